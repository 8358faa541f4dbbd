//! Reads recipes: from YAML text to typed stages, with the position of every mistake.
//!
//! The steps are: text, then a YAML value ([`read`](self::read)), then `--set` ([`set`](self::set)), then `${vars}`
//! ([`vars`](self::vars)) and one stage for each combination of a [`matrix`], then what stages leave out ([`defaults`](self::defaults), [`implied`](self::implied)), then typed stages
//! ([`stage`](self::stage)), then edges and outputs ([`wiring`](self::wiring)).
//! Every step continues after a mistake, so that [`load`] reports all of them at once. The module is given the list of kinds as a
//! value, and does not depend on what a stage does. [`schema`] and [`reference`] describe recipes; [`graph`] draws one.

mod combination;
mod defaults;
mod draft;
mod error;
pub mod foreign;
pub mod graph;
mod hints;
mod implied;
mod matrix;
pub mod outline;
mod parameters;
mod publish;
mod read;
mod reference;
mod schema;
mod sentence;
mod set;
mod source_map;
mod spellings;
mod stage;
mod syntax;
#[cfg(test)]
mod tests;
pub mod translate;
mod typing;
mod unused;
mod vars;
mod wiring;
mod words;

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::engine::{AnyStage, Handling, Kind};

pub use combination::AxisValue;
use draft::Draft;
pub use error::{RecipeError, RecipeErrors};
pub use publish::{PUBLISHED, Publish};
pub use read::yaml;
pub use reference::reference;
pub use schema::schema;
pub use source_map::{
    PathStep, RecipePath, SourceSpan, display as display_path, parse as parse_path,
};
use source_map::{SourceMap, keys};
pub use unused::Unused;
pub use words::{about, described};

/// A value given on the command line: `--set stages.tuned.train_orpo.beta=0.2`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Override {
    /// The path of the value in the recipe.
    pub path: String,
    /// The value, as YAML.
    pub value: String,
}

/// The path that chooses a profile in place of a value: `--set profile=smoke`.
pub const PROFILE: &str = "profile";

/// A recipe that can be planned: typed, wired, without a cycle.
pub struct Recipe {
    /// The file.
    pub path: PathBuf,
    /// The file's text.
    pub text: String,
    /// The description, if it has one.
    pub description: Option<String>,
    /// The stages, in the order of the recipe.
    pub stages: Vec<RecipeStage>,
    /// What is put where for people to use, in the order of the recipe.
    pub outputs: Vec<Output>,
    /// What is published where on the hub when somebody asks for it, in the order of the recipe.
    pub publish: Vec<Publish>,
    vars: Vec<String>,
    source_map: SourceMap,
    order: Vec<usize>,
}

/// One stage of a recipe.
pub struct RecipeStage {
    /// The name: in the recipe, or what a matrix made of that, as in `tuned[beta=0.1,seed=2]`.
    pub name: String,
    /// The name in the recipe.
    pub declared: String,
    /// The values of the matrix that it stands for; empty for a stage without one.
    pub combination: Vec<AxisValue>,
    /// The kind.
    pub kind: &'static Kind,
    /// The typed parameters.
    pub stage: Arc<dyn AnyStage>,
    /// How the runner treats it.
    pub handling: Handling,
    /// The stages it takes from, in the order of the parameters.
    pub edges: Vec<Edge>,
    /// The local files it reads.
    pub files: Vec<SourceFile>,
    /// Where its name is written.
    pub span: SourceSpan,
}

/// A parameter that takes another stage's artifact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Edge {
    /// The parameter, in the notation of [`display_path`].
    pub parameter: String,
    /// The stage that makes the artifact.
    pub stage: String,
    /// The noun of the artifact.
    pub artifact: String,
    /// Whether the recipe leaves the parameter out, because the rest of it says which stage is meant.
    pub implied: bool,
}

/// A parameter that names a local file or folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceFile {
    /// The parameter, in the notation of [`display_path`].
    pub parameter: String,
    /// The path as it was written.
    pub path: String,
    /// Whether the path came from `--set`, so that it starts at the current folder and not at the recipe's.
    pub from_command_line: bool,
}

/// A stage's result that is put where people use it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// The stage.
    pub stage: String,
    /// The path: relative, and inside the folder it starts at.
    pub path: String,
    /// Where it is written; the start of the file when it came from `--set`.
    pub span: SourceSpan,
}

