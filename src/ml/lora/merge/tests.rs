//! Merges against PEFT, and what is refused.

use std::collections::BTreeMap;
use std::fs;

use candle_core::Device;

use super::*;
use crate::ml::io::weights::save;
use crate::ml::model::arch::Arch;
use crate::ml::testing::golden;

#[expect(clippy::unnecessary_wraps, reason = "the type of a progress callback")]
fn ignore(_: u64, _: u64) -> anyhow::Result<()> {
    Ok(())
}

fn final_adapter() -> Adapter {
    Adapter::load(&golden::folder("adapter_final")).unwrap()
}

fn values(weights: &Weights, name: &str) -> Vec<f32> {
    let tensor = weights.tensor(name, &Device::Cpu).unwrap();
    tensor
        .to_dtype(DType::F32)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap()
}

fn far(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .fold(0., |most, (a, b)| most.max((a - b).abs()))
}

#[test]
fn the_merged_model_is_that_of_peft() {
    let out = tempfile::tempdir().unwrap();
    let source = golden::folder("model");
    let mut last = (0, 0);
    let mut progress = |done, total| {
        last = (done, total);
        Ok(())
    };
    let report = merge(&source, &final_adapter(), out.path(), &mut progress).unwrap();
    assert_eq!((report.merged, report.dequantised), (21, 0));
    assert_eq!(last, (1_115_904, 1_115_904));
    let ours = Weights::open(out.path()).unwrap();
    let theirs = Weights::open_file(&golden::folder("merged_model.safetensors")).unwrap();
    assert_eq!(ours.names(), theirs.names());
    let all = ours.names().into_iter();
    let far = all.map(|name| far(&values(&ours, name), &values(&theirs, name)));
    let far = far.fold(0., f32::max);
    println!("\n| llama | merged weights | {far:.1e} | | 1e-6 |");
    assert!(far < 1e-6, "{far}");
    // The header is theirs byte for byte; all other files are the base's.
    let head = |path: &Path| fs::read(path).unwrap()[..3096].to_vec();
    assert!(
        head(&out.path().join("model.safetensors"))
            == head(&golden::folder("merged_model.safetensors"))
    );
    for entry in fs::read_dir(&source).unwrap() {
        let name = entry.unwrap().file_name();
        if name != "model.safetensors" {
            let read = |folder: &Path| fs::read(folder.join(&name)).unwrap();
            assert!(read(&source) == read(out.path()), "{}", name.display());
        }
    }
}

#[test]
fn a_4_bit_base_becomes_dense() {
    let out = tempfile::tempdir().unwrap();
    let source = golden::folder("model_nf4");
    let mut last = (0, 0);
    let mut progress = |done, total| {
        last = (done, total);
        Ok(())
    };
    let report = merge(&source, &final_adapter(), out.path(), &mut progress).unwrap();
    assert_eq!((report.dequantised, report.bytes), (21, 1_115_904));
    assert_eq!(last.0, last.1);
    let ours = Weights::open(out.path()).unwrap();
    let theirs = golden::tensors("nf4_model_outputs.safetensors");
    let theirs = theirs["dequant_merged.layers.0.q_proj.weight"]
        .flatten_all()
        .unwrap();
    let ours_q = values(&ours, "model.layers.0.self_attn.q_proj.weight");
    assert!(far(&ours_q, &theirs.to_vec1().unwrap()) < 1e-6);
    let dense = Weights::open(&golden::folder("model")).unwrap();
    assert_eq!(ours.names(), dense.names());
    let config = Arch::read(out.path()).unwrap();
    assert_eq!(config.quantization, None);
    assert_eq!(config, Arch::read(&golden::folder("model")).unwrap());
}

#[test]
fn rank_stabilised_scaling_is_that_of_peft() {
    let out = tempfile::tempdir().unwrap();
    let mut adapter = Adapter::load(&golden::folder("adapter_init")).unwrap();
    adapter.config.use_rslora = true;
    merge(&golden::folder("model"), &adapter, out.path(), &mut ignore).unwrap();
    let name = "model.layers.0.self_attn.q_proj.weight";
    let ours = values(&Weights::open(out.path()).unwrap(), name);
    let base = values(&Weights::open(&golden::folder("model")).unwrap(), name);
    let delta: Vec<f32> = ours.iter().zip(&base).map(|(a, b)| a - b).collect();
    let theirs = golden::tensors("rslora_delta.safetensors");
    let theirs = theirs["layers.0.self_attn.q_proj.delta"]
        .flatten_all()
        .unwrap();
    assert!(far(&delta, &theirs.to_vec1().unwrap()) < 1e-6);
}

