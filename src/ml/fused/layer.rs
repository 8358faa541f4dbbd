//! One layer, forward and backward.
//!
//! With `n1 = norm(x)`, `a = attention(rope(Wq n1), rope(Wk n1), Wv n1)`, `m = x + Wo a`, `n2 = norm(m)` and
//! `u = silu(Wg n2) * Wu n2`, the layer gives `m + Wd u`. Kept are `x`, `q`, `k`, `v`, `a`, `m`, the gate, the up projection and
//! each LoRA pair's narrow values; the norms and `u` are made again.

use candle_core::{DType, Device, Result};
use pipeline_kernels::attention::{
    Gradients as HeadGradients, Heads, Inputs, attention, attention_backward,
};
use pipeline_kernels::elementwise::{
    rms_norm, rms_norm_again, rms_norm_backward, rms_norm_weight, rope, swiglu, swiglu_backward,
};
use pipeline_kernels::panels::{LANES, fill, size};
use pipeline_kernels::product::Onto;

use super::layout::Layout;
use super::pool::Pool;
use super::projection::Set;
use super::weights::Layer;
use crate::ml::model::arch::Arch;
use crate::ml::model::linear::{Pass, Weight};
use crate::ml::model::{self, Gradients, Llama};

/// The sizes of a pass and what all layers share.
pub(super) struct Shape {
    pub(super) tokens: usize,
    pub(super) hidden: usize,
    inner: usize,
    heads: Heads,
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// For each token its place in the padded batches.
    pub(super) places: Vec<u64>,
    /// Whether products with the base's weights are in bf16.
    pub(super) half: bool,
    /// The tokens in front of this one are the adapter's; the others see the base alone.
    pub(super) adapted: usize,
}

impl Shape {
    pub(super) fn new(model: &Llama, layout: &Layout) -> Result<Self> {
        let half = model.compute == DType::BF16;
        Self::of(&model.arch, layout, &model.device, half)
    }

    pub(super) fn of(
        config: &Arch,
        layout: &Layout,
        device: &Device,
        in_bf16: bool,
    ) -> Result<Self> {
        let tokens = layout.ids.len();
        let half = config.head_dim / 2;
        let positions = layout.positions.iter().copied();
        let (cos, sin) = model::angles(config, positions, device)?;
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
            hidden: config.hidden_size,
            inner: config.intermediate_size,
            heads: Heads {
                queries: config.num_attention_heads,
                keys: config.num_key_value_heads,
                width: config.head_dim,
            },
            cos: panels(cos)?,
            sin: panels(sin)?,
            places: layout.flat.clone(),
            half: in_bf16,
            adapted: tokens,
        })
    }

    fn q_width(&self) -> usize {
        self.heads.queries * self.heads.width
    }

    fn kv_width(&self) -> usize {
        self.heads.keys * self.heads.width
    }

    fn take(&self, pool: &Pool, features: usize) -> Vec<f32> {
        pool.take(size(features, self.tokens))
    }

    /// A buffer whose lanes behind the last token are zero.
    fn take_clean(&self, pool: &Pool, features: usize) -> Vec<f32> {
        let mut buffer = self.take(pool, features);
        let last = buffer.len().saturating_sub(features * LANES);
        buffer[last..].fill(0.);
        buffer
    }

    fn rope(&self, x: &mut [f32], features: usize, back: bool) {
        let half = self.heads.width / 2;
        rope(x, features, &self.cos, &self.sin, half, back);
    }
}

/// Bytes that a pass keeps of each token for its backward.
pub(super) fn kept(model: &Llama, checkpointing: bool) -> usize {
    let config = &model.arch;
    let (queries, keys) = (config.num_attention_heads, config.num_key_value_heads);
    let input = config.hidden_size;
    let all = |layer: &model::Layer| {
        let linears = layer.linears().into_iter();
        let pairs = linears.filter_map(|linear| linear.lora.as_ref());
        let narrow = pairs.filter_map(|pair| pair.a.stored(Pass::INFER).dims().first());
        let attention = 2 * (queries + keys) * config.head_dim;
        2 * input + attention + 2 * config.intermediate_size + narrow.sum::<usize>()
    };
    let layers = model.layers.get(super::lowest(model)..).unwrap_or_default();
    let all = layers.iter().map(all);
    let floats = if checkpointing {
        input * layers.len() + all.max().unwrap_or(0)
    } else {
        all.sum()
    };
    floats * size_of::<f32>()
}

/// What a layer's backward needs.
pub(super) struct Saved {
    x: Vec<f32>,
    inverse1: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    log_sums: Vec<f32>,
    attended: Vec<f32>,
    middle: Vec<f32>,
    inverse2: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    /// Of q, k, v; o; gate, up; down.
    narrow: [Vec<Vec<f32>>; 4],
}

