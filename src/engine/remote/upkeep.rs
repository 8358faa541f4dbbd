//! Maintenance of a remote: lists its contents, removes what is not needed, and finds damage.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, anyhow};
use serde::Serialize;

use super::super::canonical::Digest;
use super::super::manifest::Manifest;
use super::super::record::Record;
use super::jobs::{awaited, forgotten};
use super::layout::{
    BLOBS, MANIFESTS, RECORDS, blob_key, digest_of, get, manifest_key, parse_manifest,
    parse_record, record_key,
};
use super::pull::{PARALLEL, in_parallel};
use super::{Object, Remote, Shared};

/// How long files without a record are kept, since they may belong to an upload in progress.
const GRACE: Duration = Duration::from_hours(24);
/// How long what a job was told, or told, is kept: it may wait in a queue for that long.
const OF_JOBS: Duration = Duration::from_hours(24 * 30);

/// A result in a remote.
#[derive(Debug, Clone, Serialize)]
pub struct Listed {
    /// The digest of its fingerprint.
    pub fingerprint: Digest,
    /// The stage's name when it ran.
    pub stage: String,
    /// Its kind.
    pub kind: String,
    /// The content digest.
    pub artifact: Digest,
    /// Files and bytes, if the manifest is there.
    pub files: Option<usize>,
    /// Bytes of all files.
    pub bytes: Option<u64>,
    /// Seconds since 1970 when the stage ran.
    pub started: u64,
    /// Seconds it took.
    pub seconds: f64,
}

/// An object that can be removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waste {
    /// What it is: `record`, `manifest`, `file`, `job` (what a job of a cluster told that nobody came back to) or `unfinished` (what a
    /// writer that was killed left).
    pub what: &'static str,
    /// The object.
    pub object: Object,
}

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// The object.
    pub key: String,
    /// What is wrong with it.
    pub what: String,
}

type Records = BTreeMap<Digest, Result<Record, String>>;
type Manifests = BTreeMap<Digest, Result<Manifest, String>>;

impl Shared {
    fn at_hand(&self) -> anyhow::Result<&dyn Remote> {
        let remote = self.remote.as_ref().context(
            "there is no remote; name one by --remote, PIPELINE_REMOTE or `remote:` in pipeline.config.yaml",
        )?;
        Ok(remote.as_ref())
    }

    /// Every result in the remote, the newest first. Unreadable records are left out: `verify` names them.
    pub fn list(&self) -> anyhow::Result<Vec<Listed>> {
        let remote = self.at_hand()?;
        let records = records(remote, &remote.list(RECORDS)?)?;
        let manifests = manifests(remote, &remote.list(MANIFESTS)?)?;
        let mut listed: Vec<_> = records
            .into_iter()
            .filter_map(|(fingerprint, record)| {
                let record = record.ok()?;
                let manifest = manifests.get(&record.artifact);
                let manifest = manifest.and_then(|manifest| manifest.as_ref().ok());
                Some(Listed {
                    fingerprint,
                    stage: record.stage,
                    kind: record.fingerprint.kind,
                    artifact: record.artifact,
                    files: manifest.map(|manifest| manifest.files.len()),
                    bytes: manifest.map(Manifest::size),
                    started: record.started,
                    seconds: record.seconds,
                })
            })
            .collect();
        listed.sort_by(|a, b| {
            b.started
                .cmp(&a.started)
                .then_with(|| a.stage.cmp(&b.stage))
        });
        Ok(listed)
    }

    /// What can go: results older than `age` that are not in `keep`, and files that no result has. With `remove_it` it goes.
    pub fn collect(
        &self,
        keep: &BTreeSet<Digest>,
        age: Duration,
        remove_it: bool,
    ) -> anyhow::Result<Vec<Waste>> {
        let remote = self.at_hand()?;
        let now = SystemTime::now();
        let old = |object: &Object, age| {
            let since = now.duration_since(object.modified);
            since.is_ok_and(|since| since >= age)
        };
        let (gone, kept): (Vec<_>, Vec<_>) =
            remote.list(RECORDS)?.into_iter().partition(|object| {
                let needed = digest_of(&object.key).is_some_and(|digest| keep.contains(digest));
                !needed && old(object, age)
            });
        // An unreadable record protects no files, and is removed by its age like any other.
        let kept: BTreeSet<Digest> = records(remote, &kept)?
            .into_values()
            .filter_map(|record| Some(record.ok()?.artifact))
            .collect();
        let all = remote.list(MANIFESTS)?;
        let awaited = awaited(remote, OF_JOBS)?;
        let spared = |object: &Object| {
            digest_of(&object.key)
                .is_some_and(|digest| kept.contains(digest) || awaited.contains(digest))
                || !old(object, GRACE)
        };
        let (kept, unused): (Vec<_>, Vec<_>) = all.into_iter().partition(spared);
        let blobs: BTreeSet<Digest> = manifests(remote, &kept)?
            .into_values()
            .filter_map(Result::ok)
            .flat_map(|manifest| manifest.files.into_values().map(|entry| entry.blake3))
            .collect();
        let loose = remote.list(BLOBS)?.into_iter().filter(|object| {
            let used = digest_of(&object.key).is_some_and(|digest| blobs.contains(digest));
            !used && old(object, GRACE)
        });
        let unfinished = remote.unfinished()?.into_iter();
        let unfinished = unfinished.filter(|object| old(object, GRACE));
        let named = |what| move |object| Waste { what, object };
        // In this order, so that what is left after an interruption never names what is gone.
        let waste: Vec<Waste> = gone
            .into_iter()
            .map(named("record"))
            .chain(unused.into_iter().map(named("manifest")))
            .chain(loose.map(named("file")))
            .chain(forgotten(remote, OF_JOBS)?.into_iter().map(named("job")))
            .chain(unfinished.map(named("unfinished")))
            .collect();
        if remove_it {
            for what in ["record", "manifest", "file", "job"] {
                let keys = waste.iter().filter(|waste| waste.what == what);
                let keys: Vec<_> = keys.map(|waste| waste.object.key.clone()).collect();
                remote.delete(&keys)?;
            }
            let unfinished = waste.iter().filter(|waste| waste.what == "unfinished");
            let unfinished: Vec<_> = unfinished.map(|waste| &waste.object).collect();
            remote.discard(&unfinished)?;
        }
        Ok(waste)
    }

