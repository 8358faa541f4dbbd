//! The command line as people read it: commands by what they are for, with examples.

use std::fmt::Write as _;

use clap::{Command, CommandFactory as _};
use clap_complete::engine::{
    ArgValueCandidates, ArgValueCompleter, CompletionCandidate, PathCompleter, ValueCompleter as _,
};

use super::args::RecipeArgs;
use super::{Cli, default_recipe};
use crate::report::style::{BOLD, paint};

/// Commands by what they are for. A command that is in none of them is listed at the end.
const GROUPS: [(&str, &[&str]); 6] = [
    ("Start", &["init", "import", "validate", "kinds", "doctor"]),
    (
        "Run",
        &["preview", "estimate", "plan", "run", "why", "export"],
    ),
    (
        "Look",
        &[
            "show", "log", "graph", "report", "plot", "metrics", "history", "runs", "table", "diff",
        ],
    ),
    ("Try", &["chat", "generate"]),
    (
        "Share",
        &[
            "lock", "cache", "trust", "publish", "login", "logout", "whoami",
        ],
    ),
    ("Maintain", &["gc", "schema", "completions", "man"]),
];

/// Examples of commands: what stands under their help.
const EXAMPLES: &[(&str, &[&str])] = &[
    (
        "run",
        &[
            "pipeline run                              # everything of pipeline.yaml that is out of date",
            "pipeline run recipe.yaml scores           # one stage, and what it depends on",
            "pipeline run --set vars.seed=7            # with another value",
            "pipeline run --keep-going --jobs 2",
        ],
    ),
    (
        "plan",
        &[
            "pipeline plan",
            "pipeline plan --set stages.tuned.train_orpo.beta=0.2",
        ],
    ),
    (
        "why",
        &["pipeline why tuned", "pipeline why recipe.yaml tuned"],
    ),
    (
        "show",
        &[
            "pipeline show scores",
            "pipeline show recipe.yaml pairs -n 10",
        ],
    ),
    (
        "history",
        &[
            "pipeline history",
            "pipeline diff        # the last two runs",
        ],
    ),
    (
        "diff",
        &[
            "pipeline diff        # the last two runs",
            "pipeline diff recipe.yaml 3 5",
        ],
    ),
    (
        "validate",
        &["pipeline validate", "pipeline validate recipe.yaml"],
    ),
    (
        "graph",
        &[
            "pipeline graph",
            "pipeline graph --format mermaid > graph.md",
        ],
    ),
    ("lock", &["pipeline lock", "pipeline run --locked"]),
    (
        "gc",
        &[
            "pipeline gc --dry-run",
            "pipeline gc a.yaml b.yaml --max-size 20GB",
        ],
    ),
    (
        "cache",
        &[
            "pipeline cache push --all --remote s3://bucket/folder",
            "pipeline cache pull recipe.yaml --remote /mnt/shared",
            "pipeline cache ls",
        ],
    ),
    (
        "export",
        &["pipeline export slurm recipe.yaml -o jobs && jobs/submit.sh"],
    ),
    ("schema", &["pipeline schema > recipe.schema.json"]),
];

/// The command line with everything that is added to what its structs say.
pub(super) fn command() -> Command {
    let mut command = default_recipe::optional(Cli::command());
    for (name, lines) in EXAMPLES {
        if command
            .find_subcommand(name)
            .is_some_and(|sub| sub.get_after_help().is_none())
        {
            command = command.mut_subcommand(*name, |sub| sub.after_help(examples(lines)));
        }
    }
    let template = template(&command);
    completed(command).help_template(template)
}

fn examples(lines: &[&str]) -> String {
    format!("{}\n  {}", paint(BOLD, "Examples:"), lines.join("\n  "))
}

/// The commands of each group, and those of none.
pub(super) fn grouped(command: &Command) -> Vec<(&'static str, Vec<&Command>)> {
    let shown = || command.get_subcommands().filter(|sub| !sub.is_hide_set());
    let mut groups: Vec<(&str, Vec<&Command>)> = GROUPS
        .iter()
        .map(|(title, names)| {
            let found = |name: &&str| shown().find(|sub| sub.get_name() == *name);
            (*title, names.iter().filter_map(found).collect())
        })
        .collect();
    let known = |name: &str| GROUPS.iter().any(|(_, names)| names.contains(&name));
    groups.push((
        "More",
        shown().filter(|sub| !known(sub.get_name())).collect(),
    ));
    groups.retain(|(_, commands)| !commands.is_empty());
    groups
}

