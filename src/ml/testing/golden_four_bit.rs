//! 4-bit folders in the layouts of bitsandbytes that `quantize` doesn't make: codes in tensors of another type, a head in 4 bits,
//! projections left dense. Each against transformers, bitsandbytes and PEFT.

use std::path::Path;

use candle_core::{DType, Device};

use super::golden::{far, folder, logits, tensors};
use crate::ml::adapter::{Adapter, Names, NewAdapter};
use crate::ml::execution::{Execution, Kind};
use crate::ml::generate::greedy;
use crate::ml::io::weights::Weights;
use crate::ml::lora::attach::{Beginning, attach};
use crate::ml::lora::merge::merge;
use crate::ml::lora::verify::verify_merge;
use crate::ml::loss::Loss;
use crate::ml::loss::sft::Sft;
use crate::ml::model::arch::Arch;
use crate::ml::model::batch::{Batch, Sequence};
use crate::ml::model::linear::Pass;
use crate::ml::model::tensors::HEAD;
use crate::ml::model::{CausalLm, Gradients, Trained, logits_by_layer};
use crate::ml::quant::nf4::Nf4;
use crate::ml::testing::losses;

const CASES: [&str; 2] = ["four_bit/bf16_head", "four_bit/f32_skip"];
const OUTPUTS: &str = "four_bit/outputs.safetensors";

fn ids() -> Vec<u32> {
    let ids = &tensors(OUTPUTS)["input_ids"];
    ids.to_dtype(DType::U32).unwrap().to_vec1().unwrap()
}

fn batch() -> Batch {
    Batch::new(vec![Sequence::new(ids(), 1)], 0).unwrap()
}

fn load(base: &Path, adapter: Option<&Adapter>, trained: Trained) -> anyhow::Result<CausalLm> {
    let config = Arch::read(base)?;
    let (weights, device) = (Weights::open(base)?, Device::Cpu);
    CausalLm::load(&config, &weights, adapter, trained, DType::F32, &device)
}

fn adapter() -> Adapter {
    Adapter::load(&folder("four_bit/adapter")).unwrap()
}

#[test]
fn logits_are_those_of_bitsandbytes_and_peft() {
    let theirs = tensors(OUTPUTS);
    for case in CASES {
        let (base, adapter) = (folder(case), adapter());
        let name = case.trim_start_matches("four_bit/");
        let theirs = |what: &str| &theirs[&format!("{name}.{what}")];
        let model = load(&base, Some(&adapter), Trained::Nothing).unwrap();
        assert!(
            matches!(Execution::fastest(&model).kind(), Kind::Fused(_)),
            "the fast path is possible"
        );
        for (pass, what) in [(Pass::BASE, "logits"), (Pass::INFER, "adapter")] {
            let ours = logits(&model, &batch(), pass);
            assert!(far(&ours, theirs(what)) < 1e-4, "{case} {what}");
            // And with a layer in memory at a time.
            let (config, weights) = (Arch::read(&base).unwrap(), Weights::open(&base).unwrap());
            let by_layer = logits_by_layer(
                &config,
                &weights,
                Some(&adapter),
                &batch(),
                &[pass],
                &mut |_| Ok(()),
            );
            let by_layer = by_layer.unwrap().remove(0).squeeze(0).unwrap();
            assert!(
                far(&by_layer, theirs(what)) < 1e-4,
                "{case} {what} by layer"
            );
        }
        // Generation reads weights in its own way.
        let prompt = ids();
        let made = greedy(
            &Execution::fastest(&model),
            &[&prompt],
            1,
            &[],
            Pass::BASE,
            &mut || Ok(()),
        )
        .unwrap();
        let last = theirs("logits").get(prompt.len() - 1).unwrap();
        let best = last.argmax(0).unwrap().to_scalar::<u32>().unwrap();
        assert_eq!(made, [[best]], "{case}");
    }
}

