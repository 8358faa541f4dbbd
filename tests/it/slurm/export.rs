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

/// Three combinations, of which the last one fails, and what reads each, one and all of them.
const MATRIX: &str = "version: 1
stages:
  own:
    run_command: { command: [sh, -c, 'test ${n} -lt 3 && echo ${n} >{out}/made'], output: folder }
    matrix: { n: [1, 2, 3] }
  next: { run_command: { command: [cp, '{input.own}/made', '{out}/made'], inputs: { own: own }, output: folder } }
  one: { run_command: { command: [cp, '{input.own}/made', '{out}/made'], inputs: { own: 'own[n=2]' }, output: folder } }
  all: { run_command: { command: [ls, '{input.own}'], inputs: { own: { collect: [own] } }, output: folder } }
";

#[test]
fn a_matrix_is_an_array_and_nothing_waits_for_more_than_it_reads() {
    let Some(cluster) = Cluster::start(2, "") else {
        return;
    };
    let project = project(&cluster, "partition: main");
    project.write("r.yaml", MATRIX);
    let names = export(&project, &[]);
    assert_eq!(
        names,
        ["1-own.sh", "2-next.sh", "3-one.sh", "4-all.sh", "submit.sh"]
    );
    let output = cluster.sh(&project, "jobs/submit.sh");
    assert!(output.status.success(), "{output:?}");
    cluster.wait_until("all are over", || {
        cluster.queued("PENDING,RUNNING,COMPLETING").is_empty()
    });
    let format = "--format=%j %K %T";
    let told = cluster.told("squeue", &["-h", "-r", "--states=all", format]);
    let mut states: Vec<&str> = told.lines().collect();
    states.sort_unstable();
    assert_eq!(
        states,
        [
            "r.all N/A CANCELLED",
            "r.next 0 COMPLETED",
            "r.next 1 COMPLETED",
            "r.next 2 CANCELLED",
            "r.one N/A COMPLETED",
            "r.own 0 COMPLETED",
            "r.own 1 COMPLETED",
            "r.own 2 FAILED",
        ]
    );
    let made = [
        "plan",
        "r.yaml",
        "--exit-code",
        "next[n=1]",
        "next[n=2]",
        "one",
    ];
    project.succeeds(&made);
    // Elements have logs of their own.
    let log = |path: &std::path::Path| path.extension().is_some_and(|end| end == "log");
    let logs = fs::read_dir(project.path("jobs")).unwrap().flatten();
    let logs = logs.filter(|entry| log(&entry.path())).count();
    assert_eq!(logs, 6);
}

#[test]
fn scripts_are_made_without_slurm() {
    let project = Project::empty();
    project.write("it's.yaml", MATRIX);
    let set = "stages.own.retries=1";
    let export = |folder: &str, more: &[&str]| {
        let export = ["export", "slurm", "it's.yaml", "--set", set, "-o", folder];
        project.succeeds(&[&export[..], more].concat())
    };
    let told = export("a b", &[]);
    assert!(told.contains("4 scripts are in `a b`"), "{told}");
    for entry in fs::read_dir(project.path("a b")).unwrap() {
        let path = entry.unwrap().path();
        let checked = Command::new("sh").arg("-n").arg(&path).status().unwrap();
        assert!(checked.success(), "{}", path.display());
        let text = fs::read_to_string(&path).unwrap();
        assert!(
            path.ends_with("submit.sh") || text.contains("--set stages.own.retries=1"),
            "{text}"
        );
    }
    let script = project.read("a b/2-next.sh");
    for line in [
        "#SBATCH --array=0-2\n",
        "#SBATCH --output=it_s.next.%A_%a.log\n",
        "\n1) stage='next[n=2]'; set -- 'own[n=2]' ;;\n",
    ] {
        assert!(script.contains(line), "{line}: {script}");
    }
    let submit = project.read("a b/submit.sh");
    for line in [
        "submit \"$@\" 1-own.sh\njob1=$job\n",
        "submit --dependency=aftercorr:$job1 \"$@\" 2-next.sh\n",
        "submit --dependency=afterok:${job1}_1 \"$@\" 3-one.sh\n",
        "submit --dependency=afterok:$job1 \"$@\" 4-all.sh\n",
    ] {
        assert!(submit.contains(line), "{line}: {submit}");
    }
    // A script for each, for those who want to see that.
    let told = export("each", &["--array-size", "1"]);
    assert!(told.contains("8 scripts are in `each`"), "{told}");
    let submit = project.read("each/submit.sh");
    let all = "submit --dependency=afterok:$job1:$job2:$job3 ";
    assert!(submit.contains(all), "{submit}");
    let script = project.read("each/1-own_n=1_.sh");
    assert!(!script.contains("--array"), "{script}");
}
