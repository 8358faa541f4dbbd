//! Rounding to bfloat16, and panels of pairs of bfloat16 numbers.

use rayon::prelude::*;

use crate::dispatch::{Loop, run};
use crate::micro::pair_rows;
use crate::panels::{LANES, check, count};

/// The bits of `x` rounded to bf16, ties to even, in the low half of the result. A NaN stays a NaN.
#[inline(always)]
pub fn bf16_bits(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    let nan = (bits >> 16) | 0x40;
    if bits & 0x7fff_ffff > 0x7f80_0000 {
        nan
    } else {
        rounded
    }
}

/// Rounds panels of `features` features to bf16 and stores each two neighbouring features of a token as one word:
/// `out[panel][feature / 2][lane]`, the first of the two in the low half. With an odd number of features, the high half of the last
/// word is 0.
///
/// # Panics
/// If `data` is not a whole number of panels of `features`, or `out` does not hold as many panels of `features.div_ceil(2)` words.
pub fn pairs(data: &[f32], features: usize, out: &mut [u32]) {
    let half = features.div_ceil(2);
    let panels = count(data.len(), features, "the numbers to pair");
    check(out.len(), half, panels, "the pairs");
    out.par_chunks_mut(half.max(1) * LANES)
        .zip(data.par_chunks(features.max(1) * LANES))
        .for_each(|(out, data)| {
            let (out, _) = out.as_chunks_mut::<LANES>();
            let (rows, _) = data.as_chunks::<LANES>();
            if !pair_rows(rows, out) {
                run(Pairs { rows, out });
            }
        });
}

struct Pairs<'a> {
    rows: &'a [[f32; LANES]],
    out: &'a mut [[u32; LANES]],
}

impl Loop for Pairs<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for (out, rows) in self.out.iter_mut().zip(self.rows.chunks(2)) {
            let first = &rows[0];
            if let Some(second) = rows.get(1) {
                for lane in 0..LANES {
                    out[lane] = bf16_bits(first[lane]) | (bf16_bits(second[lane]) << 16);
                }
            } else {
                for lane in 0..LANES {
                    out[lane] = bf16_bits(first[lane]);
                }
            }
        }
    }
}

/// Rounds every value to bf16, ties to even, in place.
pub fn round_to_bf16(data: &mut [f32]) {
    struct Round<'a>(&'a mut [f32]);
    impl Loop for Round<'_> {
        type Output = ();
        #[inline(always)]
        fn run<const FMA: bool>(self) {
            for x in self.0 {
                *x = f32::from_bits(bf16_bits(*x) << 16);
            }
        }
    }
    data.par_chunks_mut(1 << 14)
        .for_each(|data| run(Round(data)));
}

/// Rounds values to bf16, ties to even, and writes them as little-endian bytes: as many as there are and `out` has room for, on the calling
/// thread.
pub fn to_bytes(values: &[f32], out: &mut [u8]) {
    struct Write<'a>(&'a [f32], &'a mut [u8]);
    impl Loop for Write<'_> {
        type Output = ();
        #[inline(always)]
        fn run<const FMA: bool>(self) {
            let (pairs, _) = self.1.as_chunks_mut::<2>();
            for (out, value) in pairs.iter_mut().zip(self.0) {
                *out = (bf16_bits(*value) as u16).to_le_bytes();
            }
        }
    }
    run(Write(values, out));
}

/// The values of little-endian bytes of bf16: as many as there are and `out` has room for, on the calling thread.
pub fn from_bytes(bytes: &[u8], out: &mut [f32]) {
    struct Read<'a>(&'a [u8], &'a mut [f32]);
    impl Loop for Read<'_> {
        type Output = ();
        #[inline(always)]
        fn run<const FMA: bool>(self) {
            let (pairs, _) = self.0.as_chunks::<2>();
            for (out, pair) in self.1.iter_mut().zip(pairs) {
                *out = f32::from_bits(u32::from(u16::from_le_bytes(*pair)) << 16);
            }
        }
    }
    run(Read(bytes, out));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::tests::with_each;

    #[test]
    fn bytes_are_those_of_half() {
        let some = (0..70_000u32).map(|i| f32::from_bits(i.wrapping_mul(0x9e37_79b9)));
        let edges = [
            0x7f80_0001,
            0xff80_0001,
            0x7f80_0000,
            0x7f7f_ffff,
            0x3f80_8000,
            0x3f81_8000,
            1,
        ];
        let values: Vec<f32> = some.chain(edges.map(f32::from_bits)).collect();
        let expected: Vec<u8> = (values.iter())
            .flat_map(|value| half::bf16::from_f32(*value).to_le_bytes())
            .collect();
        with_each(|isa| {
            // One value more than there is room for, and room for one more.
            for count in [values.len(), values.len() - 1] {
                let mut bytes = vec![7; 2 * count + 1];
                to_bytes(&values, &mut bytes);
                assert_eq!(bytes[..2 * count], expected[..2 * count], "{isa:?}");
                assert_eq!(bytes[2 * count], 7);
            }
            let mut read = vec![0.5f32; values.len() + 1];
            from_bytes(&expected, &mut read);
            assert_eq!(read.pop(), Some(0.5));
            for (read, value) in read.iter().zip(expected.chunks_exact(2)) {
                let value = half::bf16::from_le_bytes([value[0], value[1]]).to_f32();
                assert_eq!(read.to_bits(), value.to_bits(), "{isa:?}");
            }
        });
    }

    #[test]
    fn pairs_are_rounded_as_half_does() {
        with_each(|_| {
            let values = (0..3 * LANES).map(|i| (i as f32 - 40.) * 1.234_567e-3);
            let mut data: Vec<f32> = values.collect();
            data[5] = f32::NAN;
            data[6] = f32::INFINITY;
            data[7] = f32::from_bits(0x3f80_8000);
            let mut out = vec![0; 2 * LANES];
            pairs(&data, 3, &mut out);
            for (index, pair) in out.iter().enumerate() {
                let (row, lane) = (index / LANES * 2, index % LANES);
                let expected = |row: usize| {
                    data.get(row * LANES + lane)
                        .map_or(0, |x| u32::from(half::bf16::from_f32(*x).to_bits()))
                };
                assert_eq!(*pair, expected(row) | (expected(row + 1) << 16), "{index}");
            }
        });
    }
}
