//! Tests of `create_model`.

use std::path::Path;
use std::sync::Arc;

use arrow_array::{ArrayRef, RecordBatch, StringArray};

use super::*;
use crate::data::import::{ImportOptions, import_files};
use crate::data::table::Writer;
use crate::ml::io::weights::Weights;
use crate::ml::model::{CausalLm, Trained};
use crate::ml::testing::golden;
use crate::text::tokenizer::{Tokenizer, chat_template};

const SHAPE: &str =
    "hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4";

fn stage(text: &str) -> CreateModel {
    serde_yaml::from_str(&format!("{{{text}, {SHAPE}}}")).unwrap()
}

/// A dataset of strings and one of messages.
fn datasets(folder: &Path) {
    let rendered = fs::read_to_string(golden::folder("rendered.jsonl")).unwrap();
    let texts: ArrayRef = Arc::new(StringArray::from_iter_values(rendered.lines()));
    let batch = RecordBatch::try_from_iter([("prompt", texts.clone()), ("id", texts)]).unwrap();
    let strings = folder.join("strings");
    fs::create_dir(&strings).unwrap();
    let mut writer = Writer::create(&strings, "train", batch.schema()).unwrap();
    writer.write(&batch).unwrap();
    writer.finish().unwrap();

    let messages = folder.join("messages");
    fs::create_dir(&messages).unwrap();
    let lines = r#"{"messages": [{"role": "user", "content": "zebra zebra zebra"}, {"role": "assistant", "content": "quagga"}]}"#;
    let file = folder.join("messages.jsonl");
    fs::write(&file, format!("{lines}\n")).unwrap();
    let to = messages.join("train.parquet");
    import_files(&[file], &ImportOptions::default(), &to, &mut |_| Ok(())).unwrap();
}

fn context(folder: &Path, name: &str) -> Context {
    Context::for_test(
        &folder.join(name),
        &[
            ("strings", &folder.join("strings")),
            ("messages", &folder.join("messages")),
            ("other", &golden::folder("model")),
        ],
        &[("chatml.jinja", &folder.join("chatml.jinja"))],
    )
}

#[test]
fn a_new_model_is_whole() {
    let folder = tempfile::tempdir().unwrap();
    datasets(folder.path());
    let cx = context(folder.path(), "new");
    let stage = stage(
        "dataset: strings, vocab_size: 400, num_key_value_heads: 2, dtype: bfloat16, seed: 1",
    );
    assert_eq!(stage.check(), []);
    stage.run(&cx).unwrap();

    let config = Arch::read(cx.out()).unwrap();
    assert_eq!(
        (
            config.vocab_size,
            config.num_key_value_heads,
            config.head_dim
        ),
        (400, 2, 8)
    );
    assert!((config.ropes[0].theta - 500_000.).abs() < 1e-9);
    let weights = Weights::open(cx.out()).unwrap();
    let (nothing, device) = (Trained::Nothing, candle_core::Device::Cpu);
    CausalLm::load(
        &config,
        &weights,
        None,
        nothing,
        candle_core::DType::F32,
        &device,
    )
    .unwrap();
    let tokenizer = Tokenizer::load(cx.out()).unwrap();
    assert_eq!(tokenizer.vocab_size(), 400);
    assert_eq!(config.bos_token_id, tokenizer.bos.map(|token| token.id));
    assert_eq!(config.eos_token_ids, [tokenizer.eos.unwrap().id]);
    assert!(
        chat_template(cx.out())
            .unwrap()
            .unwrap()
            .contains("start_header_id")
    );
    let generation: serde_json::Value =
        serde_json::from_slice(&fs::read(cx.out().join(GENERATION_CONFIG)).unwrap()).unwrap();
    assert_eq!(generation["eos_token_id"], json!([395, 398]));
    let notes = cx.notes.lock().unwrap();
    let values = weights.bytes() / 2;
    assert_eq!(
        (&notes["parameters"], &notes["vocab_size"]),
        (&json!(values), &json!(400))
    );

    // Again: the same bytes in every file.
    let again = context(folder.path(), "again");
    stage.run(&again).unwrap();
    let mut files = 0;
    for entry in fs::read_dir(cx.out()).unwrap() {
        let name = entry.unwrap().file_name();
        let read = |cx: &Context| fs::read(cx.out().join(&name)).unwrap();
        assert!(read(&cx) == read(&again), "{}", name.display());
        files += 1;
    }
    assert_eq!(files, 7);
}

