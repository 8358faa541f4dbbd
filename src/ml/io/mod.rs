//! Model folders on disk: safetensors files read by position and written in pieces, and the types of their values.

pub mod finite;
pub mod float;
pub mod folder;
pub(in crate::ml) mod rewrite;
pub mod weights;
