//! Embeddings and heads that are one tensor or two, against transformers and PEFT: models as they are stored, adapters at
//! either end, and which modules an adapter means.
//!
//! `cargo test --lib golden_ends -- --nocapture --test-threads 1 | grep '|'` prints the measured differences as a table.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

use super::golden::{far, folder, logits, tensors};
use super::golden_peft::{self, row, write_tied_config};
use crate::ml::adapter::{self, Adapter, Names, NewAdapter};
use crate::ml::io::weights::{INDEX, Weights};
use crate::ml::lora::init;
use crate::ml::lora::merge::merge;
use crate::ml::lora::verify::verify_merge;
use crate::ml::model::arch::{Arch, LayerArch};
use crate::ml::model::batch::{Batch, Sequence};
use crate::ml::model::linear::Pass;
use crate::ml::model::tensors::{EMBEDDINGS, HEAD};
use crate::ml::model::tied;
use crate::ml::model::{CausalLm, Trained, logits_by_layer};
use crate::ml::quant::quantize;
use crate::ml::train::save::{save_adapter, save_model};

/// Each adapter and its base.
const CASES: [(&str, &str); 13] = [
    ("tied_saved_embed", "tied"),
    ("tied_saved_head", "tied"),
    ("tied_saved_both", "tied"),
    ("tied_ensure", "tied"),
    ("tied_embedding_layers", "tied"),
    ("embedding_layers", "model"),
    ("lora_head", "model"),
    ("lora_embed", "model"),
    ("lora_both", "model"),
    ("lora_head_saved_embed", "model"),
    ("tied_lora_head", "tied"),
    ("tied_lora_both", "tied"),
    ("tied_lora_ensure", "tied"),
];

const SETTINGS: quantize::Settings = quantize::Settings {
    double_quant: false,
    compute_dtype: None,
};

fn golden(name: &str) -> PathBuf {
    folder("adapters/ends").join(name)
}

fn outputs() -> BTreeMap<String, Tensor> {
    tensors("adapters/ends/outputs.safetensors")
        .into_iter()
        .collect()
}

/// A base whose `config.json` says that it is tied, with the tensors that its name tells; in two files if `sharded`, of which
/// one holds nothing but the head.
fn base(kind: &str, scratch: &Path, sharded: bool) -> PathBuf {
    let model = folder("adapters").join("model");
    if kind == "model" {
        return model;
    }
    let out = scratch.join(kind);
    write_tied_config(&out);
    let mut weights = tensors("adapters/model/model.safetensors");
    match kind {
        "tied" => weights.remove(HEAD),
        "copied" => weights.insert(HEAD.into(), weights[EMBEDDINGS].clone()),
        "only_head" => weights.remove(EMBEDDINGS),
        _ => None,
    };
    let metadata = [("format", "pt")];
    if !sharded {
        let file = out.join("model.safetensors");
        crate::ml::io::weights::save(&file, &weights.into_iter().collect(), &metadata).unwrap();
        return out;
    }
    let mut map = serde_json::Map::new();
    for (file, head) in [("a.safetensors", false), ("b.safetensors", true)] {
        let own = weights.iter().filter(|(name, _)| (*name == HEAD) == head);
        let own: BTreeMap<_, _> = own
            .map(|(name, tensor)| (name.clone(), tensor.clone()))
            .collect();
        if own.is_empty() {
            continue;
        }
        map.extend(own.keys().map(|name| (name.clone(), file.into())));
        crate::ml::io::weights::save(&out.join(file), &own, &metadata).unwrap();
    }
    let index = json!({"metadata": {}, "weight_map": map});
    fs::write(out.join(INDEX), index.to_string()).unwrap();
    out
}

fn load(base: &Path, adapter: Option<&Adapter>, trained: Trained) -> anyhow::Result<CausalLm> {
    let (config, weights) = tied::open(base)?;
    CausalLm::load(
        &config,
        &weights,
        adapter,
        trained,
        DType::F32,
        &Device::Cpu,
    )
}

