//! What a model folder holds beside its weights, and the headers of those.

use std::fmt::Write as _;
use std::fs;

use serde_json::{Value, json};

use super::{Attack, run};
use crate::support::program::{Project, copy, repository};

const PAIRS: &str = "  pairs: { import_dataset: { path: row.jsonl } }\n  \
    chats: { apply_chat_template: { dataset: pairs, chat_template: \"{% for m in messages %}{{ m.content }}{% endfor %}\" } }\n";

/// A project with the golden model under each name, with something of it changed.
struct Models {
    project: Project,
    before: String,
    attacks: Vec<Attack>,
}

impl Models {
    fn new() -> Self {
        let project = Project::empty();
        let text = format!("{}!", "x".repeat(50));
        project.write(
            "row.jsonl",
            &format!("{}\n", json!({"prompt": text, "chosen": "b"})),
        );
        Self {
            project,
            before: PAIRS.to_owned(),
            attacks: Vec::new(),
        }
    }

    fn folder(&self, name: &str) -> std::path::PathBuf {
        let folder = self.project.path(name);
        copy(&repository().join("tests/golden/model"), &folder);
        folder
    }

    /// A model whose import has to fail with the words.
    fn model(&mut self, name: &str, file: &str, bytes: &[u8], words: &'static str) {
        fs::write(self.folder(name).join(file), bytes).unwrap();
        self.attacks.push(Attack::new(
            name,
            format!("{{ import_model: {{ path: {name} }} }}"),
            words,
        ));
    }

    /// A model whose tokenizer has to make `tokenize` fail with the words.
    fn tokenizer(&mut self, name: &str, change: impl FnOnce(&mut Value), words: &'static str) {
        let path = self.folder(name).join("tokenizer.json");
        let mut json: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut json);
        fs::write(path, json.to_string()).unwrap();
        let _ = writeln!(
            self.before,
            "  m_{name}: {{ import_model: {{ path: {name} }} }}"
        );
        self.attacks.push(Attack::new(
            name,
            format!("{{ tokenize: {{ dataset: chats, tokenizer: m_{name} }} }}"),
            words,
        ));
    }
}

