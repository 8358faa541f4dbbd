//! A conversation: what was said, what is answered, and the commands in between.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::Context as _;
use serde_json::json;

use super::Signals;
use super::columns::columns;
use super::input::{Input, Said};
use crate::cli::{Failure, eprint_rendered, error, print_rendered};
use crate::inference::{FinishReason, Message, Options, Piece, Prompt, Reply, Voice};
use crate::report::harmless;
use crate::report::style::{BOLD, DIM, paint};

const HELP: &str = "\
/reset            forget what was said
/system TEXT      what the system says first, from now on; without TEXT nothing
/set NAME VALUE   temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens or seed
/retry            another answer to what you said last
/save FILE        add the conversation to a file of JSON lines, as `import_dataset` reads it
/quit             end
Three quotation marks begin and end a text of several lines.
";

/// One of the models that answer.
pub(super) struct Side<'a> {
    pub(super) name: &'static str,
    pub(super) voice: Voice<'a>,
    messages: Vec<Message>,
}

impl<'a> Side<'a> {
    pub(super) fn new(name: &'static str, voice: Voice<'a>) -> Self {
        Self {
            name,
            voice,
            messages: Vec::new(),
        }
    }
}

pub(super) struct Session<'a> {
    sides: Vec<Side<'a>>,
    system: Option<String>,
    at_terminal: bool,
    signals: Arc<Signals>,
}

/// What a line asks for.
enum Next {
    Answer(String),
    Retry,
    Nothing,
    End,
}

impl<'a> Session<'a> {
    pub(super) fn new(
        sides: Vec<Side<'a>>,
        system: Option<String>,
        at_terminal: bool,
        signals: Arc<Signals>,
    ) -> Self {
        Self {
            sides,
            system,
            at_terminal,
            signals,
        }
    }

    /// Goes on until the user ends it.
    pub(super) fn run(&mut self, input: &mut Input) -> Result<(), Failure> {
        let mut warned = false;
        loop {
            self.signals.answering.store(false, Ordering::Relaxed);
            let said = match input.next()? {
                Said::End => return Ok(()),
                Said::Interrupt if warned => return Ok(()),
                Said::Interrupt => {
                    warned = true;
                    tell("Ctrl-C again, Ctrl-D or /quit ends the conversation");
                    continue;
                }
                Said::Text(text) => text,
            };
            warned = false;
            let next = match self.command(&said) {
                Ok(next) => next,
                Err(mistake) if self.at_terminal => {
                    eprint_rendered(&error::plain(&format!("{mistake:#}")));
                    continue;
                }
                Err(mistake) => return Err(mistake.into()),
            };
            let text = match next {
                Next::End => return Ok(()),
                Next::Nothing => continue,
                Next::Answer(text) => Some(text),
                Next::Retry => None,
            };
            match self.answer(text) {
                Ok(ControlFlow::Continue(())) => {}
                Ok(ControlFlow::Break(())) => return Ok(()),
                Err(mistake) if self.at_terminal => {
                    eprint_rendered(&error::plain(&format!("{mistake:#}")));
                }
                Err(mistake) => return Err(mistake.into()),
            }
        }
    }

    fn command(&mut self, said: &str) -> anyhow::Result<Next> {
        let trimmed = said.trim();
        if trimmed.is_empty() {
            return Ok(Next::Nothing);
        }
        let (name, rest) = trimmed
            .split_once(char::is_whitespace)
            .unwrap_or((trimmed, ""));
        let rest = rest.trim();
        match name {
            "/quit" | "/exit" | "/bye" => return Ok(Next::End),
            "/help" | "/?" => eprint_rendered(HELP),
            "/reset" | "/clear" => {
                for side in &mut self.sides {
                    side.messages.clear();
                    side.voice.restart();
                }
                tell("forgotten");
            }
            "/system" => {
                self.system = (!rest.is_empty()).then(|| rest.to_owned());
                tell(match &self.system {
                    Some(_) => "the system says so from the next answer on",
                    None => "the system says nothing from the next answer on",
                });
            }
            "/set" => {
                let (name, value) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
                self.set(name, value.trim())?;
            }
            "/retry" => return Ok(Next::Retry),
            "/save" => self.save(rest)?,
            // From a pipe it may be anything.
            _ if self.at_terminal && name.starts_with('/') => {
                anyhow::bail!("there is no command `{name}`; /help lists them")
            }
            _ => return Ok(Next::Answer(said.to_owned())),
        }
        Ok(Next::Nothing)
    }

