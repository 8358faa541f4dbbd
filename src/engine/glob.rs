//! File name patterns: `*`, `**`, `?`, `[a-z]`, `[!a-z]`, and paths of recipes that are patterns of files.

use std::path::{Path, PathBuf};

/// Whether a single `*` also matches `/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Star {
    /// Yes, as in Python's `fnmatch` and `snapshot_download`.
    CrossesFolders,
    /// No; only `**` does, as in the shell and in `datasets`' `data_files`.
    StaysInFolder,
}

/// Whether `pattern` matches the whole of `path`.
pub fn matches(pattern: &str, path: &str, star: Star) -> bool {
    let pattern: Vec<char> = pattern.chars().collect();
    let path: Vec<char> = path.chars().collect();
    matches_pattern(&pattern, &path, star)
}

/// A path with a pattern in it, split into the folder before the pattern and the pattern for files below it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    folder: PathBuf,
    pattern: String,
}

impl Pattern {
    /// Reads a path as a pattern; `None` if it has no pattern, or something exists at that path.
    pub fn parse(path: &Path) -> Option<Self> {
        let is_pattern = |part: &std::ffi::OsStr| part.to_string_lossy().contains(['*', '?', '[']);
        let parts: Vec<_> = path.iter().collect();
        let first = parts.iter().position(|part| is_pattern(part))?;
        if std::fs::symlink_metadata(path).is_ok() {
            return None;
        }
        let (folder, rest) = parts.split_at_checked(first)?;
        let rest: Option<Vec<&str>> = rest.iter().map(|part| part.to_str()).collect();
        Some(Self {
            folder: folder.iter().collect(),
            pattern: rest?.join("/"),
        })
    }

    /// The folder below which files are matched.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The same pattern below another folder.
    pub fn below(&self, folder: &Path) -> PathBuf {
        folder.join(&self.pattern)
    }

    /// Whether the pattern matches a file, given its name relative to the folder.
    pub fn matches(&self, name: &str) -> bool {
        matches(&self.pattern, name, Star::StaysInFolder)
    }

    /// Whether the pattern can match files in a folder, given its name relative to the pattern's folder.
    pub fn reaches(&self, name: &str) -> bool {
        let mut parts = self.pattern.split('/');
        for folder in name.split('/') {
            match parts.next() {
                Some(part) if part.contains("**") => return true,
                Some(part) if matches(part, folder, Star::StaysInFolder) => {}
                _ => return false,
            }
        }
        parts.next().is_some()
    }

    /// Whether the pattern can match files at any depth.
    pub(super) fn is_deep(&self) -> bool {
        self.pattern.contains("**")
    }
}

/// Uses a table over both texts instead of recursion, so that a pattern with many stars costs at most the product of the lengths.
fn matches_pattern(pattern: &[char], path: &[char], star: Star) -> bool {
    // reached[i]: the pattern so far matches the first i characters.
    let mut reached = vec![false; path.len() + 1];
    reached[0] = true;
    let mut rest = pattern;
    while let Some((&first, tail)) = rest.split_first() {
        let mut next = vec![false; path.len() + 1];
        if first == '*' {
            let double = tail.first() == Some(&'*');
            let crosses = double || star == Star::CrossesFolders;
            rest = if double { &tail[1..] } else { tail };
            // `**/x` also means `x`.
            if double && star == Star::StaysInFolder && rest.first() == Some(&'/') {
                rest = &rest[1..];
                for i in 0..=path.len() {
                    let at_start = i == 0 || path[i - 1] == '/';
                    next[i] = reached[i] || (at_start && reached[..i].contains(&true));
                }
            } else {
                let mut open = false;
                for i in 0..=path.len() {
                    open = reached[i] || (open && (crosses || path[i - 1] != '/'));
                    next[i] = open;
                }
            }
        } else {
            let (set, tail) = character_set(first, tail, star);
            rest = tail;
            for (i, &c) in path.iter().enumerate() {
                next[i + 1] = reached[i] && set.has(c);
            }
        }
        reached = next;
    }
    reached[path.len()]
}

