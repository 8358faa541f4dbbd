//! Text generation on a device with memory of its own: the next tokens of several sequences at once, whose keys and values stay there.
//!
//! A step is the layers' forward pass ([`layer`]) on the tokens that are appended, with another attention: to the keys and values that are
//! kept of each sequence. No sum depends on what else is in a step. The processor has another way ([`super::decode`]), which reads weights row
//! after row.

use std::ops::Range;

use candle_core::{DType, Result, bail};
use pipeline_kernels::attention::{Heads, Scores};
use pipeline_kernels::panels::{LANES, size};
use pipeline_kernels::vectors;

use super::device::{Device, Onto};
use super::head::{blocks, logits_at_once, product};
use super::layer;
use super::layout::Layout;
use super::shape::{PassContext, Shape};
use super::weights::{Layer, TensorView};
use crate::ml::backend::{Decoder, Token};
use crate::ml::model::linear::Pass;
use crate::ml::model::{CausalLm, have_same_angles};

/// The tokens of prompts that best go through the model at a time.
const AT_ONCE: usize = 256;

/// What the attention of a step computes with.
pub(in crate::ml) struct CachedAttention<'p, D: Caching> {
    /// The queries, panels of `queries * width` features.
    pub(in crate::ml) q: &'p D::Buffer,
    /// The keys and values of all places, panels of `keys * width` features.
    pub(in crate::ml) k: &'p D::Buffer,
    pub(in crate::ml) v: &'p D::Buffer,
    pub(in crate::ml) heads: Heads,
    pub(in crate::ml) scores: Scores,
    pub(in crate::ml) seen: &'p D::Seen,
}

/// A device that keeps keys and values. A cache is panels of places, one for each token of each sequence.
pub(in crate::ml) trait Caching: Device<Buffer: Send> {
    /// The places that each token of a step attends to.
    type Seen;

    /// These places.
    fn seen(&self, places: &[Range<usize>]) -> Self::Seen;

    /// Copies token `i` of `x` to place `places[i]` of `cache`; both are panels of `features`.
    fn store(&self, x: &Self::Buffer, features: usize, places: &[usize], cache: &mut Self::Buffer);

    /// Attention of each token to the places that it sees.
    fn cached_attention(&self, inputs: CachedAttention<'_, Self>, out: &mut Self::Buffer);

    /// The first `tokens` tokens of panels of `features` as rows (tokens, features).
    fn token_rows(&self, x: &Self::Buffer, features: usize, tokens: usize) -> Self::Buffer;
}

/// Sequences that a model continues.
pub(in crate::ml) struct CachedDecoder<'a, D: Caching> {
    model: &'a CausalLm,
    device: &'a D,
    pass: Pass,
    /// The largest length of a sequence.
    longest: usize,
    lengths: Vec<usize>,
    /// The places of each sequence in the caches, a whole number of panels.
    room: usize,
    /// The keys and the values of each layer.
    caches: Vec<[D::Buffer; 2]>,
}

impl<'a, D: Caching> CachedDecoder<'a, D> {
    /// `sequences` empty sequences, none of which may become longer than `longest` tokens. `None` where rotary embeddings change on the way to
    /// `longest`.
    pub(in crate::ml) fn new(
        device: &'a D,
        model: &'a CausalLm,
        sequences: usize,
        longest: usize,
        pass: Pass,
    ) -> Result<Option<Self>> {
        if !have_same_angles(&model.arch, 1, longest) {
            return Ok(None);
        }
        model.refresh()?;
        device.begin(model, 0);
        let cache = || [D::Buffer::default(), D::Buffer::default()];
        let caches = std::iter::repeat_with(cache).take(model.layers.len());
        Ok(Some(Self {
            model,
            device,
            pass: Pass {
                tape: false,
                ..pass
            },
            longest,
            lengths: vec![0; sequences],
            room: 0,
            caches: caches.collect(),
        }))
    }

