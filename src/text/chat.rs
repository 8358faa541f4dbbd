//! Turns a row into the text of a prompt and of its answers by TRL's rules (`apply_chat_template` in `trl/data_utils.py`): prompt and
//! answer are rendered together, and the prompt is the longest common beginning of that text and the prompt rendered alone. So
//! prompt and answer always join to exactly what the template prints. The entry point is [`Renderer::render`].

use std::collections::BTreeSet;
use std::ops::Range;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use minijinja::Value;
use serde::{Deserialize, Serialize};

use super::filters::is_space;
use super::rendered::{Frame, reads_parts};
use super::template::{ChatTemplate, Extras, message};
use super::turns::by_turns;

mod answered;

pub use answered::Asked;

/// A side of a row: one text, or messages.
#[derive(Debug, Clone)]
pub enum Side {
    /// The content of one message, or a whole conversation that is already rendered.
    Text(String),
    /// Messages with `role` and `content`.
    Messages(Vec<Value>),
}

/// The columns of a row that are rendered.
#[derive(Debug, Clone, Default)]
pub struct ChatRow {
    /// The system message.
    pub system: Option<String>,
    /// What comes before the answers.
    pub prompt: Option<Side>,
    /// The (better) answer.
    pub chosen: Option<Side>,
    /// The worse answer.
    pub rejected: Option<Side>,
    /// A whole conversation, used when there is no `chosen`.
    pub messages: Option<Vec<Value>>,
    /// What the template is given besides the messages.
    pub extras: Extras,
}

/// A row as text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rendered {
    /// The conversation up to where the answer begins.
    pub prompt: String,
    /// The (better) answer.
    pub chosen: String,
    /// The worse answer, for preferences.
    pub rejected: Option<String>,
    /// What the assistant says, as ranges of bytes of prompt and answer together, where it was asked for ([`Renderer::render_answers`]).
    pub answers: Option<Vec<Range<usize>>>,
    /// What was noticed about the row.
    pub seen: Seen,
}

impl Rendered {
    /// The bytes of its texts.
    pub fn bytes(&self) -> usize {
        self.prompt.len() + self.chosen.len() + self.rejected.as_ref().map_or(0, String::len)
    }
}

/// Observations about a row, which are counted and reported.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// The row was already rendered by this template, and is used unchanged.
    pub already_rendered: bool,
    /// The row looks as if another template had rendered it; it is treated as plain text.
    pub of_another_template: bool,
    /// A special token in the text of the row, which the tokenizer will encode as that token.
    pub special_token: Option<String>,
    /// The number of answers before the last one, in rows without a rejected answer. They are not trained on.
    pub earlier_answers: usize,
    /// The conversation does not end with an answer; the turns after the last answer were left out.
    pub end_left_out: bool,
    /// The row has both a `system` column and a system message among its messages; the column was left out.
    pub system_left_out: bool,
}

/// Renders rows with one template.
#[derive(Debug)]
pub struct Renderer {
    template: ChatTemplate,
    markers: Vec<String>,
    /// The first bytes of the markers. Most texts contain none of them, which makes the search fast.
    marker_begins: BTreeSet<u8>,
    frame: Frame,
    /// What the template puts before an answer.
    generation_prompt: String,
    reads_parts: bool,
    keep_empty_system: bool,
}

/// Roles that every template is expected to know.
const ROLES: [&str; 4] = ["system", "user", "assistant", "tool"];
/// Appended to the text that an answer continues, to find the end of that text in what the template prints.
const END_OF_PROMPT: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

impl Renderer {
    /// A renderer; an empty system message is left out unless `keep_empty_system`.
    pub fn new(template: ChatTemplate, keep_empty_system: bool) -> Self {
        let user = [message("user", "x")];
        // A template may refuse such a short conversation. Its generation prompt is then unknown.
        let with = template.render(&user, true).unwrap_or_default();
        let without = template.render(&user, false).unwrap_or_default();
        let generation_prompt = with.strip_prefix(&without).unwrap_or_default().to_owned();
        let markers = template.markers();
        let begins = markers.iter().filter_map(|marker| marker.bytes().next());
        let frame = Frame::from_template(&template, &markers);
        Self {
            marker_begins: begins.collect(),
            reads_parts: reads_parts(&template),
            frame,
            markers,
            template,
            generation_prompt,
            keep_empty_system,
        }
    }

