//! Tests of `import`.

use super::*;
use crate::data::{head, summary};

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
        ["id", "prompt", "chosen", "rejected", "system"]
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
    let csv = "\u{feff}prompt,chosen,rejected\n\"q, é\n\",d,\n";
    let (_, rows) = import(&[("c.csv", csv)], &ImportOptions::default()).unwrap();
    assert_eq!(
        rows,
        [json(
            r#"{"prompt": "q, é\n", "chosen": "d", "rejected": null}"#
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
    let error = import(&[("a.jsonl", line)], &options)
        .unwrap_err()
        .to_string();
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
    let mixed = "{\"prompt\": \"p\", \"chosen\": \"c\"}\n{\"prompt\": [{\"role\": \"user\"}], \"chosen\": \"c\"}";
    assert!(
        fails("a.jsonl", mixed).contains("a.jsonl:2: the column `prompt` holds a list, unlike"),
        "{}",
        fails("a.jsonl", mixed)
    );
    assert!(fails("a.jsonl", "{\"prompt\": 3}").contains("holds a number: expected text"));
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
    let conversations = "{\"messages\": [{\"from\": \"human\", \"value\": \"x\"}]}";
    assert!(
        fails("a.jsonl", conversations).contains("expected a list of messages"),
        "{}",
        fails("a.jsonl", conversations)
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
