//! Events for people: a line for what happened, and at a terminal, below them, lines that change for what is happening.

mod frozen;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::Write;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anstyle::Style;

use super::Reporter;
use super::frame::Frame;
use super::look::{Look, RecipeNames, Verbosity};
use super::progress::{Pen, Running};
use super::screen::Screen;
use super::style::{BOLD, DIM, ERROR, GOOD, RUNS, WAITS, WARNING, paint_if, stripped};
use super::table::{Row, Table};
use super::text::{bytes, count, duration, harmless, has_the_store, significant, thousands};
use super::width::{width, wrap};
use crate::engine::{Event, Level, Reason, short};

/// Without changing lines, a line of progress at most this often a stage.
const QUIET: Duration = Duration::from_secs(10);
/// Changing lines are drawn at most this often.
const BETWEEN_FRAMES: Duration = Duration::from_millis(90);
/// The columns of labels, and of the space behind them.
const INDENT: usize = 11;
/// The most columns of stages' names that are brought in line.
const LONGEST_NAME: usize = 24;
/// So many of a failed stage's last words are shown with the failure.
const LAST_WORDS: usize = 3;
/// The width of tables where no terminal has one.
const PLAIN_WIDTH: usize = 140;

/// Shows events to people.
pub struct Terminal<W: Write> {
    recipe: RecipeNames,
    look: Look,
    screen: Screen<W>,
    table: Table,
    /// In the order in which they began.
    running: Vec<(String, Running)>,
    /// When a line of progress was last written, by stage.
    told: BTreeMap<String, Instant>,
    /// What stages said last.
    last_words: BTreeMap<String, VecDeque<String>>,
    /// The columns for names.
    names: usize,
    /// Whether it was said that stages run for the first time.
    first_run: bool,
    /// The stages that ran.
    ran: BTreeSet<String>,
    /// The frozen stages whose results are taken though something changed.
    frozen: Vec<String>,
    /// The stages of the run, and those that are ready.
    stages: (usize, usize),
    started: Instant,
    /// What is still to be written.
    lines: String,
    last_frame: Option<Instant>,
    frames: usize,
}

impl<W: Write> Terminal<W> {
    /// Writes to `out`.
    pub fn new(recipe: RecipeNames, look: Look, out: W) -> Self {
        Self::on(recipe, look, Screen::new(out))
    }

    fn on(recipe: RecipeNames, look: Look, screen: Screen<W>) -> Self {
        let names = recipe.stages.iter().map(|name| width(name)).max();
        Self {
            recipe,
            look,
            screen,
            table: Table::default(),
            running: Vec::new(),
            told: BTreeMap::new(),
            last_words: BTreeMap::new(),
            names: names.unwrap_or(0).min(LONGEST_NAME),
            first_run: false,
            ran: BTreeSet::new(),
            frozen: Vec::new(),
            stages: (0, 0),
            started: Instant::now(),
            lines: String::new(),
            last_frame: None,
            frames: 0,
        }
    }
}

impl<W: Write> Drop for Terminal<W> {
    fn drop(&mut self) {
        self.running.clear();
        self.draw();
    }
}

