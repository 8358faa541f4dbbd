//! The weights of a layer as slices, borrowed for a pass.

use std::ops::Range;

use candle_core::{CpuStorage, Layout, Result, Storage, StorageRef, Tensor, bail};
use pipeline_kernels::attention::Scores;
use pipeline_kernels::dropout::Dropout;
use pipeline_kernels::gated::Activation;
use pipeline_kernels::matrix::{Matrix, Values};

use crate::ml::model::Norm;
use crate::ml::model::arch;
use crate::ml::model::linear::{Base, Linear, Pass, Weight};
use crate::ml::quant::nf4;

/// The values of a tensor, borrowed.
pub(in crate::ml) struct TensorView<'a> {
    /// Which tensor it is, for devices that keep a copy of it.
    #[cfg(feature = "gpu")]
    pub(in crate::ml) id: candle_core::TensorId,
    storage: StorageRef<'a>,
    layout: &'a Layout,
}

impl<'a> TensorView<'a> {
    pub(in crate::ml) fn tensor(tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Self {
            #[cfg(feature = "gpu")]
            id: tensor.id(),
            storage,
            layout,
        }
    }

    pub(in crate::ml) fn weight(weight: &'a Weight, pass: Pass) -> Result<Self> {
        let borrowed = Self::tensor(weight.stored(pass));
        if borrowed.layout.contiguous_offsets().is_none() {
            bail!("a weight is not contiguous")
        }
        Ok(borrowed)
    }

    /// The shape (rows, columns) of a matrix, which is known also where its values are on a device alone.
    pub(in crate::ml) fn shape(&self) -> Result<(usize, usize)> {
        self.layout.shape().dims2()
    }

    pub(in crate::ml) fn values(&self) -> Result<Values<'_>> {
        let Some((start, end)) = self.layout.contiguous_offsets() else {
            bail!("a weight is not contiguous")
        };
        let values = match &*self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => values.get(start..end).map(Values::F32),
            Storage::Cpu(CpuStorage::BF16(values)) => values.get(start..end).map(Values::Bf16),
            Storage::Cpu(CpuStorage::F16(values)) => values.get(start..end).map(Values::F16),
            _ => None,
        };
        match values {
            Some(values) => Ok(values),
            None => bail!("a weight is neither f32, bf16 nor f16 in the host's memory"),
        }
    }

    pub(in crate::ml) fn floats(&self) -> Result<&[f32]> {
        match self.values()? {
            Values::F32(values) => Ok(values),
            _ => bail!("the weight of a norm or a bias is not f32"),
        }
    }

    /// Some rows of a matrix.
    pub(in crate::ml) fn rows(&self, rows: Range<usize>) -> Result<Matrix<'_>> {
        let (all, columns) = self.layout.shape().dims2()?;
        let span = rows.start.saturating_mul(columns)..rows.end.saturating_mul(columns);
        let values = match self.values()? {
            Values::F32(values) => values.get(span).map(Values::F32),
            Values::Bf16(values) => values.get(span).map(Values::Bf16),
            Values::F16(values) => values.get(span).map(Values::F16),
            Values::Nf4(_) => None,
        };
        let matrix = values.and_then(|values| Matrix::new(values, rows.len(), columns));
        match matrix {
            Some(matrix) => Ok(matrix),
            None => bail!("a weight of {all} rows has no rows {rows:?}"),
        }
    }

    pub(in crate::ml) fn matrix(&self) -> Result<Matrix<'_>> {
        let (rows, columns) = self.layout.shape().dims2()?;
        match Matrix::new(self.values()?, rows, columns) {
            Some(matrix) => Ok(matrix),
            None => bail!("a weight has another size than its shape ({rows}, {columns})"),
        }
    }
}

/// The weights of one projection.
pub(super) struct Projection<'a> {
    pub(super) base: BaseWeight<'a>,
    /// The bias (out), if there is one.
    pub(super) bias: Option<TensorView<'a>>,
    pub(super) lora: Option<Pair<'a>>,
    /// The dropout of the pair's input, if there is any.
    pub(super) dropout: Option<Dropout>,
}

