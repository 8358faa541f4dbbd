//! Tests of `import`.

use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, Int32Array, ListArray, RecordBatch, StringArray, StructArray};
use arrow_buffer::OffsetBuffer;
use arrow_schema::{DataType, Field, Schema};

use super::*;
use crate::data::cell::{is_json, json_field};
use crate::data::{Split, head, summary};

/// Imports files given as text; rows and columns come back as JSON.
fn import(
    files: &[(&str, &str)],
    options: &ImportOptions,
) -> Result<(ImportReport, Vec<serde_json::Value>)> {
    let folder = tempfile::tempdir()?;
    let mut sources = Vec::new();
    for (name, text) in files {
        sources.push(folder.path().join(name));
        std::fs::write(folder.path().join(name), text)?;
    }
    let out = folder.path().join("out");
    std::fs::create_dir(&out)?;
    let report = import_files(&sources, options, &out.join("train.parquet"), &mut |_| {
        Ok(())
    })?;
    assert_eq!(summary(&out)?.splits[0].rows, report.rows);
    Ok((report, head(&out, "train", 10)?))
}

fn fails(name: &str, text: &str) -> String {
    format!(
        "{:#}",
        import(&[(name, text)], &ImportOptions::default()).unwrap_err()
    )
}

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap()
}

const LINES: &str = "\u{feff}{\"id\": 1, \"prompt\": \"p\", \"chosen\": \"c\", \"rejected\": \"r\"}\n\n{\"prompt\": \"q, é\\n\", \"chosen\": \"d\", \"rejected\": \"\", \"system\": \"s\"}\r\n";

#[test]
fn all_formats_give_the_same_rows() {
    let list = "[{\"id\": 1, \"prompt\": \"p\", \"chosen\": \"c\", \"rejected\": \"r\"},\n {\"prompt\": \"q, é\\n\", \"chosen\": \"d\", \"rejected\": \"\", \"system\": \"s\"}]";
    let (report, rows) = import(&[("a.jsonl", LINES)], &ImportOptions::default()).unwrap();
    assert_eq!(
        report.columns,
        ["system", "prompt", "chosen", "rejected", "id"]
    );
    assert_eq!(
        rows,
        [
            json(r#"{"id": 1, "prompt": "p", "chosen": "c", "rejected": "r", "system": null}"#),
            json(
                r#"{"id": null, "prompt": "q, é\n", "chosen": "d", "rejected": "", "system": "s"}"#
            ),
        ]
    );
    for name in ["b.json", "b.JSON"] {
        assert_eq!(
            import(&[(name, list)], &ImportOptions::default())
                .unwrap()
                .1,
            rows
        );
        assert_eq!(
            import(&[(name, LINES)], &ImportOptions::default())
                .unwrap()
                .1,
            rows
        );
    }
    let csv = "\u{feff}prompt,chosen,rejected\n\"q, é\n\",d,r\n";
    let (_, rows) = import(&[("c.csv", csv)], &ImportOptions::default()).unwrap();
    assert_eq!(
        rows,
        [json(
            r#"{"prompt": "q, é\n", "chosen": "d", "rejected": "r"}"#
        )]
    );
}

#[test]
fn an_imported_file_imports_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (
        folder.path().join("first.parquet"),
        folder.path().join("second.parquet"),
    );
    std::fs::write(folder.path().join("a.jsonl"), LINES).unwrap();
    let options = ImportOptions::default();
    import_files(
        &[folder.path().join("a.jsonl")],
        &options,
        &first,
        &mut |_| Ok(()),
    )
    .unwrap();
    import_files(std::slice::from_ref(&first), &options, &second, &mut |_| {
        Ok(())
    })
    .unwrap();
    assert_eq!(
        std::fs::read(first).unwrap(),
        std::fs::read(second).unwrap()
    );
}

