//! `pipeline.yaml`, found by itself where a command names no recipe.
//!
//! What tells a recipe from a stage: a recipe ends in `.yaml`, `.yml` or `.json`, has a `/`, or is there as a file; the name of a stage
//! can be none of the first two.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::{Arg, Command};

use super::{Failure, eprint, error};

/// The recipe of a project.
pub(super) const NAME: &str = "pipeline.yaml";
/// The argument of commands that take a recipe or a folder with a model.
const TARGET: &str = "target";
/// How a recipe ends.
const ENDINGS: [&str; 3] = ["yaml", "yml", "json"];

/// The recipe of the project around a folder, as a path from there.
pub(super) fn find(from: &Path) -> Option<PathBuf> {
    let folder = from
        .ancestors()
        .position(|folder| folder.join(NAME).is_file())?;
    let mut path: PathBuf = std::iter::repeat_n("..", folder).collect();
    path.push(NAME);
    Some(path)
}

/// Whether a word on the command line means a recipe and not a stage.
pub(super) fn is_recipe(word: &OsStr) -> bool {
    let path = Path::new(word);
    let ends = |extension: &OsStr| {
        ENDINGS
            .iter()
            .any(|ending| extension.eq_ignore_ascii_case(ending))
    };
    path.extension().is_some_and(ends) || word.to_string_lossy().contains('/') || path.is_file()
}

/// The arguments of `command`, which are the program's, with the project's recipe where one is needed and none is named.
pub(super) fn fill(
    command: &Command,
    mut arguments: Vec<OsString>,
    here: &Path,
) -> Result<Vec<OsString>, Failure> {
    let mut chain = vec![command];
    let mut at = 1;
    let place = loop {
        let found = positional(&chain, &arguments, at);
        let sub = found.and_then(|place| {
            let name = arguments.get(place)?.to_str()?;
            chain.last()?.find_subcommand(name)
        });
        match (found, sub) {
            (Some(place), Some(sub)) => {
                chain.push(sub);
                at = place + 1;
            }
            (found, _) => break found,
        }
    };
    let needs = chain.last().and_then(|command| {
        command
            .get_positionals()
            .find(|argument| is_recipe_argument(argument))
    });
    let asks_for_help = arguments
        .iter()
        .skip(at)
        .any(|word| word == "--help" || word == "-h");
    if needs.is_none() || asks_for_help {
        return Ok(arguments);
    }
    let word = place.and_then(|place| arguments.get(place));
    let takes_folders = needs.is_some_and(|argument| argument.get_id() == TARGET);
    let is_named = |word: &OsString| is_recipe(word) || takes_folders && Path::new(word).is_dir();
    if word.is_some_and(is_named) {
        return Ok(arguments);
    }
    let Some(recipe) = find(here) else {
        let message = match word {
            Some(word) if takes_folders => format!(
                "`{}` is no recipe and no folder, and there is no `{NAME}` here or in a folder above",
                word.to_string_lossy()
            ),
            Some(word) => format!(
                "there is no recipe: `{}` is no file, and there is no `{NAME}` here or in a folder above",
                word.to_string_lossy()
            ),
            None => {
                format!("no recipe is named, and there is no `{NAME}` here or in a folder above")
            }
        };
        let hint =
            "a recipe is a file that ends in .yaml, .yml or .json; `pipeline init` writes one";
        return Err(Failure::Usage(error::with_hint(&message, hint)));
    };
    if recipe
        .parent()
        .is_some_and(|folder| folder != Path::new(""))
    {
        eprint(&format!("the recipe is `{}`\n", recipe.display()));
    }
    // In front of the stages; an option that takes a value stays beside it.
    let place = place.unwrap_or(arguments.len()).min(arguments.len());
    arguments.insert(place, recipe.into());
    Ok(arguments)
}

/// Whether a positional argument is the recipe, and a command can't do without.
fn is_recipe_argument(argument: &Arg) -> bool {
    ["recipe", "recipes", TARGET].contains(&argument.get_id().as_str())
        && argument.is_required_set()
}

/// The index of the first word from `at` on that belongs to no option of the commands in `chain`.
fn positional(chain: &[&Command], arguments: &[OsString], at: usize) -> Option<usize> {
    let mut place = at;
    while let Some(word) = arguments.get(place) {
        let word = word.to_string_lossy();
        if word == "--" {
            return arguments.get(place + 1).map(|_| place + 1);
        }
        let takes_next = match word.strip_prefix("--") {
            Some(long) if !long.contains('=') => takes_value(chain, |argument| {
                argument.get_long() == Some(long)
                    || argument
                        .get_all_aliases()
                        .is_some_and(|all| all.contains(&long))
            }),
            Some(_) => false,
            None => match word.strip_prefix('-') {
                Some(short) if !short.is_empty() => {
                    short.chars().count() == 1
                        && takes_value(chain, |argument| {
                            argument.get_short() == short.chars().next()
                        })
                }
                _ => return Some(place),
            },
        };
        place += 1 + usize::from(takes_next);
    }
    None
}

