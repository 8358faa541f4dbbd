//! Operations with a backward pass of their own: candle's fused kernels forward, a few plain operations backward.
//!
//! candle's fused kernels have no backward pass and silently cut the graph, and its automatic gradients also compute those of constants
//! (masks, tables, frozen weights). Here the value is computed outside the graph and enters it together with its backward pass.

use std::sync::Mutex;

use candle_core::{
    CpuStorage, CustomOp1, D, DType, Error, Layout, Result, Shape, Storage, Tensor, bail,
};

/// A value that is already known, with the backward pass to its only argument.
struct WithBackward<F> {
    name: &'static str,
    value: Mutex<Option<Tensor>>,
    backward: F,
}

impl<F> CustomOp1 for WithBackward<F>
where
    F: Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor> + Send + Sync,
{
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let value = match self.value.lock() {
            Ok(mut value) => value.take(),
            Err(poisoned) => poisoned.into_inner().take(),
        };
        let Some(value) = value else {
            bail!("`{}` was applied twice", self.name)
        };
        let value = value.force_contiguous()?;
        let shape = value.shape().clone();
        let (storage, layout) = value.storage_and_layout();
        match &*storage {
            Storage::Cpu(storage) if layout.start_offset() == 0 => Ok((storage.clone(), shape)),
            _ => bail!("`{}` expects a contiguous value on the cpu", self.name),
        }
    }

    fn bwd(&self, argument: &Tensor, value: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        (self.backward)(argument, value, gradient).map(Some)
    }
}

/// Adds `value`, a function of `x` that was computed outside the graph, to the graph. `backward(x, value, gradient)` maps the gradient
/// with respect to `value`, of its shape, to that with respect to `x`. `name` is for error messages.
pub fn with_backward<F>(
    name: &'static str,
    x: &Tensor,
    value: Tensor,
    backward: F,
) -> Result<Tensor>
where
    F: Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor> + Send + Sync + 'static,
{
    if !x.track_op() {
        return Ok(value);
    }
    x.apply_op1(WithBackward {
        name,
        value: Mutex::new(Some(value)),
        backward,
    })
}

/// RMS norm, `x / sqrt(mean(x^2) + eps) * weight`, over the last dimension of `x` (.., width) (Zhang and Sennrich 2019, arXiv 1910.07467,
/// equation 4). `weight` (width) is a constant: it gets no gradient.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let weight = weight.detach();
    let constant = x.detach().contiguous()?;
    #[expect(clippy::disallowed_methods, reason = "the backward stands below")]
    let value = candle_nn::ops::rms_norm(&constant, &weight, eps as f32)?;
    with_backward("rms_norm", x, value, move |x, _, gradient| {
        let x = x.detach();
        let gradient = gradient.broadcast_mul(&weight)?;
        let inverse = ((x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?).recip()?;
        let normed = x.broadcast_mul(&inverse)?;
        let along = (&gradient * &normed)?.mean_keepdim(D::Minus1)?;
        (gradient - normed.broadcast_mul(&along)?)?.broadcast_mul(&inverse)
    })
}

/// `x` times `factor`, if that is not 1.
pub fn scaled(x: Tensor, factor: f64) -> Result<Tensor> {
    if factor.to_bits() == 1f64.to_bits() {
        Ok(x)
    } else {
        x * factor
    }
}

/// `cap * tanh(x / cap)`, if there is a cap.
pub fn softcapped(x: Tensor, cap: Option<f64>) -> Result<Tensor> {
    match cap {
        Some(cap) => (x / cap)?.tanh()? * cap,
        None => Ok(x),
    }
}

/// Rotary position embedding (Su et al. 2021, arXiv 2104.09864, equation 34, with features `i` and `i + width / 2` of a head as a pair):
/// rotates `x` (batch, heads, length, width) by the angles whose cosines and sines (length, width / 2) are given. The backward pass
/// rotates by the negative angles.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    #[expect(clippy::disallowed_methods, reason = "the backward stands below")]
    fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
        candle_nn::rotary_emb::rope(&x.detach().contiguous()?, cos, sin)
    }
    let value = rotate(x, cos, sin)?;
    let (cos, back) = (cos.clone(), sin.neg()?);
    with_backward("rope", x, value, move |_, _, gradient| {
        rotate(gradient, &cos, &back)
    })
}

