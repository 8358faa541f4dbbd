//! Tests of the families with the keys of their published models, in the spellings of transformers 4 and 5.

use proptest::prelude::*;

use super::*;
use crate::ml::model::arch::{LongRopeScaling, RopeScaling, YarnScaling};

fn read(config: &Value) -> Arch {
    describe(config).unwrap()
}

/// What is written of a description is read as the same description.
fn is_kept(arch: &Arch) {
    let mut keys = config_keys(arch).unwrap();
    if let Some(float) = arch.dtype.and_then(Float::from_candle) {
        keys.insert("torch_dtype".into(), float.name().into());
    }
    assert_eq!(read(&Value::Object(keys)), *arch);
}

fn windows(arch: &Arch) -> Vec<usize> {
    let windows = arch.layers.iter().map(|layer| layer.window.unwrap_or(0));
    windows.collect()
}

fn ropes(arch: &Arch) -> Vec<Option<usize>> {
    arch.layers.iter().map(|layer| layer.rope).collect()
}

fn near(a: f64, b: f64) {
    assert!((a - b).abs() <= 1e-9 * b.abs(), "{a} {b}");
}

#[test]
fn smollm3_leaves_every_fourth_layer_unrotated() {
    let config = json!({
        "model_type": "smollm3", "attention_bias": false, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 11008,
        "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": false, "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0, 1], "num_attention_heads": 16, "num_hidden_layers": 5, "num_key_value_heads": 4,
        "pretraining_tp": 2, "rms_norm_eps": 1e-6, "rope_scaling": null, "rope_theta": 5e6, "sliding_window": null,
        "torch_dtype": "bfloat16", "use_sliding_window": false, "vocab_size": 128_256,
    });
    let arch = read(&config);
    assert_eq!(ropes(&arch), [Some(0), Some(0), Some(0), None, Some(0)]);
    assert!(arch.tie_word_embeddings && windows(&arch) == [0; 5]);
    near(arch.ropes[0].theta, 5e6);
    is_kept(&arch);
    let mut bare = config;
    for key in ["no_rope_layers", "rope_theta"] {
        bare.as_object_mut().unwrap().remove(key);
    }
    let arch = read(&bare);
    assert_eq!(ropes(&arch), [Some(0), Some(0), Some(0), None, Some(0)]);
    near(arch.ropes[0].theta, 2e6);
    bare["no_rope_layers"] = json!([1, 0]);
    let error = describe(&bare).unwrap_err().to_string();
    assert!(error.contains("`no_rope_layers` has 2 entries"), "{error}");
}

#[test]
fn granite_has_four_factors() {
    let arch = read(&json!({
        "model_type": "granite", "attention_bias": false, "attention_multiplier": 0.015_625, "embedding_multiplier": 12.0,
        "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192, "logits_scaling": 8.0, "max_position_embeddings": 131_072,
        "mlp_bias": false, "num_attention_heads": 32, "num_hidden_layers": 2, "num_key_value_heads": 8, "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-5, "rope_scaling": null, "rope_theta": 1e7, "tie_word_embeddings": true, "vocab_size": 49_159,
    }));
    near(arch.score_scale, 1. / 64.);
    near(arch.embedding_scale, 12.);
    near(arch.residual_scale, 0.22);
    near(arch.logit_scale, 0.125);
    is_kept(&arch);
}

fn gemma3() -> Value {
    json!({
        "model_type": "gemma3_text", "_sliding_window_pattern": 6, "attention_bias": false, "attn_logit_softcapping": null,
        "final_logit_softcapping": null, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 640,
        "intermediate_size": 2048, "max_position_embeddings": 32_768, "num_attention_heads": 4, "num_hidden_layers": 7,
        "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_local_base_freq": 10_000.0,
        "rope_scaling": null, "rope_theta": 1_000_000.0, "sliding_window": 512, "use_bidirectional_attention": false,
        "torch_dtype": "bfloat16", "vocab_size": 262_144,
    })
}

