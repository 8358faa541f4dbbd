//! The lexer for expressions. Its entry points are [`tokens`] and [`literal`].

/// The expression can't be parsed here. It is passed to the engine unchanged, which may accept it or report an error.
#[derive(Debug)]
pub(in crate::text) struct Unread;

pub(super) type Read<T> = Result<T, Unread>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Name,
    Number,
    Text,
    Mark,
    End,
}

/// A token of an expression and the white space before it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Token<'a> {
    pub(super) kind: Kind,
    pub(super) spaced: &'a str,
    pub(super) text: &'a str,
}

/// A string literal whose escapes that the engine does not know are replaced by the characters they stand for.
pub(super) fn literal(text: &str) -> Read<String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let escape = rest[1..].chars().next().ok_or(Unread)?;
        let length = 1 + escape.len_utf8();
        match escape {
            'a' => out.push_str("\\u0007"),
            'v' => out.push_str("\\u000b"),
            '\n' => {}
            'U' => {
                let code = rest.get(2..10).ok_or(Unread)?;
                let c = u32::from_str_radix(code, 16)
                    .ok()
                    .and_then(char::from_u32)
                    .ok_or(Unread)?;
                out.push(c);
                rest = &rest[10..];
                continue;
            }
            _ => out.push_str(&rest[..length]),
        }
        rest = &rest[length..];
    }
    out.push_str(rest);
    Ok(out)
}

pub(super) fn tokens(code: &str) -> Read<Vec<Token<'_>>> {
    const MARKS: [&str; 8] = ["**", "//", "==", "!=", "<=", ">=", "::", "~"];
    let mut tokens = Vec::new();
    let mut begin = 0;
    loop {
        let rest = &code[begin..];
        let start = begin + rest.len() - rest.trim_start().len();
        let here = &code[start..];
        let Some(first) = here.chars().next() else {
            let (kind, text) = (Kind::End, "");
            tokens.push(Token {
                kind,
                spaced: &code[begin..],
                text,
            });
            return Ok(tokens);
        };
        let (kind, length) = if first.is_alphabetic() || first == '_' {
            let end = here.find(|c: char| !c.is_alphanumeric() && c != '_');
            (Kind::Name, end.unwrap_or(here.len()))
        } else if first.is_ascii_digit() {
            (Kind::Number, number(here))
        } else if first == '"' || first == '\'' {
            (Kind::Text, quoted(here, first).ok_or(Unread)?)
        } else {
            let long = MARKS
                .iter()
                .find(|mark| **mark != "::" && here.starts_with(**mark));
            (Kind::Mark, long.map_or(first.len_utf8(), |mark| mark.len()))
        };
        let end = start + length;
        tokens.push(Token {
            kind,
            spaced: &code[begin..end],
            text: &code[start..end],
        });
        begin = end;
    }
}

/// The length of a number. A decimal point belongs to it only if digits follow.
fn number(here: &str) -> usize {
    let bytes = here.as_bytes();
    let word = |from: usize| {
        let end = bytes[from..]
            .iter()
            .position(|byte| !byte.is_ascii_alphanumeric() && *byte != b'_');
        end.map_or(bytes.len(), |end| from + end)
    };
    let mut end = word(0);
    if bytes.get(end) == Some(&b'.') && bytes.get(end + 1).is_some_and(u8::is_ascii_digit) {
        end = word(end + 1);
    }
    let exponent = matches!(bytes.get(end.wrapping_sub(1)), Some(b'e' | b'E'));
    if exponent && matches!(bytes.get(end), Some(b'+' | b'-')) && !here.starts_with("0x") {
        end = word(end + 1);
    }
    end
}

/// The length of a text in quotes.
fn quoted(here: &str, quote: char) -> Option<usize> {
    let mut escaped = false;
    for (at, c) in here.char_indices().skip(1) {
        if c == quote && !escaped {
            return Some(at + 1);
        }
        escaped = c == '\\' && !escaped;
    }
    None
}
