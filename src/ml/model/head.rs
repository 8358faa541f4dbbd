//! The end of the model: log-probabilities of given ids, and their gradient, without ever holding all logits.
//!
//! `logp(id | h) = (W h)_id - logsumexp(W h)`, so the gradient of `sum_n g_n logp_n` is `g_n (W_id - W^T softmax(W h_n))` with respect to
//! `h_n`, and `sum_n g_n (e_id - softmax(W h_n)) h_n^T` with respect to W. Rows are processed in chunks; the backward pass recomputes a
//! chunk's logits. With a scale or a soft-cap, logits are a function of `W h`, by whose slope each part of the gradient is multiplied.

use candle_core::{D, DType, Result, Tensor};

use super::autograd::{scaled, softcapped};
use super::batch::Target;

/// The number of logits in one chunk.
const CHUNK: usize = 1 << 24;

/// The head: its weight, and the matrix B of its pair.
///
/// It takes hidden states (.., hidden), or with a pair (.., hidden + r), of which the last r are `scaling A h`. Then the logits are
/// `W h + B (scaling A h)`, and one backward pass gives the gradients of both parts.
#[derive(Debug, Clone)]
pub struct Head {
    /// The weight W (vocabulary, hidden), in the compute dtype.
    pub weight: Tensor,
    /// The matrix B (vocabulary, r) of its pair, in the compute dtype.
    pub low: Option<Tensor>,
    /// Whether W is trained.
    pub trains: bool,
    /// The factor of the logits.
    pub scale: f64,
    /// The cap of the scaled logits, `cap * tanh(logit / cap)`.
    pub softcap: Option<f64>,
    /// The part e of a target's probability that is spread over the vocabulary; scores are then `(1 - e) log p + e m`, where `m` is the mean of
    /// the log-probabilities of all ids.
    pub label_smoothing: f64,
}

/// The gradients with respect to a [`Head`].
#[derive(Debug, Default)]
pub struct HeadGradients {
    /// The gradient with respect to W (vocabulary, hidden), if it is trained.
    pub weight: Option<Tensor>,
    /// The gradient with respect to B (vocabulary, r), if there is one.
    pub low: Option<Tensor>,
}

impl Head {
    fn vocabulary(&self) -> Result<usize> {
        self.weight.dim(0)
    }

    /// The logits (n, vocabulary), in f32, of rows (n, hidden) or, with a pair, (n, hidden + r).
    pub fn logits(&self, rows: &Tensor) -> Result<Tensor> {
        softcapped(scaled(self.product(rows)?, self.scale)?, self.softcap)
    }

    /// The slope (n, vocabulary) of logits (n, vocabulary) as a function of the product with the weight; `None` if it is 1.
    fn slope(&self, logits: &Tensor) -> Result<Option<Tensor>> {
        match self.softcap {
            // d/dx tanh(x) = 1 - tanh(x)^2
            Some(cap) => Ok(Some(
                (logits / cap)?.sqr()?.affine(-self.scale, self.scale)?,
            )),
            None if self.scale.to_bits() == 1f64.to_bits() => Ok(None),
            None => Ok(Some(logits.ones_like()?.affine(self.scale, 0.)?)),
        }
    }

    /// The logits without scale and soft-cap.
    fn product(&self, rows: &Tensor) -> Result<Tensor> {
        let Some(low) = &self.low else {
            return logits(rows, &self.weight);
        };
        let (hidden, r) = (self.weight.dim(1)?, low.dim(1)?);
        let high = logits(&rows.narrow(1, 0, hidden)?.contiguous()?, &self.weight)?;
        high + logits(&rows.narrow(1, hidden, r)?.contiguous()?, low)?
    }

    /// The rows of W, joined with those of B, for `ids`, in f32.
    fn rows(&self, ids: &Tensor) -> Result<Tensor> {
        let own = |part: &Tensor| part.index_select(ids, 0)?.to_dtype(DType::F32);
        match &self.low {
            None => own(&self.weight),
            Some(low) => Tensor::cat(&[own(&self.weight)?, own(low)?], 1),
        }
    }

