//! Reward models: models with [`Arch::scores`](crate::ml::model::arch::Arch::scores), made of causal language models, and the scores that
//! they give.

use std::borrow::Cow;
use std::path::Path;

use anyhow::{bail, ensure};
use candle_core::{Device, Tensor};
use serde_json::{Value, json};

use super::execution::Execution;
use super::io::float::Float;
use super::io::folder::CONFIG;
use super::io::rewrite::{Output, Written, rewrite};
use super::io::weights::{Entry, bytes};
use super::loss::reward::end;
use super::model::batch::{Batch, Sequence};
use super::model::linear::Pass;
use super::model::tensors::{EMBEDDINGS, HEAD, NormKind, SCORE, norm_path, weight_name};
use super::model::tied;
use super::threads::in_pool;
use super::torch_rng::TorchRng;

/// The scores of sequences, each at its last token, `batch_size` at a time and padded with the id `pad`; with the adapter or without, as
/// `pass` says. `report` is called with the number of finished sequences, and may stop with an error.
///
/// # Errors
/// The model is no reward model, a sequence is empty, the pass fails, or `report` returns an error.
pub fn score(
    execution: &Execution<'_>,
    sequences: &[Sequence],
    batch_size: usize,
    pad: u32,
    pass: Pass,
    report: &mut dyn FnMut(usize) -> anyhow::Result<()>,
) -> anyhow::Result<Vec<f32>> {
    ensure!(
        execution.model().arch.scores,
        "the model gives logits and no scores; expected a reward model, with a `{SCORE}`"
    );
    let mut scores = Vec::with_capacity(sequences.len());
    for sequences in sequences.chunks(batch_size.max(1)) {
        let batch = Batch::new(sequences.to_vec(), pad)?;
        let ends = (0..sequences.len()).filter_map(|row| end(&batch, row));
        let ends: Vec<_> = ends.collect();
        let found = in_pool(|| -> anyhow::Result<Vec<f64>> {
            let forward = execution.forward(&[&batch], pass, false)?;
            Ok(forward.target_mean_logits(&ends)?)
        })?;
        scores.extend(found.into_iter().map(|score| score as f32));
        report(scores.len())?;
    }
    Ok(scores)
}

/// Writes the causal language model in `source` to the folder `out` with a new head that gives scores in the place of its own, as
/// transformers' `AutoModelForSequenceClassification.from_pretrained` with `num_labels: 1` makes it: the weight is drawn from the normal
/// distribution with a mean of 0 and the standard deviation `range` (`initializer_range`), by the numbers after
/// `torch.manual_seed(seed)`. `pad` becomes the id of padding in `config.json`, by which transformers finds the last token.
///
/// `progress` is called with the bytes of weights that were written and their total, and may stop with an error.
///
/// # Errors
/// The model has such a head already or is too small, or a file can't be read or written.
pub fn add_score_head(
    source: &Path,
    out: &Path,
    range: f64,
    seed: u64,
    pad: u32,
    progress: &mut dyn FnMut(u64, u64) -> anyhow::Result<()>,
) -> anyhow::Result<Vec<Written>> {
    let (arch, weights) = tied::open(source)?;
    ensure!(
        !arch.scores,
        "the model has a head that gives scores already (`{SCORE}`)"
    );
    let values = TorchRng::new(seed).normal(arch.hidden_size)?;
    let values: Vec<f32> = values.iter().map(|x| x * range as f32).collect();
    let score = Tensor::from_vec(values, (1, arch.hidden_size), &Device::Cpu)?;
    // In the type of the norms: embeddings and head may be stored in 4 bits, and these never are.
    let like = weights
        .raw(&weight_name(&norm_path(&arch, 0, NormKind::Final)))?
        .dtype;
    ensure!(
        Float::from_safetensors(like).is_some(),
        "the model's norms are no floats"
    );
    // It stands in the place of the head, or of the embeddings that are the head.
    let place = if weights.contains(HEAD) {
        HEAD
    } else {
        EMBEDDINGS
    };
    let total = weights.bytes();
    let outputs = |name: &str| {
        let mut outputs = Vec::new();
        let is_head = name == HEAD
            || name
                .strip_prefix(HEAD)
                .is_some_and(|rest| rest.starts_with('.'));
        if !is_head {
            outputs.push(Output::same(&weights, name)?);
        }
        if name == place {
            let score = score.to_dtype(like.try_into()?)?;
            let entry = Entry::new(SCORE, like, score.dims());
            outputs.push(Output::whole(entry, move || Ok(Cow::Owned(bytes(&score)?))));
        }
        Ok(outputs)
    };
    let mut done = 0;
    let files = rewrite(&weights, out, outputs, &mut |name| {
        done += weights.size_of(name);
        progress(done, total)
    })?;
    let mut unknown = None;
    tied::carry(source, out, false, |settings| {
        let names = settings
            .get_mut("architectures")
            .and_then(Value::as_array_mut);
        let name = names.and_then(|names| names.first_mut());
        let causal = name.as_ref().and_then(|name| name.as_str());
        let causal = causal.unwrap_or_default().to_owned();
        match (causal.strip_suffix("ForCausalLM"), name) {
            (Some(stem), Some(name)) => *name = json!(format!("{stem}ForSequenceClassification")),
            _ => unknown = Some(causal),
        }
        settings.insert("id2label".into(), json!({"0": "LABEL_0"}));
        settings.insert("label2id".into(), json!({"LABEL_0": 0}));
        settings.insert("pad_token_id".into(), json!(pad));
    })?;
    if let Some(found) = unknown {
        bail!(
            "`architectures` in `{CONFIG}` is `{found}`, expected a causal language model (`LlamaForCausalLM`)"
        );
    }
    Ok(files)
}
