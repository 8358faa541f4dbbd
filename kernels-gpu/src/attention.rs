//! Grouped-query attention over spans of tokens, forward and backward, without ever holding all scores, see
//! [`pipeline_kernels::attention`].
//!
//! The tokens of each span are cut into blocks of 32. A cube computes the queries of a block for one head: it goes through the 32 keys of
//! each block that any of its queries sees, and keeps the softmax's largest score and sum for what it has seen so far (Dao et al. 2022, arXiv
//! 2205.14135, algorithm 1). The backward pass computes the scores again from the logarithms of these sums, once for the queries of a block
//! and once for the keys of a block; the latter takes all blocks of queries that see them in a fixed order, so nothing is added by two cubes
//! at a time. Which keys are seen is laid down in [`Spans`].

use cubecl::prelude::*;
use pipeline_kernels::attention::{Heads, Scores};
use pipeline_kernels::panels::LANES;

use crate::buffer::Buffer;
use crate::device::Device;
use crate::elementwise::{check, count};
use crate::kernels::{LANES as WIDE, PARTS, exp_down, lanes_and_parts, tanh};
use crate::spans::{KEY_BLOCK, QUERY_BLOCK, Spans};

/// The keys whose scores a unit computes at a time: 32 over the parts of a cube.
const EACH: usize = WIDE / PARTS;
/// Less than any score.
pub(crate) const LOWEST: f32 = -1.0e30;

/// Where feature 0 of head `head` of a token is in panels of `heads` heads.
#[cube]
pub(crate) fn place(token: usize, heads: usize, head: usize, #[comptime] width: usize) -> usize {
    ((token / WIDE * heads + head) * width) * WIDE + token % WIDE
}

/// Where the sum of a token's softmax for head `head` is, in panels of `heads` values.
#[cube]
fn place_of_sum(token: usize, heads: usize, head: usize) -> usize {
    (token / WIDE * heads + head) * WIDE + token % WIDE
}

/// The token of a unit: that of its lane in a block of queries or of keys.
#[derive(CubeType)]
struct Own {
    /// The number of tokens of the block. Lanes behind the last one do what it does, and write nothing.
    count: usize,
    /// Which token of the block it is.
    number: usize,
    token: usize,
}

/// The token of a unit of a cube of lanes and parts, in the block that is described at `block`.
#[cube]
fn own_of(tables: &[u32], block: usize) -> Own {
    let count = tables[block + 1] as usize;
    let number = (UNIT_POS_X as usize).min(count - 1);
    Own {
        count,
        number,
        token: tables[block] as usize + number,
    }
}

/// What a unit needs of its query: that of its lane in a block, for the head of its cube.
#[derive(CubeType)]
struct Query {
    /// The number of queries of the block, see [`Own`].
    count: usize,
    /// The key head that the query's head shares.
    key_head: usize,
    /// Where feature 0 of the query is.
    place: usize,
    /// Where the sum of its softmax is.
    at_sum: usize,
    /// Where the tokens of the span's keys are listed, and how many they are.
    key_list: usize,
    key_count: u32,
    /// Where the blocks of keys are listed that the queries see some of, and how many they are.
    seen: usize,
    blocks: usize,
    /// Where the query's limits are.
    limits: usize,
}

/// The query of a unit of a cube of lanes and parts; there is a cube for each block of queries and query head.
#[cube]
fn query_of(tables: &[u32], queries: usize, keys: usize, #[comptime] width: usize) -> Query {
    let head = CUBE_POS % queries;
    let block = CUBE_POS / queries * QUERY_BLOCK;
    let own = own_of(tables, block);
    Query {
        count: own.count,
        key_head: head / (queries / keys),
        place: place(own.token, queries, head, width),
        at_sum: place_of_sum(own.token, queries, head),
        key_list: tables[block + 2] as usize,
        key_count: tables[block + 3],
        seen: tables[block + 4] as usize,
        blocks: tables[block + 5] as usize,
        limits: tables[block + 6] as usize + own.number * 4,
    }
}

