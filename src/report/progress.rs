//! How a running stage stands: what it told last, how fast it is now, and the line that shows it.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use super::style::{BOLD, DIM, RUNS, paint};
use super::text::{bytes, bytes_of, count, duration, significant, thousands};
use super::width::{cut, width};

/// The rate is that of so much time: long enough to be steady, short enough to be of now.
const WINDOW: Duration = Duration::from_secs(30);
/// The least time that tells a rate.
const SHORTEST: Duration = Duration::from_millis(500);
/// Two samples of the window are at least so far apart.
const BETWEEN: Duration = Duration::from_millis(250);
/// The widest and the narrowest bar.
const WIDEST: usize = 30;
const NARROWEST: usize = 8;

/// Who counts what.
#[derive(Debug, Clone, Default, PartialEq)]
struct Count {
    done: u64,
    total: Option<u64>,
    unit: String,
}

/// A running stage.
#[derive(Debug)]
pub(super) struct Running {
    started: Instant,
    /// Seconds that its last result took.
    expected: Option<f64>,
    count: Option<Count>,
    /// What was done at some moments of the window, the oldest first.
    samples: VecDeque<(Instant, u64)>,
    memory: Option<u64>,
    metrics: BTreeMap<String, f64>,
}

/// How a line is drawn.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pen {
    /// The columns there are.
    pub(super) columns: usize,
    /// The columns for the names of stages.
    pub(super) names: usize,
    /// Whether more than ASCII can be shown.
    pub(super) unicode: bool,
}

impl Running {
    pub(super) fn new(now: Instant, expected: Option<f64>) -> Self {
        Self {
            started: now,
            expected,
            count: None,
            samples: VecDeque::new(),
            memory: None,
            metrics: BTreeMap::new(),
        }
    }

    /// Takes in how far the stage is.
    pub(super) fn progress(
        &mut self,
        now: Instant,
        (done, total): (u64, Option<u64>),
        unit: &str,
        memory: Option<u64>,
    ) {
        let same = |count: &Count| count.unit == unit && count.done <= done;
        if !self.count.as_ref().is_some_and(same) {
            // Something else is counted: what it took says nothing of this.
            self.samples.clear();
        }
        self.count = Some(Count {
            done,
            total,
            unit: unit.to_owned(),
        });
        self.memory = memory.or(self.memory);
        let soon = |last: &(Instant, u64)| now - last.0 < BETWEEN;
        if !self.samples.back().is_some_and(soon) {
            self.samples.push_back((now, done));
        }
        // One sample before the window stays: rates are from there.
        while self
            .samples
            .get(1)
            .is_some_and(|second| now - second.0 > WINDOW)
        {
            self.samples.pop_front();
        }
    }

    pub(super) fn metrics(&mut self, values: &BTreeMap<String, f64>) {
        for (name, value) in values {
            self.metrics.insert(name.clone(), *value);
        }
    }

    /// Units a second lately; none as long as that can't be told.
    fn rate(&self, now: Instant) -> Option<f64> {
        let (count, (first, before)) = (self.count.as_ref()?, self.samples.front()?);
        // Until the next report nothing is known to have been done: the time since the last one counts only when it is long.
        let last = self.samples.back().map_or(now, |last| last.0);
        let until = if now - last > WINDOW { now } else { last };
        let span = until - *first;
        let done = self.samples.back()?.1.max(*before) - before;
        (span >= SHORTEST && done > 0 && count.done > *before)
            .then(|| done as f64 / span.as_secs_f64())
    }

    /// Seconds left, from what was done lately, or else from how long the last result took.
    pub(super) fn left(&self, now: Instant) -> Option<f64> {
        let count = self.count.as_ref();
        let open = count.and_then(|count| Some(count.total?.saturating_sub(count.done)));
        if open == Some(0) {
            return None;
        }
        let known = open.and_then(|open| Some(open as f64 / self.rate(now)?));
        known.or_else(|| {
            let left = self.expected? - (now - self.started).as_secs_f64();
            (left > 0.0).then_some(left)
        })
    }

    /// Where it stopped, if it counts steps.
    pub(super) fn step(&self) -> Option<(u64, u64)> {
        let count = self.count.as_ref().filter(|count| count.unit == "steps")?;
        Some((count.done, count.total?))
    }

    /// How far it is, as in `126 of 3,000 steps`.
    pub(super) fn position(&self) -> Option<String> {
        let Count { done, total, unit } = self.count.as_ref()?;
        let text = match (total, unit.as_str()) {
            (Some(total), "bytes") => format!("{} of {}", bytes_of(*done, *total), bytes(*total)),
            (None, "bytes") => bytes(*done),
            (Some(total), unit) => format!("{} of {}", thousands(*done), count(*total, unit)),
            (None, unit) => count(*done, unit),
        };
        Some(text)
    }

