//! `run_command`: any program as a stage.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::os::unix::fs::symlink;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::layout::Makes;
use super::sandbox::Sandbox;
use crate::engine::{Anything, Context, Inputs, Problem, RunEnv, SourcePath, Stage};
use crate::stages::artifacts::Folder;

/// The interval at which a running program is checked.
const TICK: Duration = Duration::from_millis(50);
/// How many lines of what a program prints are told at most, and how many of the last ones an error has.
const MOST_TOLD: usize = 1000;
const LAST: usize = 20;
/// The longest line, in bytes; the rest of a longer one is the next line.
const LONGEST_LINE: u64 = 4096;
/// The most of what a program prints that is kept in its log, in bytes.
const LONGEST_LOG: usize = 64 << 20;
/// How long a program may take to tell its version, and how much of that counts, in bytes.
const VERSION_TIME: Duration = Duration::from_secs(20);
const LONGEST_VERSION: u64 = 4096;
/// The log in the scratch folder.
const LOG: &str = "command.log";
/// Variables that every program gets: where programs are, the language, and the time zone.
const PASSED: [&str; 5] = ["PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ"];

/// Runs a program, whose result is cached like any other.
///
/// In the command, `{out}` is the folder to write the result to, `{scratch}` a folder for anything else, which is also where the program
/// starts, and `{input.NAME}` and `{file.NAME}` are where the inputs and files are. The same paths are in the variables `OUT`, `SCRATCH`,
/// `INPUT_NAME` and `FILE_NAME`. The program should make the same result from the same inputs.
///
/// It can write to these two folders only and has no network, where bubblewrap or the namespaces of the kernel (`unshare`) allow that; else
/// the stage warns. What it prints is in `pipeline log`.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("examples" = [{
    "command": ["python3", "{file.script}", "{input.rows}", "{out}"],
    "files": {"script": "scripts/filter.py"},
    "inputs": {"rows": "pairs"},
    "output": "dataset",
}]))]
pub struct RunCommand {
    /// The program and its arguments. There is no shell in between; for one write `[sh, -c, "..."]`.
    #[schemars(length(min = 1))]
    #[schemars(extend("examples" = [["python3", "{file.script}", "{out}"]]))]
    command: Vec<String>,
    /// What the command makes. The layout is checked.
    #[schemars(extend("examples" = ["dataset"]))]
    output: Makes,
    /// Stages whose results the command reads, by the names that it calls them. Of several stages the path is a folder with `0`, `1` and so
    /// on in it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("examples" = [{"rows": "pairs"}]))]
    inputs: BTreeMap<String, Inputs<Anything>>,
    /// Local files and folders that the command reads, by the names that it calls them. Their contents count.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("examples" = [{"script": "scripts/filter.py"}]))]
    files: BTreeMap<String, SourcePath>,
    /// Environment variables that the command gets. Their names count, their values don't, so they may hold secrets.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("examples" = [["WANDB_API_KEY"]]))]
    env: Vec<String>,
    /// Whether the command may use the network.
    #[serde(default)]
    network: bool,
    /// A command whose output counts, such as `[python3, --version]`: another version of the program makes the stage stale. It runs
    /// whenever the recipe is planned, without network and with nothing to write to, and only where programs can be isolated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = [["python3", "--version"]]))]
    version_of: Option<Vec<String>>,
}

impl Stage for RunCommand {
    const KIND: &'static str = "run_command";
    const VERSION: u32 = 1;
    type Output = Folder;
    const RUNS_PROGRAMS: bool = true;

