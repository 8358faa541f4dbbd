//! `frozen: true`: the last result is taken whatever changed, that is told, and nothing runs in its place.

use std::fs;

use serde_json::Value;

use crate::support::program::{Project, events, stages};

const RECIPE: &str = "\
version: 1
stages:
  pairs: { import_dataset: { path: pairs.jsonl } }
  split: { split_dataset: { dataset: pairs, test_size: 0.2, seed: 1 } }
  chats: { apply_chat_template: { dataset: split, template: chat.jinja } }
";
const TEMPLATE: &str = "{%- for message in messages %}{{ message.content }}{% endfor %}";

fn rows(count: usize) -> String {
    let row = |n| format!("{{\"prompt\": \"p{n}\", \"chosen\": \"c\", \"rejected\": \"r\"}}\n");
    (0..count).map(row).collect()
}

fn project() -> Project {
    let project = Project::empty();
    project.write("r.yaml", RECIPE);
    project.write("pairs.jsonl", &rows(20));
    project.write("chat.jinja", TEMPLATE);
    project
}

fn freeze(project: &Project) {
    let frozen = RECIPE.replace(
        "test_size: 0.2, seed: 1 } }",
        "test_size: 0.5, seed: 1 }, frozen: true }",
    );
    project.write("r.yaml", &frozen);
}

