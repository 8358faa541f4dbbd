//! Checkpoints of a training: everything on which its next step depends.
//!
//! A checkpoint is a folder `step-00000042` with `state.safetensors` (parameters and moments), `state.json` (the rest, and the digest of the
//! first file) and `digest` (that of the second one). It is written under another name and renamed, so it is complete or absent. One that is
//! damaged nevertheless is passed over. One that can't be read for another reason ends the training, because days of work may be in it. The
//! order of rows and the dropout follow from seed and step.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::adaptive::Adaptive;
use super::best;
use super::log::{Log, Window};
use super::optim::Optimizer;
use super::scaler::Scaler;
use super::state::State;
use crate::ml::model::CausalLm;

/// The version of the format, which increases when the meaning of the files changes. Checkpoints of other versions are ignored.
pub(in crate::ml) const VERSION: u32 = 2;

/// The files of a checkpoint.
const TENSORS: &str = "state.safetensors";
const STATE: &str = "state.json";
const DIGEST: &str = "digest";

/// The version in a `state.json` of any version.
#[derive(Deserialize)]
struct Version {
    version: u32,
}

/// The contents of `state.json`. Floats are stored as their bits, so that nothing is rounded.
#[derive(Serialize, Deserialize)]
struct Stored {
    version: u32,
    digest: String,
    step: u64,
    scheduled: u64,
    skipped: u64,
    #[serde(default)]
    tokens: u64,
    scale: u64,
    good: u64,
    window: BTreeMap<String, (u64, u64)>,
    history: Vec<Line>,
    best: best::Stored,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    adaptive: Option<Adaptive>,
}

/// A [`Log`] as it is stored in `state.json`.
#[derive(Serialize, Deserialize)]
struct Line {
    step: u64,
    epoch: u64,
    values: BTreeMap<String, u64>,
}

impl Line {
    fn new(log: &Log) -> Self {
        let values = log.values.iter();
        Self {
            step: log.step,
            epoch: log.epoch.to_bits(),
            values: values
                .map(|(name, value)| (name.clone(), value.to_bits()))
                .collect(),
        }
    }

    fn log(self) -> Log {
        let values = self.values.into_iter();
        Log {
            step: self.step,
            epoch: f64::from_bits(self.epoch),
            values: values
                .map(|(name, bits)| (name, f64::from_bits(bits)))
                .collect(),
        }
    }
}

