//! Products of weights and activations, `out = W1 x1 + W2 x2 + ..`, see [`pipeline_kernels::product`].
//!
//! A cube computes 128 (or 32) rows of a panel's 32 tokens. It goes through the depth in steps of 16: its units decode a block of the
//! weight into shared memory, copy the activations' rows beside it, and each unit multiplies four rows (or one) by four tokens. A
//! second term in f32, a pair of low rank, is multiplied in the same launch.

use std::ops::Range;

use cubecl::prelude::*;
use pipeline_kernels::FloatType;
use pipeline_kernels::panels::LANES;

use crate::buffer::Buffer;
use crate::device::{Device, UNITS};
use crate::kernels::LANES as WIDE;
use crate::weight::{Format, Matrix, Part, round_factor_to_f16, round_to_bf16, weight_value};

/// One term of a sum of products, `weight * x`.
#[derive(Debug, Clone)]
pub struct Term<'a> {
    /// The weight (height, depth).
    pub weight: Matrix<'a>,
    /// Panels of `depth` features.
    pub x: &'a Buffer,
}

/// The values to which the sum of a product's terms is added.
#[derive(Debug, Clone, Copy)]
pub enum Onto<'a> {
    /// Zeros: the output is overwritten.
    Zero,
    /// The values in the output.
    Out,
    /// Other panels, of the output's size.
    Values(&'a Buffer),
}

/// One product: `out = onto + bias + sum over terms of weight * x`.
#[derive(Debug)]
pub struct Product<'a> {
    /// Panels of as many features as each weight has rows.
    pub out: &'a mut Buffer,
    /// The terms, whose weights all have the same number of rows.
    pub terms: Vec<Term<'a>>,
    /// The values to which the sum is added.
    pub onto: Onto<'a>,
    /// A number for each feature of the output, which is added to that feature of all tokens.
    pub bias: Option<&'a Buffer>,
    /// What weights and activations are rounded to first; sums are in f32 in any case.
    pub rounding: FloatType,
}

/// The number of a rounding for kernels.
pub(crate) fn rounding_number(rounding: FloatType) -> u32 {
    match rounding {
        FloatType::F32 => 0,
        FloatType::Bf16 => 1,
        FloatType::F16 => 2,
    }
}

/// The depth that is multiplied at a time.
const DEPTH: usize = 16;

/// Adds the products of `rows` rows by a cube's panel to the units' sums.
#[cube]
fn add_term(
    sums: &mut Array<f32>,
    shared_weight: &mut Shared<[f32]>,
    shared_x: &mut Shared<[f32]>,
    words: &[u32],
    scales: &[f32],
    x: &[f32],
    x_start: usize,
    start: usize,
    columns: usize,
    height: usize,
    depth: usize,
    first_row: usize,
    #[comptime] per_unit: usize,
    #[comptime] format: u32,
    #[comptime] transposed: bool,
    #[comptime] rounding: u32,
) {
    let unit = UNIT_POS as usize;
    let rows = comptime!(per_unit * 32);
    let stride = comptime!(per_unit * 32 + 1);
    let lane = (unit % 8) * 4;
    let row = (unit / 8) * per_unit;
    let mut first = 0;
    while first < depth {
        sync_cube();
        #[unroll]
        for step in 0..comptime!(per_unit * 32 * DEPTH / 256) {
            let place = step * 256 + unit;
            let mut r = place / DEPTH;
            let mut k = place % DEPTH;
            if comptime!(transposed) {
                r = place % rows;
                k = place / rows;
            }
            let mut value = 0.0f32;
            if first_row + r < height && first + k < depth {
                let mut index = start + (first_row + r) * columns + first + k;
                if comptime!(transposed) {
                    index = start + (first + k) * columns + first_row + r;
                }
                value = weight_value(words, scales, index, format);
                if comptime!(rounding == 1 && format != 1 && format != 4) {
                    value = round_to_bf16(value);
                }
                if comptime!(rounding == 2 && format != 2 && format != 5) {
                    value = round_factor_to_f16(value);
                }
            }
            shared_weight[k * stride + r] = value;
        }
        #[unroll]
        for step in 0..comptime!(DEPTH * 32 / 256) {
            let place = step * 256 + unit;
            let k = place / WIDE;
            let mut value = 0.0f32;
            if first + k < depth {
                value = x[x_start + first * WIDE + place];
                if comptime!(rounding == 1) {
                    value = round_to_bf16(value);
                }
                if comptime!(rounding == 2) {
                    value = round_factor_to_f16(value);
                }
            }
            shared_x[place] = value;
        }
        sync_cube();
        for k in 0..DEPTH {
            let x0 = shared_x[k * WIDE + lane];
            let x1 = shared_x[k * WIDE + lane + 1];
            let x2 = shared_x[k * WIDE + lane + 2];
            let x3 = shared_x[k * WIDE + lane + 3];
            #[unroll]
            for r in 0..per_unit {
                let w = shared_weight[k * stride + row + r];
                sums[r * 4] += w * x0;
                sums[r * 4 + 1] += w * x1;
                sums[r * 4 + 2] += w * x2;
                sums[r * 4 + 3] += w * x3;
            }
        }
        first += DEPTH;
    }
}

