//! Greedy generation.

use std::fmt;

use anyhow::ensure;
use pipeline_kernels::vectors::argmax;

use super::execution::{Execution, Token};
use super::model::linear::Pass;
use super::threads::in_pool;

/// The tokens of prompts that go through the model in one step.
const CHUNK: usize = 32;

/// The error of a logit that is a NaN or infinite where the next id is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotFinite;

impl fmt::Display for NotFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a NaN or an infinity comes out of the model where it answers a prompt")
    }
}

impl std::error::Error for NotFinite {}

/// The id of the largest logit (vocabulary), the lowest one of equals. A NaN or an infinity among them is an error.
fn best(logits: &[f32]) -> anyhow::Result<u32> {
    match argmax(logits) {
        Some(id) => Ok(u32::try_from(id)?),
        None => Err(NotFinite.into()),
    }
}

/// Greedy decoding: continues each prompt with the most probable id, for at most `limit` ids, up to and without the first id of
/// `stops`. Returns the ids of each continuation. `progress` is called before each step and may stop the generation with an error.
///
/// Each prompt gets the same answer as it would get alone, because no sum depends on the other prompts.
///
/// # Errors
/// A prompt is empty, an id is outside the vocabulary, a logit is [`NotFinite`], or `progress` returns an error.
pub fn greedy(
    execution: &Execution<'_>,
    prompts: &[&[u32]],
    limit: usize,
    stops: &[u32],
    pass: Pass,
    progress: &mut dyn FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<Vec<Vec<u32>>> {
    let mut longest = 0;
    for prompt in prompts {
        ensure!(!prompt.is_empty(), "the prompt has no tokens");
        longest = longest.max(prompt.len());
    }
    let mut answers = vec![Vec::new(); prompts.len()];
    let mut next = Vec::new();
    if limit == 0 {
        return Ok(answers);
    }
    let vocabulary = execution.model().arch.vocab_size;
    let mut decoder = execution.decoder(prompts.len(), longest + limit, pass)?;
    // The token that follows, unless the answer ends.
    let mut follow = |token: Token, logits: &[f32]| -> anyhow::Result<Option<Token>> {
        let answer: &mut Vec<u32> = &mut answers[token.sequence];
        let id = best(logits)?;
        if stops.contains(&id) {
            return Ok(None);
        }
        answer.push(id);
        let sequence = token.sequence;
        Ok((answer.len() < limit).then_some(Token { sequence, id }))
    };
    let all = prompts.iter().enumerate().flat_map(|(sequence, prompt)| {
        let tokens = prompt.iter().enumerate();
        tokens.map(move |(at, &id)| (Token { sequence, id }, at + 1 == prompt.len()))
    });
    let all: Vec<(Token, bool)> = all.collect();
    for chunk in all.chunks(CHUNK) {
        progress()?;
        let tokens: Vec<Token> = chunk.iter().map(|(token, _)| *token).collect();
        let last = chunk.iter().enumerate().filter(|(_, (_, last))| *last);
        let last: Vec<usize> = last.map(|(at, _)| at).collect();
        let logits = in_pool(|| decoder.step(&tokens, &last))?;
        let rows = last.iter().zip(logits.chunks_exact(vocabulary));
        let followers = rows.filter_map(|(&at, logits)| follow(tokens[at], logits).transpose());
        next.extend(followers.collect::<anyhow::Result<Vec<_>>>()?);
    }
    while !next.is_empty() {
        progress()?;
        let every: Vec<usize> = (0..next.len()).collect();
        let logits = in_pool(|| decoder.step(&next, &every))?;
        let rows = next.iter().zip(logits.chunks_exact(vocabulary));
        next = rows
            .filter_map(|(&token, logits)| follow(token, logits).transpose())
            .collect::<anyhow::Result<_>>()?;
    }
    Ok(answers)
}
