//! One layer, forward and backward.
//!
//! With `n1 = norm(x)`, `a = attention(rope(nq(Wq n1 + bq)), rope(nk(Wk n1 + bk)), Wv n1 + bv)`, `m = x + s norm(Wo a + bo)`,
//! `n2 = norm(m)` and `u = act(Wg n2 + bg) * (Wu n2 + bu)`, the layer's output is `m + s norm(Wd u + bd)`. What a model has not (biases,
//! the norms before or after the two blocks, the norms `nq` and `nk` of each head or of all together, the factor `s`, the rotary
//! embedding) is left out, at no cost.
//!
//! For the backward pass a layer keeps `x`, `q`, `k`, `v`, `a`, `m`, the gate, the up projection, the down projection of each LoRA pair
//! (`A x`), and what a norm after a block was applied to; the norms, `u`, and the normed `q` and `k` are recomputed.

use super::block::{
    BlockEnd, BlockResult, NormedValues, norm_before, norm_before_backward, recompute_norm,
};
use super::device::{Attention, Device};
use super::projection::ProjectionGroup;
use super::shape::PassContext;
use super::trainable::Trainable;
use super::weights::{Layer, NormView};
use crate::ml::model::{self, Norm};
use candle_core::{Result, bail};

/// What the backward pass of a layer needs. All are panels, with the width of the hidden states, of the heads or of the feed-forward block;
/// the norms' factors have one feature.
pub(super) struct Saved<D: Device> {
    x: D::Buffer,
    /// The factors of the norm before the attention; empty without one.
    input_inverse: D::Buffer,
    q: SavedHeads<D>,
    k: SavedHeads<D>,
    v: D::Buffer,
    log_sums: D::Buffer,
    attended: D::Buffer,
    post_attention: Option<NormedValues<D>>,
    middle: D::Buffer,
    /// The factors of the norm before the feed-forward block; empty without one.
    middle_inverse: D::Buffer,
    gate: D::Buffer,
    up: D::Buffer,
    post_feedforward: Option<NormedValues<D>>,
    /// `s A x` of the pairs of q, k and v; of o; of gate and up; and of down.
    lora_down: [Vec<D::Buffer>; 4],
}

impl<D: Device> Saved<D> {
    pub(super) fn give_back(self, device: &D) {
        self.q.give_back(device);
        self.k.give_back(device);
        let normed = [self.post_attention, self.post_feedforward];
        for normed in normed.into_iter().flatten() {
            normed.give_back(device);
        }
        device.give_all([
            self.x,
            self.input_inverse,
            self.v,
            self.log_sums,
            self.attended,
            self.middle,
            self.middle_inverse,
            self.gate,
            self.up,
        ]);
        device.give_all(self.lora_down.into_iter().flatten());
    }
}

/// The queries or keys of a layer.
enum SavedHeads<D: Device> {
    /// After the rotary embedding, as the attention takes them.
    Rotated(D::Buffer),
    /// As the projection computes them, before their norm.
    Raw(NormedValues<D>),
}

/// Queries or keys as the attention takes them, and with a norm what it was applied to.
type Heads<D> = (<D as Device>::Buffer, Option<NormedValues<D>>);

impl<D: Device> SavedHeads<D> {
    fn give_back(self, device: &D) {
        match self {
            Self::Rotated(rotated) => device.give(rotated),
            Self::Raw(raw) => raw.give_back(device),
        }
    }

    /// Chooses what to keep once the attention is computed: the values before the norm if there is one, else the rotated ones. A buffer
    /// that is not kept goes back to the device.
    fn keep(raw: Option<NormedValues<D>>, rotated: D::Buffer, device: &D) -> Self {
        match raw {
            None => Self::Rotated(rotated),
            Some(raw) => {
                device.give(rotated);
                Self::Raw(raw)
            }
        }
    }

    /// The values as the attention takes them, and with a norm those before it, with its factors.
    fn rotated(
        self,
        norm: Option<&NormView<'_>>,
        rope: Option<usize>,
        PassContext { shape, device, .. }: PassContext<'_, D>,
    ) -> Result<Heads<D>> {
        Ok(match (self, norm) {
            (Self::Raw(raw), Some(norm)) => {
                let mut rotated = device.take(device.length(&raw.values));
                let weight = device.vector(&norm.weight)?;
                device.rms_norm_recompute(&raw.values, weight, &raw.inverse, &mut rotated);
                shape.rope(device, rope, &mut rotated, false);
                (rotated, Some(raw))
            }
            (Self::Rotated(rotated), _) => (rotated, None),
            (Self::Raw(_), None) => bail!("a layer lost the norm of its heads"),
        })
    }
}

