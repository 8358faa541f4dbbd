//! The tokenizer of a model folder: `tokenizer.json`, the special tokens, and the chat template that lies beside them.

mod new_tokens;

use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use anyhow::{Context as _, Result, anyhow, bail};
use serde_json::Value;

use super::declared::Declared;
use super::fast_bpe::FastBpe;
use super::files::{LONGEST_TOKENIZER, file_name, json_file, read_short};
use super::template::LONGEST;
pub use new_tokens::NewToken;

/// A special token with its id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpecialToken {
    /// The text.
    pub text: String,
    /// The id.
    pub id: u32,
}

/// A loaded tokenizer. Cheap to share between threads.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The short way, for byte-level tokenizers whose patterns are known.
    fast: Option<Arc<FastBpe>>,
    /// What the tokenizer itself puts before and behind a text, where that is the same for all.
    around: Option<(Vec<u32>, Vec<u32>)>,
    /// The same without its post-processor, which trims white space off the places of tokens; made when it is first needed.
    untrimmed: Arc<OnceLock<tokenizers::Tokenizer>>,
    /// The beginning of a text, when the model has such a token.
    pub bos: Option<SpecialToken>,
    /// The end of an answer.
    pub eos: Option<SpecialToken>,
    /// What fills short sequences.
    pub pad: Option<SpecialToken>,
}

