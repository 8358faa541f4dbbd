//! `gc`: what nobody needs goes, what recipes and the last runs need stays.

use std::fs;

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
    project.succeeds(&["gc", "r.yaml", "--keep-runs", "3"]);
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
