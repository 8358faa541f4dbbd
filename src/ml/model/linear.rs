//! A projection `x W^T`, with or without a LoRA pair.
//!
//! Frozen tensors never get a gradient; trained ones are a [`Var`] in f32. Products are computed in the compute dtype and their results are
//! converted to f32, as with torch's autocast: products in half precision, everything between them in f32.

mod replaced_rows;

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, Var};
use pipeline_kernels::dropout::Dropout;

use super::autograd::{frozen_linear, matmul_rows};
use crate::ml::quant::nf4::Nf4;
pub use replaced_rows::ReplacedRows;

/// The options of a forward pass.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pass {
    /// Whether a graph is built for a later backward pass.
    pub tape: bool,
    /// Whether the adapter takes part.
    pub adapter: bool,
    /// The seed of this pass's dropout; `None` without dropout.
    pub dropout: Option<DropoutSeed>,
    /// The noise on the embeddings of a pass with a tape, if there is any.
    pub noise: Option<EmbeddingNoise>,
    /// By how much the number in the step of a micro-batch of the pass exceeds that of the one before it, for dropout and noise: 1, or more
    /// where other processes compute the ones between.
    pub stride: usize,
    /// The part e of a target's probability that is spread over the vocabulary: scores are then `(1 - e) log p + e m`, where `m` is the mean of
    /// the log-probabilities of all ids.
    pub label_smoothing: f64,
}

/// What the dropout masks of a pass depend on. A value's mask is a function of the step's seed, of the micro-batch's index in the step, and
/// of the value's index in the micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DropoutSeed {
    /// The step's seed.
    pub seed: u64,
    /// The index in the step of the pass's first micro-batch.
    pub batch: usize,
}

/// The noise on embeddings of a pass: uniform numbers of at most `alpha / sqrt(length * width)` in size, where `length` is that of the longest
/// sequence of the micro-batch and `width` the number of features.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EmbeddingNoise {
    /// The strength of the noise (`neftune_noise_alpha`).
    pub alpha: f64,
    /// What the noise depends on beside places.
    pub seed: DropoutSeed,
}

/// The difference between the token numbers of one micro-batch and those of the next, in dropout's random stream.
pub const BATCH_STRIDE: u64 = 1 << 32;

impl Pass {
    /// Inference, with the adapter if there is one.
    pub const INFER: Self = Self {
        tape: false,
        adapter: true,
        dropout: None,
        noise: None,
        stride: 1,
        label_smoothing: 0.,
    };
    /// Training, with the adapter if there is one.
    pub fn train(dropout: Option<DropoutSeed>) -> Self {
        Self {
            tape: true,
            adapter: true,
            dropout,
            noise: None,
            stride: 1,
            label_smoothing: 0.,
        }
    }
    /// Inference of the base alone.
    pub const BASE: Self = Self {
        tape: false,
        adapter: false,
        dropout: None,
        noise: None,
        stride: 1,
        label_smoothing: 0.,
    };
}

/// A tensor that is frozen or trained.
#[derive(Debug, Clone)]
pub enum Weight {
    /// A constant.
    Frozen(Tensor),
    /// A trained tensor, in f32.
    Trained(Var),
    /// A tensor of the base, and the adapter's tensor that replaces it.
    Replaced {
        /// The tensor without the adapter.
        base: Tensor,
        /// The tensor with the adapter, frozen or trained.
        own: Box<Weight>,
    },
    /// Embeddings or a head of the base, of which the adapter replaces some rows.
    Rows(Arc<ReplacedRows>),
}

impl Weight {
    /// The tensor in effect in a pass, inside the graph only if the pass builds one.
    pub fn tensor(&self, pass: Pass) -> Tensor {
        match self {
            Self::Frozen(tensor) => tensor.clone(),
            Self::Trained(var) => on_tape(var, pass),
            Self::Replaced { own, .. } if pass.adapter => own.tensor(pass),
            Self::Replaced { base, .. } => base.clone(),
            Self::Rows(rows) => rows.stored(pass).clone(),
        }
    }

    /// The tensor in effect in a pass, outside any graph.
    pub fn value(&self, pass: Pass) -> Tensor {
        self.tensor(Pass {
            tape: false,
            ..pass
        })
    }

    /// The tensor in effect in a pass, by reference.
    pub fn stored(&self, pass: Pass) -> &Tensor {
        match self {
            Self::Frozen(tensor) => tensor,
            Self::Trained(var) => var.as_tensor(),
            Self::Replaced { own, .. } if pass.adapter => own.stored(pass),
            Self::Replaced { base, .. } => base,
            Self::Rows(rows) => rows.stored(pass),
        }
    }

    /// The trained tensor, if there is one: the weight itself, or rows of it.
    pub fn trained(&self) -> Option<&Var> {
        match self {
            Self::Frozen(_) => None,
            Self::Trained(var) => Some(var),
            Self::Replaced { own, .. } => own.trained(),
            Self::Rows(rows) => rows.rows().trained(),
        }
    }

