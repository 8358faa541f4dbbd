//! The order in which rows are seen: Hugging Face's, so that runs can be compared row by row.

use crate::ml::torch_rng::TorchRng;

/// How rows are ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sampling {
    /// `torch.randperm` with the seed `seed + epoch`, as accelerate's `SeedableRandomSampler` does it.
    Random,
    /// As they come.
    Sequential,
}

/// The order of `count` rows in an epoch (from 0).
pub fn order(sampling: Sampling, count: usize, seed: u64, epoch: u64) -> Vec<usize> {
    match sampling {
        Sampling::Random => TorchRng::new(seed.wrapping_add(epoch)).permutation(count),
        Sampling::Sequential => (0..count).collect(),
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
            assert_eq!(order(Sampling::Random, 24, 3407, epoch), expected);
        }
    }
}
