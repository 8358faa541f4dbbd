//! A forward pass with one layer in memory at a time, for models that don't fit into memory.

use candle_core::{DType, Device, Tensor};

use super::super::adapter::Adapter;
use super::arch::Arch;
use super::autograd::scaled;
use super::batch::Batch;
use super::ends::{embedding_rows, with_lora_inputs};
use super::head::Head;
use super::layer::Shared;
use super::linear::Pass;
use super::load::Loader;
use super::rope::batch_angles;
use super::tensors::{EMBED_TOKENS, EMBEDDINGS, LM_HEAD, NormKind};
use super::{Masks, Trained};
use crate::ml::io::weights::Weights;

/// The rows of the head that are in f32 at a time.
const HEAD_ROWS: usize = 1 << 14;

/// The logits (batch, length, vocabulary) of a batch in f32, one tensor for each of `passes`, equal to what [`super::CausalLm::load`] and
/// [`super::CausalLm::hidden`] give. `layer_done` is called with the number of finished layers, and may stop with an error.
///
/// # Errors
/// A tensor is missing or has another shape, the adapter does not fit, or an id is outside the vocabulary.
pub fn logits_by_layer(
    arch: &Arch,
    weights: &Weights,
    adapter: Option<&Adapter>,
    batch: &Batch,
    passes: &[Pass],
    layer_done: &mut dyn FnMut(usize) -> anyhow::Result<()>,
) -> anyhow::Result<Vec<Tensor>> {
    let device = Device::Cpu;
    let tied = arch.tie_word_embeddings;
    let adapter = adapter.map(|adapter| adapter.beside(tied)).transpose()?;
    let adapter = adapter.as_deref();
    let mut loader = Loader::new(
        arch,
        weights,
        adapter,
        Trained::Nothing,
        DType::F32,
        &device,
    );
    let angles = batch_angles(arch, batch, &device)?;
    let masks = Masks::new(arch.layers.iter().map(|layer| layer.window), |window| {
        batch.mask(window, &device)
    })?;
    let shared = passes.iter().map(|&pass| Shared {
        angles: angles.clone(),
        masks: masks.clone(),
        pass: Pass {
            tape: false,
            ..pass
        },
    });
    let shared: Vec<Shared> = shared.collect();

    let ids = batch.ids(&device)?;
    let stored = loader.stored(EMBEDDINGS)?;
    let (table, pair) = (loader.embeddings(stored)?, loader.pair(EMBED_TOKENS)?);
    let states = shared.iter().map(|shared| {
        let rows = embedding_rows(&table, pair.as_ref(), &ids.flatten_all()?, shared.pass)?;
        let rows = scaled(rows, arch.embedding_scale)?;
        Ok(rows.reshape((ids.dim(0)?, batch.width, ()))?)
    });
    let mut states = states.collect::<anyhow::Result<Vec<Tensor>>>()?;
    drop(table);
    for number in 0..arch.num_hidden_layers() {
        let layer = loader.layer(number)?;
        for (state, shared) in states.iter_mut().zip(&shared) {
            *state = layer.forward(state, shared, &mut None)?;
        }
        layer_done(number + 1)?;
    }
    let norm = loader.norm(0, NormKind::Final)?;
    let stored = loader.stored(if tied { EMBEDDINGS } else { arch.head_name() })?;
    let weight = match loader.head(stored)? {
        Some(own) => own,
        None => loader.embeddings(stored)?,
    };
    let pair = loader.pair(LM_HEAD)?;
    let logits = states.iter().zip(&shared).map(|(state, shared)| {
        let state = norm.forward(state, shared.pass)?.flatten_to(1)?;
        let state = with_lora_inputs(state, pair.as_ref(), DType::F32, shared.pass)?;
        let weight = weight.value(shared.pass);
        let low = pair.as_ref().filter(|_| shared.pass.adapter);
        let low = low.map(|pair| pair.b.value(shared.pass));
        let parts = (0..arch.head_rows()).step_by(HEAD_ROWS).map(|from| {
            let count = HEAD_ROWS.min(arch.head_rows() - from);
            let head = Head {
                label_smoothing: 0.,
                weight: weight.narrow(0, from, count)?.to_dtype(DType::F32)?,
                low: low
                    .as_ref()
                    .map(|low| low.narrow(0, from, count))
                    .transpose()?,
                trains: false,
                scale: arch.logit_scale,
                softcap: arch.logit_softcap,
            };
            head.logits(&state)
        });
        let logits = Tensor::cat(&parts.collect::<candle_core::Result<Vec<_>>>()?, 1)?;
        Ok(logits.reshape((ids.dim(0)?, batch.width, ()))?)
    });
    logits.collect()
}
