//! Decides whether a model's head is tied to its embeddings. `config.json` and the weights may contradict each other; the decision is that
//! of transformers 5.
//!
//! | `tie_word_embeddings` | tensors | the head |
//! |---|---|---|
//! | true | embeddings | is tied |
//! | true | both, equal | is tied; its own copy is neither used nor written again |
//! | true | both, different | is its own: the model is not tied, and is written with `tie_word_embeddings: false` |
//! | true | head | is tied; the embeddings have the head's values |
//! | false or absent | both | is its own |
//!
//! In all other cases a tensor is missing, which transformers would fill with random numbers; here it is an error.

use std::path::Path;

use anyhow::ensure;
use serde_json::{Map, Value};

use super::arch::Arch;
use crate::ml::io::float::Float;
use crate::ml::io::folder::{self, CONFIG};
use crate::ml::io::weights::{RawTensor, Weights};

use super::tensors::{EMBEDDINGS, HEAD, SCORE};

/// The number of values that are compared at once.
const SPAN: usize = 1 << 20;

/// Opens a model folder. One with a `score.weight` in the place of a head is a model that scores ([`Arch::scores`]). In the result, `tie_word_embeddings` is transformers' decision, and the weights of a tied model have the
/// embeddings alone, under their own name.
///
/// # Errors
/// `config.json` is not supported, or a file is missing or damaged.
pub fn open(folder: &Path) -> anyhow::Result<(Arch, Weights)> {
    let mut arch = Arch::read(folder)?;
    let mut weights = Weights::open(folder)?;
    if weights.contains(SCORE) && !weights.contains(HEAD) {
        arch = arch.scoring();
    }
    let (embeddings, head) = (
        weights.contains(EMBEDDINGS),
        weights.contains(arch.head_name()),
    );
    if arch.tie_word_embeddings && embeddings && head {
        if equal(&weights.raw(EMBEDDINGS)?, &weights.raw(HEAD)?)? {
            weights.hide(HEAD);
        } else {
            arch.tie_word_embeddings = false;
        }
    } else if arch.tie_word_embeddings && head {
        weights.rename(HEAD, EMBEDDINGS);
    } else {
        ensure!(
            embeddings,
            "the model `{}` has no tensor `{EMBEDDINGS}`",
            folder.display()
        );
        ensure!(
            head || arch.tie_word_embeddings,
            "the model `{}` has no tensor `{HEAD}`; if its head is its embeddings, `{CONFIG}` has to say `tie_word_embeddings: true`",
            folder.display()
        );
    }
    Ok((arch, weights))
}

/// A sentence about a folder whose `config.json` and tensors contradict each other, if they do. `arch` is what [`open`] returned.
///
/// # Errors
/// A file can't be read.
pub fn conflict(folder: &Path, arch: &Arch) -> anyhow::Result<Option<&'static str>> {
    let says = Arch::read(folder)?.tie_word_embeddings;
    Ok((says && !arch.tie_word_embeddings && !arch.scores).then_some(
        "`config.json` says `tie_word_embeddings: true`, but the files have an `lm_head.weight` with other values: the head is its own, as \
         in transformers 5; other programs may take the embeddings for it",
    ))
}

/// Whether two tensors have the same values.
fn equal(a: &RawTensor<'_>, b: &RawTensor<'_>) -> anyhow::Result<bool> {
    let (Some(x), Some(y)) = (
        Float::from_safetensors(a.dtype),
        Float::from_safetensors(b.dtype),
    ) else {
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

/// Copies the files beside the weights of the model in `source` to `out`, and writes its configuration with `change` applied to it. `tied`
/// says whether the weights in `out` were written for a tied model.
///
/// # Errors
/// A file can't be read or written.
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
