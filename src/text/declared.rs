//! Reads what the files beside `tokenizer.json` declare about tokens, as transformers 5 does: named special tokens, tokens to add, and
//! tokenizer classes that build the tokenizer themselves. The entry point is [`Declared::read`].

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use serde_json::{Map, Value, json};
use tokenizers::AddedToken;

use super::files::{LONGEST_TOKENIZER, file_name, json_file, read_short};

/// The names that every tokenizer may have, in transformers' order.
const NAMES: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// How transformers' `Qwen2Tokenizer` cuts a text into words.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The declarations about tokens in a model folder.
#[derive(Debug, Default)]
pub(super) struct Declared {
    /// Special tokens by name (`bos_token`, ..). Names that only this model has come after the usual ones.
    pub(super) named: Vec<(String, AddedToken)>,
    /// Added tokens by their declared id (the key in `added_tokens_decoder`).
    listed: BTreeMap<i64, AddedToken>,
    /// Special tokens without a name.
    extra: Vec<AddedToken>,
    /// Whether special tokens in a text are text.
    pub(super) split_special_tokens: bool,
    /// The tokenizer class, if it builds the tokenizer from vocabulary and merges alone.
    pub(super) rebuilt: Option<Rebuilt>,
}

/// A tokenizer class of transformers that builds its tokenizer from vocabulary and merges and ignores the rest of `tokenizer.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rebuilt {
    /// `LlamaTokenizer`, with its `prepend_scheme`: whether a space is put before a text (`first`, `always` or `never`).
    Llama(&'static str),
    /// `GPT2Tokenizer`, and whether it puts a space before a text (`add_prefix_space`).
    Gpt2(bool),
    /// `Qwen2Tokenizer`, and whether it puts a space before a text (`add_prefix_space`).
    Qwen2(bool),
}

impl Declared {
    /// Reads the files of a model folder.
    pub(super) fn read(folder: &Path) -> Result<Self> {
        let config = json_file(&folder.join("tokenizer_config.json"))?;
        let config = object(config, "tokenizer_config.json")?;
        let mut declared = Self {
            split_special_tokens: config
                .get("split_special_tokens")
                .and_then(Value::as_bool)
                .unwrap_or(false),
            rebuilt: Rebuilt::from_config(folder, &config)?,
            ..Self::default()
        };
        let mut settings = config;
        let truthy = |value: Option<&Value>| match value {
            None | Some(Value::Null) => false,
            Some(Value::Array(items)) => !items.is_empty(),
            Some(Value::Object(items)) => !items.is_empty(),
            Some(_) => true,
        };
        // The older name of `extra_special_tokens`.
        if !truthy(settings.get("extra_special_tokens"))
            && let Some(tokens) = settings.remove("additional_special_tokens")
        {
            settings.insert("extra_special_tokens".to_owned(), tokens);
        }
        match settings.remove("added_tokens_decoder") {
            Some(listed) => declared.list(&listed)?,
            // The files of older versions are read only if `added_tokens_decoder` is missing.
            None => declared.read_older(folder, &mut settings)?,
        }
        for (name, token) in declared.rebuilt.into_iter().flat_map(Rebuilt::defaults) {
            settings.entry(*name).or_insert_with(|| json!(token));
        }
        declared.name(&settings)?;
        Ok(declared)
    }

    /// Special tokens by name, as a chat template sees them.
    pub(super) fn texts(&self) -> BTreeMap<String, String> {
        let named = self.named.iter();
        named
            .map(|(name, token)| (name.clone(), token.content.clone()))
            .collect()
    }

    fn list(&mut self, listed: &Value) -> Result<()> {
        let listed = listed.as_object().ok_or_else(|| {
            anyhow!("`added_tokens_decoder` of `tokenizer_config.json` is no object")
        })?;
        for (id, entry) in listed {
            let id: i64 = id.parse().map_err(|_| {
                anyhow!(
                    "`added_tokens_decoder` of `tokenizer_config.json` has `{id}` in place of an id"
                )
            })?;
            ensure!(
                entry.is_object(),
                "`added_tokens_decoder` of `tokenizer_config.json` has no object for the id {id}"
            );
            let token = token(entry, false).with_context(|| {
                format!("`added_tokens_decoder` of `tokenizer_config.json`, id {id}")
            })?;
            self.listed.insert(id, token);
        }
        Ok(())
    }

