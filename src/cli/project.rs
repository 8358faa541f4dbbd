//! A recipe with its surroundings: the project it belongs to, its store, and the settings of the process.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::args::{RecipeArgs, StoreArgs};
use super::confine::{self, Bounds};
use super::executors::Clusters;
use super::folders::{normal, root};
use super::includes::{Finder, IncludePins};
use super::remote::{self, RemoteArgs};
use super::{Failure, eprint_warning, error, lock_file, machine, variable};
use crate::engine::glob::Pattern;
use crate::engine::remote::Shared;
use crate::engine::{
    EventLog, Executors, Graph, Jobs, LOCAL, LoggedEvent, Node, Outcome, Pins, Record, Run, RunEnv,
    RunLabel, Session, State, Store, canonical_json, declared,
};
use crate::recipe::{Recipe, RecipeErrors, RecipeStage, Var};
use crate::report::{RecipeNames, StagePlaces, quoted};
use crate::stages::KINDS;
use crate::stages::foresight::{self, Planned};

/// Reads a recipe; all its mistakes are rendered.
pub(super) fn load(args: &RecipeArgs) -> Result<Recipe, Failure> {
    let env = run_env(false);
    let pins = lock_file::read(&args.recipe)?.unwrap_or_default().1;
    Ok(load_with(args, None, &env, pins)?.recipe)
}

/// A recipe with those that it includes, as far as they are on this machine: nothing is asked of a network, and no mistake is told.
pub(super) fn load_at_hand(args: &RecipeArgs) -> Option<Recipe> {
    let env = RunEnv {
        on_warning: None,
        ..run_env(true)
    };
    let pins = lock_file::read(&args.recipe).ok()?.unwrap_or_default().1;
    Some(load_with(args, None, &env, pins).ok()?.recipe)
}

/// The vars of a recipe, whether all that need a value have one or not.
pub(super) fn load_vars(args: &RecipeArgs, offline: bool) -> Result<Vec<Var>, Failure> {
    let (here, env) = (here()?, run_env(offline));
    let pins = lock_file::read(&args.recipe)?.unwrap_or_default().1;
    let location = RecipeLocation::of(args, &here);
    let finder = location.finder(&env, pins);
    crate::recipe::load_vars(&args.recipe, &args.changes(), KINDS, &finder)
        .map_err(|errors| Failure::Usage(error::render(&errors)))
}

/// Where a recipe is, and what the recipes that it includes may lie in.
struct RecipeLocation {
    folder: PathBuf,
    allowed: Vec<PathBuf>,
}

impl RecipeLocation {
    fn of(args: &RecipeArgs, here: &Path) -> Self {
        let file = normal(&here.join(&args.recipe));
        let folder = file.parent().unwrap_or(here).to_owned();
        let mut allowed = vec![root(&folder)];
        allowed.extend(confine::besides(args, here));
        Self { folder, allowed }
    }

    fn finder<'a>(&'a self, env: &'a RunEnv, pins: IncludePins) -> Finder<'a> {
        let advice = confine::advice(self.allowed.first().unwrap_or(&self.folder));
        Finder::new(&self.folder, &self.allowed, advice, env, pins)
    }
}

/// A recipe with what it may read and write, and the recipes that it includes.
struct Loaded {
    recipe: Recipe,
    bounds: Bounds,
    included: IncludePins,
}

/// Reads a recipe whose results go to `store`.
fn load_with(
    args: &RecipeArgs,
    store: Option<&Path>,
    env: &RunEnv,
    pins: IncludePins,
) -> Result<Loaded, Failure> {
    let here = here()?;
    let location = RecipeLocation::of(args, &here);
    let finder = location.finder(env, pins);
    crate::recipe::load_with(&args.recipe, &args.changes(), KINDS, &finder)
        .and_then(|recipe| {
            let bounds = Bounds::new(&recipe, args, &here, store);
            confine::check(&recipe, &bounds)?;
            foresee(&recipe, &here)?;
            Ok(Loaded {
                recipe,
                bounds,
                included: finder.found(),
            })
        })
        .map_err(|errors| Failure::Usage(error::render(&errors)))
}

