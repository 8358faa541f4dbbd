//! The conversion of a file's rows to ours: columns get our names, messages get `role` and `content`, and unusable rows are left out or
//! refused.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, RecordBatch, UInt32Array};
use arrow_schema::{DataType, Field, Schema, SchemaRef};
use arrow_select::take::take;
use rayon::prelude::*;

use super::ImportOptions;
use super::columns::Union;
use super::values::{Made, build, turns, unpacked};
use crate::data::cell::{Cell, is_json, json_field};
use crate::data::forms::{Form, From, Reading, list};
use crate::data::json::BROKEN;
use crate::data::messages::{messages, need_answer, transcript};

/// The number of left-out rows that are named.
const MOST_NAMED: usize = 20;

/// The computation of one of our columns.
enum Step {
    /// A column of the file, unchanged.
    As(String),
    /// Values that are converted: messages, tools, a label.
    Made(Box<From>),
}

/// Converts the rows of a file to ours.
pub(super) struct Rows {
    /// Whether texts that are transcripts become messages, in which case all texts must be transcripts.
    transcripts: bool,
    all_transcripts: bool,
    /// The number of texts that were transcripts.
    found_transcripts: AtomicU64,
    share_gpt: bool,
    union: Union,
    steps: Vec<(&'static str, Step)>,
    others: Vec<(String, AtomicU64)>,
    messages: Vec<String>,
    schema: SchemaRef,
    skip: u64,
    skipped: std::sync::Mutex<(u64, Vec<String>)>,
}

impl Rows {
    pub(super) fn new(reading: Reading, union: Union, options: &ImportOptions) -> Result<Self> {
        let Reading {
            form,
            ours,
            others,
            message,
        } = reading;
        let mut fields = Vec::new();
        let mut steps = Vec::new();
        let all_transcripts = form == Form::Transcripts;
        let has_prompt = ours.iter().any(|(name, _)| *name == "prompt");
        let transcripts = all_transcripts || (form == Form::Preference && !has_prompt);
        for (name, from) in ours {
            let reads = from.reads();
            for read in reads {
                if let Some((file, row)) = union.not_finite(read) {
                    bail!(
                        "{file}: row {row}: the column `{read}` holds NaN or an infinity, which is no value of JSON"
                    );
                }
                ensure!(
                    !union.is_bytes(read),
                    "the column `{read}` holds bytes: expected text, or lists of messages with `role` and `content`"
                );
            }
            let (step, field) = step(name, from, form, transcripts, &union);
            fields.push(field);
            steps.push((name, step));
        }
        let (bytes, others): (Vec<String>, Vec<String>) =
            others.into_iter().partition(|name| union.is_bytes(name));
        fields.extend(others.iter().map(|name| union.field(name)));
        let mut messages: Vec<String> = message.into_iter().collect();
        if !bytes.is_empty() {
            messages.push(format!(
                "left out, because they hold bytes: {}",
                list(&bytes)
            ));
        }
        let odd: Vec<&String> = union.all_not_finite().collect();
        if !odd.is_empty() {
            messages.push(format!("NaN and infinities became null in {}", list(&odd)));
        }
        Ok(Self {
            transcripts,
            all_transcripts,
            found_transcripts: AtomicU64::new(0),
            share_gpt: options.form == Some(Form::Sharegpt),
            union,
            steps,
            others: others
                .into_iter()
                .map(|name| (name, AtomicU64::new(0)))
                .collect(),
            messages,
            schema: Arc::new(Schema::new(fields)),
            skip: options.skip_invalid_rows,
            skipped: std::sync::Mutex::default(),
        })
    }

