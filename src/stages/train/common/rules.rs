//! Rules that parameters have to keep.

use crate::engine::Problem;

/// Problems with numbers that have to lie in a range.
#[derive(Default)]
pub(in crate::stages) struct Rules(pub(in crate::stages) Vec<Problem>);

impl Rules {
    pub(in crate::stages) fn rule(&mut self, holds: bool, parameter: &str, message: &str) {
        if !holds {
            self.0.push(Problem::new(parameter, message));
        }
    }
}
