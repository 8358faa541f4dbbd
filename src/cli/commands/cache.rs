//! `cache`: looks after the remote that machines share.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use clap::Subcommand;

use super::run::stop_on_signal;
use crate::cli::args::{ReadingArgs, RecipeArgs, StoreArgs};
use crate::cli::folders::root;
use crate::cli::project::{Project, own_store};
use crate::cli::remote::{RemoteArgs, report_warnings, set_trust};
use crate::cli::{Failure, print, print_json, table};
use crate::engine::remote::{Sent, Shared};
use crate::engine::{Event, Store, short};
use crate::report::{ago, bytes, duration, has_the_store};

#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Sends results that the remote lacks
    Push(Push),
    /// Fetches the results of a recipe
    Pull(Pull),
    /// Lists the results in the remote
    Ls(List),
    /// Removes old results from the remote, and files that no result has
    Gc(Collect),
    /// Reads everything in the remote and compares it with the digests that name it
    Verify(Verify),
    /// Allows the remote that the project's `pipeline.config.yaml` names, on this machine and for this project
    Trust(Trust),
}

#[derive(clap::Args)]
struct Push {
    /// The recipe whose current results are sent
    #[arg(required_unless_present = "all")]
    recipe: Option<PathBuf>,
    /// The stages [default: all]
    stages: Vec<String>,
    /// Sends every result in the store
    #[arg(long, conflicts_with = "recipe")]
    all: bool,
    #[command(flatten)]
    reading: ReadingArgs,
    #[command(flatten)]
    store: StoreArgs,
    #[command(flatten)]
    remote: Which,
}

#[derive(clap::Args)]
struct Pull {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// The stages [default: all]
    stages: Vec<String>,
    #[command(flatten)]
    store: StoreArgs,
    #[command(flatten)]
    remote: Which,
}

#[derive(clap::Args)]
struct List {
    /// The list as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    remote: Which,
}

#[derive(clap::Args)]
struct Collect {
    /// Recipes whose current results are kept, however old
    recipes: Vec<PathBuf>,
    #[command(flatten)]
    reading: ReadingArgs,
    /// Removes results that have been in the remote for this many days
    #[arg(long, value_name = "DAYS", default_value_t = 30)]
    older_than: u64,
    /// Shows what would be removed, without removing anything
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    store: StoreArgs,
    #[command(flatten)]
    remote: Which,
}

#[derive(clap::Args)]
struct Verify {
    /// Removes damaged results, so that they can be sent again
    #[arg(long)]
    remove: bool,
    /// The damage as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    remote: Which,
}

#[derive(clap::Args)]
struct Trust {
    /// Withdraws the permission
    #[arg(long)]
    revoke: bool,
}

#[derive(clap::Args)]
struct Which {
    /// The remote: a folder, or a URL such as `s3://bucket/folder` [default: `PIPELINE_REMOTE`, or the `remote` of
    /// `pipeline.config.yaml`]
    #[arg(long, value_name = "URL")]
    remote: Option<String>,
}

impl Which {
    /// These commands are about the remote: without it they fail.
    fn args(&self) -> RemoteArgs {
        RemoteArgs {
            remote: self.remote.clone(),
            no_pull: false,
            remote_required: true,
        }
    }

    /// The remote of the project around the current folder.
    fn open(&self) -> Result<Shared, Failure> {
        let here = here()?;
        let shared = self.args().open(&root(&here), false, true)?;
        report_warnings(&shared)?;
        Ok(shared)
    }
}

fn here() -> anyhow::Result<PathBuf> {
    std::env::current_dir().map_err(|error| anyhow::anyhow!("there is no current folder: {error}"))
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    match &args.command {
        Command::Push(args) => push(args),
        Command::Pull(args) => pull(args),
        Command::Ls(args) => list(args),
        Command::Gc(args) => collect(args),
        Command::Verify(args) => verify(args),
        Command::Trust(args) => trust(args),
    }
}

fn trust(args: &Trust) -> Result<(), Failure> {
    let root = root(&here()?);
    let remote = set_trust(&root, !args.revoke)?;
    let root = root.display();
    print(&if args.revoke {
        format!("`{remote}` is not used for `{root}` any more\n")
    } else {
        format!("results of `{root}` are sent to `{remote}` and taken from there from now on\n")
    });
    Ok(())
}

fn project(
    recipe: &Path,
    reading: &ReadingArgs,
    store: &StoreArgs,
    which: &Which,
) -> Result<Project, Failure> {
    let recipe = RecipeArgs::of(recipe, reading);
    let mut project = Project::open(&recipe, store)?;
    project.connect(&which.args(), false)?;
    project.report_warnings()?;
    Ok(project)
}

fn push(args: &Push) -> Result<(), Failure> {
    let cancel = Arc::new(AtomicBool::new(false));
    stop_on_signal(&cancel, true)?;
    if let Some(recipe) = &args.recipe {
        let project = project(recipe, &args.reading, &args.store, &args.remote)?;
        let targets = project.find_all(&args.stages)?;
        let fingerprints = project.session(&[]).results(&targets);
        return send(&project.store, &project.shared, &fingerprints, &cancel);
    }
    let store = if let Some(store) = &args.store.store {
        here()?.join(store)
    } else {
        let root = root(&here()?);
        let real = root.canonicalize().unwrap_or_else(|_| root.clone());
        own_store(&root, &|path| path.starts_with(&real), "")?
    };
    let store = Store::new(&store);
    let fingerprints = store.fingerprints()?;
    send(&store, &args.remote.open()?, &fingerprints, &cancel)
}

