//! What must not be told to the world: tokens, passwords, and where somebody's home is.

use std::sync::LazyLock;

use regex::Regex;

/// Passwords in addresses, tokens by their looks, and values of keys that say what they are.
static SECRETS: LazyLock<Vec<(Regex, &str)>> = LazyLock::new(|| {
    let all = [
        (r"([A-Za-z][A-Za-z0-9+.-]*://)[^\s/@]+@", "${1}(hidden)@"),
        (
            r"\b(?:hf|api_org|sk|ghp|gho|github_pat|glpat)_[A-Za-z0-9_]{16,}",
            "(hidden)",
        ),
        (r"\b(?:sk-[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16})", "(hidden)"),
        (
            r"(?im)^(\s*(?:[A-Za-z0-9_-]*[_-])?(?:token|password|passwd|secret|api[_-]?key|access[_-]?key)\s*:\s*)[^\s{\[#].*$",
            "${1}(hidden)",
        ),
        (r"(?:/home|/Users)/[^/\s\x22']+", "~"),
        (r"(^|[\s\x22'(])/root\b", "${1}~"),
    ];
    let compiled = all
        .into_iter()
        .filter_map(|(pattern, put)| Some((Regex::new(pattern).ok()?, put)));
    compiled.collect()
});

/// The text without them. `token` is the one that this very upload is made with.
pub(super) fn masked(text: &str, token: Option<&str>) -> String {
    let mut text = text.to_owned();
    if let Some(token) = token.map(str::trim).filter(|token| token.len() >= 8) {
        text = text.replace(token, "(hidden)");
    }
    for (secret, put) in SECRETS.iter() {
        text = secret.replace_all(&text, *put).into_owned();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_patterns_are_in_use() {
        assert_eq!(SECRETS.len(), 6);
    }

    #[test]
    fn secrets_and_homes_are_hidden_and_nothing_else() {
        let recipe = "\
stages:
  data: { import_dataset: { path: /home/ada/secret-project/rows.jsonl } }
  more: { import_dataset: { path: \"/root/rows.jsonl\" } }
  base: { download_model: { repo: owner/hf_model } } # https://me:s3cret@mirror.example/x
vars:
  hub_token: abc
  note: hf_abcdefghijklmnopqrstuvwx
  max_length: 512 # tokens: 512
  special_tokens: refuse
";
        let shown = masked(recipe, Some("my-own-token-1"));
        for secret in ["ada", "/root", "s3cret", "abc", "hf_abcdef"] {
            assert!(!shown.contains(secret), "{secret}: {shown}");
        }
        for kept in [
            "~/secret-project/rows.jsonl",
            "owner/hf_model",
            "@mirror.example/x",
            "max_length: 512 # tokens: 512",
            "special_tokens: refuse",
        ] {
            assert!(shown.contains(kept), "{kept}: {shown}");
        }
        assert_eq!(
            masked("x my-own-token-1 y", Some("my-own-token-1")),
            "x (hidden) y"
        );
    }
}
