//! GGUF, the file format of llama.cpp: the types of its tensors and the values of its metadata ([`GgmlType`], [`Value`]), what its
//! architectures are called here ([`names`]), and the way in: a file is read ([`read`]), its blocks become f32 ([`dequantise`]) and a
//! model folder ([`import`]).
//!
//! The format is described in ggml's `docs/gguf.md`, the types in its `ggml-common.h`.

mod codebooks;
pub mod config;
pub mod dequantise;
pub mod export;
mod ggml_type;
mod hyperparameters;
pub mod import;
pub mod mixture;
pub mod names;
pub mod read;
mod rope;
mod value;
pub mod verify;
mod write;

pub use ggml_type::GgmlType;
pub use value::{Array, Value, ValueType};

/// The first four bytes of a file.
pub const MAGIC: [u8; 4] = *b"GGUF";
/// The version of the format that is written today; 1 and 2 are read as well.
pub const VERSION: u32 = 3;
/// The alignment in bytes of the tensors of a file that doesn't say `general.alignment`.
pub const ALIGNMENT: u64 = 32;

#[cfg(test)]
mod tests;
