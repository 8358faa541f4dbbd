//! torch's `GradScaler`: a loss scale that keeps f16 gradients between underflow and overflow.

/// The first scale.
const FIRST: f64 = 65_536.;
/// Good steps in a row after which the scale doubles.
const GROWTH_INTERVAL: u64 = 2_000;

/// The scale, and the good steps since it changed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in crate::ml) struct Scaler {
    /// The factor on the loss.
    pub(in crate::ml) scale: f64,
    /// Good steps in a row.
    pub(in crate::ml) good: u64,
}

impl Default for Scaler {
    fn default() -> Self {
        Self { scale: 1., good: 0 }
    }
}

impl Scaler {
    /// At work if `on`; otherwise the scale is 1.
    pub(super) fn new(on: bool) -> Self {
        Self {
            scale: if on { FIRST } else { 1. },
            good: 0,
        }
    }

    /// The scale after a step (`GradScaler.update`): halved on overflow, doubled after 2000 good steps in a row as long as it
    /// stays a number of f32.
    pub(super) fn update(&mut self, overflow: bool) {
        if overflow {
            (self.scale, self.good) = (self.scale / 2., 0);
            return;
        }
        self.good += 1;
        if self.good == GROWTH_INTERVAL {
            let grown = self.scale * 2.;
            if (grown as f32).is_finite() {
                self.scale = grown;
            }
            self.good = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scaler(scale: f64, good: u64) -> Scaler {
        Scaler { scale, good }
    }

    #[test]
    fn the_scale_follows_grad_scaler() {
        let mut ours = Scaler::new(true);
        assert_eq!(ours, scaler(65_536., 0));
        for good in 1..2_000 {
            ours.update(false);
            assert_eq!(ours, scaler(65_536., good));
        }
        ours.update(false);
        assert_eq!(ours, scaler(131_072., 0));
        ours.update(false);
        ours.update(true);
        assert_eq!(ours, scaler(65_536., 0));
        ours.update(true);
        assert_eq!(ours, scaler(32_768., 0));
        // An overflow starts the count again.
        for _ in 0..1_999 {
            ours.update(false);
        }
        ours.update(true);
        assert_eq!(ours, scaler(16_384., 0));
    }

    #[test]
    fn the_scale_stays_a_number_of_f32() {
        let largest = 2f64.powi(127);
        let mut ours = scaler(largest, 1_999);
        ours.update(false);
        assert_eq!(ours, scaler(largest, 0));
    }
}
