//! The architecture of a model: dimensions and options, read from `config.json` by one of the [`super::families`].
//!
//! A decoder layer is `x + attention(norm(x))`, then `x + down(silu(gate(n)) * up(n))` with `n = norm(x)`. [`Arch`] describes which
//! variations of it a model has. A variation that a family's files can request beside these is refused by name when they are read.
//!
//! Where the options of further families go:
//!
//! - what differs from layer to layer (a second rotary table or none, experts): a field of [`LayerArch`];
//! - a norm over the whole width of q and k: a variant of [`QkNorm`];
//! - factors (embedding, residual, score and logit scales), soft-caps, the gate's activation, norms after the blocks, the fraction
//!   of a head that is rotated: a field of [`Arch`];
//! - norms that multiply by `1 + w`: folded into the weight when it is loaded;
//! - fused projections (`qkv_proj`): [`Projection`] and the table of tensors, `super::tensors`.
//!
//! A backend that does not compute a field must refuse the models that use it (`fused::backend`).

use candle_core::DType;

/// A model's architecture, and the other settings of its `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct Arch {
    /// The family's `model_type` (`llama`).
    pub family: &'static str,
    /// The number of token ids, which is the number of rows of the embeddings and of the head.
    pub vocab_size: usize,
    /// The width of the hidden states.
    pub hidden_size: usize,
    /// The width inside the feed-forward block.
    pub intermediate_size: usize,
    /// The decoder layers, from the lowest one on.
    pub layers: Vec<LayerArch>,
    /// The number of query heads.
    pub num_attention_heads: usize,
    /// The number of key heads and of value heads, each shared by `num_attention_heads / num_key_value_heads` query heads.
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
    /// Whether the head is tied to the embeddings, that is, has the same weight.
    pub tie_word_embeddings: bool,

    /// The longest sequence for which the model was made, in tokens; nothing is computed from it.
    pub max_position_embeddings: usize,
    /// The probability of dropping an attention weight in training. Trainings refuse a probability above 0.
    pub attention_dropout: f64,
    /// The id with which a text starts.
    pub bos_token_id: Option<u32>,
    /// The ids that end a text.
    pub eos_token_ids: Vec<u32>,
    /// The id that pads batches; its embedding gets no gradient, as with torch's `padding_idx`.
    pub pad_token_id: Option<u32>,
    /// The dtype of the weights according to `config.json`.
    pub dtype: Option<DType>,
    /// The quantisation of the weights, if they are quantised.
    pub quantization: Option<Quantization>,
}

/// What may differ from layer to layer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LayerArch {
    /// The size of the sliding window, at least 1: the query at position i attends to the keys at `i - window + 1 ..= i` of its sequence, as
    /// in transformers' `sliding_window_causal_mask_function`. Without one it attends to all keys up to its own.
    pub window: Option<usize>,
}

/// The norm of queries and keys, applied after the projection's bias and before the rotary embedding.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum QkNorm {
    /// No norm.
    #[default]
    None,
    /// An RMS norm over the `head_dim` values of each head. A layer has one weight (`head_dim`) for all query heads and one for all key
    /// heads; the eps is that of the other norms.
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
    /// The up projection, which is multiplied by the gate, of the shape of the gate.
    Up,
    /// The feed-forward block's output: (`hidden_size`, `intermediate_size`).
    Down,
}

/// The rotary embedding (Su et al. 2021, arXiv 2104.09864), over halves of a head as in transformers' `rotate_half`.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// The base: pair i of a head rotates by `theta^(-2i / head_dim)` radians for each position.
    pub theta: f64,
    /// The scaling of long wavelengths, if there is one.
    pub scaling: Option<Llama3Scaling>,
}

/// Llama 3's scaling of the rotary embedding (`_compute_llama3_parameters` in transformers' `modeling_rope_utils.py`).
#[derive(Debug, Clone, PartialEq)]
pub struct Llama3Scaling {
    /// The factor by which long wavelengths are multiplied.
    pub factor: f64,
    /// Wavelengths above the original length divided by this are long.
    pub low_freq_factor: f64,
    /// Wavelengths below the original length divided by this are not changed.
    pub high_freq_factor: f64,
    /// The length for which the model was originally trained, in tokens.
    pub original_max_position_embeddings: usize,
}

/// The settings of `quantization_config` for weights in bitsandbytes' NF4.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quantization {
    /// Whether the magnitudes of the blocks are quantised too.
    pub double_quant: bool,
    /// The dtype in which transformers computes products.
    pub compute_dtype: Option<DType>,
}

impl Projection {
    /// All projections, in the order in which torch registers them.
    pub const ALL: [Self; 7] = [
        Self::Q,
        Self::K,
        Self::V,
        Self::O,
        Self::Gate,
        Self::Up,
        Self::Down,
    ];
    /// The projections of the attention.
    pub const ATTENTION: [Self; 4] = [Self::Q, Self::K, Self::V, Self::O];
    /// The projections of the feed-forward block.
    pub const MLP: [Self; 3] = [Self::Gate, Self::Up, Self::Down];
}

impl Arch {
    /// The number of decoder layers.
    pub fn num_hidden_layers(&self) -> usize {
        self.layers.len()
    }

    /// Whether a projection has a bias; this is the same in all layers.
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

    /// The factor of the attention scores before the softmax, `1 / sqrt(head_dim)`.
    pub fn score_scale(&self) -> f64 {
        (self.head_dim as f64).powf(-0.5)
    }
}

/// The largest sizes that are accepted. They are far above those of any model, and the size in bytes of the largest such model fits into
/// 63 bits.
const LARGEST: [(&str, usize); 7] = [
    ("vocab_size", 1 << 26),
    ("hidden_size", 1 << 20),
    ("intermediate_size", 1 << 24),
    ("num_hidden_layers", 1 << 14),
    ("num_attention_heads", 1 << 16),
    ("num_key_value_heads", 1 << 16),
    ("head_dim", 1 << 16),
];
/// The largest accepted product of `num_attention_heads` and `head_dim`.
pub(super) const WIDEST: usize = 1 << 24;

/// The largest number that is accepted for the key `name` of `config.json`.
pub fn largest(name: &str) -> usize {
    let own = LARGEST.iter().find(|(own, _)| *own == name);
    own.map_or(u32::MAX as usize, |(_, largest)| *largest)
}