    /// The position of each token in its sequence, and what the sequences' lengths become.
    fn positions(&self, tokens: &[Token]) -> Result<(Vec<usize>, Vec<usize>)> {
        let mut lengths = self.lengths.clone();
        let mut positions = Vec::with_capacity(tokens.len());
        for token in tokens {
            let length = lengths.get_mut(token.sequence);
            let Some(length) = length.filter(|length| **length < self.longest) else {
                bail!(
                    "a token of sequence {} is beyond its longest length",
                    token.sequence
                )
            };
            positions.push(*length);
            *length += 1;
        }
        Ok((positions, lengths))
    }

    /// The number of features of all key heads.
    fn features(&self) -> usize {
        let arch = &self.model.arch;
        arch.num_key_value_heads * arch.head_dim
    }

    /// Makes room for sequences of `length` tokens: twice as much as there was, so that few tokens are copied often.
    fn make_room(&mut self, length: usize) {
        if length <= self.room {
            return;
        }
        let wanted = length.next_power_of_two().max(2 * LANES).min(self.longest);
        let room = wanted.max(length).next_multiple_of(LANES);
        let (features, before, device) = (self.features(), self.room, self.device);
        let sequences = self.lengths.iter().enumerate();
        let places = sequences.flat_map(|(sequence, length)| {
            // What is behind a sequence's tokens is never looked at.
            (0..room).map(move |at| {
                if at < *length {
                    sequence * before + at
                } else {
                    0
                }
            })
        });
        let places: Vec<usize> = places.collect();
        for cache in self.caches.iter_mut().flatten() {
            let mut larger = device.take(size(features, places.len()));
            if before > 0 {
                device.gather(cache, features, &places, 1., &mut larger);
            }
            device.give(std::mem::replace(cache, larger));
        }
        self.room = room;
    }

    /// The places that tokens see in layers with a sliding window, or without one.
    fn seen(&self, tokens: &[Token], positions: &[usize], window: Option<usize>) -> D::Seen {
        let places = tokens.iter().zip(positions).map(|(token, position)| {
            let (first, end) = (token.sequence * self.room, position + 1);
            let start = window.map_or(0, |window| end.saturating_sub(window));
            first + start..first + end
        });
        self.device.seen(&places.collect::<Vec<_>>())
    }

    /// The hidden states (panels) behind the last layer of tokens at these positions of their sequences.
    fn hidden(&mut self, tokens: &[Token], positions: &[usize]) -> Result<D::Buffer> {
        let (model, device, pass) = (self.model, self.device, self.pass);
        let mut layout = Layout::default();
        layout.ids = tokens.iter().map(|token| token.id).collect();
        layout.positions = positions.to_vec();
        layout.lengths = vec![self.longest; tokens.len()];
        layout.padded_index = (0..tokens.len() as u64).collect();
        let shape = Shape::new(model, &layout, device)?;
        let work = PassContext {
            shape: &shape,
            layout: &layout,
            device,
        };
        let places = tokens.iter().zip(positions);
        let places = places.map(|(token, position)| token.sequence * self.room + position);
        let places: Vec<usize> = places.collect();
        let mut all_seen: Vec<(Option<usize>, D::Seen)> = Vec::new();
        for layer in &model.layers {
            if all_seen.iter().all(|(window, _)| *window != layer.window) {
                let seen = self.seen(tokens, positions, layer.window);
                all_seen.push((layer.window, seen));
            }
        }
        let features = self.features();
        let mut x = device.take(size(shape.hidden, shape.tokens));
        let factor = model.arch.embedding_scale;
        device.lookup(&model.embed, pass, &layout.ids, factor, &mut x)?;
        for (layer, [keys, values]) in model.layers.iter().zip(&mut self.caches) {
            let weights = Layer::borrow(layer, pass)?;
            let seen = all_seen.iter().find(|(window, _)| *window == layer.window);
            let Some((_, seen)) = seen else {
                bail!("a layer without places that its tokens see")
            };
            let attend = |[q, k, v]: [&D::Buffer; 3], out: &mut D::Buffer, _: &mut D::Buffer| {
                device.store(k, features, &places, keys);
                device.store(v, features, &places, values);
                let inputs = CachedAttention {
                    q,
                    k: keys,
                    v: values,
                    heads: shape.heads,
                    scores: weights.scores,
                    seen,
                };
                device.cached_attention(inputs, out);
            };
            let (saved, out) = layer::forward_with(&weights, work, x, true, attend)?;
            saved.give_back(device);
            x = out;
        }
        Ok(x)
    }

