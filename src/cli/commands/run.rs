//! `run`: runs what is out of date and writes the outputs.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::Instant;

use anyhow::Context as _;

use crate::cli::args::{RecipeArgs, StoreArgs};
use crate::cli::console::{Output, look_of_errors, verbosity};
use crate::cli::leaving::{self, on_interrupt};
use crate::cli::on_finish::{Finished, OnFinish};
use crate::cli::project::Project;
use crate::cli::remote::RemoteArgs;
use crate::cli::tracking::tracking;
use crate::cli::{
    Failure, eprint, eprint_note, eprint_rendered, eprint_warning, error, includes, is_command,
    lock_file, machine,
};
use crate::engine::{
    Bytes, DeviceChoice, Event, Machine, Node, Options, PublishOptions, Published, RunLabel,
    Summary, publish,
};
use crate::recipe::RecipeStage;
use crate::report::style::{BOLD, paint};
use crate::report::{
    JsonLines, RecipeNames, Reporter, Terminal, Verbosity, harmless, quoted, report,
};

#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// The stages to run, with everything they depend on [default: all]
    stages: Vec<String>,
    /// Runs this stage and all that depend on it, with what they need; may be repeated
    #[arg(long, value_name = "STAGE")]
    downstream: Vec<String>,
    /// Runs this stage even if it is fresh; may be repeated
    #[arg(long, value_name = "STAGE")]
    force: Vec<String>,
    /// Names the run, for `runs` and `diff`
    #[arg(long)]
    name: Option<String>,
    /// Tags the run; may be repeated
    #[arg(long, value_name = "TAG")]
    tag: Vec<String>,
    /// Writes events to standard output as JSON, one per line
    #[arg(long)]
    json: bool,
    /// The most stages that run at once; trainings and evaluations always run one at a time [default: the number of cores]
    #[arg(long, value_name = "N")]
    jobs: Option<NonZeroUsize>,
    /// Cores for all running stages together, as their `resources` count them [default: all]
    #[arg(long, value_name = "N")]
    cpus: Option<NonZeroUsize>,
    /// Memory for all running stages together, as their `resources` count it, such as `20GiB` [default: the machine's]
    #[arg(long, value_name = "SIZE")]
    memory: Option<Bytes>,
    // It is only counted for `resources: { gpus: .. }`.
    /// Ids of the devices that stages may use, such as `0,1` [default: all]
    #[arg(long, value_name = "IDS", value_delimiter = ',', hide = true)]
    gpus: Option<Vec<usize>>,
    /// Where trainings and evaluations compute, whatever the recipe says: `cpu`, `gpu`, `gpu:1` or `auto`
    #[arg(long, value_name = "DEVICE")]
    device: Option<DeviceChoice>,
    /// Where all stages run, whatever the recipe says: an executor of `pipeline.config.yaml`, or `local`
    #[arg(long, value_name = "NAME")]
    executor: Option<String>,
    /// When interrupted, leaves jobs on a cluster alone, to be joined by the same command, instead of cancelling them
    #[arg(long)]
    leave_jobs: bool,
    /// After a failure, continues with the stages that do not depend on the failed one
    #[arg(long)]
    keep_going: bool,
    /// Fails if any input differs from what the lock file pins
    #[arg(long)]
    locked: bool,
    /// Replaces files in output folders that pipeline did not write, or that were changed since
    #[arg(long)]
    overwrite_outputs: bool,
    #[command(flatten)]
    store: StoreArgs,
    #[command(flatten)]
    remote: RemoteArgs,
    /// Sends no new results to the remote
    #[arg(long)]
    no_push: bool,
}

