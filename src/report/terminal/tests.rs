//! What people see: the lines that stay, and every frame of those that change, at each width.

use std::sync::Mutex;

use super::super::look::{Size, StagePlaces, quoted};
use super::super::width::width;
use super::*;

/// A terminal of so many columns, which understands what is written to it.
#[derive(Default)]
struct Screened {
    columns: usize,
    rows: Vec<Vec<char>>,
    at: (usize, usize),
    wraps: bool,
    /// The widest line that was ever drawn.
    widest: usize,
}

impl Screened {
    fn write(&mut self, text: &str) {
        let mut characters = text.chars();
        while let Some(character) = characters.next() {
            match character {
                '\r' => self.at.1 = 0,
                '\n' => self.at = (self.at.0 + 1, 0),
                '\u{1b}' => {
                    assert_eq!(characters.next(), Some('['));
                    let mut sequence = String::new();
                    let end = loop {
                        let next = characters.next().unwrap();
                        if next.is_ascii_alphabetic() {
                            break next;
                        }
                        sequence.push(next);
                    };
                    self.control(&sequence, end);
                }
                character => self.put(character),
            }
            let needed = self.at.0 + 1;
            if self.rows.len() < needed {
                self.rows.resize(needed, Vec::new());
            }
        }
    }

    fn control(&mut self, sequence: &str, end: char) {
        match (sequence, end) {
            ("", 'J') => {
                self.rows.truncate(self.at.0 + 1);
                self.rows[self.at.0].truncate(self.at.1);
            }
            (up, 'A') => self.at.0 -= up.parse::<usize>().unwrap(),
            ("?7", 'l') => self.wraps = false,
            ("?7", 'h') => self.wraps = true,
            (_, 'm') => {}
            other => panic!("{other:?}"),
        }
    }

    fn put(&mut self, character: char) {
        let (row, column) = self.at;
        if self.rows.len() <= row {
            self.rows.resize(row + 1, Vec::new());
        }
        let line = &mut self.rows[row];
        line.resize(line.len().max(column + 1), ' ');
        line[column] = character;
        self.at.1 += 1;
        self.widest = self.widest.max(self.at.1);
        assert!(
            self.wraps || self.at.1 <= self.columns,
            "a line that changes is wider than {}",
            self.columns
        );
    }

    fn text(&self) -> String {
        let rows = self.rows.iter();
        let rows = rows.map(|row| row.iter().collect::<String>().trim_end().to_owned());
        rows.collect::<Vec<_>>().join("\n")
    }
}

/// What is written, and how wide the terminal is.
struct Tube<'a>(&'a Mutex<Screened>);

impl Write for Tube<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let text = std::str::from_utf8(bytes).unwrap();
        self.0.lock().unwrap().write(text);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn names() -> RecipeNames {
    let stages = ["pairs", "base", "tuned", "scores"];
    RecipeNames {
        recipe: "r.yaml".into(),
        set: String::new(),
        stages: stages.map(str::to_owned).to_vec(),
        place: StagePlaces::new(move |stage| {
            let line = stages.iter().position(|name| *name == stage).unwrap();
            format!("r.yaml:{}:3", line + 3)
        }),
    }
}
fn started(stage: &str, kind: &str, reasons: Vec<Reason>) -> Event {
    Event::StageStarted {
        stage: stage.into(),
        kind: kind.into(),
        reasons,
        expected: Some(90.0),
    }
}

fn done(stage: &str) -> Event {
    Event::StageDone {
        stage: stage.into(),
        artifact: "0123456789abcdef".into(),
        same_bytes: false,
        seconds: 12.3,
    }
}

fn message(stage: &str, level: Level, text: &str) -> Event {
    Event::Message {
        stage: stage.into(),
        level,
        text: text.into(),
    }
}

fn steps(done: u64) -> Event {
    Event::Progress {
        stage: "tuned".into(),
        done,
        total: Some(3000),
        unit: "steps".into(),
        memory: Some(1_234_567_890),
    }
}

