//! Translates a template so that the template engine interprets it as jinja2 interprets the original. The entry point is
//! [`translate`]. Line numbers are kept.

use anyhow::{Result, bail};

use super::expressions::{CHARACTER_NAME, Reader, Unread};
use super::generation::{BEGIN, END};

/// The name of the function that wraps the iterable of a `for` loop.
pub(super) const EACH: &str = "__each";

/// A block of a template that is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Block {
    Loop,
    /// An `if` or `for`, in which `break` and `continue` work.
    Branch,
    /// A scope or a capture, which `break` and `continue` can't leave in the engine.
    Scope(&'static str),
}

/// The template with every newline as `\n`, its `generation` tags as scopes and its `raw` blocks whole; an error for what the
/// engine would do in another way than jinja2.
pub(super) fn translate(source: &str) -> Result<String> {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut output = String::with_capacity(source.len());
    let mut blocks: Vec<Block> = Vec::new();
    let mut rest = source.as_str();
    let (mut line, mut counted) = (1, 0);
    while let Some(start) = rest.find('{') {
        let (before, here) = rest.split_at(start);
        output.push_str(before);
        let at = source.len() - here.len();
        line += source[counted..at].matches('\n').count();
        counted = at;
        let length = if here.starts_with("{#") {
            here.find("#}").map_or(here.len(), |end| end + 2)
        } else if here.starts_with("{{") {
            let length = end_of_code(here, "}}");
            output.push_str(&printed(&here[..length], &blocks, line)?);
            rest = &here[length..];
            continue;
        } else if here.starts_with("{%") {
            let length = end_of_code(here, "%}");
            let tag = &here[..length];
            // The parser reports a tag that never ends.
            if tag.ends_with("%}") {
                if word(tag) == "raw" {
                    let whole = end_of_raw(here, length);
                    output.push_str(&raw(tag));
                    output.push_str(&here[length..whole]);
                    rest = &here[whole..];
                    continue;
                }
                output.push_str(&statement(tag, &mut blocks, line)?);
                rest = &here[length..];
                continue;
            }
            length
        } else {
            1
        };
        output.push_str(&here[..length]);
        rest = &here[length..];
    }
    output.push_str(rest);
    Ok(output)
}

/// The tag that begins a `raw` block. jinja2 keeps the newline after it, so the tag tells the engine to do the same.
fn raw(tag: &str) -> String {
    let inner = &tag[..tag.len() - 2];
    if inner.ends_with(['-', '+']) {
        tag.to_owned()
    } else {
        format!("{inner}+%}}")
    }
}

/// A `{% .. %}` tag for the engine, and what it opens or closes.
fn statement(tag: &str, blocks: &mut Vec<Block>, line: usize) -> Result<String> {
    let name = word(tag);
    let inner = inner(tag);
    match name {
        "generation" | "endgeneration" if inner != name => {}
        "generation" => {
            blocks.push(Block::Scope("generation"));
            // The variables print nothing unless marks are asked for. The inner scope's tag treats white space as the original does.
            let (open, close) = tag.split_once("generation").unwrap_or_default();
            return Ok(format!("{open}with %}}{{{{ {BEGIN} }}}}{{% with{close}"));
        }
        "endgeneration" => {
            blocks.pop();
            let (open, close) = tag.split_once("endgeneration").unwrap_or_default();
            return Ok(format!(
                "{open}endwith %}}{{{{ {END} }}}}{{% endwith{close}"
            ));
        }
        "include" | "import" | "from" | "extends" => bail!(
            "line {line} of the chat template: `{name}` reads another template, which transformers does not allow; hint: put its \
             text into this one"
        ),
        "do" => bail!(
            "line {line} of the chat template: transformers does not know the tag `do`; hint: `set` keeps what an expression gives"
        ),
        "break" | "continue" => {
            for block in blocks.iter().rev() {
                match block {
                    Block::Loop => break,
                    Block::Branch => {}
                    Block::Scope(around) => bail!(
                        "line {line} of the chat template: `{name}` inside of `{around}` inside of a loop is not supported; hint: \
                         put the condition around `{around}`"
                    ),
                }
            }
        }
        "for" => blocks.push(Block::Loop),
        "if" => blocks.push(Block::Branch),
        "with" => blocks.push(Block::Scope("with")),
        "filter" => blocks.push(Block::Scope("filter")),
        "macro" => blocks.push(Block::Scope("macro")),
        "call" => blocks.push(Block::Scope("call")),
        "block" => blocks.push(Block::Scope("block")),
        "autoescape" => blocks.push(Block::Scope("autoescape")),
        // `set` without a value captures the output up to `endset`.
        "set" if !assigns(inner) => blocks.push(Block::Scope("set")),
        "set" => check_target(inner, line)?,
        "endfor" | "endif" | "endwith" | "endfilter" | "endmacro" | "endcall" | "endblock"
        | "endautoescape" | "endset" => {
            blocks.pop();
        }
        _ => {}
    }
    with_expressions(tag, blocks, line)
}

