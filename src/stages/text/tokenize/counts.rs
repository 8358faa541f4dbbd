//! What was noticed about rows that were tokenized, for the record and for the user.

use std::collections::{BTreeMap, HashMap};

use anyhow::Result;
use serde_json::json;

use crate::data::lint::{Lint, Lints, RowLocation};
use crate::engine::Context;
use crate::stages::lints;
use crate::stages::text::added::Added;
use crate::text::preference::{RowIds, SideIds, SkipReason};
use crate::text::tokenizer::{SpecialToken, Tokenizer};

/// What goes into the record.
#[derive(Default)]
pub(super) struct Counts {
    pub(super) rows: BTreeMap<String, usize>,
    pub(super) read: usize,
    pub(super) empty_answers: usize,
    tokens: u64,
    longest: usize,
    dropped: BTreeMap<SkipReason, usize>,
    prompts_cut: usize,
    answers_cut: usize,
    equal_answers: usize,
    /// Rows with ids that the model has no embeddings for.
    beyond: usize,
    /// Preferred and other answers, and how many of their sequences got a BOS and an EOS.
    sides: usize,
    bos_added: usize,
    eos_added: usize,
    lints: Lints,
    /// Ids that were looked up: whether they are special.
    special: HashMap<u32, bool>,
}

/// An answer of no more tokens may be one that only ends the turn and the text.
const SHORT: usize = 3;
/// Behind the token that ends a turn a template may print some white space.
const END: usize = 3;

impl Counts {
    /// Takes in a row that was kept. `vocabulary` is the number of ids that the model has embeddings for, if it is known.
    pub(super) fn add(
        &mut self,
        row: &RowIds,
        location: RowLocation<'_>,
        tokenizer: &Tokenizer,
        vocabulary: Option<u32>,
    ) -> Result<()> {
        let mut empty = false;
        let (mut unended, mut double_bos) = (false, false);
        if row.prompt_cut {
            self.prompts_cut += 1;
            self.lints.add(Lint::CutPrompts, location, None);
        }
        if row.answer_cut {
            self.answers_cut += 1;
            self.lints.add(Lint::CutAnswers, location, None);
        }
        if let Some(rejected) = &row.rejected {
            self.sides += 2;
            self.bos_added += row.bos_added;
            self.eos_added += row.eos_added;
            self.lints
                .add_lengths(row.chosen.answer.len(), rejected.answer.len());
        }
        for side in std::iter::once(&row.chosen).chain(&row.rejected) {
            let length = side.prompt.len() + side.answer.len();
            self.tokens += length as u64;
            self.longest = self.longest.max(length);
            if side.answer.len() <= SHORT {
                empty |= tokenizer.decode(&side.answer, true)?.trim().is_empty();
            }
            double_bos |= begins_twice(side, tokenizer);
            if !row.answer_cut && tokenizer.eos.is_some() {
                unended |= !self.is_ended(side, tokenizer)?;
            }
        }
        if empty {
            self.empty_answers += 1;
            self.lints.add(Lint::EmptyAnswers, location, None);
        }
        if double_bos {
            self.lints.add(Lint::DoubleBos, location, None);
        }
        if unended {
            self.lints.add(Lint::MissingEos, location, None);
        }
        if row.rejected.as_ref() == Some(&row.chosen) {
            self.equal_answers += 1;
            self.lints.add(Lint::EqualAnswers, location, None);
        }
        if let Some(id) = beyond(row, vocabulary) {
            self.beyond += 1;
            let text = tokenizer.token_of(id).unwrap_or_default();
            let more = format!("`{text}` with the id {id}");
            self.lints.add(Lint::UnknownIds, location, Some(&more));
        }
        Ok(())
    }

    /// Takes in a row that was left out.
    pub(super) fn drop(&mut self, cause: SkipReason, location: RowLocation<'_>) {
        *self.dropped.entry(cause).or_default() += 1;
        self.lints
            .add(Lint::DroppedRows, location, Some(cause.name()));
    }

    /// Whether a special token ends an answer, but for some white space.
    fn is_ended(&mut self, side: &SideIds, tokenizer: &Tokenizer) -> Result<bool> {
        for id in side.answer.iter().rev().take(END) {
            let known = self.special.get(id).copied();
            let is_special = match known {
                Some(known) => known,
                None => tokenizer.decode(&[*id], true)?.is_empty(),
            };
            self.special.insert(*id, is_special);
            if is_special {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Why rows were dropped, in words.
    pub(super) fn causes(&self) -> String {
        let cause = |(cause, count): (&SkipReason, &usize)| format!("{}: {count}", cause.name());
        let causes: Vec<String> = self.dropped.iter().map(cause).collect();
        causes.join(", ")
    }

    /// What every sequence of the preferences got.
    pub(super) fn added(&self, tokenizer: &Tokenizer) -> Added {
        let all = |count: usize| count > 0 && count == self.sides;
        let id = |token: &Option<SpecialToken>| token.as_ref().map(|token| token.id);
        Added {
            bos: id(&tokenizer.bos).filter(|_| all(self.bos_added)),
            eos: id(&tokenizer.eos).filter(|_| all(self.eos_added)),
            mixed: [self.bos_added, self.eos_added]
                .into_iter()
                .any(|count| count > 0 && !all(count)),
        }
    }

    /// Tells what was noticed.
    ///
    /// # Errors
    /// A denied lint was found.
    pub(super) fn tell(&self, cx: &Context, denied: &[Lint]) -> Result<()> {
        cx.note("rows", &self.rows);
        cx.note("tokens", self.tokens);
        cx.note("longest_sequence", self.longest);
        let all = self.read;
        let dropped: usize = self.dropped.values().sum();
        if dropped > 0 {
            let named = |(cause, count): (&SkipReason, &usize)| (cause.name(), *count);
            let causes: BTreeMap<_, _> = self.dropped.iter().map(named).collect();
            cx.warn(format!(
                "{dropped} of {all} rows were dropped ({})",
                self.causes()
            ));
            cx.note("rows_dropped", causes);
        }
        for (name, count) in [
            ("prompts_cut", self.prompts_cut),
            ("answers_cut", self.answers_cut),
            ("rows_with_empty_answers", self.empty_answers),
            ("rows_with_unknown_ids", self.beyond),
            ("rows_with_equal_answers", self.equal_answers),
        ] {
            if count > 0 {
                cx.note(name, count);
            }
        }
        if let Some((chosen, rejected)) = self.lints.mean_lengths() {
            let round = |mean: f64| (mean * 10.).round() / 10.;
            cx.note(
                "mean_answer_tokens",
                json!({ "chosen": round(chosen), "rejected": round(rejected) }),
            );
        }
        lints::tell(cx, &self.lints, all, denied, &[Lint::DroppedRows])
    }
}

/// Whether a sequence begins with two BOS.
fn begins_twice(side: &SideIds, tokenizer: &Tokenizer) -> bool {
    let Some(bos) = &tokenizer.bos else {
        return false;
    };
    let mut first = side.prompt.iter().chain(&side.answer).take(2);
    first.next() == Some(&bos.id) && first.next() == Some(&bos.id)
}

/// The first id that the model has no embeddings for: a tokenizer may name more tokens than the model was made with.
fn beyond(row: &RowIds, vocabulary: Option<u32>) -> Option<u32> {
    let vocabulary = vocabulary?;
    let sides = std::iter::once(&row.chosen).chain(&row.rejected);
    let mut ids = sides.flat_map(|side| side.prompt.iter().chain(&side.answer));
    ids.find(|id| **id >= vocabulary).copied()
}
