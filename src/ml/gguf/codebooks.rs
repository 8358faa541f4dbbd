//! The codebooks of ggml's i-quants (`ggml-common.h`), whose indices are stored in place of values.
//!
//! The large ones are in `codebooks.bin`, made by `tests/python/generate_gguf.py` from the tables of the `gguf` package: a
//! little-endian u16 an entry, with the codes of its values from the lowest bits on.

/// A codebook with entries of 4 or 8 values.
pub(super) struct Codebook {
    /// The number of entries in front of it in the file.
    start: usize,
    entries: usize,
    /// What the codes stand for.
    values: &'static [f32],
}

static ENTRIES: &[u8] = include_bytes!("codebooks.bin");

const EIGHTS: &[f32] = &[8., 25., 43.];

pub(super) const IQ2_XXS: Codebook = Codebook {
    start: 0,
    entries: 256,
    values: EIGHTS,
};
pub(super) const IQ2_XS: Codebook = Codebook {
    start: 256,
    entries: 512,
    values: EIGHTS,
};
pub(super) const IQ2_S: Codebook = Codebook {
    start: 768,
    entries: 1024,
    values: EIGHTS,
};
pub(super) const IQ3_XXS: Codebook = Codebook {
    start: 1792,
    entries: 256,
    values: &[4., 12., 20., 28., 36., 44., 52., 62.],
};
pub(super) const IQ3_S: Codebook = Codebook {
    start: 2048,
    entries: 512,
    values: &[1., 3., 5., 7., 9., 11., 13., 15.],
};
/// The codebook of `IQ1_S` and `IQ1_M`.
pub(super) const IQ1: Codebook = Codebook {
    start: 2560,
    entries: 2048,
    values: &[-1., 0., 1.],
};

impl Codebook {
    /// The `N` values of an entry: 8 with codes of 2 bits, 4 with codes of 3 bits.
    ///
    /// # Panics
    /// There is no such entry.
    pub(super) fn entry<const N: usize>(&self, index: usize) -> [f32; N] {
        assert!(index < self.entries, "there is no entry {index}");
        let at = 2 * (self.start + index);
        let codes = u16::from_le_bytes([ENTRIES[at], ENTRIES[at + 1]]);
        let bits = if N == 4 { 3 } else { 2 };
        std::array::from_fn(|i| self.values[usize::from(codes >> (bits * i) & ((1 << bits) - 1))])
    }
}

/// The values of `IQ4_NL` and `IQ4_XS`.
pub(super) const IQ4: [i8; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

/// The values of E2M1, doubled.
pub(super) const MXFP4: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// The signs of eight values by the first seven of them: an even number is negative.
pub(super) const SIGNS_OF_EIGHT: [u8; 128] = {
    let mut signs = [0; 128];
    let mut index = 0;
    while index < 128 {
        let odd = (index as u8).count_ones() as u8 & 1;
        signs[index] = index as u8 | odd << 7;
        index += 1;
    }
    signs
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_books_fill_the_file() {
        let mut start = 0;
        for book in [IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S, IQ1] {
            assert_eq!(book.start, start);
            start += book.entries;
            for index in 0..book.entries {
                // Each code stands for something.
                if book.values.len() == 8 {
                    book.entry::<4>(index);
                } else {
                    book.entry::<8>(index);
                }
            }
        }
        assert_eq!(ENTRIES.len(), 2 * start);
        assert!(
            IQ2_XXS
                .entry::<8>(0)
                .iter()
                .all(|value| *value > 7. && *value < 9.)
        );
        assert_eq!(SIGNS_OF_EIGHT[..4], [0, 129, 130, 3]);
    }
}
