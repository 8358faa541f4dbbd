//! `on_finish:` of a project's settings: it runs only where it was allowed, hears how the run went, and can't stop one.

use std::path::Path;

use serde_json::Value;

use crate::support::program::Project;

const RECIPE: &str = "\
version: 1
stages:
  pairs: { import_dataset: { path: pairs.jsonl } }
outputs: { pairs: out/pairs }
";

fn project(settings: &str, script: &str) -> Project {
    let project = Project::empty();
    project.write("r.yaml", RECIPE);
    project.write(
        "pairs.jsonl",
        "{\"prompt\": \"p\", \"chosen\": \"c\", \"rejected\": \"r\"}\n",
    );
    project.write("pipeline.config.yaml", settings);
    project.write("notify.sh", &format!("#!/bin/sh\n{script}\n"));
    make_executable(&project.path("notify.sh"));
    project
}

fn make_executable(path: &Path) {
    let mut permissions = std::fs::metadata(path).unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o755);
    std::fs::set_permissions(path, permissions).unwrap();
}

#[test]
fn the_program_hears_how_the_run_went_once_it_is_allowed() {
    let project = project(
        "version: 1\non_finish: [./notify.sh, told.json]\n",
        "cat > \"$1\"; echo heard",
    );
    // A stranger's folder runs nothing.
    let ended = project.run(&["run", "r.yaml"]);
    assert_eq!(ended.code, Some(0));
    assert!(
        ended.stderr.contains(
            "runs `./notify.sh told.json`, which is not allowed on this machine; `pipeline trust`"
        ),
        "{}",
        ended.stderr
    );
    assert!(!project.path("told.json").exists());

    project.succeeds(&["trust"]);
    let ended = project.run(&[
        "run", "r.yaml", "--json", "--name", "first", "--force", "pairs",
    ]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stderr.contains("heard") && !ended.stdout.contains("heard"));
    let told: Value = serde_json::from_str(&project.read("told.json")).unwrap();
    assert_eq!(told["version"], 1);
    assert_eq!(
        (&told["outcome"], &told["name"]),
        (&"done".into(), &"first".into())
    );
    assert_eq!(
        (&told["ran"], &told["fresh"], &told["failed"]),
        (&1.into(), &0.into(), &0.into())
    );
    assert_eq!(told["run"], 2);
    assert_eq!(told["stages"][0]["stage"], "pairs");
    assert!(told["stages"][0]["artifact"].is_string());
    assert_eq!(told["outputs"][0]["path"], "out/pairs");

    // A failed run is told as well, and so is one that could not go on.
    let ended = project.run(&[
        "run",
        "r.yaml",
        "--set",
        "stages.pairs.import_dataset.path=none.jsonl",
    ]);
    assert_eq!(ended.code, Some(1));
    let told: Value = serde_json::from_str(&project.read("told.json")).unwrap();
    assert_eq!(
        (&told["outcome"], &told["failed"]),
        (&"failed".into(), &1.into())
    );

    // Another command is another question.
    project.write(
        "pipeline.config.yaml",
        "version: 1\non_finish: [./notify.sh, other.json]\n",
    );
    let ended = project.run(&["run", "r.yaml"]);
    assert!(
        ended.stderr.contains("not allowed on this machine"),
        "{}",
        ended.stderr
    );
    assert!(!project.path("other.json").exists());
    project.write(
        "pipeline.config.yaml",
        "version: 1\non_finish: [./notify.sh, told.json]\n",
    );
    project.succeeds(&["trust", "--revoke"]);
    std::fs::remove_file(project.path("told.json")).unwrap();
    project.succeeds(&["run", "r.yaml"]);
    assert!(!project.path("told.json").exists());
}

#[test]
fn its_failure_is_a_warning_unless_it_is_required() {
    let project = project("version: 1\non_finish: [./notify.sh]\n", "exit 3");
    project.succeeds(&["trust"]);
    let ended = project.run(&["run", "r.yaml"]);
    assert_eq!(ended.code, Some(0));
    assert!(
        ended
            .stderr
            .contains("warning: `on_finish` failed: `./notify.sh`: it ended with exit code 3"),
        "{}",
        ended.stderr
    );
    project.write(
        "pipeline.config.yaml",
        "version: 1\non_finish: { command: [./notify.sh], required: true }\n",
    );
    assert_eq!(project.run(&["run", "r.yaml"]).code, Some(1));
    // What never ends is ended, with all that it started.
    project.write("notify.sh", "#!/bin/sh\nsleep 1000 & sleep 1000\n");
    project.write(
        "pipeline.config.yaml",
        "version: 1\non_finish: { command: [./notify.sh], timeout: 1s }\n",
    );
    let ended = project.run(&["run", "r.yaml"]);
    assert_eq!(ended.code, Some(0));
    assert!(
        ended.stderr.contains("it took more than 1s"),
        "{}",
        ended.stderr
    );
}

#[test]
fn wrong_settings_and_a_required_program_that_may_not_run_are_refused() {
    let project = project("version: 1\non_finish: notify\n", "");
    project.refuses(&["run", "r.yaml"], "`on_finish`");
    project.write("pipeline.config.yaml", "version: 1\non_finish: []\n");
    project.refuses(&["run", "r.yaml"], "it names no program");
    project.write(
        "pipeline.config.yaml",
        "version: 1\non_finish: { command: [./notify.sh], required: true }\n",
    );
    project.refuses(&["run", "r.yaml"], "which is not allowed on this machine");
    project.write("pipeline.config.yaml", "version: 1\n");
    project.refuses(&["trust"], "names no program");
}
