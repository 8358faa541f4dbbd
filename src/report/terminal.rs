//! Events for people: a line for what happened, and a moving bar for what is happening.

use std::collections::BTreeMap;
use std::io::Write;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::Reporter;
use super::text::{bytes, duration, harmless, has_the_store, metrics};
use crate::engine::{Event, Level, short};

/// Without bars, a line of progress at most this often a stage.
const QUIET: Duration = Duration::from_secs(10);

/// Where stages stand in their recipe, by name.
pub type Spans = BTreeMap<String, String>;

/// Shows events to people.
pub struct Terminal<W: Write> {
    spans: Spans,
    bars: Option<MultiProgress>,
    running: BTreeMap<String, Running>,
    /// What is still to be written.
    lines: String,
    out: W,
}

impl<W: Write> Terminal<W> {
    /// Writes lines to `out`.
    pub fn lines(spans: Spans, out: W) -> Self {
        Self {
            spans,
            bars: None,
            running: BTreeMap::new(),
            lines: String::new(),
            out,
        }
    }

    /// Writes lines to `out`, which is the terminal that standard error shows, and below them bars that move.
    pub fn bars(spans: Spans, out: W) -> Self {
        let bars = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
        Self {
            bars: Some(bars),
            ..Self::lines(spans, out)
        }
    }
}

struct Running {
    bar: Option<ProgressBar>,
    started: Instant,
    told: Instant,
    unit: String,
}

impl<W: Write> Reporter for Terminal<W> {
    fn event(&mut self, event: &Event) {
        match event {
            Event::RunStarted { .. }
            | Event::StageSkipped { .. }
            | Event::WorkStarted { .. }
            | Event::WorkDone { .. }
            | Event::WorkFailed { .. } => {}
            Event::StageFresh {
                stage,
                artifact,
                restored,
                remote,
                ..
            } => {
                self.finish(stage);
                let state = if *restored { "restored" } else { "fresh" };
                let from = if *remote { " (from the remote)" } else { "" };
                self.line(&format!(
                    "{state:>9}  {stage}  {}{from}",
                    short(Some(artifact))
                ));
            }
            Event::StageFetching { stage } => self.begin(stage),
            Event::StageFetched {
                stage,
                files,
                bytes: size,
                ..
            } => {
                self.finish(stage);
                self.line(&format!(
                    "{:>9}  {stage}: {files} files, {}",
                    "fetched",
                    bytes(*size)
                ));
            }
            Event::StageSent {
                stage,
                files,
                bytes: size,
                ..
            } => {
                self.line(&format!(
                    "{:>9}  {stage}: {files} files, {}",
                    "sent",
                    bytes(*size)
                ));
            }
            Event::Warning { text } => self.line(&format!("{:>9}  {text}", "warning")),
            Event::StageStarted {
                stage,
                kind,
                reasons,
            } => {
                let reasons: Vec<_> = reasons.iter().map(ToString::to_string).collect();
                self.line(&format!(
                    "{:>9}  {stage} ({kind}): {}",
                    "runs",
                    reasons.join("; ")
                ));
                self.begin(stage);
            }
            Event::RunWaiting { holder } => {
                self.line(&format!("{:>9}  {}", "waits", has_the_store(holder)));
            }
            Event::StageWaiting { stage, holder } => {
                self.line(&format!(
                    "{:>9}  {stage}: {holder} is making the same result",
                    "waits"
                ));
            }
            Event::Progress {
                stage,
                done,
                total,
                unit,
            } => self.progress(stage, *done, *total, unit),
            Event::Metrics {
                stage,
                step,
                values,
            } => {
                self.line(&format!(
                    "{:>9}  {stage} step {step}: {}",
                    "",
                    metrics(values)
                ));
            }
            Event::Message { stage, level, text } => {
                let level = if *level == Level::Warning {
                    "warning"
                } else {
                    ""
                };
                self.line(&format!("{level:>9}  {stage}: {text}"));
            }
            Event::StageDone {
                stage,
                artifact,
                same_bytes,
                seconds,
            } => {
                self.finish(stage);
                let same = if *same_bytes {
                    ", same bytes as before"
                } else {
                    ""
                };
                self.line(&format!(
                    "{:>9}  {stage}  {} in {}{same}",
                    "done",
                    short(Some(artifact)),
                    duration(*seconds)
                ));
            }
            Event::StageRetried {
                stage,
                error,
                pause,
                ..
            } => {
                self.line(&format!(
                    "{:>9}  {stage}: {error}; another try in {}",
                    "failed",
                    duration(*pause)
                ));
            }
            Event::StageFailed { stage, error, kept } => {
                self.finish(stage);
                self.line(&format!("{:>9}  {stage}: {error}", "failed"));
                if let Some(span) = self.spans.get(stage) {
                    let line = format!("{:>9}  it is defined at {span}", "");
                    self.line(&line);
                }
                if let Some(kept) = kept {
                    self.line(&format!("{:>9}  its log and output are in {kept}", ""));
                }
            }
            Event::OutputPlaced {
                stage,
                path,
                changed,
                links,
            } => {
                let same = if *changed { "" } else { " (unchanged)" };
                let links = match links {
                    0 => "",
                    _ => "; its large files are read-only links into the store",
                };
                self.line(&format!("{:>9}  {stage} -> {path}{same}{links}", "output"));
            }
            Event::RunFinished {
                fresh,
                ran,
                failed,
                skipped,
                seconds,
                saved,
            } => {
                let mut parts = vec![format!("{fresh} fresh"), format!("{ran} ran")];
                if *failed > 0 {
                    parts.push(format!("{failed} failed"));
                }
                if *skipped > 0 {
                    parts.push(format!("{skipped} not started"));
                }
                let saved = if *saved >= 1.0 {
                    format!(", {} saved", duration(*saved))
                } else {
                    String::new()
                };
                let stages = fresh + ran + failed + skipped;
                self.line(&format!(
                    "{stages} stages: {} in {}{saved}",
                    parts.join(", "),
                    duration(*seconds)
                ));
            }
        }
    }

