//! Reads recipes: from YAML text to typed stages, with the position of every mistake.
//!
//! The steps are: text, then a YAML value ([`read`](self::read)), with what it extends and includes ([`compose`]) and `--set`
//! ([`set`](self::set)), then `${vars}` ([`vars`](self::vars)) and one stage for each combination of a [`matrix`], then what stages leave out ([`defaults`](self::defaults), [`implied`](self::implied)), then typed stages
//! ([`stage`](self::stage)), then edges and outputs ([`wiring`](self::wiring)).
//! Every step continues after a mistake, so that [`load`] reports all of them at once. The module is given the list of kinds as a
//! value, and does not depend on what a stage does. [`schema`] and [`reference`] describe recipes; [`graph`] draws one.

mod combination;
mod compose;
mod declared;
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
mod pieces;
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
mod when;
mod wiring;
mod words;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use crate::engine::{AnyStage, Handling, Kind};

pub use combination::AxisValue;
use compose::{Changes, Composed, Composer};
pub use compose::{Includes, NoIncludes};
pub use declared::Var;
use draft::Draft;
pub use error::{RecipeError, RecipeErrors};
use pieces::namespace;
pub use pieces::{LeftOut, RecipeFile};
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
    /// The stages that their `when` leaves out.
    pub left_out: Vec<LeftOut>,
    /// The vars.
    pub vars: Vec<Var>,
    /// Its files: first its own, then those that it extends and includes.
    pub files: Vec<RecipeFile>,
    /// The names of vars that something uses.
    used_vars: BTreeSet<String>,
    source_map: Arc<SourceMap>,
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
    /// Which of the recipe's files it is written in, so that it starts at that one's folder; none for one that came from `--set` and
    /// starts at the current folder.
    pub start: Option<usize>,
}

/// A stage's result that is put where people use it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// The stage.
    pub stage: String,
    /// The path: relative, and inside the folder it starts at.
    pub path: String,
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
        self.source_map.value(&self.steps(path)?)
    }

    /// Where the name of a stage is written.
    pub fn span_of_stage(&self, stage: &RecipeStage) -> SourceSpan {
        self.source_map.stage(&stage.name)
    }

    /// Where stages are defined, by their names and for people.
    pub fn places(&self) -> impl Fn(&str) -> String + Send + Sync + use<> {
        let (source_map, path) = (Arc::clone(&self.source_map), self.path.clone());
        let files = self.files.clone();
        move |stage: &str| place(&files, &path, source_map.stage(stage))
    }

    /// The steps of a path, in which the names of included stages have dots.
    fn steps(&self, path: &str) -> Option<RecipePath> {
        let included = path.split_once('.').and_then(|(section, rest)| {
            let stages = self.stages.iter().map(|stage| stage.name.as_str());
            let stages = stages.filter(|name| namespace(name).is_some());
            let longest = stages
                .filter(|name| {
                    let rest = rest.strip_prefix(name);
                    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
                })
                .max_by_key(|name| name.len())?;
            let rest = rest.strip_prefix(longest)?.trim_start_matches('.');
            let mut steps = keys(&[section, longest]);
            if !rest.is_empty() {
                steps.extend(source_map::parse(rest).ok()?);
            }
            Some(steps)
        });
        match included {
            Some(steps) => Some(steps),
            None => source_map::parse(path).ok(),
        }
    }

    /// A place for people, as in `r.yaml:12:3`.
    pub fn place(&self, span: SourceSpan) -> String {
        place(&self.files, &self.path, span)
    }

    /// The line at a place.
    pub fn line(&self, span: SourceSpan) -> Option<&str> {
        let mut lines = self.files.get(span.file)?.text.lines();
        lines.nth(span.line.checked_sub(1)?)
    }

    /// The stage name that is most like `name`, for a did-you-mean.
    pub fn suggest(&self, name: &str) -> Option<&str> {
        let names = self.stages.iter().map(|stage| stage.name.as_str());
        let declared = self.stages.iter().map(|stage| stage.declared.as_str());
        hints::nearest(name, declared.chain(names))
    }
}

/// A place in one of the files of the recipe at `path`.
fn place(files: &[RecipeFile], path: &Path, span: SourceSpan) -> String {
    let file = files.get(span.file).map(|file| file.shown.as_path());
    format!("{}:{span}", file.unwrap_or(path).display())
}

/// Reads a recipe file, which includes no other, applies `overrides`, and types and wires it. All mistakes come back at once.
pub fn load(
    path: &Path,
    overrides: &[Override],
    kinds: &'static [Kind],
) -> Result<Recipe, RecipeErrors> {
    load_with(path, overrides, kinds, &NoIncludes)
}

/// [`load`] for a recipe that may include others.
pub fn load_with(
    path: &Path,
    overrides: &[Override],
    kinds: &'static [Kind],
    includes: &dyn Includes,
) -> Result<Recipe, RecipeErrors> {
    parse_with(path, &text_of(path)?, overrides, kinds, includes)
}

/// The vars of a recipe file with their values, whether all that need one have one or not.
pub fn load_vars(
    path: &Path,
    overrides: &[Override],
    kinds: &'static [Kind],
    includes: &dyn Includes,
) -> Result<Vec<Var>, RecipeErrors> {
    let (mut draft, files) = drafted(path, &text_of(path)?, kinds);
    let composed =
        Composer::new(includes, &files).compose(&mut draft, Changes::Own(overrides), false);
    match composed {
        Some(composed) if draft.errors.is_empty() => Ok(shown(&composed, &draft)),
        _ => Err(draft.into_errors()),
    }
}