/// A cube for each block of rows of each panel.
#[cube(launch)]
fn product_kernel(
    out: &mut [f32],
    onto: &[f32],
    bias: &[f32],
    words: &[u32],
    scales: &[f32],
    x: &[f32],
    pair_words: &[u32],
    pair_x: &[f32],
    // The rows that are computed, the first of them in the output, and the output's features.
    height: u32,
    out_first: u32,
    out_features: u32,
    // The weight's first value, its columns, the product's depth, and where this part of `x`'s features begins.
    start: u32,
    columns: u32,
    depth: u32,
    x_first: u32,
    x_features: u32,
    pair_start: u32,
    pair_columns: u32,
    pair_depth: u32,
    cubes: u32,
    #[comptime] per_unit: usize,
    #[comptime] format: u32,
    #[comptime] transposed: bool,
    #[comptime] pair: bool,
    #[comptime] pair_transposed: bool,
    #[comptime] rounding: u32,
    #[comptime] onto_mode: u32,
    #[comptime] has_bias: bool,
) {
    let rows = comptime!(per_unit * 32);
    let mut shared_weight = Shared::<[f32]>::new_slice(comptime!((per_unit * 32 + 1) * DEPTH));
    let mut shared_x = Shared::<[f32]>::new_slice(comptime!(DEPTH * 32));
    let mut sums = Array::<f32>::new(comptime!(per_unit * 4));
    let height = height as usize;
    let blocks = height.div_ceil(rows);
    if CUBE_POS < cubes as usize {
        // Neighbouring cubes share a block of the weight.
        let panels = cubes as usize / blocks;
        let panel = CUBE_POS % panels;
        let first_row = (CUBE_POS / panels) * rows;
        add_term(
            &mut sums,
            &mut shared_weight,
            &mut shared_x,
            words,
            scales,
            x,
            (panel * x_features as usize + x_first as usize) * WIDE,
            start as usize,
            columns as usize,
            height,
            depth as usize,
            first_row,
            per_unit,
            format,
            transposed,
            rounding,
        );
        if comptime!(pair) {
            add_term(
                &mut sums,
                &mut shared_weight,
                &mut shared_x,
                pair_words,
                scales,
                pair_x,
                panel * pair_depth as usize * WIDE,
                pair_start as usize,
                pair_columns as usize,
                height,
                pair_depth as usize,
                first_row,
                per_unit,
                0u32,
                pair_transposed,
                rounding,
            );
        }
        let unit = UNIT_POS as usize;
        let lane = (unit % 8) * 4;
        let row = first_row + (unit / 8) * per_unit;
        #[unroll]
        for r in 0..per_unit {
            if row + r < height {
                let feature = out_first as usize + row + r;
                let place = (panel * out_features as usize + feature) * WIDE + lane;
                let mut added = 0.0f32;
                if comptime!(has_bias) {
                    added = bias[feature];
                }
                #[unroll]
                for i in 0..4usize {
                    let mut sum = sums[r * 4 + i] + added;
                    if comptime!(onto_mode == 1) {
                        sum += out[place + i];
                    }
                    if comptime!(onto_mode == 2) {
                        sum += onto[place + i];
                    }
                    out[place + i] = sum;
                }
            }
        }
    }
}

