//! Adapters of every kind against PEFT: logits, gradients, folders, and merged models.
//!
//! `cargo test --lib golden_adapters -- --nocapture --test-threads 1 | grep '|'` prints the measured differences as a table.

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

use super::golden::{far, folder, logits, tensors};
use super::golden_peft::{gradients_are_near, row, write_tied_config};
use crate::ml::adapter::{self, Adapter, Names, NewAdapter};
use crate::ml::io::weights::Weights;
use crate::ml::lora::attach::{Beginning, attach};
use crate::ml::lora::merge::merge;
use crate::ml::model::arch::Arch;
use crate::ml::model::batch::{Batch, Sequence};
use crate::ml::model::linear::Pass;
use crate::ml::model::{CausalLm, Trained};
use crate::ml::quant::nf4::Nf4;
use crate::ml::quant::quantize;
use crate::ml::train::save::save_adapter;

/// Each adapter and its base.
const CASES: [(&str, &str); 9] = [
    ("plain", "model"),
    ("rslora_patterns", "model"),
    ("dora", "model"),
    ("saved", "model"),
    ("saved_tied", "tied"),
    ("saved_projection", "model"),
    ("bias_all", "model"),
    ("bias_lora_only", "model"),
    ("dora_nf4", "model_nf4"),
];

fn golden(name: &str) -> PathBuf {
    folder("adapters").join(name)
}

/// The base's folder; the tied one is made of the other.
fn base(name: &str, scratch: &Path) -> PathBuf {
    if name != "tied" {
        return golden(name);
    }
    let out = scratch.join("tied");
    write_tied_config(&out);
    let mut weights = tensors("adapters/model/model.safetensors");
    weights.remove("lm_head.weight").unwrap();
    crate::ml::io::weights::save(
        &out.join("model.safetensors"),
        &weights,
        &[("format", "pt")],
    )
    .unwrap();
    out
}

fn load(base: &Path, adapter: Option<&Adapter>, trained: Trained) -> anyhow::Result<CausalLm> {
    let config = Arch::read(base)?;
    let (weights, device) = (Weights::open(base)?, Device::Cpu);
    CausalLm::load(&config, &weights, adapter, trained, DType::F32, &device)
}

fn batch() -> Batch {
    let ids = &tensors("adapters/outputs.safetensors")["input_ids"];
    let ids: Vec<u32> = ids.to_dtype(DType::U32).unwrap().to_vec1().unwrap();
    Batch::new(vec![Sequence::new(ids, 1)], 0).unwrap()
}

#[test]
fn logits_are_those_of_peft_with_and_without_the_adapter() {
    let theirs = tensors("adapters/outputs.safetensors");
    let scratch = tempfile::tempdir().unwrap();
    for (case, name) in CASES {
        let base = base(name, scratch.path());
        let adapter = Adapter::load(&golden(case)).unwrap();
        for trained in [Trained::Nothing, Trained::Adapter] {
            let model = load(&base, Some(&adapter), trained).unwrap();
            let ours = logits(&model, &batch(), Pass::INFER);
            row(
                "logits",
                case,
                far(&ours, &theirs[&format!("{case}.logits")]),
                1e-4,
            );
            let alone = logits(&model, &batch(), Pass::BASE);
            let without = load(&base, None, Trained::Nothing).unwrap();
            assert!(
                !model.is_lora_only() && !without.is_lora_only(),
                "the base has biases"
            );
            let plain = logits(&without, &batch(), Pass::BASE);
            assert!(
                far(&alone, &plain).to_bits() == 0,
                "{case} leaks into the base"
            );
            assert!(far(&alone, &ours) > 0.5, "{case} changes something");
        }
        let plain = load(&base, None, Trained::Nothing).unwrap();
        let plain = logits(&plain, &batch(), Pass::BASE);
        match name {
            "model" => row("logits", "base", far(&plain, &theirs["logits"]), 1e-4),
            "model_nf4" => row(
                "logits",
                "nf4 base",
                far(&plain, &theirs["nf4.logits"]),
                1e-4,
            ),
            _ => {}
        }
    }
}

/// PEFT's name of a parameter's gradient.
fn name_of_peft(theirs: &str) -> String {
    let own = theirs.replace("base_model.model.", "");
    let own = own
        .replace(".modules_to_save", "")
        .replace(".base_layer", "");
    own.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")
}

