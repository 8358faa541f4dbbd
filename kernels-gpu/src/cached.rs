//! Attention of single tokens to keys and values that are kept from step to step, for text generation.
//!
//! A cache is panels of places, one for each token of a text. A text's places follow each other from the first one of a panel on. A cube
//! computes one query head of one token: its units take the keys of 8 panels at a time, one each, and then the features of the values, each
//! for the keys of its lane. The softmax's largest score and sum are kept for the keys so far, as in [`crate::attention`]. Which keys are
//! summed together depends on their places in the text alone.

use std::ops::Range;

use cubecl::prelude::*;
use pipeline_kernels::attention::{Heads, Scores};
use pipeline_kernels::panels::{self, LANES};

use crate::attention::{LOWEST, place, score};
use crate::buffer::Buffer;
use crate::device::Device;
use crate::elementwise::{check, check_tokens, count};
use crate::kernels::{LANES as WIDE, PARTS, exp_down, lanes_and_parts, sum_of_lanes};

/// A cube for each token and query head.
#[cube(launch)]
fn cached_kernel(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    places: &[u32],
    out: &mut [f32],
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
    let mut query = Shared::<[f32]>::new_slice(width);
    let mut shared = Shared::<[f32]>::new_slice(WIDE * PARTS);
    let mut sums = Array::<f32>::new(comptime!(width.div_ceil(PARTS)));
    if CUBE_POS < cubes as usize {
        let head = CUBE_POS % queries;
        let token = CUBE_POS / queries;
        let key_head = head / (queries / keys);
        let start = places[token * 2] as usize;
        let end = places[token * 2 + 1] as usize;
        let own = place(token, queries, head, width);
        let mut feature = UNIT_POS as usize;
        while feature < width {
            query[feature] = q[own + feature * WIDE];
            feature += WIDE * PARTS;
        }
        sync_cube();
        let mut largest = f32::new(LOWEST);
        let mut sum = 0.0f32;
        let mut panel = start / WIDE;
        while panel * WIDE < end {
            let key = (panel + part) * WIDE + lane;
            let seen = key >= start && key < end;
            let mut value = f32::new(LOWEST);
            if seen {
                let at = place(key, keys, key_head, width);
                let mut product = 0.0f32;
                for feature in 0..width {
                    product += query[feature] * k[at + feature * WIDE];
                }
                value = score(product, scale, cap, capped);
            }
            shared[part * WIDE + lane] = value;
            sync_cube();
            let mut top = largest;
            for other in 0..WIDE * PARTS {
                top = top.max(shared[other]);
            }
            sync_cube();
            let mut p = 0.0f32;
            if seen {
                p = exp_down(value - top);
            }
            shared[part * WIDE + lane] = p;
            sync_cube();
            let factor = exp_down(largest - top);
            largest = top;
            sum *= factor;
            for other in 0..WIDE * PARTS {
                sum += shared[other];
            }
            #[unroll]
            for i in 0..comptime!(width.div_ceil(PARTS)) {
                sums[i] *= factor;
            }
            for step in 0..PARTS {
                let key = (panel + step) * WIDE + lane;
                if key >= start && key < end {
                    let p = shared[step * WIDE + lane];
                    let at = place(key, keys, key_head, width);
                    #[unroll]
                    for i in 0..comptime!(width.div_ceil(PARTS)) {
                        let feature = i * PARTS + part;
                        if feature < width {
                            sums[i] += p * v[at + feature * WIDE];
                        }
                    }
                }
            }
            sync_cube();
            panel += PARTS;
        }
        #[unroll]
        for i in 0..comptime!(width.div_ceil(PARTS)) {
            let total = sum_of_lanes(&mut shared, sums[i]);
            let feature = i * PARTS + part;
            if lane == 0 && feature < width {
                out[own + feature * WIDE] = total / sum;
            }
        }
    }
}

/// A unit for each feature of each token.
#[cube(launch)]
fn store_kernel(x: &[f32], places: &[u32], cache: &mut [f32], features: u32) {
    let index = ABSOLUTE_POS;
    let features = features as usize;
    if index < places.len() * features {
        let token = index % places.len();
        let feature = index / places.len();
        let to = places[token] as usize;
        let source = (token / WIDE * features + feature) * WIDE + token % WIDE;
        cache[(to / WIDE * features + feature) * WIDE + to % WIDE] = x[source];
    }
}

/// A unit for each value.
#[cube(launch)]
fn rows_kernel(x: &[f32], out: &mut [f32], features: u32) {
    let index = ABSOLUTE_POS;
    let features = features as usize;
    if index < out.len() {
        let token = index / features;
        let feature = index % features;
        out[index] = x[(token / WIDE * features + feature) * WIDE + token % WIDE];
    }
}

