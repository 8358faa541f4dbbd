//! The length to which sequences of labelled rows are cut, in a file beside their tokens: `tokenize` can't cut them, because each answer is
//! put behind another row's prompt, too.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, anyhow};
use serde::{Deserialize, Serialize};

use crate::ml::model::batch::Row;

const FILE: &str = "labelled.json";

/// What `tokenize` says of labelled rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::stages) struct Labelled {
    /// The longest sequence of prompt and answer, in tokens.
    pub(in crate::stages) max_length: usize,
}

impl Labelled {
    /// Writes the file into an artifact.
    pub(in crate::stages) fn write(self, out: &Path) -> anyhow::Result<()> {
        fs::write(out.join(FILE), serde_json::to_string(&self)? + "\n")
            .with_context(|| format!("could not write `{FILE}`"))
    }

    /// Cuts the answer of a row that is too long together with its prompt.
    pub(in crate::stages) fn cut(self, row: &mut Row) {
        let most = self.max_length.saturating_sub(row.prompt.len());
        row.chosen.truncate(most);
    }

    /// Reads the file of an artifact that may hold other rows.
    pub(in crate::stages) fn find(artifact: &Path) -> anyhow::Result<Option<Self>> {
        let there = artifact.join(FILE).is_file();
        there.then(|| Self::read(artifact, "")).transpose()
    }

    /// Reads the file of an artifact. `kind` is the stage that needs it.
    pub(in crate::stages) fn read(artifact: &Path, kind: &str) -> anyhow::Result<Self> {
        let path = artifact.join(FILE);
        if !path.is_file() {
            return Err(anyhow!(
                "the tokens are not made for `{kind}`; hint: `trainer: kto` in the `tokenize` that makes them keeps the rows' labels, and \
                 makes two labelled rows of a preference"
            ));
        }
        let read = || -> anyhow::Result<_> { Ok(serde_json::from_slice(&fs::read(&path)?)?) };
        read().with_context(|| format!("could not read `{FILE}`"))
    }
}
