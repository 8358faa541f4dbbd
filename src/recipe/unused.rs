//! What a recipe has and nothing uses: most likely a mistake, and no reason to refuse it.

use std::collections::BTreeSet;

use super::{Recipe, SourceSpan};

/// Something that nothing uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unused {
    /// The sentence.
    pub message: String,
    /// Where it is written, if it is.
    pub span: Option<SourceSpan>,
}

/// Artifacts that are made to be looked at.
const LOOKED_AT: [&str; 1] = ["scores"];

impl Recipe {
    /// Vars that no value takes in, and stages that neither a stage nor an output uses. A recipe without outputs is for what its last
    /// stages make, and an evaluation is for itself.
    pub fn unused(&self) -> Vec<Unused> {
        let mut unused = Vec::new();
        for name in &self.vars {
            if !self.text.contains(&format!("${{{name}}}")) {
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
        for stage in &self.stages {
            if !used.contains(stage.name.as_str()) && !LOOKED_AT.contains(&stage.stage.output()) {
                unused.push(Unused {
                    message: format!(
                        "no stage uses the result of `{0}`, and it is no output; `outputs: {{ {0}: out/{0} }}` would put it there",
                        stage.name
                    ),
                    span: Some(stage.span),
                });
            }
        }
        unused
    }
}
