//! `init`, and `pipeline.yaml` found by itself: a recipe for each method and form of data runs as it is written.

use std::fmt::Write as _;

use crate::support::program::{Project, copy, repository};

/// Rows of a form, so many that some are held out.
fn rows(form: &str) -> String {
    let mut text = String::new();
    for number in 0..24 {
        let (ask, good, bad) = (
            format!("What is {number} and one?"),
            format!("It is {}.", number + 1),
            "Ask somebody else.",
        );
        let row = match form {
            "pairs" => format!(r#"{{"prompt": "{ask}", "chosen": "{good}", "rejected": "{bad}"}}"#),
            "conversations" => format!(
                r#"{{"chosen": [{{"role": "user", "content": "{ask}"}}, {{"role": "assistant", "content": "{good}"}}], "rejected": [{{"role": "user", "content": "{ask}"}}, {{"role": "assistant", "content": "{bad}"}}]}}"#
            ),
            "messages" => format!(
                r#"{{"messages": [{{"role": "user", "content": "{ask}"}}, {{"role": "assistant", "content": "{good}"}}]}}"#
            ),
            "sharegpt" => format!(
                r#"{{"conversations": [{{"from": "human", "value": "{ask}"}}, {{"from": "gpt", "value": "{good}"}}]}}"#
            ),
            "alpaca" => format!(r#"{{"instruction": "{ask}", "input": "", "output": "{good}"}}"#),
            "completion" => format!(r#"{{"prompt": "{ask}", "completion": "{good}"}}"#),
            _ => format!(r#"{{"text": "{ask} {good}"}}"#),
        };
        _ = writeln!(text, "{row}");
    }
    text
}

fn started(form: &str, more: &[&str]) -> Project {
    let project = Project::empty();
    project.write("data/rows.jsonl", &rows(form));
    project.succeeds(&[&["init", "--data", "data/rows.jsonl"], more].concat());
    project
}

/// Makes trainings short.
const SHORT: [&str; 2] = ["--set", "stages.tuned.TRAIN.max_steps=2"];

fn runs(project: &Project, kind: &str) -> String {
    let short = SHORT.map(|word| word.replace("TRAIN", kind));
    let mut arguments = vec!["run"];
    arguments.extend(short.iter().map(String::as_str));
    let recipe = project.read("pipeline.yaml");
    if recipe.contains("\n  base:\n    train_sft") {
        arguments.extend(["--set", "stages.base.train_sft.max_steps=2"]);
    }
    project.succeeds(&arguments);
    recipe
}

#[test]
fn answers_in_every_form_are_learnt_at_once() {
    for form in [
        "messages",
        "sharegpt",
        "alpaca",
        "completion",
        "text",
        "pairs",
    ] {
        let project = started(form, &["--method", "sft"]);
        let recipe = runs(&project, "train_sft");
        assert!(
            recipe.starts_with("# yaml-language-server: $schema=.pipeline/recipe.schema.json\n"),
            "{recipe}"
        );
        assert!(project.path(".pipeline/recipe.schema.json").exists());
        assert!(
            project.path("out/tuned/model.safetensors").exists(),
            "{form}"
        );
        let comment = |line: &str| line.trim_start().starts_with('#');
        let flow = recipe
            .lines()
            .any(|line| !comment(line) && line.contains('{'));
        assert!(
            !flow && recipe.contains("\n    train_sft:\n      model: blank\n"),
            "{recipe}"
        );
    }
}

#[test]
fn preferences_are_learnt_at_once() {
    for (form, method, kind) in [
        ("pairs", None, "train_orpo"),
        ("conversations", Some("orpo"), "train_orpo"),
        ("pairs", Some("dpo"), "train_dpo"),
        ("conversations", Some("dpo"), "train_dpo"),
    ] {
        let method = method.map(|method| ["--method", method]);
        let project = started(form, method.as_ref().map_or(&[], |method| &method[..]));
        let recipe = runs(&project, kind);
        assert!(
            recipe.contains("scores:") && recipe.contains(kind),
            "{recipe}"
        );
        assert!(
            project.path("out/tuned/model.safetensors").exists(),
            "{form} {kind}"
        );
    }
}

#[test]
fn a_model_of_ones_own_gets_an_adapter() {
    for (adapter, method, kind) in [
        ("lora", "sft", "train_sft"),
        ("qlora", "orpo", "train_orpo"),
        ("none", "dpo", "train_dpo"),
    ] {
        let project = Project::empty();
        project.write("rows.jsonl", &rows("pairs"));
        copy(
            &repository().join("tests/golden/model"),
            &project.path("models/mine"),
        );
        project.succeeds(&[
            "init",
            "--data",
            "rows.jsonl",
            "--model",
            "models/mine",
            "--method",
            method,
            "--adapter",
            adapter,
        ]);
        let recipe = runs(&project, kind);
        let result = if adapter == "none" { "tuned" } else { "merged" };
        assert_eq!(recipe.contains("quantize:"), adapter == "qlora", "{recipe}");
        assert!(
            project.path(&format!("out/{result}/config.json")).exists(),
            "{recipe}"
        );
    }
}

#[test]
fn what_init_is_told_is_checked() {
    let project = Project::empty();
    project.write("rows.jsonl", &rows("messages"));
    let wrong = |arguments: &[&str], told: &str| {
        let ended = project.run(&[&["init"], arguments].concat());
        assert!(
            ended.code == Some(2) && ended.stderr.contains(told),
            "{}",
            ended.stderr
        );
        assert!(!project.path("pipeline.yaml").exists());
    };
    wrong(&[], "--data FILE");
    wrong(
        &["--data", "nowhere.jsonl"],
        "there is no data at `nowhere.jsonl`",
    );
    wrong(
        &["--data", "rows.jsonl", "--method", "orpo"],
        "have no rejected answer",
    );
    wrong(
        &["--data", "rows.jsonl", "--model", "./nowhere"],
        "no folder with a `config.json`",
    );
    project.write("bad.jsonl", "{\"a\": \n");
    let ended = project.run(&["init", "--data", "bad.jsonl"]);
    assert!(
        ended.code == Some(1) && ended.stderr.contains("bad.jsonl"),
        "{}",
        ended.stderr
    );
    project.write("other.csv", "a,b\n1,2\n");
    let ended = project.run(&["init", "--data", "other.csv"]);
    assert!(
        ended.code == Some(1) && ended.stderr.contains("\nhint: say which is which"),
        "{}",
        ended.stderr
    );
    // The folder in which the recipe lies.
    project.write("rows/train.jsonl", &rows("messages"));
    project.succeeds(&["init", "rows/pipeline.yaml", "--data", "rows"]);
    project.succeeds(&["validate", "rows/pipeline.yaml"]);
    project.succeeds(&["init", "--data", "someone/rows", "--model", "someone/model"]);
    let recipe = project.read("pipeline.yaml");
    assert!(
        recipe.contains("download_dataset:\n      repo: someone/rows\n"),
        "{recipe}"
    );
    let ended = project.run(&["init", "--data", "rows.jsonl"]);
    assert!(
        ended.code == Some(2) && ended.stderr.contains("is there already"),
        "{}",
        ended.stderr
    );
    project.succeeds(&["init", "below/other.yaml", "--data", "rows.jsonl"].map(
        |word| match word {
            "below/other.yaml" => "other.yaml",
            word => word,
        },
    ));
    assert!(
        project
            .succeeds(&["validate", "other.yaml"])
            .contains("valid")
    );
}

#[test]
fn the_recipe_of_the_project_is_found() {
    let project = Project::empty();
    project.write("rows.jsonl", &rows("pairs"));
    let ended = project.run(&["plan"]);
    assert!(
        ended.code == Some(2) && ended.stderr.contains("pipeline init"),
        "{}",
        ended.stderr
    );
    let ended = project.run(&["run", "rows"]);
    assert!(
        ended.code == Some(2) && ended.stderr.contains("`rows` is no file"),
        "{}",
        ended.stderr
    );
    project.succeeds(&["init", "--data", "rows.jsonl"]);
    project.succeeds(&["run", "split"]);
    assert!(project.succeeds(&["show", "split"]).contains("test: "));
    assert!(
        project
            .succeeds(&["show", "-n", "1", "rows"])
            .contains("train: 24 rows")
    );
    assert!(project.succeeds(&["why", "tokens"]).contains("`tokens`"));
    project.succeeds(&["gc", "--dry-run"]);
    // From a folder below, too; and a recipe that is named counts.
    std::fs::create_dir(project.path("below")).unwrap();
    let mut command = project.command(&["plan"]);
    let ended = command.current_dir(project.path("below")).output().unwrap();
    assert!(ended.status.success());
    assert!(String::from_utf8_lossy(&ended.stderr).contains("the recipe is `../pipeline.yaml`"));
    let ended = project.run(&["plan", "other.yaml"]);
    assert!(
        ended.stderr.contains("could not read the recipe"),
        "{}",
        ended.stderr
    );
    let help = project.succeeds(&["run", "--help"]);
    assert!(
        help.contains("[RECIPE]") && help.contains("`pipeline.yaml`"),
        "{help}"
    );
}
