//! Tests of the families.

use proptest::prelude::*;

use super::*;
use crate::ml::model::arch::{LayerArch, Quantization, RopeScaling};
use candle_core::DType;

#[test]
fn both_spellings_say_the_same() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/model");
    let new = Arch::read(&golden).unwrap();
    let text = std::fs::read_to_string(golden.join("config.v4style.json")).unwrap();
    let old = describe(&serde_json::from_str(&text).unwrap()).unwrap();
    assert_eq!(new, old);
    assert!((new.ropes[0].theta - 500_000.).abs() < 1e-9);
    assert_eq!(new.dtype, Some(DType::F32));
    assert_eq!(new.eos_token_ids, [1019]);
}

fn golden_with(changes: &[(&str, Value)]) -> anyhow::Result<Arch> {
    let text = include_str!("../../../../tests/golden/model/config.json");
    let mut config: Value = serde_json::from_str(text).unwrap();
    for (name, value) in changes {
        config[*name] = value.clone();
    }
    describe(&config)
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    for (name, value, expected) in [
        (
            "model_type",
            json!("mamba2"),
            "one of `llama`, `mistral`, `qwen2`, `qwen3`",
        ),
        ("is_causal", json!(false), "`is_causal` is false"),
        (
            "per_layer_config",
            json!({"0": {"intermediate_size": 8}}),
            "`per_layer_config`",
        ),
        (
            "transformers_weights",
            json!("other.safetensors"),
            "`transformers_weights`",
        ),
        ("hidden_act", json!("gelu"), "`gelu`"),
        (
            "rope_parameters",
            json!({"rope_type": "yarn", "rope_theta": 1e4}),
            "`yarn`",
        ),
        ("model_type", json!(null), "`model_type` is missing"),
        ("hidden_act", json!(null), "`hidden_act`"),
        ("attention_bias", json!(1), "`attention_bias` is 1"),
        (
            "tie_word_embeddings",
            json!("true"),
            "`tie_word_embeddings`",
        ),
        ("num_attention_heads", json!(6), "no multiple of the 6"),
        (
            "partial_rotary_factor",
            json!(0.5),
            "`partial_rotary_factor`",
        ),
        ("attention_dropout", json!("0.1"), "`attention_dropout`"),
        ("rms_norm_eps", json!(-1), "`rms_norm_eps`"),
        (
            "rope_parameters",
            json!({"rope_theta": 1e4, "factor": 4.0}),
            "has `factor`",
        ),
        (
            "rope_parameters",
            json!({"rope_type": null, "rope_theta": 1e4}),
            "`rope_type` is null",
        ),
        ("rope_scaling", json!({"type": "linear"}), "`linear`"),
        (
            "rope_parameters",
            json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "mscale": 0.7}),
            "has `mscale`",
        ),
        ("rope_scaling", json!([1]), "expected an object"),
        (
            "rope_parameters",
            json!({"rope_theta": "1e4"}),
            "`rope_theta` is \"1e4\"",
        ),
        (
            "rope_parameters",
            json!({"rope_type": "llama3", "rope_theta": 1e4}),
            "`factor`",
        ),
        ("num_key_value_heads", json!(3), "3 key heads"),
        ("head_dim", json!(15), "even number"),
        ("head_dim", json!(1 << 23), "`head_dim`"),
        (
            "num_hidden_layers",
            json!(4_000_000_000u64),
            "`num_hidden_layers`",
        ),
        (
            "num_hidden_layers",
            json!(1u64 << 62),
            "`num_hidden_layers`",
        ),
        ("vocab_size", json!(1u64 << 62), "`vocab_size`"),
        ("hidden_size", json!(u64::MAX), "`hidden_size`"),
        ("hidden_size", json!(4_000_000_000u64), "`hidden_size`"),
        (
            "intermediate_size",
            json!(1u64 << 31),
            "`intermediate_size`",
        ),
        ("vocab_size", json!(-1), "`vocab_size`"),
        ("vocab_size", json!(1u64 << 40), "`vocab_size`"),
        ("hidden_size", json!(null), "`hidden_size`"),
        ("eos_token_id", json!(["a"]), "`eos_token_id`"),
        ("bos_token_id", json!(1.5), "`bos_token_id`"),
        (
            "quantization_config",
            json!({"quant_method": "gptq", "bits": 4}),
            "`gptq`",
        ),
        (
            "quantization_config",
            json!({"quant_method": "bitsandbytes", "load_in_8bit": true}),
            "8 bits",
        ),
        (
            "quantization_config",
            json!({"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "fp4"}),
            "fp4",
        ),
    ] {
        let error = golden_with(&[(name, value.clone())]).expect_err(name);
        assert!(
            error.to_string().contains(expected),
            "{name} {value}: {error}"
        );
    }
}

