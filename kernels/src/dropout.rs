//! Dropout whose mask depends on nothing but a seed and a value's index, so that any part of it can be recomputed anywhere.

use rayon::prelude::*;

use crate::panels::{self, LANES};
use crate::random::{GAMMA, splitmix64};

/// A stream of dropout factors (Srivastava et al. 2014, JMLR 15, in the inverted form: kept values are scaled up in training).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// The state of splitmix64 at which the stream starts.
    pub start: u64,
    /// The probability of dropping a value, from 0 (inclusive) to 1 (exclusive).
    pub p: f64,
}

impl Dropout {
    /// The factor of a value that is kept, `1 / (1 - p)`.
    pub fn scale(self) -> f32 {
        (1. / (1. - self.p)) as f32
    }

    /// The same stream without its first `first` factors.
    #[must_use]
    pub fn skip(self, first: u64) -> Self {
        Self {
            start: self.start.wrapping_add(first.wrapping_mul(GAMMA)),
            ..self
        }
    }

    /// The endless stream of factors from index `first` on; each is 0 or [`Dropout::scale`].
    pub fn factors(self, first: u64) -> impl Iterator<Item = f32> {
        let (scale, limit) = (self.scale(), (self.p * 2f64.powi(64)) as u64);
        let mut state = self.skip(first).start;
        std::iter::repeat_with(move || {
            if splitmix64(&mut state) < limit {
                0.
            } else {
                scale
            }
        })
    }

    /// Multiplies panels of `features` for `numbers.len()` tokens by the factors, in place. Token `t` takes the factors from index
    /// `numbers[t] * features` on, one for each feature, so a token's mask depends on its number and not on where it is in the batch.
    ///
    /// # Panics
    /// If `panels` has not [`panels::size`]`(features, numbers.len())` floats.
    pub fn apply(self, panels: &mut [f32], features: usize, numbers: &[u64]) {
        let count = panels::panels(numbers.len());
        panels::check(panels.len(), features, count, "what is dropped from");
        let tokens = numbers.par_chunks(LANES);
        let panels = panels.par_chunks_mut(features.max(1) * LANES);
        panels.zip(tokens).for_each(|(panel, numbers)| {
            for (lane, &number) in numbers.iter().enumerate() {
                let column = panel.iter_mut().skip(lane).step_by(LANES);
                let factors = self.factors(number.wrapping_mul(features as u64));
                for (value, factor) in column.zip(factors) {
                    *value *= factor;
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::panels::{column, size};

    #[test]
    fn a_mask_depends_on_the_place_alone() {
        let dropout = Dropout { start: 7, p: 0.3 };
        let all: Vec<f32> = dropout.factors(0).take(500).collect();
        assert_eq!(
            dropout.factors(123).take(50).collect::<Vec<_>>(),
            all[123..173]
        );
        let zeros = all.iter().filter(|x| **x == 0.).count();
        assert!((100..200).contains(&zeros));
        let skipped = dropout.skip(123).factors(2);
        assert_eq!(skipped.take(5).collect::<Vec<_>>(), all[125..130]);
        let numbers: Vec<u64> = (0..40).map(|token| (token * 7) % 41).collect();
        let mut panels = vec![1.; size(5, 40)];
        dropout.apply(&mut panels, 5, &numbers);
        for (token, number) in numbers.iter().enumerate() {
            let ours: Vec<f32> = column(&panels, 5, token).collect();
            assert_eq!(ours, all[*number as usize * 5..][..5]);
        }
    }
}
