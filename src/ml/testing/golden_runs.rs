//! Whole trainings against TRL's logs, and against themselves after an interruption.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::LazyLock;

use candle_core::{DType, Tensor};

use super::golden::{far, model, rows, tensors};
use super::golden_compare::{Comparison, EXACT, Tolerance, compare, json};
use super::kinds::{fastest, kinds};
use crate::ml::execution::{Execution, Kind};
use crate::ml::loss::Loss;
use crate::ml::loss::orpo::Orpo;
use crate::ml::loss::sft::Sft;
use crate::ml::model::batch::Row;
use crate::ml::model::{CausalLm, Trained};
use crate::ml::train::optim::{self, LoraPlus, Optim};
use crate::ml::train::sampler::SamplingStrategy;
use crate::ml::train::schedule::{SchedulerKwargs, SchedulerType};
use crate::ml::train::{Ending, Every, Job, Log, Origin, ReferenceModel, Settings, train};

/// The settings of run A.
pub(in crate::ml) fn settings() -> Settings {
    Settings {
        batch_size: 2,
        eval_batch_size: 2,
        accumulation: 2,
        epochs: 2.,
        learning_rate: 2e-3,
        scheduler: SchedulerType::Cosine,
        warmup: 2.,
        optimizer: optim::Settings {
            weight_decay: 0.01,
            ..optim::Settings::default()
        },
        dropout: false,
        seed: 3407,
        data_seed: 3407,
        sampling: SamplingStrategy::Sequential,
        log_every: 1,
        save_every: 1000,
        ..Settings::default()
    }
}

/// A job of run A: ORPO, with its id for padding.
pub(in crate::ml) fn job<'a>(execution: &'a Execution<'a>, rows: &'a [Row]) -> Job<'a> {
    static ORIGIN: LazyLock<Origin> = LazyLock::new(Origin::default);
    Job {
        execution,
        loss: &Orpo { beta: 0.1 },
        reference: ReferenceModel::None,
        rows,
        eval_rows: &[],
        pad: 1023,
        origin: &ORIGIN,
        scratch: None,
        continuation: None,
    }
}

fn run(execution: &Execution<'_>, semantics: &str, settings: &Settings) -> Vec<Log> {
    let rows = rows(semantics);
    let mut logs = Vec::new();
    let ending = train(
        &Job {
            eval_rows: &rows[..5],
            ..job(execution, &rows)
        },
        settings,
        &mut |step| {
            logs.extend(step.logs.clone());
            ControlFlow::Continue(())
        },
    )
    .unwrap();
    let Ending::Finished { history, .. } = ending else {
        panic!("interrupted")
    };
    assert_eq!(history.len(), logs.len());
    logs
}

/// The same mathematics with other roundings in between: rank-stabilised scales, 4-bit weights.
pub(in crate::ml) const LOOSE: Tolerance = Tolerance {
    relative: 1e-3,
    near_zero: 1e-6,
    cancelled: 1e-6,
    grad_norm: 1e-3,
    accuracy: 0.,
};

/// Products in half precision.
const HALF: Tolerance = Tolerance {
    relative: 2e-2,
    near_zero: 1e-6,
    cancelled: 1e-2,
    grad_norm: 2e-2,
    accuracy: 0.25,
};

/// How far the trained adapter is from the reference's.
fn adapter_far(model: &CausalLm, golden: &BTreeMap<String, Tensor>) -> f64 {
    assert_eq!(golden.len(), model.parameters.len());
    let far = model.parameters.iter().map(|parameter| {
        let theirs = &golden[&format!("base_model.model.{}", parameter.name)];
        far(&parameter.var.as_detached_tensor(), theirs)
    });
    far.fold(0., f64::max)
}

#[test]
fn run_a_is_that_of_trl() {
    for kind in kinds() {
        run_a(kind);
    }
}

