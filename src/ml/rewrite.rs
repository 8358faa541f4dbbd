//! Writing a model's weights anew, file by file and tensor by tensor, in the same files as before.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context as _;
use serde_json::json;

use super::folder::sorted_json;
use super::weights::{Entry, INDEX, Weights, Writer};

/// A tensor to write. Its bytes are made when its turn comes, and dropped when they are written.
pub(super) struct Output<'a> {
    pub(super) entry: Entry,
    pub(super) bytes: Box<dyn FnOnce() -> anyhow::Result<Cow<'a, [u8]>> + 'a>,
}

impl<'a> Output<'a> {
    /// A tensor as it is.
    pub(super) fn same(weights: &'a Weights, name: &str) -> anyhow::Result<Self> {
        let raw = weights.raw(name)?;
        Ok(Self {
            entry: Entry::new(name, raw.dtype, raw.shape),
            bytes: Box::new(move || Ok(Cow::Borrowed(raw.bytes))),
        })
    }
}

/// Writes a file with `outputs`; `written` is told the name of each tensor after it.
pub(super) fn write_file(
    path: &Path,
    outputs: Vec<Output<'_>>,
    written: &mut dyn FnMut(&str) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let entries = outputs.iter().map(|output| output.entry.clone()).collect();
    let mut writer = Writer::create(path, entries)?;
    let order: Vec<String> = writer
        .order()
        .iter()
        .map(|entry| entry.name.clone())
        .collect();
    let mut outputs: BTreeMap<String, Output<'_>> = outputs
        .into_iter()
        .map(|output| (output.entry.name.clone(), output))
        .collect();
    for name in order {
        let output = outputs
            .remove(&name)
            .with_context(|| format!("`{name}` was lost"))?;
        let bytes =
            (output.bytes)().with_context(|| format!("could not make the tensor `{name}`"))?;
        writer.write(&name, &bytes)?;
        written(&name)?;
    }
    writer.finish()
}

/// Writes all files of a model anew: each with what `outputs` makes of its tensors. A sharded model gets a new index.
pub(super) fn rewrite<'a>(
    weights: &'a Weights,
    out: &Path,
    mut outputs: impl FnMut(&str) -> anyhow::Result<Vec<Output<'a>>>,
    written: &mut dyn FnMut(&str) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut index = Index::default();
    for file in weights.files() {
        let mut all = Vec::new();
        for name in weights.names_in(file) {
            let made =
                outputs(name).with_context(|| format!("could not use the tensor `{name}`"))?;
            all.extend(made);
        }
        for output in &all {
            index.add(&output.entry, file)?;
        }
        write_file(&out.join(file), all, written)?;
    }
    if weights.sharded() {
        index.write(out)?;
    }
    Ok(())
}

/// Which file holds which tensor.
#[derive(Default)]
pub(super) struct Index {
    files: BTreeMap<String, String>,
    size: u64,
}

impl Index {
    pub(super) fn add(&mut self, entry: &Entry, file: &str) -> anyhow::Result<()> {
        self.files.insert(entry.name.clone(), file.to_owned());
        self.size += entry.size()? as u64;
        Ok(())
    }

    pub(super) fn write(&self, out: &Path) -> anyhow::Result<()> {
        let index = json!({"metadata": {"total_size": self.size}, "weight_map": self.files});
        std::fs::write(out.join(INDEX), sorted_json(&index)?)
            .with_context(|| format!("could not write `{INDEX}` to `{}`", out.display()))
    }
}
