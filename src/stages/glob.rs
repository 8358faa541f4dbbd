//! File name patterns: `*`, `?`, `[a-z]`, `[!a-z]`.

/// Whether a single `*` also matches `/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Star {
    /// Yes, as in Python's `fnmatch` and `snapshot_download`.
    CrossesFolders,
    /// No; only `**` does, as in the shell and in `datasets`' `data_files`.
    StaysInFolder,
}

/// Whether the whole of `path` fits `pattern`.
pub(super) fn matches(pattern: &str, path: &str, star: Star) -> bool {
    let pattern: Vec<char> = pattern.chars().collect();
    let path: Vec<char> = path.chars().collect();
    fits(&pattern, &path, star)
}

/// A table over both texts instead of recursion: a pattern of many stars costs no more than the product of the lengths.
fn fits(pattern: &[char], path: &[char], star: Star) -> bool {
    // reached[i]: the pattern so far fits the first i characters.
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
            let (set, tail) = one(first, tail, star);
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

fn one(first: char, tail: &[char], star: Star) -> (Set<'_>, &[char]) {
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
    fn folders_stop_a_star() {
        let fits = |pattern, path| matches(pattern, path, Star::StaysInFolder);
        assert!(fits("data/train-*", "data/train-00000-of-00001.parquet"));
        assert!(!fits("data/*", "data/x/y"));
        assert!(fits("data/**", "data/x/y") && fits("**/y", "y") && fits("**/y", "data/x/y"));
        assert!(!fits("**/y", "data/xy") && !fits("a?b", "a/b"));
        assert!(fits("**", "a/b") && fits("a/**/b", "a/b") && fits("a/**/b", "a/x/y/b"));
    }
}
