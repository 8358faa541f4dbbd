//! The arithmetic of a transformer's training and decoding on plain slices of floats: matrix products, norms, rotary embeddings,
//! attention and the softmax over the vocabulary, each with its backward pass. This crate knows no tensors, files or models.
//!
//! Activations live in *panels*: 32 tokens side by side for each feature (see [`panels`]). Every loop then runs over 32
//! tokens at once, products need no packing of activations, and padding is at most 31 tokens a batch.
//!
//! Results don't depend on the number of threads: work is split by sizes alone, and every sum has a fixed order.

#![expect(
    unsafe_code,
    reason = "vector instructions and rows shared among threads; each block says why it holds"
)]
#![expect(
    clippy::inline_always,
    clippy::needless_range_loop,
    clippy::needless_bitwise_bool,
    reason = "loops over lanes must be compiled for their caller's instruction set, index several arrays, and have no branch"
)]

pub mod attention;
pub mod bf16;
pub mod dispatch;
pub mod dora;
pub mod dropout;
pub mod elementwise;
pub mod exp;
mod float_type;
pub mod gated;
pub mod ggml;
pub mod matrix;
pub mod merge;
mod micro;
pub mod nf4;
pub mod normal;
pub mod panels;
pub mod product;
pub mod random;
pub mod reduce;
pub mod team;
pub mod vectors;
pub mod vocabulary;

pub use float_type::FloatType;

#[cfg(test)]
mod tests;
