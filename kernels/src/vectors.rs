//! Products of weights with a few vectors, and attention of single tokens: text generation.
//!
//! A weight is read from memory once for all vectors, which is what takes the time. Sums run over the depth in 16 lanes, so
//! a result depends neither on the number of threads nor on the vectors beside it.

use std::ops::Range;

use rayon::prelude::*;

use crate::dispatch::{Loop, fma, run};
use crate::exp::exp;
use crate::matrix::{Matrix, Values};

/// Floats side by side in a sum.
const LANES: usize = 16;
/// Rows that are summed up side by side.
const ROWS: usize = 4;
/// Values of a weight that are worth a task of their own.
const TASK: usize = 1 << 16;

/// A weight and vectors, one after the other, each as long as the weight is deep.
pub struct VectorProduct<'a> {
    /// The weight, not turned.
    pub weight: Matrix<'a>,
    /// (vectors, depth).
    pub x: &'a [f32],
    /// (vectors, height); what is there is lost.
    pub out: &'a mut [f32],
}

/// Computes `out = W x` for each vector of some products that don't depend on each other, over all cores.
///
/// # Panics
/// If sizes don't fit or a weight is turned.
pub fn vector_products(mut all: Vec<VectorProduct<'_>>) {
    let mut tasks = Vec::new();
    for (product, each) in all.iter().enumerate() {
        let (height, depth) = (each.weight.height(), each.weight.depth());
        let vectors = each.x.len() / depth.max(1);
        assert!(!each.weight.is_turned(), "the weight is turned");
        assert_eq!(each.x.len(), vectors * depth, "the size of x");
        let size = vectors.checked_mul(height);
        assert_eq!(Some(each.out.len()), size, "the output's size");
        let rows = (TASK / depth.max(1)).next_multiple_of(ROWS).max(ROWS);
        let starts = (0..height).step_by(rows);
        tasks.extend(starts.map(|from| (product, from..(from + rows).min(height))));
    }
    let outs: Vec<Shared> = all
        .iter_mut()
        .map(|each| Shared(each.out.as_mut_ptr()))
        .collect();
    let all = &all;
    let work = |buffer: &mut Vec<f32>, (product, rows): (usize, Range<usize>)| {
        let each = &all[product];
        run(Part {
            weight: each.weight,
            x: each.x,
            rows,
            out: outs[product],
            buffer,
        });
    };
    if tasks.len() == 1 {
        let mut buffer = Vec::new();
        for task in tasks {
            work(&mut buffer, task);
        }
    } else {
        tasks.into_par_iter().for_each_init(Vec::new, work);
    }
}

#[derive(Clone, Copy)]
struct Shared(*mut f32);
// SAFETY: tasks write disjoint rows of each vector's result.
unsafe impl Send for Shared {}
// SAFETY: the same.
unsafe impl Sync for Shared {}

/// Some rows of a product.
struct Part<'a> {
    weight: Matrix<'a>,
    x: &'a [f32],
    rows: Range<usize>,
    /// (vectors, height); nobody else uses `rows` of it.
    out: Shared,
    buffer: &'a mut Vec<f32>,
}

impl Loop for Part<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let (height, depth) = (self.weight.height(), self.weight.depth());
        let mut row = self.rows.start;
        while row < self.rows.end {
            let left = self.rows.end - row;
            let out = Out {
                first: self.out,
                row,
                height,
            };
            row += match self.weight.values() {
                Values::F32(values) => {
                    block::<f32, FMA>(&values[row * depth..], self.x, depth, left, out)
                }
                Values::Bf16(values) => {
                    block::<half::bf16, FMA>(&values[row * depth..], self.x, depth, left, out)
                }
                Values::F16(_) | Values::Nf4(_) => {
                    let values = self.weight.row(row, 0..depth, self.buffer);
                    block::<f32, FMA>(values, self.x, depth, 1, out)
                }
            };
        }
    }
}

/// Where the sums of a block go.
#[derive(Clone, Copy)]
struct Out {
    first: Shared,
    row: usize,
    height: usize,
}

