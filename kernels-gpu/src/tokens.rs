//! Operations on single tokens: the embeddings' rows, tokens that are gathered into panels of their own or added to others, and single
//! values. Sums have the order of the list that a call is given, whatever is added to the same place.

use std::collections::BTreeMap;

use cubecl::prelude::*;
use pipeline_kernels::panels::{self, LANES};

use crate::buffer::Buffer;
use crate::device::Device;
use crate::elementwise::{check, check_tokens, count};
use crate::kernels::LANES as WIDE;
use crate::weight::{Weight, weight_value};

/// A unit for each value of the panels; rows that are in another part of the weight stay as they are.
#[cube(launch)]
fn lookup_kernel(
    words: &[u32],
    scales: &[f32],
    ids: &[u32],
    out: &mut [f32],
    columns: u32,
    first_row: u32,
    end_row: u32,
    factor: f32,
    #[comptime] format: u32,
    #[comptime] clear: bool,
) {
    let index = ABSOLUTE_POS;
    if index < out.len() {
        let columns = columns as usize;
        let feature = (index / WIDE) % columns;
        let token = index / WIDE / columns * WIDE + index % WIDE;
        if comptime!(clear) {
            out[index] = 0.0f32;
        }
        if token < ids.len() {
            let id = ids[token];
            if id >= first_row && id < end_row {
                let place = (id - first_row) as usize * columns + feature;
                out[index] = weight_value(words, scales, place, format) * factor;
            }
        }
    }
}

#[cube(launch)]
fn gather_kernel(x: &[f32], tokens: &[u32], out: &mut [f32], features: u32, factor: f32) {
    let index = ABSOLUTE_POS;
    if index < out.len() {
        let features = features as usize;
        let feature = (index / WIDE) % features;
        let row = index / WIDE / features * WIDE + index % WIDE;
        let mut value = 0.0f32;
        if row < tokens.len() {
            let token = tokens[row] as usize;
            value = x[(token / WIDE * features + feature) * WIDE + token % WIDE] * factor;
        }
        out[index] = value;
    }
}

/// A unit for each feature of each target. `starts` says where a target's entries begin; entries are tokens of `x`.
#[cube(launch)]
fn sums_kernel(
    x: &[f32],
    targets: &[u32],
    starts: &[u32],
    entries: &[u32],
    factors: &[f32],
    out: &mut [f32],
    features: u32,
    #[comptime] to_rows: bool,
) {
    let index = ABSOLUTE_POS;
    let features = features as usize;
    if index < targets.len() * features {
        let number = index / features;
        let feature = index % features;
        let target = targets[number] as usize;
        let mut place = (target / WIDE * features + feature) * WIDE + target % WIDE;
        if comptime!(to_rows) {
            place = target * features + feature;
        }
        let mut sum = out[place];
        for entry in starts[number]..starts[number + 1] {
            let token = entries[entry as usize] as usize;
            let source = (token / WIDE * features + feature) * WIDE + token % WIDE;
            sum += x[source] * factors[entry as usize];
        }
        out[place] = sum;
    }
}

/// A unit for each pair of places.
#[cube(launch)]
fn pick_kernel(x: &[f32], pairs: &[u32], out: &mut [f32]) {
    let index = ABSOLUTE_POS;
    if index * 2 < pairs.len() {
        out[pairs[index * 2 + 1] as usize] = x[pairs[index * 2] as usize];
    }
}

/// Entries by target: each token with its factor, in the order in which they are added.
type ByTarget = BTreeMap<u32, Vec<(u32, f32)>>;

impl Device {
    /// Rows `ids` of a weight (rows, columns), times `factor`, as panels of `columns` features, a token for each id. Lanes after the
    /// last token become zero.
    ///
    /// # Panics
    /// If the weight has no such row, or `out` has not the size of the panels.
    pub fn lookup(&self, weight: &Weight, ids: &[u32], factor: f32, out: &mut Buffer) {
        let (columns, rows) = (weight.columns(), weight.matrix().rows.end);
        let outside = ids.iter().find(|id| **id as usize >= rows);
        assert!(outside.is_none(), "row {outside:?} of a weight of {rows}");
        let panels = panels::panels(ids.len());
        check(out, columns, panels, "the rows' panels");
        if self.idle(out.len()) {
            return;
        }
        let ids = self.take_with_words(ids);
        for (number, part) in weight.parts.iter().enumerate() {
            if self.idle(1) {
                return;
            }
            let (cubes, units) = self.units(out.len());
            lookup_kernel::launch(
                &self.client,
                cubes,
                units,
                part.words.arg(),
                part.scales.as_ref().unwrap_or(&self.nothing).arg(),
                ids.arg(),
                out.arg(),
                columns as u32,
                part.rows.start as u32,
                part.rows.end as u32,
                factor,
                weight.format.number(),
                number == 0,
            );
        }
    }

