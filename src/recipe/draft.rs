//! A recipe on its way: what is known so far, and the mistakes found.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::rc::Rc;

use serde_yaml::Value;

use crate::engine::Kind;

use super::combination::Expanded;
use super::error::{RecipeError, RecipeErrors};
use super::foreign;
use super::hints;
use super::parameters::Parameters;
use super::pieces::{Change, Files, LeftOut, Namespace, Origin};
use super::source_map::{
    MOST_HOPS, PathStep, RecipePath, SourceMap, SourceSpan, child, keys, lines,
};

/// The keys a recipe may have.
pub(crate) const TOP: [&str; 11] = [
    "version",
    "description",
    "extends",
    "overrides",
    "include",
    "vars",
    "defaults",
    "stages",
    "outputs",
    "publish",
    "profiles",
];
/// Keys at the top that begin so are the user's own, such as values for YAML's anchors.
const OWN: &str = "x-";
/// More mistakes than anybody reads.
const MAX_ERRORS: usize = 100;
/// The most that vars, matrices and `--set` may put in altogether: values, and bytes of texts.
const MOST_PUT_IN: (usize, usize) = (200_000, 16 << 20);

pub(crate) struct Draft {
    /// Which of the files this is.
    pub(crate) file: usize,
    pub(crate) files: Files,
    pub(crate) kinds: &'static [Kind],
    pub(crate) source_map: SourceMap,
    pub(crate) description: Option<String>,
    pub(crate) errors: Vec<RecipeError>,
    /// What `--set` or an including recipe replaced, with where that was given.
    pub(crate) set: BTreeMap<RecipePath, Origin>,
    /// Values that took in a var that was replaced so, with where that was given.
    pub(crate) through_vars: BTreeMap<RecipePath, Origin>,
    /// Values that are known to be wrong, so that their types are not looked at.
    pub(crate) broken: BTreeSet<RecipePath>,
    /// Parameters that nobody gave and the rest of the recipe implies.
    pub(crate) implied: BTreeSet<RecipePath>,
    /// The stages that a matrix made, by name.
    pub(crate) expanded: BTreeMap<String, Expanded>,
    /// The vars of included recipes, by the names before their stages' names.
    pub(crate) namespaces: BTreeMap<String, Namespace>,
    /// Vars that something uses.
    pub(crate) used_vars: BTreeSet<String>,
    /// The stages that their `when` leaves out.
    pub(crate) left_out: Vec<LeftOut>,
    /// Changes to the stages of included recipes, by the names of the includes.
    pub(crate) routed: BTreeMap<String, Vec<Change>>,
    /// Whether a key at the top is unknown, so that the one that is missing may be meant by it.
    pub(crate) has_unknown_keys: bool,
    /// What vars, matrices and `--set` may still put in.
    pub(crate) left: (usize, usize),
    /// What is known of kinds that occurred.
    parameters: BTreeMap<&'static str, Rc<Parameters>>,
}

impl Draft {
    /// A draft of the last of the files.
    pub(crate) fn new(files: &Files, kinds: &'static [Kind]) -> Self {
        Self {
            file: files.borrow().len().saturating_sub(1),
            files: Rc::clone(files),
            kinds,
            source_map: SourceMap::default(),
            description: None,
            errors: Vec::new(),
            set: BTreeMap::new(),
            through_vars: BTreeMap::new(),
            broken: BTreeSet::new(),
            implied: BTreeSet::new(),
            expanded: BTreeMap::new(),
            namespaces: BTreeMap::new(),
            used_vars: BTreeSet::new(),
            left_out: Vec::new(),
            routed: BTreeMap::new(),
            has_unknown_keys: false,
            left: MOST_PUT_IN,
            parameters: BTreeMap::new(),
        }
    }

    /// Whether there are so few mistakes that advice is worth its time.
    pub(crate) fn gives_advice(&self) -> bool {
        self.errors.len() < 10 * MAX_ERRORS
    }

