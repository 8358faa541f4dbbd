//! One layer, forward and backward.
//!
//! With `n1 = norm(x)`, `a = attention(rope(nq(Wq n1 + bq)), rope(nk(Wk n1 + bk)), Wv n1 + bv)`, `m = x + Wo a + bo`,
//! `n2 = norm(m)` and `u = silu(Wg n2 + bg) * (Wu n2 + bu)`, the layer's output is `m + Wd u + bd`. The biases and the norms `nq` and
//! `nk` of each head are left out if the model has none. For the backward pass it keeps `x`, `q`, `k`, `v`, `a`, `m`, the gate, the up
//! projection and the down projection of each LoRA pair (`A x`); the norms, `u`, and the normed `q` and `k` are recomputed.

use candle_core::{Result, bail};
use pipeline_kernels::attention::{
    Gradients as AttentionGradients, Inputs, attention, attention_backward,
};
use pipeline_kernels::elementwise::{
    rms_norm, rms_norm_backward, rms_norm_grad_weight, rms_norm_recompute, swiglu, swiglu_backward,
};
use pipeline_kernels::panels::LANES;
use pipeline_kernels::product::Onto;

use super::layout::Layout;
use super::pool::Pool;
use super::projection::ProjectionGroup;
use super::shape::Shape;
use super::trainable::Trainable;
use super::weights::{HeadNorm, Layer, plain_parts};
use crate::ml::model::{self, Norm};

/// What the backward pass of a layer needs. All are panels, with the width of the hidden states, of the heads or of the feed-forward block;
/// the norms' factors have one feature.
pub(super) struct Saved {
    x: Vec<f32>,
    input_inverse: Vec<f32>,
    q: SavedHeads,
    k: SavedHeads,
    v: Vec<f32>,
    log_sums: Vec<f32>,
    attended: Vec<f32>,
    middle: Vec<f32>,
    post_inverse: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    /// `s A x` of the pairs of q, k and v; of o; of gate and up; and of down.
    lora_down: [Vec<Vec<f32>>; 4],
}

impl Saved {
    pub(super) fn give_back(self, pool: &Pool) {
        self.q.give_back(pool);
        self.k.give_back(pool);
        pool.give_all([
            self.x,
            self.input_inverse,
            self.v,
            self.log_sums,
            self.attended,
            self.middle,
            self.post_inverse,
            self.gate,
            self.up,
        ]);
        pool.give_all(self.lora_down.into_iter().flatten());
    }
}

/// The queries or keys of a layer.
enum SavedHeads {
    /// After the rotary embedding, as the attention takes them.
    Rotated(Vec<f32>),
    /// As the projection computes them, before their norm.
    Raw(RawHeads),
}

/// Queries or keys before their norm.
struct RawHeads {
    values: Vec<f32>,
    /// The factors `inverse` of each head's norm, panels with a feature for each head.
    inverse: Vec<f32>,
}

impl SavedHeads {
    fn give_back(self, pool: &Pool) {
        match self {
            Self::Rotated(rotated) => pool.give(rotated),
            Self::Raw(raw) => pool.give_all([raw.values, raw.inverse]),
        }
    }

    /// Chooses what to keep once the attention is computed: the values before the norm if there is one, else the rotated ones. A buffer
    /// that is not kept goes back to the pool.
    fn keep(raw: Option<RawHeads>, rotated: Vec<f32>, pool: &Pool) -> Self {
        match raw {
            None => Self::Rotated(rotated),
            Some(raw) => {
                pool.give(rotated);
                Self::Raw(raw)
            }
        }
    }

    /// The values as the attention takes them, and with a norm those before it, with its factors.
    fn rotated(
        self,
        norm: Option<&HeadNorm<'_>>,
        shape: &Shape,
        pool: &Pool,
    ) -> Result<(Vec<f32>, Option<RawHeads>)> {
        Ok(match (self, norm) {
            (Self::Raw(raw), Some(norm)) => {
                let mut rotated = pool.take(raw.values.len());
                let weight = norm.weight.floats()?;
                rms_norm_recompute(&raw.values, weight, &raw.inverse, &mut rotated);
                let features = shape.features(&rotated);
                shape.rope(&mut rotated, features, false);
                (rotated, Some(raw))
            }
            (Self::Rotated(rotated), _) => (rotated, None),
            (Self::Raw(_), None) => bail!("a layer lost the norm of its heads"),
        })
    }
}

