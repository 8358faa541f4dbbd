//! A training by two processes on two nodes, which `srun` starts inside the job and MPI connects.

use super::{Running, jobs_left, messages, project};
use crate::support::program::{Project, stages};
use crate::support::slurm::Cluster;

/// Open MPI's settings, here that it listens on the loopback address alone. A job gets those that the executor names.
const MPI: [(&str, &str); 4] = [
    ("OMPI_MCA_oob_tcp_if_include", "lo"),
    ("OMPI_MCA_btl_tcp_if_include", "lo"),
    // Tests may run as root in a container.
    ("OMPI_ALLOW_RUN_AS_ROOT", "1"),
    ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"),
];

/// A project whose training wants both processors of two nodes.
fn shared(cluster: &Cluster) -> Project {
    let names: Vec<&str> = MPI.iter().map(|(name, _)| *name).collect();
    let settings = format!("partition: main, env: [{}]", names.join(", "));
    let mut project = project(cluster, &settings);
    for (name, value) in MPI {
        project.variable(name, value);
    }
    let recipe = project.read("r.yaml").replace(
        "max_steps: 4, save_steps: 2, logging_steps: 1 }\n    resources: { cpus: 2, memory: 600MiB }",
        "max_steps: 400, save_steps: 5, logging_steps: 1, per_device_train_batch_size: 2, gradient_accumulation_steps: 2 }\n    \
         resources: { cpus: 4, processes: 2 }\n    retries: 1",
    );
    assert!(recipe.contains("processes: 2"));
    project.write("r.yaml", &recipe);
    project
}

#[test]
fn two_nodes_train_as_two_processes_of_one_machine_do() {
    let Some(cluster) = Cluster::start(2, "") else {
        return;
    };
    let here = shared(&cluster);
    // As many as the nodes claim to have.
    let local = ["r.yaml", "--cpus", "4"];
    here.succeeds(&[&["run"], &local[..]].concat());
    let expected = here.artifacts(&local);

    let there = shared(&cluster);
    there.succeeds(&["run", "r.yaml", "--executor", "cluster"]);
    // Slurm's own list of what ended: a job may be too short for its nodes to be told while it runs.
    cluster.wait_until("a job of two nodes ended", || {
        let ended = cluster.finished();
        ended.iter().any(|job| job.contains("NodeList=n[1-2]"))
    });
    assert_eq!(there.artifacts(&local), expected);

    // One of the two dies on its node; all of it ends, and the next attempt goes on from the checkpoint to the same bytes.
    let again = shared(&cluster);
    let mut run = Running::start(&again, &["r.yaml", "--executor", "cluster"]);
    run.wait_for("a step", |event| {
        event["event"] == "metrics" && event["stage"] == "tuned" && event["step"].as_u64() > Some(5)
    });
    assert_eq!(cluster.kill_one_of("--member"), 2);
    let (code, seen) = run.ended();
    assert_eq!(code, Some(0), "{:?}", seen.last());
    let retried = &stages(&seen, "stage_retried")["tuned"];
    let error = retried["error"].as_str().unwrap();
    assert!(error.contains("one of its 2 processes ended"), "{error}");
    let of_tuned = messages(&seen, "tuned");
    assert!(
        of_tuned
            .iter()
            .any(|text| text.contains("from a checkpoint")),
        "{of_tuned:?}"
    );
    assert_eq!(again.artifacts(&local), expected);
    assert_eq!(jobs_left(&again), 0);
}
