//! Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245) over spans of tokens, forward and backward, without ever holding
//! all scores.
//!
//! A span is a run of tokens that may attend to each other: a sequence, or a prompt and the two answers that share it. A prefix that
//! several spans have in common can be a span of its own, their context, so that sequences form a tree (tree training, arXiv
//! 2511.00413). One task computes the query heads that share a key head of one span. It copies the keys and values, the context's
//! first, into panels of its own, and computes scores, softmax and weighted values for 32 queries at a time. The backward pass
//! recomputes the scores from the queries, the keys and the logarithm of each softmax's sum (Dao et al. 2022, arXiv 2205.14135,
//! section 3.1). A task keeps the gradients of its context's keys and values to itself. They are added up afterwards in the order of
//! the spans, so that results don't depend on which task ends first.

mod local;
mod loops;
mod spans;
mod tiles;

use std::ops::Range;

use rayon::prelude::*;

use crate::dispatch::run;
use crate::panels::{self, LANES, count};
use local::{Shared, TokenRanges, gather, scatter, scatter_transposed};
use loops::{
    CappedScoresBackward, Dot, Limits, Mask, ScaleLanes, ScoresBackward, SoftCap, Softmax,
};
use spans::Keys;
pub use spans::{Span, Spans, Visible};
use tiles::{product, product_transposed, transpose};

/// The numbers of heads and their width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// The number of query heads.
    pub queries: usize,
    /// The number of key heads and of value heads; each serves `queries / keys` query heads.
    pub keys: usize,
    /// The number of features of one head.
    pub width: usize,
}

impl Heads {
    /// Checks that query heads can share key heads.
    ///
    /// # Panics
    /// If the number of key heads does not divide that of query heads, or a number is 0.
    #[track_caller]
    pub fn check(self) {
        let Self {
            queries,
            keys,
            width,
        } = self;
        assert!(
            width > 0 && keys > 0 && queries > 0 && queries.is_multiple_of(keys),
            "{queries} query heads can't share {keys} key heads of the width {width}"
        );
    }
}

/// What becomes of the products of queries and keys before the softmax.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scores {
    /// The factor of the products, `1 / sqrt(width)` in most models.
    pub scale: f32,
    /// The soft-cap: the scaled product `s` becomes `cap * tanh(s / cap)` (Gemma 2, arXiv 2408.00118, section 2).
    pub softcap: Option<f32>,
}

impl Scores {
    /// The products divided by the root of the heads' width, without a soft-cap (Vaswani et al. 2017, arXiv 1706.03762, equation 1).
    pub fn of_width(width: usize) -> Self {
        Self {
            scale: (width as f32).sqrt().recip(),
            softcap: None,
        }
    }
}

/// Queries, keys and values, in panels of the same tokens.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// The queries, panels of `queries * width` features.
    pub q: &'a [f32],
    /// The keys, panels of `keys * width` features.
    pub k: &'a [f32],
    /// The values, panels of `keys * width` features.
    pub v: &'a [f32],
}

/// The gradients with respect to [`Inputs`], of the same shapes.
pub struct Gradients<'a> {
    /// The gradient with respect to the queries.
    pub q: &'a mut [f32],
    /// The gradient with respect to the keys.
    pub k: &'a mut [f32],
    /// The gradient with respect to the values.
    pub v: &'a mut [f32],
}

/// One feature of a panel's tokens.
type Row = [f32; LANES];

/// Checks that all sizes fit the heads and the tokens of the spans; `like_queries` must be panels like the queries.
///
/// # Panics
/// If they are not.
fn check(
    inputs: Inputs<'_>,
    heads: Heads,
    spans: &Spans,
    like_queries: &[&[f32]],
    log_sums: &[f32],
) {
    heads.check();
    let Heads {
        queries,
        keys,
        width,
    } = heads;
    let (q_features, k_features) = (queries.saturating_mul(width), keys.saturating_mul(width));
    let panels = count(inputs.q.len(), q_features, "the queries");
    panels::check(inputs.k.len(), k_features, panels, "the keys");
    panels::check(inputs.v.len(), k_features, panels, "the values");
    for like in like_queries {
        panels::check(like.len(), q_features, panels, "what is like the queries");
    }
    panels::check(log_sums.len(), queries, panels, "the softmax's sums");
    assert!(
        spans.end <= panels * LANES,
        "spans up to token {} in {panels} panels",
        spans.end
    );
}

