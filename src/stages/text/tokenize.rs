//! `tokenize`: text to token ids.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use arrow_array::cast::AsArray;
use arrow_array::types::Float64Type;
use arrow_array::{Array, RecordBatch, StringArray};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::counts::Counts;
use super::chat_template;
use super::labelled::Labelled;
use super::shards::{Rows, make_shard};
use super::tokenizers::load;
use crate::data::lint::{Lint, RowLocation};
use crate::data::ranges;
use crate::data::table::{Split, Writer, pass_pieces, splits};
use crate::data::tokens::{Columns, TokenRow, batch, schema};
use crate::engine::{Context, Implied, ImpliedBy, Input, Problem, Row, Shard, Stage, watched};
use crate::ml::io::folder;
use crate::stages::artifacts::{Chats, Model, Tokens};
use crate::stages::lints;
use crate::text::preference::{
    RowIds, SkipReason, Truncation, encode, encode_alone, encode_labelled, encode_pair,
    encode_turns, encode_whole_pair,
};
use crate::text::tokenizer::Tokenizer;

mod counts;
pub mod look;

/// Turns texts into token ids as TRL does, the answer apart from its prompt.
///
/// Preferences get one BOS and one EOS, as by `ORPOTrainer`; with `trainer: dpo` they get none, as by `DPOTrainer`. Chats with one
/// answer stay as the chat template printed them, as by `SFTTrainer`, which puts no EOS behind the end of a turn. A text without a
/// prompt gets its EOS, and what the tokenizer itself puts around it, usually a BOS.
///
/// `trainer: kto` makes the rows of `train_kto`, and `trainer: reward` those of `train_reward`.
///
/// A row that is left without an answer token is dropped and counted in the record; TRL would train on a NaN.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("examples" = [{"dataset": "chats", "max_length": 1024}]))]
pub struct Tokenize {
    /// The texts to tokenize, in every split.
    #[schemars(extend("examples" = ["chats"]))]
    dataset: Input<Chats>,
    /// The model whose tokenizer is used. It may be left out: then it is the `tokenizer` of the chats, or else the recipe's only
    /// model that is downloaded, imported or created.
    #[schemars(extend("examples" = ["base"]))]
    tokenizer: Input<Model>,
    /// The longest sequence of prompt and answer, in tokens. What is longer is cut.
    #[serde(default = "default_max_length")]
    #[schemars(extend("minimum" = 2))]
    #[schemars(extend("examples" = [2048]))]
    max_length: usize,
    /// The length in tokens to which a prompt is cut that doesn't fit beside its longer answer, before the answers are cut, as TRL
    /// did until 0.24. Without it, only answers are cut and prompts never, as in TRL 1.16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minimum" = 1))]
    #[schemars(extend("examples" = [512]))]
    max_prompt_length: Option<usize>,
    /// Which end of a prompt is kept when it is cut. It counts only with `max_prompt_length`.
    #[serde(default)]
    truncation_mode: TruncationMode,
    /// The trainer of TRL's whose way of preparing preferences is followed; `orpo` if it isn't given. Rows with one answer are
    /// prepared as by `SFTTrainer`, except by `kto`.
    #[serde(default, skip_serializing_if = "PreferenceTrainer::is_default")]
    trainer: PreferenceTrainer,
    /// Lints that make the stage fail when a row has them, with the first rows named: any of `equal_answers`, `empty_answers`,
    /// `cut_answers`, `cut_prompts`, `dropped_rows`, `length_bias`, `double_bos`, `missing_eos` and `unknown_ids`. Without it they are
    /// counted and told.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    deny_lints: Vec<Lint>,
}

/// A trainer of TRL's that prepares preferences.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PreferenceTrainer {
    /// `ORPOTrainer`: each sequence gets a BOS and an EOS where it has none, and the prompt ends where it ends alone, or one token before.
    #[default]
    Orpo,
    /// `DPOTrainer`: sequences stay as the chat template printed them, and both answers begin at the first token in which either of them
    /// changes the prompt. Rows whose prompt fills `max_length` are dropped.
    Dpo,
    /// `KTOTrainer`: single answers with the `label` of their row. A preference becomes two rows, and of every thousand preferences the chosen
    /// answers come first. Rows whose prompt fills `max_length` are dropped; answers are cut when `train_kto` reads them.
    Kto,
    /// `RewardTrainer`: as by `dpo`, but nothing is cut: a row with a sequence above `max_length` is dropped. The `margin` of a row is kept.
    Reward,
}

