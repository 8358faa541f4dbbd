//! The artifacts, as types for [`crate::engine::Input`]. Their layouts on disk are other people's formats.

use crate::engine::Artifact;

/// Rows as people wrote them: Parquet files per split, with `system`, `prompt`, `chosen`, `rejected` or `messages`.
#[derive(Debug)]
pub struct Dataset;

/// Rendered text: Parquet files per split, with `prompt`, `chosen` and, for preferences, `rejected`.
#[derive(Debug)]
pub struct Chats;

/// Token ids: Parquet files per split; see `data::tokens` for the columns.
#[derive(Debug)]
pub struct Tokens;

/// A Hugging Face model folder, dense or in bitsandbytes' NF4 layout.
#[derive(Debug)]
pub struct Model;

/// A PEFT adapter folder: `adapter_config.json` and `adapter_model.safetensors`.
#[derive(Debug)]
pub struct Adapter;

/// The numbers of an evaluation: `scores.json`.
#[derive(Debug)]
pub struct Scores;

impl Artifact for Dataset {
    const NAME: &'static str = "dataset";
}
impl Artifact for Chats {
    const NAME: &'static str = "chats";
}
impl Artifact for Tokens {
    const NAME: &'static str = "tokens";
}
impl Artifact for Model {
    const NAME: &'static str = "model";
}
impl Artifact for Adapter {
    const NAME: &'static str = "adapter";
}
impl Artifact for Scores {
    const NAME: &'static str = "scores";
}
