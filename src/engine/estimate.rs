//! What running a stage would take, as far as that can be told before.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What running a stage would take.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Estimate {
    /// What will be done, by name: steps, tokens, trained parameters.
    pub counts: BTreeMap<String, u64>,
    /// The most memory, in bytes, by what it is for.
    pub memory: BTreeMap<String, u64>,
    /// The sum of that.
    pub peak_memory: u64,
    /// Whether `peak_memory` is known to leave something out.
    pub is_lower_bound: bool,
    /// The most memory of a GPU, in bytes, by what it is for, if the stage ran on one; empty in a program that uses none.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub gpu_memory: BTreeMap<String, u64>,
}

impl Estimate {
    /// What the memory is for, in bytes, the largest part first.
    pub fn largest_first(&self) -> Vec<(&str, u64)> {
        largest_first(&self.memory)
    }

    /// The same of a GPU's.
    pub fn largest_of_gpu_first(&self) -> Vec<(&str, u64)> {
        largest_first(&self.gpu_memory)
    }
}

fn largest_first(parts: &BTreeMap<String, u64>) -> Vec<(&str, u64)> {
    let parts = parts.iter();
    let mut parts: Vec<_> = parts.map(|(name, size)| (name.as_str(), *size)).collect();
    parts.sort_by_key(|(_, size)| std::cmp::Reverse(*size));
    parts
}