/// A `{{ .. }}` tag for the engine.
fn printed(tag: &str, blocks: &[Block], line: usize) -> Result<String> {
    let Some(code) = tag
        .strip_prefix("{{")
        .and_then(|tag| tag.strip_suffix("}}"))
    else {
        return Ok(tag.to_owned());
    };
    let (open, code, close) = trimmed(code);
    let read = || -> Result<(String, Vec<&str>), Unread> {
        let mut reader = Reader::new(code)?;
        let expression = reader.tuple(true)? + reader.end()?;
        Ok((expression, reader.names))
    };
    let Ok((expression, names)) = read() else {
        return Ok(tag.to_owned());
    };
    check_names(&names, blocks, line)?;
    Ok(format!("{{{{{open}{expression}{close}}}}}"))
}

/// The marks that trim white space around the code of a tag, and the code.
fn trimmed(code: &str) -> (&str, &str, &str) {
    let open = usize::from(code.starts_with(['-', '+']));
    let (open, code) = code.split_at(open);
    let close = code.len() - usize::from(code.ends_with(['-', '+']));
    let (code, close) = code.split_at(close);
    (open, code, close)
}

/// A macro's further arguments are nothing that the engine has, and names of characters are not known here.
fn check_names(names: &[&str], blocks: &[Block], line: usize) -> Result<()> {
    if names.contains(&CHARACTER_NAME) {
        bail!(
            "line {line} of the chat template: `\\N{{..}}` in a text is not supported; hint: write the character"
        );
    }
    let found = names
        .iter()
        .find(|name| matches!(**name, "varargs" | "kwargs"));
    if let Some(name) = found
        && blocks.contains(&Block::Scope("macro"))
    {
        bail!(
            "line {line} of the chat template: `{name}` of a macro is not supported; hint: name the arguments"
        );
    }
    Ok(())
}

/// A `{% .. %}` tag with its expressions for the engine.
fn with_expressions(tag: &str, blocks: &[Block], line: usize) -> Result<String> {
    let Some(code) = tag
        .strip_prefix("{%")
        .and_then(|tag| tag.strip_suffix("%}"))
    else {
        return Ok(tag.to_owned());
    };
    let (open, code, close) = trimmed(code);
    let Ok(mut reader) = Reader::new(code) else {
        return Ok(tag.to_owned());
    };
    let Ok((mut out, more)) = tag_code(&mut reader) else {
        return Ok(tag.to_owned());
    };
    check_names(&reader.names, blocks, line)?;
    let tags = match more {
        More::Nothing => String::new(),
        More::Tags(tags) => tags,
        More::Shadowed(name) => bail!(
            "line {line} of the chat template: `with` gives `{name}` a value and uses it in the same tag, where jinja2 takes the \
             outer one; hint: use two tags"
        ),
    };
    let Ok(end) = reader.end() else {
        return Ok(tag.to_owned());
    };
    out.push_str(end);
    if tags.is_empty() {
        return Ok(format!("{{%{open}{out}{close}%}}"));
    }
    // The last of the tags trims what follows.
    let last = tags.strip_suffix("%}").unwrap_or(&tags);
    Ok(format!("{{%{open}{out}%}}{last}{close}%}}"))
}

/// What a translated tag needs besides its own code.
enum More {
    Nothing,
    /// Tags to put after it.
    Tags(String),
    /// A name that a `with` assigns and a later value of the same tag uses.
    Shadowed(String),
}

/// The code of a tag for the engine.
fn tag_code(reader: &mut Reader) -> Result<(String, More), Unread> {
    let (spaced, name) = reader.name()?;
    let mut out = spaced.to_owned();
    match name {
        "if" | "elif" => out.push_str(&reader.tuple(true)?),
        "for" => {
            out.push_str(&reader.up_to("in")?);
            out.push_str(reader.expect("in")?);
            // The engine iterates over `none` and undefined values as over an empty list; Python does not.
            let items = reader.tuple(false)?;
            out.extend([" ", EACH, "(", &items, ")"]);
            if reader.is("if") {
                out.push_str(reader.expect("if")?);
                out.push_str(&reader.expression(true)?);
            }
            if reader.is("recursive") {
                out.push_str(reader.expect("recursive")?);
            }
        }
        "set" => {
            out.push_str(&reader.up_to("=")?);
            out.push_str(reader.expect("=")?);
            out.push_str(&reader.tuple(true)?);
        }
        "with" => {
            if let Some(name) = assignments(reader, &mut out)? {
                return Ok((out, More::Shadowed(name)));
            }
        }
        "macro" => {
            out.push_str(reader.name()?.0);
            let (parameters, tags) = signature(reader)?;
            out.push_str(&parameters);
            return Ok((out, More::Tags(tags)));
        }
        "call" => {
            if reader.is("(") {
                out.push_str(&signature(reader)?.0);
            }
            out.push_str(&reader.expression(true)?);
        }
        _ => return Err(Unread),
    }
    Ok((out, More::Nothing))
}