    fn set(&mut self, name: &str, value: &str) -> anyhow::Result<()> {
        for side in &mut self.sides {
            let options = changed(side.voice.options(), name, value)?;
            side.voice.set(options)?;
        }
        tell(&described(self.sides[0].voice.options()));
        Ok(())
    }

    fn save(&self, path: &str) -> anyhow::Result<()> {
        anyhow::ensure!(
            !path.is_empty(),
            "expected a file, as in `/save chat.jsonl`"
        );
        let mut text = String::new();
        for side in &self.sides {
            let mut row = json!({ "messages": self.conversation(side) });
            if self.sides.len() > 1 {
                row["model"] = side.name.into();
            }
            text.push_str(&serde_json::to_string(&row)?);
            text.push('\n');
        }
        let mut file = OpenOptions::new().create(true).append(true).open(path);
        let written = file.as_mut().map(|file| file.write_all(text.as_bytes()));
        match written {
            Ok(written) => written.with_context(|| format!("could not write `{path}`"))?,
            Err(error) => anyhow::bail!("could not write `{path}`: {error}"),
        }
        tell(&format!("added to {path}"));
        Ok(())
    }

    /// All that is said to a side.
    fn conversation(&self, side: &Side<'_>) -> Vec<Message> {
        let system = self.system.iter().map(|text| Message::new("system", text));
        system.chain(side.messages.iter().cloned()).collect()
    }

    /// Answers what is said, or what was said last once more. A break means that nobody reads.
    fn answer(&mut self, said: Option<String>) -> anyhow::Result<ControlFlow<()>> {
        match said {
            Some(text) => {
                for side in &mut self.sides {
                    side.messages.push(Message::new("user", text.clone()));
                }
            }
            None => {
                for side in &mut self.sides {
                    if side
                        .messages
                        .last()
                        .is_some_and(|last| last.role == "assistant")
                    {
                        side.messages.pop();
                    }
                    anyhow::ensure!(!side.messages.is_empty(), "nothing was said yet");
                }
            }
        }
        self.signals.interrupted.store(false, Ordering::Relaxed);
        self.signals.answering.store(true, Ordering::Relaxed);
        let answered = self.answer_all();
        if answered.is_err() {
            // It was not answered, and would stand before what is said next.
            for side in &mut self.sides {
                if side.messages.last().is_some_and(|last| last.role == "user") {
                    side.messages.pop();
                }
            }
        }
        answered
    }

    fn answer_all(&mut self) -> anyhow::Result<ControlFlow<()>> {
        let width = terminal_size::terminal_size().map_or(80, |(width, _)| usize::from(width.0));
        let streams = self.sides.len() == 1;
        let mut replies = Vec::with_capacity(self.sides.len());
        let mut nobody_reads = false;
        for number in 0..self.sides.len() {
            let conversation = self.conversation(&self.sides[number]);
            let prompt = Prompt::Chat(conversation);
            let signals = &self.signals;
            let shows_progress = self.at_terminal && !streams;
            let side = &mut self.sides[number];
            let mut tokens = 0;
            let name = side.name;
            let mut hear = |piece: Option<Piece<'_>>| {
                if let Some(piece) = piece {
                    tokens += 1;
                    if shows_progress {
                        eprint_rendered(&format!(
                            "\r{}",
                            paint(DIM, &format!("{name}: {tokens} tokens"))
                        ));
                    } else if streams && write_out(&harmless(piece.text)).is_err() {
                        nobody_reads = true;
                        return Ok(ControlFlow::Break(()));
                    }
                }
                Ok(if signals.interrupted.load(Ordering::Relaxed) {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                })
            };
            let mut reply = side.voice.go_on(std::slice::from_ref(&prompt), &mut hear)?;
            if shows_progress {
                eprint_rendered("\r\u{1b}[K");
            }
            let Some(reply) = reply.pop() else { continue };
            side.messages
                .push(Message::new("assistant", reply.text.clone()));
            replies.push(reply);
        }
        if nobody_reads {
            return Ok(ControlFlow::Break(()));
        }
        if streams {
            if write_out("\n").is_err() {
                return Ok(ControlFlow::Break(()));
            }
        } else {
            let names = self.sides.iter().map(|side| side.name);
            let texts: Vec<(&str, &str)> = names
                .zip(replies.iter().map(|reply| reply.text.as_str()))
                .collect();
            print_rendered(&if self.at_terminal {
                columns(&texts, width)
            } else {
                let one = |(name, text): &(&str, &str)| {
                    format!("{} {}\n", paint(BOLD, &format!("{name}:")), harmless(text))
                };
                texts.iter().map(one).collect()
            });
        }
        if self.at_terminal {
            let told: Vec<String> = replies.iter().map(counted).collect();
            tell(&told.join(" │ "));
        }
        Ok(ControlFlow::Continue(()))
    }
}

