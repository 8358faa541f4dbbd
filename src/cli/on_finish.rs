//! `on_finish:` of a project's settings: a program that gets the summary of a run as JSON on its standard input.
//!
//! The settings come with a project, perhaps from somebody else. So the program runs only where the person at the machine allowed this
//! very command for this project (`pipeline trust`).

use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::project::Project;
use super::remote::{SETTINGS, read_settings};
use super::{Failure, eprint_warning, error, trust};
use crate::engine::{RunLabel, Span, Summary};

/// The version of the summary.
const VERSION: u32 = 1;
const TICK: Duration = Duration::from_millis(10);

/// What the settings say.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    command: Vec<String>,
    /// The longest time that it may take.
    #[serde(default = "minute")]
    timeout: Span,
    /// Whether a run fails with it.
    #[serde(default)]
    required: bool,
}

fn minute() -> Span {
    Span(Duration::from_mins(1))
}

/// The program of a project, which may run.
pub(super) struct OnFinish {
    root: PathBuf,
    written: Written,
}

/// How a run went.
pub(super) struct Finished<'r> {
    pub(super) project: &'r Project,
    /// None if it was interrupted before there was one.
    pub(super) summary: Result<Option<&'r Summary>, &'r anyhow::Error>,
    pub(super) label: &'r RunLabel,
    pub(super) seconds: f64,
}

impl OnFinish {
    /// The program of the project in `root`, if it has one and that may run. That it may not is a warning, or an error if it is required.
    pub(super) fn open(root: &Path) -> Result<Option<Self>, Failure> {
        let Some(written) = read(root)? else {
            return Ok(None);
        };
        if trust::is_command_trusted(root, &written.command)? {
            let root = root.to_owned();
            return Ok(Some(Self { root, written }));
        }
        let message = format!(
            "`on_finish` of `{SETTINGS}` in `{}` runs `{}`, which is not allowed on this machine",
            root.display(),
            written.command.join(" ")
        );
        let hint =
            "`pipeline trust` in that folder allows it, after you have looked at what it does";
        if written.required {
            return Err(Failure::Usage(error::with_hint(&message, hint)));
        }
        eprint_warning(&format!("{message}; {hint}"));
        Ok(None)
    }

    /// Runs it. What goes wrong is a warning, or an error if it is required.
    pub(super) fn run(&self, finished: &Finished<'_>) -> Result<(), Failure> {
        let Err(error) = self.start(&summary(finished)) else {
            return Ok(());
        };
        let error = error.context(format!(
            "`on_finish` failed: `{}`",
            self.written.command.join(" ")
        ));
        if self.written.required {
            return Err(error.into());
        }
        eprint_warning(&format!("{error:#}"));
        Ok(())
    }

    fn start(&self, summary: &Value) -> anyhow::Result<()> {
        let [program, arguments @ ..] = &self.written.command[..] else {
            bail!("it names no program");
        };
        // Standard output may be events as JSON.
        let errors = || -> anyhow::Result<Stdio> {
            Ok(std::io::stderr().as_fd().try_clone_to_owned()?.into())
        };
        let program = if program.contains('/') {
            self.root.join(program)
        } else {
            PathBuf::from(program)
        };
        let mut child = Command::new(program)
            .args(arguments)
            .current_dir(&self.root)
            .stdin(Stdio::piped())
            .stdout(errors()?)
            .stderr(errors()?)
            .process_group(0)
            .spawn()
            .context("it could not be started")?;
        let text = serde_json::to_vec(summary)?;
        if let Some(mut input) = child.stdin.take() {
            // A program that does not read it must not stop this one, and may have ended.
            std::thread::Builder::new()
                .spawn(move || input.write_all(&text))
                .context("could not start a thread")?;
        }
        let since = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if since.elapsed() > self.written.timeout.0 {
                if let Ok(pid) = i32::try_from(child.id()) {
                    // It may have ended by itself.
                    let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
                }
                let _ = child.wait();
                bail!("it took more than {}", self.written.timeout);
            }
            std::thread::sleep(TICK);
        };
        match (status.code(), status.signal()) {
            (Some(0), _) => Ok(()),
            (Some(code), _) => Err(anyhow!("it ended with exit code {code}")),
            (None, signal) => Err(anyhow!("it ended by signal {}", signal.unwrap_or_default())),
        }
    }
}