    pub(super) fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// Converts the first `most` usable rows of a batch of `file` that starts with row number `first`.
    pub(super) fn convert(
        &self,
        batch: &RecordBatch,
        file: &str,
        first: u64,
        most: usize,
    ) -> Result<RecordBatch> {
        let skip = usize::try_from(self.skip).unwrap_or(usize::MAX);
        let batch = batch.slice(0, batch.num_rows().min(most.saturating_add(skip)));
        let place = |row: usize| format!("{file}: row {}", first + row as u64);
        let mut errors: Vec<Option<anyhow::Error>> = (0..batch.num_rows()).map(|_| None).collect();
        // These reasons include their position.
        if let Some(broken) = batch.column_by_name(BROKEN) {
            let broken = broken.as_string_opt::<i32>();
            for (row, reason) in broken.into_iter().flatten().enumerate() {
                if let (Some(reason), Some(error)) = (reason, errors.get_mut(row)) {
                    *error = Some(anyhow!("{reason}"));
                }
            }
        }
        let mut columns = Vec::with_capacity(self.schema.fields().len());
        for ((name, step), field) in self.steps.iter().zip(self.schema.fields()) {
            columns.push(match step {
                Step::As(theirs) => self.union.column(&batch, theirs)?,
                Step::Made(from) => {
                    let values = self.values(&batch, name, from)?;
                    let mut cells = Vec::with_capacity(values.len());
                    for (row, (value, error)) in values.into_iter().zip(&mut errors).enumerate() {
                        cells.push(value.unwrap_or_else(|found| {
                            error.get_or_insert_with(|| found.context(place(row)));
                            Made::Null
                        }));
                    }
                    build(field, cells)
                }
            });
        }
        for (name, _) in &self.others {
            columns.push(self.union.column(&batch, name)?);
        }
        self.missing_answers(&columns, &mut errors, &place);
        let mut kept: Vec<u32> = Vec::with_capacity(batch.num_rows());
        for (row, error) in (0_u32..).zip(errors) {
            if kept.len() == most {
                break;
            }
            let Some(error) = error else {
                kept.push(row);
                continue;
            };
            self.leave_out(error)?;
        }
        let batch = RecordBatch::try_new(self.schema.clone(), columns)?;
        let batch = if kept.len() == batch.num_rows() {
            batch
        } else {
            let kept = UInt32Array::from(kept);
            let columns: Result<Vec<ArrayRef>, _> = batch
                .columns()
                .iter()
                .map(|column| take(column, &kept, None))
                .collect();
            RecordBatch::try_new(self.schema.clone(), columns?)?
        };
        let carried = batch.columns().iter().skip(self.steps.len());
        for ((_, count), column) in self.others.iter().zip(carried) {
            let present = column.len() - column.logical_null_count();
            count.fetch_add(present as u64, Ordering::Relaxed);
        }
        Ok(batch)
    }

    /// Adds errors for rows without an answer, which name the file's columns.
    fn missing_answers(
        &self,
        columns: &[ArrayRef],
        errors: &mut [Option<anyhow::Error>],
        place: &dyn Fn(usize) -> String,
    ) {
        let column = |name: &str| {
            let index = self.steps.iter().position(|(known, _)| *known == name)?;
            columns.get(index)
        };
        let missing =
            |name: &str, row: usize| column(name).is_none_or(|column| column.is_null(row));
        let theirs = |name: &str| {
            let step = self.steps.iter().find(|(known, _)| *known == name);
            match step {
                Some((_, Step::As(theirs))) => theirs.clone(),
                Some((_, Step::Made(from))) => match from.as_ref() {
                    From::Column(theirs) => theirs.clone(),
                    _ => name.to_owned(),
                },
                None => name.to_owned(),
            }
        };
        let answers = ["chosen", "messages", "text"].map(|name| column(name).is_some());
        if !answers.contains(&true) {
            return;
        }
        for (row, error) in errors.iter_mut().enumerate() {
            if error.is_some() {
                continue;
            }
            let none = ["chosen", "messages", "text"]
                .into_iter()
                .zip(answers)
                .filter(|(_, there)| *there);
            if none.clone().all(|(name, _)| missing(name, row)) {
                let names: Vec<String> = none.map(|(name, _)| theirs(name)).collect();
                let found = anyhow!("the row has no {}", list(names));
                *error = Some(found.context(place(row)));
            } else if column("rejected").is_some()
                && missing("rejected", row)
                && !missing("chosen", row)
            {
                let found = anyhow!(
                    "the row has no {}, which a preference needs",
                    list([theirs("rejected")])
                );
                *error = Some(found.context(place(row)));
            }
        }
    }

    fn leave_out(&self, error: anyhow::Error) -> Result<()> {
        let mut skipped = self
            .skipped
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if self.skip == 0 {
            return Err(error);
        }
        ensure!(
            skipped.0 < self.skip,
            "more than {} rows can't be used, which is what `skip_invalid_rows` allows; the next one: {error:#}",
            self.skip
        );
        skipped.0 += 1;
        if skipped.1.len() < MOST_NAMED {
            skipped.1.push(format!("{error:#}"));
        }
        Ok(())
    }