#[test]
fn gradients_are_those_of_peft() {
    let theirs = tensors("adapters/outputs.safetensors");
    let scratch = tempfile::tempdir().unwrap();
    for (case, name) in CASES {
        let adapter = Adapter::load(&golden(case)).unwrap();
        let base = base(name, scratch.path());
        let model = load(&base, Some(&adapter), Trained::Adapter).unwrap();
        // Biases of keys move all scores alike, so their true gradient is 0.
        let ours = |name: &str, gradient: &Tensor| (name_of_peft(name), gradient.clone());
        let count = gradients_are_near(&model, &batch(), case, &theirs, 1e-3, ours);
        assert_eq!(count, model.parameters.len(), "{case}");
    }
}

#[test]
fn folders_are_written_as_peft_writes_them() {
    for (case, _) in CASES {
        let out = tempfile::tempdir().unwrap();
        Adapter::load(&golden(case))
            .unwrap()
            .save(out.path())
            .unwrap();
        let ours = Weights::open_file(&out.path().join(adapter::FILE)).unwrap();
        let theirs = Weights::open_file(&golden(case).join(adapter::FILE)).unwrap();
        assert_eq!(ours.names(), theirs.names(), "{case}");
        for name in ours.names() {
            let (ours, theirs) = (ours.raw(name).unwrap(), theirs.raw(name).unwrap());
            let same = ours.dtype == theirs.dtype
                && ours.shape == theirs.shape
                && ours.bytes().unwrap() == theirs.bytes().unwrap();
            assert!(same, "{case} {name}");
        }
        let json = |folder: &Path| -> serde_json::Value {
            let text = fs::read(folder.join(adapter::CONFIG)).unwrap();
            let mut json: serde_json::Value = serde_json::from_slice(&text).unwrap();
            let modules = json["target_modules"].as_array_mut().unwrap();
            modules.sort_by_key(ToString::to_string);
            json
        };
        assert_eq!(json(out.path()), json(&golden(case)), "{case}");
    }
}

#[test]
fn what_a_training_leaves_is_the_adapter_again() {
    let scratch = tempfile::tempdir().unwrap();
    for (case, name) in CASES {
        let adapter = Adapter::load(&golden(case)).unwrap();
        let model = load(
            &base(name, scratch.path()),
            Some(&adapter),
            Trained::Adapter,
        )
        .unwrap();
        // One step, on every parameter.
        for parameter in &model.parameters {
            let moved = (parameter.var.as_detached_tensor() + 0.5).unwrap();
            parameter.var.set(&moved).unwrap();
        }
        let out = tempfile::tempdir().unwrap();
        save_adapter(&model, adapter, out.path()).unwrap();
        let again = Adapter::load(out.path()).unwrap();
        let ours = Weights::open_file(&out.path().join(adapter::FILE)).unwrap();
        let theirs = Weights::open_file(&golden(case).join(adapter::FILE)).unwrap();
        assert_eq!(ours.names(), theirs.names(), "{case}");
        for name in ours.names() {
            let get = |weights: &Weights| weights.tensor(name, &Device::Cpu).unwrap();
            let moved = (get(&theirs) + 0.5).unwrap();
            assert!(far(&get(&ours), &moved) < 1e-6, "{case} {name}");
        }
        let loaded = load(&base(name, scratch.path()), Some(&again), Trained::Nothing).unwrap();
        let far = far(
            &logits(&loaded, &batch(), Pass::INFER),
            &logits(&model, &batch(), Pass::INFER),
        );
        assert!(far < 1e-5, "{case} {far}");
    }
}

#[test]
fn merged_models_give_the_logits_of_base_and_adapter() {
    let theirs = tensors("adapters/outputs.safetensors");
    let scratch = tempfile::tempdir().unwrap();
    for (case, name) in CASES {
        let out = tempfile::tempdir().unwrap();
        let adapter = Adapter::load(&golden(case)).unwrap();
        let base = base(name, scratch.path());
        let report = merge(&base, &adapter, out.path(), &mut |_, _| Ok(())).unwrap();
        assert_eq!(report.replaced, adapter.saved.len());
        let merged = load(out.path(), None, Trained::Nothing).unwrap();
        let ours = logits(&merged, &batch(), Pass::INFER);
        // What PEFT can't merge itself is held against its unmerged logits.
        let name = [format!("{case}.merged"), format!("{case}.logits")];
        let theirs = name.iter().find_map(|name| theirs.get(name)).unwrap();
        row("merged logits", case, far(&ours, theirs), 1e-4);
    }
}

