//! Chat templates that a recipe names, in our own words. Each prints what the template prints that the models it is named for came
//! with; a golden test compares them.

use super::template::LLAMA3;

/// A built-in chat template.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BuiltIn {
    /// Llama 3 and Llama 3 Instruct.
    Llama3,
    /// ChatML without a system message of its own: `OpenHermes` and many others.
    Chatml,
    /// Qwen3, with tools and thinking.
    Qwen3,
    /// Gemma 1, 2 and 3; a system message goes into the first user's, as Gemma 3 has it.
    Gemma,
    /// Mistral 7B Instruct v0.3, but that a system message goes before the first question: the original leaves it out unless
    /// the conversation ends with a question.
    Mistral,
    /// Phi-3 and Phi-3.5 mini.
    Phi3,
    /// Zephyr and `TinyLlama`.
    Zephyr,
    /// Stanford's Alpaca.
    Alpaca,
}

impl BuiltIn {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Llama3,
        Self::Chatml,
        Self::Qwen3,
        Self::Gemma,
        Self::Mistral,
        Self::Phi3,
        Self::Zephyr,
        Self::Alpaca,
    ];

    /// The name in recipes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama3 => "llama3",
            Self::Chatml => "chatml",
            Self::Qwen3 => "qwen3",
            Self::Gemma => "gemma",
            Self::Mistral => "mistral",
            Self::Phi3 => "phi3",
            Self::Zephyr => "zephyr",
            Self::Alpaca => "alpaca",
        }
    }

    /// The template with a name, if there is one.
    pub fn of(name: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|template| template.name() == name)
    }

    /// All names, for messages.
    pub fn names() -> String {
        Self::ALL
            .map(|template| format!("`{}`", template.name()))
            .join(", ")
    }

    /// The template in Jinja.
    pub fn source(self) -> &'static str {
        match self {
            Self::Llama3 => LLAMA3,
            Self::Chatml => include_str!("builtin/chatml.jinja"),
            Self::Qwen3 => include_str!("builtin/qwen3.jinja"),
            Self::Gemma => include_str!("builtin/gemma.jinja"),
            Self::Mistral => include_str!("builtin/mistral.jinja"),
            Self::Phi3 => include_str!("builtin/phi3.jinja"),
            Self::Zephyr => include_str!("builtin/zephyr.jinja"),
            Self::Alpaca => include_str!("builtin/alpaca.jinja"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;

    use super::super::template::{ChatTemplate, Extras};
    use super::*;
    use crate::data::cell::Cell;

    #[derive(Deserialize)]
    struct Case {
        template: String,
        conversation: String,
        messages: Vec<Cell>,
        tools: Option<Vec<Cell>>,
        #[serde(default)]
        add_generation_prompt: bool,
        enable_thinking: Option<bool>,
        text: String,
    }

    #[test]
    fn they_print_what_the_originals_print() {
        let cases = include_str!("../../tests/golden/templates/builtin.json");
        let cases: Vec<Case> = serde_json::from_str(cases).unwrap();
        assert_eq!(cases.len(), 107);
        for template in BuiltIn::ALL {
            assert_eq!(BuiltIn::of(template.name()), Some(template));
            let tokens = [
                ("bos_token", "<s>"),
                ("eos_token", "</s>"),
                ("pad_token", "<pad>"),
                ("unk_token", "<unk>"),
            ];
            let tokens = tokens.map(|(name, token)| (name.to_owned(), token.to_owned()));
            let compiled = ChatTemplate::new(template.source(), tokens.into(), None).unwrap();
            let of = cases.iter().filter(|case| case.template == template.name());
            let mut compared = 0;
            for case in of {
                let values = |cells: &[Cell]| -> Vec<minijinja::Value> {
                    cells
                        .iter()
                        .map(|cell| minijinja::Value::from(minijinja::value::Serde(cell.clone())))
                        .collect()
                };
                let thinking = case
                    .enable_thinking
                    .map(|thinks| ("enable_thinking".to_owned(), minijinja::Value::from(thinks)));
                let extras = Extras {
                    tools: case.tools.as_deref().map(|tools| values(tools).into()),
                    variables: thinking.into_iter().collect::<BTreeMap<_, _>>(),
                };
                let text = compiled.render_with(
                    &values(&case.messages),
                    case.add_generation_prompt,
                    &extras,
                );
                let name = format!("{}, {}", case.template, case.conversation);
                assert_eq!(text.expect(&name), case.text, "{name}");
                compared += 1;
            }
            assert!(compared > 1, "{}", template.name());
        }
    }

    #[test]
    fn roles_that_a_template_does_not_know_are_refused() {
        for template in [
            BuiltIn::Zephyr,
            BuiltIn::Phi3,
            BuiltIn::Alpaca,
            BuiltIn::Mistral,
        ] {
            let compiled = ChatTemplate::new(template.source(), BTreeMap::new(), None).unwrap();
            let chat = [super::super::template::message("developer", "x")];
            let error = compiled.render(&chat, false).unwrap_err().to_string();
            assert!(
                error.contains("developer") || error.contains("turns"),
                "{error}"
            );
        }
    }
}
