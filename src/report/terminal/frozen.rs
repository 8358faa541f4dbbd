//! Frozen stages whose results are taken though something changed: told when they are met, and once more at the end.

use std::io::Write;

use super::Terminal;
use crate::engine::{Reason, short};
use crate::report::style::{GOOD, WARNING};

impl<W: Write> Terminal<W> {
    /// A frozen stage's result is taken; `reasons` is what changed.
    pub(super) fn stage_frozen(&mut self, stage: &str, artifact: &str, reasons: &[Reason]) {
        let text = format!("{}  ", self.name(stage));
        let artifact = short(Some(artifact));
        if reasons.is_empty() {
            return self.add(GOOD, "frozen", &text, &artifact);
        }
        let reasons: Vec<String> = reasons.iter().map(ToString::to_string).collect();
        let reasons = reasons.join("; ");
        let text = format!("{text}{artifact}  its last result is taken though {reasons}");
        self.add_always(WARNING, "frozen", &text);
        self.frozen.push(stage.to_owned());
    }

    /// Says at the end which results are not what the recipe says now.
    pub(super) fn frozen_at_end(&mut self) {
        let frozen = std::mem::take(&mut self.frozen);
        if frozen.is_empty() {
            return;
        }
        let (verb, results) = match frozen.len() {
            1 => ("is", "its result is"),
            _ => ("are", "their results are"),
        };
        let names: Vec<String> = frozen.iter().map(|name| format!("`{name}`")).collect();
        let text = format!(
            "{} {verb} frozen: {results} not what the recipe says now, and neither is what was made from {}",
            names.join(", "),
            if frozen.len() == 1 { "it" } else { "them" }
        );
        self.add_always(WARNING, "frozen", &text);
    }
}
