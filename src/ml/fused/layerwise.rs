//! A forward pass over a model folder with one layer in memory at a time, for models that don't fit into memory.
//!
//! The weights of a layer are read when it is its turn and used in the type in which they are stored; only f16 is converted to f32. Sums are
//! in f32. The counterpart of the reference path is [`crate::ml::model::logits_by_layer`].

use std::ops::Range;

use anyhow::{Context as _, ensure};
use candle_core::{DType, Device, Tensor};
use half::slice::HalfFloatSliceExt as _;
use half::{bf16, f16};
use pipeline_kernels::elementwise::{rms_norm, scale};
use pipeline_kernels::matrix::{Matrix, Values};
use pipeline_kernels::panels::{fill, size};
use pipeline_kernels::vectors;
use rayon::prelude::*;

use super::layer;
use super::layout::Layout;
use super::shape::{PassContext, Shape};
use super::weights::{
    BaseWeight, Layer, NormView, Norms, Pair, Projection, TensorView, activation, scores,
};
use super::{Cpu, Packing};
use crate::ml::adapter::Adapter;
use crate::ml::io::float::Float;
use crate::ml::io::weights::{RawTensor, Weights};
use crate::ml::model::arch::{Arch, Projection as Role};
use crate::ml::model::batch::Batch;
use crate::ml::model::tensors::{
    EMBEDDINGS, NormKind, bias_name, layer_norms, norm_path, norm_shape, projection_path,
    weight_name,
};
use crate::ml::quant::nf4::Nf4;

/// The number of values that a thread converts at once.
const SPAN: usize = 1 << 14;

/// A norm, if there is one.
fn view(norm: Option<&Tensor>, eps: f32) -> Option<NormView<'_>> {
    norm.map(|norm| NormView::new(norm, eps))
}

/// A model folder and an adapter for it.
#[derive(Clone, Copy)]
pub(in crate::ml) struct MappedModel<'a> {
    pub(in crate::ml) arch: &'a Arch,
    pub(in crate::ml) weights: &'a Weights,
    pub(in crate::ml) adapter: Option<&'a Adapter>,
}

/// A weight of a folder.
pub(in crate::ml) enum WeightSource {
    Floats(Vec<f32>, (usize, usize)),
    Halves(Vec<bf16>, (usize, usize)),
    Nf4(Nf4),
}

impl WeightSource {
    fn source(&self) -> anyhow::Result<BaseWeight<'_>> {
        let (values, (rows, columns)) = match self {
            Self::Floats(values, shape) => (Values::F32(values), *shape),
            Self::Halves(values, shape) => (Values::Bf16(values), *shape),
            Self::Nf4(weight) => return Ok(BaseWeight::Nf4(weight)),
        };
        let matrix = Matrix::new(values, rows, columns);
        let matrix = matrix.context("a weight has another size than its shape")?;
        Ok(BaseWeight::Bare(matrix))
    }

    /// The matrix (out, in).
    pub(in crate::ml) fn matrix(&self) -> anyhow::Result<Matrix<'_>> {
        match self.source()? {
            BaseWeight::Bare(matrix) => Ok(matrix),
            _ => anyhow::bail!("a weight in 4 bits is not expected here"),
        }
    }
}

/// A projection's weight, its bias, and its pair with its scaling.
struct Module {
    base: WeightSource,
    bias: Option<Tensor>,
    pair: Option<(Tensor, Tensor, f32)>,
}

impl Module {
    fn borrow(&self) -> anyhow::Result<Projection<'_>> {
        let pair = self.pair.as_ref();
        let pair = pair.map(|(a, b, scaling)| Pair::new(a, b, *scaling));
        let bias = self.bias.as_ref().map(TensorView::tensor);
        Ok(Projection::new(
            self.base.source()?,
            bias,
            pair.transpose()?,
        ))
    }
}

impl<'a> MappedModel<'a> {
    /// Whether the kernels support the adapter: no `DoRA`, no fully trained modules.
    pub(in crate::ml) fn is_supported(&self) -> bool {
        self.adapter.is_none_or(Adapter::is_lora_only)
    }