    /// Reads the files of older versions: `special_tokens_map.json` takes precedence over `tokenizer_config.json`, and
    /// `added_tokens.json` adds tokens.
    fn read_older(&mut self, folder: &Path, settings: &mut Map<String, Value>) -> Result<()> {
        let map = json_file(&folder.join("special_tokens_map.json"))?;
        for (name, value) in object(map, "special_tokens_map.json")? {
            let value = match (name.as_str(), value) {
                ("extra_special_tokens", Value::Array(more)) => {
                    let mut all = match settings.remove("extra_special_tokens") {
                        Some(Value::Array(all)) => all,
                        _ => Vec::new(),
                    };
                    all.extend(more);
                    Value::Array(all)
                }
                ("additional_special_tokens", value) => {
                    if !settings.contains_key("extra_special_tokens") {
                        settings.insert("extra_special_tokens".to_owned(), value);
                    }
                    continue;
                }
                (_, Value::Object(mut token)) if name != "extra_special_tokens" => {
                    token.insert("special".to_owned(), true.into());
                    Value::Object(token)
                }
                (_, value) => value,
            };
            settings.insert(name, value);
        }
        let added = json_file(&folder.join("added_tokens.json"))?;
        let added = object(added, "added_tokens.json")?;
        let special: BTreeSet<String> = NAMES
            .iter()
            .filter_map(|name| content(settings.get(*name)?))
            .chain(
                settings
                    .get("extra_special_tokens")
                    .and_then(Value::as_array)
                    .into_iter()
                    .flatten()
                    .filter_map(content),
            )
            .collect();
        for (text, id) in added {
            let id = id
                .as_i64()
                .ok_or_else(|| anyhow!("`added_tokens.json` has no id for `{text}`"))?;
            let special = special.contains(&text);
            self.listed.insert(id, AddedToken::from(text, special));
        }
        Ok(())
    }

    /// Reads the named special tokens and the lists of unnamed ones.
    fn name(&mut self, settings: &Map<String, Value>) -> Result<()> {
        let flags: BTreeMap<String, AddedToken> = self
            .listed
            .values()
            .map(|token| (token.content.clone(), token.clone()))
            .collect();
        let mut put = |name: &str, value: &Value| -> Result<()> {
            if value.is_null() {
                return Ok(());
            }
            let token = token(value, true)
                .with_context(|| format!("`{name}` of the tokenizer's settings"))?;
            let token = match flags.get(&token.content) {
                Some(listed) if NAMES.contains(&name) => listed.clone(),
                _ => token,
            };
            self.named.retain(|(known, _)| known != name);
            self.named.push((name.to_owned(), token));
            Ok(())
        };
        for name in NAMES {
            if let Some(value) = settings.get(name) {
                put(name, value)?;
            }
        }
        // Names that only this model has, such as `image_token`.
        for (name, value) in settings {
            let token = value.is_string()
                || value.get("__type").and_then(Value::as_str) == Some("AddedToken");
            if name.ends_with("_token") && !NAMES.contains(&name.as_str()) && token {
                put(name, value)?;
            }
        }
        match settings.get("extra_special_tokens") {
            None | Some(Value::Null) => {}
            Some(Value::Object(tokens)) => {
                for (name, value) in tokens {
                    put(name, value)?;
                }
            }
            Some(Value::Array(tokens)) => {
                let tokens = tokens.iter().map(|value| token(value, true));
                let tokens: Result<Vec<AddedToken>> = tokens.collect();
                self.extra =
                    tokens.context("`extra_special_tokens` of the tokenizer's settings")?;
            }
            Some(_) => bail!(
                "`extra_special_tokens` of the tokenizer's settings is neither a list nor an object"
            ),
        }
        Ok(())
    }

    /// Adds the declared tokens that a tokenizer lacks. A token in the vocabulary keeps its id; others get the next free ids.
    pub(super) fn add_to(&self, tokenizer: &mut tokenizers::Tokenizer) -> Result<()> {
        let mut tokens: Vec<AddedToken> = self.listed.values().cloned().collect();
        let mut known: BTreeSet<String> = tokenizer
            .get_added_tokens_decoder()
            .into_values()
            .chain(tokens.iter().cloned())
            .map(|token| token.content)
            .collect();
        let named = self.named.iter().map(|(_, token)| token);
        for token in named.clone().chain(&self.extra) {
            if known.insert(token.content.clone()) {
                tokens.push(token.clone());
            }
        }
        let names: BTreeSet<&str> = named.map(|token| token.content.as_str()).collect();
        for token in &mut tokens {
            token.special |= names.contains(token.content.as_str());
        }
        let added = tokenizer.add_tokens(tokens);
        added.map_err(|error| {
            anyhow!("the tokens named beside `tokenizer.json` can't be added: {error}")
        })?;
        Ok(())
    }
}

impl Rebuilt {
    /// The class that the settings of a model folder name.
    fn from_config(folder: &Path, config: &Map<String, Value>) -> Result<Option<Self>> {
        let mut class = config
            .get("tokenizer_class")
            .and_then(Value::as_str)
            .map(str::to_owned);
        if class.is_none() {
            let model = json_file(&folder.join("config.json"))?;
            class =
                model.and_then(|model| Some(model.get("tokenizer_class")?.as_str()?.to_owned()));
        }
        let class = class.unwrap_or_default();
        let flag = |name: &str| config.get(name).and_then(Value::as_bool);
        let prefix = flag("add_prefix_space");
        Ok(match class.strip_suffix("Fast").unwrap_or(&class) {
            // A byte-level `LlamaTokenizer` (Llama 3's files) is used unchanged.
            "LlamaTokenizer" if !byte_level(folder)? => Some(Self::Llama(
                match (prefix.unwrap_or(true), flag("legacy").unwrap_or(false)) {
                    (false, _) => "never",
                    (true, true) => "always",
                    (true, false) => "first",
                },
            )),
            "GPT2Tokenizer" => Some(Self::Gpt2(prefix.unwrap_or(false))),
            "Qwen2Tokenizer" => Some(Self::Qwen2(prefix.unwrap_or(false))),
            _ => None,
        })
    }

