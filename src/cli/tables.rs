//! Tables for people: columns of equal width, and what becomes of them where a terminal is narrower.

use std::fmt::Write as _;

use super::console::output_columns;
use crate::report::{width, wrap};

/// The columns below which the last cell of a row is not wrapped, because there is too little room for it.
const LEAST: usize = 16;

/// Columns of equal width, two spaces between them, nothing behind the last. At a terminal the last cells are wrapped between words where
/// they don't fit.
pub(super) fn table(rows: &[Vec<String>]) -> String {
    fitted(rows, output_columns())
}

/// Rows below their head as a table, or where the terminal is too narrow for it, each row as a list of names and values.
pub(super) fn table_or_lists(rows: &[Vec<String>]) -> String {
    listed(rows, output_columns())
}

/// Text that is wrapped between words where standard output is a terminal; a line that begins with spaces goes on below them.
pub(super) fn paragraphs(text: &str) -> String {
    let columns = output_columns().unwrap_or(usize::MAX);
    let mut wrapped = String::new();
    for line in text.lines() {
        let indent = line.len() - line.trim_start().len();
        for part in wrap(line.trim_start(), columns.saturating_sub(indent)) {
            _ = writeln!(wrapped, "{:indent$}{part}", "");
        }
    }
    wrapped
}

fn fitted(rows: &[Vec<String>], terminal: Option<usize>) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let wide = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| width(cell)).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(wide).collect();
    // Where the last column begins.
    let start: usize = widths.iter().rev().skip(1).map(|width| width + 2).sum();
    let room = terminal
        .map(|columns| columns.saturating_sub(start))
        .filter(|room| *room >= LEAST)
        .unwrap_or(usize::MAX);
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, (cell, wide)) in row.iter().zip(&widths).enumerate() {
            if column + 1 < columns {
                let padding = wide.saturating_sub(width(cell)) + 2;
                _ = write!(line, "{cell}{:padding$}", "");
                continue;
            }
            // Lines of its own are where they shall be.
            let room = if cell.contains('\n') {
                usize::MAX
            } else {
                room
            };
            for (number, part) in wrap(cell, room).iter().enumerate() {
                if number > 0 {
                    line.truncate(line.trim_end().len());
                    _ = write!(line, "\n{:start$}", "");
                }
                line.push_str(part);
            }
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn listed(rows: &[Vec<String>], terminal: Option<usize>) -> String {
    let whole = fitted(rows, None);
    let widest = whole.lines().map(width).max().unwrap_or(0);
    let Some((head, rows)) = rows.split_first() else {
        return whole;
    };
    if terminal.is_none_or(|columns| widest <= columns) {
        return whole;
    }
    let lists = rows.iter().map(|row| {
        let cells = head.iter().zip(row).filter(|(_, cell)| !cell.is_empty());
        let cells: Vec<Vec<String>> = cells
            .map(|(name, cell)| vec![name.clone(), cell.clone()])
            .collect();
        fitted(&cells, terminal)
    });
    lists.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(rows: &[&[&str]]) -> Vec<Vec<String>> {
        let row = |row: &&[&str]| row.iter().map(|cell| (*cell).to_owned()).collect();
        rows.iter().map(row).collect()
    }

    #[test]
    fn the_last_cells_are_wrapped_where_there_is_room_for_words() {
        let rows = rows(&[&["what", "it is made of several words"], &["a", ""]]);
        assert_eq!(
            fitted(&rows, None),
            "what  it is made of several words\na\n"
        );
        assert_eq!(
            fitted(&rows, Some(24)),
            "what  it is made of\n      several words\na\n"
        );
        // No room for words: the terminal breaks the line.
        assert_eq!(fitted(&rows, Some(20)), fitted(&rows, None));
    }

    #[test]
    fn a_wide_table_becomes_lists() {
        let rows = rows(&[
            &["run", "took", "scores.margin"],
            &["2", "3 s", ""],
            &["1", "4 s", "0.25"],
        ]);
        assert_eq!(
            listed(&rows, Some(24)),
            "run  took  scores.margin\n2    3 s\n1    4 s   0.25\n"
        );
        assert_eq!(
            listed(&rows, Some(23)),
            "run   2\ntook  3 s\n\nrun            1\ntook           4 s\nscores.margin  0.25\n"
        );
    }
}
