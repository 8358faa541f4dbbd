//! Trainings by several processes, which are threads here: they are those of one process but for the order of sums, and those of as many
//! processes to the bit.

use serde::Deserialize;

use super::super::process_group::threads::together;
use super::super::process_group::{dealt, exchange, sum_gradients};
use super::super::{Passes, ReferenceModel, train_together};
use super::*;
use crate::ml::loss::Loss;
use crate::ml::loss::dpo::Dpo;
use crate::ml::loss::sft::{Answers, Sft};
use crate::ml::testing::golden_compare::json;

/// How far metrics may be from those of one process, relative.
const FAR: f64 = 1e-5;
/// And absolute, of metrics that are 0 but for rounding: differences of log-probabilities that nearly cancel.
const NEAR_ZERO: f64 = 2e-6;

/// Steps of 12 micro-batches of one row, of which the second one of an epoch has 11.
fn settings_of_12() -> Settings {
    Settings {
        batch_size: 1,
        eval_batch_size: 2,
        accumulation: 12,
        eval_every: Some(Every::Epoch),
        neftune_noise_alpha: Some(5.),
        dropout: true,
        sampling: sampler::SamplingStrategy::Random,
        ..settings()
    }
}

fn rows_of_23() -> Vec<Row> {
    let mut rows = rows("trl-1.16");
    rows.truncate(23);
    rows
}

/// The golden model with the golden adapter and a dropout.
fn model_with_dropout() -> CausalLm {
    let place = tempfile::tempdir().unwrap();
    for file in fs::read_dir(folder("adapter_init")).unwrap() {
        let path = file.unwrap().path();
        fs::copy(&path, place.path().join(path.file_name().unwrap())).unwrap();
    }
    let config = place.path().join("adapter_config.json");
    let text = fs::read_to_string(&config).unwrap();
    assert!(text.contains("\"lora_dropout\": 0.0"));
    let text = text.replace("\"lora_dropout\": 0.0", "\"lora_dropout\": 0.1");
    fs::write(&config, text).unwrap();
    CausalLm::load(
        &Arch::read(&folder("model")).unwrap(),
        &Weights::open(&folder("model")).unwrap(),
        Some(&Adapter::load(place.path()).unwrap()),
        Trained::Adapter,
        DType::F32,
        &Device::Cpu,
    )
    .unwrap()
}

/// What a process ends with.
#[derive(Debug, Clone, PartialEq)]
struct End {
    history: Vec<Log>,
    /// All tokens that were reported.
    tokens: usize,
    bits: Vec<Vec<u32>>,
}

/// The ends of all processes of a training.
fn ends(
    size: usize,
    loss: &dyn Loss,
    reference: ReferenceModel<'_>,
    rows: &[Row],
    settings: &Settings,
) -> Vec<End> {
    together(size, |processes| {
        let model = model_with_dropout();
        let execution = Execution::fastest(&model);
        let mut tokens = 0;
        let mut own_rows = rows.to_vec();
        let mut own_reference = reference;
        if matches!(reference, ReferenceModel::Rows) {
            let passes = Passes {
                execution: &execution,
                loss,
                reference: ReferenceModel::Base,
            };
            passes
                .precompute_reference(&mut own_rows, 3, 1023, processes, &mut |_| Ok(()))
                .unwrap();
            own_reference = ReferenceModel::Rows;
        }
        let job = Job {
            loss,
            reference: own_reference,
            eval_rows: &own_rows[..5],
            ..job(&execution, &own_rows)
        };
        let ending = train_together(&job, settings, processes, &mut |step| {
            tokens += step.tokens;
            ControlFlow::Continue(())
        });
        let Ending::Finished { history, .. } = ending.unwrap() else {
            panic!("interrupted")
        };
        End {
            history,
            tokens,
            bits: bits(&model),
        }
    })
}

/// Compares all metrics with those of one process, and gives the largest relative difference.
fn compare(one: &End, other: &End) -> f64 {
    assert_eq!(one.history.len(), other.history.len());
    let mut largest = 0f64;
    for (ours, theirs) in other.history.iter().zip(&one.history) {
        assert_eq!((ours.step, ours.epoch), (theirs.step, theirs.epoch));
        assert!(ours.values.keys().eq(theirs.values.keys()));
        for (name, theirs) in &theirs.values {
            let far = (ours.values[name] - theirs).abs();
            if far > NEAR_ZERO {
                let relative = far / theirs.abs();
                assert!(relative <= FAR, "{name} in step {}: {relative}", ours.step);
                largest = largest.max(relative);
            }
        }
    }
    assert_eq!(one.tokens, other.tokens);
    largest
}