    /// The template.
    pub fn template(&self) -> &ChatTemplate {
        &self.template
    }

    /// Whether the template reads a list of text parts as it reads a text.
    pub fn reads_parts(&self) -> bool {
        self.reads_parts
    }

    /// Whether a role is one of `ROLES` or occurs in the source of the template.
    pub fn knows_role(&self, role: &str) -> bool {
        let named = |quote: char| {
            let quoted = format!("{quote}{role}{quote}");
            self.template.source().contains(&quoted)
        };
        ROLES.contains(&role) || (!role.is_empty() && (named('\'') || named('"')))
    }

    /// Whether a name occurs anywhere in the source of the template.
    pub fn reads(&self, name: &str) -> bool {
        self.template.source().contains(name)
    }

    /// The row as text.
    pub fn render(&self, row: ChatRow) -> Result<Rendered> {
        let mut seen = self.look_at(&row);
        if seen.already_rendered
            && let Some(rendered) = self.already_rendered(&row)
        {
            return Ok(rendered);
        }
        seen.already_rendered = false;
        let extras = row.extras.clone();
        let (prompt, chosen, rejected) = self.conversation(row, &mut seen)?;
        ensure!(!prompt.is_empty(), "the row has an answer but no prompt");
        let opening = self
            .opening(&prompt, &extras)
            .context("the prompt could not be rendered")?;
        let whole = |answer: &[Value]| {
            let messages: Vec<Value> = prompt.iter().chain(answer).cloned().collect();
            self.template.render_with(&messages, false, &extras)
        };
        let chosen = whole(&chosen).context("`chosen` could not be rendered")?;
        let rejected = rejected
            .map(|answer| whole(&answer))
            .transpose()
            .context("`rejected` could not be rendered")?;
        let mut border = common_prefix(&opening, &chosen);
        if let Some(rejected) = &rejected {
            border = border.min(common_prefix(&opening, rejected));
        }
        Ok(Rendered {
            prompt: chosen[..border].to_owned(),
            rejected: rejected.map(|rejected| rejected[border..].to_owned()),
            chosen: chosen[border..].to_owned(),
            answers: None,
            seen,
        })
    }

    /// The row as text, and where in it the assistant speaks: in all of its turns, those of the prompt included. Whole conversations
    /// (`messages`) have an empty prompt, and nothing behind their last answer is left out.
    ///
    /// # Errors
    /// Besides those of [`Self::render`]: rows with a rejected answer, rows that are rendered already, and templates that print a
    /// conversation in another way when more follows, unless they have `{% generation %}` tags.
    pub fn render_answers(&self, row: ChatRow) -> Result<Rendered> {
        let mut seen = self.look_at(&row);
        ensure!(
            !seen.already_rendered,
            "the row is rendered already, so which parts of it the assistant says is not known; hint: import messages"
        );
        ensure!(
            row.rejected.is_none(),
            "the row has a `rejected`, and preferences are learnt from their answers alone; hint: leave the column out"
        );
        let extras = row.extras.clone();
        let (messages, before) = match row {
            ChatRow {
                chosen: None,
                messages: Some(messages),
                system,
                ..
            } => (self.with_system(system, messages, &mut seen), None),
            row => {
                let (mut prompt, chosen, _) = self.conversation(row, &mut seen)?;
                ensure!(!prompt.is_empty(), "the row has an answer but no prompt");
                let opening = self.opening(&prompt, &extras);
                let opening = opening.context("the prompt could not be rendered")?;
                prompt.extend(chosen);
                (prompt, Some(opening))
            }
        };
        seen.earlier_answers = 0;
        seen.end_left_out = false;
        let text = self
            .template
            .render_with(&messages, false, &extras)
            .context("the conversation could not be rendered")?;
        let answers = if self.template.has_generation() {
            self.template.generated(&messages, &extras, &text)?
        } else {
            by_turns(&self.template, &messages, &text, &extras)?
        };
        let border = before.map_or(0, |opening| common_prefix(&opening, &text));
        Ok(Rendered {
            prompt: text[..border].to_owned(),
            chosen: text[border..].to_owned(),
            rejected: None,
            answers: Some(answers),
            seen,
        })
    }

