//! Stages as jobs of a real Slurm, whose nodes share the store: the same bytes as on this machine, followed like local ones, left and joined
//! again. What goes wrong is in `faults`.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::support::program::{Project, events, stages};
use crate::support::slurm::Cluster;
use crate::support::terminal::AtTerminal;

mod arrays;
mod export;
mod faults;
#[cfg(feature = "mpi")]
mod nodes;
mod story;
mod unshared;

const RECIPE: &str = "\
version: 1
stages:
  pairs: { import_dataset: { path: pairs.jsonl } }
  blank:
    create_model:
      dataset: pairs
      vocab_size: 300
      hidden_size: 16
      intermediate_size: 32
      num_hidden_layers: 1
      num_attention_heads: 2
      num_key_value_heads: 1
      max_position_embeddings: 64
  chats: { apply_chat_template: { dataset: pairs, template: chatml } }
  tokens: { tokenize: { dataset: chats, tokenizer: blank } }
  tuned:
    train_orpo: { model: blank, dataset: tokens, max_steps: 4, save_steps: 2, logging_steps: 1 }
    resources: { cpus: 2, memory: 600MiB }
    timeout: 5m
outputs:
  tuned: out/tuned
";

/// A project whose program uses the cluster.
fn project(cluster: &Cluster, settings: &str) -> Project {
    let mut project = Project::empty();
    cluster.serve(&mut project, settings);
    project.write("r.yaml", RECIPE);
    let row =
        |n| format!("{{\"prompt\": \"p{n}\", \"chosen\": \"yes {n}\", \"rejected\": \"no {n}\"}}");
    let rows: Vec<String> = (0..8).map(row).collect();
    project.write("pairs.jsonl", &rows.join("\n"));
    project
}

/// A recipe of one stage `own`, a shell script that is isolated from nothing it needs here; `more` stands beside the kind.
fn scripted(project: &Project, script: &str, more: &str) {
    project.write("own.sh", script);
    let recipe = format!(
        "version: 1\nstages:\n  own:\n    run_command: {{ command: [sh, '{{file.script}}'], files: {{ script: own.sh }}, output: folder, \
         env: [SECRET] }}\n    executor: cluster\n{more}"
    );
    project.write("own.yaml", &recipe);
}

/// The texts of a stage's messages.
fn messages(events: &[Value], stage: &str) -> Vec<String> {
    let of = events
        .iter()
        .filter(|event| event["event"] == "message" && event["stage"] == stage);
    of.map(|event| event["text"].as_str().unwrap().to_owned())
        .collect()
}

/// A run that goes on beside the test; killed when this is dropped.
struct Running {
    child: Child,
    lines: Receiver<String>,
    seen: Vec<Value>,
}

/// The longest time that the next event may take.
const LONGEST: Duration = Duration::from_secs(150);

impl Running {
    fn start(project: &Project, arguments: &[&str]) -> Self {
        let arguments = [&["run", "--json"], arguments].concat();
        let mut child = project.command(&arguments).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (sender, received) = channel();
        std::thread::spawn(move || {
            lines
                .map_while(Result::ok)
                .try_for_each(|line| sender.send(line))
        });
        Self {
            child,
            lines: received,
            seen: Vec::new(),
        }
    }

    /// The next event; none after the end.
    #[track_caller]
    fn next_event(&mut self) -> Option<Value> {
        match self.lines.recv_timeout(LONGEST) {
            Ok(line) => {
                let event: Value = serde_json::from_str(&line).unwrap();
                self.seen.push(event.clone());
                Some(event)
            }
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("nothing more comes: {:?}", self.seen),
        }
    }

    /// Reads events until one holds.
    #[track_caller]
    fn wait_for(&mut self, what: &str, mut holds: impl FnMut(&Value) -> bool) {
        while let Some(event) = self.next_event() {
            if holds(&event) {
                return;
            }
        }
        panic!("{what} never came: {:?}", self.seen);
    }

    /// Waits until a message of a stage has these words.
    #[track_caller]
    fn wait_for_message(&mut self, words: &str) {
        self.wait_for(words, |event| {
            event["event"] == "message" && event["text"].as_str().unwrap().contains(words)
        });
    }

