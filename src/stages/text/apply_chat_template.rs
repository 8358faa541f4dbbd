//! `apply_chat_template`: rows to text.

use std::collections::BTreeSet;
use std::ops::Range;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use arrow_array::builder::StringBuilder;
use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, BooleanArray, RecordBatch, StringArray};
use arrow_cast::cast;
use arrow_schema::{DataType, Field, Schema};
use arrow_select::filter::filter;
use chrono::NaiveDate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

use self::counts::Counts;
pub(in crate::stages) use self::row::chat_row;
use self::source::TemplateSource;
use super::chat_template;
use super::shards::{Rows, make_shard};
use crate::data::lint::Lint;
use crate::data::ranges;
use crate::data::table::{BATCH_ROWS, Split, Writer, pass, pass_pieces, splits};
use crate::engine::{Context, Implied, ImpliedBy, Input, Problem, Row, Shard, Stage, watched};
use crate::stages::artifacts::{Chats, Dataset, Model};
use crate::stages::lints;
use crate::text::builtin::BuiltIn;
use crate::text::chat::{Rendered, Renderer};
use crate::text::template::ChatTemplate;
use crate::text::tokenizer::{self, read_template, special_tokens};

mod counts;
mod row;
mod source;

/// The longest CPU time for one row. Real rows take less than a thousandth of it.
const LONGEST: Duration = Duration::from_secs(5);
/// The approximate number of bytes of text rendered at a time.
const AT_ONCE: usize = 16 << 20;

/// Renders rows to text with a chat template, as transformers and TRL do: `prompt`, `chosen` and, for preferences, `rejected` join
/// to exactly what the template prints for the whole conversation.
///
/// The template is one of the built-in ones, a file, a text in the recipe, or else the tokenizer's own. It goes with the chats, and from them into what is
/// trained on them. Rows whose texts are rendered already are taken as they are, and counted. The `label` of rows for KTO and the `margin` of
/// preferences go with the texts.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("examples" = [{"dataset": "split", "template": "templates/llama3.jinja", "tokenizer": "base"}]))]
pub struct ApplyChatTemplate {
    /// The rows to render, in every split.
    #[schemars(extend("examples" = ["split"]))]
    dataset: Input<Dataset>,
    /// The name of a built-in chat template (`llama3`, `chatml`, `qwen3`, `gemma`, `mistral`, `phi3`, `zephyr` or `alpaca`), or a
    /// file with one, in Jinja. A file with such a name is written as a path: `./llama3`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["chatml", "templates/llama3.jinja"]))]
    template: Option<TemplateSource>,
    /// The chat template itself, as a text in the recipe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    chat_template: Option<String>,
    /// The model whose special tokens (`bos_token`, ..) are used, and whose template if no other is given. Where neither `template`
    /// nor `chat_template` is given it may be left out: then it is the recipe's only model that is downloaded, imported or created.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["base"]))]
    tokenizer: Option<Input<Model>>,
    /// Whether an empty system message is rendered, too. By default it is left out.
    #[serde(default)]
    keep_empty_system: bool,
    /// Whether `train_sft` learns all that the assistant says, in every turn, and nothing else. Without it, it learns the last turn.
    /// What the assistant says is what stands in the template's `{% generation %}` tags. Of a template that has none it is found
    /// by rendering turn by turn, which fails if the template prints a turn in another way when more follows.
    #[serde(default, skip_serializing_if = "is_false")]
    assistant_only_loss: bool,
    /// With `assistant_only_loss`, what to do with rows in which the assistant says nothing.
    #[serde(default, skip_serializing_if = "WithoutAnswer::is_default")]
    rows_without_answer: WithoutAnswer,
    /// What to do with rows whose own text holds special tokens, which the tokenizer would read as such.
    #[serde(default)]
    special_tokens: SpecialTokens,
    /// The date that `strftime_now` tells the template, as `YYYY-MM-DD`: a result must not depend on the day it was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["2026-01-31"]))]
    date: Option<String>,
    /// Lints that make the stage fail when a row has them, with the first rows named: any of `duplicate_prompts`, `leaked_prompts` and
    /// `special_tokens`. Without it they are counted and told.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    deny_lints: Vec<Lint>,
}