impl<W: Write> Reporter for Terminal<W> {
    fn event(&mut self, event: &Event) {
        match event {
            Event::RunStarted { stages, .. } => self.stages.0 = *stages,
            Event::RunNumbered { .. }
            | Event::StageSkipped { .. }
            | Event::WorkStarted { .. }
            | Event::WorkDone { .. }
            | Event::WorkFailed { .. } => {}
            Event::StageFresh {
                stage,
                artifact,
                frozen: Some(reasons),
                ..
            } => {
                self.finish(stage);
                self.stages.1 += 1;
                self.stage_frozen(stage, artifact, reasons);
            }
            Event::StageFresh {
                stage,
                artifact,
                restored,
                remote,
                ..
            } => {
                self.finish(stage);
                self.stages.1 += 1;
                let state = if *restored { "restored" } else { "fresh" };
                let from = if *remote { "  from the remote" } else { "" };
                let artifact = short(Some(artifact));
                let text = format!("{}  ", self.name(stage));
                self.add(GOOD, state, &text, &format!("{artifact}{from}"));
            }
            Event::StageFetching { stage } => self.begin(stage, None),
            Event::StageFetched {
                stage,
                files,
                bytes: size,
                ..
            } => {
                self.finish(stage);
                self.moved("fetched", stage, *files, *size);
            }
            Event::StageSent {
                stage,
                files,
                bytes: size,
                ..
            } => self.moved("sent", stage, *files, *size),
            Event::Warning { text } => self.add_always(WARNING, "warning", text),
            Event::StageStarted {
                stage,
                kind,
                reasons,
                expected,
            } => self.stage_started(stage, kind, reasons, *expected),
            Event::RunWaiting { holder } => {
                self.add_always(WAITS, "waits", &has_the_store(holder));
            }
            Event::StageWaiting { stage, holder } => {
                let text = format!("{stage}: {holder} is making the same result");
                self.add(WAITS, "waits", &text, "");
            }
            Event::Progress {
                stage,
                done,
                total,
                unit,
                memory,
            } => self.progress(stage, (*done, *total), unit, *memory),
            Event::Metrics {
                stage,
                step,
                values,
                ..
            } => self.metrics(stage, *step, values),
            Event::Message { stage, level, text } => {
                self.remember(stage, text.clone());
                let text = format!("{stage}: {text}");
                if *level == Level::Warning {
                    self.add_always(WARNING, "warning", &text);
                } else {
                    self.add(DIM, "", &text, "");
                }
            }
            Event::StageDone {
                stage,
                artifact,
                same_bytes,
                seconds,
            } => {
                self.finish(stage);
                self.stages.1 += 1;
                self.ran.insert(stage.clone());
                let same = if *same_bytes {
                    "  the same bytes as before"
                } else {
                    ""
                };
                let artifact = short(Some(artifact));
                let text = format!("{}  {:<10}  ", self.name(stage), duration(*seconds));
                self.add(GOOD, "done", &text, &format!("{artifact}{same}"));
            }
            Event::StageRetried {
                stage,
                error,
                pause,
                left,
            } => {
                let further = match left {
                    0 => "the last one".to_owned(),
                    left => format!("{left} more after it"),
                };
                let text = format!(
                    "{stage}: {error}; another attempt in {}, {further}",
                    duration(*pause)
                );
                self.add_always(ERROR, "failed", &text);
            }
            Event::StageFailed {
                stage,
                error,
                kept,
                interrupted,
            } => {
                if *interrupted || error == "interrupted" {
                    self.stage_stopped(stage);
                } else {
                    self.stage_failed(stage, error, kept.as_deref());
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
                self.add(
                    BOLD,
                    "output",
                    &format!("{stage} -> {path}{same}{links}"),
                    "",
                );
            }
            Event::RunFinished {
                fresh,
                ran,
                failed,
                skipped,
                seconds,
                saved,
                interrupted,
            } => {
                self.frozen_at_end();
                let number = |count: &usize| thousands(*count as u64);
                let mut parts = vec![
                    format!("{} fresh", number(fresh)),
                    format!("{} ran", number(ran)),
                ];
                if *failed > 0 {
                    parts.push(format!("{} failed", number(failed)));
                }
                if *skipped > 0 {
                    let what = if *interrupted { "finished" } else { "started" };
                    parts.push(format!("{} not {what}", number(skipped)));
                }
                let saved = if *saved >= 1.0 {
                    format!("; reusing results saved {}", duration(*saved))
                } else {
                    String::new()
                };
                let stages = (fresh + ran + failed + skipped) as u64;
                let stopped = if *interrupted {
                    "; the same command goes on from here"
                } else {
                    ""
                };
                let text = format!(
                    "{}: {} in {}{saved}{stopped}",
                    count(stages, "stages"),
                    parts.join(", "),
                    duration(*seconds)
                );
                if self.look.verbosity > Verbosity::Quiet {
                    self.table.interrupt();
                    for line in wrap(&text, self.room().unwrap_or(usize::MAX)) {
                        self.write(&line);
                    }
                }
            }
        }
    }

    fn flush(&mut self) {
        let is_due = self
            .last_frame
            .is_none_or(|last| last.elapsed() >= BETWEEN_FRAMES);
        if !self.lines.is_empty() || (self.look.size.is_some() && is_due) {
            self.draw();
        }
    }

    fn tick(&mut self) {
        self.flush();
    }
}

impl<W: Write> Terminal<W> {
    fn stage_started(
        &mut self,
        stage: &str,
        kind: &str,
        reasons: &[Reason],
        expected: Option<f64>,
    ) {
        self.begin(stage, expected);
        let is_first = |reason: &Reason| *reason == Reason::NeverRan;
        let verbose = self.look.verbosity == Verbosity::Verbose;
        let other = reasons.iter().filter(|reason| !is_first(reason));
        let mut shown: Vec<String> = other
            .filter_map(|reason| match reason {
                // That it ran is on the screen.
                Reason::InputChanged { stage, .. } if self.ran.contains(stage) && !verbose => {
                    let plain = self.look.size.is_none();
                    plain.then(|| format!("`{stage}` changed"))
                }
                reason => Some(reason.to_string()),
            })
            .collect();
        // At a terminal a line moves for it, and one stays when it is done; a reason that is worth a word comes before.
        let is_shown = self.look.size.is_none() || verbose || !shown.is_empty();
        // Said once, it is true of most stages.
        if reasons.iter().any(is_first)
            && (verbose || !std::mem::replace(&mut self.first_run, true))
        {
            shown.push(Reason::NeverRan.to_string());
        }
        let reasons = if shown.is_empty() {
            String::new()
        } else {
            format!(": {}", shown.join("; "))
        };
        if is_shown {
            self.add(RUNS, "runs", &format!("{stage} ({kind}){reasons}"), "");
        }
    }