#[test]
fn message_lists_keep_their_order_and_fields() {
    let line = r#"{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "name": "n"}]}"#;
    let (_, rows) = import(&[("a.jsonl", line)], &ImportOptions::default()).unwrap();
    assert_eq!(rows[0]["messages"][0]["content"], "q");
    assert_eq!(rows[0]["messages"][1]["name"], "n");
}

#[test]
fn messages_stay_json_as_they_were_written() {
    let lines = [
        r#"{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": null, "tool_calls": [{"function": {"arguments": {"t": "noon", "n": [1, 2.5, true], "e": {}, "z": null}, "name": "f"}}]}]}"#,
        r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, {"content": "a", "role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"t": 18446744073709551616, "n": "x"}}}]}]}"#,
        r#"{"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}"#,
    ];
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("a.jsonl");
    std::fs::write(&source, lines.join("\n")).unwrap();
    let to = folder.path().join("train.parquet");
    import_files(&[source], &ImportOptions::default(), &to, &mut |_| Ok(())).unwrap();
    let split = Split::open(folder.path(), "train").unwrap();
    assert!(is_json(split.schema().field(0)));
    let batches: Vec<_> = split.batches(10).collect::<Result<_>>().unwrap();
    let texts: Vec<&str> = batches
        .iter()
        .flat_map(|batch| batch.column(0).as_string::<i32>().iter().flatten())
        .collect();
    let inner = |line: &str| line["{\"messages\": ".len()..line.len() - 1].to_owned();
    assert_eq!(texts[0], inner(lines[0]));
    assert_eq!(texts[1], inner(lines[1]));
    assert_eq!(
        texts[2],
        r#"[{"role":"user","content":"q"},{"role":"assistant","content":"a"}]"#
    );
}

#[test]
fn parquet_from_elsewhere_keeps_what_it_says() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("a.parquet");
    // Columns as `datasets` writes them: JSON, also inside of structs, and fields that another row has.
    let content = json_field("content");
    let role = Field::new("role", DataType::Utf8, true);
    let name = Field::new("name", DataType::Utf8, true);
    let message = StructArray::from(vec![
        (
            Arc::new(role),
            Arc::new(StringArray::from(vec!["user", "assistant"])) as ArrayRef,
        ),
        (
            Arc::new(content),
            Arc::new(StringArray::from(vec![
                "[{\"type\":\"text\",\"text\":\"q\"}]",
                "\"a\"",
            ])),
        ),
        (
            Arc::new(name),
            Arc::new(StringArray::from(vec![None, Some("n")])),
        ),
    ]);
    let item = Arc::new(Field::new("element", message.data_type().clone(), true));
    let list = ListArray::new(
        item,
        OffsetBuffer::from_lengths([2]),
        Arc::new(message),
        None,
    );
    let number = Int32Array::from(vec![7]);
    let fields = vec![
        Field::new("messages", list.data_type().clone(), true),
        json_field("note"),
        Field::new("n", DataType::Int32, true),
    ];
    let schema = Arc::new(Schema::new(fields));
    let columns: Vec<ArrayRef> = vec![
        Arc::new(list),
        Arc::new(StringArray::from(vec!["\"pear\""])),
        Arc::new(number),
    ];
    let batch = RecordBatch::try_new(schema.clone(), columns).unwrap();
    let mut writer = Writer::create_file(&source, schema).unwrap();
    writer.write(&batch).unwrap();
    writer.finish().unwrap();
    let other = folder.path().join("b.jsonl");
    std::fs::write(
        &other,
        r#"{"n": 9, "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "note": 3}"#,
    )
    .unwrap();
    let to = folder.path().join("train.parquet");
    import_files(
        &[source, other],
        &ImportOptions::default(),
        &to,
        &mut |_| Ok(()),
    )
    .unwrap();
    assert_eq!(
        head(folder.path(), "train", 9).unwrap(),
        [
            json(
                r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "assistant", "content": "a", "name": "n"}], "note": "pear", "n": 7}"#
            ),
            json(
                r#"{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "note": 3, "n": 9}"#
            ),
        ]
    );
}

