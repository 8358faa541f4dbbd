//! Structs of parameters whose fields are side by side in one map.
//!
//! serde's `flatten` could read them too, but it loses the position of a mistake and can't refuse unknown fields.

use schemars::Schema;
use serde::de::{DeserializeOwned, Deserializer, Visitor};
use serde_json::{Map, Value};

use super::reading::{Fault, ParseError, read_parameters};

/// Reads an `A` from the fields that it has, a `B` from those that it has, and a `C` from all others.
///
/// # Errors
/// As [`read_parameters`], with the same paths as if all were one struct.
pub fn read_side_by_side<A: DeserializeOwned, B: DeserializeOwned, C: DeserializeOwned>(
    value: Value,
) -> Result<(A, B, C), ParseError> {
    let Value::Object(entries) = value else {
        // Each of them refuses it.
        let [first, second] = [value.clone(), value.clone()];
        return Ok((
            read_parameters(first)?,
            read_parameters(second)?,
            read_parameters(value)?,
        ));
    };
    let (first, others) = split_off::<A>(entries);
    let (second, third) = split_off::<B>(others);
    Ok((
        read_parameters(Value::Object(first))?,
        read_parameters(Value::Object(second))?,
        read_parameters(Value::Object(third))?,
    ))
}

/// Reads an `A` from the fields that it has, and a `B` from all others.
///
/// # Errors
/// As [`read_parameters`], with the same paths as if both were one struct.
pub fn read_both_side_by_side<A: DeserializeOwned, B: DeserializeOwned>(
    value: Value,
) -> Result<(A, B), ParseError> {
    let Value::Object(entries) = value else {
        // Each of them refuses it.
        return Ok((read_parameters(value.clone())?, read_parameters(value)?));
    };
    let (first, second) = split_off::<A>(entries);
    Ok((
        read_parameters(Value::Object(first))?,
        read_parameters(Value::Object(second))?,
    ))
}

/// Adds the properties of the schema `other` to those of `schema`, and which of them are required.
pub fn add_properties(schema: &mut Schema, mut other: Schema) {
    if let Some(Value::Object(all)) = other.remove("properties")
        && let Some(own) = schema.ensure_object().get_mut("properties")
        && let Some(own) = own.as_object_mut()
    {
        own.extend(all);
    }
    if let Some(Value::Array(all)) = other.remove("required") {
        let own = schema.ensure_object().entry("required");
        let own = own.or_insert_with(|| Value::Array(Vec::new()));
        if let Some(own) = own.as_array_mut() {
            own.extend(all);
        }
    }
}

/// The entries for the fields of a `T`, and all others.
fn split_off<T: DeserializeOwned>(
    entries: Map<String, Value>,
) -> (Map<String, Value>, Map<String, Value>) {
    let fields = fields::<T>();
    let entries = entries.into_iter();
    entries.partition(|(key, _)| fields.contains(&key.as_str()))
}

/// The names of the fields that a struct is read from.
fn fields<T: DeserializeOwned>() -> &'static [&'static str] {
    let mut found: &'static [&'static str] = &[];
    // This never succeeds.
    let _ = T::deserialize(FieldNames(&mut found));
    found
}

/// A deserializer that records the names of a struct's fields and then fails.
struct FieldNames<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for FieldNames<'_> {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Fault> {
        Err(Fault::Other("only names are wanted".into()))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        *self.0 = fields;
        self.deserialize_any(visitor)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;
    use crate::engine::FoundValue;

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Own {
        beta: f64,
        #[serde(default)]
        words: Vec<String>,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Shared {
        model: String,
        #[serde(default)]
        seed: u64,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Middle {
        #[serde(default)]
        rate: f64,
    }

    fn read(text: &str) -> Result<(Own, Middle, Shared), ParseError> {
        read_side_by_side(serde_yaml::from_str(text).unwrap())
    }

    #[track_caller]
    fn wrong(text: &str, path: &str, fault: &Fault) {
        let error = read(text).unwrap_err();
        assert_eq!((error.path.as_str(), &error.fault), (path, fault));
    }

    #[test]
    fn all_are_read_from_one_map() {
        let (own, middle, shared) =
            read("{model: base, beta: 1, rate: 0.5, seed: 7, words: [a]}").unwrap();
        assert_eq!(middle, Middle { rate: 0.5 });
        let words = vec!["a".to_owned()];
        assert_eq!(own, Own { beta: 1., words });
        let model = "base".to_owned();
        assert_eq!(shared, Shared { model, seed: 7 });
    }

    #[test]
    fn mistakes_have_the_place_that_they_have_in_one_struct() {
        let unfit = |found: &str, expected: &str| Fault::Unfit {
            found: FoundValue::Scalar(found.to_owned()),
            expected: expected.to_owned(),
        };
        wrong("{model: a, beta: 1, seed: -1}", "seed", &unfit("-1", "u64"));
        wrong("{model: a, beta: true}", "beta", &unfit("true", "f64"));
        wrong(
            "{model: a, beta: 1, rate: []}",
            "rate",
            &Fault::Unfit {
                found: FoundValue::List,
                expected: "f64".to_owned(),
            },
        );
        let element = unfit("1", "a string");
        wrong("{model: a, beta: 1, words: [a, 1]}", "words[1]", &element);
        wrong("{model: a}", ".", &Fault::Missing("beta"));
        wrong("{beta: 1}", ".", &Fault::Missing("model"));
        let unknown = Fault::Unknown {
            field: "gamma".to_owned(),
            known: &["model", "seed"],
        };
        wrong("{model: a, beta: 1, gamma: 2}", "gamma", &unknown);
    }
}
