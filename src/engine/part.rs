//! The work of a stage in parts: shards, each of which makes of some rows what can be made of each row by itself, and the task that puts
//! together what they made.

use std::ffi::OsString;
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// The part of a stage's work that is a task's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// All of it.
    #[default]
    Whole,
    /// A shard.
    Shard(Shard),
    /// All of it, but for what shards have made: the folder of each, in their order.
    Joined(Vec<OsString>),
}

impl Part {
    /// Whether the task does all of the work.
    pub(super) fn is_whole(&self) -> bool {
        *self == Self::Whole
    }
}

/// One of several shards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    /// Its number, from 0.
    pub number: usize,
    /// The number of all shards.
    pub of: usize,
}

impl Shard {
    /// Its rows, out of `rows` that are counted from 0: those of all shards join to all rows, in order.
    pub fn range(self, rows: usize) -> Range<usize> {
        let start =
            |number: usize| (rows as u128 * number as u128 / self.of.max(1) as u128) as usize;
        start(self.number)..start(self.number + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_join_to_all_rows() {
        for (rows, of) in [(10, 3), (2, 5), (0, 2), (7, 1), (usize::MAX, 3)] {
            let mut next = 0;
            for number in 0..of {
                let range = Shard { number, of }.range(rows);
                assert_eq!(range.start, next);
                next = range.end;
            }
            assert_eq!(next, rows);
        }
    }
}
