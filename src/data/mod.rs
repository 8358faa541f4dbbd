//! Tables of rows: folders with Parquet files per split. Knows no chat template, no tokenizer and no cache.
//!
//! [`table`] reads and writes splits, [`import`] brings other people's files in, [`tokens`] is the layout of token ids,
//! [`reference_logps`] that of their log-probabilities under a reference model,
//! [`lint`] finds what is likely wrong with rows, [`questions`] reads questions with choices, [`show`] is a look at the head of a folder, `reading` opens files of text, [`cell`] the values between JSON and Arrow.

mod arrow_file;
pub mod cell;
mod csv;
pub mod expression;
mod forms;
pub mod import;
mod json;
mod kind;
pub mod lengths;
pub mod lint;
pub(crate) mod messages;
pub mod numbers;
pub mod questions;
pub mod ranges;
mod reading;
pub mod reference_logps;
pub mod sample;
pub mod show;
mod size;
pub mod table;
pub mod tokens;

pub use import::{Format, ImportOptions, ImportReport};
pub use lengths::{Lengths, lengths};
pub use reading::Encoding;
pub use show::{Summary, head, summary};
pub use table::{Split, Writer, splits};