/// Applies the norm, if there is one, and the rotary embedding number `rope` to queries or keys. With a norm it also returns the values
/// before it, and its factors.
fn rotate<D: Device>(
    mut raw: D::Buffer,
    norm: Option<&NormView<'_>>,
    rope: Option<usize>,
    PassContext { shape, device, .. }: PassContext<'_, D>,
) -> Result<Heads<D>> {
    let Some(norm) = norm else {
        shape.rope(device, rope, &mut raw, false);
        return Ok((raw, None));
    };
    let width = norm.width();
    let mut rotated = device.take(device.length(&raw));
    let mut inverse = shape.take(device, shape.features(device, &raw) / width.max(1));
    let weight = device.vector(&norm.weight)?;
    device.rms_norm(&raw, weight, norm.eps, &mut rotated, &mut inverse);
    shape.rope(device, rope, &mut rotated, false);
    let raw = NormedValues {
        values: raw,
        inverse,
    };
    Ok((rotated, Some(raw)))
}

/// The backward pass of [`rotate`]: from the gradient with respect to its result to that with respect to its argument.
fn rotate_backward<D: Device>(
    mut grad: D::Buffer,
    raw: Option<NormedValues<D>>,
    (norm, trained): (Option<&NormView<'_>>, Option<&Norm>),
    rope: Option<usize>,
    PassContext { shape, device, .. }: PassContext<'_, D>,
    trainable: &mut Trainable<'_, D>,
) -> Result<D::Buffer> {
    shape.rope(device, rope, &mut grad, true);
    let (Some(raw), Some(norm)) = (raw, norm) else {
        return Ok(grad);
    };
    let grad_raw = raw.backward(&grad, norm, trained, trainable)?;
    raw.give_back(device);
    device.give(grad);
    Ok(grad_raw)
}

/// Runs the layer on hidden states `x`, panels of the hidden size. Returns what the backward pass needs, and the hidden states after the
/// layer. If not `whole`, which is enough to recompute a layer for its backward pass, what only the latter need is left out and these are
/// empty.
pub(super) fn forward<D: Device>(
    layer: &Layer<'_>,
    context: PassContext<'_, D>,
    x: D::Buffer,
    whole: bool,
) -> Result<(Saved<D>, D::Buffer)> {
    let PassContext { shape, device, .. } = context;
    let spans = shape.spans(layer.window)?;
    let attend = |[q, k, v]: [&D::Buffer; 3], out: &mut D::Buffer, log_sums: &mut D::Buffer| {
        let inputs = Attention {
            q,
            k,
            v,
            heads: shape.heads,
            scores: layer.scores,
            spans,
        };
        device.attention(inputs, out, log_sums);
    };
    forward_with(layer, context, x, whole, attend)
}

/// The same with another attention: of queries, keys and values it computes the result and, for a backward pass, the logarithms of its sums.
pub(super) fn forward_with<D: Device>(
    layer: &Layer<'_>,
    context: PassContext<'_, D>,
    x: D::Buffer,
    whole: bool,
    attend: impl FnOnce([&D::Buffer; 3], &mut D::Buffer, &mut D::Buffer),
) -> Result<(Saved<D>, D::Buffer)> {
    let PassContext {
        shape,
        layout,
        device,
    } = context;
    let (hidden, inner) = (shape.hidden, shape.inner);
    let norms = &layer.norms;
    let (normed, input_inverse) = norm_before(&x, norms.input.as_ref(), context)?.unzip();
    let group = ProjectionGroup::new(&layer.qkv, hidden, shape);
    let widths = [shape.q_width(), shape.kv_width(), shape.kv_width()];
    let input = normed.as_ref().unwrap_or(&x);
    let ([q, k, v], qkv_down) = group.forward_parts(input, widths, device)?;
    device.give_all(normed);
    let (mut q, raw_q) = rotate(q, norms.q.as_ref(), layer.rope, context)?;
    let averaging = layout.averaging(layer.window).iter().copied();
    device.clear_tokens(&mut q, shape.q_width(), averaging);
    let (k, raw_k) = rotate(k, norms.k.as_ref(), layer.rope, context)?;
    let mut attended = shape.take_clean(device, shape.q_width());
    let mut log_sums = shape.take_clean(device, shape.heads.queries);
    attend([&q, &k, &v], &mut attended, &mut log_sums);
    let q = SavedHeads::keep(raw_q, q, device);
    let k = SavedHeads::keep(raw_k, k, device);
    let end = BlockEnd {
        group: ProjectionGroup::new([&layer.o], shape.q_width(), shape),
        norm: norms.post_attention.as_ref(),
        trained: None,
        scale: layer.residual_scale,
    };
    let BlockResult {
        out: middle,
        normed: post_attention,
        lora_down: o_down,
    } = end.forward(&attended, &x, true, context)?;

    let norm = norms.pre_feedforward.as_ref();
    let (normed, middle_inverse) = norm_before(&middle, norm, context)?.unzip();
    let group = ProjectionGroup::new(&layer.gate_up, hidden, shape);
    let input = normed.as_ref().unwrap_or(&middle);
    let ([gate, up], gate_up_down) = group.forward_parts(input, [inner, inner], device)?;
    device.give_all(normed);
    let mut gated = shape.take(device, inner);
    device.gated_unit(layer.activation, &gate, &up, &mut gated);
    let end = BlockEnd {
        group: ProjectionGroup::new([&layer.down], inner, shape),
        norm: norms.post_feedforward.as_ref(),
        trained: None,
        scale: layer.residual_scale,
    };
    let BlockResult {
        out,
        normed: post_feedforward,
        lora_down: down_down,
    } = end.forward(&gated, &middle, whole, context)?;
    device.give(gated);
    let saved = Saved {
        x,
        input_inverse: input_inverse.unwrap_or_default(),
        q,
        k,
        v,
        log_sums,
        attended,
        post_attention,
        middle,
        middle_inverse: middle_inverse.unwrap_or_default(),
        gate,
        up,
        post_feedforward,
        lora_down: [qkv_down, o_down, gate_up_down, down_down],
    };
    Ok((saved, out))
}

/// A layer's weights as slices, and the layer itself, to whose parameters the gradients belong.
#[derive(Clone, Copy)]
pub(super) struct LayerRef<'a, 'b> {
    pub(super) weights: &'a Layer<'b>,
    pub(super) layer: &'a model::Layer,
}

/// The backward pass of the layer. `grad_x`, panels of the hidden size, holds the gradient with respect to the layer's output and, if
/// `wanted`, is replaced by that with respect to its input; otherwise the pass ends at the lowest trained tensor. The gradients with respect
/// to trained tensors go to `trainable`.
pub(super) fn backward<D: Device>(
    LayerRef { weights, layer }: LayerRef<'_, '_>,
    context: PassContext<'_, D>,
    saved: Saved<D>,
    grad_x: &mut D::Buffer,
    wanted: bool,
    trainable: &mut Trainable<'_, D>,
) -> Result<()> {
    let PassContext {
        shape,
        layout,
        device,
    } = context;
    let (hidden, inner) = (shape.hidden, shape.inner);
    let norms = &weights.norms;
    let Saved {
        x,
        input_inverse,
        q,
        k,
        v,
        log_sums,
        attended,
        post_attention,
        middle,
        middle_inverse,
        mut gate,
        mut up,
        post_feedforward,
        lora_down: [qkv_down, o_down, gate_up_down, down_down],
    } = saved;

    // The feed-forward block.
    let end = BlockEnd {
        group: ProjectionGroup::new([&weights.down], inner, shape),
        norm: norms.post_feedforward.as_ref(),
        trained: layer.post_feedforward_norm.as_ref(),
        scale: weights.residual_scale,
    };
    let own = end.backward(grad_x, post_feedforward, trainable)?;
    let grad_down = own.as_ref().unwrap_or(grad_x);
    let mut grad_gated = shape.take(device, inner);
    let grad_lora_down = end.group.backward(&[grad_down], &mut grad_gated, device)?;
    device.gated_unit_backward(weights.activation, &mut gate, &mut up, &mut grad_gated);
    let (grad_gate, grad_up, gated) = (gate, up, grad_gated); // what their buffers hold now
    end.group.gradients(
        &[&layer.down],
        &[grad_down],
        &gated,
        &down_down,
        &grad_lora_down,
        trainable,
    )?;
    device.give_all(down_down.into_iter().chain(grad_lora_down).chain(own));
    device.give(gated);
    let norm = norms.pre_feedforward.as_ref();
    let normed = recompute_norm(&middle, norm, &middle_inverse, device)?;
    let group = ProjectionGroup::new(&weights.gate_up, hidden, shape);
    let mut grad_input = shape.take(device, hidden);
    let grad_outs = group.join([grad_gate, grad_up], device);
    let grad_lora_down = group.backward(&grad_outs.all(), &mut grad_input, device)?;
    group.gradients(
        &layer.gate_up.linears(),
        &grad_outs.all(),
        normed.as_ref().unwrap_or(&middle),
        &gate_up_down,
        &grad_lora_down,
        trainable,
    )?;
    device.give_all(gate_up_down.into_iter().chain(grad_lora_down));
    grad_outs.give_back(device);
    let norm = (norm, layer.pre_feedforward_norm.as_ref());
    norm_before_backward(
        &middle,
        &middle_inverse,
        norm,
        &grad_input,
        grad_x,
        trainable,
    )?;
    device.give_all([middle, middle_inverse].into_iter().chain(normed));

    // Attention.
    if !wanted && !layer.trains_attention() {
        q.give_back(device);
        k.give_back(device);
        if let Some(normed) = post_attention {
            normed.give_back(device);
        }
        device.give_all(qkv_down.into_iter().chain(o_down));
        device.give_all([x, input_inverse, v, log_sums, attended, grad_input]);
        return Ok(());
    }
    let end = BlockEnd {
        group: ProjectionGroup::new([&weights.o], shape.q_width(), shape),
        norm: norms.post_attention.as_ref(),
        trained: layer.post_attention_norm.as_ref(),
        scale: weights.residual_scale,
    };
    let own = end.backward(grad_x, post_attention, trainable)?;
    let grad_o = own.as_ref().unwrap_or(grad_x);
    let mut grad_attended = shape.take_clean(device, shape.q_width());
    let grad_lora_down = end.group.backward(&[grad_o], &mut grad_attended, device)?;
    end.group.gradients(
        &[&layer.o],
        &[grad_o],
        &attended,
        &o_down,
        &grad_lora_down,
        trainable,
    )?;
    device.give_all(o_down.into_iter().chain(grad_lora_down).chain(own));
    let rope = weights.rope;
    let (mut q, raw_q) = q.rotated(norms.q.as_ref(), rope, context)?;
    let averaging = layout.averaging(weights.window).iter().copied();
    device.clear_tokens(&mut q, shape.q_width(), averaging);
    let (k, raw_k) = k.rotated(norms.k.as_ref(), rope, context)?;
    let mut grad_q = shape.take_clean(device, shape.q_width());
    let mut grad_k = shape.take_clean(device, shape.kv_width());
    let mut grad_v = shape.take_clean(device, shape.kv_width());
    device.attention_backward(
        Attention {
            q: &q,
            k: &k,
            v: &v,
            heads: shape.heads,
            scores: weights.scores,
            spans: shape.spans(weights.window)?,
        },
        (&attended, &log_sums, &grad_attended),
        [&mut grad_q, &mut grad_k, &mut grad_v],
    );
    device.give_all([attended, log_sums, grad_attended, q, k, v]);
    let norm = (norms.q.as_ref(), layer.q_norm.as_ref());
    let grad_q = rotate_backward(grad_q, raw_q, norm, rope, context, trainable)?;
    let norm = (norms.k.as_ref(), layer.k_norm.as_ref());
    let grad_k = rotate_backward(grad_k, raw_k, norm, rope, context, trainable)?;
    let norm = norms.input.as_ref();
    let normed = recompute_norm(&x, norm, &input_inverse, device)?;
    let group = ProjectionGroup::new(&weights.qkv, hidden, shape);
    let grad_outs = group.join([grad_q, grad_k, grad_v], device);
    let trains_norm = |norm: &Norm| norm.weight.trained().is_some();
    let needed = wanted || layer.input_norm.as_ref().is_some_and(trains_norm);
    let grad_lora_down = if needed {
        group.backward(&grad_outs.all(), &mut grad_input, device)?
    } else {
        group.grad_lora_down(&grad_outs.all(), device)?
    };
    group.gradients(
        &layer.qkv.linears(),
        &grad_outs.all(),
        normed.as_ref().unwrap_or(&x),
        &qkv_down,
        &grad_lora_down,
        trainable,
    )?;
    device.give_all(qkv_down.into_iter().chain(grad_lora_down));
    grad_outs.give_back(device);
    if needed {
        let norm = (norm, layer.input_norm.as_ref());
        norm_before_backward(&x, &input_inverse, norm, &grad_input, grad_x, trainable)?;
    }
    device.give_all([grad_input, x, input_inverse].into_iter().chain(normed));
    Ok(())
}
