//! The three floating-point types in which weights are stored, and their conversion between little-endian bytes and f32.

use candle_core::DType;
use half::{bf16, f16};
use pipeline_kernels::{FloatType, bf16 as bf16_kernels};
use safetensors::Dtype;

/// A floating-point type that weights may be stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Float {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// bfloat16: the upper half of a single-precision number.
    BF16,
}

impl Float {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::BF16];

    /// The type with this name in safetensors; `None` for integers and rarer types.
    pub fn from_safetensors(dtype: Dtype) -> Option<Self> {
        Self::ALL.into_iter().find(|float| float.stored() == dtype)
    }

    /// The type with this name in torch (`bfloat16`).
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|float| float.name() == name)
    }

    /// The type that candle calls `dtype`; `None` for integers and rarer types.
    pub fn from_candle(dtype: DType) -> Option<Self> {
        Self::ALL.into_iter().find(|float| float.dtype() == dtype)
    }

    /// torch's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
        }
    }

    /// safetensors' name.
    pub fn stored(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::BF16 => Dtype::BF16,
        }
    }

    /// candle's name.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::BF16 => DType::BF16,
        }
    }

    /// The kernels' name.
    pub fn kernel(self) -> FloatType {
        match self {
            Self::F32 => FloatType::F32,
            Self::F16 => FloatType::F16,
            Self::BF16 => FloatType::Bf16,
        }
    }

    /// The size of one value in bytes.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// The nearest value of this type, ties to even.
    pub fn round(self, value: f32) -> f32 {
        match self {
            Self::F32 => value,
            Self::F16 => f16::from_f32(value).to_f32(),
            Self::BF16 => bf16::from_f32(value).to_f32(),
        }
    }

    /// Converts bytes to values, as many as `bytes` holds and `out` has room for.
    pub fn read(self, bytes: &[u8], out: &mut [f32]) {
        let pairs = bytes
            .as_chunks::<2>()
            .0
            .iter()
            .map(|b| u16::from_le_bytes(*b));
        match self {
            Self::F32 => {
                let values = bytes.as_chunks::<4>().0.iter();
                for (out, bytes) in out.iter_mut().zip(values) {
                    *out = f32::from_le_bytes(*bytes);
                }
            }
            Self::F16 => {
                for (out, bits) in out.iter_mut().zip(pairs) {
                    *out = f16::from_bits(bits).to_f32();
                }
            }
            Self::BF16 => bf16_kernels::from_bytes(bytes, out),
        }
    }

    /// Whether the values in `bytes` are all finite.
    pub fn all_finite(self, bytes: &[u8]) -> bool {
        let halves = |exponent: u16| {
            let bits = bytes.as_chunks::<2>().0.iter();
            bits.fold(true, |all, bits| {
                all & (u16::from_le_bytes(*bits) & exponent != exponent)
            })
        };
        match self {
            Self::F32 => bytes.as_chunks::<4>().0.iter().fold(true, |all, bits| {
                all & (u32::from_le_bytes(*bits) & 0x7f80_0000 != 0x7f80_0000)
            }),
            Self::F16 => halves(0x7c00),
            Self::BF16 => halves(0x7f80),
        }
    }

    /// Converts values to bytes, rounded to the nearest with ties to even, as many as there are and `out` has room for.
    pub fn write(self, values: &[f32], out: &mut [u8]) {
        match self {
            Self::F32 => {
                for (out, value) in out.as_chunks_mut::<4>().0.iter_mut().zip(values) {
                    *out = value.to_le_bytes();
                }
            }
            Self::F16 => {
                for (out, value) in out.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                    *out = f16::from_f32(*value).to_le_bytes();
                }
            }
            Self::BF16 => bf16_kernels::to_bytes(values, out),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bytes_and_values_agree(values in prop::collection::vec(-1e4f32..1e4, 0..40)) {
            for float in Float::ALL {
                let mut bytes = vec![0; values.len() * float.size()];
                float.write(&values, &mut bytes);
                let mut read = vec![0.; values.len()];
                float.read(&bytes, &mut read);
                for (read, value) in read.iter().zip(&values) {
                    prop_assert_eq!(read.to_bits(), float.round(*value).to_bits());
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_is_found() {
        for float in Float::ALL {
            let is_finite = |value: f32| {
                let mut bytes = vec![0; 3 * float.size()];
                float.write(&[1., value, -0.], &mut bytes);
                float.all_finite(&bytes)
            };
            for value in [0., -3., 1e-30, 6e4, f32::MIN_POSITIVE / 8.] {
                assert!(is_finite(value), "{float:?} {value}");
            }
            for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                assert!(!is_finite(value), "{float:?} {value}");
            }
            // Rounding can lead there.
            assert_eq!(is_finite(1e5), float != Float::F16);
            assert_eq!(is_finite(f32::MAX), float == Float::F32);
        }
    }

    #[test]
    fn names_lead_back() {
        for float in Float::ALL {
            assert_eq!(Float::from_name(float.name()), Some(float));
            assert_eq!(Float::from_safetensors(float.stored()), Some(float));
            assert_eq!(Float::from_candle(float.dtype()), Some(float));
        }
        assert_eq!(Float::from_safetensors(Dtype::U8), None);
    }
}
