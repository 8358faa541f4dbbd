//! What would happen: one verdict a stage, from the recipe and the store alone. Writes nothing and needs no outputs.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use serde::Serialize;

use super::RunEnv;
use super::canonical::Digest;
use super::executor::Executors;
use super::fingerprint::{Fingerprint, Origin};
use super::graph::{Graph, Node};
use super::known_results::{KnownResults, Lookup};
use super::last_results::LastResults;
use super::manifest::{Entry, Manifest};
use super::pins::Pins;
use super::reason::{Reason, differences};
use super::record::Record;
use super::remote::Shared;
use super::sources::{Seen, Sources};
use super::stat::Stat;
use super::store::{Found, Store};

/// What is true of a stage now.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum State {
    /// Its result is in the store, or in the remote.
    Fresh {
        /// The content digest.
        artifact: Digest,
        /// Whether that result is not the last one but an earlier state, which comes back for free.
        restored: bool,
        /// Whether it was made elsewhere: its record is in the remote, and its files are fetched when they are needed.
        remote: bool,
        /// Of a frozen stage, what would make it run if it were not frozen; empty if nothing would.
        #[serde(skip_serializing_if = "Option::is_none")]
        frozen: Option<Vec<Reason>>,
    },
    /// Its result is in the store and does not meet what the stage requires of it: a run fails without making it again.
    Fails {
        /// The content digest.
        artifact: Digest,
        /// Which requirement is not met.
        error: String,
    },
    /// It would run.
    Runs {
        /// Every reason.
        reasons: Vec<Reason>,
    },
    /// It depends on the bytes that stages before it will make.
    WaitsOn {
        /// Those stages.
        stages: Vec<String>,
        /// What is known to have changed whatever they make.
        reasons: Vec<Reason>,
    },
    /// Its state can not be determined.
    Unknown {
        /// Why.
        error: String,
    },
}

/// Everything that a plan or a run needs: the recipe's graph, the store, and the settings.
pub struct Session<'a> {
    /// The graph of the recipe.
    pub graph: &'a Graph,
    /// The store.
    pub store: &'a Store,
    /// The recipe's name in the store, for its last results.
    pub recipe: &'a str,
    /// Settings of the run.
    pub env: Arc<RunEnv>,
    /// The stages to run whatever the store says.
    pub forced: Vec<bool>,
    /// The pins of inputs that can change by themselves.
    pub pins: Pins,
    /// Whether a local file that is not as `pins` has it is an error.
    pub locked: bool,
    /// Whether every artifact is read and compared, not only its stats.
    pub verify: bool,
    /// The stages whose results are published as outputs.
    pub outputs: Vec<usize>,
    /// The remote, if there is one.
    pub shared: &'a Shared,
    /// What runs the stages.
    pub executors: &'a Executors,
}

/// A stage whose inputs are known, ready to be looked up or run.
pub(crate) struct Prepared {
    pub(crate) fingerprint: Fingerprint,
    pub(crate) digest: Digest,
    pub(crate) origins: BTreeMap<String, Origin>,
    pub(crate) inputs: BTreeMap<String, Digest>,
    /// Digests of local files that need not be taken again when the files are copied.
    pub(crate) known: BTreeMap<PathBuf, Entry>,
    /// What the local files and folders looked like, by the path as written.
    pub(super) seen: BTreeMap<String, Seen>,
    /// Of a frozen stage, whose last result this is, what would make it run if it were not frozen.
    pub(crate) frozen: Option<Vec<Reason>>,
}

impl Prepared {
    /// What the local files looked like when the stage was prepared.
    pub(crate) fn stats(&self) -> Vec<(OsString, Stat)> {
        let files = self.seen.values().flat_map(Seen::stats);
        files
            .map(|(path, stat)| (path.as_os_str().to_owned(), stat))
            .collect()
    }