fn tell_waiting(holder: &str) {
    crate::cli::eprint(&format!("{}; waiting for it\n", has_the_store(holder)));
}

fn send(
    store: &Store,
    shared: &Shared,
    fingerprints: &[String],
    cancel: &AtomicBool,
) -> Result<(), Failure> {
    let in_use = store.use_results(cancel, &mut tell_waiting);
    if in_use.is_err() && cancel.load(Ordering::Relaxed) {
        return Err(Failure::Interrupted);
    }
    let _in_use = in_use?;
    let mut all = Sent::default();
    let mut results = 0;
    for fingerprint in fingerprints {
        if cancel.load(Ordering::Relaxed) {
            return Err(Failure::Interrupted);
        }
        let pushed = shared.push(store, fingerprint, true, cancel);
        let Some((record, sent)) = pushed.map_err(|error| {
            let address = shared.address().unwrap_or_default();
            error.context(format!("could not send to `{address}`"))
        })?
        else {
            continue;
        };
        results += 1;
        all.files += sent.files;
        all.bytes += sent.bytes;
        if sent.files > 0 || sent.record {
            print(&format!(
                "{}  {}  {} files, {}\n",
                record.stage,
                short(Some(&record.artifact)),
                sent.files,
                bytes(sent.bytes)
            ));
        }
    }
    report_warnings(shared)?;
    print(&format!(
        "{results} results are there; {} files, {} sent\n",
        all.files,
        bytes(all.bytes)
    ));
    Ok(())
}

fn pull(args: &Pull) -> Result<(), Failure> {
    let cancel = Arc::new(AtomicBool::new(false));
    stop_on_signal(&cancel, true)?;
    let mut project = Project::open(&args.recipe, &args.store)?;
    project.connect(&args.remote.args(), true)?;
    project.report_warnings()?;
    let targets = project.find_all(&args.stages)?;
    let (events, received) = channel();
    let here = project.session(&[]).pull(&targets, &events, &cancel);
    drop(events);
    for event in received {
        match event {
            Event::StageFetched {
                stage,
                artifact,
                files,
                bytes: size,
            } => print(&format!(
                "{stage}  {}  {files} files, {}\n",
                short(Some(&artifact)),
                bytes(size)
            )),
            Event::Warning { text } => crate::cli::eprint(&format!("warning: {text}\n")),
            Event::RunWaiting { holder } => tell_waiting(&holder),
            _ => {}
        }
    }
    let here = here?;
    if cancel.load(Ordering::Relaxed) {
        return Err(Failure::Interrupted);
    }
    project.report_warnings()?;
    let asked = |index: &usize| targets.is_empty() || targets.contains(index);
    let asked: Vec<usize> = (0..here.len()).filter(asked).collect();
    let there = asked.iter().filter(|&&index| here[index]).count();
    print(&format!("{there} of {} results are here\n", asked.len()));
    Ok(())
}

/// A sum of sizes, which somebody else may have made up.
fn total(sizes: impl Iterator<Item = u64>) -> u64 {
    sizes.fold(0, u64::saturating_add)
}

fn list(args: &List) -> Result<(), Failure> {
    let listed = args.remote.open()?.list()?;
    if args.json {
        return print_json(&listed);
    }
    let rows: Vec<Vec<String>> = listed
        .iter()
        .map(|result| {
            vec![
                short(Some(&result.fingerprint)),
                result.stage.clone(),
                result.kind.clone(),
                short(Some(&result.artifact)),
                result.bytes.map_or("incomplete".to_owned(), bytes),
                format!("{} in {}", ago(result.started), duration(result.seconds)),
            ]
        })
        .collect();
    let contents: BTreeSet<_> = listed
        .iter()
        .map(|result| (&result.artifact, result.bytes))
        .collect();
    let all = total(contents.iter().filter_map(|(_, bytes)| *bytes));
    print(&format!(
        "{}{} results, {}\n",
        table(&rows),
        listed.len(),
        bytes(all)
    ));
    Ok(())
}

fn collect(args: &Collect) -> Result<(), Failure> {
    let mut keep = BTreeSet::new();
    for recipe in &args.recipes {
        let project = project(recipe, &args.reading, &args.store, &args.remote)?;
        keep.extend(project.session(&[]).fingerprints());
        project.report_warnings()?;
    }
    let shared = args.remote.open()?;
    let age = Duration::from_secs(args.older_than.saturating_mul(24 * 3600));
    let waste = shared.collect(&keep, age, !args.dry_run)?;
    let rows: Vec<Vec<String>> = waste
        .iter()
        .map(|waste| {
            vec![
                waste.what.to_owned(),
                waste.object.key.clone(),
                bytes(waste.object.size),
            ]
        })
        .collect();
    let all = bytes(total(waste.iter().map(|waste| waste.object.size)));
    let would = if args.dry_run {
        "would be freed"
    } else {
        "freed"
    };
    print(&format!("{}{all} {would}\n", table(&rows)));
    Ok(())
}

fn verify(args: &Verify) -> Result<(), Failure> {
    let shared = args.remote.open()?;
    let (damage, files, size) = shared.verify()?;
    if args.json {
        print_json(&damage)?;
    } else {
        for damage in &damage {
            print(&format!("damaged  {}: {}\n", damage.key, damage.what));
        }
        print(&format!(
            "{files} files, {} read; {} damaged\n",
            bytes(size),
            damage.len()
        ));
    }
    if damage.is_empty() {
        return Ok(());
    }
    if args.remove {
        shared.remove(&damage)?;
        return Ok(());
    }
    Err(Failure::Reported)
}
