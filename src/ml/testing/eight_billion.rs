//! What a training of a Llama 3 8B takes of a GPU's memory, found from the headers of its files: the figures of docs/gpu.md.
//!
//! `cargo test --lib eight_billion -- --nocapture | grep '|'` prints them by part.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;

use candle_core::{DType, Device, Tensor};
use serde_json::json;

use crate::ml::adapter::{Adapter, AdapterConfig, LoraPair, Names, NewAdapter};
use crate::ml::fused::Packing;
use crate::ml::io::weights::{SINGLE, Weights};
use crate::ml::lora::init;
use crate::ml::loss::Loss;
use crate::ml::loss::orpo::Orpo;
use crate::ml::loss::sft::Sft;
use crate::ml::model::Trained;
use crate::ml::model::arch::Arch;
use crate::ml::model::batch::Row;
use crate::ml::model::tensors::{Role, projection_path, tensors};
use crate::ml::train::Settings;
use crate::ml::train::estimate::{Planned, Unloaded};

/// A folder whose file has the model's headers, and holes in the place of weights.
fn folder(in_4_bits: bool) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let config = json!({
        "model_type": "llama", "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0, "hidden_act": "silu", "tie_word_embeddings": false, "torch_dtype": "bfloat16",
    });
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let arch = Arch::read(folder.path()).unwrap();
    let mut header = serde_json::Map::new();
    let mut written = Vec::new();
    let mut end = 0;
    let mut add = |name: String, dtype: &str, shape: &[usize], bytes: usize| {
        let entry = json!({ "dtype": dtype, "shape": shape, "data_offsets": [end, end + bytes] });
        header.insert(name, entry);
        end += bytes;
    };
    // What is read of a weight in 4 bits is what describes it; these come first.
    for tensor in tensors(&arch) {
        if in_4_bits && matches!(tensor.role, Role::Projection(_)) {
            let state = json!({ "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": tensor.shape });
            let state = state.to_string();
            let name = format!("{}.quant_state.bitsandbytes__nf4", tensor.name);
            add(name, "U8", &[state.len()], state.len());
            written.extend(state.into_bytes());
        }
    }
    for tensor in tensors(&arch) {
        let count: usize = tensor.shape.iter().product();
        if in_4_bits && matches!(tensor.role, Role::Projection(_)) {
            add(tensor.name, "U8", &[count / 2, 1], count / 2);
        } else {
            add(tensor.name, "BF16", &tensor.shape, 2 * count);
        }
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut file = File::create(folder.path().join(SINGLE)).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes())
        .unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.write_all(&written).unwrap();
    file.set_len((8 + header.len() + end) as u64).unwrap();
    folder
}

/// A pair of this rank for each projection, of zeros.
fn adapter(arch: &Arch, r: usize) -> Adapter {
    let new = NewAdapter {
        r,
        target_modules: Names::Pattern(".*_proj".into()),
        ..NewAdapter::default()
    };
    let small = Arch::read(&super::golden::folder("model")).unwrap();
    let config: AdapterConfig = init::adapter(&small, &new, 5).unwrap().config;
    let zeros = |rows: usize, columns: usize| {
        Tensor::zeros((rows, columns), DType::F32, &Device::Cpu).unwrap()
    };
    let all = tensors(arch).filter_map(|tensor| match (tensor.role, &tensor.shape[..]) {
        (Role::Projection(projection), [out, input]) => {
            let layer = tensor.name.split('.').nth(2)?.parse().ok()?;
            let pair = LoraPair {
                a: zeros(r, *input),
                b: zeros(*out, r),
                magnitude: None,
            };
            Some((projection_path(layer, projection), pair))
        }
        _ => None,
    });
    Adapter {
        config,
        tensors: all.collect(),
        saved: BTreeMap::new(),
        token_rows: BTreeMap::new(),
    }
}

#[test]
fn what_fits_into_a_gpu_is_told_by_docs() {
    let row = |prompt: u32, answer: u32, rejected: bool| Row {
        prompt: (0..prompt).collect(),
        chosen: (0..answer).collect(),
        rejected: rejected.then(|| (1..=answer).collect()),
        ..Row::default()
    };
    let sft: &dyn Loss = &Sft {
        completion_only: false,
    };
    let orpo: &dyn Loss = &Orpo { beta: 0.1 };
    for (what, in_4_bits, loss, row, bounds) in [
        ("SFT, 4 bits", true, sft, row(0, 1024, false), 7.5..7.9),
        ("SFT, bf16", false, sft, row(0, 1024, false), 17.5..17.9),
        ("ORPO, 4 bits", true, orpo, row(512, 512, true), 8.0..8.4),
    ] {
        let folder = folder(in_4_bits);
        let arch = Arch::read(folder.path()).unwrap();
        let weights = Weights::open(folder.path()).unwrap();
        let adapter = adapter(&arch, 16);
        let settings = Settings {
            checkpointing: true,
            batch_size: 1,
            accumulation: 1,
            ..super::golden_runs::settings()
        };
        let rows = [row];
        let planned = Planned {
            model: Unloaded {
                arch: &arch,
                weights: &weights,
                adapter: Some(&adapter),
                trained: Trained::Adapter,
                compute: DType::BF16,
            },
            reference: None,
            base_is_reference: false,
            packing: Packing::default(),
            loss,
            settings: &settings,
            rows: &rows,
            eval_rows: &[],
            pad: 0,
        };
        let told = planned.estimate(0).unwrap().on_device;
        let sum: u64 = told.values().sum();
        let gigabytes = sum as f64 / 1e9;
        println!("| {what} | {gigabytes:.1} GB | {told:?} |");
        assert!(bounds.contains(&gigabytes), "{what}: {gigabytes}");
    }
}