#[test]
fn the_last_result_is_taken_and_that_is_told_everywhere() {
    let project = project();
    project.succeeds(&["run", "r.yaml"]);
    let before = project.artifacts(&["r.yaml"]);
    freeze(&project);
    project.write("pairs.jsonl", &rows(30));
    project.write("chat.jinja", &format!("{TEMPLATE}!"));

    let plan = project.succeeds(&["plan", "r.yaml"]);
    assert!(plan.contains("frozen"), "{plan}");
    assert!(
        plan.contains("though `test_size` changed from 0.2 to 0.5"),
        "{plan}"
    );
    assert!(
        plan.contains("though `pairs`, which it takes, is made anew"),
        "{plan}"
    );
    assert!(
        plan.contains("1 of the fresh ones frozen though something changed"),
        "{plan}"
    );
    let why = project.succeeds(&["why", "r.yaml", "split"]);
    assert!(
        why.contains("`split` is frozen: ")
            && why.contains("  - `test_size` changed from 0.2 to 0.5\n    r.yaml:4:"),
        "{why}"
    );

    // What it takes is not made for it alone.
    let ended = project.run(&["run", "r.yaml", "chats", "--json"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let told = events(&ended.stdout);
    let fresh = stages(&told, "stage_fresh");
    assert_eq!(fresh["split"]["artifact"], before["split"].as_str());
    assert_eq!(
        fresh["split"]["frozen"][0]["reason"], "parameter_changed",
        "{fresh:?}"
    );
    let ran: Vec<String> = stages(&told, "stage_done").into_keys().collect();
    assert_eq!(ran, ["chats"]);
    let record = project
        .records()
        .into_iter()
        .find(|record| !record["notes"]["made_from_frozen"].is_null());
    assert_eq!(
        record.unwrap()["notes"]["made_from_frozen"],
        serde_json::json!(["split"])
    );

    let ended = project.run(&["run", "r.yaml"]);
    assert!(
        ended.stderr.contains("its last result is taken though"),
        "{}",
        ended.stderr
    );
    assert!(
        ended.stderr.contains("`split` is frozen: its result is not what the recipe says now, and neither is what was made from it"),
        "{}",
        ended.stderr
    );
    let report = project.succeeds(&["report", "r.yaml"]);
    assert!(!report.is_empty());

    // Thawed it is a stage like any other, and what is below is made of what it makes.
    let thawed = ["r.yaml", "--set", "stages.split.frozen=false"];
    assert_eq!(project.ran(&thawed), ["chats", "split"]);
}

/// A frozen stage stays as it is, also where nothing changed.
#[test]
fn without_a_result_or_with_an_altered_one_it_is_an_error() {
    let project = project();
    freeze(&project);
    project.write("r.yaml", &project.read("r.yaml").replace("0.5", "0.2"));
    let ended = project.run(&["run", "r.yaml"]);
    assert_eq!(ended.code, Some(1));
    assert!(
        ended.stderr.contains(
            "it is frozen and has no result yet; `--set stages.split.frozen=false` thaws it"
        ),
        "{}",
        ended.stderr
    );
    project.succeeds(&["run", "r.yaml", "--set", "stages.split.frozen=false"]);
    let plan = project.succeeds(&["plan", "r.yaml"]);
    assert!(
        plan.contains("frozen") && !plan.contains("though"),
        "{plan}"
    );
    let ended = project.run(&["run", "r.yaml", "--force", "split"]);
    assert!(
        ended.stderr.contains("it is frozen, so it can't be forced"),
        "{}",
        ended.stderr
    );

    // Its files may go: nothing reads them, and `--locked` asks for nothing of it.
    project.succeeds(&["lock", "r.yaml"]);
    let artifacts = project.artifacts(&["r.yaml"]);
    let folder = fs::read_dir(project.path(".pipeline/v1/artifacts")).unwrap();
    let folder = folder
        .map(|entry| entry.unwrap().path())
        .find(|path| path.is_dir() && path.ends_with(&artifacts["split"]))
        .unwrap();
    let file = folder.join("train.parquet");
    let kept = fs::read(&file).unwrap();
    make_writable(&file);
    fs::write(&file, b"other").unwrap();
    let ended = project.run(&["run", "r.yaml", "--verify"]);
    assert_eq!(ended.code, Some(1));
    assert!(
        ended
            .stderr
            .contains("it is frozen, and its result is damaged"),
        "{}",
        ended.stderr
    );
    fs::write(&file, kept).unwrap();
    project.succeeds(&["run", "r.yaml", "--locked", "--verify"]);
    fs::remove_dir_all(&folder).unwrap();
    let ended = project.run(&["plan", "r.yaml"]);
    assert!(
        ended
            .stdout
            .contains("it is frozen, and its result is gone from the store"),
        "{}",
        ended.stdout
    );
    let plan = project.run(&["plan", "r.yaml", "--json"]);
    let plan: Vec<Value> = serde_json::from_str(&plan.stdout).unwrap();
    assert_eq!(plan[1]["plan"]["state"], "unknown");
}

/// What a remote has is a last result like any other; where it can't be had, nothing runs in its place.
#[test]
fn files_that_are_gone_come_back_from_a_remote() {
    let project = project();
    fs::create_dir(project.path("shared")).unwrap();
    project.succeeds(&["run", "r.yaml", "--remote", "shared"]);
    let before = project.artifacts(&["r.yaml"]);
    freeze(&project);
    let artifacts = project.path(".pipeline/v1/artifacts");
    let remove = || {
        for name in ["split", "chats"] {
            fs::remove_dir_all(artifacts.join(&before[name])).unwrap();
        }
    };
    remove();
    let plan = project.succeeds(&["plan", "r.yaml", "--remote", "shared"]);
    assert!(
        plan.contains("frozen")
            && plan.contains("(in the remote)")
            && plan.contains("though `test_size`"),
        "{plan}"
    );
    // Another template, so that its files are needed.
    project.write("chat.jinja", &format!("{TEMPLATE}!"));
    let ended = project.run(&["run", "r.yaml", "chats", "--remote", "shared", "--json"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let told = events(&ended.stdout);
    let fresh = stages(&told, "stage_fresh");
    assert_eq!(fresh["split"]["artifact"], before["split"].as_str());
    assert!(fresh["split"]["frozen"].is_array(), "{fresh:?}");
    let ran: Vec<String> = stages(&told, "stage_done").into_keys().collect();
    assert_eq!(ran, ["chats"]);
    fs::remove_dir_all(artifacts.join(&before["split"])).unwrap();
    let ended = project.run(&["run", "r.yaml", "split"]);
    assert_eq!(ended.code, Some(1));
    assert!(
        ended
            .stderr
            .contains("it is frozen, and its result is gone"),
        "{}",
        ended.stderr
    );
}

fn make_writable(path: &std::path::Path) {
    let mut permissions = fs::metadata(path).unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o644);
    fs::set_permissions(path, permissions).unwrap();
    let folder = path.parent().unwrap();
    let mut permissions = fs::metadata(folder).unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o755);
    fs::set_permissions(folder, permissions).unwrap();
}
