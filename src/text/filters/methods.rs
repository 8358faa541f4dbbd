//! The methods of Python's `str`, `list`, `dict` and numbers that jinja2's sandbox lets templates call. As in the sandbox, methods that
//! change a value are refused.

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, State, Value};

use super::arguments::{bind, integer, integer_or, required, text};
use super::characters::{
    capitalize, casefold, is_digit, is_identifier, is_space, is_title, lines, matches_class,
    swapcase, title,
};
use super::python::{self, fail, is_dict, is_list, is_printable, type_name};
use super::{containers, format, strip};

/// The largest width that a text is padded to.
const WIDEST: i64 = 10_000;

/// The methods that change a list or a dict.
pub(super) const CHANGES: [&str; 13] = [
    "append",
    "extend",
    "insert",
    "remove",
    "sort",
    "reverse",
    "clear",
    "pop",
    "popitem",
    "setdefault",
    "update",
    "add",
    "discard",
];

/// Calls a method that the template expects from a value of Python.
pub(super) fn method(
    state: &mut State,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let called = match value.kind() {
        ValueKind::String => string(state, value.as_str().unwrap_or_default(), name, args)?,
        ValueKind::Seq | ValueKind::Iterable => containers::list(state, value, name, args)?,
        ValueKind::Map if is_dict(value) => containers::dict(value, name, args)?,
        ValueKind::Number => containers::number(value, name, args)?,
        _ => None,
    };
    if let Some(called) = called {
        return Ok(called);
    }
    let container = is_dict(value) || is_list(value);
    if container
        && CHANGES.contains(&name)
        && value.get_attr(name).is_ok_and(|own| own.is_undefined())
    {
        return Err(fail(format!(
            "`{name}` would change a value, which the sandbox of chat templates does not allow"
        )));
    }
    Err(Error::new(
        ErrorKind::UnknownMethod,
        format!(
            "values of the type {} have no method `{name}` here",
            type_name(value)
        ),
    ))
}

/// The part of a text between two positions counted in characters, and the number of characters before it.
struct Window<'a> {
    text: &'a str,
    before: usize,
    /// Whether the start lies beyond the end of the text, where not even an empty string is found.
    beyond: bool,
}

impl<'a> Window<'a> {
    fn new(
        name: &str,
        whole: &'a str,
        start: Option<&Value>,
        end: Option<&Value>,
    ) -> Result<Self, Error> {
        let given = |value: Option<&Value>| {
            value
                .filter(|value| !value.is_none())
                .map(|value| integer(name, value))
        };
        let (start, end) = (given(start).transpose()?, given(end).transpose()?);
        if start.is_none() && end.is_none() {
            return Ok(Self {
                text: whole,
                before: 0,
                beyond: false,
            });
        }
        let count = whole.chars().count() as i64;
        let bound = |at: i64| {
            if at < 0 {
                (count + at).max(0)
            } else {
                at.min(count)
            }
        };
        let beyond = start.is_some_and(|start| start > count);
        let first = bound(start.unwrap_or(0));
        let last = bound(end.unwrap_or(count)).max(first);
        let byte = |at: i64| {
            whole
                .char_indices()
                .nth(at as usize)
                .map_or(whole.len(), |(byte, _)| byte)
        };
        Ok(Self {
            text: &whole[byte(first)..byte(last)],
            before: first as usize,
            beyond,
        })
    }

    /// Where a part stands, counted in characters of the whole text.
    fn find(&self, part: &str, last: bool) -> Option<usize> {
        if self.beyond {
            return None;
        }
        let at = if last {
            self.text.rfind(part)
        } else {
            self.text.find(part)
        };
        at.map(|at| self.before + self.text[..at].chars().count())
    }
}