impl Saved {
    pub(super) fn give_back(self, pool: &Pool) {
        for buffer in [
            self.x,
            self.inverse1,
            self.q,
            self.k,
            self.v,
            self.log_sums,
            self.attended,
            self.middle,
            self.inverse2,
            self.gate,
            self.up,
        ] {
            pool.give(buffer);
        }
        for buffer in self.narrow.into_iter().flatten() {
            pool.give(buffer);
        }
    }
}

/// What a pass works with.
#[derive(Clone, Copy)]
pub(super) struct Work<'a> {
    pub(super) shape: &'a Shape,
    pub(super) layout: &'a Layout,
    pub(super) pool: &'a Pool,
}

/// Where gradients go.
pub(super) struct Trainable<'a> {
    pub(super) model: &'a Llama,
    pub(super) gradients: &'a mut Gradients,
}

impl Trainable<'_> {
    /// Adds a gradient if the weight is trained; `make` adds it to zeros of the weight's size.
    pub(super) fn add(&mut self, weight: &Weight, make: impl FnOnce(&mut [f32])) -> Result<()> {
        if let Some(var) = weight.trained() {
            let mut values = vec![0.; var.elem_count()];
            make(&mut values);
            self.gradients.add_values(self.model, var, values)?;
        }
        Ok(())
    }
}

/// Runs the layer. Without `whole`, for a backward alone, the last product is left out and the second result is empty.
pub(super) fn forward(
    layer: &Layer<'_>,
    Work {
        shape,
        layout,
        pool,
    }: Work<'_>,
    x: Vec<f32>,
    whole: bool,
) -> Result<(Saved, Vec<f32>)> {
    let (hidden, inner) = (shape.hidden, shape.inner);
    let mut normed = shape.take(pool, hidden);
    let mut inverse1 = shape.take(pool, 1);
    let weight = layer.input_norm.floats()?;
    rms_norm(&x, weight, layer.eps.0, &mut normed, &mut inverse1);
    let mut q = shape.take(pool, shape.q_width());
    let mut k = shape.take(pool, shape.kv_width());
    let mut v = shape.take(pool, shape.kv_width());
    let set = Set::new(&[&layer.q, &layer.k, &layer.v], hidden, shape);
    let narrow1 = set.forward(&normed, vec![&mut q, &mut k, &mut v], Onto::Zero, pool)?;
    shape.rope(&mut q, shape.q_width(), false);
    shape.rope(&mut k, shape.kv_width(), false);
    let mut attended = shape.take_clean(pool, shape.q_width());
    let mut log_sums = shape.take_clean(pool, shape.heads.queries);
    let inputs = Inputs {
        q: &q,
        k: &k,
        v: &v,
    };
    attention(
        inputs,
        shape.heads,
        &layout.spans,
        &mut attended,
        &mut log_sums,
    );
    let mut middle = shape.take(pool, hidden);
    let set = Set::new(&[&layer.o], shape.q_width(), shape);
    let narrow2 = set.forward(&attended, vec![&mut middle], Onto::Values(&x), pool)?;

    let mut inverse2 = shape.take(pool, 1);
    let weight = layer.post_norm.floats()?;
    rms_norm(&middle, weight, layer.eps.1, &mut normed, &mut inverse2);
    let mut gate = shape.take(pool, inner);
    let mut up = shape.take(pool, inner);
    let set = Set::new(&[&layer.gate, &layer.up], hidden, shape);
    let narrow3 = set.forward(&normed, vec![&mut gate, &mut up], Onto::Zero, pool)?;
    pool.give(normed);
    let mut unit = shape.take(pool, inner);
    swiglu(&gate, &up, &mut unit);
    let set = Set::new(&[&layer.down], inner, shape);
    let (narrow4, out) = if whole {
        let mut out = shape.take(pool, hidden);
        let onto = Onto::Values(&middle);
        (set.forward(&unit, vec![&mut out], onto, pool)?, out)
    } else {
        (set.narrow(&unit, pool)?, Vec::new())
    };
    pool.give(unit);
    let saved = Saved {
        x,
        inverse1,
        q,
        k,
        v,
        log_sums,
        attended,
        middle,
        inverse2,
        gate,
        up,
        narrow: [narrow1, narrow2, narrow3, narrow4],
    };
    Ok((saved, out))
}

/// The layer's two names: its weights held, and where its gradients go.
#[derive(Clone, Copy)]
pub(super) struct Both<'a, 'b> {
    pub(super) held: &'a Layer<'b>,
    pub(super) layer: &'a model::Layer,
}

