//! Tests of `tokenize`.

use std::path::Path;

use super::*;
use crate::data::table::Writer;
use crate::data::tokens::read;
use crate::stages::text::added::Added;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/model");

#[derive(Deserialize)]
struct Text {
    keep_empty_system: bool,
    prompt: String,
    chosen: String,
    rejected: String,
}

fn texts() -> Vec<Text> {
    let lines = include_str!("../../../../tests/golden/rendered.jsonl").lines();
    let texts = lines.map(|line| serde_json::from_str::<Text>(line).unwrap());
    texts.filter(|text| !text.keep_empty_system).collect()
}

fn chats(folder: &Path, texts: &[Text], preferences: bool) {
    use arrow_array::ArrayRef;
    let column = |text: fn(&Text) -> &str| -> ArrayRef {
        std::sync::Arc::new(StringArray::from_iter_values(texts.iter().map(text)))
    };
    let mut columns = vec![
        ("prompt", column(|t| &t.prompt)),
        ("chosen", column(|t| &t.chosen)),
    ];
    if preferences {
        columns.push(("rejected", column(|t| &t.rejected)));
    }
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let mut writer = Writer::create(folder, "train", batch.schema()).unwrap();
    writer.write(&batch).unwrap();
    writer.finish().unwrap();
}

fn run(yaml: &str, texts: &[Text], preferences: bool) -> Result<(tempfile::TempDir, Context)> {
    let folder = tempfile::tempdir().unwrap();
    let dataset = folder.path().join("chats");
    std::fs::create_dir(&dataset).unwrap();
    chats(&dataset, texts, preferences);
    let inputs = [("chats", dataset.as_path()), ("base", Path::new(MODEL))];
    let cx = Context::for_test(folder.path(), &inputs, &[]);
    serde_yaml::from_str::<Tokenize>(yaml).unwrap().run(&cx)?;
    Ok((folder, cx))
}

fn note(cx: &Context, name: &str) -> Option<serde_json::Value> {
    cx.notes.lock().unwrap().get(name).cloned()
}

fn golden(semantics: &str, mode: Option<&str>) -> Vec<serde_json::Value> {
    let lines = include_str!("../../../../tests/golden/tokenised.jsonl").lines();
    let cases = lines.map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    cases
        .filter(|case| {
            case["semantics"] == semantics
                && case["eos"] == "end_of_text"
                && case["truncation_mode"].as_str() == mode
        })
        .collect()
}

#[test]
fn the_files_rows_are_trls_sequences_and_labels() {
    let settings = [
        ("trl-1.16", None, ""),
        ("trl-0.24", Some("keep_end"), ", max_prompt_length: 96"),
        (
            "trl-0.24",
            Some("keep_start"),
            ", max_prompt_length: 96, truncation_mode: keep_start",
        ),
    ];
    for (semantics, mode, parameters) in settings {
        let yaml = format!("{{dataset: chats, tokenizer: base, max_length: 192{parameters}}}");
        let (_folder, cx) = run(&yaml, &texts(), true).unwrap();
        let rows = read(cx.out(), "train").unwrap();
        let mut cases = golden(semantics, mode);
        // Rows without an answer token are dropped.
        let without = |labels: &serde_json::Value| {
            labels
                .as_array()
                .unwrap()
                .iter()
                .all(|label| *label == -100)
        };
        let before = cases.len();
        cases.retain(|case| !without(&case["chosen_labels"]) && !without(&case["rejected_labels"]));
        assert_eq!(rows.len(), cases.len());
        let dropped =
            note(&cx, "rows_dropped").and_then(|causes| causes["prompt_too_long"].as_u64());
        assert_eq!(dropped.unwrap_or(0), (before - cases.len()) as u64);
        for (row, case) in rows.iter().zip(&cases) {
            for (sequence, side) in [
                (row.chosen(), "chosen"),
                (row.rejected().unwrap(), "rejected"),
            ] {
                assert_eq!(
                    serde_json::json!(sequence.ids),
                    case[format!("{side}_input_ids")]
                );
                assert_eq!(
                    serde_json::json!(sequence.labels()),
                    case[format!("{side}_labels")]
                );
            }
        }
        // Edge row 26 has the same answer twice, row 27 two that are empty once trimmed.
        assert_eq!(note(&cx, "rows_with_equal_answers"), Some(2.into()));
        assert_eq!(note(&cx, "rows_with_empty_answers"), Some(1.into()));
    }
}

