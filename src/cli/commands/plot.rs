//! `plot`: the curves of trainings as a picture.

use std::path::{Path, PathBuf};

use crate::cli::args::{RecipeArgs, StoreArgs};
use crate::cli::gather::curves::{Attempt, attempts};
use crate::cli::gather::stages::standings;
use crate::cli::gather::training::{self, FIRST};
use crate::cli::project::Project;
use crate::cli::{Failure, error, print};
use crate::engine::write_atomically;
use crate::report::chart::{Chart, Content, Format, Look, Series, picture};

#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  pipeline plot recipe.yaml tuned -o curves.png         one training, with its earlier runs
  pipeline plot recipe.yaml base tuned -o both.svg      several in one picture
  pipeline plot recipe.yaml tuned -m loss -m grad_norm -o two.svg")]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// The trainings
    #[arg(required = true)]
    stages: Vec<String>,
    /// The picture to write; its name ends with `.svg` or `.png`
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// Draws this metric; may be repeated [default: the ones people look at first]
    #[arg(long, short, value_name = "NAME")]
    metric: Vec<String>,
    #[command(flatten)]
    store: StoreArgs,
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    let format = format(&args.output)?;
    let project = Project::open(&args.recipe, &args.store)?;
    let indices = project.find_all(&args.stages)?;
    let standings = standings(&project);
    let running = project.running_events();
    let mut all = Vec::new();
    for index in indices {
        let stage = &project.recipe.stages[index].name;
        let standing = standings.iter().find(|standing| standing.index == index);
        let record = standing.and_then(|standing| standing.record.as_ref());
        let found = attempts(&project, stage, record, running.as_deref());
        if found.first().is_none_or(|first| first.logs.is_empty()) {
            let message = format!("`{stage}` has no curves");
            let hint = "curves are made by trainings that ran: `pipeline run` runs them";
            return Err(Failure::Usage(error::with_hint(&message, hint)));
        }
        all.push((stage.as_str(), found));
    }
    let (charts, legend) = match &all[..] {
        [(_, attempts)] => of_one(attempts, &args.metric),
        several => of_several(several, &args.metric),
    };
    if charts.is_empty() {
        let mut names: Vec<String> = all
            .iter()
            .flat_map(|(_, attempts)| training::names(&attempts[..1]))
            .collect();
        names.sort_unstable();
        names.dedup();
        let message = format!("there is no metric {}", args.metric.join(", "));
        let hint = format!("there are {}", names.join(", "));
        return Err(Failure::Usage(error::with_hint(&message, &hint)));
    }
    let file = std::path::absolute(&args.output).map_err(anyhow::Error::from)?;
    write_atomically(&file, &picture(&charts, &legend, format)?)?;
    print(&format!("{}\n", args.output.display()));
    Ok(())
}

fn format(path: &Path) -> Result<Format, Failure> {
    let extension = path.extension().and_then(|extension| extension.to_str());
    match extension.map(str::to_ascii_lowercase).as_deref() {
        Some("svg") => Ok(Format::Svg),
        Some("png") => Ok(Format::Png),
        _ => {
            let message = format!("`{}` is no picture that can be written", path.display());
            let hint = "expected a name that ends with `.svg` or `.png`";
            Err(Failure::Usage(error::with_hint(&message, hint)))
        }
    }
}

type Drawing = (Vec<Chart>, Vec<(String, usize)>);

/// Whether a metric is wanted: those that are named, else those that people look at first.
fn wanted(name: &str, named: &[String]) -> bool {
    if named.is_empty() {
        FIRST.contains(&name)
    } else {
        named.iter().any(|wanted| wanted == name)
    }
}

/// A training with its earlier runs.
fn of_one(attempts: &[Attempt], named: &[String]) -> Drawing {
    let names = training::names(attempts);
    let names = names.iter().filter(|name| wanted(name, named));
    let charts: Vec<Chart> = names.map(|name| training::chart(attempts, name)).collect();
    let mut legend: Vec<(String, usize)> = Vec::new();
    for chart in &charts {
        let Content::Lines(series) = &chart.content else {
            continue;
        };
        for line in series {
            if !legend.iter().any(|(_, color)| *color == line.color) {
                legend.push((line.name.clone(), line.color));
            }
        }
    }
    (charts, legend)
}

/// Trainings beside each other.
fn of_several(all: &[(&str, Vec<Attempt>)], named: &[String]) -> Drawing {
    let mut names: Vec<String> = Vec::new();
    for (_, attempts) in all {
        for name in training::names(&attempts[..1]) {
            if wanted(&name, named) && !names.contains(&name) {
                names.push(name);
            }
        }
    }
    let chart = |name: &String| {
        let series = all
            .iter()
            .enumerate()
            .map(|(color, (stage, attempts))| Series {
                name: (*stage).to_owned(),
                color,
                look: Look::Line,
                points: attempts[0].points(name),
            });
        Chart {
            title: name.clone(),
            x_label: "step".into(),
            content: Content::Lines(series.collect()),
        }
    };
    let legend = all.iter().enumerate();
    let legend = legend.map(|(color, (stage, _))| ((*stage).to_owned(), color));
    (names.iter().map(chart).collect(), legend.collect())
}
