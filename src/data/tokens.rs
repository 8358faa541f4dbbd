//! The layout of token ids on disk: one row a conversation, `list<int32>` columns `prompt_ids`, `chosen_ids` and, for
//! preferences, `rejected_ids` (answers only, the prompt is not repeated). Labels follow from the lengths.
//!
//! `rejected_prompt_ids` is null unless the rejected side's prompt differs: a byte-pair merge across the border of prompt and
//! answer can move one token of the prompt into one answer and not into the other.
//!
//! `assistant_masks`, in rows whose turns are all learnt, has a 1 for each id of prompt and answer that the assistant says, and a 0
//! for each other one.
//!
//! `label`, in rows with single answers for KTO, says whether the answer is desirable. These answers are cut to `max_length` of `tokenize`
//! by themselves and not together with their prompt, for they are put behind other prompts, too. `margin`, in rows for a reward model that
//! have one, is by how much the reward of the better answer shall be higher.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow};
use arrow_array::cast::AsArray;
use arrow_array::types::{Float64Type, Int32Type};
use arrow_array::{
    Array, ArrayRef, BooleanArray, Float64Array, Int32Array, ListArray, RecordBatch,
};
use arrow_buffer::{NullBuffer, OffsetBuffer};
use arrow_schema::{DataType, Field, Schema, SchemaRef};

use super::table::{BATCH_ROWS, Split};

/// The label of a token that doesn't count in the loss.
pub const IGNORED: i64 = -100;

/// Token ids of one conversation, with one answer or with two.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TokenRow {
    /// The prompt, with its BOS.
    pub prompt_ids: Vec<u32>,
    /// The (better) answer, with its EOS.
    pub chosen_ids: Vec<u32>,
    /// The worse answer, for preferences.
    pub rejected_ids: Option<Vec<u32>>,
    /// The worse answer's prompt, only where it differs from `prompt_ids`.
    pub rejected_prompt_ids: Option<Vec<u32>>,
    /// For each id of `prompt_ids` and `chosen_ids`, 1 where the assistant says it and 0 elsewhere.
    pub assistant_masks: Option<Vec<u32>>,
    /// Whether the answer is desirable, for rows with a label.
    pub label: Option<bool>,
    /// By how much the reward of the better answer shall be higher, for preferences that say so.
    pub margin: Option<f64>,
}

/// What rows of a table hold beside a prompt and an answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Columns {
    /// Nothing.
    #[default]
    Answers,
    /// Rejected answers.
    Preferences,
    /// Rejected answers and margins.
    Margins,
    /// Masks of what the assistant says.
    Turns,
    /// Labels.
    Labels,
}

/// A prompt and an answer as one sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence {
    /// The prompt's ids and then the answer's.
    pub ids: Vec<u32>,
    /// How many of them are the prompt.
    pub prompt_length: usize,
}

impl Sequence {
    /// The ids with the prompt replaced by [`IGNORED`].
    pub fn labels(&self) -> Vec<i64> {
        let label = |(index, id): (usize, &u32)| {
            if index < self.prompt_length {
                IGNORED
            } else {
                i64::from(*id)
            }
        };
        self.ids.iter().enumerate().map(label).collect()
    }
}

impl TokenRow {
    /// Prompt and (better) answer.
    pub fn chosen(&self) -> Sequence {
        join(&self.prompt_ids, &self.chosen_ids)
    }

    /// Prompt and worse answer.
    pub fn rejected(&self) -> Option<Sequence> {
        let prompt = self
            .rejected_prompt_ids
            .as_ref()
            .unwrap_or(&self.prompt_ids);
        self.rejected_ids
            .as_ref()
            .map(|answer| join(prompt, answer))
    }
}

fn join(prompt: &[u32], answer: &[u32]) -> Sequence {
    Sequence {
        ids: [prompt, answer].concat(),
        prompt_length: prompt.len(),
    }
}

/// The columns of a tokens file.
pub fn schema(columns: Columns) -> SchemaRef {
    let mut fields = vec![field("prompt_ids"), field("chosen_ids")];
    match columns {
        Columns::Answers => {}
        Columns::Preferences | Columns::Margins => {
            fields.extend([field("rejected_ids"), field("rejected_prompt_ids")]);
        }
        Columns::Turns => fields.push(field("assistant_masks")),
        Columns::Labels => fields.push(Field::new("label", DataType::Boolean, true)),
    }
    if columns == Columns::Margins {
        fields.push(Field::new("margin", DataType::Float64, true));
    }
    Arc::new(Schema::new(fields))
}

fn field(name: &str) -> Field {
    Field::new(name, DataType::List(item_field()), true)
}

fn item_field() -> Arc<Field> {
    Arc::new(Field::new_list_field(DataType::Int32, true))
}

