//! The trait that a new kind of artifact implements.

use std::path::Path;

/// What a stage makes: a folder with files in an agreed layout. The type is only a name that makes wiring typed.
pub trait Artifact: 'static {
    /// The noun people see in errors: `dataset`, `tokens`, `model`.
    const NAME: &'static str;

    /// A look inside a folder of this kind, for people; at most `rows` rows or answers of each sort.
    fn show(folder: &Path, rows: usize) -> anyhow::Result<Vec<View>>;
}

/// A part of a look inside an artifact.
#[derive(Debug, Clone, PartialEq)]
pub enum View {
    /// A line, which may be empty.
    Line(String),
    /// Rows of cells, whose columns have equal widths.
    Table(Vec<Vec<String>>),
    /// Numbers by step, by name.
    Curves(Vec<(String, Vec<f64>)>),
}