enum Set<'a> {
    One(char),
    Any(Star),
    Ranges { text: &'a [char], negated: bool },
}

impl Set<'_> {
    fn has(&self, c: char) -> bool {
        match self {
            Self::One(one) => *one == c,
            Self::Any(star) => *star == Star::CrossesFolders || c != '/',
            Self::Ranges { text, negated } => {
                let mut found = false;
                let mut rest = *text;
                while let Some((&low, tail)) = rest.split_first() {
                    if let ['-', high, tail @ ..] = tail {
                        found |= (low..=*high).contains(&c);
                        rest = tail;
                    } else {
                        found |= low == c;
                        rest = tail;
                    }
                }
                found != *negated
            }
        }
    }
}

fn character_set(first: char, tail: &[char], star: Star) -> (Set<'_>, &[char]) {
    if first == '?' {
        return (Set::Any(star), tail);
    }
    if first == '[' {
        let negated = tail.first() == Some(&'!');
        let inner = if negated { &tail[1..] } else { tail };
        // A `]` that comes first is a member.
        if let Some(end) = inner.iter().skip(1).position(|&c| c == ']') {
            let text = &inner[..=end];
            return (Set::Ranges { text, negated }, &inner[end + 2..]);
        }
    }
    (Set::One(first), tail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_fit_as_in_python() {
        let fits = |pattern, path| matches(pattern, path, Star::CrossesFolders);
        assert!(fits("*.json", "config.json"));
        assert!(fits("*.json", "a/b/config.json"));
        assert!(!fits("*.json", "config.jsonl"));
        assert!(fits(
            "model-?????-of-[0-9]*.safetensors",
            "model-00001-of-00002.safetensors"
        ));
        assert!(fits("[!a-c]x", "dx") && !fits("[!a-c]x", "bx"));
        assert!(fits("[]]", "]") && fits("[a", "[a") && fits("", "") && !fits("", "a"));
        assert!(fits("*a*b*", "xxaxxbxx") && !fits("*a*b*", "xxbxxa"));
    }

    #[test]
    fn a_path_may_be_a_pattern() {
        let pattern = Pattern::parse(Path::new("/no/data/*/x-?.jsonl")).unwrap();
        assert_eq!(pattern.folder(), Path::new("/no/data"));
        assert!(pattern.matches("a/x-1.jsonl") && !pattern.matches("x-1.jsonl"));
        assert!(pattern.reaches("a") && !pattern.reaches("a/b"));
        let deep = Pattern::parse(Path::new("/no/**/x.jsonl")).unwrap();
        assert!(deep.matches("x.jsonl") && deep.matches("a/b/x.jsonl") && deep.reaches("a/b/c"));
        assert!(
            !Pattern::parse(Path::new("/no/*.jsonl"))
                .unwrap()
                .reaches("a")
        );
        assert_eq!(Pattern::parse(Path::new("/no/data/x.jsonl")), None);
        let folder = tempfile::tempdir().unwrap();
        let plain = folder.path().join("a[1].jsonl");
        std::fs::write(&plain, "").unwrap();
        assert_eq!(Pattern::parse(&plain), None, "what is there is no pattern");
    }

    #[test]
    fn folders_stop_a_star() {
        let fits = |pattern, path| matches(pattern, path, Star::StaysInFolder);
        assert!(fits("data/train-*", "data/train-00000-of-00001.parquet"));
        assert!(!fits("data/*", "data/x/y"));
        assert!(fits("data/**", "data/x/y") && fits("**/y", "y") && fits("**/y", "data/x/y"));
        assert!(!fits("**/y", "data/xy") && !fits("a?b", "a/b"));
        assert!(fits("**", "a/b") && fits("a/**/b", "a/b") && fits("a/**/b", "a/x/y/b"));
    }
}
