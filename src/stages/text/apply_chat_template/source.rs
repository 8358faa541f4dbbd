//! Where the chat template of a recipe comes from: the value of `template`.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::engine::SourcePath;
use crate::text::builtin::BuiltIn;

/// A built-in template by its name, or a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum TemplateSource {
    /// One of [`BuiltIn::ALL`].
    BuiltIn(BuiltIn),
    /// A file, in Jinja.
    File(SourcePath),
}

/// A built-in template is told by its name alone: when the text of one changes, `VERSION` of the stage must rise.
impl Serialize for TemplateSource {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::BuiltIn(template) => serializer.serialize_str(template.name()),
            Self::File(file) => file.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for TemplateSource {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Ok(match BuiltIn::of(&text) {
            Some(template) => Self::BuiltIn(template),
            None => Self::File(SourcePath::new(text)),
        })
    }
}

impl JsonSchema for TemplateSource {
    fn schema_name() -> Cow<'static, str> {
        "TemplateSource".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        SourcePath::json_schema(generator)
    }

    fn inline_schema() -> bool {
        true
    }
}