fn takes_value(chain: &[&Command], is_meant: impl Fn(&Arg) -> bool) -> bool {
    let all = chain
        .iter()
        .rev()
        .flat_map(|command| command.get_arguments());
    all.filter(|argument| !argument.is_positional())
        .find(|argument| is_meant(argument))
        .is_some_and(|argument| argument.get_action().takes_values())
}

/// The command with the recipe shown as what may be left out.
pub(super) fn optional(mut command: Command) -> Command {
    let names: Vec<String> = command
        .get_subcommands()
        .map(|sub| sub.get_name().to_owned())
        .collect();
    for name in names {
        command = command.mut_subcommand(name, optional);
    }
    let positionals: Vec<&Arg> = command.get_positionals().collect();
    let recipe = positionals
        .iter()
        .find(|argument| is_recipe_argument(argument));
    let Some(id) = recipe.map(|argument| argument.get_id().clone()) else {
        return command;
    };
    let others = positionals
        .iter()
        .any(|argument| argument.is_required_set() && *argument.get_id() != id);
    // `mut_arg` would put it behind the others.
    command = command.mut_args(|argument| {
        if *argument.get_id() != id {
            return argument;
        }
        let help = argument
            .get_help()
            .map(ToString::to_string)
            .unwrap_or_default();
        argument.required(false).help(format!(
            "{help} [default: `{NAME}` here or in a folder above]"
        ))
    });
    if others {
        command = command.allow_missing_positional(true);
    }
    command
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn a_recipe_is_put_where_none_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let here = folder.path();
        std::fs::write(here.join(NAME), "").unwrap();
        let below = here.join("a/b");
        std::fs::create_dir_all(&below).unwrap();
        let command = Cli::command();
        let filled = |words: &[&str], here: &Path| -> Vec<String> {
            let words = std::iter::once("pipeline").chain(words.iter().copied());
            let filled = fill(&command, words.map(OsString::from).collect(), here);
            let filled = filled.unwrap_or_else(|_| panic!("refused"));
            filled
                .iter()
                .skip(1)
                .map(|word| word.to_string_lossy().into_owned())
                .collect()
        };
        for (words, expected) in [
            (&["run"][..], &["run", NAME][..]),
            (&["run", "tuned"], &["run", NAME, "tuned"]),
            (
                &["run", "--force", "tuned"],
                &["run", "--force", "tuned", NAME],
            ),
            (
                &["run", "--force=tuned", "a"],
                &["run", "--force=tuned", NAME, "a"],
            ),
            (
                &["--color", "never", "run", "a"],
                &["--color", "never", "run", NAME, "a"],
            ),
            (&["run", "other.yaml", "a"], &["run", "other.yaml", "a"]),
            (&["run", "x/other", "a"], &["run", "x/other", "a"]),
            (
                &["show", "-n", "5", "tuned"],
                &["show", "-n", "5", NAME, "tuned"],
            ),
            (&["run", "--", "tuned"], &["run", "--", NAME, "tuned"]),
            (&["gc", "--dry-run"], &["gc", "--dry-run", NAME]),
            (
                &["cache", "pull", "tuned"],
                &["cache", "pull", NAME, "tuned"],
            ),
            (&["cache", "push", "--all"], &["cache", "push", "--all"]),
            (&["run", "--help"], &["run", "--help"]),
            (&["chat", "--compare"], &["chat", "--compare", NAME]),
            (&["chat", "tuned"], &["chat", NAME, "tuned"]),
            (&["chat", "."], &["chat", "."]),
            (
                &["generate", "--prompt", "a", "tuned"],
                &["generate", "--prompt", "a", NAME, "tuned"],
            ),
            (&["schema"], &["schema"]),
            (&[], &[]),
            (&["fly"], &["fly"]),
        ] {
            assert_eq!(filled(words, here), expected, "{words:?}");
        }
        assert_eq!(
            filled(&["run", "a"], &below),
            ["run", "../../pipeline.yaml", "a"]
        );
        let nowhere = tempfile::tempdir().unwrap();
        let words = ["pipeline", "run", "tuned"].map(OsString::from).to_vec();
        assert!(fill(&command, words, nowhere.path()).is_err());
    }

    #[test]
    fn the_command_line_is_still_one() {
        optional(Cli::command()).debug_assert();
    }
}
