//! Estimates for a stage before it runs: how long it takes, how large its result is, and where it resumes.

use std::collections::BTreeSet;

use anyhow::Context as _;
use serde::Serialize;

use super::plan::{Session, State};
use super::position::Position;
use super::stage_events::StageEvents;
use super::task::unmarked;
use super::trial::Trial;

/// The estimates for a stage.
#[derive(Debug, Clone, Serialize)]
pub struct Forecast {
    /// Its state.
    #[serde(rename = "plan")]
    pub state: State,
    /// The seconds it is likely to take: those of its last result, or what is left from where it resumes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    /// The likely size of its result in bytes: that of its last result.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Where it resumes, if an earlier run was stopped during the stage.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub goes_on: Option<Position>,
}

impl Session<'_> {
    /// The state of each stage that `targets` need (all stages when empty), in the order of the recipe, and what is to be expected of
    /// those that are not fresh. Nothing for the others. Of a remote it asks records only.
    pub fn forecast(&self, targets: &[usize]) -> Vec<Option<Forecast>> {
        let needed = self.graph.needed(targets);
        let looked = self.look(&needed, targets);
        let all = looked.into_iter().enumerate();
        let forecasts = all.map(|(index, inspection)| {
            let inspection = inspection?;
            if let State::Fresh { .. } | State::Fails { .. } = inspection.state {
                return Some(Forecast {
                    state: inspection.state,
                    seconds: None,
                    bytes: None,
                    goes_on: None,
                });
            }
            let node = &self.graph.nodes[index];
            let last = self
                .record(index)
                .filter(|last| last.fingerprint.kind == node.stage.kind());
            let goes_on = inspection.fingerprint.as_ref().and_then(|fingerprint| {
                let scratch = self.store.scratch(fingerprint);
                let known = scratch.is_dir() && !self.forced[index];
                known.then(|| node.stage.position(&scratch))?
            });
            let left = goes_on.as_ref().and_then(|position| {
                let share = |total: u64| {
                    let seconds = last.as_ref()?.seconds;
                    Some(seconds * (1.0 - position.done as f64 / total.max(1) as f64))
                };
                position.seconds_left.or_else(|| share(position.total?))
            });
            let bytes = last
                .as_ref()
                .and_then(|last| self.store.manifest(&last.artifact))
                .map(|manifest| manifest.size());
            Some(Forecast {
                state: inspection.state,
                seconds: left.or_else(|| last.map(|last| last.seconds)),
                bytes,
                goes_on,
            })
        });
        forecasts.collect()
    }

    /// Runs a stage without inputs on the first rows of its local files, in a temporary folder, to find mistakes in them. Does nothing
    /// for a stage that reads no such rows, nor for one like a stage that is among `tried`, where it is noted.
    pub fn try_first_rows(
        &self,
        index: usize,
        rows: usize,
        tried: &mut BTreeSet<String>,
    ) -> anyhow::Result<()> {
        let node = &self.graph.nodes[index];
        let Some(params) = node.stage.on_first_rows(rows) else {
            return Ok(());
        };
        // Paths in the parameters are as written, and all start at the recipe's folder or, with `--set`, at the current one.
        let key = format!("{} {params} {:?}", node.stage.kind(), node.sources);
        if !tried.insert(key) {
            return Ok(());
        }
        let folder = tempfile::tempdir().context("could not make a folder to try it in")?;
        let (sender, _unheard) = std::sync::mpsc::channel();
        let trial = Trial {
            index,
            parameters: unmarked(params),
            inputs: [].into(),
            folder: folder.path(),
            events: std::sync::Arc::new(StageEvents::new(sender)),
        };
        self.try_out(&trial).map(|_| ())
    }
}