#[test]
fn tokenizers_end_one_stage() {
    let mut models = Models::new();
    let precompiled = |map: &str| json!({"type": "Precompiled", "precompiled_charsmap": map});
    for (name, map, words) in [
        ("no_map", "", "gave up"),
        ("short_map", "AAAA", "gave up"),
        ("map_of_zeros", "AAAAAAAAAAAAAAAAAAAA", "gave up"),
        ("long_trie", "/////w==", "needed more memory"),
        (
            "long_trie_and_more",
            "/P///wAAAAAAAAAAAAAAAAAAAAAAAAAA",
            "needed more memory",
        ),
        ("wild_trie", "CAAAAP///////////////w==", "gave up"),
    ] {
        models.tokenizer(name, |json| json["normalizer"] = precompiled(map), words);
    }
    let split = |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
    for (name, regex, words) in [
        ("backtracking", "(x+x+)+y", "retry-limit"),
        ("more_backtracking", "(x|x)*y", ""),
        (
            "repeats",
            "((((x{1,1000}){1,1000}){1,1000}){1,1000}){1,1000}",
            "",
        ),
        ("brackets", &"(".repeat(100_000), "parse depth"),
        (
            "closed_brackets",
            &format!("{}x{}", "(".repeat(50_000), ")".repeat(50_000)),
            "parse depth",
        ),
        ("recursion", "(?<a>\\g<a>x|y)", "never ending recursion"),
        ("looks_behind", "(?<=x{1,100000})y", ""),
    ] {
        models.tokenizer(name, |json| json["pre_tokenizer"] = split(regex), words);
    }
    models.tokenizer(
        "post_processor",
        |json| {
            json["post_processor"] = json!({"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "nobody", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [], "special_tokens": {}});
        },
        "",
    );
    models.tokenizer(
        "empty_post_processor",
        |json| {
            json["post_processor"] = json!({"type": "TemplateProcessing", "single": [], "pair": [],
                "special_tokens": {"a": {"id": "a", "ids": [], "tokens": []}}});
        },
        "",
    );
    models.tokenizer(
        "ids",
        |json| json["added_tokens"][0]["id"] = json!(u32::MAX),
        "",
    );
    models.tokenizer(
        "vocab",
        |json| json["model"]["vocab"]["!"] = json!(u32::MAX),
        "above 2^31",
    );
    models.tokenizer(
        "unigram",
        |json| {
            json["model"] = json!({"type": "Unigram", "unk_id": 4_000_000_000_u64, "vocab": [["a", 0.0]], "byte_fallback": true});
        },
        "UnkIdNotInVocabulary",
    );
    models.tokenizer(
        "no_unigram",
        |json| json["model"] = json!({"type": "Unigram", "unk_id": null, "vocab": []}),
        "unk_id",
    );
    models.tokenizer(
        "merges",
        |json| json["model"]["merges"] = json!([["nobody", "no"]]),
        "out of vocabulary",
    );
    models.tokenizer(
        "nested",
        |json| {
            let nested = (0..120).fold(
                json!({"type": "NFC"}),
                |inner, _| json!({"type": "Sequence", "normalizers": [inner]}),
            );
            json["normalizer"] = nested;
        },
        "recursion limit",
    );
    let Models {
        project,
        before,
        attacks,
    } = models;
    run(&project, &before, &attacks);
}

#[test]
fn model_folders_are_checked_before_they_are_used() {
    let mut models = Models::new();
    let header = |json: &str| [&(json.len() as u64).to_le_bytes(), json.as_bytes()].concat();
    let tensor = |offsets: &str| {
        header(&format!(
            "{{\"a\":{{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":{offsets}}}}}"
        ))
    };
    for (name, bytes, words) in [
        ("no_header", vec![], "shorter than a header"),
        (
            "long_header",
            u64::MAX.to_le_bytes().to_vec(),
            "announces a header",
        ),
        (
            "header_of_4_gb",
            (1_u64 << 32).to_le_bytes().to_vec(),
            "announces a header",
        ),
        (
            "outside",
            tensor("[0,4000000000000]"),
            "the bytes 0 to 4000000000000",
        ),
        (
            "overflowing",
            tensor("[18446744073709551615,3]"),
            "the bytes 18446744073709551615 to 3",
        ),
        ("backwards", tensor("[4,0]"), "the bytes 4 to 0"),
        ("negative", tensor("[-4,0]"), "nothing usable"),
        ("no_data", tensor("[0,4]"), "was it cut off"),
        (
            "nested_header",
            header(&format!(
                "{{\"a\":{}{}}}",
                "[".repeat(10_000),
                "]".repeat(10_000)
            )),
            "recursion limit",
        ),
        (
            "shape",
            header(
                "{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296,4],\"data_offsets\":[0,0]}}",
            ),
            "4294967296",
        ),
    ] {
        models.model(name, "model.safetensors", &bytes, words);
    }
    let deep = format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000));
    models.model(
        "config",
        "config.json",
        deep.as_bytes(),
        "`config.json` is broken",
    );
    models.model(
        "list_config",
        "config.json",
        b"[]",
        "`config.json` is broken",
    );
    models.model("tokenizer", "tokenizer.json", deep.as_bytes(), "");
    let Models {
        project, attacks, ..
    } = models;
    run(&project, "", &attacks);
}

#[test]
fn odd_templates_of_tokenizers_are_told() {
    let mut models = Models::new();
    let mut template = |name: &str, config: &str, words: &'static str| {
        let folder = models.folder(name);
        fs::remove_file(folder.join("chat_template.jinja")).unwrap();
        fs::write(folder.join("tokenizer_config.json"), config).unwrap();
        let _ = writeln!(
            models.before,
            "  m_{name}: {{ import_model: {{ path: {name} }} }}"
        );
        models.attacks.push(Attack::new(
            name,
            format!("{{ apply_chat_template: {{ dataset: pairs, tokenizer: m_{name} }} }}"),
            words,
        ));
    };
    template("number", "{\"chat_template\": 3}", "no chat template");
    template(
        "empty_list",
        "{\"chat_template\": []}",
        "none called `default`",
    );
    template(
        "list_of_lists",
        "{\"chat_template\": [[[]]]}",
        "none called `default`",
    );
    template(
        "nameless",
        "{\"chat_template\": [{\"template\": \"x\"}]}",
        "none called `default`",
    );
    template(
        "no_text",
        "{\"chat_template\": [{\"name\": \"default\", \"template\": 3}]}",
        "none called `default`",
    );
    template(
        "minus",
        &json!({"chat_template": format!("{{{{ {}1 }}}}", "-".repeat(50_000))}).to_string(),
        "nested too deeply",
    );
    let deep = format!(
        "{{\"chat_template\": {}{}}}",
        "[".repeat(10_000),
        "]".repeat(10_000)
    );
    template("nested", &deep, "tokenizer_config.json");
    template(
        "long",
        &json!({"chat_template": "x".repeat(2 << 20)}).to_string(),
        "the limit is 1 MiB",
    );
    template("no_json", "{", "tokenizer_config.json");
    let Models {
        project,
        before,
        attacks,
    } = models;
    run(&project, &before, &attacks);
}
