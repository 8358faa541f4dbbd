//! Datasets, chats and tokens with their lengths and first rows, for the report.

use serde_json::Value;

use super::{head, number, plain, stages};
use crate::cli::project::Project;
use crate::data;
use crate::engine::Record;
use crate::report::chart::{Chart, Content};
use crate::report::page::{Data, Fact, Figure, Sample, Table};

/// The most rows of a split whose lengths are counted.
const MOST_ROWS: usize = 100_000;
/// Rows shown of each split.
const SAMPLES: usize = 3;
/// The longest text of a cell.
const LONGEST: usize = 2000;

/// What a stage that makes rows made, for the page; none if its files are not here.
///
/// # Errors
/// A chart can't be drawn.
pub(super) fn data(project: &Project, record: &Record) -> anyhow::Result<Option<Data>> {
    let folder = project.store.artifact(&record.artifact);
    let Ok(summary) = data::summary(&folder) else {
        return Ok(None);
    };
    let tokens = record.output == "tokens";
    let rows = summary.splits.iter().map(|split| {
        let columns = split
            .columns
            .iter()
            .map(|(name, kind)| format!("{name} ({kind})"));
        let columns: Vec<String> = columns.collect();
        vec![
            split.name.clone(),
            split.rows.to_string(),
            columns.join(", "),
        ]
    });
    let splits = Table {
        head: ["split", "rows", "columns"].map(str::to_owned).into(),
        rows: rows.collect(),
    };
    let mut lengths = Table {
        head: [
            "column", "unit", "rows", "shortest", "median", "mean", "95 %", "longest",
        ]
        .map(str::to_owned)
        .into(),
        rows: Vec::new(),
    };
    let mut charts = Vec::new();
    let (found, all) = data::lengths(&folder, MOST_ROWS).unwrap_or((Vec::new(), true));
    for column in found {
        let title = format!("{}, {}", column.column, column.split);
        lengths.rows.push(vec![
            title.clone(),
            column.unit.to_owned(),
            column.rows.to_string(),
            column.shortest.to_string(),
            column.median.to_string(),
            number(column.mean),
            column.p95.to_string(),
            column.longest.to_string(),
        ]);
        let label = format!(
            "Lengths of {title} in {}: median {}, longest {}",
            column.unit, column.median, column.longest
        );
        let chart = Chart {
            title,
            x_label: column.unit.to_owned(),
            content: Content::Bars(column.bars),
        };
        charts.push(Figure::new(&chart, label)?);
    }
    let mut samples = Vec::new();
    for split in summary.splits.iter().filter(|_| !tokens) {
        for (row, value) in data::head(&folder, &split.name, SAMPLES)
            .unwrap_or_default()
            .into_iter()
            .enumerate()
        {
            samples.push(Sample {
                title: format!("{}, row {}", split.name, row + 1),
                cells: cells(&value),
            });
        }
    }
    Ok(Some(Data {
        name: record.stage.clone(),
        output: record.output.clone(),
        splits,
        notes: stages::notes(record, &|name| name != "rows"),
        open: tokens,
        lengths,
        part: (!all).then(|| format!("Of the first {MOST_ROWS} rows of each split.")),
        charts,
        samples,
    }))
}

fn cells(row: &Value) -> Vec<Fact> {
    let Value::Object(row) = row else {
        return Vec::new();
    };
    let shown = row.iter().filter(|(_, value)| !value.is_null());
    shown
        .map(|(name, value)| {
            let text = match value {
                Value::String(text) => text.clone(),
                Value::Array(_) | Value::Object(_) => {
                    serde_json::to_string_pretty(value).unwrap_or_default()
                }
                value => plain(value),
            };
            (name.clone(), head(&text, LONGEST))
        })
        .collect()
}
