//! The shared cache: two machines, one remote, and everything that can be wrong with it.

#[cfg(all(feature = "aws", feature = "http"))]
mod faults;
#[cfg(feature = "aws")]
mod s3;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::program::{Ended, Project, events, stages};

const RECIPE: &str = "\
version: 1
stages:
  pairs: { import_dataset: { path: pairs.jsonl } }
  split: { split_dataset: { dataset: pairs, test_size: 0.25, seed: 1 } }
  chats: { apply_chat_template: { dataset: split, template: chat.jinja } }
outputs:
  chats: out/chats
";
const TEMPLATE: &str = "{%- for message in messages %}[{{ message.content }}]{% endfor %}";

fn rows(count: usize) -> String {
    let row = |n| format!("{{\"prompt\": \"p{n}\", \"chosen\": \"c\", \"rejected\": \"r\"}}\n");
    (0..count).map(row).collect()
}

/// A machine with the recipe in some folder of its own.
fn machine(folder: &str) -> Project {
    let project = Project::empty();
    project.write(&format!("{folder}/r.yaml"), RECIPE);
    project.write(&format!("{folder}/chat.jinja"), TEMPLATE);
    project.write(&format!("{folder}/pairs.jsonl"), &rows(8));
    project
}

/// A machine that uses a remote by its environment.
fn member(remote: &str) -> Project {
    let mut project = machine("here");
    project.variable("PIPELINE_REMOTE", remote);
    project
}

fn fingerprints(project: &Project) -> BTreeSet<String> {
    let records = project.records();
    records
        .iter()
        .map(|record| record["fingerprint"].to_string())
        .collect()
}

/// Runs with `--json`, and gives the events and what was told.
#[track_caller]
fn run(project: &Project, arguments: &[&str]) -> (Vec<Value>, Ended) {
    let ended = project.run(&[&["run", "--json"], arguments].concat());
    (events(&ended.stdout), ended)
}

fn names(events: &[Value], sort: &str) -> Vec<String> {
    stages(events, sort).into_keys().collect()
}

fn warnings(events: &[Value]) -> Vec<String> {
    let warnings = events.iter().filter(|event| event["event"] == "warning");
    warnings
        .map(|event| event["text"].as_str().unwrap().to_owned())
        .collect()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut open = vec![folder.to_owned()];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else {
                files.push(path);
            }
        }
    }
    files.sort_unstable();
    files
}

fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let inside = |path: PathBuf| {
        let name = path.strip_prefix(folder).unwrap().to_owned();
        (name, fs::read(path).unwrap())
    };
    files(folder).into_iter().map(inside).collect()
}

const NOTHING: [&str; 0] = [];

#[test]
fn a_second_machine_runs_nothing() {
    let remote = tempfile::tempdir().unwrap();
    let url = format!("file://{}", remote.path().display());
    let (first, second) = (machine("here"), machine("elsewhere/deep"));
    first.succeeds(&["lock", "here/r.yaml"]);
    second.write(
        "elsewhere/deep/r.yaml.lock",
        &first.read("here/r.yaml.lock"),
    );
    let at = |recipe| [recipe, "--locked", "--remote", &url];

    let (events, ended) = run(&first, &at("here/r.yaml"));
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert_eq!(names(&events, "stage_done"), ["chats", "pairs", "split"]);
    assert_eq!(names(&events, "stage_sent"), ["chats", "pairs", "split"]);

    // A plan asks for records, and fetches nothing.
    let told = second.succeeds(
        &[
            &["plan"],
            &at("elsewhere/deep/r.yaml")[..1],
            &["--remote", &url],
        ]
        .concat(),
    );
    assert_eq!(told.matches("(in the remote)").count(), 3, "{told}");
    assert!(told.ends_with("3 fresh, 0 to run, 0 waiting\n"), "{told}");
    let why = second.succeeds(&["why", "elsewhere/deep/r.yaml", "split", "--remote", &url]);
    assert!(why.contains("made elsewhere"), "{why}");
    let artifacts = second.path(".pipeline/v1/artifacts");
    assert!(!artifacts.exists());

    let (events, ended) = run(&second, &at("elsewhere/deep/r.yaml"));
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert_eq!(names(&events, "stage_done"), NOTHING);
    assert_eq!(names(&events, "stage_fresh"), ["chats", "pairs", "split"]);
    let split = &stages(&events, "stage_fresh")["split"];
    assert_eq!(split["remote"], true);
    assert_eq!(warnings(&events), NOTHING);

    assert_eq!(fingerprints(&first), fingerprints(&second));
    assert_eq!(
        contents(&first.path("out/chats")),
        contents(&second.path("out/chats"))
    );
    // Only what is wanted here came: the output's files.
    assert_eq!(names(&events, "stage_fetched"), ["chats"]);
    assert_eq!(fs::read_dir(&artifacts).unwrap().count(), 2);

    // With nothing to do, nobody is asked: not even whether the remote is there.
    let (events, _) = run(
        &second,
        &["elsewhere/deep/r.yaml", "--remote", "http://127.0.0.1:1/"],
    );
    assert_eq!(names(&events, "stage_done"), NOTHING);
    assert_eq!(warnings(&events), NOTHING);
    // And without any remote it is the same.
    assert_eq!(second.ran(&["elsewhere/deep/r.yaml"]), NOTHING);
    let plan = second.succeeds(&["plan", "elsewhere/deep/r.yaml"]);
    assert!(plan.ends_with("3 fresh, 0 to run, 0 waiting\n"), "{plan}");
}

