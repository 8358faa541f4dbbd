//! `apply_chat_template`: rows to text.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use arrow::array::{ArrayRef, RecordBatch, StringBuilder};
use arrow::datatypes::{DataType, Field, Schema};
use chrono::NaiveDate;
use minijinja::Value;
use minijinja::value::Serde;
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

use super::artifacts::{Chats, Dataset, Model};
use super::chat_template;
use crate::data::cell::Cell;
use crate::data::table::{BATCH_ROWS, Split, Writer, pass_pieces, splits};
use crate::engine::{Context, Input, Problem, Row, SourcePath, Stage, watched};
use crate::text::chat::{ChatRow, Notice, Rendered, Renderer, Side};
use crate::text::template::ChatTemplate;
use crate::text::tokenizer::{self, read_template, special_tokens};

/// The longest that one row may take; real ones take less than a thousandth of it.
const LONGEST: Duration = Duration::from_secs(5);
/// Bytes of text that are about rendered at once.
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
    /// What `strftime_now` tells the template, as `YYYY-MM-DD`: a result must not depend on the day it was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    date: Option<String>,
}

impl Stage for ApplyChatTemplate {
    const KIND: &'static str = "apply_chat_template";
    const VERSION: u32 = 2;
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
        let template = Row {
            number: 0,
            of: Arc::from("the chat template"),
        };
        let renderer = watched(template, LONGEST, || self.renderer(cx))?;
        chat_template::write(renderer.template().source(), cx.out())?;
        let folder = cx.input(&self.dataset)?;
        let splits: Result<Vec<Split>> = splits(folder)?
            .into_iter()
            .map(|(name, files)| Split::of_files(&name, files))
            .collect();
        let splits = splits?;
        ensure!(!splits.is_empty(), "the dataset holds no split");
        let total: usize = splits.iter().map(Split::rows).sum();
        let mut counts = Counts::default();
        for split in &splits {
            render_split(cx, &renderer, split, total as u64, &mut counts)?;
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

/// What goes into the record.
#[derive(Default)]
struct Counts {
    rows: BTreeMap<String, usize>,
    all: usize,
    already_rendered: usize,
    special_tokens: usize,
}

impl Counts {
    fn tell(&self, cx: &Context) {
        cx.note("rows", &self.rows);
        if self.already_rendered > 0 {
            cx.note("rows_already_rendered", self.already_rendered);
            cx.warn(format!(
                "{} of {} rows were rendered by a chat template before, and were taken as they are",
                self.already_rendered, self.all
            ));
        }
        if self.special_tokens > 0 {
            cx.note("rows_with_special_tokens", self.special_tokens);
            cx.warn(format!(
                "{} of {} rows hold special tokens in their own text; the tokenizer will read them as such",
                self.special_tokens, self.all
            ));
        }
    }
}

fn render_split(
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
    // Rows that are rendered at once: the text that a template makes of a row can be of any size.
    let fewest = rayon::current_num_threads();
    let mut at_once = fewest;
    let rows = pass_pieces(split, writer, |batch, made| {
        let mut start = 0;
        while start < batch.num_rows() {
            let end = batch.num_rows().min(start + at_once);
            let rendered: Result<Vec<Rendered>> = (start..end)
                .into_par_iter()
                .with_min_len(16.min((end - start).div_ceil(4 * fewest)))
                .map(|row| {
                    let number = done + row + 1;
                    let watch = Row {
                        number: number as u64,
                        of: Arc::clone(&of),
                    };
                    let render = || {
                        let rendered = renderer.render(chat_row(&batch, row)?)?;
                        ensure!(
                            !preferences || rendered.rejected.is_some(),
                            "the row has no `rejected`"
                        );
                        Ok(rendered)
                    };
                    watched(watch, LONGEST, render).with_context(|| format!("row {number} {of}"))
                })
                .collect();
            let rendered = rendered?;
            for row in &rendered {
                counts.already_rendered += usize::from(row.notice == Notice::AlreadyRendered);
                counts.special_tokens += usize::from(row.notice == Notice::SpecialTokens);
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

/// A column of all rows' texts, copied once.
fn texts(rows: &[Rendered], text: fn(&Rendered) -> Option<&str>) -> ArrayRef {
    let bytes = rows.iter().filter_map(text).map(str::len).sum();
    let mut column = StringBuilder::with_capacity(rows.len(), bytes);
    for row in rows {
        column.append_option(text(row));
    }
    Arc::new(column.finish())
}

fn chat_row(batch: &RecordBatch, row: usize) -> Result<ChatRow> {
    let cell = |name: &str| match batch.column_by_name(name) {
        None => Ok(Cell::Null),
        Some(column) => Cell::from_arrow(column, row),
    };
    let side = |name: &str| match cell(name)? {
        Cell::Null => Ok(None),
        Cell::Text(text) => Ok(Some(Side::Text(text))),
        Cell::List(items) => Ok(Some(Side::Messages(messages(name, items)?))),
        other => bail!(
            "`{name}` is {}: expected text or a list of messages",
            other.noun()
        ),
    };
    let system = match cell("system")? {
        Cell::Null => None,
        Cell::Text(text) => Some(text),
        other => bail!("`system` is {}: expected text", other.noun()),
    };
    let messages = match side("messages")? {
        None => None,
        Some(Side::Messages(messages)) => Some(messages),
        Some(Side::Text(_)) => bail!("`messages` is text: expected a list of messages"),
    };
    Ok(ChatRow {
        system,
        prompt: side("prompt")?,
        chosen: side("chosen")?,
        rejected: side("rejected")?,
        messages,
    })
}

fn messages(name: &str, items: Vec<Cell>) -> Result<Vec<Value>> {
    let message = |item: Cell| {
        ensure!(
            item.get("role").is_some(),
            "a message of `{name}` has no `role`"
        );
        Ok(Value::from(Serde(item.without_nulls())))
    };
    items.into_iter().map(message).collect()
}

#[cfg(test)]
mod tests;
