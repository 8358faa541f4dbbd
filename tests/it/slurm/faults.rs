//! What goes wrong on a cluster, each against the real Slurm.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use serde_json::json;

use super::{Running, WAITS, find, jobs_left, let_go, messages, project, scripted};
use crate::support::program::{Project, events, stages};
use crate::support::slurm::Cluster;

/// The error of the stage `own` of a run that has to fail.
#[track_caller]
fn fails(project: &Project, more: &[&str]) -> String {
    let ended = project.run(&[&["run", "--json", "own.yaml"], more].concat());
    assert_eq!(ended.code, Some(1), "{ended:?}");
    let failed = stages(&events(&ended.stdout), "stage_failed");
    failed["own"]["error"].as_str().unwrap().to_owned()
}

#[test]
fn what_the_cluster_would_never_take_is_told_before_anything_runs() {
    let Some(cluster) = Cluster::start(1, "EnforcePartLimits=ALL\n") else {
        return;
    };
    let mut project = project(&cluster, "partition: elsewhere");
    let refused = |project: &Project, words: &[&str]| {
        let ended = project.run(&["run", "--json", "r.yaml", "--executor", "cluster"]);
        assert_eq!(ended.code, Some(1));
        assert!(!ended.stdout.contains("stage_started"), "{}", ended.stdout);
        for word in words {
            assert!(ended.stderr.contains(word), "{word}: {}", ended.stderr);
        }
    };
    refused(
        &project,
        &[
            "`cluster`",
            "invalid partition",
            "its partitions are main",
            "executors.cluster.slurm",
        ],
    );
    assert!(!project.path(".pipeline/v1/records").exists());
    // A limit of the partition.
    cluster.serve(&mut project, "partition: main, time: 3h");
    refused(&project, &["can't take jobs of"]);
    cluster.serve(&mut project, "partition: main");
    project.write(
        "r.yaml",
        &project.read("r.yaml").replace("cpus: 2", "cpus: 64"),
    );
    refused(&project, &["can't take jobs of `tuned`"]);
    assert!(cluster.queued("all").is_empty());
    project.variable("PATH", "/nonexistent");
    refused(&project, &["there is no `sbatch` on this machine"]);
}

#[test]
fn a_job_that_is_ended_from_outside_says_so() {
    let Some(cluster) = Cluster::start(1, "") else {
        return;
    };
    let project = project(&cluster, "partition: main");
    scripted(&project, WAITS, "");
    let mut run = Running::start(&project, &["own.yaml"]);
    run.wait_for_message("begun");
    cluster.run(
        "scancel",
        &cluster
            .queued("RUNNING")
            .iter()
            .map(String::as_str)
            .collect::<Vec<_>>(),
    );
    let (code, seen) = run.ended();
    assert_eq!(code, Some(1));
    let error = &stages(&seen, "stage_failed")["own"]["error"];
    assert!(
        error
            .as_str()
            .unwrap()
            .contains("was cancelled by somebody else"),
        "{error}"
    );
    // Killed without a word.
    let mut run = Running::start(&project, &["own.yaml"]);
    run.wait_for_message("begun");
    cluster.run(
        "scancel",
        &[
            &["--full", "--signal=KILL"],
            &cluster
                .queued("RUNNING")
                .iter()
                .map(String::as_str)
                .collect::<Vec<_>>()[..],
        ]
        .concat(),
    );
    let (code, seen) = run.ended();
    assert_eq!(code, Some(1));
    let error = &stages(&seen, "stage_failed")["own"]["error"];
    let error = error.as_str().unwrap();
    assert!(
        error.contains("ended without a result") || error.contains("cancelled"),
        "{error}"
    );
    assert_eq!(jobs_left(&project), 0);
}

#[test]
fn the_time_limit_of_the_scheduler_is_explained() {
    let Some(cluster) = Cluster::start(1, "") else {
        return;
    };
    // The limit is of the cluster and not of the stage, which would be stopped by the runner.
    let project = project(&cluster, "partition: main, time: 1m");
    scripted(&project, WAITS, "");
    let error = fails(&project, &[]);
    assert!(error.contains("reached its time limit"), "{error}");
    assert!(
        cluster.finished()[0].contains("JobState=TIMEOUT"),
        "{:?}",
        cluster.finished()
    );
}

