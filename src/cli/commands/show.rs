//! `show`: where a stage's result is, its record, and a look inside.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::Context as _;
use serde_json::Value;

use crate::cli::args::{RecipeArgs, StoreArgs};
use crate::cli::project::Project;
use crate::cli::{Failure, print, table};
use crate::data;
use crate::engine::{Record, State, canonical_json};
use crate::ml::io::weights::Weights;
use crate::ml::model::arch::Arch;
use crate::ml::model::create::parameters;
use crate::report::{ago, bytes, duration};

#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    #[command(flatten)]
    recipe: RecipeArgs,
    /// The stage
    stage: String,
    /// Rows of each split, steps of a training and answers of an evaluation to show
    #[arg(long, short = 'n', value_name = "N", default_value_t = 3)]
    rows: usize,
    #[command(flatten)]
    store: StoreArgs,
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    let project = Project::open(&args.recipe, &args.store)?;
    let index = project.find(&args.stage)?;
    let Some(record) = project.record_of(index) else {
        let hint = format!(
            "`pipeline run {} {}` makes it",
            project.recipe.path.display(),
            args.stage
        );
        return Err(anyhow::anyhow!("`{}` has no result yet; {hint}", args.stage).into());
    };
    let folder = project.store.artifact(&record.artifact);
    let mut text = about(&project, &record, &folder);
    if let Some(State::Runs { .. } | State::WaitsOn { .. }) = project.plan().get(index) {
        let hint = format!(
            "pipeline why {} {}",
            project.recipe.path.display(),
            args.stage
        );
        _ = writeln!(
            text,
            "\nThis is the last result; the stage is stale now: `{hint}` tells why."
        );
    }
    if !folder.is_dir() {
        _ = writeln!(
            text,
            "\nIts files are not here: `pipeline cache pull {} {}` fetches them, if a remote has them.",
            project.recipe.path.display(),
            args.stage
        );
        print(&text);
        return Ok(());
    }
    look(&record.output, &folder, args.rows, &mut text)
        .with_context(|| format!("could not look into `{}`", folder.display()))?;
    print(&text);
    Ok(())
}

fn about(project: &Project, record: &Record, folder: &Path) -> String {
    let mut text = format!(
        "{} ({}) made {}\n\n",
        record.stage, record.fingerprint.kind, record.output
    );
    let manifest = project.store.manifest(&record.artifact);
    let size = manifest.map_or(0, |manifest| manifest.size());
    let mut rows = vec![
        vec!["artifact".into(), folder.display().to_string()],
        vec!["size".into(), bytes(size)],
        vec!["fingerprint".into(), record.fingerprint.digest()],
        vec![
            "made".into(),
            format!("{} in {}", ago(record.started), duration(record.seconds)),
        ],
        vec![
            "version".into(),
            format!(
                "{} of pipeline {}",
                record.fingerprint.version, record.pipeline
            ),
        ],
    ];
    for (name, value) in &record.notes {
        rows.push(vec![name.clone(), canonical_json(value)]);
    }
    for (fact, value) in &record.fingerprint.outside {
        rows.push(vec![fact.clone(), value.clone()]);
    }
    text.push_str(&table(&rows));
    text.push_str("\nparameters\n");
    let mut rows = Vec::new();
    if let Value::Object(params) = &record.fingerprint.params {
        for (name, value) in params {
            let from = record.origins.get(name).map(|origin| match origin {
                crate::engine::Origin::Stage(stage) => stage.clone(),
                crate::engine::Origin::File(path) => path.clone(),
            });
            rows.push(vec![
                format!("  {name}"),
                from.unwrap_or_else(|| canonical_json(value)),
            ]);
        }
    }
    text.push_str(&table(&rows));
    text
}

fn look(output: &str, folder: &Path, rows: usize, text: &mut String) -> anyhow::Result<()> {
    match output {
        "dataset" | "chats" | "tokens" => splits(folder, rows, text)?,
        "model" => model(folder, text)?,
        "adapter" => adapter(folder, text)?,
        "scores" => scores(folder, rows, text)?,
        _ => {}
    }
    metrics(folder, rows, text)
}

fn splits(folder: &Path, rows: usize, text: &mut String) -> anyhow::Result<()> {
    for split in data::summary(folder)?.splits {
        _ = writeln!(text, "\n{}: {} rows", split.name, split.rows);
        for (name, kind) in &split.columns {
            _ = writeln!(text, "  {name}: {kind}");
        }
        for row in data::head(folder, &split.name, rows)? {
            _ = writeln!(text, "{row}");
        }
    }
    Ok(())
}

