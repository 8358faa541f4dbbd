//! `export`: writes a recipe's graph for another program that runs it: as scripts of Slurm.

use std::fmt::Write as _;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Subcommand;

use crate::cli::args::{RecipeArgs, StoreArgs};
use crate::cli::executors::{Clusters, program};
use crate::cli::project::Project;
use crate::cli::{Failure, error, print};
use crate::engine::{LOCAL, Node, SlurmSettings};
use crate::report::quoted;

#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    #[command(subcommand)]
    command: Target,
}

#[derive(Subcommand)]
enum Target {
    /// Writes a script for `sbatch` for each stage, and one that submits them all with their dependencies
    Slurm(Slurm),
}

#[derive(clap::Args)]
struct Slurm {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// The stages to export, with everything they depend on [default: all]
    stages: Vec<String>,
    /// The folder for the scripts, new or empty [default: `RECIPE-slurm`]
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// The cluster of `pipeline.config.yaml` whose settings stages get that name none [default: the only one]
    #[arg(long, value_name = "NAME")]
    executor: Option<String>,
    #[command(flatten)]
    store: StoreArgs,
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    match &args.command {
        Target::Slurm(args) => slurm(args),
    }
}

/// A script to be written.
struct Script {
    name: String,
    text: String,
    /// The positions of the scripts that have to succeed before.
    after: Vec<usize>,
}

fn slurm(args: &Slurm) -> Result<(), Failure> {
    let project = Project::open(&args.recipe, &args.store)?;
    let targets = project.targets(&args.stages, &[])?;
    let clusters = Clusters::read(&project.root)?;
    if let Some(name) = &args.executor {
        clusters.check_name(name)?;
    }
    let folder = args.output.clone().unwrap_or_else(|| {
        let stem = project.recipe.path.file_stem().unwrap_or_default();
        PathBuf::from(format!("{}-slurm", stem.to_string_lossy()))
    });
    if fs::read_dir(&folder).is_ok_and(|mut entries| entries.next().is_some()) {
        let message = format!("`{}` is not empty", folder.display());
        let hint = "remove it, or name another folder by `--output`";
        return Err(Failure::Usage(error::with_hint(&message, hint)));
    }
    let scripts = scripts(args, &project, &clusters, &targets)?;
    let write = |name: &str, text: &str| -> anyhow::Result<()> {
        let path = folder.join(name);
        fs::write(&path, text)
            .and_then(|()| fs::set_permissions(&path, Permissions::from_mode(0o755)))
            .with_context(|| format!("could not write `{}`", path.display()))
    };
    fs::create_dir_all(&folder)
        .with_context(|| format!("could not make `{}`", folder.display()))?;
    for script in &scripts {
        write(&script.name, &script.text)?;
    }
    write("submit.sh", &submit(&project.recipe.path, &scripts))?;
    print(&format!(
        "{} scripts are in `{}`; its `submit.sh` submits them\n",
        scripts.len(),
        folder.display()
    ));
    Ok(())
}

