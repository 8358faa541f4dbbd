//! The conversation of a row with another answer than its own, as a reward model reads it.

use anyhow::{Context as _, Result, ensure};
use minijinja::Value;

use super::{ChatRow, Renderer, Seen, attribute, with_content};
use crate::text::template::{Extras, message};

/// What a row asks, and its own answer.
#[derive(Debug, Clone)]
pub struct Asked {
    /// What comes before an answer, at least one message.
    messages: Vec<Value>,
    /// The row's own answer.
    answer: Vec<Value>,
    extras: Extras,
}

impl Asked {
    /// The text of the last message before the answer; `None` if its content is no plain text.
    pub fn question(&self) -> Option<String> {
        attribute(self.messages.last()?, "content")
    }

    /// The text of the first message of the row's own answer; `None` if its content is no plain text.
    pub fn own_answer(&self) -> Option<String> {
        attribute(self.answer.first()?, "content")
    }
}

impl Renderer {
    /// What a row asks.
    ///
    /// # Errors
    /// The row lacks a prompt or an answer, or is rendered already.
    pub fn asked(&self, row: ChatRow) -> Result<Asked> {
        let seen = self.look_at(&row);
        ensure!(
            !seen.already_rendered && !seen.of_another_template,
            "the row is rendered already, so its messages are not known; hint: import messages or plain texts"
        );
        let extras = row.extras.clone();
        let (messages, answer, _) = self.conversation(row, &mut Seen::default())?;
        ensure!(!messages.is_empty(), "the row has an answer but no prompt");
        Ok(Asked {
            messages,
            answer,
            extras,
        })
    }

    /// The whole conversation with `answer` as the assistant's. Where the last message before it is the assistant's, the answer goes on with
    /// that.
    ///
    /// # Errors
    /// The template refuses the conversation.
    pub fn render_answer(&self, asked: &Asked, answer: &str) -> Result<String> {
        let mut messages = asked.messages.clone();
        let last = messages.last();
        let begun = last.filter(|last| attribute(last, "role").as_deref() == Some("assistant"));
        let begun = begun.and_then(|last| Some((last.clone(), attribute(last, "content")?)));
        if let Some((last, begun)) = begun {
            messages.pop();
            messages.push(with_content(&last, &[begun.as_str(), answer].concat()));
        } else {
            messages.push(message("assistant", answer));
        }
        self.template
            .render_with(&messages, false, &asked.extras)
            .context("the conversation could not be rendered")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::Side;
    use super::*;
    use crate::text::template::{ChatTemplate, LLAMA3};

    fn renderer() -> Renderer {
        let template = ChatTemplate::new(LLAMA3, BTreeMap::new(), None).unwrap();
        Renderer::new(template, false)
    }

    fn row(prompt: Side) -> ChatRow {
        ChatRow {
            system: Some("S".into()),
            prompt: Some(prompt),
            chosen: Some(Side::Text("own".into())),
            rejected: Some(Side::Text("worse".into())),
            ..ChatRow::default()
        }
    }

    #[test]
    fn another_answer_stands_where_the_own_one_would() {
        let renderer = renderer();
        let asked = renderer.asked(row(Side::Text("Q".into()))).unwrap();
        assert_eq!(asked.question().as_deref(), Some("Q"));
        assert_eq!(asked.own_answer().as_deref(), Some("own"));
        let own = renderer.render(row(Side::Text("Q".into()))).unwrap();
        let whole = [own.prompt, own.chosen].concat();
        assert_eq!(renderer.render_answer(&asked, "own").unwrap(), whole);
        let other = renderer.render_answer(&asked, "another").unwrap();
        assert_eq!(other, whole.replace("own", "another"));
    }

    #[test]
    fn an_answer_goes_on_with_what_the_assistant_began() {
        let renderer = renderer();
        let begun = vec![message("user", "Q"), message("assistant", "It is ")];
        let asked = renderer.asked(row(Side::Messages(begun))).unwrap();
        let text = renderer.render_answer(&asked, "blue").unwrap();
        assert!(text.contains("It is blue"), "{text}");
        assert_eq!(text.matches("assistant").count(), 1);
    }

    #[test]
    fn a_rendered_row_has_no_messages() {
        let renderer = renderer();
        let own = renderer.render(row(Side::Text("Q".into()))).unwrap();
        let rendered = ChatRow {
            prompt: Some(Side::Text(own.prompt)),
            chosen: Some(Side::Text(own.chosen)),
            ..ChatRow::default()
        };
        let error = renderer.asked(rendered).unwrap_err().to_string();
        assert!(error.contains("rendered already"), "{error}");
    }
}
