//! `plan`: what `run` would do, one line a stage, with what it is likely to take.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::estimate::{estimates, shown};
use super::run::{check_lock, warn_of_unused};
use crate::cli::args::{RecipeArgs, StoreArgs};
use crate::cli::console::{output_columns, verbosity};
use crate::cli::project::Project;
use crate::cli::remote::RemoteArgs;
use crate::cli::{Failure, eprint_rendered, print_json, print_rendered};
use crate::engine::{Forecast, Position, Reason, State, short};
use crate::recipe::LeftOut;
use crate::report::style::{BOLD, DIM, ERROR, GOOD, RUNS, WAITS, WARNING, paint};
use crate::report::{Verbosity, bytes, count, duration, harmless, thousands, wrap};

#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// The stages to plan, with everything they depend on [default: all]
    stages: Vec<String>,
    /// Plans this stage and all that depend on it, with what they need; may be repeated
    #[arg(long, value_name = "STAGE")]
    downstream: Vec<String>,
    /// Plans to run this stage even if it is fresh; may be repeated
    #[arg(long, value_name = "STAGE")]
    force: Vec<String>,
    /// Fails if any input differs from what the lock file pins
    #[arg(long)]
    locked: bool,
    /// Exits with 0 if there is nothing to do, with 2 if there is something, with 1 if that is not known
    #[arg(long)]
    exit_code: bool,
    /// The plan as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    store: StoreArgs,
    #[command(flatten)]
    remote: RemoteArgs,
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    let planned = plan(args);
    match planned {
        // 2 has another meaning here.
        Err(Failure::Usage(text)) if args.exit_code => {
            eprint_rendered(&text);
            Err(Failure::Reported)
        }
        planned => planned,
    }
}

fn plan(args: &Args) -> Result<(), Failure> {
    let mut project = Project::open(&args.recipe, &args.store)?;
    project.connect(&args.remote, true)?;
    let targets = project.targets(&args.stages, &args.downstream)?;
    let forced = project.find_all(&args.force)?;
    check_lock(&project, args.locked)?;
    project.locked = args.locked;
    let forecasts = project.session(&forced).forecast(&targets);
    project.report_warnings()?;
    warn_of_unused(&project);
    let order = project.recipe.order().into_iter();
    let planned: Vec<Planned> = order
        .filter_map(|index| {
            let stage = project.recipe.stages.get(index)?;
            Some(Planned {
                name: &stage.name,
                kind: stage.kind.name,
                forecast: forecasts.get(index)?.as_ref()?,
            })
        })
        .collect();
    let left_out = &project.recipe.left_out;
    if args.json {
        let planned = planned.iter().map(Planned::json);
        let left_out = left_out.iter().map(|left| {
            let plan = json!({ "state": "left_out", "when": left.when });
            json!({ "stage": left.name, "kind": left.kind, "plan": plan })
        });
        print_json(&planned.chain(left_out).collect::<Vec<_>>())?;
    } else {
        if verbosity() > Verbosity::Quiet {
            let columns = output_columns();
            print_rendered(&table(&planned, columns));
            for line in left_out_lines(left_out) {
                for line in wrap(&harmless(&line), columns.unwrap_or(usize::MAX)) {
                    print_rendered(&format!(
                        "{}
",
                        paint(DIM, &line)
                    ));
                }
            }
            if let Some(implied) = project.recipe.implied() {
                for line in wrap(&implied, columns.unwrap_or(usize::MAX)) {
                    print_rendered(&format!("{}\n", paint(DIM, &line)));
                }
            }
        }
        print_rendered(&sum(&planned));
        if verbosity() == Verbosity::Verbose {
            print_estimates(&project, &forecasts)?;
        }
    }
    let any = |wanted: fn(&State) -> bool| {
        planned
            .iter()
            .any(|planned| wanted(&planned.forecast.state))
    };
    if any(|state| matches!(state, State::Unknown { .. })) {
        return Err(Failure::Reported);
    }
    if args.exit_code && any(|state| !matches!(state, State::Fresh { .. })) {
        return Err(Failure::Changes);
    }
    Ok(())
}

