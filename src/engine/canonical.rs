//! Canonical JSON and digests: equal values have the same text, whatever the order of their maps.
//!
//! `serde_json`'s own output would not do: its map order changes if any dependency enables `preserve_order`.

use serde::Serialize;
use serde_json::{Map, Value};

/// A BLAKE3 digest as 64 lower-case hex digits.
pub type Digest = String;

/// 64 lower-case hex digits, which are safe in a path.
pub(super) fn is_digest(text: &str) -> bool {
    text.len() == 64
        && text
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// JSON with sorted keys and no white space.
pub fn canonical_json(value: &Value) -> String {
    String::from_utf8(bytes(value)).unwrap_or_default()
}

fn bytes(value: &Value) -> Vec<u8> {
    let mut text = Vec::with_capacity(512);
    write(value, &mut text);
    text
}

/// The digest of the canonical JSON.
pub fn digest_json(value: &Value) -> Digest {
    blake3::hash(&bytes(value)).to_hex().to_string()
}

/// [`digest_json`] of a map with these entries, without building it.
pub(super) fn digest_entries(mut entries: Vec<(&str, &Value)>) -> Digest {
    let mut text = Vec::with_capacity(512);
    map(&mut entries, &mut text);
    blake3::hash(&text).to_hex().to_string()
}

/// [`digest_json`] of a list without maps in it.
pub(super) fn digest_list(list: &impl Serialize) -> Digest {
    let mut text = Vec::with_capacity(512);
    scalar(list, &mut text);
    blake3::hash(&text).to_hex().to_string()
}

fn map(entries: &mut [(&str, &Value)], text: &mut Vec<u8>) {
    entries.sort_unstable_by(|a, b| a.0.cmp(b.0));
    text.push(b'{');
    for (index, (key, value)) in entries.iter().enumerate() {
        if index > 0 {
            text.push(b',');
        }
        string(key, text);
        text.push(b':');
        write(value, text);
    }
    text.push(b'}');
}

fn write(value: &Value, text: &mut Vec<u8>) {
    match value {
        Value::Object(entries) => {
            let mut entries: Vec<_> = entries.iter().map(|(key, value)| (&**key, value)).collect();
            map(&mut entries, text);
        }
        Value::Array(items) => {
            text.push(b'[');
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    text.push(b',');
                }
                write(item, text);
            }
            text.push(b']');
        }
        Value::String(other) => string(other, text),
        other => scalar(other, text),
    }
}

/// [`scalar`] of a text; most have nothing to escape.
fn string(value: &str, text: &mut Vec<u8>) {
    let is_escaped = |byte: u8| byte < b' ' || matches!(byte, b'"' | b'\\');
    if value.bytes().any(is_escaped) {
        scalar(value, text);
    } else {
        text.push(b'"');
        text.extend_from_slice(value.as_bytes());
        text.push(b'"');
    }
}

/// Writes a scalar as `serde_json` does.
fn scalar(value: &(impl Serialize + ?Sized), text: &mut Vec<u8>) {
    // Neither a value nor a vector can fail.
    let _ = serde_json::to_writer(text, value);
}

/// The same value with the keys of every map in order, whatever map `serde_json` was built with.
pub fn sorted_keys(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<(String, Value)> = map.into_iter().collect();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            let entries = entries
                .into_iter()
                .map(|(key, value)| (key, sorted_keys(value)));
            Value::Object(entries.collect::<Map<_, _>>())
        }
        Value::Array(list) => Value::Array(list.into_iter().map(sorted_keys).collect()),
        scalar => scalar,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn keys_are_sorted_at_every_depth_and_the_digest_is_pinned() {
        for text in [
            "",
            "plain",
            "é\u{7f}日",
            "a\"b",
            "a\\b",
            "\u{1f}",
            "\n",
            "/",
        ] {
            let expected = serde_json::to_string(text).unwrap();
            assert_eq!(canonical_json(&json!(text)), expected);
            assert_eq!(
                canonical_json(&json!({text: 1})),
                format!("{{{expected}:1}}")
            );
        }
        let value = json!({"b": [1, 2.5, {"z": null, "a": "é\n"}], "a": 8e-6});
        assert_eq!(
            canonical_json(&value),
            r#"{"a":8e-6,"b":[1,2.5,{"a":"é\n","z":null}]}"#
        );
        assert_eq!(
            digest_json(&value),
            "f7ac8c2d11a4e91994e5ec1b9b3003cba09290c004e29b62a9a00a3c92b43d71"
        );
        let entries = value.as_object().unwrap().iter().rev();
        let entries = entries.map(|(key, value)| (key.as_str(), value)).collect();
        assert_eq!(digest_entries(entries), digest_json(&value));
        let list = [("é", 1, "x\n")];
        assert_eq!(digest_list(&list), digest_json(&json!(list)));
    }
}
