//! One side of a conversation: a model with or without its adapter, which answers prompts.

use std::ops::ControlFlow;
use std::time::Instant;

use serde::Serialize;

use super::load::{Loaded, Manners};
use super::prompt::Prompt;
use crate::ml::execution::Execution;
use crate::ml::generate::{Finish, Generator, Listener};
use crate::ml::model::linear::Pass;
use crate::ml::sampling::{Sampler, Sampling};
use crate::text::text_stream::TextStream;
use crate::text::tokenizer::Tokenizer;

/// How answers are made.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// How ids are chosen.
    pub sampling: Sampling,
    /// What decides on the draws.
    pub seed: u64,
    /// The most tokens of an answer.
    pub max_new_tokens: usize,
    /// Texts that end an answer, beside the model's own tokens. They are not part of it.
    pub stop: Vec<String>,
}

/// Why an answer ended, by the names that servers of models use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// It is whole: the model ended it, or one of the texts that end answers came.
    Stop,
    /// It has as many tokens as it may have.
    Length,
    /// Somebody interrupted it.
    Interrupted,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Reply {
    /// The text.
    pub text: String,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens that were made.
    pub completion_tokens: usize,
    /// Seconds from when the prompts were given until the answer ended.
    pub seconds: f64,
}

impl Reply {
    /// Tokens made a second, the time for the prompt included.
    pub fn tokens_per_second(&self) -> f64 {
        if self.seconds > 0. {
            self.completion_tokens as f64 / self.seconds
        } else {
            0.
        }
    }
}

/// A part of an answer as it grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece<'p> {
    /// The number of the prompt.
    pub number: usize,
    /// Text behind what came before.
    pub text: &'p str,
}

/// A model that answers so many prompts side by side. It remembers the last ones: a conversation that goes on costs its new part.
pub struct Voice<'a> {
    tokenizer: &'a Tokenizer,
    manners: &'a Manners,
    generator: Generator<'a>,
    samplers: Vec<Sampler>,
    options: Options,
    context: usize,
    count: usize,
    /// The number of the next prompt of all.
    next: u64,
}

impl<'a> Voice<'a> {
    /// A voice for up to `count` prompts at once: of the model with its adapter, or with `base` of the model alone.
    ///
    /// # Errors
    /// Options out of their bounds, or buffers that can't be made.
    pub fn new(
        loaded: &'a Loaded,
        execution: &'a Execution<'_>,
        base: bool,
        count: usize,
        options: Options,
    ) -> anyhow::Result<Self> {
        options.sampling.check()?;
        let pass = if base { Pass::BASE } else { Pass::INFER };
        let manners = match &loaded.base_manners {
            Some(manners) if base => manners,
            _ => &loaded.manners,
        };
        let context = loaded.context();
        let mut voice = Self {
            tokenizer: &loaded.tokenizer,
            manners,
            generator: Generator::new(execution, count, context, pass)?,
            samplers: Vec::new(),
            options,
            context,
            count,
            next: 0,
        };
        voice.restart();
        Ok(voice)
    }

    /// Answers otherwise from now on.
    ///
    /// # Errors
    /// Options out of their bounds.
    pub fn set(&mut self, options: Options) -> anyhow::Result<()> {
        options.sampling.check()?;
        let reseeded = options.seed != self.options.seed;
        for sampler in &mut self.samplers {
            sampler.set(options.sampling);
        }
        self.options = options;
        if reseeded {
            self.restart();
        }
        Ok(())
    }

    /// How it answers.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Begins the random numbers anew.
    pub fn restart(&mut self) {
        self.next = 0;
        self.samplers = self.fresh_samplers();
    }

    fn fresh_samplers(&self) -> Vec<Sampler> {
        let number = |text: usize| self.next + text as u64;
        (0..self.count)
            .map(|text| Sampler::new(self.options.sampling, self.options.seed, number(text)))
            .collect()
    }

