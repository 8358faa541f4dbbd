//! The types of numbers, by torch's names.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ml::io::float::Float;

/// A floating-point type.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::stages) enum Dtype {
    /// IEEE single precision, 4 bytes.
    #[default]
    #[serde(alias = "f32")]
    Float32,
    /// IEEE half precision, 2 bytes.
    #[serde(alias = "f16")]
    Float16,
    /// The upper half of single precision, 2 bytes.
    #[serde(alias = "bf16")]
    Bfloat16,
}

impl Dtype {
    pub(in crate::stages) fn float(self) -> Float {
        match self {
            Self::Float32 => Float::F32,
            Self::Float16 => Float::F16,
            Self::Bfloat16 => Float::BF16,
        }
    }
}
