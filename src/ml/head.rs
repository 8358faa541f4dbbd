//! The end of the model: log-probabilities of given ids, and their gradient, without ever holding all logits.
//!
//! `logp(id | h) = (W h)_id - logsumexp(W h)`, so the gradient of `sum_n g_n logp_n` is `g_n (W_id - softmax(W h_n) W)` for
//! `h_n` and `sum_n g_n (e_id - softmax(W h_n)) h_n^T` for W. Rows go through in chunks; a chunk's logits are made again
//! in the backward.

use candle_core::{D, DType, Result, Tensor};

use super::batch::Target;

/// The number of logits in one chunk.
const CHUNK: usize = 1 << 24;

/// The head's inputs for some targets.
pub struct Scored {
    rows: Tensor,  // (targets, hidden), f32
    index: Tensor, // (targets): places in the flattened hidden states
    ids: Tensor,   // (targets)
    /// The log-probability of each target.
    pub logps: Vec<f32>,
    /// How sure the model is of each, if asked for.
    pub certainty: Option<Vec<Certainty>>,
}

/// How sure the model is where a target stands.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Certainty {
    /// The entropy of the distribution over ids, in nats.
    pub entropy: f64,
    /// Whether the target is the most probable id.
    pub is_first: bool,
}

fn chunks(count: usize, vocabulary: usize) -> impl Iterator<Item = (usize, usize)> {
    let step = (CHUNK / vocabulary.max(1)).max(1);
    (0..count)
        .step_by(step)
        .map(move |start| (start, step.min(count - start)))
}

/// Logits in f32 of rows (n, hidden), the product in the weight's dtype.
pub fn logits(rows: &Tensor, weight: &Tensor) -> Result<Tensor> {
    rows.to_dtype(weight.dtype())?
        .matmul(&weight.t()?)?
        .to_dtype(DType::F32)
}

/// Scores `targets` by the final hidden states (batch, length, hidden) and the head's weight (vocabulary, hidden).
///
/// With `certainty` it also tells how sure the model is, which takes a softmax more.
pub fn score(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &[Target],
    certainty: bool,
) -> Result<Scored> {
    let (batch, width, size) = hidden.dims3()?;
    let device = hidden.device();
    let places = targets
        .iter()
        .map(|target| (target.row * width + target.position - 1) as u32);
    let index = Tensor::from_iter(places, device)?;
    let ids = Tensor::from_iter(targets.iter().map(|target| target.id), device)?;
    let rows = hidden
        .detach()
        .reshape((batch * width, size))?
        .index_select(&index, 0)?;
    let mut logps = Vec::with_capacity(targets.len());
    let mut certainty = certainty.then(Vec::new);
    for (start, count) in chunks(targets.len(), weight.dim(0)?) {
        let logits = logits(&rows.narrow(0, start, count)?, weight)?;
        let ids = ids.narrow(0, start, count)?;
        let chosen = logits.gather(&ids.unsqueeze(1)?, 1)?;
        let all = logits.log_sum_exp(D::Minus1)?;
        logps.extend((chosen.squeeze(1)? - &all)?.to_vec1::<f32>()?);
        if let Some(certainty) = &mut certainty {
            // -sum p log p = log sum e^x - sum p x
            let mean = (softmax(&logits)? * &logits)?.sum(D::Minus1)?;
            let entropies = (all - mean)?.to_vec1::<f32>()?;
            let first = logits.argmax(D::Minus1)?.to_vec1::<u32>()?;
            let all = entropies.iter().zip(first).zip(ids.to_vec1::<u32>()?);
            certainty.extend(all.map(|((&entropy, first), id)| Certainty {
                entropy: f64::from(entropy),
                is_first: first == id,
            }));
        }
    }
    Ok(Scored {
        rows,
        index,
        ids,
        logps,
        certainty,
    })
}

impl Scored {
    /// From the gradient of each log-probability: the gradient of the hidden states (of shape `like`) and, if wanted, of
    /// the head's weight.
    pub fn backward(
        &self,
        gradient: &[f32],
        weight: &Tensor,
        like: &Tensor,
        of_weight: bool,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let device = like.device();
        let (batch, width, size) = like.dims3()?;
        // Ids without a share in the loss (the prompt of a rejected answer) need no products.
        let kept: Vec<u32> = (0u32..)
            .zip(gradient)
            .filter_map(|(place, g)| (*g != 0.).then_some(place))
            .collect();
        let mut of_hidden = Tensor::zeros((batch * width, size), DType::F32, device)?;
        let mut sum = if of_weight {
            Some(Tensor::zeros(weight.dims(), DType::F32, device)?)
        } else {
            None
        };
        for (start, count) in chunks(kept.len(), weight.dim(0)?) {
            let kept = &kept[start..start + count];
            let g: Vec<f32> = kept.iter().map(|&place| gradient[place as usize]).collect();
            let g = Tensor::from_vec(g, (count, 1), device)?;
            let kept = Tensor::from_slice(kept, count, device)?;
            let rows = self.rows.index_select(&kept, 0)?;
            let ids = self.ids.index_select(&kept, 0)?;
            let softmax = softmax(&logits(&rows, weight)?)?;
            let spread = softmax.broadcast_mul(&g)?.to_dtype(weight.dtype())?; // (count, vocabulary)
            let at_id = weight.index_select(&ids, 0)?.to_dtype(DType::F32)?;
            let of_rows =
                (at_id.broadcast_mul(&g)? - spread.matmul(weight)?.to_dtype(DType::F32)?)?;
            of_hidden = of_hidden.index_add(&self.index.index_select(&kept, 0)?, &of_rows, 0)?;
            if let Some(total) = sum {
                let narrow = rows.to_dtype(weight.dtype())?;
                let all = spread.t()?.matmul(&narrow)?.to_dtype(DType::F32)?;
                let total = total.index_add(&ids, &rows.broadcast_mul(&g)?, 0)?;
                sum = Some((total - all)?);
            }
        }
        Ok((of_hidden.reshape((batch, width, size))?, sum))
    }
}

#[expect(clippy::disallowed_methods, reason = "there is no graph here")]
fn softmax(logits: &Tensor) -> Result<Tensor> {
    candle_nn::ops::softmax_last_dim(logits)
}

/// The mean of all logits at all but the last position, padding included, of the sequences `from..from + count`: TRL's
/// `logits/chosen` and `logits/rejected`. `column_sum` is the sum of the head's rows, so no logits are made.
pub fn mean_logit(
    hidden: &Tensor,
    column_sum: &Tensor,
    vocabulary: usize,
    from: usize,
    count: usize,
) -> Result<f64> {
    let (_, width, size) = hidden.dims3()?;
    if width < 2 || count == 0 {
        return Ok(f64::NAN);
    }
    let rows = hidden
        .detach()
        .narrow(0, from, count)?
        .narrow(1, 0, width - 1)?;
    let total = rows
        .contiguous()?
        .reshape((count * (width - 1), size))?
        .sum(0)?;
    let total = (total.to_dtype(DType::F64)? * column_sum)?.sum_all()?;
    let total = total.to_scalar::<f64>()?;
    Ok(total / (vocabulary * count * (width - 1)) as f64)
}
