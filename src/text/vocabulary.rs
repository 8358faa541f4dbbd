//! Makes the files of a tokenizer from the plain lists that a GGUF file has: texts of tokens, their types and scores, pairs to merge, and
//! the name of a way to split texts. The entry point is [`Vocabulary::write`].
//!
//! Ids are those of llama.cpp for the same lists. Where a tokenizer of transformers does something that llama.cpp leaves out (Qwen's
//! normalisation of Unicode), it is done as in transformers.

pub mod export;
mod recognise;
mod sentencepiece;
mod splits;

use std::collections::HashSet;
use std::path::Path;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use serde_json::{Map, Value, json};
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::NFC;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Tokenizer};

use self::splits::Splits;
use super::tokenizer::guarded;

/// The type of a token (`llama_token_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenKind {
    /// A part of texts.
    Normal,
    /// What stands for anything that has no token.
    Unknown,
    /// A special token, which means something to the model and is left out of texts.
    Control,
    /// A token that is found in texts before they are split.
    UserDefined,
    /// A token that no text leads to.
    Unused,
    /// A single byte, spelled `<0x0A>`.
    Byte,
}

impl TokenKind {
    /// Its number in a file.
    pub fn id(self) -> i32 {
        match self {
            Self::Normal => 1,
            Self::Unknown => 2,
            Self::Control => 3,
            Self::UserDefined => 4,
            Self::Unused => 5,
            Self::Byte => 6,
        }
    }

    /// The type with this number in a file; other numbers are those of normal tokens.
    pub fn from_id(id: u64) -> Self {
        match id {
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => Self::Normal,
        }
    }
}

/// The tokens of a model, as a GGUF file has them.
#[derive(Debug, Clone, Default)]
pub struct Vocabulary<'a> {
    /// The algorithm (`tokenizer.ggml.model`): `gpt2` is byte-level BPE, `llama` BPE of `SentencePiece`, `gemma4` BPE with byte fallback.
    pub model: &'a str,
    /// How byte-level BPE splits texts into words (`tokenizer.ggml.pre`).
    pub pre: Option<&'a str>,
    /// The texts of tokens; the index is the id.
    pub tokens: &'a [String],
    /// Their types; without them, all tokens are normal.
    pub kinds: Vec<TokenKind>,
    /// Their scores; of two pairs, the one whose token has the higher score is merged first.
    pub scores: &'a [f32],
    /// Pairs to merge, in order, with a space between the two texts.
    pub merges: &'a [String],
    /// The id with which a text starts.
    pub bos: Option<u32>,
    /// The id that ends a text.
    pub eos: Option<u32>,
    /// The id of what has no token.
    pub unk: Option<u32>,
    /// The id that fills short sequences.
    pub pad: Option<u32>,
    /// Whether `bos` comes before each text; without it, the algorithm and the split decide, as in llama.cpp.
    pub add_bos: Option<bool>,
    /// Whether `eos` comes after each text.
    pub add_eos: Option<bool>,
    /// Whether a space comes before each text (`SentencePiece`); without it, one does.
    pub add_space_prefix: Option<bool>,
    /// Whether white space behind a special token belongs to it, as with Phi-3.
    pub strips_right: bool,
    /// The longest sequence of the model.
    pub model_max_length: Option<u64>,
}

#[expect(clippy::needless_pass_by_value, reason = "for `map_err`")]
fn failed(error: tokenizers::Error) -> anyhow::Error {
    anyhow!("the tokenizer can't be made: {error}")
}