impl Tokenizer {
    /// Loads the tokenizer of a model folder.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        if !path.is_file() {
            bail!(
                "the model has no `tokenizer.json`; hint: a model with only `tokenizer.model` needs it converted once with \
                 transformers' `AutoTokenizer(..).save_pretrained`"
            );
        }
        let declared = Declared::read(folder).context("the tokenizer's settings can't be used")?;
        let mut text = read_short(&path, LONGEST_TOKENIZER)
            .with_context(|| format!("`{}` can't be read", file_name(&path)))?;
        if let Some(rebuilt) = declared.rebuilt {
            let mut json = serde_json::from_slice(&text)
                .with_context(|| format!("`{}` can't be read", file_name(&path)))?;
            rebuilt.apply(&mut json)?;
            text = serde_json::to_vec(&json)?;
        }
        let mut inner = guarded(|| tokenizers::Tokenizer::from_bytes(text))
            .and_then(|read| read.map_err(|error| anyhow!("{error}")))
            .map_err(|error| anyhow!("`{}` can't be read: {error}", file_name(&path)))?;
        guarded(|| declared.add_to(&mut inner)).and_then(|added| added)?;
        inner.set_encode_special_tokens(declared.split_special_tokens);
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|error| anyhow!("`{}` can't be used: {error}", file_name(&path)))?;
        let mut tokenizer = Self {
            fast: FastBpe::from_tokenizer(&inner).map(Arc::new),
            inner,
            around: None,
            untrimmed: Arc::default(),
            bos: None,
            eos: None,
            pad: None,
        };
        tokenizer.around = tokenizer.around();
        let names = declared.texts();
        tokenizer.bos = tokenizer.special(folder, &names, "bos")?;
        tokenizer.eos = tokenizer.special(folder, &names, "eos")?;
        tokenizer.pad = tokenizer.special(folder, &names, "pad")?;
        Ok(tokenizer)
    }

    fn special(
        &self,
        folder: &Path,
        names: &BTreeMap<String, String>,
        which: &str,
    ) -> Result<Option<SpecialToken>> {
        if let Some(text) = names.get(&format!("{which}_token")) {
            return self.token(text).map(Some);
        }
        // With a tokenizer_config.json that names none there is none, whatever ids the model's configuration has.
        if folder.join("tokenizer_config.json").is_file() {
            return Ok(None);
        }
        for file in ["generation_config.json", "config.json"] {
            let Some(config) = json_file(&folder.join(file))? else {
                continue;
            };
            let id = match config.get(format!("{which}_token_id")) {
                Some(Value::Array(ids)) => ids.first().and_then(Value::as_u64),
                Some(id) => id.as_u64(),
                None => None,
            };
            let id = id.and_then(|id| u32::try_from(id).ok());
            if let Some(token) = id.and_then(|id| {
                Some(SpecialToken {
                    text: self.inner.id_to_token(id)?,
                    id,
                })
            }) {
                return Ok(Some(token));
            }
        }
        Ok(None)
    }

    /// The token with exactly this text.
    pub fn token(&self, text: &str) -> Result<SpecialToken> {
        let id = self.inner.token_to_id(text);
        let id = id.ok_or_else(|| {
            anyhow!("the special token `{text}` is not in the tokenizer's vocabulary")
        })?;
        Ok(SpecialToken {
            text: text.to_owned(),
            id,
        })
    }

    /// The longest added token (`<|eot_id|>`) that `text` begins with.
    pub fn added_token_at(&self, text: &str) -> Option<SpecialToken> {
        let added = self.inner.get_added_tokens_decoder();
        let mut found: Option<SpecialToken> = None;
        for (id, token) in added {
            let longer = found
                .as_ref()
                .is_none_or(|found| token.content.len() > found.text.len());
            if longer && !token.content.is_empty() && text.starts_with(&token.content) {
                found = Some(SpecialToken {
                    text: token.content,
                    id,
                });
            }
        }
        found
    }

    /// The ids of a text as it stands: no BOS or EOS is added, special tokens inside the text become their ids.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        if let Some(fast) = &self.fast
            && let Some(ids) = fast.encode(&self.inner, text)?
        {
            return Ok(ids);
        }
        self.encode_with(text, false)
    }

    /// The ids of a text as [`Self::encode`] gives them, and the range of the text's bytes that each of them stands for. Ids of one
    /// character have its whole range each.
    pub fn encode_with_places(&self, text: &str) -> Result<(Vec<u32>, Vec<Range<usize>>)> {
        if let Some(fast) = &self.fast
            && let Some(ids) = fast.encode(&self.inner, text)?
            && let Some(places) = fast.places(&self.inner, &ids, text.len())
        {
            return Ok((ids, places));
        }
        let untrimmed = self.untrimmed.get_or_init(|| {
            let mut tokenizer = self.inner.clone();
            tokenizer.with_post_processor(None::<tokenizers::PostProcessorWrapper>);
            tokenizer
        });
        let encoding = guarded(|| untrimmed.encode(text, false))
            .and_then(|encoding| encoding.map_err(|error| anyhow!("{error}")));
        let encoding =
            encoding.map_err(|error| anyhow!("a text could not be tokenized: {error}"))?;
        let places = encoding.get_offsets().iter();
        let places = places.map(|(start, end)| *start..*end).collect();
        Ok((encoding.get_ids().to_vec(), places))
    }

    /// The ids of a text with what the tokenizer adds by itself (usually a BOS).
    pub fn encode_with_special(&self, text: &str) -> Result<Vec<u32>> {
        match &self.around {
            Some((before, behind)) if self.fast.is_some() => {
                Ok([before, &self.encode(text)?[..], behind].concat())
            }
            _ => self.encode_with(text, true),
        }
    }

    /// What stands around the ids of texts, found with two of them.
    fn around(&self) -> Option<(Vec<u32>, Vec<u32>)> {
        let find = |text: &str| {
            let (bare, full) = (
                self.encode_with(text, false).ok()?,
                self.encode_with(text, true).ok()?,
            );
            let mut places = full
                .windows(bare.len().max(1))
                .enumerate()
                .filter(|(_, ids)| *ids == bare);
            let (at, _) = places.next().filter(|_| places.next().is_none())?;
            Some((full[..at].to_vec(), full[at + bare.len()..].to_vec()))
        };
        find("a").filter(|around| find("b c").as_ref() == Some(around))
    }

    /// The ids of many texts, on all cores, in order.
    pub fn encode_batch(&self, texts: &[&str]) -> Result<Vec<Vec<u32>>> {
        use rayon::prelude::*;
        let ids: Vec<Result<Vec<u32>>> = texts.par_iter().map(|text| self.encode(text)).collect();
        ids.into_iter().collect()
    }

    fn encode_with(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = guarded(|| self.inner.encode_fast(text, add_special))
            .and_then(|encoding| encoding.map_err(|error| anyhow!("{error}")));
        let encoding =
            encoding.map_err(|error| anyhow!("a text could not be tokenized: {error}"))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of ids.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        let decoded = guarded(|| self.inner.decode(ids, skip_special))
            .and_then(|decoded| decoded.map_err(|error| anyhow!("{error}")));
        decoded.map_err(|error| anyhow!("token ids could not be decoded: {error}"))
    }

    /// The text of an id.
    pub fn token_of(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The ids that the tokenizer itself puts before and behind a text, where they are the same for all texts.
    pub fn surroundings(&self) -> Option<(&[u32], &[u32])> {
        let (before, behind) = self.around.as_ref()?;
        Some((before, behind))
    }

    /// The tokenizer as a `tokenizer.json`, with all that the files beside it declare.
    pub fn to_json(&self) -> Result<Value> {
        let text = self.inner.to_string(false);
        let text = text.map_err(|error| anyhow!("the tokenizer can't be written: {error}"))?;
        Ok(serde_json::from_str(&text)?)
    }

    /// The number of tokens, special ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }
}

