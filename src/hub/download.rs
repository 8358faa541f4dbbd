//! One file into the shared cache: resumed, verified, renamed.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail, ensure};
use ureq::http::{HeaderMap, HeaderValue, Uri};

use super::digest::{Hasher, feed, is_file};
use super::headers::text;
use super::http::wait;
use super::http_error::HttpError;
use super::listing::linked_hash;
use super::names::{check_file, check_repo, is_commit};
use super::{Hub, RemoteFile, Snapshot};

/// Called with the bytes that are there; an error ends the download, which the next one resumes.
type Progress<'a> = &'a mut dyn FnMut(u64) -> anyhow::Result<()>;

impl Hub<'_> {
    /// The file of `snapshot` in the cache, under its own name; fetched when it is not there, and verified in any case: by its
    /// hash, or by its size alone where the hub tells no hash ([`RemoteFile::has_hash`]).
    ///
    /// `progress` gets the number of bytes of this file that are there, and ends the work by an error.
    pub fn fetch(
        &self,
        snapshot: &Snapshot,
        file: &RemoteFile,
        progress: Progress<'_>,
    ) -> anyhow::Result<PathBuf> {
        check_repo(&snapshot.repo)?;
        check_file(&file.path)?;
        ensure!(
            is_commit(&snapshot.commit),
            "`{}` is no commit",
            snapshot.commit
        );
        let file = &self.measure(snapshot, file)?;
        let cache = self.place(snapshot);
        let pointer = cache.pointer_path(&snapshot.commit).join(&file.path);
        let blob = file.etag().map(|etag| cache.blob_path(etag));
        if self.find(file, &pointer, blob.as_deref(), progress)? {
            progress(file.size.unwrap_or_default())?;
            return Ok(pointer);
        }
        let (Some(size), false) = (file.size, self.settings.offline) else {
            bail!(
                "`{}` of the {} `{}` at commit {} is not in the cache `{}` or is damaged there, and `--offline` or `HF_HUB_OFFLINE` \
                 forbids to fetch it; run once with a network",
                file.path,
                snapshot.kind.noun(),
                snapshot.repo,
                snapshot.commit,
                self.settings.cache.display()
            );
        };
        let writing = || {
            format!(
                "could not write to the hub's cache `{}`",
                self.settings.cache.display()
            )
        };
        // Without a hash the file gets its name when it is there.
        let name = file.etag().map_or_else(
            || blake3::hash(format!("{} {}", snapshot.commit, file.path).as_bytes()).to_string(),
            str::to_owned,
        );
        let place = cache.blob_path(&name);
        make_parent(&place).with_context(writing)?;
        // The lock that `huggingface_hub` takes for the same file.
        let locks = self.folder(snapshot.kind, &snapshot.repo);
        let locks = self
            .settings
            .cache
            .join(".locks")
            .join(locks.file_name().unwrap_or_default());
        std::fs::create_dir_all(&locks).with_context(writing)?;
        let lock = File::create(locks.join(format!("{name}.lock"))).with_context(writing)?;
        while let Err(TryLockError::WouldBlock) = lock.try_lock() {
            wait(Duration::from_millis(100), &mut || progress(0))?;
        }
        let kept = match &blob {
            Some(blob) if is_file(blob, file, &mut || progress(0))? => true,
            // Moved there by somebody who had the lock before us, without a link.
            _ if is_file(&pointer, file, &mut || progress(0))? => return Ok(pointer),
            _ => false,
        };
        let part = place.with_extension("incomplete");
        let blob = match blob {
            Some(blob) if kept => blob,
            _ => {
                let hash = self.download(snapshot, file, size, &part, progress)?;
                let blob = cache.blob_path(&hash);
                // What another file of the same contents put there may be in use; it is replaced only if it is damaged.
                let of = |length| Some(hash.clone()).filter(|hash| hash.len() == length);
                let same = RemoteFile::described(file.path.clone(), Some(size), of(64), of(40));
                if std::fs::hard_link(&part, &blob).is_ok()
                    || is_file(&blob, &same, &mut || progress(size))?
                {
                    std::fs::remove_file(&part).with_context(writing)?;
                } else {
                    std::fs::rename(&part, &blob)
                        .with_context(|| format!("could not write `{}`", blob.display()))?;
                }
                blob
            }
        };
        self.link(&pointer, &blob, &file.path, !kept)
            .with_context(writing)?;
        Ok(pointer)
    }

    /// Whether the cache has the file, sound; what is damaged is deleted.
    fn find(
        &self,
        file: &RemoteFile,
        pointer: &Path,
        blob: Option<&Path>,
        progress: Progress<'_>,
    ) -> anyhow::Result<bool> {
        // Where only the link knows the hash, that is what the file has to have.
        let linked = linked_hash(pointer).filter(|_| blob.is_none());
        let of = |length| linked.clone().filter(|hash| hash.len() == length);
        let known = match &linked {
            Some(_) => RemoteFile::described(file.path.clone(), file.size, of(64), of(40)),
            None => file.clone(),
        };
        if is_file(pointer, &known, &mut || progress(0))? {
            return Ok(true);
        }
        if self.settings.offline && blob.is_none() {
            return Ok(false);
        }
        if std::fs::symlink_metadata(pointer).is_ok() {
            std::fs::remove_file(pointer).with_context(|| {
                format!(
                    "`{}` is damaged and could not be removed",
                    pointer.display()
                )
            })?;
        }
        let Some(blob) = blob else { return Ok(false) };
        if !blob.exists() {
            return Ok(false);
        }
        if is_file(blob, file, &mut || progress(0))? {
            self.link(pointer, blob, &file.path, false)
                .with_context(|| format!("could not write `{}`", pointer.display()))?;
            return Ok(true);
        }
        std::fs::remove_file(blob)
            .with_context(|| format!("`{}` is damaged and could not be removed", blob.display()))?;
        Ok(false)
    }

    /// Fills `part` with the file, verified; gives its hash.
    fn download(
        &self,
        snapshot: &Snapshot,
        file: &RemoteFile,
        size: u64,
        part: &Path,
        progress: Progress<'_>,
    ) -> anyhow::Result<String> {
        let uri = self.address(snapshot, &file.path)?;
        if !file.has_hash() {
            // What an earlier download left can't be told from the beginning of something else.
            match std::fs::remove_file(part) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(anyhow::Error::new(error)
                        .context(format!("could not remove `{}`", part.display())));
                }
                _ => {}
            }
        }
        let mut found = String::new();
        for _ in 0..2 {
            found = self.complete(snapshot, file, size, &uri, part, progress)?;
            if file.etag().is_none_or(|etag| etag == found) {
                return Ok(found);
            }
            std::fs::remove_file(part)
                .with_context(|| format!("could not remove `{}`", part.display()))?;
        }
        bail!(
            "`{}` of the {} `{}` arrived twice with the wrong content: expected the hash {}, got {found}; {} or a proxy before it \
             serves something else, and nothing of it was kept",
            file.path,
            snapshot.kind.noun(),
            snapshot.repo,
            file.etag().unwrap_or_default(),
            self.endpoint.address,
        )
    }

    /// Fills `part` up to the file's size over as many requests as it takes; gives the hash of what is there.
    fn complete(
        &self,
        snapshot: &Snapshot,
        file: &RemoteFile,
        size: u64,
        uri: &Uri,
        part: &Path,
        progress: Progress<'_>,
    ) -> anyhow::Result<String> {
        let (mut best, mut tried) = (0, 0);
        loop {
            let streamed = self.stream(snapshot, file, size, uri, part, progress)?;
            let (failure, reached) = match streamed {
                Streamed::Whole(hash) => return Ok(hash),
                Streamed::Broken(failure, reached) => (failure, reached),
            };
            // A server that sends a little each time is slow, not broken.
            tried = if reached > best { 1 } else { tried + 1 };
            best = best.max(reached);
            let Some(pause) = self.pause(tried, &failure) else {
                return Err(self.explain(
                    snapshot.kind,
                    &snapshot.repo,
                    &snapshot.commit,
                    Some(&file.path),
                    &failure,
                ));
            };
            wait(pause, &mut || progress(reached))?;
        }
    }

    /// One request for what is missing in `part`.
    fn stream(
        &self,
        snapshot: &Snapshot,
        file: &RemoteFile,
        size: u64,
        uri: &Uri,
        part: &Path,
        progress: Progress<'_>,
    ) -> anyhow::Result<Streamed> {
        let writing = || format!("could not write `{}`", part.display());
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let mut target = options.open(part).with_context(writing)?;
        let mut hasher = Hasher::for_file(file, size);
        let mut have = feed(&mut target, &mut hasher, &mut || progress(0))?;
        if have > size {
            (have, hasher) = restart(&mut target, file, size).with_context(writing)?;
        }
        progress(have)?;
        if have < size {
            let reply = match self.http.get(uri, have) {
                Ok(reply) => reply,
                Err(HttpError::Status { status: 416, .. }) if have > 0 => {
                    restart(&mut target, file, size).with_context(writing)?;
                    let reason = "it refuses to go on where the last download ended";
                    return Ok(Streamed::Broken(HttpError::Connection(reason.into()), 0));
                }
                Err(failure) => return Ok(Streamed::Broken(failure, have)),
            };
            self.check_facts(snapshot, file, &reply.facts())?;
            let response = reply.response;
            let partial = response.status().as_u16() == 206;
            if !partial {
                // All of it, asked or not: what is there would stand twice.
                if have > 0 {
                    (have, hasher) = restart(&mut target, file, size).with_context(writing)?;
                }
            } else if content_start(response.headers()) != Some(have) {
                restart(&mut target, file, size).with_context(writing)?;
                let reason = "it sends another range than was asked for";
                return Ok(Streamed::Broken(HttpError::Connection(reason.into()), 0));
            }
            if let Some(length) = content_length(response.headers())
                && have.checked_add(length) != Some(size)
            {
                let reason = format!(
                    "it announces {length} bytes where {} are missing",
                    size - have
                );
                return Ok(Streamed::Broken(HttpError::Connection(reason), have));
            }
            let mut body = response.into_body().into_reader();
            let mut buffer = vec![0; 1 << 18];
            while have <= size {
                let read = match body.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(read) => read,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => {
                        let reason = format!("it broke off after {have} of {size} bytes ({error})");
                        return Ok(Streamed::Broken(HttpError::Connection(reason), have));
                    }
                };
                let bytes = &buffer[..read];
                have += read as u64;
                if have > size {
                    break;
                }
                target.write_all(bytes).with_context(writing)?;
                hasher.update(bytes);
                progress(have)?;
            }
            if have != size {
                let reason = if have > size {
                    restart(&mut target, file, size).with_context(writing)?;
                    have = 0;
                    format!("it sends more than the {size} bytes it listed")
                } else {
                    format!("it broke off after {have} of {size} bytes")
                };
                return Ok(Streamed::Broken(HttpError::Connection(reason), have));
            }
        }
        target.sync_all().with_context(writing)?;
        Ok(Streamed::Whole(hasher.finish()))
    }

    /// Makes the snapshot's entry for a blob: a relative link, so that the cache can be moved. Where links can't be made or are
    /// not wanted, a new blob is moved there, as `huggingface_hub` does, and one that was there before is copied.
    fn link(&self, pointer: &Path, blob: &Path, path: &str, new: bool) -> anyhow::Result<()> {
        make_parent(pointer)?;
        let name = blob
            .file_name()
            .ok_or_else(|| anyhow!("a blob has no name"))?;
        let mut target = PathBuf::from("../..");
        for _ in 0..path.matches('/').count() {
            target.push("..");
        }
        target.push("blobs");
        target.push(name);
        if std::fs::symlink_metadata(pointer).is_ok() {
            std::fs::remove_file(pointer)?;
        }
        let made = if self.settings.links {
            symlink(&target, pointer)
        } else {
            Err(io::ErrorKind::Unsupported.into())
        };
        match made {
            Ok(()) => Ok(()),
            // Somebody else was faster with the same link.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(_) if new && std::fs::rename(blob, pointer).is_ok() => Ok(()),
            Err(_) => std::fs::copy(blob, pointer).map(|_| ()).map_err(Into::into),
        }
    }
}

enum Streamed {
    /// The file has its size; this is its hash.
    Whole(String),
    /// Not yet, with the number of bytes that are there.
    Broken(HttpError, u64),
}

fn restart(target: &mut File, file: &RemoteFile, size: u64) -> io::Result<(u64, Hasher)> {
    target.set_len(0)?;
    target.seek(SeekFrom::Start(0))?;
    Ok((0, Hasher::for_file(file, size)))
}

fn content_length(headers: &HeaderMap<HeaderValue>) -> Option<u64> {
    text(headers, "content-length")?.trim().parse().ok()
}

/// The first byte of `Content-Range: bytes 5-9/10`.
fn content_start(headers: &HeaderMap<HeaderValue>) -> Option<u64> {
    let range = text(headers, "content-range")?.trim();
    let (start, _) = range.strip_prefix("bytes")?.trim().split_once('-')?;
    start.trim().parse().ok()
}

fn make_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), std::fs::create_dir_all)
}

#[cfg(unix)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(not(unix))]
fn symlink(_: &Path, _: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}
