//! A weight of the base of which an adapter replaces some rows, see [`crate::ml::adapter::TokenRows`].

use std::collections::BTreeMap;

use candle_core::{Result, Tensor};

use super::{Pass, Weight};
use crate::ml::adapter::TokenRows;

/// Embeddings or a head (vocabulary, hidden) with rows of the adapter's own for some tokens.
#[derive(Debug, Clone)]
pub struct ReplacedRows {
    /// The weight without the adapter.
    base: Tensor,
    /// The weight with it; has a storage of its own, into which trained rows are written anew before each pass.
    whole: Tensor,
    /// The token ids of the rows.
    ids: Tensor,
    /// The places of the rows by token id.
    places: BTreeMap<u32, usize>,
    /// The rows (ids, hidden), frozen or trained.
    rows: Weight,
}

impl ReplacedRows {
    /// Puts `rows`, which are those of `tokens`, frozen or trained, in the places of those of `whole`. The base's weight is `base`; both are
    /// (vocabulary, hidden) and of one dtype.
    ///
    /// # Errors
    /// A row lies outside the weight.
    pub fn new(base: Tensor, whole: &Tensor, tokens: &TokenRows, rows: Weight) -> Result<Self> {
        let made = Self {
            ids: Tensor::new(tokens.ids.as_slice(), whole.device())?,
            whole: whole.force_contiguous()?.copy()?,
            places: tokens.by_id(),
            base,
            rows,
        };
        made.write()?;
        Ok(made)
    }

    /// Writes the rows into the weight.
    fn write(&self) -> Result<()> {
        let rows = self.rows.value(Pass::INFER);
        let rows = rows.to_dtype(self.whole.dtype())?;
        for (id, place) in &self.places {
            let row = rows.narrow(0, *place, 1)?;
            self.whole.slice_set(&row.contiguous()?, 0, *id as usize)?;
        }
        Ok(())
    }

    /// Takes trained rows over into the weight, which has to be done before a pass.
    ///
    /// # Errors
    /// Never for a weight that was made.
    pub(in crate::ml) fn refresh(&self) -> Result<()> {
        match self.rows.trained() {
            Some(_) => self.write(),
            None => Ok(()),
        }
    }

    /// The weight with or without the adapter.
    pub(super) fn stored(&self, pass: Pass) -> &Tensor {
        if pass.adapter {
            &self.whole
        } else {
            &self.base
        }
    }

    /// The rows.
    pub(super) fn rows(&self) -> &Weight {
        &self.rows
    }

    /// The place of a token's row among the rows.
    pub(super) fn place(&self, id: u32) -> Option<usize> {
        self.places.get(&id).copied()
    }

    /// The rows of these tokens (ids, ..) of a tensor (vocabulary, ..).
    ///
    /// # Errors
    /// The tensor has fewer rows.
    pub(super) fn pick(&self, whole: &Tensor) -> Result<Tensor> {
        whole.index_select(&self.ids, 0)
    }
}
