//! Trainings on a GPU: what crosses to it and back, where they go on, and what happens when memory runs out.

use std::ops::ControlFlow;
use std::path::Path;

use candle_core::DType;

use super::golden::{far, folder, model, rows};
use super::golden_runs::{bits, job, settings};
use crate::ml::adapter::Adapter;
use crate::ml::execution::{Execution, Kind};
use crate::ml::fused::Packing;
use crate::ml::io::weights::Weights;
use crate::ml::loss::Loss;
use crate::ml::loss::orpo::Orpo;
use crate::ml::loss::sft::Sft;
use crate::ml::model::arch::Arch;
use crate::ml::model::{CausalLm, Parameter, Trained};
use crate::ml::place::{Place, Wanted, Work};
use crate::ml::train::estimate::{Planned, Unloaded};
use crate::ml::train::optim::{self, LoraPlus};
use crate::ml::train::{Ending, Job, Settings, newest_checkpoint, train};

const ORPO: &dyn Loss = &Orpo { beta: 0.1 };
const SFT: &dyn Loss = &Sft {
    completion_only: true,
};

fn fresh(trained: Trained) -> CausalLm {
    let adapter = (trained == Trained::Adapter).then_some("adapter_init");
    model("model", adapter, trained, DType::F32)
}

/// Trains with checkpoints in `scratch`, and stops after step `until`. Returns the losses of its steps.
fn train_until(
    execution: &Execution<'_>,
    loss: &dyn Loss,
    settings: &Settings,
    scratch: Option<&Path>,
    until: Option<u64>,
) -> anyhow::Result<Vec<f64>> {
    let rows = rows("trl-1.16");
    let job = Job {
        loss,
        scratch,
        ..job(execution, &rows)
    };
    let mut losses = Vec::new();
    train(&job, settings, &mut |step| {
        losses.extend(step.logs.iter().map(|log| log.values["loss"]));
        if step.micro_batches == 0 && Some(step.step) == until {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    })?;
    Ok(losses)
}

/// What a GPU did in each of six steps of a training whose steps are alike, and the bytes of the trained tensors.
fn work_of_steps(trained: Trained, loss: &dyn Loss) -> (Vec<Work>, u64) {
    // Memory is reserved for all that an opened GPU does, so that other tests would be counted too.
    let place = Place::open(Wanted::Gpu(0)).unwrap();
    let model = fresh(trained);
    let execution = Execution::placed(&model, Packing::default(), &place).unwrap();
    let row = rows("trl-1.16").swap_remove(2);
    let all = vec![row; 8];
    let settings = Settings {
        max_steps: Some(6),
        ..settings()
    };
    let (mut work, mut before) = (Vec::new(), None);
    let job = Job {
        loss,
        ..job(&execution, &all)
    };
    let ending = train(&job, &settings, &mut |step| {
        if step.micro_batches == 0 {
            let now = place.work().unwrap();
            work.extend(before.replace(now).map(|before| now.since(before)));
        }
        ControlFlow::Continue(())
    });
    assert!(matches!(ending.unwrap(), Ending::Finished { .. }));
    let trained = model.parameters.iter().map(|p| p.var.elem_count());
    (work, (trained.sum::<usize>() * size_of::<f32>()) as u64)
}

#[test]
fn nothing_but_ids_and_a_few_numbers_crosses_to_a_gpu() {
    if Place::of_tests().is_none() {
        return;
    }
    for (trained, loss) in [
        (Trained::Adapter, ORPO),
        (Trained::Adapter, SFT),
        (Trained::Everything, ORPO),
    ] {
        let (work, trained_bytes) = work_of_steps(trained, loss);
        assert_eq!(work.len(), 6);
        // In the first step weights are copied, and memory is reserved.
        let last = work[5];
        println!("{trained:?}, {trained_bytes} bytes of trained tensors, a step: {last:?}");
        for each in &work[2..] {
            let same = Work {
                peak_bytes: each.peak_bytes,
                ..last
            };
            assert_eq!(*each, same, "the steps are alike, and none reserves memory");
        }
        let copied = last.uploaded_bytes + last.downloaded_bytes;
        assert!(last.launches > 50 && copied < 60_000, "{last:?}");
        assert!(copied < trained_bytes / 2, "{copied} of {trained_bytes}");
    }
}

/// What is told before a training is what the GPU holds at most.
#[test]
fn a_gpu_holds_what_is_estimated() {
    let rows = rows("trl-1.16");
    let arch = Arch::read(&folder("model")).unwrap();
    let weights = Weights::open(&folder("model")).unwrap();
    let adapter = Adapter::load(&folder("adapter_init")).unwrap();
    let trained = Trained::Adapter;
    for checkpointing in [false, true] {
        let Some(place) = Place::of_tests() else {
            return;
        };
        let settings = Settings {
            max_steps: Some(2),
            checkpointing,
            ..settings()
        };
        let model = fresh(trained);
        let execution = Execution::placed(&model, Packing::default(), &place).unwrap();
        train_until(&execution, ORPO, &settings, None, None).unwrap();
        let held = place.work().unwrap().peak_bytes;
        let planned = Planned {
            model: Unloaded {
                arch: &arch,
                weights: &weights,
                adapter: Some(&adapter),
                trained,
                compute: DType::F32,
            },
            reference: None,
            base_is_reference: false,
            packing: Packing::default(),
            loss: ORPO,
            settings: &settings,
            rows: &rows,
            eval_rows: &[],
            pad: 1023,
        };
        let told = planned.estimate(0).unwrap().on_device;
        let all: u64 = told.values().sum();
        let ratio = all as f64 / held as f64;
        assert!((0.9..1.3).contains(&ratio), "{ratio} of {held}: {told:?}");
    }
}

/// Rates of their own for some tensors, several weight decays, and clipping in every step.
#[test]
fn a_step_on_a_gpu_is_that_of_the_processor() {
    let settings = Settings {
        max_steps: Some(3),
        max_grad_norm: 0.1,
        optimizer: optim::Settings {
            weight_decay: 0.1,
            lora_plus: Some(LoraPlus {
                ratio: 4.,
                embedding: 1.,
            }),
            ..settings().optimizer
        },
        ..settings()
    };
    for trained in [Trained::Adapter, Trained::Everything] {
        let after = [Kind::Gpu(Packing::default()), Kind::default()].map(|kind| {
            let model = fresh(trained);
            let execution = Execution::new(&model, kind);
            train_until(&execution, ORPO, &settings, None, None).unwrap();
            drop(execution);
            model
        });
        if Place::of_tests().is_none() {
            return;
        }
        let [ours, theirs] = &after;
        let before = fresh(trained);
        for ((ours, theirs), before) in
            (ours.parameters.iter().zip(&theirs.parameters)).zip(&before.parameters)
        {
            let of = |p: &Parameter| p.var.as_detached_tensor();
            let moved = far(&of(theirs), &of(before));
            let apart = far(&of(ours), &of(theirs));
            assert!(apart < 1e-2 * moved, "{}: {apart} of {moved}", ours.name);
        }
    }
}

#[test]
fn a_training_on_a_gpu_gives_the_same_bits_twice() {
    if Place::of_tests().is_none() {
        return;
    }
    let settings = Settings {
        epochs: 1.,
        ..settings()
    };
    let once = || {
        let model = fresh(Trained::Adapter);
        let execution = Execution::new(&model, Kind::Gpu(Packing::default()));
        let losses = train_until(&execution, ORPO, &settings, None, None).unwrap();
        (
            losses.into_iter().map(f64::to_bits).collect::<Vec<_>>(),
            bits(&model),
        )
    };
    assert!(once() == once());
}

/// Stopped on one device and gone on with on the other, either way.
#[test]
fn a_training_goes_on_from_a_gpu_on_the_processor_and_back() {
    if Place::of_tests().is_none() {
        return;
    }
    let settings = Settings {
        max_steps: Some(4),
        ..settings()
    };
    let (cpu, gpu) = (Kind::default(), Kind::Gpu(Packing::default()));
    for (trained, loss) in [(Trained::Adapter, ORPO), (Trained::Everything, SFT)] {
        let whole = fresh(trained);
        let execution = Execution::new(&whole, cpu);
        let expected = train_until(&execution, loss, &settings, None, None).unwrap();
        for [first, second] in [[gpu, cpu], [cpu, gpu]] {
            let scratch = tempfile::tempdir().unwrap();
            let mut losses = Vec::new();
            for (kind, until) in [(first, Some(2)), (second, None)] {
                let model = fresh(trained);
                let execution = Execution::new(&model, kind);
                let scratch = Some(scratch.path());
                losses.extend(train_until(&execution, loss, &settings, scratch, until).unwrap());
                if until.is_none() {
                    for (ours, theirs) in model.parameters.iter().zip(&whole.parameters) {
                        let [a, b] = [ours, theirs].map(|p| p.var.as_detached_tensor());
                        let far = far(&a, &b);
                        assert!(far < 2e-4, "{}: {far}", ours.name);
                    }
                }
            }
            assert_eq!(losses.len(), expected.len());
            for (ours, theirs) in losses.iter().zip(&expected) {
                assert!((ours - theirs).abs() < 2e-5 * theirs, "{ours} {theirs}");
            }
        }
    }
}

/// Of all allocations of a training one after the other fails. The training ends with an error that says so, its last checkpoint is whole, and
/// from there it goes on to the bits of one that nothing stopped.
#[test]
fn memory_that_runs_out_leaves_a_whole_checkpoint() {
    let Some(place) = Place::of_tests() else {
        return;
    };
    let settings = Settings {
        max_steps: Some(3),
        save_every: 1,
        ..settings()
    };
    let run = |place: &Place, scratch: &Path| {
        let model = fresh(Trained::Adapter);
        let execution = Execution::placed(&model, Packing::default(), place).unwrap();
        let losses = train_until(&execution, ORPO, &settings, Some(scratch), None)?;
        anyhow::Ok((losses, bits(&model)))
    };
    let scratch = tempfile::tempdir().unwrap();
    let (_, expected) = run(&place, scratch.path()).unwrap();
    let all = place.gpu.as_ref().unwrap().counts().allocations;
    let mut checkpoints = [0; 3];
    for part in 0..12 {
        let scratch = tempfile::tempdir().unwrap();
        let place = Place::of_tests().unwrap();
        // The first ones, and then some of all steps.
        let allowed = part * part * all / 125;
        place.gpu.as_ref().unwrap().limit_allocations(allowed);
        let why = format!("{:#}", run(&place, scratch.path()).unwrap_err());
        assert!(why.contains("the GPU has no memory left"), "{why}");
        checkpoints[newest_checkpoint(scratch.path()).unwrap_or(0) as usize] += 1;
        let (_, ours) = run(&Place::of_tests().unwrap(), scratch.path()).unwrap();
        assert!(ours == expected, "after {allowed} of {all} allocations");
    }
    assert!(
        checkpoints.iter().all(|count| *count > 0),
        "{checkpoints:?}"
    );
}