    /// The prompt alone, up to where the answer begins.
    fn opening(&self, prompt: &[Value], extras: &Extras) -> Result<String> {
        let Some((last, before)) = prompt.split_last() else {
            return self.template.render_with(prompt, true, extras);
        };
        if attribute(last, "role").as_deref() != Some("assistant") {
            return self.template.render_with(prompt, true, extras);
        }
        // The answer continues the last message, as with `continue_final_message` in transformers: what the template prints after
        // the text of that message does not belong to the prompt.
        let Some(content) = attribute(last, "content") else {
            return self.template.render_with(prompt, false, extras);
        };
        let continued = [content.as_str(), END_OF_PROMPT].concat();
        let mut messages = before.to_vec();
        messages.push(with_content(last, &continued));
        let mut text = self.template.render_with(&messages, false, extras)?;
        let end = text.rfind(END_OF_PROMPT.trim_end()).ok_or_else(|| {
            anyhow!("the template leaves out the end of the assistant's message that the answer is to continue")
        })?;
        let kept = text[end..].starts_with(END_OF_PROMPT);
        text.truncate(end);
        if !kept {
            // The template strips the text, and so its end.
            let stripped = text.trim_end_matches(is_space).len();
            text.truncate(stripped);
        }
        Ok(text)
    }

    /// Prompt and answers as messages.
    #[expect(clippy::type_complexity, reason = "used once")]
    fn conversation(
        &self,
        row: ChatRow,
        seen: &mut Seen,
    ) -> Result<(Vec<Value>, Vec<Value>, Option<Vec<Value>>)> {
        let ChatRow {
            system,
            prompt,
            chosen,
            rejected,
            messages,
            extras: _,
        } = row;
        let (prompt, chosen, rejected) = match (chosen, rejected) {
            (Some(Side::Text(chosen)), rejected) => {
                let rejected = match rejected {
                    Some(Side::Messages(_)) => bail!("`chosen` is text and `rejected` is messages"),
                    Some(Side::Text(text)) => Some(vec![message("assistant", &text)]),
                    None => None,
                };
                let prompt = prompt.ok_or_else(|| anyhow!("the row has no `prompt`"))?;
                (
                    prompt.into_messages("user"),
                    vec![message("assistant", &chosen)],
                    rejected,
                )
            }
            (Some(Side::Messages(chosen)), Some(Side::Messages(rejected))) => {
                let (prompt, chosen, rejected) = split_pair(prompt, chosen, rejected);
                ensure!(
                    !prompt.is_empty() || chosen.is_empty() || rejected.is_empty(),
                    "`chosen` and `rejected` begin with different messages, so there is no prompt to both; \
                     hint: let both begin with the same turn of the user, or give the row a `prompt`"
                );
                (prompt, chosen, Some(rejected))
            }
            (Some(Side::Messages(_)), Some(Side::Text(_))) => {
                bail!("`chosen` is messages and `rejected` is text")
            }
            (Some(Side::Messages(chosen)), None) => {
                let (prompt, chosen) = match prompt.map(|prompt| prompt.into_messages("user")) {
                    Some(prompt) if chosen.starts_with(&prompt) => {
                        let answer = chosen[prompt.len()..].to_vec();
                        (prompt, answer)
                    }
                    Some(prompt) => (prompt, chosen),
                    None => split_last(chosen, seen)?,
                };
                (prompt, chosen, None)
            }
            (None, Some(_)) => bail!("the row has `rejected` but no `chosen`"),
            (None, None) => {
                let messages = messages
                    .ok_or_else(|| anyhow!("the row has neither `chosen` nor `messages`"))?;
                let (prompt, chosen) = split_last(messages, seen)?;
                (prompt, chosen, None)
            }
        };
        ensure!(
            !chosen.is_empty(),
            "`chosen` has no message after the prompt"
        );
        ensure!(
            rejected
                .as_ref()
                .is_none_or(|rejected| !rejected.is_empty()),
            "`rejected` has no message after the prompt"
        );
        Ok((self.with_system(system, prompt, seen), chosen, rejected))
    }