#[test]
fn loftq_s_iterations_are_those_of_peft() {
    let theirs = tensors("adapters/outputs.safetensors");
    let dense_folder = golden("model");
    let dense = Weights::open(&dense_folder).unwrap();
    let new = NewAdapter {
        r: 4,
        lora_alpha: 4.,
        target_modules: Names::List(
            ["q_proj", "v_proj", "down_proj"]
                .map(str::to_owned)
                .to_vec(),
        ),
        ..NewAdapter::default()
    };
    let scratch = tempfile::tempdir().unwrap();
    let second = scratch.path().join("second");
    fs::create_dir(&second).unwrap();
    let begin = |four: &Path| {
        let config = Arch::read(four).unwrap();
        let four = Weights::open(four).unwrap();
        attach(
            &config,
            &four,
            &new,
            1,
            Beginning::Loftq(&dense),
            &mut |_, _| Ok(()),
        )
        .unwrap()
    };
    let mut begun = begin(&golden("model_nf4"));
    for iteration in [1, 2] {
        if iteration == 2 {
            let settings = quantize::Settings {
                double_quant: false,
                compute_dtype: None,
            };
            let ignore = &mut |_, _| Ok(());
            quantize::quantize(&dense_folder, &second, settings, Some(&begun), ignore).unwrap();
            begun = begin(&second);
        }
        for name in ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"] {
            let path = format!("model.layers.0.{name}");
            let pair = &begun.tensors[&path];
            let case = format!("{name}, iteration {iteration}");
            let get = |what: &str| theirs[&format!("loftq.{iteration}.{name}.{what}")].clone();
            let update = pair.b.matmul(&pair.a).unwrap();
            row("LoftQ's B A", &case, far(&update, &get("update")), 1e-5);
            let lengths = |x: &Tensor, dim| x.sqr().unwrap().sum(dim).unwrap().sqrt().unwrap();
            row(
                "LoftQ's A",
                &case,
                far(&lengths(&pair.a, 1), &get("a_size")),
                1e-5,
            );
            row(
                "LoftQ's B",
                &case,
                far(&lengths(&pair.b, 0), &get("b_size")),
                1e-5,
            );
            // It makes up for a part of the error.
            let weight = dense
                .tensor(&format!("{path}.weight"), &Device::Cpu)
                .unwrap();
            let norm = |x: Tensor| {
                x.sqr()
                    .unwrap()
                    .sum_all()
                    .unwrap()
                    .to_scalar::<f32>()
                    .unwrap()
            };
            let error = (&weight - get("weight")).unwrap();
            let less = (&error - update).unwrap();
            assert!(norm(less) < 0.9 * norm(error), "{case}");
        }
    }
    let weights = Weights::open(&second).unwrap();
    let name = "model.layers.0.self_attn.q_proj";
    let four = Nf4::load(&weights, &format!("{name}.weight"))
        .unwrap()
        .unwrap();
    let four = four.to_tensor(DType::F32, &Device::Cpu).unwrap();
    let theirs = &theirs["loftq.2.self_attn.q_proj.weight"];
    row(
        "LoftQ's weight",
        "q_proj, iteration 2",
        far(&four, theirs),
        1e-5,
    );
}

#[test]
fn what_does_not_fit_a_model_is_told() {
    let scratch = tempfile::tempdir().unwrap();
    let fails = |base_name: &str, adapter: &Adapter| {
        let base = base(base_name, scratch.path());
        let error = load(&base, Some(adapter), Trained::Adapter).err().unwrap();
        let merged = tempfile::tempdir().unwrap();
        (
            format!("{error:#}"),
            merge(&base, adapter, merged.path(), &mut |_, _| Ok(())),
        )
    };
    let read = |case: &str| Adapter::load(&golden(case)).unwrap();
    let (error, merged) = fails("model_nf4", &read("saved_projection"));
    assert!(error.contains("stored in 4 bits"), "{error}");
    assert!(format!("{:#}", merged.unwrap_err()).contains("4 bits"));
    let mut wide = read("saved");
    let head = wide.saved.get_mut("lm_head.weight").unwrap();
    *head = Tensor::zeros((97, 64), DType::F32, &Device::Cpu).unwrap();
    let (error, merged) = fails("model", &wide);
    assert!(error.contains("[97, 64]"), "{error}");
    assert!(format!("{:#}", merged.unwrap_err()).contains("[97, 64]"));
    let mut strange = read("plain");
    let tensor = strange.tensors["model.layers.0.mlp.down_proj"].clone();
    strange
        .tensors
        .insert("model.layers.7.mlp.down_proj".into(), tensor);
    let (error, merged) = fails("model", &strange);
    assert!(error.contains("`model.layers.7.mlp.down_proj`"), "{error}");
    assert!(merged.is_err());
    let mut loftq = read("plain");
    loftq
        .config
        .raw
        .insert("init_lora_weights".into(), "loftq".into());
    let (error, _) = fails("model", &loftq);
    assert!(error.contains("double_quant: false"), "{error}");
}

