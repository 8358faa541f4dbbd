//! The two hashes by which the hub names contents: sha256 for large files, git's blob hash for small ones.

use std::fmt::Write as _;
use std::io::{self, Read};
use std::path::Path;

use sha1::Digest as _;

use super::RemoteFile;

/// A running hash of the kind that a [`RemoteFile`] is named by.
pub(super) enum Hasher {
    Sha256(sha2::Sha256),
    Git(sha1::Sha1),
}

impl Hasher {
    /// For a file of `size` bytes. What has no hash is hashed as a large file.
    pub(super) fn for_file(file: &RemoteFile, size: u64) -> Self {
        if file.sha256.is_none() && file.git_sha1.is_some() {
            let mut hasher = sha1::Sha1::new();
            hasher.update(format!("blob {size}\0"));
            Self::Git(hasher)
        } else {
            Self::Sha256(sha2::Sha256::new())
        }
    }

    pub(super) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Git(hasher) => hasher.update(bytes),
        }
    }

    /// The hash in hexadecimal digits.
    pub(super) fn finish(self) -> String {
        match self {
            Self::Sha256(hasher) => hex(&hasher.finalize()),
            Self::Git(hasher) => hex(&hasher.finalize()),
        }
    }
}

/// Whether the file at `path` is `file`: size and hash, as far as they are known. `tick` is called now and then and may end the reading.
pub(super) fn is_file(
    path: &Path,
    file: &RemoteFile,
    tick: &mut dyn FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<bool> {
    let mut source = match std::fs::File::open(path) {
        Ok(source) => source,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => {
            return Err(
                anyhow::Error::new(error).context(format!("could not read `{}`", path.display()))
            );
        }
    };
    let metadata = source.metadata()?;
    if !metadata.is_file() || file.size.is_some_and(|size| size != metadata.len()) {
        return Ok(false);
    }
    let Some(expected) = file.etag() else {
        return Ok(file.size.is_some());
    };
    let mut hasher = Hasher::for_file(file, metadata.len());
    feed(&mut source, &mut hasher, tick)?;
    Ok(hasher.finish() == expected)
}

/// Puts all of `source` into `hasher`; gives the number of bytes.
pub(super) fn feed(
    source: &mut impl Read,
    hasher: &mut Hasher,
    tick: &mut dyn FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<u64> {
    let mut buffer = vec![0; 1 << 20];
    let mut total = 0;
    loop {
        let read = match source.read(&mut buffer) {
            Ok(0) => return Ok(total),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error.into()),
        };
        hasher.update(&buffer[..read]);
        total += read as u64;
        tick()?;
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn git_names_a_blob_as_git_does() {
        let mut file = RemoteFile {
            path: "x".into(),
            size: Some(6),
            sha256: None,
            git_sha1: Some("ce013625030ba8dba906f756967f9e9ca394464a".into()), // printf 'hello\n' | git hash-object --stdin
        };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        std::fs::write(&path, "hello\n").unwrap();
        assert!(is_file(&path, &file, &mut || Ok(())).unwrap());
        std::fs::write(&path, "hellO\n").unwrap();
        assert!(!is_file(&path, &file, &mut || Ok(())).unwrap());
        file.sha256 =
            Some("5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03".into()); // printf 'hello\n' | sha256sum
        std::fs::write(&path, "hello\n").unwrap();
        assert!(is_file(&path, &file, &mut || Ok(())).unwrap());
        assert!(!is_file(&folder.path().join("none"), &file, &mut || Ok(())).unwrap());
    }
}
