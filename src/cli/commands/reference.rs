//! The reference of the command line in Markdown, from the same definitions that parse it.

use std::fmt::Write as _;

use clap::{Arg, Command};

use crate::cli::help;

/// The contents of `docs/reference/cli.md`.
pub fn reference() -> String {
    let command = help::command();
    let mut text =
        String::from("# Command line\n\nGenerated from the argument structs; do not edit.\n\n");
    _ = writeln!(text, "{}\n", about(&command));
    if let Some(codes) = command.get_after_help() {
        _ = writeln!(text, "{codes}");
    }
    for command in command.get_subcommands() {
        if command.get_name() == "help" {
            continue;
        }
        let arguments: Vec<&Arg> = command.get_arguments().collect();
        _ = write!(
            text,
            "\n## pipeline {}\n\n{}.\n\n",
            command.get_name(),
            about(command)
        );
        _ = writeln!(
            text,
            "    pipeline {}{}",
            command.get_name(),
            usage(&arguments)
        );
        if !arguments.is_empty() {
            text.push_str("\n| argument | meaning |\n|---|---|\n");
        }
        for argument in arguments {
            let help = argument
                .get_help()
                .map(ToString::to_string)
                .unwrap_or_default();
            _ = writeln!(
                text,
                "| `{}` | {}{} |",
                name(argument),
                help.replace('|', "\\|"),
                values(argument)
            );
        }
    }
    text
}

fn about(command: &Command) -> String {
    command
        .get_about()
        .map(ToString::to_string)
        .unwrap_or_default()
}

fn usage(arguments: &[&Arg]) -> String {
    let mut usage = String::new();
    for argument in arguments.iter().filter(|argument| argument.is_positional()) {
        let name = name(argument);
        _ = if argument.is_required_set() {
            write!(usage, " {name}")
        } else {
            write!(usage, " [{name}]")
        };
    }
    if arguments.iter().any(|argument| !argument.is_positional()) {
        usage.push_str(" [options]");
    }
    usage
}

fn name(argument: &Arg) -> String {
    let values = argument.get_value_names().unwrap_or_default();
    let value = values.first().map(ToString::to_string).unwrap_or_default();
    match argument.get_long() {
        None if argument
            .get_num_args()
            .is_some_and(|range| range.max_values() > 1) =>
        {
            format!("{value}..")
        }
        None => value,
        Some(long) if argument.get_action().takes_values() => format!("--{long} {value}"),
        Some(long) => format!("--{long}"),
    }
}

fn values(argument: &Arg) -> String {
    let possible: Vec<String> = argument
        .get_possible_values()
        .iter()
        .map(|value| format!("`{}`", value.get_name()))
        .collect();
    if possible.is_empty() || !argument.get_action().takes_values() {
        return String::new();
    }
    format!(": {}", possible.join(", "))
}
