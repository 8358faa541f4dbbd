//! The token that ends an assistant's turn, found by rendering one.

use std::path::Path;

use anyhow::Result;
use chrono::NaiveDate;

use super::template::{ChatTemplate, message};
use super::tokenizer::{SpecialToken, Tokenizer, special_tokens};

/// What the assistant says in the rendered chat: found again in the text, whatever a template does to its edges.
const ANSWER: &str = "The answer is forty-two";

/// The token with which the template `source` ends an assistant's turn, for the tokenizer in `folder`: the added token that
/// stands right behind the answer of a rendered chat. None where text or nothing stands there, and where the template refuses so
/// plain a chat.
pub fn turn_end(source: &str, folder: &Path) -> Result<Option<SpecialToken>> {
    let tokenizer = Tokenizer::load(folder)?;
    // The day that a template prints has no part in how its turns end.
    let template = ChatTemplate::new(
        source,
        special_tokens(folder)?,
        NaiveDate::from_ymd_opt(2000, 1, 1),
    )?;
    let chat = [
        message("user", "What is the answer?"),
        message("assistant", ANSWER),
    ];
    let Ok(rendered) = template.render(&chat, false) else {
        return Ok(None);
    };
    let behind = rendered
        .rfind(ANSWER)
        .and_then(|at| rendered.get(at + ANSWER.len()..));
    Ok(behind.and_then(|behind| tokenizer.added_token_at(behind.trim_start())))
}

#[cfg(test)]
mod tests {
    use super::super::template::LLAMA3;
    use super::*;

    const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/model");

    fn end(source: &str) -> Option<String> {
        let found = turn_end(source, Path::new(MODEL)).unwrap();
        found.map(|token| token.text)
    }

    #[test]
    fn turns_end_with_the_token_behind_the_answer() {
        assert_eq!(end(LLAMA3).as_deref(), Some("<|eot_id|>"));
        let each = |inside: &str| format!("{{% for message in messages %}}{inside}{{% endfor %}}");
        // With a space between, in upper hands of `eos_token`, and before a new line.
        assert_eq!(
            end(&each("{{ message.content }} {{ eos_token }}\n")).as_deref(),
            Some("<|end_of_text|>")
        );
        // The day is no matter.
        let dated = each("{{ strftime_now('%Y') }}{{ message.content | trim }}<|eot_id|>");
        assert_eq!(end(&dated).as_deref(), Some("<|eot_id|>"));
        // Only the last answer's end counts.
        let last = each("{{ message.content }}{{ eos_token if loop.last else '<|eot_id|>' }}");
        assert_eq!(end(&last).as_deref(), Some("<|end_of_text|>"));
    }

    #[test]
    fn where_no_token_stands_none_is_made_up() {
        let each = |inside: &str| format!("{{% for message in messages %}}{inside}{{% endfor %}}");
        for template in [
            each("{{ message.content }}\n\n"),
            each("{{ message.content }}### End<|eot_id|>"),
            // Not in this tokenizer: a piece of text to it.
            each("{{ message.content }}<|im_end|>\n"),
            each("<|eot_id|>{{ message.content }}"),
            each("{{ message.content | upper }}<|eot_id|>"),
            "{{ raise_exception('three turns at least') }}".to_owned(),
            "nothing".to_owned(),
        ] {
            assert_eq!(end(&template), None, "{template}");
        }
    }
}
