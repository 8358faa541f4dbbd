//! One row of JSON: its values as they were written, and what Python writes beyond JSON.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Read};

use anyhow::{Result, bail};
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use crate::data::cell::entries;

/// What stands for NaN and the infinities, which Python writes though JSON has none.
const NOT_A_NUMBER: &str = "\"\\u0000 not a number 8c1f0e52 \\u0000\"";

/// The deepest nesting of lists and objects in a value: serde's own limit for a row.
pub(super) const DEEPEST_JSON: usize = 126;

/// A row, each value as it was written.
pub(super) struct Row {
    pub(super) values: Vec<(String, Box<RawValue>)>,
    /// The columns that held NaN or an infinity, which are null now.
    pub(super) not_finite: Vec<String>,
}

impl Row {
    pub(super) fn bytes(&self) -> u64 {
        let values = self.values.iter();
        values
            .map(|(name, value)| (name.len() + value.get().len() + 64) as u64)
            .sum()
    }
}

/// A row's values, to be looked up one after the other.
pub(super) enum Lookup<'a> {
    Few(&'a [(String, Box<RawValue>)]),
    Many(HashMap<&'a str, &'a RawValue>),
}

impl<'a> Lookup<'a> {
    pub(super) fn new(row: Option<&'a Row>) -> Self {
        match row {
            None => Self::Few(&[]),
            Some(row) if row.values.len() > 32 => {
                let values = row.values.iter();
                Self::Many(
                    values
                        .map(|(name, value)| (name.as_str(), &**value))
                        .collect(),
                )
            }
            Some(row) => Self::Few(&row.values),
        }
    }

    pub(super) fn get(&self, name: &str) -> Option<&'a RawValue> {
        match self {
            Self::Few(values) => values
                .iter()
                .find_map(|(known, value)| (known == name).then_some(&**value)),
            Self::Many(values) => values.get(name).copied(),
        }
    }
}

/// What stands where a row should: an object, or the noun for something else.
pub(super) enum Parsed {
    Row(Vec<(String, Box<RawValue>)>),
    Other(&'static str),
}

impl<'de> Deserialize<'de> for Parsed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ParsedVisitor;
        impl<'de> Visitor<'de> for ParsedVisitor {
            type Value = Parsed;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with columns")
            }
            fn visit_map<A: MapAccess<'de>>(self, access: A) -> Result<Parsed, A::Error> {
                entries(access).map(Parsed::Row)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Parsed, A::Error> {
                while access.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Parsed::Other("a list"))
            }
            fn visit_str<E>(self, _: &str) -> Result<Parsed, E> {
                Ok(Parsed::Other("text"))
            }
            fn visit_bool<E>(self, _: bool) -> Result<Parsed, E> {
                Ok(Parsed::Other("a boolean"))
            }
            fn visit_i64<E>(self, _: i64) -> Result<Parsed, E> {
                Ok(Parsed::Other("a number"))
            }
            fn visit_u64<E>(self, _: u64) -> Result<Parsed, E> {
                Ok(Parsed::Other("a number"))
            }
            fn visit_f64<E>(self, _: f64) -> Result<Parsed, E> {
                Ok(Parsed::Other("a number"))
            }
            fn visit_unit<E>(self) -> Result<Parsed, E> {
                Ok(Parsed::Other("null"))
            }
        }
        deserializer.deserialize_any(ParsedVisitor)
    }
}

impl Parsed {
    /// The row of a text that has no marks.
    pub(super) fn row(self) -> Result<Row> {
        match self {
            Self::Row(values) => Ok(Row {
                values,
                not_finite: Vec::new(),
            }),
            Self::Other(noun) => bail!("expected an object with columns, found {noun}"),
        }
    }

    /// The row of a text that may have marks: values with one become null.
    pub(super) fn marked_row(self) -> Result<Row> {
        let mut row = self.row()?;
        for (name, value) in &mut row.values {
            if value.get().contains(NOT_A_NUMBER) {
                row.not_finite.push(name.clone());
                *value = RawValue::NULL.to_owned();
            }
        }
        Ok(row)
    }
}

/// Whether lists and objects are nested more deeply than any reader of JSON goes.
pub(super) fn too_deep(text: &str) -> bool {
    let (mut depth, mut in_text, mut escaped) = (0_usize, false, false);
    for byte in text.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_text => escaped = true,
            b'"' => in_text = !in_text,
            b'[' | b'{' if !in_text => {
                depth += 1;
                if depth > DEEPEST_JSON {
                    return true;
                }
            }
            b']' | b'}' if !in_text => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    false
}

