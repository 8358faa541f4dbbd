//! `pipeline` runs LLM fine-tuning recipes as a cached graph of stages.
//!
//! The map, from the bottom up (a test in `tests/it/layers.rs` keeps the directions):
//!
//! - [`engine`]: fingerprints, store, plan, run, events. Knows no machine learning.
//! - [`ml`]: models, LoRA, NF4, losses, optimisers, training loops. Knows no YAML and no cache.
//! - [`data`] and [`text`]: Parquet tables; chat templates and tokenizers.
//! - [`hub`]: the Hugging Face hub behind one struct.
//! - [`remote`]: shared caches (folders, S3, Google Cloud Storage, Azure, HTTP) behind one struct.
//! - [`inference`]: a model that answers prompts, for `chat` and `generate`.
//! - [`stages`]: one file a kind of stage; the only place where the layers above meet.
//! - [`recipe`]: YAML text to a typed recipe, with places for every error.
//! - [`report`]: consumers of the engine's events (terminal, JSON lines).
//! - [`cli`]: one file a subcommand; the only reader of the environment and the only renderer of errors.

pub mod cli;
pub mod data;
pub mod engine;
pub mod hub;
pub mod inference;
pub mod ml;
pub mod recipe;
pub mod remote;
pub mod report;
pub mod stages;
pub mod text;