/// What to do with rows in which the assistant says nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WithoutAnswer {
    /// Fail at the first one.
    #[default]
    Refuse,
    /// Leave them out, and count them.
    Drop,
}

impl WithoutAnswer {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
fn is_false(value: &bool) -> bool {
    !value
}

/// What to do with special tokens in rows' own texts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SpecialTokens {
    /// Count them and name the first row.
    #[default]
    Count,
    /// Fail at the first row that has one.
    Refuse,
}

impl Stage for ApplyChatTemplate {
    const KIND: &'static str = "apply_chat_template";
    const VERSION: u32 = 4;
    type Output = Chats;
    const BOUNDED: bool = true;
    const SHARDS: bool = true;
    const IMPLIED: &'static [Implied] = &[Implied {
        parameter: "tokenizer",
        unless: &["template", "chat_template"],
        with: &[],
        sources: &[ImpliedBy::OnlyFirst],
    }];

    fn check(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        if self.template.is_some() && self.chat_template.is_some() {
            let problem = Problem::new(
                "chat_template",
                "`template` and `chat_template` are both given",
            );
            problems.push(problem.hint("keep one of them"));
        }
        if self.template.is_none() && self.chat_template.is_none() && self.tokenizer.is_none() {
            let problem = Problem::new("template", "there is no chat template");
            problems.push(problem.hint(
                "name a built-in template or a file with `template`, or a model with `tokenizer`",
            ));
        }
        if self.rows_without_answer != WithoutAnswer::Refuse && !self.assistant_only_loss {
            let message = "it counts only with `assistant_only_loss: true`";
            problems.push(Problem::new("rows_without_answer", message));
        }
        if let Err(problem) = self.parsed_date() {
            problems.push(problem);
        }
        problems.extend(lints::check(&self.deny_lints, Lint::OF_TEXTS));
        problems
    }

    fn run(&self, cx: &Context) -> Result<()> {
        let folder = cx.input(&self.dataset)?;
        let splits: Result<Vec<Split>> = splits(folder)?
            .into_iter()
            .map(|(name, files)| Split::of_files(&name, files))
            .collect();
        let splits = splits?;
        ensure!(!splits.is_empty(), "the dataset holds no split");
        let total: usize = splits.iter().map(Split::rows).sum();
        let mut counts = Counts::default();
        let renderer = if splits.iter().all(is_text) {
            // Whole texts need no template, and models trained on them often have none.
            None
        } else {
            let template = Row {
                number: 0,
                of: Arc::from("the chat template"),
            };
            let renderer = watched(template, LONGEST, || self.renderer(cx))?;
            chat_template::write(renderer.template().source(), cx.out())?;
            Some(renderer)
        };
        if let Some(shard) = cx.shard() {
            // Whole texts are left to the task that joins.
            let mut rows = 0;
            for split in splits.iter().filter(|split| !is_text(split)) {
                let renderer = renderer.as_ref().context("there is no chat template")?;
                let progress = (&mut rows, total as u64);
                self.render_shard(cx, shard, renderer, split, progress)?;
            }
            return Ok(());
        }
        for split in &splits {
            match &renderer {
                Some(renderer) if !is_text(split) => {
                    self.render_split(cx, renderer, split, total as u64, &mut counts)?;
                }
                _ => {
                    ensure!(
                        !self.assistant_only_loss,
                        "the rows of the split `{}` are whole texts, of which `assistant_only_loss` can't tell what the assistant says; \
                         hint: import messages",
                        split.name()
                    );
                    pass_texts(cx, split, total as u64, &mut counts)?;
                }
            }
        }
        counts.tell(cx, &self.deny_lints)
    }
}

impl ApplyChatTemplate {
    fn parsed_date(&self) -> Result<Option<NaiveDate>, Problem> {
        let parse = |date: &String| NaiveDate::parse_from_str(date, "%Y-%m-%d");
        self.date.as_ref().map(parse).transpose().map_err(|_| {
            Problem::new("date", "expected a date as YYYY-MM-DD").hint("for example \"2024-07-26\"")
        })
    }

