//! New tokens in a tokenizer, as by transformers' `add_tokens` and `add_special_tokens`, and the files of a model's folder that tell of them.

use std::path::Path;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use serde_json::{Map, Value, json};
use tokenizers::AddedToken;

use super::Tokenizer;
use crate::text::files::{LONGEST_TOKENIZER, json_file, read_short};

const TOKENIZER: &str = "tokenizer.json";
const SETTINGS: &str = "tokenizer_config.json";
const MAP: &str = "special_tokens_map.json";
const ADDED: &str = "added_tokens.json";
/// Where transformers 4 and 5 keep special tokens without a name of their own.
const UNNAMED: [&str; 2] = ["additional_special_tokens", "extra_special_tokens"];

/// A token to add.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewToken {
    /// Its text.
    pub text: String,
    /// Whether it is special: left out of decoded answers, and never split or normalised.
    pub special: bool,
    /// What it is called in the settings (`pad_token`), if it gets a name.
    pub name: Option<&'static str>,
}

impl Tokenizer {
    /// Adds tokens; those that are there keep their ids, the others get the next ones. Returns the ids.
    ///
    /// # Errors
    /// A text is empty, or the library refuses it.
    pub fn add(&mut self, tokens: &[NewToken]) -> Result<Vec<u32>> {
        let all: Vec<AddedToken> = tokens
            .iter()
            .map(|token| AddedToken::from(token.text.clone(), token.special))
            .collect();
        ensure!(
            all.iter().all(|token| !token.content.is_empty()),
            "a token has no text"
        );
        let added = super::guarded(|| self.inner.add_tokens(all.clone()))?;
        added.map_err(|error| anyhow!("the tokens can't be added: {error}"))?;
        self.fast = None;
        self.untrimmed = std::sync::Arc::default();
        let ids = all
            .iter()
            .map(|token| self.inner.token_to_id(&token.content));
        ids.zip(&all)
            .map(|(id, token)| {
                id.with_context(|| format!("the tokenizer does not take `{}`", token.content))
            })
            .collect()
    }

    /// One more than the largest id.
    pub fn end_of_ids(&self) -> usize {
        let vocabulary = self.inner.get_vocab(true);
        vocabulary.values().max().map_or(0, |id| *id as usize + 1)
    }

    /// Writes the files of the model's `folder` that tell of tokens, as they are with the added ones of this tokenizer, to the folder `out`.
    ///
    /// # Errors
    /// A file can't be read or written, or is not what transformers writes.
    pub fn write_added(&self, folder: &Path, tokens: &[NewToken], out: &Path) -> Result<()> {
        let text = read_short(&folder.join(TOKENIZER), LONGEST_TOKENIZER)
            .with_context(|| format!("`{TOKENIZER}` can't be read"))?;
        let mut file: Value = serde_json::from_slice(&text)
            .with_context(|| format!("`{TOKENIZER}` can't be read"))?;
        let mut decoder: Vec<(u32, AddedToken)> =
            self.inner.get_added_tokens_decoder().into_iter().collect();
        decoder.sort_by_key(|(id, _)| *id);
        let all = decoder.iter().map(|(id, token)| {
            let mut entry = flags(token);
            entry.insert("id".into(), json!(id));
            Value::Object(entry)
        });
        file.as_object_mut()
            .with_context(|| format!("`{TOKENIZER}` is no object"))?
            .insert("added_tokens".into(), all.collect());
        write(out, TOKENIZER, &file)?;

        let new = |text: &String| tokens.iter().any(|token| token.text == *text);
        let added = decoder.iter().filter(|(_, token)| new(&token.content));
        let added: Vec<&(u32, AddedToken)> = added.collect();
        let mut settings = object(folder, SETTINGS)?.unwrap_or_default();
        if let Some(Value::Object(listed)) = settings.get_mut("added_tokens_decoder") {
            for (id, token) in &added {
                listed.insert(id.to_string(), Value::Object(flags(token)));
            }
        }
        name(&mut settings, tokens, true);
        write(out, SETTINGS, &Value::Object(settings))?;
        if let Some(mut map) = object(folder, MAP)? {
            name(&mut map, tokens, false);
            write(out, MAP, &Value::Object(map))?;
        }
        if let Some(mut ids) = object(folder, ADDED)? {
            for (id, token) in &added {
                ids.insert(token.content.clone(), json!(id));
            }
            write(out, ADDED, &Value::Object(ids))?;
        }
        Ok(())
    }
}

