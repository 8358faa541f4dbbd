//! Whole trainings by DPO against TRL's logs (`tests/python/generate_dpo.py`).

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;

use super::golden::{far, folder, model};
use super::golden_compare::{Comparison, EXACT, Tolerance, json};
use super::golden_runs::{job, settings};
use super::kinds::kinds;
use crate::ml::execution::{Execution, Kind};
use crate::ml::loss::dpo::Dpo;
use crate::ml::model::batch::Row;
use crate::ml::model::{CausalLm, Trained};
use crate::ml::train::process_group::Alone;
use crate::ml::train::schedule::SchedulerType;
use crate::ml::train::{Ending, Every, Job, Log, Passes, ReferenceModel, Settings, train};

fn loss() -> Dpo {
    Dpo::sigmoid(0.1, 0.)
}

/// Log-probabilities of whole answers are sums of up to -460, so that f32 tells differences of 3e-5 apart; rewards are a tenth of such
/// differences, which add up over the tokens.
const CLOSE: Tolerance = Tolerance {
    cancelled: 2e-5,
    ..EXACT
};

#[derive(Deserialize)]
struct Case {
    rows: Vec<Pair>,
}

#[derive(Deserialize)]
struct Pair {
    prompt: Vec<u32>,
    chosen: Vec<u32>,
    rejected: Vec<u32>,
}

pub(in crate::ml) fn rows() -> Vec<Row> {
    let cases: Vec<Case> = serde_json::from_value(json("dpo/ids.json")).unwrap();
    let rows = cases.into_iter().next().unwrap().rows.into_iter();
    let rows: Vec<Row> = rows
        .map(|row| Row {
            prompt: row.prompt,
            chosen: row.chosen,
            rejected: Some(row.rejected),
            ..Row::default()
        })
        .collect();
    assert_eq!(rows.len(), 24);
    rows
}

fn adapted(name: &str, adapter: &str, trained: Trained) -> CausalLm {
    model(name, Some(adapter), trained, DType::F32)
}

pub(in crate::ml) fn logs(job: &Job<'_>, settings: &Settings) -> Vec<Log> {
    let mut logs = Vec::new();
    let ending = train(job, settings, &mut |step| {
        logs.extend(step.logs.clone());
        ControlFlow::Continue(())
    });
    assert!(matches!(ending.unwrap(), Ending::Finished { .. }));
    logs
}

/// Compares every number that TRL logs in a training, and those of the evaluation after it.
fn compare(name: &str, logs: &[Log], tolerance: Tolerance, kind: Kind) -> Comparison {
    let golden = &json("dpo/runs.json")[name];
    let mut comparison =
        Comparison::new(&format!("dpo {name}"), tolerance, kind).against_reference();
    let history = golden["log_history"].as_array().unwrap();
    comparison.logs(logs, history);
    if logs.iter().any(|log| log.values.contains_key("eval_loss")) {
        comparison.evaluation(logs, &golden["eval"]);
    }
    comparison
}

fn epoch() -> Settings {
    Settings {
        epochs: 1.,
        eval_every: Some(Every::Epoch),
        ..settings()
    }
}

fn final_adapter_far(model: &CausalLm) -> f64 {
    let path = folder("dpo").join("adapter_final.safetensors");
    let golden = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let golden: BTreeMap<String, Tensor> = golden.into_iter().collect();
    assert_eq!(golden.len(), model.parameters.len());
    let far = model.parameters.iter().map(|parameter| {
        let theirs = &golden[&format!("base_model.model.{}", parameter.name)];
        far(&parameter.var.as_detached_tensor(), theirs)
    });
    far.fold(0., f64::max)
}

#[test]
fn an_adapter_against_its_base_is_that_of_trl() {
    let settings = Settings {
        eval_every: Some(Every::Epoch),
        ..settings()
    };
    let (mut rows, mut eval_rows) = (rows(), rows()[..5].to_vec());
    for kind in kinds() {
        let model = adapted("model", "adapter_init", Trained::Adapter);
        let execution = Execution::new(&model, kind);
        let job = Job {
            loss: &loss(),
            reference: ReferenceModel::Base,
            eval_rows: &eval_rows,
            ..job(&execution, &rows)
        };
        let mut comparison = compare("base", &logs(&job, &settings), CLOSE, kind);
        let far = final_adapter_far(&model);
        comparison.largest("adapter after step 12", far, 2e-4);
        comparison.end();
    }
    // With the reference's log-probabilities computed before: once for all rows, in other batches.
    let model = adapted("model", "adapter_init", Trained::Adapter);
    let execution = Execution::fastest(&model);
    let passes = Passes {
        execution: &execution,
        loss: &loss(),
        reference: ReferenceModel::Base,
    };
    for rows in [&mut rows, &mut eval_rows] {
        let mut done = Vec::new();
        let report = &mut |count| {
            done.push(count);
            Ok(())
        };
        passes
            .precompute_reference(rows, 5, 1023, &Alone, report)
            .unwrap();
        assert_eq!(done.last(), Some(&rows.len()));
    }
    let job = Job {
        loss: &loss(),
        reference: ReferenceModel::Rows,
        eval_rows: &eval_rows,
        ..job(&execution, &rows)
    };
    compare("base", &logs(&job, &settings), CLOSE, execution.kind()).end();
}

