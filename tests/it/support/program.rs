//! The real program in a temporary project.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

/// A folder with recipes, in which the program runs.
pub(crate) struct Project {
    folder: TempDir,
    variables: BTreeMap<String, String>,
}

/// How a run of the program ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// The exit code; `None` after a signal.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Project {
    /// An empty project.
    pub(crate) fn empty() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join(".pipeline")).unwrap();
        let home = folder.path().join("home");
        fs::create_dir(&home).unwrap();
        let variables = BTreeMap::from([("HOME".to_owned(), home.display().to_string())]);
        Self { folder, variables }
    }

    /// A project with a copy of this repository's recipes.
    pub(crate) fn with_recipes() -> Self {
        let project = Self::empty();
        copy(&repository().join("recipes"), &project.path("recipes"));
        project
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// Sets an environment variable for the program.
    pub(crate) fn variable(&mut self, name: &str, value: &str) {
        self.variables.insert(name.to_owned(), value.to_owned());
    }

    /// The program with arguments, not started yet. It sees no environment but ours.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pipeline"));
        command
            .args(arguments)
            .current_dir(self.folder.path())
            .env_clear()
            .envs(&self.variables)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Ended {
        self.command(arguments).output().unwrap().into()
    }

    /// Runs the program with a text as its standard input.
    pub(crate) fn with_input(&self, arguments: &[&str], input: &str) -> Ended {
        let mut command = self.command(arguments);
        let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(input.as_bytes()).unwrap();
        drop(stdin);
        child.wait_with_output().unwrap().into()
    }

    /// Runs the program, which has to refuse and to say why.
    #[track_caller]
    pub(crate) fn refuses(&self, arguments: &[&str], why: &str) {
        let ended = self.run(arguments);
        assert!(
            matches!(ended.code, Some(1 | 2)),
            "{arguments:?}: {ended:?}"
        );
        let told = &ended.stderr;
        assert!(told.contains(why), "{arguments:?}: {told}");
        assert!(!told.contains("panicked"), "{arguments:?}: {told}");
    }

    /// Runs the program, which has to succeed; gives its standard output.
    #[track_caller]
    pub(crate) fn succeeds(&self, arguments: &[&str]) -> String {
        let ended = self.run(arguments);
        assert_eq!(ended.code, Some(0), "{arguments:?}: {}", ended.stderr);
        ended.stdout
    }

    /// Runs the program with `--json`, which has to succeed, and gives the stages that ran, in the order of their names.
    #[track_caller]
    pub(crate) fn ran(&self, arguments: &[&str]) -> Vec<String> {
        let events = events(&self.succeeds(&[&["run", "--json"], arguments].concat()));
        let mut ran: Vec<String> = stages(&events, "stage_done").into_keys().collect();
        ran.sort_unstable();
        ran
    }

    /// The content digest of each stage, of a run in which all are fresh.
    #[track_caller]
    pub(crate) fn artifacts(&self, arguments: &[&str]) -> BTreeMap<String, String> {
        let events = events(&self.succeeds(&[&["run", "--json"], arguments].concat()));
        let fresh = stages(&events, "stage_fresh");
        fresh
            .into_iter()
            .map(|(name, event)| (name, event["artifact"].as_str().unwrap().to_owned()))
            .collect()
    }

    /// The records in the store.
    pub(crate) fn records(&self) -> Vec<Value> {
        let folder = self.path(".pipeline/v1/records");
        let mut records: Vec<PathBuf> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        records.sort_unstable();
        records
            .iter()
            .map(|path| serde_json::from_slice(&fs::read(path).unwrap()).unwrap())
            .collect()
    }
}

impl From<Output> for Ended {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

/// The folder of this repository.
pub(crate) fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Whether generated files are to be written anew.
#[expect(clippy::disallowed_methods, reason = "a switch of the tests")]
pub(crate) fn update_wanted() -> bool {
    std::env::var("UPDATE_GENERATED").is_ok()
}

/// The events of a run with `--json`.
pub(crate) fn events(stdout: &str) -> Vec<Value> {
    stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// The events of one sort, by stage.
pub(crate) fn stages(events: &[Value], sort: &str) -> BTreeMap<String, Value> {
    let wanted = events.iter().filter(|event| event["event"] == sort);
    wanted
        .map(|event| (event["stage"].as_str().unwrap().to_owned(), event.clone()))
        .collect()
}

/// Copies a folder with all in it.
pub(crate) fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}
