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
use serde_json::{Map, Value};

use super::arch::Arch;
use crate::ml::io::float::Float;
use crate::ml::io::folder::{self, CONFIG};
use crate::ml::io::weights::{RawTensor, Weights};

pub use super::tensors::{EMBEDDINGS, HEAD};

/// Values that are compared at once.
const SPAN: usize = 1 << 20;

/// Opens a model folder. In the configuration `tie_word_embeddings` is what transformers makes of it, and of a tied model the
/// weights have the embeddings alone, by their own name.
pub fn open(folder: &Path) -> anyhow::Result<(Arch, Weights)> {
    let mut config = Arch::read(folder)?;
    let mut weights = Weights::open(folder)?;
    let (embeddings, head) = (weights.contains(EMBEDDINGS), weights.contains(HEAD));
    if config.tie_word_embeddings && embeddings && head {
        if equal(&weights.raw(EMBEDDINGS)?, &weights.raw(HEAD)?)? {
            weights.hide(HEAD);
        } else {
            config.tie_word_embeddings = false;
        }
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

/// What to say of a folder whose `config.json` and tensors say different things. `config` is what [`open`] made of both.
pub fn told(folder: &Path, config: &Arch) -> anyhow::Result<Option<&'static str>> {
    let says = Arch::read(folder)?.tie_word_embeddings;
    Ok((says && !config.tie_word_embeddings).then_some(
        "`config.json` says `tie_word_embeddings: true`, but the files have an `lm_head.weight` with other values: the head is its own, as \
         in transformers 5; other programs may take the embeddings for it",
    ))
}

/// Whether two tensors have the same values.
fn equal(a: &RawTensor<'_>, b: &RawTensor<'_>) -> anyhow::Result<bool> {
    let (Some(x), Some(y)) = (Float::of(a.dtype), Float::of(b.dtype)) else {
        return Ok(false);
    };
    if a.shape != b.shape {
        return Ok(false);
    }
    let all = a.size() / x.size();
    let read = |raw: &RawTensor<'_>, float: Float, first: usize, count: usize| {
        let mut bytes = vec![0; count * float.size()];
        raw.read(first * float.size(), &mut bytes)?;
        let mut values = vec![0f32; count];
        float.read(&bytes, &mut values);
        anyhow::Ok(values)
    };
    for first in (0..all).step_by(SPAN) {
        let count = SPAN.min(all - first);
        if read(a, x, first, count)? != read(b, y, first, count)? {
            return Ok(false);
        }
    }
    Ok(true)
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
