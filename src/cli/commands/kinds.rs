//! `kinds`: the kinds of stages and their parameters.

use std::fmt::Write as _;

use serde_json::json;

use crate::cli::{Failure, error, paragraphs, print_json, print_rendered, table};
use crate::recipe::{about, described, suggest_kind};
use crate::report::harmless;
use crate::report::style::{BOLD, DIM, paint};
use crate::stages::KINDS;

#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  pipeline kinds
  pipeline kinds train_orpo")]
pub(in crate::cli) struct Args {
    /// A kind, for its parameters
    kind: Option<String>,
    /// The same as JSON
    #[arg(long)]
    json: bool,
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    let Some(name) = &args.kind else {
        if args.json {
            let kinds = KINDS.iter().map(|kind| json!({ "kind": kind.name, "makes": kind.output, "about": first(&about(kind)) }));
            return print_json(&kinds.collect::<Vec<_>>());
        }
        let rows: Vec<Vec<String>> = KINDS
            .iter()
            .map(|kind| {
                vec![
                    kind.name.to_owned(),
                    kind.output.to_owned(),
                    first(&about(kind)),
                ]
            })
            .collect();
        let text = table(&rows);
        print_rendered(&format!(
            "{}\n{}\n",
            harmless(&text),
            paint(DIM, "`pipeline kinds KIND` lists its parameters")
        ));
        return Ok(());
    };
    let Some(kind) = crate::stages::kind(name) else {
        let message = format!("there is no kind `{name}`");
        return Err(Failure::Usage(error::with_hint(
            &message,
            &suggest_kind(name, KINDS),
        )));
    };
    let parameters = described(kind);
    if args.json {
        let parameters = parameters.iter().map(|[name, kind, default, meaning]| {
            json!({ "parameter": name, "type": kind, "default": default, "meaning": meaning })
        });
        return print_json(&parameters.collect::<Vec<_>>());
    }
    let mut text = format!(
        "{} makes `{}`\n\n{}\n",
        paint(BOLD, kind.name),
        kind.output,
        paragraphs(&about(kind)).trim_end()
    );
    for [name, kind, default, meaning] in parameters {
        let default = match default.as_str() {
            "" => String::new(),
            "required" => ", required".to_owned(),
            default => format!(", default {default}"),
        };
        _ = writeln!(
            text,
            "\n  {}  {}",
            paint(BOLD, &name),
            paint(DIM, &format!("{kind}{default}"))
        );
        let width = terminal_size::terminal_size().map_or(100, |(width, _)| usize::from(width.0));
        let options = textwrap::Options::new(width.clamp(40, 120))
            .initial_indent("      ")
            .subsequent_indent("      ");
        _ = writeln!(text, "{}", textwrap::fill(&meaning, options));
    }
    print_rendered(&text);
    Ok(())
}

/// The first sentence.
fn first(text: &str) -> String {
    let line = text
        .split("\n\n")
        .next()
        .unwrap_or_default()
        .replace('\n', " ");
    match line.split_once(". ") {
        Some((first, _)) => first.to_owned(),
        None => line.trim_end_matches('.').to_owned(),
    }
}
