//! Softmax over a vocabulary in parts, see [`pipeline_kernels::vocabulary`]. A cube treats a panel.

use std::ops::Range;

use cubecl::prelude::*;
use pipeline_kernels::panels::LANES;
use pipeline_kernels::vocabulary::Summary;

use crate::buffer::Buffer;
use crate::device::Device;
use crate::elementwise::{check, count};
use crate::error::Error;
use crate::kernels::{LANES as WIDE, PARTS, exp_down, lanes_and_parts, sum_of_parts, tanh};

/// The ids that a unit sums before their sum joins its total, which keeps rounding errors small.
const SUMMED: usize = 64;
/// The number of rows of a summary.
const ROWS: usize = 5;
/// Less than any logit, in the place of the largest one of none.
const LOWEST: f32 = -3.0e38;

/// What [`Summary`] holds, for each of some panels on the device.
#[derive(Debug)]
pub struct Summaries {
    /// For each panel the rows `largest`, `argmax`, `sum`, `weighted` and `squares`, as bits.
    words: Buffer,
    panels: usize,
}

#[cube(launch)]
fn no_summaries_kernel(words: &mut [u32]) {
    let index = ABSOLUTE_POS;
    if index < words.len() {
        let mut value = 0u32;
        if (index / WIDE) % ROWS == 0 {
            value = u32::reinterpret(f32::new(LOWEST));
        }
        words[index] = value;
    }
}

#[cube(launch)]
fn copy_words_kernel(from: &[u32], to: &mut [u32]) {
    let index = ABSOLUTE_POS;
    if index < to.len() {
        to[index] = from[index];
    }
}

/// One cube for each panel; its parts take every eighth id.
#[cube(launch)]
fn online_softmax_kernel(
    logits: &mut [f32],
    words: &mut [u32],
    factors: &mut [f32],
    first_id: u32,
    ids: u32,
    cap: f32,
    #[comptime] capped: bool,
) {
    let lane = UNIT_POS_X as usize;
    let part = UNIT_POS_Y as usize;
    let ids = ids as usize;
    let mut shared = Shared::<[f32]>::new_slice(WIDE * PARTS);
    let mut shared_ids = Shared::<[u32]>::new_slice(WIDE * PARTS);
    if CUBE_POS < factors.len() / WIDE {
        let start = CUBE_POS * ids * WIDE + lane;
        let summary = CUBE_POS * ROWS * WIDE + lane;
        let mut largest = f32::new(LOWEST);
        let mut best = 0xffff_ffffu32;
        let mut id = part;
        while id < ids {
            let mut logit = logits[start + id * WIDE];
            if comptime!(capped) {
                logit = cap * tanh(logit / cap);
                logits[start + id * WIDE] = logit;
            }
            if logit > largest {
                largest = logit;
                best = first_id + id as u32;
            }
            id += PARTS;
        }
        shared[part * WIDE + lane] = largest;
        shared_ids[part * WIDE + lane] = best;
        sync_cube();
        let before = f32::reinterpret(words[summary]);
        largest = before;
        best = words[summary + WIDE];
        // Of equal ones the lowest id; those before these are lower.
        let mut fresh = false;
        for other in 0..PARTS {
            let logit = shared[other * WIDE + lane];
            let id = shared_ids[other * WIDE + lane];
            if logit > largest || (fresh && logit >= largest && id < best) {
                largest = logit;
                best = id;
                fresh = true;
            }
        }
        let mut sum = 0.0f32;
        let mut weighted = 0.0f32;
        let mut squares = 0.0f32;
        let mut id = part;
        while id < ids {
            let mut some = 0.0f32;
            let mut some_weighted = 0.0f32;
            let mut some_squares = 0.0f32;
            for _step in 0..SUMMED {
                if id < ids {
                    let logit = logits[start + id * WIDE];
                    let below = logit - largest;
                    let e = exp_down(below);
                    some += e;
                    some_squares += e * e;
                    some_weighted += e * below.max(-100.0f32);
                    let mut left = e;
                    if comptime!(capped) {
                        let t = logit / cap;
                        left = e * (1.0f32 - t * t);
                    }
                    logits[start + id * WIDE] = left;
                }
                id += PARTS;
            }
            sum += some;
            weighted += some_weighted;
            squares += some_squares;
        }
        let new_sum = sum_of_parts(&mut shared, sum);
        let new_weighted = sum_of_parts(&mut shared, weighted);
        let new_squares = sum_of_parts(&mut shared, squares);
        if part == 0 {
            let below = before - largest;
            let factor = exp_down(below);
            let old_sum = f32::reinterpret(words[summary + 2 * WIDE]);
            let old_weighted = f32::reinterpret(words[summary + 3 * WIDE]);
            let moved = (old_weighted + old_sum * below.max(-100.0f32)) * factor;
            words[summary] = u32::reinterpret(largest);
            words[summary + WIDE] = best;
            words[summary + 2 * WIDE] = u32::reinterpret(old_sum * factor + new_sum);
            words[summary + 3 * WIDE] = u32::reinterpret(moved + new_weighted);
            let old_squares = f32::reinterpret(words[summary + 4 * WIDE]);
            words[summary + 4 * WIDE] =
                u32::reinterpret(old_squares * factor * factor + new_squares);
            factors[CUBE_POS * WIDE + lane] = factor;
        }
    }
}