    fn renderer(&self, cx: &Context) -> Result<Renderer> {
        let model = self
            .tokenizer
            .as_ref()
            .map(|tokenizer| cx.input(tokenizer))
            .transpose()?;
        let source = match (&self.chat_template, &self.template) {
            (Some(source), _) => source.clone(),
            (None, Some(TemplateSource::BuiltIn(template))) => template.source().to_owned(),
            (None, Some(TemplateSource::File(file))) => {
                let path = cx.source(file)?;
                let text = read_template(path);
                text.with_context(|| {
                    format!("could not read the template `{}`", file.as_written())
                })?
            }
            (None, None) => {
                let model = model.context("there is no chat template")?;
                tokenizer::chat_template(model)?.ok_or_else(|| {
                    anyhow!(
                        "the tokenizer has no chat template; hint: name one with `template`: a file, or one of {}",
                        BuiltIn::names()
                    )
                })?
            }
        };
        let tokens = model.map(special_tokens).transpose()?.unwrap_or_default();
        let date = self
            .parsed_date()
            .map_err(|problem| anyhow!(problem.message))?;
        Ok(Renderer::new(
            ChatTemplate::new(&source, tokens, date)?,
            self.keep_empty_system,
        ))
    }
}

/// Whether the rows of a split are whole texts.
fn is_text(split: &Split) -> bool {
    let has = |name: &str| split.schema().field_with_name(name).is_ok();
    has("text") && !has("chosen") && !has("messages")
}

/// The column that goes with the texts: the labels of rows with one answer, or the margins of preferences.
fn carried(split: &Split) -> Option<Field> {
    let schema = split.schema();
    let has = |name: &str| schema.field_with_name(name).is_ok();
    let (name, data_type) = if has("rejected") {
        ("margin", DataType::Float64)
    } else {
        ("label", DataType::Boolean)
    };
    let field = schema.field_with_name(name).ok()?;
    // In other rows a label is an ordinary column.
    let fits = match data_type {
        DataType::Boolean => *field.data_type() == DataType::Boolean && !has("messages"),
        _ => field.data_type().is_numeric(),
    };
    fits.then(|| Field::new(name, data_type, true))
}

/// Those of the rows `rows` of the column `field` that are kept, in its type.
fn carry(
    batch: &RecordBatch,
    field: &Field,
    rows: Range<usize>,
    kept: &BooleanArray,
) -> Result<ArrayRef> {
    let column = batch
        .column_by_name(field.name())
        .with_context(|| format!("there is no column `{}`", field.name()))?;
    let column = cast(&column.slice(rows.start, rows.len()), field.data_type())?;
    Ok(filter(&column, kept)?)
}

/// Whole texts as chats: an empty prompt and the text as the answer.
fn pass_texts(cx: &Context, split: &Split, total: u64, counts: &mut Counts) -> Result<()> {
    let fields = ["prompt", "chosen"].map(|name| Field::new(name, DataType::Utf8, true));
    let schema = Arc::new(Schema::new(fields.to_vec()));
    let writer = Writer::create(cx.out(), split.name(), schema.clone())?;
    let mut done = 0;
    let rows = pass(split, writer, |batch| {
        let texts = batch
            .column_by_name("text")
            .context("there is no column `text`")?;
        let texts = texts
            .as_string_opt::<i32>()
            .context("the column `text` is no text")?;
        if let Some(row) = (0..texts.len()).find(|row| texts.is_null(*row)) {
            bail!(
                "row {} of the split `{}`: the row has no `text`",
                done + row + 1,
                split.name()
            );
        }
        for row in 0..texts.len() {
            counts.add_text(done + row + 1, split.name(), texts.value(row));
        }
        done += batch.num_rows();
        cx.progress((counts.all + done) as u64, Some(total), "rows");
        cx.check_cancelled()?;
        let empty = StringArray::from(vec![""; batch.num_rows()]);
        let columns: [ArrayRef; 2] = [Arc::new(empty), Arc::new(texts.clone())];
        Ok(RecordBatch::try_new(schema.clone(), columns.to_vec())?)
    })?;
    counts.all += done;
    counts.texts += done;
    counts.rows.insert(split.name().to_owned(), rows);
    Ok(())
}