#[test]
fn gemma_3_has_two_rotary_embeddings_and_rounds_its_scale() {
    let arch = read(&gemma3());
    assert_eq!(windows(&arch), [512, 512, 512, 512, 512, 0, 512]);
    assert_eq!(ropes(&arch)[4..], [Some(1), Some(0), Some(1)]);
    near(arch.ropes[0].theta, 1e6);
    near(arch.ropes[1].theta, 1e4);
    // The square root of 640, 25.298, in bfloat16.
    near(arch.embedding_scale, 25.25);
    assert_eq!(
        (arch.qk_norm, arch.norm_places),
        (QkNorm::PerHead, NormPlaces::Both)
    );
    assert!(arch.norm_adds_one && arch.tie_word_embeddings && arch.pad_token_id == Some(0));
    near(arch.score_scale, 1. / 16.);
    is_kept(&arch);
    let mut new = gemma3();
    for key in ["rope_scaling", "rope_theta", "rope_local_base_freq"] {
        new.as_object_mut().unwrap().remove(key);
    }
    new["rope_parameters"] = json!({
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    });
    let scaled = read(&new);
    assert_eq!(
        scaled.ropes[0].scaling,
        Some(RopeScaling::Linear { factor: 8. })
    );
    assert_eq!(scaled.ropes[1], arch.ropes[1]);
    is_kept(&scaled);
    let mut old = gemma3();
    old["rope_scaling"] = json!({"rope_type": "linear", "factor": 8.0});
    assert_eq!(read(&old).ropes, scaled.ropes);
}

#[test]
fn what_gemma_3_does_not_compute_is_refused_by_name() {
    for (key, value, expected) in [
        ("use_bidirectional_attention", json!(true), "later tokens"),
        ("attn_logit_softcapping", json!(50.0), "expected null"),
        (
            "sliding_window_pattern",
            json!(0),
            "`sliding_window_pattern`",
        ),
        ("sliding_window", json!(null), "give no window"),
        (
            "query_pre_attn_scalar",
            json!(-1),
            "`query_pre_attn_scalar` is -1",
        ),
        (
            "rope_parameters",
            json!({"rope_type": "default"}),
            "no type of layer",
        ),
        (
            "rope_parameters",
            json!({"full_attention": 1}),
            "expected an object",
        ),
        ("hidden_activation", json!("relu"), "`relu`"),
        ("model_type", json!("gemma3"), "its vision part"),
        ("model_type", json!("qwen3_moe"), "its mixture of experts"),
    ] {
        let mut config = gemma3();
        config[key] = value;
        let error = format!("{:#}", describe(&config).unwrap_err());
        assert!(error.contains(expected), "{key}: {error}");
    }
}

#[test]
fn gemma_2_has_soft_caps_and_windows_in_every_other_layer() {
    let config = json!({
        "model_type": "gemma2", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "intermediate_size": 9216,
        "num_attention_heads": 8, "num_hidden_layers": 3, "num_key_value_heads": 4, "query_pre_attn_scalar": 224,
        "sliding_window": 4096, "vocab_size": 256_000,
    });
    let arch = read(&config);
    assert_eq!(windows(&arch), [4096, 0, 4096]);
    assert_eq!(
        (arch.score_softcap, arch.logit_softcap),
        (Some(50.), Some(30.))
    );
    near(arch.score_scale, 224f64.powf(-0.5));
    near(arch.embedding_scale, 48.);
    is_kept(&arch);
    let mut first = config;
    first["model_type"] = json!("gemma");
    first["hidden_act"] = json!("gelu");
    let first = read(&first);
    assert_eq!(
        (first.activation, first.norm_places),
        (Activation::GeluTanh, NormPlaces::Before)
    );
    is_kept(&first);
}

