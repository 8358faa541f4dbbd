//! The fingerprints of a recipe's last results in one file, so that a run with nothing to do reads one file instead of one per stage.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use super::canonical::Digest;
use super::files::{outlast, read_sealed, write_sealed};
use super::stat::Stat;
use super::store::Store;

/// The last results of a recipe's stages, as they were when this was opened.
pub(crate) struct LastResults {
    store: Store,
    recipe: String,
    /// The memo, if it is up to date.
    memo: Option<Memo>,
}

#[derive(Serialize, Deserialize)]
struct Memo {
    /// The time of the last change of the folder that has one file per stage. Any new result changes it.
    changed: i64,
    stages: BTreeMap<String, Digest>,
}

impl LastResults {
    /// Reads the memo. An outdated one is not used.
    pub(crate) fn open(store: &Store, recipe: &str) -> Self {
        let mut last_results = Self {
            store: store.clone(),
            recipe: recipe.to_owned(),
            memo: None,
        };
        let changed = last_results.changed();
        last_results.memo =
            read_sealed(&last_results.path()).filter(|memo: &Memo| Some(memo.changed) == changed);
        last_results
    }

    /// The fingerprint of a stage's last result.
    pub(crate) fn get(&self, stage: &str) -> Option<Digest> {
        match &self.memo {
            Some(memo) => memo.stages.get(stage).cloned(),
            None => self.store.last(&self.recipe, stage),
        }
    }

    /// Writes a new memo for these stages if the one that was opened is outdated.
    pub(super) fn save<'n>(&self, stages: impl Iterator<Item = &'n str>) -> anyhow::Result<()> {
        // The time is taken before reading, so that a concurrent change makes the memo outdated but never wrong.
        let Some(changed) = self.changed() else {
            return Ok(());
        };
        if self
            .memo
            .as_ref()
            .is_some_and(|memo| memo.changed == changed)
        {
            return Ok(());
        }
        // Any later change gets another time.
        let folder = self.store.folder("last");
        outlast(&folder, changed).with_context(|| format!("no clock in `{}`", folder.display()))?;
        let last = |stage: &str| Some((stage.to_owned(), self.store.last(&self.recipe, stage)?));
        let stages = stages.filter_map(last).collect();
        write_sealed(&self.path(), &Memo { changed, stages })
    }

    fn path(&self) -> PathBuf {
        self.store
            .state("last")
            .join(format!("{}.json", self.recipe))
    }

    fn changed(&self) -> Option<i64> {
        let folder = self.store.folder("last").join(&self.recipe);
        Some(Stat::from_metadata(&fs::metadata(folder).ok()?).changed)
    }
}
