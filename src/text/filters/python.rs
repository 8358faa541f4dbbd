//! Values as Python prints and orders them. Its entries are [`text`] (`str`), [`repr`] and [`compare`].

use std::cmp::Ordering;
use std::fmt::Write as _;

use minijinja::value::{ObjectRepr, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

use super::values::{BoundMethod, Range, View};

/// The number of bytes of output that cost one step of fuel, as in the template engine.
const BYTES_A_STEP: usize = 4;
/// Fuel is paid in pieces of this many bytes.
const PIECE: usize = 4096;
/// The deepest value that is printed.
const DEEPEST: usize = 200;

/// An error for an operation that fails in Python too.
pub(super) fn fail(text: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, text.into())
}

/// Python's `str(value)`; nothing for an undefined one.
pub(super) fn text(state: &State, value: &Value) -> Result<String, Error> {
    let mut printer = Printer::new(state);
    printer.value(value, false, 0)?;
    Ok(printer.text)
}

/// Python's `repr(value)`.
pub(super) fn repr(state: &State, value: &Value) -> Result<String, Error> {
    let mut printer = Printer::new(state);
    printer.value(value, true, 0)?;
    Ok(printer.text)
}

/// Writes a text and pays fuel for it as it grows. Without that a small value could print as a text of exponential length: a list
/// of lists, each of which contains the next one twice.
pub(super) struct Printer<'a> {
    state: &'a State<'a, 'a>,
    pub(super) text: String,
    paid: usize,
}

impl<'a> Printer<'a> {
    pub(super) fn new(state: &'a State) -> Self {
        Self {
            state,
            text: String::new(),
            paid: 0,
        }
    }

    /// Pays fuel for what was written since the last payment.
    pub(super) fn pay(&mut self) -> Result<(), Error> {
        let unpaid = self.text.len() - self.paid;
        if unpaid >= PIECE {
            self.paid = self.text.len();
            self.state.consume_fuel((unpaid / BYTES_A_STEP) as u64)?;
        }
        Ok(())
    }

    /// Writes a text that is already paid for.
    pub(super) fn free(&mut self, text: &str) {
        self.text.push_str(text);
        self.paid += text.len();
    }

    /// Writes a value, texts in quotes if `quoted`.
    pub(super) fn value(&mut self, value: &Value, quoted: bool, depth: usize) -> Result<(), Error> {
        if depth > DEEPEST {
            return Err(fail("the value is nested too deeply to be printed"));
        }
        self.pay()?;
        match value.kind() {
            ValueKind::Undefined if quoted => self.text.push_str("Undefined"),
            ValueKind::Undefined => {}
            ValueKind::None => self.text.push_str("None"),
            ValueKind::Bool => {
                let text = if value.is_true() { "True" } else { "False" };
                self.text.push_str(text);
            }
            ValueKind::Number => self.text.push_str(&number(value)),
            ValueKind::String => {
                let text = value.as_str().unwrap_or_default();
                if quoted {
                    quote(&mut self.text, text);
                } else {
                    self.text.push_str(text);
                }
            }
            ValueKind::Seq | ValueKind::Iterable => self.list(value, depth)?,
            ValueKind::Map => self.map(value, depth)?,
            _ => self.other(value)?,
        }
        Ok(())
    }

    fn list(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if let Some(range) = value.downcast_object_ref::<Range>() {
            self.text.push_str(&range.to_string());
            return Ok(());
        }
        let view = value.downcast_object_ref::<View>();
        if let Some(view) = view {
            self.text.push_str(view.name());
            self.text.push('(');
        }
        let tuple = is_tuple(value);
        self.text.push(if tuple { '(' } else { '[' });
        let mut count = 0;
        for item in value.try_iter()?.checked() {
            if count > 0 {
                self.text.push_str(", ");
            }
            self.value(&item?, true, depth + 1)?;
            count += 1;
        }
        if tuple && count == 1 {
            self.text.push(',');
        }
        self.text.push(if tuple { ')' } else { ']' });
        if view.is_some() {
            self.text.push(')');
        }
        Ok(())
    }

