//! Whole trainings by KTO against TRL's logs (`tests/python/generate_kto.py`).

use candle_core::DType;
use serde::Deserialize;
use serde_json::Value;

use super::golden::model;
use super::golden_compare::{Comparison, EXACT, Tolerance, json};
use super::golden_dpo::logs;
use super::golden_runs::{job, settings};
use super::kinds::kinds;
use crate::ml::execution::{Execution, Kind};
use crate::ml::loss::kto::{Kto, LossType, pair_with_neighbours};
use crate::ml::model::Trained;
use crate::ml::model::batch::Row;
use crate::ml::model::linear::Pass;
use crate::ml::train::evaluate::labelled as labelled_rows;
use crate::ml::train::process_group::Alone;
use crate::ml::train::{Every, Job, Passes, ReferenceModel, Settings};

/// As for `golden_dpo`: rewards are small differences of large sums.
const CLOSE: Tolerance = Tolerance {
    cancelled: 2e-5,
    ..EXACT
};

/// With a larger `beta` the last bits of log-probabilities, and of the estimate of the divergence, count more.
const LOOSE: Tolerance = Tolerance {
    relative: 3e-4,
    grad_norm: 3e-4,
    cancelled: 1e-4,
    ..EXACT
};

#[derive(Deserialize)]
struct Labelled {
    prompt: Vec<u32>,
    completion: Vec<u32>,
    label: bool,
    #[serde(rename = "KL_completion")]
    other: Vec<u32>,
}

fn labelled(name: &str) -> Vec<Labelled> {
    serde_json::from_value(json("kto/ids.json")[name].clone()).unwrap()
}

fn plain(rows: Vec<Labelled>) -> Vec<Row> {
    let rows = rows.into_iter().map(|row| Row {
        prompt: row.prompt,
        chosen: row.completion,
        label: Some(row.label),
        ..Row::default()
    });
    rows.collect()
}

/// The rows of a run, cut to its length.
fn rows(plain: &[Row], args: &Value) -> Vec<Row> {
    let count = |name: &str| usize::try_from(args[name].as_u64().unwrap()).unwrap();
    let max_length = count("max_length");
    let mut rows = plain.to_vec();
    rows.retain(|row| row.prompt.len() < max_length);
    pair_with_neighbours(&mut rows, count("per_device_train_batch_size"), max_length);
    for row in &mut rows {
        row.chosen.truncate(max_length - row.prompt.len());
    }
    rows
}

#[test]
fn answers_of_other_rows_are_those_of_trl() {
    for (name, batch_size) in [("base", 2), ("weights", 4), ("paired", 2)] {
        let theirs = labelled(name);
        let mut ours = plain(labelled(name));
        pair_with_neighbours(&mut ours, batch_size, usize::MAX);
        for (number, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
            let other = ours.mismatched.as_ref().unwrap();
            assert_eq!(other.answer, theirs.other, "{name} {number}");
        }
    }
}

fn loss(args: &Value) -> Kto {
    let number = |name: &str, default| args.get(name).map_or(default, |n| n.as_f64().unwrap());
    Kto {
        loss_type: match args.get("loss_type") {
            None => LossType::Kto,
            Some(name) => serde_json::from_value(name.clone()).unwrap(),
        },
        beta: number("beta", 0.1),
        desirable_weight: number("desirable_weight", 1.),
        undesirable_weight: number("undesirable_weight", 1.),
    }
}

fn settings_of(args: &Value) -> Settings {
    let count = |name: &str| usize::try_from(args[name].as_u64().unwrap()).unwrap();
    Settings {
        batch_size: count("per_device_train_batch_size"),
        accumulation: count("gradient_accumulation_steps"),
        epochs: args["num_train_epochs"].as_f64().unwrap(),
        eval_every: Some(Every::Epoch),
        ..settings()
    }
}

/// Every number of every step of a run, and of the evaluation after it.
fn compare(name: &str, kind: Kind, tolerance: Tolerance, precompute: bool) {
    let run = &json("kto/runs.json")[name];
    let args = &run["args"];
    let all = plain(labelled(if name == "paired" { name } else { "base" }));
    let mut train_rows = rows(&all, args);
    // The first five rows, or both answers of the first five pairs.
    let mut eval_rows = match name {
        "paired" => [&all[..5], &all[24..29]].concat(),
        _ => all[..5].to_vec(),
    };
    eval_rows = rows(&eval_rows, args);
    let base = if name == "nf4" { "model_nf4" } else { "model" };
    let model_of = |trained| model(base, Some("adapter_init"), trained, DType::F32);
    let trained = model_of(Trained::Adapter);
    let execution = Execution::new(&trained, kind);
    let initial = (name == "initial").then(|| model_of(Trained::Nothing));
    let initial = initial.as_ref().map(|model| Execution::new(model, kind));
    let mut reference = match &initial {
        Some(initial) => ReferenceModel::Frozen(initial),
        None => ReferenceModel::Base,
    };
    let loss = loss(args);
    if precompute {
        let passes = Passes {
            execution: &execution,
            loss: &loss,
            reference,
        };
        for rows in [&mut train_rows, &mut eval_rows] {
            passes
                .precompute_reference(rows, 5, 1023, &Alone, &mut |_| Ok(()))
                .unwrap();
        }
        reference = ReferenceModel::Rows;
    }
    let job = Job {
        loss: &loss,
        reference,
        eval_rows: &eval_rows,
        ..job(&execution, &train_rows)
    };
    let logs = logs(&job, &settings_of(args));
    let title = format!("kto {name}");
    let mut comparison = Comparison::new(&title, tolerance, kind).against_reference();
    comparison.logs(&logs, run["log_history"].as_array().unwrap());
    comparison.evaluation(&logs, &run["eval"]);
    // What `evaluate` tells is the same; means of logits are left to trainings.
    let passes = Passes {
        execution: &execution,
        loss: &loss,
        reference,
    };
    let size = usize::try_from(args["per_device_eval_batch_size"].as_u64().unwrap()).unwrap();
    let mut quiet = |_| Ok(());
    let pass = Pass::INFER;
    let (metrics, by_row) =
        labelled_rows(&passes, &eval_rows, size, 1023, pass, &mut quiet).unwrap();
    assert!(by_row.keys().eq(metrics.keys()));
    let theirs = run["eval"].as_object().unwrap();
    let known = theirs.keys().filter_map(|name| name.strip_prefix("eval_"));
    let known = known.filter(|name| !name.starts_with("logits/") && *name != "num_tokens");
    let mut known: Vec<&str> = known.collect();
    known.sort_unstable();
    assert!(metrics.keys().copied().eq(known), "{metrics:?}");
    for (name, value) in metrics {
        let theirs = theirs[&format!("eval_{name}")].as_f64().unwrap();
        comparison.number("`evaluate`", name, value, theirs);
    }
    comparison.end();
}

fn tolerance(name: &str) -> Tolerance {
    if name == "weights" { LOOSE } else { CLOSE }
}

#[test]
fn trainings_are_those_of_trl() {
    for name in [
        "base",
        "weights",
        "apo_zero_unpaired",
        "paired",
        "short",
        "initial",
    ] {
        for kind in kinds() {
            compare(name, kind, tolerance(name), false);
        }
    }
    for name in ["base", "weights", "apo_zero_unpaired"] {
        compare(name, Kind::default(), tolerance(name), true);
    }
}

#[test]
fn an_adapter_on_4_bits_is_that_of_trl() {
    let loose = Tolerance {
        relative: 1e-3,
        grad_norm: 1e-3,
        ..CLOSE
    };
    for kind in kinds() {
        compare("nf4", kind, loose, false);
    }
}
