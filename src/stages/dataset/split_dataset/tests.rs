//! Tests of `split_dataset`.

use std::path::Path;
use std::sync::Arc;

use arrow_array::{ArrayRef, StringArray};
use arrow_schema::{DataType, Field, Schema};

use super::*;
use crate::data;
use crate::data::cell::json_field;

fn dataset(folder: &Path, rows: usize) -> std::path::PathBuf {
    let dataset = folder.join("dataset");
    std::fs::create_dir(&dataset).unwrap();
    let texts: ArrayRef = Arc::new(StringArray::from_iter_values(
        (0..rows).map(|row| row.to_string()),
    ));
    let batch = RecordBatch::try_from_iter([("prompt", texts)]).unwrap();
    let mut writer = Writer::create(&dataset, "train", batch.schema()).unwrap();
    writer.write(&batch).unwrap();
    writer.finish().unwrap();
    dataset
}

fn run(yaml: &str, rows: usize) -> Result<[Vec<usize>; 2]> {
    let folder = tempfile::tempdir().unwrap();
    let dataset = dataset(folder.path(), rows);
    let cx = Context::for_test(folder.path(), &[("pairs", &dataset)], &[]);
    serde_yaml::from_str::<SplitDataset>(yaml)
        .unwrap()
        .run(&cx)?;
    let read = |split| -> Vec<usize> {
        let rows = data::head(cx.out(), split, usize::MAX).unwrap();
        rows.iter()
            .map(|row| row["prompt"].as_str().unwrap().parse().unwrap())
            .collect()
    };
    Ok([read("train"), read("test")])
}

#[test]
fn every_row_is_in_one_split_and_the_seed_decides_which() {
    let [train, test] = run("{dataset: pairs, test_size: 0.1, seed: 1}", 3001).unwrap();
    assert_eq!((train.len(), test.len()), (2700, 301));
    let mut all = [train.clone(), test.clone()].concat();
    all.sort_unstable();
    assert_eq!(all, (0..3001).collect::<Vec<_>>());
    assert!(test.is_sorted() && test[150] > 1000 && test[150] < 2000);
    assert_eq!(
        run("{dataset: pairs, test_size: 0.1, seed: 1}", 3001).unwrap(),
        [train, test.clone()]
    );
    assert_ne!(
        run("{dataset: pairs, test_size: 0.1, seed: 2}", 3001).unwrap()[1],
        test
    );
}

#[test]
fn without_shuffle_the_last_rows_are_held_out() {
    let [train, test] = run("{dataset: pairs, test_size: 2, shuffle: false}", 5).unwrap();
    assert_eq!((train, test), (vec![0, 1, 2], vec![3, 4]));
}

#[test]
fn sizes_that_leave_nothing_are_errors() {
    let error = run("{dataset: pairs, test_size: 5}", 5)
        .unwrap_err()
        .to_string();
    assert!(error.contains("leaves none"), "{error}");
    for size in ["0", "-1", "1.5", ".nan", ".inf"] {
        let yaml = format!("{{dataset: pairs, test_size: {size}}}");
        let stage: SplitDataset = serde_yaml::from_str(&yaml).unwrap();
        assert_eq!(crate::engine::check(&stage).len(), 1, "{size}");
    }
}

#[test]
fn draws_are_even() {
    let mut counts = [0; 5];
    for seed in 0..2000 {
        for (row, test) in draw(5, 2, seed, true).into_iter().enumerate() {
            counts[row] += u32::from(test);
        }
    }
    assert!(
        counts.iter().all(|count| (720..880).contains(count)),
        "{counts:?}"
    );
}

