//! What a training will take: told before its weights are read, compared with the machine, and kept in the record beside what was
//! measured.

use anyhow::bail;

use super::inputs::Inputs;
use super::method::Method;
use super::process::Resident;
use super::reference::Source;
use crate::engine::{Context, Estimate};
use crate::ml::model::{Trained, tied};
use crate::ml::train::estimate::{Planned, Unloaded};
use crate::ml::train::process_group;

/// What `pipeline estimate` assumes of a process that it can't measure.
const BASE: u64 = 32 << 20;

/// What the training will take.
pub(super) fn estimate<M: Method>(method: &M, inputs: &Inputs) -> anyhow::Result<Estimate> {
    let own = match &inputs.reference.0 {
        Source::Own(folder, adapter) if !inputs.precomputes => {
            Some((tied::open(folder)?, adapter.as_deref()))
        }
        _ => None,
    };
    let reference = own.as_ref().map(|((arch, weights), adapter)| Unloaded {
        arch,
        weights,
        adapter: *adapter,
        trained: Trained::Nothing,
        compute: inputs.compute,
    });
    let loss = method.loss();
    let planned = Planned {
        model: Unloaded {
            arch: &inputs.arch,
            weights: &inputs.weights,
            adapter: inputs.adapter.as_ref(),
            trained: inputs.trained(),
            compute: inputs.compute,
        },
        reference,
        base_is_reference: matches!(inputs.reference.0, Source::Base) && !inputs.precomputes,
        packing: inputs.packing,
        loss: &*loss,
        settings: &inputs.settings,
        rows: &inputs.train.rows,
        eval_rows: &inputs.eval_rows,
        pad: inputs.pad,
    };
    let base = Resident::of_this_process().map_or(BASE, |resident| resident.now);
    let found = planned.estimate(base)?;
    let counts = [
        ("trained_parameters", found.trained_parameters),
        ("rows", inputs.train.rows.len() as u64),
        ("steps", found.steps),
        ("tokens", found.tokens),
        ("longest_pass", found.longest_pass),
    ];
    let named = |(name, value): (&str, u64)| (name.to_owned(), value);
    let on_device = found.on_device.into_iter();
    let on_device = on_device.filter(|_| cfg!(feature = "gpu"));
    Ok(Estimate {
        counts: counts.into_iter().map(named).collect(),
        memory: found.memory.into_iter().map(named).collect(),
        peak_memory: found.peak,
        is_lower_bound: !planned.is_known(),
        gpu_memory: on_device.map(named).collect(),
    })
}

/// Tells the estimate and puts it into the record.
///
/// # Errors
/// The training can't fit into the memory of the machine.
pub(super) fn tell(cx: &Context, estimate: &Estimate, inputs: &Inputs) -> anyhow::Result<()> {
    cx.note("estimate", estimate);
    let count = |name: &str| estimate.counts.get(name).copied().unwrap_or(0);
    let more = if estimate.is_lower_bound {
        "at least "
    } else {
        "about "
    };
    cx.info(format!(
        "trains {} parameters in {} steps of {} tokens in all, with {more}{} of memory at most: {}",
        grouped(count("trained_parameters")),
        grouped(count("steps")),
        grouped(count("tokens")),
        size(estimate.peak_memory),
        parts(estimate)
    ));
    // Processes on one machine share its memory.
    let processes = process_group::of_this_process().on_this_machine() as u64;
    let Some(limit) = cx.env().memory.map(|memory| memory / processes) else {
        return Ok(());
    };
    let (peak, advice) = (estimate.peak_memory, advice(estimate, inputs));
    // The estimate is right within a tenth.
    if peak as f64 > 1.1 * limit as f64 {
        bail!(
            "the training takes {more}{} of memory, and there are {}: {}; hint: {advice}",
            size(peak),
            size(limit),
            parts(estimate)
        );
    }
    if peak as f64 > 0.9 * limit as f64 {
        cx.warn(format!(
            "the training takes {more}{} of memory, and there are no more than {}; hint: {advice}",
            size(peak),
            size(limit)
        ));
    }
    Ok(())
}

/// What takes most, the largest part first.
pub(super) fn parts(estimate: &Estimate) -> String {
    let parts = estimate.largest_first().into_iter();
    let parts: Vec<_> = parts
        .map(|(name, bytes)| format!("{name} {}", size(bytes)))
        .collect();
    parts.join(", ")
}

/// What to change for less memory, what helps most first.
pub(super) fn advice(estimate: &Estimate, inputs: &Inputs) -> String {
    let part = |name: &str| estimate.memory.get(name).copied().unwrap_or(0);
    let settings = &inputs.settings;
    let mut all = Vec::new();
    if !settings.checkpointing {
        all.push((part("kept activations"), "`gradient_checkpointing: true`"));
    }
    let of_pass = part("kept activations") + part("working buffers") + part("head");
    if settings.batch_size > 1 {
        all.push((
            of_pass,
            "a smaller `per_device_train_batch_size` with more `gradient_accumulation_steps`",
        ));
    }
    all.push((of_pass / 2, "a shorter `max_length` of `tokenize`"));
    let full = inputs.adapter.is_none();
    if full {
        let states = part("optimiser") + part("gradients") + part("copies");
        all.push((
            states,
            "an adapter by `attach_lora` instead of training every weight",
        ));
        all.push((part("optimiser"), "`optim: adamw_8bit`"));
    } else if inputs.arch.quantization.is_none() {
        all.push((part("weights"), "a base in 4 bits by `quantize`"));
    }
    all.retain(|(bytes, _)| *bytes > 0);
    all.sort_by_key(|(bytes, _)| std::cmp::Reverse(*bytes));
    let all = all.into_iter().take(3).map(|(_, advice)| advice);
    let all: Vec<&str> = all.collect();
    if all.is_empty() {
        "take a smaller model, or a machine with more memory".to_owned()
    } else {
        all.join(", or ")
    }
}

/// Bytes in powers of 1000.
pub(super) fn size(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{} kB", bytes.div_ceil(1000)),
        1_000_000..10_000_000_000 => format!("{} MB", bytes.div_ceil(1_000_000)),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}

/// A number with commas between thousands.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(grouped(7), "7");
        assert_eq!(grouped(1_234_567), "1,234,567");
        assert_eq!(size(1_500), "2 kB");
        assert_eq!(size(410_200_000), "411 MB");
        assert_eq!(size(12_340_000_000), "12.3 GB");
    }
}
