//! Log-probabilities under a reference model as columns beside token ids: `list<float32>` columns `ref_chosen_logps` and, for preferences,
//! `ref_rejected_logps`, with a number in nats for each token of the answer. TRL's columns of these names hold their sums alone.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow, ensure};
use arrow_array::cast::AsArray;
use arrow_array::types::Float32Type;
use arrow_array::{Array, ArrayRef, Float32Array, ListArray, RecordBatch};
use arrow_buffer::{NullBuffer, OffsetBuffer};
use arrow_schema::{DataType, Field, FieldRef, Schema, SchemaRef};

use super::table::{BATCH_ROWS, Split};

const CHOSEN: &str = "ref_chosen_logps";
const REJECTED: &str = "ref_rejected_logps";

/// The log-probabilities of a row's answers under a reference model, in nats.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Logps {
    /// One for each token of the (better) answer.
    pub chosen: Vec<f32>,
    /// One for each token of the worse answer, for preferences.
    pub rejected: Option<Vec<f32>>,
}

fn item_field() -> FieldRef {
    Arc::new(Field::new_list_field(DataType::Float32, true))
}

/// The columns that stay beside new log-probabilities: all but old ones.
fn others(schema: &Schema) -> impl Iterator<Item = (usize, &FieldRef)> {
    let fields = schema.fields().iter().enumerate();
    fields.filter(|(_, field)| ![CHOSEN, REJECTED].contains(&field.name().as_str()))
}

/// The columns of a tokens file with log-probabilities, which stand in place of those that it may have.
pub fn schema(tokens: &Schema) -> SchemaRef {
    let mut fields: Vec<FieldRef> = others(tokens).map(|(_, field)| Arc::clone(field)).collect();
    let mut names = vec![CHOSEN];
    if tokens.field_with_name("rejected_ids").is_ok() {
        names.push(REJECTED);
    }
    let list = DataType::List(item_field());
    fields.extend(
        names
            .into_iter()
            .map(|name| Arc::new(Field::new(name, list.clone(), true))),
    );
    Arc::new(Schema::new(fields))
}

/// Puts log-probabilities beside rows of tokens, as columns of [`schema`]. There is one of `rows` for each row of the batch.
pub fn add(tokens: &RecordBatch, rows: &[Logps]) -> Result<RecordBatch> {
    let schema = schema(tokens.schema_ref());
    let kept = others(tokens.schema_ref());
    let mut columns: Vec<ArrayRef> = kept
        .map(|(index, _)| Arc::clone(tokens.column(index)))
        .collect();
    columns.push(lists(rows, |row| Some(&row.chosen))?);
    if columns.len() < schema.fields().len() {
        columns.push(lists(rows, |row| row.rejected.as_ref())?);
    }
    Ok(RecordBatch::try_new(schema, columns)?)
}

fn lists<'a>(
    rows: &'a [Logps],
    of: impl Fn(&'a Logps) -> Option<&'a Vec<f32>>,
) -> Result<ArrayRef> {
    let lengths = rows.iter().map(|row| of(row).map_or(0, Vec::len));
    let offsets = OffsetBuffer::from_lengths(lengths);
    let values = rows.iter().filter_map(&of).flatten().copied();
    let values = Arc::new(Float32Array::from_iter_values(values));
    let valid: Vec<bool> = rows.iter().map(|row| of(row).is_some()).collect();
    let nulls = valid.contains(&false).then(|| NullBuffer::from(valid));
    let lists = ListArray::try_new(item_field(), offsets, values, nulls)?;
    Ok(Arc::new(lists))
}

/// The log-probabilities of all rows of a split, if it has any.
///
/// # Errors
/// A column has another type, a row has no list, or a number is not finite.
pub fn read(folder: &Path, split: &str) -> Result<Option<Vec<Logps>>> {
    let split = Split::open(folder, split)?;
    if split.schema().field_with_name(CHOSEN).is_err() {
        return Ok(None);
    }
    let mut all = Vec::with_capacity(split.rows());
    for batch in split.batches(BATCH_ROWS) {
        let batch = batch?;
        let chosen = floats(&batch, CHOSEN)?.with_context(|| format!("no column `{CHOSEN}`"))?;
        let mut rejected = floats(&batch, REJECTED)?.map(Vec::into_iter);
        for chosen in chosen {
            let chosen = chosen.with_context(|| {
                format!(
                    "row {} of the split `{}` has no `{CHOSEN}`",
                    all.len() + 1,
                    split.name()
                )
            })?;
            let rejected = rejected.as_mut().and_then(Iterator::next).flatten();
            all.push(Logps { chosen, rejected });
        }
    }
    Ok(Some(all))
}

