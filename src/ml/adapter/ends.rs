//! An adapter's replacements of embeddings and head, and their meaning for a base whose head is tied to its embeddings.

use std::borrow::Cow;

use anyhow::{Context as _, bail, ensure};
use candle_core::{DType, Tensor};

use super::Adapter;
use crate::ml::model::tensors::{EMBED_TOKENS, EMBEDDINGS, ENDS, HEAD, LM_HEAD};

impl Adapter {
    /// The adapter as it applies to a base whose embeddings are `tied` or not.
    ///
    /// PEFT's files may have tensors for both names where the base has one tensor: with `ensure_weight_tying` both are the trained
    /// embeddings, and with `save_embedding_layers` both are the base's. The result then has the embeddings alone, and the head follows
    /// them.
    ///
    /// # Errors
    /// The two tensors differ although the settings say that they are tied.
    pub fn beside(&self, tied: bool) -> anyhow::Result<Cow<'_, Self>> {
        ensure!(
            tied || self.config.token_ids(LM_HEAD).is_none()
                || self.token_rows.contains_key(LM_HEAD),
            "`trainable_token_indices` means tokens of `{LM_HEAD}`, but the adapter has no rows of them; it was trained for a model whose \
             head is its embeddings"
        );
        if let Some(head) = self.token_rows.get(LM_HEAD)
            && let Some(embeddings) = self.token_rows.get(EMBED_TOKENS)
            && tied
            && head.ids == embeddings.ids
        {
            let same = equal(&embeddings.values, &head.values);
            ensure!(
                same.context("could not compare rows of embeddings and head")?,
                "the adapter has different rows of the same tokens for embeddings and head, but the model's head is its embeddings \
                 (`tie_word_embeddings`); was it trained for another model?"
            );
            let mut own = self.clone();
            own.token_rows.remove(LM_HEAD);
            return Ok(Cow::Owned(own.beside(tied)?.into_owned()));
        }
        let Some(head) = self.saved.get(HEAD).filter(|_| tied && !self.frees_head()) else {
            return Ok(Cow::Borrowed(self));
        };
        let mut own = self.clone();
        own.saved.remove(HEAD);
        match self.saved.get(EMBEDDINGS) {
            None => {
                own.saved.insert(EMBEDDINGS.into(), head.clone());
            }
            Some(embeddings) => {
                let same = equal(embeddings, head);
                if !same.context("could not compare embeddings and head")? {
                    bail!(
                        "the adapter has different tensors for `{EMBEDDINGS}` and `{HEAD}` without training them apart, but the \
                         model's head is its embeddings (`tie_word_embeddings`); was it trained for another model?"
                    );
                }
            }
        }
        Ok(Cow::Owned(own))
    }

    /// Whether the head of a tied base stops following the embeddings, as in PEFT: one of the two is fully trained, and no setting
    /// keeps them tied.
    fn frees_head(&self) -> bool {
        let config = &self.config;
        !config.ensure_weight_tying && ENDS.iter().any(|path| config.saves(path))
    }

    /// Whether a base that is `tied` has a head of its own with this adapter, because only one of embeddings and head is trained or
    /// replaced.
    pub fn unties(&self, tied: bool) -> bool {
        let replaced = [EMBEDDINGS, HEAD]
            .iter()
            .any(|name| self.saved.contains_key(*name));
        let pairs = ENDS.iter().any(|path| self.tensors.contains_key(*path));
        let rows = self.token_rows.contains_key(LM_HEAD);
        tied && (pairs || rows || replaced && self.frees_head())
    }
}

fn equal(a: &Tensor, b: &Tensor) -> candle_core::Result<bool> {
    if a.dims() != b.dims() {
        return Ok(false);
    }
    let values = |tensor: &Tensor| tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
    Ok(values(a)? == values(b)?)
}
