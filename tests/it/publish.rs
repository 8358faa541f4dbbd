//! `publish` by the real program, against the hub of the tests.

use serde_json::Value;

use crate::support::hub::{HubServer, READER, TOKEN};
use crate::support::program::{Project, copy, repository};

const RECIPE: &str = r"
version: 1
vars: { hub_token: hf_never_tell_this_to_anybody }
stages:
  pairs: { import_dataset: { path: rows.jsonl } }
  base: { download_model: { repo: some/base } }
  chats: { apply_chat_template: { dataset: pairs, tokenizer: base } }
  tokens: { tokenize: { dataset: chats, tokenizer: base, max_length: 192 } }
  lora: { attach_lora: { model: base, r: 4, lora_alpha: 8, target_modules: [q_proj, v_proj], seed: 3 } }
  tuned: { train_orpo: { model: base, adapter: lora, dataset: tokens, max_steps: 1, seed: 1 } }
  scores: { evaluate: { model: base, adapter: tuned, dataset: tokens, split: train, num_answers: 0 } }
  merged: { merge: { model: base, adapter: tuned } }
publish:
  merged: { repo: me/merged, private: true }
";

/// A project that has run, and its hub.
fn scene() -> (Project, HubServer) {
    let hub = HubServer::start();
    let golden = repository().join("tests/golden");
    let read = |name: &str| std::fs::read(golden.join("model").join(name)).unwrap();
    let names = [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ];
    let mut files: Vec<(&str, Vec<u8>)> = names.iter().map(|name| (*name, read(name))).collect();
    files.push(("README.md", b"---\nlicense: llama3\n---\n# Base\n".to_vec()));
    let files: Vec<(&str, &[u8])> = files
        .iter()
        .map(|(name, bytes)| (*name, bytes.as_slice()))
        .collect();
    hub.model("some/base", &files);
    let mut project = Project::empty();
    let rows = std::fs::read_to_string(golden.join("rows.jsonl")).unwrap();
    let rows: Vec<&str> = rows.lines().take(4).collect();
    project.write("rows.jsonl", &(rows.join("\n") + "\n"));
    project.write("recipe.yaml", RECIPE);
    project.variable("HF_ENDPOINT", &hub.endpoint);
    project.variable("HF_TOKEN", TOKEN);
    (project, hub)
}

fn text(files: &std::collections::BTreeMap<String, Vec<u8>>, name: &str) -> String {
    String::from_utf8(files[name].clone()).unwrap()
}

#[test]
fn a_result_goes_to_the_hub_with_its_card_and_comes_back() {
    let (project, hub) = scene();
    let early = project.run(&["publish", "recipe.yaml", "tuned", "--repo", "me/tuned"]);
    assert!(
        early.code == Some(1) && early.stderr.contains("not up to date"),
        "{}",
        early.stderr
    );
    project.succeeds(&["run", "recipe.yaml"]);

    let dry = project.succeeds(&[
        "publish",
        "recipe.yaml",
        "tuned",
        "--repo",
        "me/tuned",
        "--dry-run",
    ]);
    assert!(
        dry.contains("adapter_model.safetensors") && dry.contains("license: llama3"),
        "{dry}"
    );
    assert!(hub.files("models/me/tuned", "main").is_none());

    let told = project.succeeds(&["publish", "recipe.yaml", "tuned", "--repo", "me/tuned"]);
    assert!(told.contains("published `tuned`: "), "{told}");
    let files = hub.files("models/me/tuned", "main").unwrap();
    let card = text(&files, "README.md");
    for piece in [
        "license: llama3",
        "base_model: some/base",
        "base_model_relation: adapter",
        "library_name: peft",
        "pipeline_tag: text-generation",
        "- orpo",
        "- lora",
        "PeftModel.from_pretrained(model, \"me/tuned\")",
        "| learning_rate |",
        "| lora_alpha | 8 |",
        "## Evaluation",
        "| rewards/accuracies |",
        "max_steps: 1",
    ] {
        assert!(card.contains(piece), "{piece}: {card}");
    }
    assert!(
        !card.contains("hf_never") && !card.contains(TOKEN),
        "{card}"
    );
    let config: Value = serde_json::from_slice(&files["adapter_config.json"]).unwrap();
    assert_eq!(config["base_model_name_or_path"], "some/base");

    // Nothing is sent twice.
    let again = project.succeeds(&["publish", "recipe.yaml", "tuned", "--repo", "me/tuned"]);
    assert!(again.contains("nothing was sent"), "{again}");
    assert_eq!(hub.commits("models/me/tuned"), 2);

    // What the recipe's section says, as JSON.
    let done: Value =
        serde_json::from_str(&project.succeeds(&["publish", "recipe.yaml", "--json"])).unwrap();
    assert_eq!(done[0]["repo"], "me/merged");
    assert!(hub.is_private("models/me/merged"));
    let merged = text(&hub.files("models/me/merged", "main").unwrap(), "README.md");
    assert!(
        merged.contains("library_name: transformers")
            && merged.contains("base_model_relation: finetune"),
        "{merged}"
    );
    assert!(merged.contains("## Evaluation"), "{merged}");

    // Both can be fetched, and belong together.
    project.write(
        "again.yaml",
        "version: 1\nstages:\n  base: { download_model: { repo: some/base } }\n  tuned: { download_adapter: { repo: me/tuned } }\n  \
         merged: { merge: { model: base, adapter: tuned } }\n  whole: { download_model: { repo: me/merged } }\n",
    );
    project.succeeds(&["run", "again.yaml"]);
    let digest = |recipe: &str, stage: &str| project.artifacts(&[recipe])[stage].clone();
    assert_eq!(
        digest("again.yaml", "merged"),
        digest("recipe.yaml", "merged")
    );
}

