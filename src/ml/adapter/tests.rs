//! Tests of `adapter`.

use std::fs;

use candle_core::DType;
use serde_json::{Map, Value, json};

use super::patterns::Orders;
use super::*;
use crate::ml::testing::golden;

fn golden_raw() -> Map<String, Value> {
    let text = include_str!("../../../tests/golden/adapter_init/adapter_config.json");
    serde_json::from_str(text).unwrap()
}

#[test]
fn an_adapter_is_written_as_peft_does() {
    let folder = tempfile::tempdir().unwrap();
    let theirs = golden::folder("adapter_init");
    Adapter::load(&theirs).unwrap().save(folder.path()).unwrap();
    let read = |folder: &Path, name: &str| fs::read(folder.join(name)).unwrap();
    assert!(read(folder.path(), FILE) == read(&theirs, FILE));
    // Their order of the modules is that of a set.
    let ours: Value = serde_json::from_slice(&read(folder.path(), CONFIG)).unwrap();
    let mut expected = golden_raw();
    let modules = [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ];
    expected["target_modules"] = json!(modules);
    assert_eq!(ours, Value::Object(expected));

    let again = tempfile::tempdir().unwrap();
    Adapter::load(folder.path())
        .unwrap()
        .save(again.path())
        .unwrap();
    assert!(read(again.path(), CONFIG) == read(folder.path(), CONFIG));
}

#[test]
fn a_new_adapter_has_keys_that_old_and_new_peft_know() {
    let new = NewAdapter {
        lora_alpha: 16.,
        target_modules: Names::List(vec!["q_proj".into()]),
        ..NewAdapter::default()
    };
    let ours = AdapterConfig::new(&new).unwrap();
    // The fields of LoraConfig in PEFT 0.4.0, which refuses all others.
    let known = [
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "modules_to_save",
        "peft_type",
        "r",
        "revision",
        "target_modules",
        "task_type",
    ];
    let mut keys: Vec<&str> = ours.raw.keys().map(String::as_str).collect();
    keys.sort_unstable();
    assert_eq!(keys, known);
    let mut theirs = golden_raw();
    theirs["target_modules"] = json!(["q_proj"]);
    for (key, value) in &ours.raw {
        assert_eq!(*value, theirs[key], "{key}");
    }
    assert!((ours.scaling("q_proj") - 2.).abs() < 1e-12);
    let all = NewAdapter {
        use_rslora: true,
        use_dora: true,
        rank_pattern: vec![("q_proj".into(), 4)],
        alpha_pattern: vec![("q_proj".into(), 2.5)],
        modules_to_save: vec!["lm_head".into()],
        bias: Bias::LoraOnly,
        ..new
    };
    let all = AdapterConfig::new(&all).unwrap();
    assert_eq!(all.raw["alpha_pattern"], json!({"q_proj": 2.5}));
    assert_eq!(all.raw["modules_to_save"], json!(["lm_head"]));
    assert_eq!(all.raw["bias"], "lora_only");
    assert!(all.use_dora && all.saves("lm_head") && !all.saves("model.norm"));
    assert!((all.scaling("model.layers.0.self_attn.q_proj") - 2.5 / 2.).abs() < 1e-12);
    assert!((all.scaling("v_proj") - 16. / 8f64.sqrt()).abs() < 1e-12);
}

