//! What is wrong is told with its place and a way out, all at once, and nothing is touched.

use std::fs;

use crate::support::program::Project;

fn wrong(project: &Project, arguments: &[&str]) -> String {
    let ended = project.run(arguments);
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    assert_eq!(ended.stdout, "");
    ended.stderr
}

#[test]
fn all_mistakes_of_a_recipe_come_at_once() {
    let project = Project::empty();
    project.write(
        "r.yaml",
        "\
version: 1
stages:
  pairs: { import_dataset: { path: pairs.jsonl } }
  chats: { apply_chat_template: { dataset: pair, template: t.jinja } }
  tokens: { tokenize: { dataset: pairs, tokenizer: base, cutoff_len: 512 } }
  base: { create_modle: { hidden_size: 64 } }
  tuned: { train_orpo: { model: base, dataset: tokens, orpo_alpha: 0.1, micro_batch_size: 2, beta: much } }
  tuned: { merge: {} }
",
    );
    let told = wrong(&project, &["run", "r.yaml"]);
    for expected in [
        "--> r.yaml:4:44",
        "did you mean `pairs`?",
        "--> r.yaml:5:58",
        "`max_length`",
        "did you mean `create_model`?",
        "`orpo_alpha`",
        "`beta`",
        "`micro_batch_size`",
        "`per_device_train_batch_size`",
        "--> r.yaml:7:100",
        "--> r.yaml:8:3",
    ] {
        assert!(told.contains(expected), "no `{expected}` in\n{told}");
    }
    for command in ["plan", "validate", "graph"] {
        assert_eq!(wrong(&project, &[command, "r.yaml"]), told);
    }
    assert_eq!(fs::read_dir(project.path(".pipeline")).unwrap().count(), 0);
}

#[test]
fn mistakes_on_the_command_line() {
    let project = Project::with_recipes();
    let quickstart = "recipes/quickstart.yaml";
    let told = wrong(&project, &["run", quickstart, "tunde"]);
    assert!(
        told.contains("has no stage `tunde`") && told.contains("did you mean `tuned`?"),
        "{told}"
    );
    let told = wrong(
        &project,
        &["run", quickstart, "--set", "stages.tuned.train_orpo.bta=1"],
    );
    assert!(
        told.contains("--set stages.tuned.train_orpo.bta=1") && told.contains("`beta`"),
        "{told}"
    );
    assert!(wrong(&project, &["run", quickstart, "--set", "seed"]).contains("expected PATH=VALUE"));
    assert!(wrong(&project, &["run", "nowhere.yaml"]).contains("could not read the recipe"));
    assert!(wrong(&project, &["fly"]).contains("unrecognized subcommand"));
    let told = wrong(&project, &["run", "recipes/data/pairs.jsonl"]);
    assert!(
        told.contains("is a file of rows, not a recipe")
            && told.contains("`pipeline init --data recipes/data/pairs.jsonl`"),
        "{told}"
    );
    for number in ["0", "-1"] {
        let told = wrong(&project, &["run", quickstart, "--jobs", number]);
        assert!(
            told.contains(&format!("invalid value '{number}' for '--jobs <N>'")),
            "{told}"
        );
    }
}

#[test]
fn bad_data_fails_its_stage_and_keeps_nothing() {
    let project = Project::empty();
    project.write(
        "r.yaml",
        "version: 1\nstages:\n  pairs: { import_dataset: { path: pairs.jsonl } }\n",
    );
    let ended = project.run(&["run", "r.yaml"]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains("pairs.jsonl"), "{}", ended.stderr);
    project.write(
        "pairs.jsonl",
        "{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"c\"}\n{\"prompt\": \n",
    );
    let ended = project.run(&["run", "r.yaml"]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("failed  pairs") && ended.stderr.contains("pairs.jsonl:2:"),
        "{}",
        ended.stderr
    );
    assert!(!project.path(".pipeline/v1/records").exists());
    let partial = project.path(".pipeline/v1/partial");
    assert_eq!(fs::read_dir(partial).unwrap().count(), 0);
}

#[test]
fn a_recipe_reads_nothing_outside_its_project() {
    let outside = tempfile::tempdir().unwrap();
    let secret = outside.path().join("secret.jsonl");
    let row = r#"{"prompt": "a", "chosen": "b", "rejected": "c"}"#;
    fs::write(&secret, row).unwrap();
    let project = Project::empty();
    fs::create_dir(project.path("folder")).unwrap();
    std::os::unix::fs::symlink(&secret, project.path("link.jsonl")).unwrap();
    std::os::unix::fs::symlink(&secret, project.path("folder/inner.jsonl")).unwrap();
    let recipe = |path: &str| {
        project.write(
            "r.yaml",
            &format!(
                "version: 1\nvars: {{ file: \"{path}\" }}\nstages:\n  pairs: {{ import_dataset: {{ path: \"${{file}}\" }} }}\n"
            ),
        );
    };
    let folder = outside.path().to_str().unwrap();
    let absolute = secret.to_str().unwrap();
    for (path, told) in [
        (absolute, "leaves the project"),
        ("../secret.jsonl", "`../secret.jsonl` leaves the project"),
        ("a/../../secret.jsonl", "leaves the project"),
        (
            "link.jsonl",
            "`link.jsonl` is a link that leaves the project",
        ),
        ("folder", "`folder/inner.jsonl` is a link that leaves"),
    ] {
        recipe(path);
        for command in ["run", "plan", "validate", "lock"] {
            let error = wrong(&project, &[command, "r.yaml"]);
            assert!(error.contains(told), "{path} {command}: {error}");
            assert!(error.contains("r.yaml:4:"), "{error}");
            assert!(error.contains("--allow-path"), "{error}");
        }
    }
    assert_eq!(fs::read_dir(project.path(".pipeline")).unwrap().count(), 0);
    let run = |arguments: &[&str]| {
        let ended = project.run(arguments);
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    };
    recipe("link.jsonl");
    run(&["run", "r.yaml", "--allow-path", folder]);
    recipe(absolute);
    run(&["run", "r.yaml", "--allow-path", folder]);
    run(&["run", "r.yaml", "--set", &format!("vars.file={absolute}")]);
}