fn string(
    state: &mut State,
    own: &str,
    name: &str,
    args: &[Value],
) -> Result<Option<Value>, Error> {
    let none = || bind::<0>(name, args, []);
    let check = |test: fn(char) -> bool| {
        none()?;
        Ok::<Value, Error>(Value::from(!own.is_empty() && own.chars().all(test)))
    };
    let cased = |wanted: fn(char) -> bool, unwanted: fn(char) -> bool| {
        none()?;
        Ok::<Value, Error>(Value::from(
            own.chars().any(wanted) && !own.chars().any(unwanted),
        ))
    };
    Ok(Some(match name {
        "strip" | "lstrip" | "rstrip" => {
            let [chars] = bind(name, args, [""])?;
            let chars = chars.filter(|chars| !chars.is_none());
            let chars = chars.as_ref().map(|chars| text(name, chars)).transpose()?;
            let strips = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
            Value::from(match name {
                "strip" => own.trim_matches(strips),
                "lstrip" => own.trim_start_matches(strips),
                _ => own.trim_end_matches(strips),
            })
        }
        "split" | "rsplit" => {
            let [separator, most] = bind(name, args, ["sep", "maxsplit"])?;
            let most = integer_or(name, most.as_ref(), -1)?;
            let most = usize::try_from(most).unwrap_or(usize::MAX);
            let parts = match separator.filter(|separator| !separator.is_none()) {
                Some(separator) => {
                    split_at(own, separator_of(name, &separator)?, most, name == "rsplit")
                }
                None if name == "split" => split_spaces(own, most),
                None => rsplit_spaces(own, most),
            };
            state.consume_fuel(parts.len() as u64)?;
            Value::from(parts)
        }
        "splitlines" => {
            let [keep] = bind(name, args, ["keepends"])?;
            let lines = lines(own, keep.is_some_and(|keep| keep.is_true()));
            state.consume_fuel(lines.len() as u64)?;
            lines.into_iter().map(Value::from).collect()
        }
        "partition" | "rpartition" => {
            let [separator] = bind(name, args, [""])?;
            let separator = required(name, separator)?;
            let separator = separator_of(name, &separator)?;
            let parts = if name == "partition" {
                own.split_once(separator)
                    .map_or((own, "", ""), |(a, b)| (a, separator, b))
            } else {
                own.rsplit_once(separator)
                    .map_or(("", "", own), |(a, b)| (a, separator, b))
            };
            Value::from((parts.0, parts.1, parts.2))
        }
        "startswith" | "endswith" => {
            let [parts, start, end] = bind(name, args, ["", "", ""])?;
            let parts = required(name, parts)?;
            let window = Window::new(name, own, start.as_ref(), end.as_ref())?;
            let is = |part: &str| {
                !window.beyond
                    && if name == "startswith" {
                        window.text.starts_with(part)
                    } else {
                        window.text.ends_with(part)
                    }
            };
            if parts.is_tuple() {
                let parts: Vec<Value> = parts.try_iter()?.collect();
                let mut found = false;
                for part in &parts {
                    found |= is(text(name, part)?);
                }
                Value::from(found)
            } else {
                Value::from(is(text(name, &parts)?))
            }
        }
        "find" | "rfind" | "index" | "rindex" => {
            let [part, start, end] = bind(name, args, ["", "", ""])?;
            let part = required(name, part)?;
            let window = Window::new(name, own, start.as_ref(), end.as_ref())?;
            let found = window.find(text(name, &part)?, name.starts_with('r'));
            match found {
                Some(index) => Value::from(index),
                None if name.ends_with("find") => Value::from(-1),
                None => return Err(fail(format!("`{name}` does not find the text"))),
            }
        }
        "count" => {
            let [part, start, end] = bind(name, args, ["", "", ""])?;
            let part = required(name, part)?;
            let window = Window::new(name, own, start.as_ref(), end.as_ref())?;
            let count = if window.beyond {
                0
            } else {
                window.text.matches(text(name, &part)?).count()
            };
            Value::from(count)
        }
        "replace" => {
            let [old, new, count] = bind(name, args, ["", "", "count"])?;
            let (old, new) = (required(name, old)?, required(name, new)?);
            let most = integer_or(name, count.as_ref(), -1)?;
            replace(state, own, text(name, &old)?, text(name, &new)?, most)?
        }
        "removeprefix" => {
            let [prefix] = bind(name, args, [""])?;
            let prefix = required(name, prefix)?;
            Value::from(own.strip_prefix(text(name, &prefix)?).unwrap_or(own))
        }
        "removesuffix" => {
            let [suffix] = bind(name, args, [""])?;
            let suffix = required(name, suffix)?;
            Value::from(own.strip_suffix(text(name, &suffix)?).unwrap_or(own))
        }
        "join" => {
            let [items] = bind(name, args, [""])?;
            join(state, own, &required(name, items)?)?
        }
        "format" => format::braces(state, own, args)?,
        "upper" | "lower" | "title" | "capitalize" | "swapcase" | "casefold" => {
            none()?;
            Value::from(match name {
                "upper" => own.to_uppercase(),
                "lower" => own.to_lowercase(),
                "title" => title(own),
                "capitalize" => capitalize(own),
                "swapcase" => swapcase(own),
                _ => casefold(own),
            })
        }
        "zfill" => {
            let [width] = bind(name, args, [""])?;
            let width = width_of(name, width)?;
            let digits = own.strip_prefix(['+', '-']).unwrap_or(own);
            let sign = &own[..own.len() - digits.len()];
            Value::from(format!("{sign}{}{digits}", fill(own, width, '0')))
        }
        "ljust" | "rjust" | "center" => {
            let [width, with] = bind(name, args, ["", ""])?;
            let width = width_of(name, width)?;
            let with = with
                .as_ref()
                .map(|with| text(name, with))
                .transpose()?
                .unwrap_or(" ");
            let mut with = with.chars();
            let (Some(with), None) = (with.next(), with.next()) else {
                return Err(fail(format!("`{name}` fills with one character")));
            };
            Value::from(justify(own, width, with, name))
        }
        "expandtabs" => {
            let [size] = bind(name, args, ["tabsize"])?;
            let size = integer_or(name, size.as_ref(), 8)?;
            if size > WIDEST {
                return Err(too_wide());
            }
            expand_tabs(state, own, size)?
        }
        "isspace" => check(is_space)?,
        "isalpha" => check(|c| matches_class(c, "alpha"))?,
        "isalnum" => check(|c| matches_class(c, "alpha") || matches_class(c, "numeric"))?,
        "isnumeric" => check(|c| matches_class(c, "numeric"))?,
        "isdecimal" => check(|c| matches_class(c, "decimal"))?,
        "isdigit" => check(is_digit)?,
        "isascii" => {
            none()?;
            Value::from(own.is_ascii())
        }
        "isprintable" => {
            none()?;
            Value::from(own.chars().all(is_printable))
        }
        "isidentifier" => {
            none()?;
            Value::from(is_identifier(own))
        }
        "islower" => cased(char::is_lowercase, char::is_uppercase)?,
        "isupper" => cased(char::is_uppercase, char::is_lowercase)?,
        "istitle" => {
            none()?;
            Value::from(is_title(own))
        }
        _ => return Ok(None),
    }))
}

