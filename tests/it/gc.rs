//! `gc`: what nobody needs goes, what recipes and the last runs need stays.

use std::fs;
use std::io::{BufRead as _, BufReader};

use crate::support::program::Project;

const RECIPE: &str = "\
version: 1
stages:
  pairs: { import_dataset: { path: pairs.jsonl } }
  split: { split_dataset: { dataset: pairs, test_size: 1 } }
";

#[test]
fn what_nobody_needs_is_removed() {
    let project = Project::empty();
    project.write("r.yaml", RECIPE);
    let row = |n| format!("{{\"prompt\": \"p{n}\", \"chosen\": \"c\", \"rejected\": \"r\"}}\n");
    let rows = |count: usize| (0..count).map(row).collect::<Vec<_>>().concat();
    for count in [3, 4, 5] {
        project.write("pairs.jsonl", &rows(count));
        project.succeeds(&["run", "r.yaml"]);
    }
    let scratch = project.path(".pipeline/v1/scratch/left");
    fs::create_dir_all(&scratch).unwrap();
    fs::write(scratch.join("checkpoint"), vec![0; 5_000_000]).unwrap();
    let count = || {
        let entries = fs::read_dir(project.path(".pipeline/v1/artifacts")).unwrap();
        entries
            .filter(|entry| entry.as_ref().unwrap().path().is_dir())
            .count()
    };
    assert_eq!(count(), 6);

    let told = project.succeeds(&["gc", "r.yaml", "--dry-run"]);
    assert!(
        told.contains("would be freed") && told.contains("unfinished work"),
        "{told}"
    );
    assert_eq!((count(), scratch.exists()), (6, true));
    let told = project.succeeds(&["gc", "r.yaml", "--keep-runs", "3"]);
    assert!(told.ends_with("5.0 MB freed\n"), "{told}");
    assert_eq!((count(), scratch.exists()), (6, false));
    project.succeeds(&["gc", "r.yaml", "--max-size", "1GB"]);
    assert_eq!(count(), 6);
    project.succeeds(&["gc", "r.yaml"]);
    assert_eq!(count(), 2);
    let nothing: [&str; 0] = [];
    assert_eq!(project.ran(&["r.yaml"]), nothing);

    // A removed state is made again, and has the same bytes.
    project.write("pairs.jsonl", &rows(4));
    let why = project.succeeds(&["why", "r.yaml", "pairs"]);
    assert!(why.contains("its result is gone from the store"), "{why}");
    assert_eq!(project.ran(&["r.yaml"]), ["pairs", "split"]);
    assert!(project.run(&["gc", "r.yaml", "--max-size", "lots"]).code == Some(2));
}

#[test]
fn what_a_profile_makes_can_be_kept() {
    let project = Project::empty();
    let profiles = "profiles: { two: { stages.split.split_dataset.test_size: 2 } }\n";
    project.write("r.yaml", &format!("{RECIPE}{profiles}"));
    let row = |n| format!("{{\"prompt\": \"p{n}\", \"chosen\": \"c\", \"rejected\": \"r\"}}\n");
    project.write("pairs.jsonl", &(0..5).map(row).collect::<String>());
    project.succeeds(&["run", "r.yaml", "--profile", "two"]);
    project.succeeds(&["run", "r.yaml"]);
    project.succeeds(&["gc", "r.yaml", "--profile", "two", "--keep-runs", "0"]);
    assert_eq!(
        project.ran(&["r.yaml", "--profile", "two"]),
        <[&str; 0]>::default()
    );
    assert_eq!(project.ran(&["r.yaml"]), ["split"]);
    project.succeeds(&["validate", "r.yaml", "--profile", "two"]);
}

#[test]
fn what_a_running_runner_uses_stays() {
    let project = Project::with_recipes();
    let recipe = "recipes/quickstart.yaml";
    let mut runner = project
        .command(&["run", recipe, "base", "--json"])
        .spawn()
        .unwrap();
    // The training has begun: what it reads, and what was made so far, is nobody's last run yet.
    let lines = BufReader::new(runner.stdout.take().unwrap()).lines();
    let begun = |line: &String| line.contains("stage_started") && line.contains("\"base\"");
    assert!(lines.map_while(Result::ok).any(|line| begun(&line)));
    let results = || {
        let entries = fs::read_dir(project.path(".pipeline/v1/artifacts")).unwrap();
        entries.count()
    };
    let before = results();
    assert!(before > 0);
    let ended = project.run(&["gc", recipe, "--keep-runs", "0"]);
    let running = runner.try_wait().unwrap().is_none();
    runner.kill().unwrap();
    runner.wait().unwrap();
    assert!(running, "the training was over too early to show anything");
    assert_eq!(ended.code, Some(1), "{}", ended.stdout);
    assert!(
        ended.stderr.contains("a run uses the store"),
        "{}",
        ended.stderr
    );
    assert_eq!(results(), before);
    // A runner that is dead uses nothing.
    project.succeeds(&["gc", recipe, "--keep-runs", "0"]);
}
