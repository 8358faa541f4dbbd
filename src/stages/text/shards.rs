//! What is made of each row of a split by itself: here, in a shard, or before, by shards that are joined.

use std::fs::File;
use std::io::{BufRead as _, BufReader, BufWriter, Write as _};
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use arrow_array::RecordBatch;
use rayon::prelude::*;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::data::table::{BATCH_ROWS, Split};
use crate::engine::{Context, Shard};

/// The name of the file in which a shard keeps what it made of its rows of a split, a line of JSON each.
fn file_name(split: &Split) -> String {
    format!("{}.jsonl", split.name())
}

/// Where what is made of the rows of a split comes from.
pub(super) enum Rows {
    /// It is made now.
    Made,
    /// Shards made it.
    Read(Lines),
}

/// The lines of several files, one file after the other.
pub(super) struct Lines {
    /// The files that are not opened yet, the last one first.
    later: Vec<PathBuf>,
    now: Option<BufReader<File>>,
}

impl Lines {
    fn next(&mut self) -> Result<Vec<u8>> {
        loop {
            if let Some(file) = &mut self.now {
                let mut line = Vec::new();
                let read = file.read_until(b'\n', &mut line);
                if read.context("could not read what a shard made")? > 0 {
                    return Ok(line);
                }
            }
            let next = self.later.pop().context("the shards made too few rows")?;
            let file = File::open(&next);
            let file = file.with_context(|| format!("could not open `{}`", next.display()))?;
            self.now = Some(BufReader::new(file));
        }
    }
}

impl Rows {
    /// Of a split, from its first row on.
    pub(super) fn new(cx: &Context, split: &Split) -> Self {
        let Some(folders) = cx.shards() else {
            return Self::Made;
        };
        let files = folders
            .iter()
            .rev()
            .map(|folder| folder.join(file_name(split)));
        Self::Read(Lines {
            later: files.collect(),
            now: None,
        })
    }

    /// What is made of the next `count` rows; `make` makes it of one of them by its index among these, at least `least` of them in a task.
    ///
    /// # Errors
    /// That of the first row that fails, by its index.
    pub(super) fn next<T: DeserializeOwned + Send>(
        &mut self,
        count: usize,
        least: usize,
        make: impl Fn(usize) -> Result<T> + Sync,
    ) -> Result<Vec<T>> {
        match self {
            Self::Made => {
                let rows = (0..count).into_par_iter().with_min_len(least);
                let made: Vec<Result<T>> = rows.map(&make).collect();
                // Collected in one go, the error would be that of the row that failed first in time.
                made.into_iter().collect()
            }
            Self::Read(lines) => {
                let lines: Result<Vec<Vec<u8>>> = (0..count).map(|_| lines.next()).collect();
                let read = |line: Vec<u8>| {
                    serde_json::from_slice(&line).context("could not read what a shard made")
                };
                lines?.into_par_iter().map(read).collect()
            }
        }
    }
}

/// Makes a shard's rows of a split. `work` takes a batch and the number of rows of the split before it, and hands on what it makes of each
/// row, in order.
pub(super) fn make_shard<T: Serialize + Sync>(
    cx: &Context,
    shard: Shard,
    split: &Split,
    mut work: impl FnMut(&RecordBatch, usize, &mut dyn FnMut(&[T]) -> Result<()>) -> Result<()>,
) -> Result<()> {
    let rows = shard.range(split.rows());
    let path = cx.out().join(file_name(split));
    let wrote = || format!("could not write `{}`", path.display());
    let mut file = BufWriter::new(File::create(&path).with_context(wrote)?);
    let mut done = rows.start;
    let mut written = 0;
    for batch in split.slice(rows.start, rows.len()).batches(BATCH_ROWS) {
        let batch = batch?;
        work(&batch, done, &mut |made| {
            written += made.len();
            let lines: Result<Vec<Vec<u8>>, _> = made.par_iter().map(serde_json::to_vec).collect();
            for mut line in lines? {
                line.push(b'\n');
                file.write_all(&line).with_context(wrote)?;
            }
            cx.check_cancelled()
        })?;
        done += batch.num_rows();
    }
    ensure!(
        written == rows.len(),
        "the split `{}` has fewer rows than it says",
        split.name()
    );
    file.flush().with_context(wrote)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use anyhow::bail;

    use super::*;

    #[test]
    fn the_error_is_that_of_the_first_row_also_where_a_later_one_fails_before() {
        let pool = || rayon::ThreadPoolBuilder::new().num_threads(2).build();
        let later_failed = AtomicBool::new(false);
        let make = |row: usize| -> Result<u32> {
            if row == 0 {
                // Whichever thread takes row 1 first, row 0 fails after it.
                while !later_failed.load(Ordering::Acquire) {
                    rayon::yield_now();
                    std::thread::yield_now();
                }
                bail!("row 0");
            }
            later_failed.store(true, Ordering::Release);
            bail!("row {row}")
        };
        for _ in 0..20 {
            later_failed.store(false, Ordering::Release);
            let made = pool().unwrap().install(|| Rows::Made.next(2, 1, make));
            assert_eq!(made.unwrap_err().to_string(), "row 0");
        }
    }
}
