//! From the folders of the inputs to a trained artifact.

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use anyhow::{Context as _, anyhow, ensure};
use candle_core::{DType, Device};

use crate::data::table::splits;
use crate::data::tokens::{self, TokenRow};
use crate::engine::Context;
use crate::ml::adapter::{Adapter, FILE};
use crate::ml::execution::{Execution, Kind};
use crate::ml::fused::Packing;
use crate::ml::io::folder::{METRICS, TRAINER_STATE};
use crate::ml::model::arch::Arch;
use crate::ml::model::batch::Row;
use crate::ml::model::{Llama, Trained, tied};
use crate::ml::train::save::{save_adapter, save_model};
use crate::ml::train::{Ending, Settings, Start, take_up, train, trainer_state};
use crate::stages::text::chat_template;
use crate::text::tokenizer::special_tokens;

/// The folders and splits of one training.
pub(in crate::stages) struct Job<'a> {
    pub(in crate::stages) model: &'a Path,
    pub(in crate::stages) adapter: Option<&'a Path>,
    pub(in crate::stages) dataset: &'a Path,
    pub(in crate::stages) train_split: &'a str,
    pub(in crate::stages) eval_split: &'a str,
    pub(in crate::stages) compute: DType,
    pub(in crate::stages) packing: Packing,
    pub(in crate::stages) cache_frozen_layers: bool,
}

/// The rows of a split, as `ml` knows them.
pub(in crate::stages) fn rows(
    dataset: &Path,
    split: &str,
    vocabulary: usize,
) -> anyhow::Result<Vec<Row>> {
    let read = tokens::read(dataset, split)?;
    let mut rows = Vec::with_capacity(read.len());
    for (number, row) in read.into_iter().enumerate() {
        let TokenRow {
            prompt_ids,
            chosen_ids,
            rejected_ids,
            rejected_prompt_ids,
        } = row;
        let all = [
            Some(&prompt_ids),
            Some(&chosen_ids),
            rejected_ids.as_ref(),
            rejected_prompt_ids.as_ref(),
        ];
        let largest = all.into_iter().flatten().flatten().max();
        ensure!(
            largest.is_none_or(|id| (*id as usize) < vocabulary),
            "row {} of the split `{split}` has the token id {}, but the model knows only {vocabulary} ids; was it tokenized for another model?",
            number + 1,
            largest.copied().unwrap_or_default(),
        );
        rows.push(Row {
            prompt: prompt_ids,
            chosen: chosen_ids,
            rejected: rejected_ids,
            rejected_prompt: rejected_prompt_ids,
            packed: Vec::new(),
        });
    }
    ensure!(!rows.is_empty(), "the split `{split}` has no rows");
    Ok(rows)
}

/// Whether a dataset has a split.
pub(in crate::stages) fn has_split(dataset: &Path, split: &str) -> anyhow::Result<bool> {
    Ok(splits(dataset)?.contains_key(split))
}

/// The id that fills batches up: the tokenizer's pad token, or what the model's config names.
pub(in crate::stages) fn pad_id(model: &Path, config: &Arch) -> u32 {
    let named = || {
        let special = special_tokens(model).ok()?;
        let pad = special.get("pad_token")?;
        Some(
            crate::stages::text::tokenizers::load(model)
                .ok()?
                .token(pad)
                .ok()?
                .id,
        )
    };
    let eos = config.eos_token_ids.first().copied();
    let pad = named().or(config.pad_token_id).or(eos).unwrap_or(0);
    if (pad as usize) < config.vocab_size {
        pad
    } else {
        0
    }
}

/// Says where the training starts, and puts it into the record.
fn tell_start(cx: &Context, start: &Start, done: u64, total: u64) {
    if let Start::After(step) = start
        && done >= *step
    {
        cx.note("continued_after_step", step);
    }
    cx.info(match (start, done) {
        (Start::After(step), done) if done == *step => format!(
            "goes on after step {done} of {total}, where an earlier training ended that differs in nothing but its length; \
             its steps are the same"
        ),
        (_, done) if done > 0 => format!("goes on after step {done} of {total}, from a checkpoint"),
        (Start::Not(step, why), _) => {
            cx.note("not_continued", why);
            format!(
                "starts at the beginning, {total} steps to go; the earlier training of {step} steps can't be gone on from: {why}"
            )
        }
        _ => format!("starts at the beginning, {total} steps to go"),
    });
}

/// Puts into the record why a model is not run the fast way, if it is not.
pub(in crate::stages) fn note_fallback(cx: &Context, execution: &Execution<'_>) {
    if let Some(why) = execution.fallback() {
        cx.note("reference_path", why);
        cx.info(format!(
            "runs on the slower reference path, for the fast one lacks something: {why}"
        ));
    }
}

