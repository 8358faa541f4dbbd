//! How long the texts and token lists of a folder of splits are.

use std::path::Path;

use anyhow::Result;
use arrow_array::cast::AsArray;
use arrow_array::{Array, RecordBatch};
use arrow_schema::DataType;
use serde::Serialize;

use super::table::{Split, splits};

/// The number of bars of a histogram.
const BARS: usize = 24;

/// How long the values of one column of a split are.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Lengths {
    /// The split's name.
    pub split: String,
    /// The column's name.
    pub column: String,
    /// What is counted: `characters`, `tokens` or `messages`.
    pub unit: &'static str,
    /// Rows that have a value.
    pub rows: usize,
    /// The shortest.
    pub shortest: usize,
    /// The mean.
    pub mean: f64,
    /// As long as this or shorter is half of them.
    pub median: usize,
    /// As long as this or shorter are 95 % of them.
    pub p95: usize,
    /// The longest.
    pub longest: usize,
    /// A histogram: where each bar begins and ends, and how many values it has. The end belongs to the next bar.
    pub bars: Vec<(f64, f64, u64)>,
}

/// The lengths of all columns with texts or lists, of the first `most_rows` rows of each split, and whether that is all of them.
///
/// # Errors
/// A file can't be read.
pub fn lengths(folder: &Path, most_rows: usize) -> Result<(Vec<Lengths>, bool)> {
    let mut found = Vec::new();
    let mut all = true;
    for (name, files) in splits(folder)? {
        let split = Split::of_files(&name, files)?;
        let fields = split.schema().fields().clone();
        let mut columns: Vec<Vec<usize>> = vec![Vec::new(); fields.len()];
        let mut seen = 0;
        for batch in split.batches(1024) {
            let batch = batch?;
            if seen >= most_rows {
                break;
            }
            let rows = batch.num_rows().min(most_rows - seen);
            seen += rows;
            collect(&batch.slice(0, rows), &mut columns);
        }
        all &= seen == split.rows();
        for (field, values) in fields.iter().zip(columns) {
            let unit = match field.data_type() {
                DataType::List(item) if item.data_type().is_integer() => "tokens",
                DataType::List(_) => "messages",
                _ => "characters",
            };
            found.extend(summary(&name, field.name(), unit, values));
        }
    }
    Ok((found, all))
}

fn collect(batch: &RecordBatch, columns: &mut [Vec<usize>]) {
    for (column, lengths) in batch.columns().iter().zip(columns) {
        let rows = (0..column.len()).filter(|row| column.is_valid(*row));
        match column.data_type() {
            DataType::Utf8 => {
                let texts = column.as_string::<i32>();
                lengths.extend(rows.map(|row| texts.value(row).chars().count()));
            }
            DataType::LargeUtf8 => {
                let texts = column.as_string::<i64>();
                lengths.extend(rows.map(|row| texts.value(row).chars().count()));
            }
            DataType::List(_) => {
                let lists = column.as_list::<i32>();
                lengths.extend(rows.map(|row| lists.value_length(row) as usize));
            }
            _ => {}
        }
    }
}

fn summary(
    split: &str,
    column: &str,
    unit: &'static str,
    mut values: Vec<usize>,
) -> Option<Lengths> {
    values.sort_unstable();
    let (shortest, longest) = (*values.first()?, *values.last()?);
    let at = |share: f64| {
        // The smallest value that at least this share of the rows does not exceed.
        let place = (share * values.len() as f64).ceil() as usize;
        values[place.clamp(1, values.len()) - 1]
    };
    let width = (longest - shortest + 1).div_ceil(BARS);
    let count = (longest - shortest + 1).div_ceil(width);
    let mut bars: Vec<(f64, f64, u64)> = (0..count)
        .map(|bar| {
            let from = shortest + bar * width;
            (from as f64, (from + width) as f64, 0)
        })
        .collect();
    for value in &values {
        bars[(value - shortest) / width].2 += 1;
    }
    Some(Lengths {
        split: split.to_owned(),
        column: column.to_owned(),
        unit,
        rows: values.len(),
        shortest,
        mean: values.iter().sum::<usize>() as f64 / values.len() as f64,
        median: at(0.5),
        p95: at(0.95),
        longest,
        bars,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_counted_and_put_into_bars() {
        let values = (1..=100).collect();
        let found = summary("train", "prompt", "characters", values).unwrap();
        assert_eq!(
            (found.shortest, found.median, found.p95, found.longest),
            (1, 50, 95, 100)
        );
        assert!((found.mean - 50.5).abs() < 1e-12);
        assert_eq!(found.bars.len(), 20);
        assert!(found.bars.iter().all(|bar| bar.2 == 5));
        let same = summary("train", "prompt", "characters", vec![7; 3]).unwrap();
        assert_eq!(same.bars, [(7., 8., 3)]);
        assert_eq!(summary("train", "prompt", "characters", vec![]), None);
    }
}
