//! Whether a model's head is its embeddings. `config.json` and the weights may say different things; what counts is what
//! transformers 5 makes of them.
//!
//! | `tie_word_embeddings` | tensors | the head |
//! |---|---|---|
//! | true | embeddings | is the embeddings |
//! | true | both, equal | is the embeddings; its own copy is not used and not written again |
//! | true | both, different | is its own: the model is not tied, and is written with `tie_word_embeddings: false` |
//! | true | head | is the embeddings, which have the head's values |
//! | false or absent | both | is its own |
//!
//! Anything else lacks a tensor, for which transformers would draw random numbers; here it is an error.

use std::path::Path;

use anyhow::ensure;
use rayon::prelude::*;
use serde_json::{Map, Value};

use super::config::LlamaConfig;
use super::float::Float;
use super::folder::{self, CONFIG};
use super::weights::{RawTensor, Weights};

/// The name of the embeddings' weight (vocabulary, hidden).
pub const EMBEDDINGS: &str = "model.embed_tokens.weight";
/// The name of the head's, of the same shape.
pub const HEAD: &str = "lm_head.weight";
/// Values that a thread compares at once.
const SPAN: usize = 1 << 14;

/// Opens a model folder. In the configuration `tie_word_embeddings` is what transformers makes of it, and of a tied model the
/// weights have the embeddings alone, by their own name.
pub fn open(folder: &Path) -> anyhow::Result<(LlamaConfig, Weights)> {
    let mut config = LlamaConfig::read(folder)?;
    let mut weights = Weights::open(folder)?;
    let (embeddings, head) = (weights.contains(EMBEDDINGS), weights.contains(HEAD));
    if config.tie_word_embeddings && embeddings && head {
        if equal(weights.raw(EMBEDDINGS)?, weights.raw(HEAD)?) {
            weights.hide(HEAD);
        } else {
            config.tie_word_embeddings = false;
        }
        weights.let_go(EMBEDDINGS);
        weights.let_go(HEAD);
    } else if config.tie_word_embeddings && head {
        weights.rename(HEAD, EMBEDDINGS);
    } else {
        ensure!(
            embeddings,
            "the model `{}` has no tensor `{EMBEDDINGS}`",
            folder.display()
        );
        ensure!(
            head || config.tie_word_embeddings,
            "the model `{}` has no tensor `{HEAD}`; if its head is its embeddings, `{CONFIG}` has to say `tie_word_embeddings: true`",
            folder.display()
        );
    }
    Ok((config, weights))
}

/// What to say of a folder whose `config.json` and tensors say different things; nothing of a folder that can't be used.
pub fn told(folder: &Path) -> Option<&'static str> {
    let says = LlamaConfig::read(folder).ok()?.tie_word_embeddings;
    let (config, _) = open(folder).ok()?;
    (says && !config.tie_word_embeddings).then_some(
        "`config.json` says `tie_word_embeddings: true`, but the files have an `lm_head.weight` with other values: the head is its own, as \
         in transformers 5; other programs may take the embeddings for it",
    )
}

/// Whether two tensors have the same values.
fn equal(a: RawTensor<'_>, b: RawTensor<'_>) -> bool {
    if a.shape != b.shape {
        return false;
    }
    if a.dtype == b.dtype && a.bytes == b.bytes {
        return true;
    }
    let (Some(x), Some(y)) = (Float::of(a.dtype), Float::of(b.dtype)) else {
        return false;
    };
    let read = |float: Float, bytes: &[u8]| {
        let mut values = vec![0f32; bytes.len() / float.size()];
        float.read(bytes, &mut values);
        values
    };
    let parts = a.bytes.par_chunks(SPAN * x.size());
    let parts = parts.zip(b.bytes.par_chunks(SPAN * y.size()));
    parts.all(|(a, b)| read(x, a) == read(y, b))
}

/// Copies the files beside the weights of the model in `source` to `out`, and writes its configuration as `change` leaves it.
/// The weights have been written for a model whose head is its embeddings, or not, as `tied` says.
pub fn carry(
    source: &Path,
    out: &Path,
    tied: bool,
    change: impl FnOnce(&mut Map<String, Value>),
) -> anyhow::Result<()> {
    let before = folder::config(source)?;
    let mut raw = before.clone();
    change(&mut raw);
    let says = raw.get("tie_word_embeddings").and_then(Value::as_bool);
    if says.unwrap_or(false) != tied {
        raw.insert("tie_word_embeddings".into(), tied.into());
    }
    if raw == before {
        return folder::carry(source, out, &[]);
    }
    folder::carry(source, out, &[CONFIG])?;
    folder::write_config(out, raw)
}