/// Keeps what the frozen layers below the adapter give, and tells what that takes.
fn cache_frozen_layers(
    cx: &Context,
    execution: &Execution<'_>,
    rows: &[&[Row]],
) -> anyhow::Result<()> {
    let Some(frozen) = execution.keep_frozen_states(cx.scratch()?)? else {
        cx.warn(
            "`cache_frozen_layers` does nothing here: the lowest layer is trained, or something in the model or adapter is not computed \
             the fast way; hint: `layers_to_transform` of `attach_lora` puts an adapter on upper layers alone",
        );
        return Ok(());
    };
    let rows = rows.iter().flat_map(|rows| rows.iter());
    let tokens = rows.map(|row| {
        let rejected = row.rejected().map_or(0, |sequence| sequence.ids.len());
        row.chosen().ids.len() + rejected
    });
    let bytes = tokens.sum::<usize>() * execution.model().arch.hidden_size * size_of::<f32>();
    cx.note("cached_frozen_layers", frozen);
    cx.info(format!(
        "keeps what the lowest {frozen} layers give of each sequence for its next epoch: up to {} MB on disk",
        bytes.div_ceil(1_000_000)
    ));
    Ok(())
}

/// Trains, and fills the stage's output folder. `prepare` turns rows as they are stored into rows to train on.
pub(in crate::stages) fn run(
    cx: &Context,
    job: &Job<'_>,
    mut settings: Settings,
    prepare: &dyn Fn(Vec<Row>) -> anyhow::Result<Vec<Row>>,
) -> anyhow::Result<()> {
    let (config, weights) = tied::open(job.model)?;
    settings.pad = pad_id(job.model, &config);
    job.train_split.clone_into(&mut settings.split);
    ensure!(
        config.attention_dropout <= 0.,
        "the model's `config.json` has `attention_dropout` {}, which drops attention weights in trainings by transformers and is not \
         computed here; hint: set it to 0 there if it is not meant",
        config.attention_dropout
    );
    settings.sources = vec![("model", job.model.to_path_buf())];
    let adapter_file = job.adapter.map(|adapter| ("adapter", adapter.join(FILE)));
    settings.sources.extend(adapter_file);
    let adapter = job.adapter.map(Adapter::load).transpose()?;
    let trained = if adapter.is_some() {
        Trained::Adapter
    } else {
        Trained::Everything
    };
    // Rows that can't be trained on are told before the weights are read.
    let read = |split| rows(job.dataset, split, config.vocab_size).and_then(prepare);
    let train_rows = read(job.train_split)?;
    let eval_rows = if settings.eval_every.is_some() {
        read(job.eval_split)?
    } else {
        Vec::new()
    };
    let device = Device::Cpu;
    let model = Llama::load(
        &config,
        &weights,
        adapter.as_ref(),
        trained,
        job.compute,
        &device,
    )?;
    drop(weights);
    let execution = Execution::new(&model, Kind::Fused(job.packing));
    note_fallback(cx, &execution);
    if job.cache_frozen_layers {
        cache_frozen_layers(cx, &execution, &[&train_rows, &eval_rows])?;
    }
    cx.note("rows", train_rows.len());
    let count = model.parameters.iter().map(|p| p.var.elem_count());
    cx.note("trained_parameters", count.sum::<usize>());
    cx.note("steps", settings.total_steps(train_rows.len()));

    settings.leave = Some(cx.continuation()?);
    let start = take_up(
        cx.scratch()?,
        &cx.continuations()?,
        &settings,
        train_rows.len(),
    )?;
    let (mut tokens, mut computed, mut began) = (0u64, 0u64, false);
    let ending = train(
        &execution,
        &train_rows,
        &eval_rows,
        &settings,
        Some(cx.scratch()?),
        &mut |step| {
            for passed_over in &step.passed_over {
                cx.warn(passed_over);
            }
            if !began {
                began = true;
                tell_start(cx, &start, step.step, step.total);
            }
            if let Some(fault) = &step.skipped {
                cx.warn(format!("left out an update: {fault}"));
            }
            tokens += step.tokens as u64;
            computed += step.computed as u64;
            cx.progress(step.step, Some(step.total), "steps");
            for log in &step.logs {
                let mut values = log.values.clone();
                values.insert("epoch".into(), log.epoch);
                cx.metrics(log.step, values);
            }
            if cx.cancelled() {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        },
    )?;
    cx.note("tokens", tokens);
    cx.note("computed_tokens", computed);
    let Ending::Finished {
        history,
        step,
        skipped,
        best,
    } = &ending
    else {
        cx.check_cancelled()?;
        return Err(anyhow!("interrupted"));
    };
    cx.note("skipped_nan_steps", skipped);
    if let Some(watch) = &settings.watch {
        cx.note("finished_steps", step);
        cx.note("best_step", best.step);
        cx.note("best_metric", best.metric);
        let total = settings.total_steps(train_rows.len());
        if *step < total {
            cx.info(format!(
                "stopped early after step {step} of {total}: `{}` has not become better for {} evaluations",
                watch.metric, best.worse
            ));
        }
    }
    if let Some(adapter) = adapter {
        save_adapter(&model, adapter, cx.out())?;
        chat_template::carry(job.dataset, cx.out())?;
    } else {
        save_model(&model, job.model, cx.out())?;
        if let Some(template) = chat_template::read(job.dataset)? {
            chat_template::install(cx, &template)?;
        }
    }
    let metrics: String = history.iter().map(|log| log.line() + "\n").collect();
    let state = trainer_state(&ending, &settings, train_rows.len())?;
    for (name, text) in [(METRICS, metrics), (TRAINER_STATE, state)] {
        fs::write(cx.out().join(name), text)
            .with_context(|| format!("could not write `{name}`"))?;
    }
    Ok(())
}