    /// Waits until each of these words came in a message, in any order: what the scheduler says and what the job says are not ordered.
    #[track_caller]
    fn wait_for_messages(&mut self, mut words: Vec<&str>) {
        self.wait_for("all messages", |event| {
            let text = event["text"]
                .as_str()
                .filter(|_| event["event"] == "message");
            words.retain(|words| !text.is_some_and(|text| text.contains(words)));
            words.is_empty()
        });
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Waits for the end; gives the exit code and all events.
    #[track_caller]
    fn ended(mut self) -> (Option<i32>, Vec<Value>) {
        while self.next_event().is_some() {}
        let code = self.child.wait().unwrap().code();
        (code, std::mem::take(&mut self.seen))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The folders of jobs that are left in the store.
fn jobs_left(project: &Project) -> usize {
    fs::read_dir(project.path(".pipeline/v1/jobs")).map_or(0, Iterator::count)
}

#[test]
fn stages_are_jobs_that_make_the_same_bytes() {
    let Some(cluster) = Cluster::start(2, "") else {
        return;
    };
    let own = project(&cluster, "partition: main");
    own.succeeds(&["run", "r.yaml"]);
    let expected = own.artifacts(&["r.yaml"]);

    let project = project(&cluster, "partition: main, time: 10m");
    let told = events(&project.succeeds(&["run", "--json", "r.yaml", "--executor", "cluster"]));
    assert_eq!(project.artifacts(&["r.yaml"]), expected);
    assert!(
        project
            .path("out/tuned/adapter_model.safetensors")
            .is_file()
            || project.path("out/tuned").is_dir()
    );
    // Followed as a local stage is.
    let of_tuned = |sort: &str| {
        let of = told
            .iter()
            .filter(|event| event["event"] == sort && event["stage"] == "tuned");
        of.count()
    };
    assert!(
        of_tuned("metrics") >= 4 && of_tuned("progress") >= 1,
        "{told:?}"
    );
    let log = project.succeeds(&["log", "r.yaml", "tuned"]);
    assert!(log.contains("runs on n") || log.contains("loss"), "{log}");
    // One job a stage, which tells recipe and stage, with what the stage asked for.
    let jobs = cluster.finished();
    cluster.wait_until("all jobs are written down", || {
        cluster.finished().len() == 5
    });
    for stage in ["pairs", "blank", "chats", "tokens", "tuned"] {
        let name = format!("Name=r.{stage}.");
        assert!(
            cluster.finished().iter().any(|job| job.contains(&name)),
            "{jobs:?}"
        );
    }
    let of = |stage: &str| {
        let name = format!("Name=r.{stage}.");
        cluster
            .finished()
            .into_iter()
            .find(|job| job.contains(&name))
            .unwrap()
    };
    let tuned = of("tuned");
    for asked in ["TimeLimit=5 ", "cpu=2", "mem=600M", "JobState=COMPLETED"] {
        assert!(tuned.contains(asked), "{asked}: {tuned}");
    }
    assert!(of("pairs").contains("TimeLimit=10 "), "{}", of("pairs"));
    assert_eq!(jobs_left(&project), 0);
    // Nothing to do, so nobody asks Slurm.
    assert!(project.ran(&["r.yaml", "--executor", "cluster"]).is_empty());
    assert_eq!(cluster.finished().len(), 5);
}

#[test]
fn secrets_reach_a_stage_and_nobody_else() {
    let Some(cluster) = Cluster::start(1, "") else {
        return;
    };
    let mut project = project(&cluster, "partition: main");
    scripted(
        &project,
        "test -n \"$SECRET\" || exit 9\necho \"${#SECRET}\" >\"$OUT/length\"\necho begun\nwhile [ ! -e \"$SCRATCH/go\" ]; do sleep 0.1; done\n",
        "    resources: { gpus: 1 }\n",
    );
    let secret = "s3cr3t-it's-$HOME";
    project.variable("SECRET", secret);
    project.variable("HF_TOKEN", "hf_otherSecretXyz");
    let mut run = Running::start(&project, &["own.yaml"]);
    run.wait_for_message("begun");
    let [id] = &cluster.queued("RUNNING")[..] else {
        panic!("one job runs")
    };
    let script = cluster.told("scontrol", &["write", "batch_script", id, "-"]);
    let shown = cluster.told("scontrol", &["show", "job", "-dd", id]);
    assert!(
        script.contains("work --job") && shown.contains("own.own."),
        "{script}{shown}"
    );
    assert!(
        shown.contains("gres:gpu:1") || shown.contains("gres/gpu=1"),
        "{shown}"
    );
    let mut kept = vec![script, shown];
    // Every file of the job but the one for the environment, which others can't read.
    let mut open = vec![project.path(".pipeline/v1/jobs")];
    let mut modes = Vec::new();
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.ends_with("environment") {
                modes.push(fs::metadata(&path).unwrap().permissions().mode() & 0o777);
                assert!(fs::read_to_string(&path).unwrap().contains("s3cr3t"));
            } else {
                kept.push(fs::read_to_string(&path).unwrap());
            }
        }
    }
    assert_eq!(modes, [0o600]);
    for text in &kept {
        assert!(
            !text.contains("s3cr3t") && !text.contains("otherSecret"),
            "{text}"
        );
    }
    let scratch = find(&project.path(".pipeline/v1/jobs"), "scratch");
    fs::write(scratch.join("go"), "").unwrap();
    let (code, seen) = run.ended();
    assert_eq!(code, Some(0), "{seen:?}");
    assert_eq!(jobs_left(&project), 0);
    let made = &stages(&seen, "stage_done")["own"]["artifact"];
    let length = format!(".pipeline/v1/artifacts/{}/length", made.as_str().unwrap());
    assert_eq!(project.read(&length).trim(), secret.len().to_string());
}

/// The first folder of this name below another.
fn find(below: &Path, name: &str) -> PathBuf {
    let mut open = vec![below.to_owned()];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.path().is_dir() {
                if entry.file_name() == name {
                    return entry.path();
                }
                open.push(entry.path());
            }
        }
    }
    panic!("there is no `{name}` in {}", below.display());
}

