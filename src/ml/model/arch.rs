//! The architecture of a model: dimensions and options, read from `config.json` by one of the [`super::families`].
//!
//! A decoder layer has two blocks, attention and feed-forward, each of which adds its result to the hidden states `x`:
//!
//! ```text
//! x = x + residual_scale * norm(attention(norm(x)))
//! x = x + residual_scale * norm(down(activation(gate(n)) * up(n)))    with n = norm(x)
//! ```
//!
//! [`NormPlaces`] says which of the four norms there are. Before the first layer, embeddings are multiplied by `embedding_scale`; after the
//! last one there is one more norm, and the head's logits `l` become `cap * tanh(logit_scale * l / cap)`.
//!
//! [`Arch`] describes which variations of it a model has. A variation that a family's files can request beside these is refused by name when
//! they are read. What differs from layer to layer is a field of [`LayerArch`]; a further option is a field of [`Arch`], and
//! `super::tensors` has the modules that come with it.
//!
//! A backend that does not compute a field must refuse the models that use it (`fused::backend`).

use candle_core::DType;

/// The head's weight (vocabulary, hidden).
pub const HEAD: &str = "lm_head.weight";
/// The weight (1, hidden) of a head that gives one number.
pub const SCORE: &str = "score.weight";

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
    /// The number of the first features of a head that are rotated, an even number; the others keep their values. It is `head_dim` but for
    /// models with a `partial_rotary_factor`.
    pub rotary_dim: usize,
    /// Added to the mean square in every RMS norm, those of q and k included.
    pub rms_norm_eps: f64,
    /// The rotary embeddings, to which the layers refer by number.
    pub ropes: Vec<Rope>,
    /// The norm of queries and keys before the rotary embedding.
    pub qk_norm: QkNorm,
    /// Where a layer has norms.
    pub norm_places: NormPlaces,
    /// Whether the files have the weight `w` of norms that multiply by `1 + w` (Gemma). Every norm in memory has the weight by which it
    /// multiplies: 1 is added in f32 when it is loaded, and taken away when it is saved.
    pub norm_adds_one: bool,
    /// The activation of the gate.
    pub activation: Activation,
    /// The factor of the embeddings after they are looked up; a tied head is not multiplied by it.
    pub embedding_scale: f64,
    /// The factor of both blocks' results before they are added to the hidden states.
    pub residual_scale: f64,
    /// The factor of the attention scores before the softmax: `1 / sqrt(head_dim)` in most families.
    pub score_scale: f64,
    /// The cap of the scaled attention scores, `cap * tanh(score / cap)`, before the mask is added.
    pub score_softcap: Option<f64>,
    /// The factor of the logits.
    pub logit_scale: f64,
    /// The cap of the scaled logits, `cap * tanh(logit / cap)`.
    pub logit_softcap: Option<f64>,
    /// Whether queries, keys and values are one projection ([`Projection::Qkv`]), and gate and up one ([`Projection::GateUp`]).
    pub fused_projections: bool,
    /// The projections that add a bias, in the order of [`Arch::projections`].
    pub biases: Vec<Projection>,
    /// Whether the head is tied to the embeddings, that is, has the same weight.
    pub tie_word_embeddings: bool,
    /// Whether the head gives one number instead of logits: the score of a sequence at its last token (transformers' models
    /// `ForSequenceClassification` with one label, which are reward models). Such a head is not tied, and its number is not scaled or capped.
    pub scores: bool,

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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerArch {
    /// The size of the sliding window, at least 1: the query at position i attends to the keys at `i - window + 1 ..= i` of its sequence, as
    /// in transformers' `sliding_window_causal_mask_function`. Without one it attends to all keys up to its own.
    pub window: Option<usize>,
    /// The number of its rotary embedding among [`Arch::ropes`]; `None` if its queries and keys are not rotated.
    pub rope: Option<usize>,
}

impl Default for LayerArch {
    /// A layer without a window, with the first rotary embedding.
    fn default() -> Self {
        Self {
            window: None,
            rope: Some(0),
        }
    }
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
    /// An RMS norm over the values of all query heads together, with a weight (`num_attention_heads * head_dim`), and one over those of all
    /// key heads together, with a weight (`num_key_value_heads * head_dim`); the eps is that of the other norms (`modular_olmo2.py`).
    Whole,
}

/// The norms of a layer, apart from those of queries and keys.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum NormPlaces {
    /// Before each of the two blocks (Llama).
    #[default]
    Before,
    /// After each block, before its result is added to the hidden states (`OLMo` 2).
    After,
    /// Before and after each block (Gemma 2).
    Both,
}

