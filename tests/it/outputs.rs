//! Where results may be put, what is never touched there, and what reaches the terminal.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use crate::support::program::{Ended, Project};

const ROW: &str = "{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"c\"}\n";

/// A project whose one result goes to `output`.
fn project(output: &str) -> Project {
    let project = Project::empty();
    project.write("data/pairs.jsonl", ROW);
    recipe(&project, output);
    project
}

fn recipe(project: &Project, output: &str) {
    let output = serde_json::to_string(output).unwrap();
    let recipe = format!(
        "version: 1\nstages:\n  pairs: {{ import_dataset: {{ path: ../data/pairs.jsonl }} }}\noutputs:\n  pairs: {output}\n"
    );
    project.write("recipes/r.yaml", &recipe);
}

const RUN: [&str; 2] = ["run", "recipes/r.yaml"];

/// The recipe is refused by every command, even by those that may overwrite, with the place of the output.
#[track_caller]
fn refused(project: &Project, told: &str) {
    for arguments in [
        &["validate", "recipes/r.yaml"][..],
        &["plan", "recipes/r.yaml"],
        &["run", "recipes/r.yaml", "--overwrite-outputs"],
    ] {
        let ended = project.run(arguments);
        assert_eq!(ended.code, Some(2), "{arguments:?}: {}", ended.stderr);
        assert!(ended.stderr.contains(told), "{told}: {}", ended.stderr);
        assert!(ended.stderr.contains("r.yaml:5:10"), "{}", ended.stderr);
    }
}

#[track_caller]
fn fails(project: &Project, arguments: &[&str], told: &str) -> Ended {
    let ended = project.run(arguments);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains(told), "{}", ended.stderr);
    ended
}

#[test]
fn nothing_but_folders_for_results_can_be_an_output() {
    for (output, told) in [
        (".git", "lies in `.git`"),
        (".git/hooks", "lies in `.git`"),
        ("sub/.GIT/hooks", "lies in `.GIT`"),
        (".git./x", "lies in `.git.`"),
        ("out/.pipeline", "lies in the store"),
        (".Pipeline/v1", "lies in the store"),
        ("pipeline.config.yaml", "is the project's settings"),
        ("Pipeline.Config.yaml/x", "lies in the project's settings"),
        ("recipes/r.yaml", "is the recipe"),
        ("recipes/r.yaml.lock", "is the lock file"),
        ("recipes", "holds the "),
        ("RECIPES", "holds the "),
        (
            "data",
            "holds `../data/pairs.jsonl`, which the recipe reads",
        ),
        (
            "data/pairs.jsonl",
            "is `../data/pairs.jsonl`, which the recipe reads",
        ),
        ("data/pairs.jsonl/x", "lies in"),
        ("out/../../x", "leaves the project"),
        ("/tmp/x", "is an absolute path"),
        ("C:\\x", "backslash"),
        ("out\u{1b}[2J", "control character"),
        ("notes/x", "lies in `notes`, which is no folder"),
        (&"x".repeat(300), "more than 255 bytes"),
        ("dangling/x", "a link that leads nowhere"),
    ] {
        let project = project(output);
        project.write("notes", "mine");
        symlink("nowhere", project.path("dangling")).unwrap();
        refused(&project, told);
    }
    let project = project("out/pairs");
    fs::create_dir(project.path("elsewhere")).unwrap();
    for store in ["out", "out/pairs/store"] {
        let arguments = [&RUN[..], &["--store", store]].concat();
        assert_eq!(project.run(&arguments).code, Some(2), "{store}");
    }
    project.succeeds(&[&RUN[..], &["--store", "elsewhere"]].concat());
}

#[test]
fn outputs_do_not_leave_by_links() {
    let outside = tempfile::tempdir().unwrap();
    let project = project("out/deep/pairs");
    symlink(outside.path(), project.path("out")).unwrap();
    refused(
        &project,
        "lies behind `out`, a link that leaves the project",
    );
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    // Whoever allows that folder gets it there.
    let folder = outside.path().to_str().unwrap();
    project.succeeds(&[&RUN[..], &["--allow-path", folder]].concat());
    assert!(outside.path().join("deep/pairs/train.parquet").exists());
    // A link that stays inside leads where it leads, but not to what is no place for results.
    fs::remove_file(project.path("out")).unwrap();
    fs::create_dir(project.path("inside")).unwrap();
    symlink("inside", project.path("out")).unwrap();
    project.succeeds(&RUN);
    assert!(project.path("inside/deep/pairs/train.parquet").exists());
    fs::remove_file(project.path("out")).unwrap();
    symlink(".pipeline", project.path("out")).unwrap();
    refused(&project, "lies in the store");
    // The store itself.
    fs::remove_file(project.path("out")).unwrap();
    fs::remove_dir_all(project.path(".pipeline")).unwrap();
    symlink(outside.path(), project.path(".pipeline")).unwrap();
    project.write("pipeline.config.yaml", "version: 1\n");
    let ended = project.run(&RUN);
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("is a link that leaves"),
        "{}",
        ended.stderr
    );
    assert!(!outside.path().join("v1").exists());
    project.succeeds(&[&RUN[..], &["--allow-path", folder]].concat());
    project.succeeds(&[&RUN[..], &["--store", folder]].concat());
}