#[test]
fn rows_that_can_not_be_used_are_left_out_where_the_recipe_says_so() {
    let text = "{\"prompt\": \"1\", \"chosen\": \"a\"}\n\n{oops\n{\"prompt\": 3, \"chosen\": \"b\"}\n{\"prompt\": \"4\", \"chosen\": \"d\"}\n";
    let options = |skip_invalid_rows| ImportOptions {
        skip_invalid_rows,
        ..ImportOptions::default()
    };
    let (report, rows) = import(&[("a.jsonl", text)], &options(2)).unwrap();
    let prompts: Vec<_> = rows
        .iter()
        .map(|row| row["prompt"].as_str().unwrap())
        .collect();
    assert_eq!(
        (prompts, report.rows, report.rows_skipped),
        (vec!["1", "4"], 2, 2)
    );
    assert!(
        report.skipped[0].contains("a.jsonl:3:2: this line is no JSON"),
        "{report:?}"
    );
    assert!(
        report.skipped[1].contains("row 3: `prompt` is a number"),
        "{report:?}"
    );
    for few in [0, 1] {
        assert!(import(&[("a.jsonl", text)], &options(few)).is_err());
    }
    // What comes after the rows that are asked for is not looked at.
    let two = ImportOptions {
        max_rows: Some(1),
        ..ImportOptions::default()
    };
    assert_eq!(import(&[("a.jsonl", text)], &two).unwrap().0.rows, 1);
}

