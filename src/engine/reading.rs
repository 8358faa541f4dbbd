//! Reads parameters from a JSON value. Errors are data ([`Fault`]), so that messages are composed here and not by another library.

use std::fmt::Display;

use serde::de::value::{MapDeserializer, SeqDeserializer, StrDeserializer};
use serde::de::{
    self, DeserializeOwned, Deserializer, Expected, IntoDeserializer, Unexpected, Visitor,
};
use serde_json::{Number, Value};

/// Parameters that don't fit, with the path to the offending value below the stage's parameters (`target_modules[1]`, or
/// `.` for the whole).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {fault}")]
pub struct ParseError {
    /// The path, in `serde_path_to_error`'s notation.
    pub path: String,
    /// What is wrong there.
    pub fault: Fault,
}

/// Reads a `T` from a JSON value, or returns why the value is not one.
pub fn read_parameters<T: DeserializeOwned>(value: Value) -> Result<T, ParseError> {
    serde_path_to_error::deserialize(Parameters(value)).map_err(|error| ParseError {
        path: error.path().to_string(),
        fault: error.into_inner(),
    })
}

/// Why a value is not a valid parameter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// A value of another type, or one out of range.
    #[error("expected {expected}, found {found}")]
    Unfit {
        /// What stands there.
        found: FoundValue,
        /// What was wanted, in the words of serde's visitors (`f64`, `a string`, `struct Name`).
        expected: String,
    },
    /// A word that is not among the known ones.
    #[error("`{found}` is none of {}", .known.join(", "))]
    Word {
        /// What stands there.
        found: String,
        /// The words there are.
        known: &'static [&'static str],
    },
    /// A field that has to be there.
    #[error("`{0}` is missing")]
    Missing(&'static str),
    /// A field that does not exist.
    #[error("`{field}` is unknown")]
    Unknown {
        /// What stands there.
        field: String,
        /// The fields there are.
        known: &'static [&'static str],
    },
    /// The message of a type's own deserialization.
    #[error("{0}")]
    Other(String),
}

/// A value, as far as a message about it needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FoundValue {
    /// A text.
    Text(String),
    /// A number or a truth value, as it is written.
    Scalar(String),
    /// A list.
    List,
    /// A map.
    Map,
    /// `null`, or no value at all.
    Nothing,
}

impl Display for FoundValue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Text(text) => write!(f, "the text {text:?}"),
            Self::Scalar(text) => f.write_str(text),
            Self::List => f.write_str("a list"),
            Self::Map => f.write_str("a map"),
            Self::Nothing => f.write_str("nothing"),
        }
    }
}

impl From<Unexpected<'_>> for FoundValue {
    fn from(unexpected: Unexpected<'_>) -> Self {
        match unexpected {
            Unexpected::Bool(value) => Self::Scalar(value.to_string()),
            Unexpected::Unsigned(value) => Self::Scalar(value.to_string()),
            Unexpected::Signed(value) => Self::Scalar(value.to_string()),
            Unexpected::Float(value) => {
                let number = Number::from_f64(value);
                Self::Scalar(number.map_or_else(|| value.to_string(), |number| number.to_string()))
            }
            Unexpected::Char(value) => Self::Text(value.to_string()),
            Unexpected::Str(value) => Self::Text(value.to_owned()),
            Unexpected::Seq | Unexpected::TupleVariant | Unexpected::Bytes(_) => Self::List,
            Unexpected::Unit | Unexpected::Option | Unexpected::UnitVariant => Self::Nothing,
            Unexpected::Map
            | Unexpected::StructVariant
            | Unexpected::NewtypeStruct
            | Unexpected::NewtypeVariant
            | Unexpected::Enum => Self::Map,
            Unexpected::Other(other) => Self::Scalar(other.to_owned()),
        }
    }
}

impl From<&Value> for FoundValue {
    fn from(value: &Value) -> Self {
        match value {
            Value::Null => Self::Nothing,
            Value::Bool(value) => Self::Scalar(value.to_string()),
            Value::Number(value) => Self::Scalar(value.to_string()),
            Value::String(value) => Self::Text(value.clone()),
            Value::Array(_) => Self::List,
            Value::Object(_) => Self::Map,
        }
    }
}

impl de::Error for Fault {
    fn custom<T: Display>(message: T) -> Self {
        Self::Other(message.to_string())
    }
    fn invalid_type(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::Unfit {
            found: found.into(),
            expected: expected.to_string(),
        }
    }
    fn invalid_value(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::invalid_type(found, expected)
    }
    fn unknown_variant(found: &str, known: &'static [&'static str]) -> Self {
        Self::Word {
            found: found.to_owned(),
            known,
        }
    }
    fn unknown_field(field: &str, known: &'static [&'static str]) -> Self {
        Self::Unknown {
            field: field.to_owned(),
            known,
        }
    }
    fn missing_field(field: &'static str) -> Self {
        Self::Missing(field)
    }
}

