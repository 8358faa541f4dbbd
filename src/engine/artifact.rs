//! The trait that a new kind of artifact implements.

use std::path::Path;

/// The result of a stage: a folder with files in an agreed layout. The type has no values; it only makes the wiring of stages typed.
pub trait Artifact: 'static {
    /// The noun used in error messages: `dataset`, `tokens`, `model`.
    const NAME: &'static str;

    /// What `show` prints of a folder of this kind: at most `rows` rows or answers of each sort.
    fn show(folder: &Path, rows: usize) -> anyhow::Result<Vec<View>>;
}

/// A part of what `show` prints of an artifact.
#[derive(Debug, Clone, PartialEq)]
pub enum View {
    /// A line, which may be empty.
    Line(String),
    /// Rows of cells, whose columns have equal widths.
    Table(Vec<Vec<String>>),
    /// Numbers by step, by name.
    Curves(Vec<(String, Vec<f64>)>),
}
