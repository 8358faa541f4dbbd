//! A tokenizer as GGUF holds it (`tokenizer.ggml.*`): a list of tokens with their types and merges or scores, and the name of the way in
//! which llama.cpp cuts a text into words.
//!
//! Two kinds can be told: byte-level BPE (`gpt2`), whose split pattern llama.cpp knows by a name ([`super::recognise`]), and
//! `SentencePiece`'s BPE (`llama`), whose merges become scores: the earlier a merge, the higher the score of what it makes, so that
//! llama.cpp merges in the same order.

use std::collections::{BTreeMap, HashMap, HashSet};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::{TokenKind, recognise};
use crate::text::tokenizer::Tokenizer;

/// The tokens of a model, for a GGUF file.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenList {
    /// `tokenizer.ggml.model`: `gpt2` or `llama`.
    pub model: &'static str,
    /// `tokenizer.ggml.pre`.
    pub pre: String,
    /// The tokens by their ids.
    pub tokens: Vec<String>,
    /// Their types.
    pub kinds: Vec<TokenKind>,
    /// Their scores, for `llama`.
    pub scores: Option<Vec<f32>>,
    /// The merges, two tokens with a space between each, for `gpt2`.
    pub merges: Option<Vec<String>>,
    /// Whether a space is put before a text, for `llama`.
    pub add_space_prefix: Option<bool>,
    /// The id of the token for unknown text, for `llama`.
    pub unknown: Option<u32>,
    /// What llama.cpp will do in another way.
    pub warnings: Vec<String>,
}

/// The score of an added token: below that of every merge.
const ADDED_SCORE: f32 = -1e8;
/// The score of an id that has no token.
const UNUSED_SCORE: f32 = -2e8;

impl TokenList {
    /// The vocabulary of `tokenizer` for a model with `size` ids. `pre` names the way of splitting, if it is not to be recognised.
    ///
    /// # Errors
    /// The tokenizer is of a kind that GGUF can't hold, its way of splitting is unknown, or it has ids that the model has not.
    pub fn new(tokenizer: &Tokenizer, size: usize, pre: Option<&str>) -> Result<Self> {
        let json = tokenizer.to_json()?;
        let model = json.get("model").context("the tokenizer has no model")?;
        let kind = model
            .get("type")
            .and_then(Value::as_str)
            .unwrap_or_default();
        ensure!(
            kind == "BPE",
            "the tokenizer's model is `{kind}`; llama.cpp computes the supported families with byte-level BPE and SentencePiece's BPE only"
        );
        let plain = plain_tokens(model)?;
        let added = added_tokens(&json)?;
        let merges = merges(model)?;
        let mut tokens: Vec<Option<(String, TokenKind)>> = vec![None; size];
        for (id, text) in &plain {
            *slot(&mut tokens, *id, text)? = Some((text.clone(), TokenKind::Normal));
        }
        let byte_fallback = model.get("byte_fallback") == Some(&Value::Bool(true));
        let is_byte_level = recognise::is_byte_level(&json);
        let mut vocabulary = Self {
            model: if is_byte_level { "gpt2" } else { "llama" },
            pre: "default".to_owned(),
            tokens: Vec::new(),
            kinds: Vec::new(),
            scores: None,
            merges: None,
            add_space_prefix: None,
            unknown: None,
            warnings: Vec::new(),
        };
        if is_byte_level {
            vocabulary.pre = match pre {
                Some(pre) => pre.to_owned(),
                None => recognise::recognise(&json)?.to_owned(),
            };
            vocabulary.merges = Some(merges.iter().map(|(a, b)| format!("{a} {b}")).collect());
        } else {
            ensure!(
                byte_fallback,
                "the tokenizer is neither byte-level nor has it tokens for bytes (`byte_fallback`), which GGUF's kinds of BPE need"
            );
            vocabulary.add_space_prefix = Some(recognise::adds_space(&json)?);
            for (text, kind) in tokens.iter_mut().flatten() {
                if is_byte(text) {
                    *kind = TokenKind::Byte;
                }
            }
            if let Some(unknown) = model.get("unk_token").and_then(Value::as_str) {
                let id = plain.iter().find(|(_, text)| text.as_str() == unknown);
                if let Some((id, text)) = id {
                    *slot(&mut tokens, *id, text)? = Some((text.clone(), TokenKind::Unknown));
                    vocabulary.unknown = Some(*id);
                }
            }
        }
        for token in &added {
            let kind = if token.special || looks_special(&token.text) {
                TokenKind::Control
            } else {
                TokenKind::UserDefined
            };
            let slot = slot(&mut tokens, token.id, &token.text)?;
            if !matches!(slot, Some((_, TokenKind::Unknown))) {
                let text = match kind {
                    // llama.cpp finds these in the text as it was before spaces were written as `▁`.
                    TokenKind::UserDefined if !is_byte_level => token.text.replace('▁', " "),
                    _ => token.text.clone(),
                };
                *slot = Some((text, kind));
            }
        }
        vocabulary.warn_of_strips(&added);
        vocabulary.fill(tokens)?;
        if !is_byte_level {
            vocabulary.scores = Some(scores(&vocabulary, &merges, &added)?);
        }
        Ok(vocabulary)
    }

    /// Sets tokens and types; an id without a token gets a name that no token has.
    fn fill(&mut self, tokens: Vec<Option<(String, TokenKind)>>) -> Result<()> {
        let mut seen = HashSet::new();
        for (id, token) in tokens.into_iter().enumerate() {
            let (text, kind) = token.unwrap_or_else(|| (format!("[PAD{id}]"), TokenKind::Unused));
            ensure!(
                seen.insert(text.clone()),
                "the token `{text}` has two ids, which a GGUF file can't hold"
            );
            self.tokens.push(text);
            self.kinds.push(kind);
        }
        Ok(())
    }