    /// Sentences for the user, and the number of the rows that were left out with their reasons.
    pub(super) fn end(self) -> (Vec<String>, u64, Vec<String>) {
        let mut messages = self.messages;
        if self.found_transcripts.load(Ordering::Relaxed) > 0 {
            messages.push("texts that begin with `Human:` or `Assistant:` are read as transcripts, turn by turn".to_owned());
        }
        let unused: Vec<String> = self
            .others
            .iter()
            .filter_map(|(name, count)| {
                let count = count.load(Ordering::Relaxed);
                (count > 0).then(|| format!("`{name}` ({count} rows)"))
            })
            .collect();
        if !unused.is_empty() {
            let more = unused.len().saturating_sub(12);
            let mut text = unused.into_iter().take(12).collect::<Vec<_>>().join(", ");
            if more > 0 {
                _ = write!(text, " and {more} more");
            }
            messages.push(format!(
                "carried along, but no part of prompts and answers: {text}"
            ));
        }
        let (count, mut named) = self
            .skipped
            .into_inner()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if count > named.len() as u64 {
            named.push(format!("and {} more", count - named.len() as u64));
        }
        (messages, count, named)
    }

    fn values(
        &self,
        batch: &RecordBatch,
        name: &'static str,
        from: &From,
    ) -> Result<Vec<Result<Made>>> {
        let column = |theirs: &String| -> Result<(Field, ArrayRef)> {
            Ok((self.union.field(theirs), self.union.column(batch, theirs)?))
        };
        let rows = (0..batch.num_rows()).into_par_iter().with_min_len(8);
        Ok(match from {
            From::Column(theirs) => {
                let (field, array) = column(theirs)?;
                rows.map(|row| {
                    let value = Cell::of_column(&field, &array, row)
                        .with_context(|| format!("the column `{theirs}` can't be read"))?;
                    let mut made = self.made(name, value);
                    if theirs != name {
                        made = made.with_context(|| format!("in the column `{theirs}`"));
                    }
                    // An unchanged value need not be serialised again.
                    match made? {
                        Made::Same(_) if is_json(&field) => {
                            let texts = array.as_string_opt::<i32>();
                            Ok(texts
                                .map_or(Made::Null, |texts| Made::Raw(texts.value(row).to_owned())))
                        }
                        made => Ok(made),
                    }
                })
                .collect()
            }
            From::Expression(expression) => {
                let columns: Result<Vec<_>> = expression
                    .reads
                    .iter()
                    .map(|read| Ok((read.clone(), column(read)?)))
                    .collect();
                let columns = columns?;
                rows.map(|row| {
                    let cells: Result<Vec<(String, Cell)>> = columns
                        .iter()
                        .map(|(read, (field, array))| {
                            let value = Cell::of_column(field, array, row);
                            let value = value
                                .with_context(|| format!("the column `{read}` can't be read"))?;
                            Ok((read.clone(), value))
                        })
                        .collect();
                    self.made(name, expression.evaluate(cells?)?)
                })
                .collect()
            }
            From::Instruction {
                instruction,
                input,
                history,
            } => {
                let instruction = column(instruction)?;
                let input = input.as_ref().map(column).transpose()?;
                let history = history.as_ref().map(column).transpose()?;
                rows.map(|row| {
                    let text = |(field, array): &(Field, ArrayRef)| match Cell::of_column(
                        field, array, row,
                    )? {
                        Cell::Null => Ok(None),
                        Cell::Text(text) => Ok(Some(text)),
                        other => bail!(
                            "the column `{}` is {}: expected text",
                            field.name(),
                            other.noun()
                        ),
                    };
                    let Some(mut prompt) = text(&instruction)? else {
                        bail!("the column `instruction` is null");
                    };
                    if let Some(input) = input.as_ref().map(text).transpose()?.flatten()
                        && !input.trim().is_empty()
                    {
                        if !prompt.is_empty() {
                            prompt.push_str("\n\n");
                        }
                        prompt.push_str(&input);
                    }
                    let Some((field, array)) = &history else {
                        return Ok(Made::Same(Cell::Text(prompt)));
                    };
                    let before = Cell::of_column(field, array, row)?;
                    Ok(Made::Other(turns(before, prompt)?))
                })
                .collect()
            }
        })
    }

