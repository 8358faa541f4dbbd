//! The attention masks of one pass.

use candle_core::{Result, Tensor, bail};

/// One mask for each different sliding window of the layers.
#[derive(Clone)]
pub(super) struct Masks(Vec<(Option<usize>, Tensor)>);

impl Masks {
    /// The masks for the layers' windows; `mask` computes each.
    pub(super) fn new(
        windows: impl Iterator<Item = Option<usize>>,
        mask: impl Fn(Option<usize>) -> Result<Tensor>,
    ) -> Result<Self> {
        let mut masks: Vec<(Option<usize>, Tensor)> = Vec::new();
        for window in windows {
            if !masks.iter().any(|(own, _)| *own == window) {
                masks.push((window, mask(window)?));
            }
        }
        Ok(Self(masks))
    }

    /// The mask for a layer with this window.
    pub(super) fn get(&self, window: Option<usize>) -> Result<&Tensor> {
        match self.0.iter().find(|(own, _)| *own == window) {
            Some((_, mask)) => Ok(mask),
            None => bail!("there is no mask for a window of {window:?} keys"),
        }
    }
}
