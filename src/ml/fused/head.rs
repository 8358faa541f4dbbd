//! The end of the model: log-probabilities of given ids and their gradient in one pass over the vocabulary.
//!
//! The gradient of `logp(id | h) = (W h)_id - log sum e^(W h)` with respect to `h` is `W_id - W^T softmax(W h)`. Its factor in the loss is
//! known only when all log-probabilities are, but it is a single number for each target. So `W^T softmax(W h)` is computed at once, while the
//! logits are in memory, and nothing is computed twice. The vocabulary is processed in blocks, each for all tokens, whose logits stay in the
//! third-level cache; when a block has a larger logit than those before, the earlier sums are scaled down (online softmax, see
//! [`pipeline_kernels::vocabulary`]).
//!
//! A factor of the logits becomes one of the hidden states. With a soft-cap a logit is `cap tanh(l / cap)` with `l = (W h)_id`, whose slope
//! `1 - tanh^2` multiplies each row of `W` in the gradient.

use std::collections::HashMap;
use std::ops::Range;

use candle_core::{DType, Result, Tensor};
use pipeline_kernels::panels::{LANES, column, fill, panels, size};
use pipeline_kernels::product::{Onto, Term, product};
use pipeline_kernels::reduce::{Order, outer};
use pipeline_kernels::vocabulary::{Summary, online_softmax, sum_capped};
use rayon::prelude::*;

use super::Forward;
use super::layout::Layout;
use super::weights::TensorView;
use crate::ml::model::Gradients;
use crate::ml::model::batch::Target;
use crate::ml::model::head::TokenStats;

/// The number of logits in memory at once, 16 MiB. It is small in tests, so that small vocabularies have several blocks.
const AT_ONCE: usize = if cfg!(test) { 1 << 12 } else { 1 << 22 };
/// The smallest number of ids in a block, and a divisor of that of all blocks but the last: the depth of a block of a product.
const IDS: usize = 512;

/// Scored targets.
pub(super) struct Scored {
    /// The log-probability of each target, in nats.
    pub(super) logps: Vec<f32>,
    /// The entropy and the arg max at each target, if requested.
    pub(super) token_stats: Option<Vec<TokenStats>>,
    /// The tokens whose hidden states were scored.
    tokens: Vec<usize>,
    /// For each target, the index of its token in `tokens`, and its id.
    rows: Vec<(usize, u32)>,
    /// The slope of each target's logit with respect to the product of the head and the hidden state; empty without a soft-cap.
    slopes: Vec<f32>,
    /// `W^T softmax(W h)` of each token (with a soft-cap `W^T` times softmax and slopes), in panels; empty if no gradient was requested.
    expected_head_row: Vec<f32>,
    /// The statistics of each panel's logits.
    summaries: Vec<Summary>,
}

/// The token in the layout from which a target is predicted.
pub(super) fn token(layout: &Layout, target: &Target) -> Result<usize> {
    let token_indices = layout.token_indices.get(target.row);
    match token_indices.and_then(|token_indices| token_indices.get(target.position.wrapping_sub(1)))
    {
        Some(&token) => Ok(token),
        None => candle_core::bail!("a target lies outside the batch"),
    }
}

/// Copies the hidden states of some tokens, times the logits' factor, into panels of their own.
fn gather(forward: &Forward<'_>, tokens: &[usize], out: &mut [f32]) {
    let hidden = forward.shape.hidden;
    let factor = forward.model.arch.logit_scale as f32;
    let rows: Vec<Vec<f32>> = tokens
        .iter()
        .map(|&token| {
            let column = column(&forward.hidden, hidden, token);
            column.map(|x| x * factor).collect()
        })
        .collect();
    fill(out, hidden, tokens.len(), |row| {
        rows.get(row).map_or(&[], Vec::as_slice)
    });
}

/// The number of ids in a block of the vocabulary for this number of tokens.
fn block(tokens: usize) -> usize {
    let ids = AT_ONCE / size(1, tokens).max(1);
    (ids / IDS).max(1) * IDS
}

