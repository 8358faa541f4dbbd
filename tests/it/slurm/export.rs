//! The graph as plain scripts, run through the real Slurm.

use std::fs;
use std::process::Command;

use super::project;
use crate::support::program::Project;
use crate::support::slurm::Cluster;

/// Exports a recipe, and gives the scripts' names.
fn export(project: &Project, arguments: &[&str]) -> Vec<String> {
    project.succeeds(&[&["export", "slurm", "r.yaml", "-o", "jobs"], arguments].concat());
    let entries = fs::read_dir(project.path("jobs")).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort_unstable();
    names
}

#[test]
fn scripts_submit_the_whole_graph() {
    let Some(cluster) = Cluster::start(2, "") else {
        return;
    };
    let project = project(&cluster, "partition: main, time: 10m");
    let names = export(&project, &[]);
    assert_eq!(names.len(), 6);
    assert!(
        names.contains(&"1-pairs.sh".to_owned()) && names.contains(&"submit.sh".to_owned()),
        "{names:?}"
    );
    let tuned = names
        .iter()
        .find(|name| name.ends_with("tuned.sh"))
        .unwrap();
    let text = project.read(&format!("jobs/{tuned}"));
    for line in [
        "#SBATCH --partition=main",
        "#SBATCH --time=5",
        "#SBATCH --cpus-per-task=2",
        "#SBATCH --mem=600M",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
    let output = cluster.sh(&project, "jobs/submit.sh");
    assert!(output.status.success(), "{output:?}");
    cluster.wait_until("all jobs are over", || cluster.finished().len() == 5);
    let jobs = cluster.finished();
    assert!(
        jobs.iter().all(|job| job.contains("JobState=COMPLETED")),
        "{jobs:?}"
    );
    project.succeeds(&["plan", "r.yaml", "--exit-code"]);
    assert!(project.path("out/tuned").is_dir());

    // It is not overwritten.
    project.refuses(&["export", "slurm", "r.yaml", "-o", "jobs"], "is not empty");
}

#[test]
fn a_script_looks_at_its_inputs_itself() {
    let Some(cluster) = Cluster::start(1, "") else {
        return;
    };
    let project = project(&cluster, "partition: main");
    let names = export(&project, &["tokens"]);
    // What it needs, and no more.
    assert!(
        names.len() == 5 && !names.iter().any(|name| name.contains("tuned")),
        "{names:?}"
    );
    let tokens = names
        .iter()
        .find(|name| name.ends_with("tokens.sh"))
        .unwrap();
    // As if its dependencies had been forgotten.
    cluster.sh(&project, &format!("sbatch jobs/{tokens}"));
    cluster.wait_until("it is over", || cluster.finished().len() == 1);
    assert!(cluster.finished()[0].contains("JobState=FAILED"));
    let logs = fs::read_dir(project.path("")).unwrap().flatten();
    let log = logs
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|end| end == "log"));
    let log = fs::read_to_string(log.unwrap()).unwrap();
    assert!(
        log.contains("not all that r.tokens reads is there"),
        "{log}"
    );
    // A stage that fails takes those behind it along, and nothing waits for ever.
    fs::remove_file(project.path("pairs.jsonl")).unwrap();
    let output = cluster.sh(&project, "jobs/submit.sh");
    assert!(output.status.success(), "{output:?}");
    cluster.wait_until("all are over", || {
        cluster.queued("PENDING,RUNNING").is_empty()
    });
    cluster.wait_until("they are written down", || cluster.finished().len() >= 5);
    let jobs = cluster.finished();
    assert!(jobs.iter().any(|job| job.contains("CANCELLED")), "{jobs:?}");
}

#[test]
fn scripts_are_made_without_slurm() {
    let project = Project::empty();
    project.write(
        "it's.yaml",
        "version: 1\nstages:\n  made:\n    run_command: { command: ['true'], output: folder }\n    matrix: { n: [1, 2] }\n",
    );
    let set = "stages.made.retries=1";
    let told = project.succeeds(&["export", "slurm", "it's.yaml", "--set", set, "-o", "a b"]);
    assert!(told.contains("2 scripts are in `a b`"), "{told}");
    for entry in fs::read_dir(project.path("a b")).unwrap() {
        let path = entry.unwrap().path();
        let checked = Command::new("sh").arg("-n").arg(&path).status().unwrap();
        assert!(checked.success(), "{}", path.display());
        let text = fs::read_to_string(&path).unwrap();
        assert!(
            path.ends_with("submit.sh") || text.contains("--set stages.made.retries=1"),
            "{text}"
        );
    }
}