#[test]
fn reasons_are_told_from_what_another_machine_made() {
    let remote = tempfile::tempdir().unwrap();
    let url = remote.path().display().to_string();
    let (first, mut second) = (member(&url), member(&url));
    first.succeeds(&["run", "here/r.yaml"]);
    assert_eq!(second.ran(&["here/r.yaml"]), NOTHING);

    // The second machine never ran these stages, and knows them as the first one ran them.
    let edit = "!{{ message.content }}!";
    second.write(
        "here/chat.jinja",
        &TEMPLATE.replace("[{{ message.content }}]", edit),
    );
    second.write("here/pairs.jsonl", &rows(12));
    let set = ["--set", "stages.split.split_dataset.seed=2"];
    second.variable("PIPELINE_REMOTE", "");
    let why = |stage: &str| {
        let told = second.succeeds(&[&["why", "here/r.yaml", stage], &set[..]].concat());
        told.split("\n\n").next().unwrap().to_owned()
    };
    let told = why("split");
    assert!(told.contains("`seed` changed from 1 to 2"), "{told}");
    let told = why("chats");
    assert!(told.contains("-    1 | {%- for"), "{told}");
    assert!(told.contains(edit), "{told}");
    second.succeeds(&[&["run", "here/r.yaml"], &set[..]].concat());
    let diff = second.succeeds(&["diff", "here/r.yaml"]);
    for expected in [
        "run 1 -> run 2\n",
        "`seed` changed from 1 to 2",
        "    rows {\"train\":8} -> {\"train\":12}\n",
        edit,
    ] {
        assert!(diff.contains(expected), "no `{expected}` in\n{diff}");
    }
}

#[test]
fn files_are_fetched_when_a_stage_needs_them() {
    let remote = tempfile::tempdir().unwrap();
    let url = remote.path().display().to_string();
    let (first, second) = (member(&url), member(&url));
    first.succeeds(&["run", "here/r.yaml"]);
    second.succeeds(&["run", "here/r.yaml"]);

    // Another template: only that stage runs, with the split from the remote.
    second.write("here/chat.jinja", &format!("{TEMPLATE}!"));
    let (events, _) = run(&second, &["here/r.yaml"]);
    assert_eq!(names(&events, "stage_done"), ["chats"]);
    assert_eq!(names(&events, "stage_fetched"), ["split"]);

    // Its result is in the remote now, for the first machine.
    first.write("here/chat.jinja", &format!("{TEMPLATE}!"));
    let (events, _) = run(&first, &["here/r.yaml"]);
    assert_eq!(names(&events, "stage_done"), NOTHING);
    assert_eq!(names(&events, "stage_fetched"), ["chats"]);
    assert_eq!(
        contents(&first.path("out/chats")),
        contents(&second.path("out/chats"))
    );

    // Without a remote, what was left there is made again, from the start if need be; and a plan says so.
    let mut third = member(&url);
    third.succeeds(&["run", "here/r.yaml"]);
    third.variable("PIPELINE_REMOTE", "");
    third.write("here/chat.jinja", &format!("{TEMPLATE}?"));
    let plan = third.succeeds(&["plan", "here/r.yaml"]);
    assert!(plan.contains("\n0 fresh, 1 to run, 2 waiting"), "{plan}");
    assert_eq!(third.ran(&["here/r.yaml"]), ["chats", "pairs", "split"]);
}