/// The number of preferences of which the chosen answers come first in rows for KTO: the batch size of `Dataset.map`.
const UNPAIRED_AT_ONCE: usize = 1000;

impl PreferenceTrainer {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Which end of a prompt is kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TruncationMode {
    /// The end; the BOS is lost.
    #[default]
    KeepEnd,
    /// The start.
    KeepStart,
}

fn default_max_length() -> usize {
    1024
}

impl Stage for Tokenize {
    const KIND: &'static str = "tokenize";
    const VERSION: u32 = 3;
    type Output = Tokens;
    const BOUNDED: bool = true;
    const SHARDS: bool = true;
    const IMPLIED: &'static [Implied] = &[Implied {
        parameter: "tokenizer",
        unless: &[],
        with: &[],
        sources: &[
            ImpliedBy::Input {
                input: "dataset",
                parameter: "tokenizer",
                before: None,
            },
            ImpliedBy::OnlyFirst,
        ],
    }];

    fn check(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        if let Some(most) = self.max_prompt_length
            && most >= self.max_length
        {
            let message = format!("expected a number below `max_length` ({})", self.max_length);
            problems.push(Problem::new("max_prompt_length", message));
        }
        let other = match self.trainer {
            PreferenceTrainer::Orpo => None,
            PreferenceTrainer::Dpo => Some("DPOTrainer"),
            PreferenceTrainer::Kto => Some("KTOTrainer"),
            PreferenceTrainer::Reward => Some("RewardTrainer"),
        };
        if let (Some(trainer), Some(_)) = (other, self.max_prompt_length) {
            let message =
                format!("`{trainer}` does not cut prompts; expected only with `trainer: orpo`");
            problems.push(Problem::new("max_prompt_length", message));
        }
        problems.extend(lints::check(&self.deny_lints, Lint::OF_TOKENS));
        problems
    }

    fn run(&self, cx: &Context) -> Result<()> {
        let folder = cx.input(&self.tokenizer)?;
        let tokenizer = load(folder)?;
        let vocabulary = vocabulary(folder)?;
        let folder = cx.input(&self.dataset)?;
        let splits: Result<Vec<Split>> = splits(folder)?
            .into_iter()
            .map(|(name, files)| Split::of_files(&name, files))
            .collect();
        let splits = splits?;
        ensure!(!splits.is_empty(), "there is no split to tokenize");
        let total: usize = splits.iter().map(Split::rows).sum();
        let mut counts = Counts::default();
        if let Some(shard) = cx.shard() {
            return self.tokenize_shard(cx, shard, &tokenizer, &splits);
        }
        for split in &splits {
            self.tokenize_split(cx, &tokenizer, vocabulary, split, total as u64, &mut counts)?;
        }
        counts.tell(cx, &self.deny_lints)?;
        counts.added(&tokenizer).write(cx.out())?;
        if self.trainer == PreferenceTrainer::Kto {
            Labelled {
                max_length: self.max_length,
            }
            .write(cx.out())?;
        }
        chat_template::carry(folder, cx.out())
    }
}

impl Tokenize {
    fn truncation(&self) -> Truncation {
        match self.max_prompt_length {
            None => Truncation::Answers {
                max_length: self.max_length,
            },
            Some(max_prompt_length) => Truncation::PromptThenAnswers {
                max_length: self.max_length,
                max_prompt_length,
                keep_end: self.truncation_mode == TruncationMode::KeepEnd,
            },
        }
    }

