//! llama.cpp's names for the ways in which tokenizers cut a text into words (`tokenizer.ggml.pre`).
//!
//! llama.cpp's converter tells them by a digest of the ids of one text. Here they are told by what the tokenizer does: the patterns in
//! `tokenizer.json` are compared with those that llama.cpp has in `llama-vocab.cpp`.

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

/// A step before BPE.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    /// Words are what the pattern matches and what is between.
    Split(String),
    /// Every digit is a word.
    Digits,
    /// GPT-2's pattern.
    Gpt2,
}

/// How Llama 3 cuts a text, and many after it.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// GPT-2's own, where a file spells it out.
const GPT2: &str = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const GPT2_LONG: &str =
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// The name by pattern, and by whether a word that is a token is taken without merging (`ignore_merges`); `None` where llama.cpp does the
/// same in both cases.
const PATTERNS: [(&str, Option<bool>, &str); 8] = [
    (LLAMA3, Some(true), "llama-bpe"),
    (LLAMA3, Some(false), "dbrx"),
    (QWEN2, Some(false), "qwen2"),
    (QWEN35, Some(false), "qwen35"),
    (GPT4O, Some(false), "gpt-4o"),
    (TEKKEN, Some(true), "tekken"),
    (GPT2, Some(false), "gpt-2"),
    (GPT2_LONG, Some(false), "gpt-2"),
];

/// Whether a tokenizer works on bytes written as characters.
pub(super) fn is_byte_level(json: &Value) -> bool {
    let pre = json.get("pre_tokenizer").unwrap_or(&Value::Null);
    parts(pre, "pretokenizers")
        .iter()
        .any(|part| kind(part) == "ByteLevel")
}

/// The parts of a sequence, or the one part.
fn parts<'v>(value: &'v Value, list: &str) -> Vec<&'v Value> {
    match value {
        Value::Null => Vec::new(),
        value if kind(value) == "Sequence" => value
            .get(list)
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .flat_map(|part| parts(part, list))
            .collect(),
        value => vec![value],
    }
}

fn kind(value: &Value) -> &str {
    value
        .get("type")
        .and_then(Value::as_str)
        .unwrap_or_default()
}

fn flag(value: &Value, name: &str) -> bool {
    value.get(name) == Some(&Value::Bool(true))
}

/// llama.cpp's name for the way in which a byte-level tokenizer cuts a text.
///
/// # Errors
/// It has none for it; the error says what was found.
pub(super) fn recognise(json: &Value) -> Result<&'static str> {
    let pre = json.get("pre_tokenizer").unwrap_or(&Value::Null);
    let found = || {
        let pre = serde_json::to_string(pre).unwrap_or_default();
        format!(
            "llama.cpp has no name that is known here for the way in which the tokenizer cuts a text into words: {pre}; hint: if it \
             has one, give it as `pre`"
        )
    };
    let ignores_merges = json
        .get("model")
        .is_some_and(|model| flag(model, "ignore_merges"));
    let normalizer = json.get("normalizer").unwrap_or(&Value::Null);
    for part in parts(normalizer, "normalizers") {
        // llama.cpp has no NFC; texts are hardly ever in another form.
        if kind(part) != "NFC" {
            bail!(
                "the tokenizer changes texts first ({}), which llama.cpp does not do for byte-level BPE",
                kind(part)
            );
        }
    }
    let steps = steps(pre).with_context(found)?;
    let name = match &steps[..] {
        [Step::Split(pattern)] => {
            let named = PATTERNS.iter().find(|(known, ignores, _)| {
                known == pattern && ignores.is_none_or(|ignores| ignores == ignores_merges)
            });
            // Where the vocabulary has no word that merges don't make, the setting makes no difference.
            let named = named.or_else(|| PATTERNS.iter().find(|(known, ..)| known == pattern));
            named.map(|(.., name)| *name)
        }
        [Step::Gpt2] if !ignores_merges => Some("gpt-2"),
        [Step::Digits, Step::Gpt2] if !ignores_merges => Some("smollm"),
        _ => None,
    };
    name.with_context(found)
}

/// The steps of a byte-level pre-tokenizer; `None` if there is one of another kind.
fn steps(pre: &Value) -> Option<Vec<Step>> {
    let mut steps = Vec::new();
    for part in parts(pre, "pretokenizers") {
        match kind(part) {
            "ByteLevel" => {
                if flag(part, "add_prefix_space") {
                    return None;
                }
                // Without the setting the library splits.
                if part.get("use_regex") != Some(&Value::Bool(false)) {
                    steps.push(Step::Gpt2);
                }
            }
            "Digits" if flag(part, "individual_digits") => steps.push(Step::Digits),
            "Split" => {
                let pattern = part.get("pattern")?.get("Regex")?.as_str()?;
                let isolated = part.get("behavior")?.as_str()? == "Isolated";
                // What is removed and inverted is the same as what is isolated where a pattern matches everything.
                let removed = part.get("behavior")?.as_str()? == "Removed" && flag(part, "invert");
                if !removed && (!isolated || flag(part, "invert")) {
                    return None;
                }
                steps.push(if pattern == r"\p{N}" {
                    Step::Digits
                } else {
                    Step::Split(pattern.to_owned())
                });
            }
            _ => return None,
        }
    }
    Some(steps)
}

/// Whether a `SentencePiece` tokenizer puts a space before a text.
///
/// # Errors
/// It does something else than `SentencePiece`'s BPE does.
pub(super) fn adds_space(json: &Value) -> Result<bool> {
    let mut adds = false;
    let mut escapes = false;
    let normalizer = json.get("normalizer").unwrap_or(&Value::Null);
    for part in parts(normalizer, "normalizers") {
        match kind(part) {
            "Prepend" if part.get("prepend") == Some(&Value::from("▁")) => adds = true,
            "Replace" if part.get("content") == Some(&Value::from("▁")) => escapes = true,
            other => bail!(
                "the tokenizer changes texts in a way that llama.cpp's SentencePiece does not: {other}"
            ),
        }
    }
    let pre = json.get("pre_tokenizer").unwrap_or(&Value::Null);
    for part in parts(pre, "pretokenizers") {
        match kind(part) {
            "Metaspace" => {
                escapes = true;
                let scheme = part.get("prepend_scheme").and_then(Value::as_str);
                adds |= scheme != Some("never");
            }
            // Gemma: merges never cross a space, because no token has one inside.
            "Split" if part.get("pattern").and_then(|p| p.get("String")) == Some(&" ".into()) => {}
            other => bail!(
                "the tokenizer cuts texts in a way that llama.cpp's SentencePiece does not: {other}"
            ),
        }
    }
    if !escapes {
        bail!("the tokenizer does not write spaces as `▁`, as llama.cpp's SentencePiece does");
    }
    Ok(adds)
}