    fn moved(&mut self, label: &str, stage: &str, files: usize, size: u64) {
        let what = format!("{}, {}", count(files as u64, "files"), bytes(size));
        let text = format!("{}  {what}", self.name(stage));
        self.add(GOOD, label, &text, "");
    }

    fn stage_failed(&mut self, stage: &str, error: &str, kept: Option<&str>) {
        let columns = self.columns();
        let last_rows = self.table.end(stage, columns);
        self.finish(stage);
        for row in last_rows {
            self.write(&row);
        }
        self.add_always(ERROR, "failed", &format!("{stage}: {error}"));
        let mut more = Vec::new();
        if let Some(span) = self.recipe.place.of(stage) {
            more.push(format!("it is defined at {span}"));
        }
        // Who looks at the log itself needs no more of it.
        let is_live = !self.recipe.recipe.is_empty();
        if let Some(words) = self.last_words.get(stage)
            && !words.is_empty()
            && is_live
        {
            more.push("the end of its log:".to_owned());
            more.extend(words.iter().map(|words| format!("  {words}")));
        }
        if is_live {
            let command = self.recipe.command("log", Some(stage));
            more.push(format!("`{command}` shows all of it"));
        }
        if let Some(kept) = kept {
            more.push(format!("what it wrote is kept in {kept}"));
        }
        for line in more {
            self.add_always(DIM, "", &line);
        }
    }

    fn stage_stopped(&mut self, stage: &str) {
        let step = self
            .running(stage)
            .and_then(|running| running.step())
            .map(|(step, total)| {
                format!(
                    "at step {} of {}; the same command goes on from there",
                    thousands(step),
                    thousands(total)
                )
            });
        self.finish(stage);
        let text = format!("{}  {}", self.name(stage), step.unwrap_or_default());
        self.add_always(WARNING, "stopped", text.trim_end());
    }

    fn begin(&mut self, stage: &str, expected: Option<f64>) {
        self.finish(stage);
        let now = Instant::now();
        self.told.insert(stage.to_owned(), now);
        self.running
            .push((stage.to_owned(), Running::new(now, expected)));
    }

    fn running(&mut self, stage: &str) -> Option<&mut Running> {
        let mut running = self.running.iter_mut();
        running
            .find(|(name, _)| name == stage)
            .map(|(_, running)| running)
    }

    fn progress(
        &mut self,
        stage: &str,
        (done, total): (u64, Option<u64>),
        unit: &str,
        memory: Option<u64>,
    ) {
        let now = Instant::now();
        let Some(running) = self.running(stage) else {
            return;
        };
        running.progress(now, (done, total), unit, memory);
        let (position, left) = (running.position().unwrap_or_default(), running.left(now));
        if self.look.size.is_some() {
            return;
        }
        let told = self.told.entry(stage.to_owned()).or_insert(now);
        if now - *told < QUIET {
            return;
        }
        *told = now;
        let left = left.map_or_else(String::new, |left| {
            format!(", about {} left", duration(left))
        });
        self.add(DIM, "", &format!("{stage}: {position}{left}"), "");
    }

