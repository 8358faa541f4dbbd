//! Chat templates that a recipe names, in our own words. Each prints what the template prints that the models it is named for came
//! with; a golden test compares them.

use super::template::LLAMA3;

/// A built-in chat template.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BuiltIn {
    /// Llama 3 and Llama 3 Instruct.
    Llama3,
    /// ChatML without a system message of its own: OpenHermes and many others.
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
    /// Zephyr and TinyLlama.
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
