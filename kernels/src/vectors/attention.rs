//! Attention of single tokens to the cached keys and values of their sequence.

use half::bf16;

use super::plain::{LANES, StoredFloat, lanes, total};
use crate::bf16::bf16_bits;
use crate::dispatch::{Loop, fma, run};
use crate::exp::{exp, tanh};

/// The cached keys or values (length, width) of one key head, row-major.
#[derive(Debug, Clone, Copy)]
pub enum Cached<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// bfloat16.
    Bf16(&'a [bf16]),
}

impl Cached<'_> {
    fn len(self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::Bf16(values) => values.len(),
        }
    }
}

/// Attention of one token, for the query heads that share a key head.
pub struct Attention<'a> {
    /// The queries (query heads, width), already multiplied by the scores' scale.
    pub query: &'a [f32],
    /// The keys (length, width).
    pub keys: Cached<'a>,
    /// The values (length, width).
    pub values: Cached<'a>,
    /// The results (query heads, width); overwritten.
    pub out: &'a mut [f32],
    /// The soft-cap of the scores, see [`crate::attention::Scores`].
    pub softcap: Option<f32>,
    /// Whether scores and probabilities are rounded to bf16, as products in bf16 round them.
    pub rounded: bool,
}

impl Attention<'_> {
    /// Computes `softmax(q K^T) V` (Vaswani et al. 2017, arXiv 1706.03762, equation 1), with a soft-cap of the scores if there is one,
    /// for heads of `width` features.
    ///
    /// # Panics
    /// If `width` is 0, `query` or `keys` is not a whole number of rows of `width`, there is no key, `out` has another size than
    /// `query` or `values` than `keys`, or keys and values have different types.
    pub fn compute(self, width: usize) {
        assert!(width > 0, "the width of a head");
        let (keys, values) = (self.keys.len(), self.values.len());
        assert!(self.query.len().is_multiple_of(width), "the query heads");
        assert_eq!(self.query.len(), self.out.len(), "the output's size");
        assert_eq!(keys, values, "the sizes of keys and values");
        assert!(keys > 0 && keys.is_multiple_of(width), "the keys");
        let (query, out) = (self.query, self.out);
        let (softcap, rounded) = (self.softcap, self.rounded);
        match (self.keys, self.values) {
            (Cached::F32(keys), Cached::F32(values)) => run(Attend {
                query,
                keys,
                values,
                out,
                softcap,
                rounded,
                width,
            }),
            (Cached::Bf16(keys), Cached::Bf16(values)) => run(Attend {
                query,
                keys,
                values,
                out,
                softcap,
                rounded,
                width,
            }),
            _ => panic!("keys and values are stored differently"),
        }
    }
}

struct Attend<'a, T> {
    query: &'a [f32],
    keys: &'a [T],
    values: &'a [T],
    out: &'a mut [f32],
    softcap: Option<f32>,
    rounded: bool,
    width: usize,
}

/// The columns of values that are summed in registers.
const COLUMNS: usize = 64;

impl<T: StoredFloat> Loop for Attend<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let width = self.width;
        let round = |p: &mut [f32]| {
            if self.rounded {
                for p in p {
                    *p = f32::from_bits(bf16_bits(*p) << 16);
                }
            }
        };
        let mut p = vec![0f32; self.keys.len() / width];
        let heads = self.query.chunks_exact(width);
        for (query, out) in heads.zip(self.out.chunks_exact_mut(width)) {
            let whole = p.len() / 4 * 4;
            for (p, keys) in p.chunks_exact_mut(4).zip(self.keys.chunks_exact(4 * width)) {
                let dots = dots::<T, 4, FMA>(query, keys);
                p.copy_from_slice(&dots);
            }
            for (token, p) in p.iter_mut().enumerate().skip(whole) {
                [*p] = dots::<T, 1, FMA>(query, &self.keys[token * width..]);
            }
            round(&mut p);
            if let Some(cap) = self.softcap {
                let inverse = 1. / cap;
                for p in &mut p {
                    *p = cap * tanh::<FMA>(*p * inverse);
                }
            }
            let most = p.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            for p in &mut p {
                *p = exp::<FMA>(*p - most);
            }
            let scale = 1. / p.iter().sum::<f32>();
            for p in &mut p {
                *p *= scale;
            }
            round(&mut p);
            for (number, out) in out.chunks_mut(COLUMNS).enumerate() {
                let values = &self.values[number * COLUMNS..];
                if let Some(out) = out.as_mut_array::<COLUMNS>() {
                    weighted::<T, FMA>(&p, values, width, out);
                } else {
                    weighted_rest::<T, FMA>(&p, values, width, out);
                }
            }
        }
    }
}

/// The dot products of a vector with `R` consecutive rows.
#[inline(always)]
fn dots<T: StoredFloat, const R: usize, const FMA: bool>(a: &[f32], rows: &[T]) -> [f32; R] {
    let width = a.len();
    let rows: [&[T]; R] = std::array::from_fn(|row| &rows[row * width..][..width]);
    let mut sums = [[0f32; LANES]; R];
    let whole = width / LANES * LANES;
    for from in (0..whole).step_by(LANES) {
        let a = lanes(a, from);
        for (sums, row) in sums.iter_mut().zip(rows) {
            let b = lanes(row, from).map(StoredFloat::get);
            for (sum, (a, b)) in sums.iter_mut().zip(a.into_iter().zip(b)) {
                *sum = fma::<FMA>(a, b, *sum);
            }
        }
    }
    std::array::from_fn(|r| {
        let rest = a[whole..].iter().zip(&rows[r][whole..]);
        rest.fold(total(&sums[r]), |sum, (a, b)| fma::<FMA>(*a, b.get(), sum))
    })
}

/// The sum over tokens of `p[token]` times the first [`COLUMNS`] values of the token's row of `width`.
#[inline(always)]
fn weighted<T: StoredFloat, const FMA: bool>(
    p: &[f32],
    values: &[T],
    width: usize,
    out: &mut [f32; COLUMNS],
) {
    let mut sums = [0f32; COLUMNS];
    for (p, values) in p.iter().zip(values.chunks(width)) {
        let Some(values) = values.first_chunk::<COLUMNS>() else {
            unreachable!("a row has as many columns");
        };
        for (sum, value) in sums.iter_mut().zip(values) {
            *sum = fma::<FMA>(*p, value.get(), *sum);
        }
    }
    *out = sums;
}

/// Like [`weighted`], for fewer columns.
#[inline(always)]
fn weighted_rest<T: StoredFloat, const FMA: bool>(
    p: &[f32],
    values: &[T],
    width: usize,
    out: &mut [f32],
) {
    out.fill(0.);
    for (p, values) in p.iter().zip(values.chunks(width)) {
        for (out, value) in out.iter_mut().zip(values) {
            *out = fma::<FMA>(*p, value.get(), *out);
        }
    }
}
