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

/// A path of the project as a task has it.
fn os(project: &Project, path: &str) -> Value {
    json!({ "Unix": project.path(path).to_str().unwrap().as_bytes() })
}

/// A task without inputs, which fills the folder `out`.
fn task_of(project: &Project, kind: &str, params: &Value) -> Value {
    json!({
        "version": 1,
        "pipeline": "0.1.0",
        "stage": "one",
        "kind": kind,
        "params": params,
        "exclusive": false,
        "offline": true,
        "cpus": 1,
        "memory": null,
        "gpus": [],
        "inputs": {},
        "sources": {},
        "outside": {},
        "out": os(project, "out"),
        "scratch": os(project, "scratch"),
        "scratch_note": [],
        "continuations": null,
        "known": [],
        "warned": [],
    })
}

fn task(project: &Project, path: &str) -> Value {
    let mut task = task_of(project, "import_dataset", &json!({ "path": path }));
    task["sources"] = json!({ path: os(project, path) });
    task
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

/// The training `base` of the quickstart as a task of `steps` steps, with the results of a run for its inputs.
fn training(project: &Project, steps: u64) -> Value {
    let inputs = project.artifacts(&["recipes/quickstart.yaml", "blank", "tokens"]);
    let folder = |name: &str| os(project, &format!(".pipeline/v1/artifacts/{}", inputs[name]));
    let params = json!({
        "model": "blank", "dataset": "tokens", "answers": "both", "completion_only_loss": false, "max_steps": steps,
        "per_device_train_batch_size": 8, "learning_rate": 3e-3, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1,
        "gradient_checkpointing": false, "logging_steps": 1, "save_steps": 50, "seed": 42,
    });
    let mut task = task_of(project, "train_sft", &params);
    task["exclusive"] = true.into();
    task["inputs"] = json!({ "blank": folder("blank"), "tokens": folder("tokens") });
    task
}

#[test]
fn a_training_is_a_task_like_any_other() {
    let project = Project::with_recipes();
    project.ran(&["recipes/quickstart.yaml", "blank", "tokens"]);
    fs::create_dir(project.path("out")).unwrap();
    project.write("task.json", &training(&project, 2).to_string());
    let told = events(&project.succeeds(&["work", "task.json"]));
    let mut steps = told
        .iter()
        .filter(|event| event["event"] == "progress" && event["unit"] == "steps");
    assert_eq!(steps.next_back().unwrap()["done"], 2);
    let metrics: Vec<&Value> = told
        .iter()
        .filter(|event| event["event"] == "metrics")
        .collect();
    assert_eq!(metrics.len(), 2, "{told:?}");
    assert_eq!(told.last().unwrap()["event"], "work_done");

    // What a run makes of the same parameters.
    let arguments = [
        "recipes/quickstart.yaml",
        "base",
        "--set",
        "stages.base.train_sft.max_steps=2",
        "--set",
        "stages.base.train_sft.logging_steps=1",
    ];
    project.ran(&arguments);
    let base = &project.artifacts(&arguments)["base"];
    for name in ["model.safetensors", "metrics.jsonl", "trainer_state.json"] {
        let theirs = project.path(&format!(".pipeline/v1/artifacts/{base}/{name}"));
        let ours = project.path(&format!("out/{name}"));
        assert!(
            fs::read(ours).unwrap() == fs::read(theirs).unwrap(),
            "{name}"
        );
    }
}

#[test]
fn a_scheduler_stops_a_training_by_a_signal_and_starts_it_again() {
    let project = Project::with_recipes();
    project.ran(&["recipes/quickstart.yaml", "blank", "tokens"]);
    fs::create_dir(project.path("out")).unwrap();
    project.write("task.json", &training(&project, 1_000_000).to_string());
    let mut child = project.command(&["work", "task.json"]).spawn().unwrap();
    let mut last = Value::Null;
    let mut stopped = false;
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        last = serde_json::from_str(&line.unwrap()).unwrap();
        // Progress is told some times a second, so not of every step.
        let steps = last["event"] == "progress" && last["unit"] == "steps";
        if steps && !stopped && last["done"].as_u64() >= Some(2) {
            stopped = true;
            kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
        }
    }
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert_eq!(last["event"], "work_failed", "{last}");
    let saved = fs::read_dir(project.path("scratch")).unwrap().flatten();
    let saved: Vec<String> = saved
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with("step-"))
        .collect();
    assert_eq!(saved.len(), 1, "{saved:?}");
    let step: u64 = saved[0].trim_start_matches("step-").parse().unwrap();
    project.write("task.json", &training(&project, step + 1).to_string());
    let told = events(&project.succeeds(&["work", "task.json"]));
    let words = format!(
        "goes on after step {step} of {}, from a checkpoint",
        step + 1
    );
    let said = told
        .iter()
        .any(|event| event["text"].as_str().is_some_and(|text| text == words));
    assert!(said, "{told:?}");
}

