//! jinja2's filters of texts.

use std::fmt::Write as _;

use minijinja::value::{Kwargs, Rest, Tuple, ValueKind, from_args};
use minijinja::{Environment, Error, State, Value};

use super::add;
use super::arguments::{bind, flag, integer_or, text};
use super::characters::{capitalize, is_space, lines, title_words};
use super::python::{self, fail, is_dict, type_name};
use super::{format, methods};

pub(super) fn install(environment: &mut Environment<'static>) {
    add(environment, "string", |state, value, args| {
        bind::<0>("string", args, [])?;
        match value.kind() {
            ValueKind::String => Ok(value.clone()),
            _ => python::text(state, value).map(Value::from),
        }
    });
    add(environment, "lower", |state, value, args| {
        changed(state, value, args, "lower", str::to_lowercase)
    });
    add(environment, "upper", |state, value, args| {
        changed(state, value, args, "upper", str::to_uppercase)
    });
    add(environment, "title", |state, value, args| {
        changed(state, value, args, "title", title_words)
    });
    add(environment, "capitalize", |state, value, args| {
        changed(state, value, args, "capitalize", capitalize)
    });
    add(environment, "escape", |state, value, args| {
        escape(state, value, args, false)
    });
    add(environment, "e", |state, value, args| {
        escape(state, value, args, false)
    });
    add(environment, "safe", |state, value, args| {
        bind::<0>("safe", args, [])?;
        Ok(Value::from_safe_string(python::text(state, value)?))
    });
    add(environment, "forceescape", |state, value, args| {
        escape(state, value, args, true)
    });
    add(environment, "striptags", |state, value, args| {
        changed(state, value, args, "striptags", strip_tags)
    });
    add(environment, "format", formatted);
    add(environment, "replace", replace);
    add(environment, "center", center);
    add(environment, "indent", indent);
    add(environment, "truncate", truncate);
    add(environment, "wordcount", wordcount);
    add(environment, "wordwrap", wordwrap);
    add(environment, "urlencode", urlencode);
}

/// A value as text with one change.
fn changed(
    state: &State,
    value: &Value,
    args: &[Value],
    what: &str,
    change: fn(&str) -> String,
) -> Result<Value, Error> {
    bind::<0>(what, args, [])?;
    match value.as_str() {
        Some(text) => Ok(Value::from(change(text))),
        None => python::text(state, value).map(|text| Value::from(change(&text))),
    }
}

/// A text with the characters that mean something in HTML as markupsafe writes them.
pub(super) fn escaped(text: &str) -> String {
    let mut output = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => output.push_str("&amp;"),
            '<' => output.push_str("&lt;"),
            '>' => output.push_str("&gt;"),
            '"' => output.push_str("&#34;"),
            '\'' => output.push_str("&#39;"),
            c => output.push(c),
        }
    }
    output
}

fn escape(state: &State, value: &Value, args: &[Value], again: bool) -> Result<Value, Error> {
    bind::<0>("escape", args, [])?;
    if value.is_safe() && !again {
        return Ok(value.clone());
    }
    Ok(Value::from_safe_string(escaped(&python::text(
        state, value,
    )?)))
}

/// A text without comments and tags, on one line, with the most usual entities read.
fn strip_tags(text: &str) -> String {
    let mut bare = String::with_capacity(text.len());
    let mut rest = text;
    for (open, close) in [("<!--", "-->"), ("<", ">")] {
        let source = if open == "<" {
            std::mem::take(&mut bare)
        } else {
            String::new()
        };
        let mut left = if open == "<" { source.as_str() } else { rest };
        let mut kept = String::new();
        while let Some(start) = left.find(open) {
            let Some(end) = left[start..].find(close) else {
                break;
            };
            kept.push_str(&left[..start]);
            left = &left[start + end + close.len()..];
        }
        kept.push_str(left);
        bare = kept;
        rest = "";
    }
    let words: Vec<&str> = bare
        .split(is_space)
        .filter(|word| !word.is_empty())
        .collect();
    let mut line = words.join(" ");
    for (entity, c) in [
        ("&lt;", "<"),
        ("&gt;", ">"),
        ("&#34;", "\""),
        ("&quot;", "\""),
        ("&#39;", "'"),
        ("&amp;", "&"),
    ] {
        line = line.replace(entity, c);
    }
    line
}

