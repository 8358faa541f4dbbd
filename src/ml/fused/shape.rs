//! The sizes of a pass, and what all its layers share.

use candle_core::{DType, Device, Result};
use pipeline_kernels::attention::Heads;
use pipeline_kernels::elementwise::rope;
use pipeline_kernels::panels::{LANES, fill, size};

use super::layout::Layout;
use super::pool::Pool;
use crate::ml::model::arch::Arch;
use crate::ml::model::{self, CausalLm};

/// The sizes of a pass and what all its layers share.
pub(super) struct Shape {
    pub(super) tokens: usize,
    pub(super) hidden: usize,
    pub(super) inner: usize,
    pub(super) heads: Heads,
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// For each token its index in the padded batches, on which its dropout depends.
    pub(super) padded_index: Vec<u64>,
    /// Whether products with the base's weights are computed in bf16.
    pub(super) half: bool,
    /// The number of tokens, from the first on, to which the adapter applies; the others see the base alone.
    pub(super) lora_tokens: usize,
}

impl Shape {
    pub(super) fn new(model: &CausalLm, layout: &Layout) -> Result<Self> {
        let half = model.compute == DType::BF16;
        Self::from_arch(&model.arch, layout, &model.device, half)
    }

    pub(super) fn from_arch(
        arch: &Arch,
        layout: &Layout,
        device: &Device,
        in_bf16: bool,
    ) -> Result<Self> {
        let tokens = layout.ids.len();
        let half = arch.head_dim / 2;
        let positions = layout.positions.iter().copied();
        let length = layout.positions.iter().max().map_or(0, |last| last + 1);
        let (cos, sin) = model::angles(arch, 0, positions, length, device)?;
        let panels = |angles: candle_core::Tensor| -> Result<Vec<f32>> {
            let rows = angles.flatten_all()?.to_vec1::<f32>()?;
            let mut out = vec![0.; size(half, tokens)];
            fill(&mut out, half, tokens, |token| {
                rows.get(token * half..(token + 1) * half)
                    .unwrap_or_default()
            });
            Ok(out)
        };
        Ok(Self {
            tokens,
            hidden: arch.hidden_size,
            inner: arch.intermediate_size,
            heads: Heads {
                queries: arch.num_attention_heads,
                keys: arch.num_key_value_heads,
                width: arch.head_dim,
            },
            cos: panels(cos)?,
            sin: panels(sin)?,
            padded_index: layout.padded_index.clone(),
            half: in_bf16,
            lora_tokens: tokens,
        })
    }

    /// The number of features of all query heads.
    pub(super) fn q_width(&self) -> usize {
        self.heads.queries * self.heads.width
    }

    /// The number of features of all key heads.
    pub(super) fn kv_width(&self) -> usize {
        self.heads.keys * self.heads.width
    }

    /// The number of features of panels of this pass.
    pub(super) fn features(&self, panels: &[f32]) -> usize {
        panels.len() / size(1, self.tokens).max(1)
    }

    /// A buffer for panels of `features`, contents unspecified.
    pub(super) fn take(&self, pool: &Pool, features: usize) -> Vec<f32> {
        pool.take(size(features, self.tokens))
    }

    /// A buffer for panels of `features` whose lanes after the last token are zero.
    pub(super) fn take_clean(&self, pool: &Pool, features: usize) -> Vec<f32> {
        let mut buffer = self.take(pool, features);
        let last = buffer.len().saturating_sub(features * LANES);
        buffer[last..].fill(0.);
        buffer
    }

    /// Applies the rotary embedding to panels of `features`, or with `back` its inverse.
    pub(super) fn rope(&self, x: &mut [f32], features: usize, back: bool) {
        let half = self.heads.width / 2;
        rope(x, features, &self.cos, &self.sin, half, back);
    }
}