#[test]
fn a_job_that_takes_too_much_memory_is_explained() {
    // Slurm's own way of looking at it, for which it needs no control groups.
    let looks = "JobAcctGatherType=jobacct_gather/linux\nJobAcctGatherFrequency=1\nJobAcctGatherParams=OverMemoryKill\n";
    let Some(cluster) = Cluster::start(1, looks) else {
        return;
    };
    let project = project(&cluster, "partition: main");
    // Each holds a line that nobody reads, and is allowed that much; both together are not.
    let holds = "head -c 200000000 /dev/zero | tail -n 1 | sleep 600";
    let more = "    resources: { memory: 300MiB }\n";
    scripted(&project, &format!("{holds} &\n{holds}\n"), more);
    let error = fails(&project, &[]);
    assert!(
        error.contains("used more memory than it was given"),
        "{error}"
    );
    assert!(
        cluster.finished()[0].contains("JobState=FAILED"),
        "{:?}",
        cluster.finished()
    );
    assert_eq!(jobs_left(&project), 0);
}

#[test]
fn the_timeout_of_a_stage_does_not_count_the_queue() {
    let Some(cluster) = Cluster::start(1, "") else {
        return;
    };
    let project = project(&cluster, "partition: main");
    scripted(&project, WAITS, "    timeout: 3s\n");
    // Somebody else has the only node.
    cluster.run(
        "sbatch",
        &[
            "--exclusive",
            "--job-name=other",
            "--wrap=sleep 8",
            "--output=/dev/null",
        ],
    );
    let error = fails(&project, &[]);
    assert!(error.contains("longer than its `timeout` of 3s"), "{error}");
    let jobs = cluster.finished();
    assert!(
        jobs.iter()
            .any(|job| job.contains("Name=other") && job.contains("COMPLETED")),
        "{jobs:?}"
    );
    assert_eq!(jobs_left(&project), 0);
}

