//! Stages in processes of their own and in the runner's: what ends such a process is an ordinary failure, and the results are the same.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::process::Child;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::support::program::{Project, events, stages};

/// A training that takes longer than the test.
const LONG: [&str; 7] = [
    "run",
    "recipes/quickstart.yaml",
    "base",
    "--keep-going",
    "--json",
    "--set",
    "stages.base.train_sft.max_steps=1000000",
];

/// The processes that a process started.
fn children(parent: u32) -> Vec<Pid> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let started = pids.filter(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // Behind the name, which may have anything in it: the state and the parent.
        let parent_of = stat
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.split(' ').nth(1)?.parse().ok());
        parent_of == Some(parent)
    });
    started.map(Pid::from_raw).collect()
}

/// Starts the long training and waits for its first step; gives the events from then on, when it has ended.
fn train(
    project: &Project,
    more: &[&str],
    at_first_step: impl FnOnce(&Child),
) -> (Vec<Value>, Option<i32>) {
    let mut child = project
        .command(&[&LONG[..], more].concat())
        .spawn()
        .unwrap();
    let mut seen = Vec::new();
    let mut at_first_step = Some(at_first_step);
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let event: Value = serde_json::from_str(&line.unwrap()).unwrap();
        let step =
            event["event"] == "progress" && event["stage"] == "base" && event["unit"] == "steps";
        seen.push(event);
        if let Some(act) = at_first_step.take_if(|_| step) {
            act(&child);
        }
    }
    assert!(at_first_step.is_none(), "no step came: {:?}", seen.last());
    (seen, child.wait().unwrap().code())
}

#[test]
fn whatever_ends_the_process_of_a_stage_is_a_failure_of_that_stage() {
    let project = Project::with_recipes();
    // The system ends a process by SIGKILL when memory runs out.
    for (signal, words) in [
        (Signal::SIGKILL, "killed from outside (SIGKILL)"),
        (Signal::SIGABRT, "ended by signal 6"),
    ] {
        let mut stage = None;
        let (seen, code) = train(&project, &[], |runner| {
            let [pid] = children(runner.id())[..] else {
                panic!("one stage runs, so one process does")
            };
            kill(pid, signal).unwrap();
            stage = Some(pid);
        });
        assert_eq!(code, Some(1));
        let failed = stages(&seen, "stage_failed");
        assert_eq!(failed.keys().collect::<Vec<_>>(), ["base"]);
        let error = failed["base"]["error"].as_str().unwrap();
        assert!(error.contains(words), "{error}");
        // Its memory is free: the process is gone.
        assert!(!fs::exists(format!("/proc/{}", stage.unwrap())).unwrap());
        let log = project.succeeds(&["log", "recipes/quickstart.yaml", "base"]);
        assert!(log.contains(words), "{log}");
    }
}

#[test]
fn a_stage_may_run_in_the_process_of_the_runner() {
    let project = Project::with_recipes();
    let own = ["--set", "stages.base.resources={ isolated: false }"];
    let (seen, code) = train(&project, &own, |runner| {
        assert_eq!(children(runner.id()), []);
        kill(Pid::from_raw(runner.id() as i32), Signal::SIGINT).unwrap();
    });
    assert_eq!(code, Some(130), "{:?}", seen.last());
    // The same result, whose fingerprint knows nothing of it.
    let short = ["--set", "stages.base.train_sft.max_steps=2"];
    let arguments = [&["recipes/quickstart.yaml", "base"], &short[..]].concat();
    let ran = project.ran(&[&arguments[..], &own[..]].concat());
    assert!(ran.contains(&"base".to_owned()));
    let own = project.artifacts(&arguments);
    let other = Project::with_recipes();
    other.ran(&arguments);
    assert_eq!(other.artifacts(&arguments), own);
}

fn task(project: &Project, path: &str) -> Value {
    let os = |path: &str| json!({ "Unix": project.path(path).to_str().unwrap().as_bytes() });
    json!({
        "version": 1,
        "pipeline": "0.1.0",
        "stage": "pairs",
        "kind": "import_dataset",
        "params": { "path": path },
        "exclusive": false,
        "offline": true,
        "cpus": 1,
        "memory": null,
        "gpus": [],
        "inputs": {},
        "sources": { path: os(path) },
        "outside": {},
        "out": os("out"),
        "scratch": os("scratch"),
        "scratch_note": [],
        "continuations": null,
        "known": [],
        "warned": [],
    })
}

#[test]
fn a_task_is_a_file_that_any_scheduler_can_deliver() {
    let project = Project::empty();
    project.write(
        "pairs.jsonl",
        "{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"c\"}\n",
    );
    fs::create_dir(project.path("out")).unwrap();
    project.write("task.json", &task(&project, "pairs.jsonl").to_string());
    let told = events(&project.succeeds(&["work", "task.json"]));
    assert_eq!(told[0]["event"], "work_started");
    assert_eq!(told[0]["version"], 1);
    assert_eq!(told.last().unwrap()["event"], "work_done");
    assert_eq!(told.last().unwrap()["notes"]["rows"], json!({ "train": 1 }));
    assert!(project.path("out/train.parquet").is_file());

    project.write("task.json", &task(&project, "nothing.jsonl").to_string());
    let failed = project.run(&["work", "task.json"]);
    let last = events(&failed.stdout).pop().unwrap();
    assert_eq!(
        (failed.code, &last["event"]),
        (Some(1), &json!("work_failed"))
    );

    let mut other = task(&project, "pairs.jsonl");
    other["version"] = 2.into();
    project.write("task.json", &other.to_string());
    let refused = project.run(&["work", "task.json"]);
    assert_eq!(refused.code, Some(1));
    assert!(
        refused
            .stderr
            .contains("the task has version 2, of pipeline 0.1.0"),
        "{}",
        refused.stderr
    );
}
