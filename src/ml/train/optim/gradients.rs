//! All gradients of a step together: their norm, scaling and clipping.

use candle_core::{Result, Tensor};

/// The L2 norm of all gradients together, computed as in torch's `clip_grad_norm_`: the norm of the tensors' norms.
pub fn norm(gradients: &[Option<Tensor>]) -> Result<f64> {
    let mut sum = 0f64;
    for gradient in gradients.iter().flatten() {
        // The sum is in f64, because candle adds f32 one after the other, which loses digits on large tensors.
        let squares = gradient.flatten_all()?.to_vec1::<f32>()?;
        sum += squares.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>();
    }
    Ok(sum.sqrt())
}

/// Multiplies all gradients by `factor`, in place.
pub fn scale(gradients: &mut [Option<Tensor>], factor: f64) -> Result<()> {
    for gradient in gradients.iter_mut().flatten() {
        *gradient = (&*gradient * factor)?;
    }
    Ok(())
}

/// Scales all gradients down so that their norm is at most `limit`, and returns their norm before (torch's `clip_grad_norm_`). With a limit
/// of 0 nothing is clipped.
pub fn clip(gradients: &mut [Option<Tensor>], limit: f64) -> Result<f64> {
    let norm = norm(gradients)?;
    let factor = limit / (norm + 1e-6);
    if limit > 0. && factor < 1. {
        scale(gradients, factor)?;
    }
    Ok(norm)
}