/// jinja2's `format`, which is Python's `%`.
fn formatted(state: &State, value: &Value, args: &[Value]) -> Result<Value, Error> {
    let (by_place, by_name): (Rest<Value>, Kwargs) = from_args(args)?;
    let named: Vec<(Value, Value)> = by_name
        .args()
        .map(|name| Ok((Value::from(name), by_name.peek::<Value>(name)?)))
        .collect::<Result<_, Error>>()?;
    if !named.is_empty() && !by_place.is_empty() {
        return Err(fail(
            "`format` takes arguments by place or by name, not both",
        ));
    }
    let arguments = if named.is_empty() {
        Value::from(Tuple::from(by_place.0))
    } else {
        Value::from_pairs(named)
    };
    format::percent(state, &python::text(state, value)?, &arguments)
}

fn replace(state: &State, value: &Value, args: &[Value]) -> Result<Value, Error> {
    let [old, new, count] = bind("replace", args, ["old", "new", "count"])?;
    let (Some(old), Some(new)) = (old, new) else {
        return Err(fail("`replace` takes what to replace and by what"));
    };
    let count = count.filter(|count| !count.is_none());
    let most = integer_or("replace", count.as_ref(), -1)?;
    let (own, old, new) = (
        python::text(state, value)?,
        python::text(state, &old)?,
        python::text(state, &new)?,
    );
    methods::replace(state, &own, &old, &new, most)
}

fn center(state: &State, value: &Value, args: &[Value]) -> Result<Value, Error> {
    let [width] = bind("center", args, ["width"])?;
    methods::center(
        &python::text(state, value)?,
        integer_or("center", width.as_ref(), 80)?,
    )
}

fn indent(state: &State, value: &Value, args: &[Value]) -> Result<Value, Error> {
    let [width, first, blank] = bind("indent", args, ["width", "first", "blank"])?;
    let indention = if let Some(text) = width.as_ref().and_then(Value::as_str) {
        text.to_owned()
    } else {
        let width = integer_or("indent", width.as_ref(), 4)?;
        if width > 10_000 {
            return Err(fail("a width above 10000 is not supported"));
        }
        " ".repeat(width.max(0) as usize)
    };
    let own = python::text(state, value)? + "\n";
    let lines = lines(&own, false);
    state.consume_fuel(((own.len() + lines.len().saturating_mul(indention.len())) / 64) as u64)?;
    let mut out = String::with_capacity(own.len());
    for (index, line) in lines.iter().enumerate() {
        if index > 0 {
            out.push('\n');
        }
        let here = if index == 0 {
            flag(first.as_ref())
        } else {
            flag(blank.as_ref()) || !line.is_empty()
        };
        if here {
            out.push_str(&indention);
        }
        out.push_str(line);
    }
    Ok(Value::from(out))
}

fn truncate(state: &State, value: &Value, args: &[Value]) -> Result<Value, Error> {
    let [length, kill_words, end, leeway] =
        bind("truncate", args, ["length", "killwords", "end", "leeway"])?;
    let own = python::text(state, value)?;
    let length = integer_or("truncate", length.as_ref(), 255)?;
    let end = end
        .as_ref()
        .map(|end| text("truncate", end))
        .transpose()?
        .unwrap_or("...");
    let leeway = leeway.filter(|leeway| !leeway.is_none());
    let leeway = integer_or("truncate", leeway.as_ref(), 5)?;
    let room = length - end.chars().count() as i64;
    if room < 0 || leeway < 0 {
        return Err(fail(
            "`truncate` takes a length not below that of its end, and a leeway not below 0",
        ));
    }
    // Of a list the items are counted.
    let counted = match value.kind() {
        ValueKind::String | ValueKind::Undefined => own.chars().count(),
        _ => value
            .len()
            .ok_or_else(|| fail(format!("`truncate` takes a text, not {}", type_name(value))))?,
    };
    if counted as i64 <= length.saturating_add(leeway) {
        return Ok(value.clone());
    }
    if !matches!(value.kind(), ValueKind::String | ValueKind::Undefined) {
        return Err(fail(format!(
            "`truncate` takes a text, not {}",
            type_name(value)
        )));
    }
    let cut: String = own.chars().take(room as usize).collect();
    let kept = if flag(kill_words.as_ref()) {
        cut.as_str()
    } else {
        cut.rsplit_once(' ')
            .map_or(cut.as_str(), |(before, _)| before)
    };
    Ok(Value::from(format!("{kept}{end}")))
}

fn wordcount(state: &State, value: &Value, args: &[Value]) -> Result<Value, Error> {
    bind::<0>("wordcount", args, [])?;
    let own = python::text(state, value)?;
    let words = own.split(|c: char| !(c.is_alphanumeric() || c == '_'));
    Ok(Value::from(words.filter(|word| !word.is_empty()).count()))
}