    /// Takes what a value costs from what may still be put in; a sentence when that is not enough.
    pub(crate) fn spend(&mut self, value: &Value) -> Result<(), String> {
        let (mut values, mut bytes) = (0, 0);
        cost(value, &mut values, &mut bytes);
        self.spend_on(values, bytes)
    }

    /// [`Draft::spend`] on so many values and bytes of texts.
    pub(crate) fn spend_on(&mut self, values: usize, bytes: usize) -> Result<(), String> {
        let (values_left, bytes_left) = self.left;
        match (
            values_left.checked_sub(values),
            bytes_left.checked_sub(bytes),
        ) {
            (Some(values), Some(bytes)) => {
                self.left = (values, bytes);
                Ok(())
            }
            _ => Err(format!(
                "vars, matrices and `--set` insert more than {} values or {} MiB of text",
                MOST_PUT_IN.0,
                MOST_PUT_IN.1 >> 20
            )),
        }
    }

    /// The parameters of a kind, made once.
    pub(crate) fn parameters(&mut self, kind: &Kind) -> Rc<Parameters> {
        let own = self.parameters.entry(kind.name);
        Rc::clone(own.or_insert_with(|| Rc::new(Parameters::from_kind(kind))))
    }

    /// How messages call the file.
    pub(crate) fn shown(&self) -> PathBuf {
        let files = self.files.borrow();
        let file = files.get(self.file).map(|file| file.shown.clone());
        file.unwrap_or_default()
    }

    /// A place for a sentence, as in `r.yaml:3:9`.
    pub(crate) fn place(&self, span: SourceSpan) -> String {
        let files = self.files.borrow();
        let file = files
            .get(span.file)
            .map(|file| file.shown.display().to_string());
        format!("{}:{span}", file.unwrap_or_default())
    }

    pub(crate) fn push(
        &mut self,
        message: String,
        span: Option<SourceSpan>,
        origin: Option<String>,
        hint: Option<String>,
    ) {
        let file = span.map_or(self.file, |span| span.file);
        let files = self.files.borrow();
        let file = files.get(file).map(|file| file.shown.clone());
        drop(files);
        self.errors.push(RecipeError {
            file: file.unwrap_or_default(),
            message,
            span,
            origin,
            hint,
            source_line: None,
        });
    }

    /// A mistake in the value at `path`.
    pub(crate) fn value_error(&mut self, path: &RecipePath, message: String, hint: Option<String>) {
        self.error(path, self.source_map.value(path), message, hint);
    }

    /// A mistake in the key at `path`.
    pub(crate) fn key_error(&mut self, path: &RecipePath, message: String, hint: Option<String>) {
        self.error(path, self.source_map.key(path), message, hint);
    }

    fn error(
        &mut self,
        path: &RecipePath,
        span: Option<SourceSpan>,
        message: String,
        hint: Option<String>,
    ) {
        let made = match path.get(1) {
            Some(PathStep::Key(name)) if self.expanded.contains_key(name) => Some(name.as_str()),
            _ => None,
        };
        let hint = match (hint, made) {
            (Some(hint), Some(name)) => Some(format!("{hint} (in `{name}`)")),
            (None, Some(name)) => Some(format!("it is so in `{name}`")),
            (hint, None) => hint,
        };
        if let Some(origin) = self.origin_in(&self.set, path) {
            let origin = origin.text.clone();
            return self.push(message, None, Some(origin), hint);
        }
        let through = self.origin_in(&self.through_vars, path);
        let through = through.map(|origin| &origin.text);
        let hint = match (hint, through) {
            (Some(hint), Some(origin)) => Some(format!("{hint}; the value comes from `{origin}`")),
            (None, Some(origin)) => Some(format!("the value comes from `{origin}`")),
            (hint, None) => hint,
        };
        self.push(message, span, None, hint);
    }

