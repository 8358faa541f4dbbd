//! What the trainings share: parameters by transformers' names, and the way from folders to a trained artifact.

/// The parameters that say how far a training goes. With another number it may start where an earlier one ended.
pub(super) const GROWS: &[&str] = &["num_train_epochs", "max_steps"];

mod parameters;
mod rules;
mod run;

pub(super) use parameters::{
    EvalStrategy, Optim, SamplingStrategy, SchedulerType, defaults, every, training_parameters,
};
pub(super) use rules::Rules;
pub(super) use run::{Job, has_split, pad_id, rows, run};

#[cfg(test)]
mod not_finite;
#[cfg(test)]
pub(super) mod tests;
