//! The combinations of a matrix and the shards of a stage that are ready together are one array of jobs, and each is followed, cancelled and
//! joined by itself.

use std::collections::BTreeSet;

use nix::sys::signal::Signal;
use serde_json::Value;

use super::{Running, jobs_left, messages, project};
use crate::support::program::{Project, events, stages};
use crate::support::slurm::Cluster;

/// Each makes its number, when there is a file for it.
fn matrix(project: &Project, numbers: &[u32]) {
    project.write(
        "own.sh",
        "n=${1#n}\necho \"begun $n\"\nwhile [ ! -e \"$2/go$n\" ]; do sleep 0.1; done\necho \"$n\" >\"$OUT/made\"\n",
    );
    let folder = project.path("");
    let recipe = format!(
        "version: 1\nstages:\n  own:\n    run_command: {{ command: [sh, '{{file.script}}', 'n${{n}}', '{}'], files: {{ script: own.sh }}, \
         output: folder }}\n    matrix: {{ n: {numbers:?} }}\n    executor: cluster\n",
        folder.display()
    );
    project.write("own.yaml", &recipe);
}

/// The arrays in the queue with the number of elements that are known of each; jobs that are none have the element `N/A`.
fn arrays(cluster: &Cluster) -> BTreeSet<(String, String)> {
    let told = cluster.told("squeue", &["-h", "-r", "--states=all", "--format=%F %K"]);
    let pairs = told.lines().filter_map(|line| line.split_once(' '));
    pairs
        .map(|(array, element)| (array.to_owned(), element.to_owned()))
        .collect()
}

/// Reads events until what was seen holds.
fn until(run: &mut Running, holds: impl Fn(&[Value]) -> bool) {
    while !holds(&run.seen) {
        assert!(run.next_event().is_some(), "it never held: {:?}", run.seen);
    }
}

/// The number of a stage's job, which its messages tell.
fn number_of(run: &mut Running, stage: &str) -> String {
    let number = |seen: &[Value]| {
        let told = messages(seen, stage);
        let id = told.iter().find_map(|text| text.strip_prefix("job "));
        id.map(|id| id.split(' ').next().unwrap().to_owned())
    };
    until(run, |seen| number(seen).is_some());
    number(&run.seen).unwrap()
}

#[test]
fn a_matrix_is_one_array_whose_elements_are_jobs_like_others() {
    let Some(cluster) = Cluster::start(2, "") else {
        return;
    };
    let project = project(&cluster, "partition: main");
    matrix(&project, &[1, 2, 3]);
    project.write("go2", "");
    let mut run = Running::start(&project, &["own.yaml", "--keep-going"]);
    run.wait_for("one of them", |event| {
        event["event"] == "stage_done" && event["stage"] == "own[n=2]"
    });
    let all = arrays(&cluster);
    let of: BTreeSet<&str> = all.iter().map(|(array, _)| array.as_str()).collect();
    let elements: BTreeSet<&str> = all.iter().map(|(_, element)| element.as_str()).collect();
    assert_eq!(of.len(), 1, "{all:?}");
    assert_eq!(elements, ["0", "1", "2"].into());
    let array = of.first().unwrap().to_string();
    let name = cluster.told("squeue", &["-h", "--states=all", "--format=%j"]);
    assert!(name.starts_with("own.own."), "{name}");
    // One that somebody cancels takes no other along.
    let first = number_of(&mut run, "own[n=1]");
    let third = number_of(&mut run, "own[n=3]");
    until(&mut run, |seen| {
        messages(seen, "own[n=1]").contains(&"begun 1".to_owned())
    });
    assert!(first.starts_with(&format!("{array}_")), "{first}");
    cluster.run("scancel", &[&first]);
    until(&mut run, |seen| {
        stages(seen, "stage_failed").contains_key("own[n=1]")
    });
    let failed = &stages(&run.seen, "stage_failed")["own[n=1]"];
    let error = failed["error"].as_str().unwrap();
    assert!(
        error.contains("cancelled by somebody else") && error.contains(&first),
        "{error}"
    );
    // The runner dies, and the next one joins what is left of the array.
    run.signal(Signal::SIGKILL);
    run.ended();
    project.write("go1", "");
    let mut run = Running::start(&project, &["own.yaml"]);
    run.wait_for_message(&format!(
        "job {third} of an earlier run works on it; this run joins it"
    ));
    project.write("go3", "");
    let (code, seen) = run.ended();
    assert_eq!(code, Some(0), "{seen:?}");
    let done: Vec<String> = stages(&seen, "stage_done").into_keys().collect();
    assert_eq!(done, ["own[n=1]", "own[n=3]"]);
    let more: Vec<_> = arrays(&cluster).difference(&all).cloned().collect();
    assert!(
        matches!(&more[..], [(_, element)] if element == "N/A"),
        "{more:?}"
    );
    assert_eq!(jobs_left(&project), 0);
}

#[test]
fn ctrl_c_cancels_all_elements() {
    let Some(cluster) = Cluster::start(2, "") else {
        return;
    };
    let project = project(&cluster, "partition: main");
    matrix(&project, &[1, 2, 3, 4, 5, 6]);
    let mut run = Running::start(&project, &["own.yaml"]);
    run.wait_for_message("begun");
    run.signal(Signal::SIGINT);
    let (code, seen) = run.ended();
    assert_eq!(code, Some(130), "{seen:?}");
    cluster.wait_until("all are over", || {
        cluster.queued("PENDING,RUNNING,COMPLETING").is_empty()
    });
    assert_eq!(jobs_left(&project), 0);
}

