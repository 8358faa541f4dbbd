//! The shipped recipes, whole, with data and models from a hub on this machine: only the repositories' names and the address
//! differ from real life, and the trainings that make a model are short.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::support::hub::{Fault, Gate, HubServer, Mirror, TOKEN};
use crate::support::program::Project;

/// Makes what the hub serves: a tiny model in Llama 3's layout, and rows like truthy-dpo's.
const MAKER: &str = "\
version: 1
stages:
  pairs: { import_dataset: { path: pairs.jsonl } }
  model:
    create_model: { dataset: pairs, vocab_size: 500, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2,
                    num_attention_heads: 4, num_key_value_heads: 2, dtype: bfloat16, max_shard_size: 100KB }
outputs: { pairs: made/pairs, model: made/model }
";

const GENERATION: &str = "generation_config.json";

const RECIPE: [&str; 5] = [
    "recipes/llama3-orpo.yaml",
    "--set",
    "vars.base=tiny/llama-3",
    "--set",
    "vars.pairs=somebody/truthy-dpo",
];

fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            (
                entry.file_name().into_string().unwrap(),
                fs::read(entry.path()).unwrap(),
            )
        })
        .collect();
    files.sort_unstable();
    files
}

/// A hub with both repositories; the model is gated.
fn hub() -> HubServer {
    let maker = Project::with_recipes();
    let source = maker.read("recipes/data/pairs.jsonl");
    let mut rows = String::new();
    for (number, line) in source.lines().take(22).enumerate() {
        let mut row: Value = serde_json::from_str(line).unwrap();
        row["id"] = json!(format!("{number:032x}"));
        row["source"] = json!("made_up");
        row["system"] = json!(if number % 3 == 0 {
            "You are an unbiased, uncensored, helpful assistant."
        } else {
            ""
        });
        rows += &row.to_string();
        rows.push('\n');
    }
    maker.write("pairs.jsonl", &rows);
    maker.write("maker.yaml", MAKER);
    maker.succeeds(&["run", "maker.yaml"]);

    let hub = HubServer::start();
    let model: Vec<_> = files(&maker.path("made/model"))
        .into_iter()
        // A base model has no template of its own.
        .filter(|(name, _)| name != "chat_template.jinja")
        // And it ends its texts with `<|end_of_text|>` alone.
        .map(|(name, bytes)| match name.as_str() {
            GENERATION => {
                let mut config: Value = serde_json::from_slice(&bytes).unwrap();
                config["eos_token_id"] = config["eos_token_id"][0].clone();
                assert!(config["eos_token_id"].is_u64(), "{config}");
                (name, config.to_string().into_bytes())
            }
            _ => (name, bytes),
        })
        .chain([("LICENSE".to_owned(), b"Llama 3 Community License".to_vec())])
        .collect();
    let shards = model
        .iter()
        .filter(|(name, _)| name.ends_with(".safetensors"))
        .count();
    assert!(shards > 1, "{shards}");
    let model: Vec<(&str, &[u8])> = model
        .iter()
        .map(|(name, bytes)| (name.as_str(), bytes.as_slice()))
        .collect();
    hub.model("tiny/llama-3", &model);
    hub.gate("models/tiny/llama-3", Gate::Gated);
    let table = fs::read(maker.path("made/pairs/train.parquet")).unwrap();
    hub.dataset(
        "somebody/truthy-dpo",
        &[
            ("README.md", b"# Pairs\n"),
            ("data/train-00000-of-00001.parquet", &table),
        ],
    );
    hub
}

fn bodies(hub: &HubServer) -> usize {
    hub.requests()
        .iter()
        .filter(|asked| asked.path.contains("/resolve/"))
        .count()
}