#[test]
fn many_wide_heads_are_refused() {
    let wide = [
        ("hidden_size", json!(1 << 16)),
        ("num_attention_heads", json!(1 << 16)),
        ("num_key_value_heads", json!(1 << 16)),
        ("head_dim", json!(512)),
    ];
    let error = golden_with(&wide).unwrap_err().to_string();
    assert!(error.contains("33554432 wide, expected"), "{error}");
}

#[test]
fn the_first_llamas_and_many_ends_are_read() {
    let old = golden_with(&[("rope_parameters", Value::Null)]).unwrap();
    assert!((old.ropes[0].theta - 10_000.).abs() < 1e-9);
    let many = golden_with(&[
        ("eos_token_id", json!([1, 2])),
        ("pad_token_id", json!(-1)),
        ("dtype", json!("torch.bfloat16")),
    ])
    .unwrap();
    assert_eq!((many.eos_token_ids, many.pad_token_id), (vec![1, 2], None));
    assert_eq!(many.dtype, Some(DType::BF16));
}

#[test]
fn both_spellings_of_rope_count_as_in_transformers() {
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64});
    let rope = |changes: &[(&str, Value)]| {
        let config = golden_with(changes).unwrap();
        let original = match &config.ropes[0].scaling {
            Some(RopeScaling::Llama3(rope)) => Some(rope.original_max_position_embeddings),
            _ => None,
        };
        (config.ropes[0].theta, original)
    };
    // `rope_scaling` counts, and then not the other's theta.
    assert_eq!(rope(&[("rope_scaling", llama3.clone())]), (1e4, Some(64)));
    let both = [
        ("rope_scaling", llama3.clone()),
        ("rope_theta", json!(7777.0)),
    ];
    assert_eq!(rope(&both), (7777., Some(64)));
    assert_eq!(rope(&[("rope_scaling", json!({}))]), (5e5, None));
    let inside = json!({"rope_type": "default", "rope_theta": 5.0});
    let both = [("rope_parameters", inside), ("rope_theta", json!(123.0))];
    assert_eq!(rope(&both), (5., None));
    let bare = ("rope_parameters", json!({"rope_type": "default"}));
    assert_eq!(
        rope(&[bare.clone(), ("rope_theta", json!(123))]),
        (123., None)
    );
    assert_eq!(rope(&[bare]), (1e4, None));
    let top = ("original_max_position_embeddings", json!(128));
    assert_eq!(
        rope(&[("rope_scaling", llama3.clone()), top]),
        (1e4, Some(128))
    );
    let mut short = llama3;
    short
        .as_object_mut()
        .unwrap()
        .remove("original_max_position_embeddings");
    assert_eq!(rope(&[("rope_scaling", short)]), (1e4, Some(512)));
    let neutral =
        json!({"rope_type": "default", "rope_theta": 1e4, "factor": 1.0, "attention_factor": null});
    assert_eq!(rope(&[("rope_parameters", neutral)]), (1e4, None));
    let other = [
        ("hidden_act", json!("swish")),
        ("attention_dropout", json!(0.1)),
    ];
    assert!((golden_with(&other).unwrap().attention_dropout - 0.1).abs() < 1e-12);
}

#[test]
fn keys_of_other_model_types_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let text = include_str!("../../../../tests/golden/model/config.json");
    let mut config: Value = serde_json::from_str(text).unwrap();
    for (name, value) in [
        ("sliding_window", json!(4096)),
        ("logit_scale", json!(0.25)),
        ("residual_multiplier", json!(1.0)),
        ("use_qk_norm", json!(false)),
        ("num_experts", json!(null)),
    ] {
        config[name] = value;
    }
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    assert_eq!(
        without_effect(folder.path()).unwrap(),
        ("llama", vec!["logit_scale", "sliding_window"])
    );
}

#[test]
fn a_quantised_model_says_so() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/model_nf4");
    let config = Arch::read(&folder).unwrap();
    let expected = Quantization {
        double_quant: true,
        compute_dtype: Some(DType::F32),
    };
    assert_eq!(config.quantization, Some(expected));
    assert_eq!(golden_with(&[]).unwrap().quantization, None);
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in ".{0,60}", key in 0usize..8, number in any::<i64>()) {
        let _ = serde_json::from_str(&text).map(|value: Value| describe(&value));
        let key = ["vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
            "eos_token_id", "rope_theta", "max_position_embeddings"][key];
        let _ = golden_with(&[(key, json!(number))]);
    }
}

/// A config.json of transformers' own defaults for a family, with the sizes of the golden model.
fn described(family: &str, changes: &[(&str, Value)]) -> anyhow::Result<Arch> {
    let mut config = json!({
        "model_type": family, "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 32,
    });
    for (name, value) in changes {
        config[*name] = value.clone();
    }
    describe(&config)
}

fn windows(family: &str, changes: &[(&str, Value)]) -> Vec<Option<usize>> {
    let arch = described(family, changes).unwrap();
    arch.layers.iter().map(|layer| layer.window).collect()
}