    /// Whether the tensor in effect in a pass is trained.
    pub(in crate::ml) fn is_trained(&self, pass: Pass) -> bool {
        match self {
            Self::Frozen(_) => false,
            Self::Trained(_) => true,
            Self::Replaced { own, .. } => pass.adapter && own.is_trained(pass),
            Self::Rows(rows) => pass.adapter && rows.rows().is_trained(pass),
        }
    }

    /// The place in the trained tensor of the weight's row number `id`; `None` if that row is not trained.
    pub(in crate::ml) fn trained_row(&self, id: u32) -> Option<usize> {
        match self {
            Self::Frozen(_) => None,
            Self::Trained(_) => Some(id as usize),
            Self::Replaced { own, .. } => own.trained_row(id),
            Self::Rows(rows) => rows.place(id),
        }
    }

    /// The rows of `whole` (rows, ..), which has as many as the weight, that belong to the trained tensor.
    ///
    /// # Errors
    /// `whole` has fewer rows.
    pub(in crate::ml) fn trained_rows(&self, whole: &Tensor) -> Result<Tensor> {
        match self {
            Self::Rows(rows) => rows.pick(whole),
            _ => Ok(whole.clone()),
        }
    }

    /// Takes trained rows over into the weight they are a part of. This has to be done after they change and before a pass.
    ///
    /// # Errors
    /// Never for a weight that was made.
    pub(in crate::ml) fn refresh(&self) -> Result<()> {
        match self {
            Self::Rows(rows) => rows.refresh(),
            _ => Ok(()),
        }
    }

    /// Whether it is a constant of the base in every pass.
    pub fn is_frozen(&self) -> bool {
        matches!(self, Self::Frozen(_))
    }
}

fn on_tape(var: &Var, pass: Pass) -> Tensor {
    if pass.tape {
        var.as_tensor().clone()
    } else {
        var.as_detached_tensor()
    }
}

/// The weight (out, in) of a projection.
#[derive(Clone)]
pub enum Base {
    /// A dense weight. A frozen one is in the compute dtype, or in the narrower dtype in which it is stored, and converted for each product.
    Dense(Weight),
    /// A frozen 4-bit weight, which is dequantised for each product.
    Nf4(Arc<Nf4>),
}

/// A low-rank pair, which adds `scaling B A dropout(x)` to a projection's result (Hu et al. 2021, arXiv 2106.09685, equation 3).
#[derive(Debug, Clone)]
pub struct Lora {
    /// The matrix A (r, in).
    pub a: Weight,
    /// The matrix B (out, r).
    pub b: Weight,
    /// With `DoRA`, the norms (out) of the rows of W + scaling B A (Liu et al. 2024, arXiv 2402.09353, equation 5).
    pub magnitude: Option<Weight>,
    /// The factor of B A: alpha / r, or alpha / sqrt(r).
    pub scaling: f64,
    /// The probability of dropping an input value in training.
    pub dropout: f64,
}

/// A projection; its name is the module's path (`model.layers.0.self_attn.q_proj`).
#[derive(Clone)]
pub struct Linear {
    /// The weight (out, in).
    pub base: Base,
    /// The bias (out), if there is one.
    pub bias: Option<Weight>,
    /// The adapter's pair, if there is one.
    pub lora: Option<Lora>,
    /// The dtype of the products.
    pub compute: DType,
    /// The projection's number, which is different for each, for dropout's random stream.
    pub index: u64,
}

impl Linear {
    /// Whether any of its tensors is trained.
    pub(in crate::ml) fn is_trained(&self) -> bool {
        let trained = |weight: &Weight| weight.trained().is_some();
        let base = match &self.base {
            Base::Dense(weight) => trained(weight),
            Base::Nf4(_) => false,
        };
        let lora = self.lora.as_ref().is_some_and(|lora| {
            let magnitude = lora.magnitude.as_ref().is_some_and(trained);
            trained(&lora.a) || trained(&lora.b) || magnitude
        });
        base || lora || self.bias.as_ref().is_some_and(trained)
    }

    /// Whether it has no `DoRA`, for which there are no kernels.
    pub fn has_kernels(&self) -> bool {
        let lora = self.lora.as_ref();
        lora.is_none_or(|lora| lora.magnitude.is_none())
    }

    /// Whether it consists of a frozen weight and at most a pair: no bias, no `DoRA`, nothing replaced.
    pub fn is_lora_only(&self) -> bool {
        let base = match &self.base {
            Base::Dense(weight) => weight.is_frozen(),
            Base::Nf4(_) => true,
        };
        let lora = self.lora.as_ref();
        base && self.bias.is_none() && lora.is_none_or(|lora| lora.magnitude.is_none())
    }

