//! What a chat template puts around each turn, found by rendering conversations: for formats that can't run Jinja.
//!
//! A template whose output is a constant text before and behind each turn is *plain*. [`PlainTemplate::find`] renders a few conversations whose
//! contents are words that no template has, cuts the texts at them, and compares what it found with the template on others. What
//! passes is told exactly for every conversation of that shape; what does not is no plain template.

use minijinja::Value;

use super::template::{ChatTemplate, message};

/// The texts around the turns of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlainTemplate {
    /// What stands at the beginning where there is no system message: a BOS, or a system message of the template's own.
    pub begin: String,
    /// The system message.
    pub system: System,
    /// Before and behind a user's turn.
    pub user: (String, String),
    /// Before and behind an assistant's turn.
    pub assistant: (String, String),
    /// What begins the answer that is to be generated.
    pub generation_prompt: String,
    /// Whether the template removes white space around contents.
    pub trims: bool,
}

/// Where a system message stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum System {
    /// In a turn of its own in place of [`PlainTemplate::begin`], between these texts.
    Own(String, String),
    /// In the first user's turn before its content, followed by this text.
    InFirst(String),
    /// In the last user's turn before its content, followed by this text.
    InLast(String),
    /// The template has no place for it: it refuses one, or leaves it out.
    None,
}

/// A turn for a probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    System,
    User,
    Assistant,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

/// Contents that stand in no template, and in which nothing is to be trimmed or escaped.
const WORDS: [&str; 6] = [
    "zq0vfirst",
    "zq1vsecond",
    "zq2vthird",
    "zq3vfourth",
    "zq4vfifth",
    "zq5vsixth",
];

type Turn<'t> = (Role, &'t str);

/// A conversation to which no answer is asked for, and what the template puts behind a whole conversation in place of a generation prompt: an
/// EOS (Phi-3) or nothing.
struct Closed {
    end: String,
}

impl Closed {
    /// By a conversation as it is rendered, and the same with a generation prompt.
    fn find(template: &ChatTemplate, closed: &str, asked: &str) -> Option<Self> {
        if asked.starts_with(closed) {
            return Some(Self { end: String::new() });
        }
        let end = template.special_token("eos_token")?;
        let open = closed.strip_suffix(end)?;
        asked.starts_with(open).then(|| Self {
            end: end.to_owned(),
        })
    }

