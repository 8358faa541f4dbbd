//! Rules that parameters have to keep beside the bounds in their schema.

use crate::engine::Problem;

/// Collects the problems of parameters.
#[derive(Default)]
pub struct Rules(pub(in crate::stages) Vec<Problem>);

impl Rules {
    /// Adds a problem with `message` for the parameter unless the rule holds.
    pub fn rule(&mut self, holds: bool, parameter: &str, message: &str) {
        if !holds {
            self.0.push(Problem::new(parameter, message));
        }
    }

    /// Products are computed in one type.
    pub fn one_precision(&mut self, bf16: bool, fp16: bool) {
        let both = bf16 && fp16;
        self.rule(!both, "fp16", "`bf16` and `fp16` exclude each other");
    }
}
