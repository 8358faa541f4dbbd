//! `split_dataset`: a held-out part.

use anyhow::{Context as _, Result, ensure};
use arrow::array::{BooleanArray, RecordBatch};
use arrow::compute::filter_record_batch;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::artifacts::Dataset;
use crate::data::table::{BATCH_ROWS, Split, Writer, splits};
use crate::engine::{Context, Input, Problem, Stage};

/// Splits the rows of `train` into `train` and `test`.
///
/// Which rows are held out is drawn with `seed`; in both splits the rows keep their order, and training shuffles them anyway. Other
/// splits of the dataset are carried along.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SplitDataset {
    /// The dataset to split.
    dataset: Input<Dataset>,
    /// How many rows become `test`: below 1 the part of all rows (rounded up), else their number.
    test_size: f64,
    /// Decides which rows are held out.
    #[serde(default = "default_seed")]
    seed: u64,
    /// Draw the rows; without it the last rows are held out.
    #[serde(default = "default_shuffle")]
    shuffle: bool,
}

fn default_seed() -> u64 {
    42
}

fn default_shuffle() -> bool {
    true
}

impl Stage for SplitDataset {
    const KIND: &'static str = "split_dataset";
    const VERSION: u32 = 1;
    type Output = Dataset;
    const BOUNDED: bool = true;

    fn check(&self) -> Vec<Problem> {
        let size = self.test_size;
        let fits = size > 0.0 && size.is_finite() && (size < 1.0 || size.fract() == 0.0);
        if fits {
            return Vec::new();
        }
        let problem = Problem::new(
            "test_size",
            "expected a part above 0 and below 1, or a number of rows",
        );
        vec![problem.hint("0.1 holds out a tenth, 100 holds out 100 rows")]
    }

    fn run(&self, cx: &Context) -> Result<()> {
        let folder = cx.input(&self.dataset)?;
        let all = splits(folder)?;
        ensure!(
            !all.contains_key("test"),
            "the dataset has a split `test` already, so there is nothing to hold out"
        );
        let train = Split::open(folder, "train")?;
        let rows = train.rows();
        let held_out = test_rows(rows, self.test_size);
        ensure!(
            held_out < rows,
            "`test_size` {} holds out {held_out} of {rows} rows and leaves none to train on",
            self.test_size
        );
        let is_test = draw(rows, held_out, self.seed, self.shuffle);
        let mut writers = [
            Writer::create(cx.out(), "train", train.schema().clone())?,
            Writer::create(cx.out(), "test", train.schema().clone())?,
        ];
        let mut done = 0;
        for batch in train.batches(BATCH_ROWS) {
            let batch = batch?;
            let range = is_test.get(done..done + batch.num_rows());
            let mask = range.context("the split holds more rows than its files say")?;
            for (writer, held_out) in writers.iter_mut().zip([false, true]) {
                writer.write(&only(&batch, mask, held_out)?)?;
            }
            done += batch.num_rows();
            cx.progress(done as u64, Some(rows as u64), "rows");
            cx.check_cancelled()?;
        }
        for writer in writers {
            writer.finish()?;
        }
        for file in all
            .iter()
            .filter(|(name, _)| *name != "train")
            .flat_map(|(_, files)| files)
        {
            let name = file.file_name().context("a file without a name")?;
            let copied = std::fs::copy(file, cx.out().join(name));
            copied.with_context(|| format!("could not copy `{}`", file.display()))?;
        }
        cx.note(
            "rows",
            std::collections::BTreeMap::from([("train", rows - held_out), ("test", held_out)]),
        );
        Ok(())
    }
}

fn only(batch: &RecordBatch, is_test: &[bool], held_out: bool) -> Result<RecordBatch> {
    let mask: BooleanArray = is_test.iter().map(|test| Some(*test == held_out)).collect();
    Ok(filter_record_batch(batch, &mask)?)
}

/// The number of rows held out, rounded as `datasets` does.
fn test_rows(rows: usize, test_size: f64) -> usize {
    if test_size < 1.0 {
        (test_size * rows as f64).ceil() as usize
    } else {
        test_size as usize
    }
}