#[test]
fn rows_with_one_answer_make_no_rejected_column_and_end_as_the_template_ends() {
    let (_folder, cx) = run("{dataset: chats, tokenizer: base}", &texts(), false).unwrap();
    let rows = read(cx.out(), "train").unwrap();
    assert_eq!(rows.len(), 28);
    assert!(
        rows.iter()
            .all(|row| row.rejected_ids.is_none() && row.chosen_ids.last() == Some(&1022))
    );
    assert_eq!(Added::read(cx.out()).unwrap(), Added::default());
}

#[test]
fn preferences_without_what_was_added_are_the_ids_of_sft() {
    let (_folder, cx) = run("{dataset: chats, tokenizer: base}", &texts(), true).unwrap();
    let added = Added::read(cx.out()).unwrap();
    assert_eq!(
        (added.bos, added.eos, added.mixed),
        (None, Some(1019), false)
    );
    let preferences = read(cx.out(), "train").unwrap();
    let (_folder, cx) = run("{dataset: chats, tokenizer: base}", &texts(), false).unwrap();
    let alone = read(cx.out(), "train").unwrap();
    for (row, alone) in preferences.into_iter().zip(alone) {
        let mut row = crate::ml::model::batch::Row {
            prompt: row.prompt_ids,
            chosen: row.chosen_ids,
            rejected: row.rejected_ids,
            rejected_prompt: row.rejected_prompt_ids,
            ..crate::ml::model::batch::Row::default()
        };
        added.take_off(&mut row);
        assert_eq!(
            (row.prompt, row.chosen),
            (alone.prompt_ids, alone.chosen_ids)
        );
        assert_eq!(row.rejected.unwrap().last(), Some(&1022));
    }
}

#[test]
fn a_row_without_rejected_is_told_with_its_number() {
    use arrow_array::ArrayRef;
    let folder = tempfile::tempdir().unwrap();
    let dataset = folder.path().join("chats");
    std::fs::create_dir(&dataset).unwrap();
    let column = |texts: [Option<&str>; 2]| -> ArrayRef { Arc::new(StringArray::from_iter(texts)) };
    let batch = RecordBatch::try_from_iter_with_nullable([
        ("prompt", column([Some("a"), Some("b")]), true),
        ("chosen", column([Some("c"), Some("d")]), true),
        ("rejected", column([Some("e"), None]), true),
    ])
    .unwrap();
    let mut writer = Writer::create(&dataset, "train", batch.schema()).unwrap();
    writer.write(&batch).unwrap();
    writer.finish().unwrap();
    let inputs = [("chats", dataset.as_path()), ("base", Path::new(MODEL))];
    let cx = Context::for_test(folder.path(), &inputs, &[]);
    let stage: Tokenize = serde_yaml::from_str("{dataset: chats, tokenizer: base}").unwrap();
    let error = format!("{:#}", stage.run(&cx).unwrap_err());
    assert!(error.contains("row 2 of the split `train`"), "{error}");
    assert!(
        error.contains("no `rejected`") && error.contains("hint"),
        "{error}"
    );
}

