//! The files of a repository at one commit: from the hub's tree, page by page; from the repository's description where a mirror
//! has no trees; and what either leaves out from each file's headers.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use serde::Deserialize;
use ureq::http::Uri;

use super::client::{MAX_DESCRIPTION, Sibling, write_whole};
use super::headers::Facts;
use super::http_error::HttpError;
use super::names::{check_file, check_repo, escape, is_commit, is_hex};
use super::{Hub, RemoteFile, Snapshot};

/// The files of a repository at one commit.
#[derive(Debug, Clone)]
pub struct Listing {
    /// The files, by path.
    pub files: Vec<RemoteFile>,
    /// False when it is only what another program left in the cache, which may be a part.
    pub complete: bool,
}

/// An entry of a tree.
#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    size: Option<u64>,
    oid: Option<String>,
    lfs: Option<Pointer>,
}

/// Where a large file is.
#[derive(Deserialize)]
struct Pointer {
    oid: Option<String>,
    size: Option<u64>,
}

impl Hub<'_> {
    /// The files of `snapshot`. Asked once: a whole answer is kept in the cache, since a commit never changes.
    pub fn list(&self, snapshot: &Snapshot) -> anyhow::Result<Listing> {
        check_repo(&snapshot.repo)?;
        ensure!(
            is_commit(&snapshot.commit),
            "`{}` is no commit",
            snapshot.commit
        );
        let kept = self.listing_path(snapshot);
        if let Some(files) = read_kept(&kept) {
            return Ok(Listing {
                files,
                complete: true,
            });
        }
        let noun = snapshot.kind.noun();
        let (repo, commit) = (&snapshot.repo, &snapshot.commit);
        if self.settings.offline {
            let files = self.cached_files(snapshot);
            ensure!(
                !files.is_empty(),
                "the {noun} `{repo}` at commit {commit} is not in the cache `{}`, and `--offline` or `HF_HUB_OFFLINE` forbids to \
                 fetch it; run once with a network",
                self.settings.cache.display()
            );
            return Ok(Listing {
                files,
                complete: false,
            });
        }
        let mut files = match self.tree(snapshot)? {
            Ok(files) => files,
            Err(failure) if failure.is_unsupported() => self.described(snapshot)?,
            Err(failure) => {
                return Err(self.explain(snapshot.kind, repo, commit, None, &failure));
            }
        };
        for file in &files {
            check_file(&file.path).with_context(|| {
                format!("the hub's list of files of the {noun} `{repo}` can't be used")
            })?;
        }
        files.sort_by(|a, b| a.path.cmp(&b.path));
        files.dedup_by(|a, b| a.path == b.path);
        // A cache that can't be written still serves what is in it.
        if files.iter().all(RemoteFile::is_whole)
            && let Ok(text) = serde_json::to_vec(&files)
        {
            let _ = write_whole(&kept, &text);
        }
        Ok(Listing {
            files,
            complete: true,
        })
    }

    /// All pages of the hub's tree.
    fn tree(&self, snapshot: &Snapshot) -> anyhow::Result<Result<Vec<RemoteFile>, HttpError>> {
        let query = "?recursive=true&expand=false";
        let first = self.api(
            snapshot.kind,
            &snapshot.repo,
            "tree",
            &snapshot.commit,
            query,
        )?;
        let (mut next, mut seen) = (Some(first), BTreeSet::new());
        let (mut files, mut left) = (Vec::new(), MAX_DESCRIPTION);
        while let Some(uri) = next {
            let page = if seen.insert(uri.to_string()) {
                self.persist(|| self.http.read::<Vec<Entry>>(&uri, &mut left))?
            } else {
                let reason = "its list of files goes round in a circle";
                Err(HttpError::Malformed(reason.into()))
            };
            let entries = match page {
                Ok((entries, more)) => {
                    next = more;
                    entries
                }
                Err(failure) if files.is_empty() && seen.len() == 1 => return Ok(Err(failure)),
                // The first pages came: this is no mirror without trees, and a part of a list is none.
                Err(failure) => {
                    return Err(self.explain(
                        snapshot.kind,
                        &snapshot.repo,
                        &snapshot.commit,
                        None,
                        &failure,
                    ));
                }
            };
            let found = entries.into_iter().filter(|entry| entry.kind == "file");
            files.extend(found.map(|entry| match entry.lfs {
                Some(lfs) => {
                    RemoteFile::described(entry.path, lfs.size.or(entry.size), lfs.oid, None)
                }
                None => RemoteFile::described(entry.path, entry.size, None, entry.oid),
            }));
        }
        Ok(Ok(files))
    }

    /// The files that the description names, with sizes and hashes where it has them.
    fn described(&self, snapshot: &Snapshot) -> anyhow::Result<Vec<RemoteFile>> {
        let (kind, repo, commit) = (snapshot.kind, &snapshot.repo, &snapshot.commit);
        let described = self.describe(kind, repo, commit, "?blobs=true")?;
        ensure!(
            described.sha == *commit,
            "asked for commit {commit} of the {} `{repo}`, the hub answered with {:?}",
            kind.noun(),
            described.sha
        );
        let file = |sibling: Sibling| match sibling.lfs {
            Some(lfs) => RemoteFile::described(
                sibling.rfilename,
                lfs.size.or(sibling.size),
                lfs.sha256,
                None,
            ),
            None => RemoteFile::described(sibling.rfilename, sibling.size, None, sibling.blob_id),
        };
        Ok(described.siblings.into_iter().map(file).collect())
    }

    /// The file with its size, and with its hash if the hub tells one at all: what its listing leaves out is asked for.
    pub fn measure(&self, snapshot: &Snapshot, file: &RemoteFile) -> anyhow::Result<RemoteFile> {
        if file.is_whole() || self.settings.offline {
            return Ok(file.clone());
        }
        let uri = self.address(snapshot, &file.path)?;
        let facts = self.persist(|| self.http.head(&uri))?.map_err(|failure| {
            let (repo, commit) = (&snapshot.repo, &snapshot.commit);
            self.explain(snapshot.kind, repo, commit, Some(&file.path), &failure)
        })?;
        self.check_facts(snapshot, file, &facts)?;
        let (sha256, git_sha1) = match &facts.etag {
            Some(etag) if is_hex(etag, 64) => (Some(etag.clone()), None),
            Some(etag) if is_hex(etag, 40) => (None, Some(etag.clone())),
            _ => (None, None),
        };
        let measured = RemoteFile {
            path: file.path.clone(),
            size: file.size.or(facts.size),
            sha256: file.sha256.clone().or(sha256),
            git_sha1: file.git_sha1.clone().or(git_sha1),
        };
        if measured.size.is_none() {
            bail!(
                "`{}` of the {} `{}` can't be fetched from {}: it tells neither in its lists nor in the headers how long the file \
                 is, so nobody could know whether all of it arrived",
                file.path,
                snapshot.kind.noun(),
                snapshot.repo,
                self.endpoint.address
            );
        }
        Ok(measured)
    }

    /// What the hub says of a file beside its body has to agree with the listing.
    pub(super) fn check_facts(
        &self,
        snapshot: &Snapshot,
        file: &RemoteFile,
        facts: &Facts,
    ) -> anyhow::Result<()> {
        let whose = || {
            format!(
                "`{}` of the {} `{}` at {}",
                file.path,
                snapshot.kind.noun(),
                snapshot.repo,
                self.endpoint.address
            )
        };
        if let Some(commit) = facts.commit.as_deref().filter(|found| is_commit(found)) {
            ensure!(
                commit == snapshot.commit,
                "{}: asked for commit {}, it answers with that of {commit}",
                whose(),
                snapshot.commit
            );
        }
        if let (Some(listed), Some(found)) = (file.size, facts.size) {
            ensure!(
                listed == found,
                "{}: it lists {listed} bytes and offers {found}",
                whose()
            );
        }
        if let (Some(listed), Some(found)) = (file.etag(), facts.etag.as_deref())
            && is_hex(found, listed.len())
        {
            ensure!(
                listed == found,
                "{}: it lists the hash {listed} and offers {found}",
                whose()
            );
        }
        Ok(())
    }

    /// The address of a file.
    pub(super) fn address(&self, snapshot: &Snapshot, path: &str) -> anyhow::Result<Uri> {
        let address = format!(
            "{}/{}/resolve/{}/{}",
            self.endpoint.address,
            snapshot.kind.page(&snapshot.repo),
            snapshot.commit,
            escape(path)
        );
        address
            .parse()
            .with_context(|| format!("`{address}` is no address"))
    }

    /// What another program left of this commit in the cache. Its links are named by the hashes.
    fn cached_files(&self, snapshot: &Snapshot) -> Vec<RemoteFile> {
        let root = self.place(snapshot).pointer_path(&snapshot.commit);
        let mut files = Vec::new();
        let mut seen = BTreeSet::new();
        collect(&root, "", &mut seen, &mut files);
        files.sort_by(|a, b| a.path.cmp(&b.path));
        files
    }
}

