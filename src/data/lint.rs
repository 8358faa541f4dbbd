//! Lints: what is likely wrong with rows that are to be trained on, found while they stream by. Memory is bounded whatever the number of
//! rows.

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Something that is likely wrong with rows.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Lint {
    /// A row has the same prompt as an earlier row of its split (`apply_chat_template`).
    DuplicatePrompts,
    /// A prompt is in more than one split, so that a test row may have been trained on (`apply_chat_template`).
    LeakedPrompts,
    /// A row's own text holds special tokens, which the tokenizer reads as such (`apply_chat_template`).
    SpecialTokens,
    /// The better and the worse answer are the same tokens (`tokenize`).
    EqualAnswers,
    /// An answer holds nothing but special tokens and white space (`tokenize`).
    EmptyAnswers,
    /// An answer lost its end, because the row is longer than `max_length` (`tokenize`).
    CutAnswers,
    /// A prompt was cut (`tokenize`).
    CutPrompts,
    /// A row was left out, because no answer token was left of it (`tokenize`).
    DroppedRows,
    /// Better answers are much longer or much shorter than worse ones, so that length alone tells them apart (`tokenize`).
    LengthBias,
    /// A sequence begins with two BOS tokens (`tokenize`).
    DoubleBos,
    /// An answer that was not cut ends without a special token, so that the model does not learn to stop (`tokenize`).
    MissingEos,
    /// A row holds token ids that the model has no embeddings for (`tokenize`).
    UnknownIds,
}

impl Lint {
    /// The lints of rendered texts.
    pub const OF_TEXTS: &[Self] = &[
        Self::DuplicatePrompts,
        Self::LeakedPrompts,
        Self::SpecialTokens,
    ];
    /// The lints of tokens.
    pub const OF_TOKENS: &[Self] = &[
        Self::EqualAnswers,
        Self::EmptyAnswers,
        Self::CutAnswers,
        Self::CutPrompts,
        Self::DroppedRows,
        Self::LengthBias,
        Self::DoubleBos,
        Self::MissingEos,
        Self::UnknownIds,
    ];

    /// Its name in recipes and records.
    pub fn name(self) -> &'static str {
        match self {
            Self::DuplicatePrompts => "duplicate_prompts",
            Self::LeakedPrompts => "leaked_prompts",
            Self::SpecialTokens => "special_tokens",
            Self::EqualAnswers => "equal_answers",
            Self::EmptyAnswers => "empty_answers",
            Self::CutAnswers => "cut_answers",
            Self::CutPrompts => "cut_prompts",
            Self::DroppedRows => "dropped_rows",
            Self::LengthBias => "length_bias",
            Self::DoubleBos => "double_bos",
            Self::MissingEos => "missing_eos",
            Self::UnknownIds => "unknown_ids",
        }
    }
}

/// How many rows of a lint are named.
const NAMED: usize = 5;

/// The rows with one lint.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Found {
    /// How many.
    pub rows: u64,
    /// Where the first of them are, in words.
    pub first: Vec<String>,
}

/// What was found in the rows of all splits.
#[derive(Debug, Default)]
pub struct Lints {
    found: BTreeMap<Lint, Found>,
    prompts: Prompts,
    lengths: Lengths,
}

/// Where a row is: its number in its split, from 1.
#[derive(Debug, Clone, Copy)]
pub struct RowLocation<'a> {
    /// The number.
    pub row: usize,
    /// The split.
    pub split: &'a str,
}

impl RowLocation<'_> {
    /// The location in words; `more` says what is there.
    fn told(self, more: Option<&str>) -> String {
        let Self { row, split } = self;
        match more {
            Some(more) => format!("row {row} of the split `{split}`, {more}"),
            None => format!("row {row} of the split `{split}`"),
        }
    }
}