    /// One line that fits: name and position first, then what else there is room for.
    pub(super) fn line(&self, name: &str, frame: &str, now: Instant, pen: Pen) -> String {
        let Pen {
            columns,
            names,
            unicode,
        } = pen;
        if columns < 24 {
            let position = self.position().unwrap_or_default();
            return cut(&format!("{frame} {name} {position}"), columns);
        }
        let indent = if columns >= 72 { 9 } else { 1 };
        let name = cut(name, (columns / 3).max(4));
        let padding = " ".repeat(names.min(columns / 3).saturating_sub(width(&name)));
        let mut left = columns.saturating_sub(indent + 2 + width(&name) + padding.len());
        let mut line = format!(
            "{}  {}{padding}",
            paint(RUNS, &format!("{frame:>indent$}")),
            paint(BOLD, &name)
        );
        // By what matters most; shown in another order.
        let elapsed = duration((now - self.started).as_secs_f64());
        let position = self.position();
        let metric = |name: &str| self.metrics.get(name).copied();
        let left_time = self
            .left(now)
            .map(|left| format!("{} left", duration(left)));
        let parts = [
            (0, position.clone().unwrap_or(elapsed)),
            (4, left_time.unwrap_or_default()),
            (
                2,
                shown(metric("loss"), |loss| format!("loss {}", significant(loss))),
            ),
            (
                3,
                shown(metric("tokens_per_second"), |rate| {
                    format!("{} tokens/s", short_count(rate))
                }),
            ),
            (
                1,
                shown(metric("epoch"), |epoch| format!("epoch {epoch:.2}")),
            ),
            (
                5,
                shown(self.memory.map(|memory| memory as f64), |memory| {
                    bytes(memory as u64)
                }),
            ),
        ];
        let mut chosen: Vec<(usize, String)> = Vec::new();
        let share = self.share();
        let mut bar = 0;
        for (number, (index, text)) in parts.into_iter().enumerate() {
            if text.is_empty() {
                continue;
            }
            let text = if number == 0 {
                cut(&text, left.saturating_sub(2))
            } else {
                text
            };
            if width(&text) + 2 <= left {
                left -= width(&text) + 2;
                chosen.push((index, text));
            }
            // The bar comes after the position and the time.
            if number == 1 && share.is_some() && left >= NARROWEST + 2 {
                bar = NARROWEST;
                left -= NARROWEST + 2;
            }
        }
        if bar > 0 {
            bar += left.min(WIDEST - NARROWEST);
        }
        chosen.sort_by_key(|(index, _)| *index);
        if let Some(share) = share.filter(|_| bar > 0) {
            let full = (share * bar as f64) as usize;
            let (done, open) = if unicode { ("━", "╌") } else { ("#", "-") };
            line = format!(
                "{line}  {}{}",
                paint(RUNS, &done.repeat(full)),
                paint(DIM, &open.repeat(bar - full))
            );
        }
        for (_, text) in chosen {
            line.push_str("  ");
            line.push_str(&super::harmless(&text));
        }
        line
    }

    /// The part that is done, from 0 to 1.
    fn share(&self) -> Option<f64> {
        let count = self.count.as_ref()?;
        let total = count.total.filter(|total| *total > 0)?;
        Some((count.done as f64 / total as f64).clamp(0.0, 1.0))
    }
}

fn shown(value: Option<f64>, text: impl Fn(f64) -> String) -> String {
    value.map(text).unwrap_or_default()
}

/// A rate in few digits: `823`, `12.3k`.
pub(super) fn short_count(value: f64) -> String {
    match value {
        0.0..9.95 => format!("{value:.1}"),
        9.95..999.5 => format!("{value:.0}"),
        999.5..999_500.0 => format!("{:.1}k", value / 1e3),
        _ => format!("{:.1}M", value / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::super::style::stripped;
    use super::*;

    fn seconds(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    #[test]
    fn what_is_left_is_told_from_what_was_done_lately() {
        let start = Instant::now();
        let mut running = Running::new(start, None);
        // Going on at a checkpoint: nothing was done in no time.
        running.progress(start + seconds(5.0), (126, Some(3000)), "steps", None);
        assert_eq!(running.left(start + seconds(5.0)), None);
        for second in 1..=100_u64 {
            let now = start + seconds(5.0 + second as f64);
            running.progress(now, (126 + 10 * second, Some(3000)), "steps", None);
        }
        let left = running.left(start + seconds(105.0)).unwrap();
        assert!((left - 187.4).abs() < 0.5, "{left}");
        // Ten times as slow from here on: half a minute later nothing else counts.
        for second in 1..=40_u64 {
            let now = start + seconds(105.0 + second as f64);
            running.progress(now, (1126 + second, Some(3000)), "steps", None);
        }
        let left = running.left(start + seconds(145.0)).unwrap();
        assert!((left - 1834.0).abs() < 5.0, "{left}");
    }

    #[test]
    fn until_then_the_last_result_tells() {
        let start = Instant::now();
        let running = Running::new(start, Some(60.0));
        assert_eq!(running.left(start + seconds(20.0)), Some(40.0));
        assert_eq!(running.left(start + seconds(70.0)), None);
    }

    #[test]
    fn lines_fit_any_width() {
        let start = Instant::now();
        let now = start + seconds(10.0);
        let mut running = Running::new(start, Some(100.0));
        running.progress(start + seconds(1.0), (0, Some(3000)), "steps", None);
        running.progress(now, (126, Some(3000)), "steps", Some(1_234_000_000));
        let values = [
            ("loss", 1.23456),
            ("epoch", 0.42),
            ("tokens_per_second", 1234.0),
        ];
        running.metrics(&values.map(|(name, value)| (name.to_owned(), value)).into());
        let line = |name: &str, columns, unicode| {
            let pen = Pen {
                columns,
                names: 8,
                unicode,
            };
            stripped(&running.line(name, "*", now, pen))
        };
        assert_eq!(
            line("tuned", 120, false),
            "        *  tuned     ---------------  126 of 3,000 steps  epoch 0.42  loss 1.235  1.2k tokens/s  3 min 25 s left  1.2 GB"
        );
        for columns in 1..250 {
            for name in [
                "tuned",
                "a-stage-with-a-very-long-name-indeed",
                "日本語日本語日本語",
            ] {
                let line = line(name, columns, true);
                assert!(width(&line) <= columns, "{columns}: {line}");
            }
        }
        assert!(line("tuned", 49, true).contains("126 of 3,000 steps"));
        assert!(line("tuned", 200, true).ends_with("1.2 GB"));
    }
}
