//! What the log-probabilities in tokens were computed by and of, in a file beside them: `reference.json`. A training takes them only if its
//! own reference model would give the same.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use blake3::Hasher;
use candle_core::DType;
use serde::{Deserialize, Serialize};

use crate::data::reference_logps::{self, Logps};
use crate::ml::adapter::Adapter;
use crate::ml::model::batch::{ReferenceLogps, Row};

const FILE: &str = "reference.json";

/// Whether a model with this adapter computes what it computes without.
pub(in crate::stages) fn changes_nothing(adapter: &Adapter) -> anyhow::Result<bool> {
    let is_zero = |tensor: &candle_core::Tensor| -> candle_core::Result<bool> {
        Ok(tensor
            .abs()?
            .flatten_all()?
            .max(0)?
            .to_dtype(DType::F64)?
            .to_scalar::<f64>()?
            == 0.)
    };
    if !adapter.saved.is_empty() || !adapter.token_rows.is_empty() {
        return Ok(false);
    }
    for pair in adapter.tensors.values() {
        if pair.magnitude.is_some() || !(is_zero(&pair.b)? || is_zero(&pair.a)?) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// A reference model, as far as its numbers depend on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::stages) struct Scorer {
    /// The digest of the model's configuration and weights.
    model: String,
    /// That of the adapter's, if there is one that changes anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    adapter: Option<String>,
    /// The type in which products are computed.
    compute: String,
}

impl Scorer {
    /// A model's folder, and that of an adapter which changes something.
    pub(in crate::stages) fn new(
        model: &Path,
        adapter: Option<&Path>,
        compute: DType,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            model: digest(model)?,
            adapter: adapter.map(digest).transpose()?,
            compute: compute.as_str().to_owned(),
        })
    }

    /// What of it differs from another, in words, and what to do about that.
    fn difference(&self, other: &Self) -> Option<String> {
        if self.model != other.model {
            return Some("another model".into());
        }
        match (&self.adapter, &other.adapter) {
            (Some(_), None) => Some("the model with an adapter".into()),
            (None, Some(_)) => Some("the model without an adapter".into()),
            (Some(own), Some(other)) if own != other => {
                Some("the model with another adapter".into())
            }
            _ if self.compute != other.compute => Some(format!(
                "the same model in {}, not in {}",
                self.compute, other.compute
            )),
            _ => None,
        }
    }
}

/// The digest of the files of a model's or an adapter's folder on which its numbers depend.
fn digest(folder: &Path) -> anyhow::Result<String> {
    let entries = fs::read_dir(folder).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let entries = entries.with_context(|| format!("could not list `{}`", folder.display()))?;
    let mut digests = BTreeMap::new();
    for entry in entries {
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let is_config = ["config.json", "adapter_config.json"].contains(&name.as_str());
        let extension = Path::new(&name).extension();
        if is_config || extension.is_some_and(|extension| extension == "safetensors") {
            let path = entry.path();
            let hash = File::open(&path).and_then(|file| {
                let mut hasher = Hasher::new();
                hasher.update_reader(file)?;
                Ok(hasher.finalize())
            });
            let hash = hash.with_context(|| format!("could not read `{}`", path.display()))?;
            digests.insert(name, hash.to_hex().to_string());
        }
    }
    let text = serde_json::to_vec(&digests)?;
    Ok(blake3::hash(&text).to_hex().to_string())
}

/// The digest of rows' ids, one after the other.
#[derive(Default)]
pub(in crate::stages) struct RowsDigest(Hasher);

impl RowsDigest {
    /// Adds a row, as `tokenize` wrote it.
    pub(in crate::stages) fn add(&mut self, row: &Row) {
        let sides = [
            Some(&row.prompt),
            Some(&row.chosen),
            row.rejected.as_ref(),
            row.rejected_prompt.as_ref(),
        ];
        for side in sides {
            let length = side.map_or(u64::MAX, |ids| ids.len() as u64);
            self.0.update(&length.to_le_bytes());
            for id in side.into_iter().flatten() {
                self.0.update(&id.to_le_bytes());
            }
        }
    }

    fn finish(&self) -> String {
        self.0.finalize().to_hex().to_string()
    }
}

/// What log-probabilities were computed by, and of which rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::stages) struct Made {
    #[serde(flatten)]
    by: Scorer,
    /// The digest of the rows of each split.
    splits: BTreeMap<String, String>,
}

impl Made {
    pub(in crate::stages) fn new(by: Scorer, splits: BTreeMap<String, RowsDigest>) -> Self {
        let splits = splits.into_iter();
        Self {
            by,
            splits: splits.map(|(name, rows)| (name, rows.finish())).collect(),
        }
    }

    /// Writes the file into an artifact.
    pub(in crate::stages) fn write(&self, out: &Path) -> anyhow::Result<()> {
        fs::write(out.join(FILE), serde_json::to_string_pretty(self)? + "\n")
            .with_context(|| format!("could not write `{FILE}`"))
    }