/// Python's `textwrap.wrap` of each line, for texts without hyphens inside of words.
fn wordwrap(state: &State, value: &Value, args: &[Value]) -> Result<Value, Error> {
    let names = [
        "width",
        "break_long_words",
        "wrapstring",
        "break_on_hyphens",
    ];
    let [width, break_long, wrap, hyphens] = bind("wordwrap", args, names)?;
    let width = integer_or("wordwrap", width.as_ref(), 79)?;
    let width = usize::try_from(width).ok().filter(|width| *width > 0);
    let width = width.ok_or_else(|| fail("`wordwrap` takes a width above 0"))?;
    let break_long = break_long.is_none_or(|flag| flag.is_true());
    let wrap = wrap.filter(|wrap| !wrap.is_none());
    let wrap = wrap
        .as_ref()
        .map(|wrap| text("wordwrap", wrap))
        .transpose()?
        .unwrap_or("\n");
    let own = python::text(state, value)?;
    if hyphens.is_none_or(|flag| flag.is_true()) && own.contains('-') {
        return Err(fail("`wordwrap` of a text with hyphens is not supported"));
    }
    state.consume_fuel((own.len().saturating_mul(1 + wrap.len()) / 64) as u64)?;
    let wrapped: Vec<String> = lines(&own, false)
        .into_iter()
        .map(|line| wrap_line(line, width, break_long).join(wrap))
        .collect();
    Ok(Value::from(wrapped.join(wrap)))
}

fn wrap_line(line: &str, width: usize, break_long: bool) -> Vec<String> {
    let blank = |c: char| matches!(c, ' ' | '\t' | '\n' | '\r' | '\u{b}' | '\u{c}');
    let mut chunks: Vec<String> = Vec::new();
    for c in line.chars() {
        match chunks.last_mut() {
            Some(last) if last.ends_with(blank) == blank(c) => last.push(c),
            _ => chunks.push(c.to_string()),
        }
    }
    let count = |text: &str| text.chars().count();
    chunks.reverse();
    let mut done: Vec<String> = Vec::new();
    while let Some(next) = chunks.last() {
        if next.starts_with(blank) && !done.is_empty() {
            chunks.pop();
        }
        let (mut current, mut length) = (Vec::new(), 0);
        while let Some(next) = chunks.last().filter(|next| length + count(next) <= width) {
            length += count(next);
            current.extend(chunks.pop());
        }
        if let Some(long) = chunks.last_mut().filter(|next| count(next) > width) {
            if break_long {
                let room = width - length;
                let head: String = long.chars().take(room).collect();
                *long = long.chars().skip(room).collect();
                current.push(head);
            } else if current.is_empty() {
                current.extend(chunks.pop());
            }
        }
        if current.last().is_some_and(|last| last.starts_with(blank)) {
            current.pop();
        }
        if !current.is_empty() {
            done.push(current.concat());
        }
    }
    done
}

fn urlencode(state: &State, value: &Value, args: &[Value]) -> Result<Value, Error> {
    bind::<0>("urlencode", args, [])?;
    let pairs: Vec<(Value, Value)> = if is_dict(value) {
        let pair = |key: Value| Ok((key.clone(), value.get_item(&key)?));
        value.try_iter()?.map(pair).collect::<Result<_, Error>>()?
    } else if matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable) {
        let mut pairs = Vec::new();
        for pair in value.try_iter()?.checked() {
            let pair = pair?;
            pairs.push((pair.get_item_by_index(0)?, pair.get_item_by_index(1)?));
        }
        pairs
    } else {
        return Ok(Value::from(quoted(&python::text(state, value)?, false)));
    };
    let mut out = String::new();
    for (key, value) in pairs {
        if !out.is_empty() {
            out.push('&');
        }
        let (key, value) = (python::text(state, &key)?, python::text(state, &value)?);
        let _ = write!(out, "{}={}", quoted(&key, true), quoted(&value, true));
    }
    Ok(Value::from(out))
}

/// A text in an address; in its query a space is a plus.
fn quoted(text: &str, query: bool) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'.' | b'-' | b'~' => {
                out.push(char::from(byte));
            }
            b'/' if !query => out.push('/'),
            b' ' if query => out.push('+'),
            // Writing to a string never fails.
            byte => {
                let _ = write!(out, "%{byte:02X}");
            }
        }
    }
    out
}
