//! Limits the nesting of expressions in a chat template. The template engine parses and compiles them recursively and limits only
//! brackets and blocks. A chain of thousands of operators, attributes, filters or `elif` would overflow the stack, which can't be
//! caught, so such templates are refused before they are parsed.

/// The deepest expression, and the longest chain of `elif`. Real templates have some dozens.
const DEEPEST: usize = 400;

/// The line of the first expression or chain of `elif` that is nested too deeply.
pub(super) fn too_deep(source: &str) -> Option<usize> {
    let mut rest = source;
    // The number of branches of every open `if`, since the engine nests each `elif` in the one before.
    let mut branches: Vec<usize> = Vec::new();
    let mut all_branches = 0_usize;
    let line = |rest: &str| {
        source.len().checked_sub(rest.len()).map_or(1, |read| {
            1 + source
                .as_bytes()
                .iter()
                .take(read)
                .filter(|byte| **byte == b'\n')
                .count()
        })
    };
    while let Some(start) = rest.find('{') {
        rest = rest.get(start..)?;
        let begin = rest;
        let inner = rest.get(2..).unwrap_or_default();
        match rest.as_bytes().get(1) {
            Some(b'#') => {
                rest = inner
                    .find("#}")
                    .and_then(|end| inner.get(end + 2..))
                    .unwrap_or_default();
            }
            Some(b'{' | b'%') => {
                let mut tag = Tag::new(inner);
                let mut first = None;
                while let Some(token) = tag.next() {
                    first = first.or(match token {
                        Token::Word(word) => Some(word),
                        Token::Mark => None,
                    });
                    if tag.deepest > DEEPEST {
                        return Some(line(begin));
                    }
                }
                rest = tag.rest;
                if begin.as_bytes().get(1) == Some(&b'%') {
                    match first {
                        Some("if") => branches.push(0),
                        Some("elif") => {
                            all_branches += 1;
                            if let Some(last) = branches.last_mut() {
                                *last += 1;
                            }
                        }
                        Some("endif") => {
                            all_branches -= branches.pop().unwrap_or(0).min(all_branches);
                        }
                        _ => {}
                    }
                    if all_branches > DEEPEST {
                        return Some(line(begin));
                    }
                }
            }
            _ => rest = rest.get(1..).unwrap_or_default(),
        }
    }
    None
}

/// A part of a tag.
enum Token<'a> {
    Word(&'a str),
    Mark,
}

/// Reads a tag up to its end.
struct Tag<'a> {
    rest: &'a str,
    /// The operators so far at each level of brackets.
    levels: Vec<usize>,
    depth: usize,
    deepest: usize,
}

impl<'a> Tag<'a> {
    fn new(rest: &'a str) -> Self {
        Self {
            rest,
            levels: vec![0],
            depth: 0,
            deepest: 0,
        }
    }

    fn next(&mut self) -> Option<Token<'a>> {
        loop {
            let text = self.rest.trim_start();
            let first = text.chars().next()?;
            if text.starts_with("%}") || text.starts_with("-%}") || text.starts_with("+%}") {
                self.rest = text;
                return None;
            }
            // Inside a map, `}}` closes the map.
            if self.levels.len() == 1 && (text.starts_with("}}") || text.starts_with("-}}")) {
                self.rest = text;
                return None;
            }
            if first == '"' || first == '\'' {
                self.rest = after_text(text, first);
                continue;
            }
            if first.is_alphanumeric() || first == '_' {
                let end = text.find(|c: char| !c.is_alphanumeric() && c != '_');
                let (word, rest) = text.split_at(end.unwrap_or(text.len()));
                self.rest = rest;
                if matches!(word, "not" | "and" | "or" | "is" | "in" | "if" | "else") {
                    self.deepen();
                }
                return Some(Token::Word(word));
            }
            self.rest = text.get(first.len_utf8()..)?;
            match first {
                '(' | '[' | '{' => {
                    self.deepen();
                    self.levels.push(0);
                }
                ')' | ']' | '}' => {
                    // A bracketed expression counts as one value afterwards.
                    if self.levels.len() > 1 {
                        self.depth -= self.levels.pop().unwrap_or(0);
                    }
                }
                ',' => {
                    if let Some(level) = self.levels.last_mut() {
                        self.depth -= *level;
                        *level = 0;
                    }
                }
                _ => self.deepen(),
            }
            return Some(Token::Mark);
        }
    }

    fn deepen(&mut self) {
        if let Some(level) = self.levels.last_mut() {
            *level += 1;
        }
        self.depth += 1;
        self.deepest = self.deepest.max(self.depth);
    }
}

/// What follows a quoted text.
fn after_text(text: &str, quote: char) -> &str {
    let mut escaped = false;
    for (offset, c) in text.char_indices().skip(1) {
        if c == quote && !escaped {
            return text.get(offset + 1..).unwrap_or_default();
        }
        escaped = c == '\\' && !escaped;
    }
    ""
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tag around many of the same.
    fn chain(begin: &str, piece: &str, end: &str) -> String {
        format!("a\n{{{{ {begin}{}{end} }}}}", piece.repeat(5000))
    }

    #[test]
    fn chains_of_every_sort_are_found() {
        for (begin, piece, end) in [
            ("", "-", "1"),
            ("", "not ", "x"),
            ("1", " + 1", ""),
            ("x", " ~ x", ""),
            ("x", " and x", ""),
            ("x", " or x", ""),
            ("x", "|trim", ""),
            ("x", ".y", ""),
            ("x", "[0]", ""),
            ("x", "()", ""),
            ("x", " is string", ""),
            ("x", " if x else x", ""),
            ("x", " == x", ""),
            ("x", " in x", ""),
            ("x", " ** x", ""),
            ("", "(", "x"),
            ("", "[", "x"),
            ("", "{1:", "x"),
        ] {
            assert_eq!(too_deep(&chain(begin, piece, end)), Some(2), "{piece}");
        }
        let elif = format!("{{% if a %}}{}{{% endif %}}", "{% elif a %}".repeat(5000));
        assert_eq!(too_deep(&elif), Some(1));
        let targets = format!("{{% for {}x in y %}}{{% endfor %}}", "(".repeat(5000));
        assert_eq!(too_deep(&targets), Some(1));
    }

    #[test]
    fn long_templates_are_not_deep() {
        for flat in [
            chain("[", "a.b, ", "a]"),
            chain("{", "'a': b + c, ", "'d': 1}"),
            chain("f(", "a=b|trim, ", "a=1)"),
            format!(
                "{{{{ '{}' }}}}",
                "- ' + . ".replace('\'', "\\'").repeat(5000)
            ),
            format!("{{# {} #}}", "a.b - ".repeat(5000)),
            "{{ a.b }}{% if a.b %}{% elif c %}{% endif %}".repeat(5000),
            format!("{} {{ {{ }}", "a.b - ".repeat(5000)),
            "{{ {'a': {'b': 1}}.a }}".repeat(5000),
        ] {
            assert_eq!(too_deep(&flat), None, "{}", &flat[..60]);
        }
        assert_eq!(too_deep(super::super::template::LLAMA3), None);
        for cut in [
            "{{",
            "{%",
            "{#",
            "{{ 'a",
            "{{ \"\\",
            "{",
            "{{ a }",
            "é{{ é ~ 'é",
        ] {
            assert_eq!(too_deep(cut), None, "{cut}");
        }
    }
}
