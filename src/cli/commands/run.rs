//! `run`: makes stale stages fresh and puts results in their places.

use std::collections::BTreeSet;
use std::io::IsTerminal as _;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};

use anyhow::Context as _;

use crate::cli::args::{RecipeArgs, StoreArgs};
use crate::cli::project::Project;
use crate::cli::remote::RemoteArgs;
use crate::cli::tracking::tracking;
use crate::cli::{Failure, eprint, error, lock_file, machine};
use crate::engine::{
    Bytes, Event, Machine, Options, PublishOptions, Published, RunLabel, Summary, publish,
};
use crate::report::{JsonLines, Reporter, Terminal, report};

#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// The stages to run, with everything they depend on [default: all]
    stages: Vec<String>,
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
    /// Ids of the devices that stages may use, such as `0,1` [default: all]
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    gpus: Option<Vec<usize>>,
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

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    let mut project = Project::open(&args.recipe, &args.store)?;
    project.connect(&args.remote, args.no_push)?;
    let targets = project.find_all(&args.stages)?;
    let forced = project.find_all(&args.force)?;
    check_lock(&project, args)?;
    project.locked = args.locked;
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
    stop_on_signal(&cancel)?;
    let (events, received) = channel();
    let mut reporter: Box<dyn Reporter + Send> = match (args.json, std::io::stderr().is_terminal())
    {
        (true, _) => Box::new(JsonLines::new(std::io::stdout())),
        (false, true) => Box::new(Terminal::bars(project.spans(), std::io::stderr())),
        (false, false) => Box::new(Terminal::lines(project.spans(), std::io::stderr())),
    };
    let mut log = project.event_log();
    let mut tracking = tracking(&project, args.name.as_deref())?;
    let summary = std::thread::scope(|scope| {
        let (log, tracking) = (&mut log, &mut tracking);
        std::thread::Builder::new()
            .spawn_scoped(scope, move || {
                report(&received, &mut [&mut *reporter, log, tracking])
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
    })?;
    if let Some(number) = summary.as_ref().and_then(|summary| summary.run) {
        // It is only for looking at later.
        let _ = log.keep(number);
    }
    for warning in tracking.finish() {
        eprint(&format!("warning: {warning}\n"));
    }
    let label = RunLabel {
        name: args.name.clone(),
        tags: args.tag.iter().cloned().collect(),
    };
    if !label.is_empty() {
        label_run(
            &project,
            summary.as_ref().and_then(|summary| summary.run),
            label,
        )?;
    }
    project.report_warnings()?;
    let Some(summary) = summary else {
        return Err(Failure::Interrupted);
    };
    if summary.interrupted {
        return Err(Failure::Interrupted);
    }
    if summary.failed > 0 {
        return Err(Failure::Reported);
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

/// With `--locked` nothing may move. Without, a lock file that is behind is worth a sentence.
fn check_lock(project: &Project, args: &Args) -> Result<(), Failure> {
    let path = lock_file::path(&args.recipe.recipe);
    if !args.locked && !path.exists() {
        return Ok(());
    }
    let changes = project.session(&[]).changed_pins()?;
    if changes.is_empty() {
        return Ok(());
    }
    let list = lock_file::list(&changes);
    let message = format!(
        "`{}` pins other inputs than those at hand:\n{}",
        path.display(),
        list.trim_end()
    );
    if args.locked {
        let hint = "`pipeline lock --update` updates the pins";
        return Err(Failure::Usage(error::with_hint(&message, hint)));
    }
    eprint(&format!("note: {message}\n"));
    Ok(())
}

/// Calls `act` at every Ctrl-C (or SIGTERM).
pub(in crate::cli) fn on_interrupt(act: impl FnMut() + Send + 'static) -> anyhow::Result<()> {
    let listening = ctrlc::set_handler(act).map_err(|error| match error {
        // Its own sentence leaves out what the system says.
        ctrlc::Error::System(error) => anyhow::Error::from(error),
        error => error.into(),
    });
    listening.context("could not listen to Ctrl-C")
}

/// The first Ctrl-C (or SIGTERM) lets stages stop by themselves; the second ends the process, which the store survives.
pub(in crate::cli) fn stop_on_signal(cancel: &Arc<AtomicBool>) -> anyhow::Result<()> {
    let cancel = Arc::clone(cancel);
    on_interrupt(move || {
        if cancel.swap(true, Ordering::Relaxed) {
            #[expect(clippy::exit, reason = "the user asked twice")]
            std::process::exit(130);
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