    /// The logits (tokens, vocabulary) of hidden states behind the last layer, panels of so many tokens.
    fn logits(&self, last: &D::Buffer, count: usize) -> Result<Vec<f32>> {
        let (model, device) = (self.model, self.device);
        let (hidden, arch) = (model.arch.hidden_size, &model.arch);
        let norm = TensorView::weight(&model.norm.weight, self.pass)?;
        let mut x = device.take(size(hidden, count));
        let mut inverse = device.take(size(1, count));
        let eps = model.norm.eps as f32;
        device.rms_norm(last, device.vector(&norm)?, eps, &mut x, &mut inverse);
        device.scale(&mut x, arch.logit_scale as f32);
        let half = model.compute != DType::F32;
        let factor = device.factor(half, &x, hidden);
        let head = TensorView::weight(model.head(), self.pass)?;
        let vocabulary = arch.head_rows();
        let mut logits = device.take(logits_at_once(vocabulary, count));
        let mut parts = Vec::new();
        for ids in blocks(vocabulary, count) {
            device.shorten(&mut logits, size(ids.len(), count));
            let weight = device.rows(&head, ids.clone())?;
            product(device, &mut logits, weight, &factor, Onto::Zero);
            parts.push((ids.clone(), device.token_rows(&logits, ids.len(), count)));
        }
        device.give_factors([factor]);
        device.give_all([logits, x, inverse]);
        let (ids, rows): (Vec<Range<usize>>, Vec<D::Buffer>) = parts.into_iter().unzip();
        let rows = device.take_values(rows)?;
        let mut all = vec![0f32; count * vocabulary];
        for (ids, rows) in ids.into_iter().zip(rows) {
            let each = rows.chunks_exact(ids.len().max(1));
            for (own, part) in all.chunks_exact_mut(vocabulary.max(1)).zip(each) {
                if let Some(own) = own.get_mut(ids.clone()) {
                    own.copy_from_slice(part);
                }
            }
        }
        if let Some(cap) = arch.logit_softcap {
            vectors::soft_cap(&mut all, cap as f32);
        }
        Ok(all)
    }
}

impl<D: Caching> Decoder for CachedDecoder<'_, D> {
    fn step(&mut self, tokens: &[Token], wanted: &[usize]) -> Result<Vec<f32>> {
        if let Some(index) = wanted.iter().find(|index| **index >= tokens.len()) {
            bail!("token {index} of {} is wanted", tokens.len())
        }
        let (positions, lengths) = self.positions(tokens)?;
        self.make_room(lengths.iter().copied().max().unwrap_or(0));
        let x = self.hidden(tokens, &positions)?;
        self.lengths = lengths;
        let (device, hidden) = (self.device, self.model.arch.hidden_size);
        let logits = if wanted.is_empty() {
            Ok(Vec::new())
        } else {
            let mut last = device.take(size(hidden, wanted.len()));
            device.gather(&x, hidden, wanted, 1., &mut last);
            let logits = self.logits(&last, wanted.len());
            device.give(last);
            logits
        };
        device.give(x);
        logits
    }

    fn truncate(&mut self, text: usize, length: usize) -> Result<()> {
        match self.lengths.get_mut(text).filter(|has| **has >= length) {
            Some(has) => {
                *has = length;
                Ok(())
            }
            None => bail!("there are no {length} tokens of text {text} to keep"),
        }
    }

    fn at_once(&self) -> usize {
        AT_ONCE
    }
}