impl RecipeStage {
    /// The parameters that the recipe leaves out because the rest of it says which stage is meant.
    pub fn implied(&self) -> impl Iterator<Item = &Edge> {
        self.edges.iter().filter(|edge| edge.implied)
    }
}

impl Recipe {
    /// A sentence with what the recipe implies, or none when it implies nothing.
    pub fn implied(&self) -> Option<String> {
        let mut groups: Vec<((&str, &str), Vec<&str>)> = Vec::new();
        for stage in &self.stages {
            for edge in stage.implied() {
                let same = (edge.parameter.as_str(), edge.stage.as_str());
                match groups.iter_mut().find(|(group, _)| *group == same) {
                    Some((_, stages)) => stages.push(&stage.name),
                    None => groups.push((same, vec![&stage.name])),
                }
            }
        }
        let all: Vec<String> = groups
            .iter()
            .take(MOST_IMPLIED)
            .map(|((parameter, is), stages)| {
                let more = match stages.len().saturating_sub(MOST_IMPLIED) {
                    0 => String::new(),
                    more => format!(" and {more} more"),
                };
                let stages = stages.get(..MOST_IMPLIED).unwrap_or(stages);
                format!("`{parameter}` of {}{more} is {is}", stages.join(", "))
            })
            .collect();
        let more = match groups.len().saturating_sub(MOST_IMPLIED) {
            0 => String::new(),
            more => format!("; and {more} more"),
        };
        (!all.is_empty()).then(|| format!("implied: {}{more}", all.join("; ")))
    }

    /// The indices of the stages so that each comes after all it takes from; otherwise in the order of the recipe.
    pub fn order(&self) -> Vec<usize> {
        self.order.clone()
    }

    /// The stage called `name`.
    pub fn stage(&self, name: &str) -> Option<&RecipeStage> {
        self.stages.iter().find(|stage| stage.name == name)
    }

    /// The stages that a name means: the one called so, or those that a matrix made of it and that have the values it picks.
    pub fn matching(&self, name: &str) -> Vec<usize> {
        let numbered = || self.stages.iter().enumerate();
        if let Some((exact, _)) = numbered().find(|(_, stage)| stage.name == name) {
            return vec![exact];
        }
        let Some(picked) = matrix::picked(name) else {
            return Vec::new();
        };
        numbered()
            .filter(|(_, stage)| stage.declared == picked.stage && picked.fits(&stage.combination))
            .map(|(index, _)| index)
            .collect()
    }

    /// Where the value at a path such as `stages.tuned.train_orpo.beta` is written, or the nearest thing around it.
    pub fn span_of(&self, path: &str) -> Option<SourceSpan> {
        self.source_map.value(&source_map::parse(path).ok()?)
    }

    /// The stage name that is most like `name`, for a did-you-mean.
    pub fn suggest(&self, name: &str) -> Option<&str> {
        let names = self.stages.iter().map(|stage| stage.name.as_str());
        let declared = self.stages.iter().map(|stage| stage.declared.as_str());
        hints::nearest(name, declared.chain(names))
    }
}

/// Reads a recipe file, applies `overrides`, and types and wires it. All mistakes come back at once.
pub fn load(
    path: &Path,
    overrides: &[Override],
    kinds: &'static [Kind],
) -> Result<Recipe, RecipeErrors> {
    let whole = |message: String, hint: Option<&str>| {
        RecipeErrors(vec![RecipeError {
            file: path.to_owned(),
            message,
            span: None,
            origin: None,
            hint: hint.map(str::to_owned),
            source_line: None,
        }])
    };
    let bytes = read_bounded(path).map_err(|error| {
        let hint = match error.kind() {
            std::io::ErrorKind::NotFound => Some("give the path of a recipe, a YAML file"),
            std::io::ErrorKind::IsADirectory => Some("give the path of a file in that folder"),
            _ => None,
        };
        whole(format!("could not read the recipe: {error}"), hint)
    })?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let line = error
            .as_bytes()
            .iter()
            .take(at)
            .filter(|b| **b == b'\n')
            .count()
            + 1;
        whole(
            format!("the recipe is not UTF-8: a wrong byte in line {line}"),
            Some("save the file as UTF-8"),
        )
    })?;
    parse(path, &text, overrides, kinds)
}

