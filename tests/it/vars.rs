//! Declared vars and `when`: what `show --vars` tells, what is refused, and what a plan says of stages that are left out.

use serde_json::Value;

use crate::support::program::Project;

const RECIPE: &str = "\
version: 1
vars:
  share: { type: number, default: 0.2, help: The part of rows to hold out., minimum: 0, maximum: 1 }
  data: { type: string, help: The file with the rows. }
  smoke: false
stages:
  pairs: { import_dataset: { path: \"${data}\" } }
  split: { split_dataset: { dataset: pairs, test_size: \"${share}\" } }
  chats:
    apply_chat_template: { dataset: split, template: chat.jinja }
    when: not smoke
outputs:
  split: out/split
  chats: out/chats
";

fn project() -> Project {
    let project = Project::empty();
    project.write("r.yaml", RECIPE);
    let row = |n| format!("{{\"prompt\": \"p{n}\", \"chosen\": \"c\", \"rejected\": \"r\"}}");
    let rows: Vec<String> = (0..20).map(row).collect();
    project.write("pairs.jsonl", &rows.join("\n"));
    project.write(
        "chat.jinja",
        "{%- for message in messages %}{{ message.content }}{% endfor %}",
    );
    project
}

#[test]
fn vars_are_shown_with_their_values_whether_all_have_one_or_not() {
    let project = project();
    let shown = project.succeeds(&["show", "r.yaml", "--vars"]);
    let lines: Vec<&str> = shown.lines().collect();
    assert!(lines[0].starts_with("var"), "{shown}");
    assert!(
        lines[1].starts_with("share")
            && lines[1].contains("number")
            && lines[1].ends_with("The part of rows to hold out. (at least 0, at most 1)"),
        "{shown}"
    );
    assert!(lines[2].contains("nobody: give one by --set"), "{shown}");
    let set = [
        "show",
        "r.yaml",
        "--vars",
        "--json",
        "--set",
        "vars.share=0.4",
    ];
    let vars: Vec<Value> = serde_json::from_str(&project.succeeds(&set)).unwrap();
    assert_eq!(vars[0]["name"], "share");
    assert_eq!(vars[0]["type"], "number");
    assert_eq!(
        (&vars[0]["value"], &vars[0]["default"]),
        (&0.4.into(), &0.2.into())
    );
    assert_eq!(vars[0]["from"], "--set vars.share=0.4");
    assert_eq!(vars[1]["value"], Value::Null);
    assert_eq!(vars[2]["type"], "boolean");
    project.refuses(
        &["show", "r.yaml", "--vars", "--set", "vars.shre=1"],
        "did you mean `share`?",
    );
    project.refuses(
        &["plan", "r.yaml"],
        "the var `data` has no value\n  --> r.yaml:4:3",
    );
    project.refuses(
        &["plan", "r.yaml", "--set", "vars.data=pairs.jsonl", "--set", "vars.share=much"],
        "the var `share` must be a number, not a text\n  --> from --set vars.share=much\nhint: `share`: The part of rows to hold out.",
    );
}

/// A declaration, like a var, is no part of a fingerprint.
#[test]
fn what_is_left_out_is_told_and_not_made() {
    let project = project();
    let data = ["--set", "vars.data=pairs.jsonl"];
    let with = |more: &[&'static str]| [&["r.yaml"], &data[..], more].concat();
    let plan = project.succeeds(&[&["plan"], &with(&["--set", "vars.smoke=true"])[..]].concat());
    assert!(
        plan.contains("left out by `when: not smoke`: chats"),
        "{plan}"
    );
    assert!(
        plan.contains("2 to run") || plan.contains("1 to run, 1 waiting"),
        "{plan}"
    );
    assert_eq!(
        project.ran(&with(&["--set", "vars.smoke=true"])),
        ["pairs", "split"]
    );
    assert!(project.path("out/split").exists() && !project.path("out/chats").exists());
    let json = project.succeeds(
        &[
            &["plan", "--json"],
            &with(&["--set", "vars.smoke=true"])[..],
        ]
        .concat(),
    );
    let plan: Vec<Value> = serde_json::from_str(&json).unwrap();
    assert_eq!(plan[2]["stage"], "chats");
    assert_eq!(plan[2]["plan"]["state"], "left_out");
    project.refuses(
        &[&["run"], &with(&["chats", "--set", "vars.smoke=true"])[..]].concat(),
        "`chats` is left out: its `when` is false",
    );
    assert_eq!(project.ran(&with(&[])), ["chats"]);
    project.write(
        "plain.yaml",
        &RECIPE
            .replace("{ type: number, default: 0.2, help: The part of rows to hold out., minimum: 0, maximum: 1 }", "0.2")
            .replace("{ type: string, help: The file with the rows. }", "pairs.jsonl")
            .replace("    when: not smoke\n", "")
            .replace("out/", "other/"),
    );
    assert!(project.ran(&["plain.yaml"]).is_empty());
}