/// Refuses the recipe if something in it is certain to fail.
fn foresee(recipe: &Recipe, here: &Path) -> Result<(), RecipeErrors> {
    let mut located = Located::new(recipe, here);
    let planned: Vec<Planned<'_>> = recipe
        .stages
        .iter()
        .map(|stage| Planned {
            name: &stage.name,
            stage: stage.stage.as_ref(),
            files: located.sources(stage),
        })
        .collect();
    let errors = foresight::foresee(&planned).into_iter().filter_map(|told| {
        let kind = recipe.stage(&told.stage)?.kind.name;
        let path = format!("stages.{}.{kind}.{}", told.stage, told.parameter);
        Some(confine::error(recipe, &path, told.message, told.hint))
    });
    let mut errors: Vec<_> = errors.collect();
    errors.extend(recipe.stages.iter().filter_map(|stage| {
        let message = without_mpi(stage.handling.resources.processes())?;
        let path = format!("stages.{}.resources.processes", stage.name);
        let hint = "install an MPI (on Debian the packages libopenmpi-dev, openmpi-bin and libclang-dev) and build it with \
                    `cargo build --release --features mpi`";
        Some(confine::error(recipe, &path, message, hint.to_owned()))
    }));
    errors.sort_by_key(|error| error.span.map(|span| (span.line, span.column)));
    if errors.is_empty() {
        Ok(())
    } else {
        Err(RecipeErrors(errors))
    }
}

/// Why this build can't run a stage as so many processes, if it can't.
fn without_mpi(processes: usize) -> Option<String> {
    (processes > 1 && !cfg!(feature = "mpi")).then(|| {
        format!(
            "this build of pipeline has no MPI, by which {processes} processes would find each other"
        )
    })
}

fn here() -> Result<PathBuf, Failure> {
    let here = std::env::current_dir();
    Ok(here.map_err(|error| anyhow::anyhow!("there is no current folder: {error}"))?)
}

/// A recipe in its project.
pub(super) struct Project {
    pub(super) recipe: Recipe,
    pub(super) graph: Graph,
    pub(super) store: Store,
    pub(super) env: Arc<RunEnv>,
    /// The project's folder.
    pub(super) root: PathBuf,
    /// Where it may read and write.
    pub(super) bounds: Bounds,
    /// What the lock file pins; nothing without one.
    pub(super) pins: Pins,
    /// The included recipes that it pins.
    pub(super) include_pins: IncludePins,
    /// The included recipes as they were read.
    pub(super) included: IncludePins,
    /// The name of the recipe in the store.
    key: String,
    /// Whether only what the lock file pins may be read.
    pub(super) locked: bool,
    verify: bool,
    /// The remote; none until one is connected.
    pub(super) shared: Shared,
    executors: Executors,
}

impl Project {
    pub(super) fn open(args: &RecipeArgs, settings: &StoreArgs) -> Result<Self, Failure> {
        Self::open_with(args, settings, false)
    }

    /// The same; with `anew`, branches of included recipes are what they are now and not what the lock file pins.
    pub(super) fn open_with(
        args: &RecipeArgs,
        settings: &StoreArgs,
        anew: bool,
    ) -> Result<Self, Failure> {
        let (pins, include_pins) = lock_file::read(&args.recipe)?.unwrap_or_default();
        let env = Arc::new(run_env(settings.offline));
        let taken = if anew {
            IncludePins::new()
        } else {
            include_pins.clone()
        };
        let loaded = load_with(args, settings.store.as_deref(), &env, taken)?;
        let Loaded {
            recipe,
            bounds,
            included,
        } = loaded;
        let here = here()?;
        let file = normal(&here.join(&recipe.path));
        let folder = file.parent().unwrap_or(&here).to_owned();
        let root = root(&folder);
        let mut located = Located::new(&recipe, &here);
        let nodes = recipe
            .stages
            .iter()
            .map(|stage| Node {
                name: stage.name.clone(),
                stage: Arc::clone(&stage.stage),
                sources: located.sources(stage),
                handling: stage.handling.clone(),
            })
            .collect();
        // A loaded recipe has no cycle and no open edge.
        let graph = Graph::new(nodes).map_err(anyhow::Error::from)?;
        let store = match &settings.store {
            Some(store) => here.join(store),
            None => own_store(
                &root,
                &|real| bounds.allows(real),
                &format!(", or {}", bounds.advice()),
            )?,
        };
        let elsewhere = |stage: &RecipeStage| {
            let executor = stage.handling.executor.as_deref();
            executor.is_some_and(|name| name != LOCAL)
        };
        if recipe.stages.iter().any(elsewhere) {
            Clusters::read(&root)?.check(&recipe)?;
        }
        Ok(Self {
            pins,
            include_pins,
            included,
            key: key(file.strip_prefix(&root).unwrap_or(&file)),
            recipe,
            graph,
            store: Store::new(&store),
            executors: Executors::new(KINDS, Arc::clone(&env), own_program()),
            env,
            root,
            bounds,
            locked: false,
            verify: settings.verify,
            shared: Shared::none(),
        })
    }

