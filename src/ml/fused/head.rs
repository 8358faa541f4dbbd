//! The end of the model: log-probabilities of given ids and their gradient in one pass over the vocabulary.
//!
//! The gradient of `logp(id | h) = (W h)_id - log sum e^(W h)` with respect to `h` is `W_id - W^T softmax(W h)`. Its factor in the loss is
//! known only when all log-probabilities are, but it is a single number for each target. So `W^T softmax(W h)` is computed at once, while the
//! logits are in memory, and nothing is computed twice. The vocabulary is processed in blocks, each for all tokens, whose logits stay in the
//! third-level cache; when a block has a larger logit than those before, the earlier sums are scaled down (online softmax, see
//! [`pipeline_kernels::vocabulary`]).
//!
//! Label smoothing takes the part `e` of each target's probability and spreads it over the vocabulary of V ids: the score is
//! `(1 - e) (W h)_id + e mean(W h) - log sum e^(W h)`. As logits are linear in the rows of `W`, the mean and its gradient take nothing but the
//! sum of these rows, which is taken off `W^T softmax(W h)` with the factor `e / V`.
//!
//! A factor of the logits becomes one of the hidden states. With a soft-cap a logit is `cap tanh(l / cap)` with `l = (W h)_id`, whose slope
//! `1 - tanh^2` multiplies each row of `W` in the gradient. Then the mean's gradient is `W^T` times the slopes, of each token its own.

use std::collections::HashMap;
use std::ops::Range;

use candle_core::{DType, Result, bail};
use pipeline_kernels::panels::{LANES, fill, panels, size};
use pipeline_kernels::reduce::Order;

use super::Forward;
use super::device::{Device, Factor, Onto, Product, Term, Transpose as _};
use super::layout::Layout;
use super::trainable::Trainable;
use super::weights::TensorView;
use crate::ml::model::batch::Target;
use crate::ml::model::head::TokenStats;

/// The number of logits in memory at once, 16 MiB. It is small in tests, so that small vocabularies have several blocks.
const AT_ONCE: usize = if cfg!(test) { 1 << 12 } else { 1 << 22 };
/// The smallest number of ids in a block, and a divisor of that of all blocks but the last: the depth of a block of a product.
const IDS: usize = 512;

/// Scored targets.
pub(super) struct Scored<D: Device> {
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
    /// `W^T softmax(W h)` of each token (with a soft-cap `W^T` times softmax and slopes, with label smoothing `W^T (softmax(W h) - e / V)`), in
    /// panels; empty if no gradient was requested.
    expected_head_row: D::Buffer,
    /// The part e of each target's probability that is spread over the vocabulary.
    label_smoothing: f64,
    /// The statistics of each panel's logits.
    summaries: D::Summaries,
}

/// The token in the layout from which a target is predicted.
pub(super) fn token(layout: &Layout, target: &Target) -> Result<usize> {
    let token_indices = layout.token_indices.get(target.row);
    match token_indices.and_then(|token_indices| token_indices.get(target.position.wrapping_sub(1)))
    {
        Some(&token) => Ok(token),
        None => bail!("a target lies outside the batch"),
    }
}

/// The hidden states of some tokens, times the logits' factor, in panels of their own.
fn gather<D: Device>(forward: &Forward<'_, D>, tokens: &[usize]) -> D::Buffer {
    let (device, hidden) = (forward.device, forward.shape.hidden);
    let factor = forward.model.arch.logit_scale as f32;
    let mut out = device.take(size(hidden, tokens.len()));
    device.gather(&forward.hidden, hidden, tokens, factor, &mut out);
    out
}

/// `out = weight x`, onto what is there.
pub(super) fn product<D: Device>(
    device: &D,
    out: &mut D::Buffer,
    weight: D::Matrix<'_>,
    x: &Factor<'_, D>,
    onto: Onto<'_, D>,
) {
    device.products(vec![Product {
        out,
        terms: vec![Term { weight, x }],
        onto,
        bias: None,
    }]);
}

