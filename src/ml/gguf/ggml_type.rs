//! The types of tensors in a GGUF file.

use std::fmt;

use anyhow::{Context as _, ensure};

/// A type of tensors by ggml's name. Values are stored in blocks: [`GgmlType::block`] values of a row take [`GgmlType::block_bytes`] bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
#[expect(missing_docs, non_camel_case_types, reason = "ggml's names")]
pub enum GgmlType {
    F32 = 0,
    F16 = 1,
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q8_1 = 9,
    Q2_K = 10,
    Q3_K = 11,
    Q4_K = 12,
    Q5_K = 13,
    Q6_K = 14,
    Q8_K = 15,
    IQ2_XXS = 16,
    IQ2_XS = 17,
    IQ3_XXS = 18,
    IQ1_S = 19,
    IQ4_NL = 20,
    IQ3_S = 21,
    IQ2_S = 22,
    IQ4_XS = 23,
    I8 = 24,
    I16 = 25,
    I32 = 26,
    I64 = 27,
    F64 = 28,
    IQ1_M = 29,
    BF16 = 30,
    TQ1_0 = 34,
    TQ2_0 = 35,
    MXFP4 = 39,
    NVFP4 = 40,
    Q1_0 = 41,
}

/// The types in the order of their ids: ggml's name, the values of a block and its bytes. The sums tell what a block holds: scales (and
/// minima) first, then the values' low bits, high bits and signs.
const TABLE: &[(GgmlType, &str, usize, usize)] = &[
    (GgmlType::F32, "F32", 1, 4),
    (GgmlType::F16, "F16", 1, 2),
    (GgmlType::Q4_0, "Q4_0", 32, 2 + 16),
    (GgmlType::Q4_1, "Q4_1", 32, 2 + 2 + 16),
    (GgmlType::Q5_0, "Q5_0", 32, 2 + 4 + 16),
    (GgmlType::Q5_1, "Q5_1", 32, 2 + 2 + 4 + 16),
    (GgmlType::Q8_0, "Q8_0", 32, 2 + 32),
    (GgmlType::Q8_1, "Q8_1", 32, 4 + 4 + 32),
    (GgmlType::Q2_K, "Q2_K", 256, 16 + 64 + 2 + 2),
    (GgmlType::Q3_K, "Q3_K", 256, 32 + 64 + 12 + 2),
    (GgmlType::Q4_K, "Q4_K", 256, 2 + 2 + 12 + 128),
    (GgmlType::Q5_K, "Q5_K", 256, 2 + 2 + 12 + 32 + 128),
    (GgmlType::Q6_K, "Q6_K", 256, 128 + 64 + 16 + 2),
    (GgmlType::Q8_K, "Q8_K", 256, 4 + 256 + 32),
    (GgmlType::IQ2_XXS, "IQ2_XXS", 256, 2 + 64),
    (GgmlType::IQ2_XS, "IQ2_XS", 256, 2 + 64 + 8),
    (GgmlType::IQ3_XXS, "IQ3_XXS", 256, 2 + 64 + 32),
    (GgmlType::IQ1_S, "IQ1_S", 256, 2 + 32 + 16),
    (GgmlType::IQ4_NL, "IQ4_NL", 32, 2 + 16),
    (GgmlType::IQ3_S, "IQ3_S", 256, 2 + 64 + 8 + 32 + 4),
    (GgmlType::IQ2_S, "IQ2_S", 256, 2 + 64 + 8 + 8),
    (GgmlType::IQ4_XS, "IQ4_XS", 256, 2 + 2 + 4 + 128),
    (GgmlType::I8, "I8", 1, 1),
    (GgmlType::I16, "I16", 1, 2),
    (GgmlType::I32, "I32", 1, 4),
    (GgmlType::I64, "I64", 1, 8),
    (GgmlType::F64, "F64", 1, 8),
    (GgmlType::IQ1_M, "IQ1_M", 256, 32 + 16 + 8),
    (GgmlType::BF16, "BF16", 1, 2),
    (GgmlType::TQ1_0, "TQ1_0", 256, 48 + 4 + 2),
    (GgmlType::TQ2_0, "TQ2_0", 256, 64 + 2),
    (GgmlType::MXFP4, "MXFP4", 32, 1 + 16),
    (GgmlType::NVFP4, "NVFP4", 64, 4 + 32),
    (GgmlType::Q1_0, "Q1_0", 128, 2 + 16),
];

impl GgmlType {
    /// All types, in the order of their ids.
    pub fn all() -> impl Iterator<Item = Self> {
        TABLE.iter().map(|row| row.0)
    }

    /// The type with this number in a file.
    pub fn from_id(id: u32) -> Option<Self> {
        Self::all().find(|kind| kind.id() == id)
    }

    /// The type with this name, in any case (`q4_k`).
    pub fn from_name(name: &str) -> Option<Self> {
        Self::all().find(|kind| kind.name().eq_ignore_ascii_case(name))
    }

    /// Its number in a file.
    pub fn id(self) -> u32 {
        self as u32
    }

    fn row(self) -> (&'static str, usize, usize) {
        let row = TABLE.iter().find(|row| row.0 == self);
        row.map_or(("", 1, 1), |row| (row.1, row.2, row.3))
    }

    /// ggml's name (`Q4_K`).
    pub fn name(self) -> &'static str {
        self.row().0
    }

    /// The values of a block. A row is a whole number of blocks.
    pub fn block(self) -> usize {
        self.row().1
    }

    /// The bytes of a block.
    pub fn block_bytes(self) -> usize {
        self.row().2
    }

    /// The bytes of `values` values.
    ///
    /// # Errors
    /// They are no whole number of blocks, or too many to be counted.
    pub fn bytes(self, values: usize) -> anyhow::Result<usize> {
        let block = self.block();
        ensure!(
            values.is_multiple_of(block),
            "{values} values of the type {self} are not a whole number of blocks of {block}"
        );
        let bytes = (values / block).checked_mul(self.block_bytes());
        bytes.with_context(|| format!("{values} values of the type {self} are too many"))
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_names_lead_back() {
        assert!(TABLE.is_sorted_by_key(|row| row.0.id()));
        for kind in GgmlType::all() {
            assert_eq!(GgmlType::from_id(kind.id()), Some(kind));
            assert_eq!(GgmlType::from_name(&kind.name().to_lowercase()), Some(kind));
            assert_eq!(kind.name(), format!("{kind:?}"));
        }
        assert_eq!(GgmlType::from_id(4), None);
    }

    #[test]
    fn bytes_are_whole_blocks() {
        assert_eq!(GgmlType::Q4_K.bytes(512).unwrap(), 288);
        assert_eq!(GgmlType::F32.bytes(0).unwrap(), 0);
        let error = GgmlType::Q8_0.bytes(48).unwrap_err().to_string();
        assert!(error.contains("Q8_0") && error.contains("32"), "{error}");
        assert!(GgmlType::F64.bytes(usize::MAX).is_err());
    }
}