#[test]
fn merging_makes_every_weight_dense() {
    let theirs = tensors(OUTPUTS);
    for case in CASES {
        let (base, adapter, out) = (folder(case), adapter(), tempfile::tempdir().unwrap());
        let name = case.trim_start_matches("four_bit/");
        let report = merge(&base, &adapter, out.path(), &mut |_, _| Ok(())).unwrap();
        let head = usize::from(name == "bf16_head");
        let skipped = if head == 1 { 0 } else { 2 + 4 };
        assert_eq!(report.dequantised, 14 + head - skipped, "{case}");
        let weights = Weights::open(out.path()).unwrap();
        assert_eq!(weights.names().len(), 21, "{:?}", weights.names());
        let model = load(out.path(), None, Trained::Nothing).unwrap();
        let ours = logits(&model, &batch(), Pass::BASE);
        assert!(
            far(&ours, &theirs[&format!("{name}.merged")]) < 1e-4,
            "{case}"
        );
        let check =
            verify_merge(&base, &adapter, out.path(), &[ids()], &mut |_, _| Ok(())).unwrap();
        assert!(
            check.relative < 1e-5 && check.effect > 0.1,
            "{case} {check:?}"
        );
    }
}

#[test]
fn adapters_are_begun_and_trained_beside_them() {
    for case in CASES {
        let base = folder(case);
        let (config, weights) = (Arch::read(&base).unwrap(), Weights::open(&base).unwrap());
        let new = NewAdapter {
            r: 2,
            target_modules: Names::List(["q_proj", "down_proj"].map(str::to_owned).to_vec()),
            use_dora: true,
            ..NewAdapter::default()
        };
        let dora = attach(&config, &weights, &new, 1, Beginning::Drawn, &mut |_, _| {
            Ok(())
        })
        .unwrap();
        assert_eq!(dora.tensors.len(), 4);
        for adapter in [&dora, &adapter()] {
            let model = load(&base, Some(adapter), Trained::Adapter).unwrap();
            let mut gradients = Gradients::none(&model);
            let objective: &dyn Loss = &Sft {
                completion_only: false,
            };
            let outcome = losses::differentiate(
                objective,
                &Execution::fastest(&model),
                &[(&batch(), 1.)],
                None,
                false,
                &mut gradients,
            );
            assert!(outcome.unwrap()[0].loss.is_finite());
            assert!(gradients.0.iter().all(Option::is_some), "{case}");
        }
    }
}

#[test]
fn a_head_in_4_bits_is_neither_trained_nor_replaced() {
    let base = folder("four_bit/bf16_head");
    let (config, weights) = (Arch::read(&base).unwrap(), Weights::open(&base).unwrap());
    assert!(Nf4::stored_shape(&weights, HEAD).unwrap().is_some());
    let error = load(&base, None, Trained::Everything);
    let error = error.err().unwrap();
    let error = format!("{error:#}");
    assert!(
        error.contains("in 4 bits") && error.contains("adapter"),
        "{error}"
    );
    let mut replaced = adapter();
    let head = Nf4::load(&weights, HEAD).unwrap().unwrap();
    let head = head.to_tensor(DType::F32, &Device::Cpu).unwrap();
    replaced.saved.insert(HEAD.into(), head);
    let error = load(&base, Some(&replaced), Trained::Nothing);
    let error = error.err().unwrap();
    let error = format!("{error:#}");
    assert!(error.contains("`lm_head.weight` whole"), "{error}");
    let new = NewAdapter {
        target_modules: Names::List(vec!["q_proj".into()]),
        modules_to_save: vec!["lm_head".into()],
        ..NewAdapter::default()
    };
    let error = attach(&config, &weights, &new, 1, Beginning::Drawn, &mut |_, _| {
        Ok(())
    })
    .unwrap_err();
    assert!(error.to_string().contains("`lm_head.weight`"), "{error}");
}
