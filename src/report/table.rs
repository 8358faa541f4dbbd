//! The metrics of trainings as a table that grows: a header, and now and then a row.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::progress::short_count;
use super::style::{DIM, paint};
use super::text::{significant, thousands};
use super::width::cut;

/// A stage gets a row at most this often.
pub(super) const PAUSE: Duration = Duration::from_secs(10);
/// After so many rows the header comes again.
const LONGEST: usize = 25;
/// The columns before the first number, where other lines have their labels.
const INDENT: usize = 11;

/// What people watch, the most important first.
const WATCHED: [&str; 9] = [
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    "tokens_per_second",
    "grad_norm",
    "learning_rate",
    "nll_loss",
    "log_odds_chosen",
    "mean_token_accuracy",
];

/// In this order they are shown.
const ORDER: [&str; 9] = [
    "loss",
    "nll_loss",
    "rewards/accuracies",
    "rewards/margins",
    "log_odds_chosen",
    "mean_token_accuracy",
    "grad_norm",
    "learning_rate",
    "tokens_per_second",
];

/// What evaluations put before the names of their metrics.
const EVALUATION: &str = "eval_";

/// The metrics of a step.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Row {
    pub(super) step: u64,
    pub(super) values: BTreeMap<String, f64>,
}

impl Row {
    fn is_evaluation(&self) -> bool {
        self.values.keys().any(|name| name.starts_with(EVALUATION))
    }

    fn value(&self, name: &str) -> Option<f64> {
        let prefix = if self.is_evaluation() { EVALUATION } else { "" };
        self.values.get(&format!("{prefix}{name}")).copied()
    }
}

/// What was shown of a stage.
#[derive(Debug, Default)]
struct Shown {
    last: Option<Instant>,
    /// A row that came too soon.
    held_back: Option<Row>,
}

/// The table.
#[derive(Debug, Default)]
pub(super) struct Table {
    stages: BTreeMap<String, Shown>,
    /// Whose rows the last lines are, their columns, and how many there are.
    open: Option<(String, Vec<&'static str>, usize)>,
}

impl Table {
    /// Something else was written: the next row needs a header.
    pub(super) fn interrupt(&mut self) {
        self.open = None;
    }

    /// Takes in the metrics of a step. Gives lines if it is time for some: at once for a stage's first row and for evaluations, and
    /// always when `every`.
    pub(super) fn add(
        &mut self,
        stage: &str,
        row: Row,
        now: Instant,
        (every, columns): (bool, usize),
    ) -> Vec<String> {
        let shown = self.stages.entry(stage.to_owned()).or_default();
        let is_due = shown.last.is_none_or(|last| now - last >= PAUSE);
        if !is_due && !every && !row.is_evaluation() {
            shown.held_back = Some(row);
            return Vec::new();
        }
        if !row.is_evaluation() {
            shown.last = Some(now);
        }
        let before = shown
            .held_back
            .take()
            .filter(|held_back| row.is_evaluation() && held_back.step == row.step);
        let rows = before.into_iter().chain([row]);
        rows.flat_map(|row| self.lines(stage, &row, columns))
            .collect()
    }

    /// The stage has ended: the lines of its last row, if that was not shown.
    pub(super) fn end(&mut self, stage: &str, columns: usize) -> Vec<String> {
        let shown = self.stages.remove(stage);
        let last = shown.and_then(|shown| shown.held_back);
        last.map_or_else(Vec::new, |row| self.lines(stage, &row, columns))
    }

    fn lines(&mut self, stage: &str, row: &Row, columns: usize) -> Vec<String> {
        let names = self.columns(stage, row, columns);
        let mut lines = Vec::new();
        let goes_on = self
            .open
            .as_ref()
            .is_some_and(|(open, shown, rows)| open == stage && *shown == names && *rows < LONGEST);
        if !goes_on {
            let titles = names.iter().map(|name| {
                let (title, width) = title(name);
                format!("{title:>width$}")
            });
            let titles: Vec<String> = titles.collect();
            let header = format!(
                "{:>9}  {:>7}  {:>6}  {}",
                cut(stage, 9),
                "step",
                "epoch",
                titles.join("  ")
            );
            lines.push(paint(DIM, &cut(header.trim_end(), columns)));
            self.open = Some((stage.to_owned(), names.clone(), 0));
        }
        if let Some((_, _, rows)) = &mut self.open {
            *rows += 1;
        }
        let numbers = names.iter().map(|name| {
            let (_, width) = title(name);
            let value = row.value(name).map(|value| match *name {
                "tokens_per_second" => short_count(value),
                _ => significant(value),
            });
            format!("{:>width$}", value.unwrap_or_default())
        });
        let numbers: Vec<String> = numbers.collect();
        let epoch = row.values.get("epoch").map(|epoch| format!("{epoch:.2}"));
        let line = format!(
            "{:>9}  {:>7}  {:>6}  {}",
            if row.is_evaluation() { "eval" } else { "" },
            thousands(row.step),
            epoch.unwrap_or_default(),
            numbers.join("  ")
        );
        lines.push(cut(line.trim_end(), columns));
        lines
    }

