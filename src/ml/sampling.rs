//! How the next id is chosen from logits: transformers' logits processors and warpers in transformers' order, and a draw.
//!
//! The order is that of `GenerationMixin._get_logits_processor` (transformers 5.23, `generation/utils.py`): the repetition penalty, then,
//! where ids are drawn, temperature, `top_k`, `top_p` and `min_p`. Each is computed as in `generation/logits_process.py`.

use std::fmt;

use anyhow::ensure;
use pipeline_kernels::random::splitmix64;
use pipeline_kernels::vectors::argmax;

use super::torch_rng::TorchRng;

/// A logit is a NaN or infinite where the next id is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotFinite;

impl fmt::Display for NotFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a NaN or an infinity comes out of the model where it answers a prompt")
    }
}

impl std::error::Error for NotFinite {}

/// How ids are chosen. The names and defaults are those of transformers' `GenerationConfig`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Whether ids are drawn; otherwise the one with the largest score is taken, and only the repetition penalty counts.
    pub do_sample: bool,
    /// What scores are divided by, above 0.
    pub temperature: f64,
    /// How many of the largest scores are kept; 0 keeps all.
    pub top_k: usize,
    /// The probability that the kept ids have together at least, from 0 to 1; 1 keeps all.
    pub top_p: f64,
    /// The least probability of an id, as a part of the largest one, from 0 to 1.
    pub min_p: Option<f64>,
    /// What scores of ids that occurred are divided by (multiplied by, where they are negative), above 0; 1 changes nothing.
    pub repetition_penalty: f64,
}

impl Default for Sampling {
    /// What transformers does where nobody says anything: it takes the largest score.
    fn default() -> Self {
        Self {
            do_sample: false,
            temperature: 1.,
            top_k: 50,
            top_p: 1.,
            min_p: None,
            repetition_penalty: 1.,
        }
    }
}

impl Sampling {
    /// Whether all numbers are within their bounds.
    ///
    /// # Errors
    /// A sentence with the first number that is not.
    pub fn check(&self) -> anyhow::Result<()> {
        let positive = [
            ("temperature", self.temperature),
            ("repetition_penalty", self.repetition_penalty),
        ];
        for (name, value) in positive {
            ensure!(
                value.is_finite() && value > 0.,
                "`{name}` is {value}: expected a number above 0"
            );
        }
        for (name, value) in [("top_p", Some(self.top_p)), ("min_p", self.min_p)] {
            ensure!(
                value.is_none_or(|value| (0. ..=1.).contains(&value)),
                "`{name}` is {}: expected a number from 0 to 1",
                value.unwrap_or_default()
            );
        }
        Ok(())
    }

    /// The scores (vocabulary) as transformers' processors leave them; ids that can't be chosen have minus infinity. `ids` are all ids
    /// so far, the prompt's included.
    pub fn process(&self, ids: &[u32], scores: &mut [f32]) {
        penalize(ids, scores, self.repetition_penalty as f32);
        if !self.do_sample {
            return;
        }
        if (self.temperature - 1.).abs() > 0. {
            let temperature = self.temperature as f32;
            for score in scores.iter_mut() {
                *score /= temperature;
            }
        }
        if self.top_k > 0 && self.top_k < scores.len() {
            keep_largest(self.top_k, scores);
        }
        if self.top_p < 1. {
            keep_probable(self.top_p, scores);
        }
        if let Some(min_p) = self.min_p {
            keep_relative(min_p as f32, scores);
        }
    }
}

/// Keskar et al. 2019 (CTRL, arXiv 1909.05858), section 4.1, with transformers' case for negative scores.
fn penalize(ids: &[u32], scores: &mut [f32], penalty: f32) {
    if (penalty - 1.).abs() == 0. {
        return;
    }
    let mut ids = ids.to_vec();
    ids.sort_unstable();
    ids.dedup();
    for id in ids {
        if let Some(score) = scores.get_mut(id as usize) {
            *score = if *score < 0. {
                *score * penalty
            } else {
                *score / penalty
            };
        }
    }
}

/// Leaves the `count` largest scores, and those that are equal to the least of them.
fn keep_largest(count: usize, scores: &mut [f32]) {
    let mut sorted = scores.to_vec();
    let index = sorted.len() - count;
    let (_, least, _) = sorted.select_nth_unstable_by(index, f32::total_cmp);
    let least = *least;
    let low = scores.iter_mut().filter(|score| **score < least);
    low.for_each(|score| *score = f32::NEG_INFINITY);
}

