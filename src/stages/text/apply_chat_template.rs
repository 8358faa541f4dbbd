//! `apply_chat_template`: rows to text.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use arrow_array::builder::StringBuilder;
use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, RecordBatch, StringArray};
use arrow_schema::{DataType, Field, Schema};
use chrono::NaiveDate;
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

use self::counts::Counts;
use self::row::chat_row;
use super::chat_template;
use crate::data::table::{BATCH_ROWS, Split, Writer, pass, pass_pieces, splits};
use crate::engine::{Context, Input, Problem, Row, SourcePath, Stage, watched};
use crate::stages::artifacts::{Chats, Dataset, Model};
use crate::text::chat::{Rendered, Renderer};
use crate::text::template::ChatTemplate;
use crate::text::tokenizer::{self, read_template, special_tokens};

mod counts;
mod row;

/// The longest CPU time for one row. Real rows take less than a thousandth of it.
const LONGEST: Duration = Duration::from_secs(5);
/// The approximate number of bytes of text rendered at a time.
const AT_ONCE: usize = 16 << 20;

/// Renders rows to text with a chat template, as transformers and TRL do: `prompt`, `chosen` and, for preferences, `rejected`
/// join to exactly what the template prints for the whole conversation.
///
/// The template is a file, a text in the recipe, or else the tokenizer's own. It goes with the chats, and from them into what is
/// trained on them. Rows whose texts were rendered before are taken as
/// they are, and counted.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ApplyChatTemplate {
    /// The rows to render; every split of it.
    dataset: Input<Dataset>,
    /// A file with the template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    template: Option<SourcePath>,
    /// The template itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    chat_template: Option<String>,
    /// The model whose special tokens (`bos_token`, ..) and, unless another is given, whose template is used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tokenizer: Option<Input<Model>>,
    /// Render a system message that is empty, too. Otherwise it is left out.
    #[serde(default)]
    keep_empty_system: bool,
    /// What to do with rows whose own text holds special tokens, which the tokenizer reads as such.
    #[serde(default)]
    special_tokens: SpecialTokens,
    /// What `strftime_now` tells the template, as `YYYY-MM-DD`: a result must not depend on the day it was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    date: Option<String>,
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
    const VERSION: u32 = 3;
    type Output = Chats;
    const BOUNDED: bool = true;

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
            problems.push(problem.hint("name a file with `template`, or a model with `tokenizer`"));
        }
        if let Err(problem) = self.parsed_date() {
            problems.push(problem);
        }
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
        for split in &splits {
            match &renderer {
                Some(renderer) if !is_text(split) => {
                    self.render_split(cx, renderer, split, total as u64, &mut counts)?;
                }
                _ => pass_texts(cx, split, total as u64, &mut counts)?,
            }
        }
        counts.tell(cx);
        Ok(())
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
            (None, Some(file)) => {
                let path = cx.source(file)?;
                let text = read_template(path);
                text.with_context(|| {
                    format!("could not read the template `{}`", file.as_written())
                })?
            }
            (None, None) => {
                let model = model.context("there is no chat template")?;
                tokenizer::chat_template(model)?.ok_or_else(|| {
                    anyhow!("the tokenizer has no chat template; hint: name a file with `template`, as templates/llama3.jinja")
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
    fn render_split(
        &self,
        cx: &Context,
        renderer: &Renderer,
        split: &Split,
        total: u64,
        counts: &mut Counts,
    ) -> Result<()> {
        let has = |name: &str| split.schema().field_with_name(name).is_ok();
        ensure!(
            has("chosen") || has("messages"),
            "the split `{}` has neither a column `chosen` nor `messages`; hint: name them with `columns:` where the data is imported",
            split.name()
        );
        let preferences = has("rejected");
        let mut names = vec!["prompt", "chosen"];
        names.extend(preferences.then_some("rejected"));
        let fields: Vec<_> = names
            .iter()
            .map(|name| Field::new(*name, DataType::Utf8, true))
            .collect();
        let schema = Arc::new(Schema::new(fields));
        let writer = Writer::create(cx.out(), split.name(), schema.clone())?;
        let mut done = 0;
        let of: Arc<str> = format!("of the split `{}`", split.name()).into();
        // The number of rows rendered at a time is limited, since a template can make a text of any size of a row.
        let fewest = rayon::current_num_threads();
        let mut at_once = fewest;
        let rows = pass_pieces(split, writer, |batch, made| {
            let mut start = 0;
            while start < batch.num_rows() {
                let end = batch.num_rows().min(start + at_once);
                let rendered: Result<Vec<(Rendered, BTreeSet<String>)>> = (start..end)
                .into_par_iter()
                .with_min_len(16.min((end - start).div_ceil(4 * fewest)))
                .map(|row| {
                    let number = done + row + 1;
                    let watch = Row {
                        number: number as u64,
                        of: Arc::clone(&of),
                    };
                    let render = || {
                        let (chat, unread) = chat_row(renderer, &batch, row)?;
                        let rendered = renderer.render(chat)?;
                        ensure!(
                            !preferences || rendered.rejected.is_some(),
                            "the row has no `rejected`"
                        );
                        if self.special_tokens == SpecialTokens::Refuse
                            && let Some(token) = &rendered.seen.special_token
                        {
                            bail!("its own text holds the special token `{token}`, which `special_tokens: refuse` doesn't allow");
                        }
                        Ok((rendered, unread))
                    };
                    watched(watch, LONGEST, render).with_context(|| format!("row {number} {of}"))
                })
                .collect();
                let (rendered, unread): (Vec<Rendered>, Vec<_>) = rendered?.into_iter().unzip();
                for ((row, rendered), unread) in (done + start + 1..).zip(&rendered).zip(unread) {
                    counts.add(row, split.name(), rendered, unread);
                }
                let column = |text: fn(&Rendered) -> Option<&str>| texts(&rendered, text);
                let mut columns = vec![
                    column(|row| Some(&row.prompt)),
                    column(|row| Some(&row.chosen)),
                ];
                if preferences {
                    columns.push(column(|row| row.rejected.as_deref()));
                }
                let bytes: usize = rendered.iter().map(Rendered::bytes).sum();
                at_once = if bytes < AT_ONCE / 2 {
                    (at_once * 2).min(BATCH_ROWS)
                } else if bytes > AT_ONCE {
                    (at_once / 2).max(fewest)
                } else {
                    at_once
                };
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
        Ok(())
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