#[test]
fn a_model_tells_whether_it_has_more_than_pairs() {
    let pairs = Adapter::load(&folder("adapter_final")).unwrap();
    for base in ["model", "model_nf4"] {
        let base = folder(base);
        assert!(pairs.is_lora_only());
        assert!(load(&base, None, Trained::Nothing).unwrap().is_lora_only());
        assert!(
            load(&base, Some(&pairs), Trained::Adapter)
                .unwrap()
                .is_lora_only()
        );
    }
    let all = load(&folder("model"), None, Trained::Everything).unwrap();
    assert!(!all.is_lora_only());
    for (case, _) in CASES {
        let adapter = Adapter::load(&golden(case)).unwrap();
        let plain = ["plain", "rslora_patterns"].contains(&case);
        assert_eq!(adapter.is_lora_only(), plain, "{case}");
    }
}

#[test]
fn some_projections_of_a_4_bit_model_may_be_dense() {
    // As in models quantised with `llm_int8_skip_modules`.
    let scratch = tempfile::tempdir().unwrap();
    let name = "model.layers.1.mlp.down_proj";
    let mut weights = tensors("adapters/model_nf4/model.safetensors");
    weights.retain(|tensor, _| !tensor.starts_with(&format!("{name}.weight")));
    let dense = tensors("adapters/model/model.safetensors");
    weights.insert(
        format!("{name}.weight"),
        dense[&format!("{name}.weight")].clone(),
    );
    let file = scratch.path().join("model.safetensors");
    crate::ml::io::weights::save(&file, &weights, &[("format", "pt")]).unwrap();
    let config = golden("model_nf4").join("config.json");
    fs::copy(config, scratch.path().join("config.json")).unwrap();
    let adapter = Adapter::load(&golden("plain")).unwrap();
    let mixed = load(scratch.path(), Some(&adapter), Trained::Adapter).unwrap();
    let ours = logits(&mixed, &batch(), Pass::INFER);
    let all = load(&golden("model_nf4"), Some(&adapter), Trained::Nothing).unwrap();
    assert!(far(&ours, &logits(&all, &batch(), Pass::INFER)) > 1e-2);

    let out = tempfile::tempdir().unwrap();
    let report = merge(scratch.path(), &adapter, out.path(), &mut |_, _| Ok(())).unwrap();
    assert_eq!((report.merged, report.dequantised), (4, 13));
    let merged = load(out.path(), None, Trained::Nothing).unwrap();
    row(
        "merged logits",
        "mixed",
        far(&ours, &logits(&merged, &batch(), Pass::INFER)),
        1e-4,
    );
}

#[test]
fn a_16_bit_model_in_4_bits_is_merged_as_unsloth_does() {
    // Dequantised to bf16, the update added in f32, rounded to bf16.
    let scratch = tempfile::tempdir().unwrap();
    let [half, four, out] = ["half", "four", "out"].map(|name| scratch.path().join(name));
    for folder in [&half, &four, &out] {
        fs::create_dir(folder).unwrap();
    }
    fs::copy(
        golden("model").join("config.json"),
        half.join("config.json"),
    )
    .unwrap();
    let weights = tensors("adapters/model/model.safetensors").into_iter();
    let weights = weights.map(|(name, tensor)| (name, tensor.to_dtype(DType::BF16).unwrap()));
    crate::ml::io::weights::save(&half.join("model.safetensors"), &weights.collect(), &[]).unwrap();
    let settings = quantize::Settings {
        double_quant: true,
        compute_dtype: None,
    };
    quantize::quantize(&half, &four, settings, None, &mut |_, _| Ok(())).unwrap();
    let adapter = Adapter::load(&golden("rslora_patterns")).unwrap();
    merge(&four, &adapter, &out, &mut |_, _| Ok(())).unwrap();
    let (four, out) = (Weights::open(&four).unwrap(), Weights::open(&out).unwrap());
    for path in [
        "model.layers.1.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
    ] {
        let name = format!("{path}.weight");
        let base = Nf4::load(&four, &name).unwrap().unwrap();
        let base = base.to_tensor(DType::BF16, &Device::Cpu).unwrap();
        let mut sum = base.to_dtype(DType::F32).unwrap();
        if let Some(pair) = adapter.tensors.get(path) {
            let update = pair.b.matmul(&pair.a).unwrap();
            sum = (sum + (update * adapter.config.scaling(path)).unwrap()).unwrap();
        }
        let ours = out.tensor(&name, &Device::Cpu).unwrap();
        assert_eq!(ours.dtype(), DType::BF16);
        let expected = sum
            .to_dtype(DType::BF16)
            .unwrap()
            .to_dtype(DType::F32)
            .unwrap();
        let far = far(&ours.to_dtype(DType::F32).unwrap(), &expected);
        assert!(far.to_bits() == 0, "{path} {far}");
    }
}
