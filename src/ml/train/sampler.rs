//! The order in which rows are seen: Hugging Face's, so that runs can be compared row by row.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ml::torch_rng::TorchRng;

/// The order in which rows are seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SamplingStrategy {
    /// Shuffled anew in each epoch, in the order that torch gives for the seed.
    #[default]
    Random,
    /// The order of the dataset.
    Sequential,
}

/// The order of `count` rows in an epoch, counted from 0. For [`SamplingStrategy::Random`] it is `torch.randperm` with the seed
/// `seed + epoch`, as in accelerate's `SeedableRandomSampler`.
pub fn order(strategy: SamplingStrategy, count: usize, seed: u64, epoch: u64) -> Vec<usize> {
    match strategy {
        SamplingStrategy::Random => TorchRng::new(seed.wrapping_add(epoch)).permutation(count),
        SamplingStrategy::Sequential => (0..count).collect(),
    }
}

/// The division of rows into micro-batches, and of these into steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grouping {
    /// The number of rows.
    pub rows: usize,
    /// The number of rows in a micro-batch; the last one of an epoch may have fewer.
    pub batch_size: usize,
    /// The number of micro-batches in a step; the last step of an epoch may have fewer.
    pub accumulation: usize,
}

impl Grouping {
    /// The number of micro-batches in an epoch.
    pub fn micro_batches(self) -> usize {
        self.rows.div_ceil(self.batch_size)
    }

    /// The number of steps in an epoch.
    pub fn steps(self) -> u64 {
        self.micro_batches().div_ceil(self.accumulation) as u64
    }
}

/// The rows of one step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// The number of the epoch, from 0.
    pub epoch: u64,
    /// The number of the step in the epoch, from 0.
    pub number: u64,
    /// The indices of the rows in each micro-batch.
    pub micro_batches: Vec<Vec<usize>>,
}

/// Chooses the rows of each step.
#[derive(Debug)]
pub struct Sampler {
    strategy: SamplingStrategy,
    seed: u64,
    grouping: Grouping,
    /// The last epoch that was requested, and its order of rows.
    order: Option<(u64, Vec<usize>)>,
}

impl Sampler {
    /// A sampler of rows that are divided into steps by `grouping`; `seed` is that of [`order`].
    pub fn new(strategy: SamplingStrategy, seed: u64, grouping: Grouping) -> Self {
        Self {
            strategy,
            seed,
            grouping,
            order: None,
        }
    }

    /// The rows of step number `step`, counted from 0 over all epochs.
    pub fn group(&mut self, step: u64) -> Group {
        let (epoch, number) = (step / self.grouping.steps(), step % self.grouping.steps());
        let known = self.order.take().filter(|(of_epoch, _)| *of_epoch == epoch);
        let (_, order) = self.order.insert(known.unwrap_or_else(|| {
            let order = order(self.strategy, self.grouping.rows, self.seed, epoch);
            (epoch, order)
        }));
        let all = order.chunks(self.grouping.batch_size);
        let first = number as usize * self.grouping.accumulation;
        let own = all.skip(first).take(self.grouping.accumulation);
        Group {
            epoch,
            number,
            micro_batches: own.map(<[usize]>::to_vec).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_that_of_torch() {
        let text = include_str!("../../../tests/golden/sampler_order_seed3407.json");
        let golden: serde_json::Value = serde_json::from_str(text).unwrap();
        let orders: Vec<Vec<usize>> =
            serde_json::from_value(golden["epoch_orders"].clone()).unwrap();
        assert_eq!(orders.len(), 2);
        for (epoch, expected) in (0..).zip(orders) {
            assert_eq!(order(SamplingStrategy::Random, 24, 3407, epoch), expected);
        }
    }

    #[test]
    fn steps_of_an_epoch_have_each_row_once_and_the_last_ones_may_be_smaller() {
        let grouping = Grouping {
            rows: 7,
            batch_size: 2,
            accumulation: 3,
        };
        let mut sampler = Sampler::new(SamplingStrategy::Random, 5, grouping);
        assert_eq!((grouping.micro_batches(), grouping.steps()), (4, 2));
        // Whether steps come one after the other or a training begins in the middle makes no difference.
        for step in [0, 1, 2, 3, 1, 0] {
            let group = sampler.group(step);
            assert_eq!((group.epoch, group.number), (step / 2, step % 2));
            let all = order(SamplingStrategy::Random, 7, 5, step / 2);
            let (first, second) = all.split_at(6);
            let rows = if step % 2 == 0 { first } else { second };
            assert_eq!(group.micro_batches.concat(), rows);
            let sizes: Vec<usize> = group.micro_batches.iter().map(Vec::len).collect();
            assert_eq!(sizes, if step % 2 == 0 { vec![2; 3] } else { vec![1] });
        }
    }
}
