//! `import`: configs of other programs become recipes, and each of their lines is accounted for. `tests/golden/import` has configs as
//! people have them, with the recipe and what is said; `UPDATE_GENERATED=1 cargo test importing` writes both anew.

use std::fs;

use pipeline::stages::KINDS;

use crate::support::program::{Project, copy, repository, update_wanted};

const CONFIGS: [(&str, &str); 8] = [
    ("axolotl", "axolotl_qlora.yaml"),
    ("axolotl", "axolotl_orpo.yml"),
    ("llamafactory", "llamafactory_sft.yaml"),
    ("llamafactory", "llamafactory_dpo.yaml"),
    ("trl", "trl_sft.yaml"),
    ("trl", "trl_dpo.yaml"),
    ("trl", "trl_kto.yaml"),
    ("trl", "trl_reward.yaml"),
];

fn project() -> Project {
    let project = Project::empty();
    copy(
        &repository().join("tests/golden/import"),
        &project.path("."),
    );
    project
}

#[test]
fn configs_become_recipes_line_by_line() {
    let project = project();
    let mut differ = Vec::new();
    for (program, config) in CONFIGS {
        let name = config.split('.').next().unwrap();
        let recipe = format!("{name}.recipe.yaml");
        let ended = project.run(&["import", program, config, "-o", &recipe]);
        assert_eq!(ended.code, Some(0), "{config}: {}", ended.stderr);
        let made = project.read(&recipe);
        for (ending, text) in [("yaml", &made), ("txt", &ended.stderr)] {
            let golden = repository().join(format!("tests/golden/import/expected/{name}.{ending}"));
            if update_wanted() {
                fs::write(&golden, text).unwrap();
            }
            if fs::read_to_string(&golden).unwrap_or_default() != *text {
                differ.push(format!("{name}.{ending}:\n{text}"));
            }
        }
        // Each key is told of once or more, with its line.
        let written = project.read(config);
        for (number, line) in written.lines().enumerate() {
            let Some((key, _)) = line.split_once(':') else {
                continue;
            };
            if key.starts_with([' ', '#', '-']) {
                continue;
            }
            let told = ended.stderr.lines().any(|told| {
                let mut words = told.trim_start_matches(['!', ' ']).split_whitespace();
                words.next() == Some(&(number + 1).to_string()) && words.next() == Some(key)
            });
            assert!(
                told,
                "{config}: nothing of `{key}` in line {}\n{}",
                number + 1,
                ended.stderr
            );
        }
        let read = pipeline::recipe::parse(recipe.as_ref(), &made, &[], KINDS);
        read.unwrap_or_else(|errors| panic!("{config}: {errors}"));
        // Nothing is written over.
        let again = project.run(&["import", program, config, "-o", &recipe]);
        assert!(
            again.code == Some(2) && again.stderr.contains("--force"),
            "{}",
            again.stderr
        );
    }
    assert!(
        differ.is_empty(),
        "UPDATE_GENERATED=1 cargo test importing\n{}",
        differ.join("\n")
    );
}

#[test]
fn what_can_not_be_trained_is_refused() {
    let project = project();
    project.write(
        "grpo.yaml",
        "base_model: a/b\nrl: grpo\ndatasets: [{path: a/c}]\nmicro_batch_size: 1\n",
    );
    let ended = project.run(&["import", "axolotl", "grpo.yaml"]);
    assert!(
        ended.code == Some(2) && ended.stderr.contains("`rl: grpo` is not computed here"),
        "{}",
        ended.stderr
    );
    project.write("nothing.yaml", "a: 1\n");
    for program in ["axolotl", "llamafactory", "trl"] {
        let ended = project.run(&["import", program, "nothing.yaml"]);
        assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    }
    for text in [
        "",
        "- 1\n",
        "a: [",
        "base_model: 5\ndatasets: 5\n",
        "base_model: a/b\ndatasets: [{}]\n",
        "base_model: a/b\ndatasets: []\n",
    ] {
        project.write("bad.yaml", text);
        let ended = project.run(&["import", "axolotl", "bad.yaml"]);
        assert_eq!(ended.code, Some(2), "{text}: {}", ended.stderr);
    }
    assert!(!project.path("pipeline.yaml").exists());
}

/// Templates by their names, tokens that are added, and which answers of a conversation are learnt.
#[test]
fn what_conversations_are_made_of_is_carried_over() {
    let project = project();
    let import = |program: &str, config: &str| {
        project.write("c.yaml", config);
        let ended = project.run(&["import", program, "c.yaml", "-o", "r.yaml", "--force"]);
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        let made = project.read("r.yaml");
        let read = pipeline::recipe::parse("r.yaml".as_ref(), &made, &[], KINDS);
        read.unwrap_or_else(|errors| panic!("{made}\n{errors}"));
        (made, ended.stderr)
    };
    let axolotl = "\
base_model: a/b
adapter: lora
datasets: [{path: data/talks.jsonl, type: chat_template, roles_to_train: [assistant]}]
chat_template: phi_3
tokens: [\"<tool>\"]
special_tokens: {eos_token: \"<|end|>\", unk_token: \"<unk>\"}
micro_batch_size: 1
";
    let (made, told) = import("axolotl", axolotl);
    for text in [
        "template: phi3",
        "assistant_only_loss: true",
        "with_tokens:\n    add_tokens:\n      model: base\n      tokens: [\"<tool>\"]\n      eos_token: \"<|end|>\"",
        "tokenizer: with_tokens",
        "    merge:\n      model: with_tokens",
    ] {
        assert!(made.contains(text), "{text}: {made}");
    }
    assert!(
        told.contains("`unk_token`") && !told.contains("roles_to_train"),
        "{told}"
    );
    // What somebody else says is learnt there and not here.
    let other = axolotl.replace("[assistant]", "[assistant, user]");
    let (_, told) = import("axolotl", &other);
    assert!(told.contains("`roles_to_train`"), "{told}");
    // Whole conversations are learnt.
    let (made, _) = import("axolotl", &format!("{axolotl}train_on_inputs: true\n"));
    assert!(!made.contains("assistant_only_loss"), "{made}");
    assert!(made.contains("completion_only_loss: false"), "{made}");
    // A token that fills up is not needed.
    let fills = axolotl.replace(
        "{eos_token: \"<|end|>\", unk_token: \"<unk>\"}",
        "{pad_token: \"<pad>\"}",
    );
    let (made, told) = import("axolotl", &fills.replace("tokens: [\"<tool>\"]\n", ""));
    assert!(!made.contains("add_tokens"), "{made}");
    assert!(told.contains("not filled up"), "{told}");

    project.write(
        "data/dataset_info.json",
        "{\"talks\": {\"file_name\": \"talks.jsonl\", \"formatting\": \"sharegpt\"}}",
    );
    let factory = "\
model_name_or_path: a/b
stage: sft
finetuning_type: lora
dataset: talks
template: gemma
add_special_tokens: <a>,<b>
cutoff_len: 512
";
    let (made, _) = import("llamafactory", factory);
    for text in [
        "template: gemma",
        "assistant_only_loss: true",
        "special_tokens: [\"<a>\", \"<b>\"]",
    ] {
        assert!(made.contains(text), "{text}: {made}");
    }
    let (made, told) = import("llamafactory", &format!("{factory}mask_history: true\n"));
    assert!(!made.contains("assistant_only_loss"), "{made}");
    assert!(
        told.contains("apply_chat_template.assistant_only_loss"),
        "{told}"
    );
}