/// A JSON value to read parameters from.
struct Parameters(Value);

impl IntoDeserializer<'_, Fault> for Parameters {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

impl<'de> Deserializer<'de> for Parameters {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self.0 {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(value),
            Value::Number(value) => match (value.as_u64(), value.as_i64(), value.as_f64()) {
                (Some(value), ..) => visitor.visit_u64(value),
                (_, Some(value), _) => visitor.visit_i64(value),
                (.., Some(value)) => visitor.visit_f64(value),
                (None, None, None) => Err(Fault::Other(format!("`{value}` is no number"))),
            },
            Value::String(value) => visitor.visit_string(value),
            Value::Array(elements) => {
                let mut elements = SeqDeserializer::new(elements.into_iter().map(Parameters));
                let value = visitor.visit_seq(&mut elements)?;
                elements.end()?;
                Ok(value)
            }
            Value::Object(entries) => {
                let entries = entries
                    .into_iter()
                    .map(|(key, value)| (key, Parameters(value)));
                let mut entries = MapDeserializer::new(entries);
                let value = visitor.visit_map(&mut entries)?;
                entries.end()?;
                Ok(value)
            }
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self.0 {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        known: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        // Enum variants with data would be maps; no kind has any.
        match &self.0 {
            Value::String(word) => visitor.visit_enum(StrDeserializer::new(word)),
            other => Err(Fault::Unfit {
                found: other.into(),
                expected: format!("one of `{}`", known.join("`, `")),
            }),
        }
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map struct identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use serde_json::json;

    use super::*;

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Toy {
        r: u32,
        #[serde(default)]
        rate: Option<f64>,
        #[serde(default)]
        words: Vec<Word>,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(rename_all = "snake_case")]
    enum Word {
        Cosine,
        Linear,
    }

    fn toy(value: Value) -> Result<Toy, ParseError> {
        read_parameters(value)
    }

    #[track_caller]
    fn wrong(value: Value, path: &str, fault: &Fault) {
        let error = toy(value).unwrap_err();
        assert_eq!((error.path.as_str(), &error.fault), (path, fault));
    }

    #[test]
    fn what_fits_is_read() {
        let read = toy(json!({"r": 8, "rate": 1, "words": ["linear", "cosine"]})).unwrap();
        let words = vec![Word::Linear, Word::Cosine];
        let rate = Some(1.0);
        assert_eq!(read, Toy { r: 8, rate, words });
        assert_eq!(toy(json!({"r": 8, "rate": null})).unwrap().rate, None);
        assert_eq!(
            toy(json!({"r": 8, "rate": 5e-324})).unwrap().rate,
            Some(5e-324)
        );
    }

    #[test]
    fn a_fault_is_told_as_data() {
        let unfit = |found: FoundValue, expected: &str| Fault::Unfit {
            found,
            expected: expected.to_owned(),
        };
        wrong(json!({}), ".", &Fault::Missing("r"));
        let text = FoundValue::Text("eight".to_owned());
        wrong(json!({"r": "eight"}), "r", &unfit(text, "u32"));
        for (value, shown) in [
            (json!(-1), "-1"),
            (json!(4_294_967_296_u64), "4294967296"),
            (json!(1.5), "1.5"),
        ] {
            let found = FoundValue::Scalar(shown.to_owned());
            wrong(json!({"r": value}), "r", &unfit(found, "u32"));
        }
        wrong(json!({"r": null}), "r", &unfit(FoundValue::Nothing, "u32"));
        wrong(json!({"r": [1]}), "r", &unfit(FoundValue::List, "u32"));
        wrong(json!({"r": {}}), "r", &unfit(FoundValue::Map, "u32"));
        let word = Fault::Word {
            found: "cosin".to_owned(),
            known: &["cosine", "linear"],
        };
        wrong(
            json!({"r": 1, "words": ["linear", "cosin"]}),
            "words[1]",
            &word,
        );
        let one = FoundValue::Scalar("1".to_owned());
        let expected = "one of `cosine`, `linear`";
        wrong(
            json!({"r": 1, "words": [1]}),
            "words[0]",
            &unfit(one, expected),
        );
        let unknown = Fault::Unknown {
            field: "s".to_owned(),
            known: &["r", "rate", "words"],
        };
        wrong(json!({"r": 1, "s": 2}), "s", &unknown);
    }
}