fn run_a(kind: Kind) {
    let model = model("model", Some("adapter_init"), Trained::Adapter, DType::F32);
    let execution = Execution::new(&model, kind);
    let settings = Settings {
        eval_every: Some(Every::Epoch),
        ..settings()
    };
    let rows = rows("trl-1.16");
    let on_gpu = matches!(kind, Kind::Gpu(_));
    let mut logs = Vec::new();
    let mut on_the_way = BTreeMap::new();
    let ending = train(
        &Job {
            eval_rows: &rows[..5],
            ..job(&execution, &rows)
        },
        &settings,
        &mut |step| {
            logs.extend(step.logs.clone());
            // Between steps, what a GPU has trained is nowhere else.
            if !on_gpu && step.micro_batches == 0 && (2..=3).contains(&step.step) {
                let golden = tensors(&format!("runs/a_adapter_step{}.safetensors", step.step));
                on_the_way.insert(step.step, adapter_far(&model, &golden));
            }
            ControlFlow::Continue(())
        },
    );
    assert!(matches!(ending.unwrap(), Ending::Finished { .. }));

    let mut comparison = compare("a_f32", &logs, EXACT, kind);
    // TRL evaluated at the end.
    let eval = logs
        .iter()
        .rfind(|log| log.values.contains_key("eval_loss"));
    let eval = eval.unwrap();
    assert_eq!((eval.step, eval.values.len()), (12, 12));
    let golden = json("runs/a_f32.json");
    for (name, value) in &eval.values {
        let theirs = golden["eval"][name].as_f64().unwrap();
        comparison.number("the evaluation", name, *value, theirs);
    }
    assert_eq!(on_the_way.len(), if on_gpu { 0 } else { 2 });
    for (step, far) in on_the_way {
        comparison.largest(&format!("adapter after step {step}"), far, 2e-5);
    }
    let golden = tensors("adapter_final/adapter_model.safetensors");
    let far = adapter_far(&model, &golden);
    comparison.largest("adapter after step 12", far, 2e-4);
    comparison.end();
}

#[test]
fn run_b_with_checkpointing_is_run_a_to_the_bit() {
    for kind in kinds() {
        run_b(kind);
    }
}

fn run_b(kind: Kind) {
    let runs = [false, true].map(|checkpointing| {
        let model = model("model", Some("adapter_init"), Trained::Adapter, DType::F32);
        let execution = Execution::new(&model, kind);
        let settings = Settings {
            checkpointing,
            ..settings()
        };
        let logs = run(&execution, "trl-1.16", &settings);
        compare("b_f32_gradient_checkpointing", &logs, EXACT, kind).end();
        let bits_of =
            |log: &Log| -> Vec<u64> { log.values.values().map(|x| x.to_bits()).collect() };
        (logs.iter().map(bits_of).collect::<Vec<_>>(), bits(&model))
    });
    assert!(runs[0] == runs[1]);
}

#[test]
fn run_c_with_a_ragged_group_is_that_of_trl() {
    let settings = Settings {
        accumulation: 5,
        epochs: 1.,
        scheduler: SchedulerType::Linear,
        warmup: 0.,
        ..settings()
    };
    for kind in kinds() {
        let model = model("model", Some("adapter_init"), Trained::Adapter, DType::F32);
        let execution = Execution::new(&model, kind);
        let logs = run(&execution, "trl-0.24", &settings);
        compare("c_f32_legacy_truncation_ragged_accum", &logs, EXACT, kind).end();
    }
}

#[test]
fn a_smaller_last_micro_batch_cuts_none_of_the_others() {
    let golden = json("runs/i_ragged.json");
    let settings = Settings {
        epochs: 1.,
        warmup: 0.,
        ..settings()
    };
    for kind in kinds() {
        let model = model("model", Some("adapter_init"), Trained::Adapter, DType::F32);
        let execution = Execution::new(&model, kind);
        let (rows, mut logs) = (&rows("trl-1.16")[..7], Vec::new());
        train(&job(&execution, rows), &settings, &mut |step| {
            logs.extend(step.logs.clone());
            ControlFlow::Continue(())
        })
        .unwrap();
        // What TRL would log if accelerate cut nothing.
        let mut comparison = Comparison::new("i_ragged", EXACT, kind);
        comparison.logs(&logs, golden["whole"].as_array().unwrap());
        comparison.end();
        // What it logs: the same, but for what goes through `gather_for_metrics` row by row in the last step.
        let cut = golden["log_history"].as_array().unwrap();
        let far = |log: &Log, name: &str| {
            let theirs = cut[log.step as usize - 1][name].as_f64().unwrap();
            (log.values[name] - theirs).abs() / theirs.abs().max(1e-3)
        };
        for log in &logs {
            for name in log
                .values
                .keys()
                .filter(|name| !name.starts_with("logits/"))
            {
                let is_cut =
                    log.step == 2 && (name.starts_with("logps/") || name.starts_with("rewards/"));
                let may_be_equal = name == "rewards/accuracies";
                let far = far(log, name);
                assert!(
                    may_be_equal || is_cut == (far > 1e-3),
                    "step {}, {name}: {far}",
                    log.step
                );
            }
        }
    }
}

#[test]
fn run_d_in_bf16_is_near_that_of_trl() {
    for kind in kinds() {
        let model = model("model", Some("adapter_init"), Trained::Adapter, DType::BF16);
        let execution = Execution::new(&model, kind);
        let logs = run(&execution, "trl-1.16", &settings());
        compare("d_bf16_autocast", &logs, HALF, kind).end();
    }
}

