//! `tojson`, which is Python's `json.dumps` in transformers' environment.

use std::fmt::Write as _;

use minijinja::value::ValueKind;
use minijinja::{Error, State, Value};

use super::arguments::{bind, flag};
use super::python::{self, fail, is_namespace, number, type_name};
use super::values::{Range, View};

/// The number of bytes of output that cost one step of fuel.
const BYTES_A_STEP: usize = 4;
/// Fuel is paid in pieces of this many bytes.
const PIECE: usize = 4096;

/// Python's `json.dumps(value, ensure_ascii=False, indent=.., separators=.., sort_keys=..)`, as transformers gives it to
/// templates: no HTML escapes, `", "` and `": "` unless told otherwise.
pub(super) fn tojson(state: &State, value: &Value, args: &[Value]) -> Result<Value, Error> {
    // The parameters in transformers' order; a template may pass them by place.
    let names = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let [ensure_ascii, indent, separators, sort_keys] = bind("tojson", args, names)?;
    let given = |value: Option<Value>| value.filter(|value| !value.is_none());
    let indent = match given(indent) {
        None => None,
        Some(value) => match (value.as_str(), value.as_i64()) {
            (Some(text), _) => Some(text.to_owned()),
            (None, _) if value.kind() == ValueKind::Bool => {
                Some(" ".repeat(usize::from(value.is_true())))
            }
            (None, Some(width)) if width <= 1000 => Some(" ".repeat(width.max(0) as usize)),
            _ => return Err(fail("`indent` must be a number up to 1000 or text")),
        },
    };
    let (item, key) = match given(separators) {
        Some(pair) => {
            let part = |index: usize| -> Result<String, Error> {
                let part = pair.get_item_by_index(index)?;
                let text = part.as_str().filter(|_| pair.len() == Some(2));
                text.map(str::to_owned)
                    .ok_or_else(|| fail("`separators` must be two texts"))
            };
            (part(0)?, part(1)?)
        }
        None => (
            (if indent.is_some() { "," } else { ", " }).to_owned(),
            ": ".to_owned(),
        ),
    };
    let mut json = Json {
        state,
        paid: 0,
        output: String::new(),
        indent,
        item,
        key,
        sort_keys: flag(sort_keys.as_ref()),
        ensure_ascii: flag(ensure_ascii.as_ref()),
    };
    json.value(value, 0)?;
    Ok(Value::from(json.output))
}

/// A JSON text that is being written.
struct Json<'a> {
    state: &'a State<'a, 'a>,
    /// The number of bytes of the output that are already paid for.
    paid: usize,
    output: String,
    indent: Option<String>,
    item: String,
    key: String,
    sort_keys: bool,
    ensure_ascii: bool,
}

impl Json<'_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > 200 {
            return Err(fail("too deep for JSON"));
        }
        let unpaid = self.output.len() - self.paid;
        if unpaid >= PIECE {
            self.paid = self.output.len();
            self.state.consume_fuel((unpaid / BYTES_A_STEP) as u64)?;
        }
        match value.kind() {
            ValueKind::None => self.output.push_str("null"),
            ValueKind::Bool => self
                .output
                .push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.output.push_str(&json_number(value)),
            ValueKind::String => self.text(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable if !is_iterator(value) => {
                self.output.push('[');
                let mut empty = true;
                for (index, item) in value.try_iter()?.checked().enumerate() {
                    self.start(index, depth + 1);
                    self.value(&item?, depth + 1)?;
                    empty = false;
                }
                self.end(empty, depth);
                self.output.push(']');
            }
            ValueKind::Map if !is_namespace(value) => self.map(value, depth)?,
            _ => {
                return Err(fail(format!(
                    "a value of the type {} can't be written as JSON",
                    type_name(value)
                )));
            }
        }
        Ok(())
    }

    fn map(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let mut keys: Vec<Value> = value.try_iter()?.collect();
        if self.sort_keys {
            python::comparable(&keys)?;
            keys.sort();
        }
        self.output.push('{');
        for (index, key) in keys.iter().enumerate() {
            self.start(index, depth + 1);
            self.text(&key_text(key)?);
            self.output.push_str(&self.key);
            self.value(&value.get_item(key)?, depth + 1)?;
        }
        self.end(keys.is_empty(), depth);
        self.output.push('}');
        Ok(())
    }

    fn start(&mut self, index: usize, depth: usize) {
        if index > 0 {
            self.output.push_str(&self.item);
        }
        self.line(depth);
    }

    fn end(&mut self, empty: bool, depth: usize) {
        if !empty {
            self.line(depth);
        }
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.output.push('\n');
            for _ in 0..depth {
                self.output.push_str(indent);
            }
        }
    }

    fn text(&mut self, text: &str) {
        self.output.push('"');
        for c in text.chars() {
            match c {
                '"' => self.output.push_str("\\\""),
                '\\' => self.output.push_str("\\\\"),
                '\n' => self.output.push_str("\\n"),
                '\r' => self.output.push_str("\\r"),
                '\t' => self.output.push_str("\\t"),
                '\u{8}' => self.output.push_str("\\b"),
                '\u{c}' => self.output.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && (!c.is_ascii() || c == '\u{7f}')) => {
                    let mut units = [0; 2];
                    for unit in c.encode_utf16(&mut units) {
                        // Writing to a string never fails.
                        let _ = write!(self.output, "\\u{unit:04x}");
                    }
                }
                c => self.output.push(c),
            }
        }
        self.output.push('"');
    }
}

/// Whether a value is one of Python's that is no list.
fn is_iterator(value: &Value) -> bool {
    value.downcast_object_ref::<Range>().is_some() || value.downcast_object_ref::<View>().is_some()
}

/// A number as `json` writes it.
fn json_number(value: &Value) -> String {
    match number(value).as_str() {
        "nan" => "NaN".to_owned(),
        "inf" => "Infinity".to_owned(),
        "-inf" => "-Infinity".to_owned(),
        text => text.to_owned(),
    }
}

fn key_text(key: &Value) -> Result<String, Error> {
    Ok(match key.kind() {
        ValueKind::String => key.as_str().unwrap_or_default().to_owned(),
        ValueKind::None => "null".to_owned(),
        ValueKind::Bool => (if key.is_true() { "true" } else { "false" }).to_owned(),
        ValueKind::Number => json_number(key),
        _ => {
            return Err(fail(format!(
                "a key of the type {} can't be written as JSON",
                type_name(key)
            )));
        }
    })
}