    /// The metrics that there is room for. A row of an evaluation goes into the columns that are there.
    fn columns(&self, stage: &str, row: &Row, columns: usize) -> Vec<&'static str> {
        if let Some((open, names, _)) = &self.open
            && open == stage
            && row.is_evaluation()
        {
            return names.clone();
        }
        let mut left = columns.saturating_sub(INDENT + 7 + 2 + 6);
        let mut chosen = Vec::new();
        for name in WATCHED {
            let (_, width) = title(name);
            if row.value(name).is_some() && left >= width + 2 {
                left -= width + 2;
                chosen.push(name);
            }
        }
        let order = ORDER.into_iter();
        order.filter(|name| chosen.contains(name)).collect()
    }
}

/// The title of a metric's column and the column's width.
fn title(name: &str) -> (&str, usize) {
    let title = match name {
        "tokens_per_second" => "tokens/s",
        "mean_token_accuracy" => "accuracy",
        name => name.rsplit('/').next().unwrap_or(name),
    };
    // Margins can be negative.
    let least = if title == "margins" { 9 } else { 8 };
    (title, title.len().max(least))
}

#[cfg(test)]
mod tests {
    use super::super::style::stripped;
    use super::super::width::width;
    use super::*;

    fn row(step: u64, names: &[&str]) -> Row {
        let named = names.iter().enumerate();
        let values = named.map(|(at, name)| ((*name).to_owned(), 0.5 + at as f64));
        let mut values: BTreeMap<String, f64> = values.collect();
        values.insert("epoch".into(), step as f64 / 100.0);
        Row { step, values }
    }

    fn text(lines: &[String]) -> Vec<String> {
        lines.iter().map(|line| stripped(line)).collect()
    }

    #[test]
    fn rows_come_now_and_then_under_one_header() {
        let mut table = Table::default();
        let start = Instant::now();
        let names = ["loss", "grad_norm", "tokens_per_second"];
        let mut at = |step: u64, second: u64| {
            let now = start + Duration::from_secs(second);
            text(&table.add("tuned", row(step, &names), now, (false, 100)))
        };
        assert_eq!(
            at(10, 1),
            [
                "    tuned     step   epoch      loss  grad_norm  tokens/s",
                "                10    0.10    0.5000      1.500       2.5",
            ]
        );
        assert_eq!(at(20, 5), [""; 0]);
        assert_eq!(
            at(1000, 11),
            ["             1,000   10.00    0.5000      1.500       2.5"]
        );
        assert_eq!(at(1010, 12), [""; 0]);
        let eval = row(1010, &["eval_loss", "eval_runtime"]);
        let lines = table.add("tuned", eval, start + Duration::from_secs(13), (false, 100));
        assert_eq!(
            text(&lines),
            [
                "             1,010   10.10    0.5000      1.500       2.5",
                "     eval    1,010   10.10    0.5000",
            ]
        );
        table.interrupt();
        let soon = table.add("tuned", row(1020, &names), start, (false, 100));
        assert!(soon.is_empty());
        let last = text(&table.end("tuned", 100));
        assert_eq!(last.len(), 2);
        assert!(last[1].starts_with("             1,020"), "{last:?}");
    }

    #[test]
    fn what_has_no_room_is_left_out() {
        for columns in [30, 50, 80, 100, 200] {
            let mut table = Table::default();
            let lines = table.add(
                "a-long-name",
                row(1, &ORDER),
                Instant::now(),
                (true, columns),
            );
            for line in text(&lines) {
                assert!(width(&line) <= columns, "{columns}: {line}");
                assert_eq!(
                    line.contains("step") && line.contains("loss"),
                    columns >= 50 && line.contains("epoch")
                );
            }
        }
    }
}
