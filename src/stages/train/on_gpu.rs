//! What a training takes of a GPU's memory, compared with what the GPU has before anything is copied to it.

use anyhow::bail;

use super::estimate::{advice, parts, size};
use super::inputs::Inputs;
use crate::engine::{Context, DeviceChoice, Estimate};
use crate::ml::place::Place;

/// How bytes fit into a memory.
#[derive(Debug, PartialEq)]
enum Fit {
    Well,
    /// There may be too few: what the driver and other programs take is not known.
    Barely(String),
    Not(String),
}

/// How a training that takes these bytes of a GPU fits into its memory.
fn fit(takes: &Estimate, memory: u64, advice: &str) -> Fit {
    let clause = format!(
        "the training takes about {} of the GPU's memory, which is {}: {}; hint: {advice}",
        size(takes.peak_memory),
        size(memory),
        parts(takes)
    );
    let share = takes.peak_memory as f64 / memory as f64;
    if share > 1. {
        Fit::Not(clause)
    } else if share > 0.85 {
        Fit::Barely(clause)
    } else {
        Fit::Well
    }
}

/// Tells what the training takes of the GPU's memory, if it is to run on one, and puts it into the record. Returns the place where it runs:
/// the processor instead, where the training does not fit and the stage may choose.
///
/// # Errors
/// The training does not fit into the memory of the GPU that was asked for by name.
pub(super) fn place_that_fits(
    cx: &Context,
    estimate: &Estimate,
    inputs: &Inputs,
    place: Place,
) -> anyhow::Result<Place> {
    let Some(adapter) = place.adapter() else {
        return Ok(place);
    };
    let takes = Estimate {
        memory: estimate.gpu_memory.clone(),
        peak_memory: estimate.gpu_memory.values().sum(),
        ..estimate.clone()
    };
    cx.note("gpu_memory_estimate", &takes.memory);
    cx.info(format!(
        "takes about {} of the GPU's memory: {}",
        size(takes.peak_memory),
        parts(&takes)
    ));
    let Some(memory) = adapter.memory else {
        return Ok(place);
    };
    match fit(&takes, memory, &advice(&takes, inputs)) {
        Fit::Well => Ok(place),
        Fit::Barely(why) => {
            cx.warn(why);
            Ok(place)
        }
        Fit::Not(why) if cx.device() == DeviceChoice::Auto => {
            cx.info(format!("computes on the processor: {why}"));
            Ok(Place::cpu())
        }
        Fit::Not(why) => bail!("{why}, or `device: cpu`"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_told_with_its_parts() {
        let takes = Estimate {
            memory: [("weights", 16_000_000_000), ("head", 500_000_000)]
                .map(|(name, bytes)| (name.to_owned(), bytes))
                .into(),
            peak_memory: 16_500_000_000,
            ..Estimate::default()
        };
        let fit = |memory: u64| fit(&takes, memory, "a base in 4 bits by `quantize`");
        assert_eq!(fit(80_000_000_000), Fit::Well);
        assert!(matches!(fit(17_000_000_000), Fit::Barely(_)));
        assert_eq!(
            fit(16_000_000_000),
            Fit::Not(
                "the training takes about 16.5 GB of the GPU's memory, which is 16.0 GB: weights 16.0 GB, head 500 MB; hint: a base in 4 \
                 bits by `quantize`"
                    .into()
            )
        );
    }
}
