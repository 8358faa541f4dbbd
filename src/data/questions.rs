//! Questions with several answers of which one is right, as rows of a table have them.

use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};

use super::cell::Cell;
use super::expression::Expression;
use super::table::{BATCH_ROWS, Split};

/// A question's answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// The texts to choose from, at least two, none of them empty.
    pub choices: Vec<String>,
    /// The place of the right one.
    pub answer: usize,
}

/// The questions of a split, each with the text that `template` makes of its row.
///
/// # Errors
/// The split is not there, or lacks a column; in the items, a row that can't be used.
pub fn questions(
    folder: &Path,
    split: &str,
    template: &Expression,
) -> Result<impl Iterator<Item = Result<(String, Question)>>> {
    let split = Split::open(folder, split)?;
    let names: Vec<String> = split
        .schema()
        .fields()
        .iter()
        .map(|field| field.name().clone())
        .collect();
    for needed in template
        .reads
        .iter()
        .map(String::as_str)
        .chain(["choices", "answer"])
    {
        ensure!(
            names.iter().any(|name| name == needed),
            "the rows have no column `{needed}`, but {}; hint: `columns: {{{needed}: ..}}` where the data is imported says which one it is",
            super::forms::list(&names)
        );
    }
    let read = move |row: usize, batch: &arrow_array::RecordBatch| {
        let cell = |name: &str| {
            let schema = batch.schema_ref();
            let place = schema.index_of(name)?;
            Cell::of_column(schema.field(place), batch.column(place), row)
                .with_context(|| format!("the column `{name}` can't be read"))
        };
        let columns: Result<Vec<(String, Cell)>> = template
            .reads
            .iter()
            .map(|name| Ok((name.clone(), cell(name)?)))
            .collect();
        let text = match template.evaluate(columns?)? {
            Cell::Text(text) => text,
            other => bail!("the question is {}: expected text", other.noun()),
        };
        Ok((text, question(&cell("choices")?, &cell("answer")?)?))
    };
    Ok(split
        .batches(BATCH_ROWS)
        .flat_map(move |batch| match batch {
            Ok(batch) => (0..batch.num_rows())
                .map(|row| read(row, &batch))
                .collect::<Vec<_>>(),
            Err(error) => vec![Err(error)],
        }))
}

/// Reads choices and the right one. Choices are a list of texts, or lists `text` and `label`. The right one is given by its label, by its
/// text, by its place from 0, or by a letter from A.
fn question(choices: &Cell, answer: &Cell) -> Result<Question> {
    let (choices, labels) = match choices {
        Cell::Map(_) => (
            choices.get("text").context("`choices` has no `text`")?,
            choices.get("label"),
        ),
        other => (other, None),
    };
    let choices = texts(choices, "choices")?;
    let labels = labels.map(|labels| texts(labels, "label")).transpose()?;
    ensure!(
        choices.len() > 1,
        "`choices` has {} texts: expected two or more",
        choices.len()
    );
    ensure!(
        choices.iter().all(|text| !text.is_empty()),
        "one of the `choices` is empty"
    );
    let place = match answer {
        Cell::Int(place) => usize::try_from(*place).ok(),
        Cell::Text(text) => {
            let among = |all: &[String]| all.iter().position(|one| one == text);
            let letter = || match text.as_bytes() {
                [letter @ b'A'..=b'Z'] => Some(usize::from(letter - b'A')),
                _ => None,
            };
            labels
                .as_deref()
                .and_then(among)
                .or_else(|| among(&choices))
                .or_else(|| text.trim().parse().ok())
                .or_else(letter)
        }
        other => bail!(
            "`answer` is {}: expected the right choice's place from 0, its label or its text",
            other.noun()
        ),
    };
    let place = place.filter(|place| *place < choices.len());
    let answer = place.with_context(|| {
        let shown = match answer {
            Cell::Int(place) => place.to_string(),
            Cell::Text(text) => format!("{text:?}"),
            _ => String::new(),
        };
        format!(
            "`answer` is {shown}, which is none of the {} choices",
            choices.len()
        )
    })?;
    Ok(Question { choices, answer })
}

fn texts(cell: &Cell, name: &str) -> Result<Vec<String>> {
    let Cell::List(items) = cell else {
        bail!("`{name}` is {}: expected a list of texts", cell.noun());
    };
    let text = |item: &Cell| match item {
        Cell::Text(text) => Ok(text.clone()),
        Cell::Int(number) => Ok(number.to_string()),
        other => bail!("`{name}` holds {}: expected texts", other.noun()),
    };
    items.iter().map(text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(choices: &str, answer: &str) -> Result<Question> {
        question(&Cell::parse(choices)?, &Cell::parse(answer)?)
    }

    #[test]
    fn answers_of_each_form_are_read() {
        let labelled = r#"{"text": ["no", "yes"], "label": ["1", "2"]}"#;
        for (choices, answer, expected) in [
            (r#"["a", "b"]"#, "1", 1),
            (r#"["a", "b"]"#, r#""a""#, 0),
            (r#"["a", "b"]"#, r#""1""#, 1),
            (r#"["x", "y", "z"]"#, r#""C""#, 2),
            // A text that is a choice is that choice, whatever else it could be.
            (r#"["1", "0"]"#, r#""0""#, 1),
            (r#"["B", "A"]"#, r#""A""#, 1),
            ("[3, 4]", r#""4""#, 1),
            (labelled, r#""1""#, 0),
            (labelled, r#""yes""#, 1),
        ] {
            assert_eq!(read(choices, answer).unwrap().answer, expected, "{answer}");
        }
    }

    #[test]
    fn what_is_no_question_is_refused() {
        for (choices, answer, expected) in [
            (
                r#"["a", "b"]"#,
                "2",
                "`answer` is 2, which is none of the 2 choices",
            ),
            (r#"["a", "b"]"#, "-1", "none of the 2 choices"),
            (r#"["a", "b"]"#, r#""c""#, r#"`answer` is "c""#),
            (r#"["a", "b"]"#, "null", "`answer` is null"),
            (r#"["a"]"#, "0", "expected two or more"),
            (r#"["a", ""]"#, "0", "is empty"),
            (r#"["a", null]"#, "0", "`choices` holds null"),
            (r#""a""#, "0", "expected a list"),
            (r#"{"label": ["1"]}"#, "0", "no `text`"),
        ] {
            let error = format!("{:#}", read(choices, answer).unwrap_err());
            assert!(error.contains(expected), "{error}");
        }
    }
}