    /// Uses the remote that the command line, the environment or the project names, if any.
    pub(super) fn connect(&mut self, args: &RemoteArgs, no_push: bool) -> Result<(), Failure> {
        self.shared = args.open(&self.root, self.env.offline, !no_push)?;
        Ok(())
    }

    /// Makes the project's clusters ready for a run. With `executor` all stages run there, whatever the recipe says.
    pub(super) fn use_clusters(&mut self, executor: Option<&str>) -> Result<(), Failure> {
        let clusters = Clusters::read(&self.root)?;
        if let Some(name) = executor {
            clusters.check_name(name)?;
            for node in &mut self.graph.nodes {
                node.handling.executor = Some(name.to_owned());
            }
        }
        let (store, shared) = (&self.store, &self.shared);
        clusters.add_to(&mut self.executors, &self.recipe.path, store, shared)
    }

    /// The jobs of a run on clusters.
    pub(super) fn jobs(&self) -> &Arc<Jobs> {
        self.executors.jobs()
    }

    /// What there is to say of the remote; an error if it is required and failed.
    pub(super) fn report_warnings(&self) -> Result<(), Failure> {
        remote::report_warnings(&self.shared)
    }

    /// The session that plans and runs look at.
    pub(super) fn session(&self, forced: &[usize]) -> Session<'_> {
        let mut force = vec![false; self.graph.nodes.len()];
        for &index in forced {
            force[index] = true;
        }
        Session {
            graph: &self.graph,
            store: &self.store,
            recipe: &self.key,
            env: Arc::clone(&self.env),
            forced: force,
            pins: self.pins.clone(),
            locked: self.locked,
            verify: self.verify,
            outputs: self
                .recipe
                .outputs
                .iter()
                .filter_map(|output| self.graph.find(&output.stage))
                .collect(),
            shared: &self.shared,
            executors: &self.executors,
        }
    }

    /// The state of every stage.
    pub(super) fn plan(&self) -> Vec<State> {
        self.session(&[]).plan()
    }

    /// The position of the one stage that a name on the command line means.
    pub(super) fn find(&self, name: &str) -> Result<usize, Failure> {
        match self.find_several(name)?[..] {
            [one] => Ok(one),
            ref several => {
                let message = format!("`{name}` is {} stages", several.len());
                let hint = format!("name one of {}", self.names(several));
                Err(Failure::Usage(error::with_hint(&message, &hint)))
            }
        }
    }

    /// The positions of the stages that a name on the command line means: with a matrix they may be several.
    fn find_several(&self, name: &str) -> Result<Vec<usize>, Failure> {
        let found = self.recipe.matching(name);
        if !found.is_empty() {
            return Ok(found);
        }
        let left_out = &self.recipe.left_out;
        if let Some(left) = left_out.iter().find(|left| left.name == name) {
            let message = format!("`{name}` is left out: its `when` is false");
            let place = left
                .span
                .map(|span| format!(" ({})", self.recipe.place(span)));
            let hint = format!("that is `when: {}`{}", left.when, place.unwrap_or_default());
            return Err(Failure::Usage(error::with_hint(&message, &hint)));
        }
        let of = declared(name);
        let relatives = self.recipe.matching(of);
        let hint = if of != name && !relatives.is_empty() {
            format!("of `{of}` there is {}", self.names(&relatives))
        } else if let Some(near) = self.recipe.suggest(name) {
            format!("did you mean `{near}`?")
        } else {
            let all: Vec<usize> = (0..self.recipe.stages.len()).collect();
            format!("its stages are {}", self.names(&all))
        };
        let message = format!("`{}` has no stage `{name}`", self.recipe.path.display());
        Err(Failure::Usage(error::with_hint(&message, &hint)))
    }

    /// The names of stages in a sentence.
    fn names(&self, stages: &[usize]) -> String {
        const MOST: usize = 100;
        let names = stages.iter().take(MOST);
        let names = names.filter_map(|index| Some(self.recipe.stages.get(*index)?.name.clone()));
        let mut names: Vec<String> = names.collect();
        if let Some(more) = stages.len().checked_sub(MOST).filter(|more| *more > 0) {
            names.push(format!("and {more} more"));
        }
        names.join(", ")
    }

    /// The record of a stage's result now, or of its last one when it is stale.
    pub(super) fn record_of(&self, index: usize) -> Option<Record> {
        self.session(&[]).current_record(index)
    }

    /// The runs of the recipe, the oldest first.
    pub(super) fn runs(&self) -> Vec<Run> {
        self.store.runs(&self.key)
    }

    /// Names and tags one of its runs.
    pub(super) fn label_run(&self, number: u64, label: &RunLabel) -> anyhow::Result<()> {
        self.store.label_run(&self.key, number, label)
    }

    /// The log of a run that begins now.
    pub(super) fn event_log(&self) -> EventLog {
        EventLog::new(&self.store, &self.key)
    }

    /// The events of one of its runs; none if they are not kept any more.
    pub(super) fn events(&self, run: u64) -> Option<impl Iterator<Item = LoggedEvent> + use<>> {
        self.store.events(&self.key, run)
    }

    /// The events so far of a run of the recipe that is in progress; none if there is no such run.
    pub(super) fn running_events(&self) -> Option<Vec<LoggedEvent>> {
        let runs = self.runs();
        let running = runs
            .iter()
            .rev()
            .find(|run| run.outcome == Outcome::Running)?;
        Some(self.events(running.number)?.collect())
    }

    /// How a command names the recipe, and where each stage stands in it, for messages.
    pub(super) fn recipe_names(&self, args: &RecipeArgs) -> RecipeNames {
        let path = self.recipe.path.display();
        let stages = self.recipe.stages.iter();
        let changes = args.changes();
        let set = changes.iter().map(|set| {
            let assignment = format!("{}={}", set.path, set.value);
            format!(" --set {}", quoted(&assignment))
        });
        RecipeNames {
            recipe: quoted(&path.to_string()),
            set: set.collect(),
            stages: stages.map(|stage| stage.name.clone()).collect(),
            place: StagePlaces::new(self.recipe.places()),
        }
    }

    /// The text of a file that a stage reads now.
    pub(super) fn file(&self, stage: &str, written: &str) -> Option<String> {
        let node = self.graph.nodes.get(self.graph.find(stage)?)?;
        std::fs::read_to_string(node.sources.get(written)?).ok()
    }

    /// What a stage noted about the rows of one of its results.
    pub(super) fn rows_of(&self, stage: &str, content: &str) -> Option<String> {
        let of_stage = |run: &Run| run.stages.get(stage).cloned();
        let stages = self
            .runs()
            .iter()
            .rev()
            .filter_map(of_stage)
            .collect::<Vec<_>>();
        let made = stages
            .into_iter()
            .find(|made| made.artifact.as_deref() == Some(content))?;
        let record = self.store.record(&made.fingerprint)?;
        Some(canonical_json(record.notes.get("rows")?))
    }

    /// The positions of the stages to run: those that are named, and those of `downstream` with all that depend on them.
    pub(super) fn targets(
        &self,
        names: &[String],
        downstream: &[String],
    ) -> Result<Vec<usize>, Failure> {
        let mut targets = self.find_all(names)?;
        for index in self.graph.downstream(&self.find_all(downstream)?) {
            if !targets.contains(&index) {
                targets.push(index);
            }
        }
        Ok(targets)
    }

    /// The positions of all stages that names on the command line mean, each once.
    pub(super) fn find_all(&self, names: &[String]) -> Result<Vec<usize>, Failure> {
        let mut all = Vec::new();
        for name in names {
            for index in self.find_several(name)? {
                if !all.contains(&index) {
                    all.push(index);
                }
            }
        }
        Ok(all)
    }
}

