//! shim config
use anyhow::Context as _;
use candle_core::DType;
use std::path::Path;

#[derive(Debug, Clone, PartialEq)]
pub struct Llama3Rope {
    pub factor: f64,
    pub low_freq_factor: f64,
    pub high_freq_factor: f64,
    pub original_max_position_embeddings: usize,
}
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    pub rope_scaling: Option<Llama3Rope>,
    pub max_position_embeddings: usize,
    pub tie_word_embeddings: bool,
    pub bos_token_id: Option<u32>,
    pub eos_token_ids: Vec<u32>,
    pub pad_token_id: Option<u32>,
    pub dtype: Option<DType>,
}
impl LlamaConfig {
    pub fn read(dir: &Path) -> anyhow::Result<Self> {
        let v: serde_json::Value =
            serde_json::from_slice(&std::fs::read(dir.join("config.json"))?)?;
        let u = |n: &str| {
            v[n].as_u64()
                .map(|x| x as usize)
                .with_context(|| n.to_owned())
        };
        let heads = u("num_attention_heads")?;
        let hidden = u("hidden_size")?;
        Ok(Self {
            vocab_size: u("vocab_size")?,
            hidden_size: hidden,
            intermediate_size: u("intermediate_size")?,
            num_hidden_layers: u("num_hidden_layers")?,
            num_attention_heads: heads,
            num_key_value_heads: u("num_key_value_heads")?,
            head_dim: u("head_dim").unwrap_or(hidden / heads),
            rms_norm_eps: v["rms_norm_eps"].as_f64().unwrap_or(1e-5),
            rope_theta: v["rope_theta"]
                .as_f64()
                .or(v["rope_parameters"]["rope_theta"].as_f64())
                .unwrap_or(1e4),
            rope_scaling: None,
            max_position_embeddings: 512,
            tie_word_embeddings: v["tie_word_embeddings"].as_bool().unwrap_or(false),
            bos_token_id: None,
            eos_token_ids: v["eos_token_id"]
                .as_u64()
                .map(|x| x as u32)
                .into_iter()
                .collect(),
            pad_token_id: v["pad_token_id"].as_u64().map(|x| x as u32),
            dtype: None,
        })
    }
}