/// The program that the settings of a project name.
pub(super) fn command(root: &Path) -> Result<Option<Vec<String>>, Failure> {
    Ok(read(root)?.map(|written| written.command))
}

fn read(root: &Path) -> Result<Option<Written>, Failure> {
    let Some(value) = read_settings(root)?.and_then(|settings| settings.on_finish) else {
        return Ok(None);
    };
    let value = match value {
        command @ Value::Array(_) => json!({ "command": command }),
        other => other,
    };
    let wrong = |why: String| {
        let message = format!("`{}`: `on_finish`: {why}", root.join(SETTINGS).display());
        let hint = "a program and its arguments: `on_finish: [./notify.sh]`, or a map with `command`, `timeout` and `required`";
        Failure::Usage(error::with_hint(&message, hint))
    };
    let written: Written =
        serde_json::from_value(value).map_err(|error| wrong(error.to_string()))?;
    if written.command.first().is_none_or(String::is_empty) {
        return Err(wrong("it names no program".to_owned()));
    }
    Ok(Some(written))
}

/// What the program gets to know.
fn summary(finished: &Finished<'_>) -> Value {
    let Finished {
        project,
        summary,
        label,
        seconds,
    } = finished;
    let recipe = &project.recipe;
    let mut told = json!({
        "version": VERSION,
        "recipe": recipe.path.display().to_string(),
        "description": recipe.description,
        "name": label.name,
        "tags": label.tags,
        "seconds": seconds,
        "outputs": recipe.outputs.iter().map(|output| json!({ "stage": output.stage, "path": output.path })).collect::<Vec<_>>(),
    });
    let outcome = match summary {
        Ok(None) => "interrupted",
        Ok(Some(summary)) if summary.interrupted => "interrupted",
        Ok(Some(summary)) if summary.failed > 0 => "failed",
        Ok(Some(_)) => "done",
        Err(_) => "failed",
    };
    let mut add = |name: &str, value: Value| {
        if let Some(map) = told.as_object_mut() {
            map.insert(name.to_owned(), value);
        }
    };
    add("outcome", outcome.into());
    if let Err(error) = summary {
        add("error", format!("{error:#}").into());
    }
    let Ok(Some(summary)) = summary else {
        return told;
    };
    add("run", summary.run.into());
    add("fresh", summary.fresh.into());
    add("ran", summary.ran.into());
    add("failed", summary.failed.into());
    add("skipped", summary.skipped.into());
    add("saved_seconds", summary.saved.into());
    let stages = recipe.stages.iter().zip(&summary.artifacts).enumerate();
    let stages = stages.map(|(index, (stage, artifact))| {
        let mut told =
            json!({ "stage": stage.name, "kind": stage.kind.name, "artifact": artifact });
        if let (Some(reasons), Some(map)) = (summary.frozen.get(&index), told.as_object_mut()) {
            map.insert("frozen".to_owned(), json!(reasons));
        }
        told
    });
    add("stages", stages.collect());
    add("scores", scores(project, summary));
    told
}

/// The numbers of the evaluations in a run, by stage.
fn scores(project: &Project, summary: &Summary) -> Value {
    let runs = project.runs();
    let run = runs.iter().find(|run| Some(run.number) == summary.run);
    let mut scores = Map::new();
    for (name, stage) in run.into_iter().flat_map(|run| &run.stages) {
        let Some(record) = project.store.record(&stage.fingerprint) else {
            continue;
        };
        if record.output == "scores" {
            let numbers = record
                .notes
                .into_iter()
                .filter(|(_, value)| value.is_number());
            scores.insert(name.clone(), Value::Object(numbers.collect()));
        }
    }
    scores.into()
}