fn floats(batch: &RecordBatch, name: &str) -> Result<Option<Vec<Option<Vec<f32>>>>> {
    let Some(column) = batch.column_by_name(name) else {
        return Ok(None);
    };
    let expected = || {
        let found = column.data_type();
        anyhow!("the column `{name}` holds {found}: expected lists of float32")
    };
    let lists = column.as_list_opt::<i32>().ok_or_else(expected)?;
    let read = |list: Option<ArrayRef>| {
        let Some(list) = list else { return Ok(None) };
        let values = list
            .as_primitive_opt::<Float32Type>()
            .ok_or_else(expected)?;
        ensure!(
            values.null_count() == 0 && values.values().iter().all(|value| value.is_finite()),
            "the column `{name}` holds a number that is not finite"
        );
        Ok(Some(values.values().to_vec()))
    };
    lists.iter().map(read).collect::<Result<_>>().map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::table::Writer;
    use crate::data::tokens::{self, Columns, TokenRow};

    fn write(folder: &Path, batch: &RecordBatch) {
        let mut writer = Writer::create(folder, "train", batch.schema()).unwrap();
        writer.write(batch).unwrap();
        writer.finish().unwrap();
    }

    #[test]
    fn columns_survive_the_file_and_are_replaced_by_new_ones() {
        let folder = tempfile::tempdir().unwrap();
        let pair = TokenRow {
            prompt_ids: vec![1, 2],
            chosen_ids: vec![3],
            rejected_ids: Some(vec![4, 5]),
            ..TokenRow::default()
        };
        let rows = vec![pair.clone(), pair];
        let plain = tokens::batch(&rows, Columns::Preferences).unwrap();
        write(folder.path(), &plain);
        assert_eq!(read(folder.path(), "train").unwrap(), None);
        let logps = |first: f32| -> Vec<Logps> {
            let row = |number: f32| Logps {
                chosen: vec![first - number],
                rejected: Some(vec![-1.5, first]),
            };
            vec![row(0.), row(1.)]
        };
        let mut scored = plain;
        for first in [-0.25, -3.] {
            scored = add(&scored, &logps(first)).unwrap();
            write(folder.path(), &scored);
            assert_eq!(scored.num_columns(), 6);
            assert_eq!(read(folder.path(), "train").unwrap(), Some(logps(first)));
            assert_eq!(tokens::read(folder.path(), "train").unwrap(), rows);
        }
    }

    #[test]
    fn single_answers_have_one_column() {
        let row = TokenRow {
            chosen_ids: vec![3],
            ..TokenRow::default()
        };
        let plain = tokens::batch(&[row], Columns::Answers).unwrap();
        let logps = vec![Logps {
            chosen: vec![-0.5],
            rejected: None,
        }];
        let scored = add(&plain, &logps).unwrap();
        assert_eq!(scored.num_columns(), 3);
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &scored);
        assert_eq!(read(folder.path(), "train").unwrap(), Some(logps));
    }

    #[test]
    fn what_is_no_log_probability_is_refused() {
        let row = TokenRow {
            chosen_ids: vec![3],
            ..TokenRow::default()
        };
        let plain = tokens::batch(&[row], Columns::Answers).unwrap();
        for value in [f32::NAN, f32::NEG_INFINITY] {
            let logps = Logps {
                chosen: vec![value],
                rejected: None,
            };
            let folder = tempfile::tempdir().unwrap();
            write(folder.path(), &add(&plain, &[logps]).unwrap());
            let error = read(folder.path(), "train").unwrap_err().to_string();
            assert!(error.contains("not finite"), "{error}");
        }
        // Another type: a list of ids under this name.
        let ids = plain.column(1);
        let field = Field::new(CHOSEN, ids.data_type().clone(), true);
        let schema = Arc::new(Schema::new(vec![field]));
        let wrong = RecordBatch::try_new(schema, vec![Arc::clone(ids)]).unwrap();
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &wrong);
        let error = read(folder.path(), "train").unwrap_err().to_string();
        assert!(error.contains("expected lists of float32"), "{error}");
    }
}