/// Holtzman et al. 2020 (arXiv 1904.09751), section 3.1: leaves the fewest ids that have the probability `top_p` together.
fn keep_probable(top_p: f64, scores: &mut [f32]) {
    let mut order: Vec<usize> = (0..scores.len())
        .filter(|&id| scores[id] > f32::NEG_INFINITY)
        .collect();
    // Of equal scores the first ids go first, as in a stable sort.
    order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]));
    let weights = weights(scores);
    let total: f64 = weights.iter().sum();
    let dropped = (1. - top_p) as f32;
    let mut sum = 0.;
    let most = order.len().saturating_sub(1);
    for &id in order.iter().take(most) {
        sum += weights[id];
        if (sum / total) as f32 > dropped {
            break;
        }
        scores[id] = f32::NEG_INFINITY;
    }
}

/// Minh et al. 2024 (arXiv 2407.01082), section 3: leaves ids whose probability is at least `min_p` of the largest one.
fn keep_relative(min_p: f32, scores: &mut [f32]) {
    let weights = weights(scores);
    let total: f64 = weights.iter().sum();
    let probability = |weight: f64| (weight / total) as f32;
    let Some(first) = largest_place(scores) else {
        return;
    };
    let least = min_p * probability(weights[first]);
    for (id, (score, weight)) in scores.iter_mut().zip(&weights).enumerate() {
        if id != first && probability(*weight) < least {
            *score = f32::NEG_INFINITY;
        }
    }
}

/// The index of the first largest score.
fn largest_place(scores: &[f32]) -> Option<usize> {
    let most = scores.iter().copied().max_by(f32::total_cmp)?;
    scores.iter().position(|score| *score >= most)
}

/// `exp(score - the largest)`: probabilities but for their sum.
fn weights(scores: &[f32]) -> Vec<f64> {
    let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |score: &f32| f64::from(*score - most).exp();
    scores.iter().map(weight).collect()
}

/// Chooses the ids of one text, one after another.
#[derive(Debug, Clone)]
pub struct Sampler {
    sampling: Sampling,
    rng: TorchRng,
}

impl Sampler {
    /// Takes the largest logit each time.
    pub fn greedy() -> Self {
        Self::new(Sampling::default(), 0, 0)
    }

    /// A sampler for the text number `text` of those that `seed` decides on: each text has draws of its own, whatever others there are.
    pub fn new(sampling: Sampling, seed: u64, text: u64) -> Self {
        let mut state = seed ^ text.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Self {
            sampling,
            rng: TorchRng::new(splitmix64(&mut state)),
        }
    }

    /// How ids are chosen.
    pub fn sampling(&self) -> &Sampling {
        &self.sampling
    }

    /// Chooses otherwise from now on, with the same stream of random numbers.
    pub fn set(&mut self, sampling: Sampling) {
        self.sampling = sampling;
    }

    /// The id that follows a prompt and what is there of its answer, given its logits (vocabulary).
    ///
    /// # Errors
    /// [`NotFinite`], if a NaN or an infinity is among the logits.
    pub fn next(&mut self, prompt: &[u32], answer: &[u32], logits: &[f32]) -> anyhow::Result<u32> {
        let largest = argmax(logits).ok_or(NotFinite)?;
        let penalized = (self.sampling.repetition_penalty - 1.).abs() > 0.;
        if !self.sampling.do_sample && !penalized {
            return Ok(u32::try_from(largest)?);
        }
        let mut scores = logits.to_vec();
        self.sampling
            .process(&[prompt, answer].concat(), &mut scores);
        let index = if self.sampling.do_sample {
            self.draw(&scores)
        } else {
            largest_place(&scores)
        };
        Ok(u32::try_from(index.unwrap_or(largest))?)
    }

    /// An index, drawn with the softmax of the scores as probabilities.
    fn draw(&mut self, scores: &[f32]) -> Option<usize> {
        let weights = weights(scores);
        let total: f64 = weights.iter().sum();
        let mut left = self.unit() * total;
        let mut last = None;
        for (index, weight) in weights.iter().enumerate() {
            if *weight > 0. {
                last = Some(index);
                if left < *weight {
                    break;
                }
                left -= weight;
            }
        }
        last
    }

    /// A number of 53 random bits, at least 0 and below 1.
    fn unit(&mut self) -> f64 {
        let (high, low) = (self.rng.next_u32() >> 5, self.rng.next_u32() >> 6);
        (f64::from(high) * f64::from(1u32 << 26) + f64::from(low)) / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests;