#[test]
fn an_array_is_as_large_as_the_cluster_takes() {
    // That is one more than the largest number of an element.
    let Some(cluster) = Cluster::start(2, "MaxArraySize=3\n") else {
        return;
    };
    let project = project(&cluster, "partition: main");
    let numbers = [1, 2, 3, 4, 5, 6, 7];
    matrix(&project, &numbers);
    for number in numbers {
        project.write(&format!("go{number}"), "");
    }
    let told = events(&project.succeeds(&["run", "--json", "own.yaml"]));
    assert_eq!(stages(&told, "stage_done").len(), 7);
    let all = arrays(&cluster);
    assert_eq!(all.len(), 7, "{all:?}");
    let of: BTreeSet<&String> = all.iter().map(|(array, _)| array).collect();
    assert!((3..7).contains(&of.len()), "{all:?}");
    assert!(all.iter().all(|(_, element)| element != "3"), "{all:?}");
}

#[test]
fn combinations_that_ask_for_something_else_are_apart() {
    let Some(cluster) = Cluster::start(2, "") else {
        return;
    };
    let project = project(&cluster, "partition: main");
    project.write(
        "own.yaml",
        "version: 1\nstages:\n  own:\n    run_command: { command: [sh, -c, 'echo ${n} >{out}/made'], output: folder }\n    \
         matrix: { n: [1, 2] }\n    resources: { cpus: '${n}' }\n    executor: cluster\n  shards:\n    apply_chat_template: { dataset: pairs, \
         template: chatml }\n    resources: { shards: 2 }\n    executor: cluster\n  pairs: { import_dataset: { path: pairs.jsonl } }\n",
    );
    let ended = project.run(&["run", "--json", "own.yaml"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let told = events(&ended.stdout);
    assert_eq!(stages(&told, "stage_done").len(), 4);
    let all = arrays(&cluster);
    let alone = all.iter().filter(|(_, element)| element == "N/A").count();
    // Two combinations, the joining task, and the two shards as an array.
    assert_eq!((all.len(), alone), (5, 3), "{all:?}");
}

/// Those of these numbers whose jobs have begun.
fn begun(seen: &[Value], numbers: &[u32]) -> Vec<u32> {
    let begun = |n: &u32| messages(seen, &format!("own[n={n}]")).contains(&format!("begun {n}"));
    numbers.iter().copied().filter(begun).collect()
}

#[test]
fn an_array_that_the_queue_has_no_room_for_is_halved() {
    // Room for three jobs: an array of five would never be taken.
    let Some(cluster) = Cluster::start(2, "MaxJobCount=4\nMinJobAge=2\n") else {
        return;
    };
    let project = project(&cluster, "partition: main");
    let numbers = [1, 2, 3, 4, 5];
    matrix(&project, &numbers);
    let mut run = Running::start(&project, &["own.yaml"]);
    run.wait_for_message("the queue takes no more jobs now");
    // Those that there is room for run and are followed to their end, while others wait for room.
    until(&mut run, |seen| begun(seen, &numbers).len() >= 2);
    let first = begun(&run.seen, &numbers)[0];
    project.write(&format!("go{first}"), "");
    until(&mut run, |seen| {
        stages(seen, "stage_done").contains_key(&format!("own[n={first}]"))
    });
    let has_job = |n: &u32| {
        let told = messages(&run.seen, &format!("own[n={n}]"));
        told.iter().any(|text| text.starts_with("job "))
    };
    let with_job = numbers.iter().filter(|n| has_job(n)).count();
    assert!(
        with_job < numbers.len(),
        "there is no room for all: {:?}",
        run.seen
    );
    for number in numbers {
        project.write(&format!("go{number}"), "");
    }
    let (code, seen) = run.ended();
    assert_eq!(code, Some(0), "{seen:?}");
    assert_eq!(stages(&seen, "stage_done").len(), 5);
    assert_eq!(jobs_left(&project), 0);
}

#[test]
fn a_runner_that_died_while_the_queue_was_full_left_jobs_that_are_joined_and_others_that_are_not() {
    let Some(cluster) = Cluster::start(2, "MaxJobCount=4\nMinJobAge=2\n") else {
        return;
    };
    let project = project(&cluster, "partition: main");
    let numbers = [1, 2, 3, 4, 5];
    matrix(&project, &numbers);
    let mut run = Running::start(&project, &["own.yaml"]);
    until(&mut run, |seen| begun(seen, &numbers).len() >= 2);
    run.signal(Signal::SIGKILL);
    let (_, before) = run.ended();
    let mut run = Running::start(&project, &["own.yaml"]);
    run.wait_for_message("of an earlier run works on it; this run joins it");
    for number in numbers {
        project.write(&format!("go{number}"), "");
    }
    let (code, seen) = run.ended();
    assert_eq!(code, Some(0), "{before:?} {seen:?}");
    assert_eq!(stages(&seen, "stage_done").len(), 5);
    assert!(stages(&seen, "stage_failed").is_empty());
    assert_eq!(jobs_left(&project), 0);
}
