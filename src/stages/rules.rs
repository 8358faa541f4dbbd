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
}