#[test]
fn a_template_that_renders_no_answers_is_told() {
    let silent = |answer: &str| Text {
        keep_empty_system: false,
        prompt: "<|begin_of_text|>hi<|eot_id|>".into(),
        chosen: answer.into(),
        rejected: answer.into(),
    };
    let many = |answer: &str| vec![silent(answer), silent(answer)];
    for preferences in [true, false] {
        let error = run(
            "{dataset: chats, tokenizer: base}",
            &many("<|eot_id|>\n"),
            preferences,
        )
        .map(|_| ())
        .unwrap_err();
        let error = format!("{error:#}");
        assert!(
            error.contains("none of the 2 rows") && error.contains("row 1"),
            "{error}"
        );
    }
    // Without an EOS of the trainer's there is no token at all.
    let error = run("{dataset: chats, tokenizer: base}", &many(""), false)
        .map(|_| ())
        .unwrap_err();
    assert!(format!("{error:#}").contains("no_answer: 2"), "{error:#}");
    // One answer that says something is enough.
    let mut texts = many("<|eot_id|>");
    texts.push(silent("yes<|eot_id|>"));
    run("{dataset: chats, tokenizer: base}", &texts, false).unwrap();
}

#[test]
fn a_token_beyond_the_embeddings_is_told_with_its_row() {
    let model = tempfile::tempdir().unwrap();
    for name in ["tokenizer.json", "config.json"] {
        std::fs::copy(Path::new(MODEL).join(name), model.path().join(name)).unwrap();
    }
    let settings = r#"{"eos_token": "<|eot_id|>", "additional_special_tokens": ["<|tool|>"]}"#;
    std::fs::write(model.path().join("tokenizer_config.json"), settings).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let dataset = folder.path().join("chats");
    std::fs::create_dir(&dataset).unwrap();
    let text = |prompt: &str| Text {
        keep_empty_system: false,
        prompt: prompt.into(),
        chosen: "yes".into(),
        rejected: "no".into(),
    };
    let run = |texts: &[Text]| {
        chats(&dataset, texts, true);
        let inputs = [("chats", dataset.as_path()), ("base", model.path())];
        let cx = Context::for_test(folder.path(), &inputs, &[]);
        let stage: Tokenize = serde_yaml::from_str("{dataset: chats, tokenizer: base}").unwrap();
        stage.run(&cx).unwrap();
        cx
    };
    let cx = run(&[text("a <tool|>")]);
    assert_eq!(note(&cx, "rows_with_unknown_ids"), None);
    // As transformers makes it: one id, whatever the model has.
    let cx = run(&[text("a"), text("a <|tool|>")]);
    assert_eq!(note(&cx, "rows_with_unknown_ids"), Some(1.into()));
    let rows = read(cx.out(), "train").unwrap();
    assert_eq!(rows[1].prompt_ids.last(), Some(&1024));
}

#[test]
fn bytes_do_not_depend_on_threads() {
    let many: Vec<Text> = (0..40).flat_map(|_| texts()).collect();
    let bytes = |threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        let yaml = "{dataset: chats, tokenizer: base, max_length: 192, max_prompt_length: 96}";
        let (_folder, cx) = pool.install(|| run(yaml, &many, true)).unwrap();
        std::fs::read(cx.out().join("train.parquet")).unwrap()
    };
    assert!(bytes(1) == bytes(3));
}

#[test]
fn when_no_row_is_left_the_stage_fails() {
    let error = run(
        "{dataset: chats, tokenizer: base, max_length: 4}",
        &texts(),
        true,
    )
    .map(|_| ())
    .unwrap_err();
    assert!(
        error.to_string().contains("no row of the split `train`"),
        "{error}"
    );
}

#[test]
fn rules_between_parameters() {
    let problems = |yaml: &str| {
        let stage: Tokenize = serde_yaml::from_str(yaml).unwrap();
        crate::engine::check(&stage).len()
    };
    assert_eq!(problems("{dataset: c, tokenizer: b}"), 0);
    assert_eq!(problems("{dataset: c, tokenizer: b, max_length: 0}"), 1);
    assert_eq!(
        problems("{dataset: c, tokenizer: b, max_length: 64, max_prompt_length: 64}"),
        1
    );
    assert_eq!(
        problems("{dataset: c, tokenizer: b, max_prompt_length: 0}"),
        1
    );
}