    fn map(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if is_own(value, "::Loop") {
            let part = |name| value.get_attr(name).map(|part| number(&part));
            let (index, length) = (part("index")?, part("length")?);
            let _ = write!(self.text, "<LoopContext {index}/{length}>");
            return Ok(());
        }
        if is_own(value, "::Macro") {
            self.text.push_str("<Macro ");
            self.value(&value.get_attr("name")?, true, depth + 1)?;
            self.text.push('>');
            return Ok(());
        }
        let namespace = is_namespace(value);
        self.text
            .push_str(if namespace { "<Namespace {" } else { "{" });
        for (index, key) in value.try_iter()?.checked().enumerate() {
            let key = key?;
            if index > 0 {
                self.text.push_str(", ");
            }
            self.value(&key, true, depth + 1)?;
            self.text.push_str(": ");
            self.value(&value.get_item(&key)?, true, depth + 1)?;
        }
        self.text.push_str(if namespace { "}>" } else { "}" });
        Ok(())
    }

    fn other(&mut self, value: &Value) -> Result<(), Error> {
        if let Some(method) = value.downcast_object_ref::<BoundMethod>() {
            return Err(fail(format!(
                "`{0}` is a method of values of the type {1}, and jinja2 prints where it lies in memory; hint: `{0}()` calls it, and \
                 `['{0}']` finds an entry of that name",
                method.name,
                type_name(&method.value)
            )));
        }
        match value.as_bytes() {
            Some(bytes) => {
                self.text.push_str("b'");
                for byte in bytes {
                    let _ = match byte {
                        b'\'' => write!(self.text, "\\'"),
                        b'\\' => write!(self.text, "\\\\"),
                        b'\n' => write!(self.text, "\\n"),
                        b'\r' => write!(self.text, "\\r"),
                        b'\t' => write!(self.text, "\\t"),
                        b' '..=b'~' => write!(self.text, "{}", char::from(*byte)),
                        byte => write!(self.text, "\\x{byte:02x}"),
                    };
                }
                self.text.push('\'');
            }
            None => {
                let _ = write!(self.text, "{value}");
            }
        }
        Ok(())
    }
}

/// Whether a value is one of the engine's own objects, by the name of its type.
fn is_own(value: &Value, name: &str) -> bool {
    let object = value.as_object();
    object.is_some_and(|object| {
        let own = object.type_name();
        own.ends_with(name) && own.starts_with("minijinja::")
    })
}

/// Whether a value was made by `namespace(..)`, which is a map in the engine but not in Python.
pub(super) fn is_namespace(value: &Value) -> bool {
    is_own(value, "::Namespace")
}

/// Whether a value is Python's `dict`.
pub(super) fn is_dict(value: &Value) -> bool {
    value.kind() == ValueKind::Map
        && !["::Namespace", "::Loop", "::Macro"]
            .iter()
            .any(|name| is_own(value, name))
}

/// Whether a value is a Python list: a literal, a slice of a list, or a concatenation of lists.
pub(super) fn is_list(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable)
        && !is_tuple(value)
        && value.downcast_object_ref::<Range>().is_none()
        && value.downcast_object_ref::<View>().is_none()
}

/// Whether a value is a tuple, a group of `groupby` included.
pub(super) fn is_tuple(value: &Value) -> bool {
    value.is_tuple() || is_own(value, "::GroupTuple")
}

/// Whether a value can be called.
pub(super) fn is_callable(value: &Value) -> bool {
    let object = value.as_object();
    // An undefined value counts as callable in jinja2; calling it raises an error that says it is undefined.
    value.is_undefined()
        || ["::Macro", "::Loop"].iter().any(|name| is_own(value, name))
        || object.is_some_and(|object| object.repr() == ObjectRepr::Plain)
}