    fn warn_of_strips(&mut self, added: &[Added]) {
        let stripping: Vec<&str> = added
            .iter()
            .filter(|token| token.strips)
            .map(|token| token.text.as_str())
            .collect();
        if let Some(first) = stripping.first() {
            self.warnings.push(format!(
                "{} added tokens, such as `{first}`, take the white space beside them or match whole words only; llama.cpp does so for \
                 a few models by their names and not for others",
                stripping.len()
            ));
        }
    }
}

/// The place of an id.
fn slot<'t>(
    tokens: &'t mut [Option<(String, TokenKind)>],
    id: u32,
    text: &str,
) -> Result<&'t mut Option<(String, TokenKind)>> {
    let size = tokens.len();
    let place = tokens.get_mut(id as usize);
    place.with_context(|| {
        format!(
            "the tokenizer has the token `{text}` with the id {id}, and the model has ids below {size} only"
        )
    })
}

/// The vocabulary of the model, by ids.
fn plain_tokens(model: &Value) -> Result<BTreeMap<u32, String>> {
    let vocabulary = model.get("vocab").and_then(Value::as_object);
    let vocabulary = vocabulary.context("the tokenizer has no `vocab`")?;
    let mut tokens = BTreeMap::new();
    for (text, id) in vocabulary {
        let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
        let id = id.with_context(|| format!("the token `{text}` has no id"))?;
        tokens.insert(id, text.clone());
    }
    Ok(tokens)
}

struct Added {
    id: u32,
    text: String,
    special: bool,
    /// Whether it takes white space or matches whole words only.
    strips: bool,
}

fn added_tokens(json: &Value) -> Result<Vec<Added>> {
    let added = json.get("added_tokens").and_then(Value::as_array);
    let flag = |token: &Value, name: &str| token.get(name) == Some(&Value::Bool(true));
    let read = |token: &Value| {
        let id = token.get("id").and_then(Value::as_u64);
        Some(Added {
            id: id.and_then(|id| u32::try_from(id).ok())?,
            text: token.get("content")?.as_str()?.to_owned(),
            special: flag(token, "special"),
            strips: ["lstrip", "rstrip", "single_word"]
                .iter()
                .any(|name| flag(token, name)),
        })
    };
    let tokens = added.into_iter().flatten().map(|token| {
        read(token).with_context(|| format!("the added token {token} has no id or no text"))
    });
    tokens.collect()
}

/// The merges, which files hold as one text or as two.
fn merges(model: &Value) -> Result<Vec<(String, String)>> {
    let merges = model.get("merges").and_then(Value::as_array);
    let merges = merges.context("the tokenizer has no `merges`")?;
    let read = |merge: &Value| match merge {
        Value::String(text) => {
            let (a, b) = text.split_once(' ')?;
            Some((a.to_owned(), b.to_owned()))
        }
        Value::Array(two) => match &two[..] {
            [Value::String(a), Value::String(b)] => Some((a.clone(), b.clone())),
            _ => None,
        },
        _ => None,
    };
    let merges = merges
        .iter()
        .map(|merge| read(merge).with_context(|| format!("the merge {merge} is not two tokens")));
    merges.collect()
}

/// Whether a token stands for a byte.
fn is_byte(text: &str) -> bool {
    let digits = text
        .strip_prefix("<0x")
        .and_then(|text| text.strip_suffix('>'));
    digits.is_some_and(|digits| {
        digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit())
    })
}

/// Whether llama.cpp's converter takes a token for a control token though its file does not (`does_token_look_special`).
fn looks_special(text: &str) -> bool {
    let between = |begin: &str, end: &str| text.starts_with(begin) && text.ends_with(end);
    ["<pad>", "<mask>", "<2mass>", "[@BOS@]"].contains(&text)
        || between("<|", "|>")
        || between("<｜", "｜>")
        || between("<unused", ">")
}

/// `SentencePiece`'s scores for merges: llama.cpp merges the pair whose whole has the highest score first, so what the first merge makes
/// has the score 0, the next -1, and so on.
fn scores(
    vocabulary: &TokenList,
    merges: &[(String, String)],
    added: &[Added],
) -> Result<Vec<f32>> {
    let mut ranks: HashMap<String, usize> = HashMap::new();
    for (rank, (a, b)) in merges.iter().enumerate() {
        ranks.entry(format!("{a}{b}")).or_insert(rank);
    }
    ensure!(
        vocabulary.tokens.len() < 1 << 23 && merges.len() < 1 << 24,
        "the vocabulary is too large for scores of single precision"
    );
    let added: HashSet<u32> = added.iter().map(|token| token.id).collect();
    let mut scores = Vec::with_capacity(vocabulary.tokens.len());
    for (id, (text, kind)) in vocabulary.tokens.iter().zip(&vocabulary.kinds).enumerate() {
        let is_added = u32::try_from(id).is_ok_and(|id| added.contains(&id));
        scores.push(match kind {
            TokenKind::Normal if !is_added => match ranks.get(text) {
                Some(rank) => -(*rank as f32),
                // A single character, which nothing is merged to.
                None => -((merges.len() + id) as f32),
            },
            TokenKind::Unused => UNUSED_SCORE,
            TokenKind::Byte | TokenKind::Unknown => 0.,
            _ => ADDED_SCORE,
        });
    }
    if scores.is_empty() {
        bail!("the tokenizer has no tokens");
    }
    Ok(scores)
}

#[cfg(test)]
mod tests;
