//! A part of a folder of splits as a folder of its own.

use std::path::Path;

use anyhow::Result;

use super::table::{BATCH_ROWS, Split, Writer, splits};

/// Writes the first `rows` rows of each split of `folder` into `out`.
///
/// # Errors
/// A file can't be read or written.
pub fn first_rows(folder: &Path, rows: usize, out: &Path) -> Result<()> {
    for (name, files) in splits(folder)? {
        let split = Split::of_files(&name, files)?;
        let mut writer = Writer::create(out, &name, split.schema().clone())?;
        let mut left = rows;
        for batch in split.batches(BATCH_ROWS) {
            let batch = batch?;
            let some = batch.slice(0, batch.num_rows().min(left));
            writer.write(&some)?;
            left -= some.num_rows();
            if left == 0 {
                break;
            }
        }
        writer.finish()?;
    }
    Ok(())
}
