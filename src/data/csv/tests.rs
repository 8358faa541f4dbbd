//! Tests of `csv`.

use std::io::Write as _;

use arrow_array::cast::AsArray;
use serde_json::{Value, json};

use super::*;

fn read(text: &[u8], delimiter: u8, most: usize) -> Result<Vec<Value>, String> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text).unwrap();
    let file = TextFile::new(file.path(), "a.csv", None);
    let read = || -> Result<Vec<Value>> {
        let mut rows = Vec::new();
        for batch in batches(&file, delimiter, most, false)? {
            let batch = batch?;
            for row in 0..batch.num_rows() {
                let mut object = serde_json::Map::new();
                for (column, field) in batch.columns().iter().zip(batch.schema().fields()) {
                    let column = column.as_string::<i32>();
                    let value = column.iter().nth(row).unwrap();
                    object.insert(field.name().clone(), json!(value));
                }
                rows.push(Value::Object(object));
            }
        }
        assert_eq!(count(&file, delimiter, most)?, rows.len());
        Ok(rows)
    };
    read().map_err(|error| format!("{error:#}"))
}

#[track_caller]
fn refused(text: &str, parts: &[&str]) {
    let error = read(text.as_bytes(), b',', usize::MAX).unwrap_err();
    for part in parts {
        assert!(error.contains(part), "{part:?} is not in: {error}");
    }
}

#[test]
fn records_are_those_of_pandas() {
    let golden = include_str!("../../../tests/golden/data_files/golden.json");
    let golden: Value = serde_json::from_str(golden).unwrap();
    let cases = golden["csv"].as_array().unwrap();
    assert!(cases.len() > 10);
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let rows = read(text.as_bytes(), b',', usize::MAX).unwrap();
        assert_eq!(json!(rows), case["rows"], "{}", case["name"]);
    }
}

#[test]
fn nothing_is_guessed() {
    let text = "prompt,chosen,n\nNA,None,007\nnull,nan,1.50\n";
    let rows = read(text.as_bytes(), b',', usize::MAX).unwrap();
    let expected = [
        json!({"prompt": "NA", "chosen": "None", "n": "007"}),
        json!({"prompt": "null", "chosen": "nan", "n": "1.50"}),
    ];
    assert_eq!(rows, expected);
}

#[test]
fn other_delimiters_are_read_by_name() {
    let expected = [json!({"prompt": "a,b", "chosen": "c"})];
    assert_eq!(
        read(b"prompt\tchosen\na,b\tc\n", b'\t', 9).unwrap(),
        expected
    );
    assert_eq!(read(b"prompt;chosen\na,b;c\n", b';', 9).unwrap(), expected);
    refused(
        "prompt\tchosen\na\tb\n",
        &["a.csv:1:", "holds `\\t`", r#"`delimiter: "\t"`"#],
    );
    refused("prompt;chosen\na;b\n", &[r#"`delimiter: ";"`"#]);
    assert_eq!(
        read(b"prompt\nx;y\n", b',', 9).unwrap(),
        [json!({"prompt": "x;y"})]
    );
}

#[test]
fn rows_of_another_width_are_errors_with_their_place() {
    refused(
        "a,b\n1,2\n\n3\n",
        &["a.csv:4: row 2 has 1 field, but the header names 2 columns"],
    );
    refused("a,b\n\"1\n1\",2\n3,4,5\n", &["a.csv:4: row 2 has 3 fields"]);
    refused("a,b,a\n", &["a.csv:1:", "names the column `a` twice"]);
    refused("", &["`a.csv` is empty"]);
}

#[test]
fn a_quote_that_is_never_closed_is_told_where_it_opens() {
    refused("a,b\n1,2\n3,\"x\n4,5\n", &["a.csv:3:", "never closed"]);
    refused("a,b\n1,2\n\"3,4\n", &["a.csv:3:", "never closed"]);
    refused("a\n\"x", &["a.csv:2:", "never closed"]);
    let long = format!("a,b\n1,\"{}", "x".repeat(LONGEST_ROW + 100_000));
    refused(&long, &["more than 64 MiB", "never closed"]);
}

#[test]
fn no_more_is_read_than_is_wanted() {
    let mut text = b"a,b\n1,2\n3,4\n".to_vec();
    text.extend(b"5\n\xff\n");
    assert_eq!(read(&text, b',', 2).unwrap().len(), 2);
    let error = read(&text, b',', 3).unwrap_err();
    assert!(error.contains("row 3 has 1 field"), "{error}");
    let error = read(b"a,b\n1,2\n\xff,3\n", b',', 3).unwrap_err();
    assert!(
        error.contains("a.csv:3: the byte 0xff at offset 8"),
        "{error}"
    );
}

#[test]
fn a_row_of_another_width_can_be_left_out() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(b"a,b\n1,2\n3\n4,5\n").unwrap();
    let file = TextFile::new(file.path(), "a.csv", None);
    let read: Result<Vec<_>> = batches(&file, b',', 9, true).unwrap().collect();
    let read = read.unwrap();
    let broken = read[0].column_by_name(BROKEN).unwrap().as_string::<i32>();
    let broken: Vec<_> = broken.iter().collect();
    assert_eq!((broken[0], broken[2]), (None, None));
    assert!(broken[1].unwrap().starts_with("a.csv:3: row 2 has 1 field"));
}
