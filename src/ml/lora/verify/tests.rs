//! Tests of `verify_merge`.

use std::collections::BTreeMap;
use std::fs;

use candle_core::{DType, Device};

use super::*;
use crate::ml::io::folder::carry;
use crate::ml::io::weights::save;
use crate::ml::lora::merge::merge;
use crate::ml::model::arch::{Arch, Projection};
use crate::ml::model::{CausalLm, Trained};
use crate::ml::testing::golden;

fn prompts() -> Vec<Vec<u32>> {
    vec![vec![1018, 5, 900, 17, 17, 3], vec![1018, 44, 2]]
}

#[expect(clippy::unnecessary_wraps, reason = "the type of a progress callback")]
fn ignore(_: u64, _: u64) -> anyhow::Result<()> {
    Ok(())
}

/// The golden model with its weights in another type.
fn in_dtype(dtype: DType) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let tensors = golden::tensors("model/model.safetensors").into_iter();
    let tensors: BTreeMap<_, _> = tensors
        .map(|(name, tensor)| (name, tensor.to_dtype(dtype).unwrap()))
        .collect();
    save(&folder.path().join("model.safetensors"), &tensors, &[]).unwrap();
    carry(&golden::folder("model"), folder.path(), &[]).unwrap();
    folder
}

/// The golden adapter with its update times `factor`.
fn adapter(factor: f64) -> Adapter {
    let mut adapter = Adapter::load(&golden::folder("adapter_final")).unwrap();
    for pair in adapter.tensors.values_mut() {
        pair.b = (&pair.b * factor).unwrap();
    }
    adapter
}

fn check_merge(base: &Path, adapter: &Adapter) -> MergeCheck {
    let out = tempfile::tempdir().unwrap();
    merge(base, adapter, out.path(), &mut ignore).unwrap();
    let mut told = Vec::new();
    let progress = &mut |done, total| {
        told.push((done, total));
        Ok(())
    };
    let check = verify_merge(base, adapter, out.path(), &prompts(), progress).unwrap();
    assert_eq!(told.first(), Some(&(1, 6)));
    assert_eq!(told.last(), Some(&(6, 6)));
    assert_eq!(check.positions, 9);
    check
}

#[test]
fn layer_by_layer_the_logits_are_those_of_the_whole_model() {
    for base in ["model", "model_nf4"] {
        let golden = golden::folder(base);
        let config = Arch::read(&golden).unwrap();
        let weights = Weights::open(&golden).unwrap();
        let adapter = adapter(1.);
        let (device, nothing) = (Device::Cpu, Trained::Nothing);
        let whole = CausalLm::load(
            &config,
            &weights,
            Some(&adapter),
            nothing,
            DType::F32,
            &device,
        )
        .unwrap();
        let passes = [Pass::BASE, Pass::INFER];
        for ids in prompts() {
            let batch = Batch::new(vec![Sequence::new(ids, 0)], 0).unwrap();
            let ours = logits_by_layer(
                &config,
                &weights,
                Some(&adapter),
                &batch,
                &passes,
                &mut |_| Ok(()),
            );
            for (ours, pass) in ours.unwrap().iter().zip(passes) {
                let whole = golden::logits(&whole, &batch, pass);
                assert_eq!(golden::far(&ours.get(0).unwrap(), &whole).to_bits(), 0);
            }
        }
    }
}

#[test]
fn the_fast_way_and_the_plain_one_tell_the_same() {
    let made = [DType::BF16, DType::F16].map(in_dtype);
    let halves = made.each_ref().map(|folder| folder.path().to_path_buf());
    let bases = [golden::folder("model"), golden::folder("model_nf4")];
    let adapter = adapter(1.);
    for base in bases.iter().chain(&halves) {
        let out = tempfile::tempdir().unwrap();
        merge(base, &adapter, out.path(), &mut ignore).unwrap();
        let open = |folder: &Path| {
            let config = Arch::read(folder).unwrap();
            (config, Weights::open(folder).unwrap())
        };
        let (first, second) = (open(base), open(out.path()));
        let walk = |(arch, weights), adapter| MappedModel {
            arch,
            weights,
            adapter,
        };
        let of_base = walk((&first.0, &first.1), Some(&adapter));
        let of_merged = walk((&second.0, &second.1), None);
        assert!(of_base.is_supported() && of_merged.is_supported());
        let sequences = prompts().into_iter().map(|ids| Sequence::new(ids, 0));
        let batch = Batch::new(sequences.collect(), 0).unwrap();
        let fast = by_kernels(of_base, of_merged, &batch, &mut ignore).unwrap();
        let plain = by_reference(of_base, of_merged, &batch, &mut ignore).unwrap();
        assert_eq!((fast.len(), plain.len()), (9, 9));
        for (fast, plain) in fast.iter().zip(&plain) {
            assert_eq!((fast.count, plain.count), (1024, 1024));
            let size = plain.with.squares.sqrt();
            let near = |ours: &Moments, theirs: &Moments| {
                (ours.spread(1024).sqrt() - theirs.spread(1024).sqrt()).abs() < 1e-5 * size
                    && (ours.sum - theirs.sum).abs() < 1e-4 * size
            };
            assert!(near(&fast.with, &plain.with));
            assert!(near(&fast.apart, &plain.apart));
            assert!(near(&fast.effect, &plain.effect));
            assert!((fast.largest - plain.largest).abs() < 1e-5 * size);
            assert!(plain.effect.spread(1024).sqrt() > 0.01 * size);
        }
    }
}

