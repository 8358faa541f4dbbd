//! Keys of maps, which are texts.

use std::cell::RefCell;

use serde::de::{DeserializeSeed, EnumAccess, Error as _, MapAccess, SeqAccess, Visitor};
use serde_yaml::Value;

use super::{MARK, Reader};
use crate::recipe::source_map::SourceSpan;
use crate::recipe::syntax::OURS;

/// Reads a key: its text, or `None` for a key that is not a text.
pub(super) struct KeySeed<'a, 'text>(pub(super) &'a Reader<'text>);

struct KeyVisitor<'a> {
    kept: &'a RefCell<Option<Value>>,
    finds_place: bool,
}

impl<'de> DeserializeSeed<'de> for KeySeed<'_, '_> {
    type Value = (Option<String>, SourceSpan);

    fn deserialize<D: serde::Deserializer<'de>>(
        self,
        deserializer: D,
    ) -> Result<Self::Value, D::Error> {
        let kept = RefCell::new(None);
        let visitor = KeyVisitor {
            kept: &kept,
            finds_place: self.0.finds_places,
        };
        let result = deserializer.deserialize_any(visitor);
        let Some(value) = kept.into_inner() else {
            return Err(match result {
                Err(error) => error,
                Ok(()) => D::Error::custom("a key was not kept"),
            });
        };
        self.0.count(Some(&value)).map_err(D::Error::custom)?;
        let span = match result {
            Err(error) => self.0.mark(&error.to_string(), &value),
            Ok(()) => self.0.nowhere(),
        };
        let key = match value {
            Value::String(key) => Some(key),
            _ => None,
        };
        Ok((key, span))
    }
}

impl KeyVisitor<'_> {
    fn keep<E: serde::de::Error>(self, value: impl Into<Value>) -> Result<(), E> {
        *self.kept.borrow_mut() = Some(value.into());
        if self.finds_place {
            Err(E::custom(MARK))
        } else {
            Ok(())
        }
    }
}

impl<'de> Visitor<'de> for KeyVisitor<'_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a key")
    }
    fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<(), E> {
        self.keep(value)
    }
    fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<(), E> {
        self.keep(value)
    }
    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<(), E> {
        self.keep(value)
    }
    fn visit_i128<E: serde::de::Error>(self, _: i128) -> Result<(), E> {
        self.keep(Value::Null)
    }
    fn visit_u128<E: serde::de::Error>(self, _: u128) -> Result<(), E> {
        self.keep(Value::Null)
    }
    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<(), E> {
        self.keep(value)
    }
    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<(), E> {
        self.keep(value)
    }
    fn visit_unit<E: serde::de::Error>(self) -> Result<(), E> {
        self.keep(Value::Null)
    }
    fn visit_none<E: serde::de::Error>(self) -> Result<(), E> {
        self.keep(Value::Null)
    }
    // If a key is a container, nothing is kept, so that the error ends the reading.
    fn visit_seq<A: SeqAccess<'de>>(self, _: A) -> Result<(), A::Error> {
        Err(A::Error::custom(format!(
            "{OURS}a key must be a text, not a list"
        )))
    }
    fn visit_map<A: MapAccess<'de>>(self, _: A) -> Result<(), A::Error> {
        Err(A::Error::custom(format!(
            "{OURS}a key must be a text, not a map|a text that begins with `{{` needs quotes"
        )))
    }
    fn visit_enum<A: EnumAccess<'de>>(self, data: A) -> Result<(), A::Error> {
        let (tag, _) = data.variant::<String>()?;
        Err(A::Error::custom(format!(
            "{OURS}the tag `{tag}` means nothing here|write the key without it"
        )))
    }
}
