//! What is asked for and what a server offers: kinds, names and their rules. A name from outside becomes a path or a URL
//! only after it passed here.

use anyhow::{bail, ensure};
use serde::{Deserialize, Serialize};

/// Models and datasets live under different addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RepoKind {
    /// A model.
    Model,
    /// A dataset.
    Dataset,
}

impl RepoKind {
    /// The noun for messages.
    pub fn noun(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Dataset => "dataset",
        }
    }

    /// The part of the API that describes repositories of this kind.
    pub(super) fn plural(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
        }
    }

    /// The repository's page below the endpoint.
    pub(super) fn page(self, repo: &str) -> String {
        match self {
            Self::Model => repo.to_owned(),
            Self::Dataset => format!("datasets/{repo}"),
        }
    }

    pub(super) fn repo_type(self) -> hf_hub::RepoType {
        match self {
            Self::Model => hf_hub::RepoType::Model,
            Self::Dataset => hf_hub::RepoType::Dataset,
        }
    }
}

/// A repository at one commit: contents that never change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Model or dataset.
    pub kind: RepoKind,
    /// `owner/name`.
    pub repo: String,
    /// The commit, 40 hexadecimal digits.
    pub commit: String,
}

/// One file of a repository, as the hub lists it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteFile {
    /// The path below the repository's root, with `/`.
    pub path: String,
    /// Bytes; `None` where the listing does not say (some mirrors).
    pub size: Option<u64>,
    /// The hash of the bytes, for large files.
    pub sha256: Option<String>,
    /// The git blob's hash, for small files.
    pub git_sha1: Option<String>,
}

impl RemoteFile {
    /// A file as a server describes it. What can't be a hash counts as none.
    pub(super) fn described(
        path: String,
        size: Option<u64>,
        sha256: Option<String>,
        git_sha1: Option<String>,
    ) -> Self {
        Self {
            path,
            size,
            git_sha1: git_sha1.filter(|hash| sha256.is_none() && is_hex(hash, 40)),
            sha256: sha256.filter(|hash| is_hex(hash, 64)),
        }
    }

    /// Whether the file has a hash, so that its contents can be verified.
    pub fn has_hash(&self) -> bool {
        self.etag().is_some()
    }

    /// Whether nothing is missing that a download needs to be verified.
    pub(super) fn is_whole(&self) -> bool {
        self.size.is_some() && self.has_hash()
    }

    /// The file's name in the cache: the hash that the hub sends as its etag.
    pub(super) fn etag(&self) -> Option<&str> {
        self.sha256.as_deref().or(self.git_sha1.as_deref())
    }
}

/// Whether `text` is a full commit.
pub(super) fn is_commit(text: &str) -> bool {
    is_hex(text, 40)
}

pub(super) fn is_hex(text: &str, length: usize) -> bool {
    let digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    text.len() == length && text.bytes().all(digit)
}

/// The rules of repository names: `name` or `owner/name`.
pub(super) fn check_repo(repo: &str) -> anyhow::Result<()> {
    let part = |part: &str| {
        !part.is_empty()
            && !part.contains("--")
            && !part.contains("..")
            && !part.starts_with(['.', '-'])
            && !part.ends_with(['.', '-'])
            && part
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
    };
    let parts: Vec<_> = repo.split('/').collect();
    ensure!(
        parts.len() <= 2 && parts.iter().all(|name| part(name)),
        "`{repo}` is no repository of the hub: expected `owner/name` of letters, digits, `-`, `_` and `.`"
    );
    Ok(())
}

/// The rules of branches, tags and commits.
pub(super) fn check_revision(revision: &str) -> anyhow::Result<()> {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && !part.contains("..")
            && part
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-_.+=@".contains(&byte))
    };
    ensure!(
        revision.split('/').all(part),
        "`{revision}` is no revision: expected a branch, a tag or a commit"
    );
    Ok(())
}

/// The rules of file names that a server sends: they stay below the repository's folder, on every system.
pub(super) fn check_file(path: &str) -> anyhow::Result<()> {
    for part in path.split('/') {
        let odd = part
            .chars()
            .any(|c| c.is_control() || c == '\\' || c == ':');
        if part.is_empty() || part == "." || part == ".." || odd {
            bail!("the hub lists a file with the unsafe name {path:?}; nothing of it was fetched");
        }
    }
    Ok(())
}

/// A path as part of a URL: its slashes stay.
pub(super) fn escape(path: &str) -> String {
    escape_but(path, b"-_.~/+=@,")
}

/// A revision as one part of a URL's path.
pub(super) fn escape_revision(revision: &str) -> String {
    escape_but(revision, b"-_.~")
}

fn escape_but(text: &str, kept: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || kept.contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            let _ = write!(escaped, "%{byte:02X}");
        }
    }
    escaped
}

/// The bytes that an escaped text means; what is not well formed stays as it is.
pub(super) fn unescape(text: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let digit = |at: usize| tail.get(at).and_then(|byte| char::from(*byte).to_digit(16));
        if let (b'%', Some(high), Some(low), Some(after)) =
            (*first, digit(0), digit(1), tail.get(2..))
        {
            bytes.push((high * 16 + low) as u8);
            rest = after;
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        for good in [
            "gpt2",
            "meta-llama/Meta-Llama-3-8B",
            "jondurbin/truthy-dpo-v0.1",
        ] {
            check_repo(good).unwrap();
        }
        for bad in [
            "",
            "/x",
            "a/b/c",
            "../x",
            "a/..",
            "a b/c",
            "a/b?x",
            "a--b/c",
            "https://x/y",
        ] {
            check_repo(bad).unwrap_err();
        }
        for good in ["main", "refs/convert/parquet", "v0.1", "refs/pr/3"] {
            check_revision(good).unwrap();
        }
        for bad in ["", "../main", "a//b", "/main", "a?b", "a#b", "a%2f"] {
            check_revision(bad).unwrap_err();
        }
        for good in [
            "config.json",
            "data/train-00000-of-00001.parquet",
            "a b.json",
            "..a",
        ] {
            check_file(good).unwrap();
        }
        for bad in [
            "",
            "/etc/passwd",
            "../x",
            "a/../../b",
            "a\\b",
            "C:x",
            "a//b",
            "a/./b",
            "x\0y",
            "x/",
        ] {
            check_file(bad).unwrap_err();
        }
    }

    #[test]
    fn urls_are_escaped() {
        assert_eq!(escape("data/a b#1?.json"), "data/a%20b%231%3F.json");
        assert_eq!(escape("ü%"), "%C3%BC%25");
        assert_eq!(escape_revision("refs/pr/1"), "refs%2Fpr%2F1");
        assert_eq!(unescape("p%40ss%2"), b"p@ss%2");
    }
}
