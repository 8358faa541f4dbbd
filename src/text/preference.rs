//! From texts to token ids as TRL's trainers make them: where the answer begins, which BOS and EOS are added, and what is cut when
//! a sequence is too long. [`encode`] is the way of the preference trainers, [`encode_alone`] that of `SFTTrainer`.

use std::ops::Range;

use anyhow::Result;
use serde::{Deserialize, Serialize};

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

impl Truncation {
    /// The longest sequence, in tokens.
    pub fn max_length(self) -> usize {
        match self {
            Self::Answers { max_length } | Self::PromptThenAnswers { max_length, .. } => max_length,
        }
    }
}

/// The ids of one side of a row: a prompt and an answer.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SideIds {
    /// The prompt.
    pub prompt: Vec<u32>,
    /// The answer.
    pub answer: Vec<u32>,
}

/// The ids of a row.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RowIds {
    /// The (better) answer's side.
    pub chosen: SideIds,
    /// The worse answer's side, for preferences.
    pub rejected: Option<SideIds>,
    /// For each id of the (better) answer's side, prompt and answer, whether the assistant says it; `None` where it was not asked for
    /// ([`encode_turns`]).
    pub assistant_masks: Option<Vec<bool>>,
    /// Whether the prompt lost tokens.
    pub prompt_cut: bool,
    /// Whether an answer lost tokens.
    pub answer_cut: bool,
    /// On how many sides a BOS was put before the prompt.
    pub bos_added: usize,
    /// On how many sides an EOS was put behind the answer.
    pub eos_added: usize,
}

/// Why a row can't be trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum SkipReason {
    /// The prompt alone is `max_length` tokens or more, so no answer token is left.
    PromptTooLong,
    /// An answer has no token.
    NoAnswer,
    /// The answers change more than one token of the prompt; TRL stops there.
    PromptsDiffer,
    /// Of what the assistant says, no token is left within `max_length`.
    NoAssistantToken,
    /// A whole sequence is longer than `max_length`, and is not cut.
    TooLong,
}