/// The most logits of so many tokens that are in memory at a time.
pub(super) fn logits_at_once(vocabulary: usize, tokens: usize) -> usize {
    size(block(tokens).min(vocabulary), tokens)
}

/// The blocks of a vocabulary.
fn blocks(vocabulary: usize, tokens: usize) -> impl Iterator<Item = Range<usize>> {
    let ids = block(tokens);
    let starts = (0..vocabulary).step_by(ids);
    starts.map(move |start| start..(start + ids).min(vocabulary))
}

pub(super) fn score(
    forward: &Forward<'_>,
    targets: &[Target],
    token_stats: bool,
    gradient: bool,
) -> Result<Scored> {
    let (model, shape) = (forward.model, &forward.shape);
    let mut tokens = Vec::new();
    let mut known = HashMap::new();
    let mut rows = Vec::with_capacity(targets.len());
    for target in targets {
        let token = token(&forward.layout, target)?;
        let row = *known.entry(token).or_insert_with(|| {
            tokens.push(token);
            tokens.len() - 1
        });
        rows.push((row, target.id));
    }
    let held = TensorView::weight(model.head(), forward.pass)?;
    let (vocabulary, hidden) = (held.matrix()?.height(), shape.hidden);
    if let Some((_, id)) = rows.iter().find(|(_, id)| *id as usize >= vocabulary) {
        candle_core::bail!("the id {id} lies outside the vocabulary of {vocabulary}")
    }
    let (pool, half) = (forward.pool, shape.half);
    let softcap = softcap(forward);
    let mut scored = Scored {
        logps: vec![0.; targets.len()],
        token_stats: token_stats.then(|| vec![TokenStats::default(); targets.len()]),
        expected_head_row: Vec::new(),
        slopes: Vec::new(),
        summaries: Vec::new(),
        tokens,
        rows,
    };
    if gradient {
        scored.expected_head_row = pool.take(size(hidden, scored.tokens.len()));
    }
    let count = scored.tokens.len();
    let mut x = pool.take(size(hidden, count));
    gather(forward, &scored.tokens, &mut x);
    let factor = pool.factor(half, &x, hidden);
    // The targets in the order of their ids, so that each block finds its own.
    let mut by_id: Vec<usize> = (0..scored.rows.len()).collect();
    by_id.sort_by_key(|&target| scored.rows[target].1);
    let mut by_id = by_id.into_iter().peekable();
    let mut chosen = vec![0f32; scored.rows.len()];
    let mut summaries = vec![Summary::EMPTY; panels(count)];
    let mut buffer = pool.take(logits_at_once(vocabulary, count));
    for ids in blocks(vocabulary, count) {
        let logits = &mut buffer[..size(ids.len(), count)];
        let weight = held.rows(ids.clone())?;
        product(logits, vec![Term { weight, x: &factor }], Onto::Zero);
        while let Some(target) = by_id.next_if(|&target| (scored.rows[target].1 as usize) < ids.end)
        {
            let (row, id) = scored.rows[target];
            let index = row / LANES * ids.len() + (id as usize - ids.start);
            chosen[target] = logits[index * LANES + row % LANES];
        }
        let factors = online_softmax(logits, ids.clone(), softcap, &mut summaries);
        if gradient {
            let expected_head_row = &mut scored.expected_head_row;
            let onto = if ids.start == 0 {
                Onto::Zero
            } else {
                multiply(expected_head_row, hidden, &factors);
                Onto::Out
            };
            let factor = pool.factor(half, logits, ids.len());
            let term = Term {
                weight: weight.transposed(),
                x: &factor,
            };
            product(expected_head_row, vec![term], onto);
            pool.give_factors([factor]);
        }
    }
    pool.give(buffer);
    pool.give_factors([factor]);
    pool.give(x);
    if let Some(cap) = softcap {
        let tanh = |logit: &f32| (logit / cap).tanh();
        let slopes = chosen.iter().map(|logit| 1. - tanh(logit).powi(2));
        scored.slopes = slopes.collect();
        for logit in &mut chosen {
            *logit = cap * tanh(logit);
        }
    }
    for (target, (row, id)) in scored.rows.iter().enumerate() {
        let (summary, lane) = (&summaries[row / LANES], row % LANES);
        scored.logps[target] = (f64::from(chosen[target]) - summary.log_sum(lane)) as f32;
        if let Some(token_stats) = &mut scored.token_stats {
            token_stats[target] = TokenStats {
                entropy: summary.entropy(lane),
                is_argmax: summary.argmax[lane] == *id,
                log_sum_sq_probs: summary.log_sum_sq_probs(lane),
            };
        }
    }
    if gradient {
        let inverse: Vec<[f32; LANES]> = summaries.iter().map(|s| s.sum.map(f32::recip)).collect();
        multiply(&mut scored.expected_head_row, hidden, &inverse);
    }
    scored.summaries = summaries;
    Ok(scored)
}

