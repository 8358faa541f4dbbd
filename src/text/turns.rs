//! Finds what the assistant says in a rendered conversation, for templates without `{% generation %}` tags: the conversation is rendered
//! turn by turn. The entry point is [`by_turns`].

use std::ops::Range;

use anyhow::{Context as _, Result, bail};
use minijinja::Value;

use super::template::{ChatTemplate, Extras};

/// The ranges of bytes of `whole`, the rendered conversation, that its assistant's messages fill: each from where the generation prompt
/// ends to where the next message begins, as TRL's training templates have it.
///
/// # Errors
/// A template that prints the beginning of a conversation otherwise when more follows, so that the turns can't be told apart.
pub(super) fn by_turns(
    template: &ChatTemplate,
    messages: &[Value],
    whole: &str,
    extras: &Extras,
) -> Result<Vec<Range<usize>>> {
    const HINT: &str = "hint: a template with `{% generation %}` around what the assistant says tells by itself what is learnt";
    let is_answer = |message: &Value| {
        let role = message.get_attr("role").unwrap_or_default();
        role.as_str() == Some("assistant")
    };
    let mut ranges: Vec<Range<usize>> = Vec::new();
    for (at, _) in messages.iter().enumerate().filter(|(_, m)| is_answer(m)) {
        let number = at + 1;
        let alone = |messages: &[Value], prompt: bool| {
            template
                .render_with(messages, prompt, extras)
                .with_context(|| {
                    format!(
                        "what the assistant says in message {number} can't be found: the template does not render the conversation up \
                         to it; {HINT}"
                    )
                })
        };
        let before = alone(&messages[..at], true)?;
        let last = messages[number..].is_empty();
        let after = if last {
            whole.to_owned()
        } else {
            alone(&messages[..number], false)?
        };
        // Some templates print an EOS at the end of the whole conversation.
        let bare = template
            .special_token("eos_token")
            .and_then(|eos| after.strip_suffix(eos));
        let ends = [Some(after.as_str()), bare];
        let end = ends
            .into_iter()
            .flatten()
            .find(|text| whole.starts_with(text));
        let Some(end) = end.filter(|end| end.starts_with(&before)) else {
            bail!(
                "what the assistant says in message {number} can't be found: the template prints the conversation up to there in another \
                 way {}; {HINT}",
                if end.is_some() {
                    "when an answer is still to come"
                } else {
                    "when more follows"
                }
            );
        };
        if before.len() < end.len() {
            ranges.push(before.len()..end.len());
        }
    }
    Ok(ranges)
}
