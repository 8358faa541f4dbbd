//! The fast path on a GPU beside the reference. Where no GPU is found (Mesa's lavapipe is one that every processor can play) the tests say so
//! and check nothing, unless `PIPELINE_NEEDS_GPU=1` makes that a failure.

use super::families::dress;
use super::*;
use crate::ml::backend::Token;
use crate::ml::generate::greedy;
use crate::ml::place::{Place, Wanted};

const ORPO: &dyn Loss = &Orpo { beta: 0.1 };

fn on_gpu(
    place: &Place,
    model: &CausalLm,
    packing: Packing,
    objective: &dyn Loss,
    checkpointing: bool,
) -> Result {
    let execution = Execution::placed(model, packing, place).unwrap();
    assert_eq!(execution.kind(), Kind::Gpu(packing));
    run_dropping(&execution, objective, checkpointing, None)
}

#[test]
fn a_gpu_gives_the_reference_s_losses_and_gradients() {
    let Some(place) = Place::of_tests() else {
        return;
    };
    for (base, adapter, trained) in [
        ("model", true, Trained::Adapter),
        ("model_nf4", true, Trained::Adapter),
        ("model", false, Trained::Everything),
    ] {
        let adapter = adapter.then_some("adapter_init");
        let model = golden::model(base, adapter, trained, DType::F32);
        let plain = run(&model, Kind::Reference, ORPO, false);
        for packing in [PADDED, SHARED] {
            let once = on_gpu(&place, &model, packing, ORPO, false);
            compare(&once, &plain, packing, 2e-5, 2e-5);
            // Twice the same bits, also where a layer is computed again.
            let again = on_gpu(&place, &model, packing, ORPO, true);
            compare(&again, &once, packing, 0., 1e-30);
        }
    }
}

#[test]
fn a_gpu_computes_biases_norms_of_heads_and_windows() {
    let Some(place) = Place::of_tests() else {
        return;
    };
    for (trained, window) in [(Trained::Adapter, 9), (Trained::Everything, 33)] {
        let adapter = (trained == Trained::Adapter).then_some("adapter_init");
        let mut model = golden::model("model", adapter, trained, DType::F32);
        dress(&mut model, window, trained == Trained::Everything);
        let sft: &dyn Loss = &Sft {
            completion_only: false,
        };
        let plain = run(&model, Kind::Reference, sft, false);
        for packing in [PADDED, SHARED] {
            let ours = on_gpu(&place, &model, packing, sft, false);
            compare(&ours, &plain, packing, 2e-5, 3e-5);
        }
    }
}

#[test]
fn a_gpu_drops_the_same_values() {
    let Some(place) = Place::of_tests() else {
        return;
    };
    let model = golden::dropping(0.3, Trained::Adapter);
    let plain = Execution::new(&model, Kind::Reference);
    let plain = run_dropping(&plain, ORPO, false, Some(7));
    let ours = Execution::placed(&model, FREE, &place).unwrap();
    let ours = run_dropping(&ours, ORPO, false, Some(7));
    compare(&ours, &plain, FREE, 2e-5, 2e-5);
}

#[test]
fn in_bf16_a_gpu_is_as_near_as_the_reference() {
    let Some(place) = Place::of_tests() else {
        return;
    };
    for base in ["model", "model_nf4"] {
        let model = golden::model(base, Some("adapter_init"), Trained::Adapter, DType::BF16);
        let plain = run(&model, Kind::Reference, ORPO, false);
        let ours = on_gpu(&place, &model, SHARED, ORPO, false);
        compare(&ours, &plain, SHARED, 2e-3, 3e-2);
    }
}

#[test]
fn a_gpu_sees_trained_weights_change() {
    let Some(place) = Place::of_tests() else {
        return;
    };
    let model = golden::model("model", Some("adapter_init"), Trained::Adapter, DType::F32);
    let execution = Execution::placed(&model, SHARED, &place).unwrap();
    let before = run_dropping(&execution, ORPO, false, None);
    for parameter in &model.parameters {
        let moved = (parameter.var.as_tensor() + 0.01).unwrap();
        parameter.var.set(&moved).unwrap();
    }
    let after = run_dropping(&execution, ORPO, false, None);
    assert!((before.evaluated - after.evaluated).abs() > 1e-4);
    let plain = run(&model, Kind::Reference, ORPO, false);
    compare(&after, &plain, SHARED, 2e-5, 2e-5);
}