fn separator_of<'a>(name: &str, separator: &'a Value) -> Result<&'a str, Error> {
    let separator = text(name, separator)?;
    if separator.is_empty() {
        return Err(fail(format!("the separator of `{name}` is empty")));
    }
    Ok(separator)
}

fn split_at(own: &str, separator: &str, most: usize, from_end: bool) -> Vec<Value> {
    let pieces = most.saturating_add(1);
    if from_end {
        let mut parts: Vec<Value> = own.rsplitn(pieces, separator).map(Value::from).collect();
        parts.reverse();
        parts
    } else {
        own.splitn(pieces, separator).map(Value::from).collect()
    }
}

/// The words of a text; what is left after `most` of them keeps its end.
fn split_spaces(own: &str, most: usize) -> Vec<Value> {
    let mut parts = Vec::new();
    let mut rest = own.trim_start_matches(is_space);
    while !rest.is_empty() {
        if parts.len() == most {
            parts.push(Value::from(rest));
            break;
        }
        let end = rest.find(is_space).unwrap_or(rest.len());
        parts.push(Value::from(&rest[..end]));
        rest = rest[end..].trim_start_matches(is_space);
    }
    parts
}

fn rsplit_spaces(own: &str, most: usize) -> Vec<Value> {
    let mut parts = Vec::new();
    let mut rest = own.trim_end_matches(is_space);
    while !rest.is_empty() {
        if parts.len() == most {
            parts.push(Value::from(rest));
            break;
        }
        let start = rest.char_indices().rev().find(|(_, c)| is_space(*c));
        let start = start.map_or(0, |(at, c)| at + c.len_utf8());
        parts.push(Value::from(&rest[start..]));
        rest = rest[..start].trim_end_matches(is_space);
    }
    parts.reverse();
    parts
}