    /// Reads everything in the remote, and compares it with the digests that name it. Gives the damage, and the number and bytes of
    /// the files that were read.
    pub fn verify(&self) -> anyhow::Result<(Vec<Damage>, usize, u64)> {
        let remote = self.at_hand()?;
        let mut damage = Vec::new();
        let mut hurt = |key: String, what: String| damage.push(Damage { key, what });
        let manifests = manifests(remote, &remote.list(MANIFESTS)?)?;
        for (fingerprint, record) in records(remote, &remote.list(RECORDS)?)? {
            match record {
                Err(what) => hurt(record_key(&fingerprint), what),
                Ok(record) if !manifests.contains_key(&record.artifact) => {
                    let what = format!(
                        "the manifest of its artifact `{}` is missing",
                        record.artifact
                    );
                    hurt(record_key(&fingerprint), what);
                }
                Ok(_) => {}
            }
        }
        let blobs = remote.list(BLOBS)?;
        let there: BTreeSet<&str> = blobs
            .iter()
            .filter_map(|blob| digest_of(&blob.key))
            .collect();
        for (content, manifest) in &manifests {
            match manifest {
                Err(what) => hurt(manifest_key(content), what.clone()),
                Ok(manifest) => {
                    for (name, entry) in &manifest.files {
                        if !there.contains(entry.blake3.as_str()) {
                            let what = format!("its file `{name}` ({}) is missing", entry.blake3);
                            hurt(manifest_key(content), what);
                        }
                    }
                }
            }
        }
        let found = Mutex::new(Vec::new());
        let trouble = in_parallel(&blobs, PARALLEL, |blob| {
            let what = match digest_of(&blob.key) {
                None => Some("its name is no digest".to_owned()),
                Some(digest) => examine(remote, digest)?,
            };
            if let (Some(what), Ok(mut found)) = (what, found.lock()) {
                let key = blob.key.clone();
                found.push(Damage { key, what });
            }
            anyhow::Ok(())
        });
        if let Some(error) = trouble {
            return Err(error);
        }
        damage.extend(found.into_inner().unwrap_or_default());
        damage.sort_by(|a, b| a.key.cmp(&b.key));
        let sizes = blobs.iter().map(|blob| blob.size);
        let bytes = sizes.fold(0, u64::saturating_add);
        Ok((damage, blobs.len(), bytes))
    }

    /// Removes damaged objects, so that whoever has them whole can send them again.
    pub fn remove(&self, damage: &[Damage]) -> anyhow::Result<()> {
        let keys: BTreeSet<_> = damage.iter().map(|damage| damage.key.clone()).collect();
        self.at_hand()?
            .delete(&keys.into_iter().collect::<Vec<_>>())
    }
}

/// What is wrong with a file's contents.
fn examine(remote: &dyn Remote, digest: &str) -> anyhow::Result<Option<String>> {
    let mut hasher = blake3::Hasher::new();
    let there = remote.read(&blob_key(digest), 0, &mut |piece| {
        hasher.update(piece);
        Ok(())
    })?;
    let right = hasher.finalize().to_hex().as_str() == digest;
    // An object that disappeared meanwhile was collected.
    Ok((there && !right).then(|| "its contents are others than its name says".to_owned()))
}

fn records(remote: &dyn Remote, objects: &[Object]) -> anyhow::Result<Records> {
    read_all(remote, objects, parse_record)
}

fn manifests(remote: &dyn Remote, objects: &[Object]) -> anyhow::Result<Manifests> {
    read_all(remote, objects, parse_manifest)
}

fn read_all<T: Send>(
    remote: &dyn Remote,
    objects: &[Object],
    parse: impl Fn(&str, &[u8]) -> anyhow::Result<T> + Sync,
) -> anyhow::Result<BTreeMap<Digest, Result<T, String>>> {
    let all = Mutex::new(BTreeMap::new());
    let trouble = in_parallel(objects, PARALLEL, |object| {
        let Some(bytes) = get(remote, &object.key)? else {
            return Ok(());
        };
        let name = digest_of(&object.key);
        let parsed = name
            .ok_or_else(|| anyhow!("its name is no digest"))
            .and_then(|digest| parse(digest, &bytes));
        let file = object.key.rsplit('/').next().unwrap_or_default();
        let name = name.unwrap_or(file.trim_end_matches(".json")).to_owned();
        if let Ok(mut all) = all.lock() {
            all.insert(name, parsed.map_err(|error| format!("{error:#}")));
        }
        anyhow::Ok(())
    });
    match trouble {
        Some(error) => Err(error),
        None => Ok(all.into_inner().unwrap_or_default()),
    }
}