fn tensors(model: &CausalLm, optimizer: &Optimizer) -> anyhow::Result<BTreeMap<String, Tensor>> {
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

/// Writes a checkpoint into a folder.
pub(in crate::ml) fn write(
    folder: &Path,
    model: &CausalLm,
    optimizer: &Optimizer,
    state: &State,
) -> anyhow::Result<()> {
    let write = || -> anyhow::Result<()> {
        let bytes = safetensors::serialize(tensors(model, optimizer)?, None)?;
        let window = state.window.sums.iter();
        let stored = Stored {
            version: VERSION,
            digest: blake3::hash(&bytes).to_string(),
            step: state.step,
            scheduled: state.scheduled,
            skipped: state.skipped,
            tokens: state.tokens,
            scale: state.scaler.scale.to_bits(),
            good: state.scaler.good,
            window: window
                .map(|(name, (sum, count))| (name.clone(), (sum.to_bits(), *count)))
                .collect(),
            history: state.history.iter().map(Line::new).collect(),
            best: state.best.stored(),
            adaptive: state.adaptive.clone(),
        };
        let json = serde_json::to_vec(&stored)?;
        let digest = blake3::hash(&json).to_string();
        put(
            folder,
            state.step,
            &[
                (TENSORS, &bytes),
                (STATE, &json),
                (DIGEST, digest.as_bytes()),
            ],
        )
    };
    write().with_context(|| format!("could not write a checkpoint to `{}`", folder.display()))
}

fn folder_of_step(folder: &Path, step: u64) -> PathBuf {
    folder.join(format!("step-{step:08}"))
}

/// Writes the files of a checkpoint, all or none of them.
fn put(folder: &Path, step: u64, files: &[(&str, &[u8])]) -> anyhow::Result<()> {
    let target = folder_of_step(folder, step);
    let partial = folder.join("partial");
    if partial.exists() {
        fs::remove_dir_all(&partial)?;
    }
    fs::create_dir_all(&partial)?;
    for (name, bytes) in files {
        let mut file = File::create(partial.join(name))?;
        file.write_all(bytes)?;
        file.sync_all()?;
    }
    if target.exists() {
        // It is damaged, or was written by a run that was interrupted at the same step.
        fs::remove_dir_all(&target)?;
    }
    fs::rename(&partial, &target)?;
    File::open(folder)?.sync_all()?;
    Ok(())
}

/// Copies a checkpoint from one folder to another; it is an error if it is not sound.
pub(in crate::ml) fn copy(from: &Path, step: u64, to: &Path) -> anyhow::Result<()> {
    let from = folder_of_step(from, step);
    let stored = read_stored(&from)?;
    ensure!(stored.step == step, "another step");
    let bytes = fs::read(from.join(TENSORS))?;
    ensure!(blake3::hash(&bytes).to_string() == stored.digest, "damaged");
    let (json, digest) = (fs::read(from.join(STATE))?, fs::read(from.join(DIGEST))?);
    put(
        to,
        step,
        &[(TENSORS, &bytes), (STATE, &json), (DIGEST, &digest)],
    )
}

/// Whether there is a checkpoint, sound or not.
pub(in crate::ml) fn any(folder: &Path) -> anyhow::Result<bool> {
    Ok(!checkpoints(folder)?.is_empty())
}

/// The step of the newest checkpoint in a folder, sound or not, by its name alone.
pub fn newest_checkpoint(folder: &Path) -> Option<u64> {
    let newest = checkpoints(folder).ok()?.pop()?;
    newest
        .file_name()?
        .to_str()?
        .strip_prefix("step-")?
        .parse()
        .ok()
}

/// Writes a checkpoint and removes all but the newest `keep`.
pub(in crate::ml) fn save(
    folder: &Path,
    model: &CausalLm,
    optimizer: &Optimizer,
    state: &State,
    keep: usize,
) -> anyhow::Result<()> {
    write(folder, model, optimizer, state)?;
    let tidy = || -> anyhow::Result<()> {
        for old in checkpoints(folder)?.iter().rev().skip(keep.max(1)) {
            fs::remove_dir_all(old)?;
        }
        // The weights of every best step that a checkpoint refers to.
        let mut wanted = Vec::new();
        for kept in checkpoints(folder)? {
            match read_stored(&kept) {
                Ok(stored) => wanted.extend(stored.best.step()),
                Err(error) if is_damage(&error) => {}
                // The checkpoint may still be good, so nothing is removed.
                Err(_) => return Ok(()),
            }
        }
        best::prune(folder, &wanted)
    };
    tidy().with_context(|| format!("could not remove old checkpoints of `{}`", folder.display()))
}

/// The checkpoints in a folder, the oldest one first.
fn checkpoints(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let cannot_list = || format!("could not list `{}`", folder.display());
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(cannot_list)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.with_context(cannot_list)?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        if name.is_some_and(|name| name.starts_with("step-")) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn read_stored(checkpoint: &Path) -> anyhow::Result<Stored> {
    let json = fs::read(checkpoint.join(STATE))?;
    let digest = fs::read_to_string(checkpoint.join(DIGEST))?;
    ensure!(blake3::hash(&json).to_string() == digest, "damaged");
    // Another version may have other fields.
    let Version { version } = serde_json::from_slice(&json)?;
    ensure!(
        version == VERSION,
        "it has another version of the format, {version} instead of {VERSION}"
    );
    Ok(serde_json::from_slice(&json)?)
}

/// Whether an error means that something is missing, truncated or altered. Other errors, such as a missing permission or a failing disk, say
/// nothing about the contents.
pub(in crate::ml) fn is_damage(error: &anyhow::Error) -> bool {
    let mut causes = error.chain();
    let trouble = |error: &std::io::Error| {
        !matches!(
            error.kind(),
            ErrorKind::NotFound
                | ErrorKind::NotADirectory
                | ErrorKind::InvalidData
                | ErrorKind::UnexpectedEof
        )
    };
    !causes.any(|cause| cause.downcast_ref().is_some_and(trouble))
}

/// The contents of a checkpoint.
struct Read {
    state: State,
    moments: BTreeMap<String, Tensor>,
    values: BTreeMap<String, Tensor>,
}

fn read(checkpoint: &Path, model: &CausalLm) -> anyhow::Result<Read> {
    let stored = read_stored(checkpoint)?;
    let best = stored.best.best();
    let folder = checkpoint.parent().context("no folder")?;
    ensure!(
        best::is_sound(folder, &best)?,
        "the best weights are damaged"
    );
    let bytes = fs::read(checkpoint.join(TENSORS))?;
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
    let window = stored.window.into_iter();
    let state = State {
        step: stored.step,
        scheduled: stored.scheduled,
        skipped: stored.skipped,
        adaptive: stored.adaptive,
        tokens: stored.tokens,
        scaler: Scaler {
            scale: f64::from_bits(stored.scale),
            good: stored.good,
        },
        window: Window {
            sums: window
                .map(|(name, (sum, count))| (name, (f64::from_bits(sum), count)))
                .collect(),
        },
        history: stored.history.into_iter().map(Line::log).collect(),
        best,
    };
    Ok(Read {
        state,
        moments,
        values,
    })
}

/// The state from which a training is resumed.
#[derive(Default)]
pub(in crate::ml) struct Resumed {
    /// The state of the newest sound checkpoint, if there is one.
    pub(in crate::ml) state: Option<State>,
    /// A sentence about each newer one, saying why it was not used.
    pub(in crate::ml) passed_over: Vec<String>,
}

/// Restores the checkpoint of a step, which another process of the training found sound.
pub(in crate::ml) fn resume_at(
    folder: &Path,
    step: u64,
    model: &CausalLm,
    optimizer: &mut Optimizer,
) -> anyhow::Result<State> {
    let checkpoint = folder_of_step(folder, step);
    let read = read(&checkpoint, model).and_then(|read| {
        optimizer.restore(&model.parameters, &read.moments)?;
        Ok(read)
    });
    let read = read.with_context(|| {
        format!(
            "could not read the checkpoint `{}`, from which another process of the training goes on; hint: all of them need the same \
             files, so the store has to be in a folder that all their machines share",
            checkpoint.display()
        )
    })?;
    take(&read, model)?;
    Ok(read.state)
}

/// Sets the model's parameters to those of a checkpoint.
fn take(read: &Read, model: &CausalLm) -> anyhow::Result<()> {
    for parameter in &model.parameters {
        if let Some(value) = read.values.get(&parameter.name) {
            parameter.var.set(&value.to_device(&model.device)?)?;
        }
    }
    Ok(())
}

/// Restores the newest sound checkpoint, if there is one. Damaged ones are passed over; it is an error if one can't be read for another
/// reason. Without an error, model and optimiser are either unchanged or entirely those of the checkpoint.
pub(in crate::ml) fn resume(
    folder: &Path,
    model: &CausalLm,
    optimizer: &mut Optimizer,
) -> anyhow::Result<Resumed> {
    let mut resumed = Resumed::default();
    for checkpoint in checkpoints(folder)?.iter().rev() {
        let restored = read(checkpoint, model).and_then(|read| {
            optimizer.restore(&model.parameters, &read.moments)?;
            Ok(read)
        });
        match restored {
            Ok(read) => {
                take(&read, model)?;
                resumed.state = Some(read.state);
                break;
            }
            Err(error) if is_damage(&error) => resumed.passed_over.push(format!(
                "the checkpoint `{}` can't be used ({error:#}); the one before it is looked for",
                checkpoint.display()
            )),
            Err(error) => {
                return Err(error.context(format!(
                    "could not read the checkpoint `{}`; make it readable and run again, or remove it to go on from the one before it",
                    checkpoint.display()
                )));
            }
        }
    }
    Ok(resumed)
}

#[cfg(test)]
mod tests;
