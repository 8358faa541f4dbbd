//! The names of objects in a remote, and what their contents must be to count.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use anyhow::{Context as _, bail, ensure};
use serde::{Deserialize, Serialize};

use super::super::canonical::{Digest, is_digest};
use super::super::manifest::{Entry, LONGEST_MANIFEST, Manifest};
use super::super::record::{FORMAT, LONGEST_RECORD, Record};
use super::super::stat::Stat;
use super::Remote;

pub(super) const RECORDS: &str = "v1/records";
pub(super) const MANIFESTS: &str = "v1/manifests";
pub(super) const BLOBS: &str = "v1/blobs";
pub(super) const JOBS: &str = "v1/jobs";

pub(super) fn record_key(fingerprint: &str) -> String {
    format!("{RECORDS}/{fingerprint}.json")
}

pub(super) fn manifest_key(content: &str) -> String {
    format!("{MANIFESTS}/{content}.json")
}

pub(super) fn blob_key(blake3: &str) -> String {
    format!("{BLOBS}/{}/{blake3}", blake3.get(..2).unwrap_or("__"))
}

/// More than the bytes of any artifact.
const LARGEST: u64 = 1 << 60;
/// The longest name of a file on usual file systems, in bytes.
const LONGEST_NAME: usize = 255;

/// The digest in the name of a record, a manifest or a blob.
pub(super) fn digest_of(key: &str) -> Option<&str> {
    let name = key.rsplit('/').next()?;
    let name = name.strip_suffix(".json").unwrap_or(name);
    is_digest(name).then_some(name)
}

#[derive(Serialize, Deserialize)]
struct Wire {
    files: BTreeMap<String, WireFile>,
}

#[derive(Serialize, Deserialize)]
struct WireFile {
    blake3: Digest,
    size: u64,
}

/// A manifest as it travels: without the times and inodes of this machine.
pub(super) fn manifest_bytes(manifest: &Manifest) -> anyhow::Result<Vec<u8>> {
    let file = |(path, entry): (&String, &Entry)| {
        let file = WireFile {
            blake3: entry.blake3.clone(),
            size: entry.stat.size,
        };
        (path.clone(), file)
    };
    let files = manifest.files.iter().map(file).collect();
    Ok(serde_json::to_vec(&Wire { files })?)
}

/// The manifest of an artifact, if these bytes from elsewhere are it. Its stats are not those of any file yet.
pub fn parse_manifest(content: &str, bytes: &[u8]) -> anyhow::Result<Manifest> {
    let wire: Wire = serde_json::from_slice(bytes).context("it is no manifest")?;
    let mut files = BTreeMap::new();
    let mut all: u64 = 0;
    for (path, file) in wire.files {
        ensure!(
            is_inside(&path),
            "it names the file `{}`, which is outside or can't be a name",
            path.escape_debug()
        );
        ensure!(
            is_digest(&file.blake3),
            "the digest of `{path}` is no digest"
        );
        let sum = all.checked_add(file.size).filter(|sum| *sum <= LARGEST);
        all = sum.context("the sizes that it names are more than any disk holds")?;
        let stat = Stat {
            size: file.size,
            modified: 0,
            changed: 0,
            inode: 0,
        };
        let blake3 = file.blake3;
        files.insert(path, Entry { blake3, stat });
    }
    for path in files.keys() {
        let mut folders = path
            .match_indices('/')
            .filter_map(|(end, _)| path.get(..end));
        if let Some(folder) = folders.find(|folder| files.contains_key(*folder)) {
            bail!(
                "it names `{}` as a file and as a folder",
                folder.escape_debug()
            );
        }
    }
    let folders = BTreeMap::new();
    let manifest = Manifest { files, folders };
    ensure!(
        manifest.digest() == content,
        "it is the manifest of other contents"
    );
    Ok(manifest)
}

/// Whether a name from elsewhere is that of a file below its folder.
fn is_inside(path: &str) -> bool {
    let plain = |part: Component<'_>| matches!(part, Component::Normal(_));
    !path.is_empty()
        && !path.contains('\0')
        && Path::new(path).components().all(plain)
        // Components skip these.
        && path.split('/').all(|part| !part.is_empty() && part != "." && part.len() <= LONGEST_NAME)
}

/// The record of a fingerprint, if these bytes from elsewhere are it.
pub fn parse_record(fingerprint: &str, bytes: &[u8]) -> anyhow::Result<Record> {
    let record: Record = serde_json::from_slice(bytes).context("it is no record")?;
    ensure!(
        record.format == FORMAT,
        "its format is {}, and {FORMAT} is known here",
        record.format
    );
    ensure!(
        record.fingerprint.digest() == fingerprint,
        "it is the record of another fingerprint"
    );
    ensure!(
        is_digest(&record.artifact),
        "what it names as its artifact is no digest"
    );
    Ok(record)
}

/// Whether a file below a remote's folder is what a writer that was killed left of one of our objects: its name and `#` with a number.
pub(crate) fn is_unfinished(path: &str) -> bool {
    let Some((key, number)) = path.rsplit_once('#') else {
        return false;
    };
    let digest = digest_of(key).unwrap_or_default();
    !number.is_empty()
        && number.bytes().all(|byte| byte.is_ascii_digit())
        && [record_key(digest), manifest_key(digest), blob_key(digest)]
            .iter()
            .any(|ours| ours == key)
}

/// A record or a manifest, whole; none if it is not there.
pub(super) fn get(remote: &dyn Remote, key: &str) -> anyhow::Result<Option<Vec<u8>>> {
    let longest = if key.starts_with(RECORDS) {
        LONGEST_RECORD
    } else {
        LONGEST_MANIFEST
    };
    get_up_to(remote, key, longest)
}

/// An object of at most so many bytes; none if it is not there.
pub(super) fn get_up_to(
    remote: &dyn Remote,
    key: &str,
    longest: usize,
) -> anyhow::Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    let found = remote.read(key, 0, &mut |piece| {
        if bytes.len() + piece.len() > longest {
            bail!("`{key}` is longer than {longest} bytes");
        }
        bytes.extend_from_slice(piece);
        Ok(())
    })?;
    Ok(found.then_some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_from_elsewhere_stay_inside() {
        for good in ["a", "a/b.json", "..a/b", "über"] {
            assert!(is_inside(good), "{good}");
        }
        for bad in [
            "", "/a", "..", "a/../b", "a//b", "./a", "a/.", "a/", "a\0b", "../a",
        ] {
            assert!(!is_inside(bad), "{bad}");
        }
        let digest = "ab".repeat(32);
        assert_eq!(digest_of(&format!("v1/blobs/ab/{digest}")), Some(&*digest));
        assert_eq!(digest_of("v1/records/../x.json"), None);
        assert!(!is_inside(&"x".repeat(256)));
        assert!(!is_digest(&digest.to_uppercase()));
        for ours in [blob_key(&digest), record_key(&digest)] {
            assert!(is_unfinished(&format!("{ours}#12")));
            assert!(!is_unfinished(&ours));
            assert!(!is_unfinished(&format!("{ours}#1x")));
            assert!(!is_unfinished(&format!("x/{ours}#1")));
        }
        assert!(!is_unfinished("v1/records/notes#1"));
    }
}