    /// The product of `spread` (n, vocabulary) with W, joined with that with B, in f32.
    fn back(&self, spread: &Tensor) -> Result<Tensor> {
        let own = |part: &Tensor| spread.matmul(part)?.to_dtype(DType::F32);
        match &self.low {
            None => own(&self.weight),
            Some(low) => Tensor::cat(&[own(&self.weight)?, own(low)?], 1),
        }
    }
}

/// Scored targets, with the head's inputs for the backward pass.
pub struct Scored {
    rows: Tensor,  // (targets, hidden), f32
    index: Tensor, // (targets): rows of the flattened hidden states
    ids: Tensor,   // (targets)
    /// The log-probability of each target, in nats.
    pub logps: Vec<f32>,
    /// The entropy and the arg max at each target, if requested.
    pub token_stats: Option<Vec<TokenStats>>,
}

/// Statistics of the model's distribution at a target.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct TokenStats {
    /// The entropy of the distribution over the vocabulary, in nats.
    pub entropy: f64,
    /// Whether the target is the most probable id.
    pub is_argmax: bool,
    /// The logarithm of the sum over the vocabulary of the squared probabilities, `ln sum p^2`: that of the probability that an id drawn from
    /// the distribution is drawn twice.
    pub log_sum_sq_probs: f64,
}

impl TokenStats {
    /// The mean entropy, in nats; a NaN for no targets.
    pub fn mean_entropy(stats: &[Self]) -> f64 {
        let total: f64 = stats.iter().map(|stats| stats.entropy).sum();
        total / stats.len() as f64
    }

