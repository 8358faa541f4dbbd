//! llama.cpp's names for the ways in which tokenizers cut a text into words (`tokenizer.ggml.pre`).
//!
//! llama.cpp's converter tells them by a digest of the ids of one text. Here they are told by what the tokenizer does: the steps in
//! `tokenizer.json` are compared with those of the ways that [`Splits`] knows.

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::splits::{Found, Splits};

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
    let nfc = !parts(normalizer, "normalizers").is_empty();
    let steps = steps(pre).with_context(found)?;
    let way = Splits::by_steps(&steps, ignores_merges, nfc);
    way.map(Splits::name).with_context(found)
}

/// The steps of a byte-level pre-tokenizer; `None` if there is one of another kind.
fn steps(pre: &Value) -> Option<Vec<Found>> {
    let mut steps = Vec::new();
    for part in parts(pre, "pretokenizers") {
        match kind(part) {
            "ByteLevel" => {
                if flag(part, "add_prefix_space") {
                    return None;
                }
                // Without the setting the library splits.
                if part.get("use_regex") != Some(&Value::Bool(false)) {
                    steps.push(Found::Gpt2);
                }
            }
            "Digits" if flag(part, "individual_digits") => steps.push(Found::Digits),
            "Split" => {
                let pattern = part.get("pattern")?.get("Regex")?.as_str()?;
                let isolated = part.get("behavior")?.as_str()? == "Isolated";
                // What is removed and inverted is the same as what is isolated where a pattern matches everything.
                let removed = part.get("behavior")?.as_str()? == "Removed" && flag(part, "invert");
                if !removed && (!isolated || flag(part, "invert")) {
                    return None;
                }
                steps.push(if pattern == r"\p{N}" {
                    Found::Digits
                } else {
                    Found::Pattern(pattern.to_owned())
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