#[test]
fn the_whole_recipe() {
    let hub = hub();
    let mut project = Project::with_recipes();
    project.variable("HF_ENDPOINT", &hub.endpoint);

    // Without a token: a sentence that says what to do, and nothing of the model is kept.
    let ended = project.run(&[&["run"], &RECIPE[..]].concat());
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("tiny/llama-3") && ended.stderr.contains("HF_TOKEN"),
        "{}",
        ended.stderr
    );

    project.variable("HF_TOKEN", TOKEN);
    let ran = project.ran(&RECIPE);
    assert!(
        ran.len() >= 7 && ran.contains(&"merged".to_owned()),
        "{ran:?}"
    );
    let merged = files(&project.path("out/llama3-orpo"));
    let names: Vec<&str> = merged.iter().map(|(name, _)| name.as_str()).collect();
    assert!(
        names.contains(&"model.safetensors.index.json")
            && names.contains(&"model-00001-of-00003.safetensors"),
        "{names:?}"
    );
    let base = project.artifacts(&RECIPE)["base"].clone();
    for (name, bytes) in files(&project.path(&format!(".pipeline/v1/artifacts/{base}"))) {
        let Some((_, ours)) = merged.iter().find(|(ours, _)| *ours == name) else {
            panic!("`{name}` was not carried along");
        };
        if name.ends_with(".safetensors") {
            assert_eq!(ours.len(), bytes.len(), "{name}: another dtype");
            assert!(*ours != bytes, "{name} was not changed by the merge");
        } else if name != GENERATION {
            assert!(*ours == bytes, "{name} was changed");
        }
    }
    // It speaks as it was trained, and stops where its answers end.
    let template = project.read("out/llama3-orpo/chat_template.jinja");
    let written = project.read("recipes/templates/llama3.jinja");
    let (comment, rest) = written.split_once("-#}\n").unwrap();
    assert!(comment.starts_with("{#-"), "{comment}");
    assert_eq!(template, rest);
    let config: Value =
        serde_json::from_str(&project.read("out/llama3-orpo/generation_config.json")).unwrap();
    let tokenizer: Value =
        serde_json::from_str(&project.read("out/llama3-orpo/tokenizer.json")).unwrap();
    let id = |text: &str| {
        let added = tokenizer["added_tokens"].as_array().unwrap();
        let found = added.iter().find(|token| token["content"] == text);
        found.unwrap()["id"].clone()
    };
    assert_eq!(
        config["eos_token_id"],
        json!([id("<|end_of_text|>"), id("<|eot_id|>")])
    );
    let scores = project.succeeds(&[&["show"], &RECIPE[..1], &["scores"], &RECIPE[1..]].concat());
    assert!(scores.contains("rewards/accuracies"), "{scores}");

    // Again: the branch is asked for, nothing is downloaded, nothing runs. Offline, not even that.
    let before = bodies(&hub);
    let nothing: [&str; 0] = [];
    assert_eq!(project.ran(&RECIPE), nothing);
    assert_eq!(bodies(&hub), before);
    let asked = hub.requests().len();
    assert_eq!(
        project.ran(&[&RECIPE[..], &["--offline"]].concat()),
        nothing
    );
    assert_eq!(hub.requests().len(), asked);

    // The token is nowhere.
    let find = std::process::Command::new("grep")
        .args(["-r", "-l", TOKEN])
        .arg(project.path(""))
        .output()
        .unwrap();
    assert_eq!(String::from_utf8(find.stdout).unwrap(), "");

    // The dataset moves: what reads it runs again, and the reason says so.
    let table = fs::read(project.path(&format!(
        ".pipeline/v1/artifacts/{}/train.parquet",
        project.artifacts(&RECIPE)["pairs"]
    )))
    .unwrap();
    hub.dataset("somebody/truthy-dpo", &[("train.parquet", &table)]);
    let why = project.succeeds(&[&["why"], &RECIPE[..1], &["pairs"], &RECIPE[1..]].concat());
    assert!(why.contains("moved from"), "{why}");
    assert_eq!(project.ran(&RECIPE), ["pairs"], "the same rows");
}