    /// The share of targets that are the most probable id; a NaN for no targets.
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

/// The logits (n, vocabulary), in f32, of rows (n, hidden) and a weight (vocabulary, hidden). The product is computed in the weight's
/// dtype.
pub fn logits(rows: &Tensor, weight: &Tensor) -> Result<Tensor> {
    rows.to_dtype(weight.dtype())?
        .matmul(&weight.t()?)?
        .to_dtype(DType::F32)
}

/// Computes the log-probabilities of `targets` from the final hidden states (batch, length, hidden), or with a pair (batch, length,
/// hidden + r), and the head; with `token_stats` also [`TokenStats`], which takes one more softmax.
///
/// # Errors
/// A target is outside the batch, or its id is outside the vocabulary.
pub fn score(
    hidden: &Tensor,
    head: &Head,
    targets: &[Target],
    token_stats: bool,
) -> Result<Scored> {
    let (batch, width, size) = hidden.dims3()?;
    let device = hidden.device();
    let rows = targets
        .iter()
        .map(|target| (target.row * width + target.position - 1) as u32);
    let index = Tensor::from_iter(rows, device)?;
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
        let mut score = chosen.squeeze(1)?;
        if head.label_smoothing > 0. {
            let mean = logits.mean(D::Minus1)?;
            score = ((score * (1. - head.label_smoothing))? + (mean * head.label_smoothing)?)?;
        }
        logps.extend((score - &all)?.to_vec1::<f32>()?);
        if let Some(token_stats) = &mut token_stats {
            // -sum p log p = log sum e^x - sum p x
            let mean = (softmax(&logits)? * &logits)?.sum(D::Minus1)?;
            let entropies = (&all - mean)?.to_vec1::<f32>()?;
            // log sum p^2 = log sum e^(2 x) - 2 log sum e^x
            let squares =
                ((&logits * 2.)?.log_sum_exp(D::Minus1)? - (all * 2.)?)?.to_vec1::<f32>()?;
            let first = logits.argmax(D::Minus1)?.to_vec1::<u32>()?;
            let is_argmax = first.iter().zip(ids.to_vec1::<u32>()?);
            let all = entropies.iter().zip(squares).zip(is_argmax);
            token_stats.extend(all.map(|((&entropy, squares), (first, id))| TokenStats {
                entropy: f64::from(entropy),
                is_argmax: *first == id,
                log_sum_sq_probs: f64::from(squares),
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
    /// The backward pass: from the gradient with respect to each log-probability (targets), the gradients with respect to the hidden
    /// states (of the shape of `like`) and to the head.
    ///
    /// # Errors
    /// `gradient` has another length than there are targets.
    pub fn backward(
        &self,
        gradient: &[f32],
        head: &Head,
        like: &Tensor,
    ) -> Result<(Tensor, HeadGradients)> {
        let device = like.device();
        let (batch, width, size) = like.dims3()?;
        let hidden = head.weight.dim(1)?;
        // Targets without a part in the loss need no products.
        let kept: Vec<u32> = (0u32..)
            .zip(gradient)
            .filter_map(|(row, g)| (*g != 0.).then_some(row))
            .collect();
        let mut grad_hidden = Tensor::zeros((batch * width, size), DType::F32, device)?;
        let zeros = |part: &Tensor| Tensor::zeros(part.dims(), DType::F32, device);
        let mut grad_head = HeadGradients {
            weight: head.trains.then(|| zeros(&head.weight)).transpose()?,
            low: head.low.as_ref().map(zeros).transpose()?,
        };
        for (start, count) in chunks(kept.len(), head.vocabulary()?) {
            let kept = &kept[start..start + count];
            let g: Vec<f32> = kept.iter().map(|&row| gradient[row as usize]).collect();
            let g = Tensor::from_vec(g, (count, 1), device)?;
            let kept = Tensor::from_slice(kept, count, device)?;
            let rows = self.rows.index_select(&kept, 0)?;
            let ids = self.ids.index_select(&kept, 0)?;
            let logits = head.logits(&rows)?;
            // What each logit's part in the score is, but for the target's own: (count, vocabulary).
            let of_all = head.label_smoothing / head.vocabulary()? as f64;
            let spread = (softmax(&logits)? - of_all)?.broadcast_mul(&g)?;
            let g = (g * (1. - head.label_smoothing))?;
            let (spread, g) = match head.slope(&logits)? {
                None => (spread, g),
                Some(slope) => {
                    let at_id = slope.gather(&ids.unsqueeze(1)?, 1)?;
                    ((spread * slope)?, (g * at_id)?)
                }
            };
            let spread = spread.to_dtype(head.weight.dtype())?;
            let of_rows = (head.rows(&ids)?.broadcast_mul(&g)? - head.back(&spread)?)?;
            grad_hidden =
                grad_hidden.index_add(&self.index.index_select(&kept, 0)?, &of_rows, 0)?;
            let add = |total: Tensor, first: usize, count: usize| -> Result<Tensor> {
                let rows = rows.narrow(1, first, count)?.contiguous()?;
                let narrow = rows.to_dtype(spread.dtype())?;
                let all = spread.t()?.matmul(&narrow)?.to_dtype(DType::F32)?;
                total.index_add(&ids, &rows.broadcast_mul(&g)?, 0)? - all
            };
            if let Some(total) = grad_head.weight.take() {
                grad_head.weight = Some(add(total, 0, hidden)?);
            }
            if let Some(total) = grad_head.low.take() {
                grad_head.low = Some(add(total, hidden, size - hidden)?);
            }
        }
        Ok((grad_hidden.reshape((batch, width, size))?, grad_head))
    }
}

#[expect(clippy::disallowed_methods, reason = "there is no graph here")]
fn softmax(logits: &Tensor) -> Result<Tensor> {
    candle_nn::ops::softmax_last_dim(logits)
}

/// For each target, the mean over the vocabulary of the logits from which it is predicted, from the final hidden states (batch, length,
/// hidden), or with a pair (batch, length, hidden + r). Without a soft-cap, logits are linear in the head's rows, and only the sum of these
/// is multiplied: `column_sum` (hidden, or hidden + r) returns it.
///
/// # Errors
/// A target is outside the batch.
pub fn target_mean_logits(
    hidden: &Tensor,
    head: &Head,
    column_sum: impl FnOnce() -> Result<Tensor>,
    targets: &[Target],
) -> Result<Vec<f64>> {
    let (batch, width, size) = hidden.dims3()?;
    let rows = targets
        .iter()
        .map(|target| (target.row * width + target.position - 1) as u32);
    let index = Tensor::from_iter(rows, hidden.device())?;
    let rows = hidden
        .detach()
        .reshape((batch * width, size))?
        .index_select(&index, 0)?;
    let vocabulary = head.vocabulary()?;
    if head.softcap.is_some() {
        let sums = row_sums(&rows, head)?;
        return Ok(sums.iter().map(|sum| sum / vocabulary as f64).collect());
    }
    let sums = rows
        .to_dtype(DType::F64)?
        .matmul(&column_sum()?.reshape((size, 1))?)?
        .flatten_all()?;
    let means = (sums / vocabulary as f64)?;
    scaled(means, head.scale)?.to_vec1()
}

/// The backward pass of a head (1, hidden) that gives one number of a hidden state: from the gradient with respect to each target's number
/// (targets), the gradients with respect to the hidden states (batch, length, hidden) and to the head.
///
/// # Errors
/// A target is outside the batch.
pub fn backward_scores(
    hidden: &Tensor,
    head: &Head,
    targets: &[Target],
    grad_scores: &[f32],
) -> Result<(Tensor, HeadGradients)> {
    let (batch, width, size) = hidden.dims3()?;
    let device = hidden.device();
    let rows = targets
        .iter()
        .map(|target| (target.row * width + target.position - 1) as u32);
    let index = Tensor::from_iter(rows, device)?;
    let flat = hidden.detach().reshape((batch * width, size))?;
    let g = Tensor::from_slice(grad_scores, (targets.len(), 1), device)?;
    let of_rows = g.matmul(&head.weight.to_dtype(DType::F32)?)?; // (targets, hidden)
    let grad_hidden = flat.zeros_like()?.index_add(&index, &of_rows, 0)?;
    let weight = if head.trains {
        Some(g.t()?.matmul(&flat.index_select(&index, 0)?)?)
    } else {
        None
    };
    let grad_head = HeadGradients { weight, low: None };
    Ok((grad_hidden.reshape((batch, width, size))?, grad_head))
}

/// Which positions of sequences count in a mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Positions {
    /// All but the last, from which nothing is predicted.
    ButLast,
    /// All.
    All,
}

impl Positions {
    /// How many of a sequence's `length` positions count: the first ones.
    pub fn count(self, length: usize) -> usize {
        match self {
            Self::ButLast => length.saturating_sub(1),
            Self::All => length,
        }
    }
}

/// The mean of all logits at these positions, padding included, of the sequences `from..from + count`: `logits/chosen` and
/// `logits/rejected` of TRL (`get_batch_loss_metrics`). Arguments are those of [`target_mean_logits`]. A NaN if there are no positions.
///
/// # Errors
/// There are fewer sequences.
pub fn mean_logit(
    hidden: &Tensor,
    head: &Head,
    column_sum: impl FnOnce() -> Result<Tensor>,
    (from, count): (usize, usize),
    positions: Positions,
) -> Result<f64> {
    let (_, width, size) = hidden.dims3()?;
    let width = positions.count(width);
    if width == 0 || count == 0 {
        return Ok(f64::NAN);
    }
    let rows = hidden
        .detach()
        .narrow(0, from, count)?
        .narrow(1, 0, width)?;
    let rows = rows.contiguous()?.reshape((count * width, size))?;
    let values = (head.vocabulary()? * count * width) as f64;
    if head.softcap.is_some() {
        return Ok(row_sums(&rows, head)?.iter().sum::<f64>() / values);
    }
    let total = rows.sum(0)?;
    let total = (total.to_dtype(DType::F64)? * column_sum()?)?.sum_all()?;
    let total = total.to_scalar::<f64>()?;
    Ok(total * head.scale / values)
}

/// The sum of the logits of each of these rows (n, hidden or hidden + r).
fn row_sums(rows: &Tensor, head: &Head) -> Result<Vec<f64>> {
    let count = rows.dim(0)?;
    let mut sums = Vec::with_capacity(count);
    for (start, count) in chunks(count, head.vocabulary()?) {
        let logits = head.logits(&rows.narrow(0, start, count)?)?;
        sums.extend(logits.to_dtype(DType::F64)?.sum(1)?.to_vec1::<f64>()?);
    }
    Ok(sums)
}
