//! Finds parts of a recipe that nothing uses. They are probably mistakes, but no reason to refuse the recipe.

use std::collections::BTreeSet;

use super::pieces::namespace;
use super::{Recipe, SourceSpan};

/// A part of a recipe that nothing uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unused {
    /// The sentence.
    pub message: String,
    /// Where it is written, if it is.
    pub span: Option<SourceSpan>,
}

/// Artifacts that are made to be read by people, so that no stage needs to use them.
const LOOKED_AT: [&str; 1] = ["scores"];

impl Recipe {
    /// Vars that no value uses, and stages that neither a stage nor an output uses. In a recipe without outputs the last stages count
    /// as used, and so do evaluations in any recipe.
    pub fn unused(&self) -> Vec<Unused> {
        let mut unused = Vec::new();
        for name in self.vars.iter().map(|var| &var.name) {
            let is_written = || self.text.contains(&format!("${{{name}}}"));
            if !self.used_vars.contains(name) && !is_written() {
                unused.push(Unused {
                    message: format!("no value uses the var `{name}`"),
                    span: self.span_of(&format!("vars.{name}")),
                });
            }
        }
        if self.outputs.is_empty() {
            return unused;
        }
        let edges = self.stages.iter().flat_map(|stage| &stage.edges);
        let mut used: BTreeSet<&str> = edges.map(|edge| edge.stage.as_str()).collect();
        used.extend(self.outputs.iter().map(|output| output.stage.as_str()));
        // One stage of a matrix that is used is enough for all of them.
        let stages = self.stages.iter();
        let in_use = stages.filter(|stage| used.contains(stage.name.as_str()));
        let mut told: BTreeSet<&str> = in_use.map(|stage| stage.declared.as_str()).collect();
        for stage in &self.stages {
            // What an included recipe makes besides is its own affair.
            if !used.contains(stage.name.as_str())
                && namespace(&stage.name).is_none()
                && !LOOKED_AT.contains(&stage.stage.output())
                && told.insert(&stage.declared)
            {
                unused.push(Unused {
                    message: format!(
                        "no stage uses the result of `{0}`, and it is no output; `outputs: {{ {0}: out/{0} }}` would put it there",
                        stage.declared
                    ),
                    span: Some(self.span_of_stage(stage)),
                });
            }
        }
        unused
    }
}