fn template(command: &Command) -> String {
    let mut text = String::from("{about-with-newline}\n{usage-heading} {usage}\n");
    for (title, commands) in grouped(command) {
        _ = writeln!(text, "\n{}", paint(BOLD, &format!("{title}:")));
        for sub in commands {
            let about = sub.get_about().map(ToString::to_string).unwrap_or_default();
            _ = writeln!(text, "  {:12} {about}", sub.get_name());
        }
    }
    text.push_str("\n`pipeline help COMMAND` says more about a command. Where RECIPE is left out, it is `pipeline.yaml`.\n");
    _ = write!(
        text,
        "\n{}\n{{options}}{{after-help}}",
        paint(BOLD, "Options:")
    );
    text
}

/// The command with candidates for recipes and stages.
fn completed(mut command: Command) -> Command {
    let names: Vec<String> = command
        .get_subcommands()
        .map(|sub| sub.get_name().to_owned())
        .collect();
    for name in names {
        command = command.mut_subcommand(name, completed);
    }
    command.mut_args(|argument| {
        // `-1` is a wrong number and not an option that nobody knows.
        let takes_values = argument.get_action().takes_values();
        let argument = argument.allow_negative_numbers(takes_values);
        match argument.get_id().as_str() {
            "recipe" | "recipes" => argument.add(ArgValueCompleter::new(recipes_and_stages)),
            "stage" | "stages" | "force" | "downstream" | "targets" => {
                argument.add(ArgValueCandidates::new(stages))
            }
            "kind" => argument.add(ArgValueCandidates::new(kinds)),
            _ => argument,
        }
    })
}

fn kinds() -> Vec<CompletionCandidate> {
    let kinds = crate::stages::KINDS.iter();
    kinds
        .map(|kind| CompletionCandidate::new(kind.name))
        .collect()
}

/// The stages of the recipe on the command line that is completed, or of the project's.
fn stages() -> Vec<CompletionCandidate> {
    // The words stand behind `--`.
    let words = std::env::args_os().skip_while(|word| word != "--").skip(2);
    let named = words
        .map(std::path::PathBuf::from)
        .find(|word| default_recipe::is_recipe(word.as_os_str()) && word.is_file());
    let found = || default_recipe::find(&std::env::current_dir().ok()?);
    let stages = named.or_else(found).map(stages_of);
    let stages = stages.unwrap_or_default();
    stages
        .into_iter()
        .map(|(name, kind)| CompletionCandidate::new(name).help(kind.map(Into::into)))
        .collect()
}

/// The names of a recipe's stages and their kinds, with those of recipes that it includes, as far as they are on this machine.
fn stages_of(path: std::path::PathBuf) -> Vec<(String, Option<String>)> {
    let Ok(text) = super::read_text(&path, 1 << 20) else {
        return Vec::new();
    };
    if ["include", "extends"].iter().any(|key| text.contains(key)) {
        let args = RecipeArgs {
            recipe: path,
            reading: super::args::ReadingArgs::default(),
        };
        if let Some(recipe) = super::project::load_at_hand(&args) {
            return crate::recipe::names_of(recipe);
        }
    }
    crate::recipe::stage_names(&text, crate::stages::KINDS)
}

/// Where a recipe may stand, a stage of the project's may stand too.
fn recipes_and_stages(current: &std::ffi::OsStr) -> Vec<CompletionCandidate> {
    let paths = PathCompleter::file().filter(|path| {
        path.is_dir()
            || default_recipe::is_recipe(path.as_os_str()) && {
                let ends = path.extension().and_then(|extension| extension.to_str());
                ends.is_some_and(|ends| ["yaml", "yml", "json"].contains(&ends))
            }
    });
    let mut all = paths.complete(current);
    let current = current.to_string_lossy();
    let here = std::env::current_dir().ok();
    if here.and_then(|here| default_recipe::find(&here)).is_some() {
        let fits = |candidate: &CompletionCandidate| {
            candidate
                .get_value()
                .to_string_lossy()
                .starts_with(current.as_ref())
        };
        all.extend(stages().into_iter().filter(fits));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_group_and_no_group_a_command_twice() {
        let command = command();
        let groups = grouped(&command);
        let more = groups.iter().find(|(title, _)| *title == "More");
        let more: Vec<&str> = more
            .iter()
            .flat_map(|(_, commands)| commands)
            .map(|sub| sub.get_name())
            .collect();
        assert!(more.is_empty(), "put into a group of GROUPS: {more:?}");
        let mut names: Vec<&str> = GROUPS
            .iter()
            .flat_map(|(_, names)| names.iter().copied())
            .collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
    }

    #[test]
    fn help_lists_every_command_once() {
        let mut command = command();
        command.clone().debug_assert();
        let help = crate::report::style::stripped(&command.render_help().to_string());
        for sub in command
            .get_subcommands()
            .filter(|sub| !sub.is_hide_set() && sub.get_name() != "help")
        {
            let line = format!("\n  {:12} ", sub.get_name());
            assert_eq!(help.matches(&line).count(), 1, "{}\n{help}", sub.get_name());
        }
        assert!(
            help.contains("\nRun:\n") && help.contains("Exit codes:"),
            "{help}"
        );
    }
}
