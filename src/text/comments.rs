//! Removes the comments of a chat template without changing what it renders, so that an edited comment does not make later stages run
//! again.

/// `source` without the comments that leave no trace in what is rendered. A comment stays where its neighbours could begin to
/// trim white space across its place (`trim_blocks` and `lstrip_blocks` are on, as transformers has them).
pub fn without_comments(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    // Where the text since the last tag begins.
    let mut text = 0;
    let mut rest = source;
    while let Some(at) = rest.match_indices('{').map(|(at, _)| at).find(|&at| {
        rest[at..].starts_with("{{") || rest[at..].starts_with("{%") || rest[at..].starts_with("{#")
    }) {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        if !rest.starts_with("{#") {
            let Some(end) = end_of_tag(rest) else { break };
            out.push_str(&rest[..end]);
            rest = &rest[end..];
            text = out.len();
            continue;
        }
        let Some(end) = rest.find("#}").filter(|end| *end >= 2) else {
            break;
        };
        let (inner, after) = (&rest[2..end], &rest[end + 2..]);
        if let Some((before, after)) = trimmed(&out, text, inner, after) {
            out.truncate(before);
            rest = after;
        } else {
            out.push_str(&rest[..end + 2]);
            rest = after;
            text = out.len();
        }
    }
    out.push_str(rest);
    out
}

/// How much of `before` stays and what comes next if the comment `inner` between `before`, whose last text begins at `text`, and
/// `after` goes; nothing if it has to stay.
fn trimmed<'a>(before: &str, text: usize, inner: &str, after: &'a str) -> Option<(usize, &'a str)> {
    if inner.starts_with('+') || inner.ends_with('+') {
        return None;
    }
    let last = &before[text..];
    let kept = if inner.starts_with('-') {
        last.trim_end()
    } else {
        let line = last.rfind('\n').map_or(0, |at| at + 1);
        if !last[line..].trim().is_empty() {
            last
        } else if line > 0 || text == 0 || last.is_empty() {
            &last[..line]
        } else {
            return None;
        }
    };
    let next = if inner.ends_with('-') && inner.len() > 1 {
        after.trim_start()
    } else {
        after.strip_prefix('\n').unwrap_or(after)
    };
    let bare = next.starts_with(|first: char| !first.is_whitespace());
    let trims = ["{%-", "{{-", "{#-"]
        .iter()
        .any(|tag| next.starts_with(tag));
    let spaced = kept.ends_with(char::is_whitespace);
    // A brace before it may not become the first of a tag.
    (bare && !(trims && spaced) && !kept.ends_with('{')).then_some((text + kept.len(), next))
}

/// The length of the tag at the beginning of `rest`; that of `raw` reaches to its end.
fn end_of_tag(rest: &str) -> Option<usize> {
    let close = if rest.starts_with("{{") { "}}" } else { "%}" };
    let end = close_of(rest, close)?;
    let name = rest[2..end - 2].trim_matches(['-', '+']).trim();
    if close == "}}" || name != "raw" {
        return Some(end);
    }
    let starts = rest[end..].match_indices("{%").map(|(at, _)| end + at);
    for start in starts {
        let inner = rest[start + 2..]
            .trim_start_matches(['-', '+'])
            .trim_start();
        if inner.starts_with("endraw") {
            return close_of(&rest[start..], close).map(|length| start + length);
        }
    }
    None
}

/// The length of a tag that ends with `close`, which does not count inside quotes.
fn close_of(rest: &str, close: &str) -> Option<usize> {
    let mut quote = None;
    let mut escaped = false;
    for (at, character) in rest.char_indices().skip(2) {
        if let Some(open) = quote {
            if escaped {
                escaped = false;
            } else if character == '\\' {
                escaped = true;
            } else if character == open {
                quote = None;
            }
        } else if rest[at..].starts_with(close) {
            return Some(at + close.len());
        } else if matches!(character, '"' | '\'') {
            quote = Some(character);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::text::template::ChatTemplate;

    fn rendered(source: &str) -> Result<String, String> {
        let template = ChatTemplate::new(source, std::collections::BTreeMap::new(), None);
        let message = minijinja::Value::from_pairs([("role", "user"), ("content", "hi")]);
        let rendered = template.and_then(|template| template.render(&[message], true));
        rendered.map_err(|error| format!("{error:#}"))
    }

    #[test]
    fn comments_go_and_nothing_else() {
        for (source, expected) in [
            ("{#- as before -#}\n{{ 'a' }}", "{{ 'a' }}"),
            (
                "{# one #}\n{# two #}\n{% if true %}x{% endif %}",
                "{% if true %}x{% endif %}",
            ),
            ("a\n  {# c #}\nb", "a\nb"),
            ("{{ '{# no #}' }}{# yes #}x", "{{ '{# no #}' }}x"),
            (
                "{% raw %}{# no #}{% endraw %}",
                "{% raw %}{# no #}{% endraw %}",
            ),
            ("{{ \"a\\\"{# no #}\" }}", "{{ \"a\\\"{# no #}\" }}"),
            // Here its place counts.
            ("a {# c #}{{- 'b' }}", "a {# c #}{{- 'b' }}"),
            (
                "{% if true %}{# c #}\n\nx{% endif %}",
                "{% if true %}{# c #}\n\nx{% endif %}",
            ),
            ("{ {#- c #}{# c #}", "{ {#- c #}{# c #}"),
            ("{#-#} {#+ c #}", "{#-#} {#+ c #}"),
            ("a{# never closed", "a{# never closed"),
            ("{#}", "{#}"),
        ] {
            assert_eq!(without_comments(source), expected, "{source:?}");
        }
    }

    #[test]
    fn the_own_template_says_the_same() {
        let source = crate::text::template::LLAMA3;
        let commented = format!("{{#- The same as before. -#}}\n{source}");
        assert_eq!(without_comments(&commented), without_comments(source));
        assert_eq!(rendered(&without_comments(source)), rendered(source));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn what_is_rendered_stays(parts in prop::collection::vec(prop::sample::select(vec![
            "a", " ", "\n", "  ", "\n\n", "{# c #}", "{#- c #}", "{# c -#}", "{#- c -#}", "{#+ c #}", "{#c+#}", "{##}", "{#-#}",
            "{{ 'x' }}", "{{- ' y ' -}}", "{% set v = 1 %}", "{%- set v = 2 %}", "{% set v = 3 -%}", "{% raw %}{# r #}{% endraw %}",
            "{% if true %}", "{%- endif %}", "{% endif -%}", "{{ '#}' }}", "{", "}",
        ]), 0..9)) {
            let source = parts.concat();
            let stripped = without_comments(&source);
            if let Ok(text) = rendered(&source) {
                prop_assert_eq!(rendered(&stripped), Ok(text), "{:?} {:?}", source, stripped);
            }
        }
    }
}
