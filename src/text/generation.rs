//! The `{% generation %}` tags of chat templates, which mark the assistant's words for a loss mask. They print nothing
//! themselves; here each pair becomes a scope without variables, which has the same rules for `set`.

/// The template with `generation` and `endgeneration` tags replaced. Comments, `raw` blocks and strings stay as they are,
/// and so do the numbers of the lines.
pub(super) fn replace_tags(source: &str) -> String {
    let mut output = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find('{') {
        let (before, here) = rest.split_at(start);
        output.push_str(before);
        let length = if here.starts_with("{#") {
            here.find("#}").map_or(here.len(), |end| end + 2)
        } else if here.starts_with("{{") {
            end_of_code(here, "}}")
        } else if here.starts_with("{%") {
            let length = end_of_code(here, "%}");
            let tag = &here[..length];
            match word(tag) {
                // A tag that never ends is the parser's to complain about.
                _ if !tag.ends_with("%}") => length,
                "generation" => {
                    output.push_str(&tag.replacen("generation", "with", 1));
                    rest = &here[length..];
                    continue;
                }
                "endgeneration" => {
                    output.push_str(&tag.replacen("endgeneration", "endwith", 1));
                    rest = &here[length..];
                    continue;
                }
                "raw" => end_of_raw(here, length),
                _ => length,
            }
        } else {
            1
        };
        output.push_str(&here[..length]);
        rest = &here[length..];
    }
    output.push_str(rest);
    output
}

/// What stands between the delimiters of a `{% .. %}` tag, without whitespace control.
fn word(tag: &str) -> &str {
    let inner = tag.strip_prefix("{%").unwrap_or(tag);
    let inner = inner.strip_suffix("%}").unwrap_or(inner);
    inner.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+')
}

/// Where the code that begins here ends, strings skipped; everything when it never does (the template's parser complains).
fn end_of_code(here: &str, end: &str) -> usize {
    let bytes = here.as_bytes();
    let mut quote = None;
    let mut place = 2;
    while place < bytes.len() {
        match (quote, bytes[place]) {
            (Some(_), b'\\') => place += 1,
            (Some(open), byte) if byte == open => quote = None,
            (None, byte @ (b'"' | b'\'')) => quote = Some(byte),
            (None, _) if bytes[place..].starts_with(end.as_bytes()) => return place + end.len(),
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
    use super::replace_tags;

    #[test]
    fn tags_are_replaced_with_their_whitespace_control() {
        assert_eq!(
            replace_tags("a{%- generation %}{{ x }}{% endgeneration -%}b"),
            "a{%- with %}{{ x }}{% endwith -%}b"
        );
    }

    #[test]
    fn comments_raw_blocks_and_strings_stay() {
        for source in [
            "{# {% generation %} #}",
            "{% raw %}{% generation %}{% endraw %}",
            r#"{{ "{% generation %}" }}"#,
            r"{{ 'it\'s {% generation %}' }}",
            r#"{% set x = "{% generation %}" %}"#,
            "{% generation",
            "{",
            "{% set generation = 1 %}",
        ] {
            assert_eq!(replace_tags(source), source);
        }
        assert_eq!(replace_tags("é{% generation %}ü"), "é{% with %}ü");
    }
}
