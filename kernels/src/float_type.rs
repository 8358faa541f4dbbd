//! The floating-point types in which weights are stored.

use half::f16;

use crate::bf16::bf16_bits;

/// A floating-point type of stored values. As bytes, values are little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FloatType {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// bfloat16: the upper half of a single-precision number.
    Bf16,
}

impl FloatType {
    /// The size of one value in bytes.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The nearest value of this type, ties to even, as f32.
    #[inline(always)]
    pub(crate) fn round(self, x: f32) -> f32 {
        match self {
            Self::F32 => x,
            Self::Bf16 => f32::from_bits(bf16_bits(x) << 16),
            Self::F16 => f16::from_f32(x).to_f32(),
        }
    }
}
