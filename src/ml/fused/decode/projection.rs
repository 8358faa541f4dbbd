//! The projections of text generation, with the adapter's pairs.

use std::borrow::Cow;

use candle_core::{DType, Result, Tensor, bail};
use pipeline_kernels::matrix::Matrix;
use pipeline_kernels::team::Team;
use pipeline_kernels::vectors::{self, VectorProduct, vector_products};

use super::super::weights::{BaseWeight, TensorView};
use crate::ml::model::linear::{Base, Linear, Pass, Weight};

/// A projection of a model, with its adapter's pair if that takes part.
pub(super) struct Projection<'a> {
    base: &'a Base,
    pass: Pass,
    out: usize,
    bias: Option<Vec<f32>>,
    pair: Option<Pair>,
}

/// Whether all values of the type `stored` are exact in the compute dtype.
pub(super) fn is_exact(stored: DType, compute: DType) -> bool {
    stored == compute || compute == DType::F32 && matches!(stored, DType::BF16 | DType::F16)
}

/// A low-rank pair, rounded to the compute dtype.
struct Pair {
    a: Vec<f32>,
    b: Vec<f32>,
    r: usize,
    scaling: f32,
}

/// A tensor's values, rounded to the compute dtype.
pub(super) fn values(tensor: &Tensor, compute: DType) -> Result<Vec<f32>> {
    let rounded = tensor.to_dtype(compute)?.to_dtype(DType::F32)?;
    rounded.flatten_all()?.to_vec1()
}

impl<'a> Projection<'a> {
    pub(super) fn new(linear: &'a Linear, pass: Pass) -> Result<Self> {
        let (out, _) = match &linear.base {
            Base::Dense(weight) => weight.stored(pass).dims2()?,
            Base::Nf4(nf4) => nf4.shape,
        };
        let bias = linear.bias.as_ref();
        let bias = bias.map(|bias| values(&bias.value(pass), DType::F32));
        let pair = match &linear.lora {
            Some(lora) if pass.adapter => Some(Pair {
                a: values(&lora.a.value(pass), linear.compute)?,
                b: values(&lora.b.value(pass), linear.compute)?,
                r: lora.a.value(pass).dim(0)?,
                scaling: lora.scaling as f32,
            }),
            _ => None,
        };
        Ok(Self {
            base: &linear.base,
            pass,
            out,
            bias: bias.transpose()?,
            pair,
        })
    }

    fn borrowed(&self) -> Result<BaseWeight<'a>> {
        BaseWeight::borrow(self.base, self.pass)
    }

    /// Whether the kernels can read the weight as it is stored.
    pub(super) fn is_readable(&self, compute: DType) -> bool {
        match self.base {
            Base::Dense(weight) => is_exact(weight.stored(self.pass).dtype(), compute),
            Base::Nf4(nf4) => compute == DType::F32 || nf4.dtype == compute,
        }
    }
}

/// How a step computes products.
pub(super) struct Products<'t> {
    /// The threads that share the step's work.
    pub(super) team: &'t Team<'t>,
    /// Whether products are computed in bf16, which rounds their factors and results.
    pub(super) rounded: bool,
}