#[test]
fn what_the_kernels_lack_goes_the_plain_way() {
    let golden = golden::folder("model");
    let config = Arch::read(&golden).unwrap();
    let biased = Arch {
        biases: Projection::MLP.to_vec(),
        ..config.clone()
    };
    let weights = Weights::open(&golden).unwrap();
    let mut dora = adapter(1.);
    dora.config.use_dora = true;
    let possible = |arch, adapter| {
        let weights = &weights;
        MappedModel {
            arch,
            weights,
            adapter,
        }
        .is_supported()
    };
    let plain = adapter(1.);
    assert!(possible(&config, None) && possible(&config, Some(&plain)));
    assert!(possible(&biased, None) && !possible(&config, Some(&dora)));
}

#[test]
fn a_difference_that_is_no_number_is_the_largest() {
    let mut position = Position::default();
    let logits = [(0., 1., 1.5), (0., 2., f32::NAN), (0., 3., 9.)];
    position.add(logits.into_iter().map(|(a, b, c)| ((a, b), c)));
    assert!(position.largest.is_nan() && position.apart.spread(3).is_nan());
    assert!((position.with.spread(3) - 2.).abs() < 1e-12);
}

#[test]
fn a_merged_model_is_as_near_as_its_type_allows() {
    for (dtype, at_most) in [(DType::F32, 5e-6), (DType::F16, 2e-3), (DType::BF16, 2e-2)] {
        let base = in_dtype(dtype);
        let check = check_merge(base.path(), &adapter(1.));
        println!(
            "| merge, {dtype:?} | logits | {:.1e} | {:.1e} | {:.0e} |",
            check.largest, check.relative, check.bound
        );
        // Room is left for models that are deeper.
        assert!(check.relative < at_most, "{dtype:?} {check:?}");
        assert!(check.bound > 2. * at_most);
        assert!(
            check.effect > 0.1 && check.fraction_lost() < 0.1,
            "{check:?}"
        );
    }
    let check = check_merge(&golden::folder("model_nf4"), &adapter(1.));
    assert!(check.relative < 5e-6, "{check:?}");
    // Without an effect there is nothing to lose.
    assert!(check_merge(&golden::folder("model"), &adapter(0.)).fraction_lost() < 1e-12);
    // So small an update is below what bf16 can tell.
    let lost = check_merge(in_dtype(DType::BF16).path(), &adapter(1e-4)).fraction_lost();
    assert!(lost > 0.5, "{lost}");
}

#[test]
fn another_model_is_refused() {
    let base = golden::folder("model");
    let fails = |adapter: &Adapter, change: &dyn Fn(&mut BTreeMap<String, Tensor>)| {
        let out = tempfile::tempdir().unwrap();
        merge(&base, adapter, out.path(), &mut ignore).unwrap();
        let file = out.path().join("model.safetensors");
        let tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
        let mut tensors: BTreeMap<_, _> = tensors.into_iter().collect();
        change(&mut tensors);
        fs::remove_file(&file).unwrap();
        save(&file, &tensors, &[]).unwrap();
        let tuned = self::adapter(1.);
        let check = verify_merge(&base, &tuned, out.path(), &prompts(), &mut ignore);
        let error = check.unwrap_err().to_string();
        assert!(
            error.contains("is not the base with the adapter"),
            "{error}"
        );
    };
    let nothing = |_: &mut BTreeMap<String, Tensor>| ();
    // Half the scale, one module forgotten, one weight altered, one that is no number.
    fails(&adapter(0.5), &nothing);
    let mut lacking = adapter(1.);
    lacking.tensors.remove("model.layers.2.mlp.down_proj");
    fails(&lacking, &nothing);
    for (factor, name) in [
        (1.01, "model.layers.1.self_attn.v_proj.weight"),
        (f64::NAN, "model.layers.0.mlp.up_proj.weight"),
    ] {
        fails(&adapter(1.), &|tensors| {
            let tensor = tensors.get_mut(name).unwrap();
            *tensor = (&*tensor * factor).unwrap();
        });
    }
}