/// One cube for each panel.
#[cube(launch)]
fn sum_capped_kernel(logits: &[f32], out: &mut [f32], cap: f32, ids: u32) {
    let lane = UNIT_POS_X as usize;
    let ids = ids as usize;
    let mut shared = Shared::<[f32]>::new_slice(WIDE * PARTS);
    if CUBE_POS < out.len() / WIDE {
        let start = CUBE_POS * ids * WIDE + lane;
        let mut sum = 0.0f32;
        let mut id = UNIT_POS_Y as usize;
        while id < ids {
            let mut some = 0.0f32;
            for _step in 0..SUMMED {
                if id < ids {
                    some += tanh(logits[start + id * WIDE] / cap);
                }
                id += PARTS;
            }
            sum += some;
        }
        let total = sum_of_parts(&mut shared, sum);
        if UNIT_POS_Y == 0 {
            out[CUBE_POS * WIDE + lane] = total * cap;
        }
    }
}

#[cube(launch)]
fn slopes_kernel(products: &mut [f32], cap: f32) {
    let index = ABSOLUTE_POS;
    if index < products.len() {
        let t = tanh(products[index] / cap);
        products[index] = 1.0f32 - t * t;
    }
}

impl Device {
    /// See [`pipeline_kernels::vocabulary::soft_cap_slopes`].
    pub fn soft_cap_slopes(&self, products: &mut Buffer, softcap: f32) {
        if self.idle(products.len()) {
            return;
        }
        let (cubes, units) = self.units(products.len());
        slopes_kernel::launch(&self.client, cubes, units, products.arg(), softcap);
    }

    /// The summaries of no ids, for so many panels.
    pub fn summaries(&self, panels: usize) -> Summaries {
        let words = self.take(ROWS * LANES * panels);
        if !self.idle(panels) {
            let (cubes, units) = self.units(words.len());
            no_summaries_kernel::launch(&self.client, cubes, units, words.arg());
        }
        Summaries { words, panels }
    }

    /// A copy of summaries.
    pub fn same_summaries(&self, summaries: &Summaries) -> Summaries {
        let words = self.take(summaries.words.len());
        if !self.idle(words.len()) {
            let (cubes, units) = self.units(words.len());
            let from = summaries.words.arg();
            copy_words_kernel::launch(&self.client, cubes, units, from, words.arg());
        }
        Summaries {
            words,
            panels: summaries.panels,
        }
    }

    /// See [`pipeline_kernels::vocabulary::online_softmax`]. Returns a factor for each lane of each panel.
    ///
    /// # Panics
    /// As it does.
    pub fn online_softmax(
        &self,
        logits: &mut Buffer,
        ids: Range<usize>,
        softcap: Option<f32>,
        summaries: &mut Summaries,
    ) -> Buffer {
        let panels = summaries.panels;
        check(logits, ids.len(), panels, "the logits");
        let end = ids.end;
        assert!(u32::try_from(end).is_ok(), "a vocabulary of {end}");
        let factors = self.take(panels * LANES);
        if self.idle(panels) {
            return factors;
        }
        online_softmax_kernel::launch(
            &self.client,
            self.cubes(panels),
            lanes_and_parts(),
            logits.arg(),
            summaries.words.arg(),
            factors.arg(),
            ids.start as u32,
            ids.len() as u32,
            softcap.unwrap_or(1.),
            softcap.is_some(),
        );
        factors
    }

    /// The summaries as values.
    ///
    /// # Errors
    /// As [`Device::read`].
    pub fn summary_values(&self, summaries: &Summaries) -> Result<Vec<Summary>, Error> {
        let words = self.read_words(&summaries.words)?;
        let (rows, _) = words.as_chunks::<LANES>();
        let (panels, _) = rows.as_chunks::<ROWS>();
        let floats = |row: &[u32; LANES]| row.map(f32::from_bits);
        let panels = panels
            .iter()
            .map(|[largest, argmax, sum, weighted, squares]| Summary {
                largest: floats(largest),
                argmax: *argmax,
                sum: floats(sum),
                weighted: floats(weighted),
                squares: floats(squares),
            });
        Ok(panels.collect())
    }

    /// The sum of each token's logits of a part of the vocabulary, with a `softcap` as in [`Device::online_softmax`], as panels of one
    /// feature. `logits` are panels of a feature for each of `ids` ids.
    ///
    /// # Panics
    /// If `logits` is no whole number of panels.
    pub fn sum_capped(&self, logits: &Buffer, softcap: f32, ids: usize) -> Buffer {
        let panels = count(logits, ids, "the logits");
        let sums = self.take(panels * LANES);
        if !self.idle(panels) {
            sum_capped_kernel::launch(
                &self.client,
                self.cubes(panels),
                lanes_and_parts(),
                logits.arg(),
                sums.arg(),
                softcap,
                ids as u32,
            );
        }
        sums
    }
}
