//! A stage that needs more memory than there is: the system kills its process, and that is an ordinary failure of the stage.
//!
//! The shortage is real: the runner and its stages are in a control group with a limit, and the kernel chooses what it kills. Where no
//! group can be made, which takes a privilege, the test says so on standard error; `executors` sends the same signal from outside.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::heard::ended;
use crate::support::program::{Ended, Project, events, stages};

/// The memory of the group in bytes: half of what the evaluation needs for the weights of its model, and twice what the other stages need. An
/// evaluation has no estimate that would refuse it before.
const LIMIT: u64 = 100 << 20;
const RECIPE: &str = "\
version: 1
stages:
  rows: { import_dataset: { path: rows.jsonl } }
  blank:
    create_model: { dataset: rows, vocab_size: 512, hidden_size: 1024, intermediate_size: 3072, num_hidden_layers: 4, num_attention_heads: 4 }
  chats: { apply_chat_template: { dataset: rows, tokenizer: blank } }
  tokens: { tokenize: { dataset: chats, tokenizer: blank } }
  scores: { evaluate: { model: blank, dataset: tokens, num_answers: 0 } }
  other: { attach_lora: { model: blank, r: 4 } }
outputs: { scores: out/scores, other: out/other }
";

/// A control group with [`LIMIT`], removed when this is dropped.
struct Group {
    folder: PathBuf,
    /// The file that counts what the kernel killed.
    kills: &'static str,
}

impl Group {
    /// A new group, if the machine has the memory controller and this process may use it.
    fn new() -> Option<Self> {
        let name = format!("pipeline-test-{}", std::process::id());
        // Version 1 has a mount of its own for memory; version 2 has one for all controllers.
        [
            (
                "/sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.oom_control",
            ),
            ("/sys/fs/cgroup", "memory.max", "memory.events"),
        ]
        .into_iter()
        .find_map(|(mount, limit, kills)| {
            let folder = Path::new(mount).join(&name);
            // On version 2 this is a folder without files where the controller is not enabled, on version 1 just a folder.
            fs::create_dir(&folder).ok()?;
            let group = Self { folder, kills };
            let file = group.folder.join(limit);
            (file.exists() && fs::write(file, LIMIT.to_string()).is_ok()).then_some(group)
        })
    }

    /// Runs the program in the group.
    fn run(&self, project: &Project, arguments: &[&str]) -> Ended {
        let program = project.command(arguments);
        let mut command = Command::new("sh");
        command
            .args(["-c", "echo $$ > \"$0\" && exec \"$@\""])
            .arg(self.folder.join("cgroup.procs"))
            .arg(program.get_program())
            .args(program.get_args())
            .current_dir(project.path(""))
            .env_clear();
        for (name, value) in program.get_envs() {
            command.env(name, value.unwrap_or_default());
        }
        let (out, errors) = (project.path("told"), project.path("errors"));
        command.stdout(fs::File::create(&out).unwrap());
        command.stderr(fs::File::create(&errors).unwrap());
        let status = ended(&mut command.spawn().unwrap());
        Ended {
            code: status.code(),
            stdout: fs::read_to_string(out).unwrap(),
            stderr: fs::read_to_string(errors).unwrap(),
        }
    }

    /// How many processes of the group the kernel has killed.
    fn kills(&self) -> u64 {
        let text = fs::read_to_string(self.folder.join(self.kills)).unwrap();
        let counts = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        counts.unwrap().trim().parse().unwrap()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // A process that was killed may still be leaving.
        for _ in 0..100 {
            if fs::remove_dir(&self.folder).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

/// A project of which everything but the last two stages is made.
fn prepared() -> Project {
    let project = Project::empty();
    project.write("r.yaml", RECIPE);
    let rows = (0..20)
        .map(|n| format!("{{\"prompt\": \"question {n}\", \"completion\": \"answer {n}\"}}\n"));
    project.write("rows.jsonl", &rows.collect::<String>());
    project.succeeds(&["run", "r.yaml", "blank", "tokens"]);
    project
}

#[test]
fn a_stage_that_the_system_kills_for_want_of_memory_fails_alone() {
    if Group::new().is_none() {
        let note = "no control group can be made here, so nothing is killed for want of memory\n";
        // Past the capture of the test runner, so that a log of a passed run shows it.
        let _ = std::io::stderr().write_all(note.as_bytes());
        return;
    }
    // The kernel sometimes ends a second process, which is then the runner, before the memory of the first one is back.
    let (project, group, ended) = (0..5)
        .find_map(|_| {
            let group = Group::new()?;
            let project = prepared();
            let ended = group.run(&project, &["run", "r.yaml", "--keep-going", "--json"]);
            (ended.code.is_some() || group.kills() == 1).then_some((project, group, ended))
        })
        .expect("the runner is killed each time");
    let seen = events(&ended.stdout);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    let failed = stages(&seen, "stage_failed");
    let names: Vec<&String> = failed.keys().collect();
    assert_eq!(names, ["scores"], "{}", ended.stderr);
    let error = failed["scores"]["error"].as_str().unwrap();
    let told = "the system ran out of memory and killed its process (SIGKILL); hint: ";
    assert!(error.contains(told), "{error}");
    assert_eq!(group.kills(), 1);
    // The runner lived on, and so did the other stage.
    let done = stages(&seen, "stage_done");
    assert!(done.contains_key("other"), "{:?}", done.keys());
    // With memory again the same command does the rest.
    assert_eq!(project.ran(&["r.yaml"]), ["scores"]);
}
