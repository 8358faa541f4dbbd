//! Puts results where people want them: linked or copied, whole or not at all, and never over somebody's own files.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

use super::canonical::Digest;
use super::files::{link_or_copy, remove, write_atomically};
use super::manifest::{Check, Manifest};
use super::store::{Store, open_lock};

/// What was put in a place, so that it can be told from what people put there.
#[derive(Serialize, Deserialize)]
struct Placed {
    artifact: Digest,
    manifest: Manifest,
}

/// Puts the artifact's files into `place`. Returns whether anything changed. A place that holds what the runner did not
/// put there is an error, unless `overwrite`.
pub fn place(store: &Store, artifact: &str, place: &Path, overwrite: bool) -> anyhow::Result<bool> {
    let state = store.state(&format!(
        "outputs/{}.json",
        blake3::hash(place.as_os_str().as_encoded_bytes()).to_hex()
    ));
    // One at a time: another runner of the same recipe would take what this one is putting there for somebody else's. A store
    // that can't be written has no lock, and no output to put anywhere either.
    let _held = open_lock(&state.with_extension("lock"))
        .ok()
        .map(|lock| lock.lock().map(|()| lock));
    let known: Vec<Placed> = fs::read(&state)
        .ok()
        .and_then(|bytes| serde_json::from_slice(&bytes).ok())
        .unwrap_or_default();
    let mut before = None;
    if fs::symlink_metadata(place).is_ok() {
        let ours = |placed: &Placed| {
            matches!(
                placed.manifest.check(place, false),
                Check::Sound | Check::Touched(_)
            )
        };
        before = known.into_iter().find(ours);
        if before.is_none()
            && let Some(manifest) = holds(place, store, artifact)
        {
            // Put there from another store, or by a copy of the whole project: it is what is wanted.
            let placed = Placed {
                artifact: artifact.to_owned(),
                manifest,
            };
            write_atomically(&state, &serde_json::to_vec(&[placed])?)?;
            return Ok(false);
        }
        match &before {
            Some(placed) if placed.artifact == artifact => return Ok(false),
            None if !overwrite && !is_empty_folder(place) => bail!(
                "`{}` holds files that pipeline did not put there, or that were changed since; move them away, or run with \
                 --overwrite-outputs",
                place.display()
            ),
            _ => {}
        }
    }
    let Some(name) = place
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
    else {
        bail!("`{}` is no place for an output", place.display());
    };
    let (next, old) = (
        place.with_file_name(format!(".{name}.next")),
        place.with_file_name(format!(".{name}.old")),
    );
    remove(&next)?;
    remove(&old)?;
    let manifest = fill(store, artifact, &next).inspect_err(|_| {
        // The error that is told is the first one.
        let _ = remove(&next);
    })?;
    // Before the exchange both states are known as ours, so that a crash in the middle locks nobody out.
    let mut known = vec![Placed {
        artifact: artifact.to_owned(),
        manifest,
    }];
    known.extend(before);
    write_atomically(&state, &serde_json::to_vec(&known)?)?;
    if fs::symlink_metadata(place).is_ok() {
        fs::rename(place, &old)
            .with_context(|| format!("could not replace `{}`", place.display()))?;
    }
    fs::rename(&next, place).with_context(|| format!("could not make `{}`", place.display()))?;
    remove(&old)?;
    Ok(true)
}

/// The manifest of a folder that has exactly the artifact's files. Reads them only where all sizes agree.
fn holds(place: &Path, store: &Store, artifact: &str) -> Option<Manifest> {
    let same_size = |(name, entry): (&String, &super::manifest::Entry)| {
        fs::metadata(place.join(name)).is_ok_and(|found| found.len() == entry.stat.size)
    };
    if !store.manifest(artifact)?.files.iter().all(same_size) {
        return None;
    }
    Manifest::read(place)
        .ok()
        .filter(|found| found.digest() == artifact)
}

fn fill(store: &Store, artifact: &str, folder: &Path) -> anyhow::Result<Manifest> {
    let from = store.artifact(artifact);
    let manifest = store
        .manifest(artifact)
        .context("the artifact's manifest is gone")?;
    fs::create_dir_all(folder).with_context(|| format!("could not make `{}`", folder.display()))?;
    let mut placed = manifest.clone();
    for (name, entry) in &mut placed.files {
        let to = folder.join(name);
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent)
                .with_context(|| format!("could not make `{}`", parent.display()))?;
        }
        link_or_copy(&from.join(name), &to)?;
        let metadata = fs::symlink_metadata(&to)
            .with_context(|| format!("could not read `{}`", to.display()))?;
        entry.stat = super::manifest::Stat::of(&metadata);
    }
    placed.remember_folders(folder);
    Ok(placed)
}

fn is_empty_folder(path: &Path) -> bool {
    fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none())
}
