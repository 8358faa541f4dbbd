//! Steps with numbers that are not finite: where they occurred, and their likely cause.

use std::cell::OnceCell;
use std::fmt;
use std::path::{Path, PathBuf};

use super::optim::Optimizer;
use super::settings::Settings;
use crate::ml::io::finite;
use crate::ml::model::CausalLm;

/// A step whose loss or gradient is NaN or infinite.
#[derive(Debug, Clone, PartialEq)]
pub struct Fault {
    /// The number of the step, from 1.
    pub step: u64,
    /// What is not finite: `loss` or `gradient's norm`.
    pub what: &'static str,
    /// Its value.
    pub value: f64,
    /// The numbers of the batch's rows in the split, from 1.
    pub rows: Vec<usize>,
    /// The name of the split.
    pub split: String,
    /// A clause about the likely cause and what may help.
    pub cause: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            step,
            what,
            value,
            rows,
            split,
            cause,
        } = self;
        write!(
            f,
            "the {what} became {value} in step {step} (rows {rows:?} of `{split}`): {cause}"
        )
    }
}

impl std::error::Error for Fault {}

/// The origin of a training's rows and weights, to name them when something is not finite.
#[derive(Debug, Clone, PartialEq)]
pub struct Origin {
    /// The name of the rows' split.
    pub split: String,
    /// The number of training rows that were made from each row of the split.
    pub rows_each: usize,
    /// The stored weights with which the training began, each with a noun for it (`model`).
    pub weights: Vec<(&'static str, PathBuf)>,
}

impl Default for Origin {
    fn default() -> Self {
        Self {
            split: "train".into(),
            rows_each: 1,
            weights: Vec::new(),
        }
    }
}

/// The name of the first trained tensor with a value that is not finite.
pub(super) fn broken(model: &CausalLm) -> candle_core::Result<Option<&str>> {
    for parameter in &model.parameters {
        if finite::in_memory(&parameter.var.as_detached_tensor())?.is_some() {
            return Ok(Some(&parameter.name));
        }
    }
    Ok(None)
}

/// Searches for the cause of a number that is not finite. Stored weights are searched once.
pub(super) struct Search<'a> {
    origin: &'a Origin,
    stored: OnceCell<Option<String>>,
}

impl<'a> Search<'a> {
    pub(super) fn new(origin: &'a Origin) -> Self {
        Self {
            origin,
            stored: OnceCell::new(),
        }
    }

    /// The numbers in the split, from 1, of rows that are given by their indices among the training rows.
    pub(super) fn rows(&self, indices: &[usize]) -> Vec<usize> {
        let each = self.origin.rows_each.max(1);
        let mut rows: Vec<usize> = indices.iter().map(|index| index / each + 1).collect();
        rows.dedup();
        rows
    }

    /// A clause about a value that is not finite in the stored weights with which the training began, if there is one.
    fn stored(&self) -> anyhow::Result<Option<&str>> {
        if self.stored.get().is_none() {
            let weights = self.origin.weights.iter();
            let weights: Vec<(&str, &Path)> = weights
                .map(|(noun, path)| (*noun, path.as_path()))
                .collect();
            let found = finite::blame(&weights)?;
            let _ = self.stored.set(found);
        }
        Ok(self.stored.get().and_then(Option::as_deref))
    }

    /// A clause about the likely cause of a fault in the step after `done` finished ones. Certain causes come before likely ones.
    pub(super) fn cause(
        &self,
        model: &CausalLm,
        optimizer: &Optimizer,
        settings: &Settings,
        done: u64,
    ) -> anyhow::Result<String> {
        if let Some(found) = self.stored()? {
            return Ok(found.to_owned());
        }
        if settings.loss_scaling
            && let Some(name) = model.overflown()?
        {
            return Ok(format!(
                "`{name}` has values beyond 65504, where f16 ends; use bf16, or neither bf16 nor fp16"
            ));
        }
        let rate = settings.learning_rate;
        if let Some(name) = broken(model)? {
            return Ok(if done == 0 {
                format!(
                    "`{name}` holds values that are not finite from the start; look at the stage that made it"
                )
            } else {
                format!(
                    "`{name}` is not finite since an earlier step; the learning_rate {rate} is too high, try a tenth"
                )
            });
        }
        if let Some(name) = optimizer.broken(&model.parameters) {
            return Ok(format!(
                "the optimiser's moments of `{name}` are not finite since an earlier step, whose gradient was too large; try a lower \
                 learning_rate or `max_grad_norm`"
            ));
        }
        Ok(if settings.loss_scaling {
            "f16 ends at 65504 and the model leaves it; use bf16, or neither bf16 nor fp16".into()
        } else if done == 0 {
            "all weights are finite, so these rows lead beyond the range of numbers".into()
        } else {
            format!(
                "the weights are finite but lead beyond the range of numbers; the learning_rate {rate} is likely too high, \
                 try a tenth"
            )
        })
    }

    /// Fails if a trained tensor has a value that is not finite at the end.
    pub(super) fn check_end(
        &self,
        model: &CausalLm,
        settings: &Settings,
        step: u64,
    ) -> anyhow::Result<()> {
        let Some(name) = broken(model)? else {
            return Ok(());
        };
        match self.stored()? {
            Some(found) => anyhow::bail!("`{name}` is not finite after step {step}: {found}"),
            None => anyhow::bail!(
                "`{name}` is not finite after step {step}; the learning_rate {} is too high, try a tenth",
                settings.learning_rate
            ),
        }
    }
}