#[test]
fn an_adapter_on_4_bits_is_that_of_trl() {
    let settings = Settings {
        eval_every: Some(Every::Epoch),
        ..settings()
    };
    let rows = rows();
    let loose = Tolerance {
        relative: 1e-3,
        grad_norm: 1e-3,
        ..CLOSE
    };
    for kind in kinds() {
        let model = adapted("model_nf4", "adapter_init", Trained::Adapter);
        let execution = Execution::new(&model, kind);
        let job = Job {
            loss: &loss(),
            reference: ReferenceModel::Base,
            eval_rows: &rows[..5],
            ..job(&execution, &rows)
        };
        compare("nf4", &logs(&job, &settings), loose, kind).end();
    }
}

/// The trained adapter's beginning, or another adapter.
#[test]
fn an_adapter_against_a_second_model_is_that_of_trl() {
    let rows = rows();
    for (name, adapter) in [("initial", "adapter_init"), ("second", "adapter_final")] {
        let reference = adapted("model", adapter, Trained::Nothing);
        for kind in kinds() {
            // The reference need not be run the same way.
            for other in [kind, Kind::Reference] {
                let model = adapted("model", "adapter_init", Trained::Adapter);
                let execution = Execution::new(&model, kind);
                let reference = Execution::new(&reference, other);
                let job = Job {
                    loss: &loss(),
                    reference: ReferenceModel::Frozen(&reference),
                    eval_rows: &rows[..5],
                    ..job(&execution, &rows)
                };
                let logs = logs(&job, &epoch());
                if name == "second" || other == kind {
                    compare(name, &logs, CLOSE, kind).end();
                }
                if name == "initial" && other == kind {
                    // Before the first update both are the same to the last bit.
                    let first = &logs[0].values;
                    assert_eq!(first["rewards/margins"].to_bits(), 0f64.to_bits());
                }
            }
        }
    }
}

#[test]
fn every_weight_against_the_model_before_is_that_of_trl() {
    let settings = Settings {
        learning_rate: 5e-4,
        ..epoch()
    };
    let rows = rows();
    let reference = model("model", None, Trained::Nothing, DType::F32);
    for kind in kinds() {
        let model = model("model", None, Trained::Everything, DType::F32);
        let execution = Execution::new(&model, kind);
        let reference = Execution::new(&reference, kind);
        let job = Job {
            loss: &loss(),
            reference: ReferenceModel::Frozen(&reference),
            eval_rows: &rows[..5],
            ..job(&execution, &rows)
        };
        compare("full", &logs(&job, &settings), CLOSE, kind).end();
    }
}

/// TRL's `aot` on single pairs, see the generator.
#[test]
fn label_smoothing_is_that_of_trl() {
    let settings = Settings {
        batch_size: 1,
        eval_every: None,
        ..epoch()
    };
    let rows = rows();
    for kind in kinds() {
        let model = adapted("model", "adapter_init", Trained::Adapter);
        let execution = Execution::new(&model, kind);
        let job = Job {
            loss: &Dpo::sigmoid(0.5, 0.1),
            reference: ReferenceModel::Base,
            ..job(&execution, &rows)
        };
        compare("aot", &logs(&job, &settings), CLOSE, kind).end();
    }
}

#[test]
fn a_stopped_training_goes_on_to_the_same_bits() {
    let settings = Settings {
        save_every: 2,
        log_every: 5,
        accumulation: 3,
        scheduler: SchedulerType::Constant,
        dropout: true,
        ..epoch()
    };
    let rows = rows();
    let run = |scratch: Option<&std::path::Path>, stop: Option<(u64, usize)>| {
        let model = adapted("model", "adapter_init", Trained::Adapter);
        let execution = Execution::fastest(&model);
        let job = Job {
            loss: &loss(),
            reference: ReferenceModel::Base,
            eval_rows: &rows[..5],
            scratch,
            ..job(&execution, &rows)
        };
        let ending = train(&job, &settings, &mut |at| {
            if Some((at.step, at.micro_batches)) == stop {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        });
        let parameters = model.parameters.iter().map(|parameter| {
            let values = parameter.var.as_detached_tensor().flatten_all().unwrap();
            let values: Vec<f32> = values.to_vec1().unwrap();
            values.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        });
        (ending.unwrap(), parameters.collect::<Vec<_>>())
    };
    let whole = run(None, None);
    let scratch = tempfile::tempdir().unwrap();
    // In the middle of a step's micro-batches, whose tokens are counted once all the same, and after a step.
    for stop in [(1, 2), (3, 0)] {
        let (ending, _) = run(Some(scratch.path()), Some(stop));
        assert_eq!(ending, Ending::Interrupted { step: stop.0 });
    }
    assert!(run(Some(scratch.path()), None) == whole);
}