    /// The ids of a row, or why there are none.
    fn encode(
        &self,
        tokenizer: &Tokenizer,
        texts: Texts<'_>,
        truncation: Truncation,
    ) -> Result<Result<RowIds, SkipReason>> {
        let Texts {
            prompt,
            chosen,
            rejected,
            answers,
        } = texts;
        if let Some(answers) = answers {
            return encode_turns(tokenizer, prompt, chosen, &answers, truncation);
        }
        let max_length = truncation.max_length();
        match (rejected, self.trainer) {
            (Some(rejected), PreferenceTrainer::Dpo) => {
                encode_pair(tokenizer, prompt, chosen, rejected, truncation)
            }
            (Some(rejected), PreferenceTrainer::Reward) => {
                encode_whole_pair(tokenizer, prompt, chosen, rejected, max_length)
            }
            (_, PreferenceTrainer::Kto) => encode_labelled(tokenizer, prompt, chosen, max_length),
            (Some(_), PreferenceTrainer::Orpo) => {
                encode(tokenizer, prompt, chosen, rejected, truncation)
            }
            (None, _) => encode_alone(tokenizer, prompt, chosen, truncation),
        }
    }

    /// The columns of a split's tokens.
    fn columns(&self, split: &Split) -> Result<Columns> {
        let has = |name: &str| split.schema().field_with_name(name).is_ok();
        let (preferences, name) = (has("rejected"), split.name());
        let only_pairs = [PreferenceTrainer::Kto, PreferenceTrainer::Reward];
        ensure!(
            !has(ranges::NAME) || !only_pairs.contains(&self.trainer),
            "the split `{name}` says which turns are the assistant's, which count for `train_sft` alone; hint: leave out \
             `assistant_only_loss` where the chat template is applied, or `trainer` here"
        );
        Ok(match self.trainer {
            PreferenceTrainer::Kto => {
                ensure!(
                    preferences || has("label"),
                    "the rows of the split `{name}` have neither a `label` that says whether the answer is a good one nor a `rejected` answer; \
                     hint: `columns: {{label: ..}}` where the data is imported names a column of another name, and `format: kto` reads it"
                );
                Columns::Labels
            }
            PreferenceTrainer::Reward => {
                ensure!(
                    preferences,
                    "the rows of the split `{name}` have no `rejected` answer, which a reward model is trained with"
                );
                if has("margin") {
                    Columns::Margins
                } else {
                    Columns::Preferences
                }
            }
            _ if preferences => Columns::Preferences,
            _ if has(ranges::NAME) => Columns::Turns,
            _ => Columns::Answers,
        })
    }

    /// The label of a row and its margin, as far as the trainer uses them.
    fn marks(&self, texts: &RecordBatch, row: usize, preferences: bool) -> Result<Marks> {
        let labels = texts.column_by_name("label");
        let labels = labels.and_then(|column| column.as_boolean_opt());
        let label = labels.filter(|labels| labels.is_valid(row));
        let label = label.map(|labels| labels.value(row));
        if preferences {
            let margins = texts.column_by_name("margin");
            let margins = margins.and_then(|column| column.as_primitive_opt::<Float64Type>());
            let margin = margins.filter(|margins| margins.is_valid(row));
            let margin = margin.map(|margins| margins.value(row));
            if self.trainer == PreferenceTrainer::Reward && margins.is_some() {
                ensure!(
                    margin.is_some_and(f64::is_finite),
                    "the row's `margin` is missing or no number"
                );
                return Ok(Marks {
                    label: None,
                    margin,
                });
            }
            return Ok(Marks::default());
        }
        if self.trainer == PreferenceTrainer::Kto {
            ensure!(label.is_some(), "the row has no `label`");
            return Ok(Marks {
                label,
                margin: None,
            });
        }
        ensure!(
            label != Some(false),
            "its `label` is false: its answer is a bad one; hint: `trainer: kto` keeps labels for `train_kto`, and `format: \
             prompt_completion` where the data is imported takes all answers as good ones"
        );
        Ok(Marks::default())
    }

