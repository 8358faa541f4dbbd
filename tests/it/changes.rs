//! Files that change while the program works, names and paths at their limits, and what stays after a stop or a failure.

use std::fs::{self, Permissions};
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::faults::{NOBODY, as_nobody, may_be_nobody, open_to_all};
use crate::support::hub::HubServer;
use crate::support::program::{Project, repository};

fn row(prompt: &str) -> String {
    format!("{{\"prompt\": \"{prompt}\", \"chosen\": \"c\", \"rejected\": \"r\"}}\n")
}

/// Files of a folder and those below it.
fn below(folder: &Path) -> Vec<PathBuf> {
    let (mut files, mut open) = (Vec::new(), vec![folder.to_owned()]);
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.is_symlink() {
                open.push(path);
            } else {
                files.push(path);
            }
        }
    }
    files.sort();
    files
}

#[test]
fn a_file_that_grows_while_it_is_read_is_neither_kept_nor_sent() {
    let project = Project::empty();
    project.write(
        "r.yaml",
        "version: 1\nstages:\n  pairs: { import_dataset: { path: pairs.jsonl } }\n",
    );
    project.write("pairs.jsonl", &row("p").repeat(400_000));
    let arguments = ["run", "r.yaml", "--json", "--remote", "shared"];
    let mut child = project.command(&arguments).spawn().unwrap();
    let mut told = Vec::new();
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        if line.contains("stage_started") {
            let path = project.path("pairs.jsonl");
            let mut file = fs::File::options().append(true).open(path).unwrap();
            std::io::Write::write_all(&mut file, row("late").as_bytes()).unwrap();
        }
        told.push(line);
    }
    assert_eq!(child.wait().unwrap().code(), Some(1), "{told:?}");
    let failed = told.iter().find(|line| line.contains("stage_failed"));
    let failed = failed.unwrap();
    assert!(
        failed.contains("`pairs.jsonl` changed while it was read"),
        "{failed}"
    );
    for folder in [".pipeline/v1/records", ".pipeline/v1/artifacts", "shared"] {
        assert_eq!(
            below(&project.path(folder)),
            Vec::<PathBuf>::new(),
            "{folder}"
        );
    }
    assert_eq!(project.ran(&["r.yaml", "--remote", "shared"]), ["pairs"]);
    let rows = &project.records()[0]["notes"]["rows"];
    assert_eq!(rows["train"], 400_001);
}

#[test]
fn a_file_edited_in_place_with_its_old_time_is_read() {
    let project = Project::empty();
    project.write(
        "r.yaml",
        "version: 1\nstages:\n  pairs: { import_dataset: { path: pairs.jsonl } }\n",
    );
    let path = project.path("pairs.jsonl");
    let old = std::time::SystemTime::now() - std::time::Duration::from_hours(1);
    let write = |text: &str| {
        fs::write(&path, text).unwrap();
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.set_modified(old).unwrap();
    };
    write(&row("aa"));
    assert_eq!(project.ran(&["r.yaml"]), ["pairs"]);
    project.succeeds(&["lock", "r.yaml"]);
    let pinned = project.read("r.yaml.lock");
    write(&row("bb"));
    project.succeeds(&["lock", "r.yaml", "--update"]);
    assert_ne!(project.read("r.yaml.lock"), pinned);
    assert_eq!(project.ran(&["r.yaml"]), ["pairs"]);
}