fn numbers(step: u64) -> Event {
    let values = [
        ("loss", 2.345),
        ("rewards/accuracies", 0.75),
        ("grad_norm", 1.25),
        ("learning_rate", 8e-6),
        ("epoch", 0.42),
        ("tokens_per_second", 1234.0),
    ];
    Event::Metrics {
        stage: "tuned".into(),
        step,
        total: Some(3000),
        values: values
            .iter()
            .map(|(name, value)| ((*name).to_owned(), *value))
            .collect(),
    }
}

fn finished() -> Event {
    Event::RunFinished {
        fresh: 1,
        ran: 2,
        failed: 0,
        skipped: 0,
        seconds: 151.0,
        saved: 723.0,
        interrupted: false,
    }
}

/// A run with a training in it.
fn session() -> Vec<Event> {
    let changed = Reason::ParameterChanged {
        parameter: "beta".into(),
        old: Some(0.1.into()),
        new: Some(0.2.into()),
    };
    let mut events = vec![
        Event::RunStarted {
            recipe: "r".into(),
            stages: 4,
            version: 1,
        },
        Event::StageFresh {
            stage: "pairs".into(),
            artifact: "fedcba9876543210".into(),
            restored: false,
            remote: false,
            saved: 723.0,
            frozen: None,
        },
        started("base", "create_model", vec![Reason::NeverRan]),
        started("tuned", "train_orpo", vec![changed]),
        message(
            "tuned",
            Level::Info,
            "starts at the beginning, 3000 steps to go",
        ),
    ];
    for step in [1, 10, 126] {
        events.push(steps(step));
        events.push(numbers(step));
    }
    events.extend([
        done("base"),
        message("tuned", Level::Warning, "left out an update"),
        done("tuned"),
        finished(),
        Event::OutputPlaced {
            stage: "tuned".into(),
            path: "out/tuned".into(),
            changed: true,
            links: 1,
        },
    ]);
    events
}

/// The lines of a session where there is no terminal.
fn plain(verbosity: Verbosity, events: &[Event]) -> String {
    let mut out = Vec::new();
    let look = Look {
        verbosity,
        ..Look::default()
    };
    let mut terminal = Terminal::on(names(), look, Screen::alone(&mut out));
    for event in events {
        terminal.event(event);
    }
    drop(terminal);
    String::from_utf8(out).unwrap()
}

#[test]
fn without_a_terminal_there_are_plain_lines() {
    let shown = plain(Verbosity::Normal, &session());
    let expected = "    fresh  pairs   fedcba9876
     runs  base (create_model): first run
     runs  tuned (train_orpo): `beta` changed from 0.1 to 0.2
           tuned: starts at the beginning, 3000 steps to go
    tuned     step   epoch      loss  accuracies  grad_norm  learning_rate  tokens/s
                 1    0.42     2.345      0.7500      1.250       8.000e-6      1.2k
     done  base    12 s        0123456789
  warning  tuned: left out an update
    tuned     step   epoch      loss  accuracies  grad_norm  learning_rate  tokens/s
               126    0.42     2.345      0.7500      1.250       8.000e-6      1.2k
     done  tuned   12 s        0123456789
3 stages: 1 fresh, 2 ran in 2 min 31 s; reusing results saved 12 min 3 s
   output  tuned -> out/tuned; its large files are read-only links into the store
";
    assert_eq!(shown, expected);
}

#[test]
fn quiet_leaves_warnings_and_failures() {
    let shown = plain(Verbosity::Quiet, &session());
    assert_eq!(shown, "  warning  tuned: left out an update\n");
}

#[test]
fn verbose_has_every_metric() {
    let shown = plain(Verbosity::Verbose, &session());
    assert!(
        shown.contains("\n                10    0.42     2.345"),
        "{shown}"
    );
}

#[test]
fn a_failure_says_where_it_stands_what_was_told_last_and_how_to_see_all() {
    let failed = Event::StageFailed {
        stage: "tuned".into(),
        error: "row 3 has no answer".into(),
        kept: Some("/store/failed/x".into()),
        interrupted: false,
    };
    let events = [
        started("tuned", "train_orpo", vec![]),
        message("tuned", Level::Info, "one"),
        numbers(7),
        failed,
    ];
    let shown = plain(Verbosity::Quiet, &events);
    let expected = "   failed  tuned: row 3 has no answer
           it is defined at r.yaml:5:3
           the end of its log:
             one
             step 7: loss 2.345
           `pipeline log r.yaml tuned` shows all of it
           what it wrote is kept in /store/failed/x
";
    assert_eq!(shown, expected);
}

