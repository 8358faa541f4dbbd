//! A matrix of trainings on two nodes, of which one is lost in the middle.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{Running, jobs_left, project};
use crate::support::program::stages;
use crate::support::slurm::Cluster;

const MATRIX: &str = "  tuned:
    train_orpo: { model: blank, dataset: tokens, max_steps: 400, save_steps: 10, logging_steps: 1, beta: '${beta}' }
    matrix: { beta: [0.05, 0.1, 0.2, 0.4] }
    resources: { cpus: 2 }
    retries: 2
";

#[test]
fn a_matrix_outlives_one_of_its_nodes() {
    let Some(cluster) = Cluster::start(2, "") else {
        return;
    };
    let with_matrix = || {
        let project = project(&cluster, "partition: main");
        let recipe = project.read("r.yaml");
        let before = recipe.split("  tuned:").next().unwrap();
        project.write("r.yaml", &format!("{before}{MATRIX}"));
        project
    };
    let here = with_matrix();
    here.succeeds(&["run", "r.yaml"]);
    let expected = here.artifacts(&["r.yaml"]);

    let project = with_matrix();
    let mut run = Running::start(&project, &["r.yaml", "--executor", "cluster"]);
    let tuned = |event: &Value| {
        event["stage"]
            .as_str()
            .is_some_and(|stage| stage.starts_with("tuned"))
    };
    // The queue is asked, not the events: those of a job come late and many at a time.
    cluster.wait_until("two trainings run at a time", || {
        let told = cluster.told("squeue", &["-h", "--states=RUNNING", "--format=%j"]);
        told.lines().filter(|name| name.contains("tuned")).count() == 2
    });
    let mut begun = BTreeSet::new();
    run.wait_for("a step of both", |event| {
        if event["event"] == "metrics" && tuned(event) {
            begun.insert(event["stage"].to_string());
        }
        begun.len() == 2
    });
    cluster.cut_power("n1");
    run.wait_for("another try", |event| {
        event["event"] == "stage_retried" && tuned(event)
    });
    let (code, seen) = run.ended();
    assert_eq!(code, Some(0), "{:?}", seen.last());
    assert_eq!(stages(&seen, "stage_done").len(), 8);
    assert_eq!(project.artifacts(&["r.yaml"]), expected);
    assert_eq!(jobs_left(&project), 0);
    let table = project.succeeds(&["table", "r.yaml"]);
    for beta in ["0.05", "0.1", "0.2", "0.4"] {
        assert!(table.contains(beta), "{table}");
    }
}