#[test]
fn a_gpu_that_is_not_there_is_an_error() {
    let why = Place::open(Wanted::Gpu(1000)).unwrap_err();
    assert!(why.contains("there is no GPU number 1000"), "{why}");
}

#[test]
fn memory_that_runs_out_on_a_gpu_is_an_error() {
    if Place::of_tests().is_none() {
        return;
    }
    let model = golden::model("model", Some("adapter_init"), Trained::Adapter, DType::F32);
    let rows = rows("trl-1.16");
    let batch = ORPO.batch(&[&rows[2], &rows[7]], 1023).unwrap();
    let evaluate = |limit: u64| {
        let place = Place::of_tests().unwrap();
        place.gpu.as_ref().unwrap().limit_memory(limit);
        let execution = Execution::placed(&model, SHARED, &place).unwrap();
        let outcome = losses::evaluate(ORPO, &execution, &batch);
        (outcome.map(|outcome| outcome.loss), place.work().unwrap())
    };
    let (loss, work) = evaluate(u64::MAX);
    assert!(loss.unwrap().is_finite() && work.launches > 10);
    for part in [0, 1, 3, 7] {
        let (loss, _) = evaluate(work.peak_bytes / 8 * part);
        let why = loss.unwrap_err().to_string();
        assert!(why.contains("the GPU has no memory left"), "{why}");
    }
}

#[test]
fn a_gpu_scales_the_rows_of_a_dora() {
    let Some(place) = Place::of_tests() else {
        return;
    };
    for (base, compute, bounds) in [
        ("model", DType::F32, [2e-5, 3e-5]),
        ("model_nf4", DType::F32, [2e-5, 3e-5]),
        ("model", DType::BF16, [2e-3, 5e-2]),
    ] {
        let model = super::dora::model(base, 0., Trained::Adapter, compute);
        let plain = run(&model, Kind::Reference, ORPO, false);
        let once = on_gpu(&place, &model, SHARED, ORPO, false);
        compare(&once, &plain, SHARED, bounds[0], bounds[1]);
        let again = on_gpu(&place, &model, SHARED, ORPO, true);
        compare(&again, &once, SHARED, 0., 1e-30);
    }
    let model = super::dora::model("model", 0.3, Trained::Adapter, DType::F32);
    let plain = Execution::new(&model, Kind::Reference);
    let plain = run_dropping(&plain, ORPO, false, Some(7));
    let ours = Execution::placed(&model, FREE, &place).unwrap();
    let ours = run_dropping(&ours, ORPO, false, Some(7));
    compare(&ours, &plain, FREE, 2e-5, 3e-5);
}

/// What the host gave up is nowhere but on the GPU, and the numbers are the same bits.
#[test]
fn frozen_weights_are_on_a_gpu_alone() {
    let Some(place) = Place::of_tests() else {
        return;
    };
    for base in ["model", "model_nf4"] {
        let mut model = golden::model(base, Some("adapter_init"), Trained::Adapter, DType::F32);
        let before = on_gpu(&place, &model, SHARED, ORPO, false);
        Execution::move_weights(&mut model, &place).unwrap();
        let in_memory = |model: &CausalLm| {
            let dense = |weight: &crate::ml::model::linear::Weight| {
                let view = TensorView::weight(weight, Pass::BASE).unwrap();
                usize::from(view.values().is_ok())
            };
            let linears = model.layers.iter().flat_map(model::Layer::linears);
            let linears = linears.map(|linear| match &linear.base {
                crate::ml::model::linear::Base::Dense(weight) => dense(weight),
                crate::ml::model::linear::Base::Nf4(nf4) => {
                    usize::from(!nf4.packed.is_empty() || !nf4.absmax.is_empty())
                }
            });
            dense(&model.embed) + dense(model.head()) + linears.sum::<usize>()
        };
        assert_eq!(in_memory(&model), 0);
        let after = on_gpu(&place, &model, SHARED, ORPO, false);
        compare(&after, &before, SHARED, 0., 1e-30);
        // Passes that need none of them for long leave them where they are.
        let gpu = crate::ml::gpu::Gpu::new(place.gpu.clone().unwrap(), &model);
        (0..40).for_each(|_| gpu.begin(&model, 1));
        let again = on_gpu(&place, &model, SHARED, ORPO, false);
        compare(&again, &before, SHARED, 0., 1e-30);
    }
}

