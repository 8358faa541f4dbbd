//! Checks of parameters.

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

    /// The parameter has to be a number above 0.
    pub fn positive(&mut self, value: f64, parameter: &str) {
        let holds = value > 0. && value.is_finite();
        self.rule(holds, parameter, "expected a number above 0");
    }

    /// The parameter has to be 0 or a number above.
    pub fn not_negative(&mut self, value: f64, parameter: &str) {
        let holds = value >= 0. && value.is_finite();
        self.rule(holds, parameter, "expected a number not below 0");
    }

    /// The parameter has to be in [0, 1).
    pub fn fraction(&mut self, value: f64, parameter: &str) {
        let holds = (0. ..1.).contains(&value);
        self.rule(holds, parameter, "expected a number from 0 to below 1");
    }

    /// The parameter has to be a count of 1 or more.
    pub fn at_least_1(&mut self, value: u64, parameter: &str) {
        self.rule(value > 0, parameter, "expected at least 1");
    }
}