fn batch() -> Batch {
    let ids = outputs()["input_ids"].to_dtype(DType::U32).unwrap();
    Batch::new(vec![Sequence::new(ids.to_vec1().unwrap(), 1)], 0).unwrap()
}

/// The size of the largest logit, by which differences are measured.
fn relative(ours: &Tensor, theirs: &Tensor) -> f64 {
    let size = theirs.abs().unwrap().flatten_all().unwrap().max(0).unwrap();
    far(ours, theirs) / f64::from(size.to_scalar::<f32>().unwrap())
}

/// What a folder has for both ends: whether `config.json` says that they are tied, and which tensors are in its files.
fn ends(folder: &Path) -> (bool, Vec<&'static str>) {
    let config = Arch::read(folder).unwrap();
    let weights = Weights::open(folder).unwrap();
    let names = [EMBEDDINGS, HEAD].into_iter();
    let names = names.filter(|name| weights.contains(name)).collect();
    (config.tie_word_embeddings, names)
}

/// The name and the gradient of ours for PEFT's.
fn of_peft(name: &str, gradient: &Tensor) -> (String, Tensor) {
    let own = name.replace("base_model.model.", "");
    let own = own.replace(".modules_to_save", "");
    if !own.contains("lora_embedding") {
        return (own, gradient.clone());
    }
    // Its matrices are transposed here: A is the transpose of B.
    let own = own.replace("lora_embedding_A", "lora_B.weight");
    let own = own.replace("lora_embedding_B", "lora_A.weight");
    (own, gradient.t().unwrap().contiguous().unwrap())
}

fn gradients_are_near(model: &CausalLm, case: &str, theirs: &BTreeMap<String, Tensor>) {
    golden_peft::gradients_are_near(model, &batch(), case, theirs, 0., of_peft);
}

#[test]
fn models_are_read_as_transformers_reads_them() {
    let theirs = outputs();
    for (kind, is_tied) in [
        ("model", false),
        ("tied", true),
        ("copied", true),
        ("different", false),
        ("only_head", true),
    ] {
        for sharded in [false, true] {
            let scratch = tempfile::tempdir().unwrap();
            let base = base(kind, scratch.path(), sharded);
            let (config, _) = tied::open(&base).unwrap();
            assert_eq!(config.tie_word_embeddings, is_tied, "{kind}");
            let told = tied::conflict(&base, &config).unwrap();
            assert_eq!(told.is_some(), kind == "different");
            let model = load(&base, None, Trained::Nothing).unwrap();
            let ours = logits(&model, &batch(), Pass::BASE);
            row(
                "logits",
                kind,
                far(&ours, &theirs[&format!("{kind}.logits")]),
                1e-4,
            );
            // In 4 bits both ends stay as they are.
            let out = tempfile::tempdir().unwrap();
            quantize::quantize(&base, out.path(), SETTINGS, None, &mut |_, _| Ok(())).unwrap();
            let names = if is_tied {
                vec![EMBEDDINGS]
            } else {
                vec![EMBEDDINGS, HEAD]
            };
            assert_eq!(ends(out.path()), (is_tied, names), "{kind}");
            let four = load(out.path(), None, Trained::Nothing).unwrap();
            let head = |model: &CausalLm| model.head_matrix(Pass::BASE).unwrap().weight;
            assert!(far(&head(&four), &head(&model)).to_bits() == 0, "{kind}");
        }
    }
}

#[test]
fn a_full_training_writes_what_transformers_would() {
    let theirs = outputs();
    for (kind, is_tied) in [
        ("tied", true),
        ("copied", true),
        ("different", false),
        ("only_head", true),
    ] {
        for sharded in [false, true] {
            let scratch = tempfile::tempdir().unwrap();
            let base = base(kind, scratch.path(), sharded);
            let model = load(&base, None, Trained::Everything).unwrap();
            if theirs.contains_key(&format!("{kind}.loss")) {
                gradients_are_near(&model, kind, &theirs);
            }
            // One step, on every parameter.
            for (number, parameter) in model.parameters.iter().enumerate() {
                let moved = parameter.var.as_detached_tensor() + 0.01 * (1 + number % 3) as f64;
                parameter.var.set(&moved.unwrap()).unwrap();
            }
            let out = tempfile::tempdir().unwrap();
            save_model(&model, &base, out.path()).unwrap();
            let names = if is_tied {
                vec![EMBEDDINGS]
            } else {
                vec![EMBEDDINGS, HEAD]
            };
            assert_eq!(ends(out.path()), (is_tied, names), "{kind}");
            let again = load(out.path(), None, Trained::Nothing).unwrap();
            let far = far(
                &logits(&again, &batch(), Pass::BASE),
                &logits(&model, &batch(), Pass::BASE),
            );
            assert!(far < 1e-5, "{kind} {far}");
        }
    }
}