fn scripts(
    args: &Slurm,
    project: &Project,
    clusters: &Clusters,
    targets: &[usize],
) -> Result<Vec<Script>, Failure> {
    let graph = &project.graph;
    let needed = graph.needed(targets);
    let here = std::env::current_dir().context("there is no current folder")?;
    let program = word(&program()?);
    let common = common(args);
    let default = args.executor.as_deref().or_else(|| clusters.only());
    let mut place = vec![0; graph.nodes.len()];
    let mut scripts = Vec::new();
    let recipe = project.recipe.path.file_stem().unwrap_or_default();
    let recipe = plain(&recipe.to_string_lossy());
    let width = needed.iter().filter(|needed| **needed).count().to_string();
    let order = graph.order.iter().filter(|index| needed[**index]);
    for (at, &index) in order.enumerate() {
        place[index] = at;
        let node = &graph.nodes[index];
        let named = node.handling.executor.as_deref();
        let named = named.filter(|name| *name != LOCAL).or(default);
        let settings = named.and_then(|name| clusters.get(name));
        let settings = settings.cloned().unwrap_or_default();
        let label = format!("{recipe}.{}", plain(&node.name));
        let mut text = head(&label, &settings, node);
        let stage = quoted(&node.name);
        _ = writeln!(text, "cd {} || exit 1", word(&here));
        let inputs = &graph.inputs[index];
        if !inputs.is_empty() {
            let names: Vec<String> = inputs
                .iter()
                .map(|input| quoted(&graph.nodes[*input].name))
                .collect();
            let names = names.join(" ");
            _ = writeln!(
                text,
                "# Slurm starts a job, too, whose dependency it has forgotten, so what the stage reads is looked at here.\n\
                 {program} plan {common} {names} --exit-code --quiet || {{\n    \
                 echo \"not all that $SLURM_JOB_NAME reads is there\" >&2\n    exit 1\n}}"
            );
        }
        _ = writeln!(
            text,
            "exec {program} run {common} {stage} --executor {LOCAL}"
        );
        scripts.push(Script {
            name: format!(
                "{:0width$}-{}.sh",
                at + 1,
                plain(&node.name),
                width = width.len()
            ),
            text,
            after: inputs.iter().map(|input| place[*input]).collect(),
        });
    }
    Ok(scripts)
}

/// What the options of `sbatch` say, as the head of a script.
fn head(label: &str, settings: &SlurmSettings, node: &Node) -> String {
    let handling = &node.handling;
    let mut text = format!(
        "#!/bin/sh\n# Stage {} ({}).\n#SBATCH --job-name={label}\n#SBATCH --output={label}.%j.log\n",
        node.name,
        node.stage.kind()
    );
    for option in settings.options(&handling.resources, handling.timeout) {
        let quotes = if option.contains([' ', '#']) {
            "\""
        } else {
            ""
        };
        _ = writeln!(text, "#SBATCH {quotes}{option}{quotes}");
    }
    text
}

/// What all calls of this program have in common.
fn common(args: &Slurm) -> String {
    let mut words = vec![word(&args.recipe.recipe)];
    for change in args.recipe.changes() {
        words.push(format!(
            "--set {}",
            quoted(&format!("{}={}", change.path, change.value))
        ));
    }
    for path in &args.recipe.reading.allow_path {
        words.push(format!("--allow-path {}", word(path)));
    }
    if let Some(store) = &args.store.store {
        words.push(format!("--store {}", word(store)));
    }
    if args.store.offline {
        words.push("--offline".to_owned());
    }
    words.join(" ")
}

/// The script that submits all others.
fn submit(recipe: &Path, scripts: &[Script]) -> String {
    let mut text = format!(
        "#!/bin/sh\n# Submits the stages of {} with their dependencies; arguments go to each sbatch.\n\
         # A job whose dependency failed is cancelled. If one can't be submitted, those before it are cancelled.\n\
         set -e\ncd \"$(dirname \"$0\")\"\njobs=\ntrap '[ -z \"$jobs\" ] || scancel $jobs' EXIT\n\
         submit() {{\n    job=$(sbatch --parsable --kill-on-invalid-dep=yes \"$@\")\n    job=${{job%%;*}}\n    jobs=\"$jobs $job\"\n\
         \x20   echo \"$job\"  >&2\n}}\n",
        quoted(&recipe.display().to_string())
    );
    for (at, script) in scripts.iter().enumerate() {
        let after: Vec<String> = script.after.iter().map(|at| format!("$job{at}")).collect();
        let dependency = if after.is_empty() {
            String::new()
        } else {
            format!("--dependency=afterok:{} ", after.join(":"))
        };
        _ = writeln!(
            text,
            "submit {dependency}\"$@\" {}\njob{at}=$job",
            quoted(&script.name)
        );
    }
    text.push_str("jobs=\n");
    text
}

/// A path as a word of a shell.
fn word(path: &Path) -> String {
    quoted(&path.display().to_string())
}

/// A name without what means something to a shell, a file system or Slurm.
fn plain(name: &str) -> String {
    let safe = |c: char| {
        if c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '=') {
            c
        } else {
            '_'
        }
    };
    name.chars().take(100).map(safe).collect()
}
