//! Numbers that are none: where they came up, and what the likely cause is.

use std::fmt;

use super::Settings;
use crate::ml::model::Llama;

/// A step whose loss or gradient is NaN or infinite.
#[derive(Debug, Clone, PartialEq)]
pub struct Fault {
    /// The step, from 1.
    pub step: u64,
    /// What is not finite: `loss` or `gradient's norm`.
    pub what: &'static str,
    /// Its value.
    pub value: f64,
    /// The batch's rows, by their numbers in the split.
    pub rows: Vec<usize>,
    /// The split.
    pub split: String,
    /// The likely cause, and what may help.
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

/// The first trained tensor with a value that is not finite.
pub(super) fn broken(model: &Llama) -> candle_core::Result<Option<&str>> {
    for parameter in &model.parameters {
        let values = parameter.var.as_detached_tensor().flatten_all()?;
        if !values.to_vec1::<f32>()?.iter().all(|v| v.is_finite()) {
            return Ok(Some(&parameter.name));
        }
    }
    Ok(None)
}

/// Why a step after `done` finished ones is likely not finite.
pub(super) fn cause(model: &Llama, settings: &Settings, done: u64) -> candle_core::Result<String> {
    let rate = settings.learning_rate;
    Ok(match broken(model)? {
        Some(name) if done == 0 => format!(
            "`{name}` holds values that are not finite from the start; look at the stage that made it"
        ),
        Some(name) => format!(
            "`{name}` is not finite since an earlier step; the learning_rate {rate} is too high, try a tenth"
        ),
        None if settings.scaler => {
            "f16 ends at 65504 and the model leaves it; use bf16, or neither bf16 nor fp16".into()
        }
        None if done == 0 => {
            "the trained weights are finite, so the frozen model holds values that are not, or these rows lead beyond \
             the range of numbers"
                .into()
        }
        None => format!(
            "the trained weights are finite but lead beyond the range of numbers; the learning_rate {rate} is likely \
             too high, try a tenth"
        ),
    })
}
