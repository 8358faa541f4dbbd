//! Tests: rows nobody would choose, from the file through every stage to finite metrics or a clear error.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::import_dataset::ImportDataset;
use crate::engine::{Context, Stage};
use crate::ml::testing::golden;
use crate::stages::text::apply_chat_template::ApplyChatTemplate;
use crate::stages::text::tokenize::Tokenize;
use crate::stages::train::train_orpo::TrainOrpo;
use crate::stages::train::train_sft::TrainSft;

struct Way {
    folder: tempfile::TempDir,
}

impl Way {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn context(&self, name: &str, before: Option<&Path>) -> Context {
        let golden = golden::folder("");
        let rows = self.folder.path().join("rows.jsonl");
        let nothing = PathBuf::new();
        Context::for_test(
            &self.folder.path().join(name),
            &[
                ("base", &golden.join("model")),
                ("adapter", &golden.join("adapter_init")),
                ("before", before.unwrap_or(&nothing)),
            ],
            &[("rows.jsonl", &rows)],
        )
    }

    fn run<S: Stage + serde::de::DeserializeOwned>(
        &self,
        name: &str,
        before: Option<&Context>,
        yaml: &str,
    ) -> anyhow::Result<Context> {
        let cx = self.context(name, before.map(Context::out));
        let stage: S = serde_yaml::from_str(yaml).unwrap();
        assert_eq!(stage.check(), []);
        stage.run(&cx)?;
        Ok(cx)
    }

    /// From rows to tokens: the contexts of the template and of the tokenizer.
    fn tokens(&self, rows: &[Value], max_length: usize) -> anyhow::Result<(Context, Context)> {
        let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
        fs::write(self.folder.path().join("rows.jsonl"), lines.join("\n")).unwrap();
        let pairs = self.run::<ImportDataset>("pairs", None, "{path: rows.jsonl}")?;
        let yaml = "{dataset: before, tokenizer: base}";
        let chats = self.run::<ApplyChatTemplate>("chats", Some(&pairs), yaml)?;
        let yaml = format!("{{dataset: before, tokenizer: base, max_length: {max_length}}}");
        let tokens = self.run::<Tokenize>("tokens", Some(&chats), &yaml)?;
        Ok((chats, tokens))
    }

    /// Trains an epoch with one row in a step, and gives the lines of metrics.
    fn metrics<S: Stage + serde::de::DeserializeOwned>(
        &self,
        tokens: &Context,
        more: &str,
    ) -> Vec<Value> {
        let yaml = format!(
            "{{model: base, adapter: adapter, dataset: before, num_train_epochs: 1, per_device_train_batch_size: 1,
              train_sampling_strategy: sequential, learning_rate: 1.0e-3{more}}}"
        );
        let cx = self.run::<S>(S::KIND, Some(tokens), &yaml).unwrap();
        let text = fs::read_to_string(cx.out().join("metrics.jsonl")).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
        let lines: Vec<Value> = lines.collect();
        for line in &lines {
            for (name, value) in line.as_object().unwrap() {
                assert!(value.is_number(), "{name} of {line}"); // not a number is written as null
            }
        }
        lines
    }
}

fn note(cx: &Context, name: &str) -> Value {
    let notes = cx.notes.lock().unwrap();
    notes.get(name).cloned().unwrap_or_default()
}

fn row(prompt: &str, chosen: &str, rejected: &str) -> Value {
    json!({"prompt": prompt, "chosen": chosen, "rejected": rejected})
}

#[test]
fn odd_rows_are_counted_and_trained_on_with_finite_numbers() {
    let many = |count: usize| "word ".repeat(count);
    let way = Way::new();
    let (chats, tokens) = way
        .tokens(
            &[
                row("What is two and two?", "It is four.", "It is five."),
                row(&many(1000), "The prompt is too long.", "It is dropped."),
                row("Say nothing.", "", "But why?"),
                row("Say it twice.", "The same.", "The same."),
                row("One token.", "a", "b"),
                row("Go on for long.", &many(10_000), "No."),
                row(
                    "What do <|eot_id|> and <|python_tag|> mean?",
                    "One ends a turn<|eot_id|>.",
                    "<|never_heard_of|>",
                ),
            ],
            192,
        )
        .unwrap();
    assert_eq!(note(&chats, "rows_with_special_tokens"), 1);
    assert_eq!(note(&tokens, "rows"), json!({"train": 6}));
    assert_eq!(note(&tokens, "rows_dropped"), json!({"prompt_too_long": 1}));
    assert_eq!(note(&tokens, "rows_with_empty_answers"), 1);
    assert_eq!(note(&tokens, "rows_with_equal_answers"), 1);
    // Of the row that is dropped nothing counts as cut.
    assert_eq!(note(&tokens, "answers_cut"), 1);
    assert_eq!(note(&tokens, "longest_sequence"), 192);

    let lines = way.metrics::<TrainOrpo>(&tokens, "");
    assert_eq!(lines.len(), 6);
    // Equal answers: no preference, log sigmoid(0).
    let equal = &lines[2];
    assert_eq!(equal["rewards/accuracies"], 0.);
    let ratio = equal["log_odds_ratio"].as_f64().unwrap();
    assert!((ratio + std::f64::consts::LN_2).abs() < 1e-6, "{ratio}");

    assert_eq!(way.metrics::<TrainSft>(&tokens, "").len(), 6);
    let packed = way.metrics::<TrainSft>(&tokens, ", packing: true, max_length: 256");
    assert!(packed.len() < 4, "{packed:?}");
}

#[test]
fn ten_thousand_tokens_at_once_are_cut_or_dropped_by_packing() {
    let way = Way::new();
    let long = "word ".repeat(10_000);
    let rows = [row("Go on.", &long, "No."), row("And?", "Yes.", "No.")];
    let (_, tokens) = way.tokens(&rows, 100_000).unwrap();
    assert!(note(&tokens, "longest_sequence").as_u64().unwrap() > 10_000);
    let lines = way.metrics::<TrainSft>(&tokens, ", packing: true, max_length: 64");
    assert_eq!(lines.len(), 2);
    let yaml = "{model: base, adapter: adapter, dataset: before, packing: true, max_length: 64}";
    let cx = way.run::<TrainSft>("noted", Some(&tokens), yaml).unwrap();
    assert_eq!(note(&cx, "rows_packed"), 2);
    assert_eq!(note(&cx, "rows_cut"), 1);
    assert_eq!(note(&cx, "rows"), 2);
}

#[test]
fn where_nothing_is_left_the_error_says_so() {
    let way = Way::new();
    let long = "word ".repeat(300);
    let rows = [row(&long, "Yes.", "No.")];
    let error = way.tokens(&rows, 64).map(|_| ()).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("no row of the split `train`"), "{text}");

    let (_, tokens) = way.tokens(&rows, 2048).unwrap();
    let yaml = "{model: base, adapter: adapter, dataset: before, packing: true, max_length: 64}";
    let error = way.run::<TrainSft>("packed", Some(&tokens), yaml);
    let text = error.map(|_| ()).unwrap_err().to_string();
    assert!(text.contains("within `max_length` 64"), "{text}");
}
