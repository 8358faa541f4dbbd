//! After the fact: which runs there were, and what differs between any two of them.

use serde_json::Value;

use crate::support::program::Project;

const RECIPE: &str = "\
version: 1
stages:
  pairs: { import_dataset: { path: pairs.jsonl } }
  chats: { apply_chat_template: { dataset: pairs, template: chat.jinja } }
";
const TEMPLATE: &str = "{%- for message in messages %}
{{- message.role }}: {{ message.content }}
{% endfor %}";

fn rows(count: usize) -> String {
    let row = |n| format!("{{\"prompt\": \"p{n}\", \"chosen\": \"c\", \"rejected\": \"r\"}}");
    (0..count).map(row).collect::<Vec<_>>().join("\n")
}

#[test]
fn two_runs_are_compared_with_old_and_new_values() {
    let project = Project::empty();
    project.write("r.yaml", RECIPE);
    project.write("pairs.jsonl", &rows(3));
    project.write("chat.jinja", TEMPLATE);
    assert_eq!(project.succeeds(&["history", "r.yaml"]), "no runs yet\n");
    let ended = project.run(&["diff", "r.yaml"]);
    assert_eq!(ended.code, Some(2));
    assert!(ended.stderr.contains("no two runs"), "{}", ended.stderr);

    project.succeeds(&["run", "r.yaml"]);
    project.succeeds(&["run", "r.yaml"]);
    project.write("pairs.jsonl", &rows(5));
    project.write(
        "chat.jinja",
        &TEMPLATE.replace("message.role }}:", "message.role }} -"),
    );
    let set = ["--set", "stages.pairs.import_dataset.max_rows=4"];
    let why = project.succeeds(&[&["why", "r.yaml", "chats"], &set[..]].concat());
    assert!(
        why.contains("    -    2 | {{- message.role }}: {{ message.content }}\n"),
        "{why}"
    );
    assert!(
        why.contains("    +    2 | {{- message.role }} - {{ message.content }}\n"),
        "{why}"
    );
    project.succeeds(&[&["run", "r.yaml"], &set[..]].concat());

    let history: Value =
        serde_json::from_str(&project.succeeds(&["history", "r.yaml", "--json"])).unwrap();
    assert_eq!(
        history.as_array().unwrap().len(),
        2,
        "the run that changed nothing left no trace"
    );
    let diff = project.succeeds(&["diff", "r.yaml"]);
    for expected in [
        "run 1 -> run 2\n",
        "`max_rows` changed from not set to 4",
        "the file `pairs.jsonl` (`path`) changed from",
        "    r.yaml:3:36\n",
        "    rows {\"train\":3} -> {\"train\":4}\n",
        "    +    2 | {{- message.role }} - {{ message.content }}\n",
    ] {
        assert!(diff.contains(expected), "no `{expected}` in\n{diff}");
    }
    let back = project.succeeds(&["diff", "r.yaml", "2", "1", "--json"]);
    let back: Value = serde_json::from_str(&back).unwrap();
    assert_eq!(back["chats"]["difference"], "changed");
    assert!(
        project
            .run(&["diff", "r.yaml", "1", "7"])
            .stderr
            .contains("there is no run 7")
    );
}

#[test]
fn failed_runs_are_part_of_the_history() {
    let project = Project::empty();
    project.write("r.yaml", RECIPE);
    project.write("pairs.jsonl", &rows(1));
    project.write("chat.jinja", "{{ raise_exception('never') }}");
    assert_eq!(project.run(&["run", "r.yaml"]).code, Some(1));
    let history = project.succeeds(&["history", "r.yaml"]);
    assert!(
        history.contains("failed") && history.contains("without a result: chats"),
        "{history}"
    );
    project.write("chat.jinja", TEMPLATE);
    project.succeeds(&["run", "r.yaml"]);
    let diff = project.succeeds(&["diff", "r.yaml"]);
    assert!(
        diff.contains("`chats`") && diff.contains("result nothing -> "),
        "{diff}"
    );
}

#[test]
fn the_events_of_a_run_are_shown_again_later() {
    let project = Project::empty();
    project.write("r.yaml", RECIPE);
    project.write("pairs.jsonl", &rows(3));
    project.write("chat.jinja", TEMPLATE);
    let told = project.succeeds(&["run", "r.yaml", "--json"]);
    project.succeeds(&["run", "r.yaml"]);
    // All but the progress, as it was told; the moment is known to the millisecond, and looked at twice.
    let lasting = |told: &str| {
        let lines = told.lines().filter(|line| !line.contains("\"progress\""));
        let lines = lines.map(|line| line.split_once(',').unwrap().1.to_owned());
        lines.collect::<Vec<_>>()
    };
    let again = project.succeeds(&["history", "r.yaml", "--events", "1", "--json"]);
    assert_eq!(lasting(&again), lasting(&told));
    assert!(again.lines().count() >= 6, "{again}");
    let shown = project.succeeds(&["history", "r.yaml", "--events", "1"]);
    for expected in [
        "     runs  chats (apply_chat_template): first run\n",
        "     done  pairs  ",
        "2 stages: ",
    ] {
        assert!(shown.contains(expected), "no `{expected}` in\n{shown}");
    }
    // The run that changed nothing left nothing, and a collection removes what is long past.
    let none = project.run(&["history", "r.yaml", "--events", "2"]);
    assert_eq!(none.code, Some(2));
    assert!(
        none.stderr.contains("no events of run 2"),
        "{}",
        none.stderr
    );
    project.write("pairs.jsonl", &rows(5));
    project.succeeds(&["run", "r.yaml"]);
    let garbage = project.succeeds(&["gc", "r.yaml", "--dry-run"]);
    assert!(garbage.contains("events of a run"), "{garbage}");
    project.succeeds(&["gc", "r.yaml"]);
    assert_eq!(
        project.run(&["history", "r.yaml", "--events", "1"]).code,
        Some(2)
    );
    project.succeeds(&["history", "r.yaml", "--events", "2"]);
    assert_eq!(project.succeeds(&["history", "r.yaml"]).lines().count(), 2);
}
