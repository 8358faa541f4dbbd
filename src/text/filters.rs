//! What Python does and minijinja doesn't: `json.dumps`, and the methods of `str` with Python's idea of white space.

use std::fmt::Write as _;

use minijinja::value::{Kwargs, Rest, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

/// Python's `str.isspace`: Unicode white space and the four separators of ASCII.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// Python's `str.strip()`.
pub(super) fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

/// Jinja's `trim`, which is Python's `str.strip`.
pub(super) fn trim(value: &Value, chars: Option<String>) -> Value {
    if let (Some(text), None) = (value.as_str(), &chars) {
        let stripped = strip(text);
        // Most texts have nothing to lose, and long ones are not copied for it.
        return if stripped.len() == text.len() {
            value.clone()
        } else {
            Value::from(stripped)
        };
    }
    let text = value.to_string();
    Value::from(match chars {
        Some(chars) => text.trim_matches(|c| chars.contains(c)),
        None => strip(&text),
    })
}

/// Calls a method that the template expects from Python's `str`, `list` or `dict`.
pub(super) fn method(
    state: &mut State,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    if let (ValueKind::String, Some(text)) = (value.kind(), value.as_str()) {
        match name {
            "join" => return join(state, text, args),
            "format" => widths(text)?,
            _ => {}
        }
        if let Some(result) = string_method(text, name, args)? {
            return Ok(result);
        }
    }
    unknown_method_callback(state, value, name, args)
}

/// Python's `str.join`. What is joined may be a list of lists, each of which holds the next one twice.
fn join(state: &State, separator: &str, args: &[Value]) -> Result<Value, Error> {
    let (values,): (&Value,) = from_args(args)?;
    let mut paid = Paid {
        text: String::new(),
        unpaid: 0,
        pay: &|fuel| state.consume_fuel(fuel),
    };
    for (place, value) in values.try_iter()?.checked().enumerate() {
        let value = value?;
        let between = if place > 0 { separator } else { "" };
        write!(paid, "{between}{value}").map_err(|_| Error::from(ErrorKind::OutOfFuel))?;
    }
    Ok(Value::from(paid.text))
}

/// A text in the making that costs fuel as it grows, and not once it is there.
struct Paid<'a> {
    text: String,
    unpaid: usize,
    pay: Pay<'a>,
}

/// Takes fuel, as long as there is any.
type Pay<'a> = &'a dyn Fn(u64) -> Result<(), Error>;

impl std::fmt::Write for Paid<'_> {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        self.unpaid += text.len();
        if self.unpaid >= PIECE {
            let fuel = self.unpaid / BYTES_A_STEP;
            self.unpaid = 0;
            (self.pay)(fuel as u64).map_err(|_| std::fmt::Error)?;
        }
        self.text.push_str(text);
        Ok(())
    }
}

/// Bytes that cost a step, as in the template engine.
const BYTES_A_STEP: usize = 64;
/// The same for text that is made by walking through a value.
const BYTES_OF_JSON_A_STEP: usize = 4;
/// Bytes that are paid at once.
const PIECE: usize = 4096;

/// Refuses widths and precisions in a format that nobody means: `"{:1000000000}"`.
fn widths(format: &str) -> Result<(), Error> {
    let mut digits = 0;
    for part in format.split('{').skip(1) {
        let spec = part.split('}').next().unwrap_or_default();
        for byte in spec.bytes() {
            digits = if byte.is_ascii_digit() { digits + 1 } else { 0 };
            if digits > 4 {
                return Err(too_wide());
            }
        }
        digits = 0;
    }
    Ok(())
}

fn too_wide() -> Error {
    Error::new(
        ErrorKind::InvalidOperation,
        "a width above 10000 is not supported",
    )
}

