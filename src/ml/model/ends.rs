//! The two ends of a model, embeddings and head, with and without matrices beside them.

use candle_core::{D, DType, Result, Tensor};

use super::Llama;
use super::autograd::matmul_rows;
use super::head::Head;
use super::linear::{Lora, Pass, Weight, apply_dropout};

impl Llama {
    pub(in crate::ml) fn head(&self) -> &Weight {
        self.head.as_ref().unwrap_or(&self.embed)
    }

    /// What the head does to hidden states (batch, length, hidden), outside any graph.
    pub fn head_matrix(&self, pass: Pass) -> Result<Head> {
        let lora = self.head_lora.as_ref().filter(|_| pass.adapter);
        let low = lora.map(|lora| lora.b.value(pass).to_dtype(self.compute));
        Ok(Head {
            weight: self.head().value(pass).to_dtype(self.compute)?,
            low: low.transpose()?,
            trains: self.head().is_trained(pass),
        })
    }

    /// The final hidden states as the head takes them: behind each, where it has matrices, the r numbers that its B is multiplied
    /// by.
    pub(super) fn widen(&self, normed: Tensor, pass: Pass) -> Result<Tensor> {
        widened(normed, self.head_lora.as_ref(), self.compute, pass)
    }

    /// The sum of the head's rows, in f64: see [`super::head::mean_logit`].
    pub fn column_sum(&self, pass: Pass) -> Result<Tensor> {
        let total = match &self.frozen_column_sum {
            Some(sum) => sum.clone(),
            None => self.sum_of_rows(&self.head().value(pass))?,
        };
        match self.head_lora.as_ref().filter(|_| pass.adapter) {
            Some(lora) => Tensor::cat(&[total, self.sum_of_rows(&lora.b.value(pass))?], 0),
            None => Ok(total),
        }
    }

    /// In parts: all of it in f64 would be the largest tensor of all.
    fn sum_of_rows(&self, weight: &Tensor) -> Result<Tensor> {
        let (rows, columns) = weight.dims2()?;
        let mut total = Tensor::zeros(columns, DType::F64, &self.device)?;
        for start in (0..rows).step_by(1 << 12) {
            let part = weight.narrow(0, start, (rows - start).min(1 << 12))?;
            let part = part.to_dtype(self.compute)?.to_dtype(DType::F64)?;
            total = (total + part.sum(0)?)?;
        }
        Ok(total)
    }

    /// Whether the head is trained.
    pub fn trains_head(&self) -> bool {
        self.head().trained().is_some()
    }

    /// Whether the embeddings or the matrices beside them are.
    pub(super) fn trains_embeddings(&self) -> bool {
        let pair = self.embed_lora.as_ref();
        self.embed.trained().is_some() || pair.is_some_and(|lora| lora.a.trained().is_some())
    }

    /// Whether embeddings or head have matrices beside them.
    pub fn has_pairs_at_ends(&self) -> bool {
        self.embed_lora.is_some() || self.head_lora.is_some()
    }
}

/// The rows (ids, hidden) of the embeddings in f32, outside any graph. PEFT drops nothing here.
pub(super) fn looked_up(
    embed: &Weight,
    lora: Option<&Lora>,
    ids: &Tensor,
    pass: Pass,
) -> Result<Tensor> {
    let rows = embed.value(pass).index_select(ids, 0)?;
    let rows = rows.to_dtype(DType::F32)?;
    let Some(lora) = lora.filter(|_| pass.adapter) else {
        return Ok(rows);
    };
    let low = lora.b.value(pass).index_select(ids, 0)?; // (ids, r)
    rows + (low.matmul(&lora.a.value(pass))? * lora.scaling)?
}

/// See [`Llama::widen`].
pub(super) fn widened(
    normed: Tensor,
    lora: Option<&Lora>,
    compute: DType,
    pass: Pass,
) -> Result<Tensor> {
    let Some(lora) = lora.filter(|_| pass.adapter) else {
        return Ok(normed);
    };
    let dropped = lora.dropout_of(pass, u64::MAX);
    let dropped = dropped
        .map(|dropout| apply_dropout(&normed, dropout))
        .transpose()?;
    let a = lora.a.tensor(pass).to_dtype(compute)?;
    let x = dropped.as_ref().unwrap_or(&normed).to_dtype(compute)?;
    let low = (matmul_rows(&x, &a.t()?)?.to_dtype(DType::F32)? * lora.scaling)?;
    Tensor::cat(&[normed, low], D::Minus1)
}
