//! `resources: { processes: n }`: what can't be shared is told with its place; and, in a build with the feature `mpi` where an MPI is installed,
//! trainings by several processes, what ends them, and how they go on.

use crate::support::program::Project;

/// The quickstart with so many processes for its last training.
fn with_processes(project: &Project, stage: &str, processes: &str) {
    let recipe = project.read("recipes/quickstart.yaml");
    let own = format!("  {stage}:\n");
    assert!(recipe.contains(&own));
    let beside = format!("{own}    resources: {{ processes: {processes} }}\n");
    project.write("recipes/quickstart.yaml", &recipe.replace(&own, &beside));
}

#[test]
fn what_can_not_be_shared_is_told_with_its_place() {
    let refused = |stage: &str, processes: &str, why: &str| {
        let project = Project::with_recipes();
        with_processes(&project, stage, processes);
        let ended = project.run(&["validate", "recipes/quickstart.yaml"]);
        assert_eq!(ended.code, Some(2), "{}", ended.stderr);
        // As it is wrapped at the width of a terminal.
        let told: Vec<&str> = ended.stderr.split_whitespace().collect();
        let told = told.join(" ");
        assert!(told.contains(why), "{told}");
        assert!(
            told.contains("quickstart.yaml:") && told.contains(&format!("processes: {processes}")),
            "{told}"
        );
        told
    };
    refused(
        "adapter",
        "2",
        "`attach_lora` runs in one process: `processes` is for trainings",
    );
    let told = refused(
        "tuned",
        "4",
        "4 processes can't share `gradient_accumulation_steps: 2` evenly",
    );
    assert!(
        told.contains("`gradient_accumulation_steps: 4` and `per_device_train_batch_size: 2`"),
        "{told}"
    );
    refused(
        "tuned",
        "3",
        "a step has 8 rows, which 3 processes can't share evenly",
    );
    refused("tuned", "0", "0");
    let project = Project::with_recipes();
    with_processes(&project, "tuned", "1");
    project.succeeds(&["validate", "recipes/quickstart.yaml"]);
    if !cfg!(feature = "mpi") {
        let told = refused("tuned", "2", "this build of pipeline has no MPI");
        assert!(told.contains("--features mpi"), "{told}");
    }
}

#[cfg(feature = "mpi")]
mod mpi {
    use std::collections::BTreeMap;
    use std::fs;
    use std::io::{BufRead as _, BufReader};
    use std::process::Child;
    use std::time::{Duration, Instant};

    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;
    use serde_json::{Value, json};

    use crate::support::program::{Project, events, stages};

    const PROCESSES: &str = "stages.tuned.resources={ processes: 2, cpus: 2 }";

    /// Several processes compute on processors, whatever else does not.
    #[test]
    fn a_gpu_is_refused_to_several_processes_by_name() {
        let project = Project::with_recipes();
        let run = ["run", "recipes/quickstart.yaml", "--set", PROCESSES];
        let why = "`--device gpu` can't be had for `tuned`: its 2 processes compute on processors";
        project.refuses(&[&run[..], &["--device", "gpu"]].concat(), why);
        let beside = ["--set", "stages.tuned.device=gpu"];
        let why = "several processes compute on processors";
        project.refuses(&[&run[..], &beside].concat(), why);
    }