#[test]
fn a_new_model_may_be_of_any_family() {
    let folder = tempfile::tempdir().unwrap();
    datasets(folder.path());
    for (family, more, biases, window) in [
        ("llama", "", 0, None),
        ("qwen2", "", 3, None),
        ("qwen2", "sliding_window: 9, ", 3, Some(9)),
        ("qwen3", "head_dim: 16, ", 0, None),
        ("mistral", "", 0, None),
        ("mistral", "sliding_window: 9, ", 0, Some(9)),
        ("smollm3", "", 0, None),
        ("granite", "", 0, None),
        ("gemma", "head_dim: 16, ", 0, None),
        ("gemma2", "", 0, None),
        ("gemma3_text", "num_key_value_heads: 1, ", 0, None),
        ("olmo2", "", 0, None),
        ("olmo3", "", 0, None),
        ("phi3", "sliding_window: 9, ", 0, Some(9)),
    ] {
        let name = format!("{family}{}", more.len());
        let cx = context(folder.path(), &name);
        let stage = stage(&format!("tokenizer: other, {more}family: {family}"));
        assert_eq!(stage.check(), []);
        stage.run(&cx).unwrap();
        let (arch, weights) = (
            Arch::read(cx.out()).unwrap(),
            Weights::open(cx.out()).unwrap(),
        );
        assert_eq!((arch.family, arch.biases.len()), (family, biases));
        assert!(arch.layers.iter().all(|layer| layer.window == window));
        assert!(
            crate::ml::model::compare::compare(&arch, &weights)
                .unwrap()
                .is_empty()
        );
        let values = |name: &str| -> Vec<f32> {
            let tensor = weights.tensor(name, &candle_core::Device::Cpu).unwrap();
            tensor.to_vec1().unwrap()
        };
        if biases > 0 {
            let bias = values("model.layers.1.self_attn.k_proj.bias");
            assert!(bias.iter().all(|x| *x == 0.));
        }
        if family.starts_with("gemma") {
            assert!(values("model.norm.weight").iter().all(|x| *x == 0.));
        }
        if family == "qwen3" {
            let norm = values("model.layers.1.self_attn.k_norm.weight");
            assert_eq!(norm, [1.; 16]);
        }
    }
    let error = serde_yaml::from_str::<CreateModel>(&format!("{{family: mamba, {SHAPE}}}"));
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("`mamba`") && error.contains("`qwen3`"),
        "{error}"
    );
    // A Llama's family is not written, as before there were others.
    let written = serde_json::to_value(stage("tokenizer: other, family: llama")).unwrap();
    assert!(written.get("family").is_none(), "{written}");
}

#[test]
fn messages_teach_and_few_texts_leave_rows_unused() {
    let folder = tempfile::tempdir().unwrap();
    datasets(folder.path());
    fs::write(folder.path().join("chatml.jinja"), "<|im_start|>").unwrap();
    let cx = context(folder.path(), "new");
    let stage = stage(
        "dataset: messages, vocab_size: 500, chat_template: chatml.jinja, max_shard_size: 20KB",
    );
    assert_eq!(stage.check(), []);
    stage.run(&cx).unwrap();
    assert_eq!(Arch::read(cx.out()).unwrap().vocab_size, 500);
    let tokenizer = Tokenizer::load(cx.out()).unwrap();
    assert!(tokenizer.vocab_size() < 290, "{}", tokenizer.vocab_size());
    assert_eq!(tokenizer.encode("zebra").unwrap().len(), 1);
    assert_eq!(
        chat_template(cx.out()).unwrap().as_deref(),
        Some("<|im_start|>")
    );
    let weights = Weights::open(cx.out()).unwrap();
    assert!(weights.sharded() && weights.files().len() > 3);
}