impl Lints {
    /// Notes a row with a lint; `more` says what it has, if there is something to say.
    pub fn add(&mut self, lint: Lint, location: RowLocation<'_>, more: Option<&str>) {
        self.add_weighted(lint, 1, location, more);
    }

    /// The same for a row that stands for so many.
    fn add_weighted(
        &mut self,
        lint: Lint,
        weight: u64,
        location: RowLocation<'_>,
        more: Option<&str>,
    ) {
        let found = self.found.entry(lint).or_default();
        found.rows += weight;
        if found.first.len() < NAMED {
            found.first.push(location.told(more));
        }
    }

    /// Notes a row's prompt. Splits come one after the other.
    pub fn add_prompt(&mut self, prompt: &str, location: RowLocation<'_>) {
        let weight = 1 << self.prompts.halvings;
        let (lint, more) = match self.prompts.add(prompt, location) {
            Some(Before::SameSplit(row)) => (Lint::DuplicatePrompts, format!("as row {row}")),
            Some(Before::OtherSplit(row, split)) => {
                (Lint::LeakedPrompts, format!("as row {row} of `{split}`"))
            }
            None => return,
        };
        self.add_weighted(lint, weight, location, Some(&more));
    }

    /// Notes the lengths of a preference's answers, in tokens.
    pub fn add_lengths(&mut self, chosen: usize, rejected: usize) {
        self.lengths.rows += 1;
        self.lengths.chosen += chosen as u64;
        self.lengths.rejected += rejected as u64;
    }

    /// The mean lengths of better and worse answers, in tokens, if there are any.
    pub fn mean_lengths(&self) -> Option<(f64, f64)> {
        let Lengths {
            rows,
            chosen,
            rejected,
        } = self.lengths;
        let mean = |sum: u64| sum as f64 / rows as f64;
        (rows > 0).then(|| (mean(chosen), mean(rejected)))
    }

    /// What was found.
    pub fn found(&self) -> BTreeMap<Lint, Found> {
        let mut found = self.found.clone();
        if self.lengths.is_biased() {
            let rows = self.lengths.rows;
            let first = Vec::new();
            found.insert(Lint::LengthBias, Found { rows, first });
        }
        found
    }

    /// Whether counts of prompts are estimates.
    pub fn counts_are_estimates(&self) -> bool {
        self.prompts.halvings > 0
    }
}

/// Sums of answers' lengths.
#[derive(Debug, Clone, Copy, Default)]
struct Lengths {
    rows: u64,
    chosen: u64,
    rejected: u64,
}

impl Lengths {
    /// Fewer rows tell nothing.
    const FEWEST: u64 = 20;

    /// Whether one side is at least a third longer than the other.
    fn is_biased(&self) -> bool {
        let (longer, shorter) = (
            self.chosen.max(self.rejected),
            self.chosen.min(self.rejected),
        );
        self.rows >= Self::FEWEST && longer * 3 >= shorter * 4
    }
}

/// The most prompts that are remembered at once: about 64 MiB of them.
const MOST: usize = if cfg!(test) { 64 } else { 1 << 21 };

/// Prompts that were seen, by 64-bit hashes. When there are too many, only those are kept whose hash lies in half of the part that
/// was kept before: equal prompts stay or go together, so the rest still tells how many there are of each.
#[derive(Debug, Default)]
struct Prompts {
    seen: HashMap<u64, First>,
    splits: Vec<String>,
    halvings: u32,
}

/// Where a prompt was seen first.
#[derive(Debug, Clone, Copy)]
struct First {
    split: u32,
    row: u32,
    /// The split in which it was last told as leaked.
    told: u32,
}

/// Where a prompt was before.
enum Before<'a> {
    SameSplit(u32),
    OtherSplit(u32, &'a str),
}

