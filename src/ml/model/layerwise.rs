//! A forward pass with one layer in memory at a time, for models that are too large to hold.

use candle_core::{DType, Device, Tensor};

use super::super::adapter::{Adapter, ENDS};
use super::arch::Arch;
use super::batch::Batch;
use super::ends::{looked_up, widened};
use super::head::Head;
use super::linear::Pass;
use super::load::Loader;
use super::tied::{EMBEDDINGS, HEAD};
use super::{Shared, Trained, angles};
use crate::ml::io::weights::Weights;

/// Rows of the head that are in f32 at a time.
const HEAD_ROWS: usize = 1 << 14;

/// The logits (batch, length, vocabulary) of a batch in f32, one tensor for each of `passes`: what [`super::Llama::load`] and
/// [`super::Llama::hidden`] lead to. `layer_done` is told the number of layers that are done, and may stop.
pub fn logits_by_layer(
    config: &Arch,
    weights: &Weights,
    adapter: Option<&Adapter>,
    batch: &Batch,
    passes: &[Pass],
    layer_done: &mut dyn FnMut(usize) -> anyhow::Result<()>,
) -> anyhow::Result<Vec<Tensor>> {
    let device = Device::Cpu;
    let tied = config.tie_word_embeddings;
    let adapter = adapter.map(|adapter| adapter.beside(tied)).transpose()?;
    let adapter = adapter.as_deref();
    let mut loader = Loader::new(
        config,
        weights,
        adapter,
        Trained::Nothing,
        DType::F32,
        &device,
    );
    let (cos, sin) = angles(config, 0..batch.width, &device)?;
    let mask = batch.mask(&device)?;
    let shared = passes.iter().map(|&pass| Shared {
        cos: cos.clone(),
        sin: sin.clone(),
        mask: mask.clone(),
        pass: Pass {
            tape: false,
            ..pass
        },
    });
    let shared: Vec<Shared> = shared.collect();

    let ids = batch.ids(&device)?;
    let stored = loader.stored(EMBEDDINGS)?;
    let (table, pair) = (loader.embeddings(stored)?, loader.pair(ENDS[0])?);
    let states = shared.iter().map(|shared| {
        let rows = looked_up(&table, pair.as_ref(), &ids.flatten_all()?, shared.pass)?;
        Ok(rows.reshape((ids.dim(0)?, batch.width, ()))?)
    });
    let mut states = states.collect::<anyhow::Result<Vec<Tensor>>>()?;
    drop(table);
    for number in 0..config.num_hidden_layers() {
        let layer = loader.layer(number)?;
        for (state, shared) in states.iter_mut().zip(&shared) {
            *state = layer.forward(state, shared, &mut None)?;
        }
        layer_done(number + 1)?;
    }
    let norm = loader.norm("model.norm")?;
    let stored = loader.stored(if tied { EMBEDDINGS } else { HEAD })?;
    let weight = match loader.head(stored)? {
        Some(own) => own,
        None => loader.embeddings(stored)?,
    };
    let pair = loader.pair(ENDS[1])?;
    let logits = states.iter().zip(&shared).map(|(state, shared)| {
        let state = norm.forward(state, shared.pass)?.flatten_to(1)?;
        let state = widened(state, pair.as_ref(), DType::F32, shared.pass)?;
        let weight = weight.value(shared.pass);
        let low = pair.as_ref().filter(|_| shared.pass.adapter);
        let low = low.map(|pair| pair.b.value(shared.pass));
        let parts = (0..config.vocab_size).step_by(HEAD_ROWS).map(|from| {
            let count = HEAD_ROWS.min(config.vocab_size - from);
            let head = Head {
                weight: weight.narrow(0, from, count)?.to_dtype(DType::F32)?,
                low: low
                    .as_ref()
                    .map(|low| low.narrow(0, from, count))
                    .transpose()?,
                trains: false,
            };
            head.logits(&state)
        });
        let logits = Tensor::cat(&parts.collect::<candle_core::Result<Vec<_>>>()?, 1)?;
        Ok(logits.reshape((ids.dim(0)?, batch.width, ()))?)
    });
    logits.collect()
}
