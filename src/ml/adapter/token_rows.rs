//! Rows of embeddings or head that an adapter trains in place of the model's, one for each of some tokens: PEFT's `trainable_token_indices`
//! (`peft/tuners/trainable_tokens/layer.py`).

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, bail, ensure};
use candle_core::{DType, Tensor};
use serde_json::{Map, Value, json};

use crate::ml::model::tensors::{EMBED_TOKENS, ENDS};

/// The setting.
pub(super) const SETTING: &str = "trainable_token_indices";
/// The suffix that the name of the rows adds to the path of their module.
pub const DELTA: &str = ".token_adapter.trainable_tokens_delta";
/// The part between the path of a module with such rows and the name of its own tensor, where PEFT saves that, too.
pub(super) const BASE: &str = ".token_adapter.base_layer";

/// Rows that replace those of a weight (vocabulary, hidden).
#[derive(Debug, Clone)]
pub struct TokenRows {
    /// The ids of the tokens, each once.
    pub ids: Vec<u32>,
    /// Their rows (ids, hidden).
    pub values: Tensor,
}

impl TokenRows {
    /// The places of the rows by token id.
    pub fn by_id(&self) -> BTreeMap<u32, usize> {
        self.ids.iter().copied().zip(0..).collect()
    }

    /// The rows in f32, one after the other.
    ///
    /// # Errors
    /// They can't be converted.
    pub fn floats(&self) -> candle_core::Result<Vec<f32>> {
        self.values
            .to_dtype(DType::F32)?
            .flatten_all()?
            .to_vec1::<f32>()
    }

    /// Fails unless they fit the weight (vocabulary, hidden) of the module at `path`.
    pub fn check(&self, path: &str, vocabulary: usize, hidden: usize) -> anyhow::Result<()> {
        ensure!(
            self.values.dims() == [self.ids.len(), hidden],
            "the adapter's rows for `{path}` have the shape {:?}, expected {:?}; was it trained for another model?",
            self.values.dims(),
            [self.ids.len(), hidden]
        );
        let largest = self.ids.iter().max().copied().unwrap_or(0);
        ensure!(
            (largest as usize) < vocabulary,
            "the adapter has a row for the token {largest}, but the model's vocabulary has {vocabulary}; it needs the model to which \
             its tokens were added (`add_tokens`)"
        );
        Ok(())
    }
}

/// The ids of [`SETTING`] by the ends of modules' paths. A list without names is meant for the embeddings.
pub(super) fn parse(raw: &Map<String, Value>) -> anyhow::Result<BTreeMap<String, Vec<u32>>> {
    let modules = match raw.get(SETTING) {
        None | Some(Value::Null) => return Ok(BTreeMap::new()),
        Some(Value::Array(ids)) if ids.is_empty() => return Ok(BTreeMap::new()),
        Some(list @ Value::Array(_)) => vec![(EMBED_TOKENS, list)],
        Some(Value::Object(modules)) => modules
            .iter()
            .map(|(name, ids)| (name.as_str(), ids))
            .collect(),
        Some(other) => {
            bail!("`{SETTING}` is {other}, expected ids of tokens, or such for each module's name")
        }
    };
    let modules = modules.into_iter().map(|(name, ids)| {
        ensure!(
            ENDS.iter().any(|path| names_end(name, path)),
            "`{SETTING}` names `{name}`, expected `embed_tokens` or `lm_head`"
        );
        Ok((name.to_owned(), ids_of(ids)?))
    });
    modules.collect()
}

/// Whether `name` is the end of `path`, by whole parts.
pub(super) fn names_end(name: &str, path: &str) -> bool {
    path.strip_suffix(name)
        .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

fn ids_of(value: &Value) -> anyhow::Result<Vec<u32>> {
    let ids = value.as_array().and_then(|ids| {
        let ids = ids.iter().map(|id| u32::try_from(id.as_u64()?).ok());
        ids.collect::<Option<Vec<u32>>>()
    });
    let ids = ids.filter(|ids| !ids.is_empty());
    let ids = ids.with_context(|| format!("`{SETTING}` has {value}, expected ids of tokens"))?;
    let mut seen = BTreeSet::new();
    if let Some(twice) = ids.iter().find(|id| !seen.insert(**id)) {
        bail!("`{SETTING}` has the token {twice} twice");
    }
    Ok(ids)
}

/// The setting as PEFT writes it: a list if it is for the embeddings alone.
pub(super) fn written(modules: &BTreeMap<String, Vec<u32>>) -> Value {
    let mut all = modules.iter();
    match (all.next(), all.next()) {
        (Some((name, ids)), None) if names_end(name, EMBED_TOKENS) => json!(ids),
        _ => json!(modules),
    }
}
