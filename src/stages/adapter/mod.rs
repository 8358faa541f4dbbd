//! Adapters: how they begin, how they come, and how several become one.

pub mod attach_lora;
pub mod combine_adapters;
pub mod download_adapter;
pub(in crate::stages) mod files;
pub mod import_adapter;
