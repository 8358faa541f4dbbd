//! The kinds of stages, one file each. This is the only place where the engine meets data, text, the hub and `ml`.
//!
//! A new kind is one file plus one line in [`KINDS`]; docs/adding-a-stage.md walks through it.

pub mod adapter;
pub mod artifacts;
pub mod command;
pub mod dataset;
pub mod foresight;
mod from_hub;
mod lints;
pub mod model;
mod model_input;
pub mod preview;
mod reference_columns;
pub mod rules;
pub mod scores;
mod support;
pub mod text;
pub mod train;

#[cfg(test)]
mod threads;

#[cfg(test)]
#[path = "../../tests/it/support/hub/mod.rs"]
#[expect(dead_code, reason = "the integration tests use the rest of it")]
mod test_hub;

use crate::engine::Kind;
pub use support::support;

/// Every kind of stage, in the order of the reference docs.
pub const KINDS: &[Kind] = &[
    Kind::of::<dataset::download_dataset::DownloadDataset>(),
    Kind::of::<model::download_model::DownloadModel>(),
    Kind::of::<adapter::download_adapter::DownloadAdapter>(),
    Kind::of::<dataset::import_dataset::ImportDataset>(),
    Kind::of::<model::import_model::ImportModel>(),
    Kind::of::<adapter::import_adapter::ImportAdapter>(),
    Kind::of::<dataset::split_dataset::SplitDataset>(),
    Kind::of::<model::create_model::CreateModel>(),
    Kind::of::<text::apply_chat_template::ApplyChatTemplate>(),
    Kind::of::<text::tokenize::Tokenize>(),
    Kind::of::<model::add_tokens::AddTokens>(),
    Kind::of::<model::add_score_head::AddScoreHead>(),
    Kind::of::<model::quantize::Quantize>(),
    Kind::of::<adapter::attach_lora::AttachLora>(),
    Kind::of::<text::score_reference::ScoreReference>(),
    Kind::of::<train::train_sft::TrainSft>(),
    Kind::of::<train::train_orpo::TrainOrpo>(),
    Kind::of::<train::train_dpo::TrainDpo>(),
    Kind::of::<train::train_cpo::TrainCpo>(),
    Kind::of::<train::train_kto::TrainKto>(),
    Kind::of::<train::train_reward::TrainReward>(),
    Kind::of::<adapter::combine_adapters::CombineAdapters>(),
    Kind::of::<scores::evaluate::Evaluate>(),
    Kind::of::<scores::evaluate_choices::EvaluateChoices>(),
    Kind::of::<scores::evaluate_answers::EvaluateAnswers>(),
    Kind::of::<model::merge::Merge>(),
    Kind::of::<model::export_gguf::ExportGguf>(),
    Kind::of::<command::run_command::RunCommand>(),
];

/// The kind called `name`.
pub fn kind(name: &str) -> Option<&'static Kind> {
    KINDS.iter().find(|kind| kind.name == name)
}
