//! Text generation on plain vectors: the next tokens of several sequences at once.
//!
//! A step reads every weight once for all sequences, keys and values are appended in place, and there are no tensors between the products.
//! [`CausalLm::next_logits`] is the reference path; the two differ in the order of sums alone.

mod projection;

use std::borrow::Cow;
use std::ops::Range;

use candle_core::{DType, Result, Tensor, bail};
use half::bf16;
use pipeline_kernels::gated::Activation;
use pipeline_kernels::team::Team;
use pipeline_kernels::vectors::{self, Attention, Cached};

use self::projection::{Products, Projection, is_exact, values};
use super::weights::activation;
use crate::ml::backend::{self, Token};
use crate::ml::model::linear::{Linear, Pass};
use crate::ml::model::{CausalLm, Layer, Norm, angles, have_same_angles};

/// Sequences that a model continues.
pub(super) struct Decoder<'a> {
    pass: Pass,
    layers: Vec<DecoderLayer<'a>>,
    model: &'a CausalLm,
    /// The final norm.
    norm: RowNorm,
    /// The cosines and sines (positions, `rotary_dim / 2`) of each rotary embedding.
    angles: Vec<(Vec<f32>, Vec<f32>)>,
    /// The largest length of a sequence.
    longest: usize,
    sequences: Vec<CachedSequence>,
    /// Whether products are computed in bf16, which rounds their factors and results.
    rounded: bool,
}

/// The length and the cache of a sequence.
struct CachedSequence {
    length: usize,
    /// The keys and values by layer and key head.
    cache: Vec<Entries>,
}

/// The keys and values of one head, each (length, width), in the compute dtype.
#[derive(Debug, Clone)]
enum Entries {
    F32(Vec<f32>, Vec<f32>),
    Bf16(Vec<bf16>, Vec<bf16>),
}

impl Entries {
    fn push(&mut self, key: &[f32], value: &[f32]) {
        match self {
            Self::F32(keys, values) => {
                keys.extend_from_slice(key);
                values.extend_from_slice(value);
            }
            Self::Bf16(keys, values) => {
                keys.extend(key.iter().map(|x| bf16::from_f32(*x)));
                values.extend(value.iter().map(|x| bf16::from_f32(*x)));
            }
        }
    }

    /// Forgets all but so many numbers of each.
    fn truncate(&mut self, count: usize) {
        match self {
            Self::F32(keys, values) => {
                keys.truncate(count);
                values.truncate(count);
            }
            Self::Bf16(keys, values) => {
                keys.truncate(count);
                values.truncate(count);
            }
        }
    }

    /// The first so many numbers of each.
    fn beginning(&self, count: usize) -> Self {
        match self {
            Self::F32(keys, values) => Self::F32(keys[..count].to_vec(), values[..count].to_vec()),
            Self::Bf16(keys, values) => {
                Self::Bf16(keys[..count].to_vec(), values[..count].to_vec())
            }
        }
    }

    /// A range of the keys and the same range of the values.
    fn span(&self, span: Range<usize>) -> (Cached<'_>, Cached<'_>) {
        match self {
            Self::F32(keys, values) => {
                (Cached::F32(&keys[span.clone()]), Cached::F32(&values[span]))
            }
            Self::Bf16(keys, values) => (
                Cached::Bf16(&keys[span.clone()]),
                Cached::Bf16(&values[span]),
            ),
        }
    }
}

/// A layer's small tensors as vectors, and its projections.
struct DecoderLayer<'a> {
    layer: &'a Layer,
    input_norm: Option<RowNorm>,
    post_attention_norm: Option<RowNorm>,
    pre_feedforward_norm: Option<RowNorm>,
    post_feedforward_norm: Option<RowNorm>,
    /// The norms of the queries and of the keys, of each head or of all together.
    q_norm: Option<RowNorm>,
    k_norm: Option<RowNorm>,
    /// The projections of queries, keys and values, or the one whose rows are theirs in this order.
    qkv: Vec<Projection<'a>>,
    o: Projection<'a>,
    /// The projections of gate and up, or the one whose rows are theirs in this order.
    gate_up: Vec<Projection<'a>>,
    down: Projection<'a>,
    softcap: Option<f32>,
    activation: Activation,
    residual_scale: f32,
}

