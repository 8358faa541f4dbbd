//! Sizes and spans of time as people write them: `20GiB`, `1h 30m`.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A number of bytes: a whole number, or a text with a unit (`KB`, `MB`, `GB`, `TB` are powers of 1000, `KiB` .. `TiB` of 1024).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |_| format!("`{text}` is no size: expected one such as `500MB` or `20GiB`");
        text.parse::<bytesize::ByteSize>()
            .map(|size| Self(size.0))
            .map_err(wrong)
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", bytesize::ByteSize(self.0).display().si())
    }
}

/// A span of time: a whole number of seconds, or a text such as `90s`, `45m` or `1h 30m`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            |_| format!("`{text}` is no span of time: expected one such as `90s` or `1h 30m`");
        humantime::parse_duration(text).map(Self).map_err(wrong)
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", humantime::format_duration(self.0))
    }
}

/// Reads a whole number or a text.
struct Either(&'static str);

impl Visitor<'_> for Either {
    type Value = Result<u64, String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Self::Value, E> {
        Ok(Ok(value))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Self::Value, E> {
        Ok(Err(value.to_owned()))
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match deserializer.deserialize_any(Either("a size such as `20GiB`"))? {
            Ok(bytes) => Ok(Self(bytes)),
            Err(text) => text.parse().map_err(D::Error::custom),
        }
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match deserializer.deserialize_any(Either("a span of time such as `1h 30m`"))? {
            Ok(seconds) => Ok(Self(Duration::from_secs(seconds))),
            Err(text) => text.parse().map_err(D::Error::custom),
        }
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

impl Serialize for Span {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

macro_rules! number_or_text {
    ($name:ident, $text:literal) => {
        impl JsonSchema for $name {
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({
                    "description": $text,
                    "anyOf": [{ "type": "integer", "minimum": 0 }, { "type": "string", "minLength": 1 }],
                })
            }
        }
    };
}
number_or_text!(Bytes, "Bytes, or a text such as `500MB` or `20GiB`.");
number_or_text!(Span, "Seconds, or a text such as `90s` or `1h 30m`.");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_spans_are_read_as_people_write_them() {
        let bytes = |text: &str| text.parse::<Bytes>().map(|bytes| bytes.0);
        assert_eq!(bytes("500MB"), Ok(500_000_000));
        assert_eq!(bytes("2 GiB"), Ok(2 << 30));
        assert_eq!(bytes("1.5kB"), Ok(1500));
        assert_eq!(bytes("17"), Ok(17));
        assert!(bytes("much").unwrap_err().contains("`much` is no size"));
        assert!(bytes("-1GB").is_err());
        let span = |text: &str| text.parse::<Span>().map(|span| span.0.as_secs());
        assert_eq!(span("1h 30m"), Ok(5400));
        assert_eq!(span("90s"), Ok(90));
        assert!(span("soon").unwrap_err().contains("`soon` is no span"));
        assert_eq!(Span(Duration::from_mins(90)).to_string(), "1h 30m");
        let read: (Bytes, Span) = serde_json::from_str(r#"[3, "2m"]"#).unwrap();
        assert_eq!(read, (Bytes(3), Span(Duration::from_mins(2))));
        let wrong = serde_json::from_str::<Bytes>("true").unwrap_err();
        assert!(wrong.to_string().contains("expected a size"), "{wrong}");
    }
}