    /// Messages with that of the column `system` before them, unless they have one of their own.
    fn with_system(
        &self,
        system: Option<String>,
        mut messages: Vec<Value>,
        seen: &mut Seen,
    ) -> Vec<Value> {
        let system = system.filter(|system| self.keep_empty_system || !system.is_empty());
        let first = messages.first().and_then(|first| attribute(first, "role"));
        let has_system = first.as_deref() == Some("system");
        seen.system_left_out = has_system && system.is_some();
        if let Some(system) = system.filter(|_| !has_system) {
            messages.insert(0, message("system", &system));
        }
        messages
    }

    fn look_at(&self, row: &ChatRow) -> Seen {
        let mut seen = Seen::default();
        let sides = [
            (&row.prompt, true),
            (&row.chosen, false),
            (&row.rejected, false),
        ];
        let sides = sides.into_iter();
        for (side, is_prompt) in sides.filter_map(|(side, is)| Some((side.as_ref()?, is))) {
            match side {
                Side::Text(text) => {
                    self.look_at_text(text, &mut seen);
                    seen.already_rendered |= if is_prompt {
                        self.frame.is_rendered_prompt(text)
                    } else {
                        self.frame.is_rendered(text)
                    };
                    seen.of_another_template |= Frame::is_of_another(text);
                }
                Side::Messages(messages) => self.look_at_messages(messages, &mut seen),
            }
        }
        self.look_at_messages(row.messages.as_deref().unwrap_or_default(), &mut seen);
        if let Some(system) = &row.system {
            self.look_at_text(system, &mut seen);
        }
        seen.of_another_template &= !seen.already_rendered;
        seen
    }

    fn look_at_messages(&self, messages: &[Value], seen: &mut Seen) {
        for message in messages {
            let content = message.get_attr("content").unwrap_or_default();
            if let Some(text) = content.as_str() {
                self.look_at_text(text, seen);
                continue;
            }
            for part in content.try_iter().into_iter().flatten() {
                if let Some(text) = attribute(&part, "text") {
                    self.look_at_text(&text, seen);
                }
            }
        }
    }

    fn look_at_text(&self, text: &str, seen: &mut Seen) {
        let begins = |byte: &u8| text.as_bytes().contains(byte);
        if seen.special_token.is_some() || !self.marker_begins.iter().any(begins) {
            return;
        }
        let found = self
            .markers
            .iter()
            .find(|marker| text.contains(marker.as_str()));
        seen.special_token = found.cloned();
    }

    /// The prompt and answers of a row whose texts are already rendered; `None` if the beginning of the answers can't be found.
    fn already_rendered(&self, row: &ChatRow) -> Option<Rendered> {
        let text = |side: &Option<Side>| match side {
            Some(Side::Text(text)) => Some(text.clone()),
            _ => None,
        };
        let chosen = text(&row.chosen)?;
        let rejected = text(&row.rejected);
        let prompt = text(&row.prompt).unwrap_or_default();
        let rendered = |prompt: &str, border: usize| Rendered {
            prompt: prompt.to_owned(),
            chosen: chosen[border..].to_owned(),
            rejected: rejected
                .as_ref()
                .map(|rejected| rejected[border..].to_owned()),
            answers: None,
            seen: Seen {
                already_rendered: true,
                ..Seen::default()
            },
        };
        let begins = |text: &str| self.frame.begins(text);
        if begins(&prompt) && !begins(&chosen) {
            return Some(rendered(&prompt, 0));
        }
        let both = |start: &str| {
            chosen.starts_with(start)
                && rejected.as_ref().is_none_or(|text| text.starts_with(start))
        };
        if begins(&prompt) && both(&prompt) {
            return Some(rendered(&prompt, prompt.len()));
        }
        // Both answers contain the whole conversation. The prompt ends after the generation prompt of the template.
        let common = rejected
            .as_ref()
            .map_or(chosen.len(), |rejected| common_prefix(&chosen, rejected));
        let opens = if self.generation_prompt.is_empty() {
            &self.frame.answer
        } else {
            &self.generation_prompt
        };
        let start = (!opens.is_empty()).then(|| chosen[..common].rfind(opens));
        let start = start.flatten().filter(|_| begins(&chosen))?;
        let border = start + opens.len();
        Some(rendered(&chosen[..border], border))
    }
}