    fn render(&self, template: &ChatTemplate, turns: &[Turn<'_>]) -> Option<String> {
        let text = render(template, turns, false)?;
        text.strip_suffix(self.end.as_str()).map(str::to_owned)
    }
}

fn render(template: &ChatTemplate, turns: &[Turn<'_>], generate: bool) -> Option<String> {
    let messages: Vec<Value> = turns
        .iter()
        .map(|(role, content)| message(role.name(), content))
        .collect();
    template.render(&messages, generate).ok()
}

/// The text between the words of a probe, if each stands there once and in order.
fn cut(text: &str, turns: &[Turn<'_>]) -> Option<Vec<String>> {
    let mut parts = Vec::new();
    let mut rest = text;
    for (_, word) in turns {
        let (before, behind) = rest.split_once(word)?;
        parts.push(before.to_owned());
        rest = behind;
    }
    parts.push(rest.to_owned());
    let repeated = |part: &String| turns.iter().any(|(_, word)| part.contains(word));
    (!parts.iter().any(repeated)).then_some(parts)
}

/// How many bytes two texts end alike, on a character's boundary.
fn common_end(a: &str, b: &str) -> usize {
    let alike = a.chars().rev().zip(b.chars().rev());
    alike
        .take_while(|(a, b)| a == b)
        .map(|(a, _)| a.len_utf8())
        .sum()
}

impl PlainTemplate {
    /// The texts around the turns of `template`, or `None` if it is not plain.
    pub fn find(template: &ChatTemplate) -> Option<Self> {
        use Role::{Assistant, System as Says, User};
        let long = [(User, WORDS[0]), (Assistant, WORDS[1]), (User, WORDS[2])];
        let asked = render(template, &long[..1], true)?;
        let closed = render(template, &long[..1], false)?;
        let closed = Closed::find(template, &closed, &asked)?;
        let open = closed.render(template, &long[..1])?;
        let generation_prompt = asked.strip_prefix(&open)?.to_owned();
        let short = cut(&open, &long[..1])?;
        let parts = cut(&closed.render(template, &long)?, &long)?;
        let [first, behind_user] = &short[..] else {
            return None;
        };
        let [begin, to_assistant, to_user, end] = &parts[..] else {
            return None;
        };
        if begin != first || end != behind_user {
            return None;
        }
        let before_assistant = to_assistant.strip_prefix(behind_user.as_str())?;
        // Any cut between the turns prints the same. Where both kinds of turns end alike it is there, else before what all users' turns have.
        let alike = to_user
            .strip_prefix(behind_user.as_str())
            .filter(|before| begin.ends_with(before));
        let bos = template
            .special_token("bos_token")
            .filter(|bos| begin.starts_with(bos));
        let common = match common_end(begin, to_user) {
            whole if whole == begin.len() => whole,
            // A BOS is not cut in two.
            part => part.min(begin.len() - bos.map_or(0, str::len)),
        };
        let before_user = alike.or_else(|| to_user.get(to_user.len() - common..))?;
        let begin = begin.strip_suffix(before_user)?;
        let behind_assistant = to_user.strip_suffix(before_user)?;
        let mut turns = Self {
            begin: begin.to_owned(),
            system: System::None,
            user: (before_user.to_owned(), behind_user.clone()),
            assistant: (before_assistant.to_owned(), behind_assistant.to_owned()),
            generation_prompt,
            trims: false,
        };
        turns.system = turns.find_system(template)?;
        let padded = format!(" {}\n", WORDS[0]);
        let padded = [(User, padded.as_str())];
        turns.trims = render(template, &padded, true)? != turns.render(&padded, true);
        let probes: [&[Turn<'_>]; 4] = [
            &[
                (User, WORDS[5]),
                (Assistant, WORDS[4]),
                (User, WORDS[3]),
                (Assistant, WORDS[2]),
                (User, WORDS[1]),
            ],
            &[(User, "Was it 3 < 4 & \"5\"?")],
            &[(Says, "Be {{ kind }} and\n\nbrief."), (User, WORDS[1])],
            &[
                (Says, WORDS[0]),
                (User, WORDS[1]),
                (Assistant, "Yes.\nNo."),
                (User, "naïve — 你好 🙂"),
            ],
        ];
        let agrees = probes.iter().all(|probe| {
            let has_system = probe.iter().any(|(role, _)| *role == Says);
            (has_system && turns.system == System::None)
                || render(template, probe, true).as_deref() == Some(&turns.render(probe, true))
        });
        agrees.then_some(turns)
    }

    /// Where a system message stands; `None` if that can't be told.
    fn find_system(&self, template: &ChatTemplate) -> Option<System> {
        use Role::{Assistant, System as Says, User};
        let probe = [
            (Says, WORDS[3]),
            (User, WORDS[0]),
            (Assistant, WORDS[1]),
            (User, WORDS[2]),
        ];
        // A template may refuse a system message.
        let Some(text) = render(template, &probe, false) else {
            return Some(System::None);
        };
        if !text.contains(WORDS[3]) {
            return Some(System::None);
        }
        if let Some(parts) = cut(&text, &probe) {
            let [before, behind, ..] = &parts[..] else {
                return None;
            };
            let in_first = format!("{}{}", self.begin, self.user.0);
            if *before == in_first {
                return Some(System::InFirst(behind.clone()));
            }
            let behind = behind.strip_suffix(self.user.0.as_str())?;
            return Some(System::Own(before.clone(), behind.to_owned()));
        }
        let last = [probe[1], probe[2], probe[0], probe[3]];
        let parts = cut(&text, &last)?;
        parts.get(3).map(|behind| System::InLast(behind.clone()))
    }

    /// The conversation as text, which is what the template prints for it. The contents are taken as they are.
    fn render(&self, turns: &[Turn<'_>], generate: bool) -> String {
        let system = turns.iter().find(|(role, _)| *role == Role::System);
        let system = system.map(|(_, content)| *content);
        let mut text = match (&self.system, system) {
            (System::Own(before, behind), Some(system)) => format!("{before}{system}{behind}"),
            _ => self.begin.clone(),
        };
        let users: Vec<usize> = (0..turns.len())
            .filter(|at| turns[*at].0 == Role::User)
            .collect();
        for (at, (role, content)) in turns.iter().enumerate() {
            let (before, behind) = match role {
                Role::System => continue,
                Role::User => &self.user,
                Role::Assistant => &self.assistant,
            };
            text.push_str(before);
            let place = match &self.system {
                System::InFirst(between) => users.first().map(|first| (*first, between)),
                System::InLast(between) => users.last().map(|last| (*last, between)),
                System::Own(..) | System::None => None,
            };
            if let (Some((place, between)), Some(system)) = (place, system)
                && place == at
            {
                text.push_str(system);
                text.push_str(between);
            }
            text.push_str(content);
            text.push_str(behind);
        }
        if generate {
            text.push_str(&self.generation_prompt);
        }
        text
    }

    /// The template in Go's language, as Ollama reads it, without `bos` at its beginning, which llama.cpp puts there itself where the
    /// vocabulary says so. An assistant's turn at the end stays open, so that it is continued.
    pub fn go_template(&self, bos: Option<&str>) -> String {
        let without_bos = |text: &str| {
            let rest = bos.and_then(|bos| text.strip_prefix(bos));
            literal(rest.unwrap_or(text))
        };
        let mut out = String::new();
        match &self.system {
            System::Own(before, behind) => {
                out.push_str("{{ if .System }}");
                out.push_str(&without_bos(before));
                out.push_str("{{ .System }}");
                out.push_str(&literal(behind));
                let begin = without_bos(&self.begin);
                if !begin.is_empty() {
                    out.push_str("{{ else }}");
                    out.push_str(&begin);
                }
                out.push_str("{{ end }}");
            }
            _ => out.push_str(&without_bos(&self.begin)),
        }
        out.push_str("{{ range $i, $_ := .Messages }}");
        out.push_str("{{ $last := eq (len (slice $.Messages $i)) 1 }}");
        out.push_str("{{ if eq .Role \"user\" }}");
        let place = match &self.system {
            // A system message is the first of the messages.
            System::InFirst(between) => Some(("(eq $i 1)", between)),
            System::InLast(between) => Some(("$last", between)),
            System::Own(..) | System::None => None,
        };
        // What comes first in the file may also begin a user's turn.
        out.push_str(&if self.begin.is_empty() {
            literal_after_bos(&self.user.0, bos)
        } else {
            literal(&self.user.0)
        });
        if let Some((condition, between)) = place {
            out.push_str("{{ if and $.System ");
            out.push_str(condition);
            out.push_str(" }}{{ $.System }}");
            out.push_str(&literal(between));
            out.push_str("{{ end }}");
        }
        out.push_str("{{ .Content }}");
        out.push_str(&literal(&self.user.1));
        out.push_str("{{ else if eq .Role \"assistant\" }}");
        out.push_str(&literal(&self.assistant.0));
        out.push_str("{{ .Content }}{{ if not $last }}");
        out.push_str(&literal(&self.assistant.1));
        out.push_str("{{ end }}{{ end }}");
        out.push_str("{{ if and $last (ne .Role \"assistant\") }}");
        out.push_str(&literal(&self.generation_prompt));
        out.push_str("{{ end }}{{ end }}");
        out
    }
}

/// A text that begins every user's turn and, in the first, a BOS too: such a template begins each of them with a BOS, which stays.
fn literal_after_bos(text: &str, bos: Option<&str>) -> String {
    match bos.and_then(|bos| text.strip_prefix(bos).map(|rest| (bos, rest))) {
        Some((bos, rest)) => format!(
            "{{{{ if gt $i 1 }}}}{}{{{{ end }}}}{}",
            literal(bos),
            literal(rest)
        ),
        None => literal(text),
    }
}

/// A text in a template of Go's.
fn literal(text: &str) -> String {
    text.replace("{{", "{{ \"{{\" }}")
}

#[cfg(test)]
mod tests;