#[test]
fn a_lost_node_is_one_attempt_and_its_orphans_change_nothing() {
    let Some(cluster) = Cluster::start(2, "") else {
        return;
    };
    let project = project(&cluster, "partition: main");
    // Each start writes its own line for as long as it lives, also when nobody counts it any more.
    let script = "echo \"$$\" >\"$OUT/who\"\necho begun\nwhile [ ! -e \"$SCRATCH/go\" ]; do echo \"$$\" >>\"$OUT/lines\"; \
                  echo \"$$\" >>\"$SCRATCH/lines\"; sleep 0.1; done\n";
    scripted(&project, script, "    retries: 1\n");
    let mut run = Running::start(&project, &["own.yaml"]);
    run.wait_for_messages(vec!["runs on n1", "begun"]);
    let first = find(&project.path(".pipeline/v1/jobs"), "out")
        .parent()
        .unwrap()
        .to_owned();
    cluster.lose_node("n1");
    run.wait_for("another try", |event| event["event"] == "stage_retried");
    let error = run.seen.last().unwrap()["error"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(
        error.contains("`n1`") && error.contains("NODE_FAIL"),
        "{error}"
    );
    run.wait_for_messages(vec!["runs on n2", "begun"]);
    assert!(cluster.processes_of("own.sh") >= 2, "the orphan is alive");
    let second = find(&project.path(".pipeline/v1/jobs"), "out")
        .parent()
        .unwrap()
        .to_owned();
    assert_ne!(first, second);
    let_go(&project);
    let (code, seen) = run.ended();
    assert_eq!(code, Some(0), "{seen:?}");
    let made = stages(&seen, "stage_done")["own"]["artifact"]
        .as_str()
        .unwrap()
        .to_owned();
    let read = |name: &str| project.read(&format!(".pipeline/v1/artifacts/{made}/{name}"));
    let who = read("who");
    assert!(read("lines").lines().all(|line| line == who.trim()));
    // It is what its digest says, and stays so.
    project.succeeds(&["plan", "--verify", "--exit-code", "own.yaml"]);
}

#[test]
fn a_job_that_slurm_starts_again_takes_the_scratch_and_not_the_output() {
    let Some(cluster) = Cluster::start(1, "") else {
        return;
    };
    let project = project(&cluster, "partition: main, extra: [--requeue]");
    let script = "echo x >>\"$SCRATCH/starts\"\necho \"begun $(wc -l <\"$SCRATCH/starts\")\"\necho half >>\"$OUT/made\"\n\
                  while [ ! -e \"$SCRATCH/go\" ]; do sleep 0.1; done\n";
    scripted(&project, script, "");
    let mut run = Running::start(&project, &["own.yaml"]);
    run.wait_for_message("begun 1");
    let [id] = &cluster.queued("RUNNING")[..] else {
        panic!("one job runs")
    };
    cluster.requeue(id);
    run.wait_for_message("begun 2");
    let_go(&project);
    let (code, seen) = run.ended();
    assert_eq!(code, Some(0), "{seen:?}");
    let made = stages(&seen, "stage_done")["own"]["artifact"]
        .as_str()
        .unwrap()
        .to_owned();
    assert_eq!(
        project.read(&format!(".pipeline/v1/artifacts/{made}/made")),
        "half\n"
    );
}

#[test]
fn a_controller_that_is_away_for_a_while_is_waited_for() {
    let Some(cluster) = Cluster::start(1, "") else {
        return;
    };
    let project = project(&cluster, "partition: main");
    scripted(&project, WAITS, "");
    let own = project.read("own.yaml");
    let next = "  next:\n    run_command: { command: [sh, -c, 'cp {input.own}/made {out}/'], inputs: { own: own }, output: folder }\n    \
                executor: cluster\n";
    project.write("own.yaml", &format!("{own}{next}"));
    let mut run = Running::start(&project, &["own.yaml"]);
    run.wait_for_message("begun");
    cluster.stop_controller();
    run.wait_for_message("the controller does not answer");
    // The job goes on without it, and its result counts.
    let_go(&project);
    run.wait_for("the first stage", |event| {
        event["event"] == "stage_done" && event["stage"] == "own"
    });
    run.wait_for("a try to submit", |event| {
        event["event"] == "message"
            && event["stage"] == "next"
            && event["text"].as_str().unwrap().contains("trying again")
    });
    cluster.start_controller(&[]);
    let (code, seen) = run.ended();
    assert_eq!(code, Some(0), "{seen:?}");
    assert_eq!(
        cluster
            .finished()
            .iter()
            .filter(|job| job.contains("Name=own.next."))
            .count(),
        1
    );
}

#[test]
fn a_full_queue_is_waited_for() {
    let Some(cluster) = Cluster::start(1, "MaxJobCount=3\nMinJobAge=2\n") else {
        return;
    };
    let project = project(&cluster, "partition: main");
    scripted(&project, "echo made >\"$OUT/made\"\n", "");
    for name in ["one", "two"] {
        let name = format!("--job-name={name}");
        cluster.run("sbatch", &[&name, "--wrap=sleep 600", "--output=/dev/null"]);
    }
    let mut run = Running::start(&project, &["own.yaml"]);
    run.wait_for_message("the queue takes no more jobs now");
    for name in ["--name=one", "--name=two"] {
        cluster.run("scancel", &[name]);
    }
    let (code, seen) = run.ended();
    assert_eq!(code, Some(0), "{seen:?}");
}

#[test]
fn a_node_without_the_program_or_with_another_version_is_told() {
    let Some(cluster) = Cluster::start(1, "") else {
        return;
    };
    let mut project = project(&cluster, "partition: main");
    scripted(&project, "true\n", "");
    project.variable(
        "PIPELINE_SLURM_PROGRAM",
        project.path("no such").to_str().unwrap(),
    );
    let error = fails(&project, &[]);
    assert!(
        error.contains("the node n1 can't start the program") && error.contains("not found"),
        "{error}"
    );
    project.write("other version", "#!/bin/sh\necho pipeline 0.0.9\n");
    let other = project.path("other version");
    fs::set_permissions(&other, fs::Permissions::from_mode(0o755)).unwrap();
    project.variable("PIPELINE_SLURM_PROGRAM", other.to_str().unwrap());
    let error = fails(&project, &[]);
    let own = concat!("this is pipeline ", env!("CARGO_PKG_VERSION"));
    assert!(
        error.contains("has pipeline 0.0.9 at") && error.contains(own),
        "{error}"
    );
    assert_eq!(jobs_left(&project), 0);
}

#[test]
fn a_failure_on_a_node_is_that_of_a_local_stage() {
    let Some(cluster) = Cluster::start(1, "") else {
        return;
    };
    let project = project(&cluster, "partition: main");
    scripted(
        &project,
        "echo something >\"$OUT/half\"\necho why it failed\nexit 3\n",
        "    retries: 2\n",
    );
    let ended = project.run(&["run", "--json", "own.yaml"]);
    let seen = events(&ended.stdout);
    let failed = &stages(&seen, "stage_failed")["own"];
    let local = project.run(&["run", "--json", "own.yaml", "--executor", "local"]);
    let local = stages(&events(&local.stdout), "stage_failed")["own"].clone();
    assert_eq!(failed["error"], local["error"]);
    let kept = failed["kept"].as_str().unwrap();
    assert_eq!(
        fs::read_to_string(format!("{kept}/output/half")).unwrap(),
        "something\n"
    );
    assert!(
        messages(&seen, "own").contains(&"why it failed".to_owned()),
        "{seen:?}"
    );
    assert_eq!(failed["interrupted"], json!(false));
    assert_eq!(jobs_left(&project), 0);
}
