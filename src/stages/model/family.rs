//! The family of a new model, by transformers' `model_type`.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::ml::model::families::{self, FAMILIES, Family};

/// One of [`FAMILIES`].
#[derive(Clone, Copy)]
pub(in crate::stages) struct FamilyName(pub(in crate::stages) &'static Family);

impl FamilyName {
    /// Whether it is what a model is of unless it is said.
    #[expect(
        clippy::trivially_copy_pass_by_ref,
        reason = "the type of serde's `skip_serializing_if`"
    )]
    pub(in crate::stages) fn is_default(&self) -> bool {
        self.0.model_type == Self::default().0.model_type
    }
}

impl Default for FamilyName {
    fn default() -> Self {
        Self(&FAMILIES[0])
    }
}

impl std::fmt::Debug for FamilyName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0.model_type)
    }
}

impl Serialize for FamilyName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.0.model_type)
    }
}

impl<'de> Deserialize<'de> for FamilyName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        let family = families::family(Some(&name)).map_err(serde::de::Error::custom)?;
        Ok(Self(family))
    }
}

impl JsonSchema for FamilyName {
    fn schema_name() -> Cow<'static, str> {
        "FamilyName".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let names: Vec<_> = FAMILIES.iter().map(|family| family.model_type).collect();
        schemars::json_schema!({ "type": "string", "enum": names })
    }

    fn inline_schema() -> bool {
        true
    }
}
