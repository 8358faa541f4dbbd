//! Frozen stages (`frozen: true` beside the kind): their last result is taken whatever changed, and they never run.
//!
//! A frozen stage is known by its last result's fingerprint, so everything that reads it has a fingerprint with the contents that it
//! really read: nothing stale is taken for fresh. What would make the frozen stage itself run is told wherever its state is.

use std::collections::BTreeMap;

use anyhow::{Context as _, ensure};

use super::canonical::Digest;
use super::plan::{Prepared, Session};
use super::reason::{Reason, differences};
use super::sources::Sources;

impl Session<'_> {
    /// A frozen stage as it was when its last result was made. `needed` says which stages a run looks at.
    pub(super) fn prepare_frozen(
        &self,
        index: usize,
        contents: &[Option<Digest>],
        needed: &[bool],
        sources: &mut Sources,
    ) -> anyhow::Result<Prepared> {
        let node = &self.graph.nodes[index];
        let thaw = format!("`--set stages.{}.frozen=false` thaws it", node.name);
        ensure!(
            !self.forced[index],
            "it is frozen, so it can't be forced; {thaw}"
        );
        let last = self.store.last(self.recipe, &node.name);
        let last = last.with_context(|| format!("it is frozen and has no result yet; {thaw}"))?;
        let record = self.store.record(&last).with_context(|| {
            format!("it is frozen, and the record of its last result is gone; {thaw}")
        })?;
        ensure!(
            record.output == node.stage.output(),
            "it is frozen, and its last result is `{}`, not `{}`; {thaw}",
            record.output,
            node.stage.output()
        );
        let mut reasons: Vec<Reason> = self.graph.inputs[index]
            .iter()
            .filter(|&&input| needed[input] && contents[input].is_none())
            .map(|&input| Reason::InputStale {
                stage: self.graph.nodes[input].name.clone(),
            })
            .collect();
        // Nothing from outside is asked for: that it moved makes no difference now.
        let outside = record.fingerprint.outside.clone();
        let inputs = self.assumed_inputs(index, &record, contents);
        match self.prepare_of(index, inputs, outside, false, sources) {
            Ok(now) => reasons.extend(
                differences(&record.fingerprint, &now.fingerprint, &now.origins)
                    .into_iter()
                    .filter(|reason| !reason.is_open()),
            ),
            Err(error) => reasons.push(Reason::Unknown {
                error: format!("{error:#}"),
            }),
        }
        Ok(Prepared {
            fingerprint: record.fingerprint,
            digest: last,
            origins: record.origins,
            inputs: BTreeMap::new(),
            known: BTreeMap::new(),
            seen: BTreeMap::new(),
            frozen: Some(reasons),
        })
    }

    /// The frozen stages that a stage depends on and whose results are taken though something changed; `frozen` has what changed by stage.
    pub(super) fn frozen_before(
        &self,
        index: usize,
        frozen: &BTreeMap<usize, Vec<Reason>>,
    ) -> Vec<String> {
        let changed = frozen.iter();
        let mut changed = changed
            .filter(|(_, reasons)| !reasons.is_empty())
            .peekable();
        if changed.peek().is_none() {
            return Vec::new();
        }
        let needed = self.graph.needed(&[index]);
        changed
            .filter(|(frozen, _)| needed[**frozen])
            .map(|(frozen, _)| self.graph.nodes[*frozen].name.clone())
            .collect()
    }
}
