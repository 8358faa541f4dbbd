//! Tests of `train`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::{Device, Tensor};

use super::schedule::SchedulerType;
use super::*;
use crate::ml::adapter::Adapter;
use crate::ml::execution::Execution;
use crate::ml::io::weights::Weights;
use crate::ml::loss::orpo::Orpo;
use crate::ml::model::Trained;
use crate::ml::model::arch::Arch;
use crate::ml::model::batch::Row;
use crate::ml::testing::golden::{self, folder, rows, tensors};
use crate::ml::testing::golden_runs::{job, settings};

mod together;

fn model(compute: DType) -> CausalLm {
    golden::model("model", Some("adapter_init"), Trained::Adapter, compute)
}

fn bits(model: &CausalLm) -> Vec<Vec<u32>> {
    let values = model.parameters.iter().map(|parameter| {
        let tensor = parameter.var.as_detached_tensor().flatten_all().unwrap();
        let values: Vec<f32> = tensor.to_vec1().unwrap();
        values.into_iter().map(f32::to_bits).collect()
    });
    values.collect()
}

fn goes_on() -> impl FnMut(&Step) -> ControlFlow<()> {
    |_| ControlFlow::Continue(())
}

/// The golden model, but the embedding of `id` is infinite.
fn with_a_broken_token(id: u32) -> CausalLm {
    let place = tempfile::tempdir().unwrap();
    let mut tensors = tensors("model/model.safetensors");
    let embed = tensors.get_mut("model.embed_tokens.weight").unwrap();
    let mut values: Vec<Vec<f32>> = embed.to_dtype(DType::F32).unwrap().to_vec2().unwrap();
    values[id as usize][0] = f32::INFINITY;
    *embed = Tensor::new(values, &Device::Cpu).unwrap();
    let tensors = tensors.into_iter().collect();
    candle_core::safetensors::save(&tensors, place.path().join("model.safetensors")).unwrap();
    let config = fs::read(folder("model").join("config.json")).unwrap();
    fs::write(place.path().join("config.json"), config).unwrap();
    CausalLm::load(
        &Arch::read(place.path()).unwrap(),
        &Weights::open(place.path()).unwrap(),
        Some(&Adapter::load(&folder("adapter_init")).unwrap()),
        Trained::Adapter,
        DType::F32,
        &Device::Cpu,
    )
    .unwrap()
}

/// A token of one row only, and the row.
fn rare_token(rows: &[Row]) -> (u32, usize) {
    let ids = |row: &Row| {
        let rejected = row.rejected.clone().unwrap_or_default();
        [row.prompt.clone(), row.chosen.clone(), rejected].concat()
    };
    let all: Vec<Vec<u32>> = rows.iter().map(ids).collect();
    let only = |id: u32| all.iter().filter(|ids| ids.contains(&id)).count() == 1;
    let mut candidates = all
        .iter()
        .enumerate()
        .skip(4)
        .flat_map(|(row, ids)| ids.iter().map(move |id| (*id, row)));
    candidates.find(|(id, _)| only(*id)).unwrap()
}

#[test]
fn an_infinite_weight_stops_the_step_of_its_rows_or_is_skipped() {
    let rows = rows("trl-1.16");
    let (id, row) = rare_token(&rows);
    let mut settings = Settings {
        epochs: 1.,
        ..settings()
    };
    let origin = Origin {
        split: "odd".into(),
        ..Origin::default()
    };
    let error = train(
        &Job {
            origin: &origin,
            ..job(&Execution::fastest(&with_a_broken_token(id)), &rows)
        },
        &settings,
        &mut goes_on(),
    )
    .unwrap_err();
    let fault: &Fault = error.downcast_ref().unwrap();
    let step = row / 4 + 1;
    assert_eq!(fault.step, step as u64);
    assert_eq!(fault.rows, [row / 2 * 2 + 1, row / 2 * 2 + 2]);
    assert_eq!(fault.what, "loss");
    let text = error.to_string();
    assert!(
        text.contains("of `odd`) : ") || text.contains("of `odd`): "),
        "{text}"
    );
    assert!(text.contains("learning_rate 0.002"), "{text}");

    settings.skip_nan_steps = 1;
    let model = with_a_broken_token(id);
    let mut told = Vec::new();
    let ending = train(
        &Job {
            origin: &origin,
            ..job(&Execution::fastest(&model), &rows)
        },
        &settings,
        &mut |step| {
            told.extend(step.skipped.clone());
            ControlFlow::Continue(())
        },
    );
    let Ending::Finished {
        history, skipped, ..
    } = ending.unwrap()
    else {
        panic!("interrupted")
    };
    assert_eq!((skipped, told.len(), history.len()), (1, 1, 6));
    assert_eq!(told[0].rows, fault.rows);
    let at = |step: usize, name: &str| history[step - 1].values[name];
    assert!(!at(step, "loss").is_finite());
    assert!(history[step - 1].line().contains("\"loss\":null"));
    for other in (1..=6).filter(|other| *other != step) {
        assert!(at(other, "loss").is_finite() && at(other, "grad_norm").is_finite());
    }
    // The schedule waits for the update.
    if step < 6 {
        let rate = |step| at(step, "learning_rate").to_bits();
        assert_eq!(rate(step), rate(step + 1));
    }
}

