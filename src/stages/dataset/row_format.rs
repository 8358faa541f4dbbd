//! The parameter `format` of stages that bring data in: the format of the files, the form of the rows, or both in a list.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::{IntoDeserializer, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::data::import::{Form, Format};
use crate::engine::Problem;

/// A format of files or a form of rows.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub(in crate::stages) enum RowFormat {
    /// Files: Apache Parquet.
    Parquet,
    /// Files: one JSON object a line.
    Jsonl,
    /// Files: one JSON list of objects.
    Json,
    /// Files: values between commas, with a header line.
    Csv,
    /// Files: values between tabs, with a header line.
    Tsv,
    /// Files: Apache Arrow, a file (Feather, version 2) or a stream.
    Arrow,
    /// Rows: whole conversations in `messages`, with `role` and `content`.
    Messages,
    /// Rows: `chosen` and `rejected`, with a `prompt` or with what both begin with alike.
    Preference,
    /// Rows: `prompt` and `completion`, or `chosen` in its place.
    PromptCompletion,
    /// Rows: `instruction`, perhaps `input`, and `output`.
    Alpaca,
    /// Rows: conversations in `conversations`, with `from` and `value`.
    Sharegpt,
    /// Rows: plain texts in `text`, which no chat template is applied to.
    Text,
    /// Rows: `chosen` and `rejected` as transcripts, `\n\nHuman: ..\n\nAssistant: ..`.
    Transcripts,
    /// Rows: `prompt`, `completion` and a `label` that says whether it is a good one.
    Kto,
    /// Rows: a `question` with `choices`, and an `answer` that says which one is right.
    Choices,
}

impl RowFormat {
    fn file(self) -> Option<Format> {
        Some(match self {
            Self::Parquet => Format::Parquet,
            Self::Jsonl => Format::Jsonl,
            Self::Json => Format::Json,
            Self::Csv => Format::Csv,
            Self::Tsv => Format::Tsv,
            Self::Arrow => Format::Arrow,
            _ => return None,
        })
    }

    fn form(self) -> Option<Form> {
        Some(match self {
            Self::Messages => Form::Messages,
            Self::Preference => Form::Preference,
            Self::PromptCompletion => Form::PromptCompletion,
            Self::Alpaca => Form::Alpaca,
            Self::Sharegpt => Form::Sharegpt,
            Self::Text => Form::Text,
            Self::Transcripts => Form::Transcripts,
            Self::Kto => Form::Kto,
            Self::Choices => Form::Choices,
            _ => return None,
        })
    }
}

/// One of them, or one of each kind.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct RowFormats(Vec<RowFormat>);

impl RowFormats {
    /// Whether nothing was said.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The format of the files.
    pub fn file(&self) -> Option<Format> {
        self.0.iter().find_map(|format| format.file())
    }

    /// The form of the rows.
    pub fn form(&self) -> Option<Form> {
        self.0.iter().find_map(|format| format.form())
    }

    /// What is wrong with it; `at` is the way to it.
    pub fn check(&self, at: &str, problems: &mut Vec<Problem>) {
        let files = self
            .0
            .iter()
            .filter(|format| format.file().is_some())
            .count();
        if files > 1 || self.0.len() - files > 1 {
            let problem = Problem::new(format!("{at}format"), "two formats exclude each other");
            problems
                .push(problem.hint("say one format of files, one form of rows, or one of each"));
        }
    }
}

impl<'de> Deserialize<'de> for RowFormats {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = RowFormats;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a format, or a list of them")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<RowFormats, E> {
                RowFormat::deserialize(text.into_deserializer()).map(|one| RowFormats(vec![one]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<RowFormats, A::Error> {
                let mut list = Vec::new();
                while let Some(item) = items.next_element()? {
                    list.push(item);
                }
                list.sort_unstable();
                list.dedup();
                Ok(RowFormats(list))
            }
        }
        deserializer.deserialize_any(Reader)
    }
}

impl JsonSchema for RowFormats {
    fn schema_name() -> Cow<'static, str> {
        "RowFormats".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let one = RowFormat::json_schema(generator);
        schemars::json_schema!({ "oneOf": [one, { "type": "array", "items": one }] })
    }

    fn inline_schema() -> bool {
        true
    }
}
