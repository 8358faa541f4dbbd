//! The end of the model: log-probabilities of given ids, and their gradient, without ever holding all logits.
//!
//! `logp(id | h) = (W h)_id - logsumexp(W h)`, so the gradient of `sum_n g_n logp_n` is `g_n (W_id - softmax(W h_n) W)` for
//! `h_n` and `sum_n g_n (e_id - softmax(W h_n)) h_n^T` for W. Rows go through in chunks; a chunk's logits are made again
//! in the backward.

use candle_core::{D, DType, Result, Tensor};

use super::batch::Target;

/// The number of logits in one chunk.
const CHUNK: usize = 1 << 24;

/// The head: its weight, and B of the matrices beside it.
///
/// Hidden states that go through it are (.., hidden), or with matrices (.., hidden + r): the last r are scaling A h, so that the
/// logits are `W h + B (scaling A h)` and gradients of both parts come from one walk.
#[derive(Debug, Clone)]
pub struct Head {
    /// W (vocabulary, hidden), in the dtype of products.
    pub weight: Tensor,
    /// B (vocabulary, r), likewise.
    pub low: Option<Tensor>,
    /// Whether W is trained.
    pub trains: bool,
}

/// Gradients of a [`Head`].
#[derive(Debug, Default)]
pub struct OfHead {
    /// That of W, where it is trained.
    pub weight: Option<Tensor>,
    /// That of B, where there is one.
    pub low: Option<Tensor>,
}

impl Head {
    fn vocabulary(&self) -> Result<usize> {
        self.weight.dim(0)
    }

    /// Logits in f32 (n, vocabulary) of rows (n, hidden) or (n, hidden + r).
    pub fn logits(&self, rows: &Tensor) -> Result<Tensor> {
        let Some(low) = &self.low else {
            return logits(rows, &self.weight);
        };
        let (hidden, r) = (self.weight.dim(1)?, low.dim(1)?);
        let high = logits(&rows.narrow(1, 0, hidden)?.contiguous()?, &self.weight)?;
        high + logits(&rows.narrow(1, hidden, r)?.contiguous()?, low)?
    }

    /// Both parts' rows of some ids, in f32.
    fn rows(&self, ids: &Tensor) -> Result<Tensor> {
        let own = |part: &Tensor| part.index_select(ids, 0)?.to_dtype(DType::F32);
        match &self.low {
            None => own(&self.weight),
            Some(low) => Tensor::cat(&[own(&self.weight)?, own(low)?], 1),
        }
    }

    /// The product of numbers (n, vocabulary) with both parts, in f32.
    fn back(&self, spread: &Tensor) -> Result<Tensor> {
        let own = |part: &Tensor| spread.matmul(part)?.to_dtype(DType::F32);
        match &self.low {
            None => own(&self.weight),
            Some(low) => Tensor::cat(&[own(&self.weight)?, own(low)?], 1),
        }
    }
}

/// The head's inputs for some targets.
pub struct Scored {
    rows: Tensor,  // (targets, hidden), f32
    index: Tensor, // (targets): places in the flattened hidden states
    ids: Tensor,   // (targets)
    /// The log-probability of each target.
    pub logps: Vec<f32>,
    /// Entropy and arg max at each, if asked for.
    pub token_stats: Option<Vec<TokenStats>>,
}

/// What the model expects at a target, beside the target's own probability.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct TokenStats {
    /// The entropy of the distribution over ids, in nats.
    pub entropy: f64,
    /// Whether the target is the most probable id.
    pub is_argmax: bool,
}

impl TokenStats {
    /// The mean entropy, in nats.
    pub fn mean_entropy(stats: &[Self]) -> f64 {
        let total: f64 = stats.iter().map(|stats| stats.entropy).sum();
        total / stats.len() as f64
    }