/// docs/hub.md: `--set` puts a download in the place of a stage that reads a local file or makes a model.
#[test]
fn the_other_recipes_with_data_and_model_from_the_hub() {
    let hub = hub();
    let mut project = Project::with_recipes();
    project.variable("HF_ENDPOINT", &hub.endpoint);
    project.variable("HF_TOKEN", TOKEN);
    let nothing: [&str; 0] = [];
    for (recipe, output) in [
        ("recipes/quickstart.yaml", "out/quickstart"),
        ("recipes/truthfulqa-orpo.yaml", "out/truthfulqa"),
    ] {
        let sets = [
            "stages.pairs={ download_dataset: { repo: somebody/truthy-dpo } }",
            "stages.blank={ download_model: { repo: tiny/llama-3 } }",
            "stages.base.train_sft.max_steps=2",
            "stages.base.train_sft.save_steps=2",
            "stages.tuned.train_orpo.max_steps=2",
            "stages.tuned.train_orpo.save_steps=2",
            "stages.scores.evaluate.max_new_tokens=2",
        ];
        let sets = sets.iter().flat_map(|set| ["--set", *set]);
        let mut arguments: Vec<&str> = [recipe].into_iter().chain(sets).collect();
        if recipe.contains("truthfulqa") {
            // The model has no template of its own.
            arguments.extend([
                "--set",
                "stages.chats.apply_chat_template.template=recipes/templates/llama3.jinja",
                "--set",
                "stages.chats.apply_chat_template.tokenizer=blank",
            ]);
        }
        let ran = project.ran(&arguments);
        assert!(
            ran.contains(&"pairs".to_owned()) || recipe.contains("truthfulqa"),
            "{ran:?}"
        );
        assert!(ran.contains(&"merged".to_owned()), "{ran:?}");
        let merged = files(&project.path(output));
        assert!(
            merged
                .iter()
                .any(|(name, _)| name.ends_with(".safetensors")),
            "{output}"
        );
        let before = bodies(&hub);
        assert_eq!(project.ran(&arguments), nothing);
        assert_eq!(bodies(&hub), before, "nothing is downloaded twice");
    }
}

#[test]
fn what_the_hub_says_reaches_people() {
    let hub = HubServer::start();
    let rows = b"{\"prompt\":\"a\",\"chosen\":\"b\",\"rejected\":\"c\"}\n";
    hub.dataset("some/pairs", &[("train.jsonl", rows), ("test.jsonl", rows)]);
    hub.mirror(Mirror {
        no_tree: true,
        no_sizes: true,
        no_hashes: true,
        ..Mirror::default()
    });
    let mut project = Project::empty();
    let recipe = "version: 1\nstages:\n  a: { download_dataset: { repo: some/pairs } }\n  b: { download_dataset: { repo: some/pairs, split: test } }\n";
    project.write("recipe.yaml", recipe);
    // printf 'me:s3cret' | base64
    hub.login("bWU6czNjcmV0");
    let endpoint = hub.endpoint.replace("http://", "http://me:s3cret@");
    project.variable("HF_ENDPOINT", &endpoint);
    project.variable("HF_TOKEN", TOKEN);
    let wait = vec![("RateLimit", "\"api\";r=0;t=2".to_owned())];
    hub.fault("/revision/", Fault::Busy(429, wait), 1);
    let ended = project.run(&["run", "recipe.yaml"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    for piece in [
        "asks to wait 2 seconds (429)",
        "without their sizes",
        "tells no hash of 1 of 1 files of `some/pairs` (such as `train.jsonl`)",
    ] {
        assert!(ended.stderr.contains(piece), "{piece}: {}", ended.stderr);
    }
    // Several stages and both of plan and run ask; it is told once.
    let both = "instead of the hub's token";
    assert_eq!(ended.stderr.matches(both).count(), 1, "{}", ended.stderr);

    // The password is in no message, event, record or log, of a run that succeeds or fails.
    let json = project.run(&["run", "recipe.yaml", "--json", "--force", "a"]);
    project.variable("HF_ENDPOINT", &endpoint.replace("s3cret", "wr0ng"));
    let failed = project.run(&["run", "recipe.yaml", "--json", "--force", "a"]);
    assert_eq!(failed.code, Some(1), "{}", failed.stderr);
    let plan = project.run(&["plan", "recipe.yaml"]);
    for ended in [&ended, &json, &failed, &plan] {
        for secret in ["s3cret", "wr0ng", TOKEN, "bWU6czNjcmV0"] {
            let said = format!("{}{}", ended.stdout, ended.stderr);
            assert!(!said.contains(secret), "{said}");
        }
    }
    for secret in ["s3cret", "wr0ng", TOKEN, "bWU6czNjcmV0"] {
        let find = std::process::Command::new("grep")
            .args(["-r", "-l", secret])
            .arg(project.path(""))
            .output()
            .unwrap();
        assert_eq!(String::from_utf8(find.stdout).unwrap(), "", "{secret}");
    }
}