/// Which rows are held out.
fn draw(rows: usize, held_out: usize, seed: u64, shuffle: bool) -> Vec<bool> {
    let mut is_test = vec![false; rows];
    if !shuffle {
        is_test[rows - held_out..].fill(true);
        return is_test;
    }
    // Floyd's sampling: each set of `held_out` rows is as likely as any other, and no permutation is held.
    let mut random = SplitMix(seed);
    for last in rows - held_out..rows {
        let drawn = random.below(last as u64 + 1) as usize;
        if is_test[drawn] {
            is_test[last] = true;
        } else {
            is_test[drawn] = true;
        }
    }
    is_test
}

/// `SplitMix64` (Steele, Lea, Flood 2014): small, well mixed, and the same on every machine.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// An even draw from `0..bound`.
    fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use arrow::array::{ArrayRef, StringArray};

    use super::*;
    use crate::data;

    fn dataset(folder: &Path, rows: usize) -> std::path::PathBuf {
        let dataset = folder.join("dataset");
        std::fs::create_dir(&dataset).unwrap();
        let texts: ArrayRef = Arc::new(StringArray::from_iter_values(
            (0..rows).map(|row| row.to_string()),
        ));
        let batch = RecordBatch::try_from_iter([("prompt", texts)]).unwrap();
        let mut writer = Writer::create(&dataset, "train", batch.schema()).unwrap();
        writer.write(&batch).unwrap();
        writer.finish().unwrap();
        dataset
    }

    fn run(yaml: &str, rows: usize) -> Result<[Vec<usize>; 2]> {
        let folder = tempfile::tempdir().unwrap();
        let dataset = dataset(folder.path(), rows);
        let cx = Context::for_test(folder.path(), &[("pairs", &dataset)], &[]);
        serde_yaml::from_str::<SplitDataset>(yaml)
            .unwrap()
            .run(&cx)?;
        let read = |split| -> Vec<usize> {
            let rows = data::head(cx.out(), split, usize::MAX).unwrap();
            rows.iter()
                .map(|row| row["prompt"].as_str().unwrap().parse().unwrap())
                .collect()
        };
        Ok([read("train"), read("test")])
    }

    #[test]
    fn every_row_is_in_one_split_and_the_seed_decides_which() {
        let [train, test] = run("{dataset: pairs, test_size: 0.1, seed: 1}", 3001).unwrap();
        assert_eq!((train.len(), test.len()), (2700, 301));
        let mut all = [train.clone(), test.clone()].concat();
        all.sort_unstable();
        assert_eq!(all, (0..3001).collect::<Vec<_>>());
        assert!(test.is_sorted() && test[150] > 1000 && test[150] < 2000);
        assert_eq!(
            run("{dataset: pairs, test_size: 0.1, seed: 1}", 3001).unwrap(),
            [train, test.clone()]
        );
        assert_ne!(
            run("{dataset: pairs, test_size: 0.1, seed: 2}", 3001).unwrap()[1],
            test
        );
    }

    #[test]
    fn without_shuffle_the_last_rows_are_held_out() {
        let [train, test] = run("{dataset: pairs, test_size: 2, shuffle: false}", 5).unwrap();
        assert_eq!((train, test), (vec![0, 1, 2], vec![3, 4]));
    }

    #[test]
    fn sizes_that_leave_nothing_are_errors() {
        let error = run("{dataset: pairs, test_size: 5}", 5)
            .unwrap_err()
            .to_string();
        assert!(error.contains("leaves none"), "{error}");
        for size in ["0", "-1", "1.5", ".nan", ".inf"] {
            let yaml = format!("{{dataset: pairs, test_size: {size}}}");
            let stage: SplitDataset = serde_yaml::from_str(&yaml).unwrap();
            assert_eq!(stage.check().len(), 1, "{size}");
        }
    }

    #[test]
    fn draws_are_even() {
        let mut counts = [0; 5];
        for seed in 0..2000 {
            for (row, test) in draw(5, 2, seed, true).into_iter().enumerate() {
                counts[row] += u32::from(test);
            }
        }
        assert!(
            counts.iter().all(|count| (720..880).contains(count)),
            "{counts:?}"
        );
    }
}