    /// The final hidden states after the norm, in panels of the hidden size: those of the tokens of all `batches`, one after the other
    /// without padding. The adapter applies to the first `lora_tokens` tokens. `layer_done` is called with the number of finished layers, and
    /// may stop with an error.
    ///
    /// # Errors
    /// A tensor is missing or has another shape, or an id is outside the vocabulary.
    pub(in crate::ml) fn hidden(
        &self,
        batches: &[&Batch],
        lora_tokens: usize,
        layer_done: &mut dyn FnMut(usize) -> anyhow::Result<()>,
    ) -> anyhow::Result<Vec<f32>> {
        let packing = Packing {
            padding_free: true,
            share_prompts: false,
        };
        let mut layout = Layout::new(batches, packing);
        layout.add_windows(self.arch.layers.iter().filter_map(|layer| layer.window));
        let cpu = Cpu::default();
        let mut shape = Shape::from_arch(self.arch, &layout, &cpu, false)?;
        shape.lora_tokens = lora_tokens;
        let work = PassContext {
            shape: &shape,
            layout: &layout,
            device: &cpu,
        };
        let mut x = self.embed(&layout.ids)?;
        for number in 0..self.arch.num_hidden_layers() {
            x = self.layer(number, work, x)?;
            layer_done(number + 1)?;
        }
        let norm = self.norm(0, NormKind::Final)?;
        let (mut hidden, mut inverse) = (vec![0.; x.len()], vec![0.; size(1, shape.tokens)]);
        let eps = self.arch.rms_norm_eps as f32;
        let weight = TensorView::tensor(&norm);
        rms_norm(&x, weight.floats()?, eps, &mut hidden, &mut inverse);
        Ok(hidden)
    }

    /// Scales and caps logits, the products of the head and the hidden states, in any order.
    pub(in crate::ml) fn finish_logits(&self, logits: &mut [f32]) {
        let (scale, softcap) = (self.arch.logit_scale as f32, self.arch.logit_softcap);
        logits.par_chunks_mut(SPAN).for_each(|logits| {
            vectors::scale(logits, scale);
            if let Some(cap) = softcap {
                vectors::soft_cap(logits, cap as f32);
            }
        });
    }

    fn layer(
        &self,
        number: usize,
        work: PassContext<'_, Cpu>,
        x: Vec<f32>,
    ) -> anyhow::Result<Vec<f32>> {
        let arch = self.arch;
        let modules = |roles: &[Role]| -> anyhow::Result<Vec<Module>> {
            let own = roles
                .iter()
                .filter(|role| arch.projections().contains(role));
            own.map(|role| self.module(number, *role)).collect()
        };
        let qkv = modules(&[Role::Q, Role::K, Role::V, Role::Qkv])?;
        let gate_up = modules(&[Role::Gate, Role::Up, Role::GateUp])?;
        let (o, down) = (
            self.module(number, Role::O)?,
            self.module(number, Role::Down)?,
        );
        let own = layer_norms(arch);
        let read = |norm: NormKind| {
            let there = own.contains(&norm);
            there.then(|| self.norm(number, norm)).transpose()
        };
        let (input, q, k) = (
            read(NormKind::Input)?,
            read(NormKind::Query)?,
            read(NormKind::Key)?,
        );
        let post_attention = read(NormKind::PostAttention)?;
        let pre_feedforward = read(NormKind::PreFeedforward)?;
        let post_feedforward = read(NormKind::PostFeedforward)?;
        let eps = arch.rms_norm_eps as f32;
        let described = arch.layers.get(number).copied().unwrap_or_default();
        let layer = Layer {
            qkv: qkv
                .iter()
                .map(Module::borrow)
                .collect::<anyhow::Result<_>>()?,
            o: o.borrow()?,
            gate_up: gate_up
                .iter()
                .map(Module::borrow)
                .collect::<anyhow::Result<_>>()?,
            down: down.borrow()?,
            norms: Norms {
                input: view(input.as_ref(), eps),
                q: view(q.as_ref(), eps),
                k: view(k.as_ref(), eps),
                post_attention: view(post_attention.as_ref(), eps),
                pre_feedforward: view(pre_feedforward.as_ref(), eps),
                post_feedforward: view(post_feedforward.as_ref(), eps),
            },
            window: described.window,
            rope: described.rope,
            scores: scores(arch.score_scale, arch.score_softcap),
            activation: activation(arch.activation),
            residual_scale: arch.residual_scale as f32,
        };
        let (saved, out) = layer::forward(&layer, work, x, true)?;
        saved.give_back(work.device);
        Ok(out)
    }

    fn module(&self, layer: usize, role: Role) -> anyhow::Result<Module> {
        let shape = self.arch.shape(role);
        let path = projection_path(layer, role);
        let name = weight_name(&path);
        let base = match Nf4::load(self.weights, &name)? {
            Some(nf4) => {
                ensure!(
                    nf4.shape == shape,
                    "the tensor `{name}` has the shape {:?}, expected {shape:?} from config.json",
                    nf4.shape
                );
                WeightSource::Nf4(nf4)
            }
            None => self.rows(&name, shape, 0..shape.0)?,
        };
        let adapter = self.adapter.and_then(|adapter| {
            let pair = adapter.tensors.get(&path)?;
            Some((pair, adapter.config.scaling(&path) as f32))
        });
        let pair = adapter.map(|(pair, scaling)| -> candle_core::Result<_> {
            let f32 = |tensor: &Tensor| tensor.to_dtype(DType::F32)?.contiguous();
            Ok((f32(&pair.a)?, f32(&pair.b)?, scaling))
        });
        let bias = if self.arch.has_bias(role) {
            Some(self.vector(&bias_name(&path), shape.0)?)
        } else {
            None
        };
        Ok(Module {
            base,
            bias,
            pair: pair.transpose()?,
        })
    }

