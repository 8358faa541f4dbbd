//! A projection `x W^T`, with or without a LoRA pair beside it.
//!
//! What is frozen never gets a gradient; what is trained is a [`Var`] in f32. Products run in the compute dtype, and the
//! result is f32 again (autocast: products in half precision, everything between them in f32).

use std::sync::Arc;

use candle_core::{DType, Result, Tensor, Var};

use super::nf4::Nf4;
use super::ops::{frozen_linear, matmul_rows};

/// How a forward pass is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pass {
    /// Whether a graph is built for a later backward.
    pub tape: bool,
    /// Whether the adapter takes part.
    pub adapter: bool,
    /// The seed of this pass's dropout; none without dropout.
    pub dropout: Option<u64>,
}

impl Pass {
    /// Inference, with the adapter if there is one.
    pub const INFER: Self = Self {
        tape: false,
        adapter: true,
        dropout: None,
    };
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
}

impl Weight {
    /// The tensor, inside the graph only where the pass builds one.
    pub fn tensor(&self, pass: Pass) -> Tensor {
        match self {
            Self::Frozen(tensor) => tensor.clone(),
            Self::Trained(var) => on_tape(var, pass),
        }
    }

    /// The tensor outside any graph.
    pub fn value(&self) -> Tensor {
        match self {
            Self::Frozen(tensor) => tensor.clone(),
            Self::Trained(var) => var.as_detached_tensor(),
        }
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
    /// A weight as it is, in the compute dtype when frozen.
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
    /// The adapter's part.
    pub lora: Option<Lora>,
    /// The dtype of the products.
    pub compute: DType,
    /// A number of its own for the dropout's random stream.
    pub index: u64,
}

impl Linear {
    /// `x` (batch, length, in) to (batch, length, out), both f32.
    pub fn forward(&self, x: &Tensor, pass: Pass) -> Result<Tensor> {
        let y = match &self.base {
            Base::Dense(Weight::Frozen(weight)) => {
                let weight = weight.clone();
                frozen_linear(x, move || Ok(weight.clone()))?
            }
            Base::Dense(Weight::Trained(var)) => self.product(x, &on_tape(var, pass))?,
            Base::Nf4(weight) => {
                let (weight, compute) = (Arc::clone(weight), self.compute);
                let device = x.device().clone();
                frozen_linear(x, move || weight.to_tensor(compute, &device))?
            }
        };
        let y = y.to_dtype(DType::F32)?;
        match &self.lora {
            Some(lora) if pass.adapter => {
                let x = match pass.dropout {
                    Some(seed) if lora.dropout > 0. => self.drop(x, lora.dropout, seed)?,
                    _ => x.clone(),
                };
                let low = self.product(&x, &lora.a.tensor(pass))?; // (batch, length, r)
                let high = self.product(&low, &lora.b.tensor(pass))?;
                y + (high.to_dtype(DType::F32)? * lora.scaling)?
            }
            _ => Ok(y),
        }
    }

    /// `x W^T` in the compute dtype, with gradients of both.
    fn product(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let weight = weight.to_dtype(self.compute)?;
        matmul_rows(&x.to_dtype(self.compute)?, &weight.t()?)
    }

    /// Drops each value with probability `p` and scales the others up. The mask depends on the seed and this projection
    /// only, so that a recomputed layer drops the same values.
    pub(super) fn drop(&self, x: &Tensor, p: f64, seed: u64) -> Result<Tensor> {
        let mut state = seed ^ (self.index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let scale = (1. / (1. - p)) as f32;
        let limit = (p * 2f64.powi(64)) as u64;
        let mask: Vec<f32> = (0..x.elem_count())
            .map(|_| if mix(&mut state) < limit { 0. } else { scale })
            .collect();
        x * Tensor::from_vec(mask, x.shape(), x.device())?
    }
}

/// The next number of a splitmix64 stream (Steele, Lea and Flood 2014).
pub(crate) fn mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