fn string_method(text: &str, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let no_chars = args.first().is_none_or(Value::is_none);
    Ok(Some(match name {
        "strip" if no_chars => Value::from(strip(text)),
        "lstrip" if no_chars => Value::from(text.trim_start_matches(is_space)),
        "rstrip" if no_chars => Value::from(text.trim_end_matches(is_space)),
        "isspace" => Value::from(!text.is_empty() && text.chars().all(is_space)),
        "split" if args.is_empty() => text
            .split(is_space)
            .filter(|word| !word.is_empty())
            .map(Value::from)
            .collect(),
        "rsplit" => {
            let (separator, most): (&str, Option<usize>) = from_args(args)?;
            non_empty(separator)?;
            let most = most.map_or(usize::MAX, |most| most.saturating_add(1));
            let mut parts: Vec<_> = text.rsplitn(most, separator).map(Value::from).collect();
            parts.reverse();
            Value::from(parts)
        }
        "partition" => {
            let (separator,): (&str,) = from_args(args)?;
            non_empty(separator)?;
            let (before, found, after) = match text.split_once(separator) {
                Some((before, after)) => (before, separator, after),
                None => (text, "", ""),
            };
            Value::from(vec![
                Value::from(before),
                Value::from(found),
                Value::from(after),
            ])
        }
        "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            non_empty(separator)?;
            let (before, found, after) = match text.rsplit_once(separator) {
                Some((before, after)) => (before, separator, after),
                None => ("", "", text),
            };
            Value::from(vec![
                Value::from(before),
                Value::from(found),
                Value::from(after),
            ])
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "title" => Value::from(title(text)),
        "index" => {
            let (part,): (&str,) = from_args(args)?;
            let place = text
                .find(part)
                .ok_or_else(|| Error::new(ErrorKind::InvalidOperation, "substring not found"))?;
            Value::from(text[..place].chars().count())
        }
        "swapcase" => {
            let swap = |c: char| -> String {
                if c.is_lowercase() {
                    c.to_uppercase().collect()
                } else {
                    c.to_lowercase().collect()
                }
            };
            Value::from(text.chars().map(swap).collect::<String>())
        }
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
            let sign = &text[..text.len() - digits.len()];
            Value::from(format!("{sign}{}{digits}", fill(text, width, '0')?))
        }
        "ljust" | "rjust" | "center" => {
            let (width, with): (usize, Option<char>) = from_args(args)?;
            let filled = fill(text, width, with.unwrap_or(' '))?;
            let count = filled.chars().count();
            // As in Python, an odd place goes to the left only when the width is odd, too.
            let left = match name {
                "ljust" => 0,
                "rjust" => count,
                _ => count / 2 + (count & width & 1),
            };
            let split = filled
                .char_indices()
                .nth(left)
                .map_or(filled.len(), |(place, _)| place);
            let (before, after) = filled.split_at(split);
            Value::from(format!("{before}{text}{after}"))
        }
        "casefold" => Value::from(text.to_lowercase()),
        _ => return Ok(None),
    }))
}

/// What is missing for `text` to be `width` characters wide.
fn fill(text: &str, width: usize, with: char) -> Result<String, Error> {
    if width > 10_000 {
        return Err(too_wide());
    }
    let missing = width.saturating_sub(text.chars().count());
    Ok(std::iter::repeat_n(with, missing).collect())
}

fn non_empty(separator: &str) -> Result<(), Error> {
    if separator.is_empty() {
        return Err(Error::new(ErrorKind::InvalidOperation, "empty separator"));
    }
    Ok(())
}