#[test]
fn an_untrained_adapter_changes_no_byte() {
    let out = tempfile::tempdir().unwrap();
    let mut adapter = final_adapter();
    for pair in adapter.tensors.values_mut() {
        pair.b = pair.b.zeros_like().unwrap();
    }
    let source = golden::folder("model");
    merge(&source, &adapter, out.path(), &mut ignore).unwrap();
    let read = |folder: &Path| fs::read(folder.join("model.safetensors")).unwrap();
    assert!(read(&source) == read(out.path()));
}

#[test]
fn what_does_not_fit_is_told() {
    let out = tempfile::tempdir().unwrap();
    let source = golden::folder("model");
    let fails = |adapter: &Adapter| {
        let error = merge(&source, adapter, out.path(), &mut ignore).unwrap_err();
        format!("{error:#}")
    };
    let mut deep = final_adapter();
    let pair = deep.tensors["model.layers.2.mlp.up_proj"].clone();
    deep.tensors
        .insert("model.layers.3.mlp.up_proj".into(), pair.clone());
    assert!(fails(&deep).contains("`model.layers.3.mlp.up_proj`"));
    let mut wide = final_adapter();
    wide.tensors
        .insert("model.layers.2.mlp.down_proj".into(), pair);
    assert!(fails(&wide).contains("another model"));

    let path = "model.layers.0.self_attn.q_proj";
    let mut wild = final_adapter();
    let pair = wild.tensors.get_mut(path).unwrap();
    pair.b = (pair.b.ones_like().unwrap() * f64::from(f32::MAX)).unwrap();
    let error = fails(&wild);
    assert!(
        error.contains("q_proj.weight") && error.contains("the adapter's update leads to"),
        "{error}"
    );
}

#[test]
fn half_precision_is_rounded_once_and_overflow_noticed() {
    let pair = LoraPair {
        a: Tensor::new(&[[1f32, 2.]], &Device::Cpu).unwrap(),
        b: Tensor::new(&[[0.001f32], [3.]], &Device::Cpu).unwrap(),
        magnitude: None,
    };
    let summed = |pair: &LoraPair, float: Float| {
        let update = Update::new(pair, 0.5).unwrap();
        let mut bytes = vec![0; 4 * float.size()];
        let read = |first: usize, _: &[u8], values: &mut [f32]| {
            values.copy_from_slice(&[1f32, 2., 3., 4.][first..first + values.len()]);
        };
        sum(0, &mut bytes, float, Some(&update), None, &read).map(|()| bytes)
    };
    let bytes = summed(&pair, Float::BF16).unwrap();
    let mut read = [0.; 4];
    Float::BF16.read(&bytes, &mut read);
    let exact = [1.0005, 2.001, 4.5, 7.].map(|x| Float::BF16.round(x));
    assert_eq!(read.map(f32::to_bits), exact.map(f32::to_bits));
    let large = LoraPair {
        b: (&pair.b * 1e5).unwrap(),
        ..pair.clone()
    };
    assert!(summed(&large, Float::F32).is_ok());
    let error = summed(&large, Float::F16).unwrap_err().to_string();
    assert!(
        error.contains("value 2 (from 0) becomes 1.50003e5, which float16"),
        "{error}"
    );
}

#[test]
fn a_folder_s_own_adapter_of_another_dtype_is_taken() {
    // PEFT saves adapters of 16-bit models in f32; others may not.
    let folder = tempfile::tempdir().unwrap();
    let out = tempfile::tempdir().unwrap();
    let theirs = golden::folder("adapter_final");
    let tensors = golden::tensors("adapter_final/adapter_model.safetensors");
    let half = tensors
        .into_iter()
        .map(|(name, tensor)| (name, tensor.to_dtype(DType::BF16).unwrap()));
    save(
        &folder.path().join("adapter_model.safetensors"),
        &half.collect::<BTreeMap<_, _>>(),
        &[],
    )
    .unwrap();
    fs::copy(
        theirs.join("adapter_config.json"),
        folder.path().join("adapter_config.json"),
    )
    .unwrap();
    let adapter = Adapter::load(folder.path()).unwrap();
    merge(&golden::folder("model"), &adapter, out.path(), &mut ignore).unwrap();
    let ours = Weights::open(out.path()).unwrap();
    let exact = Weights::open_file(&golden::folder("merged_model.safetensors")).unwrap();
    for name in ours.names() {
        assert!(
            far(&values(&ours, name), &values(&exact, name)) < 1e-2,
            "{name}"
        );
    }
}