/// Rows as an Arrow batch of [`schema`].
pub fn batch(rows: &[TokenRow], columns: Columns) -> Result<RecordBatch> {
    let mut lists_of = vec![
        lists(rows, |row| Some(&row.prompt_ids))?,
        lists(rows, |row| Some(&row.chosen_ids))?,
    ];
    match columns {
        Columns::Answers => {}
        Columns::Preferences | Columns::Margins => {
            lists_of.push(lists(rows, |row| row.rejected_ids.as_ref())?);
            lists_of.push(lists(rows, |row| row.rejected_prompt_ids.as_ref())?);
        }
        Columns::Turns => lists_of.push(lists(rows, |row| row.assistant_masks.as_ref())?),
        Columns::Labels => {
            let labels = rows.iter().map(|row| row.label);
            lists_of.push(Arc::new(labels.collect::<BooleanArray>()));
        }
    }
    if columns == Columns::Margins {
        let margins = rows.iter().map(|row| row.margin);
        lists_of.push(Arc::new(margins.collect::<Float64Array>()));
    }
    Ok(RecordBatch::try_new(schema(columns), lists_of)?)
}

fn lists<'a>(
    rows: &'a [TokenRow],
    ids: impl Fn(&'a TokenRow) -> Option<&'a Vec<u32>>,
) -> Result<ArrayRef> {
    let lengths = rows.iter().map(|row| ids(row).map_or(0, Vec::len));
    let offsets = OffsetBuffer::from_lengths(lengths);
    let values = rows.iter().filter_map(&ids).flatten();
    let values: Result<Vec<i32>, _> = values.map(|id| i32::try_from(*id)).collect();
    let valid: Vec<bool> = rows.iter().map(|row| ids(row).is_some()).collect();
    let nulls = valid.contains(&false).then(|| NullBuffer::from(valid));
    let values = Arc::new(Int32Array::from(
        values.context("a token id is above 2^31")?,
    ));
    Ok(Arc::new(ListArray::try_new(
        item_field(),
        offsets,
        values,
        nulls,
    )?))
}

/// All rows of a split.
pub fn read(folder: &Path, split: &str) -> Result<Vec<TokenRow>> {
    rows(folder, split)?.collect()
}

/// The rows of a split as a stream.
pub fn rows(folder: &Path, split: &str) -> Result<impl Iterator<Item = Result<TokenRow>> + use<>> {
    let split = Split::open(folder, split)?;
    for name in ["prompt_ids", "chosen_ids"] {
        split.schema().field_with_name(name).map_err(|_| {
            anyhow!(
                "`{}` holds no tokens: it has no column `{name}`",
                folder.display()
            )
        })?;
    }
    Ok(split
        .batches(BATCH_ROWS)
        .flat_map(|batch| match batch.and_then(|batch| unpack(&batch)) {
            Ok(rows) => rows.into_iter().map(Ok).collect::<Vec<_>>(),
            Err(error) => vec![Err(error)],
        }))
}

/// The rows of a batch.
///
/// # Errors
/// It has no columns of ids, or a row has none.
pub fn unpack(batch: &RecordBatch) -> Result<Vec<TokenRow>> {
    let prompt = ids(batch, "prompt_ids")?;
    let chosen = ids(batch, "chosen_ids")?;
    let rejected = ids(batch, "rejected_ids")?;
    let rejected_prompt = ids(batch, "rejected_prompt_ids")?;
    let masks = ids(batch, "assistant_masks")?;
    let labels = typed(batch, "label", |column| column.as_boolean_opt(), "booleans")?;
    let margins = typed(
        batch,
        "margin",
        |column| column.as_primitive_opt::<Float64Type>(),
        "floats of 64 bits",
    )?;
    let required = |column: &Option<Vec<Option<Vec<u32>>>>, row: usize, name: &str| {
        let value = column
            .as_ref()
            .and_then(|column| column.get(row).cloned().flatten());
        value.ok_or_else(|| anyhow!("a row of tokens has no `{name}`"))
    };
    let optional = |column: &Option<Vec<Option<Vec<u32>>>>, row: usize| {
        column
            .as_ref()
            .and_then(|column| column.get(row).cloned().flatten())
    };
    (0..batch.num_rows())
        .map(|row| {
            Ok(TokenRow {
                prompt_ids: required(&prompt, row, "prompt_ids")?,
                chosen_ids: required(&chosen, row, "chosen_ids")?,
                rejected_ids: optional(&rejected, row),
                rejected_prompt_ids: optional(&rejected_prompt, row),
                assistant_masks: optional(&masks, row),
                label: labels
                    .filter(|labels| labels.is_valid(row))
                    .map(|labels| labels.value(row)),
                margin: margins
                    .filter(|margins| margins.is_valid(row))
                    .map(|margins| margins.value(row)),
            })
        })
        .collect()
}

/// A column of one type, if there is one of this name.
fn typed<'a, T>(
    batch: &'a RecordBatch,
    name: &str,
    read: impl Fn(&'a ArrayRef) -> Option<&'a T>,
    expected: &str,
) -> Result<Option<&'a T>> {
    let Some(column) = batch.column_by_name(name) else {
        return Ok(None);
    };
    let found = read(column).ok_or_else(|| {
        anyhow!(
            "the column `{name}` holds {}: expected {expected}",
            column.data_type()
        )
    })?;
    Ok(Some(found))
}