    /// Answers prompts, at most as many as there is room for, that have nothing to do with earlier ones: the draws of each depend on the
    /// seed and on how many prompts were before.
    ///
    /// # Errors
    /// As [`Voice::go_on`].
    pub fn answer(
        &mut self,
        prompts: &[Prompt],
        hear: &mut dyn FnMut(Option<Piece<'_>>) -> anyhow::Result<ControlFlow<()>>,
    ) -> anyhow::Result<Vec<Reply>> {
        self.samplers = self.fresh_samplers();
        self.next += prompts.len() as u64;
        self.go_on(prompts, hear)
    }

    /// Answers the next prompts of conversations, at most as many as there is room for. `hear` gets the text as it grows, and nothing before each
    /// step; a break ends all answers.
    ///
    /// # Errors
    /// A prompt that can't be rendered or is too long, or what the model or `hear` says.
    pub fn go_on(
        &mut self,
        prompts: &[Prompt],
        hear: &mut dyn FnMut(Option<Piece<'_>>) -> anyhow::Result<ControlFlow<()>>,
    ) -> anyhow::Result<Vec<Reply>> {
        let begun = Instant::now();
        let ids = prompts
            .iter()
            .map(|prompt| prompt.ids(self.tokenizer, self.manners))
            .collect::<anyhow::Result<Vec<_>>>()?;
        for ids in &ids {
            anyhow::ensure!(
                ids.len() < self.context,
                "the conversation has {} tokens, and the model takes {} with its answer",
                ids.len(),
                self.context
            );
        }
        let ids: Vec<&[u32]> = ids.iter().map(Vec::as_slice).collect();
        let mut ear = Ear {
            growing: ids.iter().map(|_| Growing::new(self.tokenizer)).collect(),
            stop: &self.options.stop,
            begun,
            hear,
            broken: false,
        };
        let answers = self.generator.answer(
            &ids,
            self.options.max_new_tokens,
            &self.manners.stops,
            &mut self.samplers,
            &mut ear,
        )?;
        let mut replies = Vec::with_capacity(answers.len());
        for (number, answer) in answers.into_iter().enumerate() {
            ear.finish(number)?;
            let growing = &ear.growing[number];
            replies.push(Reply {
                finish_reason: match answer.finish {
                    Finish::Broken if growing.stopped => FinishReason::Stop,
                    Finish::Stop => FinishReason::Stop,
                    Finish::Length => FinishReason::Length,
                    Finish::Broken => FinishReason::Interrupted,
                },
                text: growing.text.clone(),
                prompt_tokens: ids[number].len(),
                completion_tokens: answer.ids.len(),
                seconds: growing.seconds,
            });
        }
        Ok(replies)
    }
}

/// An answer on its way.
struct Growing<'a> {
    stream: TextStream<'a>,
    /// What was heard.
    text: String,
    /// What may be the beginning of a text that ends the answer.
    held: String,
    /// Whether such a text came.
    stopped: bool,
    seconds: f64,
}

impl<'a> Growing<'a> {
    fn new(tokenizer: &'a Tokenizer) -> Self {
        Self {
            stream: TextStream::new(tokenizer),
            text: String::new(),
            held: String::new(),
            stopped: false,
            seconds: 0.,
        }
    }

    /// Takes new text; returns what of it is certain.
    fn grow(&mut self, new: &str, stop: &[String]) -> String {
        self.held.push_str(new);
        let found = stop.iter().filter_map(|stop| self.held.find(stop.as_str()));
        let certain = if let Some(end) = found.min() {
            self.stopped = true;
            end
        } else {
            let begins = |at: &usize| {
                let rest = &self.held[*at..];
                stop.iter().any(|stop| stop.starts_with(rest))
            };
            let places = self.held.char_indices().map(|(at, _)| at);
            { places }.find(begins).unwrap_or(self.held.len())
        };
        let rest = self.held.split_off(certain);
        let certain = std::mem::replace(&mut self.held, rest);
        if self.stopped {
            self.held.clear();
        }
        self.text.push_str(&certain);
        certain
    }

    /// Nothing follows; returns what was held back.
    fn end(&mut self) -> String {
        let rest = std::mem::take(&mut self.held);
        self.text.push_str(&rest);
        rest
    }
}

/// Makes text of ids and passes it on.
struct Ear<'a, 'h> {
    growing: Vec<Growing<'a>>,
    stop: &'h [String],
    begun: Instant,
    hear: &'h mut dyn FnMut(Option<Piece<'_>>) -> anyhow::Result<ControlFlow<()>>,
    broken: bool,
}

impl Ear<'_, '_> {
    fn pass_on(&mut self, number: usize, text: &str) -> anyhow::Result<()> {
        if !text.is_empty() {
            self.broken |= (self.hear)(Some(Piece { number, text }))?.is_break();
        }
        Ok(())
    }

    fn finish(&mut self, number: usize) -> anyhow::Result<()> {
        let growing = &mut self.growing[number];
        if growing.stopped {
            return Ok(());
        }
        let last = growing.stream.finish()?;
        let mut text = growing.grow(&last, self.stop);
        text.push_str(&growing.end());
        self.pass_on(number, &text)
    }
}

impl Listener for Ear<'_, '_> {
    fn step(&mut self) -> anyhow::Result<ControlFlow<()>> {
        if self.broken {
            return Ok(ControlFlow::Break(()));
        }
        (self.hear)(None)
    }

    fn token(&mut self, number: usize, id: u32) -> anyhow::Result<ControlFlow<()>> {
        let growing = &mut self.growing[number];
        growing.seconds = self.begun.elapsed().as_secs_f64();
        let new = growing.stream.push(id)?;
        let text = growing.grow(&new, self.stop);
        let stopped = growing.stopped;
        self.pass_on(number, &text)?;
        Ok(if stopped {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        })
    }
}

#[cfg(test)]
mod tests;