impl ApplyChatTemplate {
    /// Fails if the columns of a split can't be rendered.
    fn check_columns(&self, split: &Split) -> Result<()> {
        let has = |name: &str| split.schema().field_with_name(name).is_ok();
        ensure!(
            has("chosen") || has("messages"),
            "the split `{}` has neither a column `chosen` nor `messages`; hint: name them with `columns:` where the data is imported",
            split.name()
        );
        ensure!(
            !has("rejected") || !self.assistant_only_loss,
            "the split `{}` has a column `rejected`, and preferences are learnt from their answers alone; hint: leave out \
             `assistant_only_loss`, or the column where the data is imported",
            split.name()
        );
        Ok(())
    }

    fn render_split(
        &self,
        cx: &Context,
        renderer: &Renderer,
        split: &Split,
        total: u64,
        counts: &mut Counts,
    ) -> Result<()> {
        self.check_columns(split)?;
        let preferences = split.schema().field_with_name("rejected").is_ok();
        let mut names = vec!["prompt", "chosen"];
        names.extend(preferences.then_some("rejected"));
        let mut fields: Vec<_> = names
            .iter()
            .map(|name| Field::new(*name, DataType::Utf8, true))
            .collect();
        let carried = carried(split);
        fields.extend(carried.clone());
        if self.assistant_only_loss {
            fields.push(ranges::field());
        }
        let schema = Arc::new(Schema::new(fields));
        let writer = Writer::create(cx.out(), split.name(), schema.clone())?;
        let mut done = 0;
        let mut rows_of_split = Rows::new(cx, split);
        let fewest = rayon::current_num_threads();
        let mut at_once = fewest;
        let rows = pass_pieces(split, writer, |batch, made| {
            let mut start = 0;
            while start < batch.num_rows() {
                let end = batch.num_rows().min(start + at_once);
                let make = self.make_row(renderer, &batch, split, done);
                let least = 16.min((end - start).div_ceil(4 * fewest));
                let rendered = rows_of_split.next(end - start, least, |row| make(start + row));
                let (mut rendered, unread): (Vec<Rendered>, Vec<_>) = rendered?.into_iter().unzip();
                for ((row, rendered), unread) in (done + start + 1..).zip(&rendered).zip(unread) {
                    counts.add(row, split.name(), rendered, unread);
                }
                let says_something =
                    |row: &Rendered| !row.answers.as_ref().is_some_and(Vec::is_empty);
                let kept: BooleanArray = rendered
                    .iter()
                    .map(|row| Some(says_something(row)))
                    .collect();
                rendered.retain(says_something);
                let column = |text: fn(&Rendered) -> Option<&str>| texts(&rendered, text);
                let mut columns = vec![
                    column(|row| Some(&row.prompt)),
                    column(|row| Some(&row.chosen)),
                ];
                if preferences {
                    columns.push(column(|row| row.rejected.as_deref()));
                }
                if let Some(field) = &carried {
                    columns.push(carry(&batch, field, start..end, &kept)?);
                }
                if self.assistant_only_loss {
                    let answers = rendered.iter().map(|row| row.answers.as_deref());
                    columns.push(ranges::column(answers.map(Option::unwrap_or_default))?);
                }
                let bytes: usize = rendered.iter().map(Rendered::bytes).sum();
                at_once = next_at_once(at_once, bytes);
                drop(rendered);
                made.send(RecordBatch::try_new(schema.clone(), columns)?)?;
                start = end;
                cx.check_cancelled()?;
            }
            done += batch.num_rows();
            cx.progress((counts.all + done) as u64, Some(total), "rows");
            Ok(())
        })?;
        counts.all += done;
        counts.rows.insert(split.name().to_owned(), rows);
        ensure!(
            rows > 0 || done == 0,
            "the assistant says nothing in any row of the split `{}`; hint: look at what the chat template prints for the assistant",
            split.name()
        );
        Ok(())
    }
}