/// The largest number of floats in which tasks keep gradients of contexts' keys and values at a time.
const MAX_CONTEXT_GRADS: usize = 1 << 24;

/// The query heads that share a key head of one span.
struct Task<'a> {
    span: &'a Span,
    keys: &'a Keys,
    head: usize,
    /// Receives the gradients of the context's keys and values.
    context_grads: &'a mut [f32],
}

/// The number of floats in which a task keeps the gradients of its context's keys and values, as
/// `[keys, values][chunk of 32 features][key][32 features]`.
fn context_grads_size(keys: &Keys, heads: Heads) -> usize {
    let wide = heads.width.next_multiple_of(LANES);
    keys.context.saturating_mul(2 * wide)
}

/// The tasks of some key heads. Each gets its part of `context_grads`, in the order of spans and heads.
fn tasks<'a>(
    spans: &'a Spans,
    heads: Heads,
    head_range: Range<usize>,
    mut context_grads: Option<&'a mut [f32]>,
) -> Vec<Task<'a>> {
    let mut tasks = Vec::new();
    for (span, keys) in spans.with_keys() {
        for head in head_range.clone() {
            let all = context_grads.take().unwrap_or_default();
            let own = if all.is_empty() {
                0
            } else {
                context_grads_size(keys, heads)
            };
            let (own, rest) = all.split_at_mut(own);
            context_grads = Some(rest);
            if !span.visible.is_empty() {
                tasks.push(Task {
                    span,
                    keys,
                    head,
                    context_grads: own,
                });
            }
        }
    }
    // The longest tasks come first, so that all cores finish at about the same time.
    tasks.sort_by_key(|task| std::cmp::Reverse(task.span.visible.len() * task.keys.count));
    tasks
}

/// Computes `softmax(scores) v` for each head over the keys that a token may attend to (Vaswani et al. 2017, arXiv 1706.03762,
/// equation 1); the scores are `q k^T` scaled and capped as [`Scores`] says.
///
/// `out` is panels of `queries * width` features, like the queries. `log_sums`, as many panels of `queries` features, receives the
/// logarithm of each softmax's sum. Tokens outside all spans are left unchanged in both. Panels of 32 keys to which none of 32 queries
/// may attend are skipped.
///
/// # Panics
/// If the number of key heads does not divide that of query heads, or a size does not fit the heads or the spans.
pub fn attention(
    inputs: Inputs<'_>,
    heads: Heads,
    scores: Scores,
    spans: &Spans,
    out: &mut [f32],
    log_sums: &mut [f32],
) {
    check(inputs, heads, spans, &[out], log_sums);
    let (out, log_sums) = (Shared::new(out), Shared::new(log_sums));
    tasks(spans, heads, 0..heads.keys, None)
        .into_par_iter()
        .for_each_init(
            || Buffers::new(scores),
            |buffers, task| {
                let Task { span, head, .. } = task;
                buffers.load(inputs, heads, task.keys, head);
                let tokens = [span.tokens()];
                let queries = TokenRanges::all(&tokens);
                let group = heads.queries / heads.keys;
                for query_head in head * group..(head + 1) * group {
                    for block in 0..span.visible.len().div_ceil(LANES) {
                        buffers.forward(inputs.q, heads, span, query_head, block);
                        let columns = (heads.queries * heads.width, query_head * heads.width);
                        scatter(&buffers.result, out, columns, queries, block, false);
                        let columns = (heads.queries, query_head);
                        scatter(&buffers.log_sum, log_sums, columns, queries, block, false);
                    }
                }
            },
        );
}

