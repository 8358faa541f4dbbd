//! The quickstart as people live with it: run, run again, change something, take it back. Trainings are cut to a few steps.

use std::fs;

use crate::support::program::{Project, events, stages};

const QUICKSTART: &str = "recipes/quickstart.yaml";
const SHORT: [&str; 5] = [
    QUICKSTART,
    "--set",
    "stages.base.train_sft.max_steps=2",
    "--set",
    "stages.tuned.train_orpo.max_steps=2",
];
const STAGES: [&str; 11] = [
    "adapter", "base", "base4", "blank", "chats", "merged", "pairs", "scores", "split", "tokens",
    "tuned",
];

fn short<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&SHORT[..], more].concat()
}

#[test]
fn only_what_is_stale_runs() {
    let project = Project::with_recipes();
    let nothing: [&str; 0] = [];
    assert_eq!(project.ran(&short(&[])), STAGES);
    assert!(project.path("out/quickstart/model.safetensors").is_file());
    assert_eq!(project.ran(&short(&[])), nothing);

    let beta = ["--set", "stages.tuned.train_orpo.beta=0.2"];
    assert_eq!(project.ran(&short(&beta)), ["merged", "scores", "tuned"]);
    assert_eq!(
        project.ran(&short(&[])),
        nothing,
        "an earlier state comes back for free"
    );
    assert_eq!(project.ran(&short(&beta)), nothing);

    // A setting that can't change the result.
    let logging = ["--set", "stages.tuned.train_orpo.logging_steps=1"];
    assert_eq!(project.ran(&short(&logging)), nothing);

    // An edit that changes no rendered byte: only the stage that reads the file runs.
    let template = "recipes/templates/llama3.jinja";
    let text = project.read(template);
    project.write(template, &format!("{{#- The same as before. -#}}\n{text}"));
    assert_eq!(project.ran(&short(&[])), ["chats"]);

    // An edit that changes them: everything that reads the texts, and what comes of it.
    project.write(template, &text.replace("<|eot_id|>", "<|eot_id|> "));
    assert_eq!(
        project.ran(&short(&[])),
        [
            "adapter", "base", "base4", "chats", "merged", "scores", "tokens", "tuned"
        ]
    );
    project.write(template, &text);
    assert_eq!(project.ran(&short(&[])), nothing);

    // Names and places of files don't count.
    fs::rename(
        project.path("recipes/data/pairs.jsonl"),
        project.path("recipes/data/renamed.jsonl"),
    )
    .unwrap();
    let renamed = [
        "--set",
        "stages.pairs.import_dataset.path=recipes/data/renamed.jsonl",
    ];
    assert_eq!(project.ran(&short(&renamed)), nothing);
}

#[test]
fn targets_force_and_damage() {
    let project = Project::with_recipes();
    assert_eq!(
        project.ran(&short(&["chats"])),
        ["blank", "chats", "pairs", "split"]
    );
    assert!(!project.path("out").exists());

    // It runs again, makes the same bytes, and nothing below it does.
    let out = project.succeeds(
        &[
            &["run", "--json"],
            &short(&["tokens", "--force", "split"])[..],
        ]
        .concat(),
    );
    let events = events(&out);
    let done = stages(&events, "stage_done");
    assert_eq!(done.keys().collect::<Vec<_>>(), ["split", "tokens"]);
    assert_eq!(done["split"]["same_bytes"], true);

    // A deleted and an altered artifact are noticed and made again.
    let artifacts = project.artifacts(&short(&["tokens"]));
    let folder =
        |stage: &str| project.path(&format!(".pipeline/v1/artifacts/{}", artifacts[stage]));
    fs::remove_dir_all(folder("chats")).unwrap();
    assert_eq!(project.ran(&short(&["tokens"])), ["chats"]);
    let file = folder("tokens").join("train.parquet");
    let mut bytes = fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::remove_file(&file).unwrap();
    fs::write(&file, &bytes).unwrap();
    assert_eq!(project.ran(&short(&["tokens"])), ["tokens"]);
    assert_eq!(project.artifacts(&short(&["tokens"])), artifacts);
}

#[test]
fn two_runners_share_the_work() {
    let project = Project::with_recipes();
    let arguments = [&["run", "--json"], &short(&["base4"])[..]].concat();
    let started = [0, 1].map(|_| project.command(&arguments).spawn().unwrap());
    let mut ran = Vec::new();
    for child in started {
        let output = child.wait_with_output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let events = events(std::str::from_utf8(&output.stdout).unwrap());
        ran.extend(stages(&events, "stage_done").into_keys());
    }
    ran.sort_unstable();
    assert_eq!(
        ran,
        [
            "base", "base4", "blank", "chats", "pairs", "split", "tokens"
        ],
        "each stage once"
    );
}

#[test]
fn outputs_never_replace_what_people_put_there() {
    let project = Project::with_recipes();
    project.write("out/quickstart/notes.txt", "mine");
    let ended = project.run(&[&["run"], &short(&[])[..]].concat());
    assert_eq!(ended.code, Some(1));
    assert!(
        ended.stderr.contains("--overwrite-outputs"),
        "{}",
        ended.stderr
    );
    assert_eq!(project.read("out/quickstart/notes.txt"), "mine");
    project.succeeds(&[&["run"], &short(&["--overwrite-outputs"])[..]].concat());
    assert!(!project.path("out/quickstart/notes.txt").exists());
    assert!(project.path("out/quickstart/config.json").is_file());

    // From another store comes the same: there is nothing to replace.
    project.succeeds(&[&["run"], &short(&["--store", "other"])[..]].concat());
}
