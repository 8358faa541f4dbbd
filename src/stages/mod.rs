//! The kinds of stages, one file each. This is the only place where the engine meets data, text, the hub and `ml`.
//!
//! A new kind is one file plus one line in [`KINDS`]; docs/adding-a-stage.md walks through it.

mod adapter_files;
mod added;
pub mod apply_chat_template;
pub mod artifacts;
pub mod attach_lora;
mod chat_template;
pub mod create_model;
mod dataset_files;
mod dataset_folders;
pub mod download_adapter;
pub mod download_dataset;
pub mod download_model;
mod dtype;
pub mod evaluate;
mod from_hub;
pub mod import_adapter;
pub mod import_dataset;
pub mod import_model;
pub mod merge;
mod model_files;
pub mod quantize;
mod row_format;
pub mod split_dataset;
pub mod tokenize;
mod tokenizers;
pub mod train_orpo;
pub mod train_sft;
mod training;

#[cfg(test)]
mod bad_data;
#[cfg(test)]
mod formats;
#[cfg(test)]
mod threads;

#[cfg(test)]
#[path = "../../tests/it/support/hub/mod.rs"]
#[expect(dead_code, reason = "the integration tests use the rest of it")]
mod test_hub;

use crate::engine::Kind;

/// Every kind of stage, in the order of the reference docs.
pub const KINDS: &[Kind] = &[
    Kind::of::<download_dataset::DownloadDataset>(),
    Kind::of::<download_model::DownloadModel>(),
    Kind::of::<download_adapter::DownloadAdapter>(),
    Kind::of::<import_dataset::ImportDataset>(),
    Kind::of::<import_model::ImportModel>(),
    Kind::of::<import_adapter::ImportAdapter>(),
    Kind::of::<split_dataset::SplitDataset>(),
    Kind::of::<create_model::CreateModel>(),
    Kind::of::<apply_chat_template::ApplyChatTemplate>(),
    Kind::of::<tokenize::Tokenize>(),
    Kind::of::<quantize::Quantize>(),
    Kind::of::<attach_lora::AttachLora>(),
    Kind::of::<train_sft::TrainSft>(),
    Kind::of::<train_orpo::TrainOrpo>(),
    Kind::of::<evaluate::Evaluate>(),
    Kind::of::<merge::Merge>(),
];

/// The kind called `name`.
pub fn kind(name: &str) -> Option<&'static Kind> {
    KINDS.iter().find(|kind| kind.name == name)
}
