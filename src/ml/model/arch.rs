//! What a model computes: dimensions and switches, read from `config.json` by one of the [`super::families`].
//!
//! A decoder layer is `x + attention(norm(x))`, then `x + down(silu(gate(n)) * up(n))` with `n = norm(x)`. [`Arch`] says which of
//! the variations on it a model has. Whatever a family's files can ask for beside them is refused by name when they are read.
//!
//! Where the switches of further families go:
//!
//! - what differs from layer to layer (a second rotary table or none, experts): a field of [`LayerArch`];
//! - a norm over the whole width of q and k: a variant of [`QkNorm`];
//! - factors (embedding, residual, score and logit scales), soft-caps, the gate's activation, norms behind the blocks, the share
//!   of a head that is rotated: a field of [`Arch`];
//! - norms that multiply by `1 + w`: folded into the weight where it is loaded;
//! - fused projections (`qkv_proj`): [`Projection`] and the table of tensors, `super::tensors`.
//!
//! A field that an execution does not compute must make its `supports` say no.

use candle_core::DType;

/// What a model computes, and what `config.json` says beside it.
#[derive(Debug, Clone, PartialEq)]
pub struct Arch {
    /// The family's `model_type` (`llama`).
    pub family: &'static str,
    /// Token ids; the rows of the embeddings and of the head.
    pub vocab_size: usize,
    /// The width of the hidden states.
    pub hidden_size: usize,
    /// The width inside the feed-forward block.
    pub intermediate_size: usize,
    /// The decoder layers, from the bottom.
    pub layers: Vec<LayerArch>,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads, each shared by `num_attention_heads / num_key_value_heads` query heads.
    pub num_key_value_heads: usize,
    /// The width of a head, an even number. `num_attention_heads * head_dim` may differ from `hidden_size`.
    pub head_dim: usize,
    /// Added to the mean square in every RMS norm, those of q and k included.
    pub rms_norm_eps: f64,
    /// The rotary embedding of all layers.
    pub rope: Rope,
    /// The norm of queries and keys before the rotary embedding.
    pub qk_norm: QkNorm,
    /// The projections that add a bias, in the order of [`Projection::ALL`].
    pub biases: Vec<Projection>,
    /// Whether the head is the embeddings.
    pub tie_word_embeddings: bool,

    /// The longest sequence that the model was made for; nothing is computed from it.
    pub max_position_embeddings: usize,
    /// The probability of dropping an attention weight in training. Above 0 it is refused by trainings.
    pub attention_dropout: f64,
    /// The first id of a text.
    pub bos_token_id: Option<u32>,
    /// The ids that end a text.
    pub eos_token_ids: Vec<u32>,
    /// The id that pads batches; its embedding gets no gradient, as in torch's `padding_idx`.
    pub pad_token_id: Option<u32>,
    /// The dtype that the weights are meant to have.
    pub dtype: Option<DType>,
    /// How the weights are quantised, if they are.
    pub quantization: Option<Quantization>,
}

/// What may differ from layer to layer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LayerArch {
    /// The number of keys that a query sees, its own included: the query at position i sees the keys at `i - window + 1 ..= i` of its
    /// text, as in transformers' `sliding_window_causal_mask_function`. `None`: all keys up to its own. At least 1.
    pub window: Option<usize>,
}

/// The norm of queries and keys, applied after the projection's bias and before the rotary embedding.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    #[default]
    None,
    /// An RMS norm of each head's `head_dim` values, with one weight (`head_dim`) for all query heads of a layer and one for all key
    /// heads, and the eps of the other norms.
    PerHead,
}

/// The projections of a layer, in the order in which torch registers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Projection {
    /// Queries: (`num_attention_heads * head_dim`, `hidden_size`).
    Q,
    /// Keys: (`num_key_value_heads * head_dim`, `hidden_size`).
    K,
    /// Values, of the shape of keys.
    V,
    /// The attention's output: (`hidden_size`, `num_attention_heads * head_dim`).
    O,
    /// The gate: (`intermediate_size`, `hidden_size`).
    Gate,
    /// What is gated, of the shape of the gate.
    Up,
    /// The feed-forward block's output: (`hidden_size`, `intermediate_size`).
    Down,
}

/// The rotary embedding (Su et al. 2021, arXiv 2104.09864), over halves of a head as in transformers' `rotate_half`.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// The base: pair i of a head rotates by `theta^(-2i / head_dim)` radians a position.
    pub theta: f64,
    /// How long waves are stretched.
    pub scaling: Option<Llama3Scaling>,
}

/// Llama 3's scaling of the rotary embedding's long waves (transformers' `modeling_rope_utils.py`, rope type `llama3`).
#[derive(Debug, Clone, PartialEq)]
pub struct Llama3Scaling {
    /// By how much long waves are stretched.
    pub factor: f64,
    /// A wave longer than the original length divided by this is long.
    pub low_freq_factor: f64,
    /// A wave shorter than the original length divided by this is left as it is.
    pub high_freq_factor: f64,
    /// The length the model was first trained for, in tokens.
    pub original_max_position_embeddings: usize,
}

/// What `quantization_config` says about weights in bitsandbytes' NF4.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quantization {
    /// Whether the blocks' magnitudes are quantised too.
    pub double_quant: bool,
    /// The dtype that transformers computes products in.
    pub compute_dtype: Option<DType>,
}

impl Projection {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Q,
        Self::K,
        Self::V,
        Self::O,
        Self::Gate,
        Self::Up,
        Self::Down,
    ];
    /// Those of the attention.
    pub const ATTENTION: [Self; 4] = [Self::Q, Self::K, Self::V, Self::O];
    /// Those of the feed-forward block.
    pub const MLP: [Self; 3] = [Self::Gate, Self::Up, Self::Down];
}

impl Arch {
    /// The number of decoder layers.
    pub fn num_hidden_layers(&self) -> usize {
        self.layers.len()
    }

    /// Whether a projection adds a bias, in all layers.
    pub fn has_bias(&self, projection: Projection) -> bool {
        self.biases.contains(&projection)
    }

    /// The shape (out, in) of a projection's weight.
    pub fn shape(&self, projection: Projection) -> (usize, usize) {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let queries = self.num_attention_heads * self.head_dim;
        let keys = self.num_key_value_heads * self.head_dim;
        match projection {
            Projection::Q => (queries, hidden),
            Projection::K | Projection::V => (keys, hidden),
            Projection::O => (hidden, queries),
            Projection::Gate | Projection::Up => (inner, hidden),
            Projection::Down => (hidden, inner),
        }
    }

    /// The factor of the attention scores before the softmax.
    pub fn score_scale(&self) -> f64 {
        (self.head_dim as f64).powf(-0.5)
    }
}

/// The largest numbers that are accepted. They are far above any model's, and the bytes of all weights of the largest such model
/// can be counted in 63 bits.
const LARGEST: [(&str, usize); 7] = [
    ("vocab_size", 1 << 26),
    ("hidden_size", 1 << 20),
    ("intermediate_size", 1 << 24),
    ("num_hidden_layers", 1 << 14),
    ("num_attention_heads", 1 << 16),
    ("num_key_value_heads", 1 << 16),
    ("head_dim", 1 << 16),
];
/// The largest product of `num_attention_heads` and `head_dim`.
pub(super) const WIDEST: usize = 1 << 24;

/// The largest number that is accepted for a size of `config.json`.
pub fn largest(name: &str) -> usize {
    let own = LARGEST.iter().find(|(own, _)| *own == name);
    own.map_or(u32::MAX as usize, |(_, largest)| *largest)
}