#[test]
fn mistakes_about_executors_are_told_with_their_places() {
    let project = Project::empty();
    project.write(
        "pairs.jsonl",
        "{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"c\"}\n",
    );
    let recipe = "version: 1\nstages:\n  pairs:\n    import_dataset: { path: pairs.jsonl }\n    executor: clutser\n";
    project.write("r.yaml", recipe);
    let refused = |arguments: &[&str], words: &[&str]| {
        let ended = project.run(arguments);
        assert_eq!(ended.code, Some(2), "{ended:?}");
        for word in words {
            assert!(ended.stderr.contains(word), "{word}: {}", ended.stderr);
        }
    };
    let plan = ["plan", "r.yaml"];
    refused(
        &plan,
        &[
            "there is no executor `clutser`",
            "r.yaml:5:15",
            "`executors:` in `pipeline.config.yaml`",
        ],
    );
    let settings = |executors: &str| {
        project.write(
            "pipeline.config.yaml",
            &format!("version: 1\nexecutors: {executors}\n"),
        );
    };
    settings("{ cluster: { slurm: { partition: main } } }");
    refused(
        &plan,
        &[
            "there is no executor `clutser`",
            "those of this project are cluster, local",
        ],
    );
    for (written, words) in [
        (
            "[]",
            ["`executors`: expected a map", "slurm: { partition: main }"],
        ),
        (
            "{ a: 1 }",
            [
                "`executors.a`: expected a map",
                "slurm: { partition: main }",
            ],
        ),
        (
            "{ local: { slurm: {} } }",
            ["`executors.local`", "`local` is this machine"],
        ),
        (
            "{ a b: { slurm: {} } }",
            ["`executors.a b`", "letters, digits"],
        ),
        (
            "{ a: { slurm: { parition: x } } }",
            ["`executors.a.slurm", "its keys are partition, account"],
        ),
        (
            "{ a: { slurm: { time: soon } } }",
            ["`executors.a.slurm.time`", "`soon` is no span of time"],
        ),
        (
            "{ a: { slurm: { jobs: 0 } } }",
            ["`executors.a.slurm.jobs`", "expected"],
        ),
        (
            "{ a: { slurm: { extra: [--wrap=x] } } }",
            [
                "`executors.a.slurm.extra[0]`",
                "`--wrap` can't be given here",
            ],
        ),
        (
            "{ a: { slurm: { extra: [-pmain] } } }",
            ["`executors.a.slurm.extra[0]`", "no long option"],
        ),
        (
            "{ a: { slurm: { partition: '' } } }",
            ["`executors.a.slurm.partition`", "it is empty"],
        ),
        (
            "{ a: { slurm: { env: [A=1] } } }",
            [
                "`executors.a.slurm.env[0]`",
                "not the name of an environment variable",
            ],
        ),
    ] {
        settings(written);
        refused(&plan, &[&words[..], &["pipeline.config.yaml"]].concat());
    }
    settings("{ cluster: { slurm: {} } }");
    project.write("r.yaml", &recipe.replace("clutser", "cluster"));
    let planned = project.succeeds(&plan);
    refused(
        &["run", "r.yaml", "--executor", "other"],
        &["there is no executor `other`"],
    );
    // Where a stage runs is no part of what it is.
    project.succeeds(&["run", "r.yaml", "--executor", "local"]);
    project.write("r.yaml", &recipe.replace("    executor: clutser\n", ""));
    assert!(project.ran(&["r.yaml"]).is_empty(), "{planned}");
}