#[test]
fn olmo_has_norms_after_its_blocks() {
    let config = json!({
        "model_type": "olmo2", "attention_bias": false, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192,
        "max_position_embeddings": 4096, "num_attention_heads": 16, "num_hidden_layers": 5, "num_key_value_heads": 16,
        "rope_scaling": null, "rope_theta": 500_000, "tie_word_embeddings": false, "vocab_size": 100_352,
    });
    let arch = read(&config);
    assert_eq!(
        (arch.qk_norm, arch.norm_places),
        (QkNorm::Whole, NormPlaces::After)
    );
    near(arch.rms_norm_eps, 1e-5);
    is_kept(&arch);
    let mut third = config;
    third["model_type"] = json!("olmo3");
    third["sliding_window"] = json!(4096);
    third["rope_scaling"] = json!({"attention_factor": 1.207_944_154_167_983_6, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
        "original_max_position_embeddings": 8192, "rope_type": "yarn"});
    let third = read(&third);
    assert_eq!(windows(&third), [4096, 4096, 4096, 0, 4096]);
    assert_eq!(ropes(&third)[2..], [Some(1), Some(0), Some(1)]);
    let yarn = YarnScaling {
        factor: 8.,
        attention_factor: 1.207_944_154_167_983_6,
        beta_fast: 32.,
        beta_slow: 1.,
        original_max_position_embeddings: 8192,
        truncate: true,
    };
    assert_eq!(third.ropes[0].scaling, Some(RopeScaling::Yarn(yarn)));
    assert_eq!(third.ropes[1].scaling, None);
    is_kept(&third);
}

#[test]
fn phi_3_fuses_its_projections_and_rotates_a_part_of_each_head() {
    let factors = |first: f64| -> Vec<f64> { (0..48).map(|at| first + f64::from(at)).collect() };
    let config = json!({
        "model_type": "phi3", "attention_bias": false, "attention_dropout": 0.0, "embd_pdrop": 0.0, "hidden_act": "silu",
        "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 131_072, "num_attention_heads": 24,
        "num_hidden_layers": 2, "num_key_value_heads": 8, "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75,
        "resid_pdrop": 0.0, "rms_norm_eps": 1e-5,
        "rope_scaling": {"long_factor": factors(1.), "short_factor": factors(0.5), "type": "longrope"},
        "rope_theta": 10_000.0, "sliding_window": 262_144, "tie_word_embeddings": true, "vocab_size": 200_064,
    });
    let arch = read(&config);
    assert!(arch.fused_projections);
    assert_eq!((arch.head_dim, arch.rotary_dim), (128, 96));
    assert_eq!(arch.shape(Projection::Qkv), (3072 + 2 * 1024, 3072));
    let long = LongRopeScaling {
        short_factor: factors(0.5),
        long_factor: factors(1.),
        attention_factor: (1. + 32f64.ln() / 4096f64.ln()).sqrt(),
        original_max_position_embeddings: 4096,
    };
    assert_eq!(arch.ropes[0].scaling, Some(RopeScaling::LongRope(long)));
    is_kept(&arch);
    let mut old = config.clone();
    old["rope_scaling"]["type"] = json!("su");
    assert_eq!(read(&old), arch);
    for (key, value, expected) in [
        ("resid_pdrop", json!(0.1), "`resid_pdrop`"),
        (
            "partial_rotary_factor",
            json!(0.5),
            "48 factors, expected 32",
        ),
        ("partial_rotary_factor", json!(1.5), "at most 1"),
        (
            "partial_rotary_factor",
            json!(0.01),
            "expected an even number",
        ),
        (
            "rope_scaling",
            json!({"type": "linear", "factor": 2.0}),
            "`longrope`",
        ),
    ] {
        let mut config = config.clone();
        config[key] = value;
        let error = format!("{:#}", describe(&config).unwrap_err());
        assert!(error.contains(expected), "{key}: {error}");
    }
}

