//! The cheap stages of a recipe, tried out on a few rows in a folder that goes away.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::channel;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use tempfile::TempDir;

use crate::cli::project::Project;
use crate::data::sample::first_rows;
use crate::engine::{Artifact as _, Event, Level, Session, StageEvents, State, Trial};
use crate::report::quoted;
use crate::stages::artifacts::{Chats, Dataset, Model, Tokens};
use crate::stages::preview::{
    Row, TokenizerSource, hands_on, is_data, look, shortened, tokenizer_of_gguf, tokenizer_source,
};

/// What was seen of one stage.
pub(super) struct Tried {
    pub(super) stage: String,
    pub(super) kind: &'static str,
    pub(super) notes: BTreeMap<String, Value>,
    /// What it told, warnings apart.
    pub(super) messages: Vec<(Level, String)>,
}

/// The rows of a target.
pub(super) struct Found {
    pub(super) stage: String,
    /// Tokens, where they are made.
    pub(super) rows: Vec<Row>,
    /// Rows as JSON, where there are no tokens.
    pub(super) plain: Vec<(String, Value)>,
}

/// The stages that were tried out so far.
pub(in crate::cli::commands) struct Trials<'a> {
    pub(super) project: &'a Project,
    session: Session<'a>,
    states: Vec<State>,
    pub(super) rows: usize,
    folder: TempDir,
    done: BTreeMap<usize, PathBuf>,
    /// What was tried, in order.
    pub(super) tried: Vec<Tried>,
    /// Stages that ran and failed.
    failed: BTreeSet<usize>,
}

impl<'a> Trials<'a> {
    pub(in crate::cli::commands) fn new(project: &'a Project, rows: usize) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("pipeline-preview-")
            .tempdir();
        Ok(Self {
            project,
            session: project.session(&[]),
            states: project.plan(),
            rows,
            folder: folder.context("could not make a temporary folder")?,
            done: BTreeMap::new(),
            tried: Vec::new(),
            failed: BTreeSet::new(),
        })
    }