impl Side {
    fn into_messages(self, role: &str) -> Vec<Value> {
        match self {
            Self::Text(text) => vec![message(role, &text)],
            Self::Messages(messages) => messages,
        }
    }
}

/// Splits two lists of messages, each of which may be a whole conversation, into their common beginning (the prompt) and the rest.
fn split_pair(
    prompt: Option<Side>,
    mut chosen: Vec<Value>,
    mut rejected: Vec<Value>,
) -> (Vec<Value>, Vec<Value>, Vec<Value>) {
    if let Some(Side::Messages(prompt)) = prompt {
        if !prompt.is_empty() && chosen.starts_with(&prompt) && rejected.starts_with(&prompt) {
            chosen.drain(..prompt.len());
            rejected.drain(..prompt.len());
        }
        return (prompt, chosen, rejected);
    }
    let whole = chosen
        .first()
        .and_then(|first| attribute(first, "role"))
        .is_some_and(|role| role != "assistant");
    if let (Some(Side::Text(text)), false) = (&prompt, whole) {
        return (vec![message("user", text)], chosen, rejected);
    }
    // At least one message remains as the answer, even if the lists are equal.
    let most = chosen.len().min(rejected.len()).saturating_sub(1);
    let alike = chosen
        .iter()
        .zip(&rejected)
        .take(most)
        .take_while(|(a, b)| a == b)
        .count();
    let prompt = chosen.drain(..alike).collect();
    rejected.drain(..alike);
    (prompt, chosen, rejected)
}

/// Splits a conversation into what comes before its last answer and that answer. Messages after the answer can't be trained on; they
/// are dropped, which is recorded in `seen`.
fn split_last(mut messages: Vec<Value>, seen: &mut Seen) -> Result<(Vec<Value>, Vec<Value>)> {
    let last = messages
        .iter()
        .rposition(|message| attribute(message, "role").as_deref() == Some("assistant"))
        .ok_or_else(|| anyhow!("the conversation has no message of the role `assistant`"))?;
    seen.end_left_out = last + 1 < messages.len();
    messages.truncate(last + 1);
    let answer = messages.split_off(last);
    let answers = messages
        .iter()
        .filter(|message| attribute(message, "role").as_deref() == Some("assistant"));
    seen.earlier_answers = answers.count();
    Ok((messages, answer))
}

/// A message with another content.
fn with_content(message: &Value, content: &str) -> Value {
    let keys = message.try_iter().into_iter().flatten();
    let entries = keys.map(|key| {
        let value = if key.as_str() == Some("content") {
            Value::from(content)
        } else {
            message.get_item(&key).unwrap_or_default()
        };
        (key, value)
    });
    Value::from_pairs(entries)
}

fn attribute(message: &Value, name: &str) -> Option<String> {
    let value = message.get_attr(name).ok()?;
    value.as_str().map(str::to_owned)
}

/// The length in bytes of the longest common beginning of `a` and `b` that ends between characters.
fn common_prefix(a: &str, b: &str) -> usize {
    const STEP: usize = 32;
    let (a_bytes, b_bytes) = (a.as_bytes(), b.as_bytes());
    let steps = a_bytes.chunks_exact(STEP).zip(b_bytes.chunks_exact(STEP));
    let mut alike = STEP * steps.take_while(|(a, b)| a == b).count();
    let rest = a_bytes[alike..].iter().zip(&b_bytes[alike..]);
    alike += rest.take_while(|(a, b)| a == b).count();
    while !a.is_char_boundary(alike) {
        alike -= 1;
    }
    alike
}

#[cfg(test)]
mod answers_tests;
#[cfg(test)]
mod tests;