fn model(folder: &Path, text: &mut String) -> anyhow::Result<()> {
    let config = Arch::read(folder)?;
    let weights = Weights::open(folder)?;
    let rows = [
        ("layers", config.num_hidden_layers().to_string()),
        ("hidden_size", config.hidden_size.to_string()),
        ("intermediate_size", config.intermediate_size.to_string()),
        (
            "heads",
            format!(
                "{} queries, {} keys and values, {} wide",
                config.num_attention_heads, config.num_key_value_heads, config.head_dim
            ),
        ),
        ("vocab_size", config.vocab_size.to_string()),
        ("parameters", parameters(&config).to_string()),
        (
            "dtype",
            config
                .dtype
                .map_or_else(|| "not said".to_owned(), |dtype| dtype.as_str().to_owned()),
        ),
        (
            "quantization",
            config
                .quantization
                .as_ref()
                .map_or("none", |quantization| {
                    if quantization.double_quant {
                        "nf4, double quant"
                    } else {
                        "nf4"
                    }
                })
                .to_owned(),
        ),
        (
            "weights",
            format!(
                "{} in {} files, {} tensors",
                bytes(weights.bytes()),
                weights.files().len(),
                weights.names().len()
            ),
        ),
    ];
    text.push_str("\nmodel\n");
    text.push_str(&table(
        &rows.map(|(name, value)| vec![format!("  {name}"), value]),
    ));
    Ok(())
}

fn adapter(folder: &Path, text: &mut String) -> anyhow::Result<()> {
    let config: Value = serde_json::from_slice(&fs::read(folder.join("adapter_config.json"))?)?;
    text.push_str("\nadapter\n");
    let names = [
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "bias",
        "target_modules",
    ];
    let rows = names.map(|name| {
        let value = config.get(name).map(canonical_json).unwrap_or_default();
        vec![format!("  {name}"), value]
    });
    text.push_str(&table(&rows));
    Ok(())
}

fn scores(folder: &Path, rows: usize, text: &mut String) -> anyhow::Result<()> {
    let scores: Value = serde_json::from_slice(&fs::read(folder.join("scores.json"))?)?;
    let of = |part: &str, name: &str| {
        scores
            .get(part)
            .and_then(|part| part.get(name))
            .and_then(Value::as_f64)
    };
    let number = |value: Option<f64>| value.map(|value| format!("{value:.4}")).unwrap_or_default();
    let names = scores
        .get("base")
        .and_then(Value::as_object)
        .map(|base| base.keys().cloned().collect::<Vec<_>>());
    let mut lines = vec![
        ["", "base", "with adapter", "difference"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for name in names.unwrap_or_default() {
        let parts = ["base", "adapter", "difference"].map(|part| number(of(part, &name)));
        lines.push(std::iter::once(name).chain(parts).collect());
    }
    text.push('\n');
    text.push_str(&table(&lines));
    let answers = fs::read_to_string(folder.join("answers.jsonl")).unwrap_or_default();
    for line in answers.lines().take(rows) {
        let answer: Value = serde_json::from_str(line)?;
        text.push('\n');
        for name in ["prompt", "chosen", "rejected", "base", "adapter"] {
            if let Some(value) = answer.get(name).and_then(Value::as_str) {
                _ = writeln!(
                    text,
                    "{name:>9}: {}",
                    value.trim().replace('\n', "\n           ")
                );
            }
        }
    }
    Ok(())
}

/// The last steps of a training.
fn metrics(folder: &Path, rows: usize, text: &mut String) -> anyhow::Result<()> {
    let path = folder.join("metrics.jsonl");
    if !path.is_file() {
        return Ok(());
    }
    let metrics = fs::read_to_string(path)?;
    let lines: Vec<&str> = metrics.lines().collect();
    _ = writeln!(
        text,
        "\nmetrics: {} lines, the first and the last {rows}",
        lines.len()
    );
    let first = lines.first().into_iter().copied();
    let last = lines
        .iter()
        .skip(1.max(lines.len().saturating_sub(rows)))
        .copied();
    for line in first.chain(last) {
        _ = writeln!(text, "{line}");
    }
    Ok(())
}
