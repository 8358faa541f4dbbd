//! Pins of what can move: facts from outside (the commit of a branch) and the contents of local files, stage by stage.
//!
//! A pin holds for the parameters it was made for. Edit the revision in the recipe, and the pin says nothing any more.

use std::collections::BTreeMap;

use anyhow::ensure;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::canonical::{Digest, digest_json};
use super::fingerprint::Fingerprint;
use super::graph::Node;
use super::plan::Situation;
use super::sources::Sources;

/// What a stage's moving inputs were.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pin {
    /// The digest of the stage's kind and parameters, for which the rest holds.
    pub asked: Digest,
    /// Facts from outside.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub outside: BTreeMap<String, String>,
    /// Content digests of local files, by the path as written.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub files: BTreeMap<String, Digest>,
}

/// The pins of a recipe, by stage. Stages without moving inputs have none.
pub type Pins = BTreeMap<String, Pin>;

/// A moving input that is not where its pin says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Move {
    /// The stage.
    pub stage: String,
    /// What moved: the name of a fact, or a path as written.
    pub what: String,
    /// The pinned value; none where nothing was pinned.
    pub old: Option<String>,
    /// The value now; none where it is no longer there.
    pub new: Option<String>,
}

/// What a stage asks for: its kind and parameters, without contents and neutral settings.
fn asked(node: &Node) -> anyhow::Result<Digest> {
    let params = node.stage.params()?;
    let blank = |names: Vec<String>| {
        names
            .into_iter()
            .map(|name| (name, String::new()))
            .collect()
    };
    let (mut inputs, mut files) = (Vec::new(), Vec::new());
    for (_, marker) in super::graph::markers(&params) {
        match marker {
            super::graph::Marker::Stage { stage, .. } => inputs.push(stage),
            super::graph::Marker::File(path) => files.push(path),
            super::graph::Marker::Neutral => {}
        }
    }
    let (fingerprint, _) = Fingerprint::new(
        node.stage.as_ref(),
        &blank(inputs),
        &blank(files),
        BTreeMap::new(),
    )?;
    Ok(digest_json(&json!([fingerprint.kind, fingerprint.params])))
}

impl Situation<'_> {
    /// The facts that are pinned for a stage as it is now.
    pub(crate) fn pinned(&self, node: &Node) -> anyhow::Result<Option<&BTreeMap<String, String>>> {
        let Some(pin) = self.pins.get(&node.name) else {
            return Ok(None);
        };
        Ok((!pin.outside.is_empty() && asked(node)? == pin.asked).then_some(&pin.outside))
    }

    /// Makes sure that a local file is as it is pinned: it may have changed since [`Situation::moves`] looked.
    pub(super) fn is_pinned(&self, node: &Node, written: &str, digest: &str) -> anyhow::Result<()> {
        let pin = self.pins.get(&node.name);
        let pinned = pin.and_then(|pin| pin.files.get(written));
        ensure!(
            pinned.is_some_and(|pinned| pinned == digest),
            "`{written}` is not as the lock file pins it, and --locked asks for that"
        );
        Ok(())
    }

    /// Pins for all moving inputs: `fresh(stage)` says which are looked up anew, and not taken from the pins at hand.
    pub fn pin(&self, fresh: &dyn Fn(&str) -> bool) -> anyhow::Result<Pins> {
        // A lock file is kept for long: what it says is read, whatever is remembered.
        let mut sources = Sources::open(self.store, true);
        let mut pins = Pins::new();
        for node in &self.graph.nodes {
            let asked = asked(node)?;
            let old = self
                .pins
                .get(&node.name)
                .filter(|pin| pin.asked == asked && !fresh(&node.name));
            let pin = match old {
                Some(pin) => pin.clone(),
                None => Pin {
                    asked,
                    outside: node.stage.outside(&self.world)?,
                    files: files(node, &mut sources)?,
                },
            };
            if !pin.outside.is_empty() || !pin.files.is_empty() {
                pins.insert(node.name.clone(), pin);
            }
        }
        Ok(pins)
    }

    /// What a run would take that is not pinned so: changed files, and stages without a pin that holds. Asks nobody outside.
    pub fn moves(&self) -> anyhow::Result<Vec<Move>> {
        let mut sources = self.sources();
        let mut moves = Vec::new();
        for node in &self.graph.nodes {
            let pin = self.pins.get(&node.name);
            let holds = match pin {
                Some(pin) => pin.asked == asked(node)?,
                None => false,
            };
            let pinned_files = pin.map(|pin| pin.files.clone()).unwrap_or_default();
            for (what, new) in files(node, &mut sources)? {
                let old = pinned_files.get(&what).cloned();
                if old.as_ref() != Some(&new) {
                    moves.push(Move {
                        stage: node.name.clone(),
                        what,
                        old,
                        new: Some(new),
                    });
                }
            }
            if !holds && node.stage.moves() {
                moves.push(Move {
                    stage: node.name.clone(),
                    what: "what it takes from outside".into(),
                    old: pin.map(|_| "other parameters".into()),
                    new: None,
                });
            }
        }
        Ok(moves)
    }
}

fn files(node: &Node, sources: &mut Sources) -> anyhow::Result<BTreeMap<String, Digest>> {
    let files = node.sources.iter();
    files
        .map(|(written, path)| Ok((written.clone(), sources.digest(path, false)?.0)))
        .collect()
}

/// What differs between two sets of pins.
pub fn moved(old: &Pins, new: &Pins) -> Vec<Move> {
    let mut moves = Vec::new();
    let stages: std::collections::BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    for stage in stages {
        let values = |pins: &Pins| {
            let pin = pins.get(stage);
            let both = pin.map(|pin| pin.outside.iter().chain(&pin.files));
            let values = both.into_iter().flatten();
            values
                .map(|(what, value)| (what.clone(), value.clone()))
                .collect::<BTreeMap<_, _>>()
        };
        let (old, new) = (values(old), values(new));
        let all: std::collections::BTreeSet<&String> = old.keys().chain(new.keys()).collect();
        for what in all {
            let (old, new) = (old.get(what).cloned(), new.get(what).cloned());
            if old != new {
                moves.push(Move {
                    stage: stage.clone(),
                    what: what.clone(),
                    old,
                    new,
                });
            }
        }
    }
    moves
}