/// The rows of both splits by their number, of a dataset with these columns besides; and what was told.
fn split(yaml: &str, columns: &[(&str, bool, Vec<String>)]) -> Result<[Vec<usize>; 2], String> {
    let folder = tempfile::tempdir().unwrap();
    let dataset = folder.path().join("dataset");
    std::fs::create_dir(&dataset).unwrap();
    let rows = columns[0].2.len();
    let numbers: ArrayRef = Arc::new(StringArray::from_iter_values(
        (0..rows).map(|row| row.to_string()),
    ));
    let mut fields = vec![Field::new("n", DataType::Utf8, true)];
    let mut arrays = vec![numbers];
    for (name, is_json, values) in columns {
        let field = if *is_json {
            json_field(name)
        } else {
            Field::new(*name, DataType::Utf8, true)
        };
        fields.push(field);
        arrays.push(Arc::new(StringArray::from_iter_values(values)));
    }
    let schema = Arc::new(Schema::new(fields));
    let batch = RecordBatch::try_new(schema.clone(), arrays).unwrap();
    let mut writer = Writer::create(&dataset, "train", schema).unwrap();
    writer.write(&batch).unwrap();
    writer.finish().unwrap();
    let cx = Context::for_test(folder.path(), &[("pairs", &dataset)], &[]);
    let stage: SplitDataset = serde_yaml::from_str(yaml).unwrap();
    assert_eq!(stage.check(), [], "{yaml}");
    stage.run(&cx).map_err(|error| format!("{error:#}"))?;
    Ok(["train", "test"].map(|split| {
        let rows = data::head(cx.out(), split, usize::MAX).unwrap();
        rows.iter()
            .map(|row| row["n"].as_str().unwrap().parse().unwrap())
            .collect()
    }))
}

fn texts(rows: usize, of: impl Fn(usize) -> String) -> Vec<String> {
    (0..rows).map(of).collect()
}

#[test]
fn preferences_with_the_same_prompt_stay_together() {
    // 25 prompts with 4 pairs each, as in UltraFeedback.
    let prompts = texts(100, |row| format!("p{}", row % 25));
    let pairs = [
        ("prompt", false, prompts),
        ("rejected", false, texts(100, |row| row.to_string())),
    ];
    let [train, test] = split("{dataset: pairs, test_size: 0.12}", &pairs).unwrap();
    assert_eq!((train.len(), test.len()), (88, 12));
    assert!(
        test.iter()
            .all(|row| !train.iter().any(|other| other % 25 == row % 25))
    );
    // Ten rows are two and a half prompts.
    let [_, test] = split("{dataset: pairs, test_size: 10}", &pairs).unwrap();
    assert_eq!(test.len(), 8);
    let again = split("{dataset: pairs, test_size: 10}", &pairs).unwrap();
    assert_eq!(again[1], test);
    let other = split("{dataset: pairs, test_size: 10, seed: 7}", &pairs).unwrap();
    assert_ne!(other[1], test);
    let [_, last] = split("{dataset: pairs, test_size: 8, shuffle: false}", &pairs).unwrap();
    assert_eq!(last, [23, 24, 48, 49, 73, 74, 98, 99]);
    let [train, test] = split("{dataset: pairs, test_size: 10, group_by: none}", &pairs).unwrap();
    assert_eq!(test.len(), 10);
    assert!(
        test.iter()
            .any(|row| train.iter().any(|other| other % 25 == row % 25))
    );
}

#[test]
fn rows_that_share_nothing_are_drawn_as_ever() {
    let pairs = [
        ("prompt", false, texts(3001, |row| row.to_string())),
        ("rejected", false, texts(3001, |_| "r".to_owned())),
    ];
    let found = split("{dataset: pairs, test_size: 0.1, seed: 1}", &pairs).unwrap();
    assert_eq!(
        found,
        run("{dataset: pairs, test_size: 0.1, seed: 1}", 3001).unwrap()
    );
}