    /// The first local file that is not as it was when the stage was prepared: by its times alone, or by the contents as well where times
    /// don't tell.
    pub(crate) fn changed(&self, node: &Node, contents: bool) -> Option<PathBuf> {
        self.seen.iter().find_map(|(written, seen)| {
            let source = node.sources.get(written)?;
            let found = if contents {
                seen.changed(source)
            } else {
                seen.moved(source)
            };
            // As the recipe has it, and what lies below.
            let found = found?;
            let below = found.strip_prefix(source).ok().map(Path::to_owned);
            Some(match below {
                Some(below) if below.as_os_str().is_empty() => PathBuf::from(written),
                Some(below) => Path::new(written).join(below),
                None => found,
            })
        })
    }
}

/// A prepared stage, looked up.
pub(crate) enum Verdict {
    Fresh {
        /// The content digest.
        artifact: Digest,
        /// Seconds the stage took.
        seconds: f64,
        restored: bool,
        /// Whether it is already known as the stage's last result.
        last: bool,
        /// New stats to remember.
        touched: Option<Manifest>,
    },
    /// The result was made elsewhere; the reasons to run if its files can't be had.
    RemoteOnly {
        record: Box<Record>,
        restored: bool,
        reasons: Vec<Reason>,
    },
    Stale(Vec<Reason>),
}

/// The current state of a stage, and what is known of it.
pub(crate) struct Inspection {
    pub(crate) state: State,
    /// What its result contains, if that is known.
    pub(crate) content: Option<Digest>,
    /// The digest of its fingerprint, if that is known.
    pub(crate) fingerprint: Option<Digest>,
    /// Whether the result was made elsewhere and its files are not here.
    pub(crate) remote_only: bool,
}