    fn flush(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        if lines.is_empty() {
            return;
        }
        // Somebody closed the terminal: the run goes on.
        let mut write = || _ = self.out.write_all(lines.as_bytes());
        match &self.bars {
            Some(bars) => bars.suspend(write),
            None => write(),
        }
    }
}

impl<W: Write> Terminal<W> {
    fn begin(&mut self, stage: &str) {
        self.finish(stage);
        let bar = self.bars.as_ref().map(|bars| bars.add(spinner(stage)));
        let now = Instant::now();
        let running = Running {
            bar,
            started: now,
            told: now,
            unit: String::new(),
        };
        self.running.insert(stage.to_owned(), running);
    }

    fn progress(&mut self, stage: &str, done: u64, total: Option<u64>, unit: &str) {
        let Some(running) = self.running.get_mut(stage) else {
            return;
        };
        if let Some(bar) = &running.bar {
            if running.unit != unit {
                unit.clone_into(&mut running.unit);
                bar.reset_eta();
                bar.set_style(style(total.is_some(), unit == "bytes"));
            }
            if let Some(total) = total {
                bar.set_length(total);
            }
            bar.set_message(unit.to_owned());
            bar.set_position(done);
            return;
        }
        if running.told.elapsed() < QUIET {
            return;
        }
        running.told = Instant::now();
        let seconds = running.started.elapsed().as_secs_f64();
        let count = |count: u64| {
            if unit == "bytes" {
                bytes(count)
            } else {
                format!("{count} {unit}")
            }
        };
        let mut line = format!("{:>9}  {stage}: {}", "", count(done));
        if let Some(total) = total.filter(|total| *total > 0 && done > 0) {
            let left = seconds / done as f64 * total.saturating_sub(done) as f64;
            line = format!("{line} of {}, about {} left", count(total), duration(left));
        }
        self.line(&line);
    }

    fn finish(&mut self, stage: &str) {
        if let Some(bar) = self.running.remove(stage).and_then(|running| running.bar) {
            bar.finish_and_clear();
        }
    }

    /// Adds a line. What has several goes on indented, so that no text from elsewhere looks like another event.
    fn line(&mut self, text: &str) {
        for (index, line) in harmless(text)
            .trim_end_matches('\n')
            .split('\n')
            .enumerate()
        {
            if index > 0 {
                self.lines.push_str("           ");
            }
            self.lines.push_str(line);
            self.lines.push('\n');
        }
    }
}

fn spinner(stage: &str) -> ProgressBar {
    let bar = ProgressBar::no_length();
    if let Ok(style) = ProgressStyle::with_template("{prefix:>20} {spinner} {elapsed}") {
        bar.set_style(style);
    }
    bar.set_prefix(harmless(&stage.replace('\n', " ")).into_owned());
    // The bar's own thread panics where the system gives no more; then it turns with the events alone.
    if std::thread::Builder::new().spawn(|| ()).is_ok() {
        bar.enable_steady_tick(Duration::from_millis(200));
    }
    bar
}

fn style(total: bool, bytes: bool) -> ProgressStyle {
    let template = match (total, bytes) {
        (true, false) => "{prefix:>20} {bar:30} {pos}/{len} {msg} {per_sec} {eta} left",
        (true, true) => "{prefix:>20} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta} left",
        (false, true) => "{prefix:>20} {spinner} {bytes} {bytes_per_sec}",
        (false, false) => "{prefix:>20} {spinner} {pos} {msg} {per_sec}",
    };
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