    /// Whether the value at `path`, or something in it, is known to be wrong.
    pub(crate) fn is_broken(&self, path: &RecipePath) -> bool {
        if self.broken.is_empty() {
            return false;
        }
        let next = self.broken.range(path.clone()..).next();
        next.is_some_and(|broken| broken.starts_with(path))
    }

    /// Where the value at `path` was given, wholly or in part, if not where it is written.
    pub(crate) fn origin(&self, path: &RecipePath) -> Option<&Origin> {
        let set = self.origin_in(&self.set, path);
        set.or_else(|| self.origin_in(&self.through_vars, path))
    }

    /// The entry of a map for the value at `path` or for one around it; what was filled in from elsewhere is looked for there.
    fn origin_in<'m>(
        &self,
        map: &'m BTreeMap<RecipePath, Origin>,
        path: &RecipePath,
    ) -> Option<&'m Origin> {
        if map.is_empty() {
            return None;
        }
        let mut path = path.clone();
        for _ in 0..MOST_HOPS {
            let found = around(map, &path);
            match (found, self.source_map.hop(&path)) {
                (Some((length, origin)), Some((filled, _))) if length >= filled => {
                    return Some(origin);
                }
                (_, Some((_, next))) => path = next,
                (found, None) => return found.map(|(_, origin)| origin),
            }
        }
        None
    }

    /// Where the value of a var comes from, for people.
    pub(crate) fn source_of(&self, path: &RecipePath) -> String {
        if let Some(origin) = self.origin(path) {
            return origin.text.clone();
        }
        let written = self.source_map.written(path);
        let steps: Vec<&str> = written
            .iter()
            .map_while(|step| match step {
                PathStep::Key(key) => Some(key.as_str()),
                PathStep::Index(_) => None,
            })
            .collect();
        match steps[..] {
            ["profiles", name, ..] => format!("--profile {name}"),
            ["overrides", ..] => "overrides".to_owned(),
            _ => "default".to_owned(),
        }
    }

    /// Checks the keys at the top. Whether there is something to go on with.
    pub(crate) fn top(&mut self, value: &Value) -> bool {
        let Value::Mapping(map) = value else {
            let (message, span) = match value {
                Value::Null => ("the recipe is empty", None),
                _ => ("a recipe is a map", self.source_map.value(&Vec::new())),
            };
            let hint = "begin with `version: 1`, then `stages:`".to_owned();
            self.push(message.to_owned(), span, None, Some(hint));
            return false;
        };
        if let Some(program) = foreign::recognise(map) {
            let span = SourceSpan {
                file: self.file,
                line: 1,
                column: 1,
                length: 1,
            };
            let span = self.source_map.first().unwrap_or(span);
            let message = format!("this is a config of {}, not a recipe", program.name());
            let hint = format!(
                "`pipeline import {} {}` makes a recipe of it. Where its keys are in a recipe (`training` is the kind \
                 of the training, such as train_sft):{}",
                program.argument(),
                self.shown().display(),
                foreign::table(program, map)
            );
            self.push(message, Some(span), None, Some(hint));
            return false;
        }
        for key in map.keys().filter_map(Value::as_str) {
            if !TOP.contains(&key) && !key.starts_with(OWN) {
                self.has_unknown_keys = true;
                let message = format!("unknown key `{key}`");
                let hint = match hints::nearest(key, TOP) {
                    Some(known) => format!("did you mean `{known}`?"),
                    None if self.kinds.iter().any(|kind| kind.name == key) => {
                        format!(
                            "put it under `stages:` and a name, as in `my_stage: {{ {key}: {{ .. }} }}`"
                        )
                    }
                    None => format!("a recipe has {}", hints::list(TOP)),
                };
                self.key_error(&keys(&[key]), message, Some(hint));
            }
        }
        let version = keys(&["version"]);
        match map.get("version") {
            None => self.push(
                "the recipe has no `version`".to_owned(),
                None,
                None,
                Some("begin with `version: 1`".to_owned()),
            ),
            Some(one) if one.as_u64() == Some(1) => {}
            Some(other) => {
                let message = format!("unknown version {}", super::sentence::show(other));
                let hint = Some("this program reads `version: 1`".to_owned());
                self.value_error(&version, message, hint);
            }
        }
        match map.get("description") {
            None => {}
            Some(Value::String(text)) => self.description = Some(text.clone()),
            Some(_) => {
                self.value_error(
                    &keys(&["description"]),
                    "`description` must be a text".to_owned(),
                    None,
                );
            }
        }
        true
    }

    /// The map under a top key, empty when the key is missing; other values are mistakes.
    pub(crate) fn section<'v>(
        &mut self,
        value: &'v Value,
        name: &str,
    ) -> Vec<(String, RecipePath, &'v Value)> {
        let path = keys(&[name]);
        match value.get(name) {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Mapping(map)) => map
                .iter()
                .filter_map(|(key, value)| Some((key.as_str()?.to_owned(), value)))
                .map(|(key, value)| (key.clone(), child(&path, &key), value))
                .collect(),
            Some(other) => {
                let found = super::sentence::noun(other);
                let hint = match name {
                    "stages" => {
                        "each stage has a name in place of a dash: `pairs: { import_dataset: { .. } }`"
                    }
                    "vars" => "as in `vars: { seed: 42 }`",
                    "include" => "as in `include: { prep: shared/prep.yaml }`",
                    "overrides" => "from paths to values, as in `overrides: { vars.seed: 1 }`",
                    "profiles" => {
                        "as in `profiles: { smoke: { stages.tuned.train_orpo.max_steps: 3 } }`"
                    }
                    _ => {
                        "as in `outputs: { merged: out/merged }`: the name of a stage and a folder"
                    }
                };
                let message = format!("`{name}` must be a map, not {found}");
                self.value_error(&path, message, Some(hint.to_owned()));
                Vec::new()
            }
        }
    }

    /// All mistakes, by file and line.
    pub(crate) fn into_errors(mut self) -> RecipeErrors {
        self.errors.sort_by_key(|error| {
            let span = error.span.map(|span| (span.file, span.line, span.column));
            (error.origin.is_some(), span)
        });
        let mut seen = BTreeSet::new();
        self.errors.retain(|error| {
            let file = error.file.clone();
            seen.insert((
                file,
                error.span,
                error.origin.clone(),
                error.message.clone(),
            ))
        });
        let more = self.errors.len().saturating_sub(MAX_ERRORS);
        if more > 0 {
            self.errors.truncate(MAX_ERRORS);
            self.push(format!("and {more} more mistakes"), None, None, None);
        }
        // Only now: thousands of mistakes may stand in one long line.
        let files = self.files.borrow();
        let texts: Vec<Vec<&str>> = files.iter().map(|file| lines(&file.text)).collect();
        for error in &mut self.errors {
            let line = error
                .span
                .and_then(|span| texts.get(span.file)?.get(span.line.checked_sub(1)?));
            error.source_line = line.map(|line| (*line).to_owned());
        }
        drop(texts);
        drop(files);
        RecipeErrors(self.errors)
    }
}

/// Counts a value's nodes and the bytes of its texts.
fn cost(value: &Value, values: &mut usize, bytes: &mut usize) {
    *values += 1;
    match value {
        Value::String(text) => *bytes += text.len(),
        Value::Sequence(list) => list.iter().for_each(|value| cost(value, values, bytes)),
        Value::Mapping(map) => {
            for (key, value) in map {
                cost(key, values, bytes);
                cost(value, values, bytes);
            }
        }
        _ => {}
    }
}

/// The entry of `map` at `path` or above it, and how long its path is.
fn around<'m, T>(map: &'m BTreeMap<RecipePath, T>, path: &RecipePath) -> Option<(usize, &'m T)> {
    (1..=path.len())
        .rev()
        .find_map(|length| Some((length, map.get(path.get(..length)?)?)))
}