impl Session<'_> {
    /// The fingerprint of a stage whose inputs have these contents; that of its last result if it is frozen. `needed` says which stages
    /// are looked at.
    pub(crate) fn prepare(
        &self,
        index: usize,
        contents: &[Option<Digest>],
        needed: &[bool],
        sources: &mut Sources,
    ) -> anyhow::Result<Prepared> {
        if self.graph.nodes[index].handling.frozen {
            return self.prepare_frozen(index, contents, needed, sources);
        }
        let mut inputs = BTreeMap::new();
        for &input in &self.graph.inputs[index] {
            let content = contents[input]
                .clone()
                .context("an input has no contents yet")?;
            inputs.insert(self.graph.nodes[input].name.clone(), content);
        }
        self.prepare_with(index, inputs, sources)
    }

    pub(super) fn prepare_with(
        &self,
        index: usize,
        inputs: BTreeMap<String, Digest>,
        sources: &mut Sources,
    ) -> anyhow::Result<Prepared> {
        let outside = self.external_facts(&self.graph.nodes[index])?;
        self.prepare_of(index, inputs, outside, self.locked, sources)
    }

    /// The fingerprint of a stage with these inputs and facts from outside; `locked` says whether its files must be as they are pinned.
    pub(super) fn prepare_of(
        &self,
        index: usize,
        inputs: BTreeMap<String, Digest>,
        outside: BTreeMap<String, String>,
        locked: bool,
        sources: &mut Sources,
    ) -> anyhow::Result<Prepared> {
        let node = &self.graph.nodes[index];
        let (mut files, mut seen) = (BTreeMap::new(), BTreeMap::new());
        for (written, path) in &node.sources {
            let (digest, looked) = sources.digest(path, self.forced[index])?;
            if locked {
                self.is_pinned(node, written, &digest)?;
            }
            files.insert(written.clone(), digest);
            seen.insert(written.clone(), looked);
        }
        let stage = &node.stage;
        let params = stage.params()?;
        let (fingerprint, origins) = Fingerprint::new(
            stage.kind(),
            stage.version(),
            &params,
            &inputs,
            &files,
            outside,
        )?;
        let digest = fingerprint.digest();
        Ok(Prepared {
            fingerprint,
            digest,
            origins,
            inputs,
            known: BTreeMap::new(),
            seen,
            frozen: None,
        })
    }

    /// The digests of local files. With `verify` all of them are read again.
    pub(crate) fn sources(&self) -> Sources {
        Sources::open(self.store, self.verify)
    }

    /// The external facts of a stage: the pinned ones, or else the current ones. Offline, those of the last run are used if the current
    /// ones can't be found out.
    pub(super) fn external_facts(&self, node: &Node) -> anyhow::Result<BTreeMap<String, String>> {
        if let Some(pinned) = self.pinned(node)? {
            return Ok(pinned.clone());
        }
        match node.stage.external_facts(&self.env) {
            Err(error) if self.env.offline => self
                .last_record(node)
                .map(|record| record.fingerprint.outside)
                .ok_or(error),
            facts => facts,
        }
    }

    /// What the store and the remote say. An error where the store can't be read: making everything anew is no answer to that.
    pub(super) fn judge(
        &self,
        index: usize,
        prepared: &Prepared,
        (last_results, known_results): (&LastResults, &KnownResults),
    ) -> anyhow::Result<Verdict> {
        if self.forced[index] {
            return Ok(Verdict::Stale(vec![Reason::Forced]));
        }
        let node = &self.graph.nodes[index];
        let last = last_results.get(&node.name);
        let restored = last.as_ref().is_some_and(|last| *last != prepared.digest);
        let fresh = |artifact, seconds, touched| Verdict::Fresh {
            artifact,
            seconds,
            restored,
            last: last.as_ref() == Some(&prepared.digest),
            touched,
        };
        let found = match known_results.find(self.store, &prepared.digest, self.verify)? {
            Lookup::Known { artifact, seconds } => return Ok(fresh(artifact, seconds, None)),
            Lookup::Read(found) => found,
        };
        let (missing, reasons) = match found {
            Found::Hit(record, touched) => {
                return Ok(fresh(record.artifact, record.seconds, touched));
            }
            Found::Missing(record) => (Some(record), vec![Reason::ArtifactMissing]),
            Found::Damaged(_, what) => (None, vec![Reason::ArtifactDamaged { what }]),
            Found::Nothing if prepared.frozen.is_some() => (None, vec![Reason::ArtifactMissing]),
            Found::Nothing => (None, self.changes(last.as_deref(), prepared)),
        };
        let offered = self
            .shared
            .offer(self.store, &prepared.digest, missing.as_deref())?;
        Ok(match offered {
            Some(record) => Verdict::RemoteOnly {
                record: Box::new(record),
                restored,
                reasons,
            },
            None if prepared.frozen.is_some() => bail!(
                "it is frozen, and {}; `--set stages.{}.frozen=false` thaws it",
                reasons
                    .iter()
                    .map(ToString::to_string)
                    .collect::<Vec<_>>()
                    .join(", "),
                node.name
            ),
            None => Verdict::Stale(reasons),
        })
    }

    /// What changed since the last result.
    fn changes(&self, last: Option<&str>, prepared: &Prepared) -> Vec<Reason> {
        let reasons = match last.and_then(|last| self.store.record(last)) {
            Some(record) => differences(
                &record.fingerprint,
                &prepared.fingerprint,
                &prepared.origins,
            ),
            None => Vec::new(),
        };
        if reasons.is_empty() {
            vec![Reason::NeverRan]
        } else {
            reasons
        }
    }

    /// Whether a stage's result, whose files are here, meets what the stage requires.
    pub(super) fn accept(&self, index: usize, content: &Digest) -> anyhow::Result<()> {
        let stage = &self.graph.nodes[index].stage;
        if !stage.has_requirements() {
            return Ok(());
        }
        stage.accept(&self.store.artifact(content))
    }

    fn last_record(&self, node: &Node) -> Option<Record> {
        self.store
            .record(&self.store.last(self.recipe, &node.name)?)
    }

    /// The folders of a prepared stage's inputs.
    pub(crate) fn input_folders(&self, prepared: &Prepared) -> BTreeMap<String, PathBuf> {
        prepared
            .inputs
            .iter()
            .map(|(name, content)| (name.clone(), self.store.artifact(content)))
            .collect()
    }

    /// The record of a stage's last result, if it has one.
    pub fn record(&self, index: usize) -> Option<Record> {
        self.last_record(self.graph.nodes.get(index)?)
    }

    /// The record of the result that a stage has now, whoever made it: another recipe, or a stage of another name; else that of its
    /// last result.
    pub fn current_record(&self, index: usize) -> Option<Record> {
        let needed = self.graph.needed(&[index]);
        let mut inspections = self.inspect(&needed, &mut self.sources());
        let inspection = inspections.get_mut(index)?.take()?;
        let fresh = matches!(inspection.state, State::Fresh { .. } | State::Fails { .. });
        let fingerprint = inspection.fingerprint.filter(|_| fresh);
        fingerprint
            .and_then(|fingerprint| self.store.record(&fingerprint))
            .or_else(|| self.record(index))
    }

    /// The state of every stage, in the order of the recipe. Of a remote it asks records only.
    pub fn plan(&self) -> Vec<State> {
        let needed = vec![true; self.graph.nodes.len()];
        self.look(&needed, &[])
            .into_iter()
            .flatten()
            .map(|inspection| inspection.state)
            .collect()
    }

    /// Looks at the stages that `targets` need (all when empty), as a run would.
    pub(super) fn look(&self, needed: &[bool], targets: &[usize]) -> Vec<Option<Inspection>> {
        let wanted = self.wanted(needed, targets);
        let mut sources = self.sources();
        loop {
            let inspections = self.inspect(needed, &mut sources);
            let mut lacking = Vec::new();
            if !self.shared.pulls() {
                lacking = self.lacking(&inspections, &wanted, false);
            }
            for fingerprint in lacking
                .iter()
                .filter_map(|&index| known(&inspections, index))
            {
                self.shared.distrust(fingerprint);
            }
            if lacking.is_empty() {
                return inspections;
            }
        }
    }

    /// The fingerprints of these stages' results (all stages when empty) that are here.
    pub fn results(&self, targets: &[usize]) -> Vec<Digest> {
        let needed = self.graph.needed(targets);
        let inspections = self.inspect(&needed, &mut self.sources());
        let inspections = inspections.into_iter().enumerate();
        inspections
            .filter(|(index, _)| targets.is_empty() || targets.contains(index))
            .filter_map(|(_, inspection)| {
                inspection
                    .filter(|inspection| inspection.content.is_some() && !inspection.remote_only)
            })
            .filter_map(|inspection| inspection.fingerprint)
            .collect()
    }

    /// The digests of all fingerprints that are known now.
    pub fn fingerprints(&self) -> BTreeSet<Digest> {
        let needed = vec![true; self.graph.nodes.len()];
        let inspections = self.inspect(&needed, &mut self.sources());
        let known = inspections
            .into_iter()
            .flatten()
            .filter_map(|inspection| inspection.fingerprint);
        known.collect()
    }

    /// Looks at every stage that is needed.
    pub(crate) fn inspect(
        &self,
        needed: &[bool],
        sources: &mut Sources,
    ) -> Vec<Option<Inspection>> {
        let last_results = LastResults::open(self.store, self.recipe);
        let known_results = KnownResults::open(self.store, self.recipe);
        let mut contents: Vec<Option<Digest>> = vec![None; self.graph.nodes.len()];
        let mut inspections: Vec<Option<Inspection>> = Vec::new();
        inspections.resize_with(self.graph.nodes.len(), || None);
        for &index in self.graph.order.iter().filter(|&&index| needed[index]) {
            let is_frozen = self.graph.nodes[index].handling.frozen;
            let waits: Vec<_> = self.graph.inputs[index]
                .iter()
                .copied()
                .filter(|&input| !is_frozen && contents[input].is_none())
                .collect();
            let mut remote_only = false;
            let mut fingerprint = None;
            let mut frozen = None;
            let state = if waits.is_empty() {
                let judged = self
                    .prepare(index, &contents, needed, sources)
                    .and_then(|prepared| {
                        fingerprint = Some(prepared.digest.clone());
                        frozen.clone_from(&prepared.frozen);
                        self.judge(index, &prepared, (&last_results, &known_results))
                    });
                match judged {
                    Err(error) => State::Unknown {
                        error: format!("{error:#}"),
                    },
                    Ok(verdict) => {
                        remote_only = matches!(verdict, Verdict::RemoteOnly { .. });
                        match verdict {
                            Verdict::Fresh {
                                artifact, restored, ..
                            } => match self.accept(index, &artifact) {
                                Err(error) => State::Fails {
                                    artifact,
                                    error: format!("{error:#}"),
                                },
                                Ok(()) => State::Fresh {
                                    artifact,
                                    restored,
                                    remote: false,
                                    frozen,
                                },
                            },
                            Verdict::RemoteOnly {
                                record, restored, ..
                            } => State::Fresh {
                                artifact: record.artifact,
                                restored,
                                remote: true,
                                frozen,
                            },
                            Verdict::Stale(reasons) => State::Runs { reasons },
                        }
                    }
                }
            } else {
                let stages = waits
                    .iter()
                    .map(|&input| self.graph.nodes[input].name.clone())
                    .collect();
                State::WaitsOn {
                    stages,
                    reasons: self.known_changes(index, &contents, sources),
                }
            };
            if let State::Fresh { artifact, .. } = &state {
                contents[index] = Some(artifact.clone());
            }
            let content = match &state {
                State::Fails { artifact, .. } => Some(artifact.clone()),
                _ => contents[index].clone(),
            };
            inspections[index] = Some(Inspection {
                state,
                content,
                fingerprint,
                remote_only,
            });
        }
        inspections
    }

    /// What changed in a stage besides the inputs that are not made yet.
    fn known_changes(
        &self,
        index: usize,
        contents: &[Option<Digest>],
        sources: &mut Sources,
    ) -> Vec<Reason> {
        let node = &self.graph.nodes[index];
        let Some(last) = self.last_record(node) else {
            return vec![Reason::NeverRan];
        };
        let inputs = self.assumed_inputs(index, &last, contents);
        match self.prepare_with(index, inputs, sources) {
            Ok(prepared) => {
                differences(&last.fingerprint, &prepared.fingerprint, &prepared.origins)
                    .into_iter()
                    .filter(|reason| !reason.is_open())
                    .collect()
            }
            Err(_) => Vec::new(),
        }
    }

    /// The contents of a stage's inputs. One that is still open counts as unchanged: the contents that `last` had stand in.
    pub(super) fn assumed_inputs(
        &self,
        index: usize,
        last: &Record,
        contents: &[Option<Digest>],
    ) -> BTreeMap<String, Digest> {
        let assumed = |input: usize| {
            let name = &self.graph.nodes[input].name;
            let content = contents[input].clone().or_else(|| {
                let (parameter, _) = last
                    .origins
                    .iter()
                    .find(|(_, origin)| matches!(origin, Origin::Stage(stage) if stage == name))?;
                let leaf = last.fingerprint.leaves().get(parameter).cloned();
                leaf.as_ref()
                    .and_then(super::fingerprint::content)
                    .map(str::to_owned)
            });
            (name.clone(), content.unwrap_or_default())
        };
        self.graph.inputs[index]
            .iter()
            .copied()
            .map(assumed)
            .collect()
    }
}

/// The fingerprint of a stage that was looked at.
pub(crate) fn known(inspections: &[Option<Inspection>], index: usize) -> Option<&Digest> {
    inspections[index].as_ref()?.fingerprint.as_ref()
}