#[test]
fn patterns_fit_as_in_peft() {
    // What PEFT's `re.match(rf"(.*\.)?({key})$", path)` says.
    let path = "model.layers.1.self_attn.q_proj";
    for (pattern, matches) in [
        ("q_proj", true),
        ("self_attn.q_proj", true),
        (path, true),
        ("^model.layers.1.self_attn.q_proj", true),
        (r"layers\.[0-4]\..*q_proj", true),
        ("v_proj|q_proj", true),
        ("proj", false),
        ("^q_proj", false),
        ("layers.1", false),
        (r"layers\.[2-4]\..*q_proj", false),
    ] {
        let patterns = Patterns::new([(pattern.to_owned(), 3)]).unwrap();
        assert_eq!(patterns.find(path), matches.then_some(3), "{pattern}");
        let unused = patterns.unused(&[path].into_iter());
        assert_eq!(unused, if matches { vec![] } else { vec![pattern] });
    }
    let two = [("q_proj".to_owned(), 1), (".*".to_owned(), 2)];
    assert_eq!(
        Patterns::new(two).unwrap().find(path),
        Some(1),
        "the first counts"
    );
    let error = Patterns::new([("(".to_owned(), 1)])
        .unwrap_err()
        .to_string();
    assert!(error.contains("`(`"), "{error}");
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    for (name, value) in [
        ("trainable_token_indices", json!([1, 2, 1])),
        ("trainable_token_indices", json!({"q_proj": [1]})),
        ("trainable_token_indices", json!({"lm_head": []})),
        ("trainable_token_indices", json!([-1])),
        ("trainable_token_indices", json!("<tool>")),
        ("lora_bias", json!(true)),
        ("modules_to_save", json!("lm_head")),
        ("modules_to_save", json!([""])),
        ("bias", json!("some")),
        ("rank_pattern", json!({"q_proj": 0})),
        ("rank_pattern", json!({"(q_proj": 4})),
        ("alpha_pattern", json!({"q_proj": "4"})),
        ("loftq", json!({"loftq_bits": 4, "loftq_iter": 5})),
        ("init_lora_weights", json!("pissa_niter_4")),
        ("lora_dropout", json!(1.)),
        ("lora_alpha", json!("16")),
        ("r", json!(0)),
        ("peft_type", json!("LOHA")),
    ] {
        let mut raw = golden_raw();
        if name == "loftq" {
            raw["init_lora_weights"] = json!(name);
            raw["loftq_config"] = value.clone();
        } else {
            raw[name] = value.clone();
        }
        let error = format!(
            "{:#}",
            AdapterConfig::parse(raw, &Orders::default()).expect_err(name)
        );
        let named = error.contains(name) || error.contains("LOHA");
        assert!(named, "{name} {value}: {error}");
    }
    for (name, value) in [
        ("modules_to_save", json!([])),
        ("trainable_token_indices", json!([])),
        (
            "trainable_token_indices",
            json!({"model.embed_tokens": [3, 1]}),
        ),
        ("init_lora_weights", json!("gaussian")),
    ] {
        let mut raw = golden_raw();
        raw[name] = value;
        AdapterConfig::parse(raw, &Orders::default()).unwrap();
    }
}