#[test]
fn a_prompt_is_what_both_conversations_begin_with() {
    let conversation = |question: usize, content: &str, answer: usize| {
        let content = content.replace('?', &question.to_string());
        format!(
            r#"[{{"role":"user","content":{content}}},{{"content":"{answer}","role":"assistant"}}]"#
        )
    };
    // The same question as text and as parts.
    let content = |row: usize| {
        if row < 20 {
            r#""?""#
        } else {
            r#"[{"type":"text","text":"?"}]"#
        }
    };
    let column = |shift: usize| texts(40, |row| conversation(row % 20, content(row), row + shift));
    let pairs = [("chosen", true, column(0)), ("rejected", true, column(1))];
    let [train, test] = split("{dataset: pairs, test_size: 0.2}", &pairs).unwrap();
    assert_eq!((train.len(), test.len()), (32, 8));
    assert!(
        test.iter().all(|row| test.contains(&((row + 20) % 40))),
        "{test:?}"
    );
    // Without a prompt there is nothing to go by.
    let plain = [
        ("chosen", false, texts(10, |_| "a".into())),
        ("rejected", false, texts(10, |_| "b".into())),
    ];
    assert_eq!(
        split("{dataset: pairs, test_size: 0.2}", &plain).unwrap()[1].len(),
        2
    );
}

#[test]
fn columns_by_name_keep_rows_together() {
    let columns = [
        ("a", false, texts(60, |row| (row % 2).to_string())),
        (
            "b",
            true,
            texts(60, |row| format!(r#"{{"x": {}, "y": 1}}"#, row % 15)),
        ),
    ];
    let [train, test] = split(
        "{dataset: pairs, test_size: 10, group_by: [a, b]}",
        &columns,
    )
    .unwrap();
    assert_eq!(test.len(), 10);
    assert!(
        test.iter()
            .all(|row| !train.iter().any(|other| other % 30 == row % 30))
    );
    let error = split("{dataset: pairs, test_size: 10, group_by: c}", &columns).unwrap_err();
    assert!(
        error.contains("no column `c`: found `n`, `a`, `b`"),
        "{error}"
    );
    let one = [("a", false, texts(9, |_| "same".into()))];
    let error = split("{dataset: pairs, test_size: 3, group_by: a}", &one).unwrap_err();
    assert!(
        error.contains("9 rows are 1 group") && error.contains("group_by: none"),
        "{error}"
    );
}

#[test]
fn classes_keep_their_part() {
    let classes = [(
        "topic",
        false,
        texts(100, |row| if row < 80 { "a" } else { "b" }.to_owned()),
    )];
    let [_, test] = split(
        "{dataset: pairs, test_size: 0.1, stratify: topic}",
        &classes,
    )
    .unwrap();
    assert_eq!(test.iter().filter(|row| **row < 80).count(), 8);
    assert_eq!(test.len(), 10);
    let rare = [(
        "topic",
        false,
        texts(20, |row| if row == 7 { "rare" } else { "a" }.to_owned()),
    )];
    let error = split("{dataset: pairs, test_size: 0.2, stratify: topic}", &rare).unwrap_err();
    assert!(
        error.contains("the class \"rare\" of the column `topic`"),
        "{error}"
    );
    let many = [("topic", false, texts(20, |row| (row % 10).to_string()))];
    let error = split("{dataset: pairs, test_size: 5, stratify: topic}", &many).unwrap_err();
    assert!(
        error.contains("10 classes, more than the 5 rows of `test`"),
        "{error}"
    );
    assert_eq!(proportional(&[80, 20], 10), [8, 2]);
    assert_eq!(proportional(&[3, 3, 3], 4), [2, 1, 1]);
    assert_eq!(proportional(&[10, 1], 5), [5, 0]);
}

#[test]
fn the_prompt_of_a_chat_is_all_before_its_last_answer() {
    let chats = texts(40, |row| {
        let (question, answer) = (row % 10, row);
        format!(
            r#"[{{"role":"user","content":"{question}"}},{{"role":"assistant","content":"{answer}"}}]"#
        )
    });
    let yaml = "{dataset: pairs, test_size: 8, group_by: prompt}";
    let [train, test] = split(yaml, &[("messages", true, chats)]).unwrap();
    assert_eq!(test.len(), 8);
    assert!(
        test.iter()
            .all(|row| !train.iter().any(|other| other % 10 == row % 10))
    );
}