#[test]
fn a_store_has_no_folders_elsewhere() {
    for link in ["v1", "v1/artifacts", "v1/records", "v1/last"] {
        let outside = tempfile::tempdir().unwrap();
        let project = project("out/pairs");
        project.write("pipeline.config.yaml", "version: 1\n");
        let link = project.path(&format!(".pipeline/{link}"));
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        symlink(outside.path(), &link).unwrap();
        let push = ["cache", "push", "--all", "--remote", "."];
        for arguments in [&RUN[..], &["gc", "recipes/r.yaml"], &push] {
            let ended = project.run(arguments);
            assert_eq!(ended.code, Some(2), "{}", ended.stderr);
            let told = format!("`{}` is a link that leaves the project", link.display());
            assert!(ended.stderr.contains(&told), "{}", ended.stderr);
        }
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
        // Whoever allows that folder, or names the store, has it so.
        let folder = outside.path().to_str().unwrap();
        project.succeeds(&[&RUN[..], &["--allow-path", folder]].concat());
        project.succeeds(&[&RUN[..], &["--store", ".pipeline"]].concat());
    }
}

#[test]
fn links_of_sources_are_followed_to_their_end() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret.jsonl"), ROW).unwrap();
    let project = Project::empty();
    project.write(
        "r.yaml",
        "version: 1\nstages:\n  pairs: { import_dataset: { path: folder } }\n",
    );
    project.write("folder/train.jsonl", ROW);
    project.write("folder/.hidden/x", "");
    // Hidden files are no part of it, wherever they lead.
    symlink("/bin/sh", project.path("folder/.hidden/sh")).unwrap();
    project.succeeds(&["run", "r.yaml"]);
    // A folder of the project, in which a link leads out.
    fs::create_dir(project.path("other")).unwrap();
    symlink(
        outside.path().join("secret.jsonl"),
        project.path("other/test.jsonl"),
    )
    .unwrap();
    symlink("../other", project.path("folder/more")).unwrap();
    let told = |told: &str| {
        let ended = project.run(&["run", "r.yaml"]);
        assert_eq!(ended.code, Some(2), "{}", ended.stderr);
        assert!(ended.stderr.contains(told), "{}", ended.stderr);
    };
    told("`folder/more/test.jsonl` is a link that leaves the project");
    // A chain of links, and a circle.
    fs::remove_file(project.path("folder/more")).unwrap();
    symlink("../other/test.jsonl", project.path("folder/test.jsonl")).unwrap();
    told("`folder/test.jsonl` is a link that leaves the project");
    fs::remove_file(project.path("folder/test.jsonl")).unwrap();
    symlink("..", project.path("other/up")).unwrap();
    fs::remove_file(project.path("other/test.jsonl")).unwrap();
    symlink("../other", project.path("folder/more")).unwrap();
    let ended = project.run(&["run", "r.yaml"]);
    assert_ne!(ended.code, None);
    assert!(!ended.stderr.contains("leaves"), "{}", ended.stderr);
}

#[test]
fn what_is_no_file_is_not_read() {
    let project = Project::empty();
    project.write(
        "r.yaml",
        "version: 1\nstages:\n  pairs: { import_dataset: { path: pipe } }\n",
    );
    let fifo = |path: &Path| {
        let made = std::process::Command::new("mkfifo").arg(path).status();
        assert!(made.unwrap().success());
    };
    fifo(&project.path("pipe"));
    fails(&project, &["run", "r.yaml"], "pipe");
    fs::remove_file(project.path("pipe")).unwrap();
    fs::create_dir(project.path("pipe")).unwrap();
    fifo(&project.path("pipe/train.jsonl"));
    fails(&project, &["run", "r.yaml"], "has no data file");
    // And neither is a recipe that never ends.
    let ended = project.run(&["validate", "/dev/zero"]);
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
    // Nor a lock file.
    project.write("pipe/test.jsonl", ROW);
    fs::remove_file(project.path("pipe/train.jsonl")).unwrap();
    symlink("/dev/zero", project.path("r.yaml.lock")).unwrap();
    fails(&project, &["run", "r.yaml"], "it is not a file");
}