/// What is worth to know of an answer.
fn counted(reply: &Reply) -> String {
    let ended = match reply.finish_reason {
        FinishReason::Stop => "",
        FinishReason::Length => ", cut at the most tokens",
        FinishReason::Interrupted => ", interrupted",
    };
    format!(
        "{} tokens, {:.1} tokens/s{ended}",
        reply.completion_tokens,
        reply.tokens_per_second()
    )
}

fn write_out(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

fn tell(text: &str) {
    eprint_rendered(&format!("{}\n", paint(DIM, text)));
}

/// How answers are made, in words.
pub(super) fn described(options: &Options) -> String {
    let sampling = options.sampling;
    let mut parts = Vec::new();
    if sampling.do_sample {
        parts.push(format!("temperature {}", sampling.temperature));
        if sampling.top_k > 0 {
            parts.push(format!("top_k {}", sampling.top_k));
        }
        if sampling.top_p < 1. {
            parts.push(format!("top_p {}", sampling.top_p));
        }
        if let Some(min_p) = sampling.min_p {
            parts.push(format!("min_p {min_p}"));
        }
        parts.push(format!("seed {}", options.seed));
    } else {
        parts.push("greedy".to_owned());
    }
    if (sampling.repetition_penalty - 1.).abs() > 0. {
        parts.push(format!(
            "repetition_penalty {}",
            sampling.repetition_penalty
        ));
    }
    parts.push(format!("max_new_tokens {}", options.max_new_tokens));
    parts.join(", ")
}

/// The options with another value of one of them.
fn changed(options: &Options, name: &str, value: &str) -> anyhow::Result<Options> {
    let mut options = options.clone();
    let number = || -> anyhow::Result<f64> {
        let number = value.parse();
        number.map_err(|_| anyhow::anyhow!("`{name}` is `{value}`: expected a number"))
    };
    let count = || -> anyhow::Result<u64> {
        let count = value.parse();
        count.map_err(|_| anyhow::anyhow!("`{name}` is `{value}`: expected a whole number"))
    };
    let sampling = &mut options.sampling;
    match name {
        "temperature" if number()? == 0. => sampling.do_sample = false,
        "temperature" => sampling.temperature = number()?,
        "top_p" => sampling.top_p = number()?,
        "min_p" => sampling.min_p = Some(number()?),
        "top_k" => sampling.top_k = usize::try_from(count()?)?,
        "repetition_penalty" => sampling.repetition_penalty = number()?,
        "max_new_tokens" => options.max_new_tokens = usize::try_from(count()?)?,
        "seed" => options.seed = count()?,
        _ => anyhow::bail!(
            "there is no `{name}` to set: expected temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens or seed"
        ),
    }
    let draws = ["temperature", "top_p", "top_k", "min_p"].contains(&name);
    if draws && !(name == "temperature" && number()? == 0.) {
        options.sampling.do_sample = true;
    }
    options.sampling.check()?;
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ml::sampling::Sampling;

    fn options() -> Options {
        Options {
            sampling: Sampling::default(),
            seed: 0,
            max_new_tokens: 9,
            stop: Vec::new(),
        }
    }

    #[test]
    fn settings_change_one_at_a_time() {
        let warm = changed(&options(), "temperature", "0.7").unwrap();
        assert!(warm.sampling.do_sample);
        assert_eq!(
            described(&warm),
            "temperature 0.7, top_k 50, seed 0, max_new_tokens 9"
        );
        let cold = changed(&warm, "temperature", "0").unwrap();
        assert_eq!(described(&cold), "greedy, max_new_tokens 9");
        let counted = changed(&options(), "max_new_tokens", "3").unwrap();
        assert_eq!(
            (counted.max_new_tokens, counted.sampling.do_sample),
            (3, false)
        );
        for (name, value) in [
            ("top_p", "2"),
            ("top_k", "-1"),
            ("seed", "x"),
            ("warmth", "1"),
            ("temperature", "nan"),
        ] {
            changed(&options(), name, value).unwrap_err();
        }
    }
}