/// The stages that are left out, by the expressions that do it.
fn left_out_lines(left_out: &[LeftOut]) -> Vec<String> {
    const MOST: usize = 5;
    let mut by_when: Vec<(&str, Vec<&str>)> = Vec::new();
    for left in left_out {
        match by_when.iter_mut().find(|(when, _)| *when == left.when) {
            Some((_, names)) => names.push(&left.name),
            None => by_when.push((&left.when, vec![&left.name])),
        }
    }
    let lines = by_when.into_iter().map(|(when, names)| {
        let more = match names.len().saturating_sub(MOST) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let names = names.get(..MOST).unwrap_or(&names).join(", ");
        match when {
            "" => format!("left out with what they take from: {names}{more}"),
            when => format!("left out by `when: {when}`: {names}{more}"),
        }
    });
    lines.collect()
}

/// What the trainings that will run take, where their inputs are there.
fn print_estimates(project: &Project, forecasts: &[Option<Forecast>]) -> Result<(), Failure> {
    let states = project.plan();
    let runs = |index: usize| {
        let forecast = forecasts.get(index).and_then(Option::as_ref);
        forecast.is_some_and(|forecast| !matches!(forecast.state, State::Fresh { .. }))
    };
    let (found, _) = estimates(project, &states, runs)?;
    for one in found {
        print_rendered(&format!("\n{}", shown(&one, project.env.memory)));
    }
    Ok(())
}

/// A stage of the plan.
struct Planned<'a> {
    name: &'a str,
    kind: &'static str,
    forecast: &'a Forecast,
}

impl Planned<'_> {
    fn json(&self) -> Value {
        let mut value = json!({ "stage": self.name, "kind": self.kind });
        if let (Some(value), Ok(Value::Object(forecast))) =
            (value.as_object_mut(), serde_json::to_value(self.forecast))
        {
            value.extend(forecast);
        }
        value
    }
}

/// The columns below which reasons stand below a stage's line, because there is too little room for them in it.
const LEAST_FOR_REASONS: usize = 24;
/// The columns of a digest as it is shown.
const DIGEST: usize = 10;