/// The backward pass of [`attention`]: writes the gradients with respect to the queries, keys and values of all tokens in spans to
/// `gradients`. `out` and `log_sums` are what [`attention`] wrote, `grad_out` is the gradient with respect to `out`, of its shape.
///
/// # Panics
/// As [`attention`] does.
pub fn attention_backward(
    inputs: Inputs<'_>,
    heads: Heads,
    scores: Scores,
    spans: &Spans,
    (out, log_sums, grad_out): (&[f32], &[f32], &[f32]),
    gradients: &mut Gradients<'_>,
) {
    check(
        inputs,
        heads,
        spans,
        &[out, grad_out, gradients.q],
        log_sums,
    );
    let (grad_k, grad_v) = (gradients.k.len(), gradients.v.len());
    assert_eq!(grad_k, inputs.k.len(), "the size of the keys' gradient");
    assert_eq!(grad_v, inputs.v.len(), "the size of the values' gradient");
    let (grad_q, grad_k, grad_v) = (
        Shared::new(gradients.q),
        Shared::new(gradients.k),
        Shared::new(gradients.v),
    );
    // As many heads at a time as `MAX_CONTEXT_GRADS` allows.
    let per_head: usize = spans
        .with_keys()
        .map(|(_, keys)| context_grads_size(keys, heads))
        .sum();
    let heads_at_once = MAX_CONTEXT_GRADS
        .checked_div(per_head)
        .unwrap_or(heads.keys);
    let heads_at_once = heads_at_once.clamp(1, heads.keys);
    let mut context_grads = vec![0f32; per_head * heads_at_once];
    for first in (0..heads.keys).step_by(heads_at_once) {
        let head_range = first..(first + heads_at_once).min(heads.keys);
        let context_grads = &mut context_grads[..per_head * head_range.len()];
        tasks(spans, heads, head_range.clone(), Some(context_grads))
            .into_par_iter()
            .for_each_init(
                || Buffers::new(scores),
                |buffers, task| {
                    let Task { span, head, .. } = task;
                    buffers.load(inputs, heads, task.keys, head);
                    buffers.clear(heads);
                    let tokens = [span.tokens()];
                    let queries = TokenRanges::all(&tokens);
                    let group = heads.queries / heads.keys;
                    for query_head in head * group..(head + 1) * group {
                        for block in 0..span.visible.len().div_ceil(LANES) {
                            buffers.backward(
                                inputs.q,
                                (out, log_sums, grad_out),
                                heads,
                                span,
                                query_head,
                                block,
                            );
                            let columns = (heads.queries * heads.width, query_head * heads.width);
                            scatter(&buffers.result, grad_q, columns, queries, block, false);
                        }
                    }
                    let keys = TokenRanges {
                        ranges: &task.keys.ranges,
                        skipped: task.keys.context,
                    };
                    let columns = (heads.keys * heads.width, head * heads.width, heads.width);
                    scatter_transposed(&buffers.grad_k, grad_k, columns, keys, false);
                    scatter_transposed(&buffers.grad_v, grad_v, columns, keys, false);
                    buffers.keep_context_grads(heads, task.keys, task.context_grads);
                },
            );
        if per_head > 0 {
            add_context_grads(spans, heads, head_range, context_grads, [grad_k, grad_v]);
        }
    }
}

/// Adds the gradients that spans kept for the keys and values of their contexts.
fn add_context_grads(
    spans: &Spans,
    heads: Heads,
    head_range: Range<usize>,
    context_grads: &[f32],
    outs: [Shared; 2],
) {
    // For each span, the index at which the part of its first head begins, and the size of a part.
    let parts: Vec<(usize, usize, &Keys)> = spans
        .with_keys()
        .scan(0, |start, (_, keys)| {
            let (first, size) = (*start, context_grads_size(keys, heads));
            *start += size * head_range.len();
            Some((first, size, keys))
        })
        .collect();
    let users = spans.users();
    let mut tasks = Vec::new();
    for (span, users) in spans.iter().zip(&users) {
        if !users.is_empty() && !span.visible.is_empty() {
            tasks.extend(head_range.clone().map(|head| (span, users, head)));
        }
    }
    tasks.into_par_iter().for_each(|(span, users, head)| {
        let tokens = [span.tokens()];
        let (count, blocks) = (span.visible.len(), span.visible.len().div_ceil(LANES));
        let chunks = heads.width.div_ceil(LANES);
        let mut sums = vec![0f32; chunks * blocks * LANES * LANES];
        for (which, out) in outs.into_iter().enumerate() {
            sums.fill(0.);
            for &(user, first) in users {
                let (start, size, keys) = parts[user];
                let part = &context_grads[start + size * (head - head_range.start)..][..size];
                for (chunk, sums) in sums.chunks_mut(blocks * LANES * LANES).enumerate() {
                    let index = ((which * chunks + chunk) * keys.context + first) * LANES;
                    let values = &part[index..index + count * LANES];
                    for (sum, value) in sums.iter_mut().zip(values) {
                        *sum += value;
                    }
                }
            }
            let columns = (heads.keys * heads.width, head * heads.width, heads.width);
            scatter_transposed(&sums, out, columns, TokenRanges::all(&tokens), true);
        }
    });
}