/// The base's weight of a projection (out, in).
pub(in crate::ml) enum BaseWeight<'a> {
    Dense(TensorView<'a>),
    Nf4(&'a nf4::Nf4),
    /// A matrix that is not held by a tensor.
    Bare(Matrix<'a>),
}

impl<'a> BaseWeight<'a> {
    pub(in crate::ml) fn borrow(base: &'a Base, pass: Pass) -> Result<Self> {
        Ok(match base {
            Base::Dense(weight) => Self::Dense(TensorView::weight(weight, pass)?),
            Base::Nf4(weight) => Self::Nf4(weight),
        })
    }

    /// The shape (out, in), which is known also where the values are on a device alone.
    pub(in crate::ml) fn shape(&self) -> Result<(usize, usize)> {
        match self {
            Self::Dense(borrowed) => borrowed.shape(),
            Self::Bare(matrix) => Ok((matrix.height(), matrix.depth())),
            Self::Nf4(weight) => Ok(weight.shape),
        }
    }

    /// The weight (out, in).
    pub(in crate::ml) fn matrix(&self) -> Result<Matrix<'_>> {
        match self {
            Self::Dense(borrowed) => borrowed.matrix(),
            Self::Bare(matrix) => Ok(*matrix),
            Self::Nf4(weight) => {
                let values = Values::Nf4(weight.kernel());
                let (rows, columns) = weight.shape;
                match Matrix::new(values, rows, columns) {
                    Some(matrix) => Ok(matrix),
                    None => bail!("a 4-bit weight has another size than its shape"),
                }
            }
        }
    }
}

/// A LoRA pair.
pub(super) struct Pair<'a> {
    /// The matrix A (r, in).
    pub(super) a: BaseWeight<'a>,
    /// The matrix B (out, r).
    pub(super) b: BaseWeight<'a>,
    pub(super) rank: usize,
    pub(super) scaling: f32,
    /// With `DoRA`, the trained norms (out) of the rows of W + scaling B A.
    pub(super) magnitude: Option<TensorView<'a>>,
}

impl<'a> Pair<'a> {
    /// The pair of A (r, in) and B (out, r), both in f32.
    pub(super) fn new(a: &'a Tensor, b: &'a Tensor, scaling: f32) -> Result<Self> {
        Ok(Self {
            rank: a.dim(0)?,
            a: BaseWeight::Dense(TensorView::tensor(a)),
            b: BaseWeight::Dense(TensorView::tensor(b)),
            scaling,
            magnitude: None,
        })
    }
}

impl<'a> Projection<'a> {
    /// A projection of a weight (out, in), a bias (out) and a pair, without dropout.
    pub(super) fn new(
        base: BaseWeight<'a>,
        bias: Option<TensorView<'a>>,
        lora: Option<Pair<'a>>,
    ) -> Self {
        Self {
            base,
            bias,
            lora,
            dropout: None,
        }
    }

    fn borrow(linear: &'a Linear, pass: Pass) -> Result<Self> {
        let base = BaseWeight::borrow(&linear.base, pass)?;
        let lora = match &linear.lora {
            Some(lora) if pass.adapter => {
                let (a, b) = (lora.a.stored(pass), lora.b.stored(pass));
                let magnitude = lora.magnitude.as_ref();
                let magnitude = magnitude.map(|own| TensorView::weight(own, pass));
                Some(Pair {
                    magnitude: magnitude.transpose()?,
                    ..Pair::new(a, b, lora.scaling as f32)?
                })
            }
            _ => None,
        };
        let dropout = linear.dropout(pass);
        let bias = linear.bias.as_ref();
        let bias = bias
            .map(|bias| TensorView::weight(bias, pass))
            .transpose()?;
        Ok(Self {
            base,
            bias,
            lora,
            dropout,
        })
    }

    /// The number of features of its result.
    pub(super) fn height(&self) -> Result<usize> {
        Ok(self.base.shape()?.0)
    }

    /// The rank of the adapter's pair; 0 without one.
    pub(super) fn rank(&self) -> usize {
        self.lora.as_ref().map_or(0, |pair| pair.rank)
    }
}