/// Also with a reference that was computed before, each process a part of the rows: TRL's pull request 6403 mends what went wrong there when a
/// process had only a part of the model.
#[test]
fn several_processes_train_as_one_does() {
    let rows = rows_of_23();
    let single = crate::ml::loss::sft::rows(&rows, Answers::Chosen).unwrap();
    let dpo = Dpo::sigmoid(0.1, 0.);
    let sft = Sft {
        completion_only: true,
    };
    let cases: [(&dyn Loss, ReferenceModel<'_>, &[Row]); 4] = [
        (&Orpo { beta: 0.1 }, ReferenceModel::None, &rows),
        // Its micro-batches weigh by their tokens.
        (&sft, ReferenceModel::None, &single),
        (&dpo, ReferenceModel::Base, &rows),
        (&dpo, ReferenceModel::Rows, &rows),
    ];
    let settings = settings_of_12();
    for (number, (loss, reference, rows)) in cases.into_iter().enumerate() {
        let alone = ends(1, loss, reference, rows, &settings);
        assert_eq!(alone[0].history.iter().map(|log| log.step).max(), Some(4));
        for size in [2, 3, 4] {
            let all = ends(size, loss, reference, rows, &settings);
            // All processes have the same numbers, and so has another training by as many.
            for other in &all {
                assert_eq!(other.history, all[0].history, "case {number}, {size}");
                assert!(other.bits == all[0].bits);
            }
            if size == 2 {
                assert!(all == ends(size, loss, reference, rows, &settings));
            }
            let far = compare(&alone[0], &all[0]);
            println!("case {number}, {size} processes: {far:e}");
        }
    }
}

/// The end of each process; `stop` says in which report which process stops.
fn go(
    size: usize,
    scratch: &Path,
    rows: &[Row],
    settings: &Settings,
    stop: &(dyn Fn(usize, &Step) -> bool + Sync),
) -> Vec<(Ending, Vec<Vec<u32>>)> {
    together(size, |processes| {
        let model = model_with_dropout();
        let execution = Execution::fastest(&model);
        let job = Job {
            eval_rows: &rows[..5],
            scratch: Some(scratch),
            ..job(&execution, rows)
        };
        let ending = train_together(&job, settings, processes, &mut |step| {
            if stop(processes.rank(), step) {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        });
        (ending.unwrap(), bits(&model))
    })
}

/// Whether a process stops a training at a step, by its rank.
type Stops<'a> = &'a (dyn Fn(usize, &Step) -> bool + Sync);

#[test]
fn several_processes_stop_together_and_go_on_with_the_same_bits() {
    let rows = rows_of_23();
    let settings = Settings {
        save_every: 1,
        watch: Some(Watch {
            metric: "loss".into(),
            greater: false,
            load: true,
            patience: None,
            threshold: 0.,
        }),
        ..settings_of_12()
    };
    let folder = || tempfile::tempdir().unwrap();
    let whole = go(2, folder().path(), &rows, &settings, &|_, _| false);
    // After a step, in the middle of one, and before the first one; by the first process or by the other one.
    let stops: [Stops<'_>; 4] = [
        &|rank, step| rank == 0 && step.step == 1 && step.micro_batches == 0,
        &|rank, step| rank == 1 && step.step == 2 && step.micro_batches == 0,
        &|rank, step| rank == 1 && step.step == 3 && step.micro_batches == 2,
        &|rank, step| rank == 0 && step.step == 0 && step.micro_batches == 0,
    ];
    for (number, stop) in stops.into_iter().enumerate() {
        let scratch = folder();
        let stopped = go(2, scratch.path(), &rows, &settings, stop);
        let steps = [1, 2, 3, 0];
        for (ending, _) in &stopped {
            let step = steps[number];
            assert_eq!(*ending, Ending::Interrupted { step });
        }
        let resumed = go(2, scratch.path(), &rows, &settings, &|_, _| false);
        assert_eq!(resumed[0], whole[0], "stop {number}");
        // One process goes on from there, too.
        let stopped = go(2, scratch.path(), &rows, &settings, &|_, _| true);
        assert!(matches!(stopped[1].0, Ending::Interrupted { .. }));
        let alone = go(1, scratch.path(), &rows, &settings, &|_, _| false);
        assert!(matches!(alone[0].0, Ending::Finished { .. }));
    }
}

#[test]
fn what_is_not_finite_is_the_same_fault_in_all_processes() {
    let rows = rows("trl-1.16");
    let (id, _) = rare_token(&rows);
    let settings = Settings {
        epochs: 1.,
        ..settings()
    };
    let faults = |size: usize, skip_nan_steps: u64| {
        let settings = Settings {
            skip_nan_steps,
            ..settings.clone()
        };
        together(size, |processes| {
            let model = with_a_broken_token(id);
            let execution = Execution::fastest(&model);
            let job = job(&execution, &rows);
            let mut told = Vec::new();
            let ending = train_together(&job, &settings, processes, &mut |step| {
                told.extend(step.skipped.as_ref().map(ToString::to_string));
                ControlFlow::Continue(())
            });
            (told, ending.err().map(|error| error.to_string()))
        })
    };
    for skipped in [0, 1] {
        let alone = faults(1, skipped).remove(0);
        assert_eq!(
            (alone.0.len() as u64, alone.1.is_none()),
            (skipped, skipped == 1)
        );
        for of_process in faults(2, skipped) {
            assert_eq!(of_process, alone);
        }
    }
}

#[test]
fn gradients_are_added_in_the_order_of_ranks_and_missing_ones_are_zeros() {
    let parameters: Vec<Tensor> = [3, 2, 1]
        .map(|count| Tensor::zeros(count, DType::F32, &Device::Cpu).unwrap())
        .to_vec();
    // (1e8 + 1) - 1e8 in f32 is 0, and (1e8 - 1e8) + 1 is 1.
    let values = [[1e8f32, 0., 0.25], [1., 0., 0.5], [-1e8, 0., 1.]];
    let sums = together(3, |processes| {
        let rank = processes.rank();
        let own = Tensor::new(&values[rank], &Device::Cpu).unwrap();
        // The second parameter has a gradient in the last process alone, the third one nowhere.
        let second = (rank == 2).then(|| Tensor::new(&[7f32, 8.], &Device::Cpu).unwrap());
        let mut gradients = vec![Some(own), second, None];
        let has: Vec<bool> = gradients.iter().map(Option::is_some).collect();
        let has = exchange(processes, has).unwrap();
        sum_gradients(processes, &parameters, &mut gradients, &has).unwrap();
        let values = gradients.iter().map(|gradient| {
            let gradient = gradient.as_ref()?;
            Some(gradient.to_vec1::<f32>().unwrap())
        });
        values.collect::<Vec<_>>()
    });
    let expected = vec![Some(vec![0., 0., 1.75]), Some(vec![7., 8.]), None];
    assert_eq!(sums, vec![expected; 3]);
}

/// A case of `tests/golden/dealt.json`: the rows of each batch of each process.
#[derive(Deserialize)]
struct Dealt {
    rows: usize,
    batch_size: usize,
    processes: Vec<Vec<Vec<usize>>>,
}

#[test]
fn rows_are_dealt_as_accelerate_deals_them() {
    let cases: Vec<Dealt> = serde_json::from_value(json("dealt.json")).unwrap();
    assert!(cases.len() >= 12);
    for case in cases {
        let size = case.processes.len();
        for accumulation in [1, 2, 3] {
            let grouping = sampler::Grouping {
                rows: case.rows,
                batch_size: case.batch_size,
                accumulation: accumulation * size,
            };
            let ours = together(size, |processes| {
                let mut sampler = Sampler::new(sampler::SamplingStrategy::Sequential, 0, grouping);
                let steps = (0..grouping.steps()).flat_map(|step| {
                    let batches = sampler.group(step).micro_batches;
                    let own = dealt(processes, batches.len());
                    own.map(move |number| batches[number].clone())
                });
                steps.collect::<Vec<_>>()
            });
            assert_eq!(ours, case.processes, "{} rows, {size} processes", case.rows);
        }
    }
}
