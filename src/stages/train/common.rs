//! What the trainings share: parameters by transformers' names, and the way from folders to a trained artifact.

/// The parameters that say how far a training goes. With another number it may start where an earlier one ended.
pub(in crate::stages) const LENGTH_PARAMETERS: &[&str] = &["num_train_epochs", "max_steps"];

mod parameters;
mod rules;
mod run;

pub(in crate::stages) use parameters::{
    EvalStrategy, Optim, SamplingStrategy, SchedulerType, defaults, every, training_parameters,
};
pub(in crate::stages) use rules::Rules;
pub(in crate::stages) use run::{Job, has_split, note_fallback, pad_id, rows, run};

#[cfg(test)]
mod not_finite;
#[cfg(test)]
pub(in crate::stages) mod tests;