/// The store of a project. One behind a link that somebody else may have made is asked for by name, and so is one whose folders are
/// such links. What lies deeper is compared with its digest, whoever made it.
pub(super) fn own_store(
    root: &Path,
    allows: &dyn Fn(&Path) -> bool,
    advice: &str,
) -> Result<PathBuf, Failure> {
    let store = root.join(".pipeline");
    let below = |folder: &PathBuf| {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect::<Vec<_>>()
    };
    let formats = below(&store);
    let folders: Vec<PathBuf> = formats.iter().flat_map(below).collect();
    let leaves =
        |path: &&PathBuf| path.is_symlink() && !path.canonicalize().is_ok_and(|real| allows(&real));
    let all = std::iter::once(&store).chain(&formats).chain(&folders);
    if let Some(link) = all.into_iter().find(leaves) {
        let message = format!("`{}` is a link that leaves the project", link.display());
        let hint = format!("name the store by `--store DIR`{advice}");
        return Err(Failure::Usage(error::with_hint(&message, &hint)));
    }
    Ok(store)
}

/// Where files are: those written in a recipe start at its folder, those of `--set` at the current one. A file that many stages read is
/// looked for once.
struct Located<'a> {
    recipe: &'a Recipe,
    here: &'a Path,
    /// The paths found, by the file as it is written and where that is.
    found: BTreeMap<(Option<usize>, &'a str), PathBuf>,
}

