//! A projection `x W^T`, with or without a LoRA pair beside it.
//!
//! What is frozen never gets a gradient; what is trained is a [`Var`] in f32. Products run in the compute dtype, and the
//! result is f32 again (autocast: products in half precision, everything between them in f32).

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, Var};
use pipeline_kernels::dropout::Dropout;

use super::autograd::{frozen_linear, matmul_rows};
use crate::ml::quant::nf4::Nf4;

/// How a forward pass is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pass {
    /// Whether a graph is built for a later backward.
    pub tape: bool,
    /// Whether the adapter takes part.
    pub adapter: bool,
    /// What this pass's dropout depends on; none without dropout.
    pub dropout: Option<Drops>,
}

/// What is dropped: a function of a step's seed, of the micro-batch's number in the step, and of the place in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drops {
    /// The step's seed.
    pub seed: u64,
    /// The number of the pass's first micro-batch.
    pub batch: usize,
}

/// How far the places of one micro-batch are from those of the next.
pub const BATCH_STRIDE: u64 = 1 << 32;

impl Pass {
    /// Inference, with the adapter if there is one.
    pub const INFER: Self = Self {
        tape: false,
        adapter: true,
        dropout: None,
    };
    /// Learning, with the adapter if there is one.
    pub fn learn(dropout: Option<Drops>) -> Self {
        Self {
            tape: true,
            adapter: true,
            dropout,
        }
    }
    /// Inference of the base alone.
    pub const BASE: Self = Self {
        tape: false,
        adapter: false,
        dropout: None,
    };
}

/// A tensor that is trained or not.
#[derive(Debug, Clone)]
pub enum Weight {
    /// A constant.
    Frozen(Tensor),
    /// A trained tensor, in f32.
    Trained(Var),
    /// A tensor of the base and what an adapter puts in its place.
    Replaced {
        /// What counts without the adapter.
        base: Tensor,
        /// What counts with it, frozen or trained.
        own: Box<Weight>,
    },
}

impl Weight {
    /// The tensor, inside the graph only where the pass builds one.
    pub fn tensor(&self, pass: Pass) -> Tensor {
        match self {
            Self::Frozen(tensor) => tensor.clone(),
            Self::Trained(var) => on_tape(var, pass),
            Self::Replaced { own, .. } if pass.adapter => own.tensor(pass),
            Self::Replaced { base, .. } => base.clone(),
        }
    }

    /// The tensor outside any graph.
    pub fn value(&self, pass: Pass) -> Tensor {
        self.tensor(Pass {
            tape: false,
            ..pass
        })
    }

    /// The tensor that counts in a pass, where it lies.
    pub fn stored(&self, pass: Pass) -> &Tensor {
        match self {
            Self::Frozen(tensor) => tensor,
            Self::Trained(var) => var.as_tensor(),
            Self::Replaced { own, .. } if pass.adapter => own.stored(pass),
            Self::Replaced { base, .. } => base,
        }
    }

    /// The trained tensor, if it is one.
    pub fn trained(&self) -> Option<&Var> {
        match self {
            Self::Frozen(_) => None,
            Self::Trained(var) => Some(var),
            Self::Replaced { own, .. } => own.trained(),
        }
    }

    /// Whether what counts in a pass is trained.
    pub(in crate::ml) fn is_trained(&self, pass: Pass) -> bool {
        match self {
            Self::Frozen(_) => false,
            Self::Trained(_) => true,
            Self::Replaced { own, .. } => pass.adapter && own.is_trained(pass),
        }
    }

    /// Whether it is a constant of the base, whatever the pass.
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
    /// A weight as it is; a frozen one in the compute dtype, or in a narrower one that it is stored in, and widened for each product.
    Dense(Weight),
    /// A frozen 4-bit weight, dequantised for each product and dropped after it.
    Nf4(Arc<Nf4>),
}

/// A low-rank pair: `y += B A dropout(x) * scaling`.
#[derive(Debug, Clone)]
pub struct Lora {
    /// A, (r, in).
    pub a: Weight,
    /// B, (out, r).
    pub b: Weight,
    /// The norms (out) that the rows of W + scaling B A get, in `DoRA` (Liu et al. 2024, arXiv 2402.09353).
    pub magnitude: Option<Weight>,
    /// alpha / r, or alpha / sqrt(r).
    pub scaling: f64,
    /// The probability of dropping an input value, in training.
    pub dropout: f64,
}

/// A projection; its name is the module's path (`model.layers.0.self_attn.q_proj`).
#[derive(Clone)]
pub struct Linear {
    /// The weight.
    pub base: Base,
    /// What is added to the product, (out).
    pub bias: Option<Weight>,
    /// The adapter's part.
    pub lora: Option<Lora>,
    /// The dtype of the products.
    pub compute: DType,
    /// A number of its own for the dropout's random stream.
    pub index: u64,
}

impl Linear {
    /// Whether anything of it is trained.
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

    /// Whether there is nothing beside a weight and a pair of matrices: no bias, no `DoRA`.
    pub fn has_kernels(&self) -> bool {
        let lora = self.lora.as_ref();
        self.bias.is_none() && lora.is_none_or(|lora| lora.magnitude.is_none())
    }

    /// Whether it is a frozen weight with at most a pair of matrices: no bias, no `DoRA`, nothing replaced.
    pub fn is_lora_only(&self) -> bool {
        let base = match &self.base {
            Base::Dense(weight) => weight.is_frozen(),
            Base::Nf4(_) => true,
        };
        let lora = self.lora.as_ref();
        base && self.bias.is_none() && lora.is_none_or(|lora| lora.magnitude.is_none())
    }

    /// `x` (batch, length, in) to (batch, length, out), both f32.
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
        // Rows scaled from their own norm to the trained one. The norm is a constant to the gradient (section 4.3), and
        // as in PEFT it is the dropped input that is scaled.
        let plain = match &dropped {
            Some(x) => self.base_product(x, pass)?,
            None => plain,
        };
        let scale = (magnitude.tensor(pass) / self.row_norms(lora, pass, x.device())?)?; // (out)
        y + (plain.broadcast_mul(&(&scale - 1.)?)? + update.broadcast_mul(&scale)?)?
    }

    /// The product with the base's weight, in f32 and without the bias.
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

    /// The norms (out) of the rows of W + scaling B A, in f32 and outside any graph.
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

    /// The masks of this projection in a pass, from its first micro-batch on, if its input is dropped at all. They depend on the
    /// pass's [`Drops`] and the projection only, so that a recomputed layer drops the same values.
    pub(in crate::ml) fn dropout(&self, pass: Pass) -> Option<Dropout> {
        self.lora.as_ref()?.dropout_of(pass, self.index)
    }
}

impl Lora {
    /// See [`Linear::dropout`]; `index` is the module's own number.
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

/// Drops values and scales the others up.
pub(in crate::ml) fn apply_dropout(x: &Tensor, dropout: Dropout) -> Result<Tensor> {
    let mask: Vec<f32> = dropout.factors(0).take(x.elem_count()).collect();
    x * Tensor::from_vec(mask, x.shape(), x.device())?
}

/// The norms (out) of the rows of W + scaling B A.
pub fn row_norms(base: &Tensor, a: &Tensor, b: &Tensor, scaling: f64) -> Result<Tensor> {
    let sum = (base + (b.matmul(a)? * scaling)?)?;
    sum.sqr()?.sum(1)?.sqrt()
}