/// Enters the names of tokens, and special ones without a name in the list of those. Where there is no such list one is begun if `begins`.
fn name(settings: &mut Map<String, Value>, tokens: &[NewToken], begins: bool) {
    for token in tokens {
        if let Some(name) = token.name {
            settings.insert(name.into(), json!(token.text));
        }
    }
    let unnamed = tokens
        .iter()
        .filter(|token| token.special && token.name.is_none());
    let unnamed: Vec<Value> = unnamed.map(|token| json!(token.text)).collect();
    if unnamed.is_empty() {
        return;
    }
    let there = UNNAMED
        .into_iter()
        .find(|key| settings.get(*key).is_some_and(Value::is_array));
    let Some(key) = there.or(begins.then_some(UNNAMED[0])) else {
        return;
    };
    let list = settings.entry(key).or_insert_with(|| json!([]));
    if let Value::Array(list) = list {
        for token in unnamed {
            let text = |value: &Value| value.get("content").cloned().unwrap_or(value.clone());
            if !list.iter().any(|own| text(own) == token) {
                list.push(token);
            }
        }
    }
}

/// A file of the folder that holds an object, if it is there.
fn object(folder: &Path, name: &str) -> Result<Option<Map<String, Value>>> {
    match json_file(&folder.join(name))? {
        None => Ok(None),
        Some(Value::Object(map)) => Ok(Some(map)),
        Some(_) => bail!("`{name}` is no object"),
    }
}

fn flags(token: &AddedToken) -> Map<String, Value> {
    [
        ("content", json!(token.content)),
        ("single_word", json!(token.single_word)),
        ("lstrip", json!(token.lstrip)),
        ("rstrip", json!(token.rstrip)),
        ("normalized", json!(token.normalized)),
        ("special", json!(token.special)),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into_iter()
    .collect()
}

fn write(out: &Path, name: &str, value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|error| anyhow!(error))? + "\n";
    std::fs::write(out.join(name), text).with_context(|| format!("could not write `{name}`"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::special_tokens;

    const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/model");

    fn token(text: &str, special: bool, name: Option<&'static str>) -> NewToken {
        NewToken {
            text: text.into(),
            special,
            name,
        }
    }

    /// The files of transformers 4, which tell of tokens in four places.
    #[test]
    fn every_file_tells_of_the_new_tokens() {
        let (folder, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let put = |name: &str, value: Value| {
            std::fs::write(folder.path().join(name), value.to_string()).unwrap();
        };
        std::fs::copy(
            Path::new(GOLDEN).join(TOKENIZER),
            folder.path().join(TOKENIZER),
        )
        .unwrap();
        let old = json!({"content": "<|eot_id|>", "lstrip": false, "normalized": false, "rstrip": false, "single_word": false, "special": true});
        put(
            SETTINGS,
            json!({
                "added_tokens_decoder": { "1022": old },
                "additional_special_tokens": ["<|eot_id|>"],
                "eos_token": "<|eot_id|>",
            }),
        );
        put(
            MAP,
            json!({"additional_special_tokens": [old], "eos_token": old}),
        );
        put(ADDED, json!({"<|eot_id|>": 1022}));
        let tokens = [
            token("<tool>", false, None),
            token("<|pad|>", true, Some("pad_token")),
            token("<|eot_id|>", true, None),
            token("<|new|>", true, None),
        ];
        let mut tokenizer = Tokenizer::load(folder.path()).unwrap();
        let before = tokenizer.token("<|eot_id|>").unwrap().id;
        let end = tokenizer.end_of_ids();
        let ids = tokenizer.add(&tokens).unwrap();
        let next = u32::try_from(end).unwrap();
        assert_eq!(ids, [next, next + 1, before, next + 2]);
        assert_eq!(tokenizer.end_of_ids(), end + 3);
        tokenizer
            .write_added(folder.path(), &tokens, out.path())
            .unwrap();

        let again = Tokenizer::load(out.path()).unwrap();
        assert_eq!(again.pad.as_ref().unwrap().id, next + 1);
        let text = "a <tool><|new|> b<|pad|>";
        assert_eq!(again.encode(text).unwrap(), tokenizer.encode(text).unwrap());
        assert!(again.encode(text).unwrap().contains(&(next + 2)));
        assert_eq!(special_tokens(out.path()).unwrap()["pad_token"], "<|pad|>");
        let read = |name: &str| object(out.path(), name).unwrap().unwrap();
        let settings = read(SETTINGS);
        let listed = settings["added_tokens_decoder"].as_object().unwrap();
        assert_eq!(listed[&next.to_string()]["content"], "<tool>");
        assert_eq!(listed[&(next + 2).to_string()]["special"], true);
        let unnamed = json!(["<|eot_id|>", "<|new|>"]);
        assert_eq!(settings["additional_special_tokens"], unnamed);
        let map = read(MAP);
        assert_eq!(map["pad_token"], "<|pad|>");
        assert_eq!(map["additional_special_tokens"][1], "<|new|>");
        assert_eq!(read(ADDED)["<|new|>"], next + 2);

        let mut tokenizer = Tokenizer::load(folder.path()).unwrap();
        assert!(tokenizer.add(&[token("", true, None)]).is_err());
    }
}