/// Calls the library, which panics at tables and regular expressions that nobody means.
pub(super) fn guarded<R>(call: impl FnOnce() -> R) -> Result<R> {
    // What the library leaves half done is not looked at again.
    catch_unwind(AssertUnwindSafe(call)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        let text = text.unwrap_or("it does not say why");
        anyhow!("the tokenizers library gave up: {text}; hint: the tokenizer's file may be damaged")
    })
}

/// The special tokens that the files of a model folder name, as variables of a chat template (`bos_token`, ..).
pub fn special_tokens(folder: &Path) -> Result<BTreeMap<String, String>> {
    Ok(Declared::read(folder)?.texts())
}

/// The chat template of a model folder: `chat_template.jinja`, or the one in `tokenizer_config.json` (one text, or a list of
/// named ones of which `default` counts).
pub fn chat_template(folder: &Path) -> Result<Option<String>> {
    let path = folder.join("chat_template.jinja");
    if path.is_file() {
        let text = read_template(&path);
        return text
            .with_context(|| format!("could not read `{}`", file_name(&path)))
            .map(Some);
    }
    template_in(&folder.join("tokenizer_config.json"))
}

/// The chat template in the file `tokenizer_config.json`, if there are both.
pub fn template_in(settings: &Path) -> Result<Option<String>> {
    let Some(config) = json_file(settings)? else {
        return Ok(None);
    };
    Ok(match config.get("chat_template") {
        Some(Value::String(text)) => Some(text.clone()),
        Some(Value::Array(named)) => {
            let name = |entry: &Value| entry.get("name").and_then(Value::as_str).map(str::to_owned);
            let text = |entry: &Value| {
                entry
                    .get("template")
                    .and_then(Value::as_str)
                    .map(str::to_owned)
            };
            let default = named
                .iter()
                .find(|entry| name(entry).as_deref() == Some("default"));
            let Some(text) = default.and_then(text) else {
                let names: Vec<_> = named.iter().filter_map(name).collect();
                bail!(
                    "`{}` has several chat templates ({}) and none called `default`; hint: give the one to use with `template`",
                    file_name(settings),
                    names.join(", ")
                );
            };
            Some(text)
        }
        _ => None,
    })
}

