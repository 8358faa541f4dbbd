//! A matrix of stages: what runs, what is fresh, where results go, and how commands name its stages.

use serde_json::Value;

use crate::support::program::Project;

const RECIPE: &str = "\
version: 1
stages:
  pairs: { import_dataset: { path: pairs.jsonl } }
  split:
    matrix: { share: [0.2, 0.4], seed: [1, 2] }
    split_dataset: { dataset: pairs, test_size: \"${share}\", seed: \"${seed}\" }
  chats: { apply_chat_template: { dataset: split, template: chat.jinja } }
  picked: { apply_chat_template: { dataset: 'split[share=0.2,seed=1]', template: chat.jinja } }
outputs:
  chats: out/chats
  split: \"out/split-${share}-${seed}\"
  picked: out/picked
";
const TEMPLATE: &str = "{%- for message in messages %}
{{- message.role }}: {{ message.content }}
{% endfor %}";

fn project() -> Project {
    let project = Project::empty();
    project.write("r.yaml", RECIPE);
    let row = |n| format!("{{\"prompt\": \"p{n}\", \"chosen\": \"c\", \"rejected\": \"r\"}}");
    let rows: Vec<String> = (0..60).map(row).collect();
    project.write("pairs.jsonl", &rows.join("\n"));
    project.write("chat.jinja", TEMPLATE);
    project
}

#[test]
fn each_combination_is_a_stage_with_its_own_place_and_runs_once() {
    let project = project();
    let plan = project.succeeds(&["plan", "r.yaml"]);
    assert!(plan.contains("chats[share=0.4,seed=2]"), "{plan}");
    let ran = project.ran(&["r.yaml"]);
    // What is picked is what one of the combinations makes, so it is made once.
    assert_eq!(ran.len(), 9, "{ran:?}");
    assert!(project.ran(&["r.yaml"]).is_empty());
    for share in ["0.2", "0.4"] {
        for seed in ["1", "2"] {
            assert!(
                project
                    .path(&format!("out/split-{share}-{seed}/test.parquet"))
                    .exists()
            );
            let chats = format!("out/chats/share={share},seed={seed}/train.parquet");
            assert!(project.path(&chats).exists());
        }
    }
    let artifacts = project.artifacts(&["r.yaml"]);
    assert_eq!(artifacts["picked"], artifacts["chats[share=0.2,seed=1]"]);

    // A stage that is written out and one that a matrix made have one result.
    project.write(
        "written.yaml",
        "version: 1\nstages:\n  pairs: { import_dataset: { path: pairs.jsonl } }\n  \
         split: { split_dataset: { dataset: pairs, test_size: 0.4, seed: 2 } }\n",
    );
    assert!(project.ran(&["written.yaml"]).is_empty());

    // A value more makes only what is new; one less makes nothing.
    let set = ["r.yaml", "--set", "stages.split.matrix.seed=[1, 2, 3]"];
    let ran = project.ran(&set);
    assert_eq!(
        ran,
        [
            "chats[share=0.2,seed=3]",
            "chats[share=0.4,seed=3]",
            "split[share=0.2,seed=3]",
            "split[share=0.4,seed=3]",
        ]
    );
    assert!(
        project
            .ran(&["r.yaml", "--set", "stages.split.matrix.seed=[1]"])
            .is_empty()
    );
    // What a comment in the template changes stops early.
    project.write("chat.jinja", &format!("{{# a remark #}}{TEMPLATE}"));
    let plan = project.succeeds(&["plan", "r.yaml", "split"]);
    assert!(plan.contains("5 fresh"), "{plan}");
}

#[test]
fn commands_take_one_stage_of_a_matrix_some_or_all() {
    let project = project();
    let ran = project.ran(&["r.yaml", "chats[seed=2]"]);
    assert_eq!(ran.len(), 5, "{ran:?}");
    let why = project.succeeds(&["why", "r.yaml", "chats[share=0.2]"]);
    assert!(why.contains("`chats[share=0.2,seed=1]` waits"), "{why}");
    assert!(why.contains("`chats[share=0.2,seed=2]` is fresh"), "{why}");
    let show = project.succeeds(&["show", "r.yaml", "split[seed=2,share=0.2]"]);
    assert!(
        show.starts_with("split[share=0.2,seed=2] (split_dataset) made dataset"),
        "{show}"
    );
    let log = project.succeeds(&["log", "r.yaml", "split[seed=2,share=0.4]"]);
    assert!(log.contains("`split[share=0.4,seed=2]` in run 1"), "{log}");
    let graph = project.succeeds(&["graph", "r.yaml"]);
    assert!(graph.contains("<- split[share=0.4,seed=1]"), "{graph}");
    project.succeeds(&["report", "r.yaml"]);
    project.refuses(&["show", "r.yaml", "split"], "`split` is 4 stages");
    project.refuses(
        &["show", "r.yaml", "split[seed=3]"],
        "split[share=0.2,seed=1]",
    );
    project.refuses(&["run", "r.yaml", "splt"], "did you mean `split`?");
    let plan = project.succeeds(&["plan", "r.yaml", "--json"]);
    let plan: Vec<Value> = serde_json::from_str(&plan).unwrap();
    let stages: Vec<&str> = plan
        .iter()
        .map(|one| one["stage"].as_str().unwrap())
        .collect();
    assert!(stages.contains(&"split[share=0.4,seed=1]"), "{stages:?}");
    let downstream = project.ran(&["r.yaml", "--downstream", "split[share=0.4,seed=1]"]);
    assert_eq!(
        downstream,
        ["chats[share=0.4,seed=1]", "split[share=0.4,seed=1]"]
    );
    let forced = project.ran(&[
        "r.yaml",
        "split[seed=2]",
        "--force",
        "split[seed=2,share=0.2]",
    ]);
    assert_eq!(forced, ["split[share=0.2,seed=2]"]);
}

#[test]
fn a_mistake_in_a_matrix_is_told_once_with_its_place() {
    let project = project();
    project.write("r.yaml", &RECIPE.replace("seed: [1, 2]", "seed: [1, many]"));
    project.refuses(&["validate", "r.yaml"], "r.yaml:6:");
    let ended = project.run(&["validate", "r.yaml"]);
    assert_eq!(ended.stderr.matches("error").count(), 1, "{}", ended.stderr);
    assert!(
        ended.stderr.contains("split[share=0.2,seed=many]"),
        "{}",
        ended.stderr
    );
    // A thousand stages are planned.
    let many: Vec<String> = (0..250).map(|n| n.to_string()).collect();
    let set = format!("stages.split.matrix.seed=[{}]", many.join(", "));
    project.write("r.yaml", RECIPE);
    let plan = project.succeeds(&["plan", "r.yaml", "--set", &set]);
    assert!(
        plan.contains("0 fresh, 1 to run, 1001 waiting"),
        "{}",
        plan.lines().last().unwrap()
    );
}