/// A stored value.
trait Stored: Copy {
    fn get(self) -> f32;
}

impl Stored for f32 {
    #[inline(always)]
    fn get(self) -> f32 {
        self
    }
}

impl Stored for half::bf16 {
    #[inline(always)]
    fn get(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

/// The next rows with all vectors: [`ROWS`] of them, or one where fewer are left. Returns how many.
#[inline(always)]
fn block<T: Stored, const FMA: bool>(
    weight: &[T],
    x: &[f32],
    depth: usize,
    left: usize,
    out: Out,
) -> usize {
    let vectors = x.len() / depth.max(1);
    let rows = if left >= ROWS { ROWS } else { 1 };
    let mut vector = 0;
    while vector < vectors {
        let x = &x[vector * depth..];
        vector += match (rows, vectors - vector) {
            (ROWS, 4..) => sums::<T, ROWS, 4, FMA>(weight, x, depth, vector, out),
            (ROWS, 2..) => sums::<T, ROWS, 2, FMA>(weight, x, depth, vector, out),
            (ROWS, _) => sums::<T, ROWS, 1, FMA>(weight, x, depth, vector, out),
            (_, 4..) => sums::<T, 1, 4, FMA>(weight, x, depth, vector, out),
            _ => sums::<T, 1, 1, FMA>(weight, x, depth, vector, out),
        };
    }
    rows
}

/// `R` rows by `V` vectors from the vector `first` on. Returns `V`.
#[inline(always)]
fn sums<T: Stored, const R: usize, const V: usize, const FMA: bool>(
    weight: &[T],
    x: &[f32],
    depth: usize,
    first: usize,
    out: Out,
) -> usize {
    let rows: [&[T]; R] = std::array::from_fn(|row| &weight[row * depth..][..depth]);
    let xs: [&[f32]; V] = std::array::from_fn(|vector| &x[vector * depth..][..depth]);
    let mut sums = [[[0f32; LANES]; V]; R];
    let whole = depth / LANES * LANES;
    for from in (0..whole).step_by(LANES) {
        let x: [[f32; LANES]; V] = std::array::from_fn(|vector| lanes(xs[vector], from));
        for (sums, row) in sums.iter_mut().zip(rows) {
            let w = lanes(row, from).map(Stored::get);
            for (sums, x) in sums.iter_mut().zip(x) {
                for (sum, (w, x)) in sums.iter_mut().zip(w.into_iter().zip(x)) {
                    *sum = fma::<FMA>(w, x, *sum);
                }
            }
        }
    }
    for (r, (sums, row)) in sums.iter().zip(rows).enumerate() {
        for (v, (sums, x)) in sums.iter().zip(xs).enumerate() {
            let rest = row[whole..].iter().zip(&x[whole..]);
            let sum = rest.fold(total(sums), |sum, (w, x)| fma::<FMA>(w.get(), *x, sum));
            // SAFETY: the rows are this task's alone and below `height`, as `block` takes no more than are left of them; vector
            // `first + v` is one of `x`, and `vector_products` saw that the output has `height` values for each.
            unsafe { *{ out.first }.0.add((first + v) * out.height + out.row + r) = sum };
        }
    }
    V
}

#[inline(always)]
fn lanes<T: Copy>(values: &[T], from: usize) -> [T; LANES] {
    match values[from..].first_chunk() {
        Some(chunk) => *chunk,
        None => unreachable!("whole lanes were counted"),
    }
}

/// The sum of the lanes, halves first.
#[inline(always)]
fn total(lanes: &[f32; LANES]) -> f32 {
    let mut sums = *lanes;
    for half in [8, 4, 2, 1] {
        for lane in 0..half {
            sums[lane] += sums[lane + half];
        }
    }
    sums[0]
}

/// Attention of one token's query heads that share a key head.
pub struct Attention<'a> {
    /// (query heads, width), scaled already.
    pub query: &'a [f32],
    /// Keys of all heads, a token after the other: (length, key heads * width).
    pub keys: &'a [f32],
    /// Values of all heads, likewise.
    pub values: &'a [f32],
    /// The shared key head.
    pub head: usize,
    /// Key heads.
    pub heads: usize,
    /// (query heads, width).
    pub out: &'a mut [f32],
    /// Whether scores and probabilities are rounded to bf16, as a product in bf16 leaves them.
    pub rounded: bool,
}

impl Attention<'_> {
    /// Computes `softmax(q K^T) V`.
    ///
    /// # Panics
    /// If sizes don't fit.
    pub fn compute(self, width: usize) {
        assert!(self.head < self.heads && width > 0, "the key head");
        let stride = self.heads.saturating_mul(width);
        let (keys, values) = (self.keys.len(), self.values.len());
        assert!(self.query.len().is_multiple_of(width), "the query heads");
        assert_eq!(self.query.len(), self.out.len(), "the output's size");
        assert_eq!(keys, values, "the sizes of keys and values");
        assert!(keys > 0 && keys.is_multiple_of(stride), "the keys");
        run(Attend { all: self, width });
    }
}