/// Translates the assignments of a `with`. Returns the first assigned name that a later value uses.
fn assignments(reader: &mut Reader, out: &mut String) -> Result<Option<String>, Unread> {
    let mut given: Vec<&str> = Vec::new();
    let mut shadowed = None;
    while let Ok((spaced, name)) = reader.name() {
        out.push_str(spaced);
        out.push_str(reader.expect("=")?);
        let before = reader.names.len();
        out.push_str(&reader.expression(true)?);
        let used = reader.names[before..]
            .iter()
            .find(|name| given.contains(*name));
        shadowed = shadowed.or(used.map(|name| (*name).to_owned()));
        given.push(name);
        if !reader.is(",") {
            break;
        }
        out.push_str(reader.expect(",")?);
    }
    Ok(shadowed)
}

/// Translates the parameters of a macro. Also returns tags that set the parameters whose default refers to an earlier parameter, which
/// the engine does not support in the signature.
fn signature(reader: &mut Reader) -> Result<(String, String), Unread> {
    let mut out = reader.expect("(")?.to_owned();
    let mut tags = String::new();
    let mut known: Vec<&str> = Vec::new();
    while !reader.is(")") {
        let (spaced, name) = reader.name()?;
        out.push_str(spaced);
        if reader.is("=") {
            let sign = reader.expect("=")?;
            let before = reader.names.len();
            let default = reader.expression(true)?;
            if reader.names[before..]
                .iter()
                .any(|name| known.contains(name))
            {
                let check = ["{% if ", name, " is undefined %}{% set ", name, " ="];
                tags.extend(
                    check
                        .into_iter()
                        .chain([default.as_str(), " %}{% endif %}"]),
                );
            } else {
                out.push_str(sign);
                out.push_str(&default);
            }
        }
        known.push(name);
        if reader.is(",") {
            out.push_str(reader.expect(",")?);
        } else if !reader.is(")") {
            return Err(Unread);
        }
    }
    out.push_str(reader.expect(")")?);
    Ok((out, tags))
}

/// Whether a `set` has a value.
fn assigns(inner: &str) -> bool {
    let mut quote = None;
    let mut depth = 0_usize;
    for c in inner.chars() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (None, '"' | '\'') => quote = Some(c),
            (None, '(' | '[' | '{') => depth += 1,
            (None, ')' | ']' | '}') => depth = depth.saturating_sub(1),
            (None, '=') if depth == 0 => return true,
            _ => {}
        }
    }
    false
}

/// transformers lets no name of a namespace begin with an underscore.
fn check_target(inner: &str, line: usize) -> Result<()> {
    let target = inner
        .trim_start_matches("set")
        .split('=')
        .next()
        .unwrap_or_default();
    if let Some((_, attribute)) = target.split_once('.')
        && attribute.trim().starts_with('_')
    {
        bail!(
            "line {line} of the chat template: a namespace can't have the attribute `{}`: transformers refuses names with an \
             underscore first",
            attribute.trim()
        );
    }
    Ok(())
}

/// What stands between the delimiters of a `{% .. %}` tag, without whitespace control.
fn inner(tag: &str) -> &str {
    let inner = tag.strip_prefix("{%").unwrap_or(tag);
    let inner = inner.strip_suffix("%}").unwrap_or(inner);
    inner.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+')
}

/// The first word of a `{% .. %}` tag.
fn word(tag: &str) -> &str {
    let inner = inner(tag);
    let end = inner.find(|c: char| !c.is_alphanumeric() && c != '_');
    &inner[..end.unwrap_or(inner.len())]
}
/// The position where the code at the beginning of `here` ends, outside strings and brackets; the length of `here` if it never ends,
/// which the parser reports.
fn end_of_code(here: &str, end: &str) -> usize {
    let bytes = here.as_bytes();
    let (mut quote, mut depth) = (None, 0_usize);
    let mut place = 2;
    while place < bytes.len() {
        match (quote, bytes[place]) {
            (Some(_), b'\\') => place += 1,
            (Some(open), byte) if byte == open => quote = None,
            (None, byte @ (b'"' | b'\'')) => quote = Some(byte),
            (None, _) if depth == 0 && bytes[place..].starts_with(end.as_bytes()) => {
                return place + end.len();
            }
            (None, b'(' | b'[' | b'{') => depth += 1,
            (None, b')' | b']' | b'}') => depth = depth.saturating_sub(1),
            _ => {}
        }
        place += 1;
    }
    bytes.len()
}

