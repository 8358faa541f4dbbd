//! The words of a Rust source: without comments, literals, and what stands under `#[cfg(test)]`.

/// A token, as far as paths need.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Token<'a> {
    Word(&'a str),
    /// `::`.
    Separator,
    /// Any other character.
    Mark(char),
}

/// The tokens of a text.
pub(super) fn tokens(text: &str) -> Vec<Token<'_>> {
    without_tests(&all(text))
}

fn all(text: &str) -> Vec<Token<'_>> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else if let Some(length) = raw_text(rest) {
            length
        } else if first == '"' {
            quoted(rest, '"')
        } else if first == '\'' {
            character(rest)
        } else if rest.starts_with("::") {
            found.push(Token::Separator);
            2
        } else if is_word(first) {
            let end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
            found.push(Token::Word(&rest[..end]));
            end
        } else {
            if !first.is_whitespace() {
                found.push(Token::Mark(first));
            }
            first.len_utf8()
        };
        rest = &rest[length..];
    }
    found
}

/// The length of a raw text (`r"..."`, `br#"..."#`), if one begins here.
fn raw_text(rest: &str) -> Option<usize> {
    let start = rest.strip_prefix('b').unwrap_or(rest).strip_prefix('r')?;
    let hashes = start.len() - start.trim_start_matches('#').len();
    start[hashes..].strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    let begin = rest.len() - start.len() + hashes + 1;
    Some(
        rest[begin..]
            .find(&end)
            .map_or(rest.len(), |at| begin + at + end.len()),
    )
}

/// The length of a literal that begins here and ends at the next quote without a backslash.
fn quoted(rest: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, character) in rest.char_indices().skip(1) {
        if character == quote && !escaped {
            return at + character.len_utf8();
        }
        escaped = character == '\\' && !escaped;
    }
    rest.len()
}

/// The length of a character, or of the quote before a lifetime.
fn character(rest: &str) -> usize {
    let mut characters = rest.chars().skip(1);
    match (characters.next(), characters.next()) {
        (Some('\\'), _) => quoted(rest, '\''),
        (Some(inner), Some('\'')) => inner.len_utf8() + 2,
        _ => 1,
    }
}

/// Leaves out every item under `#[cfg(test)]`.
fn without_tests<'a>(tokens: &[Token<'a>]) -> Vec<Token<'a>> {
    use Token::{Mark, Word};
    const TEST: [Token<'_>; 7] = [
        Mark('#'),
        Mark('['),
        Word("cfg"),
        Mark('('),
        Word("test"),
        Mark(')'),
        Mark(']'),
    ];
    let mut kept = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        if !tokens[at..].starts_with(&TEST) {
            kept.push(tokens[at]);
            at += 1;
            continue;
        }
        at += TEST.len();
        while tokens.get(at) == Some(&Mark('#')) {
            at = closing(tokens, at + 1);
        }
        let is_use = tokens[at..]
            .iter()
            .take(5)
            .any(|token| *token == Word("use"));
        while at < tokens.len() {
            match tokens[at] {
                Mark(';') => {
                    at += 1;
                    break;
                }
                Mark('{') if !is_use => {
                    at = closing(tokens, at);
                    break;
                }
                Mark('(' | '[' | '{') => at = closing(tokens, at),
                _ => at += 1,
            }
        }
    }
    kept
}

/// The position behind the bracket that closes the one at `at`.
fn closing(tokens: &[Token<'_>], mut at: usize) -> usize {
    let mut depth = 0_usize;
    while let Some(token) = tokens.get(at) {
        at += 1;
        match token {
            Token::Mark('(' | '[' | '{') => depth += 1,
            Token::Mark(')' | ']' | '}') => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    break;
                }
            }
            _ => {}
        }
    }
    at
}
