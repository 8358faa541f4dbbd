//! What a training reports: metrics, and how it ended.

use std::collections::BTreeMap;

use serde_json::Value;

use super::best::Best;
use super::fault::Fault;

/// The metrics of a step, by TRL's names.
#[derive(Debug, Clone, PartialEq)]
pub struct Log {
    /// The number of finished steps.
    pub step: u64,
    /// The number of epochs seen, with its fraction.
    pub epoch: f64,
    /// The metrics.
    pub values: BTreeMap<String, f64>,
}

impl Log {
    /// One line of JSON, without a line break, with all digits of the numbers.
    pub fn line(&self) -> String {
        let mut line = format!("{{\"step\":{},\"epoch\":{:?}", self.step, self.epoch);
        for (name, value) in &self.values {
            line.push_str(",\"");
            line.push_str(name);
            line.push_str("\":");
            if value.is_finite() {
                line.push_str(&value.to_string());
            } else {
                line.push_str("null");
            }
        }
        line.push('}');
        line
    }

    /// Reads what [`Log::line`] wrote; none if it is something else. `null` is read as NaN.
    pub fn parse(line: &str) -> Option<Self> {
        let Ok(Value::Object(fields)) = serde_json::from_str(line) else {
            return None;
        };
        let number = |value: &Value| match value {
            Value::Null => Some(f64::NAN),
            value => value.as_f64(),
        };
        let values = fields
            .iter()
            .filter(|(name, _)| !matches!(name.as_str(), "step" | "epoch"));
        Some(Self {
            step: fields.get("step")?.as_u64()?,
            epoch: fields.get("epoch").and_then(number).unwrap_or(f64::NAN),
            values: values
                .filter_map(|(name, value)| Some((name.clone(), number(value)?)))
                .collect(),
        })
    }
}

/// A report to the callback, before the first step, after each micro-batch, and with logs after each step.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Step {
    /// The number of finished steps.
    pub step: u64,
    /// The number of all steps.
    pub total: u64,
    /// The number of finished micro-batches of the current step; 0 after a step.
    pub micro_batches: usize,
    /// The number of tokens in this micro-batch, without padding.
    pub tokens: usize,
    /// The number of tokens computed in the pass that started with this micro-batch; 0 if it is not the first one of a pass.
    pub computed: usize,
    /// The metrics to show.
    pub logs: Vec<Log>,
    /// The fault for which this step's update was skipped.
    pub skipped: Option<Fault>,
    /// In the first report of a training, a sentence about each checkpoint that could not be used.
    pub passed_over: Vec<String>,
}

/// How a training ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Ending {
    /// All steps are done, or the patience was exhausted.
    Finished {
        /// The metrics of each step and of each evaluation.
        history: Vec<Log>,
        /// The number of finished steps.
        step: u64,
        /// The number of steps that were skipped because something was not finite.
        skipped: u64,
        /// The best evaluation.
        best: Best,
    },
    /// The callback stopped the training. A checkpoint was written if there is a folder for it.
    Interrupted {
        /// The number of finished steps.
        step: u64,
    },
}

/// The sums of metrics that are logged as means.
#[derive(Debug, Clone, Default, PartialEq)]
pub(in crate::ml) struct Window {
    /// For each name, the sum and the count of its values.
    pub(in crate::ml) sums: BTreeMap<String, (f64, u64)>,
}

impl Window {
    pub(super) fn add(&mut self, name: &str, value: f64) {
        let sum = self.sums.entry(name.to_owned()).or_default();
        *sum = (sum.0 + value, sum.1 + 1);
    }

    pub(super) fn merge(&mut self, other: &Self) {
        for (name, (sum, count)) in &other.sums {
            let own = self.sums.entry(name.clone()).or_default();
            *own = (own.0 + sum, own.1 + count);
        }
    }

    pub(super) fn means(&self) -> BTreeMap<String, f64> {
        let means = self.sums.iter();
        means
            .map(|(name, (sum, count))| (name.clone(), sum / *count as f64))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_as_it_was_written() {
        let log = Log {
            step: 3,
            epoch: 0.1,
            values: [("loss", 0.1 + 0.2), ("rewards/margins", -5e-324)]
                .map(|(name, value)| (name.to_owned(), value))
                .into(),
        };
        assert_eq!(Log::parse(&log.line()), Some(log));
        let read = Log::parse("{\"step\":1,\"epoch\":1.0,\"loss\":null,\"note\":\"x\"}").unwrap();
        assert!(read.values["loss"].is_nan() && read.values.len() == 1);
        assert_eq!(Log::parse("nonsense"), None);
    }
}
