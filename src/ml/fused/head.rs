//! The end of the model: log-probabilities of given ids and their gradient in one pass over the vocabulary.
//!
//! The gradient of `logp(id | h) = (W h)_id - log sum e^(W h)` for `h` is `W_id - W^T softmax(W h)`. What it is multiplied by
//! is known only when all log-probabilities are, but that is one number a target: so `W^T softmax(W h)` is made at once, while
//! the logits are in memory, and nothing is computed twice. Tokens go through in chunks that bound the memory of the logits.

use std::collections::HashMap;

use candle_core::{DType, Result, Tensor};
use pipeline_kernels::panels::{LANES, column, fill, size};
use pipeline_kernels::product::{Onto, Term, product};
use pipeline_kernels::reduce::{Order, outer};
use pipeline_kernels::vocabulary::{Summary, exponentials};

use super::Forward;
use super::weights::Held;
use crate::ml::batch::Target;
use crate::ml::head::Certainty;
use crate::ml::model::Gradients;

/// The number of logits in one chunk.
const CHUNK: usize = 1 << 24;

/// Scored targets.
pub struct Scored {
    /// The log-probability of each target.
    pub logps: Vec<f32>,
    /// How sure the model is of each, if asked for.
    pub certainty: Option<Vec<Certainty>>,
    /// Tokens whose hidden states were scored.
    tokens: Vec<usize>,
    /// For each target, which of those, and its id.
    rows: Vec<(usize, u32)>,
    /// `W^T softmax(W h)` of each token, in panels; empty if no gradient was asked for.
    spread: Vec<f32>,
}

/// The hidden states of some tokens, in panels of their own.
fn gather(forward: &Forward<'_>, tokens: &[usize], out: &mut [f32]) {
    let hidden = forward.shape.hidden;
    let rows: Vec<Vec<f32>> = tokens
        .iter()
        .map(|&token| column(&forward.hidden, hidden, token).collect())
        .collect();
    fill(out, hidden, tokens.len(), |row| {
        rows.get(row).map_or(&[], Vec::as_slice)
    });
}

/// Tokens of one chunk.
fn chunk(vocabulary: usize) -> usize {
    (CHUNK / (vocabulary.max(1) * LANES)).max(1) * LANES
}

pub(super) fn score(
    forward: &Forward<'_>,
    targets: &[Target],
    certainty: bool,
    gradient: bool,
) -> Result<Scored> {
    let (model, shape) = (forward.model, &forward.shape);
    let mut tokens = Vec::new();
    let mut known = HashMap::new();
    let mut rows = Vec::with_capacity(targets.len());
    for target in targets {
        let places = forward.layout.places.get(target.row);
        let Some(&token) = places.and_then(|places| places.get(target.position.wrapping_sub(1)))
        else {
            candle_core::bail!("a target lies outside the batch")
        };
        let row = *known.entry(token).or_insert_with(|| {
            tokens.push(token);
            tokens.len() - 1
        });
        rows.push((row, target.id));
    }
    let mut by_row: Vec<Vec<usize>> = vec![Vec::new(); tokens.len()];
    for (target, (row, _)) in rows.iter().enumerate() {
        by_row[*row].push(target);
    }
    let weight = Held::weight(model.head(), forward.pass)?;
    let weight = weight.matrix()?;
    let (vocabulary, hidden) = (weight.height(), shape.hidden);
    if let Some((_, id)) = rows.iter().find(|(_, id)| *id as usize >= vocabulary) {
        candle_core::bail!("the id {id} lies outside the vocabulary of {vocabulary}")
    }
    let (pool, half) = (&model.pool, shape.half);
    let mut scored = Scored {
        logps: vec![0.; targets.len()],
        certainty: certainty.then(|| vec![Certainty::default(); targets.len()]),
        spread: Vec::new(),
        tokens,
        rows,
    };
    if gradient {
        scored.spread = pool.take(size(hidden, scored.tokens.len()));
    }
    for (number, part) in scored.tokens.chunks(chunk(vocabulary)).enumerate() {
        let first = number * chunk(vocabulary);
        let mut x = pool.take(size(hidden, part.len()));
        gather(forward, part, &mut x);
        let wide = pool.factor(half, &x, hidden);
        let mut logits = pool.take(size(vocabulary, part.len()));
        product(&mut logits, vec![Term { weight, x: &wide }], Onto::Zero);
        pool.give_factors([wide]);
        pool.give(x);
        let at = |row: usize, id: u32| {
            let place = (row / LANES * vocabulary + id as usize) * LANES + row % LANES;
            logits[place]
        };
        let chosen: Vec<(usize, usize, f32)> = (0..part.len())
            .flat_map(|row| by_row[first + row].iter().map(move |&target| (row, target)))
            .map(|(row, target)| (row, target, at(row, scored.rows[target].1)))
            .collect();
        let summaries = exponentials(&mut logits, vocabulary);
        for (row, target, logit) in chosen {
            let summary = &summaries[row / LANES];
            let lane = row % LANES;
            scored.logps[target] = (f64::from(logit) - summary.log_sum(lane)) as f32;
            if let Some(certainty) = &mut scored.certainty {
                certainty[target] = Certainty {
                    entropy: summary.entropy(lane),
                    is_first: summary.first[lane] == scored.rows[target].1,
                };
            }
        }
        if gradient {
            let start = first / LANES * hidden * LANES;
            let spread = &mut scored.spread[start..start + size(hidden, part.len())];
            let wide = pool.factor(half, &logits, vocabulary);
            let term = Term {
                weight: weight.turned(),
                x: &wide,
            };
            product(spread, vec![term], Onto::Zero);
            pool.give_factors([wide]);
            divide(spread, hidden, &summaries);
        }
        pool.give(logits);
    }
    Ok(scored)
}

