//! The stage on the golden model: its file, its `Modelfile`, its notes and its refusals.

use super::*;
use crate::ml::gguf::Value;
use crate::ml::testing::golden;

fn stage(text: &str) -> ExportGguf {
    serde_yaml::from_str(text).unwrap()
}

#[test]
fn a_model_becomes_a_file_with_its_tokens_and_a_modelfile() {
    let folder = tempfile::tempdir().unwrap();
    let model = golden::folder("model");
    let cx = Context::for_test(folder.path(), &[("base", &model)], &[]);
    stage("{model: base, outtype: q8_0, name: tiny, license: mit, base_model: me/base}")
        .run(&cx)
        .unwrap();
    let file = File::open(&cx.out().join("tiny-Q8_0.gguf")).unwrap();
    let text = |key: &str| file.text(key).unwrap().unwrap().to_owned();
    assert_eq!(text("general.architecture"), "llama");
    assert_eq!(text("general.name"), "tiny");
    assert_eq!(text("general.license"), "mit");
    assert_eq!(
        text("general.base_model.0.repo_url"),
        "https://huggingface.co/me/base"
    );
    assert_eq!(file.unsigned("general.file_type").unwrap(), Some(7));
    assert_eq!(text("tokenizer.ggml.pre"), "llama-bpe");
    let tokenizer = crate::stages::text::tokenizers::load(&model).unwrap();
    let id = |text: &str| Some(u64::from(tokenizer.token(text).unwrap().id));
    assert_eq!(
        file.unsigned("tokenizer.ggml.bos_token_id").unwrap(),
        id("<|begin_of_text|>")
    );
    assert_eq!(
        file.metadata().get("tokenizer.ggml.add_bos_token"),
        Some(&Value::Bool(true))
    );
    let modelfile = fs::read_to_string(cx.out().join("Modelfile")).unwrap();
    assert!(
        modelfile.starts_with("FROM ./tiny-Q8_0.gguf\n"),
        "{modelfile}"
    );
    let notes = cx.notes.lock().unwrap().clone();
    let number = |name: &str| notes[name].as_f64().unwrap();
    assert!(number("logit_difference") <= number("logit_difference_allowed"));
    assert!(number("kl_divergence") < 0.01);
    assert!(number("compared_logits_of_tokens") >= 24.);
    // Nothing of the comparison is left behind.
    assert_eq!(fs::read_dir(cx.scratch().unwrap()).unwrap().count(), 0);
}

#[test]
fn a_chat_template_is_in_the_file_and_in_the_modelfile() {
    let source = golden::folder("model");
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    fs::create_dir(&model).unwrap();
    for entry in fs::read_dir(&source).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), model.join(entry.file_name())).unwrap();
    }
    let export = |template: &str| {
        fs::write(model.join("chat_template.jinja"), template).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let cx = Context::for_test(folder.path(), &[("base", &model)], &[]);
        stage("{model: base, outtype: f16}").run(&cx).unwrap();
        let path = cx.out().join("model-F16.gguf");
        let file = File::open(&path).unwrap();
        assert_eq!(
            file.text("tokenizer.chat_template").unwrap(),
            Some(template)
        );
        fs::read_to_string(cx.out().join("Modelfile")).unwrap()
    };
    let llama3 = export(crate::text::template::LLAMA3);
    assert!(
        llama3.contains(
            "TEMPLATE \"\"\"{{ if .System }}<|start_header_id|>system<|end_header_id|>\n\n"
        ),
        "{llama3}"
    );
    assert!(
        llama3.contains("PARAMETER stop \"<|eot_id|>\"\n"),
        "{llama3}"
    );
    let other = export("{% for m in messages %}{{ loop.index }}{{ m['content'] }}{% endfor %}");
    assert!(!other.contains("TEMPLATE"), "{other}");
}

#[test]
fn wrong_settings_are_told_before_anything_runs() {
    for name in ["", "a/b", "..", ".hidden", "a b"] {
        let problems = stage(&format!("{{model: base, name: '{name}'}}")).check();
        assert_eq!(problems[0].parameter, "name", "{name}");
    }
    assert_eq!(stage("{model: base, name: My-Model_1.5}").check(), []);
    assert_eq!(stage("{model: base}").outtype, Outtype::Q4_K_M);
    let error = serde_yaml::from_str::<ExportGguf>("{model: base, outtype: q3_k}").unwrap_err();
    assert!(error.to_string().contains("q4_k_m"), "{error}");
}

#[test]
fn what_makes_no_useful_file_is_refused() {
    let fails = |model: &Path| {
        let folder = tempfile::tempdir().unwrap();
        let cx = Context::for_test(folder.path(), &[("base", model)], &[]);
        format!("{:#}", stage("{model: base}").run(&cx).unwrap_err())
    };
    let error = fails(&golden::folder("model_nf4"));
    assert!(
        error.contains("4 bits") && error.contains("merge"),
        "{error}"
    );
    let folder = tempfile::tempdir().unwrap();
    let bare = folder.path().join("bare");
    golden::altered("model", &bare, |_| {});
    fs::remove_file(bare.join("tokenizer.json")).unwrap();
    let error = fails(&bare);
    assert!(error.contains("tokenizer.json"), "{error}");
}
