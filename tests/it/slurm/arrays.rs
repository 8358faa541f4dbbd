//! The combinations of a matrix and the shards of a stage that are ready together are one array of jobs, and each is followed, cancelled and
//! joined by itself.

use std::collections::BTreeSet;

use nix::sys::signal::Signal;

use super::{Running, jobs_left, messages, project};
use crate::support::program::{Project, events, stages};
use crate::support::slurm::Cluster;

/// Each makes its number, when there is a file for it.
fn matrix(project: &Project, numbers: &[u32]) {
    project.write(
        "own.sh",
        "echo \"begun $1\"\nwhile [ ! -e \"$2/go$1\" ]; do sleep 0.1; done\necho \"$1\" >\"$OUT/made\"\n",
    );
    let folder = project.path("");
    let recipe = format!(
        "version: 1\nstages:\n  own:\n    run_command: {{ command: [sh, '{{file.script}}', '${{n}}', '{}'], files: {{ script: own.sh }}, \
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
    // The runner dies, and the next one joins what is left of the array.
    run.signal(Signal::SIGKILL);
    run.ended();
    let mut run = Running::start(&project, &["own.yaml", "--keep-going"]);
    run.wait_for_messages(vec!["begun 1", "begun 3"]);
    let of_one = |event: &serde_json::Value| {
        event["stage"] == "own[n=1]"
            && event["text"]
                .as_str()
                .is_some_and(|text| text.contains("joins it") && text.contains('_'))
    };
    assert!(run.seen.iter().any(of_one), "{:?}", run.seen);
    // One that somebody cancels takes no other along.
    let told = messages(&run.seen, "own[n=1]");
    let id = told
        .iter()
        .find_map(|text| text.strip_prefix("job "))
        .unwrap();
    let id = id.split(' ').next().unwrap().to_owned();
    assert!(id.starts_with(&format!("{array}_")), "{id}");
    cluster.run("scancel", &[&id]);
    project.write("go3", "");
    let (code, seen) = run.ended();
    assert_eq!(code, Some(1));
    let failed = stages(&seen, "stage_failed");
    assert_eq!(failed.keys().collect::<Vec<_>>(), ["own[n=1]"]);
    let error = failed["own[n=1]"]["error"].as_str().unwrap();
    assert!(
        error.contains("cancelled by somebody else") && error.contains(&id),
        "{error}"
    );
    assert!(stages(&seen, "stage_done").contains_key("own[n=3]"));
    assert_eq!(arrays(&cluster), all, "nothing was submitted twice");
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
    // Three elements, and six jobs of all.
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
    let told = events(&project.succeeds(&["run", "--json", "own.yaml"]));
    assert_eq!(stages(&told, "stage_done").len(), 4);
    let all = arrays(&cluster);
    let alone = all.iter().filter(|(_, element)| element == "N/A").count();
    // Two combinations, the joining task, and the two shards as an array.
    assert_eq!((all.len(), alone), (5, 3), "{all:?}");
}
