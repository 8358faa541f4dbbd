//! The interleaving of the rows of several datasets, in the same order as `datasets.interleave_datasets` with the same seed.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use arrow_array::RecordBatch;
use arrow_select::interleave::interleave_record_batch;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::data::table::{BATCH_ROWS, Split, Writer};

/// The number of rows that are assembled at once. Each of them may be large.
const ROWS: usize = 256;

/// When interleaving ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StoppingStrategy {
    /// When one dataset has no more rows: no row is read twice, and some are not read.
    FirstExhausted,
    /// When every row was read once: smaller datasets are read again from their beginning meanwhile.
    AllExhausted,
    /// When every row was read once; no row is read twice.
    AllExhaustedWithoutReplacement,
}

/// How rows of several datasets become one.
#[derive(Debug, Clone, PartialEq)]
pub struct Mix {
    /// The probability of each dataset; none takes them in turn.
    pub probabilities: Option<Vec<f64>>,
    /// Decides which dataset each row is taken from.
    pub seed: u64,
    /// When it ends.
    pub stopping_strategy: StoppingStrategy,
}

impl Mix {
    /// The index of the dataset from which each row comes, for datasets of these lengths. The rows of a dataset are taken in order, and
    /// start again at its beginning when it has no more.
    pub(super) fn order(&self, lengths: &[usize]) -> Result<Box<dyn Iterator<Item = usize>>> {
        let count = lengths.len();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let shortest = lengths.iter().copied().min().unwrap_or(0);
        let lengths = lengths.to_vec();
        let Some(probabilities) = &self.probabilities else {
            let rounds = |rounds: usize| (0..rounds).flat_map(move |_| 0..count);
            return Ok(match self.stopping_strategy {
                StoppingStrategy::FirstExhausted => Box::new(rounds(shortest)),
                StoppingStrategy::AllExhausted => {
                    let empty = lengths.contains(&0);
                    ensure!(
                        !empty || longest == 0,
                        "one of the datasets has no row to read again"
                    );
                    Box::new(rounds(longest))
                }
                StoppingStrategy::AllExhaustedWithoutReplacement => {
                    let round = move |number: usize| {
                        let lengths = lengths.clone();
                        (0..count).filter(move |source| {
                            lengths.get(*source).is_some_and(|length| number < *length)
                        })
                    };
                    Box::new((0..longest).flat_map(round))
                }
            });
        };
        let drawn: Vec<bool> = probabilities.iter().map(|one| *one > 0.0).collect();
        for (length, drawn) in lengths.iter().zip(&drawn) {
            ensure!(
                *length > 0 || !drawn,
                "one of the datasets has no rows, so that none can be drawn of it"
            );
        }
        let mut draws = Draws::new(probabilities, self.seed);
        let mut taken = vec![0; count];
        let strategy = self.stopping_strategy;
        // The number of datasets with rows that have not been read.
        let mut open = drawn.iter().filter(|drawn| **drawn).count();
        let all = open;
        Ok(Box::new(std::iter::from_fn(move || {
            loop {
                let is_done = match strategy {
                    StoppingStrategy::FirstExhausted => open < all,
                    _ => open == 0,
                };
                if is_done {
                    return None;
                }
                let source = draws.next();
                let (taken, length) = (taken.get_mut(source)?, *lengths.get(source)?);
                if strategy == StoppingStrategy::AllExhaustedWithoutReplacement && *taken >= length
                {
                    continue;
                }
                *taken += 1;
                open -= usize::from(*taken == length);
                return Some(source);
            }
        })))
    }
}

/// The results of repeated calls of `numpy.random.default_rng(seed).choice(n, size=1000, p=probabilities)`.
struct Draws {
    random: Pcg64,
    sums: Vec<f64>,
}

impl Draws {
    fn new(probabilities: &[f64], seed: u64) -> Self {
        let mut sum = 0.0;
        let sums = probabilities.iter().map(|one| {
            sum += one;
            sum
        });
        let mut sums: Vec<f64> = sums.collect();
        for one in &mut sums {
            *one /= sum;
        }
        Self {
            random: Pcg64::new(seed),
            sums,
        }
    }

    fn next(&mut self) -> usize {
        let drawn = self.random.double();
        self.sums.partition_point(|sum| *sum <= drawn)
    }
}

/// The default generator of `NumPy`: PCG64 (O'Neill 2014, "PCG: A family of simple fast space-efficient statistically good algorithms for
/// random number generation"), seeded by its `SeedSequence`.
struct Pcg64 {
    state: u128,
    step: u128,
}

impl Pcg64 {
    fn new(seed: u64) -> Self {
        let words = seed_words(seed);
        let pair = |at: usize| {
            let word = |at: usize| u128::from(words.get(at).copied().unwrap_or_default());
            (word(at) << 64) | word(at + 1)
        };
        let mut random = Self {
            state: 0,
            step: (pair(2) << 1) | 1,
        };
        random.advance();
        random.state = random.state.wrapping_add(pair(0));
        random.advance();
        random
    }

    fn advance(&mut self) {
        const FACTOR: u128 = 0x2360_ed05_1fc6_5da4_4385_df64_9fcc_f645;
        self.state = self.state.wrapping_mul(FACTOR).wrapping_add(self.step);
    }

    /// A uniform number from 0 (inclusive) to 1 (exclusive).
    fn double(&mut self) -> f64 {
        self.advance();
        let folded = ((self.state >> 64) as u64) ^ (self.state as u64);
        let bits = folded.rotate_right((self.state >> 122) as u32);
        (bits >> 11) as f64 / 9_007_199_254_740_992.0
    }
}

