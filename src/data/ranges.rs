//! The column of chats that says which parts of a row's text, prompt and answer together, the assistant says: a `list<int32>` of
//! the first byte of each part and the byte behind it, in turn.

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow, ensure};
use arrow_array::builder::{Int32Builder, ListBuilder};
use arrow_array::cast::AsArray;
use arrow_array::types::Int32Type;
use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_schema::{DataType, Field};

/// The column's name.
pub const NAME: &str = "assistant_ranges";

/// The column's field.
pub fn field() -> Field {
    let item = Field::new_list_field(DataType::Int32, true);
    Field::new(NAME, DataType::List(Arc::new(item)), true)
}

/// Rows of ranges as a column.
pub fn column<'a>(rows: impl Iterator<Item = &'a [Range<usize>]>) -> Result<ArrayRef> {
    let mut lists = ListBuilder::new(Int32Builder::new());
    for ranges in rows {
        for at in ranges.iter().flat_map(|range| [range.start, range.end]) {
            let at = i32::try_from(at).context("a text has more than 2 GiB")?;
            lists.values().append_value(at);
        }
        lists.append(true);
    }
    Ok(Arc::new(lists.finish()))
}

/// The ranges of a row, in order and within a text of `length` bytes; `None` without the column.
pub fn read(batch: &RecordBatch, row: usize, length: usize) -> Result<Option<Vec<Range<usize>>>> {
    let Some(column) = batch.column_by_name(NAME) else {
        return Ok(None);
    };
    let wrong = || anyhow!("the column `{NAME}` holds no ranges of bytes");
    let lists = column.as_list_opt::<i32>().ok_or_else(wrong)?;
    ensure!(lists.is_valid(row), "the row has no `{NAME}`");
    let list = lists.value(row);
    let values = list.as_primitive_opt::<Int32Type>().ok_or_else(wrong)?;
    let places: Result<Vec<usize>, _> = values
        .values()
        .iter()
        .map(|at| usize::try_from(*at))
        .collect();
    let places = places.map_err(|_| wrong())?;
    let (pairs, rest) = places.as_chunks::<2>();
    ensure!(
        rest.is_empty() && places.is_sorted() && places.last().is_none_or(|last| *last <= length),
        "the column `{NAME}` holds ranges that are none of the row's text"
    );
    Ok(Some(
        pairs.iter().map(|[start, end]| *start..*end).collect(),
    ))
}

#[cfg(test)]
mod tests {
    use arrow_schema::Schema;

    use super::*;

    #[test]
    fn ranges_survive_and_odd_ones_are_refused() {
        let rows: [&[Range<usize>]; 3] = [&[1..2, 2..7], &[], &[0..3, 3..4]];
        let made = column(rows.into_iter()).unwrap();
        let schema = Arc::new(Schema::new(vec![field()]));
        let batch = RecordBatch::try_new(schema, vec![made]).unwrap();
        for (at, ranges) in rows.iter().enumerate() {
            let found = read(&batch, at, 7).unwrap();
            assert_eq!(found.as_deref(), Some(*ranges));
        }
        assert!(read(&batch, 0, 6).is_err());
        let backwards = column([[3..5, 1..2].as_slice()].into_iter()).unwrap();
        let schema = Arc::new(Schema::new(vec![field()]));
        let batch = RecordBatch::try_new(schema, vec![backwards]).unwrap();
        assert!(read(&batch, 0, 7).is_err());
    }
}