/// A part of a term that one launch multiplies: a matrix in one buffer.
struct Piece<'a> {
    part: &'a Part,
    format: Format,
    x: &'a Buffer,
    /// The first value in the part.
    start: usize,
    columns: usize,
    transposed: bool,
    /// The rows of the output that it computes.
    out: Range<usize>,
    /// The features of `x` that it takes, of how many.
    features: Range<usize>,
    x_features: usize,
}

impl Term<'_> {
    /// The parts of the weight that hold rows of the matrix.
    fn pieces(&self) -> impl Iterator<Item = Piece<'_>> {
        let Matrix {
            weight,
            rows,
            transposed,
        } = &self.weight;
        let (columns, depth) = (weight.columns(), self.weight.depth());
        weight.parts.iter().filter_map(move |part| {
            let own = rows.start.max(part.rows.start)..rows.end.min(part.rows.end);
            if own.is_empty() {
                return None;
            }
            let within = own.start - rows.start..own.end - rows.start;
            let (out, features) = if *transposed {
                (0..columns, within)
            } else {
                (within, 0..columns)
            };
            Some(Piece {
                part,
                format: weight.format,
                x: self.x,
                start: (own.start - part.rows.start) * columns,
                columns,
                transposed: *transposed,
                out,
                features,
                x_features: depth,
            })
        })
    }

    /// The term as a pair's, if one launch can multiply it beside another one.
    fn as_pair(&self) -> Option<Piece<'_>> {
        let mut pieces = self.pieces();
        let only = pieces.next()?;
        let whole = pieces.next().is_none() && self.weight.weight.format == Format::F32;
        whole.then_some(only)
    }
}

/// Checks a product's sizes and returns its height and the number of panels.
fn check(product: &Product<'_>) -> (usize, usize) {
    let Some(first) = product.terms.first() else {
        panic!("a product without terms");
    };
    let height = first.weight.height();
    let panel = height * LANES;
    let length = product.out.len();
    let panels = length.checked_div(panel).unwrap_or(0);
    assert!(
        panels * panel == length,
        "the output: {length} floats are no panels of {height} features"
    );
    for term in &product.terms {
        assert_eq!(term.weight.height(), height, "heights of the weights");
        let depth = term.weight.depth();
        assert_eq!(
            term.x.len(),
            panels * depth * LANES,
            "the factor: the size of {panels} panels of {depth} features"
        );
    }
    if let Onto::Values(values) = product.onto {
        assert_eq!(values.len(), length, "the size of what is added to");
    }
    if let Some(bias) = product.bias {
        assert_eq!(bias.len(), height, "the size of the bias");
    }
    (height, panels)
}

impl Device {
    /// Computes products that don't depend on each other, see [`pipeline_kernels::product::products`].
    ///
    /// # Panics
    /// As it does, and if a product has no terms.
    pub fn products(&self, all: Vec<Product<'_>>) {
        for each in all {
            self.product(each);
        }
    }