/// A script that says that it began, and ends when there is a file `go` in its scratch folder.
const WAITS: &str =
    "echo begun\nwhile [ ! -e \"$SCRATCH/go\" ]; do sleep 0.1; done\necho made >\"$OUT/made\"\n";

/// Lets [`WAITS`] end whose scratch folder is below this one.
fn let_go_below(folder: &Path) {
    fs::write(find(folder, "scratch").join("go"), "").unwrap();
}

/// Lets [`WAITS`] end on a node that shares the project's store.
fn let_go(project: &Project) {
    let_go_below(&project.path(".pipeline/v1/jobs"));
}

/// Leaves jobs of a project in all ways and comes back to them. Their scratch folders are below `jobs`.
fn are_left_and_joined(cluster: &Cluster, project: &Project, jobs: &Path) {
    scripted(project, WAITS, "");
    let begun = |seen: &[Value]| {
        let told = messages(seen, "own");
        told.iter().filter(|text| *text == "begun").count()
    };
    // Told to leave them.
    let mut run = Running::start(project, &["own.yaml", "--leave-jobs"]);
    run.wait_for_message("begun");
    run.signal(Signal::SIGINT);
    let (code, seen) = run.ended();
    assert_eq!(code, Some(130));
    let told = messages(&seen, "own");
    assert!(
        told.last().unwrap().contains("goes on by itself"),
        "{told:?}"
    );
    let running = cluster.queued("RUNNING");
    assert_eq!(running.len(), 1);
    // A runner that joined it and died.
    let mut run = Running::start(project, &["own.yaml"]);
    run.wait_for_message("joins it");
    // What it told before is told again.
    run.wait_for_message("begun");
    run.signal(Signal::SIGKILL);
    let (code, _) = run.ended();
    assert_eq!(code, None);
    assert_eq!(cluster.queued("RUNNING"), running);
    // Somebody who wants it here joins it all the same: it is not made twice.
    let mut run = Running::start(project, &["own.yaml", "--executor", "local"]);
    run.wait_for_message("joins it");
    let_go_below(jobs);
    let (code, seen) = run.ended();
    assert_eq!(code, Some(0), "{seen:?}");
    assert_eq!(begun(&seen), 1, "{seen:?}");
    assert_eq!(cluster.queued("all"), running);
    assert_eq!(jobs_left(project), 0);

    // One that ended while nobody was there.
    project.write("own.sh", &format!("# other\n{WAITS}"));
    let mut run = Running::start(project, &["own.yaml"]);
    run.wait_for_message("begun");
    run.signal(Signal::SIGKILL);
    run.ended();
    let_go_below(jobs);
    cluster.wait_until("the job is over", || cluster.queued("RUNNING").is_empty());
    let told = events(&project.succeeds(&["run", "--json", "own.yaml"]));
    assert!(stages(&told, "stage_done").contains_key("own"), "{told:?}");
    assert_eq!(begun(&told), 1, "{told:?}");
    assert_eq!(cluster.queued("all").len(), 2);
    assert_eq!(jobs_left(project), 0);
}