#[test]
fn a_huge_learning_rate_is_named_as_the_cause() {
    let rows = rows("trl-1.16");
    let mut settings = Settings {
        learning_rate: 1e30,
        scheduler: SchedulerType::Constant,
        skip_nan_steps: 2,
        ..settings()
    };
    let fresh = model(DType::F32);
    let error = train(
        &job(&Execution::fastest(&fresh), &rows),
        &settings,
        &mut goes_on(),
    )
    .unwrap_err();
    let fault: &Fault = error.downcast_ref().unwrap();
    assert!(fault.step > 3, "two steps may be skipped: {fault}");
    assert!(fault.cause.contains("learning_rate"), "{fault}");

    // Weights that are not finite after the last step are no result.
    settings.learning_rate = 1e39;
    settings.max_steps = Some(1);
    let fresh = model(DType::F32);
    let error = train(
        &job(&Execution::fastest(&fresh), &rows),
        &settings,
        &mut goes_on(),
    )
    .unwrap_err();
    assert!(
        error.to_string().contains("not finite after step 1"),
        "{error:#}"
    );
}

#[test]
fn the_best_weights_come_back_and_a_stop_in_between_changes_nothing() {
    let rows = rows("trl-1.16");
    let eval = &rows[..5];
    let watched = |load, patience| Settings {
        learning_rate: 3e-2,
        scheduler: SchedulerType::Constant,
        eval_every: Some(Every::Steps(1)),
        save_every: 1,
        watch: Some(Watch {
            metric: "loss".into(),
            greater: true, // of a loss that falls: the first evaluation is the best
            load,
            patience,
            threshold: 0.,
        }),
        ..settings()
    };
    let scratch = tempfile::tempdir().unwrap();
    let whole = model(DType::F32);
    let settings = watched(true, Some(3));
    let ending = train(
        &Job {
            eval_rows: eval,
            scratch: Some(scratch.path()),
            ..job(&Execution::fastest(&whole), &rows)
        },
        &settings,
        &mut goes_on(),
    );
    let ending = ending.unwrap();
    let Ending::Finished {
        history,
        step,
        best,
        ..
    } = &ending
    else {
        panic!("interrupted")
    };
    let losses: Vec<f64> = history
        .iter()
        .filter_map(|log| log.values.get("eval_loss").copied())
        .collect();
    let largest = losses.iter().copied().fold(f64::MIN, f64::max);
    assert_eq!(best.metric, Some(largest));
    let best_step = best.step.unwrap();
    assert!(losses[best_step as usize - 1] >= largest);
    assert_eq!(*step, best_step + 3, "{losses:?}");
    assert!(*step < 12);

    // The weights are those of a training that ends at the best step.
    let short = model(DType::F32);
    let plain = Settings {
        max_steps: Some(best_step),
        watch: None,
        ..settings.clone()
    };
    train(
        &Job {
            eval_rows: eval,
            ..job(&Execution::fastest(&short), &rows)
        },
        &plain,
        &mut goes_on(),
    )
    .unwrap();
    assert!(bits(&short) == bits(&whole));

    // Stopped after each step, and once with the newest checkpoint's best weights gone.
    let scratch = tempfile::tempdir().unwrap();
    for stop in 1..=*step {
        let model = model(DType::F32);
        let ended = train(
            &Job {
                eval_rows: eval,
                scratch: Some(scratch.path()),
                ..job(&Execution::fastest(&model), &rows)
            },
            &settings,
            &mut |at| {
                if at.step == stop && at.micro_batches == 0 {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            },
        );
        assert_eq!(ended.unwrap(), Ending::Interrupted { step: stop });
    }
    let resumed = model(DType::F32);
    let again = train(
        &Job {
            eval_rows: eval,
            scratch: Some(scratch.path()),
            ..job(&Execution::fastest(&resumed), &rows)
        },
        &settings,
        &mut goes_on(),
    );
    assert_eq!(again.unwrap(), ending);
    assert!(bits(&resumed) == bits(&whole));
    let weights = fs::read_dir(scratch.path()).unwrap().flatten();
    let weights: Vec<_> = weights
        .map(|entry| entry.file_name().into_string().unwrap())
        .filter(|name| name.starts_with("best-"))
        .collect();
    assert_eq!(weights, [format!("best-{best_step:08}.safetensors")]);
    fs::write(scratch.path().join(&weights[0]), "damaged").unwrap();
    let resumed = model(DType::F32);
    let again = train(
        &Job {
            eval_rows: eval,
            scratch: Some(scratch.path()),
            ..job(&Execution::fastest(&resumed), &rows)
        },
        &settings,
        &mut goes_on(),
    );
    assert_eq!(again.unwrap(), ending);
    assert!(bits(&resumed) == bits(&whole));

    // A metric that the evaluation does not give is told before the first step.
    let mut settings = watched(false, Some(1));
    if let Some(watch) = &mut settings.watch {
        watch.metric = "bleu".into();
    }
    let fresh = model(DType::F32);
    let error = train(
        &Job {
            eval_rows: eval,
            ..job(&Execution::fastest(&fresh), &rows)
        },
        &settings,
        &mut goes_on(),
    )
    .unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("`bleu`") && text.contains("rewards/margins"),
        "{text}"
    );
}