    fn output(&self) -> &'static str {
        self.output.noun()
    }

    fn check(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        if self.command.is_empty() {
            let problem = Problem::new("command", "expected a program and its arguments");
            problems.push(problem.hint("as in `command: [python3, script.py]`"));
        }
        if self.version_of.as_ref().is_some_and(Vec::is_empty) {
            problems.push(Problem::new(
                "version_of",
                "expected a program and its arguments",
            ));
        }
        let plain = |name: &str| {
            !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        };
        let inputs = self.inputs.keys().map(|name| ("inputs", name));
        let files = self.files.keys().map(|name| ("files", name));
        for (parameter, name) in inputs.chain(files) {
            if !plain(name) {
                let problem = Problem::new(parameter, format!("`{name}` is not a valid name"));
                problems.push(problem.hint("a name consists of letters, digits and `_`"));
            }
        }
        for (name, inputs) in &self.inputs {
            if inputs.is_empty() {
                problems.push(Problem::new(format!("inputs.{name}"), "expected a stage"));
            }
        }
        for (index, argument) in self.command.iter().enumerate() {
            for (sort, known) in [
                ("input", self.inputs.keys().collect::<Vec<_>>()),
                ("file", self.files.keys().collect()),
            ] {
                let start = format!("{{{sort}.");
                for rest in argument.split(&start).skip(1) {
                    let name = rest.split('}').next().unwrap_or_default();
                    if !known.iter().any(|known| *known == name) {
                        let message = format!("`{start}{name}}}` names nothing in `{sort}s`");
                        problems.push(Problem::new(format!("command[{index}]"), message));
                    }
                }
            }
        }
        for (index, name) in self.env.iter().enumerate() {
            if !plain(name) {
                let message = format!("`{name}` is not the name of an environment variable");
                let problem = Problem::new(format!("env[{index}]"), message);
                problems.push(
                    problem.hint("the value comes from the environment that `pipeline` runs in"),
                );
            }
        }
        problems
    }

    fn external_facts(&self, env: &RunEnv) -> anyhow::Result<BTreeMap<String, String>> {
        let Some(command) = &self.version_of else {
            return Ok(BTreeMap::new());
        };
        let version = version(command, env)
            .with_context(|| format!("`version_of` failed: {}", command.join(" ")))?;
        Ok(BTreeMap::from([("version".to_owned(), version)]))
    }

    fn variables(&self) -> Vec<String> {
        self.env.clone()
    }

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        let scratch = cx.scratch()?.canonicalize()?;
        let out = cx.out().canonicalize()?;
        let paths = self.paths(cx, &out, &scratch)?;
        let arguments: Vec<OsString> = self
            .command
            .iter()
            .map(|argument| filled(argument, &paths))
            .collect();
        let words: Vec<&OsStr> = arguments.iter().map(OsString::as_os_str).collect();
        let sandbox = Sandbox::here(lookup(cx.env(), "PATH").as_deref());
        if sandbox == Sandbox::Nothing {
            cx.warn(
                "neither bubblewrap nor unshare works here: nothing keeps the command from writing elsewhere and from using the network",
            );
        }
        cx.note("isolation", sandbox.name());
        let temporary = scratch.join("tmp");
        fs::create_dir_all(&temporary)?;
        let network = self.network && !cx.env().offline;
        let mut command = sandbox.command(&words, &out, &scratch, network);
        command.env_clear();
        for name in PASSED
            .into_iter()
            .chain(self.env.iter().map(String::as_str))
        {
            if let Some(value) = lookup(cx.env(), name) {
                command.env(name, value);
            }
        }
        command.env("HOME", &scratch).env("TMPDIR", &temporary);
        for (name, path) in &paths {
            command.env(name.to_uppercase().replace('.', "_"), path);
        }
        command.stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.process_group(0);
        let program = &self.command[0];
        let child = command
            .spawn()
            .with_context(|| format!("could not start `{program}`"))?;
        let ended = listen(cx, child, &scratch.join(LOG))?;
        if !ended.status.success() {
            let how = match (ended.status.code(), ended.status.signal()) {
                (Some(code), _) => format!("with exit code {code}"),
                (None, Some(signal)) => format!("by signal {signal}"),
                (None, None) => "without telling how".to_owned(),
            };
            let last = if ended.last.is_empty() {
                "; it printed nothing".to_owned()
            } else {
                format!("; the last it printed:\n{}", ended.last.join("\n"))
            };
            bail!("`{program}` ended {how}{last}");
        }
        self.output.check(cx).with_context(|| {
            format!(
                "`{program}` wrote no {} that can be used",
                self.output.noun()
            )
        })
    }
}

impl RunCommand {
    /// What stands for what in the command.
    fn paths(
        &self,
        cx: &Context,
        out: &Path,
        scratch: &Path,
    ) -> anyhow::Result<BTreeMap<String, PathBuf>> {
        let mut paths = BTreeMap::from([
            ("out".to_owned(), out.to_owned()),
            ("scratch".to_owned(), scratch.to_owned()),
        ]);
        for (name, inputs) in &self.inputs {
            let path = match inputs.stages() {
                [one] if !inputs.is_list() => cx.input(one)?.canonicalize()?,
                several => {
                    let folder = scratch.join("inputs").join(name);
                    if folder.exists() {
                        fs::remove_dir_all(&folder)?;
                    }
                    fs::create_dir_all(&folder)?;
                    for (number, input) in several.iter().enumerate() {
                        let path = cx.input(input)?.canonicalize()?;
                        symlink(path, folder.join(number.to_string()))?;
                    }
                    folder
                }
            };
            paths.insert(format!("input.{name}"), path);
        }
        for (name, file) in &self.files {
            let path = cx.source(file)?;
            let found = path.canonicalize();
            let found = found.with_context(|| format!("could not read `{}`", file.as_written()))?;
            paths.insert(format!("file.{name}"), found);
        }
        Ok(paths)
    }
}

/// An argument with the paths that it names.
fn filled(argument: &str, paths: &BTreeMap<String, PathBuf>) -> OsString {
    let mut made = OsString::new();
    let mut rest = argument;
    while let Some(start) = rest.find('{') {
        let (before, from) = rest.split_at(start);
        made.push(before);
        let named = from
            .get(1..)
            .and_then(|inside| inside.split_once('}'))
            .and_then(|(name, after)| Some((paths.get(name)?, after)));
        if let Some((path, after)) = named {
            made.push(path);
            rest = after;
        } else {
            made.push("{");
            rest = from.get(1..).unwrap_or_default();
        }
    }
    made.push(rest);
    made
}