/// Tells stages where to compute, whatever the recipe says. Those of several processes stay on the processor unless a GPU is asked for by name.
fn compute_on(device: DeviceChoice, nodes: &mut [Node]) -> Result<(), Failure> {
    let is_shared = |node: &Node| node.handling.resources.processes() > 1;
    if let DeviceChoice::Gpu(_) = device
        && let Some(node) = nodes.iter().find(|node| is_shared(node))
    {
        let message = format!(
            "`--device {device}` can't be had for `{}`: its {} processes compute on processors",
            node.name,
            node.handling.resources.processes()
        );
        let hint = "with `--device auto` it stays on the processor; without its `processes` one process computes on the GPU";
        return Err(Failure::Usage(error::with_hint(&message, hint)));
    }
    for node in nodes.iter_mut().filter(|node| !is_shared(node)) {
        node.handling.device = device;
    }
    Ok(())
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    let mut project = Project::open(&args.recipe, &args.store)?;
    project.connect(&args.remote, args.no_push)?;
    project.use_clusters(args.executor.as_deref())?;
    let targets = project.targets(&args.stages, &args.downstream)?;
    let forced = project.find_all(&args.force)?;
    check_lock(&project, args.locked)?;
    project.locked = args.locked;
    warn_of_unused(&project);
    if args.gpus.is_some() {
        eprint_warning(
            "`--gpus` only counts for `resources: { gpus: .. }`; `--device` says where stages compute",
        );
    }
    if let Some(device) = args.device {
        compute_on(device, &mut project.graph.nodes)?;
    }
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let options = Options {
        jobs: args.jobs.map_or(cores, NonZeroUsize::get),
        machine: Machine {
            cpus: args.cpus.map_or(cores, NonZeroUsize::get),
            memory: args.memory.or_else(machine::memory),
            gpus: args.gpus.clone().unwrap_or_else(machine::gpus),
        },
        keep_going: args.keep_going,
    };
    let cancel = Arc::clone(&project.env.cancel);
    let look = look_of_errors(Arc::clone(&cancel));
    let says_it = !args.json && look.size.is_some() && verbosity() > Verbosity::Quiet;
    leaving::stop_on_signal(&cancel, !says_it, project.jobs(), args.leave_jobs)?;
    let (events, received) = channel();
    let mut reporter: Box<dyn Reporter + Send> = if args.json {
        Box::new(JsonLines::new(Output))
    } else {
        let names = project.recipe_names(&args.recipe);
        Box::new(Terminal::new(names, look, std::io::stderr()))
    };
    let mut log = project.event_log();
    let mut tracking = tracking(&project, args.name.as_deref())?;
    let on_finish = OnFinish::open(&project.root)?;
    let started = Instant::now();
    let label = RunLabel {
        name: args.name.clone(),
        tags: args.tag.iter().cloned().collect(),
    };
    let summary = std::thread::scope(|scope| {
        let (log, tracking) = (&mut log, &mut tracking);
        std::thread::Builder::new()
            .spawn_scoped(scope, move || {
                report(&received, &mut [&mut *reporter, log, tracking]);
            })
            .context("could not start a thread")?;
        // The sender goes when this is done, and with it the reporters.
        let events = events;
        // Also until the outputs are published: nothing they are made of may go before.
        let in_use = project.store.use_results(&cancel, &mut |holder| {
            let holder = holder.to_owned();
            // A reporter that is gone misses nothing else.
            let _ = events.send(Event::RunWaiting { holder });
        });
        if in_use.is_err() && cancel.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let _in_use = in_use?;
        let session = project.session(&forced);
        let summary = crate::engine::run(&session, &targets, &options, &events, &cancel)?;
        // After a failure only who wants to go on gets what is finished.
        if !summary.interrupted && (summary.failed == 0 || args.keep_going) {
            let how = PublishOptions {
                overwrite: args.overwrite_outputs,
                verify: args.store.verify,
            };
            let published = publish_outputs(&project, &summary, &targets, how, &events, &cancel);
            if published.is_err() && cancel.load(Ordering::Relaxed) {
                return Ok(None);
            }
            published?;
        }
        anyhow::Ok(Some(summary))
    });
    // Whatever comes of the run, it is told; what comes of telling it counts only where nothing else went wrong.
    let tell = |summary: Result<Option<&Summary>, &anyhow::Error>| match &on_finish {
        Some(on_finish) => on_finish.run(&Finished {
            project: &project,
            summary,
            label: &label,
            seconds: started.elapsed().as_secs_f64(),
        }),
        None => Ok(()),
    };
    let summary = match summary {
        Ok(summary) => summary,
        Err(error) => {
            let _ = tell(Err(&error));
            return Err(error.into());
        }
    };
    if let Some(number) = summary.as_ref().and_then(|summary| summary.run) {
        // It is only for looking at later.
        let _ = log.keep(number);
    }
    for warning in tracking.finish() {
        eprint_warning(&warning);
    }
    if !label.is_empty() {
        label_run(
            &project,
            summary.as_ref().and_then(|summary| summary.run),
            label.clone(),
        )?;
    }
    project.report_warnings()?;
    let told = tell(Ok(summary.as_ref()));
    let Some(summary) = summary else {
        return Err(Failure::Interrupted);
    };
    if summary.interrupted {
        return Err(Failure::Interrupted);
    }
    if summary.failed > 0 {
        return Err(Failure::Reported);
    }
    told?;
    if summary.ran > 0 && !args.json && verbosity() > Verbosity::Quiet {
        suggest(&project, &targets, &project.recipe_names(&args.recipe));
    }
    Ok(())
}

