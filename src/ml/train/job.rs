//! The inputs of a training: a model, rows, a loss, and folders for its files.

use std::path::Path;

use anyhow::ensure;

use super::fault::Origin;
use super::passes::{Passes, ReferenceModel};
use super::schedule::SchedulerType;
use super::settings::Settings;
use crate::ml::execution::Execution;
use crate::ml::loss::Loss;
use crate::ml::model::batch::Row;

/// The inputs of a training.
#[derive(Clone, Copy)]
pub struct Job<'a> {
    /// The model that is trained, with its backend.
    pub execution: &'a Execution<'a>,
    /// The loss that is minimised.
    pub loss: &'a dyn Loss,
    /// The reference model, for a loss that needs one.
    pub reference: ReferenceModel<'a>,
    /// The rows to train on.
    pub rows: &'a [Row],
    /// The rows to evaluate on.
    pub eval_rows: &'a [Row],
    /// The id with which batches are padded.
    pub pad: u32,
    /// The origin of rows and weights, for messages.
    pub origin: &'a Origin,
    /// The folder for checkpoints and for the best weights, if there is one.
    pub scratch: Option<&'a Path>,
    /// The folder in which the last state is kept for a training with more steps, if there is one: see [`super::continue_from`].
    pub continuation: Option<&'a Path>,
}

impl Job<'_> {
    pub(super) fn passes(&self) -> Passes<'_> {
        Passes {
            execution: self.execution,
            loss: self.loss,
            reference: self.reference,
        }
    }

    /// Fails at once for what would fail later.
    pub(super) fn check(&self, settings: &Settings) -> anyhow::Result<()> {
        ensure!(!self.rows.is_empty(), "there are no rows to train on");
        ensure!(
            !self.loss.needs().reference || !matches!(self.reference, ReferenceModel::None),
            "the loss needs a reference model"
        );
        let schedule = settings.schedule(settings.total_steps(self.rows.len()));
        ensure!(
            schedule.scheduler != SchedulerType::Polynomial
                || schedule.lr_end() < settings.learning_rate,
            "`polynomial` decays to `lr_end` {}, expected less than `learning_rate`, which is {}",
            schedule.lr_end(),
            settings.learning_rate
        );
        let follows = settings.scheduler.follows_evaluations();
        if let Some(watch) = &settings.watch {
            self.check_metric(settings, "the best step is found", &watch.metric)?;
            ensure!(
                self.scratch.is_some() || !watch.load,
                "the best weights need a folder"
            );
        }
        if follows {
            self.check_metric(
                settings,
                "the learning rate changes",
                &settings.scheduler_metric,
            )?;
        }
        Ok(())
    }

    /// Fails if there are no evaluations or if they don't give this metric.
    fn check_metric(&self, settings: &Settings, what: &str, metric: &str) -> anyhow::Result<()> {
        ensure!(
            settings.eval_every.is_some() && !self.eval_rows.is_empty(),
            "{what} by evaluations, but there are none"
        );
        let mut names = self.loss.metrics().to_vec();
        names.push("loss");
        names.sort_unstable();
        ensure!(
            names.contains(&metric),
            "`metric_for_best_model` is `{metric}`, but the evaluation gives {}",
            names.join(", ")
        );
        Ok(())
    }
}
