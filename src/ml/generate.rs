//! Text generation: answers to several prompts side by side, id by id.

use std::ops::ControlFlow;

use anyhow::ensure;

use super::backend::Decoder;
use super::execution::{Execution, Token};
use super::model::linear::Pass;
pub use super::sampling::NotFinite;
use super::sampling::Sampler;
use super::threads::in_pool;

/// The fewest tokens that are copied from a prompt that begins alike: before, what is open of that prompt has to go through the model,
/// which reads all weights.
const FEWEST_COPIED: usize = 8;

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// With an id that ends answers, which is not part of it.
    Stop,
    /// It has as many ids as it may have, or as the model has places for.
    Length,
    /// The listener ended it.
    Broken,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Its ids, without the one that ended it.
    pub ids: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
}

/// Who waits for answers.
pub trait Listener {
    /// Called before each step of the model. A break ends all answers as they are; an error ends the generation.
    ///
    /// # Errors
    /// Whatever ends the generation.
    fn step(&mut self) -> anyhow::Result<ControlFlow<()>>;

    /// Hears the next id of the answer number `text`. A break ends this answer, with the id.
    ///
    /// # Errors
    /// Whatever ends the generation.
    fn token(&mut self, _text: usize, _id: u32) -> anyhow::Result<ControlFlow<()>> {
        Ok(ControlFlow::Continue(()))
    }
}

/// A listener that is told of steps alone.
struct Steps<'t>(&'t mut dyn FnMut() -> anyhow::Result<()>);

impl Listener for Steps<'_> {
    fn step(&mut self) -> anyhow::Result<ControlFlow<()>> {
        (self.0)().map(|()| ControlFlow::Continue(()))
    }
}

/// Texts that a model goes on with. Keys and values of what a text has already are kept: a prompt that begins with it costs only its
/// other tokens.
pub struct Generator<'a> {
    decoder: Box<dyn Decoder + 'a>,
    /// The ids that went through the model, by text.
    seen: Vec<Vec<u32>>,
    vocabulary: usize,
    longest: usize,
}

impl<'a> Generator<'a> {
    /// So many empty texts, none of which gets longer than `longest` tokens.
    ///
    /// # Errors
    /// Buffers that can't be made.
    pub fn new(
        execution: &'a Execution<'_>,
        texts: usize,
        longest: usize,
        pass: Pass,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            decoder: execution.decoder(texts, longest, pass)?,
            seen: vec![Vec::new(); texts],
            vocabulary: execution.model().arch.vocab_size,
            longest,
        })
    }

    /// Answers prompts, at most as many as there are texts and samplers: at most `limit` ids each, up to and without the first id of
    /// `stops`.
    ///
    /// Each prompt gets the answer that it gets alone: no sum depends on the other prompts.
    ///
    /// # Errors
    /// Too many prompts, an empty or too long one, an id outside the vocabulary, [`NotFinite`] logits, or what the listener says.
    pub fn answer(
        &mut self,
        prompts: &[&[u32]],
        limit: usize,
        stops: &[u32],
        samplers: &mut [Sampler],
        listener: &mut dyn Listener,
    ) -> anyhow::Result<Vec<Answer>> {
        ensure!(
            prompts.len() <= samplers.len().min(self.seen.len()),
            "{} prompts, and {} samplers and {} texts for them",
            prompts.len(),
            samplers.len(),
            self.seen.len()
        );
        for prompt in prompts {
            ensure!(!prompt.is_empty(), "the prompt has no tokens");
            ensure!(
                prompt.len() <= self.longest,
                "the prompt has {} tokens, and there is room for {}",
                prompt.len(),
                self.longest
            );
        }
        let none = Answer {
            ids: Vec::new(),
            finish: Finish::Length,
        };
        let mut answers = vec![none; prompts.len()];
        if limit == 0 {
            return Ok(answers);
        }
        let mut choice = Choice {
            prompts,
            limit,
            longest: self.longest,
            stops,
            samplers,
            answers: &mut answers,
        };
        let mut next = Vec::new();
        let at_once = self.decoder.at_once().max(1);
        // The tokens that wait for their turn, and whether they end their prompt.
        let mut waiting: Vec<(Token, bool)> = Vec::new();
        let mut read = |generator: &mut Self, waiting: &mut Vec<(Token, bool)>| {
            if waiting.is_empty() {
                return Ok(ControlFlow::Continue(()));
            }
            if listener.step()?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
            let tokens: Vec<Token> = waiting.iter().map(|(token, _)| *token).collect();
            let last = waiting.iter().enumerate().filter(|(_, (_, last))| *last);
            let last: Vec<usize> = last.map(|(at, _)| at).collect();
            waiting.clear();
            let logits = generator.step(&tokens, &last)?;
            for (&at, logits) in last.iter().zip(logits.chunks_exact(generator.vocabulary)) {
                next.extend(choice.follow(tokens[at].sequence, logits, listener)?);
            }
            anyhow::Ok(ControlFlow::Continue(()))
        };
        let mut is_broken = false;
        'texts: for (text, prompt) in prompts.iter().enumerate() {
            let mut known = self.keep_beginning(text, prompt)?;
            if let Some((from, length)) = alike(prompts, text, known) {
                if waiting.iter().any(|(token, _)| token.sequence == from) {
                    is_broken = read(self, &mut waiting)?.is_break();
                    if is_broken {
                        break;
                    }
                }
                if self.decoder.copy_beginning(from, text, length)? {
                    self.seen[text] = prompt[..length].to_vec();
                    known = length;
                }
            }
            for (at, &id) in prompt.iter().enumerate().skip(known) {
                waiting.push((Token { sequence: text, id }, at + 1 == prompt.len()));
                if waiting.len() == at_once {
                    is_broken = read(self, &mut waiting)?.is_break();
                    if is_broken {
                        break 'texts;
                    }
                }
            }
        }
        if is_broken || read(self, &mut waiting)?.is_break() {
            choice.break_off();
            return Ok(answers);
        }
        while !next.is_empty() {
            if listener.step()?.is_break() {
                for token in &next {
                    choice.answers[token.sequence].finish = Finish::Broken;
                }
                break;
            }
            let every: Vec<usize> = (0..next.len()).collect();
            let logits = self.step(&next, &every)?;
            let mut followers = Vec::with_capacity(next.len());
            for (token, logits) in next.iter().zip(logits.chunks_exact(self.vocabulary)) {
                followers.extend(choice.follow(token.sequence, logits, listener)?);
            }
            next = followers;
        }
        Ok(answers)
    }

    /// Forgets of a text what the prompt does not begin with. Returns how many of the prompt's tokens are there; the last one is not,
    /// since its logits are wanted.
    fn keep_beginning(&mut self, text: usize, prompt: &[u32]) -> anyhow::Result<usize> {
        let seen = &mut self.seen[text];
        let equal = seen.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        let kept = equal.min(prompt.len() - 1);
        self.decoder.truncate(text, kept)?;
        seen.truncate(kept);
        Ok(kept)
    }

    fn step(&mut self, tokens: &[Token], wanted: &[usize]) -> anyhow::Result<Vec<f32>> {
        let decoder = &mut self.decoder;
        let logits = in_pool(|| decoder.step(tokens, wanted))?;
        for token in tokens {
            self.seen[token.sequence].push(token.id);
        }
        Ok(logits)
    }
}

