//! Files of rows as people have them, through the program: what a recipe's paths mean, and what counts for a fingerprint.

use std::fs;

use crate::support::program::{Project, copy, events, repository, stages};

const ROW: &str = "{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"c\"}\n";

/// A project with the golden files of rows in `data`.
fn project(stage: &str) -> Project {
    let project = Project::empty();
    copy(
        &repository().join("tests/golden/data_files"),
        &project.path("data"),
    );
    project.write(
        "recipe.yaml",
        &format!("version: 1\nstages:\n  rows: {{ import_dataset: {stage} }}\n"),
    );
    project
}

fn rows(project: &Project) -> String {
    let records = project.records();
    records.last().unwrap()["notes"]["rows"].to_string()
}

/// The error of the one stage.
fn error(project: &Project) -> String {
    let ended = project.run(&["run", "recipe.yaml", "--json"]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
    let failed = stages(&events(&ended.stdout), "stage_failed");
    failed["rows"]["error"].as_str().unwrap().to_owned()
}

#[test]
fn packed_arrow_and_saved_files_are_read() {
    for (stage, expected) in [
        ("{ path: data/rows.jsonl.gz }", r#"{"train":3}"#),
        (
            "{ path: data/rows.jsonl.zst, split: test }",
            r#"{"test":3}"#,
        ),
        ("{ path: data/zstd.feather }", r#"{"train":3}"#),
        ("{ path: data/saved_dict }", r#"{"test":3,"train":5}"#),
        // Their last row has no `rejected`.
        (
            "{ path: [data/rows.csv, data/rows.tsv], format: prompt_completion }",
            r#"{"train":6}"#,
        ),
        ("{ path: data/shards }", r#"{"train":3}"#),
        (
            "{ path: data/rows.tsv, format: [csv, prompt_completion], delimiter: \"\\t\" }",
            r#"{"train":3}"#,
        ),
        (
            "{ datasets: [{ path: data/rows.jsonl, weight: 1 }, { path: data/saved, weight: 2 }], \
             stopping_strategy: all_exhausted_without_replacement }",
            r#"{"train":6}"#,
        ),
    ] {
        let project = project(stage);
        project.succeeds(&["run", "recipe.yaml"]);
        assert_eq!(rows(&project), expected, "{stage}");
    }
}

#[test]
fn a_pattern_is_stale_when_what_fits_changes() {
    let project = project("{ path: 'in/**/part-*.jsonl' }");
    fs::create_dir_all(project.path("in/more")).unwrap();
    project.write("in/part-1.jsonl", ROW);
    let run = ["recipe.yaml"];
    assert_eq!(project.ran(&run), ["rows"]);
    assert_eq!(project.ran(&run), [""; 0]);
    project.write("in/other.jsonl", ROW);
    project.write("part-0.jsonl", ROW);
    assert_eq!(project.ran(&run), [""; 0], "neither fits");
    project.write("in/more/part-2.jsonl", &ROW.repeat(2));
    assert_eq!(project.ran(&run), ["rows"]);
    assert_eq!(rows(&project), r#"{"train":3}"#);
    fs::remove_file(project.path("in/more/part-2.jsonl")).unwrap();
    assert_eq!(
        project.ran(&run),
        [""; 0],
        "its result is there from before"
    );
    fs::remove_file(project.path("in/part-1.jsonl")).unwrap();
    let ended = project.run(&["run", "recipe.yaml"]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("no file fits"), "{}", ended.stderr);
}

#[test]
fn a_pattern_keeps_to_the_project_and_away_from_outputs() {
    let project = project("{ path: 'in/*.jsonl' }");
    fs::create_dir_all(project.path("in")).unwrap();
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("x.jsonl"), ROW).unwrap();
    std::os::unix::fs::symlink(outside.path().join("x.jsonl"), project.path("in/x.jsonl")).unwrap();
    let ended = project.run(&["run", "recipe.yaml"]);
    assert!(
        ended
            .stderr
            .contains("`in/x.jsonl` is a link that leaves the project"),
        "{}",
        ended.stderr
    );
    fs::remove_file(project.path("in/x.jsonl")).unwrap();
    project.write("in/x.jsonl", ROW);
    project.write(
        "recipe.yaml",
        "version: 1\nstages:\n  rows: { import_dataset: { path: 'in/**' } }\noutputs: { rows: in/out }\n",
    );
    let ended = project.run(&["run", "recipe.yaml"]);
    assert!(
        ended.stderr.contains("lies where `in/**` looks for files"),
        "{}",
        ended.stderr
    );
}

#[test]
fn a_folder_tells_what_it_leaves_aside() {
    let project = project("{ path: in }");
    fs::create_dir_all(project.path("in")).unwrap();
    project.write("in/train.jsonl", ROW);
    project.write("in/train.csv", "prompt,chosen,rejected\na,b,c\n");
    project.write("in/holdout.jsonl", ROW);
    project.write("in/dataset_info.json", "{}");
    let ended = project.run(&["run", "recipe.yaml"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert_eq!(rows(&project), r#"{"holdout":1,"train":1}"#);
    let told = ended.stdout + &ended.stderr;
    assert!(
        told.contains("`in/train.csv` is left aside: the split `train` is read from `train.jsonl`"),
        "{told}"
    );
}

#[test]
fn what_can_t_be_read_is_told_in_words() {
    let write = |project: &Project, bytes: &[u8]| fs::write(project.path("data/x"), bytes).unwrap();
    let cases: [(&str, &[u8], &[&str]); 8] = [
        (
            "{ path: data/rows.jsonl, delimiter: \";\" }",
            b"",
            &["`data/rows.jsonl` is read as `jsonl`, which has no `delimiter`"],
        ),
        (
            "{ path: data/rows.arrow, encoding: latin-1 }",
            b"",
            &["which has no `encoding`"],
        ),
        (
            "{ path: data/x, format: jsonl }",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n",
            &["`data/x`", "hint: run `git lfs pull`"],
        ),
        (
            "{ path: data/x, format: parquet }",
            b"PK\x03\x04\x1b[2J",
            &["`data/x`", "zip archive"],
        ),
        (
            "{ path: data/x, format: csv }",
            b"prompt,chosen\ncaf\xe9,b\n",
            &["data/x:2: the byte 0xe9 at offset 17", "encoding"],
        ),
        (
            "{ path: data/x, format: csv }",
            b"prompt,chosen\na,b\n\x1b[2J,b,c\n",
            &["data/x:3: row 2 has 3 fields"],
        ),
        (
            "{ path: data/x, format: jsonl }",
            b"\x1f\x8b\x08\0\0\0\0\0\0\x03",
            &["gzip file is cut off"],
        ),
        (
            "{ path: data/utf16.csv }",
            b"",
            &["`data/utf16.csv`", "`encoding: utf-16le`"],
        ),
    ];
    for (stage, bytes, parts) in cases {
        let project = project(stage);
        write(&project, bytes);
        let error = error(&project);
        for part in parts {
            assert!(error.contains(part), "{part:?} is not in: {error}");
        }
        assert!(!error.contains('\u{1b}'), "{error:?}");
        let place = project.path("");
        assert!(!error.contains(place.to_str().unwrap()), "{error}");
    }
}

#[test]
fn a_failure_names_the_row_and_the_stages_place_in_the_recipe() {
    let project = Project::empty();
    let rows = "{\"prompt\": \"p\", \"chosen\": \"c\"}\n{\"prompt\": 3, \"chosen\": \"c\"}\n";
    fs::write(project.path("rows.jsonl"), rows).unwrap();
    let recipe = "version: 1\nstages:\n  rows: { import_dataset: { path: rows.jsonl } }\n";
    fs::write(project.path("recipe.yaml"), recipe).unwrap();
    let ended = project.run(&["run", "recipe.yaml"]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    for expected in [
        "rows.jsonl: row 2: `prompt` is a number: expected text",
        "it is defined at recipe.yaml:3:3",
    ] {
        assert!(ended.stderr.contains(expected), "{}", ended.stderr);
    }
}