/// Applies the norm, if there is one, and the rotary embedding to queries or keys. With a norm it also returns the values before it, and
/// its factors.
fn rotate(
    mut raw: Vec<f32>,
    norm: Option<&HeadNorm<'_>>,
    shape: &Shape,
    pool: &Pool,
) -> Result<(Vec<f32>, Option<RawHeads>)> {
    let features = shape.features(&raw);
    let Some(norm) = norm else {
        shape.rope(&mut raw, features, false);
        return Ok((raw, None));
    };
    let mut rotated = pool.take(raw.len());
    let mut inverse = shape.take(pool, features / shape.heads.width);
    let weight = norm.weight.floats()?;
    rms_norm(&raw, weight, norm.eps, &mut rotated, &mut inverse);
    shape.rope(&mut rotated, features, false);
    let raw = RawHeads {
        values: raw,
        inverse,
    };
    Ok((rotated, Some(raw)))
}

/// The backward pass of [`rotate`]: from the gradient with respect to its result to that with respect to its argument.
fn rotate_backward(
    mut grad: Vec<f32>,
    raw: Option<RawHeads>,
    (norm, trained): (Option<&HeadNorm<'_>>, Option<&Norm>),
    PassContext { shape, pool, .. }: PassContext<'_>,
    trainable: &mut Trainable<'_>,
) -> Result<Vec<f32>> {
    let features = shape.features(&grad);
    shape.rope(&mut grad, features, true);
    let (Some(raw), Some(norm)) = (raw, norm) else {
        return Ok(grad);
    };
    if let Some(trained) = trained {
        trainable.add(&trained.weight, |sum| {
            rms_norm_grad_weight(&raw.values, &raw.inverse, &grad, sum);
        })?;
    }
    let mut grad_raw = pool.take(raw.values.len());
    grad_raw.fill(0.);
    let weight = norm.weight.floats()?;
    rms_norm_backward(&raw.values, weight, &raw.inverse, &grad, &mut grad_raw);
    pool.give_all([raw.values, raw.inverse, grad]);
    Ok(grad_raw)
}

/// Sets all `features` of some tokens in panels to zero.
fn clear_tokens(panels: &mut [f32], features: usize, tokens: &[usize]) {
    for token in tokens {
        let panel = &mut panels[token / LANES * features * LANES..][..features * LANES];
        for value in panel.iter_mut().skip(token % LANES).step_by(LANES) {
            *value = 0.;
        }
    }
}

/// What the layers of a pass have in common.
#[derive(Clone, Copy)]
pub(super) struct PassContext<'a> {
    pub(super) shape: &'a Shape,
    pub(super) layout: &'a Layout,
    pub(super) pool: &'a Pool,
}