#[test]
fn run_e_with_rslora_and_adamw_8bit_is_that_of_trl() {
    let settings = Settings {
        epochs: 1.,
        optimizer: optim::Settings {
            optim: Optim::Adamw8bit,
            ..settings().optimizer
        },
        ..settings()
    };
    for kind in kinds() {
        let model = super::golden::rslora_model();
        let execution = Execution::new(&model, kind);
        let logs = run(&execution, "trl-1.16", &settings);
        compare("e_f32_rslora_adamw8bit", &logs, LOOSE, kind).end();
    }
}

#[test]
fn run_g_on_a_4_bit_base_is_that_of_trl() {
    let settings = Settings {
        epochs: 1.,
        ..settings()
    };
    for kind in kinds() {
        let adapter = Some("adapter_init");
        let model = model("model_nf4", adapter, Trained::Adapter, DType::F32);
        let execution = Execution::new(&model, kind);
        let logs = run(&execution, "trl-1.16", &settings);
        compare("g_qlora_nf4_f32", &logs, LOOSE, kind).end();
    }
}

#[test]
fn run_h_on_every_weight_is_that_of_trl() {
    let golden = json("runs/h_full.json");
    let rows = rows("trl-1.16");
    for (name, optim, tolerance) in [
        ("adamw_torch", Optim::AdamwTorch, EXACT),
        // bitsandbytes on a CPU takes another code than the nearest now and then (one in 200), so the moments differ by a
        // little, and what is left where large numbers cancel by more.
        (
            "adamw_8bit",
            Optim::Adamw8bit,
            Tolerance {
                cancelled: 3e-4,
                ..LOOSE
            },
        ),
    ] {
        let golden = &golden[name];
        let model = model("model", None, Trained::Everything, DType::F32);
        let execution = Execution::new(&model, fastest());
        let before: Vec<Tensor> = model
            .parameters
            .iter()
            .map(|parameter| parameter.var.as_detached_tensor().copy().unwrap())
            .collect();
        let settings = Settings {
            epochs: 1.,
            learning_rate: 5e-4,
            scheduler: SchedulerType::Linear,
            warmup: 1.,
            optimizer: optim::Settings {
                optim,
                ..settings().optimizer
            },
            ..settings()
        };
        let mut logs = Vec::new();
        let ending = train(&job(&execution, &rows), &settings, &mut |step| {
            logs.extend(step.logs.clone());
            ControlFlow::Continue(())
        });
        assert!(matches!(ending.unwrap(), Ending::Finished { .. }));
        let mut comparison =
            Comparison::new(&format!("h_full {name}"), tolerance, execution.kind());
        comparison.logs(&logs, golden["log_history"].as_array().unwrap());
        let mut largest = 0f64;
        for (parameter, before) in model.parameters.iter().zip(&before) {
            let moved = (parameter.var.as_detached_tensor() - before).unwrap();
            let moved = optim::norm(&[Some(moved)]).unwrap();
            let theirs = golden["moved"][&parameter.name].as_f64().unwrap();
            largest = largest.max((moved - theirs).abs() / theirs);
        }
        comparison.largest("length of each tensor's change, relative", largest, 3e-3);
        comparison.end();
        // Which tensors have moments in 8 bits: all large ones but the embeddings.
        let optimizer = optim::Optimizer::new(settings.optimizer, &model.parameters);
        let saved = optimizer.save(&model.parameters).unwrap();
        let eight = saved
            .iter()
            .filter(|(_, tensor)| tensor.dtype() == DType::U8);
        let eight: Vec<&str> = eight
            .filter_map(|(name, _)| name.strip_prefix("m."))
            .collect();
        assert_eq!(golden["eight_bit"], serde_json::json!(eight));
    }
}

#[test]
fn f16_with_a_loss_scale_learns_the_same() {
    let model = model("model", Some("adapter_init"), Trained::Adapter, DType::F16);
    let execution = Execution::new(&model, fastest());
    let settings = Settings {
        loss_scaling: true,
        ..settings()
    };
    let logs = run(&execution, "trl-1.16", &settings);
    compare("a_f32", &logs, HALF, execution.kind()).end();
}

pub(super) fn bits(model: &CausalLm) -> Vec<Vec<u32>> {
    let values = model.parameters.iter().map(|parameter| {
        let tensor = parameter.var.as_detached_tensor().flatten_all().unwrap();
        let values: Vec<f32> = tensor.to_vec1().unwrap();
        values.into_iter().map(f32::to_bits).collect()
    });
    values.collect()
}

