//! Stages made cheap, for a look at a recipe before time is spent.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::artifacts::{Chats, Dataset, Tokens};
use super::from_hub::cached;
use super::model::create_model::CreateModel;
use super::model::download_model::DownloadModel;
use super::text::score_reference::ScoreReference;
use super::{dataset, from_hub, model};
use crate::engine::{Artifact as _, RunEnv, Stage as _};
use crate::hub::RepoKind;

pub use super::text::tokenize::look::{Piece, Role, Row, Side, look};

/// Whether a stage that makes this artifact is cheap on few rows.
pub fn is_data(output: &str) -> bool {
    [Dataset::NAME, Chats::NAME, Tokens::NAME].contains(&output)
}

/// The parameter that names the stage whose rows a stage of this kind hands on, where it adds to them what takes a model to compute.
pub fn hands_on(kind: &str) -> Option<&'static str> {
    (kind == ScoreReference::KIND).then_some("dataset")
}

/// The parameters of a stage of this kind so that it takes no more than the first `rows` rows of what it reads; and what to say of a result
/// that is another one than with all rows. Stages that read local files alone have [`crate::engine::Stage::on_first_rows`].
pub fn shortened(kind: &str, mut parameters: Value, rows: usize) -> (Value, Option<&'static str>) {
    match kind {
        dataset::download_dataset::DownloadDataset::KIND => {
            let most = parameters["max_rows"].as_u64().unwrap_or(u64::MAX);
            parameters["max_rows"] = json!(most.min(rows as u64));
            (parameters, None)
        }
        dataset::split_dataset::SplitDataset::KIND => {
            let size = parameters["test_size"].as_f64().unwrap_or(0.);
            if size * 2. < rows as f64 {
                return (parameters, None);
            }
            parameters["test_size"] = json!(0.1);
            (
                parameters,
                Some("holds out a tenth of the rows that are read here"),
            )
        }
        CreateModel::KIND => {
            for (name, value) in [
                ("hidden_size", 8),
                ("intermediate_size", 8),
                ("num_hidden_layers", 1),
                ("num_attention_heads", 1),
                ("num_key_value_heads", 1),
                ("head_dim", 8),
            ] {
                parameters[name] = json!(value);
            }
            let trains = parameters
                .get("dataset")
                .is_some_and(|value| !value.is_null());
            let told = "trains its tokenizer on the rows that are read here alone, so that tokens differ from those of a run";
            (parameters, trains.then_some(told))
        }
        _ => (parameters, None),
    }
}

/// Writes the tokenizer and the chat template of a GGUF file to the folder `out`.
///
/// # Errors
/// The file can't be read, or its tokenizer is not known.
pub fn tokenizer_of_gguf(file: &Path, out: &Path) -> Result<()> {
    model::gguf::tokenizer_alone(file, out)
}

/// Where the tokenizer of a model comes from that is not made yet.
pub enum TokenizerSource {
    /// A folder that is there, or a GGUF file.
    Folder(PathBuf),
    /// A local file or folder of the recipe, as it is written there.
    Source(String),
    /// The stage has to make it, which costs little.
    Made,
    /// The model that another stage makes.
    Stage(String),
}

/// Where the tokenizer of the model comes from that a stage with these parameters makes.
///
/// # Errors
/// The model is on the hub, and not in the shared cache.
pub fn tokenizer_source(
    kind: &str,
    parameters: &Value,
    env: &RunEnv,
) -> Result<Option<TokenizerSource>> {
    let text = |name: &str| parameters[name].as_str().map(str::to_owned);
    Ok(match kind {
        model::import_model::ImportModel::KIND => text("path").map(TokenizerSource::Source),
        CreateModel::KIND => Some(TokenizerSource::Made),
        // It has more tokens than the model that it is made of.
        model::add_tokens::AddTokens::KIND => None,
        DownloadModel::KIND => {
            let repo = text("repo").unwrap_or_default();
            let revision = text("revision").unwrap_or_else(from_hub::main_revision);
            let folder = cached(env, RepoKind::Model, &repo, &revision);
            let folder = folder.with_context(|| {
                format!("the tokenizer of `{repo}` is not here; hint: run the stage that downloads it first")
            })?;
            let file = text("file").map(|file| folder.join(file));
            Some(TokenizerSource::Folder(file.unwrap_or(folder)))
        }
        _ => text("model").map(TokenizerSource::Stage),
    })
}