/// Runs the layer on hidden states `x`, panels of the hidden size. Returns what the backward pass needs, and the hidden states after the
/// layer. If not `whole`, which is enough to recompute a layer for its backward pass, the last product is left out and these are empty.
pub(super) fn forward(
    layer: &Layer<'_>,
    context: PassContext<'_>,
    x: Vec<f32>,
    whole: bool,
) -> Result<(Saved, Vec<f32>)> {
    let PassContext {
        shape,
        layout,
        pool,
    } = context;
    let (hidden, inner) = (shape.hidden, shape.inner);
    let mut normed = shape.take(pool, hidden);
    let mut input_inverse = shape.take(pool, 1);
    let weight = layer.input_norm.floats()?;
    rms_norm(&x, weight, layer.eps.0, &mut normed, &mut input_inverse);
    let mut q = shape.take(pool, shape.q_width());
    let mut k = shape.take(pool, shape.kv_width());
    let mut v = shape.take(pool, shape.kv_width());
    let group = ProjectionGroup::new(&[&layer.q, &layer.k, &layer.v], hidden, shape);
    let qkv_down = group.forward(&normed, vec![&mut q, &mut k, &mut v], Onto::Zero, pool)?;
    let (mut q, raw_q) = rotate(q, layer.q_norm.as_ref(), shape, pool)?;
    clear_tokens(&mut q, shape.q_width(), layout.averaging(layer.window));
    let (k, raw_k) = rotate(k, layer.k_norm.as_ref(), shape, pool)?;
    let mut attended = shape.take_clean(pool, shape.q_width());
    let mut log_sums = shape.take_clean(pool, shape.heads.queries);
    let inputs = Inputs {
        q: &q,
        k: &k,
        v: &v,
    };
    let spans = layout.spans(layer.window);
    attention(inputs, shape.heads, spans, &mut attended, &mut log_sums);
    let q = SavedHeads::keep(raw_q, q, pool);
    let k = SavedHeads::keep(raw_k, k, pool);
    let mut middle = shape.take(pool, hidden);
    let group = ProjectionGroup::new(&[&layer.o], shape.q_width(), shape);
    let o_down = group.forward(&attended, vec![&mut middle], Onto::Values(&x), pool)?;

    let mut post_inverse = shape.take(pool, 1);
    let weight = layer.post_norm.floats()?;
    rms_norm(&middle, weight, layer.eps.1, &mut normed, &mut post_inverse);
    let mut gate = shape.take(pool, inner);
    let mut up = shape.take(pool, inner);
    let group = ProjectionGroup::new(&[&layer.gate, &layer.up], hidden, shape);
    let gate_up_down = group.forward(&normed, vec![&mut gate, &mut up], Onto::Zero, pool)?;
    pool.give(normed);
    let mut gated = shape.take(pool, inner);
    swiglu(&gate, &up, &mut gated);
    let group = ProjectionGroup::new(&[&layer.down], inner, shape);
    let (down_down, out) = if whole {
        let mut out = shape.take(pool, hidden);
        let onto = Onto::Values(&middle);
        (group.forward(&gated, vec![&mut out], onto, pool)?, out)
    } else {
        (group.lora_down(&gated, pool)?, Vec::new())
    };
    pool.give(gated);
    let saved = Saved {
        x,
        input_inverse,
        q,
        k,
        v,
        log_sums,
        attended,
        middle,
        post_inverse,
        gate,
        up,
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
pub(super) fn backward(
    LayerRef { weights, layer }: LayerRef<'_, '_>,
    context: PassContext<'_>,
    saved: Saved,
    grad_x: &mut [f32],
    wanted: bool,
    trainable: &mut Trainable<'_>,
) -> Result<()> {
    let PassContext {
        shape,
        layout,
        pool,
    } = context;
    let (hidden, inner) = (shape.hidden, shape.inner);
    let Saved {
        x,
        input_inverse,
        q,
        k,
        v,
        log_sums,
        attended,
        middle,
        post_inverse,
        mut gate,
        mut up,
        lora_down: [qkv_down, o_down, gate_up_down, down_down],
    } = saved;

    // The feed-forward block.
    let mut grad_gated = shape.take(pool, inner);
    let group = ProjectionGroup::new(&[&weights.down], inner, shape);
    let grad_lora_down = group.backward(&[grad_x], &mut grad_gated, pool)?;
    swiglu_backward(&mut gate, &mut up, &mut grad_gated);
    let (grad_gate, grad_up, gated) = (gate, up, grad_gated); // what their buffers hold now
    group.gradients(
        &[&layer.down],
        &[grad_x],
        &gated,
        &down_down,
        &grad_lora_down,
        trainable,
    )?;
    pool.give_all(down_down.into_iter().chain(grad_lora_down));
    pool.give(gated);
    let mut normed = shape.take(pool, hidden);
    let parts = plain_parts(layer)?;
    let weight = weights.post_norm.floats()?;
    rms_norm_recompute(&middle, weight, &post_inverse, &mut normed);
    let group = ProjectionGroup::new(&[&weights.gate, &weights.up], hidden, shape);
    let mut grad_normed = shape.take(pool, hidden);
    let grad_outs: [&[f32]; 2] = [&grad_gate, &grad_up];
    let grad_lora_down = group.backward(&grad_outs, &mut grad_normed, pool)?;
    group.gradients(
        &[parts.gate, parts.up],
        &grad_outs,
        &normed,
        &gate_up_down,
        &grad_lora_down,
        trainable,
    )?;
    pool.give_all(gate_up_down.into_iter().chain(grad_lora_down));
    pool.give_all([grad_gate, grad_up]);
    trainable.add(&parts.post_norm.weight, |sum| {
        rms_norm_grad_weight(&middle, &post_inverse, &grad_normed, sum);
    })?;
    rms_norm_backward(&middle, weight, &post_inverse, &grad_normed, grad_x);
    pool.give_all([middle, post_inverse]);

    // Attention.
    if !wanted && !layer.trains_attention() {
        q.give_back(pool);
        k.give_back(pool);
        pool.give_all(qkv_down.into_iter().chain(o_down));
        pool.give_all([x, input_inverse, v, log_sums, attended, grad_normed, normed]);
        return Ok(());
    }
    let group = ProjectionGroup::new(&[&weights.o], shape.q_width(), shape);
    let mut grad_attended = shape.take_clean(pool, shape.q_width());
    let grad_lora_down = group.backward(&[grad_x], &mut grad_attended, pool)?;
    group.gradients(
        &[&layer.o],
        &[grad_x],
        &attended,
        &o_down,
        &grad_lora_down,
        trainable,
    )?;
    pool.give_all(o_down.into_iter().chain(grad_lora_down));
    let norms = (weights.q_norm.as_ref(), weights.k_norm.as_ref());
    let (mut q, raw_q) = q.rotated(norms.0, shape, pool)?;
    clear_tokens(&mut q, shape.q_width(), layout.averaging(weights.window));
    let (k, raw_k) = k.rotated(norms.1, shape, pool)?;
    let mut grad_q = shape.take_clean(pool, shape.q_width());
    let mut grad_k = shape.take_clean(pool, shape.kv_width());
    let mut grad_v = shape.take_clean(pool, shape.kv_width());
    attention_backward(
        Inputs {
            q: &q,
            k: &k,
            v: &v,
        },
        shape.heads,
        layout.spans(weights.window),
        (&attended, &log_sums, &grad_attended),
        &mut AttentionGradients {
            q: &mut grad_q,
            k: &mut grad_k,
            v: &mut grad_v,
        },
    );
    pool.give_all([attended, log_sums, grad_attended, q, k, v]);
    let norm = (norms.0, layer.q_norm.as_ref());
    let grad_q = rotate_backward(grad_q, raw_q, norm, context, trainable)?;
    let norm = (norms.1, layer.k_norm.as_ref());
    let grad_k = rotate_backward(grad_k, raw_k, norm, context, trainable)?;
    let parts = plain_parts(layer)?;
    let weight = weights.input_norm.floats()?;
    rms_norm_recompute(&x, weight, &input_inverse, &mut normed);
    let group = ProjectionGroup::new(&[&weights.q, &weights.k, &weights.v], hidden, shape);
    let grad_outs: [&[f32]; 3] = [&grad_q, &grad_k, &grad_v];
    let needed = wanted || parts.input_norm.weight.trained().is_some();
    let grad_lora_down = if needed {
        group.backward(&grad_outs, &mut grad_normed, pool)?
    } else {
        group.grad_lora_down(&grad_outs, pool)?
    };
    group.gradients(
        &[parts.q, parts.k, parts.v],
        &grad_outs,
        &normed,
        &qkv_down,
        &grad_lora_down,
        trainable,
    )?;
    pool.give_all(qkv_down.into_iter().chain(grad_lora_down));
    if needed {
        trainable.add(&parts.input_norm.weight, |sum| {
            rms_norm_grad_weight(&x, &input_inverse, &grad_normed, sum);
        })?;
        rms_norm_backward(&x, weight, &input_inverse, &grad_normed, grad_x);
    }
    pool.give_all([
        grad_q,
        grad_k,
        grad_v,
        grad_normed,
        normed,
        x,
        input_inverse,
    ]);
    Ok(())
}
