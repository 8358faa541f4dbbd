//! Loads a model's tokenizer under a time limit, since its regular expressions and tables are untrusted.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::engine::{Row, watched};
use crate::text::tokenizer::Tokenizer;

/// The longest CPU time for that. The largest real tokenizers take a few seconds.
const LONGEST: Duration = Duration::from_mins(1);

/// [`Tokenizer::load`].
pub(in crate::stages) fn load(folder: &Path) -> anyhow::Result<Tokenizer> {
    let watch = Row {
        number: 0,
        of: Arc::from("reading the tokenizer"),
    };
    watched(watch, LONGEST, || Tokenizer::load(folder))
}
