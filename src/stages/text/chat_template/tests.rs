//! Tests of the chat template's way.

use std::path::PathBuf;

use super::*;
use crate::engine::{Level, Stage};
use crate::ml::generation_config::stop_ids;
use crate::ml::testing::golden;
use crate::stages::model::merge::Merge;
use crate::stages::train::tests::write_tokens;
use crate::stages::train::train_sft::TrainSft;
use crate::text::template::message;
use crate::text::template::{ChatTemplate, LLAMA3, LONGEST};
use crate::text::tokenizer::special_tokens;

/// Another way of speaking than the golden model's.
const OTHER: &str = "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token if message.role == 'user' else '<|eot_id|>' }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

fn json_in(folder: &Path, name: &str) -> Value {
    serde_json::from_slice(&fs::read(folder.join(name)).unwrap()).unwrap()
}

/// The golden model and adapter, changed by `change`; merged, and what was told.
fn merged(change: &dyn Fn(&Path, &Path)) -> (tempfile::TempDir, PathBuf, Vec<String>) {
    let folder = tempfile::tempdir().unwrap();
    let (model, adapter) = (folder.path().join("model"), folder.path().join("adapter"));
    copy(&golden::folder("model"), &model);
    copy(&golden::folder("adapter_final"), &adapter);
    change(&model, &adapter);
    let inputs = [("base", model.as_path()), ("tuned", adapter.as_path())];
    let cx = Context::for_test(folder.path(), &inputs, &[]);
    let stage: Merge = serde_yaml::from_str("{model: base, adapter: tuned}").unwrap();
    stage.run(&cx).unwrap();
    assert_eq!(cx.messages(Level::Warning), [] as [String; 0]);
    let out = cx.out().to_path_buf();
    (folder, out, cx.messages(Level::Info))
}

#[test]
fn the_merged_model_speaks_as_the_adapter_was_trained() {
    let (_folder, out, messages) = merged(&|model, adapter| {
        write(OTHER, adapter).unwrap();
        fs::create_dir(model.join(NAMED)).unwrap();
        fs::write(model.join(NAMED).join("tool_use.jinja"), "t").unwrap();
        fs::write(model.join("chat_template.json"), "{}").unwrap();
    });
    assert_eq!(fs::read_to_string(out.join(FILE)).unwrap(), OTHER);
    // Nowhere else does another one stand; all other settings of the tokenizer stay.
    let mut kept = json_in(&golden::folder("model"), TOKENIZER_CONFIG);
    kept.as_object_mut()
        .unwrap()
        .remove("chat_template")
        .unwrap();
    assert_eq!(json_in(&out, TOKENIZER_CONFIG), kept);
    assert!(!out.join(NAMED).exists() && !out.join("chat_template.json").exists());
    assert_eq!(chat_template(&out).unwrap().as_deref(), Some(OTHER));
    // The token behind the user's turn ends no answer.
    let mut config = json_in(&golden::folder("model"), GENERATION_CONFIG);
    assert_eq!(config["eos_token_id"], 1019);
    config["eos_token_id"] = json!([1019, 1022]);
    assert_eq!(json_in(&out, GENERATION_CONFIG), config);
    assert_eq!(messages.len(), 1, "{messages:?}");
    assert!(
        messages[0].contains(FILE)
            && messages[0].contains("`<|eot_id|>`")
            && messages[0].contains(GENERATION_CONFIG),
        "{messages:?}"
    );
    // What transformers prints for the merged folder (tests/python/check_formats.py holds both against each other).
    let template = ChatTemplate::new(OTHER, special_tokens(&out).unwrap(), None).unwrap();
    let chat = [
        message("user", "Why?"),
        message("assistant", "So."),
        message("user", "Oh."),
    ];
    let expected = "user: Why?<|end_of_text|>\nassistant: So.<|eot_id|>\nuser: Oh.<|end_of_text|>\nassistant: ";
    assert_eq!(template.render(&chat, true).unwrap(), expected);
}

#[test]
fn what_says_the_same_stays_to_the_byte() {
    let same = |out: &Path, name: &str| {
        let read = |folder: &Path| fs::read(folder.join(name)).unwrap();
        assert!(read(out) == read(&golden::folder("model")), "{name}");
    };
    // Without a template beside the adapter.
    let (_folder, out, messages) = merged(&|_, _| ());
    for name in [FILE, TOKENIZER_CONFIG, GENERATION_CONFIG] {
        same(&out, name);
    }
    assert_eq!(messages, [] as [String; 0]);
    // With the model's own one, whose answers end with a token that no generation stopped at.
    let (_folder, out, messages) = merged(&|model, adapter| carry(model, adapter).unwrap());
    for name in [FILE, TOKENIZER_CONFIG] {
        same(&out, name);
    }
    assert_eq!(
        json_in(&out, GENERATION_CONFIG)["eos_token_id"],
        json!([1019, 1022])
    );
    assert!(
        messages.len() == 1 && !messages[0].contains(FILE),
        "{messages:?}"
    );
    // An older place that says something else contradicts.
    let (_folder, out, _) = merged(&|model, adapter| {
        write(LLAMA3, model).unwrap();
        write(LLAMA3, adapter).unwrap();
    });
    assert!(
        json_in(&out, TOKENIZER_CONFIG)
            .get("chat_template")
            .is_none()
    );
}

