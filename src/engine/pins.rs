//! Pins of inputs that can change by themselves, stage by stage: external facts (the commit of a branch) and the contents of local files.
//!
//! A pin is valid for the parameters it was made for. If the revision in the recipe is edited, the pin is ignored.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::canonical::Digest;

/// The inputs of a stage that can change by themselves, as they were when they were pinned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pin {
    /// The digest of the stage's kind and parameters for which the pin is valid.
    pub asked: Digest,
    /// External facts (see [`super::Stage::external_facts`]).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub outside: BTreeMap<String, String>,
    /// Content digests of local files, by the path as written.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub files: BTreeMap<String, Digest>,
}

/// The pins of a recipe, by stage. Stages whose inputs can't change by themselves have none.
pub type Pins = BTreeMap<String, Pin>;

/// An input that differs from its pin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PinChange {
    /// The stage.
    pub stage: String,
    /// What moved: the name of a fact, or a path as written.
    pub what: String,
    /// The pinned value; none where nothing was pinned.
    pub old: Option<String>,
    /// The value now; none where it is no longer there.
    pub new: Option<String>,
}

/// What differs between two sets of pins.
pub fn pin_changes(old: &Pins, new: &Pins) -> Vec<PinChange> {
    let mut changes = Vec::new();
    let stages: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
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
        let all: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
        for what in all {
            let (old, new) = (old.get(what).cloned(), new.get(what).cloned());
            if old != new {
                changes.push(PinChange {
                    stage: stage.clone(),
                    what: what.clone(),
                    old,
                    new,
                });
            }
        }
    }
    changes
}