#[test]
fn a_card_that_people_wrote_stays() {
    let (project, hub) = scene();
    project.succeeds(&["run", "recipe.yaml", "tuned"]);
    let publish = ["publish", "recipe.yaml", "tuned", "--repo", "me/tuned"];
    project.succeeds(&publish);
    let made = hub.files("models/me/tuned", "main").unwrap();
    let edited = text(&made, "README.md").replace("# tuned", "# My tuned model");
    let all: Vec<(&str, &[u8])> = made
        .iter()
        .map(|(name, bytes)| match name.as_str() {
            "README.md" => (name.as_str(), edited.as_bytes()),
            name => (name, bytes.as_slice()),
        })
        .collect();
    hub.commit("models/me/tuned", "main", &all);
    let ended = project.run(&publish);
    assert!(
        ended.code == Some(0) && ended.stderr.contains("--overwrite-card"),
        "{ended:?}"
    );
    assert_eq!(
        text(&hub.files("models/me/tuned", "main").unwrap(), "README.md"),
        edited
    );
    // One that was made here and not changed follows what it tells of.
    project.succeeds(&[&publish[..], &["--overwrite-card"]].concat());
    project.succeeds(&["run", "recipe.yaml", "scores"]);
    project.succeeds(&publish);
    let card = text(&hub.files("models/me/tuned", "main").unwrap(), "README.md");
    assert!(
        card.contains("## Evaluation") && !card.contains("My tuned"),
        "{card}"
    );
}

#[test]
fn folders_and_data_can_be_published() {
    let (project, hub) = scene();
    copy(
        &repository().join("tests/golden/model"),
        &project.path("out"),
    );
    let unlicensed = project.run(&["publish", "out", "--repo", "me/out"]);
    assert!(
        unlicensed.code == Some(2) && unlicensed.stderr.contains("--license"),
        "{}",
        unlicensed.stderr
    );
    assert!(hub.files("models/me/out", "main").is_none());
    project.write("out/.secret", "x");
    project.succeeds(&[
        "publish",
        "out",
        "--repo",
        "me/out",
        "--license",
        "mit",
        "--revision",
        "v1",
    ]);
    let files = hub.files("models/me/out", "v1").unwrap();
    assert!(files.contains_key("model.safetensors") && !files.contains_key(".secret"));
    assert!(text(&files, "README.md").contains("license: mit"));

    project.succeeds(&["run", "recipe.yaml", "pairs"]);
    project.succeeds(&[
        "publish",
        "recipe.yaml",
        "pairs",
        "--repo",
        "me/pairs",
        "--create-pr",
    ]);
    assert!(hub.files("datasets/me/pairs", "main").unwrap().len() == 1);
    let files = hub.files("datasets/me/pairs", "refs/pr/1").unwrap();
    assert!(
        files.keys().any(|name| name.ends_with(".parquet")),
        "{:?}",
        files.keys()
    );
}

#[test]
fn what_can_not_be_published_says_why() {
    let (mut project, hub) = scene();
    project.succeeds(&["run", "recipe.yaml", "tuned"]);
    project.refuses(
        &["publish", "recipe.yaml", "tokens", "--repo", "me/x"],
        "no repositories for",
    );
    project.refuses(&["publish", "recipe.yaml", "tuned"], "--repo OWNER/NAME");
    project.refuses(&["publish", "recipe.yaml", "merged"], "not up to date");
    project.refuses(&["publish", "recipe.yaml", "tuned", "--repo", "x"], "owner");
    project.refuses(
        &[
            "publish",
            "recipe.yaml",
            "tuned",
            "--repo",
            "me/x",
            "--license",
            "my own",
        ],
        "license",
    );
    project.refuses(
        &["publish", "recipe.yaml", "tuned", "--repo", "openai/x"],
        "(403)",
    );
    project.refuses(
        &[
            "publish",
            "recipe.yaml",
            "tuned",
            "--repo",
            "me/x",
            "--offline",
        ],
        "--offline",
    );
    project.variable("HF_TOKEN", READER);
    project.refuses(
        &["publish", "recipe.yaml", "tuned", "--repo", "me/x"],
        "write",
    );
    assert!(hub.files("models/me/x", "main").is_none());

    for (section, piece) in [
        ("publish: { tund: { repo: me/x } }", "did you mean `tuned`"),
        ("publish: { tokens: { repo: me/x } }", "has no repositories"),
        ("publish: { tuned: { repo: x } }", "owner/name"),
        ("publish: { tuned: { private: true } }", "no `repo`"),
        (
            "publish: { tuned: { repo: me/x, privat: true } }",
            "did you mean `private`",
        ),
        ("publish: { tuned: me/x }", "must be a map"),
        (
            "publish: { tuned: { repo: me/x, private: maybe } }",
            "true or false",
        ),
    ] {
        let (head, _) = RECIPE.split_once("publish:").unwrap();
        project.write("bad.yaml", &format!("{head}{section}\n"));
        let ended = project.run(&["validate", "bad.yaml"]);
        assert!(
            ended.code == Some(2) && ended.stderr.contains(piece),
            "{section}: {}",
            ended.stderr
        );
    }
}