    /// The share of targets that are the most probable id.
    pub fn accuracy(stats: &[Self]) -> f64 {
        let right = stats.iter().filter(|stats| stats.is_argmax).count();
        right as f64 / stats.len() as f64
    }
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

/// Scores `targets` by the final hidden states (batch, length, hidden) and the head.
///
/// With `token_stats` it also gives these, which takes one more softmax.
pub fn score(
    hidden: &Tensor,
    head: &Head,
    targets: &[Target],
    token_stats: bool,
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
    let mut token_stats = token_stats.then(Vec::new);
    for (start, count) in chunks(targets.len(), head.vocabulary()?) {
        let logits = head.logits(&rows.narrow(0, start, count)?)?;
        let ids = ids.narrow(0, start, count)?;
        let chosen = logits.gather(&ids.unsqueeze(1)?, 1)?;
        let all = logits.log_sum_exp(D::Minus1)?;
        logps.extend((chosen.squeeze(1)? - &all)?.to_vec1::<f32>()?);
        if let Some(token_stats) = &mut token_stats {
            // -sum p log p = log sum e^x - sum p x
            let mean = (softmax(&logits)? * &logits)?.sum(D::Minus1)?;
            let entropies = (all - mean)?.to_vec1::<f32>()?;
            let first = logits.argmax(D::Minus1)?.to_vec1::<u32>()?;
            let all = entropies.iter().zip(first).zip(ids.to_vec1::<u32>()?);
            token_stats.extend(all.map(|((&entropy, first), id)| TokenStats {
                entropy: f64::from(entropy),
                is_argmax: first == id,
            }));
        }
    }
    Ok(Scored {
        rows,
        index,
        ids,
        logps,
        token_stats,
    })
}

impl Scored {
    /// From the gradient of each log-probability: the gradients of the hidden states (of shape `like`) and of the head.
    pub fn backward(
        &self,
        gradient: &[f32],
        head: &Head,
        like: &Tensor,
    ) -> Result<(Tensor, OfHead)> {
        let device = like.device();
        let (batch, width, size) = like.dims3()?;
        let hidden = head.weight.dim(1)?;
        // Ids without a share in the loss (the prompt of a rejected answer) need no products.
        let kept: Vec<u32> = (0u32..)
            .zip(gradient)
            .filter_map(|(place, g)| (*g != 0.).then_some(place))
            .collect();
        let mut of_hidden = Tensor::zeros((batch * width, size), DType::F32, device)?;
        let zeros = |part: &Tensor| Tensor::zeros(part.dims(), DType::F32, device);
        let mut of_head = OfHead {
            weight: head.trains.then(|| zeros(&head.weight)).transpose()?,
            low: head.low.as_ref().map(zeros).transpose()?,
        };
        for (start, count) in chunks(kept.len(), head.vocabulary()?) {
            let kept = &kept[start..start + count];
            let g: Vec<f32> = kept.iter().map(|&place| gradient[place as usize]).collect();
            let g = Tensor::from_vec(g, (count, 1), device)?;
            let kept = Tensor::from_slice(kept, count, device)?;
            let rows = self.rows.index_select(&kept, 0)?;
            let ids = self.ids.index_select(&kept, 0)?;
            let softmax = softmax(&head.logits(&rows)?)?;
            let spread = softmax.broadcast_mul(&g)?.to_dtype(head.weight.dtype())?; // (count, vocabulary)
            let of_rows = (head.rows(&ids)?.broadcast_mul(&g)? - head.back(&spread)?)?;
            of_hidden = of_hidden.index_add(&self.index.index_select(&kept, 0)?, &of_rows, 0)?;
            let add = |total: Tensor, first: usize, count: usize| -> Result<Tensor> {
                let rows = rows.narrow(1, first, count)?.contiguous()?;
                let narrow = rows.to_dtype(spread.dtype())?;
                let all = spread.t()?.matmul(&narrow)?.to_dtype(DType::F32)?;
                total.index_add(&ids, &rows.broadcast_mul(&g)?, 0)? - all
            };
            if let Some(total) = of_head.weight.take() {
                of_head.weight = Some(add(total, 0, hidden)?);
            }
            if let Some(total) = of_head.low.take() {
                of_head.low = Some(add(total, hidden, size - hidden)?);
            }
        }
        Ok((of_hidden.reshape((batch, width, size))?, of_head))
    }
}

#[expect(clippy::disallowed_methods, reason = "there is no graph here")]
fn softmax(logits: &Tensor) -> Result<Tensor> {
    candle_nn::ops::softmax_last_dim(logits)
}

/// The mean over the vocabulary of the logits that each target is predicted from. `column_sum` is the sum of the head's rows, so no
/// logits are made.
pub fn target_mean_logits(
    hidden: &Tensor,
    column_sum: &Tensor,
    vocabulary: usize,
    targets: &[Target],
) -> Result<Vec<f64>> {
    let (batch, width, size) = hidden.dims3()?;
    let places = targets
        .iter()
        .map(|target| (target.row * width + target.position - 1) as u32);
    let index = Tensor::from_iter(places, hidden.device())?;
    let rows = hidden
        .detach()
        .reshape((batch * width, size))?
        .index_select(&index, 0)?;
    let sums = rows
        .to_dtype(DType::F64)?
        .matmul(&column_sum.reshape((size, 1))?)?
        .flatten_all()?;
    let means = (sums / vocabulary as f64)?;
    means.to_vec1()
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