/// The lines of all stages; reasons are wrapped between words where a terminal has `columns`.
fn table(planned: &[Planned<'_>], columns: Option<usize>) -> String {
    let width = |of: fn(&Planned<'_>) -> usize| planned.iter().map(of).max().unwrap_or(0);
    let names = width(|planned| planned.name.chars().count());
    let kinds = width(|planned| planned.kind.chars().count());
    let expected: Vec<[String; 2]> = planned.iter().map(|one| expected(one.forecast)).collect();
    let wide = |column: usize| {
        let cells = expected.iter().map(|cells| cells[column].chars().count());
        cells.max().unwrap_or(0)
    };
    let (times, sizes) = (wide(0), wide(1));
    let mut text = String::new();
    for (planned, [time, size]) in planned.iter().zip(&expected) {
        let state = &planned.forecast.state;
        let (word, mut why) = describe(state);
        if let Some(position) = &planned.forecast.goes_on {
            why.push(goes_on(position));
        }
        let style = match state {
            State::Fresh {
                frozen: Some(reasons),
                ..
            } if !reasons.is_empty() => WARNING,
            State::Fresh { .. } => GOOD,
            State::Runs { .. } => RUNS,
            State::WaitsOn { .. } => WAITS,
            State::Fails { .. } | State::Unknown { .. } => ERROR,
        };
        let head = format!(
            "{}  {}  {}  ",
            paint(BOLD, &format!("{:names$}", planned.name)),
            format_args!("{:kinds$}", planned.kind),
            paint(style, &format!("{word:7}"))
        );
        let mut costs = String::new();
        for (cell, width) in [(time, times), (size, sizes)] {
            if width > 0 {
                _ = write!(costs, "{cell:>width$}  ");
            }
        }
        let margin = names + kinds + 7 + 6 + costs.len();
        let is_fresh = matches!(state, State::Fresh { .. });
        let beside = columns
            .map(|columns| columns.saturating_sub(margin))
            .filter(|room| *room >= LEAST_FOR_REASONS || is_fresh && *room >= DIGEST);
        text.push_str(&head);
        text.push_str(&paint(DIM, &costs));
        // Where there is no room beside the costs, reasons stand below.
        let (indent, room) = match (columns, beside) {
            (None, _) => (margin, usize::MAX),
            (Some(_), Some(room)) => (margin, room),
            (Some(columns), None) => {
                if !why.is_empty() {
                    trim_end(&mut text);
                    text.push_str("  ");
                }
                (2, columns.saturating_sub(2))
            }
        };
        let mut lines = why.iter().flat_map(|why| wrap(&harmless(why), room));
        let first = lines.next().unwrap_or_default();
        text.push_str(&if is_fresh { paint(DIM, &first) } else { first });
        trim_end(&mut text);
        for line in lines {
            text.push_str(&" ".repeat(indent));
            text.push_str(&line);
            trim_end(&mut text);
        }
    }
    text
}

/// Ends a line without spaces before its end.
fn trim_end(text: &mut String) {
    text.truncate(text.trim_end_matches(' ').len());
    text.push('\n');
}

/// What a stage that is not fresh is likely to take: time and space.
fn expected(forecast: &Forecast) -> [String; 2] {
    let time = forecast
        .seconds
        .map(|seconds| format!("~{}", duration(seconds)));
    [
        time.unwrap_or_default(),
        forecast.bytes.map(bytes).unwrap_or_default(),
    ]
}

/// How many stages are in which state, and what is likely to be taken in all.
fn sum(planned: &[Planned<'_>]) -> String {
    let count_of = |wanted: fn(&State) -> bool| {
        let states = planned.iter().map(|planned| &planned.forecast.state);
        states.filter(|state| wanted(state)).count()
    };
    let unknown = count_of(|state| matches!(state, State::Unknown { .. }));
    let mut text = format!(
        "{} fresh, {} to run, {} waiting",
        count_of(|state| matches!(state, State::Fresh { .. })),
        count_of(|state| matches!(state, State::Runs { .. })),
        count_of(|state| matches!(state, State::WaitsOn { .. })),
    );
    let frozen = count_of(
        |state| matches!(state, State::Fresh { frozen: Some(reasons), .. } if !reasons.is_empty()),
    );
    if frozen > 0 {
        text = format!("{text}, {frozen} of the fresh ones frozen though something changed");
    }
    let failing = count_of(|state| matches!(state, State::Fails { .. }));
    if failing > 0 {
        text = format!("{text}, {failing} failing");
    }
    if unknown > 0 {
        text = format!("{text}, {unknown} unknown");
    }
    let stale = planned.iter().filter(|planned| {
        !matches!(
            planned.forecast.state,
            State::Fresh { .. } | State::Fails { .. }
        )
    });
    let stale: Vec<_> = stale.collect();
    let seconds: Vec<f64> = stale
        .iter()
        .filter_map(|planned| planned.forecast.seconds)
        .collect();
    if !seconds.is_empty() {
        let sizes: u64 = stale
            .iter()
            .filter_map(|planned| planned.forecast.bytes)
            .sum();
        text = format!(
            "{text}; about {} and {} by the last results",
            duration(seconds.iter().sum()),
            bytes(sizes)
        );
        let without = stale.len() - seconds.len();
        if without > 0 {
            text = format!(
                "{text}, without {} that never ran",
                count(without as u64, "stages")
            );
        }
    }
    text.push('\n');
    text
}

/// Where a stage goes on.
pub(super) fn goes_on(position: &Position) -> String {
    let unit = position.unit.strip_suffix('s').unwrap_or(&position.unit);
    let total = position
        .total
        .map(|total| format!(" of {}", thousands(total)));
    format!(
        "goes on at {unit} {}{}",
        thousands(position.done),
        total.unwrap_or_default()
    )
}

/// One word for a state, and a line for each thing to say about it.
pub(in crate::cli) fn describe(state: &State) -> (&'static str, Vec<String>) {
    match state {
        State::Fresh {
            artifact,
            restored,
            remote,
            frozen,
        } => {
            let from = match (restored, remote) {
                (true, true) => " (an earlier state, in the remote)",
                (true, false) => " (an earlier state)",
                (false, true) => " (in the remote)",
                (false, false) => "",
            };
            let result = format!("{}{from}", short(Some(artifact)));
            let Some(reasons) = frozen else {
                return ("fresh", vec![result]);
            };
            let reasons = reasons.iter();
            let reasons = reasons.map(|reason| format!("though {reason}"));
            ("frozen", std::iter::once(result).chain(reasons).collect())
        }
        State::Runs { reasons } => ("runs", reasons.iter().map(ToString::to_string).collect()),
        State::WaitsOn { stages, reasons } => {
            let waits = format!("on {}", stages.join(", "));
            // That it runs for the first time is true of everything behind a stage that does.
            let reasons = reasons
                .iter()
                .filter(|reason| **reason != Reason::NeverRan)
                .map(ToString::to_string);
            ("waits", std::iter::once(waits).chain(reasons).collect())
        }
        State::Fails { error, .. } => ("fails", vec![error.clone()]),
        State::Unknown { error } => ("unknown", vec![error.clone()]),
    }
}