    /// The rows of ids that a row of texts becomes: one, or two of a preference for KTO.
    fn rows(&self, tokenizer: &Tokenizer, texts: &Texts<'_>, marks: Marks) -> Result<Sides> {
        let one = |texts: Texts<'_>, marks: Marks| {
            let ids = self.encode(tokenizer, texts, self.truncation())?;
            anyhow::Ok(ids.map(|ids| TokenizedRow { ids, marks }))
        };
        let Some(rejected) = texts
            .rejected
            .filter(|_| self.trainer == PreferenceTrainer::Kto)
        else {
            return Ok(vec![one(texts.clone(), marks)?]);
        };
        let side = |chosen, label| {
            let texts = Texts {
                chosen,
                rejected: None,
                ..texts.clone()
            };
            let marks = Marks {
                label: Some(label),
                margin: None,
            };
            one(texts, marks)
        };
        Ok(vec![side(texts.chosen, true)?, side(rejected, false)?])
    }

    /// What makes the rows of ids of a batch of texts, by its index there; `before` rows of the split come before the batch.
    fn make_rows<'a>(
        &'a self,
        tokenizer: &'a Tokenizer,
        texts: &'a RecordBatch,
        split: &Split,
        before: usize,
    ) -> Result<impl Fn(usize) -> Result<Sides> + Sync + use<'a>> {
        let of: Arc<str> = format!("of the split `{}`", split.name()).into();
        let prompt = column(texts, "prompt")?;
        let chosen = column(texts, "chosen")?;
        let preferences = split.schema().field_with_name("rejected").is_ok();
        let rejected = preferences.then(|| column(texts, "rejected")).transpose()?;
        Ok(move |row: usize| {
            let number = before + row + 1;
            let make = || {
                let rejected = rejected
                    .map(|rejected| text(rejected, row, "rejected"))
                    .transpose()?;
                let prompt = text(prompt, row, "prompt")?;
                let chosen = text(chosen, row, "chosen")?;
                let bytes = prompt.len() + chosen.len() + rejected.map_or(0, str::len);
                let watch = Row {
                    number: number as u64,
                    of: Arc::clone(&of),
                };
                let own = Texts {
                    prompt,
                    chosen,
                    rejected,
                    answers: ranges::read(texts, row, prompt.len() + chosen.len())?,
                };
                let marks = self.marks(texts, row, preferences)?;
                watched(watch, longest(bytes), || self.rows(tokenizer, &own, marks))
            };
            make().with_context(|| format!("row {number} {of}"))
        })
    }

    /// Makes a shard's rows of all splits.
    fn tokenize_shard(
        &self,
        cx: &Context,
        shard: Shard,
        tokenizer: &Tokenizer,
        splits: &[Split],
    ) -> Result<()> {
        let total: usize = splits.iter().map(Split::rows).sum();
        let mut done = 0;
        for split in splits {
            self.columns(split)?;
            make_shard(cx, shard, split, |texts, before, made| {
                let make = self.make_rows(tokenizer, texts, split, before)?;
                made(&Rows::Made.next(texts.num_rows(), 8, make)?)?;
                done += texts.num_rows();
                cx.progress(done as u64, Some(total as u64), "rows");
                Ok(())
            })?;
        }
        Ok(())
    }

    fn tokenize_split(
        &self,
        cx: &Context,
        tokenizer: &Tokenizer,
        vocabulary: Option<u32>,
        split: &Split,
        total: u64,
        counts: &mut Counts,
    ) -> Result<()> {
        let preferences = split.schema().field_with_name("rejected").is_ok();
        let columns = self.columns(split)?;
        let unpairs = preferences && self.trainer == PreferenceTrainer::Kto;
        let (mut chosen_rows, mut rejected_rows) = (Vec::new(), Vec::new());
        let writer = Writer::create(cx.out(), split.name(), schema(columns))?;
        let mut done = 0;
        let before = counts.empty_answers;
        let mut rows_of_split = Rows::new(cx, split);
        let rows = pass_pieces(split, writer, |texts, made| {
            let rows = self.make_rows(tokenizer, &texts, split, done);
            let rows = rows.and_then(|make| rows_of_split.next(texts.num_rows(), 8, make));
            let mut kept = Vec::with_capacity(texts.num_rows());
            for (sides, number) in rows?.into_iter().zip(done + 1..) {
                let location = || RowLocation {
                    row: number,
                    split: split.name(),
                };
                for (side, row) in sides.into_iter().enumerate() {
                    match row {
                        Ok(TokenizedRow { ids, marks }) => {
                            counts.add(&ids, location(), tokenizer, vocabulary)?;
                            let row = token_row(ids, marks);
                            match (unpairs, side) {
                                (false, _) => kept.push(row),
                                (true, 0) => chosen_rows.push(row),
                                (true, _) => rejected_rows.push(row),
                            }
                        }
                        Err(cause) => counts.drop(cause, location()),
                    }
                }
                if unpairs && (number % UNPAIRED_AT_ONCE == 0 || number == split.rows()) {
                    kept.append(&mut chosen_rows);
                    kept.append(&mut rejected_rows);
                }
            }
            done += texts.num_rows();
            cx.progress((counts.read + done) as u64, Some(total), "rows");
            cx.check_cancelled()?;
            made.send(batch(&kept, columns)?)
        })?;
        let empty = counts.empty_answers - before;
        ensure!(
            rows == 0 || empty < rows,
            "none of the {rows} rows of the split `{}` has an answer of more than special tokens, the first of them in row 1; hint: \
             look at what the chat template prints for the assistant, and at the rows' answers",
            split.name()
        );
        ensure!(
            rows > 0 || done == 0,
            "no row of the split `{}` has an answer token left within `max_length` {} ({}); hint: raise it, or look at what the \
             chat template prints for the assistant",
            split.name(),
            self.max_length,
            counts.causes()
        );
        counts.read += done;
        counts.rows.insert(split.name().to_owned(), rows);
        Ok(())
    }
}

