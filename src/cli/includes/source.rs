//! How a recipe names another one: a path, `git+https://host/owner/repo@rev#path`, or `hf://owner/repo@rev/path`.

use std::path::PathBuf;

use crate::hub::RepoKind;

/// The recipe of a repository that names no path.
const DEFAULT: &str = "pipeline.yaml";
/// How repositories are reached.
const SCHEMES: [&str; 3] = ["https://", "ssh://", "file://"];

/// Where a recipe is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Source {
    /// A path from the folder of the recipe that names it.
    Local(PathBuf),
    /// A file in a git repository.
    Git {
        url: String,
        /// A branch, a tag or a commit; none for the default branch.
        revision: Option<String>,
        path: String,
    },
    /// A file in a repository of the hub.
    Hub {
        kind: RepoKind,
        repo: String,
        revision: String,
        path: String,
    },
}

impl Source {
    /// Reads a source. The error is a sentence, and what to do.
    pub(super) fn parse(written: &str) -> Result<Self, (String, String)> {
        if let Some(rest) = written.strip_prefix("git+") {
            return git(written, rest);
        }
        if let Some(rest) = written.strip_prefix("hf://") {
            return hub(written, rest);
        }
        if let Some((scheme, _)) = written.split_once("://") {
            let message = format!("`{written}` is an address that no recipe can be had from");
            let hint = format!(
                "a git repository is `git+{scheme}://host/owner/repo@rev#path`, and one of the hub `hf://owner/repo@rev/path`"
            );
            return Err((message, hint));
        }
        if written.trim().is_empty() {
            let message = "the path of the recipe is empty".to_owned();
            return Err((message, "as in `shared/prep.yaml`".to_owned()));
        }
        Ok(Self::Local(PathBuf::from(written)))
    }
}

fn git(written: &str, rest: &str) -> Result<Source, (String, String)> {
    let example = "as in `git+https://host/owner/repo@v1.2#recipes/prep.yaml`".to_owned();
    let wrong = |why: &str| Err((format!("`{written}` {why}"), example.clone()));
    let (address, path) = rest.split_once('#').unwrap_or((rest, DEFAULT));
    let Some(scheme) = SCHEMES.iter().find(|scheme| address.starts_with(**scheme)) else {
        return wrong("is reached neither by https nor by ssh");
    };
    let after = address.get(scheme.len()..).unwrap_or_default();
    let (host, below) = after.split_once('/').unwrap_or((after, ""));
    if below.is_empty() || (host.is_empty() && *scheme != "file://") {
        return wrong("names no repository");
    }
    if host
        .split_once('@')
        .is_some_and(|(user, _)| user.contains(':'))
    {
        let message = "the address of a repository has a password in it".to_owned();
        let hint = "recipes are read by many; git asks its credential helper or the SSH agent";
        return Err((message, hint.to_owned()));
    }
    let (below, revision) = match below.rsplit_once('@') {
        Some((below, revision)) => (below, Some(revision)),
        None => (below, None),
    };
    if revision.is_some_and(|revision| !is_revision(revision)) {
        return wrong("has a revision that is no branch, tag or commit");
    }
    if !is_inside(path) {
        return wrong("has a path that leaves the repository");
    }
    let plain = |c: char| !c.is_control() && !c.is_whitespace();
    if below.split('/').any(|part| part == "..") {
        return wrong("has `..` in it");
    }
    if !address.chars().all(plain) || host.starts_with('-') {
        return wrong("is no address");
    }
    Ok(Source::Git {
        url: format!("{scheme}{host}/{below}"),
        revision: revision.map(str::to_owned),
        path: path.to_owned(),
    })
}