    /// The quickstart up to its last training, which saves at each step; `more` is what else is set.
    fn arguments<'a>(more: &[&'a str]) -> Vec<&'a str> {
        let mut all = vec!["recipes/quickstart.yaml", "tuned"];
        let own = [
            "stages.base.train_sft.max_steps=2",
            "stages.tuned.train_orpo.save_steps=1",
            "stages.tuned.train_orpo.logging_steps=1",
        ];
        for set in own.iter().chain(more) {
            all.extend(["--set", set]);
        }
        all
    }

    /// A project whose MPI listens on the loopback address alone; `None` where there is no `mpirun` and none is asked for.
    #[expect(clippy::disallowed_methods, reason = "a switch of the tests alone")]
    fn project() -> Option<Project> {
        let mut project = Project::with_recipes();
        let path = std::env::var("PATH").unwrap();
        let found = std::env::split_paths(&path).any(|folder| folder.join("mpirun").is_file());
        if !found {
            let needed = std::env::var_os("PIPELINE_NEEDS_MPI").is_some_and(|value| value == "1");
            assert!(!needed, "there is no `mpirun`");
            println!("not run: there is no `mpirun`");
            return None;
        }
        project.variable("PATH", &path);
        for (name, value) in [
            ("OMPI_MCA_oob_tcp_if_include", "lo"),
            ("OMPI_MCA_btl_tcp_if_include", "lo"),
            // Tests may run as root in a container.
            ("OMPI_ALLOW_RUN_AS_ROOT", "1"),
            ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"),
        ] {
            project.variable(name, value);
        }
        Some(project)
    }

    /// The metrics of the last training, by step.
    fn metrics(project: &Project, arguments: &[&str]) -> Vec<BTreeMap<String, f64>> {
        let artifact = &project.artifacts(arguments)["tuned"];
        let path = format!(".pipeline/v1/artifacts/{artifact}/metrics.jsonl");
        let text = project.read(&path);
        let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
        lines.collect()
    }

    /// The processes below one, at any depth, and the command of each.
    fn below(parent: i32) -> Vec<(Pid, String)> {
        let entries = fs::read_dir("/proc").unwrap().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let mut parents: BTreeMap<i32, i32> = BTreeMap::new();
        for pid in pids {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let fields = stat.rsplit_once(") ").map(|(_, rest)| rest.split(' '));
            let parent = fields.and_then(|mut fields| fields.nth(1)?.parse().ok());
            parents.extend(parent.map(|parent| (pid, parent)));
        }
        let is_below = |mut pid: i32| {
            while let Some(above) = parents.get(&pid) {
                if *above == parent {
                    return true;
                }
                pid = *above;
            }
            false
        };
        let own = parents.keys().copied().filter(|pid| is_below(*pid));
        own.map(|pid| {
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            (Pid::from_raw(pid), command)
        })
        .collect()
    }

    /// The processes of a training below the runner, without the one that started them.
    fn members(runner: &Child) -> Vec<Pid> {
        let all = below(runner.id() as i32).into_iter();
        let members = all.filter(|(_, command)| {
            command.contains("work --member") && !command.starts_with("mpirun")
        });
        members.map(|(pid, _)| pid).collect()
    }

    /// Starts a run and does something when the training has finished so many steps; gives its events and its exit code.
    fn at_step(
        project: &Project,
        arguments: &[&str],
        step: u64,
        act: impl FnOnce(&Child),
    ) -> (Vec<Value>, Option<i32>) {
        let mut child = project
            .command(&[&["run", "--json"], arguments].concat())
            .spawn()
            .unwrap();
        let mut seen = Vec::new();
        let mut act = Some(act);
        for line in BufReader::new(child.stdout.take().unwrap()).lines() {
            let event: Value = serde_json::from_str(&line.unwrap()).unwrap();
            let is_there = event["event"] == "metrics"
                && event["stage"] == "tuned"
                && event["step"].as_u64() >= Some(step);
            seen.push(event);
            if let Some(act) = act.take_if(|_| is_there) {
                act(&child);
            }
        }
        assert!(act.is_none(), "the step did not come: {:?}", seen.last());
        (seen, child.wait().unwrap().code())
    }

    #[test]
    fn two_processes_train_as_one_does_and_the_result_counts_as_the_same() {
        let Some(two) = project() else { return };
        let steps = "stages.tuned.train_orpo.max_steps=4";
        let plain = arguments(&[steps]);
        let shared = arguments(&[steps, PROCESSES]);
        let ran = events(&two.succeeds(&[&["run", "--json"], &shared[..]].concat()));
        assert!(stages(&ran, "stage_done").contains_key("tuned"));
        let messages = ran.iter().filter(|event| event["event"] == "message");
        let told: Vec<&str> = messages
            .filter_map(|event| event["text"].as_str())
            .collect();
        assert!(
            !told.iter().any(|text| text.contains("process 2 of 2")),
            "{told:?}"
        );
        let again = project().unwrap();
        again.succeeds(&[&["run"], &shared[..]].concat());
        assert_eq!(
            two.artifacts(&shared),
            again.artifacts(&shared),
            "to the bit"
        );

        let one = Project::with_recipes();
        one.succeeds(&[&["run"], &plain[..]].concat());
        let (ours, theirs) = (metrics(&two, &shared), metrics(&one, &plain));
        assert_eq!((ours.len(), theirs.len()), (4, 4));
        for (ours, theirs) in ours.iter().zip(&theirs) {
            assert!(ours.keys().eq(theirs.keys()));
            for (name, theirs) in theirs {
                let far = (ours[name] - theirs).abs();
                assert!(
                    far <= 1e-5 * theirs.abs() + 2e-6,
                    "{name}: {ours:?} {theirs}"
                );
            }
        }
        // How many processes made it is no part of what it is.
        assert_eq!(two.ran(&plain), Vec::<String>::new());
        let record = two
            .records()
            .into_iter()
            .find(|record| record["stage"] == "tuned");
        let of_one = one
            .records()
            .into_iter()
            .find(|record| record["stage"] == "tuned");
        let tokens = |record: Option<Value>| record.unwrap()["notes"]["tokens"].clone();
        assert_eq!(tokens(record), tokens(of_one));
    }

    #[test]
    fn a_process_that_dies_ends_all_and_the_same_command_goes_on_to_the_same_bytes() {
        let Some(whole) = project() else { return };
        let few = arguments(&["stages.tuned.train_orpo.max_steps=40", PROCESSES]);
        whole.succeeds(&[&["run"], &few[..]].concat());
        let expected = whole.artifacts(&few);

        let project = project().unwrap();
        // Killed, first one process and then the other one; then interrupted.
        for rank in 0..2 {
            let mut gone = Vec::new();
            let (seen, code) = at_step(&project, &few, 2 + rank, |runner| {
                gone = members(runner);
                assert_eq!(gone.len(), 2);
                kill(gone[rank as usize], Signal::SIGKILL).unwrap();
            });
            assert_eq!(code, Some(1), "{:?}", seen.last());
            let failed = stages(&seen, "stage_failed");
            let error = failed["tuned"]["error"].as_str().unwrap();
            assert!(
                error.contains("one of its 2 processes ended without a result")
                    && error.contains("signal 9 (Killed)"),
                "{error}"
            );
            wait_until_gone(&gone);
        }
        let mut gone = Vec::new();
        let (seen, code) = at_step(&project, &few, 4, |runner| {
            gone = members(runner);
            kill(Pid::from_raw(runner.id() as i32), Signal::SIGINT).unwrap();
        });
        assert_eq!(code, Some(130), "{:?}", seen.last());
        wait_until_gone(&gone);
        let ran = events(&project.succeeds(&[&["run", "--json"], &few[..]].concat()));
        let messages = ran.iter().filter_map(|event| event["text"].as_str());
        assert!(
            messages
                .clone()
                .any(|text| text.contains("from a checkpoint")),
            "{:?}",
            messages.collect::<Vec<_>>()
        );
        assert_eq!(project.artifacts(&few), expected);
    }

    #[test]
    fn processes_end_with_the_runner() {
        let Some(project) = project() else { return };
        let mut gone = Vec::new();
        let long = arguments(&["stages.tuned.train_orpo.max_steps=1000000", PROCESSES]);
        let mut child = project
            .command(&[&["run", "--json"], &long[..]].concat())
            .spawn()
            .unwrap();
        for line in BufReader::new(child.stdout.take().unwrap()).lines() {
            let event: Value = serde_json::from_str(&line.unwrap()).unwrap();
            if event["event"] == "metrics" && event["stage"] == "tuned" {
                gone = members(&child);
                child.kill().unwrap();
                break;
            }
        }
        child.wait().unwrap();
        assert_eq!(gone.len(), 2);
        wait_until_gone(&gone);
    }

    /// Waits for processes to end.
    fn wait_until_gone(pids: &[Pid]) {
        let until = Instant::now() + Duration::from_mins(1);
        let is_there = |pid: &Pid| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            // A zombie has ended.
            stat.rsplit_once(") ")
                .is_some_and(|(_, rest)| !rest.starts_with('Z'))
        };
        while pids.iter().any(is_there) {
            assert!(Instant::now() < until, "a process goes on: {pids:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    #[test]
    fn what_fails_all_processes_is_told_once_as_by_one() {
        let Some(project) = project() else { return };
        let huge = [
            "stages.tuned.train_orpo.learning_rate=1e30",
            "stages.tuned.train_orpo.lr_scheduler_type=constant",
            "stages.tuned.train_orpo.warmup_ratio=0",
        ];
        let shared = [&huge[..], &[PROCESSES]].concat();
        let error = |sets: &[&str]| {
            let ended = project.run(&[&["run", "--json"], &arguments(sets)[..]].concat());
            assert_eq!(ended.code, Some(1), "{}", ended.stderr);
            let failed = stages(&events(&ended.stdout), "stage_failed");
            failed["tuned"]["error"].as_str().unwrap().to_owned()
        };
        let of_two = error(&shared);
        assert!(of_two.contains("learning_rate"), "{of_two}");
        assert_eq!(of_two, error(&huge));
    }

    #[test]
    fn a_task_in_a_file_starts_its_processes_itself() {
        let Some(project) = project() else { return };
        let sets = arguments(&["stages.tuned.train_orpo.max_steps=2"]);
        project.succeeds(&[&["run"], &sets[..]].concat());
        let records = project.records();
        let folder = |stage: &str| {
            let record = records.iter().find(|record| record["stage"] == stage);
            let artifact = record.unwrap()["artifact"].as_str().unwrap();
            let path = project.path(&format!(".pipeline/v1/artifacts/{artifact}"));
            json!({ "Unix": path.to_str().unwrap().as_bytes() })
        };
        let os = |name: &str| json!({ "Unix": project.path(name).to_str().unwrap().as_bytes() });
        fs::create_dir(project.path("out")).unwrap();
        let mut task = json!({
            "version": 1,
            "pipeline": "0.1.0",
            "stage": "tuned",
            "kind": "train_orpo",
            "params": {
                "model": "base4",
                "adapter": "adapter",
                "dataset": "tokens",
                "max_steps": 2,
                "gradient_accumulation_steps": 2,
                "logging_steps": 1,
            },
            "exclusive": true,
            "offline": true,
            "cpus": 2,
            "processes": 2,
            "memory": null,
            "gpus": [],
            "inputs": { "adapter": folder("adapter"), "base4": folder("base4"), "tokens": folder("tokens") },
            "sources": {},
            "outside": {},
            "out": os("out"),
            "scratch": os("scratch"),
            "scratch_note": [],
            "continuations": null,
            "known": [],
            "warned": [],
        });
        project.write("task.json", &task.to_string());
        let ended = project.run(&["work", "task.json"]);
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        let told = events(&ended.stdout);
        assert_eq!(told.first().unwrap()["event"], "work_started");
        assert_eq!(told.last().unwrap()["event"], "work_done");
        assert!(project.path("out/adapter_model.safetensors").is_file());
        // What goes wrong is told, and the exit code says so.
        task["params"]["adapter"] = "tokens".into();
        project.write("task.json", &task.to_string());
        let ended = project.run(&["work", "task.json"]);
        assert_ne!(ended.code, Some(0), "{}", ended.stdout);
        assert!(ended.stdout.contains("work_failed"), "{}", ended.stdout);
    }
}