#[test]
fn a_stage_that_becomes_known_late_is_found_in_the_remote() {
    let remote = tempfile::tempdir().unwrap();
    let url = remote.path().display().to_string();
    let (first, second) = (member(&url), member(&url));
    first.succeeds(&["run", "here/r.yaml"]);
    // Other rows that are the same after import: the import runs, and the rest is the remote's.
    second.write("here/pairs.jsonl", &rows(8).replace("\", ", "\",  "));
    let (events, ended) = run(&second, &["here/r.yaml"]);
    assert_eq!(names(&events, "stage_done"), ["pairs"], "{}", ended.stderr);
    assert_eq!(names(&events, "stage_fetched"), ["chats", "split"]);
    // Both switches.
    let third = member(&url);
    third.write("here/pairs.jsonl", &rows(9));
    let before = files(remote.path()).len();
    let (events, _) = run(&third, &["here/r.yaml", "--no-push"]);
    assert_eq!(names(&events, "stage_sent"), NOTHING);
    assert_eq!(files(remote.path()).len(), before);
    let fourth = member(&url);
    let (events, _) = run(&fourth, &["here/r.yaml", "--no-pull"]);
    assert_eq!(names(&events, "stage_done").len(), 3);
    let sent = stages(&events, "stage_sent");
    assert!(sent.values().all(|event| event["files"] == 0), "{sent:?}");
}

