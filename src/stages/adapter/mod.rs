//! Adapters: how they begin, and how they come.

pub mod attach_lora;
pub mod download_adapter;
pub(in crate::stages) mod files;
pub mod import_adapter;