/// One task's buffers.
struct Buffers {
    options: Scores,
    keys: Vec<f32>,   // [panel][width][32 keys]
    values: Vec<f32>, // the same
    query: Vec<f32>,  // [width][32 queries], multiplied by the scores' scale
    scores: Vec<f32>, // [panel in `seen`][32 keys][32 queries]
    seen: Vec<usize>, // the panels of keys to which any of the queries attends
    result: Vec<f32>, // [width][32 queries]
    log_sum: Vec<f32>,
    grad_scores: Vec<f32>, // like scores
    grad_result: Vec<f32>, // [width][32 queries]
    transposed: Vec<f32>,  // [chunk of 32 features][32 queries][32 features]
    grad_k: Vec<f32>,      // [chunk of 32 features][keys][32 features]
    grad_v: Vec<f32>,      // the same
}

impl Buffers {
    fn new(options: Scores) -> Self {
        Self {
            options,
            keys: Vec::new(),
            values: Vec::new(),
            query: Vec::new(),
            scores: Vec::new(),
            seen: Vec::new(),
            result: Vec::new(),
            log_sum: Vec::new(),
            grad_scores: Vec::new(),
            grad_result: Vec::new(),
            transposed: Vec::new(),
            grad_k: Vec::new(),
            grad_v: Vec::new(),
        }
    }

    fn load(&mut self, inputs: Inputs<'_>, heads: Heads, keys: &Keys, head: usize) {
        let (features, first) = (heads.keys * heads.width, head * heads.width);
        let blocks = keys.count.div_ceil(LANES);
        let tokens = TokenRanges::all(&keys.ranges);
        let size = heads.width * LANES;
        for (data, out) in [(inputs.k, &mut self.keys), (inputs.v, &mut self.values)] {
            out.resize(blocks * size, 0.);
            for (block, out) in out.chunks_mut(size).enumerate() {
                gather(data, features, first, tokens, block, out);
            }
        }
    }

    fn clear(&mut self, heads: Heads) {
        let keys = self.keys.len() / heads.width;
        let size = heads.width.div_ceil(LANES) * keys * LANES;
        for sums in [&mut self.grad_k, &mut self.grad_v] {
            sums.clear();
            sums.resize(size, 0.);
        }
    }

    /// Copies the gradients of the context's keys and values to `out`, see [`context_grads_size`].
    fn keep_context_grads(&self, heads: Heads, keys: &Keys, out: &mut [f32]) {
        let all = keys.count.div_ceil(LANES) * LANES * LANES;
        let chunks = heads.width.div_ceil(LANES);
        let sums = self.grad_k.chunks_exact(all).take(chunks);
        let sums = sums.chain(self.grad_v.chunks_exact(all).take(chunks));
        let own = (keys.context * LANES).max(1);
        for (out, sums) in out.chunks_exact_mut(own).zip(sums) {
            out.copy_from_slice(&sums[..own]);
        }
    }

    /// Computes the scores of 32 queries, -inf where they may not attend.
    fn scores(&mut self, q: &[f32], heads: Heads, span: &Span, query_head: usize, block: usize) {
        let width = heads.width;
        self.query.resize(width * LANES, 0.);
        let first = query_head * width;
        let tokens = [span.tokens()];
        let queries = TokenRanges::all(&tokens);
        gather(
            q,
            heads.queries * width,
            first,
            queries,
            block,
            &mut self.query,
        );
        for x in &mut self.query {
            *x *= self.options.scale;
        }
        // Lanes after the last query have the last one's limits.
        let limits: [Visible; LANES] = std::array::from_fn(|lane| {
            let index = (block * LANES + lane).min(span.visible.len() - 1);
            span.visible[index]
        });
        let limits = Limits::new(&limits);
        self.seen.clear();
        let blocks = self.keys.len() / (width * LANES);
        self.seen
            .extend((0..blocks).filter(|block| limits.sees(block * LANES)));
        self.scores.resize(self.seen.len() * LANES * LANES, 0.);
        let scores = self.scores.chunks_exact_mut(LANES * LANES);
        for (&panel, scores) in self.seen.iter().zip(scores) {
            let keys = &self.keys[panel * width * LANES..][..width * LANES];
            product_transposed(keys, &self.query, scores);
            if let Some(cap) = self.options.softcap {
                run(SoftCap(scores, cap));
            }
            if !limits.sees_all(panel * LANES) {
                run(Mask(scores, &limits, panel * LANES));
            }
        }
    }