/// The activation of the gate.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    #[default]
    Silu,
    /// `0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))` (Hendrycks and Gimpel 2016, arXiv 1606.08415, section 2).
    GeluTanh,
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
    /// Queries, keys and values in one matrix, whose rows are those of Q, K and V in this order.
    Qkv,
    /// Gate and up in one matrix, whose rows are those of both in this order.
    GateUp,
}

/// A rotary embedding (Su et al. 2021, arXiv 2104.09864), over halves of a head's rotated features as in transformers' `rotate_half`.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// The base: pair i of a head rotates by `theta^(-2i / rotary_dim)` radians for each position.
    pub theta: f64,
    /// The scaling of wavelengths, if there is one.
    pub scaling: Option<RopeScaling>,
}

/// The ways of scaling a rotary embedding for longer sequences (`ROPE_INIT_FUNCTIONS` in transformers' `modeling_rope_utils.py`).
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// All wavelengths times a factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// A base that grows with the length of the longest sequence, once that exceeds `max_position_embeddings` (NTK-aware scaling).
    Dynamic {
        /// The factor by which the usable length grows.
        factor: f64,
        /// The length up to which nothing is scaled, in tokens.
        max_position_embeddings: usize,
    },
    /// `YaRN` (Peng et al. 2023, arXiv 2309.00071).
    Yarn(YarnScaling),
    /// Llama 3's.
    Llama3(Llama3Scaling),
    /// `LongRoPE` (Ding et al. 2024, arXiv 2402.13753): one factor a wavelength, in two sets.
    LongRope(LongRopeScaling),
}

/// The parameters of `YaRN`, with transformers' defaults filled in.
#[derive(Debug, Clone, PartialEq)]
pub struct YarnScaling {
    /// The factor by which long wavelengths are multiplied.
    pub factor: f64,
    /// The factor of cosines and sines.
    pub attention_factor: f64,
    /// Wavelengths with more rotations than this in the original length are not changed.
    pub beta_fast: f64,
    /// Wavelengths with fewer rotations than this in the original length are long.
    pub beta_slow: f64,
    /// The length for which the model was originally trained, in tokens.
    pub original_max_position_embeddings: usize,
    /// Whether the first and the last pair of the range between them are rounded to whole numbers.
    pub truncate: bool,
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

/// The parameters of `LongRoPE`.
#[derive(Debug, Clone, PartialEq)]
pub struct LongRopeScaling {
    /// The factor of each wavelength (`rotary_dim / 2`) while no sequence is longer than the original length.
    pub short_factor: Vec<f64>,
    /// The factor of each wavelength (`rotary_dim / 2`) for longer sequences.
    pub long_factor: Vec<f64>,
    /// The factor of cosines and sines.
    pub attention_factor: f64,
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
    /// The projections of a layer without fused ones, in the order in which torch registers them.
    pub const SEPARATE: [Self; 7] = [
        Self::Q,
        Self::K,
        Self::V,
        Self::O,
        Self::Gate,
        Self::Up,
        Self::Down,
    ];
    /// The projections of a layer with [`Arch::fused_projections`], in the order in which torch registers them.
    pub const FUSED: [Self; 4] = [Self::O, Self::Qkv, Self::GateUp, Self::Down];
    /// The projections of the attention.
    pub const ATTENTION: [Self; 4] = [Self::Q, Self::K, Self::V, Self::O];
    /// The projections of the feed-forward block.
    pub const MLP: [Self; 3] = [Self::Gate, Self::Up, Self::Down];
}

impl Arch {
    /// The name of the head's weight, where it is not tied.
    pub fn head_name(&self) -> &'static str {
        if self.scores { SCORE } else { HEAD }
    }

    /// The number of rows of the head's weight.
    pub fn head_rows(&self) -> usize {
        if self.scores { 1 } else { self.vocab_size }
    }

    /// The architecture of a model with the same layers whose head gives one number.
    #[must_use]
    pub fn scoring(self) -> Self {
        Self {
            scores: true,
            tie_word_embeddings: false,
            logit_scale: 1.,
            logit_softcap: None,
            ..self
        }
    }

    /// The number of decoder layers.
    pub fn num_hidden_layers(&self) -> usize {
        self.layers.len()
    }

    /// The projections of each layer, in the order in which torch registers them.
    pub fn projections(&self) -> &'static [Projection] {
        if self.fused_projections {
            &Projection::FUSED
        } else {
            &Projection::SEPARATE
        }
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
            Projection::Qkv => (queries + 2 * keys, hidden),
            Projection::GateUp => (2 * inner, hidden),
        }
    }
}

/// The factor of the attention scores in most families, `1 / sqrt(head_dim)`.
pub fn default_score_scale(head_dim: usize) -> f64 {
    (head_dim as f64).powf(-0.5)
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
