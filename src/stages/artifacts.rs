//! The artifacts as types for [`crate::engine::Input`]. On disk they have the formats of other programs.

use std::path::Path;

use crate::engine::{Artifact, View};

mod show;

/// An artifact as a value.
pub struct ArtifactKind {
    /// [`Artifact::NAME`].
    pub name: &'static str,
    /// [`Artifact::show`].
    pub show: fn(&Path, usize) -> anyhow::Result<Vec<View>>,
}

impl ArtifactKind {
    const fn of<A: Artifact>() -> Self {
        Self {
            name: A::NAME,
            show: A::show,
        }
    }
}

/// All artifacts.
pub const ARTIFACTS: [ArtifactKind; 8] = [
    ArtifactKind::of::<Dataset>(),
    ArtifactKind::of::<Chats>(),
    ArtifactKind::of::<Tokens>(),
    ArtifactKind::of::<Model>(),
    ArtifactKind::of::<Adapter>(),
    ArtifactKind::of::<Scores>(),
    ArtifactKind::of::<Gguf>(),
    ArtifactKind::of::<Folder>(),
];

/// Rows as people wrote them: Parquet files per split, with `system`, `prompt`, `chosen`, `rejected` or `messages`.
#[derive(Debug)]
pub struct Dataset;

/// Rendered text: Parquet files per split, with `prompt`, `chosen` and, for preferences, `rejected`.
#[derive(Debug)]
pub struct Chats;

/// Token ids: Parquet files per split; see `data::tokens` for the columns.
#[derive(Debug)]
pub struct Tokens;

/// A Hugging Face model folder, dense or in bitsandbytes' NF4 layout.
#[derive(Debug)]
pub struct Model;

/// A PEFT adapter folder: `adapter_config.json` and `adapter_model.safetensors`.
#[derive(Debug)]
pub struct Adapter;

/// The numbers of an evaluation: `scores.json`.
#[derive(Debug)]
pub struct Scores;

/// A model in one GGUF file, with a `Modelfile` for Ollama.
#[derive(Debug)]
pub struct Gguf;

/// Any files, made by a command.
#[derive(Debug)]
pub struct Folder;

impl Artifact for Folder {
    const NAME: &'static str = "folder";

    fn show(folder: &Path, rows: usize) -> anyhow::Result<Vec<View>> {
        show::files(folder, rows)
    }
}

impl Artifact for Dataset {
    const NAME: &'static str = "dataset";

    fn show(folder: &Path, rows: usize) -> anyhow::Result<Vec<View>> {
        show::splits(folder, rows)
    }
}

impl Artifact for Chats {
    const NAME: &'static str = "chats";

    fn show(folder: &Path, rows: usize) -> anyhow::Result<Vec<View>> {
        show::splits(folder, rows)
    }
}

impl Artifact for Tokens {
    const NAME: &'static str = "tokens";

    fn show(folder: &Path, rows: usize) -> anyhow::Result<Vec<View>> {
        show::splits(folder, rows)
    }
}

impl Artifact for Model {
    const NAME: &'static str = "model";

    fn show(folder: &Path, _: usize) -> anyhow::Result<Vec<View>> {
        show::model(folder)
    }
}

impl Artifact for Adapter {
    const NAME: &'static str = "adapter";

    fn show(folder: &Path, _: usize) -> anyhow::Result<Vec<View>> {
        show::adapter(folder)
    }
}

impl Artifact for Scores {
    const NAME: &'static str = "scores";

    fn show(folder: &Path, rows: usize) -> anyhow::Result<Vec<View>> {
        show::scores(folder, rows)
    }
}

impl Artifact for Gguf {
    const NAME: &'static str = "gguf";

    fn show(folder: &Path, _: usize) -> anyhow::Result<Vec<View>> {
        show::gguf(folder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stages::KINDS;

    #[test]
    fn whatever_a_stage_makes_can_be_shown() {
        for kind in KINDS {
            assert!(
                ARTIFACTS
                    .iter()
                    .any(|artifact| artifact.name == kind.output),
                "{}",
                kind.output
            );
        }
    }
}