/// Where the `{% raw %}` block ends whose first tag has `length` bytes.
fn end_of_raw(here: &str, length: usize) -> usize {
    let mut from = length;
    while let Some(start) = here[from..].find("{%").map(|start| start + from) {
        let end = here[start..]
            .find("%}")
            .map_or(here.len(), |end| start + end + 2);
        if word(&here[start..end]) == "endraw" {
            return end;
        }
        from = start + 2;
    }
    here.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn translated(source: &str) -> String {
        translate(source).unwrap()
    }

    #[test]
    fn generation_tags_become_scopes_with_their_whitespace_control() {
        assert_eq!(
            translated("a{%- generation %}{{ x }}{% endgeneration -%}b"),
            "a{%- with %}{{ __generation }}{% with %}{{ x }}{% endwith %}{{ __endgeneration }}{% endwith -%}b"
        );
    }

    #[test]
    fn comments_raw_blocks_and_strings_stay() {
        for source in [
            "{# {% generation %} #}",
            "{% raw -%}{% generation %}{% endraw %}",
            r#"{{ "{% generation %}" }}"#,
            r"{{ 'it\'s {% generation %}' }}",
            r#"{% set x = "{% generation %}" %}"#,
            "{% generation",
            "{",
            "{% set generation = 1 %}",
        ] {
            assert_eq!(translated(source), source);
        }
        assert_eq!(
            translated("é{% generation %}ü"),
            "é{% with %}{{ __generation }}{% with %}ü"
        );
    }

    #[test]
    fn what_loops_go_through_is_looked_at() {
        for (source, expected) in [
            ("{% for x in y %}", "{% for x in __each( y) %}"),
            ("{%- for x in y -%}", "{%- for x in __each( y) -%}"),
            (
                "{% for a, b in f(c in d) if 'in' recursive %}",
                "{% for a, b in __each( f(c in d)) if 'in' recursive %}",
            ),
            (
                "{% for x in y[1 if z else 2]%}",
                "{% for x in __each( y[1 if z else 2])%}",
            ),
            ("{% for x in %}", "{% for x in %}"),
            ("{% for %}", "{% for %}"),
        ] {
            assert_eq!(translated(source), expected);
        }
    }

    #[test]
    fn what_a_default_names_is_known_to_it() {
        assert_eq!(
            translated("{%- macro m(a, b=a, c=1) -%}"),
            "{%- macro m(a, b, c=1) %}{% if b is undefined %}{% set b =a %}{% endif -%}"
        );
        let refused = |source: &str| translate(source).unwrap_err().to_string();
        assert!(refused("{% with a = 1, b = a %}").contains("`a`"));
        assert!(refused("{% macro m() %}{{ varargs }}{% endmacro %}").contains("`varargs`"));
        translated("{{ varargs }}{% macro m(a) %}{{ a.kwargs }}{% endmacro %}");
    }

    #[test]
    fn newlines_are_those_of_jinja2() {
        assert_eq!(translated("a\r\nb\rc\n"), "a\nb\nc\n");
        assert_eq!(
            translated("{% raw %}\n{% endraw %}"),
            "{% raw +%}\n{% endraw %}"
        );
    }

    #[test]
    fn what_the_engine_can_not_leave_is_refused_with_its_line() {
        let refused = |source: &str| translate(source).unwrap_err().to_string();
        let around = |scope: &str, end: &str| {
            format!(
                "{{% for x in y %}}\n{{% {scope} %}}{{% if x %}}{{% break %}}{{% endif %}}{{% {end} %}}{{% endfor %}}"
            )
        };
        assert!(refused(&around("with", "endwith")).contains("line 2"));
        assert!(refused(&around("generation", "endgeneration")).contains("inside of `generation`"));
        assert!(refused(&around("set z", "endset")).contains("inside of `set`"));
        for source in [
            "{% for x in y %}{% if x %}{% break %}{% endif %}{% endfor %}",
            "{% with %}{% for x in y %}{% continue %}{% endfor %}{% endwith %}",
            "{% for x in y %}{% set z = 1 %}{% break %}{% endfor %}",
        ] {
            translated(source);
        }
        assert!(refused("\n{% include 'x' %}").contains("line 2"));
        assert!(refused("{% set ns._x = 1 %}").contains("underscore"));
    }
}
