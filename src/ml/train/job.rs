//! What a training is given: a model, rows, a loss, and where its files go.

use std::path::Path;

use anyhow::ensure;

use super::fault::Origin;
use super::passes::{Passes, ReferenceModel};
use super::settings::Settings;
use crate::ml::execution::Execution;
use crate::ml::loss::Loss;
use crate::ml::model::batch::Row;

/// A training to be done.
#[derive(Clone, Copy)]
pub struct Job<'a> {
    /// The model that is trained, and what runs it.
    pub execution: &'a Execution<'a>,
    /// What is minimised.
    pub loss: &'a dyn Loss,
    /// The reference model, for a loss that needs one.
    pub reference: ReferenceModel<'a>,
    /// The rows to train on.
    pub rows: &'a [Row],
    /// The rows to evaluate on.
    pub eval_rows: &'a [Row],
    /// The id that fills batches up.
    pub pad: u32,
    /// Where rows and weights come from, for messages.
    pub origin: &'a Origin,
    /// The folder for checkpoints and for the best weights, if there is one.
    pub scratch: Option<&'a Path>,
    /// The folder that keeps the last state for a training with more steps, if there is one: see [`super::continue_from`].
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

    /// Refuses at once what would fail later.
    pub(super) fn check(&self, settings: &Settings) -> anyhow::Result<()> {
        ensure!(!self.rows.is_empty(), "there are no rows to train on");
        ensure!(
            !self.loss.needs().reference || !matches!(self.reference, ReferenceModel::None),
            "the loss needs a reference model"
        );
        let Some(watch) = &settings.watch else {
            return Ok(());
        };
        ensure!(
            settings.eval_every.is_some() && !self.eval_rows.is_empty(),
            "the best step is found by evaluations, but there are none"
        );
        ensure!(
            self.scratch.is_some() || !watch.load,
            "the best weights need a folder"
        );
        let mut names = self.loss.metrics().to_vec();
        names.push("loss");
        names.sort_unstable();
        ensure!(
            names.contains(&watch.metric.as_str()),
            "`metric_for_best_model` is `{}`, but the evaluation gives {}",
            watch.metric,
            names.join(", ")
        );
        Ok(())
    }
}