fn read_kept(path: &Path) -> Option<Vec<RemoteFile>> {
    let files: Vec<RemoteFile> = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
    let sound = |file: &RemoteFile| {
        let hash = file.etag().unwrap_or_default();
        check_file(&file.path).is_ok()
            && file.size.is_some()
            && (is_hex(hash, 64) || is_hex(hash, 40))
    };
    files.iter().all(sound).then_some(files)
}

fn collect(folder: &Path, below: &str, seen: &mut BTreeSet<PathBuf>, files: &mut Vec<RemoteFile>) {
    // A link to a parent folder must not send us round and round.
    let Ok(real) = folder.canonicalize() else {
        return;
    };
    if !seen.insert(real) {
        return;
    }
    let Ok(entries) = std::fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let path = format!("{below}{name}");
        let Ok(metadata) = std::fs::metadata(entry.path()) else {
            continue;
        };
        if metadata.is_dir() {
            collect(&entry.path(), &format!("{path}/"), seen, files);
        } else if check_file(&path).is_ok() {
            let hash = linked_hash(&entry.path());
            let of = |length| hash.clone().filter(|hash| hash.len() == length);
            files.push(RemoteFile::described(
                path,
                Some(metadata.len()),
                of(64),
                of(40),
            ));
        }
    }
}

/// The hash that a link of the cache is named after.
pub(super) fn linked_hash(link: &Path) -> Option<String> {
    let target = std::fs::read_link(link).ok()?;
    let name = target.file_name()?.to_str()?;
    (is_hex(name, 64) || is_hex(name, 40)).then(|| name.to_owned())
}