/// An earlier prompt that begins as the prompt number `text` does, and with how many tokens; the last one is not counted, since its
/// logits are wanted. `None` where that would spare too little beside the `known` tokens.
fn alike(prompts: &[&[u32]], text: usize, known: usize) -> Option<(usize, usize)> {
    let prompt = prompts[text];
    let equal = |other: &[u32]| {
        let pairs = other.iter().zip(&prompt[..prompt.len() - 1]);
        pairs.take_while(|(a, b)| a == b).count()
    };
    let earlier = prompts[..text].iter().enumerate().rev();
    let (from, length) = earlier
        .map(|(number, other)| (number, equal(other)))
        .max_by_key(|(_, length)| *length)?;
    (length >= known + FEWEST_COPIED).then_some((from, length))
}

/// What decides on the next ids.
struct Choice<'c> {
    prompts: &'c [&'c [u32]],
    limit: usize,
    longest: usize,
    stops: &'c [u32],
    samplers: &'c mut [Sampler],
    answers: &'c mut Vec<Answer>,
}

impl Choice<'_> {
    /// The id that follows in a text, given its logits, unless the answer ends.
    fn follow(
        &mut self,
        text: usize,
        logits: &[f32],
        listener: &mut dyn Listener,
    ) -> anyhow::Result<Option<Token>> {
        let answer = &mut self.answers[text];
        let id = self.samplers[text].next(self.prompts[text], &answer.ids, logits)?;
        if self.stops.contains(&id) {
            answer.finish = Finish::Stop;
            return Ok(None);
        }
        answer.ids.push(id);
        if listener.token(text, id)?.is_break() {
            answer.finish = Finish::Broken;
            return Ok(None);
        }
        let room = self.prompts[text].len() + answer.ids.len() <= self.longest;
        Ok((answer.ids.len() < self.limit && room).then_some(Token { sequence: text, id }))
    }

    /// Before anything was answered.
    fn break_off(&mut self) {
        for answer in self.answers.iter_mut() {
            answer.finish = Finish::Broken;
        }
    }
}

/// The most probable continuation of each prompt, at most `limit` ids, up to and without the first id of `stops`. `tell` is
/// called before each step and may stop with an error.
///
/// Each prompt gets the answer that it gets alone: no sum depends on the other prompts.
///
/// # Errors
/// An empty prompt, an id outside the vocabulary, [`NotFinite`] logits, or what `tell` says.
pub fn greedy(
    execution: &Execution<'_>,
    prompts: &[&[u32]],
    limit: usize,
    stops: &[u32],
    pass: Pass,
    tell: &mut dyn FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<Vec<Vec<u32>>> {
    let longest = prompts.iter().map(|prompt| prompt.len()).max().unwrap_or(0);
    let mut generator = Generator::new(execution, prompts.len(), longest + limit, pass)?;
    let mut samplers = vec![Sampler::greedy(); prompts.len()];
    let answers = generator.answer(prompts, limit, stops, &mut samplers, &mut Steps(tell))?;
    Ok(answers.into_iter().map(|answer| answer.ids).collect())
}