struct Attend<'a> {
    all: Attention<'a>,
    width: usize,
}

impl Loop for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let (all, width) = (self.all, self.width);
        let round = |x: f32| {
            if all.rounded {
                half::bf16::from_f32(x).to_f32()
            } else {
                x
            }
        };
        let (stride, start) = (all.heads * width, all.head * width);
        let mut p = vec![0f32; all.keys.len() / stride];
        let pairs = all
            .query
            .chunks_exact(width)
            .zip(all.out.chunks_exact_mut(width));
        for (query, out) in pairs {
            for (p, keys) in p.iter_mut().zip(all.keys.chunks_exact(stride)) {
                *p = round(dot::<FMA>(query, &keys[start..][..width]));
            }
            let most = p.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            for p in &mut p {
                *p = exp::<FMA>(*p - most);
            }
            let all_of_it = 1. / p.iter().sum::<f32>();
            out.fill(0.);
            for (p, values) in p.iter().zip(all.values.chunks_exact(stride)) {
                let p = round(p * all_of_it);
                for (out, value) in out.iter_mut().zip(&values[start..][..width]) {
                    *out = fma::<FMA>(p, *value, *out);
                }
            }
        }
    }
}

#[inline(always)]
fn dot<const FMA: bool>(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; LANES];
    let whole = a.len() / LANES * LANES;
    for from in (0..whole).step_by(LANES) {
        let pairs = lanes(a, from).into_iter().zip(lanes(b, from));
        for (sum, (a, b)) in sums.iter_mut().zip(pairs) {
            *sum = fma::<FMA>(a, b, *sum);
        }
    }
    let rest = a[whole..].iter().zip(&b[whole..]);
    rest.fold(total(&sums), |sum, (a, b)| fma::<FMA>(*a, *b, sum))
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::dispatch::tests::with_each;
    use crate::matrix::{NF4_BLOCK, Nf4, Rounding};

    /// Numbers between -1 and 1 that look random.
    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 8_388_608. - 1.
        };
        std::iter::repeat_with(next).take(count).collect()
    }

    fn plain(weight: &[f32], x: &[f32], height: usize, depth: usize) -> Vec<f64> {
        let row = |x: &[f32], row: usize| {
            let pairs = weight[row * depth..][..depth].iter().zip(x);
            pairs.map(|(w, x)| f64::from(*w) * f64::from(*x)).sum()
        };
        let vectors = x.chunks_exact(depth);
        vectors
            .flat_map(|x| (0..height).map(move |r| row(x, r)))
            .collect()
    }

    fn close(ours: &[f32], plain: &[f64], within: f64) {
        assert_eq!(ours.len(), plain.len());
        for (place, (a, b)) in ours.iter().zip(plain).enumerate() {
            assert!((f64::from(*a) - b).abs() < within, "{place}: {a}, {b}");
        }
    }

    #[test]
    fn products_are_those_of_a_plain_loop() {
        let code: [f32; 16] = std::array::from_fn(|i| i as f32 / 7.5 - 1.);
        for (height, depth) in [(1, 1), (5, 64), (9, 100), (200, 576)] {
            for vectors in [1, 2, 3, 4, 7] {
                let values = numbers(height * depth, 1);
                let x = numbers(vectors * depth, 2);
                let halves: Vec<bf16> = values.iter().map(|x| bf16::from_f32(*x)).collect();
                let rounded: Vec<f32> = halves.iter().map(|x| x.to_f32()).collect();
                let count = height * depth;
                let packed: Vec<u8> = (0..count.div_ceil(2)).map(|i| (i * 37) as u8).collect();
                let absmax = vec![0.5; count.div_ceil(NF4_BLOCK)];
                let nf4 = Nf4 {
                    packed: &packed,
                    absmax: &absmax,
                    code: &code,
                    rounding: Rounding::F32,
                };
                let codes = packed.iter().flat_map(|byte| [byte >> 4, byte & 15]);
                let dense: Vec<f32> = codes
                    .map(|c| code[usize::from(c)] * 0.5)
                    .take(count)
                    .collect();
                with_each(|_| {
                    for (stored, same) in [
                        (Values::F32(&values), &values),
                        (Values::Bf16(&halves), &rounded),
                        (Values::Nf4(nf4), &dense),
                    ] {
                        let mut out = vec![f32::NAN; vectors * height];
                        let weight = Matrix::new(stored, height, depth).unwrap();
                        vector_products(vec![VectorProduct {
                            weight,
                            x: &x,
                            out: &mut out,
                        }]);
                        close(&out, &plain(same, &x, height, depth), 1e-4);
                    }
                });
            }
        }
    }

    #[test]
    fn a_vector_does_not_depend_on_those_beside_it() {
        let (height, depth) = (300, 250);
        let (values, x) = (numbers(height * depth, 3), numbers(7 * depth, 4));
        let product = |x: &[f32]| {
            let mut out = vec![0.; x.len() / depth * height];
            let weight = Matrix::f32(&values, height, depth).unwrap();
            let out_of = &mut out;
            vector_products(vec![VectorProduct {
                weight,
                x,
                out: out_of,
            }]);
            out
        };
        with_each(|isa| {
            let together = product(&x);
            let alone: Vec<f32> = x.chunks_exact(depth).flat_map(product).collect();
            assert!(together == alone, "{isa:?}");
        });
    }

    #[test]
    fn attention_is_that_of_a_plain_loop() {
        let (heads, group, width) = (2, 3, 20);
        for length in [1, 5, 130] {
            let query = numbers(group * width, 5);
            let keys = numbers(length * heads * width, 6);
            let values = numbers(length * heads * width, 7);
            for head in 0..heads {
                let wide = |x: &[f32], token: usize, i: usize| {
                    f64::from(x[(token * heads + head) * width + i])
                };
                let mut expected = Vec::new();
                for query in query.chunks_exact(width) {
                    let score = |token| {
                        (0..width)
                            .map(|i| f64::from(query[i]) * wide(&keys, token, i))
                            .sum::<f64>()
                    };
                    let p: Vec<f64> = (0..length).map(|token| score(token).exp()).collect();
                    let total: f64 = p.iter().sum();
                    expected.extend((0..width).map(|i| {
                        let sum = p
                            .iter()
                            .enumerate()
                            .map(|(token, p)| p * wide(&values, token, i));
                        sum.sum::<f64>() / total
                    }));
                }
                with_each(|_| {
                    for (rounded, within) in [(false, 1e-5), (true, 2e-2)] {
                        let mut out = vec![f32::NAN; group * width];
                        let attention = Attention {
                            query: &query,
                            keys: &keys,
                            values: &values,
                            head,
                            heads,
                            out: &mut out,
                            rounded,
                        };
                        attention.compute(width);
                        close(&out, &expected, within);
                    }
                });
            }
        }
    }
}