#[test]
fn tensors_that_make_no_pairs_are_told() {
    let good = "base_model.model.model.layers.0.self_attn.q_proj";
    let tensor = |shape: (usize, usize)| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    for (tensors, expected) in [
        (vec![(format!("{good}.lora_A.weight"), (8, 64))], "has no"),
        (vec![(format!("{good}.lora_B.weight"), (64, 8))], "has no"),
        (
            vec![(format!("{good}.lora_magnitude_vector"), (64, 1))],
            "has no",
        ),
        (
            vec![
                (format!("{good}.lora_A.weight"), (4, 64)),
                (format!("{good}.lora_B.weight"), (64, 4)),
            ],
            "expected the rank 8",
        ),
        (vec![], "has no LoRA matrices"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        fs::copy(
            golden::folder("adapter_init").join(CONFIG),
            folder.path().join(CONFIG),
        )
        .unwrap();
        let tensors = tensors
            .into_iter()
            .map(|(name, shape)| (name, tensor(shape)));
        weights::save(&folder.path().join(FILE), &tensors.collect(), &[]).unwrap();
        let error = format!("{:#}", Adapter::load(folder.path()).unwrap_err());
        assert!(error.contains(expected), "{error}");
    }
}

/// As PEFT saves it: the lengths stand beside matrices that have other names than those of projections.
#[test]
fn lengths_beside_embeddings_are_refused_by_name() {
    for lengths in ["lora_magnitude_vector", "lora_magnitude_vector.weight"] {
        let folder = tempfile::tempdir().unwrap();
        let mut raw = golden_raw();
        raw["use_dora"] = true.into();
        raw["target_modules"] = json!(["embed_tokens"]);
        let raw = Value::from(raw).to_string();
        fs::write(folder.path().join(CONFIG), raw).unwrap();
        let tensors = [
            ("lora_embedding_A", 8),
            ("lora_embedding_B", 64),
            (lengths, 64),
        ];
        let tensors = tensors.map(|(part, rows)| {
            let name = format!("base_model.model.model.embed_tokens.{part}");
            let columns = 72 - rows;
            (
                name,
                Tensor::zeros((rows, columns), DType::F32, &Device::Cpu).unwrap(),
            )
        });
        weights::save(&folder.path().join(FILE), &tensors.into(), &[]).unwrap();
        let error = format!("{:#}", Adapter::load(folder.path()).unwrap_err());
        let told = "`use_dora` beside `model.embed_tokens` is not supported";
        assert!(error.contains(told), "{error}");
    }
}

#[test]
fn settings_and_tensors_have_to_tell_the_same() {
    let fails = |case: &str, key: &str, value: Value, extra: Option<&str>| {
        let folder = tempfile::tempdir().unwrap();
        let theirs = golden::folder("adapters").join(case);
        let mut raw: Value =
            serde_json::from_slice(&fs::read(theirs.join(CONFIG)).unwrap()).unwrap();
        raw[key] = value;
        fs::write(folder.path().join(CONFIG), raw.to_string()).unwrap();
        let mut tensors = golden::tensors(&format!("adapters/{case}/{FILE}"));
        if let Some(name) = extra {
            let tensor = Tensor::zeros(4, DType::F32, &Device::Cpu).unwrap();
            tensors.insert(format!("base_model.model.{name}"), tensor);
        }
        weights::save(&folder.path().join(FILE), &tensors, &[]).unwrap();
        format!("{:#}", Adapter::load(folder.path()).unwrap_err())
    };
    let error = fails("dora", "use_dora", false.into(), None);
    assert!(error.contains("has a `lora_magnitude_vector`"), "{error}");
    let error = fails("plain", "use_dora", true.into(), None);
    assert!(error.contains("lacks a `lora_magnitude_vector`"), "{error}");
    let error = fails("plain", "modules_to_save", json!(["lm_head"]), None);
    assert!(error.contains("no tensor of it"), "{error}");
    let error = fails(
        "rslora_patterns",
        "rank_pattern",
        json!({"v_proj": 4}),
        None,
    );
    assert!(error.contains("expected the rank 4"), "{error}");
    for (name, expected) in [
        ("model.embed_tokens.lora_embedding_A", "no matrix of floats"),
        ("model.norm.running_mean", "is no LoRA matrix"),
        (
            "transformer.h.0.weight",
            "no module of a causal language model",
        ),
        (
            "model.layers.0.self_attn.q_proj.weight",
            "both LoRA matrices and a weight",
        ),
    ] {
        let error = fails("plain", "r", 2.into(), Some(name));
        assert!(error.contains(expected), "{error}");
    }
}

/// A copy of PEFT's folder `plain` with other settings.
fn plain_with(change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let theirs = golden::folder("adapters").join("plain");
    let mut raw: Value = serde_json::from_slice(&fs::read(theirs.join(CONFIG)).unwrap()).unwrap();
    change(&mut raw);
    fs::write(folder.path().join(CONFIG), raw.to_string()).unwrap();
    fs::copy(theirs.join(FILE), folder.path().join(FILE)).unwrap();
    folder
}

#[test]
fn matrices_that_the_settings_do_not_mean_are_refused() {
    for (key, value) in [
        ("target_modules", json!(["q_proj"])),
        ("target_modules", json!(".*q_proj")),
        ("exclude_modules", json!(["down_proj"])),
        ("layers_to_transform", json!([0])),
    ] {
        let folder = plain_with(|raw| raw[key] = value.clone());
        let error = format!("{:#}", Adapter::load(folder.path()).unwrap_err());
        assert!(error.contains("does not mean"), "{key} {value}: {error}");
    }
    for (key, value) in [
        ("target_modules", json!("all-linear")),
        ("target_modules", json!(r".*\.(?!k_proj)\w+_proj")),
        ("layers_to_transform", json!([0, 1])),
        ("exclude_modules", json!([])),
    ] {
        let folder = plain_with(|raw| raw[key] = value.clone());
        Adapter::load(folder.path()).unwrap();
    }
    for (key, value) in [
        ("layers_pattern", json!("layers")),
        ("target_modules", json!("(")),
    ] {
        let folder = plain_with(|raw| raw[key] = value);
        let error = format!("{:#}", Adapter::load(folder.path()).unwrap_err());
        assert!(error.contains(key), "{error}");
    }
}

#[test]
fn a_folder_of_an_old_peft_gets_no_keys_that_it_would_refuse() {
    // The fields of LoraConfig in PEFT 0.4.0.
    let known: Vec<String> = AdapterConfig::new(&NewAdapter {
        target_modules: Names::List(vec!["q_proj".into()]),
        ..NewAdapter::default()
    })
    .unwrap()
    .raw
    .keys()
    .cloned()
    .collect();
    let folder = plain_with(|raw| {
        raw.as_object_mut()
            .unwrap()
            .retain(|key, _| known.contains(key));
    });
    let out = tempfile::tempdir().unwrap();
    Adapter::load(folder.path())
        .unwrap()
        .save(out.path())
        .unwrap();
    let keys = |folder: &Path| -> Vec<String> {
        let raw: Map<String, Value> =
            serde_json::from_slice(&fs::read(folder.join(CONFIG)).unwrap()).unwrap();
        raw.keys().cloned().collect()
    };
    assert_eq!(keys(out.path()), keys(folder.path()));
    assert_eq!(keys(out.path()).len(), known.len());
    // Settings of a later one stay, and are told where they say something.
    let folder = plain_with(|raw| {
        raw["use_wings"] = json!(3);
        raw["use_tail"] = json!(null);
    });
    let adapter = Adapter::load(folder.path()).unwrap();
    assert_eq!(adapter.config.unknown().collect::<Vec<_>>(), ["use_wings"]);
    adapter.save(out.path()).unwrap();
    assert!(keys(out.path()).contains(&"use_tail".to_owned()));
}

#[test]
fn patterns_keep_the_order_of_the_file() {
    let text = r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["v_proj"],
        "alpha_pattern": {"v_proj": 2, "layers.1.self_attn.v_proj": 64, "v_proj": 3}, "rank_pattern": {"z": 1, "a": 2}}"#;
    let config = AdapterConfig::read(text.as_bytes()).unwrap();
    // Of two equal keys the last value counts, at the place of the first.
    let path = "model.layers.1.self_attn.v_proj";
    assert!((config.scaling(path) - 3. / 4.).abs() < 1e-12);
    let written = config.json().unwrap();
    let places = [
        "\"v_proj\": 3",
        "layers.1.self_attn",
        "\"rank_pattern\"",
        "\"z\"",
        "\"a\"",
    ];
    let places = places.map(|text| {
        written
            .find(text)
            .unwrap_or_else(|| panic!("{text} in {written}"))
    });
    assert!(places.is_sorted(), "{written}");
    let again = AdapterConfig::read(written.as_bytes()).unwrap();
    assert_eq!(again, config);
    let swapped = text.replace(r#"{"z": 1, "a": 2}"#, r#"{"a": 2, "z": 1}"#);
    assert_ne!(AdapterConfig::read(swapped.as_bytes()).unwrap(), config);
}

#[test]
fn whole_modules_are_meant_by_letters_as_in_peft() {
    let path = "model.layers.0.post_attention_layernorm";
    for (name, means) in [("norm", true), ("layernorm", true), ("layers.0", true)] {
        assert_eq!(names_module(name, path), means, "{name}");
    }
    assert!(!names_module("post_attention", path) && !names_module("input_layernorm", path));
    assert!(names_module("mlp", "model.layers.1.mlp.up_proj"));
}