/// The rows that a norm takes at a time.
const ROWS: usize = 8;

/// An RMS norm of rows as long as its weight.
struct RowNorm {
    weight: Vec<f32>,
    eps: f64,
}

impl RowNorm {
    fn new(norm: &Norm, pass: Pass) -> Result<Self> {
        Ok(Self {
            weight: values(&norm.weight.value(pass), DType::F32)?,
            eps: norm.eps,
        })
    }

    /// See [`vectors::rms_norm`].
    fn apply(&self, x: &[f32], products: &Products<'_>) -> Vec<f32> {
        let mut normed = vec![0.; x.len()];
        let size = self.weight.len() * ROWS;
        products
            .team
            .share_chunks(&mut normed, size.max(1), |chunk, normed| {
                let x = &x[chunk * size..][..normed.len()];
                vectors::rms_norm(x, &self.weight, self.eps as f32, normed);
            });
        normed
    }
}

/// `x` after a norm, if there is one.
fn normed<'b>(x: &'b [f32], norm: Option<&RowNorm>, products: &Products<'_>) -> Cow<'b, [f32]> {
    norm.map_or(Cow::Borrowed(x), |norm| Cow::Owned(norm.apply(x, products)))
}

impl<'a> DecoderLayer<'a> {
    fn new(layer: &'a Layer, pass: Pass) -> Result<Self> {
        let norm = |norm: &Option<Norm>| {
            let norm = norm.as_ref();
            norm.map(|norm| RowNorm::new(norm, pass)).transpose()
        };
        let all = |linears: Vec<&'a Linear>| -> Result<Vec<_>> {
            let each = linears.into_iter();
            each.map(|linear| Projection::new(linear, pass)).collect()
        };
        Ok(Self {
            layer,
            input_norm: norm(&layer.input_norm)?,
            post_attention_norm: norm(&layer.post_attention_norm)?,
            pre_feedforward_norm: norm(&layer.pre_feedforward_norm)?,
            post_feedforward_norm: norm(&layer.post_feedforward_norm)?,
            q_norm: norm(&layer.q_norm)?,
            k_norm: norm(&layer.k_norm)?,
            qkv: all(layer.qkv.linears())?,
            o: Projection::new(&layer.o, pass)?,
            gate_up: all(layer.gate_up.linears())?,
            down: Projection::new(&layer.down, pass)?,
            softcap: layer.score_softcap.map(|cap| cap as f32),
            activation: activation(layer.activation),
            residual_scale: layer.residual_scale as f32,
        })
    }

    fn projections(&self) -> impl Iterator<Item = &Projection<'a>> {
        let (qkv, gate_up) = (self.qkv.iter(), self.gate_up.iter());
        qkv.chain([&self.o]).chain(gate_up).chain([&self.down])
    }

    /// Adds a block's result `y` to the hidden states `x`, after its norm and times its factor.
    fn join(&self, x: &mut [f32], y: &[f32], norm: Option<&RowNorm>, products: &Products<'_>) {
        let y = normed(y, norm, products);
        for (x, y) in x.iter_mut().zip(y.iter()) {
            *x += y * self.residual_scale;
        }
    }
}