#[test]
fn a_tokenizer_is_taken_from_another_model() {
    let folder = tempfile::tempdir().unwrap();
    datasets(folder.path());
    let cx = context(folder.path(), "new");
    let taken = stage("tokenizer: other, tie_word_embeddings: true");
    assert_eq!(taken.check(), []);
    taken.run(&cx).unwrap();
    let config = Arch::read(cx.out()).unwrap();
    assert_eq!((config.vocab_size, config.pad_token_id), (1024, Some(1023)));
    let golden = golden::folder("model");
    for name in [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ] {
        let read = |folder: &Path| fs::read(folder.join(name)).unwrap();
        assert!(read(cx.out()) == read(&golden), "{name}");
    }
    let text = fs::read_to_string(cx.out().join(GENERATION_CONFIG)).unwrap();
    let generation: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(generation["eos_token_id"], json!([1019, 1022]));

    let small = stage("tokenizer: other, vocab_size: 1000");
    let error = small.run(&context(folder.path(), "small")).unwrap_err();
    assert!(error.to_string().contains("1024 tokens"), "{error}");
}

#[test]
fn a_dataset_without_texts_is_told() {
    let folder = tempfile::tempdir().unwrap();
    datasets(folder.path());
    let batch =
        RecordBatch::try_from_iter([("id", Arc::new(StringArray::from(vec!["a"])) as ArrayRef)])
            .unwrap();
    let strings = folder.path().join("strings");
    let mut writer = Writer::create(&strings, "train", batch.schema()).unwrap();
    writer.write(&batch).unwrap();
    writer.finish().unwrap();
    let run = |text: &str| {
        stage(text)
            .run(&context(folder.path(), "new"))
            .unwrap_err()
            .to_string()
    };
    let error = run("dataset: strings, vocab_size: 400");
    assert!(
        error.contains("no column of texts") && error.contains("messages"),
        "{error}"
    );
    let error = run("dataset: messages, vocab_size: 400, split: test");
    assert!(error.contains("no split `test`"), "{error}");
    let error = run("dataset: messages, vocab_size: 100");
    assert!(error.contains("too small"), "{error}");
}

#[test]
fn rules_between_parameters_are_kept() {
    for (text, parameter) in [
        ("vocab_size: 400", "tokenizer"),
        ("dataset: a, tokenizer: b, vocab_size: 400", "tokenizer"),
        ("dataset: a", "vocab_size"),
        ("tokenizer: b, chat_template: x.jinja", "chat_template"),
        (
            "tokenizer: b, num_key_value_heads: 3",
            "num_key_value_heads",
        ),
        (
            "tokenizer: b, num_key_value_heads: 0",
            "num_key_value_heads",
        ),
        ("tokenizer: b, head_dim: 7", "head_dim"),
        ("tokenizer: b, rope_theta: 0", "rope_theta"),
        ("tokenizer: b, sliding_window: 8", "sliding_window"),
        (
            "tokenizer: b, family: mistral, sliding_window: 0",
            "sliding_window",
        ),
        ("tokenizer: b, max_shard_size: 5", "max_shard_size"),
    ] {
        let problems = crate::engine::check(&stage(text));
        let found: Vec<_> = problems
            .iter()
            .map(|problem| problem.parameter.as_str())
            .collect();
        assert_eq!(found, [parameter], "{text}");
    }
    let odd: CreateModel = serde_yaml::from_str(
        "{tokenizer: b, hidden_size: 30, intermediate_size: 0, num_hidden_layers: 1, num_attention_heads: 4}",
    )
    .unwrap();
    let problems = crate::engine::check(&odd);
    let found: Vec<_> = problems
        .iter()
        .map(|problem| problem.parameter.as_str())
        .collect();
    assert_eq!(found, ["intermediate_size", "hidden_size"]);
    for size in ["0GB", "GB", "-1B"] {
        let mut odd = serde_yaml::from_str::<CreateModel>(
            "{tokenizer: b, hidden_size: 32, intermediate_size: 8, num_hidden_layers: 1, num_attention_heads: 4}",
        )
        .unwrap();
        assert_eq!(odd.check(), []);
        odd.max_shard_size = size.into();
        assert_eq!(odd.check()[0].parameter, "max_shard_size", "{size}");
    }
}