#[test]
fn a_model_without_an_end_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let tied = base("tied", scratch.path(), false);
    let config = fs::read_to_string(tied.join("config.json")).unwrap();
    for says in ["false", "null"] {
        let config = config.replace(
            "\"tie_word_embeddings\": true",
            &format!("\"tie_word_embeddings\": {says}"),
        );
        fs::write(tied.join("config.json"), config).unwrap();
        let error = load(&tied, None, Trained::Nothing)
            .err()
            .unwrap()
            .to_string();
        assert!(
            error.contains("`lm_head.weight`") && error.contains("`tie_word_embeddings: true`"),
            "{error}"
        );
    }
}

#[test]
fn adapters_at_the_ends_are_those_of_peft() {
    let theirs = outputs();
    for (case, kind) in CASES {
        let scratch = tempfile::tempdir().unwrap();
        let base = base(kind, scratch.path(), false);
        let adapter = Adapter::load(&golden(case)).unwrap();
        let model = load(&base, Some(&adapter), Trained::Nothing).unwrap();
        let ours = logits(&model, &batch(), Pass::INFER);
        let values = &theirs[&format!("{case}.logits")];
        row("logits, relative", case, relative(&ours, values), 2e-6);
        let alone = logits(&model, &batch(), Pass::BASE);
        let plain = load(&base, None, Trained::Nothing).unwrap();
        let apart = far(&alone, &logits(&plain, &batch(), Pass::BASE));
        assert!(apart.to_bits() == 0, "{case} leaks into the base");
        let (config, weights) = tied::open(&base).unwrap();
        let passes = [Pass::BASE, Pass::INFER];
        let layers = logits_by_layer(
            &config,
            &weights,
            Some(&adapter),
            &batch(),
            &passes,
            &mut |_| Ok(()),
        );
        for (one, all) in layers.unwrap().iter().zip([alone, ours]) {
            assert!(relative(&one.get(0).unwrap(), &all) < 1e-6, "{case}");
        }
        // One token after the other, as text is generated.
        let mut cache = crate::ml::model::Cache::default();
        let last = model
            .next_logits(&batch().sequences[0].ids, &mut cache, Pass::INFER)
            .unwrap();
        let last = Tensor::new(last, &Device::Cpu).unwrap();
        assert!(relative(&last, &values.get(23).unwrap()) < 2e-6, "{case}");
    }
}