fn hub(written: &str, rest: &str) -> Result<Source, (String, String)> {
    let example = "as in `hf://owner/repo@main/recipes/prep.yaml`".to_owned();
    let wrong = |why: &str| Err((format!("`{written}` {why}"), example.clone()));
    let (kind, rest) = match rest.strip_prefix("datasets/") {
        Some(rest) => (RepoKind::Dataset, rest),
        None => (
            RepoKind::Model,
            rest.strip_prefix("models/").unwrap_or(rest),
        ),
    };
    let mut parts = rest.splitn(3, '/');
    let (Some(owner), Some(name)) = (parts.next(), parts.next()) else {
        return wrong("names no repository of the hub");
    };
    let path = parts.next().unwrap_or(DEFAULT);
    let (name, revision) = name.split_once('@').unwrap_or((name, "main"));
    if owner.is_empty() || name.is_empty() {
        return wrong("names no repository of the hub");
    }
    if !is_revision(revision) {
        return wrong("has a revision that is no branch, tag or commit");
    }
    if !is_inside(path) {
        return wrong("has a path that leaves the repository");
    }
    Ok(Source::Hub {
        kind,
        repo: format!("{owner}/{name}"),
        revision: revision.to_owned(),
        path: path.to_owned(),
    })
}

/// Whether git can take a text as the name of a commit, and as nothing else.
fn is_revision(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '/' | '+');
    !text.is_empty()
        && text.len() <= 200
        && !text.starts_with(['-', '/', '.'])
        && !text.contains("..")
        && text.chars().all(plain)
}

/// Whether a path is relative and stays below its start.
fn is_inside(path: &str) -> bool {
    let part = |part: &str| !part.is_empty() && part != ".." && part != "." && part != ".git";
    path.split('/').all(part) && !path.contains(['\\', '\0']) && path.len() <= 1000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_read() {
        let git = |url: &str, revision: Option<&str>, path: &str| Source::Git {
            url: url.into(),
            revision: revision.map(str::to_owned),
            path: path.into(),
        };
        let hub = |kind, revision: &str, path: &str| Source::Hub {
            kind,
            repo: "o/r".into(),
            revision: revision.into(),
            path: path.into(),
        };
        for (written, expected) in [
            ("shared/prep.yaml", Source::Local("shared/prep.yaml".into())),
            ("git+https://h/o/r", git("https://h/o/r", None, DEFAULT)),
            (
                "git+https://h/o/r@v1#a/b.yaml",
                git("https://h/o/r", Some("v1"), "a/b.yaml"),
            ),
            (
                "git+https://h/o/r@a/b#c.yaml",
                git("https://h/o/r", Some("a/b"), "c.yaml"),
            ),
            (
                "git+ssh://git@h/o/r@v1",
                git("ssh://git@h/o/r", Some("v1"), DEFAULT),
            ),
            (
                "git+ssh://git@h:22/o/r#x",
                git("ssh://git@h:22/o/r", None, "x"),
            ),
            (
                "git+file:///a/b@main#x",
                git("file:///a/b", Some("main"), "x"),
            ),
            ("hf://o/r", hub(RepoKind::Model, "main", DEFAULT)),
            (
                "hf://o/r@v2/a/b.yaml",
                hub(RepoKind::Model, "v2", "a/b.yaml"),
            ),
            (
                "hf://datasets/o/r/b.yaml",
                hub(RepoKind::Dataset, "main", "b.yaml"),
            ),
        ] {
            assert_eq!(Source::parse(written), Ok(expected), "{written}");
        }
    }

    #[test]
    fn what_git_could_misread_is_refused() {
        for written in [
            "",
            "https://h/o/r",
            "git+http://h/o/r",
            "git+ext::sh -c x",
            "git+https://h",
            "git+https://u:p@h/o/r",
            "git+https://h/o/r@--upload-pack=x",
            "git+https://h/o/r@a..b",
            "git+https://h/o/r#../x",
            "git+https://h/o/r#/etc/passwd",
            "git+https://h/o/r#.git/config",
            "git+ssh://-oProxyCommand=x/o/r",
            "git+https://h/o r",
            "git+file:///a/../b",
            "hf://o",
            "hf://o/r@-x/y",
            "hf://o/r/../x",
        ] {
            assert!(Source::parse(written).is_err(), "{written}");
        }
    }
}