#[test]
fn a_stop_token_is_added_where_it_is_missing_and_not_made_up() {
    let stops = |change: &dyn Fn(&Path), template: &str| {
        let (_folder, out, messages) = merged(&|model, adapter| {
            write(template, adapter).unwrap();
            change(model);
        });
        let file = out.join(GENERATION_CONFIG);
        let config = file
            .is_file()
            .then(|| json_in(&out, GENERATION_CONFIG)["eos_token_id"].clone());
        (config, messages.join(" "))
    };
    let set = |eos: Value| {
        move |model: &Path| {
            let mut config = json_in(model, GENERATION_CONFIG);
            config["eos_token_id"] = eos.clone();
            fs::write(model.join(GENERATION_CONFIG), config.to_string()).unwrap();
        }
    };
    assert_eq!(
        stops(&set(json!([1022, 7])), LLAMA3).0,
        Some(json!([1022, 7]))
    );
    assert_eq!(stops(&set(json!(1022)), LLAMA3).0, Some(json!(1022)));
    // Nothing there: transformers takes the model's.
    assert_eq!(
        stops(&set(Value::Null), LLAMA3).0,
        Some(json!([1019, 1022]))
    );
    let gone = |model: &Path| fs::remove_file(model.join(GENERATION_CONFIG)).unwrap();
    assert_eq!(stops(&gone, LLAMA3).0, Some(json!([1019, 1022])));
    let (eos, messages) = stops(
        &gone,
        "{% for m in messages %}{{ m.content }}\n{% endfor %}",
    );
    assert!(
        eos.is_none() && messages.contains("no token"),
        "{eos:?} {messages}"
    );
    // A model without a tokenizer.
    let bare = |model: &Path| fs::remove_file(model.join("tokenizer.json")).unwrap();
    assert_eq!(stops(&bare, LLAMA3).0, Some(json!(1019)));
}

#[test]
fn a_template_that_cannot_be_rendered_is_no_obstacle() {
    let folder = tempfile::tempdir().unwrap();
    let cx = Context::for_test(folder.path(), &[], &[]);
    copy(&golden::folder("model"), cx.out());
    install(&cx, "{% for %}").unwrap();
    let warned = cx.messages(Level::Warning);
    assert!(
        warned.len() == 1 && warned[0].contains("could not be found"),
        "{warned:?}"
    );
    assert_eq!(read(cx.out()).unwrap().as_deref(), Some("{% for %}"));
    // Far too long a one is an error before it is read.
    fs::write(cx.out().join(FILE), vec![b' '; LONGEST + 1]).unwrap();
    assert!(read(cx.out()).unwrap_err().to_string().contains("1 MiB"));
}

#[test]
fn an_imported_adapter_brings_its_template() {
    let import = |files: &[(&str, &str)]| {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("source");
        copy(&golden::folder("adapter_init"), &source);
        for (name, text) in files {
            fs::write(source.join(name), text).unwrap();
        }
        let cx = Context::for_test(folder.path(), &[], &[("a", &source)]);
        let stage: crate::stages::adapter::import_adapter::ImportAdapter =
            serde_yaml::from_str("{path: a}").unwrap();
        stage.run(&cx).unwrap();
        (read(cx.out()).unwrap(), cx.messages(Level::Warning).len())
    };
    assert_eq!(import(&[]), (None, 0));
    assert_eq!(
        import(&[(FILE, LLAMA3)]),
        (Some(without_comments(LLAMA3)), 0)
    );
    // As older versions of TRL saved it.
    assert_eq!(
        import(&[(TOKENIZER_CONFIG, r#"{"chat_template": "t"}"#)]),
        (Some("t".to_owned()), 0)
    );
    assert_eq!(import(&[(TOKENIZER_CONFIG, "{")]), (None, 1));
}

#[test]
fn generation_stops_where_the_template_ends_answers() {
    let folder = tempfile::tempdir().unwrap();
    let cx = Context::for_test(folder.path(), &[], &[]);
    let model = golden::folder("model");
    assert_eq!(stop_token(&cx, cx.out(), &model).unwrap(), None);
    write(LLAMA3, cx.out()).unwrap();
    let stop = stop_token(&cx, cx.out(), &model).unwrap().unwrap();
    let config = crate::ml::model::arch::Arch::read(&model).unwrap();
    let known = stop_ids(&model, &config).unwrap();
    assert!(stop.id == 1022 && !known.contains(&1022), "{known:?}");
}

#[test]
fn a_training_takes_the_template_of_its_rows() {
    let folder = tempfile::tempdir().unwrap();
    let tokens = folder.path().join("tokens");
    fs::create_dir(&tokens).unwrap();
    write_tokens(&tokens);
    write(OTHER, &tokens).unwrap();
    let (model, adapter) = (golden::folder("model"), golden::folder("adapter_init"));
    let inputs = [
        ("model", model.as_path()),
        ("adapter", adapter.as_path()),
        ("tokens", tokens.as_path()),
    ];
    let trained = |name: &str, more: &str| {
        let cx = Context::for_test(&folder.path().join(name), &inputs, &[]);
        let yaml = format!(
            "{{model: model, dataset: tokens, max_steps: 1, per_device_train_batch_size: 1{more}}}"
        );
        let stage: TrainSft = serde_yaml::from_str(&yaml).unwrap();
        stage.run(&cx).unwrap();
        assert_eq!(read(cx.out()).unwrap().as_deref(), Some(OTHER));
        cx
    };
    let cx = trained("full", "");
    assert!(
        json_in(cx.out(), TOKENIZER_CONFIG)
            .get("chat_template")
            .is_none()
    );
    assert_eq!(
        json_in(cx.out(), GENERATION_CONFIG)["eos_token_id"],
        json!([1019, 1022])
    );
    assert_eq!(
        cx.messages(Level::Info)
            .iter()
            .filter(|text| text.contains(FILE))
            .count(),
        1
    );
    let cx = trained("adapter", ", adapter: adapter");
    crate::ml::adapter::Adapter::load(cx.out()).unwrap();
    assert!(!cx.out().join(GENERATION_CONFIG).exists());
}
