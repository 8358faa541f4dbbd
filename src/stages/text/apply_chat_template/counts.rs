//! Counts of observations about rendered rows, for the record and for the user.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;

use crate::data::lint::{Lint, Lints, RowLocation};
use crate::engine::Context;
use crate::stages::lints;
use crate::text::chat::Rendered;

/// The number of rows of one kind, and the first of them.
#[derive(Default)]
struct Seen {
    rows: usize,
    first: Option<String>,
}

impl Seen {
    fn add(&mut self, row: usize, split: &str) {
        self.rows += 1;
        self.first
            .get_or_insert_with(|| format!("row {row} of the split `{split}`"));
    }

    fn first(&self) -> &str {
        self.first.as_deref().unwrap_or_default()
    }
}

/// The counts in the record.
#[derive(Default)]
pub(crate) struct Counts {
    pub(crate) rows: BTreeMap<String, usize>,
    pub(crate) all: usize,
    /// Whole texts, which no template was applied to.
    pub(crate) texts: usize,
    already_rendered: Seen,
    of_another_template: Seen,
    earlier_answers: Seen,
    ends_left_out: Seen,
    systems_left_out: Seen,
    without_answer: Seen,
    /// What the template doesn't read.
    unread: BTreeMap<String, Seen>,
    lints: Lints,
    rows_with_special_tokens: usize,
}

impl Counts {
    pub(crate) fn add(
        &mut self,
        row: usize,
        split: &str,
        rendered: &Rendered,
        unread: BTreeSet<String>,
    ) {
        for name in unread {
            self.unread.entry(name).or_default().add(row, split);
        }
        let seen = &rendered.seen;
        for (is_so, count) in [
            (seen.already_rendered, &mut self.already_rendered),
            (seen.of_another_template, &mut self.of_another_template),
            (seen.earlier_answers > 0, &mut self.earlier_answers),
            (seen.end_left_out, &mut self.ends_left_out),
            (seen.system_left_out, &mut self.systems_left_out),
            (
                rendered.answers.as_ref().is_some_and(Vec::is_empty),
                &mut self.without_answer,
            ),
        ] {
            if is_so {
                count.add(row, split);
            }
        }
        let location = RowLocation { row, split };
        if let Some(token) = &seen.special_token {
            let more = format!("`{token}`");
            self.lints.add(Lint::SpecialTokens, location, Some(&more));
            self.rows_with_special_tokens += 1;
        }
        // A conversation whose turns are all learnt has no prompt of its own; its text stands for it.
        self.lints.add_prompt(
            if rendered.prompt.is_empty() {
                &rendered.chosen
            } else {
                &rendered.prompt
            },
            location,
        );
    }

    /// Notes a row that is a whole text.
    pub(crate) fn add_text(&mut self, row: usize, split: &str, text: &str) {
        self.lints.add_prompt(text, RowLocation { row, split });
    }

    /// Tells what was noticed.
    ///
    /// # Errors
    /// A denied lint was found.
    pub(crate) fn tell(&self, cx: &Context, denied: &[Lint]) -> Result<()> {
        let all = self.all;
        cx.note("rows", &self.rows);
        if self.texts > 0 {
            cx.note("rows_of_plain_text", self.texts);
            cx.info(format!(
                "{} rows are whole texts, which no chat template was applied to",
                self.texts
            ));
        }
        let warn = |name: &str, seen: &Seen, sentence: &str| {
            if seen.rows > 0 {
                cx.note(name, seen.rows);
                let (rows, first) = (seen.rows, seen.first());
                cx.warn(format!(
                    "{rows} of {all} rows {sentence} (the first: {first})"
                ));
            }
        };
        warn(
            "rows_already_rendered",
            &self.already_rendered,
            "were rendered by this chat template before, and were taken as they are",
        );
        warn(
            "rows_of_another_template",
            &self.of_another_template,
            "look as if another chat template had rendered them, and were taken as plain text; hint: import messages, not rendered texts",
        );
        warn(
            "rows_with_earlier_answers",
            &self.earlier_answers,
            "have several answers, of which only the last one is learnt; hint: `assistant_only_loss: true` learns all of them",
        );
        warn(
            "rows_with_ends_left_out",
            &self.ends_left_out,
            "end with turns behind their last answer, which were left out",
        );
        warn(
            "rows_with_systems_left_out",
            &self.systems_left_out,
            "have a `system` beside a system message of their own, which counts",
        );
        warn(
            "rows_without_answer",
            &self.without_answer,
            "were left out, for the assistant says nothing in them",
        );
        for (name, seen) in &self.unread {
            let (rows, first) = (seen.rows, seen.first());
            cx.info(format!(
                "the chat template doesn't read {name}, which {rows} of {all} rows have (the first: {first})"
            ));
        }
        if self.rows_with_special_tokens > 0 {
            cx.note("rows_with_special_tokens", self.rows_with_special_tokens);
        }
        lints::tell(cx, &self.lints, all, denied, &[])
    }
}