impl ApplyChatTemplate {
    /// What renders the rows of a batch, by their index there, with what the template doesn't read of them; `before` rows of the split come
    /// before the batch.
    fn make_row<'a>(
        &'a self,
        renderer: &'a Renderer,
        batch: &'a RecordBatch,
        split: &Split,
        before: usize,
    ) -> impl Fn(usize) -> Result<(Rendered, BTreeSet<String>)> + Sync + use<'a> {
        let of: Arc<str> = format!("of the split `{}`", split.name()).into();
        let preferences = split.schema().field_with_name("rejected").is_ok();
        move |row: usize| {
            let number = before + row + 1;
            let watch = Row {
                number: number as u64,
                of: Arc::clone(&of),
            };
            let render = || {
                let (chat, unread) = chat_row(renderer, batch, row)?;
                let rendered = if self.assistant_only_loss {
                    self.answers(renderer.render_answers(chat)?)?
                } else {
                    renderer.render(chat)?
                };
                ensure!(
                    !preferences || rendered.rejected.is_some(),
                    "the row has no `rejected`"
                );
                if self.special_tokens == SpecialTokens::Refuse
                    && let Some(token) = &rendered.seen.special_token
                {
                    bail!(
                        "its own text holds the special token `{token}`, which `special_tokens: refuse` doesn't allow"
                    );
                }
                Ok((rendered, unread))
            };
            watched(watch, LONGEST, render).with_context(|| format!("row {number} {of}"))
        }
    }

    /// Makes a shard's rows of a split; `rows` of `total` are made before them.
    fn render_shard(
        &self,
        cx: &Context,
        shard: Shard,
        renderer: &Renderer,
        split: &Split,
        (rows, total): (&mut usize, u64),
    ) -> Result<()> {
        self.check_columns(split)?;
        let mut at_once = rayon::current_num_threads();
        make_shard(cx, shard, split, |batch, before, made| {
            let make = self.make_row(renderer, batch, split, before);
            let mut start = 0;
            while start < batch.num_rows() {
                let end = batch.num_rows().min(start + at_once);
                let rendered = Rows::Made.next(end - start, 1, |row| make(start + row))?;
                let bytes = rendered.iter().map(|(row, _)| row.bytes()).sum();
                at_once = next_at_once(at_once, bytes);
                made(&rendered)?;
                start = end;
            }
            *rows += batch.num_rows();
            cx.progress(*rows as u64, Some(total), "rows");
            Ok(())
        })
    }

    /// A row in which the assistant says something, or one that is dropped because it doesn't.
    fn answers(&self, rendered: Rendered) -> Result<Rendered> {
        ensure!(
            self.rows_without_answer == WithoutAnswer::Drop
                || rendered
                    .answers
                    .as_ref()
                    .is_none_or(|answers| !answers.is_empty()),
            "the assistant says nothing in it, so with `assistant_only_loss` nothing is learnt; hint: `rows_without_answer: drop` leaves \
             such rows out"
        );
        Ok(rendered)
    }
}

/// The number of rows to render at a time after so many gave so many bytes of text: it is limited, since a template can make a text of any
/// size of a row.
fn next_at_once(rows: usize, bytes: usize) -> usize {
    if bytes < AT_ONCE / 2 {
        (rows * 2).min(BATCH_ROWS)
    } else if bytes > AT_ONCE {
        (rows / 2).max(rayon::current_num_threads())
    } else {
        rows
    }
}

/// A column with the texts of all rows, which are copied only once.
fn texts(rows: &[Rendered], text: fn(&Rendered) -> Option<&str>) -> ArrayRef {
    let bytes = rows.iter().filter_map(text).map(str::len).sum();
    let mut column = StringBuilder::with_capacity(rows.len(), bytes);
    for row in rows {
        column.append_option(text(row));
    }
    Arc::new(column.finish())
}

#[cfg(test)]
mod tests;
