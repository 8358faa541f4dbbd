//! How much memory rows take, and batches cut to what may be held at once. Bounds of what other people's files may ask for live
//! here, too.

use arrow_array::cast::AsArray;
use arrow_array::{Array, RecordBatch};
use arrow_schema::DataType;

/// A batch of more bytes is cut: several are on their way at a time. One row may be larger.
pub(super) const BATCH_BYTES: u64 = 32 << 20;
/// The longest row of JSON, in bytes of text. Read into values it may take twenty times as much.
pub(super) const LONGEST_ROW: usize = 64 << 20;
/// The most columns of a file, and the most fields of an object, nested ones included. Each costs time and memory in every batch.
pub(crate) const MOST_FIELDS: usize = 2000;
/// The deepest nesting of lists and structs; JSON has the same limit.
pub(super) const DEEPEST: usize = 100;

/// The bytes that the values of an array stand for. Texts that share their bytes count each time: they do once they are copied.
pub(super) fn bytes(array: &dyn Array) -> u64 {
    let rows = array.len() as u64;
    let lists = |first: usize, last: usize, items: &dyn Array| {
        let items = items.slice(first, last.saturating_sub(first));
        rows * 4 + bytes(&items)
    };
    match array.data_type() {
        DataType::Utf8View => {
            let views = array.as_string_view().views().iter();
            rows * 8 + views.map(|view| u64::from(*view as u32)).sum::<u64>()
        }
        DataType::BinaryView => {
            let views = array.as_binary_view().views().iter();
            rows * 8 + views.map(|view| u64::from(*view as u32)).sum::<u64>()
        }
        DataType::List(_) => {
            let list = array.as_list::<i32>();
            let offsets = list.value_offsets();
            match (offsets.first(), offsets.last()) {
                (Some(first), Some(last)) => lists(*first as usize, *last as usize, list.values()),
                _ => 0,
            }
        }
        DataType::LargeList(_) => {
            let list = array.as_list::<i64>();
            let offsets = list.value_offsets();
            match (offsets.first(), offsets.last()) {
                (Some(first), Some(last)) => lists(*first as usize, *last as usize, list.values()),
                _ => 0,
            }
        }
        DataType::Struct(_) => {
            let columns = array.as_struct().columns().iter();
            columns.map(|column| bytes(column)).sum()
        }
        _ => array.to_data().get_slice_memory_size().unwrap_or_default() as u64,
    }
}

/// The bytes of all columns.
pub(super) fn batch_bytes(batch: &RecordBatch) -> u64 {
    batch.columns().iter().map(|column| bytes(column)).sum()
}

/// The batch in pieces of at most `most` bytes, or of one row.
pub(super) fn pieces(batch: RecordBatch, most: u64) -> Vec<RecordBatch> {
    let mut whole = vec![batch];
    let mut pieces = Vec::new();
    while let Some(batch) = whole.pop() {
        let rows = batch.num_rows();
        if rows <= 1 || batch_bytes(&batch) <= most {
            pieces.push(batch);
            continue;
        }
        // The first half is looked at first.
        whole.push(batch.slice(rows / 2, rows - rows / 2));
        whole.push(batch.slice(0, rows / 2));
    }
    pieces
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::types::Int32Type;
    use arrow_array::{ArrayRef, Int64Array, ListArray, StringArray, StringViewArray};

    use super::*;

    fn batch(column: ArrayRef) -> RecordBatch {
        RecordBatch::try_from_iter([("a", column)]).unwrap()
    }

    #[test]
    fn pieces_are_small_and_whole() {
        let text = |n: usize| "x".repeat(n * 10);
        let rows: Vec<String> = (0..100).map(text).collect();
        let plain: ArrayRef = Arc::new(StringArray::from_iter_values(&rows));
        let views: ArrayRef = Arc::new(StringViewArray::from_iter_values(&rows));
        let lists: ArrayRef = Arc::new(ListArray::from_iter_primitive::<Int32Type, _, _>(
            (0..100).map(|n| Some((0..n).map(Some))),
        ));
        for column in [plain, views, lists] {
            let batch = batch(column);
            let pieces = pieces(batch.clone(), 2000);
            assert!(pieces.len() > 5);
            assert!(pieces.iter().all(|piece| batch_bytes(piece) <= 2000));
            let whole = arrow_select::concat::concat_batches(&batch.schema(), &pieces).unwrap();
            assert_eq!(whole, batch);
        }
    }

    #[test]
    fn a_single_row_stays_whole_and_shared_texts_count_each_time() {
        let text = "y".repeat(5000);
        let one: ArrayRef = Arc::new(StringArray::from_iter_values([&text]));
        assert_eq!(pieces(batch(one), 10).len(), 1);
        let many: ArrayRef = Arc::new(StringViewArray::from_iter_values(vec![&text; 100]));
        assert!(bytes(&many) >= 500_000);
        let numbers: ArrayRef = Arc::new(Int64Array::from_iter_values(0..100));
        assert_eq!(bytes(&numbers.slice(3, 10)), 80);
    }
}