    /// Computes one product.
    ///
    /// # Panics
    /// As [`Device::products`].
    pub fn product(&self, product: Product<'_>) {
        let (height, panels) = check(&product);
        if self.idle(height * panels) {
            return;
        }
        let Product {
            out,
            terms,
            mut onto,
            mut bias,
            rounding,
        } = product;
        let mut terms = terms.iter().peekable();
        while let Some(term) = terms.next() {
            let pair = terms.peek().and_then(|next| next.as_pair());
            let transposed = term.weight.transposed;
            let mut pieces = term.pieces().peekable();
            let mut with_pair = false;
            if pieces.peek().is_none() {
                // A depth of 0.
                self.add_nothing(out, height, onto, bias);
                (onto, bias) = (Onto::Out, None);
            }
            let mut number = 0;
            while let Some(piece) = pieces.next() {
                // The pair joins every part of the rows, or the last part of the depth.
                let own = pair.as_ref().filter(|_| {
                    (!transposed || pieces.peek().is_none()) && piece.out.len() == height
                });
                with_pair |= own.is_some();
                let first_of_rows = !transposed || number == 0;
                let (from, added) = if first_of_rows {
                    (onto, bias)
                } else {
                    (Onto::Out, None)
                };
                self.launch(out, (height, panels), &piece, own, (from, added), rounding);
                number += 1;
            }
            (onto, bias) = (Onto::Out, None);
            if with_pair {
                terms.next();
            }
        }
    }

    fn launch(
        &self,
        out: &mut Buffer,
        (height, panels): (usize, usize),
        piece: &Piece<'_>,
        pair: Option<&Piece<'_>>,
        (onto, bias): (Onto<'_>, Option<&Buffer>),
        rounding: FloatType,
    ) {
        // A unit's rows: few for a product of low rank.
        let per_unit = if piece.out.len() <= 32 { 1 } else { 4 };
        let cubes = piece.out.len().div_ceil(32 * per_unit) * panels;
        let (mode, onto) = match onto {
            Onto::Zero => (0, None),
            Onto::Out => (1, None),
            Onto::Values(values) => (2, Some(values)),
        };
        let nothing = &self.nothing;
        product_kernel::launch(
            &self.client,
            self.cubes(cubes),
            CubeDim::new_1d(UNITS),
            out.arg(),
            onto.unwrap_or(nothing).arg(),
            bias.unwrap_or(nothing).arg(),
            piece.part.words.arg(),
            piece.part.scales.as_ref().unwrap_or(nothing).arg(),
            piece.x.arg(),
            pair.map_or(nothing, |pair| &pair.part.words).arg(),
            pair.map_or(nothing, |pair| pair.x).arg(),
            piece.out.len() as u32,
            piece.out.start as u32,
            height as u32,
            piece.start as u32,
            piece.columns as u32,
            piece.features.len() as u32,
            piece.features.start as u32,
            piece.x_features as u32,
            pair.map_or(0, |pair| pair.start as u32),
            pair.map_or(0, |pair| pair.columns as u32),
            pair.map_or(0, |pair| pair.features.len() as u32),
            cubes as u32,
            per_unit,
            piece.format.number(),
            piece.transposed,
            pair.is_some(),
            pair.is_some_and(|pair| pair.transposed),
            rounding_number(rounding),
            mode,
            bias.is_some(),
        );
    }

    /// A sum of nothing: `onto` and the bias alone.
    fn add_nothing(&self, out: &mut Buffer, height: usize, onto: Onto<'_>, bias: Option<&Buffer>) {
        let (cubes, units) = self.units(out.len());
        let (mode, onto) = match onto {
            Onto::Zero => (0, None),
            Onto::Out => (1, None),
            Onto::Values(values) => (2, Some(values)),
        };
        nothing_kernel::launch(
            &self.client,
            cubes,
            units,
            out.arg(),
            onto.unwrap_or(&self.nothing).arg(),
            bias.unwrap_or(&self.nothing).arg(),
            height as u32,
            mode,
            bias.is_some(),
        );
    }
}

/// A unit for each value.
#[cube(launch)]
fn nothing_kernel(
    out: &mut [f32],
    onto: &[f32],
    bias: &[f32],
    height: u32,
    #[comptime] mode: u32,
    #[comptime] has_bias: bool,
) {
    let index = ABSOLUTE_POS;
    if index < out.len() {
        let mut sum = 0.0f32;
        if comptime!(has_bias) {
            sum = bias[(index / WIDE) % height as usize];
        }
        if comptime!(mode == 1) {
            sum += out[index];
        }
        if comptime!(mode == 2) {
            sum += onto[index];
        }
        out[index] = sum;
    }
}