#[test]
fn rows_without_an_answer_are_named_by_the_files_own_columns() {
    let two = |first: &str, second: &str| fails("a.jsonl", &format!("{first}\n{second}\n"));
    for (first, second, expected) in [
        (
            r#"{"prompt": "p", "chosen": "c", "rejected": "r"}"#,
            r#"{"prompt": "p", "chosen": "c"}"#,
            "row 2: the row has no `rejected`, which a preference needs",
        ),
        (
            r#"{"instruction": "p", "output": "c"}"#,
            r#"{"instruction": "p", "output": null}"#,
            "row 2: the row has no `output`",
        ),
        (
            r#"{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}"#,
            r#"{"messages": [{"role": "user", "content": "q"}]}"#,
            "row 2: `messages` has no message of the role `assistant`",
        ),
        (
            r#"{"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}"#,
            r#"{"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: x", "rejected": "\n\nHuman: q\n\nAssistant: b"}"#,
            "row 2: `chosen` is a transcript that ends with Human",
        ),
    ] {
        let error = two(first, second);
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn json_is_read_over_several_lines_and_with_nan() {
    let pretty = "{\n  \"prompt\": \"p\",\n  \"chosen\": \"c\"\n}\n{\n  \"prompt\": \"q\",\n  \"chosen\": \"d\"\n}\n";
    let (_, rows) = import(&[("a.jsonl", pretty)], &ImportOptions::default()).unwrap();
    assert_eq!(rows[1], json(r#"{"prompt": "q", "chosen": "d"}"#));
    let line = "{\"prompt\": \"NaN\", \"chosen\": \"c\", \"score\": NaN, \"more\": [1, -Infinity]}";
    for (name, text) in [
        ("a.jsonl", line.to_owned()),
        ("a.json", format!("[{line}]")),
    ] {
        let (report, rows) = import(&[(name, &text)], &ImportOptions::default()).unwrap();
        assert_eq!(
            rows,
            [json(
                r#"{"prompt": "NaN", "chosen": "c", "score": null, "more": null}"#
            )]
        );
        assert!(
            report
                .messages
                .iter()
                .any(|message| message.contains("`more`, `score`")),
            "{report:?}"
        );
    }
    let great = "{\"prompt\": \"p\", \"chosen\": \"c\", \"score\": 1e999}";
    let (_, rows) = import(&[("a.jsonl", great)], &ImportOptions::default()).unwrap();
    assert_eq!(
        rows,
        [json(r#"{"prompt": "p", "chosen": "c", "score": null}"#)]
    );
    let used = "{\"prompt\": \"p\", \"chosen\": NaN}";
    assert!(fails("a.jsonl", used).contains("a.jsonl: row 1: the column `chosen` holds NaN"));
}

#[test]
fn forms_that_people_have_become_prompts_and_answers() {
    let one = |line: &str| {
        import(&[("a.jsonl", line)], &ImportOptions::default())
            .unwrap()
            .1
            .remove(0)
    };
    for (line, expected) in [
        (
            r#"{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}"#,
            r#"{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}"#,
        ),
        (
            r#"{"instruction": "add", "input": "2 3", "output": "5"}"#,
            r#"{"prompt": "add\n\n2 3", "chosen": "5"}"#,
        ),
        (
            r#"{"instruction": "add", "input": "", "output": "5"}"#,
            r#"{"prompt": "add", "chosen": "5"}"#,
        ),
        (
            r#"{"instruction": "b", "history": [["a", "1"]], "output": "2"}"#,
            r#"{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "1"}, {"role": "user", "content": "b"}], "chosen": "2"}"#,
        ),
        (
            r#"{"text": "whole", "n": 1}"#,
            r#"{"text": "whole", "n": 1}"#,
        ),
        (
            r#"{"prompt": "p", "completion": "c"}"#,
            r#"{"prompt": "p", "chosen": "c"}"#,
        ),
        (
            r#"{"prompt": "p", "completion": "c", "label": 0}"#,
            r#"{"prompt": "p", "chosen": "c", "label": false}"#,
        ),
        (
            r#"{"prompt": "p", "chosen": {"role": "assistant", "content": "c"}, "rejected": {"from": "gpt", "value": "r"}}"#,
            r#"{"prompt": "p", "chosen": [{"role": "assistant", "content": "c"}], "rejected": [{"role": "assistant", "content": "r"}]}"#,
        ),
        (
            r#"{"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}"#,
            r#"{"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]}"#,
        ),
    ] {
        assert_eq!(one(line), json(expected), "{line}");
    }
    let columns = [("prompt", "${q.text}: ${n}"), ("chosen", "answers[0]")];
    let options = ImportOptions {
        columns: columns.map(|(a, b)| (a.to_owned(), b.to_owned())).into(),
        ..ImportOptions::default()
    };
    let line = r#"{"q": {"text": "x"}, "n": 5, "answers": ["a", "b"]}"#;
    let (_, rows) = import(&[("a.jsonl", line)], &options).unwrap();
    assert_eq!(
        (&rows[0]["prompt"], &rows[0]["chosen"]),
        (&json("\"x: 5\""), &json("\"a\""))
    );
}

#[test]
fn columns_can_be_renamed_even_in_a_circle() {
    let columns = [
        ("chosen", "rejected"),
        ("rejected", "chosen"),
        ("prompt", "question"),
    ];
    let columns = columns
        .iter()
        .map(|(ours, theirs)| ((*ours).to_owned(), (*theirs).to_owned()))
        .collect();
    let options = ImportOptions {
        columns,
        ..ImportOptions::default()
    };
    let line = r#"{"question": "p", "chosen": "c", "rejected": "r", "prompt": "unused"}"#;
    let (_, rows) = import(&[("a.jsonl", line)], &options).unwrap();
    assert_eq!(
        rows,
        [json(r#"{"prompt": "p", "rejected": "c", "chosen": "r"}"#)]
    );
    let options = ImportOptions {
        columns: [("prompt".to_owned(), "nothing".to_owned())].into(),
        ..ImportOptions::default()
    };
    let error = import(&[("a.jsonl", line)], &options).unwrap_err();
    let error = format!("{error:#}");
    assert!(
        error.contains("`nothing`") && error.contains("`question`"),
        "{error}"
    );
}

#[test]
fn several_files_follow_one_another_up_to_the_limit() {
    let files = [
        (
            "a.jsonl",
            "{\"prompt\": \"1\", \"chosen\": \"a\"}\n{\"prompt\": \"2\", \"chosen\": \"b\"}",
        ),
        ("b.csv", "prompt,chosen\n3,c\n4,d\n"),
    ];
    let options = ImportOptions {
        max_rows: Some(3),
        ..ImportOptions::default()
    };
    let (report, rows) = import(&files, &options).unwrap();
    let prompts: Vec<_> = rows
        .iter()
        .map(|row| row["prompt"].as_str().unwrap())
        .collect();
    assert_eq!((report.rows, prompts), (3, vec!["1", "2", "3"]));
}

#[test]
fn more_rows_than_a_batch_survive() {
    let lines: Vec<String> = (0..3000)
        .map(|row| format!("{{\"prompt\": \"{row}\", \"chosen\": \"c\"}}\n"))
        .collect();
    let lines = lines.concat();
    let (report, _) = import(&[("a.jsonl", &lines)], &ImportOptions::default()).unwrap();
    assert_eq!(report.rows, 3000);
    let list = format!("[{}]", lines.trim_end().replace('\n', ","));
    let options = ImportOptions {
        max_rows: Some(2000),
        ..ImportOptions::default()
    };
    assert_eq!(import(&[("a.json", &list)], &options).unwrap().0.rows, 2000);
}

#[test]
fn broken_lines_are_named_with_their_number() {
    let error = fails(
        "a.jsonl",
        "{\"prompt\": \"p\", \"chosen\": \"c\"}\n{\"prompt\": \"p\" \"chosen\"}\n",
    );
    assert!(
        error.contains("a.jsonl:2:16")
            && error.contains("no JSON")
            && error.contains("{\"prompt\": \"p\" \"chosen\"}"),
        "{error}"
    );
    assert!(fails("a.jsonl", "7\n").contains("a.jsonl:1: expected an object"));
    assert!(fails("a.json", "[{\"prompt\": \"p\"},\n {]").contains("a.json:2:3"));
    let number = "{\"prompt\": \"p\", \"chosen\": \"c\"}\n{\"prompt\": 3, \"chosen\": \"c\"}";
    assert!(
        fails("a.jsonl", number).contains("a.jsonl: row 2: `prompt` is a number: expected text"),
        "{}",
        fails("a.jsonl", number)
    );
    let ragged = fails("a.csv", "prompt,chosen\na,b\na,b,c\n");
    assert!(ragged.contains("a.csv") && ragged.contains('3'), "{ragged}");
    let invalid = import(
        &[("a.jsonl", "{\"prompt\": \"\\ud800\"}")],
        &ImportOptions::default(),
    );
    assert!(invalid.is_err());
}

#[test]
fn files_without_a_usable_column_name_what_they_have() {
    for (name, text) in [
        ("a.jsonl", "{\"question\": \"q\", \"best\": \"b\"}"),
        ("a.csv", "question,best\nq,b\n"),
    ] {
        let error = fails(name, text);
        assert!(
            error.contains("found `question`, `best`")
                && error.contains("columns: {prompt: question"),
            "{error}"
        );
    }
    assert!(fails("a.xlsx", "x").contains("extension"));
    assert!(fails("a.parquet", "x").contains("no Parquet file"));
    assert!(fails("a.csv", "").contains("empty"));
    let list = "{\"messages\": [\"x\"]}";
    assert!(
        fails("a.jsonl", list).contains("row 1: message 1 of `messages`: it is text"),
        "{}",
        fails("a.jsonl", list)
    );
}

proptest::proptest! {
    #[test]
    fn any_bytes_are_rows_or_an_error(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200), format in 0_usize..4) {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("a");
        std::fs::write(&source, bytes).unwrap();
        let format = [Format::Parquet, Format::Json, Format::Jsonl, Format::Csv].get(format).copied();
        let options = ImportOptions { format, ..ImportOptions::default() };
        let _ = import_files(&[source], &options, &folder.path().join("train.parquet"), &mut |_| Ok(()));
    }
}
