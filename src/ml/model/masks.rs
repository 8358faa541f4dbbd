//! The attention's masks of one pass.

use candle_core::{Result, Tensor, bail};

use super::arch::Arch;

/// One mask for each window that layers have.
#[derive(Clone)]
pub(super) struct Masks(Vec<(Option<usize>, Tensor)>);

impl Masks {
    /// Those of a model's layers, each made by `mask`.
    pub(super) fn of(arch: &Arch, mask: impl Fn(Option<usize>) -> Result<Tensor>) -> Result<Self> {
        let mut masks: Vec<(Option<usize>, Tensor)> = Vec::new();
        for layer in &arch.layers {
            if !masks.iter().any(|(window, _)| *window == layer.window) {
                masks.push((layer.window, mask(layer.window)?));
            }
        }
        Ok(Self(masks))
    }

    /// That of a layer with a window.
    pub(super) fn get(&self, window: Option<usize>) -> Result<&Tensor> {
        match self.0.iter().find(|(own, _)| *own == window) {
            Some((_, mask)) => Ok(mask),
            None => bail!("there is no mask for a window of {window:?} keys"),
        }
    }
}