/// Python's `str.title()`: every letter after a non-letter is a capital.
fn title(text: &str) -> String {
    let mut output = String::with_capacity(text.len());
    let mut inside = false;
    for c in text.chars() {
        if inside {
            output.extend(c.to_lowercase());
        } else {
            output.extend(c.to_uppercase());
        }
        inside = c.is_alphabetic();
    }
    output
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=.., separators=.., sort_keys=..)`, as transformers gives it to
/// templates: no HTML escapes, `", "` and `": "` unless told otherwise.
#[expect(
    clippy::needless_pass_by_value,
    reason = "minijinja asks for this shape"
)]
pub(super) fn tojson(
    state: &State,
    value: &Value,
    args: Rest<Value>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    // The parameters in transformers' order; a template may pass them by place.
    let by_place = |place: usize, name: &str| -> Result<Option<Value>, Error> {
        match args.get(place) {
            Some(value) => Ok(Some(value.clone())),
            None => kwargs.get::<Option<Value>>(name),
        }
    };
    let ensure_ascii = by_place(0, "ensure_ascii")?.is_some_and(|value| value.is_true());
    let indent = match by_place(1, "indent")?.filter(|value| !value.is_none()) {
        None => None,
        Some(value) => match (value.as_str(), usize::try_from(value.clone())) {
            (Some(text), _) => Some(text.to_owned()),
            (None, Ok(width)) if width <= 1000 => Some(" ".repeat(width)),
            _ => {
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    "`indent` must be a number or text",
                ));
            }
        },
    };
    let separators = by_place(2, "separators")?.filter(|value| !value.is_none());
    let (item, key) = match separators {
        Some(pair) => {
            let part = |place: usize| -> Result<String, Error> {
                let part = pair.get_item_by_index(place)?;
                part.as_str().map(str::to_owned).ok_or_else(|| {
                    Error::new(
                        ErrorKind::InvalidOperation,
                        "`separators` must be two texts",
                    )
                })
            };
            (part(0)?, part(1)?)
        }
        None => (
            (if indent.is_some() { "," } else { ", " }).to_owned(),
            ": ".to_owned(),
        ),
    };
    let sort_keys = by_place(3, "sort_keys")?.is_some_and(|value| value.is_true());
    kwargs.assert_all_used()?;
    let mut json = Json {
        pay: &|fuel| state.consume_fuel(fuel),
        paid: 0,
        output: String::new(),
        indent,
        item,
        key,
        sort_keys,
        ensure_ascii,
    };
    json.value(value, 0)?;
    Ok(Value::from(json.output))
}

/// A JSON text in the making.
struct Json<'a> {
    pay: Pay<'a>,
    /// How much of the output has cost fuel.
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
            return Err(Error::new(ErrorKind::InvalidOperation, "too deep for JSON"));
        }
        let unpaid = self.output.len() - self.paid;
        if unpaid >= PIECE {
            self.paid = self.output.len();
            (self.pay)((unpaid / BYTES_OF_JSON_A_STEP) as u64)?;
        }
        match value.kind() {
            ValueKind::None => self.output.push_str("null"),
            ValueKind::Bool => self
                .output
                .push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.output.push_str(&number(value)),
            ValueKind::String => self.text(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.output.push('[');
                for (place, item) in items.iter().enumerate() {
                    self.start(place, depth + 1);
                    self.value(item, depth + 1)?;
                }
                self.end(items.is_empty(), depth);
                self.output.push(']');
            }
            ValueKind::Map => {
                let mut entries = Vec::new();
                for key in value.try_iter()? {
                    let entry = value.get_item(&key)?;
                    entries.push((key_text(&key)?, entry));
                }
                if self.sort_keys {
                    entries.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.output.push('{');
                for (place, (key, entry)) in entries.iter().enumerate() {
                    self.start(place, depth + 1);
                    self.text(key);
                    self.output.push_str(&self.key);
                    self.value(entry, depth + 1)?;
                }
                self.end(entries.is_empty(), depth);
                self.output.push('}');
            }
            kind => {
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    format!("a value of type {kind} can't be written as JSON"),
                ));
            }
        }
        Ok(())
    }

    fn start(&mut self, place: usize, depth: usize) {
        if place > 0 {
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
                c if c < ' ' || (self.ensure_ascii && !c.is_ascii()) => {
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

fn key_text(key: &Value) -> Result<String, Error> {
    Ok(match key.kind() {
        ValueKind::String => key.as_str().unwrap_or_default().to_owned(),
        ValueKind::None => "null".to_owned(),
        ValueKind::Bool => (if key.is_true() { "true" } else { "false" }).to_owned(),
        ValueKind::Number => number(key),
        kind => {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                format!("a key of type {kind} can't be written as JSON"),
            ));
        }
    })
}

/// Python's `repr` of a number.
fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let Ok(number) = f64::try_from(value.clone()) else {
        return value.to_string();
    };
    if number.is_nan() {
        return "NaN".to_owned();
    }
    if number.is_infinite() {
        return (if number > 0.0 {
            "Infinity"
        } else {
            "-Infinity"
        })
        .to_owned();
    }
    // Rust switches to exponents at the same sizes, but writes 1e16 for 1e+16 and 1e-5 for 1e-05.
    let text = format!("{number:?}");
    match text.split_once('e') {
        None => text,
        Some((digits, exponent)) => {
            let (sign, exponent) = exponent
                .strip_prefix('-')
                .map_or(('+', exponent), |rest| ('-', rest));
            format!("{digits}e{sign}{exponent:0>2}")
        }
    }
}
