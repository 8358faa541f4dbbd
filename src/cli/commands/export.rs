//! `export`: writes a recipe's graph for another program that runs it: as scripts of Slurm.

mod arrays;

use std::fmt::Write as _;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Subcommand;

use arrays::{After, Group, groups};

use crate::cli::args::{RecipeArgs, StoreArgs};
use crate::cli::executors::{Clusters, program};
use crate::cli::project::Project;
use crate::cli::{Failure, error, print};
use crate::engine::{Graph, LOCAL, declared};
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
    /// The most combinations of a matrix in one script, as an array of jobs; 1 writes a script for each
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    array_size: u32,
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
    /// The option of `sbatch` with what has to succeed before.
    dependency: String,
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
    let order: Vec<usize> = graph
        .order
        .iter()
        .copied()
        .filter(|stage| needed[*stage])
        .collect();
    let default = args.executor.as_deref().or_else(|| clusters.only());
    let options = |stage: usize| {
        let handling = &graph.nodes[stage].handling;
        let named = handling.executor.as_deref();
        let named = named.filter(|name| *name != LOCAL).or(default);
        let settings = named.and_then(|name| clusters.get(name)).cloned();
        let settings = settings.unwrap_or_default();
        settings.options(&handling.resources, handling.timeout)
    };
    let like = |stage: usize| {
        let name = graph.nodes[stage].name.as_str();
        let of = declared(name);
        (of != name).then(|| (of, options(stage)))
    };
    let groups = groups(&graph.inputs, &order, like, args.array_size as usize);
    let here = std::env::current_dir().context("there is no current folder")?;
    let recipe = project.recipe.path.file_stem().unwrap_or_default();
    let writer = Writer {
        graph,
        recipe: plain(&recipe.to_string_lossy()),
        here: word(&here),
        program: word(&program()?),
        common: common(args),
    };
    let width = groups.len().to_string().len();
    let scripts = groups.iter().zip(1..).map(|(group, number)| Script {
        name: format!("{number:0width$}-{}.sh", plain(writer.name(group))),
        text: writer.text(group, &options(group.stages[0].1)),
        dependency: dependency(group),
    });
    Ok(scripts.collect())
}

/// What all scripts have in common.
struct Writer<'a> {
    graph: &'a Graph,
    recipe: String,
    here: String,
    program: String,
    common: String,
}

impl Writer<'_> {
    /// What the stages of a script are called.
    fn name(&self, group: &Group) -> &str {
        let first = &self.graph.nodes[group.stages[0].1].name;
        if group.is_array() {
            declared(first)
        } else {
            first
        }
    }

    /// The script for stages that get these options of `sbatch`.
    fn text(&self, group: &Group, options: &[String]) -> String {
        let mut text = self.head(group, options);
        let (program, common) = (&self.program, &self.common);
        _ = writeln!(text, "cd {} || exit 1", self.here);
        let reads = |stage: usize| -> String {
            let inputs = self.graph.inputs[stage].iter();
            let names: Vec<String> = inputs.map(|input| self.quoted(*input)).collect();
            names.join(" ")
        };
        let (_, first) = group.stages[0];
        let (mut stage, mut inputs, mut who) =
            (self.quoted(first), reads(first), "$SLURM_JOB_NAME");
        if group.is_array() {
            let are_same = group
                .stages
                .iter()
                .all(|(_, stage)| reads(*stage) == inputs);
            _ = writeln!(text, "case $SLURM_ARRAY_TASK_ID in");
            for (element, stage) in &group.stages {
                let own = if are_same {
                    String::new()
                } else {
                    format!("; set -- {}", reads(*stage))
                };
                _ = writeln!(text, "{element}) stage={}{own} ;;", self.quoted(*stage));
            }
            text.push_str(
                "*)\n    echo \"$SLURM_JOB_NAME has no element $SLURM_ARRAY_TASK_ID\" >&2\n    exit 1\n    ;;\nesac\n",
            );
            (stage, who) = ("\"$stage\"".to_owned(), "$stage");
            if !are_same {
                "\"$@\"".clone_into(&mut inputs);
            }
        }
        if !inputs.is_empty() {
            _ = writeln!(
                text,
                "# Slurm starts a job, too, whose dependency it has forgotten, so what the stage reads is looked at here.\n\
                 {program} plan {common} {inputs} --exit-code --quiet || {{\n    \
                 echo \"not all that {who} reads is there\" >&2\n    exit 1\n}}"
            );
        }
        _ = writeln!(
            text,
            "exec {program} run {common} {stage} --executor {LOCAL}"
        );
        text
    }

    /// What the options of `sbatch` say, as the head of a script.
    fn head(&self, group: &Group, options: &[String]) -> String {
        let name = self.name(group);
        let kind = self.graph.nodes[group.stages[0].1].stage.kind();
        let label = format!("{}.{}", self.recipe, plain(name));
        let mut text = if group.is_array() {
            let elements = ranges(group.stages.iter().map(|(element, _)| *element));
            format!(
                "#!/bin/sh\n# Combinations of {name} ({kind}), each of them a job.\n#SBATCH --job-name={label}\n\
                 #SBATCH --output={label}.%A_%a.log\n#SBATCH --array={elements}\n"
            )
        } else {
            format!(
                "#!/bin/sh\n# Stage {name} ({kind}).\n#SBATCH --job-name={label}\n#SBATCH --output={label}.%j.log\n"
            )
        };
        for option in options {
            let quotes = if option.contains([' ', '#']) {
                "\""
            } else {
                ""
            };
            _ = writeln!(text, "#SBATCH {quotes}{option}{quotes}");
        }
        text
    }

    /// The name of a stage as a word of a shell.
    fn quoted(&self, stage: usize) -> String {
        quoted(&self.graph.nodes[stage].name)
    }
}

/// Numbers in the way of `--array`: `0-3,5`.
fn ranges(numbers: impl Iterator<Item = usize>) -> String {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for number in numbers {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => ranges.push((number, number)),
        }
    }
    let shown = ranges.into_iter().map(|(first, last)| {
        if first == last {
            first.to_string()
        } else {
            format!("{first}-{last}")
        }
    });
    shown.collect::<Vec<_>>().join(",")
}

/// The option that says what a script waits for, by the variables of `submit.sh` that have the numbers of jobs; empty if it waits for nothing.
fn dependency(group: &Group) -> String {
    let (mut all, mut corresponding) = (Vec::new(), Vec::new());
    for after in &group.after {
        match after {
            After::All(group) => all.push(format!("$job{}", group + 1)),
            After::Element(group, element) => all.push(format!("${{job{}}}_{element}", group + 1)),
            After::Corresponding(group) => corresponding.push(format!("$job{}", group + 1)),
        }
    }
    let lists = [("afterok", all), ("aftercorr", corresponding)];
    let lists = lists.iter().filter(|(_, jobs)| !jobs.is_empty());
    let lists: Vec<String> = lists
        .map(|(sort, jobs)| format!("{sort}:{}", jobs.join(":")))
        .collect();
    if lists.is_empty() {
        String::new()
    } else {
        format!("--dependency={} ", lists.join(","))
    }
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
         \x20   echo \"$job\" >&2\n}}\n",
        quoted(&recipe.display().to_string())
    );
    for (script, number) in scripts.iter().zip(1..) {
        let Script {
            name, dependency, ..
        } = script;
        let name = quoted(name);
        _ = writeln!(text, "submit {dependency}\"$@\" {name}\njob{number}=$job");
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
