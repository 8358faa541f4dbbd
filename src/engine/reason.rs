//! Why a stage runs: every reason, with the old and the new value.

use std::collections::BTreeMap;
use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::canonical::canonical_json;
use super::fingerprint::{Fingerprint, Origin, content};

/// One reason for running a stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "reason", rename_all = "snake_case")]
pub enum Reason {
    /// This stage of this recipe has no earlier result here.
    NeverRan,
    /// `--force` names the stage.
    Forced,
    /// The stage was of another kind.
    KindChanged {
        /// The kind of the last run.
        old: String,
        /// The kind now.
        new: String,
    },
    /// The code of the kind changed.
    VersionChanged {
        /// The version of the last run.
        old: u32,
        /// The version now.
        new: u32,
    },
    /// A parameter changed; `None` where it was, or is, not set.
    ParameterChanged {
        /// The path below the kind.
        parameter: String,
        /// The last run's value.
        old: Option<Value>,
        /// The value now.
        new: Option<Value>,
    },
    /// An input has other contents than in the last run.
    InputChanged {
        /// The parameter that names the input.
        parameter: String,
        /// The stage that makes it.
        stage: String,
        /// The last run's content digest.
        old: Option<String>,
        /// The content digest now.
        new: String,
    },
    /// A local file has other contents than in the last run.
    FileChanged {
        /// The parameter that names the file.
        parameter: String,
        /// The path as written.
        path: String,
        /// The last run's content digest.
        old: Option<String>,
        /// The content digest now.
        new: String,
    },
    /// A fact from outside changed, such as the commit of a branch.
    OutsideChanged {
        /// What it is.
        what: String,
        /// The last run's value.
        old: Option<String>,
        /// The value now.
        new: Option<String>,
    },
    /// An input is made anew. Told of frozen stages only, which don't wait for it.
    InputStale {
        /// The stage that makes it.
        stage: String,
    },
    /// What changed can't be told. Told of frozen stages only.
    Unknown {
        /// Why.
        error: String,
    },
    /// The result is recorded but no longer in the store.
    ArtifactMissing,
    /// The result in the store is not what was recorded.
    ArtifactDamaged {
        /// What is wrong, naming the file.
        what: String,
    },
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NeverRan => write!(f, "first run"),
            Self::Forced => write!(f, "it is forced"),
            Self::KindChanged { old, new } => write!(f, "its kind changed from `{old}` to `{new}`"),
            Self::VersionChanged { old, new } => {
                write!(f, "the stage's code changed from version {old} to {new}")
            }
            Self::ParameterChanged {
                parameter,
                old,
                new,
            } => {
                write!(
                    f,
                    "`{parameter}` changed from {} to {}",
                    shown(old.as_ref()),
                    shown(new.as_ref())
                )
            }
            Self::InputChanged {
                parameter,
                stage,
                old,
                new,
            } => {
                write!(
                    f,
                    "the contents of `{stage}` (`{parameter}`) changed from {} to {}",
                    short(old.as_deref()),
                    short(Some(new))
                )
            }
            Self::FileChanged {
                parameter,
                path,
                old,
                new,
            } => {
                write!(
                    f,
                    "the file `{path}` (`{parameter}`) changed from {} to {}",
                    short(old.as_deref()),
                    short(Some(new))
                )
            }
            Self::OutsideChanged { what, old, new } => {
                write!(
                    f,
                    "{what} moved from {} to {}",
                    short(old.as_deref()),
                    short(new.as_deref())
                )
            }
            Self::InputStale { stage } => write!(f, "`{stage}`, which it takes, is made anew"),
            Self::Unknown { error } => write!(f, "what changed can't be told: {error}"),
            Self::ArtifactMissing => write!(f, "its result is gone from the store"),
            Self::ArtifactDamaged { what } => write!(f, "its result is damaged: {what}"),
        }
    }
}

impl Reason {
    /// Whether it is only that an input is not known yet.
    pub(crate) fn is_open(&self) -> bool {
        matches!(self, Self::InputChanged { new, .. } if new.is_empty())
    }
}

fn shown(value: Option<&Value>) -> String {
    const LONGEST: usize = 60;
    let Some(value) = value else {
        return "not set".into();
    };
    let text = canonical_json(value);
    if text.chars().count() <= LONGEST {
        return text;
    }
    text.chars().take(LONGEST - 1).chain(['…']).collect()
}

/// The first digits of a digest: enough to tell two apart.
pub fn short(digest: Option<&str>) -> String {
    digest.map_or_else(
        || "nothing".into(),
        |digest| digest.chars().take(10).collect(),
    )
}

/// All differences between the last run's fingerprint and the one now.
pub(crate) fn differences(
    old: &Fingerprint,
    new: &Fingerprint,
    origins: &BTreeMap<String, Origin>,
) -> Vec<Reason> {
    let mut reasons = Vec::new();
    if old.kind != new.kind {
        // Parameters of two kinds have nothing in common.
        return vec![Reason::KindChanged {
            old: old.kind.clone(),
            new: new.kind.clone(),
        }];
    }
    if old.version != new.version {
        reasons.push(Reason::VersionChanged {
            old: old.version,
            new: new.version,
        });
    }
    let (old_leaves, new_leaves) = (old.leaves(), new.leaves());
    let parameters: std::collections::BTreeSet<_> =
        old_leaves.keys().chain(new_leaves.keys()).collect();
    for parameter in parameters {
        let (old, new) = (old_leaves.get(parameter), new_leaves.get(parameter));
        if old == new {
            continue;
        }
        let parameter = parameter.clone();
        let old_content = old.and_then(content).map(str::to_owned);
        reasons.push(
            match (
                new.and_then(content).map(str::to_owned),
                origins.get(&parameter),
            ) {
                (Some(new), Some(Origin::Stage(stage))) => Reason::InputChanged {
                    parameter,
                    stage: stage.clone(),
                    old: old_content,
                    new,
                },
                (Some(new), Some(Origin::File(path))) => Reason::FileChanged {
                    parameter,
                    path: path.clone(),
                    old: old_content,
                    new,
                },
                _ => Reason::ParameterChanged {
                    parameter,
                    old: old.cloned(),
                    new: new.cloned(),
                },
            },
        );
    }
    let facts: std::collections::BTreeSet<_> =
        old.outside.keys().chain(new.outside.keys()).collect();
    for what in facts {
        let (old, new) = (old.outside.get(what), new.outside.get(what));
        if old != new {
            reasons.push(Reason::OutsideChanged {
                what: what.clone(),
                old: old.cloned(),
                new: new.cloned(),
            });
        }
    }
    reasons
}