/// A layer's weights, and what else it computes with.
pub(super) struct Layer<'a> {
    /// The projections of queries, keys and values, or the one whose rows are theirs in this order.
    pub(super) qkv: Vec<Projection<'a>>,
    pub(super) o: Projection<'a>,
    /// The projections of gate and up, or the one whose rows are theirs in this order.
    pub(super) gate_up: Vec<Projection<'a>>,
    pub(super) down: Projection<'a>,
    pub(super) norms: Norms<'a>,
    /// The size of the sliding window in keys, the query's own included; without one, a query attends to all keys up to its own.
    pub(super) window: Option<usize>,
    /// The number of the rotary embedding, if there is one.
    pub(super) rope: Option<usize>,
    pub(super) scores: Scores,
    pub(super) activation: Activation,
    /// The factor of each block's result before it is added to the hidden states.
    pub(super) residual_scale: f32,
}

/// The norms of a layer, as far as it has them.
#[derive(Default)]
pub(super) struct Norms<'a> {
    pub(super) input: Option<NormView<'a>>,
    /// Those of the queries and of the keys, of each head or of all together.
    pub(super) q: Option<NormView<'a>>,
    pub(super) k: Option<NormView<'a>>,
    pub(super) post_attention: Option<NormView<'a>>,
    pub(super) pre_feedforward: Option<NormView<'a>>,
    pub(super) post_feedforward: Option<NormView<'a>>,
}

/// An RMS norm over as many features as its weight has elements, in f32.
pub(super) struct NormView<'a> {
    pub(super) weight: TensorView<'a>,
    pub(super) eps: f32,
}

impl<'a> NormView<'a> {
    /// A norm with this weight, in f32.
    pub(super) fn new(weight: &'a Tensor, eps: f32) -> Self {
        Self {
            weight: TensorView::tensor(weight),
            eps,
        }
    }

    /// A norm of a model.
    pub(super) fn borrow(norm: &'a Norm, pass: Pass) -> Result<Self> {
        Ok(Self {
            weight: TensorView::weight(&norm.weight, pass)?,
            eps: norm.eps as f32,
        })
    }

    /// The number of features that are normed together.
    pub(super) fn width(&self) -> usize {
        self.weight.layout.shape().elem_count()
    }
}

/// The activation as the kernels know it.
pub(super) fn activation(activation: arch::Activation) -> Activation {
    match activation {
        arch::Activation::Silu => Activation::Silu,
        arch::Activation::GeluTanh => Activation::GeluTanh,
    }
}

/// The treatment of attention scores as the kernels know it.
pub(super) fn scores(scale: f64, softcap: Option<f64>) -> Scores {
    Scores {
        scale: scale as f32,
        softcap: softcap.map(|cap| cap as f32),
    }
}

impl<'a> Layer<'a> {
    pub(super) fn borrow(layer: &'a crate::ml::model::Layer, pass: Pass) -> Result<Self> {
        let all = |linears: Vec<&'a Linear>| -> Result<Vec<_>> {
            let each = linears.into_iter();
            each.map(|linear| Projection::borrow(linear, pass))
                .collect()
        };
        let norm = |norm: &'a Option<Norm>| {
            let norm = norm.as_ref();
            norm.map(|norm| NormView::borrow(norm, pass)).transpose()
        };
        Ok(Self {
            qkv: all(layer.qkv.linears())?,
            o: Projection::borrow(&layer.o, pass)?,
            gate_up: all(layer.gate_up.linears())?,
            down: Projection::borrow(&layer.down, pass)?,
            norms: Norms {
                input: norm(&layer.input_norm)?,
                q: norm(&layer.q_norm)?,
                k: norm(&layer.k_norm)?,
                post_attention: norm(&layer.post_attention_norm)?,
                pre_feedforward: norm(&layer.pre_feedforward_norm)?,
                post_feedforward: norm(&layer.post_feedforward_norm)?,
            },
            window: layer.window,
            rope: layer.rope,
            scores: scores(layer.score_scale, layer.score_softcap),
            activation: activation(layer.activation),
            residual_scale: layer.residual_scale as f32,
        })
    }
}