#[test]
fn a_stopped_training_goes_on_to_the_same_bits() {
    const LOSS: &dyn Loss = &Sft {
        completion_only: true,
    };
    let rows = rows("trl-1.16");
    for (optim, trained) in [
        (Optim::Adamw8bit, Trained::Everything),
        (Optim::AdamwTorch, Trained::Adapter),
        // With noise, a learning rate that follows evaluations, and rates of their own for B.
        (Optim::Adafactor, Trained::Adapter),
    ] {
        let extras = optim == Optim::Adafactor;
        let settings = Settings {
            sampling: SamplingStrategy::Random,
            dropout: true,
            log_every: 5,
            save_every: 2,
            accumulation: 5,
            optimizer: optim::Settings {
                optim,
                lora_plus: extras.then_some(LoraPlus {
                    ratio: 4.,
                    embedding: 1.,
                }),
                ..settings().optimizer
            },
            neftune_noise_alpha: extras.then_some(5.),
            eval_every: extras.then_some(Every::Steps(1)),
            scheduler: if extras {
                SchedulerType::ReduceLrOnPlateau
            } else {
                settings().scheduler
            },
            scheduler_kwargs: SchedulerKwargs {
                patience: extras.then_some(0),
                threshold: extras.then_some(1.),
                ..SchedulerKwargs::default()
            },
            ..settings()
        };
        let fresh = || {
            let adapter = (trained == Trained::Adapter).then_some("adapter_init");
            model("model", adapter, trained, DType::F32)
        };
        let whole = fresh();
        let goes_on = &mut |_: &_| ControlFlow::Continue(());
        let ending = train(
            &Job {
                loss: LOSS,
                eval_rows: &rows[..2],
                ..job(&Execution::fastest(&whole), &rows)
            },
            &settings,
            goes_on,
        )
        .unwrap();

        let scratch = tempfile::tempdir().unwrap();
        // Stopped in the middle of a group, then after a step.
        for (step, micro) in [(2, 1), (4, 0)] {
            let model = fresh();
            let ending = train(
                &Job {
                    loss: LOSS,
                    scratch: Some(scratch.path()),
                    eval_rows: &rows[..2],
                    ..job(&Execution::fastest(&model), &rows)
                },
                &settings,
                &mut |at| {
                    if (at.step, at.micro_batches) == (step, micro) {
                        ControlFlow::Break(())
                    } else {
                        ControlFlow::Continue(())
                    }
                },
            );
            assert_eq!(ending.unwrap(), Ending::Interrupted { step });
        }
        // The newest checkpoint is damaged: the one before it is taken.
        let newest = scratch.path().join("step-00000004/state.safetensors");
        let mut bytes = std::fs::read(&newest).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        std::fs::write(&newest, bytes).unwrap();
        let resumed = fresh();
        let mut first = None;
        let again = train(
            &Job {
                loss: LOSS,
                scratch: Some(scratch.path()),
                eval_rows: &rows[..2],
                ..job(&Execution::fastest(&resumed), &rows)
            },
            &settings,
            &mut |at| {
                first = first.or(Some(at.step));
                ControlFlow::Continue(())
            },
        );
        assert_eq!(first, Some(2));
        assert_eq!(again.unwrap(), ending);
        assert!(bits(&resumed) == bits(&whole), "{optim:?}");
        assert!(bits(&resumed) != bits(&fresh()));
    }
}

#[test]
fn a_loss_that_is_no_number_stops_with_the_step_and_the_rows() {
    let model = model("model", Some("adapter_init"), Trained::Adapter, DType::F32);
    let rows = rows("trl-1.16");
    let broken = &model.parameters[0].var;
    let nan = (broken.as_detached_tensor() * f64::NAN).unwrap();
    broken.set(&nan).unwrap();
    let goes_on = &mut |_: &_| ControlFlow::Continue(());
    let error = train(
        &job(&Execution::fastest(&model), &rows),
        &settings(),
        goes_on,
    )
    .unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("NaN in step 1 (rows [1, 2] of `train`)"),
        "{text}"
    );
}

#[test]
fn an_overflow_in_f16_skips_the_step_and_halves_the_scale() {
    let model = model("model", Some("adapter_init"), Trained::Adapter, DType::F16);
    let before = bits(&model);
    let rows = rows("trl-1.16");
    // A weight this large makes gradients overflow f16 at the first scale, but not the loss.
    let settings = Settings {
        loss_scaling: true,
        warmup: 0.,
        max_steps: Some(1),
        ..settings()
    };
    let mut logs = Vec::new();
    let ending = train(
        &Job {
            loss: &Orpo { beta: 1e6 },
            ..job(&Execution::new(&model, fastest()), &rows)
        },
        &settings,
        &mut |step| {
            logs.extend(step.logs.clone());
            ControlFlow::Continue(())
        },
    );
    assert!(matches!(ending.unwrap(), Ending::Finished { .. }));
    assert_eq!(logs.len(), 1);
    assert!(logs[0].values["loss"].is_finite());
    assert!(!logs[0].values["grad_norm"].is_finite());
    assert!(bits(&model) == before);
}