/// Panels of so many features, each of which is the value of its token; zeros in the lanes behind the last token.
fn token_values(features: usize, values: &[f32]) -> Vec<f32> {
    let mut out = vec![0f32; size(features, values.len())];
    for (panel, own) in out
        .chunks_mut((features * LANES).max(1))
        .zip(values.chunks(LANES))
    {
        for feature in panel.chunks_mut(LANES) {
            feature[..own.len()].copy_from_slice(own);
        }
    }
    out
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
pub(super) fn blocks(vocabulary: usize, tokens: usize) -> impl Iterator<Item = Range<usize>> {
    let ids = block(tokens);
    let starts = (0..vocabulary).step_by(ids);
    starts.map(move |start| start..(start + ids).min(vocabulary))
}

pub(super) fn score<D: Device>(
    forward: &Forward<'_, D>,
    targets: &[Target],
    token_stats: bool,
    gradient: bool,
) -> Result<Scored<D>> {
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
    let (vocabulary, hidden) = (held.shape()?.0, shape.hidden);
    if let Some((_, id)) = rows.iter().find(|(_, id)| *id as usize >= vocabulary) {
        bail!("the id {id} lies outside the vocabulary of {vocabulary}")
    }
    let (device, half) = (forward.device, shape.half);
    let count = tokens.len();
    let softcap = softcap(forward);
    let mut scored = Scored {
        logps: vec![0.; targets.len()],
        token_stats: token_stats.then(|| vec![TokenStats::default(); targets.len()]),
        expected_head_row: D::Buffer::default(),
        label_smoothing: forward.pass.label_smoothing,
        slopes: Vec::new(),
        summaries: device.summaries(panels(count)),
        tokens,
        rows,
    };
    if gradient {
        scored.expected_head_row = device.take(size(hidden, count));
    }
    let x = gather(forward, &scored.tokens);
    let factor = device.factor(half, &x, hidden);
    // The targets in the order of their ids, so that each block finds its own.
    let mut by_id: Vec<usize> = (0..scored.rows.len()).collect();
    by_id.sort_by_key(|&target| scored.rows[target].1);
    let mut by_id = by_id.into_iter().peekable();
    let mut chosen = device.zeros(scored.rows.len());
    let mut logits = device.take(logits_at_once(vocabulary, count));
    let spreads = gradient && scored.label_smoothing > 0.;
    let mut spread = softcap.filter(|_| spreads).map(|cap| Spread {
        cap,
        slopes: device.take(logits_at_once(vocabulary, count)),
        rows: device.take(size(hidden, count)),
    });
    for ids in blocks(vocabulary, count) {
        device.shorten(&mut logits, size(ids.len(), count));
        let weight = device.rows(&held, ids.clone())?;
        product(device, &mut logits, weight.clone(), &factor, Onto::Zero);
        let mut here = Vec::new();
        while let Some(target) = by_id.next_if(|&target| (scored.rows[target].1 as usize) < ids.end)
        {
            let (row, id) = scored.rows[target];
            let index = row / LANES * ids.len() + (id as usize - ids.start);
            here.push((index * LANES + row % LANES, target));
        }
        device.pick(&logits, &here, &mut chosen);
        if let Some(spread) = &mut spread {
            spread.add(forward, &logits, ids.clone(), weight.clone());
        }
        let summaries = &mut scored.summaries;
        let factors = device.online_softmax(&mut logits, ids.clone(), softcap, summaries);
        if gradient {
            let expected_head_row = &mut scored.expected_head_row;
            let onto = if ids.start == 0 {
                Onto::Zero
            } else {
                device.multiply(expected_head_row, hidden, &factors);
                Onto::Out
            };
            let factor = device.factor(half, &logits, ids.len());
            let weight = weight.transposed();
            product(device, expected_head_row, weight, &factor, onto);
            device.give_factors([factor]);
        }
    }
    device.give(logits);
    device.give_factors([factor]);
    device.give(x);
    let mut chosen = device.take_values(vec![chosen])?.pop().unwrap_or_default();
    if let Some(cap) = softcap {
        let tanh = |logit: &f32| (logit / cap).tanh();
        let slopes = chosen.iter().map(|logit| 1. - tanh(logit).powi(2));
        scored.slopes = slopes.collect();
        for logit in &mut chosen {
            *logit = cap * tanh(logit);
        }
    }
    let smoothing = scored.label_smoothing;
    let means = if smoothing > 0. {
        forward.mean_logits(&scored.tokens)?
    } else {
        Vec::new()
    };
    let summaries = device.summary_values(&scored.summaries)?;
    for (target, (row, id)) in scored.rows.iter().enumerate() {
        let (summary, lane) = (&summaries[row / LANES], row % LANES);
        let mut logit = f64::from(chosen[target]);
        if let Some(mean) = means.get(*row) {
            logit = (1. - smoothing) * logit + smoothing * mean;
        }
        scored.logps[target] = (logit - summary.log_sum(lane)) as f32;
        if let Some(token_stats) = &mut scored.token_stats {
            token_stats[target] = TokenStats {
                entropy: summary.entropy(lane),
                is_argmax: summary.argmax[lane] == *id,
                log_sum_sq_probs: summary.log_sum_sq_probs(lane),
            };
        }
    }
    if gradient {
        let inverse = summaries.iter().flat_map(|s| s.sum.map(f32::recip));
        let inverse = device.upload(inverse.collect());
        device.multiply(&mut scored.expected_head_row, hidden, &inverse);
        let factor = -(smoothing / model.arch.head_rows() as f64);
        if let Some(Spread { slopes, rows, .. }) = spread {
            device.add(&mut scored.expected_head_row, &rows, factor as f32);
            device.give_all([slopes, rows]);
        } else if smoothing > 0. {
            let sums = forward.column_sums()?;
            let row: Vec<f32> = sums.iter().map(|sum| (factor * sum) as f32).collect();
            let mut panels = vec![0f32; size(hidden, count)];
            fill(&mut panels, hidden, count, |_| &row);
            device.add(&mut scored.expected_head_row, &device.upload(panels), 1.);
        }
    }
    drop(summaries);
    Ok(scored)
}

/// What label smoothing adds to the gradient of logits with a soft-cap: `W^T` times their slopes.
struct Spread<D: Device> {
    cap: f32,
    /// The slopes of a block's logits, in panels.
    slopes: D::Buffer,
    /// The sum over the blocks so far of the head's rows times slopes, for each token in panels.
    rows: D::Buffer,
}

impl<D: Device> Spread<D> {
    /// Adds a block, whose products with the head are `products` and whose rows of the head are `weight`.
    fn add(
        &mut self,
        forward: &Forward<'_, D>,
        products: &D::Buffer,
        ids: Range<usize>,
        weight: D::Matrix<'_>,
    ) {
        let device = forward.device;
        device.shorten(&mut self.slopes, device.length(products));
        device.copy(products, &mut self.slopes);
        device.soft_cap_slopes(&mut self.slopes, self.cap);
        let factor = device.factor(forward.shape.half, &self.slopes, ids.len());
        let onto = if ids.start == 0 {
            Onto::Zero
        } else {
            Onto::Out
        };
        product(device, &mut self.rows, weight.transposed(), &factor, onto);
        device.give_factors([factor]);
    }
}

/// The soft-cap of the logits, if there is one.
fn softcap<D: Device>(forward: &Forward<'_, D>) -> Option<f32> {
    forward.model.arch.logit_softcap.map(|cap| cap as f32)
}

/// The sum over the vocabulary of the logits of each of these tokens, with a soft-cap.
pub(super) fn capped_sums<D: Device>(
    forward: &Forward<'_, D>,
    tokens: &[usize],
    cap: f32,
) -> Result<Vec<f64>> {
    let (device, hidden, count) = (forward.device, forward.shape.hidden, tokens.len());
    let held = TensorView::weight(forward.model.head(), forward.pass)?;
    let vocabulary = held.shape()?.0;
    let x = gather(forward, tokens);
    let factor = device.factor(forward.shape.half, &x, hidden);
    let mut logits = device.take(logits_at_once(vocabulary, count));
    let mut sums = vec![[0f64; LANES]; panels(count)];
    for ids in blocks(vocabulary, count) {
        device.shorten(&mut logits, size(ids.len(), count));
        let weight = device.rows(&held, ids)?;
        product(device, &mut logits, weight, &factor, Onto::Zero);
        device.sum_capped(&logits, cap, &mut sums)?;
    }
    device.give(logits);
    device.give_factors([factor]);
    device.give(x);
    Ok(sums.into_iter().flatten().take(count).collect())
}

/// The backward pass of a head that gives one number `w h` of a hidden state: from the gradient with respect to each target's number, writes
/// that with respect to the hidden states (panels), and adds that with respect to w to `gradients` if it is trained.
pub(super) fn backward_scores<D: Device>(
    forward: &Forward<'_, D>,
    targets: &[Target],
    grad_scores: &[f32],
    trainable: &mut Trainable<'_, D>,
) -> Result<D::Buffer> {
    let (model, device, hidden) = (forward.model, forward.device, forward.shape.hidden);
    let tokens = targets.iter().map(|target| token(&forward.layout, target));
    let tokens: Vec<usize> = tokens.collect::<Result<_>>()?;
    let grad_hidden = if D::ON_HOST {
        let weight = model.head().value(forward.pass).to_dtype(DType::F32)?;
        let weight = weight.flatten_all()?.to_vec1::<f32>()?;
        let mut grad_hidden = vec![0f32; device.length(&forward.hidden)];
        for (&token, g) in tokens.iter().zip(grad_scores) {
            let out = &mut grad_hidden[token / LANES * hidden * LANES + token % LANES..];
            for (out, w) in out.iter_mut().step_by(LANES).zip(&weight) {
                *out += g * w;
            }
        }
        device.upload(grad_hidden)
    } else {
        let mut grad_hidden = device.zeros(device.length(&forward.hidden));
        let mut rows = device.zeros(size(hidden, tokens.len()));
        let ids = vec![0; tokens.len()];
        device.lookup(model.head(), forward.pass, &ids, 1., &mut rows)?;
        device.scatter(&rows, hidden, grad_scores, &tokens, &mut grad_hidden);
        grad_hidden
    };
    if model.head().trained().is_some() {
        let rows: Vec<(usize, f32, usize)> = tokens
            .iter()
            .zip(grad_scores)
            .map(|(&token, &g)| (token, g, 0))
            .collect();
        trainable.add(model.head(), |device, sum| {
            device.add_to_rows(&forward.hidden, hidden, &rows, sum);
            Ok(())
        })?;
    }
    Ok(grad_hidden)
}

impl<D: Device> Scored<D> {
    /// The backward pass: from the gradient with respect to each log-probability (targets), writes that with respect to the hidden states
    /// (panels), and adds that with respect to the head's weight to `trainable` if it is trained.
    pub(super) fn backward(
        self,
        forward: &Forward<'_, D>,
        grad_logps: &[f32],
        grad_hidden: &mut D::Buffer,
        trainable: &mut Trainable<'_, D>,
    ) -> Result<()> {
        let (model, device) = (forward.model, forward.device);
        let hidden = forward.shape.hidden;
        device.clear(grad_hidden);
        let mut sums = vec![0f32; self.tokens.len()];
        for ((row, _), g) in self.rows.iter().zip(grad_logps) {
            sums[*row] += g;
        }
        let logit_scale = model.arch.logit_scale as f32;
        let factors: Vec<f32> = sums.iter().map(|sum| -(sum * logit_scale)).collect();
        let expected = &self.expected_head_row;
        device.scatter(expected, hidden, &factors, &self.tokens, grad_hidden);
        let ids: Vec<u32> = self.rows.iter().map(|(_, id)| *id).collect();
        let mut at_id = device.zeros(size(hidden, ids.len()));
        device.lookup(model.head(), forward.pass, &ids, 1., &mut at_id)?;
        let grad_logits = self.grad_logits(grad_logps, logit_scale);
        let tokens = self.rows.iter().map(|(row, _)| self.tokens[*row]);
        let tokens: Vec<usize> = tokens.collect();
        device.scatter(&at_id, hidden, &grad_logits, &tokens, grad_hidden);
        drop(at_id);
        self.grad_weight(forward, &sums, &grad_logits, trainable)?;
        device.give(self.expected_head_row);
        Ok(())
    }

    /// The gradient of each target's log-probability with respect to the product of the head's row and the hidden state, but for the part
    /// through the sum over the vocabulary.
    fn grad_logits(&self, grad_logps: &[f32], logit_scale: f32) -> Vec<f32> {
        let own = (1. - self.label_smoothing) as f32 * logit_scale;
        let mut grads: Vec<f32> = grad_logps.iter().map(|g| g * own).collect();
        for (grad, slope) in grads.iter_mut().zip(&self.slopes) {
            *grad *= slope;
        }
        grads
    }

    /// Adds the gradient with respect to the head's weight, `sum g (e_id - softmax(W h)) h^T`, for which the softmax is recomputed; with label
    /// smoothing `sum g ((1 - e) e_id + e / V - softmax(W h)) h^T`.
    fn grad_weight(
        &self,
        forward: &Forward<'_, D>,
        sums: &[f32],
        grad_logits: &[f32],
        trainable: &mut Trainable<'_, D>,
    ) -> Result<()> {
        let (model, shape) = (forward.model, &forward.shape);
        let (hidden, head) = (shape.hidden, model.head());
        if !model.trains_head() || head.trained().is_none() {
            return Ok(());
        }
        // Where some rows alone are trained, the others' gradients are not needed.
        let weight = head.trained_rows(head.stored(forward.pass))?;
        let held = TensorView::tensor(&weight);
        let (vocabulary, count) = (held.shape()?.0, self.tokens.len());
        trainable.add(head, |device, total| {
            let x = gather(forward, &self.tokens);
            let factor = device.factor(shape.half, &x, hidden);
            let mut logits = device.take(logits_at_once(vocabulary, count));
            // The summaries are those of the whole vocabulary, so these exponentials need no correction.
            let summaries = device.summary_values(&self.summaries)?;
            let inverse = summaries.iter().enumerate().flat_map(|(panel, summary)| {
                let factor = move |lane: usize| {
                    let sum = sums.get(panel * LANES + lane);
                    sum.map_or(0., |g| -g / summary.sum[lane])
                };
                (0..LANES).map(factor)
            });
            let inverse = device.upload(inverse.collect());
            let of_each = self.label_smoothing / model.arch.head_rows() as f64;
            let of_each: Vec<f32> = sums
                .iter()
                .map(|g| (f64::from(*g) * of_each) as f32)
                .collect();
            // What label smoothing adds to the gradient of each logit, with the number of ids that it is for: that of a block.
            let mut spread: Option<(usize, D::Buffer)> = None;
            for ids in blocks(vocabulary, count) {
                device.shorten(&mut logits, size(ids.len(), count));
                let weight = device.rows(&held, ids.clone())?;
                product(device, &mut logits, weight, &factor, Onto::Zero);
                let mut known = device.same_summaries(&self.summaries);
                let softcap = softcap(forward);
                let spreads = self.label_smoothing > 0.;
                let slopes = softcap.filter(|_| spreads).map(|cap| {
                    let mut slopes = device.take(device.length(&logits));
                    device.copy(&logits, &mut slopes);
                    device.soft_cap_slopes(&mut slopes, cap);
                    slopes
                });
                device.online_softmax(&mut logits, ids.clone(), softcap, &mut known);
                device.multiply(&mut logits, ids.len(), &inverse);
                if let Some(mut slopes) = slopes {
                    let mut of_each = of_each.clone();
                    of_each.resize(size(1, count), 0.);
                    device.multiply(&mut slopes, ids.len(), &device.upload(of_each));
                    device.add(&mut logits, &slopes, 1.);
                    device.give(slopes);
                } else if spreads {
                    let known = spread.take().filter(|(height, _)| *height == ids.len());
                    let known = known.unwrap_or_else(|| {
                        let values = token_values(ids.len(), &of_each);
                        (ids.len(), device.upload(values))
                    });
                    let (_, values) = spread.insert(known);
                    device.add(&mut logits, values, 1.);
                }
                let first = ids.start * hidden;
                let factors = ((&logits, ids.len()), (&x, hidden));
                device.outer(factors.0, factors.1, total, first, Order::Straight);
            }
            device.give(logits);
            device.give_factors([factor]);
            device.give(x);
            let targets = self.rows.iter().zip(grad_logits);
            let targets = targets
                .filter_map(|((row, id), g)| Some((self.tokens[*row], *g, head.trained_row(*id)?)));
            let targets: Vec<(usize, f32, usize)> = targets.collect();
            device.add_to_rows(&forward.hidden, hidden, &targets, total);
            Ok(())
        })
    }
}