/// Prints speed and peak memory: `cargo test --lib a_million_rows -- --ignored --nocapture`.
#[test]
#[ignore = "takes minutes; measures memory of the whole process"]
fn a_million_rows_take_less_than_a_gigabyte() {
    use std::io::Write as _;
    use std::time::Instant;

    use crate::stages::dataset::import_dataset::ImportDataset;
    use crate::stages::text::apply_chat_template::ApplyChatTemplate;

    const MILLION: usize = 1_000_000;
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("rows.jsonl");
    let mut file = std::io::BufWriter::new(std::fs::File::create(&source).unwrap());
    for row in 0..MILLION {
        let text =
            format!("Question {row}: what is {row} + 1, and why does it matter to anybody at all?");
        let answer = row + 1;
        writeln!(file, r#"{{"system": "Be brief.", "prompt": "{text}", "chosen": "It is {answer}, because one more than {row} is {answer}.", "rejected": "It is {row}."}}"#).unwrap();
    }
    file.into_inner().unwrap();
    let mut place = source.clone();
    let mut started = Instant::now();
    let mut stage = |name: &str, run: &dyn Fn(&Context) -> Result<()>| {
        let out = folder.path().join(name);
        let template = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/templates/llama3.jinja");
        let sources = [
            ("rows.jsonl", source.as_path()),
            ("llama3.jinja", template.as_path()),
        ];
        let cx = Context::for_test(
            &out,
            &[("base", Path::new(MODEL)), ("before", place.as_path())],
            &sources,
        );
        run(&cx).unwrap();
        let seconds = started.elapsed().as_secs_f64();
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let peak = status
            .lines()
            .find(|line| line.starts_with("VmHWM"))
            .unwrap();
        println!("{name}: {:.0} rows/s, {peak}", MILLION as f64 / seconds);
        let kilobytes: u64 = peak.split_whitespace().nth(1).unwrap().parse().unwrap();
        assert!(kilobytes < 1_000_000, "{name}: {peak}");
        place = out.join("out");
        started = Instant::now();
    };
    let import: ImportDataset = serde_yaml::from_str("{path: rows.jsonl}").unwrap();
    stage("import", &|cx| import.run(cx));
    let template: ApplyChatTemplate =
        serde_yaml::from_str("{dataset: before, template: llama3.jinja, tokenizer: base}").unwrap();
    stage("template", &|cx| template.run(cx));
    let tokenize: Tokenize = serde_yaml::from_str("{dataset: before, tokenizer: base}").unwrap();
    stage("tokenize", &|cx| tokenize.run(cx));
}

#[test]
fn preferences_for_dpo_stay_as_the_template_printed_them() {
    let text = "{dataset: chats, tokenizer: base, trainer: dpo}";
    let (_folder, cx) = run(text, &texts(), true).unwrap();
    assert_eq!(Added::read(cx.out()).unwrap(), Added::default());
    let rows = read(cx.out(), "train").unwrap();
    let (_folder, cx) = run("{dataset: chats, tokenizer: base}", &texts(), true).unwrap();
    let with_eos = read(cx.out(), "train").unwrap();
    assert_eq!(rows.len(), with_eos.len());
    for (row, other) in rows.iter().zip(&with_eos) {
        assert_eq!(row.rejected_prompt_ids, None);
        assert_eq!(row.chosen_ids.last(), Some(&1022));
        assert_eq!(
            [&row.chosen().ids[..], &[1019]].concat(),
            other.chosen().ids
        );
    }
    let stage: Tokenize =
        serde_yaml::from_str("{dataset: a, tokenizer: b, trainer: dpo, max_prompt_length: 9}")
            .unwrap();
    assert_eq!(Stage::check(&stage)[0].parameter, "max_prompt_length");
}

/// Texts of the golden rows with a label each, and what `KTOTrainer` makes of them.
#[test]
fn labelled_rows_and_pairs_become_those_of_trl() {
    use arrow_array::{ArrayRef, BooleanArray};
    let cases: serde_json::Value =
        serde_json::from_str(include_str!("../../../../tests/golden/dpo/ids.json")).unwrap();
    let golden: serde_json::Value =
        serde_json::from_str(include_str!("../../../../tests/golden/kto/ids.json")).unwrap();
    let texts = cases[0]["texts"].as_array().unwrap();
    let label = |number: usize| number % 3 != 1;
    let column = |text: &dyn Fn(usize, &serde_json::Value) -> String| -> ArrayRef {
        let all = texts.iter().enumerate();
        Arc::new(StringArray::from_iter_values(
            all.map(|(number, row)| text(number, row)),
        ))
    };
    let of = |name: &'static str| {
        move |_: usize, row: &serde_json::Value| row[name].as_str().unwrap().to_owned()
    };
    let labelled = column(&|number, row| {
        let name = if label(number) { "chosen" } else { "rejected" };
        row[name].as_str().unwrap().to_owned()
    });
    let labels: ArrayRef = Arc::new(BooleanArray::from(
        (0..texts.len()).map(label).collect::<Vec<_>>(),
    ));
    let tables = [
        (
            "base",
            vec![
                ("prompt", column(&of("prompt"))),
                ("chosen", labelled),
                ("label", labels),
            ],
        ),
        (
            "paired",
            vec![
                ("prompt", column(&of("prompt"))),
                ("chosen", column(&of("chosen"))),
                ("rejected", column(&of("rejected"))),
            ],
        ),
    ];
    for (name, columns) in tables {
        let folder = tempfile::tempdir().unwrap();
        let dataset = folder.path().join("chats");
        std::fs::create_dir(&dataset).unwrap();
        let batch = RecordBatch::try_from_iter(columns).unwrap();
        let mut writer = Writer::create(&dataset, "train", batch.schema()).unwrap();
        writer.write(&batch).unwrap();
        writer.finish().unwrap();
        let inputs = [("chats", dataset.as_path()), ("base", Path::new(MODEL))];
        let cx = Context::for_test(folder.path(), &inputs, &[]);
        let text = "{dataset: chats, tokenizer: base, trainer: kto, max_length: 192}";
        let stage: Tokenize = serde_yaml::from_str(text).unwrap();
        stage.run(&cx).unwrap();
        let rows = read(cx.out(), "train").unwrap();
        let theirs = golden[name].as_array().unwrap();
        assert_eq!(rows.len(), theirs.len());
        for (number, (row, theirs)) in rows.iter().zip(theirs).enumerate() {
            let ids =
                |name: &str| -> Vec<u32> { serde_json::from_value(theirs[name].clone()).unwrap() };
            assert_eq!(row.prompt_ids, ids("prompt"), "{name} {number}");
            let mut answer = ids("completion");
            answer.truncate(192);
            assert_eq!(row.chosen_ids, answer, "{name} {number}");
            assert_eq!(row.label, theirs["label"].as_bool(), "{name} {number}");
        }
        let kept = Labelled::read(cx.out(), "train_kto").unwrap();
        assert_eq!(kept.max_length, 192);
        if name == "base" {
            // Others can't use a bad answer.
            let stage: Tokenize =
                serde_yaml::from_str("{dataset: chats, tokenizer: base}").unwrap();
            let cx = Context::for_test(&folder.path().join("other"), &inputs, &[]);
            let error = format!("{:#}", stage.run(&cx).unwrap_err());
            assert!(
                error.contains("row 2") && error.contains("`label` is false"),
                "{error}"
            );
        }
    }
}

#[test]
fn pairs_for_a_reward_model_are_kept_whole_or_dropped() {
    let text = "{dataset: chats, tokenizer: base, trainer: reward, max_length: 100}";
    let (_folder, cx) = run(text, &texts(), true).unwrap();
    let rows = read(cx.out(), "train").unwrap();
    let uncut = "{dataset: chats, tokenizer: base, trainer: reward, max_length: 10000}";
    let (_folder, cx) = run(uncut, &texts(), true).unwrap();
    let mut all = read(cx.out(), "train").unwrap();
    let count = all.len();
    let longest = |row: &TokenRow| {
        row.chosen()
            .ids
            .len()
            .max(row.rejected().unwrap().ids.len())
    };
    all.retain(|row| longest(row) <= 100);
    assert!(!rows.is_empty() && rows.len() < count);
    assert_eq!(rows, all);
}
