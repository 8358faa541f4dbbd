//! How `attach_lora` is told which modules it means.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::{Error, MapAccess, SeqAccess, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::ml::adapter::{ALL_LINEAR, DEFAULT_TARGETS, Names};
use crate::ml::model::tensors::projection_name;

/// The modules that get a pair of matrices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum TargetModules {
    /// Every projection of the layers.
    AllLinear,
    /// Those that are named, or that a pattern fits.
    Some(Modules),
}

/// Modules by the ends of their paths, whose order means nothing and is not kept; or by a regular expression for whole paths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Modules {
    /// Ends of paths.
    Named(Vec<String>),
    /// A regular expression.
    Pattern(String),
}

impl Modules {
    pub(crate) fn of_peft(&self) -> Names {
        match self {
            Self::Named(names) => Names::List(names.clone()),
            Self::Pattern(pattern) => Names::Pattern(pattern.clone()),
        }
    }
}

impl Default for TargetModules {
    /// PEFT's for a Llama.
    fn default() -> Self {
        let names = DEFAULT_TARGETS.map(projection_name);
        Self::Some(Modules::Named(names.map(str::to_owned).to_vec()))
    }
}

impl Serialize for Modules {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Named(names) => names.serialize(serializer),
            Self::Pattern(pattern) => serializer.serialize_str(pattern),
        }
    }
}

impl<'de> Deserialize<'de> for Modules {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let many = Many::<String>::deserialize(deserializer)?;
        Ok(match many {
            Many::One(pattern) => Self::Pattern(pattern),
            Many::List(mut names) => {
                names.sort_unstable();
                names.dedup();
                Self::Named(names)
            }
        })
    }
}

impl JsonSchema for Modules {
    fn schema_name() -> Cow<'static, str> {
        "Modules".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        schemars::json_schema!({
            "oneOf": [
                { "type": "string", "description": "A regular expression that fits whole paths." },
                { "type": "array", "items": { "type": "string" }, "minItems": 1 },
            ],
        })
    }

    fn inline_schema() -> bool {
        true
    }
}

impl Serialize for TargetModules {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::AllLinear => serializer.serialize_str(ALL_LINEAR),
            Self::Some(modules) => modules.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for TargetModules {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(match Modules::deserialize(deserializer)? {
            Modules::Pattern(text) if text.to_lowercase() == ALL_LINEAR => Self::AllLinear,
            modules => Self::Some(modules),
        })
    }
}

impl JsonSchema for TargetModules {
    fn schema_name() -> Cow<'static, str> {
        "TargetModules".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        schemars::json_schema!({
            "oneOf": [
                { "type": "string", "description": "`all-linear`, or a regular expression that fits whole paths." },
                { "type": "array", "items": { "type": "string" }, "minItems": 1 },
            ],
        })
    }

    fn inline_schema() -> bool {
        true
    }
}

/// One value, or a list of such.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Many<T> {
    One(T),
    List(Vec<T>),
}

/// What may stand alone or in a list.
trait Item: Sized + for<'de> Deserialize<'de> {
    const NOUN: &'static str;
    fn of_text(_: &str) -> Option<Self> {
        None
    }
    fn of_number(_: u64) -> Option<Self> {
        None
    }
}

impl Item for String {
    const NOUN: &'static str = "a list of names, or a text";
    fn of_text(text: &str) -> Option<Self> {
        Some(text.to_owned())
    }
}

impl Item for usize {
    const NOUN: &'static str = "a list of layers' numbers, or one";
    fn of_number(number: u64) -> Option<Self> {
        usize::try_from(number).ok()
    }
}

impl<'de, T: Item> Deserialize<'de> for Many<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader<T>(PhantomData<T>);
        impl<'de, T: Item> Visitor<'de> for Reader<T> {
            type Value = Many<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(T::NOUN)
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Many<T>, E> {
                let one = T::of_text(text).map(Many::One);
                one.ok_or_else(|| E::invalid_type(Unexpected::Str(text), &self))
            }

            fn visit_u64<E: Error>(self, number: u64) -> Result<Many<T>, E> {
                let one = T::of_number(number).map(Many::One);
                one.ok_or_else(|| E::invalid_type(Unexpected::Unsigned(number), &self))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Many<T>, A::Error> {
                let mut list = Vec::new();
                while let Some(item) = items.next_element()? {
                    list.push(item);
                }
                Ok(Many::List(list))
            }
        }
        deserializer.deserialize_any(Reader(PhantomData))
    }
}

/// Numbers of layers, or names of lists of layers; one alone may go without brackets. Order means nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub(crate) struct OneOrMany<T>(pub(crate) Vec<T>);

impl<T> OneOrMany<T> {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<'de, T: Item + Ord> Deserialize<'de> for OneOrMany<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut list = match Many::deserialize(deserializer)? {
            Many::One(one) => vec![one],
            Many::List(list) => list,
        };
        list.sort_unstable();
        list.dedup();
        Ok(Self(list))
    }
}

impl<T: JsonSchema> JsonSchema for OneOrMany<T> {
    fn schema_name() -> Cow<'static, str> {
        format!("OneOrMany_{}", T::schema_name()).into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let one = T::json_schema(generator);
        schemars::json_schema!({ "oneOf": [one, { "type": "array", "items": one }] })
    }

    fn inline_schema() -> bool {
        true
    }
}

/// Numbers by pattern, in the order of the recipe: the first pattern that fits a module counts. For the fingerprint, in which the
/// entries of a map have no order, it is a list of pairs.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(transparent)]
pub(crate) struct ByPattern<T>(pub(crate) Vec<(String, T)>);

impl<T> Default for ByPattern<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> ByPattern<T> {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn values(&self) -> impl Iterator<Item = &T> {
        self.0.iter().map(|(_, value)| value)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for ByPattern<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Reader<T> {
            type Value = ByPattern<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of patterns and numbers")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<ByPattern<T>, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(ByPattern(entries))
            }

            // As it is written here, for the process that runs the stage.
            fn visit_seq<A: SeqAccess<'de>>(self, mut pairs: A) -> Result<ByPattern<T>, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = pairs.next_element()? {
                    entries.push(entry);
                }
                Ok(ByPattern(entries))
            }
        }
        deserializer.deserialize_any(Reader(PhantomData))
    }
}

impl<T: JsonSchema> JsonSchema for ByPattern<T> {
    fn schema_name() -> Cow<'static, str> {
        format!("ByPattern_{}", T::schema_name()).into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let number = T::json_schema(generator);
        schemars::json_schema!({ "type": "object", "additionalProperties": number })
    }

    fn inline_schema() -> bool {
        true
    }
}