#[test]
fn what_makes_no_rotary_embedding_is_refused() {
    let base = json!({"model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": 512});
    let scaled = |scaling: &Value| {
        let mut config = base.clone();
        config["rope_scaling"] = scaling.clone();
        describe(&config)
    };
    let list = |count: usize| vec![1.5; count];
    for scaling in [
        json!({"rope_type": "linear", "factor": 2.0}),
        json!({"rope_type": "dynamic", "factor": 2.0}),
        json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "truncate": false}),
        json!({"rope_type": "longrope", "long_factor": list(8), "short_factor": list(8), "original_max_position_embeddings": 128}),
    ] {
        is_kept(&scaled(&scaling).unwrap());
    }
    for (scaling, expected) in [
        (
            json!({"rope_type": "linear", "factor": 0.0}),
            "out of range",
        ),
        (json!({"rope_type": "dynamic"}), "is missing"),
        (
            json!({"rope_type": "yarn", "beta_fast": 16}),
            "`factor` of the rope type `yarn` is missing",
        ),
        (
            json!({"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0}),
            "above 1",
        ),
        (
            json!({"rope_type": "proportional"}),
            "`proportional` is not supported",
        ),
        (
            json!({"rope_type": "longrope", "long_factor": list(8)}),
            "`short_factor`",
        ),
        (
            json!({"rope_type": "longrope", "long_factor": list(8), "short_factor": list(7)}),
            "7 factors, expected 8",
        ),
        (
            json!({"rope_type": "longrope", "long_factor": list(8), "short_factor": ["a", 1, 1, 1, 1, 1, 1, 1]}),
            "expected numbers",
        ),
        (
            json!({"rope_type": "longrope", "long_factor": list(8), "short_factor": list(8), "original_max_position_embeddings": 1}),
            "too short",
        ),
        (
            json!({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}),
            "`original_max_position_embeddings`",
        ),
    ] {
        let error = format!("{:#}", scaled(&scaling).unwrap_err());
        assert!(error.contains(expected), "{scaling}: {error}");
    }
}

/// Keys of all families, each of which may have any value.
const KEYS: [&str; 30] = [
    "attention_bias",
    "attention_multiplier",
    "attn_logit_softcapping",
    "dtype",
    "embedding_multiplier",
    "final_logit_softcapping",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "hidden_size",
    "layer_types",
    "logits_scaling",
    "max_position_embeddings",
    "mlp_bias",
    "no_rope_layer_interval",
    "no_rope_layers",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "query_pre_attn_scalar",
    "residual_multiplier",
    "rope_local_base_freq",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "sliding_window_pattern",
    "use_sliding_window",
];

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-3i64..40).prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        Just(json!("yarn")),
        Just(json!("longrope")),
        Just(json!("sliding_attention")),
    ];
    leaf.prop_recursive(3, 24, 6, |inner| {
        let keys = prop_oneof![
            Just("rope_type".to_owned()),
            Just("factor".to_owned()),
            Just("short_factor".to_owned()),
            Just("long_factor".to_owned()),
            Just("full_attention".to_owned()),
            Just("original_max_position_embeddings".to_owned()),
        ];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::btree_map(keys, inner, 0..5)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn any_keys_are_read_or_refused(family in 0..FAMILIES.len(), changes in prop::collection::vec((0..KEYS.len(), any_json()), 0..4)) {
        let mut config = json!({"model_type": FAMILIES[family].model_type, "vocab_size": 64, "hidden_size": 64,
            "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "max_position_embeddings": 512});
        for (key, value) in changes {
            config[KEYS[key]] = value;
        }
        if let Ok(arch) = describe(&config) {
            for rope in 0..arch.ropes.len() {
                let positions = [0usize, 1, 700];
                crate::ml::model::angles(&arch, rope, positions, 701, &candle_core::Device::Cpu).unwrap();
            }
            config_keys(&arch).unwrap();
        }
    }
}
