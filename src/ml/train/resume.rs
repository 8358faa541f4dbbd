//! What a finished training keeps for a longer one, and whether the longer one may continue from it.
//!
//! It may if it would have made the same steps itself, that is, if the settings are the same but for the number of steps, and the learning
//! rates of these steps don't depend on that number. The kept state is that before anything was done because the step was the last one, so
//! the result has the same bits as that of a training from the beginning.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use serde::{Deserialize, Serialize};

use super::checkpoint;
use super::optim::Optimizer;
use super::settings::Settings;
use super::state::State;
use crate::ml::model::CausalLm;

/// The file that says how the training ended, after a line with its digest.
const FILE: &str = "end.json";

/// A file in the folder of checkpoints with the number of steps of the training from which this one continues.
const CONTINUED: &str = "continued";

/// How a training ended.
#[derive(Debug, Serialize, Deserialize)]
struct End {
    /// The version of the checkpoint beside it.
    version: u32,
    /// The number of finished steps.
    step: u64,
    /// The number of steps it should have had.
    total: u64,
    /// The reason why no other may continue from it; without one there is a checkpoint beside it.
    obstacle: Option<String>,
}

/// The start of a training with regard to earlier ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Start {
    /// At the beginning, because there was no earlier training.
    Alone,
    /// After the last step of an earlier training, which had this number of steps.
    After(u64),
    /// At the beginning, although there was an earlier training: its number of steps, and why this one can't continue from it.
    Beginning(u64, String),
}

const BY_SCHEDULE: &str = "its learning rate depends on the number of all steps (`lr_scheduler_type`, `warmup_steps`, \
                           `warmup_ratio`)";

/// Keeps the state after the last step in `folder`, if another training could continue from it.
pub(super) fn keep_continuation(
    folder: &Path,
    model: &CausalLm,
    optimizer: &Optimizer,
    state: &State,
    settings: &Settings,
    total: u64,
) -> anyhow::Result<()> {
    let loads_best = settings.watch.as_ref().is_some_and(|watch| watch.load);
    let obstacle = if loads_best {
        Some("its weights are those of its best step".to_owned())
    } else if same_rates(settings, state.step, total, total.saturating_mul(2)) {
        None
    } else {
        Some(BY_SCHEDULE.to_owned())
    };
    if obstacle.is_none() {
        checkpoint::write(folder, model, optimizer, state)?;
    }
    write(folder, state.step, total, obstacle)
}

/// Notes in `folder` that the training ended before its last step.
pub(super) fn note_early_stop(folder: &Path, step: u64, total: u64) -> anyhow::Result<()> {
    write(folder, step, total, Some("it was stopped early".into()))
}

fn write(folder: &Path, step: u64, total: u64, obstacle: Option<String>) -> anyhow::Result<()> {
    let end = End {
        version: checkpoint::VERSION,
        step,
        total,
        obstacle,
    };
    let json = serde_json::to_string(&end)?;
    let text = format!("{}\n{json}", blake3::hash(json.as_bytes()));
    let path = folder.join(FILE);
    fs::write(&path, text).with_context(|| format!("could not write `{}`", path.display()))
}

fn read(folder: &Path) -> anyhow::Result<End> {
    let text = fs::read_to_string(folder.join(FILE))?;
    let (digest, json) = text.split_once('\n').context("damaged")?;
    ensure!(
        blake3::hash(json.as_bytes()).to_string() == digest,
        "damaged"
    );
    let end: End = serde_json::from_str(json)?;
    ensure!(end.version == checkpoint::VERSION, "another version");
    Ok(end)
}

/// Whether the first `steps` steps have the same learning rates in trainings of `a` and of `b` steps.
fn same_rates(settings: &Settings, steps: u64, a: u64, b: u64) -> bool {
    let (a, b) = (settings.schedule(a), settings.schedule(b));
    (0..steps).all(|step| a.factor(step).to_bits() == b.factor(step).to_bits())
}

/// Copies the state of an earlier training to `scratch`, the folder of checkpoints, where [`super::train`] finds it, if continuing from it
/// gives exactly the same result as starting at the beginning. `continuations` are the folders kept by trainings
/// ([`super::Job::continuation`]) that differ from this one in nothing but the number of steps; `rows` is the number of training rows.
///
/// # Errors
/// A file can't be read, for a reason that says nothing about what is in it.
pub fn continue_from(
    scratch: &Path,
    continuations: &[PathBuf],
    settings: &Settings,
    rows: usize,
) -> anyhow::Result<Start> {
    if checkpoint::any(scratch)? {
        let noted = fs::read_to_string(scratch.join(CONTINUED)).ok();
        let step = noted.and_then(|noted| noted.trim().parse().ok());
        return Ok(step.map_or(Start::Alone, Start::After));
    }
    let note = scratch.join(CONTINUED);
    if note.exists() {
        fs::remove_file(&note).with_context(|| format!("could not remove `{}`", note.display()))?;
    }
    let total = settings.total_steps(rows);
    let mut start = Start::Alone;
    let unreadable = |folder: &Path, error: anyhow::Error| {
        error.context(format!(
            "could not read what an earlier training left in `{}`; make it readable and run again, or run with --force to start at \
             the beginning",
            folder.display()
        ))
    };
    let mut known = Vec::new();
    for path in continuations {
        match read(path) {
            Ok(end) => known.push((path, end)),
            // A damaged file is treated like a missing one.
            Err(error) if checkpoint::is_damage(&error) => {}
            Err(error) => return Err(unreadable(path, error)),
        }
    }
    known.sort_by_key(|(_, end)| end.step);
    for (folder, end) in known.into_iter().rev() {
        let obstacle = if let Some(obstacle) = end.obstacle {
            Some(obstacle)
        } else if end.step >= total {
            Some("it did not have fewer steps".into())
        } else if !same_rates(settings, end.step, end.total, total) {
            Some(BY_SCHEDULE.into())
        } else {
            match checkpoint::copy(folder, end.step, scratch) {
                Ok(()) => None,
                Err(error) if checkpoint::is_damage(&error) => {
                    Some(format!("its state could not be read ({error:#})"))
                }
                Err(error) => return Err(unreadable(folder, error)),
            }
        };
        match obstacle {
            None => {
                fs::write(&note, end.step.to_string())
                    .with_context(|| format!("could not write `{}`", note.display()))?;
                return Ok(Start::After(end.step));
            }
            Some(obstacle) if start == Start::Alone => start = Start::Beginning(end.step, obstacle),
            Some(_) => {}
        }
    }
    Ok(start)
}