#[test]
fn a_gpu_continues_texts_as_the_reference_does() {
    let Some(place) = Place::of_tests() else {
        return;
    };
    let mut dressed = golden::model("model", Some("adapter_init"), Trained::Nothing, DType::F32);
    dress(&mut dressed, 3, false);
    let of = |base, compute| golden::model(base, Some("adapter_final"), Trained::Nothing, compute);
    for (mut model, within) in [
        (of("model", DType::F32), 1e-4),
        (of("model_nf4", DType::F32), 1e-4),
        (of("model", DType::BF16), 3e-2),
        (dressed, 1e-4),
        (
            super::dora::model("model", 0., Trained::Nothing, DType::F32),
            1e-4,
        ),
    ] {
        for pass in [Pass::BASE, Pass::INFER] {
            let execution = Execution::placed(&model, SHARED, &place).unwrap();
            let mut decoder = execution.decoder(3, 6, pass).unwrap();
            assert!(decoder.at_once() > 32, "it is the GPU's own");
            let once = super::decode::continues(&mut *decoder, &model, pass, within);
            // What is forgotten and read again, all at once, has the same bits.
            decoder.truncate(0, 2).unwrap();
            let ids = super::decode::SEQUENCES[0];
            let tokens = ids[2..].iter().map(|&id| Token { sequence: 0, id });
            let again = decoder.step(&tokens.collect::<Vec<_>>(), &[3]).unwrap();
            assert!(again == once[0]);
            assert!(decoder.truncate(0, 7).is_err());
        }
        // So they do where the host has no weights left.
        let answer = |model: &CausalLm| {
            let execution = Execution::placed(model, SHARED, &place).unwrap();
            let prompt: &[u32] = &[5, 90, 7];
            greedy(&execution, &[prompt], 12, &[], Pass::INFER, &mut || Ok(())).unwrap()
        };
        let before = answer(&model);
        Execution::move_weights(&mut model, &place).unwrap();
        assert_eq!(answer(&model), before);
    }
}

/// Prompts of unlike lengths, which outgrow the room that is made at first, beside each other and alone.
#[test]
fn a_gpu_answers_as_the_processor_does() {
    let Some(place) = Place::of_tests() else {
        return;
    };
    let model = golden::model("model", Some("adapter_final"), Trained::Nothing, DType::F32);
    let long: Vec<u32> = (0..70).map(|at| at * 37 % 1000).collect();
    let prompts: [&[u32]; 3] = [&long, &[5, 90, 7], &long[3..40]];
    let answers = |execution: &Execution<'_>, prompts: &[&[u32]]| {
        greedy(execution, prompts, 66, &[], Pass::INFER, &mut || Ok(())).unwrap()
    };
    let plain = answers(&Execution::new(&model, Kind::default()), &prompts);
    let ours = Execution::placed(&model, SHARED, &place).unwrap();
    assert_eq!(answers(&ours, &prompts), plain);
    assert_eq!(answers(&ours, &prompts[2..])[0], plain[2]);
}

#[test]
fn memory_that_runs_out_in_an_answer_is_an_error() {
    if Place::of_tests().is_none() {
        return;
    }
    let model = golden::model("model", None, Trained::Nothing, DType::F32);
    let answer = |allowed: u64| {
        let place = Place::of_tests().unwrap();
        let device = place.gpu.as_ref().unwrap();
        device.limit_allocations(allowed);
        let execution = Execution::placed(&model, SHARED, &place).unwrap();
        let prompt: &[u32] = &[5, 90, 7];
        let answer = greedy(&execution, &[prompt], 3, &[], Pass::BASE, &mut || Ok(()));
        (answer, device.counts().allocations)
    };
    let (answered, all) = answer(u64::MAX);
    answered.unwrap();
    for allowed in (0..all).step_by(all.div_ceil(25) as usize) {
        let why = format!("{:#}", answer(allowed).0.unwrap_err());
        assert!(why.contains("the GPU has no memory left"), "{why}");
    }
}