#[test]
fn the_project_says_where_the_remote_is() {
    let project = machine("here");
    fs::create_dir(project.path("team")).unwrap();
    let settings = |text: &str| project.write("pipeline.config.yaml", text);
    settings("version: 1\nremote: { url: team, push: false }\n");
    let told = project.succeeds(&["cache", "trust"]);
    assert!(told.contains("team` and taken from there"), "{told}");
    project.succeeds(&["run", "here/r.yaml"]);
    assert_eq!(files(&project.path("team")), Vec::<PathBuf>::new());
    settings("version: 1\nremote: { url: team }\n");
    assert_eq!(project.succeeds(&["cache", "ls"]), "0 results, 0 B\n");
    project.succeeds(&["cache", "push", "here/r.yaml"]);
    let list = project.succeeds(&["cache", "ls"]);
    assert!(
        list.contains("split_dataset") && list.contains("3 results, "),
        "{list}"
    );

    for (text, hint) in [
        ("version: 1\nremote: { uri: team }\n", "unknown field `uri`"),
        ("version: 2\n", "version 2 is not known"),
        (
            "version: 1\nremote: { url: 'ftp://host/x' }\n",
            "expected a folder",
        ),
        (
            "version: 1\nremote: { url: 'https://me:hush@host/x' }\n",
            "holds credentials",
        ),
        (
            "version: 1\nremote: 'https://me:hush@host/x'\n",
            "expected a mapping with `url`",
        ),
        (
            "version: 1\nremote: [{ url: 'https://me:hush@host/x' }]\n",
            "expected a mapping with `url`",
        ),
    ] {
        settings(text);
        let ended = project.run(&["run", "here/r.yaml"]);
        assert_eq!(ended.code, Some(2), "{text}");
        assert!(ended.stderr.contains(hint), "{}", ended.stderr);
        assert!(!ended.stderr.contains("hush"), "{}", ended.stderr);
    }
    settings("version: 1\nremote: { url: nowhere, required: true }\n");
    project.succeeds(&["cache", "trust"]);
    let ended = project.run(&["run", "here/r.yaml"]);
    assert_eq!(ended.code, Some(1));
    assert!(
        ended.stderr.contains("there is no folder"),
        "{}",
        ended.stderr
    );
    // The command line is asked first.
    let ended = project.run(&["run", "here/r.yaml", "--remote", "team"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
}

#[test]
fn a_remote_that_a_project_brings_along_is_asked_for() {
    let outside = tempfile::tempdir().unwrap();
    let url = outside.path().display().to_string();
    let project = machine("here");
    project.write(
        "pipeline.config.yaml",
        &format!("version: 1\nremote: {{ url: '{url}' }}\n"),
    );
    let refused = |arguments: &[&str]| {
        let ended = project.run(arguments);
        assert_eq!(ended.code, Some(2), "{arguments:?}");
        let told = ended.stderr;
        assert!(told.contains("not allowed on this machine"), "{told}");
        assert!(told.contains("pipeline cache trust"), "{told}");
        assert_eq!(files(outside.path()), Vec::<PathBuf>::new());
    };
    refused(&["run", "here/r.yaml"]);
    refused(&["plan", "here/r.yaml"]);
    refused(&["cache", "push", "--all"]);
    refused(&["cache", "verify", "--remove"]);
    // Whoever names a remote has one, and whoever wants none has none.
    project.succeeds(&["run", "here/r.yaml", "--remote", ""]);
    project.succeeds(&["cache", "trust"]);
    project.succeeds(&["cache", "push", "--all"]);
    assert!(!files(outside.path()).is_empty());
    project.succeeds(&["cache", "trust", "--revoke"]);
    fs::remove_dir_all(outside.path().join("v1")).unwrap();
    refused(&["run", "here/r.yaml"]);
    // Another address, or another project, is another question.
    project.succeeds(&["cache", "trust"]);
    project.write(
        "pipeline.config.yaml",
        &format!("version: 1\nremote: {{ url: '{url}/v2' }}\n"),
    );
    refused(&["run", "here/r.yaml"]);
    // Settings that are no file of the project are not read: they might never end, or be told.
    let settings = project.path("pipeline.config.yaml");
    let secret = outside.path().join("secret");
    fs::write(&secret, "hush-hush").unwrap();
    for target in [secret.to_str().unwrap(), "/dev/zero"] {
        fs::remove_file(&settings).unwrap();
        std::os::unix::fs::symlink(target, &settings).unwrap();
        let ended = project.run(&["run", "here/r.yaml"]);
        assert_eq!(ended.code, Some(2), "{}", ended.stderr);
        assert!(ended.stderr.contains("pipeline.config.yaml"));
        assert!(!ended.stderr.contains("hush"), "{}", ended.stderr);
    }
}

#[test]
fn what_killed_writers_left_in_a_folder_goes_when_it_is_old() {
    let remote = tempfile::tempdir().unwrap();
    let url = remote.path().display().to_string();
    let project = member(&url);
    project.succeeds(&["run", "here/r.yaml"]);
    let whole = files(remote.path());
    let beside = |path: &Path, end: &str| PathBuf::from(format!("{}{end}", path.display()));
    let old = fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH);
    let write = |path: &Path, is_old: bool| {
        fs::write(path, "half").unwrap();
        if is_old {
            let file = fs::File::options().append(true).open(path).unwrap();
            file.set_times(old).unwrap();
        }
    };
    // One of each sort, one that may still be written, and files of others.
    let left: Vec<_> = whole.iter().map(|path| beside(path, "#1")).collect();
    let kept = [
        beside(&whole[0], "#2"),
        beside(&whole[0], "#mine"),
        remote.path().join("v1/notes#1"),
        remote.path().join("notes#1"),
    ];
    for path in left.iter().chain(&kept[1..]) {
        write(path, true);
    }
    write(&kept[0], false);
    let would = project.succeeds(&["cache", "gc", "here/r.yaml", "--dry-run"]);
    assert_eq!(would.matches("unfinished  ").count(), left.len(), "{would}");
    assert!(left.iter().all(|path| path.exists()));
    project.succeeds(&["cache", "gc", "here/r.yaml"]);
    assert!(left.iter().all(|path| !path.exists()));
    assert!(kept.iter().chain(&whole).all(|path| path.exists()));
}

#[test]
fn a_remote_is_listed_checked_and_cleaned() {
    let remote = tempfile::tempdir().unwrap();
    let url = remote.path().display().to_string();
    let project = member(&url);
    project.succeeds(&["run", "here/r.yaml", "--no-push"]);
    let told = project.succeeds(&["cache", "push", "--all"]);
    assert!(told.contains("3 results are there; "), "{told}");
    let told = project.succeeds(&["cache", "push", "here/r.yaml", "split"]);
    assert_eq!(told, "1 results are there; 0 files, 0 B sent\n");
    let list: Value = serde_json::from_str(&project.succeeds(&["cache", "ls", "--json"])).unwrap();
    assert_eq!(list.as_array().unwrap().len(), 3);
    let told = project.succeeds(&["cache", "verify"]);
    assert!(told.ends_with("; 0 damaged\n"), "{told}");

    let other = member(&url);
    let told = other.succeeds(&["cache", "pull", "here/r.yaml"]);
    assert!(told.ends_with("3 of 3 results are here\n"), "{told}");
    assert_eq!(other.ran(&["here/r.yaml", "--remote", ""]), NOTHING);

    // A damaged file is found, removed, and sent again.
    let blob = files(&remote.path().join("v1/blobs")).remove(0);
    let good = fs::read(&blob).unwrap();
    fs::write(&blob, b"bad").unwrap();
    let ended = project.run(&["cache", "verify"]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.stdout.contains("; 1 damaged\n"), "{}", ended.stdout);
    project.succeeds(&["cache", "verify", "--remove"]);
    assert_eq!(project.run(&["cache", "verify"]).code, Some(1));
    project.succeeds(&["cache", "push", "--all"]);
    assert_eq!(fs::read(&blob).unwrap(), good);
    project.succeeds(&["cache", "verify"]);

    // Results of another template that nobody needs any more, months later.
    let old = fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH);
    project.succeeds(&[
        "run",
        "here/r.yaml",
        "--set",
        "stages.split.split_dataset.seed=2",
    ]);
    for file in files(remote.path()) {
        let file = fs::File::options().append(true).open(file).unwrap();
        file.set_times(old).unwrap();
    }
    let would = project.succeeds(&["cache", "gc", "here/r.yaml", "--dry-run"]);
    assert_eq!(would.matches("record  ").count(), 2, "{would}");
    assert!(would.ends_with(" would be freed\n"), "{would}");
    let all = files(remote.path()).len();
    project.succeeds(&["cache", "gc", "here/r.yaml"]);
    assert!(files(remote.path()).len() < all);
    project.succeeds(&["cache", "verify"]);
    let list = project.succeeds(&["cache", "ls"]);
    assert!(list.contains("3 results, "), "{list}");
    let third = member(&url);
    assert_eq!(third.ran(&["here/r.yaml"]), NOTHING);
}

