//! One decoder layer on candle's tensors.

use candle_core::{D, DType, Result, Tensor};

use super::arch::Activation;
use super::autograd::{masked_softmax, rms_norm, rope, scaled, softcapped};
use super::linear::{Linear, Pass, Weight};
use super::masks::Masks;

pub(in crate::ml) struct Norm {
    pub(in crate::ml) weight: Weight,
    pub(in crate::ml) eps: f64,
}

/// A decoder layer. It has the norms of its model's [`super::arch::NormPlaces`].
pub(in crate::ml) struct Layer {
    pub(in crate::ml) input_norm: Option<Norm>,
    pub(in crate::ml) qkv: Qkv,
    pub(in crate::ml) o: Linear,
    pub(in crate::ml) post_attention_norm: Option<Norm>,
    pub(in crate::ml) pre_feedforward_norm: Option<Norm>,
    pub(in crate::ml) gate_up: GateUp,
    pub(in crate::ml) down: Linear,
    pub(in crate::ml) post_feedforward_norm: Option<Norm>,
    /// The norms of the queries and of the keys, of each head or of all together.
    pub(in crate::ml) q_norm: Option<Norm>,
    pub(in crate::ml) k_norm: Option<Norm>,
    /// The size of the sliding window in keys, the query's own included; without one, a query attends to all keys up to its own.
    pub(in crate::ml) window: Option<usize>,
    /// The number of its rotary embedding, if it has one.
    pub(in crate::ml) rope: Option<usize>,
    pub(in crate::ml) heads: usize,
    pub(in crate::ml) kv_heads: usize,
    pub(in crate::ml) head_dim: usize,
    pub(in crate::ml) score_scale: f64,
    pub(in crate::ml) score_softcap: Option<f64>,
    pub(in crate::ml) activation: Activation,
    pub(in crate::ml) residual_scale: f64,
}

/// The projections of queries, keys and values.
#[expect(
    clippy::large_enum_variant,
    reason = "there is one of them for each layer"
)]
pub(in crate::ml) enum Qkv {
    Separate { q: Linear, k: Linear, v: Linear },
    Fused(Linear),
}

/// The projections of the gate and of what it multiplies.
pub(in crate::ml) enum GateUp {
    Separate { gate: Linear, up: Linear },
    Fused(Linear),
}

/// What all layers have in common in one pass.
#[derive(Clone)]
pub(super) struct Shared {
    /// For each rotary embedding the cosines and sines (length, `rotary_dim / 2`), or those for each sequence.
    pub(super) angles: Vec<(Tensor, Tensor)>,
    pub(super) masks: Masks, // (batch or 1, 1, length, keys)
    pub(super) pass: Pass,
}

/// The keys and values of one layer, each (batch, key heads, length, head width).
pub(super) type KeysAndValues = Option<(Tensor, Tensor)>;

impl Norm {
    pub(super) fn forward(&self, x: &Tensor, pass: Pass) -> Result<Tensor> {
        let weight = self.weight.tensor(pass);
        if self.weight.trained().is_none() {
            return rms_norm(x, &weight, self.eps);
        }
        let ones = weight.detach().ones_like()?;
        rms_norm(x, &ones, self.eps)?.broadcast_mul(&weight)
    }
}

impl Qkv {
    pub(in crate::ml) fn linears(&self) -> Vec<&Linear> {
        match self {
            Self::Separate { q, k, v } => vec![q, k, v],
            Self::Fused(qkv) => vec![qkv],
        }
    }
}

impl GateUp {
    pub(in crate::ml) fn linears(&self) -> Vec<&Linear> {
        match self {
            Self::Separate { gate, up } => vec![gate, up],
            Self::Fused(gate_up) => vec![gate_up],
        }
    }

    /// The gate and what it multiplies, each (batch, length, inner).
    fn forward(&self, x: &Tensor, pass: Pass) -> Result<(Tensor, Tensor)> {
        match self {
            Self::Separate { gate, up } => Ok((gate.forward(x, pass)?, up.forward(x, pass)?)),
            Self::Fused(gate_up) => {
                let both = gate_up.forward(x, pass)?;
                let inner = both.dim(D::Minus1)? / 2;
                Ok((both.narrow(2, 0, inner)?, both.narrow(2, inner, inner)?))
            }
        }
    }
}