/// Python's `str.replace`; a count below 0 means all.
pub(super) fn replace(
    state: &State,
    own: &str,
    old: &str,
    new: &str,
    most: i64,
) -> Result<Value, Error> {
    let places = own.matches(old).count();
    let places = usize::try_from(most).map_or(places, |most| most.min(places));
    let size = (own.len() as u64).saturating_add((places as u64).saturating_mul(new.len() as u64));
    state.consume_fuel(size / 64)?;
    Ok(Value::from(own.replacen(old, new, places)))
}

/// Python's `str.join`. Fuel is paid for the result, which can be exponentially long (see [`super::python::Printer`]).
fn join(state: &State, separator: &str, items: &Value) -> Result<Value, Error> {
    let mut printer = python::Printer::new(state);
    for (index, item) in items.try_iter()?.checked().enumerate() {
        let item = item?;
        if item.kind() != ValueKind::String && !item.is_undefined() {
            return Err(fail(format!(
                "`join` takes texts, and item {index} is of the type {}; the filter `| join` takes anything",
                type_name(&item)
            )));
        }
        if item.is_undefined() {
            return Err(fail(format!(
                "`join` takes texts, and item {index} is undefined"
            )));
        }
        if index > 0 {
            printer.text.push_str(separator);
        }
        printer.text.push_str(item.as_str().unwrap_or_default());
        printer.pay()?;
    }
    Ok(Value::from(printer.text))
}

fn too_wide() -> Error {
    fail(format!("a width above {WIDEST} is not supported"))
}

fn width_of(name: &str, width: Option<Value>) -> Result<usize, Error> {
    let width = integer(name, &required(name, width)?)?;
    if width > WIDEST {
        return Err(too_wide());
    }
    Ok(width.max(0) as usize)
}

/// The padding that makes `own` `width` characters wide.
fn fill(own: &str, width: usize, with: char) -> String {
    let missing = width.saturating_sub(own.chars().count());
    std::iter::repeat_n(with, missing).collect()
}

fn justify(own: &str, width: usize, with: char, how: &str) -> String {
    let filled = fill(own, width, with);
    let count = filled.chars().count();
    // As in Python, an odd place goes to the left only when the width is odd, too.
    let left = match how {
        "ljust" => 0,
        "rjust" => count,
        _ => count / 2 + (count & width & 1),
    };
    let split = filled
        .char_indices()
        .nth(left)
        .map_or(filled.len(), |(offset, _)| offset);
    let (before, after) = filled.split_at(split);
    format!("{before}{own}{after}")
}

/// jinja2's filter `center`.
pub(super) fn center(own: &str, width: i64) -> Result<Value, Error> {
    if width > WIDEST {
        return Err(too_wide());
    }
    Ok(Value::from(justify(
        own,
        width.max(0) as usize,
        ' ',
        "center",
    )))
}

fn expand_tabs(state: &State, own: &str, size: i64) -> Result<Value, Error> {
    let size = size.max(0) as usize;
    state.consume_fuel((own.matches('\t').count() * size / 64) as u64)?;
    let mut out = String::new();
    let mut column = 0;
    for c in own.chars() {
        match c {
            '\t' => {
                let missing = if size == 0 { 0 } else { size - column % size };
                out.extend(std::iter::repeat_n(' ', missing));
                column += missing;
            }
            '\n' | '\r' => {
                out.push(c);
                column = 0;
            }
            c => {
                out.push(c);
                column += 1;
            }
        }
    }
    Ok(Value::from(out))
}

/// Jinja's `trim`, which is Python's `str.strip`.
pub(super) fn trim(state: &State, value: &Value, args: &[Value]) -> Result<Value, Error> {
    let [chars] = bind("trim", args, ["chars"])?;
    let chars = chars.filter(|chars| !chars.is_none());
    if let (Some(own), None) = (value.as_str(), &chars) {
        let stripped = strip(own);
        // Most texts have nothing to lose, and long ones are not copied for it.
        return Ok(if stripped.len() == own.len() {
            value.clone()
        } else {
            Value::from(stripped)
        });
    }
    let own = python::text(state, value)?;
    Ok(Value::from(match &chars {
        Some(chars) => {
            let chars = text("trim", chars)?;
            own.trim_matches(|c| chars.contains(c))
        }
        None => strip(&own),
    }))
}