/// Names a run. One that changed nothing left no trace: then the last one, with the same results, gets the name.
fn label_run(project: &Project, number: Option<u64>, label: RunLabel) -> anyhow::Result<()> {
    let runs = project.runs();
    let Some(run) = (match number {
        Some(number) => runs.into_iter().find(|run| run.number == number),
        None => runs.into_iter().next_back(),
    }) else {
        return Ok(());
    };
    let mut new = run.label;
    new.name = label.name.or(new.name);
    new.tags.extend(label.tags);
    project.label_run(run.number, &new)
}

/// The commands that are worth a try now.
fn suggest(project: &Project, targets: &[usize], names: &RecipeNames) {
    let needed = project.graph.needed(targets);
    let order = project.recipe.order().into_iter();
    let stages = order.filter(|&index| needed.get(index) == Some(&true));
    let stages: Vec<&RecipeStage> = stages
        .filter_map(|index| project.recipe.stages.get(index))
        .collect();
    // What was made last of a sort is what people wanted.
    let last = |wanted: &[&str]| {
        let mut found = stages.iter().rev();
        found.find(|stage| wanted.contains(&stage.stage.output()))
    };
    let mut commands = Vec::new();
    let mut suggest = |command: &str, stage: Option<&&RecipeStage>| {
        if is_command(command) {
            let stage = stage.map(|stage| stage.name.as_str());
            commands.push(names.command(command, stage));
        }
    };
    let trains = stages.iter().any(|stage| stage.stage.exclusive());
    match (last(&["scores"]), last(&["model", "adapter"])) {
        (None, None) => suggest("show", stages.last()),
        (scores, model) => {
            if scores.is_some() {
                suggest("show", scores);
            }
            if model.is_some() && trains {
                suggest("chat", model);
            }
        }
    }
    if trains {
        suggest("report", None);
    }
    let lines = commands.iter().enumerate().map(|(at, command)| {
        let label = if at == 0 { "try" } else { "" };
        format!(
            "{}  {}\n",
            paint(BOLD, &format!("{label:>9}")),
            harmless(command)
        )
    });
    eprint_rendered(&lines.collect::<String>());
}

/// Tells what the recipe has and nothing uses.
pub(in crate::cli) fn warn_of_unused(project: &Project) {
    for unused in project.recipe.unused() {
        let place = unused
            .span
            .map(|span| format!(" ({})", project.recipe.place(span)));
        eprint_warning(&format!("{}{}", unused.message, place.unwrap_or_default()));
    }
}