impl<'a> Located<'a> {
    fn new(recipe: &'a Recipe, here: &'a Path) -> Self {
        Self {
            recipe,
            here,
            found: BTreeMap::new(),
        }
    }

    /// The paths of the files of a stage, as they are written.
    fn sources(&mut self, stage: &'a RecipeStage) -> BTreeMap<String, PathBuf> {
        let mut paths = BTreeMap::new();
        for file in &stage.files {
            let start = || confine::start(self.recipe, file, self.here);
            let path = self.found.entry((file.start, file.path.as_str()));
            let path = path.or_insert_with(|| real(&normal(&start().join(&file.path))));
            paths.insert(file.path.clone(), path.clone());
        }
        paths
    }
}

/// A path with links resolved: one that is turned elsewhere from now on changes nothing.
fn real(path: &Path) -> PathBuf {
    let real = match Pattern::parse(path) {
        None => path.canonicalize(),
        Some(pattern) => {
            let folder = pattern.folder().canonicalize();
            folder.map(|folder| pattern.below(&folder))
        }
    };
    real.unwrap_or_else(|_| path.to_owned())
}

/// A readable name for a recipe's file that no other file of the project has.
fn key(file: &Path) -> String {
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    let stem: String = stem
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || c == '-' {
                c
            } else {
                '_'
            }
        })
        .take(40)
        .collect();
    let digest = blake3::hash(file.as_os_str().as_encoded_bytes()).to_hex();
    format!("{stem}-{}", &digest[..8])
}

/// The surroundings of a run, with the variables that the hub's settings read.
pub(super) fn run_env(offline: bool) -> RunEnv {
    let variables: BTreeMap<String, String> = crate::hub::VARIABLES
        .iter()
        .filter_map(|name| Some(((*name).to_owned(), variable(name)?)))
        .collect();
    let forced = crate::hub::is_offline(&|name| variables.get(name).cloned());
    RunEnv {
        offline: offline || forced,
        memory: machine::memory_of_process(),
        home: std::env::home_dir(),
        variables,
        lookup: Some(variable),
        on_warning: Some(eprint_warning),
        ..RunEnv::default()
    }
}

/// The running program, to be started once more for each stage: on Linux the very file, wherever it was moved since.
pub(super) fn own_program() -> Option<PathBuf> {
    let own = PathBuf::from("/proc/self/exe");
    if own.exists() {
        return Some(own);
    }
    std::env::current_exe().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recipes_of_one_name_have_different_keys() {
        assert_ne!(key(Path::new("a/orpo.yaml")), key(Path::new("b/orpo.yaml")));
        assert!(key(Path::new("a/über x.yaml")).starts_with("_ber_x-"));
    }
}
