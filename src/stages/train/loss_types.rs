//! The losses of `train_dpo` by TRL's names, as a recipe has them.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::{IntoDeserializer as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::ml::loss::dpo::{self, LossType};

/// One loss, which may go without brackets, or several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LossTypes(pub(super) Vec<LossType>);

impl LossTypes {
    /// Whether it is DPO's own loss alone.
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl Default for LossTypes {
    fn default() -> Self {
        Self(vec![LossType::default()])
    }
}

impl Serialize for LossTypes {
    /// As it is usually written, so that a list of one is the same as the one.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.0[..] {
            [one] => one.serialize(serializer),
            all => all.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for LossTypes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;

        impl<'de> Visitor<'de> for Reader {
            type Value = LossTypes;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the name of a loss, or a list of such names")
            }

            fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<LossTypes, E> {
                Ok(LossTypes(vec![LossType::deserialize(
                    name.into_deserializer(),
                )?]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<LossTypes, A::Error> {
                let mut all = Vec::new();
                while let Some(one) = list.next_element()? {
                    all.push(one);
                }
                if all.is_empty() {
                    return Err(serde::de::Error::invalid_length(0, &"at least one loss"));
                }
                Ok(LossTypes(all))
            }
        }

        deserializer.deserialize_any(Reader)
    }
}

impl JsonSchema for LossTypes {
    fn schema_name() -> Cow<'static, str> {
        "LossTypes".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let one = LossType::json_schema(generator);
        schemars::json_schema!({ "anyOf": [one, { "type": "array", "items": one, "minItems": 1 }] })
    }

    fn inline_schema() -> bool {
        true
    }
}

/// A measure of the distance to the reference model, by TRL's name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum FDivergenceType {
    /// DPO's own.
    #[default]
    ReverseKl,
    /// The forward Kullback-Leibler divergence.
    ForwardKl,
    /// The Jensen-Shannon divergence.
    JsDivergence,
    /// The divergence of the order `f_alpha_divergence_coef`.
    AlphaDivergence,
}

impl FDivergenceType {
    /// Whether it is DPO's own.
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// The divergence, `alpha` being the order of an alpha divergence.
    pub(super) fn divergence(self, alpha: f64) -> dpo::Divergence {
        match self {
            Self::ReverseKl => dpo::Divergence::ReverseKl,
            Self::ForwardKl => dpo::Divergence::ForwardKl,
            Self::JsDivergence => dpo::Divergence::JsDivergence,
            Self::AlphaDivergence => dpo::Divergence::AlphaDivergence(alpha),
        }
    }
}
