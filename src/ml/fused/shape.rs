//! The sizes of a pass, and what all its layers share.

use candle_core::{DType, Result};
use pipeline_kernels::attention::Heads;
use pipeline_kernels::panels::{fill, size};

use super::device::{Device, Rotary};
use super::layout::Layout;
use crate::ml::model::arch::Arch;
use crate::ml::model::{self, CausalLm};

/// What the layers of a pass have in common.
pub(super) struct PassContext<'a, D: Device> {
    pub(super) shape: &'a Shape<D>,
    pub(super) layout: &'a Layout,
    pub(super) device: &'a D,
}

impl<D: Device> Clone for PassContext<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<D: Device> Copy for PassContext<'_, D> {}

/// The sizes of a pass and what all its layers share.
pub(super) struct Shape<D: Device> {
    pub(super) tokens: usize,
    pub(super) hidden: usize,
    pub(super) inner: usize,
    pub(super) heads: Heads,
    /// The cosines and sines of each rotary embedding, panels of a feature for each rotated pair.
    angles: Vec<(D::Buffer, D::Buffer)>,
    /// The number of rotated pairs of features of a head.
    pairs: usize,
    /// For each token its index in the padded batches, on which its dropout depends.
    pub(super) padded_index: D::Numbers,
    /// The spans for each size of a sliding window, and those without one.
    spans: Vec<(Option<usize>, D::Spans)>,
    /// Whether products are computed with factors that are rounded to bf16 or f16.
    pub(super) half: bool,
    /// The number of tokens, from the first on, to which the adapter applies; the others see the base alone.
    pub(super) lora_tokens: usize,
}

impl<D: Device> Shape<D> {
    pub(super) fn new(model: &CausalLm, layout: &Layout, device: &D) -> Result<Self> {
        let half = model.compute != DType::F32;
        Self::from_arch(&model.arch, layout, device, half)
    }

    pub(super) fn from_arch(
        arch: &Arch,
        layout: &Layout,
        device: &D,
        rounds: bool,
    ) -> Result<Self> {
        let tokens = layout.ids.len();
        let ropes = 0..arch.ropes.len();
        let angles = ropes.map(|rope| {
            let known = angles_of_positions(arch, rope, layout, device)?;
            if let Some(known) = known {
                return Ok(known);
            }
            let (cos, sin) = angles(arch, rope, layout)?;
            Ok((device.upload(cos), device.upload(sin)))
        });
        let angles = angles.collect::<Result<_>>()?;
        let windows = std::iter::once(None).chain(layout.window_sizes().map(Some));
        let spans = windows.map(|window| (window, device.spans(layout.spans(window))));
        Ok(Self {
            tokens,
            hidden: arch.hidden_size,
            inner: arch.intermediate_size,
            heads: Heads {
                queries: arch.num_attention_heads,
                keys: arch.num_key_value_heads,
                width: arch.head_dim,
            },
            angles,
            pairs: arch.rotary_dim / 2,
            padded_index: device.numbers(&layout.padded_index),
            spans: spans.collect(),
            half: rounds,
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
    pub(super) fn features(&self, device: &D, panels: &D::Buffer) -> usize {
        device.length(panels) / size(1, self.tokens).max(1)
    }

    /// The spans for a window, see [`Layout::spans`].
    pub(super) fn spans(&self, window: Option<usize>) -> Result<&D::Spans> {
        let of = |wanted| self.spans.iter().find(|(window, _)| *window == wanted);
        match of(window).or_else(|| of(None)) {
            Some((_, spans)) => Ok(spans),
            None => candle_core::bail!("a pass without spans"),
        }
    }

    /// A buffer for panels of `features`, contents unspecified.
    pub(super) fn take(&self, device: &D, features: usize) -> D::Buffer {
        device.take(size(features, self.tokens))
    }

    /// A buffer for panels of `features` whose lanes after the last token are zero.
    pub(super) fn take_clean(&self, device: &D, features: usize) -> D::Buffer {
        let mut buffer = self.take(device, features);
        device.clear_last_panel(&mut buffer, features);
        buffer
    }

    /// Applies a rotary embedding, if there is one, to panels of `features`, or with `back` its transpose.
    pub(super) fn rope(&self, device: &D, number: Option<usize>, x: &mut D::Buffer, back: bool) {
        let features = self.features(device, x);
        let angles = number.and_then(|number| self.angles.get(number));
        if let Some((cos, sin)) = angles.filter(|_| self.pairs > 0) {
            let rotary = Rotary {
                cos,
                sin,
                pairs: self.pairs,
                width: self.heads.width,
            };
            device.rope(x, features, rotary, back);
        }
    }
}

/// The cosines and sines of a rotary embedding for the tokens of a pass, in panels of a feature for each rotated pair.
fn angles(arch: &Arch, rope: usize, layout: &Layout) -> Result<(Vec<f32>, Vec<f32>)> {
    let (tokens, pairs) = (layout.ids.len(), arch.rotary_dim / 2);
    let mut cos = vec![0f32; tokens * pairs];
    let mut sin = cos.clone();
    // Angles may depend on the length of the token's micro-batch.
    let mut lengths = layout.lengths.clone();
    lengths.sort_unstable();
    lengths.dedup();
    for length in lengths {
        let own = || (0..tokens).filter(|token| layout.lengths[*token] == length);
        let positions = own().map(|token| layout.positions[token]);
        let (some_cos, some_sin) =
            model::angles(arch, rope, positions, length, &candle_core::Device::Cpu)?;
        for (all, some) in [(&mut cos, some_cos), (&mut sin, some_sin)] {
            let some = some.flatten_all()?.to_vec1::<f32>()?;
            for (token, row) in own().zip(some.chunks_exact(pairs.max(1))) {
                all[token * pairs..][..pairs].copy_from_slice(row);
            }
        }
    }
    Ok((in_panels(&cos, pairs), in_panels(&sin, pairs)))
}

/// Rows of `width` as the tokens of panels.
fn in_panels(rows: &[f32], width: usize) -> Vec<f32> {
    let tokens = rows.len() / width.max(1);
    let mut out = vec![0.; size(width, tokens)];
    fill(&mut out, width, tokens, |token| {
        &rows[token * width..][..width]
    });
    out
}

/// The same from tables that the device keeps, if it does and if the angles depend on nothing but positions.
fn angles_of_positions<D: Device>(
    arch: &Arch,
    rope: usize,
    layout: &Layout,
    device: &D,
) -> Result<Option<(D::Buffer, D::Buffer)>> {
    let pairs = arch.rotary_dim / 2;
    if pairs == 0 || !model::have_same_angles(arch, 1, usize::MAX) {
        return Ok(None);
    }
    let table = |is_sine: bool| {
        let make = |positions: usize| {
            let cpu = &candle_core::Device::Cpu;
            let (cos, sin) = model::angles(arch, rope, 0..positions, positions, cpu)?;
            let all = if is_sine { sin } else { cos };
            Ok(in_panels(&all.flatten_all()?.to_vec1::<f32>()?, pairs))
        };
        device.table_rows(
            2 * rope + usize::from(is_sine),
            pairs,
            &layout.positions,
            &make,
        )
    };
    Ok(table(false)?.zip(table(true)?))
}
