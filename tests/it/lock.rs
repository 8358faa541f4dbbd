//! The lock file: two people with the same recipe and lock get the same fingerprints, whatever moved meanwhile.

use std::collections::BTreeSet;

use crate::support::hub::HubServer;
use crate::support::program::Project;

const RECIPE: &str = "\
version: 1
stages:
  pairs: { download_dataset: { repo: some/pairs } }
  chats: { apply_chat_template: { dataset: pairs, template: chat.jinja } }
";
const TEMPLATE: &str = "{%- for message in messages %}{{ message.content }}{% endfor %}";

fn rows(count: usize) -> Vec<u8> {
    let row = |n| format!("{{\"prompt\": \"p{n}\", \"chosen\": \"c\", \"rejected\": \"r\"}}\n");
    (0..count)
        .map(row)
        .collect::<Vec<_>>()
        .concat()
        .into_bytes()
}

fn person(hub: &HubServer, folder: &str) -> Project {
    let mut project = Project::empty();
    project.variable("HF_ENDPOINT", &hub.endpoint);
    project.write(&format!("{folder}/r.yaml"), RECIPE);
    project.write(&format!("{folder}/chat.jinja"), TEMPLATE);
    project
}

fn fingerprints(project: &Project) -> BTreeSet<String> {
    let records = project.records();
    records
        .iter()
        .map(|record| record["fingerprint"].to_string())
        .collect()
}

#[test]
fn the_same_lock_gives_the_same_fingerprints() {
    let hub = HubServer::start();
    hub.dataset("some/pairs", &[("train.jsonl", &rows(3))]);
    let first = person(&hub, "here");
    let refused = first.run(&["run", "here/r.yaml", "--locked"]);
    assert_eq!(refused.code, Some(2));
    assert!(
        refused.stderr.contains("`--locked` needs `here/r.yaml.lock`, which is not there\nhint: `pipeline lock here/r.yaml` writes it"),
        "{}",
        refused.stderr
    );

    let told = first.succeeds(&["lock", "here/r.yaml"]);
    assert!(
        told.contains("`pairs`: commit nothing -> ") && told.contains("pins 2 stages"),
        "{told}"
    );
    first.succeeds(&["run", "here/r.yaml", "--locked"]);

    // The branch moves; the second person has the lock.
    hub.dataset("some/pairs", &[("train.jsonl", &rows(4))]);
    let second = person(&hub, "elsewhere/deep");
    second.write(
        "elsewhere/deep/r.yaml.lock",
        &first.read("here/r.yaml.lock"),
    );
    second.succeeds(&["run", "elsewhere/deep/r.yaml", "--locked"]);
    assert_eq!(fingerprints(&first), fingerprints(&second));
    let nothing: [&str; 0] = [];
    assert_eq!(
        first.ran(&["here/r.yaml"]),
        nothing,
        "the lock holds without --locked, too"
    );

    // Moving on is a decision, and is told.
    let told = first.succeeds(&["lock", "here/r.yaml"]);
    assert_eq!(told, "`here/r.yaml.lock` pins 2 stages\n");
    let told = first.succeeds(&["lock", "here/r.yaml", "pairs", "--update"]);
    assert!(told.starts_with("`pairs`: commit "), "{told}");
    assert_eq!(first.ran(&["here/r.yaml", "--locked"]), ["chats", "pairs"]);
}

#[test]
fn what_is_not_as_pinned_is_told_or_refused() {
    let hub = HubServer::start();
    hub.dataset("some/pairs", &[("train.jsonl", &rows(3))]);
    let project = person(&hub, "here");
    project.succeeds(&["lock", "here/r.yaml"]);
    project.write("here/chat.jinja", &format!("{TEMPLATE}!"));
    let ended = project.run(&["run", "here/r.yaml"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(
        ended
            .stderr
            .contains("note: `here/r.yaml.lock` pins other inputs"),
        "{}",
        ended.stderr
    );
    assert_eq!(
        project.run(&["run", "here/r.yaml", "--locked"]).code,
        Some(2)
    );

    // Another question than the pinned one.
    project.write("here/chat.jinja", TEMPLATE);
    let asked = ["--set", "stages.pairs.download_dataset.max_rows=2"];
    let refused = project.run(&[&["run", "here/r.yaml", "--locked"], &asked[..]].concat());
    assert_eq!(refused.code, Some(2));
    assert!(
        refused
            .stderr
            .contains("`pairs`: what it takes from outside"),
        "{}",
        refused.stderr
    );

    project.write("here/r.yaml.lock", "version: 1\nstages: [");
    let refused = project.run(&["run", "here/r.yaml"]);
    assert_eq!(refused.code, Some(2));
    assert!(
        refused.stderr.contains("is no lock file"),
        "{}",
        refused.stderr
    );
}