/// With `--locked` nothing may move. Without, a lock file that is behind is worth a sentence.
pub(in crate::cli) fn check_lock(project: &Project, locked: bool) -> Result<(), Failure> {
    let recipe = &project.recipe.path;
    let path = lock_file::path(recipe);
    let shown = quoted(&recipe.display().to_string());
    if !path.exists() {
        if !locked {
            return Ok(());
        }
        let message = format!("`--locked` needs `{}`, which is not there", path.display());
        let hint = format!("`pipeline lock {shown}` writes it");
        return Err(Failure::Usage(error::with_hint(&message, &hint)));
    }
    let mut changes = includes::changes(&project.include_pins, &project.included);
    match project.session(&[]).changed_pins() {
        Ok(others) => changes.extend(others),
        Err(error) if locked => return Err(error.into()),
        // What can't be read now is told of the stage that reads it.
        Err(_) => {}
    }
    if changes.is_empty() {
        return Ok(());
    }
    let list = lock_file::list(&changes);
    let message = format!(
        "`{}` pins other inputs than those at hand:\n{}",
        path.display(),
        list.trim_end()
    );
    if locked {
        let hint = format!("`pipeline lock --update {shown}` pins those at hand");
        return Err(Failure::Usage(error::with_hint(&message, &hint)));
    }
    eprint_note(&message);
    Ok(())
}

/// The first Ctrl-C (or SIGTERM) is remembered in `cancel`; the second ends the process.
pub(in crate::cli) fn stop_waiting_on_interrupt(cancel: &Arc<AtomicBool>) -> anyhow::Result<()> {
    let cancel = Arc::clone(cancel);
    on_interrupt(move || {
        if cancel.swap(true, Ordering::Relaxed) {
            #[expect(clippy::exit, reason = "the user asked twice")]
            std::process::exit(130);
        }
    })
}

/// The first Ctrl-C (or SIGTERM) lets stages stop by themselves, and is answered if `answers`; the second ends the process, which the
/// store survives.
pub(in crate::cli) fn stop_on_signal(
    cancel: &Arc<AtomicBool>,
    answers: bool,
) -> anyhow::Result<()> {
    let cancel = Arc::clone(cancel);
    on_interrupt(move || {
        if cancel.swap(true, Ordering::Relaxed) {
            // Nothing that moved stays on the terminal.
            eprint("");
            #[expect(clippy::exit, reason = "the user asked twice")]
            std::process::exit(130);
        }
        if !answers {
            return;
        }
        eprint("interrupted: waiting for stages to stop; press Ctrl-C again to stop at once\n");
    })
}

fn publish_outputs(
    project: &Project,
    summary: &Summary,
    targets: &[usize],
    how: PublishOptions,
    events: &Sender<Event>,
    cancel: &AtomicBool,
) -> anyhow::Result<()> {
    let targets: BTreeSet<usize> = targets.iter().copied().collect();
    for output in &project.recipe.outputs {
        let Some(index) = project.graph.find(&output.stage) else {
            continue;
        };
        if !targets.is_empty() && !targets.contains(&index) {
            continue;
        }
        let Some(artifact) = summary.artifacts.get(index).and_then(Option::as_ref) else {
            continue;
        };
        let to = project.root.join(&output.path);
        let mut waiting = |holder: &str| {
            let text = format!(
                "{holder} is writing to `{}`; waiting for it to finish",
                output.path
            );
            // A reporter that is gone misses nothing else.
            let _ = events.send(Event::Warning { text });
        };
        // Looked at again: a run takes its time, and somebody may have turned a link elsewhere.
        let published = match project.bounds.output(output) {
            Ok(real) => publish(&project.store, artifact, &real, how, cancel, &mut waiting),
            Err((message, hint)) => Err(anyhow::anyhow!("it {message}; {hint}")),
        };
        let Published { changed, links } = published
            .with_context(|| format!("could not publish the result of `{}`", output.stage))?;
        let shown = std::env::current_dir()
            .ok()
            .and_then(|here| Some(to.strip_prefix(here).ok()?.to_owned()))
            .unwrap_or(to);
        // A reporter that is gone misses nothing else.
        let _ = events.send(Event::OutputPlaced {
            stage: output.stage.clone(),
            path: shown.display().to_string(),
            changed,
            links,
        });
    }
    Ok(())
}