/// `x` through a norm, if there is one.
fn normed(norm: Option<&Norm>, x: Tensor, pass: Pass) -> Result<Tensor> {
    match norm {
        Some(norm) => norm.forward(&x, pass),
        None => Ok(x),
    }
}

impl Layer {
    /// Its projections, in the order of [`Arch::projections`].
    pub(in crate::ml) fn linears(&self) -> Vec<&Linear> {
        let (mut qkv, mut gate_up) = (self.qkv.linears(), self.gate_up.linears());
        match self.qkv {
            Qkv::Separate { .. } => qkv.push(&self.o),
            Qkv::Fused(_) => qkv.insert(0, &self.o),
        }
        gate_up.push(&self.down);
        qkv.append(&mut gate_up);
        qkv
    }

    /// Its projections, to be changed.
    #[cfg(feature = "gpu")]
    pub(in crate::ml) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        let qkv = match &mut self.qkv {
            Qkv::Separate { q, k, v } => vec![q, k, v],
            Qkv::Fused(qkv) => vec![qkv],
        };
        let gate_up = match &mut self.gate_up {
            GateUp::Separate { gate, up } => vec![gate, up],
            GateUp::Fused(gate_up) => vec![gate_up],
        };
        let all = qkv.into_iter().chain(gate_up);
        all.chain([&mut self.o, &mut self.down])
    }

    /// Whether a tensor of its attention is trained, the norms before and after it included.
    pub(in crate::ml) fn trains_attention(&self) -> bool {
        let own = [&self.input_norm, &self.post_attention_norm];
        let mut norms = self.qk_norms().chain(own.into_iter().flatten());
        let mut linears = self.qkv.linears();
        linears.push(&self.o);
        norms.any(|norm| norm.weight.trained().is_some())
            || linears.into_iter().any(Linear::is_trained)
    }

    fn qk_norms(&self) -> impl Iterator<Item = &Norm> {
        self.q_norm.iter().chain(&self.k_norm)
    }

    /// Its norms.
    pub(in crate::ml) fn norms(&self) -> impl Iterator<Item = &Norm> {
        let own = [
            &self.input_norm,
            &self.post_attention_norm,
            &self.pre_feedforward_norm,
            &self.post_feedforward_norm,
        ];
        self.qk_norms().chain(own.into_iter().flatten())
    }

    /// Whether any of its tensors is trained.
    pub(in crate::ml) fn is_trained(&self) -> bool {
        self.norms().any(|norm| norm.weight.trained().is_some())
            || self.linears().into_iter().any(Linear::is_trained)
    }

    pub(super) fn forward(
        &self,
        x: &Tensor,
        shared: &Shared,
        cache: &mut KeysAndValues,
    ) -> Result<Tensor> {
        let pass = shared.pass;
        let inner = normed(self.input_norm.as_ref(), x.clone(), pass)?;
        let y = self.attention(&inner, shared, cache)?;
        let y = normed(self.post_attention_norm.as_ref(), y, pass)?;
        let x = (x + scaled(y, self.residual_scale)?)?;
        let inner = normed(self.pre_feedforward_norm.as_ref(), x.clone(), pass)?;
        let (gate, up) = self.gate_up.forward(&inner, pass)?;
        let gate = match self.activation {
            Activation::Silu => gate.silu()?,
            Activation::GeluTanh => gate.gelu()?,
        };
        let y = self.down.forward(&(gate * up)?, pass)?;
        let y = normed(self.post_feedforward_norm.as_ref(), y, pass)?;
        x + scaled(y, self.residual_scale)?
    }

    /// Queries, keys and values, each (batch, length, heads * width).
    fn projected(&self, x: &Tensor, pass: Pass) -> Result<[Tensor; 3]> {
        match &self.qkv {
            Qkv::Separate { q, k, v } => Ok([
                q.forward(x, pass)?,
                k.forward(x, pass)?,
                v.forward(x, pass)?,
            ]),
            Qkv::Fused(qkv) => {
                let all = qkv.forward(x, pass)?;
                let (queries, keys) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
                Ok([
                    all.narrow(2, 0, queries)?,
                    all.narrow(2, queries, keys)?,
                    all.narrow(2, queries + keys, keys)?,
                ])
            }
        }
    }

    /// Splits `y` (batch, length, heads * width) into heads: (batch, heads, length, width). A norm with a weight of the width applies to each
    /// head, a longer one to all of them together.
    fn split(&self, y: &Tensor, heads: usize, norm: Option<&Norm>, pass: Pass) -> Result<Tensor> {
        let (batch, length, _) = y.dims3()?;
        let shape = (batch, length, heads, self.head_dim);
        let y = match norm {
            Some(norm) if norm.weight.stored(pass).elem_count() != self.head_dim => {
                norm.forward(y, pass)?.reshape(shape)?
            }
            Some(norm) => norm.forward(&y.reshape(shape)?, pass)?,
            None => y.reshape(shape)?,
        };
        y.transpose(1, 2)
    }

    /// Rotates the first features of `y` (batch, heads, length, width), if the layer has a rotary embedding.
    fn rotated(&self, y: &Tensor, shared: &Shared) -> Result<Tensor> {
        let Some(rope_number) = self.rope else {
            return y.contiguous();
        };
        let Some((cos, sin)) = shared.angles.get(rope_number) else {
            candle_core::bail!("there is no rotary embedding number {rope_number}")
        };
        let rotary_dim = 2 * cos.dim(D::Minus1)?;
        if rotary_dim == self.head_dim {
            return rope(y, cos, sin);
        }
        let rotated = rope(&y.narrow(3, 0, rotary_dim)?, cos, sin)?;
        let rest = y.narrow(3, rotary_dim, self.head_dim - rotary_dim)?;
        Tensor::cat(&[&rotated, &rest.contiguous()?], 3)
    }

    /// Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245). The query heads that share a key head are rows of one product, so
    /// keys and values are never repeated.
    fn attention(&self, x: &Tensor, shared: &Shared, cache: &mut KeysAndValues) -> Result<Tensor> {
        let (batch, length, _) = x.dims3()?;
        let (heads, kv_heads, width) = (self.heads, self.kv_heads, self.head_dim);
        let group = heads / kv_heads;
        let (compute, pass) = (self.o.compute, shared.pass);
        let [q, k, v] = self.projected(x, pass)?;
        let q = self.split(&q, heads, self.q_norm.as_ref(), pass)?;
        let q = (self.rotated(&q, shared)? * self.score_scale)?;
        let k = self.split(&k, kv_heads, self.k_norm.as_ref(), pass)?;
        let mut k = self.rotated(&k, shared)?;
        let mut v = self.split(&v, kv_heads, None, pass)?;
        if let Some((keys, values)) = cache.take() {
            k = Tensor::cat(&[&keys, &k], 2)?;
            v = Tensor::cat(&[&values, &v], 2)?;
        }
        if !pass.tape {
            *cache = Some((k.clone(), v.clone()));
        }
        let keys = k.dim(2)?;
        let q = q.reshape((batch, kv_heads, group * length, width))?;
        let scores = q
            .to_dtype(compute)?
            .matmul(&k.to_dtype(compute)?.transpose(2, 3)?)?
            .reshape((batch, heads, length, keys))?;
        let scores = match self.score_softcap {
            Some(_) => softcapped(scores.to_dtype(DType::F32)?, self.score_softcap)?,
            None => scores,
        };
        let p = masked_softmax(&scores, shared.masks.get(self.window)?)?;
        let p = p.reshape((batch, kv_heads, group * length, keys))?;
        let y = p
            .to_dtype(compute)?
            .matmul(&v.contiguous()?.to_dtype(compute)?)?
            .to_dtype(DType::F32)?
            .reshape((batch, heads, length, width))?
            .transpose(1, 2)?
            .reshape((batch, length, heads * width))?;
        self.o.forward(&y, pass)
    }
}
