//! `DoRA` beside the reference.

use super::*;
use crate::ml::adapter::Adapter;
use crate::ml::model::linear::row_norms;

const ORPO: &dyn Loss = &Orpo { beta: 0.1 };

/// A new `DoRA` for all projections, whose matrices are random and whose magnitudes are not the rows' norms.
pub(in crate::ml::fused) fn adapter(dropout: f64) -> Adapter {
    let folder = golden::folder("model");
    let (arch, weights) = (
        Arch::read(&folder).unwrap(),
        Weights::open(&folder).unwrap(),
    );
    let new = NewAdapter {
        r: 5,
        lora_dropout: dropout,
        init_lora_weights: false,
        target_modules: Names::Pattern(".*_proj".into()),
        ..NewAdapter::default()
    };
    let mut adapter = init::adapter(&arch, &new, 5).unwrap();
    adapter.config.use_dora = true;
    for (path, pair) in &mut adapter.tensors {
        let name = format!("{path}.weight");
        let base = weights.tensor(&name, &candle_core::Device::Cpu).unwrap();
        let base = base.to_dtype(DType::F32).unwrap();
        let norms = row_norms(&base, &pair.a, &pair.b, 0.3).unwrap();
        let waves = (0..norms.elem_count()).map(|row| 1. + 0.3 * (row as f32).sin());
        let waves = Tensor::from_iter(waves, norms.device()).unwrap();
        pair.magnitude = Some((norms * waves).unwrap());
    }
    adapter
}

pub(in crate::ml::fused) fn model(
    base: &str,
    dropout: f64,
    trained: Trained,
    compute: DType,
) -> CausalLm {
    let folder = golden::folder(base);
    let (arch, weights) = (
        Arch::read(&folder).unwrap(),
        Weights::open(&folder).unwrap(),
    );
    let (adapter, device) = (adapter(dropout), candle_core::Device::Cpu);
    CausalLm::load(&arch, &weights, Some(&adapter), trained, compute, &device).unwrap()
}

#[test]
fn rows_are_scaled_and_magnitudes_learn_the_same_way() {
    for base in ["model", "model_nf4"] {
        let model = model(base, 0., Trained::Adapter, DType::F32);
        let pairs = 3 * 7 * model.layers.len();
        assert_eq!(model.parameters.len(), pairs, "A, B and magnitudes");
        let plain = run(&model, Kind::Reference, ORPO, false);
        for packing in [PADDED, SHARED] {
            let once = run(&model, Kind::Fused(packing), ORPO, false);
            compare(&once, &plain, packing, 1e-5, 2e-5);
            let again = run(&model, Kind::Fused(packing), ORPO, true);
            compare(&again, &once, packing, 0., 1e-30);
        }
    }
}

/// What is dropped goes through the weight alone, and the rest is scaled.
#[test]
fn dropout_is_before_the_scaling() {
    let model = model("model", 0.3, Trained::Adapter, DType::F32);
    let learn = |kind, checkpointing, seed| {
        let execution = Execution::new(&model, kind);
        run_dropping(&execution, ORPO, checkpointing, Some(seed))
    };
    let plain = learn(Kind::Reference, false, 7);
    for packing in [PADDED, FREE] {
        let once = learn(Kind::Fused(packing), false, 7);
        compare(&once, &plain, packing, 1e-5, 2e-5);
        let again = learn(Kind::Fused(packing), true, 7);
        compare(&again, &once, packing, 0., 1e-30);
    }
    let other = learn(Kind::Fused(FREE), false, 8);
    for (other, plain) in other.outcomes.iter().zip(&plain.outcomes) {
        assert!((other.loss - plain.loss).abs() > 1e-5);
    }
}

#[test]
fn in_bf16_it_is_as_near_as_the_reference() {
    let model = model("model", 0., Trained::Adapter, DType::BF16);
    let plain = run(&model, Kind::Reference, ORPO, false);
    let ours = run(&model, Kind::Fused(SHARED), ORPO, false);
    // The reference rounds results too, ours the factors alone.
    compare(&ours, &plain, SHARED, 2e-3, 5e-2);
    let exact = self::model("model", 0., Trained::Adapter, DType::F32);
    let exact = run(&exact, Kind::Reference, ORPO, false);
    compare(&ours, &exact, SHARED, 2e-3, 5e-2);
}
