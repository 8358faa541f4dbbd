//! The graph of a recipe as text, Mermaid or Graphviz.

use std::fmt::Write as _;

use super::{Recipe, RecipeStage};

/// How to draw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// One line per stage, in the order they run.
    Text,
    /// A Mermaid flowchart.
    Mermaid,
    /// A Graphviz digraph.
    Dot,
}

/// Draws the graph. `label` may add something to a stage, such as its state.
pub fn draw(
    recipe: &Recipe,
    format: Format,
    label: impl Fn(&RecipeStage) -> Option<String>,
) -> String {
    match format {
        Format::Text => text(recipe, label),
        Format::Mermaid => mermaid(recipe, label),
        Format::Dot => dot(recipe, label),
    }
}

/// Each stage that `stage` takes from, once, with the parameters.
fn sources(stage: &RecipeStage) -> Vec<(&str, String)> {
    let mut sources: Vec<(&str, String)> = Vec::new();
    for edge in &stage.edges {
        match sources.iter_mut().find(|(name, _)| *name == edge.stage) {
            Some((_, parameters)) => _ = write!(parameters, ", {}", edge.parameter),
            None => sources.push((&edge.stage, edge.parameter.clone())),
        }
    }
    sources
}

fn text(recipe: &Recipe, label: impl Fn(&RecipeStage) -> Option<String>) -> String {
    let order = recipe.order();
    let stages: Vec<&RecipeStage> = order.iter().filter_map(|i| recipe.stages.get(*i)).collect();
    let width = |of: fn(&RecipeStage) -> &str| {
        let widths = stages.iter().map(|stage| of(stage).chars().count());
        widths.max().unwrap_or(0)
    };
    let names = width(|stage| &stage.name);
    let kinds = width(|stage| stage.kind.name);
    let mut drawn = String::new();
    for stage in stages {
        let sources: Vec<&str> = sources(stage).into_iter().map(|(name, _)| name).collect();
        let from = match sources[..] {
            [] => String::new(),
            _ => format!("<- {}", sources.join(", ")),
        };
        let label = label(stage).map_or_else(String::new, |label| format!("[{label}]"));
        let line = format!(
            "{:names$}  {:kinds$}  {from}  {label}",
            stage.name, stage.kind.name
        );
        drawn.push_str(line.trim_end());
        drawn.push('\n');
    }
    for output in &recipe.outputs {
        _ = writeln!(drawn, "{} => {}", output.stage, output.path);
    }
    drawn
}

fn mermaid(recipe: &Recipe, label: impl Fn(&RecipeStage) -> Option<String>) -> String {
    // Names may be words of Mermaid, such as `end`, so nodes have numbers.
    let number = |name: &str| recipe.stages.iter().position(|stage| stage.name == name);
    let escape = |text: &str| text.replace('"', "#quot;");
    let mut drawn = String::from("flowchart TD\n");
    for (index, stage) in recipe.stages.iter().enumerate() {
        let label = label(stage).map_or_else(String::new, |label| format!("<br/>{label}"));
        let text = format!("{}<br/><i>{}</i>{label}", stage.name, stage.kind.name);
        _ = writeln!(drawn, "    s{index}[\"{}\"]", escape(&text));
    }
    for (index, stage) in recipe.stages.iter().enumerate() {
        for (source, parameters) in sources(stage) {
            if let Some(from) = number(source) {
                _ = writeln!(
                    drawn,
                    "    s{from} -->|\"{}\"| s{index}",
                    escape(&parameters)
                );
            }
        }
    }
    for (index, output) in recipe.outputs.iter().enumerate() {
        if let Some(from) = number(&output.stage) {
            let path = escape(&output.path);
            _ = writeln!(
                drawn,
                "    o{index}[/\"{path}\"/]\n    s{from} ==> o{index}"
            );
        }
    }
    drawn
}

fn dot(recipe: &Recipe, label: impl Fn(&RecipeStage) -> Option<String>) -> String {
    let quote = |text: &str| format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""));
    let mut drawn = String::from("digraph recipe {\n    node [shape=box];\n");
    for stage in &recipe.stages {
        let mut lines = vec![stage.name.clone(), stage.kind.name.to_owned()];
        lines.extend(label(stage));
        let lines: Vec<String> = lines
            .iter()
            .map(|line| line.replace('\\', "\\\\").replace('"', "\\\""))
            .collect();
        let name = quote(&stage.name);
        _ = writeln!(drawn, "    {name} [label=\"{}\"];", lines.join("\\n"));
    }
    for stage in &recipe.stages {
        for (source, parameters) in sources(stage) {
            let (from, to) = (quote(source), quote(&stage.name));
            let parameters = quote(&parameters);
            _ = writeln!(drawn, "    {from} -> {to} [label={parameters}];");
        }
    }
    for output in &recipe.outputs {
        let folder = quote(&format!("=> {}", output.path));
        let from = quote(&output.stage);
        _ = writeln!(
            drawn,
            "    {folder} [shape=folder];\n    {from} -> {folder};"
        );
    }
    drawn.push_str("}\n");
    drawn
}