    /// Its name.
    fn name(self) -> &'static str {
        match self {
            Self::Llama(_) => "LlamaTokenizer",
            Self::Gpt2(_) => "GPT2Tokenizer",
            Self::Qwen2(_) => "Qwen2Tokenizer",
        }
    }

    /// The special tokens that the class defines if the settings don't.
    fn defaults(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Llama(_) => &[
                ("unk_token", "<unk>"),
                ("bos_token", "<s>"),
                ("eos_token", "</s>"),
            ],
            Self::Gpt2(_) => &[
                ("unk_token", "<|endoftext|>"),
                ("bos_token", "<|endoftext|>"),
                ("eos_token", "<|endoftext|>"),
            ],
            Self::Qwen2(_) => &[
                ("unk_token", "<|endoftext|>"),
                ("eos_token", "<|endoftext|>"),
                ("pad_token", "<|endoftext|>"),
            ],
        }
    }

    /// Changes `tokenizer.json` to what the class builds from its vocabulary, merges and post-processor.
    pub(super) fn apply(self, tokenizer: &mut Value) -> Result<()> {
        let kind = tokenizer.pointer("/model/type").and_then(Value::as_str);
        ensure!(
            kind == Some("BPE"),
            "`tokenizer_class` is {}, which transformers builds anew for byte-pair vocabularies, and the vocabulary of \
             `tokenizer.json` is of another type; hint: set `tokenizer_class` to PreTrainedTokenizerFast to take it as it is",
            self.name()
        );
        let mut model = |name: &str| {
            tokenizer
                .pointer_mut(&format!("/model/{name}"))
                .map(Value::take)
        };
        let (vocab, merges) = (model("vocab"), model("merges"));
        let bytes = |prefix: bool, regex: bool| json!({"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": regex});
        let (normalizer, pre_tokenizer, decoder) = match self {
            Self::Llama(prepend_scheme) => {
                let mut decoders = vec![
                    json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
                    json!({"type": "ByteFallback"}),
                    json!({"type": "Fuse"}),
                ];
                if prepend_scheme != "never" {
                    decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
                }
                (
                    Value::Null,
                    json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": prepend_scheme, "split": false}),
                    json!({"type": "Sequence", "decoders": decoders}),
                )
            }
            Self::Gpt2(prefix) => (Value::Null, bytes(prefix, true), bytes(true, true)),
            Self::Qwen2(prefix) => {
                let split = json!({"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated", "invert": false});
                (
                    json!({"type": "NFC"}),
                    json!({"type": "Sequence", "pretokenizers": [split, bytes(prefix, false)]}),
                    bytes(true, true),
                )
            }
        };
        let llama = matches!(self, Self::Llama(_));
        let affix = if llama { Value::Null } else { json!("") };
        let take = |tokenizer: &mut Value, name: &str| tokenizer.get_mut(name).map(Value::take);
        *tokenizer = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": take(tokenizer, "added_tokens").unwrap_or_else(|| json!([])),
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": take(tokenizer, "post_processor"),
            "decoder": decoder,
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": affix, "end_of_word_suffix": affix,
                "fuse_unk": llama, "byte_fallback": llama, "ignore_merges": false, "vocab": vocab, "merges": merges,
            },
        });
        Ok(())
    }
}

/// Whether transformers treats the folder's `tokenizer.json` as byte-level.
fn byte_level(folder: &Path) -> Result<bool> {
    let path = folder.join("tokenizer.json");
    if !path.is_file() {
        return Ok(true);
    }
    let text = read_short(&path, LONGEST_TOKENIZER)
        .with_context(|| format!("`{}` can't be read", file_name(&path)))?;
    let part = b"\"ByteLevel\"";
    Ok(text.windows(part.len()).any(|window| window == part))
}

fn object(value: Option<Value>, file: &str) -> Result<Map<String, Value>> {
    match value {
        None => Ok(Map::new()),
        Some(Value::Object(object)) => Ok(object),
        Some(_) => bail!("`{file}` holds no object"),
    }
}

/// The text of a token, which is written as such or as an object.
fn content(value: &Value) -> Option<String> {
    let text = value.as_str().or_else(|| value.get("content")?.as_str());
    text.map(str::to_owned)
}

/// A token written as a text or as an object with its flags.
fn token(value: &Value, special: bool) -> Result<AddedToken> {
    let text = content(value)
        .ok_or_else(|| anyhow!("a token is neither a text nor an object with `content`"))?;
    let flag = |name: &str| value.get(name).and_then(Value::as_bool);
    let special = flag("special").unwrap_or(special);
    Ok(AddedToken::from(text, special)
        .single_word(flag("single_word").unwrap_or(false))
        .lstrip(flag("lstrip").unwrap_or(false))
        .rstrip(flag("rstrip").unwrap_or(false))
        .normalized(flag("normalized").unwrap_or(!special)))
}

#[cfg(test)]
mod tests;
