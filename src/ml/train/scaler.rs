//! The loss scale of torch's `GradScaler`, which keeps f16 gradients from underflow and overflow (Micikevicius et al. 2018, arXiv
//! 1710.03740, section 3.2).

/// The first scale.
const FIRST: f64 = 65_536.;
/// The number of consecutive good steps after which the scale doubles.
const GROWTH_INTERVAL: u64 = 2_000;

/// The loss scale, and the number of good steps since it changed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in crate::ml) struct Scaler {
    /// The factor of the loss.
    pub(in crate::ml) scale: f64,
    /// The number of consecutive good steps.
    pub(in crate::ml) good: u64,
}

impl Default for Scaler {
    fn default() -> Self {
        Self { scale: 1., good: 0 }
    }
}

impl Scaler {
    /// A scaler with the first scale if `on`; otherwise the scale is always 1.
    pub(super) fn new(on: bool) -> Self {
        Self {
            scale: if on { FIRST } else { 1. },
            good: 0,
        }
    }

    /// Updates the scale after a step (`GradScaler.update`): it is halved on overflow, and doubled after 2000 consecutive good steps as long as
    /// it stays finite in f32.
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