impl Vocabulary<'_> {
    /// Writes `tokenizer.json` and `tokenizer_config.json` to `folder`.
    ///
    /// # Errors
    /// The algorithm or the way to split texts is not known (the error names those that are), the lists contradict each other, or a file
    /// can't be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let text = guarded(|| self.tokenizer()?.to_string(true).map_err(failed))??;
        let write = |name: &str, text: &str| {
            std::fs::write(folder.join(name), text)
                .with_context(|| format!("could not write `{name}`"))
        };
        write("tokenizer.json", &text)?;
        let mut config = serde_json::to_string_pretty(&self.settings()?)?;
        config.push('\n');
        write("tokenizer_config.json", &config)
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// As for [`Vocabulary::write`].
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        self.check()?;
        let mut tokenizer = match self.model {
            "gpt2" => self.byte_level()?,
            "llama" | "gemma4" => self.sentencepiece()?,
            other => {
                let known = NOT_MADE.iter().find(|(name, _)| *name == other);
                let what = known.map_or(String::new(), |(_, what)| format!(", which is {what}"));
                bail!(
                    "its tokenizer is of the kind `{other}` (`tokenizer.ggml.model`){what}; expected byte-level BPE (`gpt2`) or \
                     SentencePiece's BPE (`llama`, `gemma4`), which all supported families have"
                )
            }
        };
        let kinds = self.tokens.iter().zip(&self.kinds);
        let added = kinds.filter_map(|(text, kind)| {
            let special = match kind {
                TokenKind::Control | TokenKind::Unknown => true,
                TokenKind::UserDefined => false,
                TokenKind::Normal | TokenKind::Unused | TokenKind::Byte => return None,
            };
            let right = special && self.strips_right && !UNSTRIPPED.contains(&text.as_str());
            let token = AddedToken::from(text.as_str(), special).normalized(false);
            Some(token.rstrip(right))
        });
        tokenizer
            .add_tokens(added.collect::<Vec<_>>())
            .map_err(failed)?;
        // What is added after the vocabulary would have an id that the model doesn't know.
        ensure!(
            tokenizer.get_vocab_size(true) == self.tokens.len(),
            "the tokenizer would have {} tokens in place of {}",
            tokenizer.get_vocab_size(true),
            self.tokens.len()
        );
        self.surround(&mut tokenizer)?;
        Ok(tokenizer)
    }

    /// Fails if the lists contradict each other.
    fn check(&self) -> Result<()> {
        let count = self.tokens.len();
        ensure!(count > 0, "it has no tokens (`tokenizer.ggml.tokens`)");
        for (name, length) in [("types", self.kinds.len()), ("scores", self.scores.len())] {
            ensure!(
                length == 0 || length == count,
                "it has {count} tokens, but {length} {name} of tokens"
            );
        }
        let mut seen = HashSet::with_capacity(count);
        for (id, text) in self.tokens.iter().enumerate() {
            ensure!(!text.is_empty(), "the token {id} is empty");
            ensure!(
                seen.insert(text),
                "two tokens are `{}`, one of them with the id {id}",
                text.escape_debug()
            );
        }
        for (name, id) in [
            ("bos", self.bos),
            ("eos", self.eos),
            ("unknown", self.unk),
            ("padding", self.pad),
        ] {
            ensure!(
                id.is_none_or(|id| (id as usize) < count),
                "`tokenizer.ggml.{name}_token_id` is {}, but there are {count} tokens",
                id.unwrap_or_default()
            );
        }
        Ok(())
    }

    /// The text of a token.
    fn text(&self, id: Option<u32>) -> Option<&str> {
        let text = self.tokens.get(id? as usize)?;
        Some(text)
    }

    /// The ids of tokens by their texts.
    fn ids(&self) -> Vocab {
        let ids = 0u32..;
        self.tokens.iter().cloned().zip(ids).collect()
    }

    /// Pairs to merge.
    fn pairs(&self) -> Result<Vec<(String, String)>> {
        let pair = |merge: &String| {
            // A part may itself begin with a space.
            let first = merge.chars().next().map_or(0, char::len_utf8);
            let space = merge[first..].find(' ').map(|space| space + first);
            let (left, right) = merge.split_at(space?);
            Some((left.to_owned(), right[1..].to_owned()))
        };
        self.merges
            .iter()
            .map(|merge| {
                pair(merge).with_context(|| {
                    format!(
                        "`{}` in `tokenizer.ggml.merges` is no pair of texts with a space between them",
                        merge.escape_debug()
                    )
                })
            })
            .collect()
    }

    fn splits(&self) -> Result<&'static Splits> {
        let name = self.pre.unwrap_or("default");
        let names = || {
            let names: Vec<_> = splits::names().collect();
            format!("expected one of `{}`", names.join("`, `"))
        };
        Splits::by_name(name).with_context(|| {
            format!(
                "its way to split texts, `{name}` (`tokenizer.ggml.pre`), is not known, {}",
                names()
            )
        })
    }

    /// Byte-level BPE, as in GPT-2 and all that followed it.
    fn byte_level(&self) -> Result<Tokenizer> {
        let splits = self.splits()?;
        ensure!(
            !self.merges.is_empty(),
            "it has no pairs to merge (`tokenizer.ggml.merges`)"
        );
        let model = BPE::builder()
            .vocab_and_merges(self.ids(), self.pairs()?)
            .ignore_merges(splits.ignore_merges)
            .build()
            .map_err(failed)?;
        let mut tokenizer = Tokenizer::new(model);
        if splits.nfc {
            tokenizer.with_normalizer(Some(NFC)).map_err(failed)?;
        }
        tokenizer.with_pre_tokenizer(Some(splits.pre_tokenizer()?));
        tokenizer.with_decoder(Some(ByteLevel::default()));
        Ok(tokenizer)
    }

    /// Puts BOS before and EOS behind a text, where the model wants that.
    fn surround(&self, tokenizer: &mut Tokenizer) -> Result<()> {
        let usual = match self.model {
            "gpt2" => self.splits()?.add_bos,
            _ => true,
        };
        let bos = self.text(self.bos.filter(|_| self.add_bos.unwrap_or(usual)));
        let eos = self.text(self.eos.filter(|_| self.add_eos.unwrap_or(false)));
        if bos.is_none() && eos.is_none() {
            return Ok(());
        }
        // As in `tokenizer.json`: the library's short form has no place for a colon in a token.
        let pieces = |sequence: &str, type_id: u32| {
            let special = |text: Option<&str>| {
                text.map(|text| json!({"SpecialToken": {"id": text, "type_id": type_id}}))
            };
            let sequence = json!({"Sequence": {"id": sequence, "type_id": type_id}});
            let all = [special(bos), Some(sequence), special(eos)];
            all.into_iter().flatten().collect::<Vec<_>>()
        };
        let named = [(bos, self.bos), (eos, self.eos)];
        let named: Map<String, Value> = named
            .into_iter()
            .filter_map(|(text, id)| {
                let text = text?;
                let token = json!({"id": text, "ids": [id?], "tokens": [text]});
                Some((text.to_owned(), token))
            })
            .collect();
        let pair = [pieces("A", 0), pieces("B", 1)].concat();
        let template: TemplateProcessing = serde_json::from_value(json!({
            "type": "TemplateProcessing",
            "single": pieces("A", 0),
            "pair": pair,
            "special_tokens": named,
        }))
        .context("the tokenizer's post-processor can't be made")?;
        tokenizer.with_post_processor(Some(template));
        Ok(())
    }

    /// `tokenizer_config.json`.
    fn settings(&self) -> Result<Value> {
        let mut settings = Map::new();
        for (name, id) in [
            ("bos_token", self.bos),
            ("eos_token", self.eos),
            ("pad_token", self.pad),
            ("unk_token", self.unk),
        ] {
            if let Some(text) = self.text(id) {
                settings.insert(name.into(), json!(text));
            }
        }
        settings.insert("clean_up_tokenization_spaces".into(), json!(false));
        if let Some(length) = self.model_max_length {
            settings.insert("model_max_length".into(), json!(length));
        }
        settings.insert("tokenizer_class".into(), json!("PreTrainedTokenizerFast"));
        // Sorted, whatever order the library's map keeps.
        let sorted: std::collections::BTreeMap<_, _> = settings.into_iter().collect();
        Ok(serde_json::to_value(sorted)?)
    }
}

/// llama.cpp's other kinds of tokenizers: their names in `tokenizer.ggml.model`, and what they are.
const NOT_MADE: [(&str, &str); 6] = [
    ("t5", "SentencePiece's unigram model"),
    ("bert", "WordPiece"),
    ("rwkv", "RWKV's greedy search in a trie"),
    ("plamo2", "PLaMo-2's dynamic programming over a table"),
    ("hybriddna", "HybriDNA's k-mers beside BPE"),
    ("none", "no tokenizer at all"),
];

/// The special tokens of Phi-3 behind which white space stays (llama.cpp's `llama-vocab.cpp`).
const UNSTRIPPED: [&str; 3] = ["<unk>", "<s>", "<|endoftext|>"];

#[cfg(test)]
mod tests;