#[test]
fn edits_of_outputs_stay_and_cost_no_run() {
    let project = project("out/pairs");
    project.succeeds(&RUN);
    // The result's folder is copied, as people do before they try something.
    let readme = project.path("out/pairs/train.parquet");
    fs::write(&readme, "mine").unwrap();
    fs::create_dir_all(project.path("out/.pairs.old")).unwrap();
    project.write("out/.pairs.next/keep.txt", "mine");
    let ended = fails(&project, &RUN, "`train.parquet` was changed");
    assert!(
        ended.stderr.contains("--overwrite-outputs"),
        "{}",
        ended.stderr
    );
    // The result in the store is as it was.
    let plan = project.succeeds(&["plan", "recipes/r.yaml", "--verify"]);
    assert!(plan.ends_with("1 fresh, 0 to run, 0 waiting\n"), "{plan}");
    assert_eq!(fs::read(&readme).unwrap(), b"mine");
    project.succeeds(&[&RUN[..], &["--overwrite-outputs"]].concat());
    assert_ne!(fs::read(&readme).unwrap(), b"mine");
    assert_eq!(project.read("out/.pairs.next/keep.txt"), "mine");
    assert!(project.path("out/.pairs.old").is_dir());
}

#[test]
fn damage_in_an_output_is_seen_when_all_is_read() {
    let project = project("out/pairs");
    project.succeeds(&RUN);
    let output = project.path("out/pairs/train.parquet");
    let artifact = project.artifacts(&RUN[1..])["pairs"].clone();
    let kept = project.path(&format!(".pipeline/v1/artifacts/{artifact}/train.parquet"));
    let good = fs::read(&kept).unwrap();
    let rot = |path: &Path| {
        let found = fs::metadata(path).unwrap();
        let mut mode = found.permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut mode, 0o644);
        fs::set_permissions(path, mode).unwrap();
        let mut bytes = good.clone();
        bytes[100] ^= 1;
        fs::write(path, bytes).unwrap();
        let file = fs::File::options().append(true).open(path).unwrap();
        let times = fs::FileTimes::new().set_modified(found.modified().unwrap());
        file.set_times(times).unwrap();
        fs::set_permissions(path, found.permissions()).unwrap();
    };
    // The store's bytes: the result is made again, and the output is right.
    rot(&kept);
    let told = project.run(&[&RUN[..], &["--verify"]].concat());
    assert_eq!(told.code, Some(0), "{}", told.stderr);
    assert_eq!(fs::read(&kept).unwrap(), good);
    assert_eq!(fs::read(&output).unwrap(), good);
    // The output's own: nobody can tell damage from an edit, so it is told and stays.
    rot(&output);
    let arguments = [&RUN[..], &["--verify"]].concat();
    let ended = fails(&project, &arguments, "`train.parquet` was changed");
    assert!(!ended.stderr.contains("unchanged"), "{}", ended.stderr);
    project.succeeds(&[&arguments[..], &["--overwrite-outputs"]].concat());
    assert_eq!(fs::read(&output).unwrap(), good);
}