/// Whether a token with limits at `limits` attends to a key.
#[cube]
fn attends(tables: &[u32], limits: usize, key: u32) -> bool {
    let ours = key < tables[limits + 1] || key >= tables[limits + 2];
    ours && key >= tables[limits] && key < tables[limits + 3]
}

/// A score from the product of a query and a key.
#[cube]
pub(crate) fn score(product: f32, scale: f32, cap: f32, #[comptime] capped: bool) -> f32 {
    let scaled = product * scale;
    if comptime!(capped) {
        cap * tanh(scaled / cap)
    } else {
        scaled
    }
}

/// The derivative of a score with respect to the product.
#[cube]
fn slope(score: f32, scale: f32, cap: f32, #[comptime] capped: bool) -> f32 {
    if comptime!(capped) {
        let t = score / cap;
        scale * (1.0f32 - t * t)
    } else {
        scale
    }
}

/// One cube for each block of queries and query head. Its lanes are the queries, its parts share the keys and then the features.
#[cube(launch)]
fn forward_kernel(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    tables: &[u32],
    out: &mut [f32],
    log_sums: &mut [f32],
    queries: u32,
    keys: u32,
    cubes: u32,
    scale: f32,
    cap: f32,
    #[comptime] width: usize,
    #[comptime] capped: bool,
) {
    let lane = UNIT_POS_X as usize;
    let part = UNIT_POS_Y as usize;
    let (queries, keys) = (queries as usize, keys as usize);
    let mut shared = Shared::<[f32]>::new_slice(WIDE * WIDE);
    let mut sums = Array::<f32>::new(comptime!(width.div_ceil(PARTS)));
    if CUBE_POS < cubes as usize {
        let own = query_of(tables, queries, keys, width);
        let mut largest = f32::new(LOWEST);
        let mut sum = 0.0f32;
        for number in 0..own.blocks {
            let first = tables[own.seen + number] * WIDE as u32;
            let mut visible = 0u32;
            #[unroll]
            for j in 0..EACH {
                let key = first + (part * EACH + j) as u32;
                let mut value = f32::new(LOWEST);
                if key < own.key_count && attends(tables, own.limits, key) {
                    let key_token = tables[own.key_list + key as usize] as usize;
                    let at = place(key_token, keys, own.key_head, width);
                    let mut product = 0.0f32;
                    for feature in 0..width {
                        product += q[own.place + feature * WIDE] * k[at + feature * WIDE];
                    }
                    value = score(product, scale, cap, capped);
                    visible |= 1u32 << (j as u32);
                }
                shared[(part * EACH + j) * WIDE + lane] = value;
            }
            sync_cube();
            let mut top = largest;
            for key in 0..WIDE {
                top = top.max(shared[key * WIDE + lane]);
            }
            sync_cube();
            #[unroll]
            for j in 0..EACH {
                let index = (part * EACH + j) * WIDE + lane;
                let mut p = 0.0f32;
                if (visible >> (j as u32)) & 1 == 1 {
                    p = exp_down(shared[index] - top);
                }
                shared[index] = p;
            }
            sync_cube();
            let factor = exp_down(largest - top);
            largest = top;
            sum *= factor;
            #[unroll]
            for i in 0..comptime!(width.div_ceil(PARTS)) {
                sums[i] *= factor;
            }
            let last = (own.key_count - first).min(WIDE as u32) as usize;
            for key in 0..last {
                let p = shared[key * WIDE + lane];
                sum += p;
                let key_token = tables[own.key_list + first as usize + key] as usize;
                let at = place(key_token, keys, own.key_head, width);
                #[unroll]
                for i in 0..comptime!(width.div_ceil(PARTS)) {
                    let feature = i * PARTS + part;
                    if feature < width {
                        sums[i] += p * v[at + feature * WIDE];
                    }
                }
            }
            sync_cube();
        }
        if lane < own.count {
            #[unroll]
            for i in 0..comptime!(width.div_ceil(PARTS)) {
                let feature = i * PARTS + part;
                if feature < width {
                    out[own.place + feature * WIDE] = sums[i] / sum;
                }
            }
            if part == 0 {
                log_sums[own.at_sum] = largest + sum.ln();
            }
        }
    }
}

