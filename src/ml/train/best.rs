//! The best evaluation, and early stopping if there is no better one, by transformers' rules.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use candle_core::Device;
use serde::{Deserialize, Serialize};

use crate::ml::model::CausalLm;

/// The metric that decides which evaluation is the best.
#[derive(Debug, Clone, PartialEq)]
pub struct Watch {
    /// The name of the metric, without `eval_`.
    pub metric: String,
    /// Whether larger values are better.
    pub greater: bool,
    /// Whether the result has the best weights instead of the last ones.
    pub load: bool,
    /// The number of consecutive evaluations without improvement after which the training stops.
    pub patience: Option<u64>,
    /// The change of the metric from which on it counts as an improvement for the patience.
    pub threshold: f64,
}

/// The best evaluation so far.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Best {
    /// The metric's best value; infinite as long as all values were NaN.
    pub metric: Option<f64>,
    /// The step of the best value.
    pub step: Option<u64>,
    /// The number of consecutive evaluations without improvement.
    pub worse: u64,
    /// The digest of the file with the weights.
    pub(in crate::ml) digest: Option<String>,
}

impl Watch {
    fn better(&self, value: f64, than: f64) -> bool {
        if self.greater {
            value > than
        } else {
            value < than
        }
    }

    /// Whether the patience is exhausted.
    pub(super) fn stops(&self, best: &Best) -> bool {
        self.patience.is_some_and(|patience| best.worse >= patience)
    }
}

impl Best {
    /// Records the value of an evaluation and returns whether it is the best so far. First the patience is updated (transformers'
    /// `EarlyStoppingCallback`, with the threshold), then the best value (`_determine_best_metric`, without it).
    pub(super) fn judge(&mut self, watch: &Watch, value: f64, step: u64) -> bool {
        let improved = self
            .metric
            .is_none_or(|best| watch.better(value, best) && (value - best).abs() > watch.threshold);
        self.worse = if improved { 0 } else { self.worse + 1 };
        let worst = if watch.greater {
            f64::NEG_INFINITY
        } else {
            f64::INFINITY
        };
        let best = *self.metric.get_or_insert(worst);
        let is_best = watch.better(value, best);
        if is_best {
            (self.metric, self.step) = (Some(value), Some(step));
        }
        is_best
    }

    /// The same values in a form that JSON does not round.
    pub(in crate::ml) fn stored(&self) -> Stored {
        Stored {
            metric: self.metric.map(f64::to_bits),
            step: self.step,
            worse: self.worse,
            digest: self.digest.clone(),
        }
    }
}

/// [`Best`] as it is stored in a checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(in crate::ml) struct Stored {
    metric: Option<u64>,
    step: Option<u64>,
    worse: u64,
    digest: Option<String>,
}

impl Stored {
    /// The step of the best weights.
    pub(in crate::ml) fn step(&self) -> Option<u64> {
        self.step
    }

    pub(in crate::ml) fn best(self) -> Best {
        Best {
            metric: self.metric.map(f64::from_bits),
            step: self.step,
            worse: self.worse,
            digest: self.digest,
        }
    }
}

const PREFIX: &str = "best-";

fn weights_path(folder: &Path, step: u64) -> PathBuf {
    folder.join(format!("{PREFIX}{step:08}.safetensors"))
}

/// Writes the weights as those of the best step, and returns the digest of the file.
pub(super) fn keep(folder: &Path, model: &CausalLm, step: u64) -> anyhow::Result<String> {
    let write = || -> anyhow::Result<String> {
        let tensors = model.parameters.iter();
        let tensors = tensors.map(|p| (p.name.clone(), p.var.as_detached_tensor()));
        let bytes = safetensors::serialize(tensors, None)?;
        let partial = folder.join("partial.safetensors");
        let mut file = File::create(&partial)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&partial, weights_path(folder, step))?;
        File::open(folder)?.sync_all()?;
        Ok(blake3::hash(&bytes).to_string())
    };
    write().with_context(|| format!("could not write the best weights to `{}`", folder.display()))
}

/// Whether the file of the best weights is complete and unchanged. It is an error if it can't be read.
pub(in crate::ml) fn is_sound(folder: &Path, best: &Best) -> anyhow::Result<bool> {
    let (Some(step), Some(digest)) = (best.step, &best.digest) else {
        return Ok(true);
    };
    let bytes = fs::read(weights_path(folder, step)).context("the best weights")?;
    Ok(blake3::hash(&bytes).to_string() == *digest)
}

/// Sets the model's parameters to the best weights.
pub(super) fn restore(folder: &Path, model: &CausalLm, best: &Best) -> anyhow::Result<()> {
    let Some(step) = best.step else {
        return Ok(()); // no evaluation gave a number: the last weights stay, as with transformers
    };
    let path = weights_path(folder, step);
    let read = || -> anyhow::Result<()> {
        let bytes = fs::read(&path)?;
        let digest = blake3::hash(&bytes).to_string();
        ensure!(Some(&digest) == best.digest.as_ref(), "it is damaged");
        let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)?;
        for parameter in &model.parameters {
            let value = tensors.get(&parameter.name);
            let value = value.with_context(|| format!("it has no `{}`", parameter.name))?;
            parameter.var.set(&value.to_device(&model.device)?)?;
        }
        Ok(())
    };
    read().with_context(|| format!("could not read the best weights from `{}`", path.display()))
}

/// Removes the weights of all steps but `wanted`.
pub(in crate::ml) fn prune(folder: &Path, wanted: &[u64]) -> anyhow::Result<()> {
    let wanted: Vec<PathBuf> = wanted
        .iter()
        .map(|&step| weights_path(folder, step))
        .collect();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        if name.is_some_and(|name| name.starts_with(PREFIX)) && !wanted.contains(&path) {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The values of a metric, and after each: best value, step of the best, evaluations without improvement. Those of
    /// transformers 5.23's `EarlyStoppingCallback` and `_determine_best_metric`.
    fn judged(watch: &Watch, values: &[f64]) -> Vec<(f64, Option<u64>, u64)> {
        let mut best = Best::default();
        let judged = (1..).zip(values).map(|(step, &value)| {
            best.judge(watch, value, step);
            (best.metric.unwrap(), best.step, best.worse)
        });
        judged.collect()
    }

    #[test]
    fn the_best_is_that_of_transformers() {
        let mut watch = Watch {
            metric: "loss".into(),
            greater: false,
            load: true,
            patience: Some(2),
            threshold: 0.1,
        };
        // An improvement below the threshold is the best, but does not help the patience; an equal value is no improvement.
        assert_eq!(
            judged(&watch, &[5., 4., 3.95, 3.95, f64::NAN, 3.]),
            [
                (5., Some(1), 0),
                (4., Some(2), 0),
                (3.95, Some(3), 1),
                (3.95, Some(3), 2),
                (3.95, Some(3), 3),
                (3., Some(6), 0),
            ]
        );
        watch.greater = true;
        watch.threshold = 0.;
        assert_eq!(
            judged(&watch, &[f64::NAN, 0.5, 0.25, 0.75]),
            [
                (f64::NEG_INFINITY, None, 0),
                (0.5, Some(2), 0),
                (0.5, Some(2), 1),
                (0.75, Some(4), 0),
            ]
        );
        let best = Best {
            worse: 2,
            ..Best::default()
        };
        assert!(watch.stops(&best));
        watch.patience = None;
        assert!(!watch.stops(&best));
    }
}
