//! `include` and `extends`: recipes beside others, in git repositories and on the hub; what is pinned, what works without a network, and
//! what may be read.

use std::path::Path;
use std::process::Command;

use crate::support::hub::HubServer;
use crate::support::program::Project;

mod network;

const PREP: &str = "\
version: 1
vars:
  share: { type: number, default: 0.2 }
stages:
  pairs: { import_dataset: { path: data/pairs.jsonl } }
  split: { split_dataset: { dataset: pairs, test_size: \"${share}\" } }
";
const TEMPLATE: &str = "{%- for message in messages %}{{ message.content }}{% endfor %}";

fn rows(count: usize) -> String {
    let row = |n| format!("{{\"prompt\": \"p{n}\", \"chosen\": \"c\", \"rejected\": \"r\"}}\n");
    (0..count).map(row).collect()
}

fn main(source: &str) -> String {
    format!(
        "version: 1\ninclude:\n  prep: {{ recipe: '{source}', vars: {{ share: 0.4 }} }}\nstages:\n  \
         chats: {{ apply_chat_template: {{ dataset: prep.split, template: chat.jinja }} }}\noutputs:\n  prep.split: out/split\n"
    )
}

fn project(source: &str) -> Project {
    let project = Project::empty();
    project.write("r.yaml", &main(source));
    project.write("chat.jinja", TEMPLATE);
    project
}

#[test]
fn a_local_recipe_is_part_of_this_one_and_reads_files_beside_it() {
    let project = project("shared/prep.yaml");
    project.write("shared/prep.yaml", PREP);
    project.write("shared/data/pairs.jsonl", &rows(20));
    assert_eq!(
        project.ran(&["r.yaml"]),
        ["chats", "prep.pairs", "prep.split"]
    );
    assert!(project.path("out/split/test.parquet").exists());
    project.succeeds(&["validate", "r.yaml"]);
    assert!(
        project
            .succeeds(&["graph", "r.yaml"])
            .contains("<- prep.split")
    );
    let show = project.succeeds(&["show", "r.yaml", "prep.split"]);
    assert!(show.contains("test_size"), "{show}");
    project.succeeds(&["log", "r.yaml", "prep.split"]);
    project.succeeds(&["report", "r.yaml"]);
    // The same stages in one file have the same results.
    project.write(
        "shared/data/../one.yaml",
        &PREP.replace("default: 0.2", "default: 0.4"),
    );
    assert!(project.ran(&["shared/one.yaml"]).is_empty());
    let why = project.succeeds(&[
        "why",
        "r.yaml",
        "prep.split",
        "--set",
        "stages.prep.split.split_dataset.seed=5",
    ]);
    assert!(why.contains("`seed` changed from"), "{why}");

    // Mistakes have the places of the file that they are in.
    project.write("shared/prep.yaml", &PREP.replace("test_size", "test_sice"));
    project.refuses(&["plan", "r.yaml"], "--> shared/prep.yaml:6:");
    project.write(
        "shared/prep.yaml",
        &PREP.replace("data/pairs.jsonl", "../../pairs.jsonl"),
    );
    project.refuses(
        &["plan", "r.yaml"],
        "`../../pairs.jsonl` leaves the project",
    );
    project.write("r.yaml", &main("../other.yaml"));
    project.refuses(&["plan", "r.yaml"], "there is no recipe `../other.yaml`");
    project.write("r.yaml", &main("/etc/hostname"));
    project.refuses(&["plan", "r.yaml"], "leaves the project");
}

#[test]
fn a_lock_file_pins_included_recipes() {
    let project = project("shared/prep.yaml");
    project.write("shared/prep.yaml", PREP);
    project.write("shared/data/pairs.jsonl", &rows(20));
    let told = project.succeeds(&["lock", "r.yaml"]);
    assert!(
        told.contains("`shared/prep.yaml`: recipe nothing -> "),
        "{told}"
    );
    assert!(told.contains("pins 2 stages and 1 recipe"), "{told}");
    project.succeeds(&["run", "r.yaml", "--locked"]);
    project.write("shared/prep.yaml", &PREP.replace("0.2", "0.3"));
    let ended = project.run(&["run", "r.yaml", "--locked"]);
    assert_eq!(ended.code, Some(2));
    assert!(
        ended.stderr.contains("`shared/prep.yaml`: recipe "),
        "{}",
        ended.stderr
    );
    let ended = project.run(&["run", "r.yaml"]);
    assert!(
        ended
            .stderr
            .contains("note: `r.yaml.lock` pins other inputs"),
        "{}",
        ended.stderr
    );
    project.succeeds(&["lock", "r.yaml", "--update"]);
    project.succeeds(&["run", "r.yaml", "--locked"]);
}

fn git(folder: &Path, arguments: &[&str]) -> String {
    let output = Command::new("git")
        .args([
            "-c",
            "user.name=a",
            "-c",
            "user.email=a@b",
            "-c",
            "init.defaultBranch=main",
        ])
        .args(arguments)
        .current_dir(folder)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn commit(project: &Project, folder: &str) -> String {
    let path = project.path(folder);
    git(&path, &["add", "--all"]);
    git(&path, &["commit", "--quiet", "--message", "x"]);
    git(&path, &["rev-parse", "HEAD"])
}

#[test]
fn a_recipe_in_a_git_repository_is_pinned_by_its_commit() {
    let project = Project::empty();
    project.write("away/prep.yaml", PREP);
    project.write("away/data/pairs.jsonl", &rows(20));
    git(&project.path("away"), &["init", "--quiet"]);
    let first = commit(&project, "away");
    let source = format!(
        "git+file://{}@main#prep.yaml",
        project.path("away").display()
    );
    project.write("r.yaml", &main(&source));
    project.write("chat.jinja", TEMPLATE);
    assert_eq!(
        project.ran(&["r.yaml"]),
        ["chats", "prep.pairs", "prep.split"]
    );
    project.succeeds(&["lock", "r.yaml"]);
    assert!(project.read("r.yaml.lock").contains(&first));

    // The branch moves on; what is pinned stays, also where the repository is gone.
    project.write(
        "away/prep.yaml",
        &PREP.replace("pairs, test", "pairs, seed: 9, test"),
    );
    let second = commit(&project, "away");
    let nothing: [&str; 0] = [];
    assert_eq!(project.ran(&["r.yaml", "--locked"]), nothing);
    let told = project.succeeds(&["lock", "r.yaml", "--update"]);
    assert!(
        told.contains(&format!("commit {} -> {}", &first[..10], &second[..10])),
        "{told}"
    );
    assert_eq!(
        project.ran(&["r.yaml", "--locked"]),
        ["chats", "prep.split"]
    );
    std::fs::rename(project.path("away"), project.path("gone")).unwrap();
    assert_eq!(project.ran(&["r.yaml", "--offline"]), nothing);
    std::fs::remove_file(project.path("r.yaml.lock")).unwrap();
    project.refuses(&["plan", "r.yaml"], "could not be had: git failed");
    std::fs::rename(project.path("gone"), project.path("away")).unwrap();

    // A wrong branch, a wrong path, a place outside, and mistakes in it.
    project.write("r.yaml", &main(&source.replace("@main", "@mian")));
    project.refuses(
        &["plan", "r.yaml"],
        "the repository has no branch or tag `mian`",
    );
    project.write("r.yaml", &main(&source.replace("#prep", "#pre")));
    project.refuses(&["plan", "r.yaml"], "there is no recipe `pre.yaml` in it");
    project.write("r.yaml", &main("git+file:///nowhere@main"));
    project.refuses(
        &["plan", "r.yaml"],
        "the repository `file:///nowhere` leaves the project",
    );
    project.write(
        "away/prep.yaml",
        &PREP.replace("data/pairs.jsonl", "../../../../r.yaml"),
    );
    commit(&project, "away");
    project.write("r.yaml", &main(&source));
    project.refuses(&["plan", "r.yaml"], "leaves the repository of its recipe");
    project.write("away/prep.yaml", &PREP.replace("test_size", "test_sice"));
    let last = commit(&project, "away");
    project.refuses(
        &["plan", "r.yaml"],
        &format!("{}: prep.yaml:6:", &last[..10]),
    );
}

/// Nothing of a stranger's repository runs, and no link of it leads out.
#[test]
fn a_git_repository_does_nothing_here() {
    let project = Project::empty();
    project.write("away/prep.yaml", PREP);
    project.write("away/real/pairs.jsonl", &rows(20));
    project.write("secret.jsonl", &rows(3));
    std::fs::create_dir(project.path("away/data")).unwrap();
    std::os::unix::fs::symlink(
        project.path("secret.jsonl"),
        project.path("away/data/pairs.jsonl"),
    )
    .unwrap();
    project.write("away/.gitattributes", "*.yaml filter=evil\n");
    git(&project.path("away"), &["init", "--quiet"]);
    commit(&project, "away");
    let source = format!("git+file://{}#prep.yaml", project.path("away").display());
    project.write("r.yaml", &main(&source));
    project.write("chat.jinja", TEMPLATE);
    // A link comes as a file with the path that it has, which is no row.
    let ended = project.run(&["run", "r.yaml"]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains("prep.pairs"), "{}", ended.stderr);
}

#[test]
fn a_recipe_on_the_hub_is_fetched_with_what_is_beside_it() {
    let hub = HubServer::start();
    let data = rows(20);
    let files = [
        ("recipes/prep.yaml", PREP.as_bytes()),
        ("recipes/data/pairs.jsonl", data.as_bytes()),
    ];
    let commit = hub.dataset("some/recipes", &files);
    let mut project = project("hf://datasets/some/recipes@main/recipes/prep.yaml");
    project.variable("HF_ENDPOINT", &hub.endpoint);
    project.succeeds(&["lock", "r.yaml"]);
    assert!(project.read("r.yaml.lock").contains(&commit));
    assert_eq!(
        project.ran(&["r.yaml", "--locked"]),
        ["chats", "prep.pairs", "prep.split"]
    );
    let nothing: [&str; 0] = [];
    assert_eq!(project.ran(&["r.yaml", "--offline"]), nothing);
    project.write(
        "r.yaml",
        &main("hf://datasets/some/recipes/recipes/none.yaml"),
    );
    project.refuses(
        &["plan", "r.yaml"],
        "`some/recipes` has no file `recipes/none.yaml`",
    );
}

#[test]
fn a_recipe_that_extends_another_one_changes_what_it_names() {
    let project = Project::empty();
    project.write(
        "base/base.yaml",
        &format!("{PREP}outputs: {{ split: out/base }}\n"),
    );
    project.write("base/data/pairs.jsonl", &rows(20));
    project.write(
        "r.yaml",
        "version: 1\nextends: base/base.yaml\nvars: { share: 0.5 }\noutputs: { split: out/own }\noverrides:\n  \
         stages.split.split_dataset.seed: 3\n",
    );
    project.succeeds(&["run", "base/base.yaml"]);
    assert_eq!(project.ran(&["r.yaml"]), ["split"]);
    assert!(project.path("out/own/train.parquet").exists());
    let why = project.succeeds(&["why", "r.yaml", "split", "--set", "vars.share=0.3"]);
    assert!(why.contains("`test_size` changed from 0.5 to 0.3"), "{why}");
    let vars = project.succeeds(&["show", "r.yaml", "--vars"]);
    assert!(vars.contains("share  number  0.5"), "{vars}");
}
