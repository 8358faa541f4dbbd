//! A recipe on its way: what is known so far, and the mistakes found.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::rc::Rc;

use serde_yaml::Value;

use crate::engine::Kind;

use super::combination::Expanded;
use super::error::{RecipeError, RecipeErrors};
use super::foreign;
use super::hints;
use super::parameters::Parameters;
use super::source_map::{PathStep, RecipePath, SourceMap, SourceSpan, child, keys, lines};

/// The keys a recipe may have.
pub(crate) const TOP: [&str; 8] = [
    "version",
    "description",
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

pub(crate) struct Draft<'a> {
    file: &'a Path,
    lines: Vec<&'a str>,
    pub(crate) kinds: &'static [Kind],
    pub(crate) source_map: SourceMap,
    pub(crate) description: Option<String>,
    pub(crate) errors: Vec<RecipeError>,
    /// What `--set` replaced, with the argument.
    pub(crate) set: BTreeMap<RecipePath, String>,
    /// Values that took in a var that `--set` replaced, with the argument.
    pub(crate) through_vars: BTreeMap<RecipePath, String>,
    /// Values that are known to be wrong, so that their types are not looked at.
    pub(crate) broken: BTreeSet<RecipePath>,
    /// Parameters that nobody gave and the rest of the recipe implies.
    pub(crate) implied: BTreeSet<RecipePath>,
    /// The stages that a matrix made, by name.
    pub(crate) expanded: BTreeMap<String, Expanded>,
    /// Whether a key at the top is unknown, so that the one that is missing may be meant by it.
    pub(crate) has_unknown_keys: bool,
    /// What vars, matrices and `--set` may still put in.
    left: (usize, usize),
    /// What is known of kinds that occurred.
    parameters: BTreeMap<&'static str, Rc<Parameters>>,
}

impl<'a> Draft<'a> {
    pub(crate) fn new(file: &'a Path, text: &'a str, kinds: &'static [Kind]) -> Self {
        Self {
            file,
            lines: lines(text),
            kinds,
            source_map: SourceMap::default(),
            description: None,
            errors: Vec::new(),
            set: BTreeMap::new(),
            through_vars: BTreeMap::new(),
            broken: BTreeSet::new(),
            implied: BTreeSet::new(),
            expanded: BTreeMap::new(),
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

    pub(crate) fn push(
        &mut self,
        message: String,
        span: Option<SourceSpan>,
        origin: Option<String>,
        hint: Option<String>,
    ) {
        self.errors.push(RecipeError {
            file: self.file.to_owned(),
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
        let path = &self.source_map.written(path);
        if let Some(origin) = around(&self.set, path) {
            let origin = origin.clone();
            return self.push(message, None, Some(origin), hint);
        }
        let through = around(&self.through_vars, path);
        let hint = match (hint, through) {
            (Some(hint), Some(origin)) => Some(format!("{hint}; the value comes from `{origin}`")),
            (None, Some(origin)) => Some(format!("the value comes from `{origin}`")),
            (hint, None) => hint,
        };
        self.push(message, span, None, hint);
    }

    /// Whether the value at `path`, or something in it, is known to be wrong.
    pub(crate) fn is_broken(&self, path: &RecipePath) -> bool {
        let next = self.broken.range(path.clone()..).next();
        next.is_some_and(|broken| broken.starts_with(path))
    }

    /// Whether the value at `path` was given, wholly or in part, on the command line.
    pub(crate) fn is_from_command_line(&self, path: &RecipePath) -> bool {
        let path = &self.source_map.written(path);
        around(&self.set, path).is_some() || around(&self.through_vars, path).is_some()
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
                line: 1,
                column: 1,
                length: 1,
            };
            let span = self.source_map.first().unwrap_or(span);
            let message = format!("this is a config of {}, not a recipe", program.name());
            let hint = format!(
                "`pipeline import {} {}` makes a recipe of it. Where its keys are in a recipe (`training` is train_sft, train_orpo or \
                 train_dpo):{}",
                program.argument(),
                self.file.display(),
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

    /// All mistakes, by line.
    pub(crate) fn into_errors(mut self) -> RecipeErrors {
        self.errors.sort_by_key(|error| {
            let span = error.span.map(|span| (span.line, span.column));
            (error.origin.is_some(), span)
        });
        let mut seen = BTreeSet::new();
        self.errors
            .retain(|error| seen.insert((error.span, error.origin.clone(), error.message.clone())));
        let more = self.errors.len().saturating_sub(MAX_ERRORS);
        if more > 0 {
            self.errors.truncate(MAX_ERRORS);
            self.push(format!("and {more} more mistakes"), None, None, None);
        }
        // Only now: thousands of mistakes may stand in one long line.
        for error in &mut self.errors {
            let line = error
                .span
                .and_then(|span| self.lines.get(span.line.checked_sub(1)?));
            error.source_line = line.map(|line| (*line).to_owned());
        }
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

/// The entry of `map` at `path` or above it.
fn around<'m>(map: &'m BTreeMap<RecipePath, String>, path: &RecipePath) -> Option<&'m String> {
    (1..=path.len())
        .rev()
        .find_map(|length| map.get(path.get(..length)?))
}