/// The product of each query head's result and its gradient: a unit for each token and head.
#[cube(launch)]
fn delta_kernel(out: &[f32], grad_out: &[f32], delta: &mut [f32], #[comptime] width: usize) {
    let index = ABSOLUTE_POS;
    if index < delta.len() {
        let start = index / WIDE * width * WIDE + index % WIDE;
        let mut sum = 0.0f32;
        for feature in 0..width {
            sum += out[start + feature * WIDE] * grad_out[start + feature * WIDE];
        }
        delta[index] = sum;
    }
}

/// The gradient with respect to the queries: one cube for each block of queries and query head.
#[cube(launch)]
fn grad_q_kernel(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    tables: &[u32],
    log_sums: &[f32],
    delta: &[f32],
    grad_out: &[f32],
    grad_q: &mut [f32],
    queries: u32,
    keys: u32,
    cubes: u32,
    scale: f32,
    cap: f32,
    #[comptime] width: usize,
    #[comptime] capped: bool,
) {
    let lane = UNIT_POS_X as usize;
    let part = UNIT_POS_Y as usize;
    let (queries, keys) = (queries as usize, keys as usize);
    let mut shared = Shared::<[f32]>::new_slice(WIDE * WIDE);
    let mut sums = Array::<f32>::new(comptime!(width.div_ceil(PARTS)));
    if CUBE_POS < cubes as usize {
        let own = query_of(tables, queries, keys, width);
        let log_sum = log_sums[own.at_sum];
        let own_delta = delta[own.at_sum];
        for number in 0..own.blocks {
            let first = tables[own.seen + number] * WIDE as u32;
            #[unroll]
            for j in 0..EACH {
                let key = first + (part * EACH + j) as u32;
                let mut grad = 0.0f32;
                if key < own.key_count && attends(tables, own.limits, key) {
                    let key_token = tables[own.key_list + key as usize] as usize;
                    let at = place(key_token, keys, own.key_head, width);
                    let mut product = 0.0f32;
                    let mut grad_p = 0.0f32;
                    for feature in 0..width {
                        let step = feature * WIDE;
                        product += q[own.place + step] * k[at + step];
                        grad_p += grad_out[own.place + step] * v[at + step];
                    }
                    let s = score(product, scale, cap, capped);
                    // Rounding may take a score beyond the logarithm of the sum by a little.
                    let p = exp_down((s - log_sum).min(0.0f32));
                    grad = p * (grad_p - own_delta) * slope(s, scale, cap, capped);
                }
                shared[(part * EACH + j) * WIDE + lane] = grad;
            }
            sync_cube();
            let last = (own.key_count - first).min(WIDE as u32) as usize;
            for key in 0..last {
                let grad = shared[key * WIDE + lane];
                let key_token = tables[own.key_list + first as usize + key] as usize;
                let at = place(key_token, keys, own.key_head, width);
                #[unroll]
                for i in 0..comptime!(width.div_ceil(PARTS)) {
                    let feature = i * PARTS + part;
                    if feature < width {
                        sums[i] += grad * k[at + feature * WIDE];
                    }
                }
            }
            sync_cube();
        }
        if lane < own.count {
            #[unroll]
            for i in 0..comptime!(width.div_ceil(PARTS)) {
                let feature = i * PARTS + part;
                if feature < width {
                    grad_q[own.place + feature * WIDE] = sums[i];
                }
            }
        }
    }
}