    fn output(&self, index: usize) -> &'static str {
        self.project.graph.nodes[index].stage.output()
    }

    /// The stages to look at: the one that is asked for, or those that make the rows which it reads; tokens rather than chats, and these
    /// rather than datasets.
    pub(super) fn targets(&self, asked: Option<usize>) -> Result<Vec<usize>> {
        let graph = &self.project.graph;
        let candidates: Vec<usize> = match asked {
            Some(index) if is_data(self.output(index)) => return Ok(vec![self.rows_of(index)?]),
            Some(index) => graph.inputs[index].clone(),
            None => graph.order.clone(),
        };
        for noun in [Tokens::NAME, Chats::NAME, Dataset::NAME] {
            let of_noun = candidates.iter().copied();
            let found: Vec<usize> = of_noun
                .filter(|index| self.output(*index) == noun)
                .collect();
            if !found.is_empty() {
                let found = found.into_iter().map(|index| self.rows_of(index));
                let mut found = found.collect::<Result<Vec<usize>>>()?;
                let mut seen = BTreeSet::new();
                found.retain(|index| seen.insert(*index));
                return Ok(found);
            }
        }
        match asked {
            Some(index) => bail!(
                "`{}` reads no rows; hint: name a stage that makes or reads a dataset",
                graph.nodes[index].name
            ),
            None => bail!("the recipe has no stage that makes rows"),
        }
    }

    /// The stage that made the rows which a stage hands on, or the stage itself.
    fn rows_of(&self, index: usize) -> Result<usize> {
        let Some(name) = hands_on(self.project.graph.nodes[index].stage.kind()) else {
            return Ok(index);
        };
        let parameters = self.session.parameters(index)?;
        self.rows_of(self.input(&parameters, name)?)
    }

    /// The first rows of a target.
    pub(super) fn look(&mut self, target: usize, count: usize) -> Result<Found> {
        let folder = self.data(target)?;
        let stage = self.project.graph.nodes[target].name.clone();
        let (mut rows, mut plain) = (Vec::new(), Vec::new());
        if self.output(target) == Tokens::NAME {
            let parameters = self.session.parameters(target)?;
            let chats = self.input(&parameters, "dataset")?;
            let tokenizer = self.input(&parameters, "tokenizer")?;
            let (chats, tokenizer) = (self.data(chats)?, self.tokenizer(tokenizer)?);
            let learns = self.learns_prompts(target);
            rows = look(parameters, &tokenizer, &chats, count, learns)?;
        } else {
            for split in crate::data::splits(&folder)?.into_keys() {
                let head = crate::data::head(&folder, &split, count)?;
                plain.extend(head.into_iter().map(|row| (split.clone(), row)));
            }
        }
        Ok(Found { stage, rows, plain })
    }

    /// Runs a stage that makes rows, and those before it, on the first rows. The error is that stage's own: nothing is said of one that can't
    /// be tried before another stage ran, or behind one that failed.
    pub(in crate::cli::commands) fn check(&mut self, index: usize) -> Result<()> {
        match self.data(index) {
            Err(error) if self.failed.contains(&index) => Err(error),
            _ => Ok(()),
        }
    }

    /// Whether every training that reads these tokens learns prompts, too.
    fn learns_prompts(&self, tokens: usize) -> bool {
        let graph = &self.project.graph;
        let reads = |index: usize| {
            let mut inputs = graph.inputs[index].iter();
            inputs.any(|input| self.rows_of(*input).ok() == Some(tokens))
        };
        let readers = (0..graph.nodes.len()).filter(|index| reads(*index));
        let setting = |index| {
            let parameters = self.session.parameters(index).ok()?;
            let trains = parameters.get("learning_rate").is_some();
            trains.then(|| parameters["completion_only_loss"] == Value::Bool(false))
        };
        let settings: Vec<bool> = readers.filter_map(setting).collect();
        !settings.is_empty() && settings.into_iter().all(|learns| learns)
    }

    fn input(&self, parameters: &Value, name: &str) -> Result<usize> {
        let stage = parameters[name].as_str().unwrap_or_default();
        let found = self.project.graph.find(stage);
        found.with_context(|| format!("there is no stage `{stage}`"))
    }

    /// The folder of a result in the store, if it is there and up to date.
    fn fresh(&self, index: usize) -> Option<PathBuf> {
        let Some(State::Fresh {
            artifact,
            remote: false,
            ..
        }) = self.states.get(index)
        else {
            return None;
        };
        let folder = self.project.store.artifact(artifact);
        folder.is_dir().then_some(folder)
    }

    /// The folder with a stage's first rows.
    fn data(&mut self, index: usize) -> Result<PathBuf> {
        let index = self.rows_of(index)?;
        if let Some(done) = self.done.get(&index) {
            return Ok(done.clone());
        }
        let stage = &self.project.graph.nodes[index].stage;
        let is_kept = stage.has_external_facts() || stage.runs_programs();
        let out = match self.fresh(index).filter(|_| is_kept) {
            // What came from the hub need not be found there again.
            Some(folder) => {
                let out = self.folder.path().join(index.to_string()).join("out");
                std::fs::create_dir_all(&out)?;
                first_rows(&folder, self.rows, &out)?;
                out
            }
            None => self.try_out(index)?,
        };
        self.done.insert(index, out.clone());
        Ok(out)
    }

    fn try_out(&mut self, index: usize) -> Result<PathBuf> {
        let graph = &self.project.graph;
        let node = &graph.nodes[index];
        if node.stage.runs_programs() {
            bail!(
                "`{}` runs a program, which is not done for a look: `pipeline run {} {}` runs it",
                node.name,
                quoted(&self.project.recipe.path.display().to_string()),
                quoted(&node.name)
            );
        }
        let mut inputs = BTreeMap::new();
        for &input in &graph.inputs[index] {
            let folder = match self.output(input) {
                noun if is_data(noun) => self.data(input)?,
                noun if noun == Model::NAME => self.tokenizer(input)?,
                _ => bail!(
                    "`{}` is not cheap, so that it can't be looked at before it ran",
                    node.name
                ),
            };
            inputs.insert(graph.nodes[input].name.clone(), folder);
        }
        let (parameters, told) = match self.session.parameters_of_first_rows(index, self.rows) {
            Some(parameters) => (parameters, None),
            None => shortened(
                node.stage.kind(),
                self.session.parameters(index)?,
                self.rows,
            ),
        };
        let (sender, events) = channel();
        let folder = self.folder.path().join(index.to_string());
        let trial = Trial {
            index,
            parameters,
            inputs,
            folder: &folder,
            events: Arc::new(StageEvents::new(sender)),
        };
        let result = self.session.try_out(&trial);
        let out = trial.out();
        drop(trial);
        if result.is_err() {
            self.failed.insert(index);
        }
        let result = result.with_context(|| format!("`{}` fails on these rows", node.name))?;
        let mut messages: Vec<(Level, String)> = told
            .into_iter()
            .map(|told| (Level::Warning, format!("{told} (`--rows` reads more)")))
            .collect();
        messages.extend(events.try_iter().filter_map(|event| match event {
            Event::Message { level, text, .. } => Some((level, text)),
            _ => None,
        }));
        self.tried.push(Tried {
            stage: node.name.clone(),
            kind: node.stage.kind(),
            notes: result.notes,
            messages,
        });
        Ok(out)
    }

    /// A folder with the tokenizer of the model that a stage makes, and with what else is beside it.
    fn tokenizer(&mut self, index: usize) -> Result<PathBuf> {
        if let Some(done) = self.done.get(&index) {
            return Ok(done.clone());
        }
        if let Some(folder) = self.fresh(index) {
            self.done.insert(index, folder.clone());
            return Ok(folder);
        }
        let node = &self.project.graph.nodes[index];
        let parameters = self.session.parameters(index)?;
        let source = tokenizer_source(node.stage.kind(), &parameters, &self.project.env)?;
        let folder = match source {
            Some(TokenizerSource::Folder(folder)) => folder,
            Some(TokenizerSource::Source(written)) => {
                let found = node.sources.get(&written).cloned();
                found.with_context(|| format!("`{written}` is no folder"))?
            }
            Some(TokenizerSource::Made) => self.try_out(index)?,
            Some(TokenizerSource::Stage(stage)) => {
                let found = self.project.graph.find(&stage);
                self.tokenizer(found.with_context(|| format!("there is no stage `{stage}`"))?)?
            }
            None => bail!(
                "the tokenizer of `{}` is not known before it ran",
                node.name
            ),
        };
        let folder = if folder.is_file() {
            let out = self.folder.path().join(format!("tokenizer-{index}"));
            std::fs::create_dir_all(&out)?;
            tokenizer_of_gguf(&folder, &out)
                .with_context(|| format!("the tokenizer of `{}` can't be made", node.name))?;
            out
        } else {
            folder
        };
        self.done.insert(index, folder.clone());
        Ok(folder)
    }
}