    /// Some tokens of panels of `features`, times `factor`, as panels of their own. Lanes after the last token become zero.
    ///
    /// # Panics
    /// If `x` has no such token, or a buffer not the size of its panels.
    pub fn gather(
        &self,
        x: &Buffer,
        features: usize,
        tokens: &[u32],
        factor: f32,
        out: &mut Buffer,
    ) {
        check_tokens(tokens, count(x, features, "what is gathered from"));
        let panels = panels::panels(tokens.len());
        check(out, features, panels, "the gathered tokens");
        if self.idle(out.len()) {
            return;
        }
        let tokens = self.take_with_words(tokens);
        if self.idle(1) {
            return;
        }
        let (cubes, units) = self.units(out.len());
        gather_kernel::launch(
            &self.client,
            cubes,
            units,
            x.arg(),
            tokens.arg(),
            out.arg(),
            features as u32,
            factor,
        );
    }

    /// Adds token `i` of `x`, times `factors[i]`, to token `tokens[i]` of `out`, one after the other; both are panels of `features`.
    ///
    /// # Panics
    /// If there is no such token, the lists differ in length, or a buffer is no whole number of panels.
    pub fn scatter(
        &self,
        x: &Buffer,
        features: usize,
        factors: &[f32],
        tokens: &[u32],
        out: &mut Buffer,
    ) {
        assert_eq!(factors.len(), tokens.len(), "a factor for each token");
        let sources = count(x, features, "the tokens that are added");
        let (found, rows) = (tokens.len(), sources * LANES);
        assert!(found <= rows, "{found} tokens of panels of {rows}");
        check_tokens(tokens, count(out, features, "the tokens that are added to"));
        let mut all = ByTarget::new();
        for ((row, token), factor) in (0..).zip(tokens).zip(factors) {
            all.entry(*token).or_default().push((row, *factor));
        }
        self.add_sums(x, features, &all, out, false);
    }

    /// Adds token `token` of panels `x` of `features`, times `factor`, to row `row` of `out`, a matrix (rows, features), for each
    /// `(token, factor, row)`, one after the other.
    ///
    /// # Panics
    /// If there is no such token or row, or `x` is no whole number of panels.
    pub fn add_to_rows(
        &self,
        x: &Buffer,
        features: usize,
        all: &[(u32, f32, u32)],
        out: &mut Buffer,
    ) {
        let panels = count(x, features, "the tokens that are added");
        let rows = out.len().checked_div(features).unwrap_or(0);
        let mut by_row = ByTarget::new();
        for &(token, factor, row) in all {
            check_tokens(&[token], panels);
            assert!((row as usize) < rows, "row {row} of {rows}");
            by_row.entry(row).or_default().push((token, factor));
        }
        self.add_sums(x, features, &by_row, out, true);
    }

    fn add_sums(
        &self,
        x: &Buffer,
        features: usize,
        all: &ByTarget,
        out: &mut Buffer,
        to_rows: bool,
    ) {
        if self.idle(all.len() * features) {
            return;
        }
        let (mut targets, mut starts) = (Vec::new(), vec![0]);
        let (mut entries, mut factors) = (Vec::new(), Vec::new());
        for (target, own) in all {
            targets.push(*target);
            entries.extend(own.iter().map(|(token, _)| *token));
            factors.extend(own.iter().map(|(_, factor)| *factor));
            starts.push(entries.len() as u32);
        }
        let count = targets.len() * features;
        let words = [&targets, &starts, &entries].map(|words| self.take_with_words(words));
        let factors = self.take_with(&factors);
        if self.idle(1) {
            return;
        }
        let [targets, starts, entries] = words;
        let (cubes, units) = self.units(count);
        sums_kernel::launch(
            &self.client,
            cubes,
            units,
            x.arg(),
            targets.arg(),
            starts.arg(),
            entries.arg(),
            factors.arg(),
            out.arg(),
            features as u32,
            to_rows,
        );
    }

    /// Copies single values: for each `(from, to)`, `out[to] = x[from]`. No two may have the same target.
    ///
    /// # Panics
    /// If there is no such value.
    pub fn pick(&self, x: &Buffer, all: &[(u32, u32)], out: &mut Buffer) {
        for &(from, to) in all {
            let inside = (from as usize) < x.len() && (to as usize) < out.len();
            let (source, target) = (x.len(), out.len());
            assert!(inside, "value {from} of {source} to {to} of {target}");
        }
        if self.idle(all.len()) {
            return;
        }
        let words: Vec<u32> = all.iter().flat_map(|(from, to)| [*from, *to]).collect();
        let pairs = self.take_with_words(&words);
        if self.idle(1) {
            return;
        }
        let (cubes, units) = self.units(all.len());
        pick_kernel::launch(&self.client, cubes, units, x.arg(), pairs.arg(), out.arg());
    }
}
