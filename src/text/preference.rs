//! From texts to token ids as TRL's preference trainers make them: where the answer begins, which BOS and EOS are added, and
//! what is cut when a sequence is too long. Its one entry is [`encode`].

use anyhow::Result;

use super::tokenizer::Tokenizer;

/// What is cut when a sequence is too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Truncation {
    /// TRL 1.16: each answer is cut to what `max_length` leaves, the prompt never.
    Answers {
        /// Longest sequence, in tokens.
        max_length: usize,
    },
    /// TRL until 0.24: if prompt and longer answer don't fit, first the prompt is cut to `max_prompt_length`, then, if that
    /// was not enough, the answers to the rest.
    PromptThenAnswers {
        /// Longest sequence, in tokens.
        max_length: usize,
        /// What is left of a prompt that must be cut; below `max_length`.
        max_prompt_length: usize,
        /// Keep the prompt's end (and lose its BOS) rather than its start.
        keep_end: bool,
    },
}

/// The ids of one side of a row: a prompt and an answer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SideIds {
    /// The prompt.
    pub prompt: Vec<u32>,
    /// The answer.
    pub answer: Vec<u32>,
}

/// The ids of a row.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RowIds {
    /// The (better) answer's side.
    pub chosen: SideIds,
    /// The worse answer's side, for preferences.
    pub rejected: Option<SideIds>,
    /// Whether the prompt lost tokens.
    pub prompt_cut: bool,
    /// Whether an answer lost tokens.
    pub answer_cut: bool,
}

/// Why a row can't be trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Drop {
    /// The prompt alone is `max_length` tokens or more, so no answer token is left.
    PromptTooLong,
    /// An answer has no token.
    NoAnswer,
    /// The answers change more than one token of the prompt; TRL stops there.
    PromptsDiffer,
}

impl Drop {
    /// The cause in the record's words.
    pub fn name(self) -> &'static str {
        match self {
            Self::PromptTooLong => "prompt_too_long",
            Self::NoAnswer => "no_answer",
            Self::PromptsDiffer => "prompts_differ",
        }
    }
}

/// The ids of a row of texts, or why there are none. One tokenizer call per text.
pub fn encode(
    tokenizer: &Tokenizer,
    prompt: &str,
    chosen: &str,
    rejected: Option<&str>,
    truncation: Truncation,
) -> Result<Result<RowIds, Drop>> {
    let prompt_ids = tokenizer.encode(prompt)?;
    let side = |answer: &str| -> Result<SideIds> {
        let full = tokenizer.encode(&[prompt, answer].concat())?;
        let mut side = split(full, &prompt_ids);
        if let Some(bos) = &tokenizer.bos
            && side.prompt.first() != Some(&bos.id)
        {
            side.prompt.insert(0, bos.id);
        }
        if let Some(eos) = &tokenizer.eos
            && side.answer.last() != Some(&eos.id)
        {
            side.answer.push(eos.id);
        }
        Ok(side)
    };
    let chosen = side(chosen)?;
    let rejected = rejected.map(side).transpose()?;
    if rejected
        .as_ref()
        .is_some_and(|rejected| prompts_differ(&chosen.prompt, &rejected.prompt))
    {
        return Ok(Err(Drop::PromptsDiffer));
    }
    let row = truncate(
        RowIds {
            chosen,
            rejected,
            ..RowIds::default()
        },
        truncation,
    );
    let empty = |side: &SideIds| side.answer.is_empty();
    if empty(&row.chosen) || row.rejected.as_ref().is_some_and(empty) {
        let cause = if row.answer_cut {
            Drop::PromptTooLong
        } else {
            Drop::NoAnswer
        };
        return Ok(Err(cause));
    }
    Ok(Ok(row))
}

/// Splits the ids of a whole text after the prompt's, found by their number as TRL does. A byte-pair merge across the border
/// makes the prompt's last token part of the answer; only one such token is looked for.
fn split(full: Vec<u32>, prompt: &[u32]) -> SideIds {
    let start = if full.starts_with(prompt) {
        prompt.len()
    } else {
        prompt.len().saturating_sub(1)
    };
    let mut prompt = full;
    let answer = prompt.split_off(start.min(prompt.len()));
    SideIds { prompt, answer }
}

fn prompts_differ(a: &[u32], b: &[u32]) -> bool {
    let differing = a.iter().zip(b).filter(|(a, b)| a != b).count();
    differing > 1 || a.len().abs_diff(b.len()) > 1
}

fn truncate(mut row: RowIds, truncation: Truncation) -> RowIds {
    let RowIds {
        chosen,
        rejected,
        prompt_cut,
        answer_cut,
    } = &mut row;
    let longest = chosen
        .answer
        .len()
        .max(rejected.as_ref().map_or(0, |side| side.answer.len()));
    for side in std::iter::once(chosen).chain(rejected) {
        match truncation {
            Truncation::Answers { max_length } => {
                let room = max_length.saturating_sub(side.prompt.len());
                *answer_cut |= side.answer.len() > room;
                side.answer.truncate(room);
            }
            Truncation::PromptThenAnswers {
                max_length,
                max_prompt_length,
                keep_end,
            } => {
                // The longer answer decides for both sides.
                if side.prompt.len() + longest > max_length {
                    let excess = side.prompt.len().saturating_sub(max_prompt_length);
                    *prompt_cut |= excess > 0;
                    if keep_end {
                        side.prompt.drain(..excess);
                    } else {
                        side.prompt.truncate(max_prompt_length);
                    }
                }
                if side.prompt.len() + longest > max_length {
                    let room = max_length.saturating_sub(max_prompt_length);
                    *answer_cut |= side.answer.len() > room;
                    side.answer.truncate(room);
                }
            }
        }
    }
    row
}

#[cfg(test)]
mod tests;
