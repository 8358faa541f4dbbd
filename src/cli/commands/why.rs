//! `why`: every reason of one stage, with the places of the parameters in the recipe.

use std::fmt::Write as _;

use similar::{ChangeTag, TextDiff};

use super::plan::{describe, goes_on};
use crate::cli::args::{RecipeArgs, StoreArgs};
use crate::cli::project::Project;
use crate::cli::remote::RemoteArgs;
use crate::cli::{Failure, print_headed};
use crate::engine::{Forecast, Reason, State};
use crate::report::{ago, duration};

#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// The stage
    stage: String,
    #[command(flatten)]
    store: StoreArgs,
    #[command(flatten)]
    remote: RemoteArgs,
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    let mut project = Project::open(&args.recipe, &args.store)?;
    project.connect(&args.remote, true)?;
    let asked = project.find_all(std::slice::from_ref(&args.stage))?;
    let forecasts = project.session(&[]).forecast(&asked);
    project.report_warnings()?;
    let mut text = String::new();
    for (number, index) in asked.iter().enumerate() {
        if number > 0 {
            text.push('\n');
        }
        explain(&project, &forecasts, *index, &mut text);
    }
    // What it waits on, and what that waits on: each once, nearest first.
    let mut told = asked;
    let mut next = 0;
    while let Some(&index) = told.get(next) {
        next += 1;
        let state = |index: usize| Some(&forecasts.get(index)?.as_ref()?.state);
        if let Some(State::WaitsOn { .. }) = state(index) {
            for &input in &project.graph.inputs[index] {
                let open = !matches!(state(input), Some(State::Fresh { .. }));
                if open && !told.contains(&input) {
                    text.push('\n');
                    explain(&project, &forecasts, input, &mut text);
                    told.push(input);
                }
            }
        }
    }
    print_headed(&text);
    Ok(())
}

fn explain(project: &Project, forecasts: &[Option<Forecast>], index: usize, text: &mut String) {
    let (Some(stage), Some(Some(forecast))) =
        (project.recipe.stages.get(index), forecasts.get(index))
    else {
        return;
    };
    let state = &forecast.state;
    let name = &stage.name;
    let (word, lines) = describe(state);
    match state {
        State::Fresh {
            artifact,
            frozen: Some(reasons),
            ..
        } => {
            let result = lines.first().map_or("", String::as_str);
            _ = writeln!(text, "`{name}` is frozen: {result}");
            if reasons.is_empty() {
                _ = writeln!(text, "  nothing changed since it was made");
            } else {
                _ = writeln!(text, "  its last result is taken, whatever changed since:");
                list(project, name, reasons, text);
            }
            _ = writeln!(text, "  {}", project.store.artifact(artifact).display());
        }
        State::Fresh {
            artifact, remote, ..
        } => {
            _ = writeln!(text, "`{name}` is fresh: {}", lines.join(" "));
            if *remote {
                let address = project.shared.address().unwrap_or("a remote");
                _ = writeln!(
                    text,
                    "  made elsewhere from the same parameters and contents; its files come from {address} when they are needed"
                );
                return;
            }
            if let Some(record) = project.record_of(index) {
                _ = writeln!(
                    text,
                    "  made {} in {} from the same parameters and contents",
                    ago(record.started),
                    duration(record.seconds)
                );
            }
            _ = writeln!(text, "  {}", project.store.artifact(artifact).display());
        }
        State::Fails { artifact, error } => {
            _ = writeln!(text, "`{name}` {word}: {error}");
            _ = writeln!(
                text,
                "  its result is up to date and stays: {}",
                project.store.artifact(artifact).display()
            );
        }
        State::Unknown { error } => _ = writeln!(text, "the state of `{name}` is unknown: {error}"),
        State::Runs { reasons } => {
            _ = writeln!(text, "`{name}` {word}:");
            list(project, name, reasons, text);
        }
        State::WaitsOn { stages, reasons } => {
            _ = writeln!(text, "`{name}` {word} on {}", stages.join(", "));
            list(project, name, reasons, text);
        }
    }
    if let Some(position) = &forecast.goes_on {
        _ = writeln!(text, "  {}, from its last checkpoint", goes_on(position));
    }
}

/// Reasons with the places of their parameters and, for small text files, the changed lines.
pub(in crate::cli) fn list(project: &Project, stage: &str, reasons: &[Reason], text: &mut String) {
    for reason in reasons {
        _ = writeln!(text, "  - {reason}");
        let (Reason::ParameterChanged { parameter, .. }
        | Reason::InputChanged { parameter, .. }
        | Reason::FileChanged { parameter, .. }) = reason
        else {
            continue;
        };
        if let Some(stage) = project.recipe.stage(stage) {
            let path = format!("stages.{}.{}.{parameter}", stage.name, stage.kind.name);
            if let Some(span) = project.recipe.span_of(&path) {
                _ = writeln!(text, "    {}", project.recipe.place(span));
            }
        }
        match reason {
            Reason::FileChanged {
                path,
                old: Some(old),
                new,
                ..
            } => {
                let old = project.store.text(old);
                let new = project
                    .store
                    .text(new)
                    .or_else(|| project.file(stage, path));
                if let (Some(old), Some(new)) = (old, new) {
                    changed_lines(&old, &new, text);
                }
            }
            Reason::InputChanged {
                stage,
                old: Some(old),
                new,
                ..
            } => {
                let rows = [old, new].map(|content| project.rows_of(stage, content));
                if let [Some(old), Some(new)] = rows {
                    _ = writeln!(text, "    rows {old} -> {new}");
                }
            }
            _ => {}
        }
    }
}

fn changed_lines(old: &str, new: &str, text: &mut String) {
    const MOST: usize = 40;
    let difference = TextDiff::from_lines(old, new);
    let changes = difference
        .iter_all_changes()
        .filter(|change| change.tag() != ChangeTag::Equal);
    for (number, change) in changes.enumerate() {
        if number == MOST {
            text.push_str("    ..\n");
            return;
        }
        let (sign, line) = match change.tag() {
            ChangeTag::Delete => ('-', change.old_index()),
            _ => ('+', change.new_index()),
        };
        let line = line.map_or(0, |line| line + 1);
        _ = writeln!(text, "    {sign} {line:>4} | {}", change.value().trim_end());
    }
}
