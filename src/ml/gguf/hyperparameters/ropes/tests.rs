//! Rotary embeddings as llama.cpp reads them, and what it would compute in another way.

use serde_json::{Value as Json, json};

use super::super::{Hyperparameters, hyperparameters};
use super::*;

/// The keys of a small model with what `own` adds or replaces.
fn model(model_type: &str, own: &Json) -> Json {
    let mut config = json!({
        "model_type": model_type,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 128,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": model_type.starts_with("gemma"),
    });
    let all = config.as_object_mut().unwrap();
    if model_type == "gemma3_text" {
        all.insert("query_pre_attn_scalar".into(), json!(16));
    }
    all.extend(own.as_object().unwrap().clone());
    config
}

fn made(model_type: &str, own: &Json) -> anyhow::Result<Hyperparameters> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    std::fs::write(path, model(model_type, own).to_string()).unwrap();
    let arch = Arch::read(folder.path()).unwrap();
    hyperparameters(GgufArch::by_model_type(model_type).unwrap(), &arch)
}

fn number(made: &Hyperparameters, name: &str) -> Option<f64> {
    let found = made.keys.iter().find(|(key, _)| key.ends_with(name))?;
    match &found.1 {
        Value::F32(number) => Some(f64::from(*number)),
        Value::U32(number) => Some(f64::from(*number)),
        other => panic!("{name} is {other:?}"),
    }
}

fn refused(model_type: &str, own: &Json) -> String {
    made(model_type, own).unwrap_err().to_string()
}

#[test]
fn yarn_has_the_factor_that_llama_cpp_multiplies_by() {
    let yarn = |own: &Json| {
        let mut scaling =
            json!({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512});
        let keys = own.as_object().unwrap().clone();
        scaling.as_object_mut().unwrap().extend(keys);
        json!({ "rope_scaling": scaling })
    };
    // llama.cpp's own, and OLMo 3's, which is the same.
    let usual = 1. + 0.1 * 8f64.ln();
    for own in [json!({}), json!({"attention_factor": usual})] {
        let made = made("qwen3", &yarn(&own)).unwrap();
        assert_eq!(number(&made, "rope.scaling.factor"), Some(8.));
        assert_eq!(number(&made, "original_context_length"), Some(512.));
        assert_eq!(number(&made, "attn_factor"), None);
    }
    let made = made("qwen3", &yarn(&json!({"attention_factor": 1.5}))).unwrap();
    let own = number(&made, "qwen3.rope.scaling.attn_factor").unwrap();
    assert!((own * usual - 1.5).abs() < 1e-6, "{own}");
    assert_eq!(number(&made, "yarn_attn_factor"), None);
    let error = refused("qwen3", &yarn(&json!({"truncate": false})));
    assert!(error.contains("truncate"), "{error}");
    let error = refused("qwen3", &yarn(&json!({"beta_fast": 16.0})));
    assert!(error.contains("beta_fast"), "{error}");
}

#[test]
fn factors_go_where_llama_cpp_reads_them() {
    let scaling = json!({"rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256,
    }});
    let llama = made("llama", &scaling).unwrap();
    assert_eq!(llama.tensors[0].0, "rope_freqs.weight");
    assert_eq!(llama.tensors[0].1.len(), 8);
    let error = refused("qwen3", &scaling);
    assert!(
        error.contains("`qwen3`") && error.contains("llama3"),
        "{error}"
    );
    let long = json!({"rope_scaling": {
        "rope_type": "longrope", "short_factor": vec![1.0; 8], "long_factor": vec![2.5; 8], "original_max_position_embeddings": 1024,
    }});
    for model_type in ["llama", "granite"] {
        let made = made(model_type, &long).unwrap();
        assert_eq!(made.tensors[0], ("rope_factors_long.weight", vec![2.5; 8]));
        assert_eq!(made.tensors[1], ("rope_factors_short.weight", vec![1.; 8]));
        let factor = number(&made, "rope.scaling.attn_factor").unwrap();
        let expected = (1. + 4f64.ln() / 1024f64.ln()).sqrt();
        assert!((factor - expected).abs() < 1e-6);
        assert!(
            made.warnings
                .iter()
                .any(|warning| warning.contains("1024 tokens"))
        );
    }
    let error = refused("smollm3", &long);
    assert!(
        error.contains("`smollm3`") && error.contains("longrope"),
        "{error}"
    );
}

#[test]
fn layers_with_a_window_rotate_as_llama_cpp_does_it_or_are_refused() {
    let ropes = |full: &Json, sliding: &Json| json!({"sliding_window": 16, "rope_parameters": {"full_attention": full, "sliding_attention": sliding}});
    let plain = |theta: f64| json!({"rope_type": "default", "rope_theta": theta});
    let linear = json!({"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4});
    let gemma = made("gemma3_text", &ropes(&plain(1e6), &plain(1e4))).unwrap();
    assert_eq!(number(&gemma, "freq_base"), Some(1e6));
    assert_eq!(number(&gemma, "freq_base_swa"), Some(1e4));
    made("olmo3", &ropes(&linear, &plain(1e4))).unwrap();
    let error = refused("olmo3", &ropes(&plain(5e5), &plain(1e4)));
    assert!(
        error.contains("500000") && error.contains("10000"),
        "{error}"
    );
    for model_type in ["gemma3_text", "olmo3"] {
        let error = refused(model_type, &ropes(&plain(1e4), &linear));
        assert!(error.contains("does not scale"), "{error}");
    }
    let yarn = json!({"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4, "original_max_position_embeddings": 512, "attention_factor": 1.5});
    made("olmo3", &ropes(&yarn, &plain(1e4))).unwrap();
    let error = refused("gemma3_text", &ropes(&yarn, &plain(1e4)));
    assert!(error.contains("attention_factor"), "{error}");
}

#[test]
fn what_llama_cpp_would_not_open_is_refused() {
    for model_type in ["gemma", "gemma2"] {
        let error = refused(model_type, &json!({"tie_word_embeddings": false}));
        assert!(error.contains("tie_word_embeddings: false"), "{error}");
    }
    let error = refused("olmo2", &json!({"tie_word_embeddings": true}));
    assert!(error.contains("tie_word_embeddings: true"), "{error}");
    let error = refused("qwen2", &json!({"head_dim": 8}));
    assert!(error.contains("32 wide in place of 64"), "{error}");
    let error = refused("gemma2", &json!({"final_logit_softcapping": null}));
    assert!(error.contains("soft-caps"), "{error}");
    let gemma = made("gemma", &json!({})).unwrap();
    assert_eq!(number(&gemma, "gemma.attention.key_length"), Some(16.));
}