/// The vars for people.
fn shown(composed: &Composed, draft: &Draft) -> Vec<Var> {
    let declarations = composed.declarations.iter();
    declarations
        .map(|declaration| declaration.shown(draft, &composed.vars))
        .collect()
}

/// The text of a recipe's file, without a mark at its start.
pub fn text_of(path: &Path) -> Result<String, RecipeErrors> {
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
    if is_of_rows(path) {
        let name = path.display();
        return Err(whole(
            format!("`{name}` is a file of rows, not a recipe"),
            Some(&format!(
                "`pipeline init --data {name}` writes a recipe for it"
            )),
        ));
    }
    let bytes = read_bounded(path).map_err(|error| {
        let hint = match error.kind() {
            std::io::ErrorKind::NotFound => Some("give the path of a recipe, a YAML file"),
            std::io::ErrorKind::IsADirectory => Some("give the path of a file in that folder"),
            _ => None,
        };
        whole(format!("could not read the recipe: {error}"), hint)
    })?;
    String::from_utf8(bytes).map_err(|error| {
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
    })
}

/// The most groups, and the most stages of one, that a sentence names.
const MOST_IMPLIED: usize = 5;
/// The stages of a recipe by name, with their kinds, as far as a text can be read that is perhaps being written. Of a recipe that can be
/// read wholly also those that a matrix makes.
pub fn stage_names(text: &str, kinds: &'static [Kind]) -> Vec<(String, Option<String>)> {
    if text.contains(matrix::MATRIX)
        && let Ok(recipe) = parse(Path::new(""), text, &[], kinds)
    {
        return names_of(recipe);
    }
    let Ok(recipe) = yaml::<serde_yaml::Value>(text) else {
        return Vec::new();
    };
    let stages = recipe.get("stages").and_then(serde_yaml::Value::as_mapping);
    let stages = stages.into_iter().flatten();
    let named = stages.filter_map(|(name, stage)| {
        let keys = stage.as_mapping().into_iter().flat_map(|map| map.keys());
        let mut keys = keys.filter_map(serde_yaml::Value::as_str);
        let kind = keys.find(|key| !stage::is_beside(key)).map(str::to_owned);
        Some((name.as_str()?.to_owned(), kind))
    });
    named.collect()
}

/// The names of a recipe's stages, those of a matrix with and without their combinations, and their kinds.
pub fn names_of(recipe: Recipe) -> Vec<(String, Option<String>)> {
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
    names
}

/// Advice for a kind that doesn't exist.
pub fn suggest_kind(name: &str, kinds: &[Kind]) -> String {
    hints::kind(name, kinds)
}

/// The longest recipe, in bytes. Longer is only what never ends, such as a device.
const LONGEST: u64 = 64 << 20;

/// Whether the name of a file that is there says that it holds rows.
fn is_of_rows(path: &Path) -> bool {
    let ends = path.extension().map(std::ffi::OsStr::to_ascii_lowercase);
    let of_rows = ["jsonl", "ndjson", "parquet", "csv", "tsv", "arrow"];
    ends.is_some_and(|ends| of_rows.iter().any(|known| ends == *known)) && path.is_file()
}

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

/// [`load`] for a text that is already read and includes nothing; `path` is for messages.
pub fn parse(
    path: &Path,
    text: &str,
    overrides: &[Override],
    kinds: &'static [Kind],
) -> Result<Recipe, RecipeErrors> {
    parse_with(path, text, overrides, kinds, &NoIncludes)
}

/// A draft of a text, and the files of the recipe, of which this is the first.
fn drafted(path: &Path, text: &str, kinds: &'static [Kind]) -> (Draft, pieces::Files) {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let files = Rc::new(RefCell::new(vec![RecipeFile {
        path: path.to_owned(),
        shown: path.to_owned(),
        text: text.into(),
        fetched: None,
    }]));
    (Draft::new(&files, kinds), files)
}

fn parse_with(
    path: &Path,
    text: &str,
    overrides: &[Override],
    kinds: &'static [Kind],
    includes: &dyn Includes,
) -> Result<Recipe, RecipeErrors> {
    let (mut draft, files) = drafted(path, text, kinds);
    let composed =
        Composer::new(includes, &files).compose(&mut draft, Changes::Own(overrides), true);
    let Some(mut composed) = composed else {
        return Err(draft.into_errors());
    };
    let value = &mut composed.value;
    matrix::expand(&mut draft, &composed.vars, value);
    defaults::fill(&mut draft, value);
    implied::fill(&mut draft, value);
    let stages = stage::read(&mut draft, value);
    let wired = wiring::wire(&mut draft, stages, value);
    if !draft.errors.is_empty() {
        return Err(draft.into_errors());
    }
    let mut stages = Vec::with_capacity(wired.stages.len());
    for stage in wired.stages {
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
        });
    }
    let vars = shown(&composed, &draft);
    let files = files.borrow().clone();
    Ok(Recipe {
        path: path.to_owned(),
        text: files
            .first()
            .map(|file| file.text.to_string())
            .unwrap_or_default(),
        description: draft.description,
        stages,
        outputs: wired
            .outputs
            .into_iter()
            .map(|(stage, path)| Output { stage, path })
            .collect(),
        publish: wired.publish,
        left_out: draft.left_out,
        vars,
        files,
        used_vars: draft.used_vars,
        source_map: Arc::new(draft.source_map),
        order: wired.order,
    })
}