    fn metrics(&mut self, stage: &str, step: u64, values: &BTreeMap<String, f64>) {
        if let Some(running) = self.running(stage) {
            running.metrics(values);
        }
        if let Some(loss) = values.get("loss") {
            self.remember(stage, format!("step {step}: loss {}", significant(*loss)));
        }
        if self.look.verbosity == Verbosity::Quiet {
            return;
        }
        let row = Row {
            step,
            values: values.clone(),
        };
        let shape = (self.look.verbosity == Verbosity::Verbose, self.columns());
        for line in self.table.add(stage, row, Instant::now(), shape) {
            self.write(&line);
        }
        // The next line of progress would say the same.
        self.told.insert(stage.to_owned(), Instant::now());
    }

    fn finish(&mut self, stage: &str) {
        if self.look.verbosity > Verbosity::Quiet {
            let columns = self.columns();
            for row in self.table.end(stage, columns) {
                self.write(&row);
            }
        }
        self.running.retain(|(name, _)| name != stage);
        self.told.remove(stage);
    }

    fn remember(&mut self, stage: &str, words: String) {
        let last = self.last_words.entry(stage.to_owned()).or_default();
        if last.len() == LAST_WORDS {
            last.pop_front();
        }
        last.push_back(words);
    }

    /// A stage's name with spaces behind it, so that what follows is in line.
    fn name(&self, stage: &str) -> String {
        let padding = " ".repeat(self.names.saturating_sub(width(stage)));
        format!("{stage}{padding}")
    }

    /// The columns there are for a line, if there is an end to them.
    fn room(&self) -> Option<usize> {
        let columns = self.look.size.map(|size| size().0).or(self.look.columns);
        // In the last column some terminals already begin a new line.
        columns.map(|columns| columns.saturating_sub(1))
    }

    /// The columns there are for a table.
    fn columns(&self) -> usize {
        self.room().unwrap_or(PLAIN_WIDTH)
    }

    /// Adds a line, unless only what has to be told is shown. `more` matters less than `text`.
    fn add(&mut self, style: Style, label: &str, text: &str, more: &str) {
        if self.look.verbosity > Verbosity::Quiet {
            self.add_line(style, label, text, more);
        }
    }

    /// Adds a line, however little is shown.
    fn add_always(&mut self, style: Style, label: &str, text: &str) {
        self.add_line(style, label, text, "");
    }

    /// What has several lines goes on indented, so that no text from elsewhere looks like another event.
    fn add_line(&mut self, style: Style, label: &str, text: &str, more: &str) {
        self.table.interrupt();
        let text = harmless(text).replace("; hint: ", "\nhint: ");
        let columns = self
            .room()
            .map_or(usize::MAX, |columns| columns.saturating_sub(INDENT).max(8));
        let fits = columns == usize::MAX || width(&text) + width(more) <= columns;
        let color = self.look.color;
        let (text, more) = match more {
            more if fits && !more.is_empty() => (text.as_str(), paint_if(color, DIM, more)),
            _ => (text.trim_end(), String::new()),
        };
        let lines = text.split('\n').flat_map(|line| wrap(line, columns));
        for (index, line) in lines.enumerate() {
            let label = if index == 0 { label } else { "" };
            let more = if index == 0 { more.as_str() } else { "" };
            let label = paint_if(color, style, &format!("{label:>9}"));
            self.write(&format!("{label}  {line}{more}"));
        }
    }

    /// Adds a line as it is.
    fn write(&mut self, line: &str) {
        if self.look.color {
            self.lines.push_str(line);
        } else {
            self.lines.push_str(stripped(line).trim_end());
        }
        self.lines.push('\n');
    }

    fn draw(&mut self) {
        let frame = self.frame();
        let lines = std::mem::take(&mut self.lines);
        self.screen.draw(&lines, &frame);
        self.last_frame = Some(Instant::now());
    }

    /// The lines that change.
    fn frame(&mut self) -> Vec<String> {
        let Some(size) = self.look.size else {
            return Vec::new();
        };
        if self.running.is_empty() || self.look.verbosity == Verbosity::Quiet {
            return Vec::new();
        }
        let (columns, rows) = size();
        self.frames += 1;
        let frame = Frame {
            running: &self.running,
            stages: self.stages,
            elapsed: self.started.elapsed().as_secs_f64(),
            stopping: self.look.stopping.load(Ordering::Relaxed),
            number: self.frames,
            rows,
            pen: Pen {
                columns: columns.saturating_sub(1),
                names: self.names,
                unicode: self.look.unicode,
            },
        };
        let lines = frame.lines();
        if self.look.color {
            lines
        } else {
            lines.iter().map(|line| stripped(line)).collect()
        }
    }
}

#[cfg(test)]
mod tests;