    /// Converts a value to one of our column `name`.
    fn made(&self, name: &'static str, value: Cell) -> Result<Made> {
        if value == Cell::Null {
            return Ok(Made::Null);
        }
        match name {
            "choices" | "answer" => Ok(Made::Same(value)),
            "system" | "text" | "question" => match value {
                Cell::Text(text) => Ok(Made::Same(Cell::Text(text))),
                other => bail!("`{name}` is {}: expected text", other.noun()),
            },
            "label" => match &value {
                Cell::Bool(_) => Ok(Made::Same(value)),
                Cell::Int(0 | 1) => Ok(Made::Other(Cell::Bool(value == Cell::Int(1)))),
                Cell::Text(text) if text.eq_ignore_ascii_case("true") => {
                    Ok(Made::Other(Cell::Bool(true)))
                }
                Cell::Text(text) if text.eq_ignore_ascii_case("false") => {
                    Ok(Made::Other(Cell::Bool(false)))
                }
                other => bail!("`label` is {}: expected true or false", other.noun()),
            },
            "tools" => {
                let (value, written) = unpacked(value, "tools")?;
                let Cell::List(tools) = &value else {
                    bail!(
                        "`tools` is {}: expected a list of tools, or JSON text of one",
                        value.noun()
                    );
                };
                for (number, tool) in (1..).zip(tools) {
                    ensure!(
                        matches!(tool, Cell::Map(_)),
                        "tool {number} of `tools` is {}: expected an object",
                        tool.noun()
                    );
                }
                Ok(Made::new(value, written))
            }
            "chat_template_kwargs" => {
                let (value, written) = unpacked(value, name)?;
                ensure!(
                    matches!(value, Cell::Map(_)),
                    "`chat_template_kwargs` is {}: expected an object",
                    value.noun()
                );
                Ok(Made::new(value, written))
            }
            "messages" => {
                let (value, written) = unpacked(value, name)?;
                let (value, changed) = messages(value, name, self.share_gpt)?;
                ensure!(
                    value != Cell::List(Vec::new()),
                    "`messages` is an empty list"
                );
                need_answer(&value)?;
                Ok(Made::new(value, written || changed))
            }
            _ => match value {
                Cell::Text(text) if self.transcripts => match transcript(&text) {
                    Some(turns) => {
                        let turns = Cell::List(turns);
                        if name != "prompt" {
                            let last = match &turns {
                                Cell::List(turns) => turns.last(),
                                _ => None,
                            };
                            ensure!(
                                last.and_then(|turn| turn.get("role"))
                                    == Some(&Cell::Text("assistant".to_owned())),
                                "`{name}` is a transcript that ends with Human: expected an answer"
                            );
                        }
                        self.found_transcripts.fetch_add(1, Ordering::Relaxed);
                        Ok(Made::Other(turns))
                    }
                    None if self.all_transcripts && name != "prompt" => {
                        bail!(
                            "`{name}` is no transcript: expected text that begins with `Human:` or `Assistant:`"
                        )
                    }
                    None => Ok(Made::Same(Cell::Text(text))),
                },
                Cell::Text(text) => Ok(Made::Same(Cell::Text(text))),
                value @ (Cell::List(_) | Cell::Map(_)) => {
                    let (value, changed) = messages(value, name, self.share_gpt)?;
                    Ok(Made::new(value, changed))
                }
                other => bail!(
                    "`{name}` is {}: expected text, or a list of messages with `role` and `content`",
                    other.noun()
                ),
            },
        }
    }
}

/// The computation of one of our columns, and its field.
fn step(
    name: &'static str,
    from: From,
    form: Form,
    transcripts: bool,
    union: &Union,
) -> (Step, Field) {
    let text = |name: &str| Field::new(name, DataType::Utf8, true);
    let is_text = |theirs: &str| {
        let field = union.field(theirs);
        *field.data_type() == DataType::Utf8 && !is_json(&field)
    };
    match from {
        From::Column(theirs) if name == "label" && form != Form::Kto => {
            // In other forms it is a column like any other.
            let field = union.field(&theirs).with_name(name);
            (Step::As(theirs), field)
        }
        From::Column(theirs) if matches!(name, "choices" | "answer") => {
            // Who asks the questions reads them.
            let field = union.field(&theirs).with_name(name);
            (Step::As(theirs), field)
        }
        From::Column(theirs) if is_text(&theirs) && may_stay_text(name, transcripts) => {
            (Step::As(theirs), text(name))
        }
        from => {
            let field = match (name, &from) {
                ("system" | "text" | "question", _)
                | (_, From::Instruction { history: None, .. }) => text(name),
                ("label", _) if form == Form::Kto => Field::new(name, DataType::Boolean, true),
                ("prompt" | "chosen" | "rejected", From::Expression(expression))
                    if !expression.is_alone() && !transcripts =>
                {
                    text(name)
                }
                _ => json_field(name),
            };
            (Step::Made(Box::new(from)), field)
        }
    }
}

/// Whether texts of a column need no conversion.
fn may_stay_text(name: &str, transcripts: bool) -> bool {
    match name {
        "system" | "text" | "question" => true,
        "prompt" | "chosen" | "rejected" => !transcripts,
        _ => false,
    }
}