/// What transformers 5.23's configuration classes take where a file is silent.
#[test]
fn defaults_are_those_of_each_family() {
    for (family, keys, width, length, window) in [
        ("llama", 32, 2, 2048, None),
        ("qwen2", 32, 2, 32_768, None),
        ("qwen3", 32, 128, 32_768, None),
        ("mistral", 8, 2, 131_072, Some(4096)),
    ] {
        let arch = described(family, &[]).unwrap();
        assert_eq!(arch.family, family);
        assert_eq!(arch.num_key_value_heads, keys, "{family}");
        assert_eq!(arch.head_dim, width, "{family}");
        assert_eq!(arch.max_position_embeddings, length, "{family}");
        assert_eq!(
            arch.layers,
            vec![
                LayerArch {
                    window,
                    ..LayerArch::default()
                };
                3
            ],
            "{family}"
        );
        assert!(
            (arch.ropes[0].theta - 1e4).abs() < 1e-9 && (arch.rms_norm_eps - 1e-6).abs() < 1e-18
        );
        assert!(!arch.tie_word_embeddings);
        let null = [("num_key_value_heads", Value::Null)];
        assert_eq!(described(family, &null).unwrap().num_key_value_heads, 32);
    }
    assert!(described("qwen3", &[("head_dim", Value::Null)]).is_err());
    // Only Llama refuses heads that don't divide the width.
    let odd = [("hidden_size", json!(72)), ("head_dim", json!(4))];
    assert!(described("llama", &odd).is_err());
    for family in ["qwen2", "qwen3", "mistral"] {
        assert_eq!(described(family, &odd).unwrap().head_dim, 4);
    }
}

#[test]
fn windows_are_where_transformers_has_them() {
    let null = ("sliding_window", Value::Null);
    assert_eq!(windows("mistral", std::slice::from_ref(&null)), [None; 3]);
    let some = ("sliding_window", json!(7));
    assert_eq!(
        windows("mistral", std::slice::from_ref(&some)),
        [Some(7); 3]
    );
    for family in ["qwen2", "qwen3"] {
        let on = ("use_sliding_window", json!(true));
        assert_eq!(windows(family, std::slice::from_ref(&some)), [None; 3]);
        let upper = ("max_window_layers", json!(2));
        let found = windows(family, &[on.clone(), some.clone(), upper.clone()]);
        assert_eq!(found, [None, None, Some(7)]);
        assert_eq!(windows(family, &[on.clone(), some.clone()]), [None; 3]);
        let found = windows(family, &[on.clone(), upper.clone()]);
        assert_eq!(found, [None, None, Some(4096)]);
        let found = windows(family, &[on.clone(), upper, null.clone()]);
        assert_eq!(found, [None; 3]);
        let types = |types: Value| ("layer_types", types);
        let mixed = types(json!(["sliding_attention", "attention", "full_attention"]));
        let found = windows(family, &[on.clone(), some.clone(), mixed.clone()]);
        assert_eq!(found, [Some(7), None, None]);
        for (changes, expected) in [
            (vec![mixed], "give no window"),
            (vec![types(json!(["full_attention"]))], "has 1 entries"),
            (
                vec![types(json!([
                    "full_attention",
                    "full_attention",
                    "linear_attention"
                ]))],
                "\"linear_attention\"",
            ),
            (
                vec![on.clone(), ("sliding_window", json!(0))],
                "`sliding_window`",
            ),
            (
                vec![("max_window_layers", json!(-1))],
                "`max_window_layers`",
            ),
        ] {
            let error = described(family, &changes).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}

#[test]
fn what_is_written_is_what_is_read() {
    for family in FAMILIES {
        let mut arch = described(family.model_type, &[]).unwrap();
        let read = |arch: &Arch| describe(&Value::Object(config_keys(arch).unwrap())).unwrap();
        assert_eq!(read(&arch), arch, "{}", family.model_type);
        arch.layers = vec![
            LayerArch {
                window: Some(5),
                ..LayerArch::default()
            };
            3
        ];
        arch.attention_dropout = 0.25;
        arch.eos_token_ids = vec![3, 4];
        let whole = complete(&arch);
        assert_eq!(whole.is_ok(), family.has_windows(), "{}", family.model_type);
        if let Ok(whole) = whole {
            assert_eq!(read(&whole), whole, "{}", family.model_type);
            assert!(
                whole.layers.contains(&LayerArch {
                    window: Some(5),
                    rope: whole.layers[0].rope,
                }) || family.model_type == "smollm3"
            );
        }
    }
}

#[test]
fn each_family_tells_of_the_keys_that_it_does_not_know() {
    let folder = tempfile::tempdir().unwrap();
    let told = |family: &str| {
        let config = json!({"model_type": family, "sliding_window": 7, "attention_bias": true, "layer_types": ["full_attention"]});
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        without_effect(folder.path()).unwrap().1
    };
    assert_eq!(told("llama"), ["layer_types", "sliding_window"]);
    assert_eq!(told("qwen2"), ["attention_bias"]);
    assert!(told("qwen3").is_empty());
    assert_eq!(told("mistral"), ["attention_bias", "layer_types"]);
}