/// `numpy.random.SeedSequence(seed).generate_state(4, uint64)`.
fn seed_words(seed: u64) -> [u64; 4] {
    let mut factor = 0x43b0_d7e5_u32;
    let mut hash = |value: u32| {
        let value = value ^ factor;
        factor = factor.wrapping_mul(0x931e_8875);
        let value = value.wrapping_mul(factor);
        value ^ (value >> 16)
    };
    let mut pool = [seed as u32, (seed >> 32) as u32, 0, 0].map(&mut hash);
    for from in 0..4 {
        for to in (0..4).filter(|to| *to != from) {
            let left = pool[to].wrapping_mul(0xca01_f9dd);
            let mixed = left.wrapping_sub(hash(pool[from]).wrapping_mul(0x4973_f715));
            pool[to] = mixed ^ (mixed >> 16);
        }
    }
    let mut factor = 0x8b51_f9dd_u32;
    let mut half = |at: usize| {
        let value = pool[at % 4] ^ factor;
        factor = factor.wrapping_mul(0x58f3_8ded);
        let value = value.wrapping_mul(factor);
        u64::from(value ^ (value >> 16))
    };
    std::array::from_fn(|at| half(2 * at) | (half(2 * at + 1) << 32))
}

/// Interleaves the rows of several datasets, which are stored one after the other in the Parquet file `source`, and writes at most `most` of
/// them to `destination`. `progress` is called with the number of rows so far and may stop with an error. Returns the number of rows.
pub fn mix_rows(
    source: &Path,
    lengths: &[usize],
    mix: &Mix,
    most: usize,
    destination: &Path,
    progress: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<usize> {
    let all = Split::of_files("source", vec![source.to_owned()])?;
    let mut start = 0;
    let mut sides: Vec<Box<dyn Fn() -> Rows<'static>>> = Vec::with_capacity(lengths.len());
    for length in lengths {
        let part = all.slice(start, *length);
        start += length;
        sides.push(Box::new(move || Box::new(part.batches(BATCH_ROWS))));
    }
    let mut mixed = Mixed::new(Box::new(mix.order(lengths)?.take(most)), sides);
    let mut writer = Writer::create_file(destination, all.schema().clone())?;
    let mut rows = 0;
    while let Some(batch) = mixed.batch()? {
        rows += batch.num_rows();
        writer.write(&batch)?;
        progress(rows as u64)?;
    }
    writer.finish()?;
    Ok(rows)
}

/// An iterator over the rows of a dataset.
pub(super) type Rows<'a> = Box<dyn Iterator<Item = Result<RecordBatch>> + 'a>;

/// The interleaved rows of several datasets with the same columns.
pub(super) struct Mixed<'a> {
    order: Box<dyn Iterator<Item = usize>>,
    sources: Vec<Side<'a>>,
}

/// The reading position in one dataset.
struct Side<'a> {
    open: Box<dyn Fn() -> Rows<'a> + 'a>,
    rows: Rows<'a>,
    /// The batch with the next row, and (`next`) that row's index in it.
    held: Option<RecordBatch>,
    place: usize,
}

impl<'a> Mixed<'a> {
    pub(super) fn new(
        order: Box<dyn Iterator<Item = usize>>,
        sources: Vec<Box<dyn Fn() -> Rows<'a> + 'a>>,
    ) -> Self {
        let side = |open: Box<dyn Fn() -> Rows<'a> + 'a>| Side {
            rows: open(),
            open,
            held: None,
            place: 0,
        };
        Self {
            order,
            sources: sources.into_iter().map(side).collect(),
        }
    }

    /// The next rows.
    pub(super) fn batch(&mut self) -> Result<Option<RecordBatch>> {
        let order: Vec<usize> = self.order.by_ref().take(ROWS).collect();
        if order.is_empty() {
            return Ok(None);
        }
        // Each row as (batch, row), with the batches of all datasets in one list.
        let mut batches: Vec<RecordBatch> = Vec::new();
        let mut rows = vec![(0, 0); order.len()];
        for (number, side) in self.sources.iter_mut().enumerate() {
            let wanted = rows
                .iter_mut()
                .zip(&order)
                .filter(|(_, source)| **source == number);
            side.fill(&mut batches, &mut wanted.map(|(row, _)| row))?;
        }
        let batches: Vec<&RecordBatch> = batches.iter().collect();
        Ok(Some(interleave_record_batch(&batches, &rows)?))
    }
}

impl Side<'_> {
    /// Assigns the next rows to `wanted`, and appends the batches that hold them to `batches`.
    fn fill(
        &mut self,
        batches: &mut Vec<RecordBatch>,
        wanted: &mut dyn Iterator<Item = &mut (usize, usize)>,
    ) -> Result<()> {
        let mut is_listed = false;
        for row in wanted {
            while (self.held.as_ref()).is_none_or(|batch| self.place >= batch.num_rows()) {
                self.place = 0;
                is_listed = false;
                let mut next = self.rows.next();
                if next.is_none() {
                    self.rows = (self.open)();
                    next = self.rows.next();
                }
                self.held = Some(next.context("a dataset has no rows")??);
            }
            if !is_listed {
                batches.extend(self.held.clone());
                is_listed = true;
            }
            *row = (batches.len() - 1, self.place);
            self.place += 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
