//! Nodes that see neither the project nor its store: what a stage reads, tells and makes goes through the remote. On these nodes an empty
//! folder that nobody can write lies where the project is, its home included.

use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;
use tempfile::TempDir;

use super::{
    RECIPE, Running, WAITS, are_left_and_joined, jobs_left, let_go_below, project, scripted,
};
use crate::support::program::{Project, events, stages};
use crate::support::slurm::Cluster;

/// A project, the remote, and a place for the stores of nodes, which is none of the project's.
struct Far {
    project: Project,
    remote: TempDir,
    nodes: TempDir,
}

impl Far {
    /// None where no node can be kept from seeing the project.
    fn new(cluster: &Cluster, settings: &str) -> Option<Self> {
        let mut project = project(
            cluster,
            &format!("partition: main, shared: false{settings}"),
        );
        let (remote, nodes) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        project.variable("PIPELINE_REMOTE", remote.path().to_str().unwrap());
        // On a node it is a place as any other.
        project.variable("RUST_BACKTRACE", "1");
        cluster.hide(&project.path("")).then_some(Self {
            project,
            remote,
            nodes,
        })
    }

    /// The same where nodes keep what they fetched.
    fn with_node_store(cluster: &Cluster) -> Option<Self> {
        let mut far = Self::new(cluster, "")?;
        let store = far.nodes.path().to_str().unwrap();
        let settings = format!("partition: main, shared: false, node_store: {store}");
        cluster.serve(&mut far.project, &settings);
        Some(far)
    }

    /// What jobs left in the remote beside results.
    fn left(&self) -> usize {
        files(&self.remote.path().join("v1/jobs")).len()
    }
}

/// All files below a folder.
fn files(below: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![below.to_owned()];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                open.push(path);
            } else {
                found.push(path);
            }
        }
    }
    found
}

#[test]
fn a_training_on_nodes_without_the_store_makes_the_same_bytes() {
    let Some(cluster) = Cluster::start(2, "") else {
        return;
    };
    let own = project(&cluster, "partition: main");
    own.succeeds(&["run", "r.yaml"]);
    let expected = own.artifacts(&["r.yaml"]);
    let Some(far) = Far::new(&cluster, "") else {
        return;
    };
    let project = &far.project;
    // One of them in shards, each of which is a job, too.
    let sharded = RECIPE.replace(
        "  tokens: { tokenize: { dataset: chats, tokenizer: blank } }\n",
        "  tokens:\n    tokenize: { dataset: chats, tokenizer: blank }\n    resources: { shards: 2 }\n",
    );
    assert_ne!(sharded, RECIPE);
    // And its rows are in the files that fit a pattern.
    let sharded = sharded.replace("path: pairs.jsonl", "path: 'pa*.jsonl'");
    project.write("r.yaml", &sharded);
    let told = events(&project.succeeds(&["run", "--json", "r.yaml", "--executor", "cluster"]));
    assert_eq!(project.artifacts(&["r.yaml"]), expected);
    let of_tuned = |sort: &str| {
        let of = told
            .iter()
            .filter(|event| event["event"] == sort && event["stage"] == "tuned");
        of.count()
    };
    assert!(of_tuned("metrics") >= 4, "{told:?}");
    assert_eq!((jobs_left(project), far.left()), (0, 0));
    assert!(project.path("out/tuned").is_dir());
    // Its results are those of any other machine that has the remote.
    let mut other = super::project(&cluster, "partition: main");
    other.write("r.yaml", &sharded);
    other.variable("PIPELINE_REMOTE", far.remote.path().to_str().unwrap());
    assert!(other.ran(&["r.yaml"]).is_empty());
    project.succeeds(&["cache", "verify"]);
}