impl SkipReason {
    /// The cause in the record's words.
    pub fn name(self) -> &'static str {
        match self {
            Self::PromptTooLong => "prompt_too_long",
            Self::NoAnswer => "no_answer",
            Self::PromptsDiffer => "prompts_differ",
            Self::NoAssistantToken => "no_assistant_token",
            Self::TooLong => "too_long",
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
) -> Result<Result<RowIds, SkipReason>> {
    let prompt_ids = tokenizer.encode(prompt)?;
    let (mut bos_added, mut eos_added) = (0, 0);
    let mut side = |answer: &str| -> Result<SideIds> {
        let full = tokenizer.encode(&[prompt, answer].concat())?;
        let mut side = split(full, &prompt_ids);
        if let Some(bos) = &tokenizer.bos
            && side.prompt.first() != Some(&bos.id)
        {
            side.prompt.insert(0, bos.id);
            bos_added += 1;
        }
        if let Some(eos) = &tokenizer.eos
            && side.answer.last() != Some(&eos.id)
        {
            side.answer.push(eos.id);
            eos_added += 1;
        }
        Ok(side)
    };
    let chosen = side(chosen)?;
    let rejected = rejected.map(side).transpose()?;
    if rejected
        .as_ref()
        .is_some_and(|rejected| prompts_differ(&chosen.prompt, &rejected.prompt))
    {
        return Ok(Err(SkipReason::PromptsDiffer));
    }
    let row = RowIds {
        chosen,
        rejected,
        bos_added,
        eos_added,
        ..RowIds::default()
    };
    Ok(cut(row, truncation))
}

/// The ids of a prompt and its one answer as `SFTTrainer` makes them. What a chat template printed gets no BOS and no EOS; a text
/// without a prompt gets its EOS and what the tokenizer itself puts around it. The answer begins where the ids leave those of the
/// prompt alone.
pub fn encode_alone(
    tokenizer: &Tokenizer,
    prompt: &str,
    answer: &str,
    truncation: Truncation,
) -> Result<Result<RowIds, SkipReason>> {
    let chosen = if prompt.is_empty() {
        let ids = match &tokenizer.eos {
            Some(eos) if !answer.ends_with(&eos.text) => {
                tokenizer.encode_with_special(&[answer, &eos.text].concat())?
            }
            _ => tokenizer.encode_with_special(answer)?,
        };
        // Of a single token nothing is predicted.
        if ids.len() < 2 {
            return Ok(Err(SkipReason::NoAnswer));
        }
        SideIds {
            prompt: Vec::new(),
            answer: ids,
        }
    } else {
        let alone = tokenizer.encode(prompt)?;
        let mut prompt = tokenizer.encode(&[prompt, answer].concat())?;
        let border = alone
            .iter()
            .zip(&prompt)
            .take_while(|(a, b)| a == b)
            .count();
        let answer = prompt.split_off(border);
        SideIds { prompt, answer }
    };
    let row = RowIds {
        chosen,
        ..RowIds::default()
    };
    Ok(cut(row, truncation))
}

/// The ids of a conversation that a chat template printed, and which of them the assistant says, as `SFTTrainer` makes them with
/// `assistant_only_loss`. `answers` are ranges of bytes of `prompt` and `answer` together. A token that lies in one of them with any
/// of its bytes belongs to it.
pub fn encode_turns(
    tokenizer: &Tokenizer,
    prompt: &str,
    answer: &str,
    answers: &[Range<usize>],
    truncation: Truncation,
) -> Result<Result<RowIds, SkipReason>> {
    let (mut ids, places) = tokenizer.encode_with_places(&[prompt, answer].concat())?;
    let mut mask = vec![false; ids.len()];
    let mut first = 0;
    for range in answers {
        let outside = |place: &Range<usize>| place.end <= range.start;
        first += places[first..]
            .iter()
            .take_while(|place| outside(place))
            .count();
        let inside = places[first..].iter().enumerate();
        for (at, _) in inside.take_while(|(_, place)| place.start < range.end) {
            mask[first + at] = true;
        }
    }
    let border = if prompt.is_empty() {
        0
    } else {
        let alone = tokenizer.encode(prompt)?;
        ids.iter().zip(&alone).take_while(|(a, b)| a == b).count()
    };
    let answer = ids.split_off(border);
    let whole = SideIds {
        prompt: ids,
        answer,
    };
    let row = RowIds {
        chosen: whole,
        ..RowIds::default()
    };
    Ok(cut(row, truncation).and_then(|mut row| {
        let (prompts, answers) = mask.split_at(border);
        let kept = row.chosen.prompt.len();
        let prompts = match truncation {
            Truncation::PromptThenAnswers { keep_end: true, .. } => &prompts[border - kept..],
            _ => &prompts[..kept],
        };
        let mask = [prompts, &answers[..row.chosen.answer.len()]].concat();
        if !mask.contains(&true) {
            return Err(SkipReason::NoAssistantToken);
        }
        row.assistant_masks = Some(mask);
        Ok(row)
    }))
}

/// The ids of a preference row as `DPOTrainer` makes them. What a chat template printed gets no BOS and no EOS; texts without a prompt
/// get their EOS and what the tokenizer itself puts around them. Both answers begin where the ids of either whole text leave those of the
/// prompt alone.
pub fn encode_pair(
    tokenizer: &Tokenizer,
    prompt: &str,
    chosen: &str,
    rejected: &str,
    truncation: Truncation,
) -> Result<Result<RowIds, SkipReason>> {
    let alone = prompt_alone(tokenizer, prompt)?;
    let common = |ids: &[u32]| common(ids, &alone);
    let chosen = whole(tokenizer, prompt, chosen)?;
    let rejected = whole(tokenizer, prompt, rejected)?;
    let border = common(&chosen).min(common(&rejected));
    let side = |mut prompt: Vec<u32>| {
        let answer = prompt.split_off(border);
        SideIds { prompt, answer }
    };
    let row = RowIds {
        chosen: side(chosen),
        rejected: Some(side(rejected)),
        ..RowIds::default()
    };
    Ok(cut(row, truncation))
}

/// The ids of a labelled row as `KTOTrainer` makes them, each text as by [`encode_pair`]. The answer begins where its ids leave those of the
/// prompt alone. It is cut to `max_length` tokens by itself, because it is also put behind other prompts; a row whose prompt has so many
/// is dropped.
pub fn encode_labelled(
    tokenizer: &Tokenizer,
    prompt: &str,
    answer: &str,
    max_length: usize,
) -> Result<Result<RowIds, SkipReason>> {
    let alone = prompt_alone(tokenizer, prompt)?;
    let mut prompt = whole(tokenizer, prompt, answer)?;
    let answer = prompt.split_off(common(&prompt, &alone));
    if prompt.len() >= max_length {
        return Ok(Err(SkipReason::PromptTooLong));
    }
    let answer_cut = prompt.len() + answer.len() > max_length;
    let mut row = RowIds {
        chosen: SideIds { prompt, answer },
        answer_cut,
        ..RowIds::default()
    };
    row.chosen.answer.truncate(max_length);
    Ok(cut(
        row,
        Truncation::Answers {
            max_length: usize::MAX,
        },
    ))
}

/// The ids of a preference row as `RewardTrainer` makes them: those of [`encode_pair`], but a row with a sequence of more than `max_length`
/// tokens is dropped.
pub fn encode_whole_pair(
    tokenizer: &Tokenizer,
    prompt: &str,
    chosen: &str,
    rejected: &str,
    max_length: usize,
) -> Result<Result<RowIds, SkipReason>> {
    let nothing = Truncation::Answers {
        max_length: usize::MAX,
    };
    let row = encode_pair(tokenizer, prompt, chosen, rejected, nothing)?;
    Ok(row.and_then(|row| {
        let mut sides = std::iter::once(&row.chosen).chain(&row.rejected);
        if sides.any(|side| side.prompt.len() + side.answer.len() > max_length) {
            return Err(SkipReason::TooLong);
        }
        Ok(row)
    }))
}

/// The ids of a prompt and an answer together. A text without a prompt gets its EOS and what the tokenizer itself puts around it.
fn whole(tokenizer: &Tokenizer, prompt: &str, answer: &str) -> Result<Vec<u32>> {
    match &tokenizer.eos {
        _ if !prompt.is_empty() => tokenizer.encode(&[prompt, answer].concat()),
        Some(eos) if !answer.ends_with(&eos.text) => {
            tokenizer.encode_with_special(&[answer, &eos.text].concat())
        }
        _ => tokenizer.encode_with_special(answer),
    }
}

/// The ids of a prompt by itself.
fn prompt_alone(tokenizer: &Tokenizer, prompt: &str) -> Result<Vec<u32>> {
    if prompt.is_empty() {
        tokenizer.encode_with_special("")
    } else {
        tokenizer.encode(prompt)
    }
}

/// How many ids two sequences have in common at their beginning.
fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// A row cut to its length, or why nothing is left of it.
fn cut(row: RowIds, truncation: Truncation) -> Result<RowIds, SkipReason> {
    let row = truncate(row, truncation);
    let empty = |side: &SideIds| side.answer.is_empty();
    if empty(&row.chosen) || row.rejected.as_ref().is_some_and(empty) {
        return Err(if row.answer_cut {
            SkipReason::PromptTooLong
        } else {
            SkipReason::NoAnswer
        });
    }
    Ok(row)
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
        ..
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
