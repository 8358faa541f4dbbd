//! Checkpoints of a training: everything that its next step depends on.
//!
//! A checkpoint is a folder `step-00000042` with `state.safetensors` (parameters and moments) and `state.json` (the rest,
//! and the digest of the first). It is written under another name and renamed, so it is whole or absent; one that is
//! damaged all the same is passed over. The order of rows and the dropout follow from seed and step.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::model::Llama;
use super::optim::Optimizer;
use super::train::Window;

/// Raised when the files' meaning changes; other versions are ignored.
const VERSION: u32 = 1;

/// Where a training stands, apart from its tensors.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct State {
    /// Finished steps.
    pub(super) step: u64,
    /// Finished steps that the schedule counts (not those skipped on overflow).
    pub(super) scheduled: u64,
    /// The loss scale.
    pub(super) scale: f64,
    /// Steps since the scale changed.
    pub(super) good: u64,
    /// What has not been logged yet.
    pub(super) window: Window,
    /// One line for each step and evaluation.
    pub(super) history: Vec<String>,
}

/// `state.json`. Floats are kept as bits, so that nothing is rounded.
#[derive(Serialize, Deserialize)]
struct Stored {
    version: u32,
    digest: String,
    step: u64,
    scheduled: u64,
    scale: u64,
    good: u64,
    window: BTreeMap<String, (u64, u64)>,
    history: Vec<String>,
}

fn tensors(model: &Llama, optimizer: &Optimizer) -> anyhow::Result<BTreeMap<String, Tensor>> {
    let mut tensors = BTreeMap::new();
    for (name, tensor) in optimizer.save(&model.parameters)? {
        tensors.insert(format!("optimizer.{name}"), tensor);
    }
    for parameter in &model.parameters {
        let value = parameter.var.as_detached_tensor();
        tensors.insert(format!("model.{}", parameter.name), value);
    }
    Ok(tensors)
}

/// Writes a checkpoint and removes all but the newest `keep`.
pub(super) fn save(
    folder: &Path,
    model: &Llama,
    optimizer: &Optimizer,
    state: &State,
    keep: usize,
) -> anyhow::Result<()> {
    let write = || -> anyhow::Result<()> {
        let place = folder.join(format!("step-{:08}", state.step));
        let partial = folder.join("partial");
        if partial.exists() {
            fs::remove_dir_all(&partial)?;
        }
        fs::create_dir_all(&partial)?;
        let bytes = safetensors::serialize(tensors(model, optimizer)?, None)?;
        let window = state.window.sums.iter();
        let stored = Stored {
            version: VERSION,
            digest: blake3::hash(&bytes).to_string(),
            step: state.step,
            scheduled: state.scheduled,
            scale: state.scale.to_bits(),
            good: state.good,
            window: window
                .map(|(name, (sum, count))| (name.clone(), (sum.to_bits(), *count)))
                .collect(),
            history: state.history.clone(),
        };
        for (name, bytes) in [
            ("state.safetensors", bytes),
            ("state.json", serde_json::to_vec(&stored)?),
        ] {
            let mut file = File::create(partial.join(name))?;
            file.write_all(&bytes)?;
            file.sync_all()?;
        }
        if place.exists() {
            // Damaged, or written by a run that was interrupted at the same step again.
            fs::remove_dir_all(&place)?;
        }
        fs::rename(&partial, &place)?;
        File::open(folder)?.sync_all()?;
        for old in checkpoints(folder)?.iter().rev().skip(keep.max(1)) {
            fs::remove_dir_all(old)?;
        }
        Ok(())
    };
    write().with_context(|| format!("could not write a checkpoint to `{}`", folder.display()))
}

/// The checkpoints in a folder, oldest first.
fn checkpoints(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    if folder.is_dir() {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            if name.is_some_and(|name| name.starts_with("step-")) {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

fn load(place: &Path, model: &Llama, optimizer: &mut Optimizer) -> anyhow::Result<State> {
    let stored: Stored = serde_json::from_slice(&fs::read(place.join("state.json"))?)?;
    ensure!(stored.version == VERSION, "another version");
    let bytes = fs::read(place.join("state.safetensors"))?;
    ensure!(blake3::hash(&bytes).to_string() == stored.digest, "damaged");
    let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)?;
    let mut moments = BTreeMap::new();
    let mut values = BTreeMap::new();
    for (name, tensor) in tensors.into_iter().collect::<BTreeMap<_, _>>() {
        if let Some(name) = name.strip_prefix("optimizer.") {
            moments.insert(name.to_owned(), tensor);
        } else if let Some(name) = name.strip_prefix("model.") {
            values.insert(name.to_owned(), tensor);
        }
    }
    for parameter in &model.parameters {
        let value = values.get(&parameter.name);
        let fits = value.is_some_and(|value| value.dims() == parameter.var.dims());
        ensure!(fits, "no fitting `{}`", parameter.name);
    }
    optimizer.restore(&model.parameters, &moments)?;
    for parameter in &model.parameters {
        if let Some(value) = values.get(&parameter.name) {
            parameter.var.set(&value.to_device(&model.device)?)?;
        }
    }
    let window = stored.window.into_iter();
    Ok(State {
        step: stored.step,
        scheduled: stored.scheduled,
        scale: f64::from_bits(stored.scale),
        good: stored.good,
        window: Window {
            sums: window
                .map(|(name, (sum, count))| (name, (f64::from_bits(sum), count)))
                .collect(),
        },
        history: stored.history,
    })
}

/// Takes up the newest sound checkpoint, if there is one.
pub(super) fn resume(
    folder: &Path,
    model: &Llama,
    optimizer: &mut Optimizer,
) -> anyhow::Result<Option<State>> {
    let found = checkpoints(folder)?;
    let sound = found
        .iter()
        .rev()
        .find_map(|place| load(place, model, optimizer).ok());
    Ok(sound)
}
