//! Distinguishes a conversation that is already rendered from a text that only mentions special tokens, by what the template puts
//! before a conversation and before an answer.

use minijinja::Value;

use super::filters::strip;
use super::template::{ChatTemplate, message};

/// The beginnings of conversations rendered by well-known templates, each with a marker that also occurs in them.
const OTHERS: &[(&str, &str)] = &[
    ("<|im_start|>", "<|im_end|>"),
    ("<|begin_of_text|><|start_header_id|>", "<|end_header_id|>"),
    ("<|start_header_id|>", "<|end_header_id|>"),
    ("[INST]", "[/INST]"),
    ("<s>[INST]", "[/INST]"),
    ("<bos><start_of_turn>", "<end_of_turn>"),
    ("<start_of_turn>", "<end_of_turn>"),
    ("<|user|>", "<|assistant|>"),
    ("<|system|>", "<|assistant|>"),
];

/// The text that a template puts around messages.
#[derive(Debug, Default)]
pub(super) struct Frame {
    /// What a conversation can begin with: the text before a user message and before a system message.
    openings: Vec<String>,
    /// The text between a user message and an answer.
    pub(super) answer: String,
}

impl Frame {
    /// Finds the frame in conversations that the template renders. Conversations that it refuses are ignored.
    pub(super) fn from_template(template: &ChatTemplate, markers: &[String]) -> Self {
        const SYSTEM: &str = "Sq5wv";
        const USER: &str = "Uq7xk";
        const ANSWER: &str = "Aq9zj";
        let marked = |text: &str| markers.iter().any(|marker| text.contains(marker.as_str()));
        let plain = [message("user", USER), message("assistant", ANSWER)];
        let system = [
            message("system", SYSTEM),
            message("user", USER),
            message("assistant", ANSWER),
        ];
        let mut frame = Self::default();
        for (first, chat) in [(USER, &plain[..]), (SYSTEM, &system[..])] {
            let Ok(text) = template.render(chat, false) else {
                continue;
            };
            let opening = text.find(first).map(|at| strip(&text[..at]));
            if let Some(opening) = opening.filter(|opening| opening.len() > 2 && marked(opening)) {
                frame.openings.push(opening.to_owned());
            }
            let between = text
                .find(USER)
                .zip(text.find(ANSWER))
                .and_then(|(user, answer)| text.get(user + USER.len()..answer));
            if frame.answer.is_empty()
                && let Some(between) = between.filter(|between| marked(between))
            {
                between.clone_into(&mut frame.answer);
            }
        }
        // The first special token may have been left to the tokenizer.
        let bos = template.special_token("bos_token").unwrap_or_default();
        let bare = |opening: &String| {
            let bare = strip(opening.strip_prefix(bos).unwrap_or(opening));
            (bare.len() > 2 && marked(bare)).then(|| bare.to_owned())
        };
        let bare: Vec<String> = frame.openings.iter().filter_map(bare).collect();
        frame.openings.extend(bare);
        frame
    }

    /// Whether a text begins as a conversation of this template does.
    pub(super) fn begins(&self, text: &str) -> bool {
        let text = strip(text);
        self.openings
            .iter()
            .any(|opening| text.starts_with(opening.as_str()))
    }

    /// Whether a text is a conversation up to an answer, or with one.
    pub(super) fn is_rendered(&self, text: &str) -> bool {
        !self.answer.is_empty() && self.begins(text) && text.contains(strip(&self.answer))
    }

    /// Whether a prompt is a conversation up to where an answer begins.
    pub(super) fn is_rendered_prompt(&self, text: &str) -> bool {
        self.is_rendered(text) && strip(text).ends_with(strip(&self.answer))
    }

    /// Whether a text looks like the work of another template.
    pub(super) fn is_of_another(text: &str) -> bool {
        let text = strip(text);
        OTHERS
            .iter()
            .any(|(begin, mark)| text.starts_with(begin) && text.contains(mark))
    }
}

/// Whether a template reads a content that is a list of parts: as it reads the text itself, or nothing else, as some for images do.
pub(super) fn reads_parts(template: &ChatTemplate) -> bool {
    const TEXT: &str = "Pq3vt";
    let part = |text: &str| Value::from_pairs([("type", "text"), ("text", text)]);
    let of_parts = |role: &str, text: &str| {
        Value::from_pairs([
            ("role", Value::from(role)),
            ("content", Value::from(vec![part(text)])),
        ])
    };
    let texts = [message("user", TEXT), message("assistant", TEXT)];
    let parts = [of_parts("user", TEXT), of_parts("assistant", TEXT)];
    match (template.render(&texts, true), template.render(&parts, true)) {
        (Ok(texts), Ok(parts)) => texts == parts || (parts.contains(TEXT) && !texts.contains(TEXT)),
        (Err(_), Ok(parts)) => parts.contains(TEXT),
        _ => false,
    }
}
