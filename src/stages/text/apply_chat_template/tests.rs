//! Tests of `apply_chat_template`.

use std::path::{Path, PathBuf};

use super::*;
use crate::data;
use crate::data::import::{ImportOptions, import_files};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");
const LLAMA3: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/recipes/templates/llama3.jinja"
);

pub(in crate::stages) fn dataset(folder: &Path, splits: &[(&str, &str)]) -> PathBuf {
    let dataset = folder.join("dataset");
    std::fs::create_dir_all(&dataset).unwrap();
    for (split, text) in splits {
        let source = folder.join(format!("{split}.jsonl"));
        std::fs::write(&source, text).unwrap();
        let destination = dataset.join(format!("{split}.parquet"));
        import_files(
            &[source],
            &ImportOptions::default(),
            &destination,
            &mut |_| Ok(()),
        )
        .unwrap();
    }
    dataset
}

fn run(yaml: &str, splits: &[(&str, &str)]) -> Result<(tempfile::TempDir, Context)> {
    let folder = tempfile::tempdir().unwrap();
    let dataset = dataset(folder.path(), splits);
    let model = Path::new(GOLDEN).join("model");
    let inputs = [("pairs", dataset.as_path()), ("base", model.as_path())];
    let cx = Context::for_test(
        folder.path(),
        &inputs,
        &[("llama3.jinja", Path::new(LLAMA3))],
    );
    serde_yaml::from_str::<ApplyChatTemplate>(yaml)
        .unwrap()
        .run(&cx)?;
    Ok((folder, cx))
}

fn note(cx: &Context, name: &str) -> Option<serde_json::Value> {
    cx.notes.lock().unwrap().get(name).cloned()
}

#[test]
fn every_source_of_the_template_renders_the_golden_rows() {
    let rows = include_str!("../../../../tests/golden/rows.jsonl");
    let golden: Vec<serde_json::Value> = include_str!("../../../../tests/golden/rendered.jsonl")
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    for keep in [false, true] {
        for source in [
            "template: llama3.jinja",
            "tokenizer: base",
            "template: llama3.jinja, tokenizer: base",
        ] {
            let yaml = format!("{{dataset: pairs, {source}, keep_empty_system: {keep}}}");
            let (_folder, cx) = run(&yaml, &[("train", rows)]).unwrap();
            let rendered = data::head(cx.out(), "train", 100).unwrap();
            assert_eq!(rendered.len(), 24);
            for (number, row) in rendered.iter().enumerate() {
                let case = golden.iter().rfind(|case| {
                    case["row"] == number && (keep || case["keep_empty_system"] == false)
                });
                for name in ["prompt", "chosen", "rejected"] {
                    assert_eq!(row[name], case.unwrap()[name], "row {number}");
                }
            }
            // Row 15 talks about a special token.
            assert_eq!(note(&cx, "rows_with_special_tokens"), Some(1.into()));
            assert_eq!(note(&cx, "rows_already_rendered"), None);
        }
    }
}

#[test]
fn all_splits_are_rendered_in_order_whatever_the_number_of_threads() {
    let line = |row: usize| {
        format!(
            "{{\"messages\": [{{\"role\": \"user\", \"content\": \"q{row}\"}}, {{\"role\": \"assistant\", \"content\": \"a{row}\"}}]}}\n"
        )
    };
    let train: String = (0..9000).map(line).collect();
    let test = line(7);
    let splits = [("train", train.as_str()), ("test", test.as_str())];
    let yaml =
        "{dataset: pairs, chat_template: \"{% for m in messages %}[{{ m.content }}]{% endfor %}\"}";
    let bytes = |threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        let (_folder, cx) = pool.install(|| run(yaml, &splits)).unwrap();
        let rows = data::head(cx.out(), "train", 9000).unwrap();
        assert_eq!(
            rows[8999],
            serde_json::json!({"prompt": "[q8999]", "chosen": "[a8999]"})
        );
        assert_eq!(
            data::head(cx.out(), "test", 9).unwrap(),
            [serde_json::json!({"prompt": "[q7]", "chosen": "[a7]"})]
        );
        std::fs::read(cx.out().join("train.parquet")).unwrap()
    };
    assert!(bytes(1) == bytes(3));
}