impl Products<'_> {
    /// Applies the head's weight (out, in) to a few vectors (tokens, in). The result is (tokens, out).
    pub(super) fn head(&self, weight: &Weight, pass: Pass, x: &[f32]) -> Result<Vec<f32>> {
        let weight = TensorView::tensor(weight.stored(pass));
        let weight = weight.matrix()?;
        let mut out = vec![0.; x.len() / weight.depth().max(1) * weight.height()];
        let product = VectorProduct {
            weight,
            x: &self.factor(x),
            rounded: self.rounded,
            out: &mut out,
        };
        vector_products(self.team, vec![product]);
        self.round(&mut out);
        Ok(out)
    }

    pub(super) fn round(&self, values: &mut [f32]) {
        if self.rounded {
            vectors::round_to_bf16(values);
        }
    }

    /// `x` as a factor of a product, rounded if products are computed in bf16.
    fn factor<'b>(&self, x: &'b [f32]) -> Cow<'b, [f32]> {
        let mut x = Cow::Borrowed(x);
        if self.rounded {
            self.round(x.to_mut());
        }
        x
    }

    /// Applies projections to the same vectors (tokens, in). Each result is (tokens, width): that of a projection, or a part of that of a
    /// single one.
    pub(super) fn parts<const N: usize>(
        &self,
        all: &[Projection<'_>],
        x: &[f32],
        widths: [usize; N],
    ) -> Result<[Vec<f32>; N]> {
        let outs = self.apply(all, x)?;
        match (<[Vec<f32>; N]>::try_from(outs), widths) {
            (Ok(outs), _) => Ok(outs),
            (Err(outs), widths) => match &outs[..] {
                [joined] => Ok(split(joined, widths)),
                outs => bail!("{} projections for {N} results", outs.len()),
            },
        }
    }

    /// Applies projections to the same vectors (tokens, in). Each result is (tokens, out).
    fn apply(&self, all: &[Projection<'_>], x: &[f32]) -> Result<Vec<Vec<f32>>> {
        let x = self.factor(x);
        let borrowed = all
            .iter()
            .map(Projection::borrowed)
            .collect::<Result<Vec<_>>>()?;
        let mut outs: Vec<Vec<f32>> = vec![Vec::new(); all.len()];
        let mut lows = outs.clone();
        let mut products = Vec::with_capacity(2 * all.len());
        let mut count = 0;
        for (((one, borrowed), out), low) in all.iter().zip(&borrowed).zip(&mut outs).zip(&mut lows)
        {
            let weight = borrowed.matrix()?;
            count = x.len() / weight.depth().max(1);
            if let Some(pair) = &one.pair {
                low.resize(count * pair.r, 0.);
                products.push(VectorProduct {
                    weight: dense(&pair.a, pair.r, weight.depth())?,
                    x: &x,
                    rounded: self.rounded,
                    out: low,
                });
            }
            out.resize(count * one.out, 0.);
            products.push(VectorProduct {
                weight,
                x: &x,
                rounded: self.rounded,
                out,
            });
        }
        vector_products(self.team, products);
        let mut highs: Vec<Vec<f32>> = vec![Vec::new(); all.len()];
        let mut products = Vec::new();
        for (((one, low), high), out) in all.iter().zip(&mut lows).zip(&mut highs).zip(&mut outs) {
            self.round(out);
            if let Some(bias) = &one.bias {
                for out in out.chunks_exact_mut(bias.len().max(1)) {
                    add(out, bias);
                }
            }
            if let Some(pair) = &one.pair {
                self.round(low);
                high.resize(count * one.out, 0.);
                products.push(VectorProduct {
                    weight: dense(&pair.b, one.out, pair.r)?,
                    x: low,
                    rounded: self.rounded,
                    out: high,
                });
            }
        }
        if !products.is_empty() {
            vector_products(self.team, products);
        }
        for ((one, high), out) in all.iter().zip(&mut highs).zip(&mut outs) {
            if let Some(pair) = &one.pair {
                self.round(high);
                for (out, high) in out.iter_mut().zip(high) {
                    *out += *high * pair.scaling;
                }
            }
        }
        Ok(outs)
    }
}

/// Rows of `widths` together, as rows of their own for each of them.
fn split<const N: usize>(rows: &[f32], widths: [usize; N]) -> [Vec<f32>; N] {
    let total: usize = widths.iter().sum();
    let mut first = 0;
    widths.map(|width| {
        let span = first..first + width;
        first = span.end;
        let rows = rows.chunks_exact(total.max(1));
        rows.flat_map(|row| &row[span.clone()]).copied().collect()
    })
}

fn dense(values: &[f32], rows: usize, columns: usize) -> Result<Matrix<'_>> {
    match Matrix::f32(values, rows, columns) {
        Some(matrix) => Ok(matrix),
        None => bail!("a pair has not ({rows}, {columns}) values"),
    }
}

fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}