#[test]
fn a_stopped_training_says_where_it_goes_on() {
    let stopped = Event::StageFailed {
        stage: "tuned".into(),
        error: "interrupted".into(),
        kept: None,
        interrupted: true,
    };
    let over = Event::RunFinished {
        fresh: 1,
        ran: 0,
        failed: 0,
        skipped: 3,
        seconds: 5.0,
        saved: 0.0,
        interrupted: true,
    };
    let events = [
        started("tuned", "train_orpo", vec![]),
        steps(126),
        stopped,
        over,
    ];
    let shown = plain(Verbosity::Normal, &events);
    let expected = "     runs  tuned (train_orpo)
  stopped  tuned   at step 126 of 3,000; the same command goes on from there
4 stages: 1 fresh, 0 ran, 3 not finished in 5.0 s; the same command goes on from here
";
    assert_eq!(shown, expected);
}

/// The widths that a test's terminals have, by test.
static WIDTHS: [Mutex<usize>; 7] = [const { Mutex::new(0) }; 7];

fn size<const AT: usize>() -> (usize, usize) {
    (*WIDTHS[AT].lock().unwrap(), 24)
}

/// Plays a session at a terminal whose width is another one after each event; what is left on it.
fn play(at: usize, size: Size, widths: &[usize], events: &[Event]) -> (String, usize) {
    let tube = Mutex::new(Screened {
        wraps: true,
        ..Screened::default()
    });
    let look = Look {
        unicode: true,
        color: true,
        size: Some(size),
        ..Look::default()
    };
    let mut frames = 0;
    {
        let screen = Screen::alone(Tube(&tube));
        let mut terminal = Terminal::on(names(), look, screen);
        for (event, columns) in events.iter().zip(widths.iter().cycle()) {
            *WIDTHS[at].lock().unwrap() = *columns;
            tube.lock().unwrap().columns = *columns;
            terminal.event(event);
            terminal.draw();
            frames += usize::from(tube.lock().unwrap().text().contains("stages, "));
        }
    }
    let text = tube.lock().unwrap().text();
    (text, frames)
}

#[test]
fn at_a_terminal_lines_move_and_leave_nothing_behind() {
    let sizes: [Size; 7] = [
        size::<0>, size::<1>, size::<2>, size::<3>, size::<4>, size::<5>, size::<6>,
    ];
    let widths = [
        &[20][..],
        &[40],
        &[50],
        &[80],
        &[100],
        &[200],
        &[120, 50, 200, 31, 80],
    ];
    for (at, widths) in widths.into_iter().enumerate() {
        let (left, frames) = play(at, sizes[at], widths, &session());
        assert!(
            frames > 5 || *widths == [20],
            "{widths:?}: {frames}\n{left}"
        );
        for gone in ["━", "⠋", "stages, ", " s left", "1.2 GB", "of 3,000"] {
            assert!(!left.contains(gone), "{widths:?}: {gone}\n{left}");
        }
        for stays in ["fresh  pairs", "done  base", "done  tuned", "1.2k"] {
            let narrow = stays == "1.2k" && widths.iter().any(|width| *width < 80);
            assert!(
                narrow || left.contains(stays),
                "{widths:?}: {stays}\n{left}"
            );
        }
        // Nor is any line that stays wider than the terminal was.
        if let [columns] = widths {
            // But for a word that is wider than the room for it.
            let several = left.lines().filter(|line| line.trim().contains(' '));
            let widest = several.map(width).max().unwrap();
            assert!(widest <= *columns, "{widths:?}\n{left}");
        }
    }
}

#[test]
fn arguments_are_quoted_for_a_shell() {
    assert_eq!(quoted("recipes/a-b.yaml"), "recipes/a-b.yaml");
    assert_eq!(quoted("it's"), r"'it'\''s'");
    assert_eq!(quoted(""), "''");
}