impl Prompts {
    fn add(&mut self, prompt: &str, location: RowLocation<'_>) -> Option<Before<'_>> {
        let mut hasher = DefaultHasher::new();
        prompt.hash(&mut hasher);
        let hash = hasher.finish();
        if !self.keeps(hash) {
            return None;
        }
        if self.splits.last().is_none_or(|last| last != location.split) {
            self.splits.push(location.split.to_owned());
        }
        let split = self.splits.len() as u32;
        let Some(first) = self.seen.get_mut(&hash) else {
            let row = u32::try_from(location.row).unwrap_or(u32::MAX);
            let told = split;
            self.seen.insert(hash, First { split, row, told });
            if self.seen.len() > MOST {
                self.halvings += 1;
                let halvings = self.halvings;
                self.seen.retain(|hash, _| keeps(*hash, halvings));
            }
            return None;
        };
        if first.split == split {
            return Some(Before::SameSplit(first.row));
        }
        if first.told == split {
            // Once a split: its other rows with this prompt are duplicates of that one.
            return None;
        }
        first.told = split;
        let other = self.splits.get(first.split as usize - 1)?;
        Some(Before::OtherSplit(first.row, other))
    }

    fn keeps(&self, hash: u64) -> bool {
        keeps(hash, self.halvings)
    }
}

/// Whether a hash lies in the part of all hashes that is kept after so many halvings.
fn keeps(hash: u64, halvings: u32) -> bool {
    hash.leading_zeros() >= halvings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn location(row: usize, split: &str) -> RowLocation<'_> {
        RowLocation { row, split }
    }

    #[test]
    fn prompts_that_come_again_are_told_apart_by_their_splits() {
        let mut lints = Lints::default();
        for (row, prompt) in [(1, "a"), (2, "b"), (3, "a")] {
            lints.add_prompt(prompt, location(row, "test"));
        }
        for (row, prompt) in [(1, "c"), (2, "b"), (3, "b"), (4, "c")] {
            lints.add_prompt(prompt, location(row, "train"));
        }
        let found = lints.found();
        let duplicates = &found[&Lint::DuplicatePrompts];
        assert_eq!(duplicates.rows, 2);
        assert_eq!(
            duplicates.first,
            [
                "row 3 of the split `test`, as row 1",
                "row 4 of the split `train`, as row 1"
            ]
        );
        let leaked = &found[&Lint::LeakedPrompts];
        assert_eq!(
            (leaked.rows, leaked.first[0].as_str()),
            (1, "row 2 of the split `train`, as row 2 of `test`")
        );
    }

    #[test]
    fn memory_is_bounded_and_the_counts_stay_about_right() {
        let mut lints = Lints::default();
        // Every prompt twice, one right behind the other.
        for row in 0..4000 {
            lints.add_prompt(&format!("prompt {}", row / 2), location(row + 1, "train"));
            assert!(lints.prompts.seen.len() <= MOST);
        }
        assert!(lints.counts_are_estimates());
        let mut whole = Lints::default();
        whole.add_prompt("x", location(1, "train"));
        assert!(!whole.counts_are_estimates());
        let rows = lints.found()[&Lint::DuplicatePrompts].rows;
        assert!(
            (1200..=2800).contains(&rows),
            "2000 of them are there: {rows}"
        );
    }

    #[test]
    fn lengths_are_biased_where_one_side_is_a_third_longer() {
        for (chosen, rejected, rows, expected) in [
            (40, 30, 20, true),
            (39, 30, 20, false),
            (30, 40, 20, true),
            (90, 30, 19, false),
        ] {
            let mut lints = Lints::default();
            (0..rows).for_each(|_| lints.add_lengths(chosen, rejected));
            let biased = lints.found().contains_key(&Lint::LengthBias);
            assert_eq!(biased, expected, "{chosen} {rejected} {rows}");
        }
    }

    #[test]
    fn names_are_those_of_recipes() {
        for lint in Lint::OF_TEXTS.iter().chain(Lint::OF_TOKENS) {
            assert_eq!(serde_json::to_value(lint).unwrap(), lint.name());
        }
    }
}