/// The soft-cap of the logits, if there is one.
fn softcap(forward: &Forward<'_>) -> Option<f32> {
    forward.model.arch.logit_softcap.map(|cap| cap as f32)
}

/// The sum over the vocabulary of the logits of each of these tokens, with a soft-cap.
pub(super) fn capped_sums(forward: &Forward<'_>, tokens: &[usize], cap: f32) -> Result<Vec<f64>> {
    let (pool, hidden, count) = (forward.pool, forward.shape.hidden, tokens.len());
    let held = TensorView::weight(forward.model.head(), forward.pass)?;
    let vocabulary = held.matrix()?.height();
    let mut x = pool.take(size(hidden, count));
    gather(forward, tokens, &mut x);
    let factor = pool.factor(forward.shape.half, &x, hidden);
    let mut buffer = pool.take(logits_at_once(vocabulary, count));
    let mut sums = vec![[0f64; LANES]; panels(count)];
    for ids in blocks(vocabulary, count) {
        let logits = &mut buffer[..size(ids.len(), count)];
        let weight = held.rows(ids)?;
        product(logits, vec![Term { weight, x: &factor }], Onto::Zero);
        sum_capped(logits, cap, &mut sums);
    }
    pool.give(buffer);
    pool.give_factors([factor]);
    pool.give(x);
    Ok(sums.into_iter().flatten().take(count).collect())
}

/// Multiplies each token's features by its factor.
fn multiply(data: &mut [f32], features: usize, factors: &[[f32; LANES]]) {
    let panels = data.par_chunks_mut(features * LANES).zip(factors);
    panels.for_each(|(panel, factors)| {
        if factors.iter().all(|x| x.to_bits() == 1f32.to_bits()) {
            return;
        }
        for row in panel.as_chunks_mut::<LANES>().0 {
            for (x, factor) in row.iter_mut().zip(factors) {
                *x *= factor;
            }
        }
    });
}

impl Scored {
    /// The backward pass: from the gradient with respect to each log-probability (targets), writes that with respect to the hidden states
    /// (panels), and adds that with respect to the head's weight to `gradients` if it is trained.
    pub(super) fn backward(
        mut self,
        forward: &Forward<'_>,
        grad_logps: &[f32],
        grad_hidden: &mut [f32],
        gradients: &mut Gradients,
    ) -> Result<()> {
        let (model, hidden) = (forward.model, forward.shape.hidden);
        grad_hidden.fill(0.);
        let mut sums = vec![0f32; self.tokens.len()];
        let ids: Vec<u32> = self.rows.iter().map(|(_, id)| *id).collect();
        let ids = Tensor::from_vec(ids, self.rows.len(), &model.device)?;
        let at_id = model.head().value(forward.pass).index_select(&ids, 0)?;
        let at_id = at_id
            .to_dtype(DType::F32)?
            .flatten_all()?
            .to_vec1::<f32>()?;
        for ((row, _), g) in self.rows.iter().zip(grad_logps) {
            sums[*row] += g;
        }
        let logit_scale = model.arch.logit_scale as f32;
        let expected_head_row = std::mem::take(&mut self.expected_head_row);
        for (row, (&token, sum)) in self.tokens.iter().zip(&sums).enumerate() {
            let out = &mut grad_hidden[token / LANES * hidden * LANES + token % LANES..];
            let values = column(&expected_head_row, hidden, row);
            let factor = sum * logit_scale;
            for (out, value) in out.iter_mut().step_by(LANES).zip(values) {
                *out -= factor * value;
            }
        }
        forward.pool.give(expected_head_row);
        let grad_logits = self.grad_logits(grad_logps, logit_scale);
        for (((row, _), g), weight) in self.rows.iter().zip(&grad_logits).zip(at_id.chunks(hidden))
        {
            let token = self.tokens[*row];
            let out = &mut grad_hidden[token / LANES * hidden * LANES + token % LANES..];
            for (out, value) in out.iter_mut().step_by(LANES).zip(weight) {
                *out += g * value;
            }
        }
        if model.trains_head() {
            self.grad_weight(forward, &sums, &grad_logits, gradients)?;
        }
        Ok(())
    }