/// The gradients with respect to keys and values: one cube for each block of keys and key head, whose lanes are the keys.
#[cube(launch)]
fn grad_kv_kernel(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    tables: &[u32],
    log_sums: &[f32],
    delta: &[f32],
    grad_out: &[f32],
    grad_k: &mut [f32],
    grad_v: &mut [f32],
    queries: u32,
    keys: u32,
    cubes: u32,
    blocks: u32,
    scale: f32,
    cap: f32,
    #[comptime] width: usize,
    #[comptime] capped: bool,
) {
    let lane = UNIT_POS_X as usize;
    let part = UNIT_POS_Y as usize;
    let (queries, keys) = (queries as usize, keys as usize);
    let mut shared_p = Shared::<[f32]>::new_slice(WIDE * WIDE);
    let mut shared_grad = Shared::<[f32]>::new_slice(WIDE * WIDE);
    let mut sums_k = Array::<f32>::new(comptime!(width.div_ceil(PARTS)));
    let mut sums_v = Array::<f32>::new(comptime!(width.div_ceil(PARTS)));
    if CUBE_POS < cubes as usize {
        let key_head = CUBE_POS % keys;
        let block = blocks as usize * QUERY_BLOCK + CUBE_POS / keys * KEY_BLOCK;
        let own = own_of(tables, block);
        let list = tables[block + 2] as usize;
        let at = place(own.token, keys, key_head, width);
        let group = queries / keys;
        for number in 0..tables[block + 3] as usize {
            let other = tables[list + number * 2] as usize * QUERY_BLOCK;
            let key = tables[list + number * 2 + 1] + own.number as u32;
            let first_query = tables[other] as usize;
            let query_count = tables[other + 1] as usize;
            let limits = tables[other + 6] as usize;
            for member in 0..group {
                let head = key_head * group + member;
                #[unroll]
                for j in 0..EACH {
                    let number = part * EACH + j;
                    let mut p = 0.0f32;
                    let mut grad = 0.0f32;
                    if number < query_count
                        && lane < own.count
                        && attends(tables, limits + number * 4, key)
                    {
                        let query_token = first_query + number;
                        let query = place(query_token, queries, head, width);
                        let mut product = 0.0f32;
                        let mut grad_p = 0.0f32;
                        for feature in 0..width {
                            let step = feature * WIDE;
                            product += q[query + step] * k[at + step];
                            grad_p += grad_out[query + step] * v[at + step];
                        }
                        let at_sum = place_of_sum(query_token, queries, head);
                        let s = score(product, scale, cap, capped);
                        p = exp_down((s - log_sums[at_sum]).min(0.0f32));
                        grad = p * (grad_p - delta[at_sum]) * slope(s, scale, cap, capped);
                    }
                    shared_p[number * WIDE + lane] = p;
                    shared_grad[number * WIDE + lane] = grad;
                }
                sync_cube();
                for number in 0..query_count {
                    let p = shared_p[number * WIDE + lane];
                    let grad = shared_grad[number * WIDE + lane];
                    let query = place(first_query + number, queries, head, width);
                    #[unroll]
                    for i in 0..comptime!(width.div_ceil(PARTS)) {
                        let feature = i * PARTS + part;
                        if feature < width {
                            sums_k[i] += grad * q[query + feature * WIDE];
                            sums_v[i] += p * grad_out[query + feature * WIDE];
                        }
                    }
                }
                sync_cube();
            }
        }
        if lane < own.count {
            #[unroll]
            for i in 0..comptime!(width.div_ceil(PARTS)) {
                let feature = i * PARTS + part;
                if feature < width {
                    grad_k[at + feature * WIDE] = sums_k[i];
                    grad_v[at + feature * WIDE] = sums_v[i];
                }
            }
        }
    }
}

/// What an attention computes with, see [`pipeline_kernels::attention::attention`].
#[derive(Debug, Clone, Copy)]
pub struct Attention<'a> {
    /// The queries, panels of `queries * width` features.
    pub q: &'a Buffer,
    /// The keys, panels of `keys * width` features.
    pub k: &'a Buffer,
    /// The values, panels of `keys * width` features.
    pub v: &'a Buffer,
    /// The numbers of heads and their width.
    pub heads: Heads,
    /// What becomes of the products of queries and keys.
    pub scores: Scores,
    /// Which tokens attend to which.
    pub spans: &'a Spans,
}

