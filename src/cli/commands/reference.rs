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
    text.push_str("\n## Options of every command\n");
    table(&mut text, &command.get_arguments().collect::<Vec<_>>());
    for (title, commands) in help::grouped(&command) {
        _ = write!(text, "\n## {title}\n");
        for command in commands {
            section(&mut text, command, "pipeline", 3);
        }
    }
    text
}

/// The commands below one that users see.
fn visible(command: &Command) -> impl Iterator<Item = &Command> {
    let commands = command.get_subcommands();
    commands.filter(|command| command.get_name() != "help" && !command.is_hide_set())
}

/// A command and those below it, each with a heading of its own.
fn section(text: &mut String, command: &Command, above: &str, level: usize) {
    let name = format!("{above} {}", command.get_name());
    let below: Vec<&Command> = visible(command).collect();
    let arguments: Vec<&Arg> = command.get_arguments().collect();
    let about = about(command);
    let stop = if about.ends_with('.') { "" } else { "." };
    _ = write!(text, "\n{} {name}\n\n{about}{stop}\n\n", "#".repeat(level));
    let mut usage = usage(&arguments);
    if !below.is_empty() {
        usage.push_str(" COMMAND");
    }
    _ = writeln!(text, "    {name}{usage}");
    if let Some(more) = command.get_after_help() {
        indented(text, &more.to_string());
    }
    table(text, &arguments);
    for command in below {
        section(text, command, &name, level + 1);
    }
}

/// Arguments and what they mean.
fn table(text: &mut String, arguments: &[&Arg]) {
    if !arguments.is_empty() {
        text.push_str("\n| argument | meaning |\n|---|---|\n");
    }
    for argument in arguments {
        let help = argument
            .get_help()
            .map(ToString::to_string)
            .unwrap_or_default();
        let short = argument.get_short().map(|short| format!("`-{short}`, "));
        _ = writeln!(
            text,
            "| {}`{}` | {}{}{} |",
            short.unwrap_or_default(),
            name(argument).replace('|', "\\|"),
            help.replace('|', "\\|"),
            values(argument),
            default(argument)
        );
    }
}

/// Examples and the like as they stand in the help, which has lines of its own.
fn indented(text: &mut String, more: &str) {
    text.push_str("\n```text\n");
    for line in more.trim_end().lines() {
        _ = writeln!(text, "{}", line.trim_end());
    }
    text.push_str("```\n");
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

/// The value without the option, where its help doesn't say it.
fn default(argument: &Arg) -> String {
    let values: Vec<_> = argument
        .get_default_values()
        .iter()
        .map(|value| value.to_string_lossy())
        .collect();
    if values.is_empty()
        || !argument.get_action().takes_values()
        || argument.is_hide_default_value_set()
    {
        return String::new();
    }
    format!(" [default: {}]", values.join(" "))
}
