//! Whole trainings by the losses of DPO's and CPO's families, with evaluations between their steps, against TRL's logs
//! (`tests/python/generate_losses.py`).

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::golden::{model, rows};
use super::golden_compare::{Comparison, EXACT, Tolerance, json};
use super::golden_dpo;
use super::golden_runs::{job, settings};
use crate::ml::execution::{Execution, Kind};
use crate::ml::fused::Packing;
use crate::ml::loss::Loss;
use crate::ml::loss::cpo::Cpo;
use crate::ml::loss::dpo::{Divergence, Dpo};
use crate::ml::model::Trained;
use crate::ml::model::batch::Row;
use crate::ml::train::{Every, Job, ReferenceModel, Settings};
use candle_core::DType;

/// As for `golden_dpo`: rewards are small differences of large sums. The mean of three batches is one in f32 with TRL.
const CLOSE: Tolerance = Tolerance {
    cancelled: 2e-5,
    accuracy: 1e-7,
    ..EXACT
};

/// Runs whose numbers hang on the last bits of f32: log-ratios of some 100 nats, known to 3e-5, go through an exponential (`forward_kl`,
/// `discopop`), are scaled by a larger `beta`, are squared (`sppo_hard`), or leave a loss that is near 0 (`hinge`, `robust`).
const SENSITIVE: [&str; 6] = [
    "discopop",
    "forward_kl",
    "hinge",
    "robust",
    "sigmoid_norm",
    "sppo_hard",
];
const LOOSE: Tolerance = Tolerance {
    relative: 3e-4,
    grad_norm: 3e-4,
    cancelled: 1e-4,
    ..CLOSE
};

/// A number among the arguments of a run, or TRL's default.
fn number(args: &Value, name: &str, default: f64) -> f64 {
    args.get(name)
        .map_or(default, |value| value.as_f64().unwrap())
}

/// A loss by TRL's name.
fn named<T: DeserializeOwned>(name: &Value) -> T {
    serde_json::from_value(name.clone()).unwrap()
}

fn dpo(args: &Value) -> Dpo {
    let names = args["loss_type"].as_array().unwrap();
    let weights = |index: usize| match &args["loss_weights"] {
        Value::Array(weights) => weights[index].as_f64().unwrap(),
        _ => 1.,
    };
    let terms = names.iter().enumerate();
    Dpo {
        terms: terms
            .map(|(index, name)| (named(name), weights(index)))
            .collect(),
        ld_alpha: args["ld_alpha"].as_f64(),
        use_weighting: args["use_weighting"] == true,
        divergence: match args["f_divergence_type"].as_str() {
            None => Divergence::ReverseKl,
            Some("forward_kl") => Divergence::ForwardKl,
            Some("js_divergence") => Divergence::JsDivergence,
            Some("alpha_divergence") => {
                Divergence::AlphaDivergence(number(args, "f_alpha_divergence_coef", 0.5))
            }
            Some(other) => panic!("TRL has no divergence called {other}"),
        },
        ..Dpo::sigmoid(
            number(args, "beta", 0.1),
            number(args, "label_smoothing", 0.),
        )
    }
}

fn cpo(args: &Value) -> Cpo {
    Cpo {
        loss_type: args.get("loss_type").map(named).unwrap_or_default(),
        beta: number(args, "beta", 0.1),
        label_smoothing: number(args, "label_smoothing", 0.),
        cpo_alpha: number(args, "cpo_alpha", 1.),
        simpo_gamma: number(args, "simpo_gamma", 0.5),
        alpha: number(args, "alpha", 0.),
    }
}

/// Every number of every step, and of every evaluation, of every run in `file`.
fn compare(
    file: &str,
    rows: &[Row],
    packing: Packing,
    reference: ReferenceModel<'_>,
    loss: impl Fn(&Value) -> Box<dyn Loss>,
) {
    let kind = Kind::Fused(packing);
    let settings = Settings {
        eval_every: Some(Every::Steps(4)),
        ..settings()
    };
    let runs = json(&format!("losses/{file}.json"));
    let mut wrong = Vec::new();
    for (name, run) in runs.as_object().unwrap() {
        let loss = loss(&run["args"]);
        let history = run["log_history"].as_array().unwrap();
        let evaluations = run["evaluations"].as_array().unwrap();
        assert_eq!((history.len(), evaluations.len()), (12, 3), "{name}");
        let model = model("model", Some("adapter_init"), Trained::Adapter, DType::F32);
        let execution = Execution::new(&model, kind);
        let job = Job {
            loss: &*loss,
            reference,
            eval_rows: &rows[..5],
            ..job(&execution, rows)
        };
        let title = format!("{file} {name}");
        let tolerance = if SENSITIVE.contains(&name.as_str()) && file == "dpo" {
            LOOSE
        } else {
            CLOSE
        };
        let mut comparison = Comparison::new(&title, tolerance, kind).against_reference();
        let logs = golden_dpo::logs(&job, &settings);
        comparison.logs(&logs, history);
        comparison.evaluations(&logs, evaluations);
        let of_run = comparison.wrong().into_iter();
        wrong.extend(of_run.map(|wrong| format!("{title}: {wrong}")));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn losses_of_dpo_are_those_of_trl() {
    let rows = golden_dpo::rows();
    let packing = Packing {
        padding_free: true,
        share_prompts: true,
    };
    compare("dpo", &rows, packing, ReferenceModel::Base, |args| {
        Box::new(dpo(args))
    });
}

#[test]
fn losses_of_cpo_are_those_of_trl() {
    let rows = rows("trl-1.16");
    // TRL's means of logits include those of the padding.
    let packing = Packing {
        padding_free: false,
        share_prompts: false,
    };
    compare("cpo", &rows, packing, ReferenceModel::None, |args| {
        Box::new(cpo(args))
    });
}