impl Attention<'_> {
    /// Checks all sizes. `like_queries` must be panels like the queries.
    #[track_caller]
    fn check(&self, like_queries: &[&Buffer], log_sums: &Buffer) {
        self.heads.check();
        let Heads {
            queries,
            keys,
            width,
        } = self.heads;
        let panels = count(self.q, queries * width, "the queries");
        check(self.k, keys * width, panels, "the keys");
        check(self.v, keys * width, panels, "the values");
        for like in like_queries {
            check(like, queries * width, panels, "what is like the queries");
        }
        check(log_sums, queries, panels, "the softmax's sums");
        let end = self.spans.end;
        assert!(
            end <= panels * LANES,
            "spans up to token {end} in {panels} panels"
        );
    }
}

impl Device {
    /// See [`pipeline_kernels::attention::attention`]. Tokens outside all spans are left unchanged.
    ///
    /// # Panics
    /// As it does.
    pub fn attention(&self, inputs: Attention<'_>, out: &mut Buffer, log_sums: &mut Buffer) {
        inputs.check(&[out], log_sums);
        let Attention {
            q,
            k,
            v,
            heads,
            scores,
            spans,
        } = inputs;
        let cubes = spans.blocks * heads.queries;
        if self.idle(cubes) {
            return;
        }
        forward_kernel::launch(
            &self.client,
            self.cubes(cubes),
            lanes_and_parts(),
            q.arg(),
            k.arg(),
            v.arg(),
            spans.tables.arg(),
            out.arg(),
            log_sums.arg(),
            heads.queries as u32,
            heads.keys as u32,
            cubes as u32,
            scores.scale,
            scores.softcap.unwrap_or(1.),
            heads.width,
            scores.softcap.is_some(),
        );
    }

    /// See [`pipeline_kernels::attention::attention_backward`]. `gradients` are those with respect to queries, keys and values.
    ///
    /// # Panics
    /// As it does.
    pub fn attention_backward(
        &self,
        inputs: Attention<'_>,
        (out, log_sums, grad_out): (&Buffer, &Buffer, &Buffer),
        [grad_q, grad_k, grad_v]: [&mut Buffer; 3],
    ) {
        inputs.check(&[out, grad_out, grad_q], log_sums);
        let Attention {
            q,
            k,
            v,
            heads,
            scores,
            spans,
        } = inputs;
        assert_eq!(grad_k.len(), k.len(), "the size of the keys' gradient");
        assert_eq!(grad_v.len(), v.len(), "the size of the values' gradient");
        if self.idle(spans.blocks) {
            return;
        }
        let delta = self.take(log_sums.len());
        if self.idle(1) {
            return;
        }
        let (cubes, units) = self.units(delta.len());
        delta_kernel::launch(
            &self.client,
            cubes,
            units,
            out.arg(),
            grad_out.arg(),
            delta.arg(),
            heads.width,
        );
        let (cap, capped) = (scores.softcap.unwrap_or(1.), scores.softcap.is_some());
        let cubes = spans.blocks * heads.queries;
        grad_q_kernel::launch(
            &self.client,
            self.cubes(cubes),
            lanes_and_parts(),
            q.arg(),
            k.arg(),
            v.arg(),
            spans.tables.arg(),
            log_sums.arg(),
            delta.arg(),
            grad_out.arg(),
            grad_q.arg(),
            heads.queries as u32,
            heads.keys as u32,
            cubes as u32,
            scores.scale,
            cap,
            heads.width,
            capped,
        );
        let cubes = spans.blocks * heads.keys;
        grad_kv_kernel::launch(
            &self.client,
            self.cubes(cubes),
            lanes_and_parts(),
            q.arg(),
            k.arg(),
            v.arg(),
            spans.tables.arg(),
            log_sums.arg(),
            delta.arg(),
            grad_out.arg(),
            grad_k.arg(),
            grad_v.arg(),
            heads.queries as u32,
            heads.keys as u32,
            cubes as u32,
            spans.blocks as u32,
            scores.scale,
            cap,
            heads.width,
            capped,
        );
    }
}
