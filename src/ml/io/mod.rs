//! Model folders on the disk: safetensors read by position and written in pieces, and the types of what they hold.

pub mod finite;
pub mod float;
pub mod folder;
pub(in crate::ml) mod rewrite;
pub mod weights;
