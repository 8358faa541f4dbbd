//! The special tokens that `tokenize` added to each sequence of a preference dataset, in a file beside the tokens. `SFTTrainer` adds
//! none, so `train_sft` removes them.

use std::fs;
use std::path::Path;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use crate::ml::model::batch::Row;

const FILE: &str = "added.json";

/// The tokens that were added.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::stages) struct Added {
    /// The BOS added before every prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::stages) bos: Option<u32>,
    /// The EOS added after every answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(in crate::stages) eos: Option<u32>,
    /// Whether some sequences already had the token, so that it is not known which ones got it.
    #[serde(default)]
    pub(in crate::stages) mixed: bool,
}

impl Added {
    /// Writes the file into an artifact, unless nothing was added.
    pub(in crate::stages) fn write(self, out: &Path) -> anyhow::Result<()> {
        if self == Self::default() {
            return Ok(());
        }
        fs::write(out.join(FILE), serde_json::to_string(&self)? + "\n")
            .with_context(|| format!("could not write `{FILE}`"))
    }

    /// Reads the file of an artifact.
    pub(in crate::stages) fn read(artifact: &Path) -> anyhow::Result<Self> {
        let path = artifact.join(FILE);
        if !path.is_file() {
            return Ok(Self::default());
        }
        let read = || -> anyhow::Result<_> { Ok(serde_json::from_slice(&fs::read(&path)?)?) };
        read().with_context(|| format!("could not read `{FILE}`"))
    }

    /// A preference row without the added tokens. A truncated row has already lost its EOS.
    pub(in crate::stages) fn take_off(self, row: &mut Row) {
        if row.rejected.is_none() {
            return;
        }
        for prompt in std::iter::once(&mut row.prompt).chain(&mut row.rejected_prompt) {
            if self.bos.is_some() && prompt.first().copied() == self.bos {
                prompt.remove(0);
            }
        }
        for answer in std::iter::once(&mut row.chosen).chain(&mut row.rejected) {
            if self.eos.is_some() && answer.last().copied() == self.eos {
                answer.pop();
            }
        }
    }
}