fn lookup(env: &RunEnv, name: &str) -> Option<String> {
    env.lookup.and_then(|lookup| lookup(name))
}

/// A program that is ended with all its processes when this is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(pid) = i32::try_from(self.0.id()) {
            // It may have ended by itself.
            let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// How a program ended, and what it printed last.
struct Ended {
    status: ExitStatus,
    last: Vec<String>,
}

/// Hands on what a program prints until it ends, and keeps it in a log.
fn listen(cx: &Context, child: Child, log: &Path) -> anyhow::Result<Ended> {
    let mut running = Running(child);
    let (Some(output), Some(errors)) = (running.0.stdout.take(), running.0.stderr.take()) else {
        bail!("the program has no pipes");
    };
    let mut log = fs::File::create(log).context("could not write the log of the program")?;
    let mut room = LONGEST_LOG;
    let (sender, lines) = sync_channel(1000);
    start_reading(output, sender.clone())?;
    start_reading(errors, sender)?;
    let (mut last, mut told) = (Vec::new(), 0);
    let mut hear = |line: String| -> anyhow::Result<()> {
        if let Some(left) = room.checked_sub(line.len() + 1) {
            room = left;
            writeln!(log, "{line}").context("could not write the log of the program")?;
        }
        if told < MOST_TOLD {
            cx.info(line.clone());
        } else if told == MOST_TOLD {
            cx.info("the program prints more, which is not told");
        }
        told += 1;
        if last.len() == LAST {
            last.remove(0);
        }
        last.push(line);
        Ok(())
    };
    let mut closed = false;
    let status = loop {
        cx.check_cancelled()?;
        if closed {
            std::thread::sleep(TICK);
        } else {
            match lines.recv_timeout(TICK) {
                Ok(line) => {
                    hear(line)?;
                    continue;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => closed = true,
            }
        }
        if let Some(status) = running.0.try_wait()? {
            break status;
        }
    };
    // What was printed just before the end. A process that was left behind may keep the pipes open.
    while let Ok(line) = lines.recv_timeout(TICK) {
        hear(line)?;
    }
    drop(running);
    Ok(Ended { status, last })
}

/// Reads lines of at most [`LONGEST_LINE`] bytes on a thread of its own.
fn start_reading(from: impl Read + Send + 'static, to: SyncSender<String>) -> anyhow::Result<()> {
    let read = move || {
        let mut from = BufReader::new(from);
        let mut line = Vec::new();
        loop {
            line.clear();
            match from
                .by_ref()
                .take(LONGEST_LINE)
                .read_until(b'\n', &mut line)
            {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
            let text = String::from_utf8_lossy(&line);
            if to.send(text.trim_end().to_owned()).is_err() {
                break;
            }
        }
    };
    std::thread::Builder::new()
        .spawn(read)
        .context("could not start a thread")?;
    Ok(())
}

/// What a program prints about its version.
fn version(command: &[String], env: &RunEnv) -> anyhow::Result<String> {
    let path = lookup(env, "PATH");
    let sandbox = Sandbox::here(path.as_deref());
    ensure!(
        sandbox != Sandbox::Nothing,
        "a program runs before the recipe does only where it can be isolated, and neither bubblewrap nor unshare works here; install \
         bubblewrap, or leave `version_of` out"
    );
    let folder = tempfile::tempdir().context("could not make a temporary folder")?;
    let words: Vec<&OsStr> = command.iter().map(OsStr::new).collect();
    let mut started = sandbox.command(&words, folder.path(), folder.path(), false);
    started.env_clear().env("HOME", folder.path());
    for name in PASSED {
        if let Some(value) = lookup(env, name) {
            started.env(name, value);
        }
    }
    let log = folder.path().join("version");
    let written = fs::File::create(&log)?;
    started.stdin(Stdio::null()).stdout(written.try_clone()?);
    started.stderr(written).process_group(0);
    let mut running = Running(started.spawn().context("could not start it")?);
    let since = Instant::now();
    let status = loop {
        env.check_cancelled()?;
        if let Some(status) = running.0.try_wait()? {
            break status;
        }
        ensure!(
            since.elapsed() < VERSION_TIME,
            "it took more than {} seconds",
            VERSION_TIME.as_secs()
        );
        std::thread::sleep(Duration::from_millis(2));
    };
    let mut printed = Vec::new();
    fs::File::open(&log)?
        .take(LONGEST_VERSION)
        .read_to_end(&mut printed)?;
    let printed = String::from_utf8_lossy(&printed).trim().to_owned();
    ensure!(status.success(), "it ended with {status}: {printed}");
    ensure!(!printed.is_empty(), "it printed nothing");
    Ok(printed)
}