/// Divides each token's features by its sum of exponentials.
fn divide(data: &mut [f32], features: usize, summaries: &[Summary]) {
    for (panel, summary) in data.chunks_mut(features * LANES).zip(summaries) {
        let inverse = summary.sum.map(f32::recip);
        for row in panel.as_chunks_mut::<LANES>().0 {
            for (x, inverse) in row.iter_mut().zip(inverse) {
                *x *= inverse;
            }
        }
    }
}

impl Scored {
    /// From the gradient of each log-probability: writes that of the hidden states, and adds that of the head's weight if it
    /// is trained.
    pub(super) fn backward(
        mut self,
        forward: &Forward<'_>,
        of_logps: &[f32],
        of_hidden: &mut [f32],
        gradients: &mut Gradients,
    ) -> Result<()> {
        let (model, hidden) = (forward.model, forward.shape.hidden);
        of_hidden.fill(0.);
        let mut sums = vec![0f32; self.tokens.len()];
        let ids: Vec<u32> = self.rows.iter().map(|(_, id)| *id).collect();
        let ids = Tensor::from_vec(ids, self.rows.len(), &model.device)?;
        let at_id = model.head().value(forward.pass).index_select(&ids, 0)?;
        let at_id = at_id
            .to_dtype(DType::F32)?
            .flatten_all()?
            .to_vec1::<f32>()?;
        for ((row, _), g) in self.rows.iter().zip(of_logps) {
            sums[*row] += g;
        }
        let spread = std::mem::take(&mut self.spread);
        for (row, (&token, sum)) in self.tokens.iter().zip(&sums).enumerate() {
            let out = &mut of_hidden[token / LANES * hidden * LANES + token % LANES..];
            let values = column(&spread, hidden, row);
            for (out, value) in out.iter_mut().step_by(LANES).zip(values) {
                *out -= sum * value;
            }
        }
        model.pool.give(spread);
        for (((row, _), g), weight) in self.rows.iter().zip(of_logps).zip(at_id.chunks(hidden)) {
            let token = self.tokens[*row];
            let out = &mut of_hidden[token / LANES * hidden * LANES + token % LANES..];
            for (out, value) in out.iter_mut().step_by(LANES).zip(weight) {
                *out += g * value;
            }
        }
        if model.trains_head() {
            self.of_weight(forward, &sums, of_logps, gradients)?;
        }
        Ok(())
    }

    /// The head's gradient: `sum g (e_id - softmax(W h)) h^T`, the softmax made again.
    fn of_weight(
        &self,
        forward: &Forward<'_>,
        sums: &[f32],
        of_logps: &[f32],
        gradients: &mut Gradients,
    ) -> Result<()> {
        let (model, shape) = (forward.model, &forward.shape);
        let (pool, hidden) = (&model.pool, shape.hidden);
        let Some(var) = model.head().trained() else {
            return Ok(());
        };
        let held = Held::weight(model.head(), forward.pass)?;
        let weight = held.matrix()?;
        let vocabulary = weight.height();
        let mut total = vec![0f32; vocabulary * hidden];
        for (number, part) in self.tokens.chunks(chunk(vocabulary)).enumerate() {
            let first = number * chunk(vocabulary);
            let mut x = pool.take(size(hidden, part.len()));
            gather(forward, part, &mut x);
            let mut logits = pool.take(size(vocabulary, part.len()));
            let wide = pool.factor(shape.half, &x, hidden);
            product(&mut logits, vec![Term { weight, x: &wide }], Onto::Zero);
            let summaries = exponentials(&mut logits, vocabulary);
            let panels = logits.chunks_mut(vocabulary * LANES).zip(&summaries);
            for (panel, (logits, summary)) in panels.enumerate() {
                let factors: [f32; LANES] = std::array::from_fn(|lane| {
                    let sum = sums.get(first + panel * LANES + lane);
                    sum.map_or(0., |g| -g / summary.sum[lane])
                });
                for row in logits.as_chunks_mut::<LANES>().0 {
                    for (x, factor) in row.iter_mut().zip(factors) {
                        *x *= factor;
                    }
                }
            }
            outer(
                (&logits, vocabulary),
                (&x, hidden),
                &mut total,
                Order::Straight,
            );
            pool.give_factors([wide]);
            pool.give(x);
            pool.give(logits);
        }
        for ((row, id), g) in self.rows.iter().zip(of_logps) {
            let out = &mut total[*id as usize * hidden..][..hidden];
            let values = column(&forward.hidden, hidden, self.tokens[*row]);
            for (out, value) in out.iter_mut().zip(values) {
                *out += g * value;
            }
        }
        gradients.add_values(model, var, total)
    }
}