    /// Reads the file of an artifact, if it has one.
    pub(in crate::stages) fn read(artifact: &Path) -> anyhow::Result<Option<Self>> {
        let path = artifact.join(FILE);
        if !path.is_file() {
            return Ok(None);
        }
        let read = || -> anyhow::Result<_> { Ok(serde_json::from_slice(&fs::read(&path)?)?) };
        read()
            .with_context(|| format!("could not read `{FILE}`"))
            .map(Some)
    }

    /// Fails unless `reference`, the reference model of a training, is what computed them. `told` is that in words.
    pub(in crate::stages) fn check(&self, reference: &Scorer, told: &str) -> anyhow::Result<()> {
        let Some(difference) = self.by.difference(reference) else {
            return Ok(());
        };
        bail!(
            "the reference log-probabilities in the dataset were computed by {difference}, but the reference of this training is {told}; hint: \
             `score_reference` takes `model`, `adapter`, `bf16` and `fp16` like the training, or another reference if the training names it as \
             `ref_model` or `ref_adapter`"
        )
    }

    /// Puts the log-probabilities of a split beside its rows, as `tokenize` wrote these.
    ///
    /// # Errors
    /// They are not of these rows, or there are none.
    pub(in crate::stages) fn attach(
        &self,
        artifact: &Path,
        split: &str,
        rows: &mut [Row],
    ) -> anyhow::Result<()> {
        let mut found = RowsDigest::default();
        for row in &*rows {
            found.add(row);
        }
        let logps = reference_logps::read(artifact, split)?.unwrap_or_default();
        ensure!(
            self.splits.get(split) == Some(&found.finish()) && logps.len() == rows.len(),
            "the reference log-probabilities of the split `{split}` belong to other rows, or to rows that were cut otherwise; hint: make the \
             tokens anew by `score_reference`"
        );
        for (row, Logps { chosen, rejected }) in rows.iter_mut().zip(logps) {
            row.reference_logps = Some(ReferenceLogps {
                chosen,
                rejected: rejected.unwrap_or_default(),
            });
        }
        Ok(())
    }
}

/// Fails unless each answer, as a training takes it, has a log-probability for each token.
pub(in crate::stages) fn check_lengths(rows: &[Row], split: &str) -> anyhow::Result<()> {
    for (row, number) in rows.iter().zip(1..) {
        let Some(known) = &row.reference_logps else {
            bail!("row {number} of the split `{split}` has no reference log-probabilities");
        };
        let rejected = row.rejected.as_ref().map_or(0, Vec::len);
        ensure!(
            (known.chosen.len(), known.rejected.len()) == (row.chosen.len(), rejected),
            "row {number} of the split `{split}` has answers of {} and {rejected} tokens, and reference log-probabilities of {} and {}; hint: \
             make the tokens anew by `score_reference`",
            row.chosen.len(),
            known.chosen.len(),
            known.rejected.len()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> Vec<Row> {
        let row = Row {
            prompt: vec![1, 2],
            chosen: vec![3],
            rejected: Some(vec![4]),
            ..Row::default()
        };
        let other = Row {
            prompt: vec![1],
            rejected_prompt: Some(vec![1, 2]),
            ..row.clone()
        };
        vec![row, other]
    }

    fn digest_of(rows: &[Row]) -> String {
        let mut digest = RowsDigest::default();
        for row in rows {
            digest.add(row);
        }
        digest.finish()
    }

    #[test]
    fn rows_that_were_cut_otherwise_have_another_digest() {
        let known = digest_of(&rows());
        assert_eq!(digest_of(&rows()), known);
        let changes: [fn(&mut Vec<Row>); 6] = [
            |rows| rows.truncate(1),
            |rows| rows.swap(0, 1),
            |rows| rows[0].prompt.rotate_left(1),
            |rows| rows[0].rejected = None,
            // The same ids in other places.
            |rows| {
                let id = rows[0].prompt.pop().unwrap();
                rows[0].chosen.insert(0, id);
            },
            |rows| rows[1].rejected_prompt = None,
        ];
        for (number, change) in changes.into_iter().enumerate() {
            let mut rows = rows();
            change(&mut rows);
            assert_ne!(digest_of(&rows), known, "{number}");
        }
    }

    #[test]
    fn a_folders_digest_depends_on_its_weights_and_configuration_alone() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        write("config.json", "{}");
        write("model.safetensors", "weights");
        let known = digest(folder.path()).unwrap();
        write("README.md", "a model");
        write("tokenizer.json", "{}");
        assert_eq!(digest(folder.path()).unwrap(), known);
        write("model.safetensors", "others");
        assert_ne!(digest(folder.path()).unwrap(), known);
        write("model.safetensors", "weights");
        write("config.json", "{ }");
        assert_ne!(digest(folder.path()).unwrap(), known);
    }
}
