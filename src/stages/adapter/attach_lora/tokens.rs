//! How `attach_lora` is told which tokens' rows are trained.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use anyhow::Context as _;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::{Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::ml::model::tensors::{EMBED_TOKENS, ENDS};
use crate::stages::text::tokenizers;

/// A token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Token {
    Id(u32),
    Text(String),
}

/// Tokens of the embeddings, or of the modules that are named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Tokens {
    Embeddings(Vec<Token>),
    Modules(BTreeMap<String, Vec<Token>>),
}

/// The last part of a module's path.
fn name_of(path: &str) -> &str {
    path.rsplit_once('.').map_or(path, |(_, name)| name)
}

impl Tokens {
    /// What is wrong with it, if anything is.
    pub(super) fn mistake(&self) -> Option<String> {
        let names = ENDS.map(name_of);
        let lists: Vec<&Vec<Token>> = match self {
            Self::Embeddings(list) => vec![list],
            Self::Modules(modules) => {
                if let Some(name) = modules.keys().find(|name| !names.contains(&name.as_str())) {
                    return Some(format!(
                        "`{name}` has no rows of tokens, expected `embed_tokens` or `lm_head`"
                    ));
                }
                modules.values().collect()
            }
        };
        if lists.is_empty() || lists.iter().any(|list| list.is_empty()) {
            return Some("expected at least one token".into());
        }
        let twice = lists.iter().find_map(|list| {
            (1..list.len()).find_map(|at| list[..at].contains(&list[at]).then(|| &list[at]))
        });
        twice.map(|token| format!("{token} stands there twice"))
    }

    /// Whether it means rows of the head, too.
    pub(super) fn has_head(&self) -> bool {
        matches!(self, Self::Modules(modules) if modules.len() == ENDS.len())
    }

    /// The ids by the names of modules; texts are looked up in the tokenizer of the model in `folder`.
    pub(super) fn ids(&self, folder: &Path) -> anyhow::Result<BTreeMap<String, Vec<u32>>> {
        let mut tokenizer = None;
        let mut id = |token: &Token| -> anyhow::Result<u32> {
            let text = match token {
                Token::Id(id) => return Ok(*id),
                Token::Text(text) => text,
            };
            let tokenizer = match &mut tokenizer {
                Some(tokenizer) => tokenizer,
                none => none.insert(tokenizers::load(folder)?),
            };
            let found = tokenizer.token(text).ok().map(|token| token.id);
            found.with_context(|| {
                format!("`trainable_token_indices` has `{text}`, which is no token of the model; hint: `add_tokens` makes it one")
            })
        };
        let mut ids = |list: &Vec<Token>| list.iter().map(&mut id).collect::<anyhow::Result<_>>();
        match self {
            Self::Embeddings(list) => Ok([(name_of(EMBED_TOKENS).to_owned(), ids(list)?)].into()),
            Self::Modules(modules) => modules
                .iter()
                .map(|(name, list)| Ok((name.clone(), ids(list)?)))
                .collect(),
        }
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => write!(f, "{id}"),
            Self::Text(text) => write!(f, "`{text}`"),
        }
    }
}

impl Serialize for Token {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Id(id) => serializer.serialize_u32(*id),
            Self::Text(text) => serializer.serialize_str(text),
        }
    }
}

impl<'de> Deserialize<'de> for Token {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;

        impl Visitor<'_> for Either {
            type Value = Token;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the text of a token, or its id")
            }

            fn visit_u64<E: Error>(self, id: u64) -> Result<Token, E> {
                let id = u32::try_from(id).map_err(|_| E::custom("ids of tokens have 32 bits"))?;
                Ok(Token::Id(id))
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Token, E> {
                Ok(Token::Text(text.to_owned()))
            }
        }

        deserializer.deserialize_any(Either)
    }
}

impl Serialize for Tokens {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Embeddings(list) => list.serialize(serializer),
            Self::Modules(modules) => modules.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Tokens {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;

        impl<'de> Visitor<'de> for Either {
            type Value = Tokens;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of tokens, or such lists for `embed_tokens` and `lm_head`")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Tokens, A::Error> {
                let mut list = Vec::new();
                while let Some(token) = seq.next_element()? {
                    list.push(token);
                }
                Ok(Tokens::Embeddings(list))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Tokens, A::Error> {
                let mut modules = BTreeMap::new();
                while let Some((name, list)) = map.next_entry()? {
                    modules.insert(name, list);
                }
                Ok(Tokens::Modules(modules))
            }
        }

        deserializer.deserialize_any(Either)
    }
}

impl JsonSchema for Tokens {
    fn schema_name() -> Cow<'static, str> {
        "Tokens".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let list = schemars::json_schema!({
            "type": "array",
            "items": { "oneOf": [{ "type": "string" }, { "type": "integer", "minimum": 0, "maximum": u32::MAX }] },
            "minItems": 1,
        });
        schemars::json_schema!({
            "oneOf": [
                list,
                {
                    "type": "object",
                    "properties": { "embed_tokens": list, "lm_head": list },
                    "additionalProperties": false,
                    "minProperties": 1,
                },
            ],
        })
    }

    fn inline_schema() -> bool {
        true
    }
}