fn ids(batch: &RecordBatch, name: &str) -> Result<Option<Vec<Option<Vec<u32>>>>> {
    let Some(column) = batch.column_by_name(name) else {
        return Ok(None);
    };
    let lists = column.as_list_opt::<i32>().ok_or_else(|| {
        anyhow!(
            "the column `{name}` holds {}: expected lists of int32",
            column.data_type()
        )
    })?;
    let read = |list: Option<ArrayRef>| {
        let Some(list) = list else { return Ok(None) };
        let values = list.as_primitive_opt::<Int32Type>().ok_or_else(|| {
            anyhow!(
                "the column `{name}` holds lists of {}: expected int32",
                list.data_type()
            )
        })?;
        let values: Result<Vec<u32>, _> = values
            .values()
            .iter()
            .map(|id| u32::try_from(*id))
            .collect();
        let values = values.with_context(|| format!("the column `{name}` holds a negative id"))?;
        Ok(Some(values))
    };
    lists.iter().map(read).collect::<Result<_>>().map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::table::Writer;

    #[test]
    fn rows_survive_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let plain = TokenRow {
            prompt_ids: vec![1, 2],
            chosen_ids: vec![3],
            rejected_ids: Some(vec![4, 5]),
            ..TokenRow::default()
        };
        let slipped = TokenRow {
            rejected_prompt_ids: Some(vec![1]),
            ..plain.clone()
        };
        let rows = vec![plain, slipped];
        let mut writer =
            Writer::create(folder.path(), "train", schema(Columns::Preferences)).unwrap();
        writer
            .write(&batch(&rows, Columns::Preferences).unwrap())
            .unwrap();
        writer.finish().unwrap();
        assert_eq!(read(folder.path(), "train").unwrap(), rows);
        let rejected = rows[1].rejected().unwrap();
        assert_eq!(
            (rejected.ids.as_slice(), rejected.prompt_length),
            ([1, 4, 5].as_slice(), 1)
        );
        assert_eq!(rejected.labels(), [-100, 4, 5]);
        assert_eq!(rows[1].chosen().labels(), [-100, -100, 3]);
    }

    #[test]
    fn rows_with_one_answer_have_no_rejected_columns() {
        let folder = tempfile::tempdir().unwrap();
        let rows = vec![TokenRow {
            prompt_ids: vec![7],
            chosen_ids: vec![8],
            ..TokenRow::default()
        }];
        let mut writer = Writer::create(folder.path(), "test", schema(Columns::Answers)).unwrap();
        writer
            .write(&batch(&rows, Columns::Answers).unwrap())
            .unwrap();
        writer.finish().unwrap();
        assert_eq!(read(folder.path(), "test").unwrap(), rows);
        assert_eq!(rows[0].rejected(), None);
        let masked = vec![TokenRow {
            assistant_masks: Some(vec![0, 1]),
            ..rows[0].clone()
        }];
        let mut writer = Writer::create(folder.path(), "turns", schema(Columns::Turns)).unwrap();
        writer
            .write(&batch(&masked, Columns::Turns).unwrap())
            .unwrap();
        writer.finish().unwrap();
        assert_eq!(read(folder.path(), "turns").unwrap(), masked);
    }

    #[test]
    fn labels_and_margins_survive_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let answer = TokenRow {
            prompt_ids: vec![7],
            chosen_ids: vec![8],
            ..TokenRow::default()
        };
        let labelled: Vec<TokenRow> = [true, false]
            .map(|label| TokenRow {
                label: Some(label),
                ..answer.clone()
            })
            .into();
        let pair = TokenRow {
            rejected_ids: Some(vec![9]),
            ..answer
        };
        let margins: Vec<TokenRow> = [Some(0.5), None]
            .map(|margin| TokenRow {
                margin,
                ..pair.clone()
            })
            .into();
        for (name, columns, rows) in [
            ("labels", Columns::Labels, labelled),
            ("margins", Columns::Margins, margins),
        ] {
            let mut writer = Writer::create(folder.path(), name, schema(columns)).unwrap();
            writer.write(&batch(&rows, columns).unwrap()).unwrap();
            writer.finish().unwrap();
            assert_eq!(read(folder.path(), name).unwrap(), rows);
        }
    }

    #[test]
    fn a_table_without_ids_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let schema = Arc::new(Schema::new(vec![Field::new(
            "prompt",
            DataType::Utf8,
            true,
        )]));
        Writer::create(folder.path(), "train", schema)
            .unwrap()
            .finish()
            .unwrap();
        assert!(
            read(folder.path(), "train")
                .unwrap_err()
                .to_string()
                .contains("no column `prompt_ids`")
        );
    }
}
