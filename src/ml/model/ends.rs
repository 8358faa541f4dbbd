//! The two ends of a model, embeddings and head, with and without LoRA pairs.

use candle_core::{CpuStorage, D, DType, Result, Storage, Tensor, bail};
use pipeline_kernels::FloatType;
use pipeline_kernels::matrix::{Matrix, Values};
use pipeline_kernels::reduce::column_sums;

use super::CausalLm;
use super::autograd::matmul_rows;
use super::head::Head;
use super::linear::{Lora, Pass, Weight, apply_dropout};

impl CausalLm {
    pub(in crate::ml) fn head(&self) -> &Weight {
        self.head.as_ref().unwrap_or(&self.embed)
    }

    /// The head, which maps hidden states (see [`CausalLm::hidden`]) to logits, outside any graph.
    ///
    /// # Errors
    /// Its weight can't be converted to the compute dtype.
    pub fn head_matrix(&self, pass: Pass) -> Result<Head> {
        let lora = self.head_lora.as_ref().filter(|_| pass.adapter);
        let low = lora.map(|lora| lora.b.value(pass).to_dtype(self.compute));
        Ok(Head {
            weight: self.head().value(pass).to_dtype(self.compute)?,
            low: low.transpose()?,
            trains: self.head().is_trained(pass),
            scale: self.arch.logit_scale,
            softcap: self.arch.logit_softcap,
            label_smoothing: pass.label_smoothing,
        })
    }

    /// The final hidden states (batch, length, hidden) in the form that the head takes: if it has a pair, each is followed by the r numbers
    /// that are multiplied by its B.
    pub(super) fn append_lora_inputs(&self, normed: Tensor, pass: Pass) -> Result<Tensor> {
        with_lora_inputs(normed, self.head_lora.as_ref(), self.compute, pass)
    }

    /// The sum of the head's rows (hidden, or hidden + r with a pair), in f64, for [`super::head::mean_logit`].
    ///
    /// # Errors
    /// Its weight can't be converted.
    pub fn column_sum(&self, pass: Pass) -> Result<Tensor> {
        let total = if let Some(sum) = self.frozen_column_sum.get() {
            sum.clone()
        } else {
            let sum = self.sum_of_rows(self.head().stored(pass))?;
            if self.head().is_frozen() {
                // Another thread may have set the same.
                let _ = self.frozen_column_sum.set(sum.clone());
            }
            sum
        };
        match self.head_lora.as_ref().filter(|_| pass.adapter) {
            Some(lora) => Tensor::cat(&[total, self.sum_of_rows(&lora.b.value(pass))?], 0),
            None => Ok(total),
        }
    }

    /// The sum of a weight's rows in f64, each value rounded to the compute dtype.
    fn sum_of_rows(&self, weight: &Tensor) -> Result<Tensor> {
        let (rows, columns) = weight.dims2()?;
        let weight = weight.contiguous()?;
        let (storage, layout) = weight.storage_and_layout();
        let span = layout.contiguous_offsets();
        let values = match (&*storage, span) {
            (Storage::Cpu(CpuStorage::F32(all)), Some((start, end))) => {
                all.get(start..end).map(Values::F32)
            }
            (Storage::Cpu(CpuStorage::BF16(all)), Some((start, end))) => {
                all.get(start..end).map(Values::Bf16)
            }
            (Storage::Cpu(CpuStorage::F16(all)), Some((start, end))) => {
                all.get(start..end).map(Values::F16)
            }
            _ => None,
        };
        let Some(matrix) = values.and_then(|values| Matrix::new(values, rows, columns)) else {
            bail!("the rows of a head of {:?} can't be summed", weight.dtype())
        };
        let rounding = match self.compute {
            DType::BF16 => FloatType::Bf16,
            DType::F16 => FloatType::F16,
            _ => FloatType::F32,
        };
        Tensor::from_vec(column_sums(&matrix, rounding), columns, &self.device)
    }

    /// Takes the trained rows of embeddings and head over into them, which has to be done before a pass.
    ///
    /// # Errors
    /// The device fails.
    pub(in crate::ml) fn refresh(&self) -> Result<()> {
        self.embed.refresh()?;
        self.head.as_ref().map_or(Ok(()), Weight::refresh)
    }

    /// Whether the head is trained.
    pub fn trains_head(&self) -> bool {
        self.head().trained().is_some()
    }

    /// Whether the embeddings or their pair are trained.
    pub(super) fn trains_embeddings(&self) -> bool {
        let pair = self.embed_lora.as_ref();
        self.embed.trained().is_some() || pair.is_some_and(|lora| lora.a.trained().is_some())
    }

    /// Whether embeddings or head have a pair.
    pub fn has_pairs_at_ends(&self) -> bool {
        self.embed_lora.is_some() || self.head_lora.is_some()
    }
}

/// The rows of the embeddings for `ids` (.., hidden), in f32 and outside any graph. As in PEFT, there is no dropout.
pub(super) fn embedding_rows(
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

/// See [`CausalLm::append_lora_inputs`], for a head whose pair is `lora`.
pub(super) fn with_lora_inputs(
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