/// What Python calls a value's type.
pub(super) fn type_name(value: &Value) -> &'static str {
    match value.kind() {
        ValueKind::Undefined => "Undefined",
        ValueKind::None => "NoneType",
        ValueKind::Bool => "bool",
        ValueKind::Number if value.is_integer() => "int",
        ValueKind::Number => "float",
        ValueKind::String => "str",
        ValueKind::Bytes => "bytes",
        ValueKind::Seq | ValueKind::Iterable if is_tuple(value) => "tuple",
        ValueKind::Seq | ValueKind::Iterable => match value.downcast_object_ref::<View>() {
            Some(view) => view.name(),
            None if value.downcast_object_ref::<Range>().is_some() => "range",
            None => "list",
        },
        ValueKind::Map if is_namespace(value) => "namespace",
        ValueKind::Map => "dict",
        _ => "function",
    }
}

/// Whether a value is a float in Python's eyes.
pub(super) fn is_float(value: &Value) -> bool {
    value.kind() == ValueKind::Number && !value.is_integer()
}

/// Python's `repr` of a number.
pub(super) fn number(value: &Value) -> String {
    if value.kind() != ValueKind::Number || !is_float(value) {
        return value.to_string();
    }
    match f64::try_from(value.clone()) {
        Ok(number) => float(number),
        Err(_) => value.to_string(),
    }
}

/// Python's `repr` of a float.
pub(super) fn float(number: f64) -> String {
    if number.is_nan() {
        return "nan".to_owned();
    }
    if number.is_infinite() {
        return (if number > 0.0 { "inf" } else { "-inf" }).to_owned();
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

/// Python's `repr` of a text.
fn quote(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    out.push(quote);
    for c in text.chars() {
        let _ = match c {
            '\\' => write!(out, "\\\\"),
            '\n' => write!(out, "\\n"),
            '\r' => write!(out, "\\r"),
            '\t' => write!(out, "\\t"),
            c if c == quote => write!(out, "\\{c}"),
            ' '..='~' => write!(out, "{c}"),
            c if is_printable(c) => write!(out, "{c}"),
            c if u32::from(c) < 0x100 => write!(out, "\\x{:02x}", u32::from(c)),
            c if u32::from(c) < 0x1_0000 => write!(out, "\\u{:04x}", u32::from(c)),
            c => write!(out, "\\U{:08x}", u32::from(c)),
        };
    }
    out.push(quote);
}

/// Python's `str.isprintable` of a character: not a separator, a control character or one that is not assigned.
pub(super) fn is_printable(c: char) -> bool {
    if c.is_ascii() {
        return (' '..='~').contains(&c);
    }
    // The standard library escapes the same ones; behind a first character marks stay as they are.
    let mut text = ['a'; 2];
    text[1] = c;
    text.iter().collect::<String>().escape_debug().count() == 2
}

/// How Python orders two values, or an error where it doesn't.
pub(super) fn compare(a: &Value, b: &Value) -> Result<Ordering, Error> {
    let rank = |value: &Value| match value.kind() {
        ValueKind::Bool | ValueKind::Number => 1,
        ValueKind::String => 2,
        ValueKind::Seq | ValueKind::Iterable if is_tuple(value) => 3,
        ValueKind::Seq | ValueKind::Iterable if is_list(value) => 4,
        _ => 0,
    };
    if rank(a) == 0 || rank(a) != rank(b) {
        return Err(fail(format!(
            "Python can't order values of the types {} and {}",
            type_name(a),
            type_name(b)
        )));
    }
    Ok(a.cmp(b))
}

/// Refuses values that Python can't sort.
pub(super) fn comparable<'a>(values: impl IntoIterator<Item = &'a Value>) -> Result<(), Error> {
    let mut values = values.into_iter();
    let Some(mut before) = values.next() else {
        return Ok(());
    };
    for value in values {
        compare(before, value)?;
        before = value;
    }
    Ok(())
}