#[test]
fn programs_files_and_secrets_reach_such_a_node_and_nothing_secret_stays() {
    let Some(cluster) = Cluster::start(1, "") else {
        return;
    };
    let Some(mut far) = Far::new(&cluster, "") else {
        return;
    };
    let project = &mut far.project;
    project.variable("SECRET", "s3cr3t-it's-$HOME");
    project.variable("AWS_SECRET_ACCESS_KEY", "cloudSecretXyz");
    project.variable("UNRELATED", "nobodysBusiness");
    scripted(
        project,
        "test -n \"$SECRET\" || exit 9\necho \"${#SECRET} $UNRELATED\" >\"$OUT/told\"\n\"$1\" data/* >>\"$OUT/told\"\necho begun\n\
         while [ ! -e \"$OUT/../go\" ]; do sleep 0.1; done\n",
        "",
    );
    let recipe = project.read("own.yaml").replace(
        "command: [sh, '{file.script}'], files: { script: own.sh }",
        "command: [sh, '{file.script}', '{file.tool}', '{file.data}'], files: { script: own.sh, tool: tool, data: data }",
    );
    project.write("own.yaml", &recipe);
    project.write(
        "own.sh",
        &project.read("own.sh").replace("data/*", "\"$2\""),
    );
    project.write("tool", "#!/bin/sh\ncat \"$1/a.txt\" \"$1/deep/b.txt\"\n");
    let tool = project.path("tool");
    fs::set_permissions(&tool, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    project.write("data/a.txt", "one\n");
    project.write("data/deep/b.txt", "two\n");
    let mut run = Running::start(project, &["own.yaml"]);
    run.wait_for_message("begun");
    let [id] = &cluster.queued("RUNNING")[..] else {
        panic!("one job runs")
    };
    let script = cluster.told("scontrol", &["write", "batch_script", id, "-"]);
    let shown = cluster.told("scontrol", &["show", "job", "-dd", id]);
    assert!(script.contains("work --far"), "{script}");
    let mut kept = vec![script, shown];
    for path in files(far.remote.path())
        .into_iter()
        .chain(files(&far.project.path(".pipeline")))
    {
        kept.push(String::from_utf8_lossy(&fs::read(&path).unwrap()).into_owned());
    }
    for secret in ["s3cr3t", "cloudSecretXyz", "nobodysBusiness"] {
        assert!(kept.iter().all(|text| !text.contains(secret)), "{secret}");
    }
    // The folder of the node's own store.
    let out = cluster.environment_of("own.sh", "OUT");
    fs::write(Path::new(&out).parent().unwrap().join("go"), "").unwrap();
    let (code, seen) = run.ended();
    assert_eq!(code, Some(0), "{seen:?}");
    let made = stages(&seen, "stage_done")["own"]["artifact"].clone();
    let told = format!(".pipeline/v1/artifacts/{}/told", made.as_str().unwrap());
    assert_eq!(far.project.read(&told), "17 \none\ntwo\n");
    // Nothing of it stays on the node, and nothing of the job in the remote.
    assert!(!Path::new(&out).exists());
    assert_eq!((jobs_left(&far.project), far.left()), (0, 0));
}

#[test]
fn a_cluster_that_does_not_share_needs_a_remote_for_both_ways() {
    let Some(cluster) = Cluster::start(1, "") else {
        return;
    };
    let mut project = project(&cluster, "partition: main, shared: false");
    let refused = |project: &Project, more: &[&str]| {
        let run = ["run", "--json", "r.yaml", "--executor", "cluster"];
        let ended = project.run(&[&run[..], more].concat());
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert!(!ended.stdout.contains("stage_started"), "{}", ended.stdout);
        assert!(ended.stderr.contains("is not `shared`"), "{}", ended.stderr);
        assert!(ended.stderr.contains("hint: name one"), "{}", ended.stderr);
    };
    refused(&project, &[]);
    let remote = tempfile::tempdir().unwrap();
    project.variable("PIPELINE_REMOTE", remote.path().to_str().unwrap());
    refused(&project, &["--no-push"]);
    refused(&project, &["--no-pull"]);
    // Here it needs none.
    project.variable("PIPELINE_REMOTE", "");
    project.succeeds(&["run", "r.yaml", "pairs"]);
    cluster.serve(&mut project, "partition: main, node_store: /scratch");
    let ended = project.run(&["run", "r.yaml", "--executor", "cluster"]);
    assert_eq!(ended.code, Some(2));
    assert!(
        ended.stderr.contains("executors.cluster.slurm.node_store"),
        "{}",
        ended.stderr
    );
}

#[test]
fn such_jobs_are_left_and_joined_as_others_are() {
    let Some(cluster) = Cluster::start(1, "") else {
        return;
    };
    let Some(far) = Far::with_node_store(&cluster) else {
        return;
    };
    let (project, nodes) = (&far.project, far.nodes.path());
    are_left_and_joined(&cluster, project, nodes);
    assert_eq!(far.left(), 0);

    // A remote that is away for a while is waited for.
    project.write("own.sh", &format!("# with another remote\n{WAITS}"));
    let mut run = Running::start(project, &["own.yaml"]);
    run.wait_for_message("begun");
    let away = far.remote.path().with_extension("away");
    fs::rename(far.remote.path(), &away).unwrap();
    fs::write(far.remote.path(), "no folder").unwrap();
    let_go_below(nodes);
    run.wait_for_message("nothing comes from job");
    fs::remove_file(far.remote.path()).unwrap();
    fs::rename(&away, far.remote.path()).unwrap();
    let (code, seen) = run.ended();
    assert_eq!(code, Some(0), "{seen:?}");
}

#[test]
fn a_training_that_was_cancelled_goes_on_where_its_node_kept_it() {
    let Some(cluster) = Cluster::start(1, "") else {
        return;
    };
    let Some(far) = Far::with_node_store(&cluster) else {
        return;
    };
    let long = [
        "r.yaml",
        "--executor",
        "cluster",
        "--set",
        "stages.tuned.train_orpo.max_steps=100000",
        "--set",
        "stages.tuned.train_orpo.lr_scheduler_type=constant",
    ];
    let mut run = Running::start(&far.project, &long);
    run.wait_for("a step", |event| {
        event["event"] == "metrics"
            && event["stage"] == "tuned"
            && event["step"].as_u64() >= Some(5)
    });
    run.signal(Signal::SIGINT);
    let (code, seen) = run.ended();
    assert_eq!(code, Some(130), "{:?}", seen.last());
    assert_eq!((jobs_left(&far.project), far.left()), (0, 0));
    let mut run = Running::start(&far.project, &long);
    run.wait_for_message("from a checkpoint");
}

#[test]
fn what_such_a_node_refuses_is_told_by_slurm() {
    let Some(cluster) = Cluster::start(1, "") else {
        return;
    };
    let Some(mut far) = Far::new(&cluster, "") else {
        return;
    };
    let project = &mut far.project;
    scripted(project, "true\n", "");
    let fails = |project: &Project| {
        let ended = project.run(&["run", "--json", "own.yaml"]);
        assert_eq!(ended.code, Some(1), "{ended:?}");
        let failed = stages(&events(&ended.stdout), "stage_failed");
        failed["own"]["error"].as_str().unwrap().to_owned()
    };
    project.variable("PIPELINE_SLURM_PROGRAM", "/no such/program");
    let error = fails(project);
    assert!(
        error.contains("the node n1 can't start the program") && error.contains("not found"),
        "{error}"
    );
    // A task that somebody put in the place of the one that was submitted.
    project.variable("PIPELINE_SLURM_PROGRAM", "");
    let blocks = [
        "--exclusive",
        "--job-name=other",
        "--wrap=sleep 60",
        "--output=/dev/null",
    ];
    cluster.run("sbatch", &blocks);
    cluster.wait_until("somebody has the node", || {
        cluster.queued("RUNNING").len() == 1
    });
    let mut run = Running::start(project, &["own.yaml"]);
    run.wait_for("the start", |event| event["event"] == "stage_started");
    cluster.wait_until("it waits", || cluster.queued("PENDING").len() == 1);
    let tasks = files(&far.remote.path().join("v1/jobs"));
    let [task] = &tasks[..] else {
        panic!("one task is there: {tasks:?}")
    };
    let other = fs::read_to_string(task).unwrap().replace("sh\"", "rm\"");
    fs::write(task, other).unwrap();
    cluster.run("scancel", &["--name=other"]);
    let (code, seen) = run.ended();
    assert_eq!(code, Some(1));
    let error = stages(&seen, "stage_failed")["own"]["error"].to_string();
    assert!(
        error.contains("is not the one that was submitted"),
        "{error}"
    );
    assert_eq!((jobs_left(&far.project), far.left()), (0, 0));
}
