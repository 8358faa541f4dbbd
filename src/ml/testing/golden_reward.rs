//! Reward models against TRL's logs, and transformers' and PEFT's files (`tests/python/generate_reward.py`).

use candle_core::{DType, Device};
use serde::Deserialize;
use serde_json::Value;

use super::golden::folder;
use super::golden_compare::{Comparison, EXACT, Tolerance, json};
use super::golden_dpo::logs;
use super::golden_runs::{job, settings};
use super::kinds::kinds;
use crate::ml::adapter::Adapter;
use crate::ml::execution::{Execution, Kind};
use crate::ml::io::weights::{self, Weights};
use crate::ml::loss::reward::Reward;
use crate::ml::model::batch::{Row, Sequence};
use crate::ml::model::linear::Pass;
use crate::ml::model::tensors::SCORE;
use crate::ml::model::{CausalLm, Trained, tied};
use crate::ml::reward::{add_score_head, score};
use crate::ml::train::evaluate::rewards;
use crate::ml::train::{Every, Job, Passes, ReferenceModel, Settings};

#[derive(Deserialize)]
struct Pair {
    chosen: Vec<u32>,
    rejected: Vec<u32>,
}

/// The rows, whose prompts are what both sequences begin with.
fn rows(margins: bool) -> Vec<Row> {
    let pairs: Vec<Pair> = serde_json::from_value(json("reward/ids.json")).unwrap();
    assert_eq!(pairs.len(), 24);
    let row = |(number, pair): (usize, Pair)| {
        let both = pair.chosen.iter().zip(&pair.rejected);
        let prompt = both.take_while(|(a, b)| a == b).count();
        Row {
            prompt: pair.chosen[..prompt].to_vec(),
            chosen: pair.chosen[prompt..].to_vec(),
            rejected: Some(pair.rejected[prompt..].to_vec()),
            margin: margins.then_some((number % 5) as f64 * 0.25 - 0.25),
            ..Row::default()
        }
    };
    pairs.into_iter().enumerate().map(row).collect()
}

/// A folder with the golden model `name` and the golden head that gives scores.
fn base(name: &str) -> tempfile::TempDir {
    let out = tempfile::tempdir().unwrap();
    add_score_head(
        &folder(name),
        out.path(),
        0.12,
        42,
        1023,
        &mut |_, _| Ok(()),
    )
    .unwrap();
    let file = out.path().join(weights::SINGLE);
    let made = Weights::open_file(&file).unwrap();
    let names = made.names().into_iter();
    let mut tensors: std::collections::BTreeMap<String, candle_core::Tensor> = names
        .map(|name| (name.to_owned(), made.tensor(name, &Device::Cpu).unwrap()))
        .collect();
    let own = super::golden::tensors("reward/score.safetensors");
    assert_eq!(tensors[SCORE].dims(), own[SCORE].dims());
    tensors.insert(SCORE.to_owned(), own[SCORE].clone());
    weights::save(&file, &tensors, &[("format", "pt")]).unwrap();
    out
}

fn load(folder: &std::path::Path, adapter: Option<&Adapter>, trained: Trained) -> CausalLm {
    let (arch, weights) = tied::open(folder).unwrap();
    assert!(arch.scores);
    CausalLm::load(&arch, &weights, adapter, trained, DType::F32, &Device::Cpu).unwrap()
}

/// Run A's first adapter, with the golden head among the modules that are trained whole.
fn initial() -> Adapter {
    let mut adapter = Adapter::load(&folder("adapter_init")).unwrap();
    let trained = Adapter::load(&folder("reward/adapter")).unwrap();
    assert!(trained.config.is_classifier());
    adapter.config = trained.config;
    let score = super::golden::tensors("reward/score.safetensors")[SCORE].clone();
    adapter.saved.insert(SCORE.to_owned(), score);
    adapter
}

fn compare(name: &str, kind: Kind, tolerance: Tolerance) -> Vec<f32> {
    let run = &json("reward/runs.json")[name];
    let base = base(if name == "nf4" { "model_nf4" } else { "model" });
    let adapter = (name != "full").then(initial);
    let trained = match &adapter {
        Some(_) => Trained::Adapter,
        None => Trained::Everything,
    };
    let model = load(base.path(), adapter.as_ref(), trained);
    let execution = Execution::new(&model, kind);
    assert_eq!(execution.fallback(), None);
    let rows = rows(name == "margin");
    let args: &Value = &run["args"];
    let settings = Settings {
        epochs: args["num_train_epochs"].as_f64().unwrap(),
        learning_rate: args["learning_rate"].as_f64().unwrap(),
        eval_every: Some(Every::Epoch),
        ..settings()
    };
    let coefficient = args["center_rewards_coefficient"].as_f64();
    let job = Job {
        loss: &Reward {
            center_rewards_coefficient: coefficient.unwrap_or(0.),
        },
        eval_rows: &rows[..5],
        ..job(&execution, &rows)
    };
    let logs = logs(&job, &settings);
    let mut comparison = Comparison::new(&format!("reward {name}"), tolerance, kind);
    comparison.logs(&logs, run["log_history"].as_array().unwrap());
    comparison.evaluation(&logs, &run["eval"]);
    comparison.end();
    scores(&execution, &rows)
}

