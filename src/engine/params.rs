//! The marker types of parameters. Each reads as a plain value in YAML, and serialises as an object with one `$` key, so
//! that the engine finds edges, files and neutral settings in any params struct without being told.

use std::borrow::Cow;
use std::marker::PhantomData;
use std::ops::Deref;
use std::path::Path;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::Artifact;

/// The key that marks an edge in serialised parameters: `{"$stage": name, "$artifact": noun}`.
pub(crate) const STAGE_KEY: &str = "$stage";
/// The key beside [`STAGE_KEY`] that says which artifact the parameter wants.
pub(crate) const ARTIFACT_KEY: &str = "$artifact";
/// The key that marks a local file: `{"$file": path}`.
pub(crate) const FILE_KEY: &str = "$file";
/// The key that marks a setting outside the fingerprint: `{"$neutral": value}`.
pub(crate) const NEUTRAL_KEY: &str = "$neutral";

/// An edge of the graph: the name of the stage that makes an artifact of type `A`.
pub struct Input<A> {
    stage: String,
    artifact: PhantomData<fn() -> A>,
}

impl<A> Input<A> {
    /// The edge to the stage called `stage`.
    pub fn new(stage: impl Into<String>) -> Self {
        Self {
            stage: stage.into(),
            artifact: PhantomData,
        }
    }

    /// The name of the stage.
    pub fn stage(&self) -> &str {
        &self.stage
    }
}

impl<A> Clone for Input<A> {
    fn clone(&self) -> Self {
        Self::new(self.stage.clone())
    }
}

impl<A: Artifact> std::fmt::Debug for Input<A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Input<{}>({})", A::NAME, self.stage)
    }
}

impl<A: Artifact> Serialize for Input<A> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(2))?;
        map.serialize_entry(STAGE_KEY, &self.stage)?;
        map.serialize_entry(ARTIFACT_KEY, A::NAME)?;
        map.end()
    }
}

impl<'de, A> Deserialize<'de> for Input<A> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self::new)
    }
}

impl<A: Artifact> JsonSchema for Input<A> {
    fn schema_name() -> Cow<'static, str> {
        format!("Input_{}", A::NAME).into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        schemars::json_schema!({
            "type": "string",
            "description": format!("The name of a stage that makes: {}.", A::NAME),
            "x-artifact": A::NAME,
        })
    }

    fn inline_schema() -> bool {
        true
    }
}

/// A local file or folder. Its content, not its path, enters the fingerprint.
///
/// Relative paths start at the recipe's folder; those given by `--set` start at the current folder.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct SourcePath(String);

impl SourcePath {
    /// The path as it was written.
    pub fn new(path: impl Into<String>) -> Self {
        Self(path.into())
    }

    /// The path as it was written; [`super::Context::source`] resolves it.
    pub fn as_written(&self) -> &str {
        &self.0
    }

    /// The extension, in lower case.
    pub fn extension(&self) -> Option<String> {
        Path::new(&self.0)
            .extension()
            .map(|extension| extension.to_string_lossy().to_lowercase())
    }
}

impl Serialize for SourcePath {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(1))?;
        map.serialize_entry(FILE_KEY, &self.0)?;
        map.end()
    }
}

impl<'de> Deserialize<'de> for SourcePath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self)
    }
}

impl JsonSchema for SourcePath {
    fn schema_name() -> Cow<'static, str> {
        "SourcePath".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        schemars::json_schema!({
            "type": "string",
            "description": "A local file or folder, relative to the recipe's folder. Its content counts, not its path.",
        })
    }

    fn inline_schema() -> bool {
        true
    }
}

/// A setting that can't change a stage's result, so that changing it makes nothing stale.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Neutral<T>(pub T);

impl<T> Deref for Neutral<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: Serialize> Serialize for Neutral<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(1))?;
        map.serialize_entry(NEUTRAL_KEY, &self.0)?;
        map.end()
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Neutral<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        T::deserialize(deserializer).map(Self)
    }
}

impl<T: JsonSchema> JsonSchema for Neutral<T> {
    fn schema_name() -> Cow<'static, str> {
        format!("Neutral_{}", T::schema_name()).into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let mut schema = T::json_schema(generator);
        schema.insert("x-neutral".into(), true.into());
        schema
    }

    fn inline_schema() -> bool {
        true
    }
}
