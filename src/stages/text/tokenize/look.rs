//! A look at rows as they are trained on: their tokens, and what each is.

use std::path::Path;

use anyhow::{Context as _, Result};
use arrow_array::RecordBatch;
use serde::Serialize;

use super::{Texts, Tokenize, column, longest, text};
use crate::data::ranges;
use crate::data::table::{Split, splits};
use crate::engine::{Row as Watched, Stage as _, watched};
use crate::stages::text::tokenizers::load;
use crate::text::preference::{RowIds, SideIds, Truncation};
use crate::text::tokenizer::Tokenizer;

/// What a token is to a training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// It is read and not learnt.
    Prompt,
    /// It is learnt.
    Trained,
    /// It was cut off.
    Cut,
}

/// Tokens of one role that follow each other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Piece {
    /// What they are.
    pub role: Role,
    /// Their text, special tokens included.
    pub text: String,
    /// Their ids.
    pub ids: Vec<u32>,
    /// Each token as the vocabulary has it.
    pub tokens: Vec<String>,
}

/// One sequence of a row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Side {
    /// Which: `chosen`, `rejected`, or `answer` where there is one alone.
    pub name: &'static str,
    /// Its pieces, in order.
    pub pieces: Vec<Piece>,
}

/// A row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Row {
    /// The split.
    pub split: String,
    /// Its number in the split, from 1.
    pub row: usize,
    /// Why it is left out, if it is.
    pub dropped: Option<&'static str>,
    /// Its sequences.
    pub sides: Vec<Side>,
}

/// The first rows of each split of `chats` as a `tokenize` with these parameters makes them of the texts. With `learns_prompts` prompts
/// are learnt like answers.
///
/// # Errors
/// A file can't be read, or a text not be tokenized.
pub fn look(
    parameters: serde_json::Value,
    tokenizer: &Path,
    chats: &Path,
    count: usize,
    learns_prompts: bool,
) -> Result<Vec<Row>> {
    let stage = Tokenize::read(parameters).map_err(|error| anyhow::anyhow!("{error}"))?;
    let tokenizer = load(tokenizer)?;
    let mut rows = Vec::new();
    for (name, files) in splits(chats)? {
        let split = Split::of_files(&name, files)?;
        let mut done = 0;
        for batch in split.batches(count.clamp(1, 1024)) {
            if done >= count {
                break;
            }
            let batch = batch?;
            for at in 0..batch.num_rows().min(count - done) {
                let mut row = stage.row(&tokenizer, &batch, at, (&name, done + at + 1))?;
                if learns_prompts && batch.column_by_name(ranges::NAME).is_none() {
                    learn_prompts(&mut row);
                }
                rows.push(row);
            }
            done += batch.num_rows();
        }
    }
    Ok(rows)
}

fn learn_prompts(row: &mut Row) {
    for piece in row.sides.iter_mut().flat_map(|side| &mut side.pieces) {
        if piece.role == Role::Prompt {
            piece.role = Role::Trained;
        }
    }
}

impl Tokenize {
    fn row(
        &self,
        tokenizer: &Tokenizer,
        batch: &RecordBatch,
        at: usize,
        (split, number): (&str, usize),
    ) -> Result<Row> {
        let of = |name: &'static str| text(column(batch, name)?, at, name);
        let rejected = match batch.column_by_name("rejected") {
            Some(_) => Some(of("rejected")?),
            None => None,
        };
        let (prompt, chosen) = (of("prompt")?, of("chosen")?);
        let texts = Texts {
            prompt,
            chosen,
            rejected,
            answers: ranges::read(batch, at, prompt.len() + chosen.len())?,
        };
        let bytes = texts.prompt.len() + texts.chosen.len() + rejected.map_or(0, str::len);
        let watch = Watched {
            number: number as u64,
            of: format!("of the split `{split}`").into(),
        };
        let uncut = Truncation::Answers {
            max_length: usize::MAX,
        };
        let (kept, whole) = watched(watch, 2 * longest(bytes), || {
            anyhow::Ok((
                self.encode(tokenizer, texts.clone(), self.truncation())?,
                self.encode(tokenizer, texts, uncut)?,
            ))
        })
        .with_context(|| format!("row {number} of the split `{split}`"))?;
        let dropped = kept.as_ref().err().map(|cause| cause.name());
        let whole = whole.unwrap_or_default();
        let mut kept = kept.unwrap_or_else(|_| RowIds {
            chosen: SideIds::default(),
            rejected: whole.rejected.as_ref().map(|_| SideIds::default()),
            ..RowIds::default()
        });
        // A labelled answer is cut only where it is trained on.
        let room = self.max_length.saturating_sub(kept.chosen.prompt.len());
        if self.max_prompt_length.is_none() {
            kept.chosen.answer.truncate(room);
        }
        let first = if rejected.is_some() {
            "chosen"
        } else {
            "answer"
        };
        let mask = whole.assistant_masks.as_deref();
        let mut sides = vec![Side {
            name: first,
            pieces: pieces(tokenizer, &kept.chosen, &whole.chosen, mask)?,
        }];
        if let (Some(kept), Some(whole)) = (&kept.rejected, &whole.rejected) {
            sides.push(Side {
                name: "rejected",
                pieces: pieces(tokenizer, kept, whole, None)?,
            });
        }
        Ok(Row {
            split: split.to_owned(),
            row: number,
            dropped,
            sides,
        })
    }
}

/// What is kept of a sequence, and what was cut of it. `mask` tells for each id of the whole sequence whether it may be learnt.
fn pieces(
    tokenizer: &Tokenizer,
    kept: &SideIds,
    whole: &SideIds,
    mask: Option<&[bool]>,
) -> Result<Vec<Piece>> {
    let lost = whole.prompt.len().saturating_sub(kept.prompt.len());
    // Either end of a prompt may be gone.
    let at_start = lost > 0 && whole.prompt.ends_with(&kept.prompt);
    let split = if at_start { lost } else { kept.prompt.len() };
    let (front, back) = whole.prompt.split_at(split.min(whole.prompt.len()));
    let prompts = if at_start {
        [(Role::Cut, front), (Role::Prompt, back)]
    } else {
        [(Role::Prompt, front), (Role::Cut, back)]
    };
    let answer = kept.answer.len().min(whole.answer.len());
    let (trained, cut) = whole.answer.split_at(answer);
    let all = prompts
        .into_iter()
        .chain([(Role::Trained, trained), (Role::Cut, cut)]);
    let mut pieces: Vec<Piece> = Vec::new();
    let mut start = 0;
    for (role, mut ids) in all {
        let mut masks = mask.map_or(&[][..], |mask| &mask[start..start + ids.len()]);
        start += ids.len();
        while !ids.is_empty() {
            // Up to where the mask changes.
            let learnt = masks.first().copied().unwrap_or(true);
            let alike = masks.iter().take_while(|mask| **mask == learnt).count();
            let (piece, rest) = ids.split_at(if masks.is_empty() { ids.len() } else { alike });
            masks = &masks[alike..];
            ids = rest;
            let role = match (role, mask) {
                (Role::Trained, Some(_)) if !learnt => Role::Prompt,
                _ => role,
            };
            let token = |id: &u32| tokenizer.token_of(*id).unwrap_or_default();
            pieces.push(Piece {
                role,
                text: tokenizer.decode(piece, false)?,
                ids: piece.to_vec(),
                tokens: piece.iter().map(token).collect(),
            });
        }
    }
    Ok(pieces)
}
