//! The commands that look and don't touch.

use serde_json::Value;

use crate::support::program::Project;

const QUICKSTART: &str = "recipes/quickstart.yaml";

#[test]
fn a_plan_needs_nothing_and_writes_nothing() {
    let project = Project::with_recipes();
    std::fs::remove_dir(project.path(".pipeline")).unwrap();
    let store = project.path("elsewhere");
    let plan = project.succeeds(&["plan", QUICKSTART, "--store", "elsewhere"]);
    assert!(
        plan.contains("pairs    import_dataset       runs     first run\n"),
        "{plan}"
    );
    assert!(
        plan.contains("merged   merge                waits    on base, tuned\n")
            || plan.contains("waits    on tuned, base\n"),
        "{plan}"
    );
    assert!(plan.contains("0 fresh, 1 to run, 10 waiting"), "{plan}");
    assert!(!store.exists() && !project.path("recipes/.pipeline").exists());
}

#[test]
fn plans_and_reasons_tell_old_and_new_values() {
    let project = Project::with_recipes();
    project.succeeds(&["run", QUICKSTART, "chats"]);
    let changed = [
        "--set",
        "stages.split.split_dataset.test_size=0.25",
        "--set",
        "vars.seed=7",
    ];
    let plan = project.succeeds(&[&["plan", QUICKSTART], &changed[..]].concat());
    assert!(plan.contains("`seed` changed from 42 to 7"), "{plan}");
    assert!(
        plan.contains("`test_size` changed from 0.15 to 0.25"),
        "{plan}"
    );
    let json = project.succeeds(&[&["plan", QUICKSTART, "--json"], &changed[..]].concat());
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json[0]["plan"]["state"], "fresh");
    assert_eq!(json[1]["plan"]["reasons"][1]["parameter"], "test_size");

    let why = project.succeeds(&[&["why", QUICKSTART, "chats"], &changed[..]].concat());
    assert!(why.starts_with("`chats` waits on split, blank\n"), "{why}");
    assert!(
        why.contains("`split` runs:\n  - `seed` changed from 42 to 7"),
        "{why}"
    );
    let why = project.succeeds(&["why", QUICKSTART, "chats"]);
    assert!(why.starts_with("`chats` is fresh"), "{why}");
    let why = project.succeeds(&["why", QUICKSTART, "tokens"]);
    assert!(why.contains("first run"), "{why}");
}

#[test]
fn results_can_be_looked_at() {
    let project = Project::with_recipes();
    let short = [
        "--set",
        "stages.base.train_sft.max_steps=2",
        "--set",
        "stages.tuned.train_orpo.max_steps=2",
    ];
    let show = |stage: &str| project.succeeds(&[&["show", QUICKSTART, stage], &short[..]].concat());
    let ended = project.run(&["show", QUICKSTART, "pairs"]);
    assert_eq!(ended.code, Some(1));
    assert!(
        ended
            .stderr
            .contains("`pipeline run recipes/quickstart.yaml pairs` makes it"),
        "{}",
        ended.stderr
    );
    project.succeeds(&[&["run", QUICKSTART], &short[..]].concat());

    let pairs = show("pairs");
    assert!(
        pairs.contains("train: 400 rows") && pairs.contains("With pleasure!"),
        "{pairs}"
    );
    let tokens = show("tokens");
    assert!(
        tokens.contains("test: 60 rows") && tokens.contains("List(Int32"),
        "{tokens}"
    );
    let base4 = show("base4");
    assert!(
        base4.contains("nf4, double quant") && base4.contains("quantised_weights"),
        "{base4}"
    );
    let tuned = show("tuned");
    assert!(
        tuned.contains("lora_alpha      16") && tuned.contains("metrics of 2 steps"),
        "{tuned}"
    );
    let scores = show("scores");
    assert!(
        scores.contains("rewards/accuracies") && scores.contains("rejected:"),
        "{scores}"
    );
    let merged = show("merged");
    assert!(merged.contains("quantization       none"), "{merged}");
    let stale = project.succeeds(&["show", QUICKSTART, "base"]);
    assert!(stale.contains("the stage is stale now"), "{stale}");
}

#[test]
fn graphs_and_schemas_are_printed() {
    let project = Project::with_recipes();
    let text = project.succeeds(&["graph", QUICKSTART]);
    assert!(text.contains("tuned    train_orpo           <- "), "{text}");
    assert!(
        project
            .succeeds(&["graph", QUICKSTART, "--format", "mermaid"])
            .starts_with("flowchart")
    );
    assert!(
        project
            .succeeds(&["graph", QUICKSTART, "--format", "dot"])
            .starts_with("digraph")
    );
    let schema: Value = serde_json::from_str(&project.succeeds(&["schema"])).unwrap();
    assert_eq!(schema["title"], "pipeline recipe");
    assert!(
        project
            .succeeds(&["validate", QUICKSTART])
            .contains("is valid: 11 stages")
    );
    assert!(project.succeeds(&["--version"]).starts_with("pipeline "));
}