impl<'a> Decoder<'a> {
    /// `sequences` empty sequences, none of which may become longer than `longest` tokens. `None` for what the kernels don't support: other
    /// devices than the CPU, products in f16, pairs of embeddings or head, `DoRA`, and rotary embeddings that change on the way to `longest`.
    pub(super) fn new(
        model: &'a CausalLm,
        sequences: usize,
        longest: usize,
        pass: Pass,
    ) -> Result<Option<Self>> {
        let compute = model.compute;
        if !model.device.is_cpu() || !matches!(compute, DType::F32 | DType::BF16) {
            return Ok(None);
        }
        let linears = model.layers.iter().flat_map(Layer::linears);
        if model.has_pairs_at_ends()
            || !{ linears }.all(Linear::has_kernels)
            || !have_same_angles(&model.arch, 1, longest)
        {
            return Ok(None);
        }
        let layers = model
            .layers
            .iter()
            .map(|layer| DecoderLayer::new(layer, pass));
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let all = layers.iter().flat_map(DecoderLayer::projections);
        if !is_exact(model.head().stored(pass).dtype(), compute)
            || !{ all }.all(|one| one.is_readable(compute))
        {
            return Ok(None);
        }
        let ropes = 0..model.arch.ropes.len();
        let angles = ropes.map(|rope| {
            let (cos, sin) = angles(&model.arch, rope, 0..longest, longest, &model.device)?;
            Ok((values(&cos, DType::F32)?, values(&sin, DType::F32)?))
        });
        let angles = angles.collect::<Result<_>>()?;
        let entries = match compute {
            DType::BF16 => Entries::Bf16(Vec::new(), Vec::new()),
            _ => Entries::F32(Vec::new(), Vec::new()),
        };
        let count = layers.len() * model.arch.num_key_value_heads;
        let sequence = || CachedSequence {
            length: 0,
            cache: vec![entries.clone(); count],
        };
        Ok(Some(Self {
            pass,
            layers,
            model,
            norm: RowNorm::new(&model.norm, pass)?,
            angles,
            longest,
            sequences: std::iter::repeat_with(sequence).take(sequences).collect(),
            rounded: compute == DType::BF16,
        }))
    }

    /// The position of each token in its sequence.
    fn positions_(&self, tokens: &[Token]) -> Result<Vec<usize>> {
        let mut lengths: Vec<usize> = self
            .sequences
            .iter()
            .map(|sequence| sequence.length)
            .collect();
        let mut positions = Vec::with_capacity(tokens.len());
        for token in tokens {
            let Some(length) = lengths
                .get_mut(token.sequence)
                .filter(|length| **length < self.longest)
            else {
                bail!(
                    "a token of sequence {} is beyond its longest length",
                    token.sequence
                );
            };
            positions.push(*length);
            *length += 1;
        }
        Ok(positions)
    }

    /// Applies a rotary embedding, if there is one, to rows of `row` values, one for each of `positions`.
    fn rotate(&self, rope: Option<usize>, rows: &mut [f32], row: usize, positions: &[usize]) {
        let (width, pairs) = (self.model.arch.head_dim, self.model.arch.rotary_dim / 2);
        let Some((cos, sin)) = rope.and_then(|rope| self.angles.get(rope)) else {
            return;
        };
        for (row, position) in rows.chunks_exact_mut(row).zip(positions) {
            let span = position * pairs..(position + 1) * pairs;
            vectors::rope(row, width, &cos[span.clone()], &sin[span]);
        }
    }

    /// The attention of each token to its sequence up to itself: (tokens, heads * width).
    fn attention(
        &self,
        products: &Products<'_>,
        number: usize,
        q: &[f32],
        tokens: &[Token],
        positions: &[usize],
    ) -> Vec<f32> {
        let layer = self.layers[number].layer;
        let (heads, width) = (layer.kv_heads, layer.head_dim);
        let group = layer.heads / heads.max(1) * width;
        let rounded = products.rounded;
        let mut y = vec![0.; q.len()];
        products.team.share_chunks(&mut y, group, |index, out| {
            let (token, head) = (index / heads, index % heads);
            let entries = &self.sequences[tokens[token].sequence].cache[number * heads + head];
            let end = positions[token] + 1;
            let first = layer.window.map_or(0, |window| end.saturating_sub(window));
            let (keys, values) = entries.span(first * width..end * width);
            let attention = Attention {
                query: &q[index * group..][..group],
                keys,
                values,
                out,
                softcap: self.layers[number].softcap,
                rounded,
            };
            attention.compute(width);
        });
        products.round(&mut y);
        y
    }