#[test]
fn unchanged_files_of_a_model_are_not_sent_again() {
    let remote = tempfile::tempdir().unwrap();
    let mut project = Project::empty();
    project.variable("PIPELINE_REMOTE", &remote.path().display().to_string());
    project.write("pairs.jsonl", &rows(40));
    project.write(
        "r.yaml",
        "\
version: 1
stages:
  pairs: { import_dataset: { path: pairs.jsonl } }
  model:
    create_model: { dataset: pairs, vocab_size: 300, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
                    num_attention_heads: 2, num_key_value_heads: 1, max_position_embeddings: 32, seed: 1 }
",
    );
    let blobs = || files(&remote.path().join("v1/blobs")).len();
    let (events, ended) = run(&project, &["r.yaml"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let first = stages(&events, "stage_sent")["model"]["files"]
        .as_u64()
        .unwrap();
    assert!(first > 2, "weights, a configuration, a tokenizer");
    let before = blobs();
    let set = "stages.model.create_model.seed=2";
    let (events, _) = run(&project, &["r.yaml", "--set", set]);
    assert_eq!(stages(&events, "stage_sent")["model"]["files"], 1);
    assert_eq!(blobs(), before + 1);

    // And who has the first model fetches only the weights of the second.
    let mut other = Project::empty();
    other.variable("PIPELINE_REMOTE", &remote.path().display().to_string());
    for name in ["r.yaml", "pairs.jsonl"] {
        other.write(name, &project.read(name));
    }
    let (events, _) = run(&other, &["r.yaml"]);
    assert_eq!(stages(&events, "stage_fetched")["model"]["files"], first);
    let (events, _) = run(&other, &["r.yaml", "--set", set]);
    assert_eq!(names(&events, "stage_done"), NOTHING);
    assert_eq!(stages(&events, "stage_fetched")["model"]["files"], 1);
}