#[test]
fn a_row_that_fails_is_named() {
    let rows = "{\"prompt\": \"p\", \"chosen\": \"c\"}\n{\"prompt\": \"bad\", \"chosen\": \"c\"}";
    let yaml = "{dataset: pairs, chat_template: \"{% if messages[0].content == 'bad' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}\"}";
    let error = format!(
        "{:#}",
        run(yaml, &[("test", rows)]).map(|_| ()).unwrap_err()
    );
    assert!(
        error.starts_with("row 2 of the split `test`: ") && error.contains("refuses the row: no"),
        "{error}"
    );
}

#[test]
fn what_the_template_does_not_read_is_told() {
    let rows = r#"{"messages": [{"role": "user", "content": "q", "weight": 0}, {"role": "assistant", "content": "a", "thinking": "t"}], "tools": [{"name": "f"}], "chat_template_kwargs": {"think": true}}"#;
    let messages = |template: &str| {
        let yaml = format!("{{dataset: pairs, chat_template: \"{template}\"}}");
        let (_folder, cx) = run(&yaml, &[("train", rows)]).unwrap();
        format!("{:?}", cx.events.last())
    };
    let each = "{% for m in messages %}{{ m.content }}{{ m.reasoning_content }}{% endfor %}";
    let all = messages(each);
    for name in [
        "`weight` of messages",
        "`tools`",
        "`think` of `chat_template_kwargs`",
    ] {
        assert!(
            all.contains(&format!("doesn't read {name}, which 1 of 1 rows have")),
            "{all}"
        );
    }
    assert!(!all.contains("`thinking`"), "{all}");
    let reading = each.replace(
        "{{ m.content }}",
        "{{ m.content }}{{ tools }}{{ think }}{{ m.weight }}",
    );
    let none = messages(&reading.replace("m.reasoning_content", "m.role"));
    assert!(
        none.contains("`thinking` of messages") && !none.contains("`tools`"),
        "{none}"
    );
}

#[test]
fn the_date_is_a_parameter() {
    let template = "chat_template: \"{{ strftime_now('%d %b %Y') }}{{ messages[-1].content }}\"";
    let rows = "{\"prompt\": \"p\", \"chosen\": \"c\"}";
    let (_folder, cx) = run(
        &format!("{{dataset: pairs, {template}, date: \"2024-07-26\"}}"),
        &[("train", rows)],
    )
    .unwrap();
    assert_eq!(
        data::head(cx.out(), "train", 1).unwrap()[0]["prompt"],
        "26 Jul 2024"
    );
    let error = run(
        &format!("{{dataset: pairs, {template}}}"),
        &[("train", rows)],
    )
    .map(|_| ())
    .unwrap_err();
    assert!(format!("{error:#}").contains("hint: set `date"));
}

#[test]
fn rules_between_parameters() {
    let problems = |yaml: &str| {
        serde_yaml::from_str::<ApplyChatTemplate>(yaml)
            .unwrap()
            .check()
            .len()
    };
    assert_eq!(problems("{dataset: pairs}"), 1);
    assert_eq!(
        problems("{dataset: pairs, template: a, chat_template: b, date: tomorrow}"),
        2
    );
    assert_eq!(
        problems("{dataset: pairs, tokenizer: base, date: 2024-07-26}"),
        0
    );
}

#[test]
fn a_dataset_without_answers_is_refused() {
    let error = run(
        "{dataset: pairs, template: llama3.jinja}",
        &[("train", "{\"prompt\": \"p\"}")],
    )
    .map(|_| ())
    .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("neither a column `chosen` nor `messages`"),
        "{error}"
    );
}
