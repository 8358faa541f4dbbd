//! Stages outside of a run: tried out with other parameters or inputs, or asked what they would take. Nothing is written to the store.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::control::Control;
use super::executor::TaskResult;
use super::graph::Node;
use super::part::Part;
use super::plan::Session;
use super::stage_events::StageEvents;
use super::task::{TASK_VERSION, Task, memory, unmarked};
use super::{Context, Estimate};

/// A stage to be tried out.
pub struct Trial<'a> {
    /// The number of the stage in the graph.
    pub index: usize,
    /// Its parameters as a recipe has them; see [`Session::parameters`].
    pub parameters: Value,
    /// The folders of its inputs, by the names of their stages.
    pub inputs: BTreeMap<String, PathBuf>,
    /// An empty folder for all it writes.
    pub folder: &'a Path,
    /// Where its events go.
    pub events: Arc<StageEvents>,
}

impl Trial<'_> {
    /// The folder with the result.
    pub fn out(&self) -> PathBuf {
        self.folder.join("out")
    }
}

impl Session<'_> {
    /// The parameters of a stage as a recipe has them, with defaults.
    pub fn parameters(&self, index: usize) -> anyhow::Result<Value> {
        let params = self.graph.nodes[index].stage.params()?;
        Ok(unmarked(Arc::unwrap_or_clone(params)))
    }

    /// The parameters of [`super::Stage::on_first_rows`] as a recipe has them.
    pub fn parameters_of_first_rows(&self, index: usize, rows: usize) -> Option<Value> {
        let parameters = self.graph.nodes[index].stage.on_first_rows(rows)?;
        Some(unmarked(parameters))
    }

    /// Runs a stage in its usual place of execution, and gives what it noted. It can be interrupted as a run can.
    ///
    /// # Errors
    /// Those of the stage.
    pub fn try_out(&self, trial: &Trial<'_>) -> anyhow::Result<TaskResult> {
        let node = &self.graph.nodes[trial.index];
        let mut task = self.trial_task(node, &trial.inputs, trial.folder)?;
        task.params = trial.parameters.clone();
        task.outside = self.external_facts(node)?;
        std::fs::create_dir_all(trial.out())?;
        let control = Control::new(Arc::clone(&self.env.cancel), node.handling.timeout);
        let executor = self.executors.for_stage(&node.handling.resources);
        executor.execute(&task, &trial.events, &control)
    }

    /// What running a stage on these inputs would take, if it can tell.
    ///
    /// # Errors
    /// An input can't be read, or is not what the stage needs.
    pub fn estimate(
        &self,
        index: usize,
        inputs: &BTreeMap<String, PathBuf>,
    ) -> anyhow::Result<Option<Estimate>> {
        let node = &self.graph.nodes[index];
        // It writes nothing, so these folders need not be there.
        let task = self.trial_task(node, inputs, Path::new(""))?;
        let (sender, _) = std::sync::mpsc::channel();
        let events = Arc::new(StageEvents::new(sender));
        let context = Context::new(&task, Arc::clone(&self.env), events, Control::default());
        node.stage.estimate(&context)
    }

    fn trial_task(
        &self,
        node: &Node,
        inputs: &BTreeMap<String, PathBuf>,
        folder: &Path,
    ) -> anyhow::Result<Task> {
        let paths = |paths: &BTreeMap<String, PathBuf>| {
            let entries = paths.iter();
            entries
                .map(|(name, path)| (name.clone(), path.clone().into_os_string()))
                .collect()
        };
        let resources = &node.handling.resources;
        Ok(Task {
            version: TASK_VERSION,
            pipeline: env!("CARGO_PKG_VERSION").to_owned(),
            stage: node.name.clone(),
            kind: node.stage.kind().to_owned(),
            params: unmarked(Arc::unwrap_or_clone(node.stage.params()?)),
            exclusive: node.stage.exclusive(),
            offline: self.env.offline,
            cpus: resources.cpus,
            // It looks at what one process would take.
            processes: None,
            part: Part::Whole,
            memory: memory(node.stage.bounded(), resources),
            gpus: Vec::new(),
            device: node.handling.device,
            resources: resources.clone(),
            timeout: node.handling.timeout,
            variables: node.stage.variables(),
            inputs: paths(inputs),
            sources: paths(&node.sources),
            outside: BTreeMap::new(),
            out: folder.join("out").into_os_string(),
            scratch: folder.join("scratch").into_os_string(),
            scratch_note: Vec::new(),
            continuations: None,
            known: Vec::new(),
            seen: Vec::new(),
            warned: self.env.warnings(),
        })
    }
}