    fn forward(&mut self, q: &[f32], heads: Heads, span: &Span, query_head: usize, block: usize) {
        self.scores(q, heads, span, query_head, block);
        let (log_sum, inverse) = run(Softmax(&mut self.scores));
        self.log_sum.clear();
        self.log_sum.extend(log_sum);
        let width = heads.width;
        self.result.resize(width * LANES, 0.);
        let scores = self.scores.chunks_exact(LANES * LANES);
        for (number, (&panel, p)) in self.seen.iter().zip(scores).enumerate() {
            let values = &self.values[panel * width * LANES..][..width * LANES];
            product(values, width, p, &mut self.result, number > 0);
        }
        run(ScaleLanes(&mut self.result, &inverse));
    }

    fn backward(
        &mut self,
        q: &[f32],
        (out, log_sums, grad_out): (&[f32], &[f32], &[f32]),
        heads: Heads,
        span: &Span,
        query_head: usize,
        block: usize,
    ) {
        let width = heads.width;
        let (features, first) = (heads.queries * width, query_head * width);
        self.scores(q, heads, span, query_head, block);
        let tokens = [span.tokens()];
        let queries = TokenRanges::all(&tokens);
        self.log_sum.resize(LANES, 0.);
        gather(
            log_sums,
            heads.queries,
            query_head,
            queries,
            block,
            &mut self.log_sum,
        );
        self.result.resize(width * LANES, 0.);
        gather(out, features, first, queries, block, &mut self.result);
        self.grad_result.resize(width * LANES, 0.);
        gather(
            grad_out,
            features,
            first,
            queries,
            block,
            &mut self.grad_result,
        );
        // sum over keys of p * (v . grad_out) = out . grad_out
        let delta = run(Dot(&self.result, &self.grad_result));
        self.grad_scores.resize(self.scores.len(), 0.);
        let grad_scores = self.grad_scores.chunks_exact_mut(LANES * LANES);
        let scores = self.scores.chunks_exact_mut(LANES * LANES);
        // Lanes after the last query contribute nothing.
        let lanes = (span.visible.len() - block * LANES).min(LANES);
        for ((&panel, p), grad_scores) in self.seen.iter().zip(scores).zip(grad_scores) {
            let values = &self.values[panel * width * LANES..][..width * LANES];
            product_transposed(values, &self.grad_result, grad_scores);
            let backward = ScoresBackward {
                p,
                values: grad_scores,
                log_sum: &self.log_sum,
                delta: &delta,
                lanes,
            };
            match self.options.softcap {
                None => run(backward),
                Some(cap) => run(CappedScoresBackward(backward, cap)),
            }
        }
        let keys = self.keys.len() / width;
        for (data, left, sums) in [
            (&self.grad_result, &self.scores, &mut self.grad_v),
            (&self.query, &self.grad_scores, &mut self.grad_k),
        ] {
            transpose(data, width, &mut self.transposed);
            let left = left.chunks_exact(LANES * LANES);
            for (&panel, left) in self.seen.iter().zip(left) {
                let chunks = self.transposed.chunks_exact(LANES * LANES).enumerate();
                for (chunk, right) in chunks {
                    let index = (chunk * keys + panel * LANES) * LANES;
                    let out = &mut sums[index..index + LANES * LANES];
                    product(left, LANES, right, out, true);
                }
            }
        }
        let grad_scores = self.grad_scores.chunks_exact(LANES * LANES);
        for (number, (&panel, grad_scores)) in self.seen.iter().zip(grad_scores).enumerate() {
            let keys = &self.keys[panel * width * LANES..][..width * LANES];
            product(keys, width, grad_scores, &mut self.result, number > 0);
        }
        let scale = [self.options.scale; LANES];
        run(ScaleLanes(&mut self.result, &scale));
    }
}

#[cfg(test)]
pub(crate) mod tests;
