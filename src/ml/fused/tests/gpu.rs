//! The fast path on a GPU beside the reference. Where no GPU is found (Mesa's lavapipe is one that every processor can play) the tests say so
//! and check nothing, unless `PIPELINE_NEEDS_GPU=1` makes that a failure.

use super::families::dress;
use super::*;
use crate::ml::place::{Place, Wanted};

const ORPO: &dyn Loss = &Orpo { beta: 0.1 };

fn on_gpu(
    place: &Place,
    model: &CausalLm,
    packing: Packing,
    objective: &dyn Loss,
    checkpointing: bool,
) -> Result {
    let execution = Execution::placed(model, packing, place, Pass::INFER).unwrap();
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
    let ours = Execution::placed(&model, FREE, &place, Pass::INFER).unwrap();
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
    let execution = Execution::placed(&model, SHARED, &place, Pass::INFER).unwrap();
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
        let execution = Execution::placed(&model, SHARED, &place, Pass::INFER).unwrap();
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
