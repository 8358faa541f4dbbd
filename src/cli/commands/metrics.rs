//! `metrics`: the numbers of trainings for other programs.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde_json::{Map, Value, json};

use super::runs::csv;
use crate::cli::args::{RecipeArgs, StoreArgs};
use crate::cli::gather::curves::{Attempt, attempts};
use crate::cli::gather::stages::standings;
use crate::cli::project::Project;
use crate::cli::{Failure, error, print};
use crate::data::numbers::{Column, write_numbers};
use crate::engine::write_atomically;
use crate::ml::train::Log;
use crate::report::tensorboard::{EventFile, tag};

#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  pipeline metrics recipe.yaml > metrics.csv
  pipeline metrics recipe.yaml tuned --to parquet -o tuned.parquet
  pipeline metrics recipe.yaml --earlier --to tensorboard -o logs   then: tensorboard --logdir logs")]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// The trainings [default: all]
    stages: Vec<String>,
    /// What to write
    #[arg(long, value_enum, default_value_t = Format::Csv)]
    to: Format,
    /// The file, or for `tensorboard` the folder, to write [default for CSV and JSON: standard output]
    #[arg(long, short, value_name = "PATH")]
    output: Option<PathBuf>,
    /// Earlier runs of the trainings as well
    #[arg(long)]
    earlier: bool,
    #[command(flatten)]
    store: StoreArgs,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// A row a step
    Csv,
    /// A line of JSON a step
    Json,
    /// A row a step, as Parquet
    Parquet,
    /// TensorBoard's event files, a folder a training
    Tensorboard,
}

/// The numbers of one training.
struct Training {
    stage: String,
    run: Option<u64>,
    attempt: Attempt,
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    let project = Project::open(&args.recipe, &args.store)?;
    let wanted = project.find_all(&args.stages)?;
    let running = project.running_events();
    let mut trainings = Vec::new();
    for standing in standings(&project) {
        let Some(stage) = project.recipe.stages.get(standing.index) else {
            continue;
        };
        if !(wanted.is_empty() || wanted.contains(&standing.index)) {
            continue;
        }
        let record = standing.record.as_ref();
        let found = attempts(&project, &stage.name, record, running.as_deref());
        let most = if args.earlier { found.len() } else { 1 };
        for attempt in found.into_iter().take(most) {
            if attempt.logs.is_empty() {
                continue;
            }
            trainings.push(Training {
                stage: stage.name.clone(),
                run: attempt.run,
                attempt,
            });
        }
    }
    if trainings.is_empty() {
        let hint = "they are made by trainings that ran: `pipeline run` runs them";
        return Err(Failure::Usage(error::with_hint(
            "there are no metrics",
            hint,
        )));
    }
    let needs_path = || {
        let hint = "name the place by `--output PATH`";
        Failure::Usage(error::with_hint("this form is not for a terminal", hint))
    };
    match args.to {
        Format::Csv => put(args, &csv(&csv_rows(&trainings))?),
        Format::Json => put(args, &json_lines(&trainings)),
        Format::Parquet => {
            let path = args.output.as_deref().ok_or_else(needs_path)?;
            write_numbers(path, &columns(&trainings))?;
            print(&format!("{}\n", path.display()));
            Ok(())
        }
        Format::Tensorboard => {
            let folder = args.output.as_deref().ok_or_else(needs_path)?;
            for training in &trainings {
                event_file(folder, training)?;
            }
            print(&format!("{}\n", folder.display()));
            Ok(())
        }
    }
}

fn put(args: &Args, text: &str) -> Result<(), Failure> {
    match &args.output {
        Some(path) => {
            let file = std::path::absolute(path).map_err(anyhow::Error::from)?;
            write_atomically(&file, text.as_bytes())?;
            print(&format!("{}\n", path.display()));
        }
        None => print(text),
    }
    Ok(())
}

/// All steps with the training they are of.
fn steps(trainings: &[Training]) -> impl Iterator<Item = (&Training, &Log)> {
    trainings
        .iter()
        .flat_map(|training| training.attempt.logs.iter().map(move |log| (training, log)))
}

fn names(trainings: &[Training]) -> Vec<String> {
    let names: BTreeSet<String> = trainings
        .iter()
        .flat_map(|training| training.attempt.names())
        .collect();
    names.into_iter().collect()
}

fn csv_rows(trainings: &[Training]) -> Vec<Vec<String>> {
    let names = names(trainings);
    let head = ["stage", "run", "step", "epoch"].map(str::to_owned);
    let mut rows = vec![head.into_iter().chain(names.clone()).collect::<Vec<_>>()];
    for (training, log) in steps(trainings) {
        let run = training.run.map_or_else(String::new, |run| run.to_string());
        let epoch = if log.epoch.is_finite() {
            log.epoch.to_string()
        } else {
            String::new()
        };
        let values = names.iter().map(|name| {
            let value = log.values.get(name);
            value.map_or_else(String::new, f64::to_string)
        });
        let head = [training.stage.clone(), run, log.step.to_string(), epoch];
        rows.push(head.into_iter().chain(values).collect());
    }
    rows
}

fn json_lines(trainings: &[Training]) -> String {
    let mut text = String::new();
    for (training, log) in steps(trainings) {
        let mut line = Map::new();
        line.insert("stage".into(), json!(training.stage));
        line.insert("run".into(), json!(training.run));
        line.insert("step".into(), json!(log.step));
        // What is not finite is null.
        line.insert("epoch".into(), json!(log.epoch));
        line.extend(
            log.values
                .iter()
                .map(|(name, value)| (name.clone(), json!(value))),
        );
        text += &Value::Object(line).to_string();
        text.push('\n');
    }
    text
}

fn columns(trainings: &[Training]) -> Vec<(String, Column)> {
    let texts = steps(trainings).map(|(training, _)| training.stage.clone());
    let runs = steps(trainings).map(|(training, _)| training.run);
    let counts = steps(trainings).map(|(_, log)| Some(log.step));
    let epochs = steps(trainings).map(|(_, log)| Some(log.epoch).filter(|epoch| epoch.is_finite()));
    let mut columns = vec![
        ("stage".to_owned(), Column::Texts(texts.collect())),
        ("run".to_owned(), Column::Counts(runs.collect())),
        ("step".to_owned(), Column::Counts(counts.collect())),
        ("epoch".to_owned(), Column::Numbers(epochs.collect())),
    ];
    for name in names(trainings) {
        let values = steps(trainings).map(|(_, log)| log.values.get(&name).copied());
        columns.push((name.clone(), Column::Numbers(values.collect())));
    }
    columns
}

/// Writes a training as TensorBoard's events. When a step was is known only of the whole: the steps are spread over its time.
fn event_file(folder: &Path, training: &Training) -> anyhow::Result<()> {
    let run = match training.run {
        Some(run) => format!("run-{run}"),
        None => "last".to_owned(),
    };
    let record = training.attempt.record.as_ref();
    let (started, seconds) =
        record.map_or((0., 0.), |record| (record.started as f64, record.seconds));
    let mut file = EventFile::create(&folder.join(&training.stage).join(run), started)?;
    let last = training
        .attempt
        .logs
        .last()
        .map_or(1, |log| log.step.max(1));
    for log in &training.attempt.logs {
        let mut values: BTreeMap<String, f64> = log
            .values
            .iter()
            .map(|(name, value)| (tag(name), *value))
            .collect();
        if log.epoch.is_finite() {
            values.insert("train/epoch".into(), log.epoch);
        }
        file.add(
            started + seconds * log.step as f64 / last as f64,
            log.step,
            &values,
        )?;
    }
    Ok(())
}