/// For each of some tokens the places of a cache whose keys it attends to.
#[derive(Debug)]
pub struct Seen {
    /// The first place and the end of each token's.
    words: Buffer,
    tokens: usize,
    /// The end of the last place.
    end: usize,
}

/// What an attention to a cache computes with.
#[derive(Debug, Clone, Copy)]
pub struct CachedAttention<'a> {
    /// The queries, panels of `queries * width` features.
    pub q: &'a Buffer,
    /// The keys of all places, panels of `keys * width` features.
    pub k: &'a Buffer,
    /// The values of all places.
    pub v: &'a Buffer,
    /// The numbers of heads and their width.
    pub heads: Heads,
    /// What becomes of the products of queries and keys.
    pub scores: Scores,
    /// The places that the first tokens of the panels attend to.
    pub seen: &'a Seen,
}

impl Device {
    /// Copies to the device which places of a cache each token attends to.
    ///
    /// # Panics
    /// If a token attends to none.
    pub fn seen(&self, places: &[Range<usize>]) -> Seen {
        let nothing = places.iter().find(|own| own.is_empty());
        assert!(
            nothing.is_none(),
            "a token attends to the places {nothing:?}"
        );
        let words = places.iter().flat_map(|own| [own.start, own.end]);
        let words: Vec<u32> = words.map(|place| place as u32).collect();
        Seen {
            words: self.take_with_words(&words),
            tokens: places.len(),
            end: places.iter().map(|own| own.end).max().unwrap_or(0),
        }
    }

    /// Copies token `i` of `x` to place `places[i]` of `cache`; both are panels of `features`. No two may have the same place.
    ///
    /// # Panics
    /// If there is no such token or place, or a buffer is no whole number of panels.
    pub fn store(&self, x: &Buffer, features: usize, places: &[u32], cache: &mut Buffer) {
        let panels = panels::panels(places.len());
        check(x, features, panels, "the tokens that are kept");
        check_tokens(places, count(cache, features, "the cache"));
        if self.idle(places.len() * features) {
            return;
        }
        let (cubes, units) = self.units(places.len() * features);
        let places = self.take_with_words(places);
        if self.idle(1) {
            return;
        }
        store_kernel::launch(
            &self.client,
            cubes,
            units,
            x.arg(),
            places.arg(),
            cache.arg(),
            features as u32,
        );
    }

    /// Attention of each token's queries to the keys and values at the places that it attends to, as
    /// [`pipeline_kernels::attention::attention`] computes it. Tokens behind those of `seen` are left unchanged.
    ///
    /// # Panics
    /// If the sizes of the buffers don't fit the heads, or a place is outside the cache.
    pub fn cached_attention(&self, inputs: CachedAttention<'_>, out: &mut Buffer) {
        let CachedAttention {
            q,
            k,
            v,
            heads,
            scores,
            seen,
        } = inputs;
        heads.check();
        let Heads {
            queries,
            keys,
            width,
        } = heads;
        let panels = panels::panels(seen.tokens);
        check(q, queries * width, panels, "the queries");
        check(out, queries * width, panels, "what is like the queries");
        let places = count(k, keys * width, "the keys");
        check(v, keys * width, places, "the values");
        let end = seen.end;
        assert!(
            end <= places * LANES,
            "places up to {end} in {places} panels"
        );
        let cubes = seen.tokens * queries;
        if self.idle(cubes) {
            return;
        }
        cached_kernel::launch(
            &self.client,
            self.cubes(cubes),
            lanes_and_parts(),
            q.arg(),
            k.arg(),
            v.arg(),
            seen.words.arg(),
            out.arg(),
            queries as u32,
            keys as u32,
            cubes as u32,
            scores.scale,
            scores.softcap.unwrap_or(1.),
            width,
            scores.softcap.is_some(),
        );
    }

    /// The first `tokens` tokens of panels of `features` as rows (tokens, features).
    ///
    /// # Panics
    /// If there are fewer tokens, or `x` is no whole number of panels.
    pub fn token_rows(&self, x: &Buffer, features: usize, tokens: usize) -> Buffer {
        let found = count(x, features, "tokens that become rows") * LANES;
        assert!(tokens <= found, "{tokens} tokens of panels of {found}");
        let rows = self.take(tokens * features);
        if !self.idle(rows.len()) {
            let (cubes, units) = self.units(rows.len());
            rows_kernel::launch(
                &self.client,
                cubes,
                units,
                x.arg(),
                rows.arg(),
                features as u32,
            );
        }
        rows
    }
}