#[test]
fn an_output_is_whole_whenever_the_run_is_killed() {
    let project = Project::empty();
    let row = |n| format!("{{\"prompt\": \"p{n}\", \"chosen\": \"b\", \"rejected\": \"c\"}}\n");
    let rows: Vec<String> = (0..300).map(row).collect();
    project.write("pairs.jsonl", &rows.concat());
    project.write(
        "r.yaml",
        "version: 1\nstages:\n  pairs: { import_dataset: { path: pairs.jsonl } }\n  split: { split_dataset: { dataset: pairs, test_size: \
         0.5 } }\noutputs:\n  split: out/split\n",
    );
    let arguments = |seed: &str| {
        let set = format!("stages.split.split_dataset.seed={seed}");
        ["run", "r.yaml", "--set", &set].map(str::to_owned)
    };
    let run = |seed: &str| {
        let arguments = arguments(seed);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        project.command(&arguments)
    };
    let read = || {
        ["train", "test"]
            .map(|split| fs::read(project.path(&format!("out/split/{split}.parquet"))).ok())
    };
    let whole = ["1", "2"].map(|seed| {
        assert!(run(seed).output().unwrap().status.success());
        read()
    });
    assert_ne!(whole[0], whole[1]);
    assert!(whole.iter().flatten().all(Option::is_some));
    let mut killed = 0;
    for round in 0..40 {
        let mut child = run(["1", "2"][round % 2]).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_micros(400 * round as u64));
        child.kill().unwrap();
        killed += usize::from(child.wait().unwrap().code().is_none());
        let found = read();
        assert!(whole.contains(&found), "after {round} kills");
    }
    assert!(killed >= 10, "only {killed} runs were killed");
    assert!(run("1").output().unwrap().status.success());
    assert_eq!(read(), whole[0]);
    let beside: Vec<_> = fs::read_dir(project.path("out"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(beside, ["split"], "what kills left is cleared away");
}

/// Sequences that would clear a screen, set a title, or turn a text around.
const STEERING: [&str; 4] = ["\u{1b}[2J", "\u{7}", "\u{9b}31m", "\u{202e}"];

#[track_caller]
fn harmless(ended: &Ended) {
    for text in [&ended.stdout, &ended.stderr] {
        let steering = STEERING.iter().find(|steering| text.contains(**steering));
        assert!(steering.is_none(), "{text:?}");
    }
}

#[test]
fn text_from_elsewhere_does_not_reach_the_terminal_as_it_is() {
    let project = Project::empty();
    let evil = STEERING.concat();
    // Written with escapes, as JSON and YAML both allow.
    let escaped = |c: char| format!("\\u{:04x}", u32::from(c));
    let json: String = format!("{evil}\nmore").chars().map(escaped).collect();
    let json = format!("\"{json}\"");
    project.write(
        "pairs.jsonl",
        &format!("{{\"prompt\": {json}, \"chosen\": \"b\", \"rejected\": \"c\"}}\n"),
    );
    let recipe = |template: &str| {
        project.write("chat.jinja", template);
        project.write(
            "r.yaml",
            &format!(
                "version: 1\ndescription: {json}\nstages:\n  pairs: {{ import_dataset: {{ path: pairs.jsonl }} }}\n  chats: {{ \
                 apply_chat_template: {{ dataset: pairs, template: chat.jinja }} }}\n"
            ),
        );
    };
    // An error that data words.
    recipe("{{ raise_exception(messages[0].content) }}");
    let ended = project.run(&["run", "r.yaml"]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("\\u{1b}[2J"), "{}", ended.stderr);
    harmless(&ended);
    // A line of its own must not look like another event.
    assert!(!ended.stderr.contains("\nmore"), "{}", ended.stderr);
    let ended = project.run(&["run", "r.yaml", "--json"]);
    harmless(&ended);
    let told: Vec<serde_json::Value> = ended
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let failed = told
        .iter()
        .find(|event| event["event"] == "stage_failed")
        .unwrap();
    assert!(
        failed["error"].as_str().unwrap().contains(&evil),
        "{failed}"
    );
    // Data that are shown, a changed template, a drawing, a history.
    recipe("{% for message in messages %}{{ message.content }}{% endfor %}");
    project.succeeds(&["run", "r.yaml"]);
    recipe(&format!(
        "{{# {evil} #}}{{% for message in messages %}}{{{{ message.content }}}}{{% endfor %}}"
    ));
    project.succeeds(&["run", "r.yaml", "--force", "chats"]);
    for arguments in [
        &["show", "r.yaml", "pairs"][..],
        &["show", "r.yaml", "chats"],
        &["why", "r.yaml", "chats"],
        &["diff", "r.yaml"],
        &["diff", "r.yaml", "--json"],
        &["history", "r.yaml", "--json"],
        &["graph", "r.yaml"],
        &["graph", "r.yaml", "--format", "dot"],
        &["plan", "r.yaml", "--json"],
    ] {
        let ended = project.run(arguments);
        assert_eq!(ended.code, Some(0), "{arguments:?}: {}", ended.stderr);
        harmless(&ended);
    }
    // Broken data and broken recipes, in words of the parsers; names of files and flags.
    project.write("pairs.jsonl", &format!("{{\"prompt\": 1, {evil}\n"));
    harmless(&project.run(&["run", "r.yaml"]));
    project.write("pairs.jsonl", &format!("{{\"{evil}\": 1}}\n"));
    harmless(&project.run(&["run", "r.yaml"]));
    let name = format!("{}.yaml", STEERING[0]);
    project.write(
        &name,
        &format!("version: 1\nstages:\n  \"{evil}\": {{ \"{evil}\": 1 }}\n"),
    );
    harmless(&project.run(&["validate", &name]));
    harmless(&project.run(&["validate", &evil]));
    harmless(&project.run(&["run", "r.yaml", &format!("--{evil}")]));
    harmless(&project.run(&["run", "r.yaml", &evil]));
    harmless(&project.run(&["run", "r.yaml", "--remote", &format!("{evil}://x")]));
    harmless(&project.run(&["run", "r.yaml", "--remote", &evil]));
    project.write(
        "pipeline.config.yaml",
        &format!("version: 1\nremote: {{ \"{evil}\": 1 }}\n"),
    );
    harmless(&project.run(&["run", "r.yaml"]));
    project.write("pipeline.config.yaml", "version: 1\n");
    project.write("r.yaml.lock", &format!("version: 1\n{evil}: 1\n"));
    harmless(&project.run(&["run", "r.yaml"]));
}