/// The text of a template's file. One that is too long is not read.
pub fn read_template(path: &Path) -> Result<String> {
    let text = read_short(path, LONGEST as u64)?;
    String::from_utf8(text).context("it is not UTF-8")
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/model");

    #[derive(Deserialize)]
    struct Case {
        text: String,
        ids: Vec<u32>,
        ids_with_special: Vec<u32>,
        decoded: String,
    }

    #[test]
    fn ids_are_the_python_tokenizers() {
        let tokenizer = Tokenizer::load(Path::new(MODEL)).unwrap();
        let cases = include_str!("../../tests/golden/tokenizer_cases.json");
        let cases: Vec<Case> = serde_json::from_str(cases).unwrap();
        assert_eq!(cases.len(), 22);
        for case in &cases {
            assert_eq!(
                tokenizer.encode(&case.text).unwrap(),
                case.ids,
                "{:?}",
                case.text
            );
            assert_eq!(
                tokenizer.encode_with_special(&case.text).unwrap(),
                case.ids_with_special,
                "{:?}",
                case.text
            );
            assert_eq!(tokenizer.decode(&case.ids, false).unwrap(), case.decoded);
        }
        let texts: Vec<&str> = cases.iter().map(|case| case.text.as_str()).collect();
        let ids: Vec<_> = cases.iter().map(|case| case.ids.clone()).collect();
        assert_eq!(tokenizer.encode_batch(&texts).unwrap(), ids);
        assert_eq!(
            tokenizer.decode(&[1018, 64, 1022], true).unwrap(),
            tokenizer.decode(&[64], false).unwrap()
        );
    }

    fn model_with(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::copy(
            Path::new(MODEL).join("tokenizer.json"),
            folder.path().join("tokenizer.json"),
        )
        .unwrap();
        for (name, text) in files {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        folder
    }

    #[test]
    fn special_tokens_are_found_in_every_place_they_live() {
        let config = r#"{"bos_token": {"content": "<|begin_of_text|>"}, "eos_token": "<|eot_id|>", "pad_token": null}"#;
        let folder = model_with(&[("tokenizer_config.json", config)]);
        let tokenizer = Tokenizer::load(folder.path()).unwrap();
        assert_eq!(tokenizer.bos.unwrap().id, 1018);
        assert_eq!(tokenizer.eos.unwrap().id, 1022);
        assert_eq!(tokenizer.pad, None);
        let folder = model_with(&[
            (
                "special_tokens_map.json",
                r#"{"pad_token": "<|reserved_special_token_250|>"}"#,
            ),
            (
                "config.json",
                r#"{"bos_token_id": 1018, "eos_token_id": [1019, 1022]}"#,
            ),
        ]);
        let tokenizer = Tokenizer::load(folder.path()).unwrap();
        assert_eq!(
            tokenizer.eos,
            Some(SpecialToken {
                text: "<|end_of_text|>".into(),
                id: 1019
            })
        );
        assert_eq!(
            (tokenizer.bos.unwrap().id, tokenizer.pad.unwrap().id),
            (1018, 1023)
        );
        // A token that only the settings name is added to the vocabulary, as transformers does.
        let folder = model_with(&[("tokenizer_config.json", r#"{"eos_token": "</s>"}"#)]);
        let tokenizer = Tokenizer::load(folder.path()).unwrap();
        assert_eq!(tokenizer.encode("a</s>").unwrap(), [64, 1024]);
        assert_eq!(tokenizer.eos.unwrap().id, 1024);
    }

    #[test]
    fn the_chat_template_may_be_a_file_a_text_or_a_list() {
        let template = |files: &[(&str, &str)]| {
            let folder = model_with(files);
            chat_template(folder.path())
        };
        let list = r#"{"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]}"#;
        assert_eq!(template(&[]).unwrap(), None);
        assert_eq!(
            template(&[("tokenizer_config.json", list)])
                .unwrap()
                .as_deref(),
            Some("d")
        );
        let text = r#"{"chat_template": "t"}"#;
        assert_eq!(
            template(&[("tokenizer_config.json", text)])
                .unwrap()
                .as_deref(),
            Some("t")
        );
        let both = [
            ("tokenizer_config.json", text),
            ("chat_template.jinja", "file"),
        ];
        assert_eq!(template(&both).unwrap().as_deref(), Some("file"));
        let none = r#"{"chat_template": [{"name": "rag", "template": "r"}]}"#;
        assert!(
            template(&[("tokenizer_config.json", none)])
                .unwrap_err()
                .to_string()
                .contains("rag")
        );
    }

    #[test]
    fn a_folder_without_a_tokenizer_is_a_sentence() {
        let folder = tempfile::tempdir().unwrap();
        let error = Tokenizer::load(folder.path()).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
    }
}