/// What a row of texts becomes.
type Sides = Vec<Result<TokenizedRow, SkipReason>>;

/// The ids of a row, or of one side of a preference.
#[derive(Serialize, Deserialize)]
struct TokenizedRow {
    ids: RowIds,
    marks: Marks,
}

/// What is said of a row beside its texts.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
struct Marks {
    label: Option<bool>,
    margin: Option<f64>,
}

/// The texts of a row.
#[derive(Clone)]
struct Texts<'a> {
    prompt: &'a str,
    chosen: &'a str,
    rejected: Option<&'a str>,
    /// Where in prompt and answer the assistant speaks, if only that is learnt.
    answers: Option<Vec<Range<usize>>>,
}

/// The longest that texts of so many bytes may take, many times what they do take.
fn longest(bytes: usize) -> Duration {
    Duration::from_secs(10 + (bytes >> 17) as u64)
}

fn token_row(row: RowIds, marks: Marks) -> TokenRow {
    let (rejected_ids, rejected_prompt_ids) = match row.rejected {
        None => (None, None),
        Some(side) => (
            Some(side.answer),
            (side.prompt != row.chosen.prompt).then_some(side.prompt),
        ),
    };
    TokenRow {
        prompt_ids: row.chosen.prompt,
        chosen_ids: row.chosen.answer,
        rejected_ids,
        rejected_prompt_ids,
        assistant_masks: row
            .assistant_masks
            .map(|mask| mask.into_iter().map(u32::from).collect()),
        label: marks.label,
        margin: marks.margin,
    }
}

fn column<'a>(batch: &'a RecordBatch, name: &str) -> Result<&'a StringArray> {
    let column = batch.column_by_name(name);
    let column = column.and_then(|column| column.as_string_opt::<i32>());
    column.ok_or_else(|| anyhow!("the chats have no text column `{name}`"))
}

fn text<'a>(column: &'a StringArray, row: usize, name: &str) -> Result<&'a str> {
    ensure!(
        column.is_valid(row),
        "the row has no `{name}`{}",
        if name == "rejected" {
            ", and others of the split have one; hint: give it one or leave it out, or train on the answers alone by not importing \
             the column"
        } else {
            ""
        }
    );
    Ok(column.value(row))
}

/// How many ids the model's embeddings have, where its configuration tells.
fn vocabulary(model: &Path) -> Result<Option<u32>> {
    if !model.join("config.json").is_file() {
        return Ok(None);
    }
    let config = folder::config(model)?;
    let size = config.get("vocab_size").and_then(serde_json::Value::as_u64);
    Ok(size.and_then(|size| u32::try_from(size).ok()))
}

#[cfg(test)]
mod tests;