    /// Maps `x` (batch, length, in) to (batch, length, out), both in f32.
    ///
    /// # Errors
    /// The last dimension of `x` is not that of the weight.
    pub fn forward(&self, x: &Tensor, pass: Pass) -> Result<Tensor> {
        let plain = self.base_product(x, pass)?;
        let y = match &self.bias {
            Some(bias) => plain.broadcast_add(&bias.tensor(pass))?,
            None => plain.clone(),
        };
        let Some(lora) = self.lora.as_ref().filter(|_| pass.adapter) else {
            return Ok(y);
        };
        let dropped = self.dropout(pass).map(|dropout| apply_dropout(x, dropout));
        let dropped = dropped.transpose()?;
        let low = self.product(dropped.as_ref().unwrap_or(x), &lora.a.tensor(pass))?; // (batch, length, r)
        let high = self.product(&low, &lora.b.tensor(pass))?;
        let update = (high.to_dtype(DType::F32)? * lora.scaling)?;
        let Some(magnitude) = &lora.magnitude else {
            return y + update;
        };
        // Rows are scaled from their own norm to the trained one. The gradient treats the norm as a constant (DoRA, section 4.3), and as in
        // PEFT the scale applies to the input after dropout.
        let plain = match &dropped {
            Some(x) => self.base_product(x, pass)?,
            None => plain,
        };
        let scale = (magnitude.tensor(pass) / self.row_norms(lora, pass, x.device())?)?; // (out)
        y + (plain.broadcast_mul(&(&scale - 1.)?)? + update.broadcast_mul(&scale)?)?
    }

    /// The product with the base's weight, without the bias, in f32.
    fn base_product(&self, x: &Tensor, pass: Pass) -> Result<Tensor> {
        let y = match &self.base {
            Base::Dense(weight) if weight.is_trained(pass) => {
                self.product(x, &weight.tensor(pass))?
            }
            Base::Dense(weight) => {
                let (weight, compute) = (weight.value(pass), self.compute);
                frozen_linear(x, move || weight.to_dtype(compute))?
            }
            Base::Nf4(weight) => {
                let (weight, compute) = (Arc::clone(weight), self.compute);
                let device = x.device().clone();
                frozen_linear(x, move || weight.to_tensor(compute, &device))?
            }
        };
        y.to_dtype(DType::F32)
    }

    /// The norms (out) of the rows of W + scaling B A in f32, outside any graph.
    fn row_norms(&self, lora: &Lora, pass: Pass, device: &Device) -> Result<Tensor> {
        let base = match &self.base {
            Base::Dense(weight) => weight.value(pass).to_dtype(DType::F32)?,
            Base::Nf4(weight) => weight.to_tensor(DType::F32, device)?,
        };
        row_norms(
            &base,
            &lora.a.value(pass),
            &lora.b.value(pass),
            lora.scaling,
        )
    }

    /// `x W^T` in the compute dtype, with gradients of both.
    fn product(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let weight = weight.to_dtype(self.compute)?;
        matmul_rows(&x.to_dtype(self.compute)?, &weight.t()?)
    }

    /// The dropout of the pair's input in a pass, from its first micro-batch on, if there is any. It depends on nothing but the pass's
    /// [`DropoutSeed`] and the projection, so a recomputed layer drops the same values.
    pub(in crate::ml) fn dropout(&self, pass: Pass) -> Option<Dropout> {
        self.lora.as_ref()?.dropout_of(pass, self.index)
    }
}

impl Lora {
    /// See [`Linear::dropout`]; `index` is [`Linear::index`].
    pub(in crate::ml) fn dropout_of(&self, pass: Pass, index: u64) -> Option<Dropout> {
        let drops = pass.dropout?;
        (pass.adapter && self.dropout > 0.).then(|| {
            let own = index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let all = Dropout {
                start: drops.seed ^ own,
                p: self.dropout,
            };
            let features = self.a.stored(pass).dims().last().copied().unwrap_or(0) as u64;
            let first = (drops.batch as u64).wrapping_mul(BATCH_STRIDE);
            all.skip(first.wrapping_mul(features))
        })
    }
}

/// Drops values of `x`, of any shape, and multiplies the others by [`Dropout::scale`].
pub(in crate::ml) fn apply_dropout(x: &Tensor, dropout: Dropout) -> Result<Tensor> {
    let mask: Vec<f32> = dropout.factors(0).take(x.elem_count()).collect();
    x * Tensor::from_vec(mask, x.shape(), x.device())?
}

/// The norms (out) of the rows of W + scaling B A, for a weight (out, in), A (r, in) and B (out, r).
pub fn row_norms(base: &Tensor, a: &Tensor, b: &Tensor, scaling: f64) -> Result<Tensor> {
    let sum = (base + (b.matmul(a)? * scaling)?)?;
    sum.sqr()?.sum(1)?.sqrt()
}