#[test]
fn jobs_that_were_left_are_joined() {
    let Some(cluster) = Cluster::start(1, "") else {
        return;
    };
    let project = project(&cluster, "partition: main");
    let jobs = project.path(".pipeline/v1/jobs");
    are_left_and_joined(&cluster, &project, &jobs);
}

#[test]
fn a_second_runner_waits_for_the_first_and_submits_nothing() {
    let Some(cluster) = Cluster::start(1, "") else {
        return;
    };
    let project = project(&cluster, "partition: main");
    scripted(&project, WAITS, "");
    let mut first = Running::start(&project, &["own.yaml"]);
    first.wait_for_message("begun");
    let mut second = Running::start(&project, &["own.yaml"]);
    second.wait_for("waiting", |event| event["event"] == "stage_waiting");
    let_go(&project);
    let (code, seen) = first.ended();
    assert_eq!(code, Some(0), "{seen:?}");
    let (code, seen) = second.ended();
    assert_eq!(code, Some(0), "{seen:?}");
    assert!(stages(&seen, "stage_fresh").contains_key("own"));
    assert_eq!(cluster.queued("all").len(), 1);
}

#[test]
fn without_a_terminal_ctrl_c_cancels_and_a_training_goes_on_later() {
    let Some(cluster) = Cluster::start(1, "") else {
        return;
    };
    let project = project(&cluster, "partition: main");
    let long = [
        "r.yaml",
        "--executor",
        "cluster",
        "--set",
        "stages.tuned.train_orpo.max_steps=100000",
        "--set",
        "stages.tuned.train_orpo.lr_scheduler_type=constant",
    ];
    let mut run = Running::start(&project, &long);
    run.wait_for("a step", |event| {
        event["event"] == "metrics"
            && event["stage"] == "tuned"
            && event["step"].as_u64() >= Some(5)
    });
    run.signal(Signal::SIGINT);
    let (code, seen) = run.ended();
    assert_eq!(code, Some(130), "{:?}", seen.last());
    cluster.wait_until("the job is over", || {
        cluster.queued("RUNNING,COMPLETING").is_empty()
    });
    let jobs = cluster.finished();
    assert!(
        jobs.last().unwrap().contains("JobState=CANCELLED"),
        "{jobs:?}"
    );
    assert_eq!(jobs_left(&project), 0);
    // What it saved is where this machine, too, goes on from.
    let mut run = Running::start(
        &project,
        &[&["--executor", "local"], &long[..1], &long[3..]].concat(),
    );
    run.wait_for("a step", |event| {
        event["event"] == "metrics" && event["stage"] == "tuned"
    });
    assert!(
        run.seen.last().unwrap()["step"].as_u64() >= Some(3),
        "{:?}",
        run.seen.last()
    );
}

#[test]
fn at_a_terminal_ctrl_c_asks() {
    let Some(cluster) = Cluster::start(1, "") else {
        return;
    };
    let project = project(&cluster, "partition: main");
    scripted(&project, WAITS, "");
    let mut run = AtTerminal::start(&project, &["run", "own.yaml"]);
    run.wait_for("begun");
    run.interrupt();
    run.wait_for("1 job is on the cluster: cancel (c), or leave");
    run.say("what\n");
    run.wait_for("cancel (c), or leave");
    run.say("l\n");
    assert_eq!(run.ended(), Some(130));
    assert_eq!(cluster.queued("RUNNING").len(), 1);

    let mut run = AtTerminal::start(&project, &["run", "own.yaml"]);
    run.wait_for("joins it");
    run.wait_for("begun");
    run.interrupt();
    run.wait_for("cancel (c), or leave");
    run.say("c\n");
    assert_eq!(run.ended(), Some(130));
    cluster.wait_until("the job is over", || {
        cluster.queued("RUNNING,COMPLETING").is_empty()
    });
    assert_eq!(jobs_left(&project), 0);

    // Another Ctrl-C instead of an answer ends the program at once, and the job goes on.
    let mut run = AtTerminal::start(&project, &["run", "own.yaml"]);
    run.wait_for("begun");
    run.interrupt();
    run.wait_for("cancel (c), or leave");
    run.interrupt();
    assert_eq!(run.ended(), Some(130));
    assert_eq!(cluster.queued("RUNNING").len(), 1);
}