/// Two scores a row.
fn scores(execution: &Execution<'_>, rows: &[Row]) -> Vec<f32> {
    let sequences = rows.iter();
    let sequences = sequences.flat_map(|row| [row.chosen(), row.rejected().unwrap()]);
    let sequences: Vec<Sequence> = sequences.collect();
    score(execution, &sequences, 5, 1023, Pass::INFER, &mut |_| Ok(())).unwrap()
}

fn near_golden(name: &str, ours: &[f32]) {
    let theirs: Vec<[f32; 2]> =
        serde_json::from_value(json("reward/scores.json")[name].clone()).unwrap();
    let theirs = theirs.concat();
    assert_eq!(ours.len(), theirs.len());
    for (ours, theirs) in ours.iter().zip(theirs) {
        assert!((ours - theirs).abs() < 2e-4, "{ours} {theirs}");
    }
}

/// Scores are sums of products around 0, of which f32 keeps some digits less.
const CLOSE: Tolerance = Tolerance {
    near_zero: 1e-5,
    ..EXACT
};

#[test]
fn trainings_are_those_of_trl() {
    for name in ["base", "centered", "margin", "full"] {
        for kind in kinds() {
            let after = compare(name, kind, CLOSE);
            if name == "base" || name == "full" {
                near_golden(name, &after);
            }
        }
    }
}

#[test]
fn an_adapter_on_4_bits_is_that_of_trl() {
    let loose = Tolerance {
        relative: 1e-3,
        near_zero: 1e-4,
        grad_norm: 1e-3,
        ..EXACT
    };
    for kind in kinds() {
        compare("nf4", kind, loose);
    }
}

/// The adapter that PEFT wrote, on the base whose head it replaces.
#[test]
fn adapters_of_peft_give_its_scores() {
    let base = base("model");
    let adapter = Adapter::load(&folder("reward/adapter")).unwrap();
    let rows = rows(false);
    for kind in kinds() {
        let model = load(base.path(), Some(&adapter), Trained::Nothing);
        near_golden("base", &scores(&Execution::new(&model, kind), &rows));
    }
    // A causal language model has no place for such a head.
    let (arch, weights) = tied::open(&folder("model")).unwrap();
    let nothing = Trained::Nothing;
    let error = CausalLm::load(
        &arch,
        &weights,
        Some(&adapter),
        nothing,
        DType::F32,
        &Device::Cpu,
    );
    let error = format!("{:#}", error.err().unwrap());
    assert!(error.contains("add_score_head"), "{error}");
}

#[test]
fn the_settings_of_a_new_reward_model_are_those_of_transformers() {
    let base = base("model");
    let read = |path: std::path::PathBuf| -> serde_json::Map<String, Value> {
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    };
    let (ours, theirs) = (
        read(base.path().join("config.json")),
        read(folder("reward").join("config.json")),
    );
    for (key, value) in &theirs {
        // The trainer turns the cache off.
        if key != "use_cache" {
            assert_eq!(ours.get(key), Some(value), "{key}");
        }
    }
    assert!(add_score_head(base.path(), base.path(), 0.1, 1, 0, &mut |_, _| Ok(())).is_err());
}

/// The scores of all rows as one micro-batch, made of those that TRL's model gives.
#[test]
fn preferences_are_scored_by_what_both_answers_get() {
    let base = base("model");
    let adapter = Adapter::load(&folder("reward/adapter")).unwrap();
    let pairs: Vec<[f64; 2]> =
        serde_json::from_value(json("reward/scores.json")["base"].clone()).unwrap();
    let mean = |of: &dyn Fn(&[f64; 2]) -> f64| {
        let sum: f64 = pairs.iter().map(of).sum();
        sum / pairs.len() as f64
    };
    let all = || pairs.iter().flatten().copied();
    let expected = [
        ("accuracy", mean(&|[c, r]| f64::from(u8::from(c > r)))),
        ("loss", mean(&|[c, r]| (1. + (r - c).exp()).ln())),
        ("margin", mean(&|[c, r]| c - r)),
        ("max_reward", all().fold(f64::MIN, f64::max)),
        ("mean_reward", mean(&|[c, r]| (c + r) / 2.)),
        ("min_reward", all().fold(f64::MAX, f64::min)),
    ];
    let rows = rows(false);
    for kind in kinds() {
        let model = load(base.path(), Some(&adapter), Trained::Nothing);
        let execution = Execution::new(&model, kind);
        let passes = Passes {
            execution: &execution,
            loss: &Reward::default(),
            reference: ReferenceModel::Base,
        };
        let mut done = Vec::new();
        let mut report = |rows| {
            done.push(rows);
            Ok(())
        };
        let pass = Pass::INFER;
        let (metrics, by_row) = rewards(&passes, &rows, 5, 1023, pass, &mut report).unwrap();
        assert_eq!(done, [5, 10, 15, 20, 24]);
        assert!(metrics.keys().copied().eq(expected.map(|(name, _)| name)));
        for (name, theirs) in expected {
            assert!((metrics[name] - theirs).abs() < 2e-4, "{name}: {metrics:?}");
            // The smallest and the largest are no means.
            let spread = by_row.get(name).map(|score| score.value(0..rows.len()));
            let is_end = ["max_reward", "min_reward"].contains(&name);
            assert_eq!(spread.is_none(), is_end, "{name}");
            if let Some(spread) = spread {
                assert!((spread - metrics[name]).abs() < 1e-9, "{name}");
            }
        }
    }
}