/// Goes back through the layer: `of_x`, the gradient of what it gave, becomes that of what it took, if `wanted`; otherwise it goes
/// no further than what is trained.
pub(super) fn backward(
    Both { held, layer }: Both<'_, '_>,
    Work {
        shape,
        layout,
        pool,
    }: Work<'_>,
    saved: Saved,
    of_x: &mut [f32],
    wanted: bool,
    trainable: &mut Trainable<'_>,
) -> Result<()> {
    let (hidden, inner) = (shape.hidden, shape.inner);
    let Saved {
        x,
        inverse1,
        mut q,
        mut k,
        v,
        log_sums,
        attended,
        middle,
        inverse2,
        mut gate,
        mut up,
        narrow: [narrow1, narrow2, narrow3, narrow4],
    } = saved;

    // The gated unit.
    let mut unit = shape.take(pool, inner);
    let set = Set::new(&[&held.down], inner, shape);
    let slopes = set.backward(&[of_x], &mut unit, pool)?;
    swiglu_backward(&mut gate, &mut up, &mut unit); // gate and up are their gradients now, and unit itself
    set.gradients(&[&layer.down], &[of_x], &unit, &narrow4, &slopes, trainable)?;
    pool.give_all(narrow4.into_iter().chain(slopes));
    pool.give(unit);
    let mut normed = shape.take(pool, hidden);
    let weight = held.post_norm.floats()?;
    rms_norm_again(&middle, weight, &inverse2, &mut normed);
    let set = Set::new(&[&held.gate, &held.up], hidden, shape);
    let mut of_normed = shape.take(pool, hidden);
    let slopes = set.backward(&[&gate, &up], &mut of_normed, pool)?;
    let linears = [&layer.gate, &layer.up];
    set.gradients(
        &linears,
        &[&gate, &up],
        &normed,
        &narrow3,
        &slopes,
        trainable,
    )?;
    pool.give_all(narrow3.into_iter().chain(slopes));
    pool.give(gate);
    pool.give(up);
    trainable.add(&layer.post_norm.weight, |sum| {
        rms_norm_weight(&middle, &inverse2, &of_normed, sum);
    })?;
    rms_norm_backward(&middle, weight, &inverse2, &of_normed, of_x);
    pool.give(middle);
    pool.give(inverse2);

    // Attention.
    if !wanted && !layer.trains_attention() {
        let narrow = narrow1.into_iter().chain(narrow2);
        let rest = [x, inverse1, q, k, v, log_sums, attended, of_normed, normed];
        pool.give_all(narrow.chain(rest));
        return Ok(());
    }
    let set = Set::new(&[&held.o], shape.q_width(), shape);
    let mut of_attended = shape.take_clean(pool, shape.q_width());
    let slopes = set.backward(&[of_x], &mut of_attended, pool)?;
    set.gradients(
        &[&layer.o],
        &[of_x],
        &attended,
        &narrow2,
        &slopes,
        trainable,
    )?;
    pool.give_all(narrow2.into_iter().chain(slopes));
    let mut of_q = shape.take_clean(pool, shape.q_width());
    let mut of_k = shape.take_clean(pool, shape.kv_width());
    let mut of_v = shape.take_clean(pool, shape.kv_width());
    let inputs = Inputs {
        q: &q,
        k: &k,
        v: &v,
    };
    attention_backward(
        inputs,
        shape.heads,
        &layout.spans,
        (&attended, &log_sums, &of_attended),
        &mut HeadGradients {
            q: &mut of_q,
            k: &mut of_k,
            v: &mut of_v,
        },
    );
    for buffer in [attended, log_sums, of_attended, v] {
        pool.give(buffer);
    }
    shape.rope(&mut of_q, shape.q_width(), true);
    shape.rope(&mut of_k, shape.kv_width(), true);
    for buffer in [std::mem::take(&mut q), std::mem::take(&mut k)] {
        pool.give(buffer);
    }
    let weight = held.input_norm.floats()?;
    rms_norm_again(&x, weight, &inverse1, &mut normed);
    let set = Set::new(&[&held.q, &held.k, &held.v], hidden, shape);
    let outs: [&[f32]; 3] = [&of_q, &of_k, &of_v];
    let needed = wanted || layer.input_norm.weight.trained().is_some();
    let slopes = if needed {
        set.backward(&outs, &mut of_normed, pool)?
    } else {
        set.slopes(&outs, pool)?
    };
    let linears = [&layer.q, &layer.k, &layer.v];
    set.gradients(&linears, &outs, &normed, &narrow1, &slopes, trainable)?;
    pool.give_all(narrow1.into_iter().chain(slopes));
    if needed {
        trainable.add(&layer.input_norm.weight, |sum| {
            rms_norm_weight(&x, &inverse1, &of_normed, sum);
        })?;
        rms_norm_backward(&x, weight, &inverse1, &of_normed, of_x);
    }
    for buffer in [of_q, of_k, of_v, of_normed, normed, x, inverse1] {
        pool.give(buffer);
    }
    Ok(())
}
