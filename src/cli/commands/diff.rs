//! `diff`: what differs between two runs, and in which result it ended.

use std::fmt::Write as _;

use super::why::list;
use crate::cli::args::{RecipeArgs, StoreArgs};
use crate::cli::project::Project;
use crate::cli::{Failure, error, print, print_json};
use crate::engine::{Difference, Run, short};

#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// The earlier run, by its number in `history` [default: the last but one]
    old: Option<u64>,
    /// The later run [default: the last]
    new: Option<u64>,
    /// The differences as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    store: StoreArgs,
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    let project = Project::open(&args.recipe, &args.store)?;
    let runs = project.runs();
    let last = runs.last().map_or(0, |run| run.number);
    let new = find(&runs, args.new.unwrap_or(last))?;
    let before = runs
        .iter()
        .map(|run| run.number)
        .rfind(|number| *number < new.number);
    let old = find(&runs, args.old.or(before).unwrap_or(0))?;
    let differences = project.store.compare(old, new);
    if args.json {
        return print_json(&differences);
    }
    let mut text = format!("run {} -> run {}\n", old.number, new.number);
    if differences.is_empty() {
        text.push_str("no stage differs\n");
    }
    // In the order of the recipe, and then what it no longer has.
    let order = project.recipe.order();
    let here = order
        .iter()
        .filter_map(|&index| project.recipe.stages.get(index));
    let here: Vec<&str> = here.map(|stage| stage.name.as_str()).collect();
    let gone = differences
        .keys()
        .map(String::as_str)
        .filter(|name| !here.contains(name));
    for name in here.iter().copied().chain(gone) {
        let Some(difference) = differences.get(name) else {
            continue;
        };
        match difference {
            Difference::Added => _ = writeln!(text, "\n`{name}` is new"),
            Difference::Removed => _ = writeln!(text, "\n`{name}` is gone"),
            Difference::Changed {
                reasons,
                same_bytes,
            } => {
                _ = writeln!(text, "\n`{name}`");
                list(&project, name, reasons, &mut text);
                result(old, new, name, *same_bytes, &mut text);
            }
        }
    }
    print(&text);
    Ok(())
}

fn result(old: &Run, new: &Run, name: &str, same_bytes: bool, text: &mut String) {
    let artifact = |run: &Run| {
        run.stages
            .get(name)
            .and_then(|stage| stage.artifact.clone())
    };
    _ = match (artifact(old), artifact(new)) {
        (Some(_), Some(_)) if same_bytes => writeln!(text, "  the result has the same bytes"),
        (old, new) => writeln!(
            text,
            "  result {} -> {}",
            short(old.as_deref()),
            short(new.as_deref())
        ),
    };
}

fn find(runs: &[Run], number: u64) -> Result<&Run, Failure> {
    runs.iter().find(|run| run.number == number).ok_or_else(|| {
        let hint = match runs {
            [] => "there are no runs yet".to_owned(),
            [only] => format!("there is only run {}", only.number),
            [first, .., last] => format!(
                "there are the runs {} to {}: see `pipeline history`",
                first.number, last.number
            ),
        };
        let message = if number == 0 {
            "there are no two runs to compare".to_owned()
        } else {
            format!("there is no run {number}")
        };
        Failure::Usage(error::with_hint(&message, &hint))
    })
}