/// Softmax over the last dimension of `scores + mask`, in f32. `mask` is a constant that is broadcast to the shape of `scores`.
pub fn masked_softmax(scores: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let masked = scores
        .detach()
        .to_dtype(DType::F32)?
        .broadcast_add(mask)?
        .contiguous()?;
    #[expect(clippy::disallowed_methods, reason = "the backward stands below")]
    let value = candle_nn::ops::softmax_last_dim(&masked)?;
    with_backward("masked_softmax", scores, value, |scores, p, gradient| {
        let p = p.detach();
        let weighted = (&p * gradient)?;
        let total = weighted.sum_keepdim(D::Minus1)?;
        (weighted - p.broadcast_mul(&total)?)?.to_dtype(scores.dtype())
    })
}

/// The product `x W^T` of `x` (.., in) with a frozen weight (out, in), which `weight` returns in the dtype of the product. No gradient of
/// the weight is ever computed. The result (.., out) has that dtype.
pub fn frozen_linear<F>(x: &Tensor, weight: F) -> Result<Tensor>
where
    F: Fn() -> Result<Tensor> + Send + Sync + 'static,
{
    let value = {
        let weight = weight()?;
        matmul_rows(&x.detach().to_dtype(weight.dtype())?, &weight.t()?)?
    };
    with_backward("frozen_linear", x, value, move |x, _, gradient| {
        let weight = weight()?;
        matmul_rows(&gradient.to_dtype(weight.dtype())?, &weight)?.to_dtype(x.dtype())
    })
}

/// The product of `x` (.., k) and `w` (k, n), (.., n), computed as one product of two matrices.
pub fn matmul_rows(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let mut shape = x.dims().to_vec();
    let Some(last) = shape.pop() else {
        return Err(Error::Msg("a scalar has no rows to multiply".into()).bt());
    };
    let rows = x.elem_count() / last.max(1);
    shape.push(w.dim(1)?);
    x.contiguous()?
        .reshape((rows, last))?
        .matmul(w)?
        .reshape(shape)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;

    fn random(shape: impl Into<Shape>) -> Tensor {
        Tensor::randn(0f32, 1f32, shape, &Device::Cpu).unwrap()
    }

    /// Gradients of `sum(f(x) * w)` by `fast` and by candle's own graph of `slow` agree, and so do the values.
    fn same(
        x: &Tensor,
        fast: impl Fn(&Tensor) -> Result<Tensor>,
        slow: impl Fn(&Tensor) -> Result<Tensor>,
    ) {
        let x = Var::from_tensor(x).unwrap();
        let (a, b) = (fast(&x).unwrap(), slow(&x).unwrap());
        let w = random(a.shape());
        let gradient = |y: &Tensor| {
            let store = (y * &w).unwrap().sum_all().unwrap().backward().unwrap();
            store.get(&x).unwrap().clone()
        };
        let far = |a: &Tensor, b: &Tensor| {
            let difference = (a - b).unwrap().abs().unwrap().max_all().unwrap();
            difference.to_scalar::<f32>().unwrap()
        };
        assert!(far(&a, &b) < 1e-5, "values");
        assert!(far(&gradient(&a), &gradient(&b)) < 2e-5, "gradients");
    }

    #[test]
    fn rms_norm_is_the_plain_formula() {
        let w = random(16);
        same(
            &random((3, 5, 16)),
            |x| rms_norm(x, &w, 1e-5),
            |x| candle_nn::ops::rms_norm_slow(x, &w, 1e-5),
        );
    }

    #[test]
    fn rope_is_the_plain_formula() {
        let angles = random((5, 4));
        let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
        same(
            &random((2, 3, 5, 8)),
            |x| rope(x, &cos, &sin),
            |x| candle_nn::rotary_emb::rope_slow(x, &cos, &sin),
        );
    }

    #[test]
    fn masked_softmax_is_the_plain_formula() {
        let mask = Tensor::new(
            &[[0f32, f32::NEG_INFINITY, 0.], [0., 0., f32::NEG_INFINITY]],
            &Device::Cpu,
        )
        .unwrap();
        let slow = |x: &Tensor| candle_nn::ops::softmax(&x.broadcast_add(&mask)?, D::Minus1);
        same(&random((4, 2, 3)), |x| masked_softmax(x, &mask), slow);
    }

    #[test]
    fn frozen_linear_is_a_product() {
        let w = random((7, 4));
        let held = w.clone();
        same(
            &random((2, 3, 4)),
            move |x| {
                let w = held.clone();
                frozen_linear(x, move || Ok(w.clone()))
            },
            |x| x.broadcast_matmul(&w.t()?),
        );
    }
}
