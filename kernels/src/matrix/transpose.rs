//! The transpose of a tile of rows to `[column][row]`, the order that the innermost loop reads.

use crate::dispatch::{Loop, run};
use crate::micro::TILE;

/// A float, or a pair of bf16.
pub(super) trait Word: Copy + Default {}

impl Word for f32 {}

impl Word for u32 {}

/// Transposes `count` rows of words, `stride` apart, into a tile of `[column][TILE]`. Rows from `count` on are unspecified.
///
/// # Panics
/// If `count` is 0 or more than [`TILE`], or `values` are fewer than the rows.
pub(super) fn transpose<T: Word>(values: &[T], stride: usize, count: usize, tile: &mut [T]) {
    let columns = tile.len() / TILE;
    assert!((1..=TILE).contains(&count), "{count} rows in a tile");
    assert!(
        values.len() >= (count - 1) * stride + columns,
        "rows of a tile"
    );
    #[cfg(target_arch = "x86_64")]
    if count == TILE && crate::dispatch::Isa::current() >= crate::dispatch::Isa::Avx2 {
        let whole = columns / avx2::COLUMNS * avx2::COLUMNS;
        // SAFETY: the processor has AVX2; the rows are there, as asserted, and the tile has `columns` columns; a word has 32 bits, which
        // are only moved.
        unsafe {
            avx2::transpose(
                values.as_ptr().cast(),
                stride,
                whole,
                tile.as_mut_ptr().cast(),
            );
        }
        for (k, column) in tile
            .as_chunks_mut::<TILE>()
            .0
            .iter_mut()
            .enumerate()
            .skip(whole)
        {
            *column = std::array::from_fn(|i| values[i * stride + k]);
        }
        return;
    }
    run(Transpose {
        values,
        stride,
        count,
        tile,
    });
}

/// The transpose by 16 columns at a time, which the compiler keeps in registers.
struct Transpose<'a, T> {
    values: &'a [T],
    stride: usize,
    count: usize,
    tile: &'a mut [T],
}

impl<T: Word> Loop for Transpose<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        const BLOCK: usize = 16;
        let row = |i: usize| &self.values[i.min(self.count - 1) * self.stride..];
        let rows: [&[T]; TILE] = std::array::from_fn(row);
        let (columns, _) = self.tile.as_chunks_mut::<TILE>();
        for (block, columns) in columns.chunks_mut(BLOCK).enumerate() {
            let first = block * BLOCK;
            let mut part = [[T::default(); BLOCK]; TILE];
            for (part, row) in part.iter_mut().zip(rows).take(self.count) {
                if let Some(whole) = row.get(first..).and_then(|row| row.first_chunk::<BLOCK>()) {
                    *part = *whole;
                } else {
                    for (part, value) in part.iter_mut().zip(&row[first..]) {
                        *part = *value;
                    }
                }
            }
            for (k, column) in columns.iter_mut().enumerate() {
                for i in 0..TILE {
                    column[i] = part[i][k];
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        __m128, __m256, _mm_storeu_ps, _mm256_castps256_ps128, _mm256_extractf128_ps,
        _mm256_loadu_ps, _mm256_permute2f128_ps, _mm256_shuffle_ps, _mm256_storeu_ps,
        _mm256_unpackhi_ps, _mm256_unpacklo_ps,
    };

    use super::TILE;

    /// The columns transposed at a time.
    pub(super) const COLUMNS: usize = 8;

    /// Transposes four rows of eight words: column `k` is in half `k / 4` of vector `k % 4`.
    #[target_feature(enable = "avx2")]
    fn columns(rows: [__m256; 4]) -> [__m256; 4] {
        let [a, b, c, d] = rows;
        let (ab, cd) = (_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d));
        let (ab2, cd2) = (_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d));
        [
            _mm256_shuffle_ps::<0b01_00_01_00>(ab, cd),
            _mm256_shuffle_ps::<0b11_10_11_10>(ab, cd),
            _mm256_shuffle_ps::<0b01_00_01_00>(ab2, cd2),
            _mm256_shuffle_ps::<0b11_10_11_10>(ab2, cd2),
        ]
    }

    /// # Safety
    /// The processor must have AVX2, `values` [`TILE`] rows of `count` words, `stride` apart, `tile` `count` columns, and `count`
    /// be a multiple of [`COLUMNS`].
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn transpose(
        values: *const f32,
        stride: usize,
        count: usize,
        tile: *mut f32,
    ) {
        for first in (0..count).step_by(COLUMNS) {
            let four = |row: usize| {
                let rows: [__m256; 4] = std::array::from_fn(|i| {
                    // SAFETY: eight words of a row.
                    unsafe { _mm256_loadu_ps(values.add((row + i) * stride + first)) }
                });
                rows
            };
            let (a, b, c) = (columns(four(0)), columns(four(4)), columns(four(8)));
            for k in 0..4 {
                let halves: [(__m256, __m128); 2] = [
                    (
                        _mm256_permute2f128_ps::<0x20>(a[k], b[k]),
                        _mm256_castps256_ps128(c[k]),
                    ),
                    (
                        _mm256_permute2f128_ps::<0x31>(a[k], b[k]),
                        _mm256_extractf128_ps::<1>(c[k]),
                    ),
                ];
                for (half, (eight, four)) in halves.into_iter().enumerate() {
                    // SAFETY: one of the tile's columns, of twelve words.
                    unsafe {
                        let column = tile.add((first + half * 4 + k) * TILE);
                        _mm256_storeu_ps(column, eight);
                        _mm_storeu_ps(column.add(8), four);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::tests::with_each;
    use crate::product::tests::numbers;

    #[test]
    fn rows_become_columns() {
        with_each(|isa| {
            for (columns, stride) in [(1, 1), (7, 9), (8, 8), (16, 21), (45, 45), (64, 70)] {
                for count in [1, 5, TILE - 1, TILE] {
                    let values = numbers((count - 1) * stride + columns, 3);
                    let mut tile = vec![0.; columns * TILE];
                    transpose(&values, stride, count, &mut tile);
                    for (k, column) in tile.as_chunks::<TILE>().0.iter().enumerate() {
                        for i in 0..count {
                            assert_eq!(
                                column[i].to_bits(),
                                values[i * stride + k].to_bits(),
                                "{isa:?} {columns} {count}"
                            );
                        }
                    }
                }
            }
        });
    }
}