#[test]
fn trainings_at_the_ends_are_those_of_peft() {
    let theirs = outputs();
    for (case, kind) in CASES {
        let scratch = tempfile::tempdir().unwrap();
        let base = base(kind, scratch.path(), false);
        let adapter = Adapter::load(&golden(case)).unwrap();
        let model = load(&base, Some(&adapter), Trained::Adapter);
        if case == "tied_lora_ensure" {
            let error = model.err().unwrap().to_string();
            assert!(error.contains("`ensure_weight_tying`"), "{error}");
            continue;
        }
        let model = model.unwrap();
        if theirs
            .keys()
            .any(|name| name.starts_with(&format!("{case}.grad.")))
        {
            gradients_are_near(&model, case, &theirs);
        }
        let out = tempfile::tempdir().unwrap();
        for parameter in &model.parameters {
            let moved = (parameter.var.as_detached_tensor() + 0.1).unwrap();
            parameter.var.set(&moved).unwrap();
        }
        save_adapter(&model, adapter, out.path()).unwrap();
        let again = Adapter::load(out.path()).unwrap();
        let loaded = load(&base, Some(&again), Trained::Nothing).unwrap();
        let far = far(
            &logits(&loaded, &batch(), Pass::INFER),
            &logits(&model, &batch(), Pass::INFER),
        );
        assert!(far < 1e-4, "{case} {far}");
        let names = |folder: &Path| {
            let weights = Weights::open_file(&folder.join(adapter::FILE)).unwrap();
            weights
                .names()
                .into_iter()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        assert_eq!(names(out.path()), names(&golden(case)), "{case}");
    }
}

#[test]
fn merged_ends_are_those_of_peft() {
    let theirs = outputs();
    for (case, kind) in CASES {
        let kinds: &[&str] = if kind == "tied" {
            &["tied", "copied"]
        } else {
            &[kind]
        };
        for (kind, sharded) in kinds.iter().flat_map(|kind| [(kind, false), (kind, true)]) {
            let scratch = tempfile::tempdir().unwrap();
            let base = base(kind, scratch.path(), sharded);
            let adapter = Adapter::load(&golden(case)).unwrap();
            let out = tempfile::tempdir().unwrap();
            merge(&base, &adapter, out.path(), &mut |_, _| Ok(())).unwrap();
            let merged = load(out.path(), None, Trained::Nothing).unwrap();
            let ours = logits(&merged, &batch(), Pass::INFER);
            let name = [format!("{case}.merged"), format!("{case}.logits")];
            let values = name.iter().find_map(|name| theirs.get(name)).unwrap();
            row(
                "merged logits, relative",
                case,
                relative(&ours, values),
                1e-5,
            );
            let is_tied = match theirs.get(&format!("{case}.tied")) {
                Some(tied) => tied.to_vec1::<i64>().unwrap() == [1],
                None => false,
            };
            let names = if is_tied {
                vec![EMBEDDINGS]
            } else {
                vec![EMBEDDINGS, HEAD]
            };
            assert_eq!(ends(out.path()), (is_tied, names), "{case}");
            let ids = vec![batch().sequences[0].ids.clone()];
            let check =
                verify_merge(&base, &adapter, out.path(), &ids, &mut |_, _| Ok(())).unwrap();
            row("verify", case, check.relative, 1e-6);
        }
    }
}

#[test]
fn an_imported_folder_is_written_as_it_was() {
    for (case, _) in CASES {
        let out = tempfile::tempdir().unwrap();
        Adapter::load(&golden(case))
            .unwrap()
            .save(out.path())
            .unwrap();
        let weights = |folder: &Path| Weights::open_file(&folder.join(adapter::FILE)).unwrap();
        let (ours, theirs) = (weights(out.path()), weights(&golden(case)));
        assert_eq!(ours.names(), theirs.names(), "{case}");
        for name in ours.names() {
            let (ours, theirs) = (ours.raw(name).unwrap(), theirs.raw(name).unwrap());
            assert!(
                ours.shape == theirs.shape && ours.bytes().unwrap() == theirs.bytes().unwrap(),
                "{case} {name}"
            );
        }
        let keys = |folder: &Path| -> Value {
            let text = fs::read(folder.join(adapter::CONFIG)).unwrap();
            let mut json: Value = serde_json::from_slice(&text).unwrap();
            json["target_modules"]
                .as_array_mut()
                .unwrap()
                .sort_by_key(ToString::to_string);
            json
        };
        assert_eq!(keys(out.path()), keys(&golden(case)), "{case}");
    }
}

#[test]
fn the_first_pattern_of_the_file_counts() {
    let theirs = &outputs()["patterns.logits"];
    let adapter = Adapter::load(&golden("patterns")).unwrap();
    let model = |adapter: &Adapter| {
        load(
            &base("model", Path::new(""), false),
            Some(adapter),
            Trained::Nothing,
        )
        .unwrap()
    };
    let ours = |adapter: &Adapter| logits(&model(adapter), &batch(), Pass::INFER);
    row("logits", "patterns", far(&ours(&adapter), theirs), 1e-4);
    // What is written keeps the order.
    let out = tempfile::tempdir().unwrap();
    adapter.save(out.path()).unwrap();
    let again = Adapter::load(out.path()).unwrap();
    row(
        "logits",
        "patterns written again",
        far(&ours(&again), theirs),
        1e-4,
    );
    let text = fs::read_to_string(out.path().join(adapter::CONFIG)).unwrap();
    let place = |text_: &str| text.find(text_).unwrap();
    assert!(
        place("\"q_proj\": 2") < place("layers.1.self_attn.q_proj"),
        "{text}"
    );
    assert!(place("\"alpha_pattern\"") < place("\"bias\""), "{text}");
}

#[test]
fn both_ends_begin_with_the_numbers_of_peft() {
    let theirs = outputs();
    let config = Arch::read(&folder("adapters").join("model")).unwrap();
    let new = NewAdapter {
        r: 2,
        target_modules: Names::List(
            ["lm_head", "embed_tokens", "v_proj"]
                .map(str::to_owned)
                .to_vec(),
        ),
        ..NewAdapter::default()
    };
    let ours = init::adapter(&config, &new, 3407).unwrap();
    let out = tempfile::tempdir().unwrap();
    ours.save(out.path()).unwrap();
    let ours =
        candle_core::safetensors::load(out.path().join(adapter::FILE), &Device::Cpu).unwrap();
    let begun = theirs
        .iter()
        .filter_map(|(name, tensor)| Some((name.strip_prefix("begun.")?, tensor)));
    let begun: Vec<_> = begun.collect();
    assert_eq!(begun.len(), ours.len());
    for (name, tensor) in begun {
        row("first numbers", name, far(&ours[name], tensor), 1e-6);
    }
}

#[test]
fn modules_are_chosen_as_peft_chooses_them() {
    let text = include_str!("../../../tests/golden/adapters/targets.json");
    let cases: Vec<Value> = serde_json::from_str(text).unwrap();
    assert!(cases.len() > 40);
    let mut config = Arch::read(&folder("adapters").join("model")).unwrap();
    config.layers.resize(12, LayerArch::default());
    for case in cases {
        let settings = &case["settings"];
        let strings = |value: &Value| -> Option<Vec<String>> {
            let items = value.as_array()?.iter();
            Some(
                items
                    .map(|item| item.as_str().unwrap().to_owned())
                    .collect(),
            )
        };
        let names = |key: &str| match &settings[key] {
            Value::Null => None,
            Value::String(text) => Some(Names::Pattern(text.clone())),
            list => strings(list).map(Names::List),
        };
        let one = |value: &Value| value.as_u64().map(|layer| vec![layer as usize]);
        let layers = &settings["layers_to_transform"];
        let many = || {
            layers.as_array().map(|all| {
                all.iter()
                    .filter_map(Value::as_u64)
                    .map(|n| n as usize)
                    .collect()
            })
        };
        let pattern = &settings["layers_pattern"];
        let pattern = pattern
            .as_str()
            .map(|text| vec![text.to_owned()])
            .or_else(|| strings(pattern));
        let new = NewAdapter {
            r: 1,
            target_modules: names("target_modules")
                .unwrap_or_else(|| Names::List(vec!["q_proj".into(), "v_proj".into()])),
            exclude_modules: names("exclude_modules"),
            layers_to_transform: one(layers).or_else(many).unwrap_or_default(),
            layers_pattern: pattern.unwrap_or_default(),
            modules_to_save: strings(&settings["modules_to_save"]).unwrap_or_default(),
            ..NewAdapter::default()
        };
        let ours = init::adapter(&config, &new, 1);
        match case["modules"].as_array() {
            None => {
                let error = ours.expect_err(&settings.to_string()).to_string();
                assert!(error.contains('`'), "{error}");
            }
            Some(theirs) => {
                let ours = ours.unwrap_or_else(|error| panic!("{settings}: {error:#}"));
                let ours: Vec<&str> = ours.tensors.keys().map(String::as_str).collect();
                let mut theirs: Vec<&str> = theirs.iter().filter_map(Value::as_str).collect();
                theirs.sort_unstable();
                assert_eq!(ours, theirs, "{settings}");
            }
        }
    }
}