#[test]
fn what_is_finished_is_put_in_its_place_beside_a_failure() {
    let project = Project::empty();
    project.write("good.jsonl", &row("p"));
    project.write("bad.jsonl", "{\"prompt\": \n");
    project.write(
        "r.yaml",
        "version: 1\nstages:\n  good: { import_dataset: { path: good.jsonl } }\n  bad: { import_dataset: { path: bad.jsonl } }\n\
         outputs:\n  good: out/good\n  bad: out/bad\n",
    );
    assert_eq!(project.run(&["run", "r.yaml"]).code, Some(1));
    assert!(!project.path("out").exists());
    let ended = project.run(&["run", "r.yaml", "--keep-going"]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(project.path("out/good/train.parquet").is_file());
    assert!(!project.path("out/bad").exists());
}

#[test]
fn empty_texts_are_refused_with_their_place() {
    let project = Project::empty();
    project.write(
        "r.yaml",
        "\
version: 1
vars: { nothing: \"\" }
stages:
  pairs: { import_dataset: { path: \"\" } }
  other: { import_dataset: { path: \" \", columns: { prompt: \"\" } } }
  third: { import_dataset: { path: \"${nothing}\", split: \"\" } }
  hub: { download_dataset: { repo: \"\", files: [a, \"\"], name: \"\" } }
  model: { import_model: { path: \"\" } }
  base: { download_model: { repo: a/b, revision: \"\", allow_patterns: [\"\"] } }
  chats: { apply_chat_template: { dataset: pairs, template: \"\" } }
",
    );
    let ended = project.run(&["validate", "r.yaml"]);
    assert_eq!(ended.code, Some(2));
    for expected in [
        "`path` of `import_dataset` is empty",
        "r.yaml:4:36",
        "r.yaml:5:36",
        "`columns.prompt` of `import_dataset` is empty",
        "`split` of `import_dataset` is empty",
        "`repo` of `download_dataset` is empty",
        "`files[1]` of `download_dataset` is empty",
        "`name` of `download_dataset` is empty",
        "`path` of `import_model` is empty",
        "`revision` of `download_model` is empty",
        "`allow_patterns[0]` of `download_model` is empty",
        "`template` of `apply_chat_template` is empty",
    ] {
        assert!(
            ended.stderr.contains(expected),
            "no `{expected}` in\n{}",
            ended.stderr
        );
    }
    assert_eq!(
        ended.stderr.matches("error").count(),
        12,
        "{}",
        ended.stderr
    );
}

#[test]
fn long_names_are_no_trouble() {
    let project = Project::empty();
    project.write("pairs.jsonl", &row("p"));
    let recipe = |stage: &str, split: &str| {
        format!(
            "version: 1\nstages:\n  ? {stage}\n  : {{ import_dataset: {{ path: pairs.jsonl, split: {split} }} }}\n"
        )
    };
    let stage = "s".repeat(400);
    let file = "r".repeat(250) + ".yaml";
    project.write(&file, &recipe(&stage, "train"));
    assert_eq!(project.ran(&[&file]), [stage.as_str()]);
    assert_eq!(project.ran(&[&file]), [""; 0]);
    let ended = project.run(&["lock", &file]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("too long"), "{}", ended.stderr);
    project.write("r.yaml", &recipe("s", &"t".repeat(300)));
    let ended = project.run(&["validate", "r.yaml"]);
    assert!(ended.stderr.contains("`split`"), "{}", ended.stderr);
}

/// The quickstart with a training that takes its time and saves each step.
fn slow(project: &Project) {
    let text = project.read("recipes/quickstart.yaml");
    let text = text
        .replace("num_train_epochs: 8", "max_steps: 400")
        .replace("save_steps: 50", "save_steps: 1");
    assert!(text.contains("max_steps: 400") && text.contains("save_steps: 1\n"));
    project.write("recipes/slow.yaml", &text);
}

#[test]
fn a_stopped_training_goes_on_after_a_collection() {
    let project = Project::with_recipes();
    slow(&project);
    let arguments = ["run", "recipes/slow.yaml", "base", "--json"];
    let stopped = |signal: &str, steps: u64| {
        let mut child = project.command(&arguments).spawn().unwrap();
        let (mut told, mut sent) = (Vec::new(), false);
        for line in BufReader::new(child.stdout.take().unwrap()).lines() {
            // The last line may be cut.
            let Ok(event) = serde_json::from_str::<Value>(&line.unwrap()) else {
                break;
            };
            let done = event["done"].as_u64().filter(|_| event["unit"] == "steps");
            if !sent && done.is_some_and(|done| done >= steps) {
                sent = true;
                let kill = format!("kill {signal} {}", child.id());
                let status = Command::new("sh").args(["-c", &kill]).status();
                assert!(status.unwrap().success());
            }
            told.extend(event["text"].as_str().map(str::to_owned));
        }
        child.wait().unwrap();
        assert!(sent, "{told:?}");
        told
    };
    let begins = stopped("-INT", 3);
    assert!(
        begins
            .iter()
            .any(|text| text.contains("starts at the beginning")),
        "{begins:?}"
    );
    project.succeeds(&["gc", "recipes/slow.yaml", "--keep-runs", "0"]);
    let goes_on = stopped("-KILL", 8);
    assert!(
        goes_on
            .iter()
            .any(|text| text.contains("from a checkpoint")),
        "{goes_on:?}"
    );
    // A killed run is in no history.
    project.succeeds(&["gc", "recipes/slow.yaml", "--keep-runs", "0"]);
    let goes_on = stopped("-INT", 12);
    assert!(
        goes_on
            .iter()
            .any(|text| text.contains("from a checkpoint")),
        "{goes_on:?}"
    );
    // Of another training it is of no use.
    let text = project.read("recipes/slow.yaml");
    project.write("recipes/slow.yaml", &text.replace("3.0e-3", "2.0e-3"));
    let told = project.succeeds(&["gc", "recipes/slow.yaml", "--keep-runs", "0"]);
    assert!(told.contains("unfinished work"), "{told}");
    assert_eq!(
        below(&project.path(".pipeline/v1/scratch")),
        Vec::<PathBuf>::new()
    );
}

/// A hub with the golden model.
fn hub() -> HubServer {
    let server = HubServer::start();
    let files = below(&repository().join("tests/golden/model"));
    let files: Vec<_> = files
        .iter()
        .map(|path| {
            let name = path.file_name().unwrap().to_str().unwrap();
            (name, fs::read(path).unwrap())
        })
        .collect();
    let files: Vec<_> = files
        .iter()
        .map(|(name, bytes)| (*name, bytes.as_slice()))
        .collect();
    server.model("some/model", &files);
    server
}

#[test]
fn the_hubs_shared_cache_stays_as_it_was() {
    let server = hub();
    let mut project = Project::empty();
    project.variable("HF_ENDPOINT", &server.endpoint);
    project.write(
        "r.yaml",
        "\
version: 1
stages:
  base: { download_model: { repo: some/model } }
  adapter: { attach_lora: { model: base, r: 2, target_modules: [q_proj] } }
  merged: { merge: { model: base, adapter: adapter } }
outputs: { base: out/base, merged: out/merged }
",
    );
    project.succeeds(&["run", "r.yaml"]);
    let cache = project.path("home/.cache/huggingface/hub");
    // Another program's modes and times.
    for path in below(&cache) {
        if !path.is_symlink() {
            fs::set_permissions(&path, Permissions::from_mode(0o664)).unwrap();
        }
    }
    fs::remove_dir_all(project.path(".pipeline")).unwrap();
    fs::create_dir(project.path(".pipeline")).unwrap();
    fs::remove_dir_all(project.path("out")).unwrap();
    let state = || {
        let files = below(&cache).into_iter();
        let files = files.filter(|path| {
            path.starts_with(&cache) && path.components().any(|part| part.as_os_str() == "blobs")
        });
        files
            .map(|path| {
                let found = fs::metadata(&path).unwrap();
                let bytes = blake3::hash(&fs::read(&path).unwrap());
                (
                    path,
                    found.mode(),
                    found.uid(),
                    found.gid(),
                    found.mtime(),
                    found.mtime_nsec(),
                    bytes,
                )
            })
            .collect::<Vec<_>>()
    };
    let before = state();
    assert!(before.len() > 5, "{before:?}");
    project.succeeds(&["run", "r.yaml"]);
    assert_eq!(state(), before);
    // The large file is not on the disk twice.
    let weights = |path: &str| {
        let path = project.path(path);
        let found = below(&path)
            .into_iter()
            .find(|path| path.ends_with("model.safetensors"));
        found.map(|path| fs::metadata(path).unwrap())
    };
    let large = below(&cache)
        .into_iter()
        .map(|path| fs::metadata(path).unwrap())
        .max_by_key(std::fs::Metadata::len)
        .unwrap();
    let shares = below(&project.path(".pipeline/v1/artifacts"))
        .into_iter()
        .any(|path| fs::metadata(path).unwrap().ino() == large.ino());
    assert!(shares || large.nlink() == 1);
    assert!(weights("out/base").is_some());
    for arguments in [&["run", "r.yaml", "--verify"][..], &["gc", "r.yaml"]] {
        project.succeeds(arguments);
        assert_eq!(state(), before);
    }
    assert_eq!(project.ran(&["r.yaml"]), [""; 0]);

    // Whoever writes into the cache damages the result; it is noticed and made anew, and what is in the cache then is right again.
    if shares {
        let path = below(&cache)
            .into_iter()
            .find(|path| !path.is_symlink() && fs::metadata(path).unwrap().ino() == large.ino())
            .unwrap();
        let mut bytes = fs::read(&path).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(&path, &bytes).unwrap();
        fs::File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_modified(large.modified().unwrap())
            .unwrap();
        // Whether the output is affected as well is another matter.
        fs::remove_dir_all(project.path("out")).unwrap();
        let why = project.succeeds(&["why", "r.yaml", "base"]);
        assert!(why.contains("changed") || why.contains("damaged"), "{why}");
        assert_eq!(project.ran(&["r.yaml"]), ["base"]);
    }
    fs::write(
        project.path("empty.yaml"),
        "version: 1\nstages:\n  a: { import_dataset: { path: none.jsonl } }\n",
    )
    .unwrap();
    let now = state();
    project.succeeds(&["gc", "empty.yaml", "--keep-runs", "0"]);
    assert_eq!(state(), now);
}

#[test]
fn a_cache_of_another_owner_can_be_used() {
    let server = hub();
    let mut project = Project::empty();
    project.variable("HF_ENDPOINT", &server.endpoint);
    let recipe = "version: 1\nstages:\n  base: { download_model: { repo: some/model } }\n";
    project.write("r.yaml", recipe);
    if !may_be_nobody(&project) {
        return;
    }
    project.succeeds(&["run", "r.yaml"]);
    fs::remove_dir_all(project.path(".pipeline")).unwrap();
    fs::create_dir(project.path(".pipeline")).unwrap();
    // The group may write, and `nobody` is of the group.
    let mut open = vec![project.path("home")];
    while let Some(folder) = open.pop() {
        chown(&folder, None, Some(NOBODY)).unwrap();
        fs::set_permissions(&folder, Permissions::from_mode(0o775)).unwrap();
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.is_symlink() {
                open.push(path);
            } else if !path.is_symlink() {
                chown(&path, None, Some(NOBODY)).unwrap();
                fs::set_permissions(&path, Permissions::from_mode(0o664)).unwrap();
            }
        }
    }
    open_to_all(&project, 0o777);
    let ended = as_nobody(&project, &["run", "r.yaml"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    for path in below(&project.path("home")) {
        let found = fs::symlink_metadata(&path).unwrap();
        assert!(
            found.is_symlink() || found.mode() & 0o777 != 0o444,
            "{}",
            path.display()
        );
    }
    let ended = as_nobody(&project, &["run", "r.yaml", "--verify"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
}
