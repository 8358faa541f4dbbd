//! Dropout whose mask is a function of a seed and a place, so that it can be made again anywhere.

use rayon::prelude::*;

use crate::panels::{self, LANES};
use crate::random::{GAMMA, splitmix64};

/// A stream of masks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// Where the stream starts.
    pub start: u64,
    /// The probability of dropping a value.
    pub p: f64,
}

impl Dropout {
    /// What a value that is kept is multiplied by.
    pub fn scale(self) -> f32 {
        (1. / (1. - self.p)) as f32
    }

    /// The same stream from number `first` on.
    #[must_use]
    pub fn skip(self, first: u64) -> Self {
        Self {
            start: self.start.wrapping_add(first.wrapping_mul(GAMMA)),
            ..self
        }
    }

    /// The factors of the values number `first` and on of the stream: 0 or [`Dropout::scale`].
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

    /// Multiplies panels by the factors. Token `t` has the numbers `places[t] * features` and on.
    ///
    /// # Panics
    /// If there are not the panels of so many features for so many tokens.
    pub fn apply(self, panels: &mut [f32], features: usize, places: &[u64]) {
        let count = panels::panels(places.len());
        panels::check(panels.len(), features, count, "what is dropped from");
        let tokens = places.par_chunks(LANES);
        let panels = panels.par_chunks_mut(features.max(1) * LANES);
        panels.zip(tokens).for_each(|(panel, places)| {
            for (lane, &place) in places.iter().enumerate() {
                let column = panel.iter_mut().skip(lane).step_by(LANES);
                let factors = self.factors(place.wrapping_mul(features as u64));
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
        let places: Vec<u64> = (0..40).map(|token| (token * 7) % 41).collect();
        let mut panels = vec![1.; size(5, 40)];
        dropout.apply(&mut panels, 5, &places);
        for (token, place) in places.iter().enumerate() {
            let ours: Vec<f32> = column(&panels, 5, token).collect();
            assert_eq!(ours, all[*place as usize * 5..][..5]);
        }
    }
}