#[test]
fn a_last_step_between_two_evaluations_is_evaluated_too() {
    let rows = rows("trl-1.16");
    let settings = Settings {
        eval_every: Some(Every::Steps(4)),
        max_steps: Some(6),
        ..settings()
    };
    let fresh = model(DType::F32);
    let ending = train(
        &Job {
            eval_rows: &rows[..5],
            ..job(&Execution::fastest(&fresh), &rows)
        },
        &settings,
        &mut goes_on(),
    );
    let Ending::Finished { history, .. } = ending.unwrap() else {
        panic!("interrupted")
    };
    let evaluated = history
        .iter()
        .filter(|log| log.values.contains_key("eval_loss"));
    assert_eq!(evaluated.map(|log| log.step).collect::<Vec<_>>(), [4, 6]);
}

#[test]
fn an_overflow_halves_the_scale_and_the_schedule_waits() {
    let rows = rows("trl-1.16");
    // So heavy a loss overflows f16 gradients at the first scales, but is itself a number.
    let settings = Settings {
        loss_scaling: true,
        warmup: 0.,
        scheduler: SchedulerType::Linear,
        max_steps: Some(30),
        ..settings()
    };
    let scratch = tempfile::tempdir().unwrap();
    let trained = model(DType::F16);
    let before = bits(&trained);
    let mut logs = Vec::new();
    let ending = train(
        &Job {
            loss: &Orpo { beta: 1e4 },
            scratch: Some(scratch.path()),
            ..job(&Execution::fastest(&trained), &rows)
        },
        &settings,
        &mut |at| {
            logs.extend(at.logs.clone());
            if at.step == 2 && at.micro_batches == 0 {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        },
    );
    assert_eq!(ending.unwrap(), Ending::Interrupted { step: 2 });
    assert!(bits(&trained) == before);
    let resume = |model: &CausalLm| {
        let mut optimizer = Optimizer::new(settings.optimizer, &model.parameters);
        let state = checkpoint::resume(scratch.path(), model, &mut optimizer).unwrap();
        (state.state.unwrap(), optimizer)
    };
    let (state, optimizer) = resume(&trained);
    // Steps are counted and logged; updates, schedule and good steps are not, as with accelerate.
    assert_eq!((state.step, state.scheduled, state.skipped), (2, 0, 0));
    assert_eq!(
        state.scaler,
        Scaler {
            scale: 16_384.,
            good: 0
        }
    );
    let moments = optimizer.save(&trained.parameters).unwrap();
    assert_eq!(moments["steps"].to_vec1::<i64>().unwrap(), [0]);
    for log in &logs {
        assert!(!log.values["grad_norm"].is_finite());
        assert_eq!(log.values["learning_rate"].to_bits(), 2e-3f64.to_bits());
    }
    assert_eq!(logs.len(), 2);
    assert_eq!(logs[1].step, 2);

    // Halved far enough, the steps are good ones.
    train(
        &Job {
            loss: &Orpo { beta: 1e4 },
            scratch: Some(scratch.path()),
            ..job(&Execution::fastest(&trained), &rows)
        },
        &Settings {
            max_steps: Some(30),
            ..settings.clone()
        },
        &mut |at| {
            if at.step == 25 && at.micro_batches == 0 {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        },
    )
    .unwrap();
    let (state, _) = resume(&trained);
    let halved = (65_536. / state.scaler.scale).log2() as u64;
    assert!(state.scheduled > 0 && halved > 2);
    assert_eq!(state.scheduled + halved, 25);
    assert!(bits(&trained) != before);
}

#[test]
fn a_damaged_checkpoint_is_passed_over() {
    let rows = rows("trl-1.16");
    let settings = Settings {
        save_every: 1,
        keep: 3,
        max_steps: Some(4),
        ..settings()
    };
    let made = |damage: &dyn Fn(&Path)| {
        let scratch = tempfile::tempdir().unwrap();
        train(
            &Job {
                scratch: Some(scratch.path()),
                ..job(&Execution::fastest(&model(DType::F32)), &rows)
            },
            &settings,
            &mut goes_on(),
        )
        .unwrap();
        damage(&scratch.path().join("step-00000003"));
        let mut first = None;
        let trained = model(DType::F32);
        let ending = train(
            &Job {
                scratch: Some(scratch.path()),
                ..job(&Execution::fastest(&trained), &rows)
            },
            &settings,
            &mut |at| {
                first.get_or_insert_with(|| at.clone());
                ControlFlow::Continue(())
            },
        );
        (first, ending.unwrap(), bits(&trained))
    };
    let (first, ending, whole) = made(&|_| ());
    assert_eq!(first.unwrap().step, 3);
    let change = |place: &Path, name: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = fs::read(place.join(name)).unwrap();
        change(&mut bytes);
        fs::write(place.join(name), bytes).unwrap();
    };
    let flip = |bytes: &mut Vec<u8>| {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
    };
    let truncate = |bytes: &mut Vec<u8>| bytes.truncate(bytes.len() / 2);
    let damages: [&dyn Fn(&Path); 5] = [
        &|place| change(place, "state.safetensors", &flip),
        &|place| change(place, "state.json", &flip),
        &|place| change(place, "state.safetensors", &truncate),
        &|place| change(place, "state.json", &truncate),
        &|place| fs::remove_file(place.join("state.json")).unwrap(),
    ];
    for (number, damage) in damages.iter().enumerate() {
        let (first, again, bits) = made(damage);
        let step = first.as_ref().unwrap();
        assert_eq!(step.passed_over.len(), 1, "damage {number}");
        assert!(step.passed_over[0].contains("step-00000003"));
        assert_eq!(step.step, 2, "damage {number}");
        assert_eq!(again, ending);
        assert!(bits == whole);
    }
}

/// Reading fails with an I/O error, whoever asks: that says nothing about what is there, so the training does not start over.
#[cfg(target_os = "linux")]
#[test]
fn a_checkpoint_that_can_not_be_read_stops_the_training() {
    let rows = rows("trl-1.16");
    let settings = Settings {
        save_every: 1,
        keep: 3,
        max_steps: Some(3),
        ..settings()
    };
    let scratch = tempfile::tempdir().unwrap();
    let go = |model: &CausalLm| {
        let scratch = Some(scratch.path());
        train(
            &Job {
                scratch,
                ..job(&Execution::fastest(model), &rows)
            },
            &settings,
            &mut goes_on(),
        )
    };
    go(&model(DType::F32)).unwrap();
    let newest = scratch.path().join("step-00000002");
    for name in ["state.safetensors", "state.json", "digest"] {
        let (path, aside) = (newest.join(name), newest.join("aside"));
        fs::rename(&path, &aside).unwrap();
        std::os::unix::fs::symlink("/proc/self/mem", &path).unwrap();
        let untouched = model(DType::F32);
        let before = bits(&untouched);
        let error = format!("{:#}", go(&untouched).unwrap_err());
        assert!(
            error.contains("could not read the checkpoint"),
            "{name}: {error}"
        );
        assert!(error.contains("step-00000002"), "{name}: {error}");
        assert!(bits(&untouched) == before);
        fs::remove_file(&path).unwrap();
        fs::rename(&aside, &path).unwrap();
    }
    go(&model(DType::F32)).unwrap();
}

#[test]
fn an_optimiser_takes_all_of_a_checkpoint_or_nothing() {
    let model = model(DType::F32);
    let mut optimizer = Optimizer::new(settings().optimizer, &model.parameters);
    let start = optimizer.save(&model.parameters).unwrap();
    let ones = |tensor: &Tensor| match tensor.dtype() {
        DType::I64 => Tensor::new(&[7i64], &Device::Cpu),
        _ => tensor.ones_like(),
    };
    let mut other: BTreeMap<String, Tensor> = start
        .iter()
        .map(|(name, tensor)| (name.clone(), ones(tensor).unwrap()))
        .collect();
    let last = other.keys().rfind(|name| *name != "steps").unwrap().clone();
    other.remove(&last);
    assert!(optimizer.restore(&model.parameters, &other).is_err());
    for (name, tensor) in &optimizer.save(&model.parameters).unwrap() {
        let as_f64 = |tensor: &Tensor| {
            tensor
                .to_dtype(DType::F64)
                .unwrap()
                .to_vec1::<f64>()
                .unwrap()
        };
        assert_eq!(as_f64(tensor), as_f64(&start[name]), "{name}");
    }
}