    /// [`backend::Decoder::step`] with a way to compute products.
    fn step_with(
        &mut self,
        products: &Products<'_>,
        tokens: &[Token],
        wanted: &[usize],
    ) -> Result<Vec<f32>> {
        let hidden = self.model.arch.hidden_size;
        let positions = self.positions_(tokens)?;
        let ids: Vec<u32> = tokens.iter().map(|token| token.id).collect();
        let ids = Tensor::new(ids, &self.model.device)?.unsqueeze(0)?;
        let mut x = values(&self.model.embed(&ids, self.pass)?, DType::F32)?;
        for number in 0..self.layers.len() {
            let weights = &self.layers[number];
            let layer = weights.layer;
            let input = normed(&x, weights.input_norm.as_ref(), products);
            let (heads, width) = (layer.kv_heads, layer.head_dim);
            let widths = [layer.heads * width, heads * width, heads * width];
            let [mut q, mut k, mut v] = products.parts(&weights.qkv, &input, widths)?;
            for (x, norm) in [(&mut q, &weights.q_norm), (&mut k, &weights.k_norm)] {
                if let Some(norm) = norm {
                    *x = norm.apply(x, products);
                }
            }
            self.rotate(layer.rope, &mut q, layer.heads * width, &positions);
            vectors::scale(&mut q, layer.score_scale as f32);
            self.rotate(layer.rope, &mut k, heads * width, &positions);
            for values in [&mut q, &mut k, &mut v] {
                products.round(values);
            }
            let entries = k.chunks_exact(width).zip(v.chunks_exact(width));
            for (index, (key, value)) in entries.enumerate() {
                let (token, head) = (index / heads, index % heads);
                let sequence = &mut self.sequences[tokens[token].sequence];
                sequence.cache[number * heads + head].push(key, value);
            }
            let y = self.attention(products, number, &q, tokens, &positions);
            let weights = &self.layers[number];
            let [y] = products.parts(std::slice::from_ref(&weights.o), &y, [hidden])?;
            weights.join(&mut x, &y, weights.post_attention_norm.as_ref(), products);
            let input = normed(&x, weights.pre_feedforward_norm.as_ref(), products);
            let widths = [self.model.arch.intermediate_size; 2];
            let [mut gate, up] = products.parts(&weights.gate_up, &input, widths)?;
            let width = self.model.arch.intermediate_size.max(1);
            products.team.share_chunks(&mut gate, width, |token, gate| {
                let up = &up[token * width..][..width];
                vectors::gated_unit(weights.activation, gate, up);
            });
            let [y] = products.parts(std::slice::from_ref(&weights.down), &gate, [hidden])?;
            weights.join(&mut x, &y, weights.post_feedforward_norm.as_ref(), products);
        }
        for token in tokens {
            self.sequences[token.sequence].length += 1;
        }
        let mut last = Vec::with_capacity(wanted.len() * hidden);
        for index in wanted {
            match x.chunks_exact(hidden).nth(*index) {
                Some(row) => last.extend_from_slice(row),
                None => bail!("token {index} of {} is wanted", tokens.len()),
            }
        }
        let last = self.norm.apply(&last, products);
        let mut logits = products.head(self.model.head(), self.pass, &last)?;
        vectors::scale(&mut logits, self.model.arch.logit_scale as f32);
        if let Some(cap) = self.model.arch.logit_softcap {
            vectors::soft_cap(&mut logits, cap as f32);
        }
        Ok(logits)
    }
}

impl backend::Decoder for Decoder<'_> {
    fn step(&mut self, tokens: &[Token], wanted: &[usize]) -> Result<Vec<f32>> {
        let rounded = self.rounded;
        Team::gather(|team| {
            let products = Products { team, rounded };
            self.step_with(&products, tokens, wanted)
        })
    }

    fn truncate(&mut self, text: usize, length: usize) -> Result<()> {
        let width = self.model.arch.head_dim;
        let found = self.sequences.get_mut(text);
        let Some(text) = found.filter(|text| text.length >= length) else {
            bail!("there are no {length} tokens of text {text} to keep");
        };
        text.length = length;
        for entries in &mut text.cache {
            entries.truncate(length * width);
        }
        Ok(())
    }

    fn copy_beginning(&mut self, from: usize, to: usize, length: usize) -> Result<bool> {
        let count = length * self.model.arch.head_dim;
        let found = self.sequences.get(from);
        let Some(from) = found.filter(|from| from.length >= length) else {
            bail!("there are no {length} tokens of text {from} to copy");
        };
        let cache = from.cache.iter().map(|entries| entries.beginning(count));
        let cache = cache.collect();
        let Some(to) = self.sequences.get_mut(to) else {
            bail!("there is no text {to}");
        };
        *to = CachedSequence { length, cache };
        Ok(true)
    }
}