/// The text with a mark in place of each NaN and infinity outside of its strings; none when there is none.
pub(super) fn without_nan(text: &[u8]) -> Option<Vec<u8>> {
    let mut made = Vec::with_capacity(text.len());
    let mut state = State::default();
    state.pass(text, &mut made, true);
    state.found.then_some(made)
}

/// Where in a JSON text the next byte stands.
#[derive(Default)]
struct State {
    in_text: bool,
    escaped: bool,
    found: bool,
}

const WORDS: [&[u8]; 3] = [b"NaN", b"Infinity", b"-Infinity"];
const LONGEST_WORD: usize = 9;

impl State {
    /// Adds to `made` what `raw` becomes; returns how much of it was looked at, which is all of it when it is the `last`.
    fn pass(&mut self, raw: &[u8], made: &mut Vec<u8>, last: bool) -> usize {
        let mut at = 0;
        while let Some(byte) = raw.get(at) {
            let rest = &raw[at..];
            if self.in_text {
                self.in_text = self.escaped || *byte != b'"';
                self.escaped = !self.escaped && *byte == b'\\';
            } else if matches!(byte, b'N' | b'I' | b'-') {
                if rest.len() < LONGEST_WORD && !last {
                    break;
                }
                if let Some(word) = WORDS.iter().find(|word| rest.starts_with(word)) {
                    made.extend_from_slice(NOT_A_NUMBER.as_bytes());
                    at += word.len();
                    self.found = true;
                    continue;
                }
            } else {
                self.in_text = *byte == b'"';
            }
            made.push(*byte);
            at += 1;
        }
        at
    }
}

/// A reader of JSON that puts the mark in place of NaN and the infinities.
pub(super) struct WithoutNan<R> {
    inner: R,
    state: State,
    raw: Vec<u8>,
    made: Vec<u8>,
    given: usize,
}

impl<R: Read> WithoutNan<R> {
    pub(super) fn new(inner: R) -> Self {
        Self {
            inner,
            state: State::default(),
            raw: Vec::new(),
            made: Vec::new(),
            given: 0,
        }
    }
}

impl<R: Read> Read for WithoutNan<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        while self.given == self.made.len() {
            self.made.clear();
            self.given = 0;
            let mut chunk = [0; 1 << 14];
            let count = self.inner.read(&mut chunk)?;
            self.raw.extend_from_slice(&chunk[..count]);
            if self.raw.is_empty() {
                return Ok(0);
            }
            let used = self.state.pass(&self.raw, &mut self.made, count == 0);
            self.raw.drain(..used);
        }
        let count = bytes.len().min(self.made.len() - self.given);
        bytes[..count].copy_from_slice(&self.made[self.given..self.given + count]);
        self.given += count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_bare_words_stand_for_no_number() {
        let marked =
            |text: &str| without_nan(text.as_bytes()).map(|text| String::from_utf8(text).unwrap());
        assert_eq!(marked(r#"{"a": "NaN \" Infinity", "b": 1}"#), None);
        let text = marked(r#"{"a": [NaN, -Infinity], "b": "NaN\\"}"#).unwrap();
        let expected = format!(r#"{{"a": [{NOT_A_NUMBER}, {NOT_A_NUMBER}], "b": "NaN\\"}}"#);
        assert_eq!(text, expected);
    }

    #[test]
    fn a_stream_is_marked_as_the_whole_text_is_wherever_it_is_cut() {
        struct Dribble<'a>(&'a [u8], usize);
        impl Read for Dribble<'_> {
            fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
                let count = self.1.min(self.0.len());
                bytes[..count].copy_from_slice(&self.0[..count]);
                self.0 = &self.0[count..];
                Ok(count)
            }
        }
        let text = br#"[{"a": -Infinity, "b": "-Infinity", "c": -1}, {"a": NaN}]"#;
        let whole = without_nan(text).unwrap();
        for step in 1..12 {
            let mut made = Vec::new();
            WithoutNan::new(Dribble(text, step))
                .read_to_end(&mut made)
                .unwrap();
            assert_eq!(made, whole, "{step}");
        }
    }

    #[test]
    fn depth_counts_brackets_outside_of_texts() {
        assert!(!too_deep(&format!("[\"{}\\\"\"]", "[".repeat(500))));
        assert!(!too_deep(&"[]".repeat(500)));
        assert!(too_deep(&"[".repeat(DEEPEST_JSON + 1)));
    }
}
