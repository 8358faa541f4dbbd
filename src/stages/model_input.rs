//! The inputs of stages that run a model: rows of token ids, the id of padding, and the backend.

use std::path::Path;

use anyhow::{anyhow, ensure};
use serde_json::json;

use super::text::tokenizers;
use crate::data::table::splits;
use crate::data::tokens::{self, TokenRow};
use crate::engine::{Context, DeviceChoice, Implied, ImpliedBy};
use crate::ml::execution::{Execution, Kind};
use crate::ml::fused::Packing;
use crate::ml::model::CausalLm;
use crate::ml::model::arch::Arch;
use crate::ml::model::batch::Row;
use crate::ml::place::{Place, Wanted};
use crate::text::tokenizer::special_tokens;

/// The `model` of a stage that has an `adapter` is the one that the adapter was made for, unless the recipe gives another.
pub(in crate::stages) const BASE_OF_ADAPTER: &[Implied] = &[Implied {
    parameter: "model",
    unless: &[],
    with: &[],
    sources: &[ImpliedBy::Input {
        input: "adapter",
        parameter: "model",
        before: None,
    }],
}];

/// Row `number`, from 1, of a split, as `ml` reads it.
pub(in crate::stages) fn row(
    row: TokenRow,
    number: usize,
    split: &str,
    vocabulary: usize,
) -> anyhow::Result<Row> {
    let TokenRow {
        prompt_ids,
        chosen_ids,
        rejected_ids,
        rejected_prompt_ids,
        assistant_masks,
        label,
        margin,
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
        "row {number} of the split `{split}` has the token id {}, but the model knows only {vocabulary} ids; was it tokenized for another model?",
        largest.copied().unwrap_or_default(),
    );
    let mask = assistant_masks
        .map(|mask| {
            ensure!(
                mask.len() == prompt_ids.len() + chosen_ids.len(),
                "row {number} of the split `{split}` has {} ids and a mask for {}",
                prompt_ids.len() + chosen_ids.len(),
                mask.len()
            );
            Ok(mask.into_iter().map(|learnt| learnt != 0).collect())
        })
        .transpose()?;
    Ok(Row {
        mask,
        prompt: prompt_ids,
        chosen: chosen_ids,
        rejected: rejected_ids,
        rejected_prompt: rejected_prompt_ids,
        label,
        margin,
        ..Row::default()
    })
}

/// The rows of a split, as `ml` reads them.
pub(in crate::stages) fn rows(
    dataset: &Path,
    split: &str,
    vocabulary: usize,
) -> anyhow::Result<Vec<Row>> {
    let read = tokens::read(dataset, split)?;
    let mut rows = Vec::with_capacity(read.len());
    for (tokens, number) in read.into_iter().zip(1..) {
        rows.push(row(tokens, number, split, vocabulary)?);
    }
    ensure!(!rows.is_empty(), "the split `{split}` has no rows");
    Ok(rows)
}

/// The split that an evaluation reads: `given`, or `test`, or `train` where there is no `test`.
pub(in crate::stages) fn split_or_test(
    dataset: &Path,
    given: Option<&str>,
) -> anyhow::Result<String> {
    Ok(match given {
        Some(split) => split.to_owned(),
        None if splits(dataset)?.contains_key("test") => "test".to_owned(),
        None => "train".to_owned(),
    })
}

/// The id of padding: that of the tokenizer's pad token, or the one in the model's configuration.
pub(in crate::stages) fn pad_id(model: &Path, config: &Arch) -> u32 {
    let named = || {
        let special = special_tokens(model).ok()?;
        let pad = special.get("pad_token")?;
        Some(tokenizers::load(model).ok()?.token(pad).ok()?.id)
    };
    let eos = config.eos_token_ids.first().copied();
    let pad = named().or(config.pad_token_id).or(eos).unwrap_or(0);
    if (pad as usize) < config.vocab_size {
        pad
    } else {
        0
    }
}

/// Opens the device that a stage is told to compute on.
pub(in crate::stages) fn place(cx: &Context) -> anyhow::Result<Place> {
    let device = cx.device();
    let wanted = match device {
        DeviceChoice::Cpu => Wanted::Cpu,
        DeviceChoice::Auto => Wanted::Auto,
        DeviceChoice::Gpu(number) => Wanted::Gpu(number),
    };
    let place = Place::open(wanted).map_err(|why| no_device(device, &why))?;
    if let Some(why) = place.instead() {
        cx.info(format!("computes on the processor: {why}"));
    }
    Ok(place)
}

fn no_device(device: DeviceChoice, why: &str) -> anyhow::Error {
    anyhow!(
        "`device: {device}` can't be had: {why}; with `device: auto` the processor computes where no GPU can, and `pipeline doctor` lists the GPUs"
    )
}

/// Runs a model where the stage is told to, and notes in the record where that is.
pub(in crate::stages) fn execution_on<'m>(
    cx: &Context,
    model: &'m CausalLm,
    packing: Packing,
    place: &Place,
) -> anyhow::Result<Execution<'m>> {
    let execution = Execution::placed(model, packing, place);
    let execution = execution.map_err(|why| no_device(cx.device(), &why))?;
    match (place.adapter(), execution.kind()) {
        (Some(adapter), Kind::Gpu(_)) => {
            let device = json!({
                "name": adapter.name,
                "driver": adapter.driver,
                "interface": adapter.interface,
                "precision": execution.precision(),
            });
            cx.note("device", device);
            cx.info(format!("computes on {} ({})", adapter.name, adapter.driver));
        }
        (Some(_), _) => {
            let why = execution.fallback().unwrap_or("it lacks something");
            cx.info(format!("computes on the processor, for a GPU can't: {why}"));
        }
        (None, _) => {}
    }
    note_fallback(cx, &execution);
    Ok(execution)
}

/// Notes in the record what a GPU was made to do, if one was used.
pub(in crate::stages) fn note_work(cx: &Context, place: &Place) {
    if let Some(work) = place.work() {
        cx.note("gpu_work", work);
    }
}

/// Notes in the record why a model is not run on the fast path, if it is not.
fn note_fallback(cx: &Context, execution: &Execution<'_>) {
    if let Some(why) = execution.fallback() {
        cx.note("reference_path", why);
        cx.info(format!(
            "runs on the slower reference path, for the fast one lacks something: {why}"
        ));
    }
}
