//! A parameter that takes one stage or several, and the artifact that stands for any.

use std::borrow::Cow;
use std::path::Path;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Artifact, Input, View};

/// Whatever a stage makes. No stage makes it; an input of it takes any artifact.
#[derive(Debug)]
pub struct Anything;

impl Artifact for Anything {
    const NAME: &'static str = "anything";

    fn show(_: &Path, _: usize) -> anyhow::Result<Vec<View>> {
        Ok(Vec::new())
    }
}

/// One edge of the graph or a list of them: the name of a stage, or names. In a recipe also `collect: [..]`, which the recipe's reader
/// replaces by the list of all stages that a matrix made of these.
pub struct Inputs<A> {
    stages: Vec<Input<A>>,
    is_list: bool,
}

impl<A> Inputs<A> {
    /// The stages in order.
    pub fn stages(&self) -> &[Input<A>] {
        &self.stages
    }

    /// Whether they are a list, which may be of one.
    pub fn is_list(&self) -> bool {
        self.is_list
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.stages.is_empty()
    }
}

impl<A: Artifact> Serialize for Inputs<A> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.stages[..] {
            [one] if !self.is_list => one.serialize(serializer),
            several => several.serialize(serializer),
        }
    }
}

impl<'de, A> Deserialize<'de> for Inputs<A> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names<A>(std::marker::PhantomData<fn() -> A>);

        impl<'de, A> Visitor<'de> for Names<A> {
            type Value = Inputs<A>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("the name of a stage, a list of names, or `collect` with names")
            }

            fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<Self::Value, E> {
                let stages = vec![Input::new(name)];
                let is_list = false;
                Ok(Inputs { stages, is_list })
            }

            fn visit_seq<S: SeqAccess<'de>>(self, mut names: S) -> Result<Self::Value, S::Error> {
                let mut stages = Vec::new();
                while let Some(name) = names.next_element::<String>()? {
                    stages.push(Input::new(name));
                }
                let is_list = true;
                Ok(Inputs { stages, is_list })
            }
        }

        deserializer.deserialize_any(Names(std::marker::PhantomData))
    }
}

impl<A: Artifact> JsonSchema for Inputs<A> {
    fn schema_name() -> Cow<'static, str> {
        format!("Inputs_{}", A::NAME).into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let one = Input::<A>::json_schema(generator);
        schemars::json_schema!({
            "description": format!("The name of a stage that makes: {}; a list of such names; or `collect` with the names of stages that have a matrix.", A::NAME),
            "anyOf": [
                one,
                { "type": "array", "items": one, "minItems": 1 },
                {
                    "type": "object",
                    "properties": {
                        "collect": {
                            "description": "All stages that a matrix made of these.",
                            "type": ["array", "string"],
                            "items": { "type": "string" },
                        },
                    },
                    "required": ["collect"],
                    "additionalProperties": false,
                    "x-collect": true,
                },
            ],
        })
    }

    fn inline_schema() -> bool {
        true
    }
}