    fn shaped(&self, name: &str, shape: &[usize]) -> anyhow::Result<(Float, RawTensor<'a>)> {
        let raw = self.weights.raw(name)?;
        ensure!(
            raw.shape == shape,
            "the tensor `{name}` has the shape {:?}, expected {shape:?} from config.json",
            raw.shape
        );
        let float = Float::from_safetensors(raw.dtype).with_context(|| {
            let dtype = raw.dtype;
            format!("the tensor `{name}` is stored as {dtype:?}, expected F32, F16 or BF16")
        })?;
        Ok((float, raw))
    }

    /// Reads some rows of a dense weight (height, depth).
    fn rows(
        &self,
        name: &str,
        (height, depth): (usize, usize),
        rows: Range<usize>,
    ) -> anyhow::Result<WeightSource> {
        let (float, raw) = self.shaped(name, &[height, depth])?;
        let shape = (rows.len(), depth);
        let (first, count) = (rows.start * depth, rows.len() * depth);
        Ok(match float {
            Float::F32 => WeightSource::Floats(raw.values_from(first, count)?, shape),
            Float::BF16 => WeightSource::Halves(raw.values_from(first, count)?, shape),
            Float::F16 => {
                let halves: Vec<f16> = raw.values_from(first, count)?;
                let mut values = vec![0f32; count];
                values
                    .par_chunks_mut(SPAN)
                    .zip(halves.par_chunks(SPAN))
                    .for_each(|(values, halves)| halves.convert_to_f32_slice(values));
                WeightSource::Floats(values, shape)
            }
        })
    }

    /// Reads the head's weight (vocabulary, hidden) if it is stored in 4 bits.
    pub(in crate::ml) fn head_in_4_bits(&self) -> anyhow::Result<Option<Nf4>> {
        let (name, shape) = (
            self.head_name(),
            (self.arch.head_rows(), self.arch.hidden_size),
        );
        let head = Nf4::load(self.weights, name)?;
        if let Some(head) = &head {
            ensure!(
                head.shape == shape,
                "the tensor `{name}` has the shape {:?}, expected {shape:?} from config.json",
                head.shape
            );
        }
        Ok(head)
    }

    /// Reads some rows of the head's weight (vocabulary, hidden), which is `packed` if it is stored in 4 bits.
    pub(in crate::ml) fn head(
        &self,
        packed: Option<&Nf4>,
        rows: Range<usize>,
    ) -> anyhow::Result<WeightSource> {
        let shape = (self.arch.head_rows(), self.arch.hidden_size);
        let Some(packed) = packed else {
            return self.rows(self.head_name(), shape, rows);
        };
        let shape = (rows.len(), shape.1);
        let mut values = vec![0f32; shape.0 * shape.1];
        packed.dequantise_rows(rows, &mut values);
        Ok(WeightSource::Floats(values, shape))
    }

    fn head_name(&self) -> &'static str {
        if self.arch.tie_word_embeddings {
            EMBEDDINGS
        } else {
            self.arch.head_name()
        }
    }

    fn norm(&self, layer: usize, norm: NormKind) -> anyhow::Result<Tensor> {
        let name = weight_name(&norm_path(self.arch, layer, norm));
        let weight = self.vector(&name, norm_shape(self.arch, norm))?;
        if self.arch.norm_adds_one {
            Ok((weight + 1.)?)
        } else {
            Ok(weight)
        }
    }

    /// Reads a tensor of `length` elements, in f32.
    fn vector(&self, name: &str, length: usize) -> anyhow::Result<Tensor> {
        self.shaped(name, &[length])?;
        let tensor = self.weights.tensor(name, &Device::Cpu)?;
        Ok(tensor.to_dtype(DType::F32)?)
    }

    /// The embeddings of the tokens, in panels of the hidden size.
    fn embed(&self, ids: &[u32]) -> anyhow::Result<Vec<f32>> {
        let width = self.arch.hidden_size;
        let (float, raw) = self.shaped(EMBEDDINGS, &[self.arch.vocab_size, width])?;
        let mut rows = vec![0f32; ids.len() * width];
        let mut bytes = vec![0; width * float.size()];
        for (row, &id) in rows.chunks_mut(width.max(1)).zip(ids) {
            ensure!(
                (id as usize) < self.arch.vocab_size,
                "the id {id} lies outside the vocabulary of {}",
                self.arch.vocab_size
            );
            raw.read(id as usize * bytes.len(), &mut bytes)?;
            float.read(&bytes, row);
        }
        scale(&mut rows, self.arch.embedding_scale as f32);
        let mut out = vec![0f32; size(width, ids.len())];
        fill(&mut out, width, ids.len(), |token| {
            rows.get(token * width..(token + 1) * width)
                .unwrap_or_default()
        });
        Ok(out)
    }
}