    /// The gradient of each target's log-probability with respect to the product of the head's row and the hidden state, but for the part
    /// through the sum over the vocabulary.
    fn grad_logits(&self, grad_logps: &[f32], logit_scale: f32) -> Vec<f32> {
        let mut grads: Vec<f32> = grad_logps.iter().map(|g| g * logit_scale).collect();
        for (grad, slope) in grads.iter_mut().zip(&self.slopes) {
            *grad *= slope;
        }
        grads
    }

    /// Adds the gradient with respect to the head's weight, `sum g (e_id - softmax(W h)) h^T`, for which the softmax is recomputed.
    fn grad_weight(
        &self,
        forward: &Forward<'_>,
        sums: &[f32],
        grad_logits: &[f32],
        gradients: &mut Gradients,
    ) -> Result<()> {
        let (model, shape) = (forward.model, &forward.shape);
        let (pool, hidden) = (forward.pool, shape.hidden);
        let Some(var) = model.head().trained() else {
            return Ok(());
        };
        // Where some rows alone are trained, the others' gradients are not needed.
        let weight = model
            .head()
            .trained_rows(model.head().stored(forward.pass))?;
        let held = TensorView::tensor(&weight);
        let (vocabulary, count) = (held.matrix()?.height(), self.tokens.len());
        let mut total = vec![0f32; vocabulary * hidden];
        let mut x = pool.take(size(hidden, count));
        gather(forward, &self.tokens, &mut x);
        let factor = pool.factor(shape.half, &x, hidden);
        let mut buffer = pool.take(logits_at_once(vocabulary, count));
        for ids in blocks(vocabulary, count) {
            let logits = &mut buffer[..size(ids.len(), count)];
            let weight = held.rows(ids.clone())?;
            product(logits, vec![Term { weight, x: &factor }], Onto::Zero);
            // The summaries are those of the whole vocabulary, so these exponentials need no correction.
            let softcap = softcap(forward);
            online_softmax(logits, ids.clone(), softcap, &mut self.summaries.clone());
            let panels = self.summaries.iter().enumerate();
            let factors: Vec<[f32; LANES]> = panels
                .map(|(panel, summary)| {
                    std::array::from_fn(|lane| {
                        let sum = sums.get(panel * LANES + lane);
                        sum.map_or(0., |g| -g / summary.sum[lane])
                    })
                })
                .collect();
            multiply(logits, ids.len(), &factors);
            outer(
                (logits, ids.len()),
                (&x, hidden),
                &mut total[ids.start * hidden..ids.end * hidden],
                Order::Straight,
            );
        }
        pool.give(buffer);
        pool.give_factors([factor]);
        pool.give(x);
        for ((row, id), g) in self.rows.iter().zip(grad_logits) {
            let Some(trained) = model.head().trained_row(*id) else {
                continue;
            };
            let out = &mut total[trained * hidden..][..hidden];
            let values = column(&forward.hidden, hidden, self.tokens[*row]);
            for (out, value) in out.iter_mut().zip(values) {
                *out += g * value;
            }
        }
        gradients.add_values(model, var, total)
    }
}
