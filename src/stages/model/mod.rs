//! Models: how they come, are made, quantised and merged.

pub mod add_score_head;
pub mod add_tokens;
pub mod create_model;
pub mod download_model;
pub(in crate::stages) mod dtype;
pub mod export_gguf;
mod family;
pub(in crate::stages) mod files;
pub(in crate::stages) mod gguf;
pub mod import_model;
pub mod merge;
pub mod quantize;
