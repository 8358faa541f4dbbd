//! What a model is asked: a conversation, or a text to go on with.

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use minijinja::Value;
use minijinja::value::Serde;
use serde::{Deserialize, Serialize};

use super::load::Manners;
use crate::text::tokenizer::Tokenizer;

/// A message of a conversation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant` or what the template knows.
    pub role: String,
    /// What is said.
    #[serde(default)]
    pub content: serde_json::Value,
    /// What else a template may read (`tool_calls`, `name`, ..).
    #[serde(flatten)]
    pub more: serde_json::Map<String, serde_json::Value>,
}

impl Message {
    /// A message of text.
    pub fn new(role: &str, content: impl Into<String>) -> Self {
        Self {
            role: role.to_owned(),
            content: serde_json::Value::String(content.into()),
            more: serde_json::Map::new(),
        }
    }
}

/// What a model is asked.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// A conversation, to which an answer is wanted.
    Chat(Vec<Message>),
    /// A text as it stands, which is gone on with.
    Text(String),
}

impl Prompt {
    /// The prompt's ids.
    pub(super) fn ids(&self, tokenizer: &Tokenizer, manners: &Manners) -> Result<Vec<u32>> {
        let ids = match self {
            Self::Text(text) => tokenizer.encode_with_special(text)?,
            Self::Chat(messages) => {
                let template = manners.template.as_ref().ok_or_else(|| {
                    anyhow!("the model has no chat template; hint: `--raw` goes on with a text as it stands, `--template FILE` gives one")
                })?;
                let messages: Vec<Value> = messages
                    .iter()
                    .map(|message| Value::from(Serde(message.clone())))
                    .collect();
                let text = template
                    .render(&messages, true)
                    .context("the chat template can't render this conversation")?;
                tokenizer.encode(&text)?
            }
        };
        ensure!(!ids.is_empty(), "the prompt is empty");
        Ok(ids)
    }

    /// A row of a file of prompts: a text, `{"prompt": text or messages}` or `{"messages": [..]}`, each with `system` if there is one.
    /// With `raw` texts are gone on with, else they are what a user says.
    ///
    /// # Errors
    /// A row of another form.
    pub fn from_json(row: &serde_json::Value, system: Option<&str>, raw: bool) -> Result<Self> {
        use serde_json::Value as Json;
        let (said, own) = match row {
            Json::Object(map) => {
                let said = map.get("messages").or_else(|| map.get("prompt"));
                let said = said.context("it has neither `prompt` nor `messages`")?;
                let own = map.get("system").and_then(Json::as_str);
                (said, own.filter(|own| !own.is_empty()))
            }
            other => (other, None),
        };
        match said {
            Json::String(text) if raw => Ok(Self::Text(text.clone())),
            Json::String(text) => Ok(Self::said(text, own.or(system))),
            Json::Array(_) if raw => {
                bail!("it holds messages; hint: without `--raw` the chat template renders them")
            }
            Json::Array(_) => {
                let mut messages: Vec<Message> = Vec::<Message>::deserialize(said)
                    .map_err(|error| anyhow!("its messages can't be read: {error}"))?;
                // A file of conversations has answers, too.
                while messages.last().is_some_and(|last| last.role == "assistant") {
                    messages.pop();
                }
                ensure!(!messages.is_empty(), "there is no message to answer");
                let has_system = messages.first().is_some_and(|first| first.role == "system");
                if let (Some(system), false) = (own.or(system), has_system) {
                    messages.insert(0, Message::new("system", system));
                }
                Ok(Self::Chat(messages))
            }
            _ => bail!("expected a text, or an object with `prompt` or `messages`"),
        }
    }

    /// What a user says, after what the system says.
    pub fn said(text: &str, system: Option<&str>) -> Self {
        let system = system.map(|system| Message::new("system", system));
        let user = Message::new("user", text);
        Self::Chat(system.into_iter().chain([user]).collect())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn rows_of_each_form_are_read() {
        let read = |row: serde_json::Value| Prompt::from_json(&row, Some("S"), false);
        let chat = |messages: &[(&str, &str)]| {
            let made = messages
                .iter()
                .map(|(role, text)| Message::new(role, *text));
            Prompt::Chat(made.collect())
        };
        let asked = chat(&[("system", "S"), ("user", "hi")]);
        assert_eq!(read(json!("hi")).unwrap(), asked);
        assert_eq!(read(json!({"prompt": "hi", "chosen": "x"})).unwrap(), asked);
        assert_eq!(
            read(json!({"prompt": "hi", "system": "T"})).unwrap(),
            chat(&[("system", "T"), ("user", "hi")])
        );
        let messages = json!({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]});
        assert_eq!(read(messages.clone()).unwrap(), asked);
        let raw = Prompt::from_json(&json!({"prompt": "Once"}), None, true).unwrap();
        assert_eq!(raw, Prompt::Text("Once".into()));
        for bad in [
            json!(3),
            json!({"text": "x"}),
            json!({"messages": []}),
            json!({"messages": [{"content": "x"}]}),
        ] {
            read(bad).unwrap_err();
        }
        Prompt::from_json(&messages, None, true).unwrap_err();
    }
}