/// The most groups, and the most stages of one, that a sentence names.
const MOST_IMPLIED: usize = 5;
/// The stages of a recipe by name, with their kinds, as far as a text can be read that is perhaps being written. Of a recipe that can be
/// read wholly also those that a matrix makes.
pub fn stage_names(text: &str, kinds: &'static [Kind]) -> Vec<(String, Option<String>)> {
    if text.contains(matrix::MATRIX)
        && let Ok(recipe) = parse(Path::new(""), text, &[], kinds)
    {
        let mut names: Vec<(String, Option<String>)> = Vec::new();
        for stage in recipe.stages {
            let kind = Some(stage.kind.name.to_owned());
            if names.iter().all(|(name, _)| *name != stage.declared) {
                names.push((stage.declared.clone(), kind.clone()));
            }
            if stage.name != stage.declared {
                names.push((stage.name, kind));
            }
        }
        return names;
    }
    let Ok(recipe) = yaml::<serde_yaml::Value>(text) else {
        return Vec::new();
    };
    let stages = recipe.get("stages").and_then(serde_yaml::Value::as_mapping);
    let stages = stages.into_iter().flatten();
    let named = stages.filter_map(|(name, stage)| {
        let keys = stage.as_mapping().into_iter().flat_map(|map| map.keys());
        let mut keys = keys.filter(|key| *key != matrix::MATRIX);
        let kind = keys.next();
        let kind = kind.and_then(serde_yaml::Value::as_str).map(str::to_owned);
        Some((name.as_str()?.to_owned(), kind))
    });
    named.collect()
}

/// Advice for a kind that doesn't exist.
pub fn suggest_kind(name: &str, kinds: &[Kind]) -> String {
    hints::kind(name, kinds)
}

/// The longest recipe, in bytes. Longer is only what never ends, such as a device.
const LONGEST: u64 = 64 << 20;

fn read_bounded(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)?
        .take(LONGEST + 1)
        .read_to_end(&mut bytes)?;
    if bytes.len() as u64 > LONGEST {
        return Err(std::io::ErrorKind::FileTooLarge.into());
    }
    Ok(bytes)
}

/// [`load`] for a text that is already read; `path` is for messages.
pub fn parse(
    path: &Path,
    text: &str,
    overrides: &[Override],
    kinds: &'static [Kind],
) -> Result<Recipe, RecipeErrors> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut draft = Draft::new(path, text, kinds);
    let mut value = match read::read(text) {
        Ok(read) => {
            draft.source_map = read.source_map;
            for mistake in read.mistakes {
                draft.push(mistake.message, mistake.span, None, mistake.hint);
            }
            read.value
        }
        Err(mistake) => {
            draft.push(mistake.message, mistake.span, None, mistake.hint);
            return Err(draft.into_errors());
        }
    };
    if !draft.top(&value) {
        return Err(draft.into_errors());
    }
    set::apply(&mut draft, &mut value, overrides);
    let vars = vars::read(&mut draft, &value);
    vars::substitute(&mut draft, &vars, &mut value, &["defaults"]);
    matrix::expand(&mut draft, &vars, &mut value);
    defaults::fill(&mut draft, &mut value);
    implied::fill(&mut draft, &mut value);
    let vars = vars.into_keys().collect();
    let stages = stage::read(&mut draft, &value);
    let wired = wiring::wire(&mut draft, stages, &value);
    if !draft.errors.is_empty() {
        return Err(draft.into_errors());
    }
    let start = SourceSpan {
        line: 1,
        column: 1,
        length: 1,
    };
    let mut stages = Vec::with_capacity(wired.stages.len());
    for stage in wired.stages {
        let span = draft.source_map.key(&keys(&["stages", &stage.name]));
        // Every stage has its parts when there is no error.
        let (Some(kind), Some(typed)) = (stage.kind, stage.typed) else {
            continue;
        };
        let expanded = draft.expanded.get(&stage.name).cloned();
        let (declared, combination) = match expanded {
            Some(expanded) => (expanded.declared, expanded.combination),
            None => (stage.name.clone(), Vec::new()),
        };
        stages.push(RecipeStage {
            name: stage.name,
            declared,
            combination,
            kind,
            stage: typed,
            handling: stage.handling,
            edges: stage.edges,
            files: stage.files,
            span: span.unwrap_or(start),
        });
    }
    Ok(Recipe {
        path: path.to_owned(),
        text: text.to_owned(),
        description: draft.description,
        stages,
        outputs: wired
            .outputs
            .into_iter()
            .map(|(stage, path)| Output {
                span: draft
                    .source_map
                    .value(&keys(&["outputs", &stage]))
                    .unwrap_or(start),
                stage,
                path,
            })
            .collect(),
        publish: wired.publish,
        vars,
        source_map: draft.source_map,
        order: wired.order,
    })
}
