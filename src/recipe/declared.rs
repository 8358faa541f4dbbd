//! Vars that are declared: with a type, a text for people and what they may be, in place of a bare value.
//!
//! A declaration is gone before `--set` is applied: what stays in the recipe is its default. So everything else sees values only.

use serde::Serialize;
use serde_json::Value as Json;
use serde_yaml::{Mapping, Value};

use super::draft::Draft;
use super::hints;
use super::pieces::Vars;
use super::sentence::{noun, show};
use super::source_map::{PathStep, RecipePath, child, keys};
use super::typing::json;

/// The keys of a declaration.
const KEYS: [&str; 6] = ["type", "default", "help", "choices", "minimum", "maximum"];
/// What other programs call these keys.
const OTHER_KEYS: [(&str, &str); 8] = [
    ("description", "help"),
    ("title", "help"),
    ("enum", "choices"),
    ("options", "choices"),
    ("min", "minimum"),
    ("ge", "minimum"),
    ("max", "maximum"),
    ("le", "maximum"),
];

/// What a declared var may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Type {
    String,
    Number,
    Integer,
    Boolean,
    List,
    Map,
}

const TYPES: [(&str, Type); 6] = [
    ("string", Type::String),
    ("number", Type::Number),
    ("integer", Type::Integer),
    ("boolean", Type::Boolean),
    ("list", Type::List),
    ("map", Type::Map),
];

/// What other programs call these types.
const OTHER_TYPES: [(&str, &str); 12] = [
    ("str", "string"),
    ("text", "string"),
    ("path", "string"),
    ("float", "number"),
    ("double", "number"),
    ("int", "integer"),
    ("bool", "boolean"),
    ("array", "list"),
    ("sequence", "list"),
    ("object", "map"),
    ("dict", "map"),
    ("mapping", "map"),
];

impl Type {
    fn named(name: &str) -> Option<Self> {
        let mut types = TYPES.iter();
        types.find(|(own, _)| *own == name).map(|(_, own)| *own)
    }

    /// The type of a value that is given without a declaration.
    fn of(value: &Value) -> Option<Self> {
        match value {
            Value::Null => None,
            Value::Bool(_) => Some(Self::Boolean),
            Value::Number(number) if number.is_f64() => Some(Self::Number),
            Value::Number(_) => Some(Self::Integer),
            Value::String(_) => Some(Self::String),
            Value::Sequence(_) => Some(Self::List),
            Value::Mapping(_) | Value::Tagged(_) => Some(Self::Map),
        }
    }

    fn name(self) -> &'static str {
        let mut types = TYPES.iter();
        types
            .find(|(_, own)| *own == self)
            .map_or("", |(name, _)| name)
    }

    /// The type in a sentence.
    fn noun(self) -> &'static str {
        match self {
            Self::String => "a text",
            Self::Number => "a number",
            Self::Integer => "a whole number",
            Self::Boolean => "`true` or `false`",
            Self::List => "a list",
            Self::Map => "a map",
        }
    }

    fn fits(self, value: &Value) -> bool {
        match self {
            Self::String => value.is_string(),
            Self::Number => value.as_f64().is_some_and(f64::is_finite),
            Self::Integer => value.is_i64() || value.is_u64(),
            Self::Boolean => value.is_bool(),
            Self::List => value.is_sequence(),
            Self::Map => value.is_mapping(),
        }
    }
}

/// A var as the recipe has it.
pub(crate) struct Declaration {
    name: String,
    /// The type; none for a var that is given as a bare value.
    declared: Option<Type>,
    default: Option<Value>,
    help: Option<String>,
    choices: Vec<Value>,
    minimum: Option<f64>,
    maximum: Option<f64>,
}

/// A var of a recipe, for people and programs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Var {
    /// Its name.
    pub name: String,
    /// Its type: that of its declaration, or of its value.
    #[serde(rename = "type")]
    pub type_name: Option<&'static str>,
    /// Its value now; none if it has no default and nobody gave one.
    pub value: Option<Json>,
    /// What it is where nobody gives another value.
    pub default: Option<Json>,
    /// Where the value comes from: `default`, `--set ..`, `--profile ..` or another file; none without a value.
    pub from: Option<String>,
    /// What it is for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
    /// The values that it may have, if it is declared with such.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub choices: Vec<Json>,
    /// The smallest number that it may be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub minimum: Option<f64>,
    /// The largest number that it may be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub maximum: Option<f64>,
}

/// Takes declarations out of the section `vars`: their defaults stay in their places, or nothing where there is no default. Mistakes in
/// declarations are told.
pub(crate) fn take(draft: &mut Draft, recipe: &mut Value) -> Vec<Declaration> {
    let Some(Value::Mapping(vars)) = recipe.get_mut("vars") else {
        return Vec::new();
    };
    let mut all = Vec::new();
    for (name, value) in vars.iter_mut() {
        let Some(name) = name.as_str() else { continue };
        let path = keys(&["vars", name]);
        let read = match value.as_mapping() {
            Some(map) if is_declaration(map) => Some(declaration(draft, name, &path, map)),
            _ => None,
        };
        let Some(declaration) = read else {
            all.push(bare(name, value));
            continue;
        };
        *value = declaration.default.clone().unwrap_or_default();
        let default = child(&path, "default");
        draft.source_map.moved(&path, &default);
        all.push(declaration);
    }
    all
}

fn bare(name: &str, value: &Value) -> Declaration {
    Declaration {
        name: name.to_owned(),
        declared: None,
        default: Some(value.clone()),
        help: None,
        choices: Vec::new(),
        minimum: None,
        maximum: None,
    }
}

/// Whether a map declares a var. Any other map is a value.
fn is_declaration(map: &Mapping) -> bool {
    let of_type = map.get("type").and_then(Value::as_str);
    let known = |key: &Value| key.as_str().is_some_and(|key| KEYS.contains(&key));
    let all_known = map.keys().all(known);
    match of_type {
        Some(name) if Type::named(name).is_some() => true,
        Some(_) => all_known && map.len() > 1,
        None => all_known && map.contains_key("help"),
    }
}

fn declaration(draft: &mut Draft, name: &str, path: &RecipePath, map: &Mapping) -> Declaration {
    let mut read = bare(name, &Value::Null);
    read.default = None;
    let before = draft.errors.len();
    for key in map.keys().filter_map(Value::as_str) {
        if !KEYS.contains(&key) {
            let other = OTHER_KEYS.iter().find(|(other, _)| *other == key);
            let hint = match other.map(|(_, own)| *own).or(hints::nearest(key, KEYS)) {
                Some(known) => format!("did you mean `{known}`?"),
                None => format!("a var has {}", hints::list(KEYS)),
            };
            let message = format!("unknown key `{key}` of the var `{name}`");
            draft.key_error(&child(path, key), message, Some(hint));
        }
    }
    if let Some(Value::String(written)) = map.get("type") {
        read.declared = Type::named(written);
        if read.declared.is_none() {
            let lower = written.to_lowercase();
            let other = OTHER_TYPES.iter().find(|(other, _)| *other == lower);
            let names = TYPES.map(|(name, _)| name);
            let hint = match other.map(|(_, own)| *own).or(hints::nearest(&lower, names)) {
                Some(known) => format!("did you mean `{known}`?"),
                None => format!("the types are {}", hints::list(names)),
            };
            let message = format!("the var `{name}` has the unknown type `{written}`");
            draft.value_error(&child(path, "type"), message, Some(hint));
        }
    } else {
        let message = format!("the var `{name}` is declared without a `type`");
        let names = TYPES.map(|(name, _)| name);
        let hint = format!("as in `type: number`; the types are {}", hints::list(names));
        draft.key_error(path, message, Some(hint));
    }
    match map.get("help") {
        None => {}
        Some(Value::String(text)) => read.help = Some(text.trim().to_owned()),
        Some(other) => {
            let message = format!(
                "`help` of the var `{name}` must be a text, not {}",
                noun(other)
            );
            draft.value_error(&child(path, "help"), message, None);
        }
    }
    for (key, bound) in [
        ("minimum", &mut read.minimum),
        ("maximum", &mut read.maximum),
    ] {
        let Some(value) = map.get(key) else { continue };
        let numbers = matches!(read.declared, None | Some(Type::Number | Type::Integer));
        match value.as_f64().filter(|number| number.is_finite()) {
            Some(number) if numbers => *bound = Some(number),
            found => {
                let message = match found {
                    Some(_) => format!("`{key}` is for numbers, and the var `{name}` is none"),
                    None => {
                        format!(
                            "`{key}` of the var `{name}` must be a number, not {}",
                            noun(value)
                        )
                    }
                };
                draft.value_error(&child(path, key), message, None);
            }
        }
    }
    match map.get("choices") {
        None => {}
        Some(Value::Sequence(choices)) if !choices.is_empty() => {
            for (index, choice) in choices.iter().enumerate() {
                let mut at = child(path, "choices");
                at.push(PathStep::Index(index));
                if let Some((message, hint)) = read.fault(choice, "a choice of the var") {
                    draft.value_error(&at, message, hint);
                }
            }
            read.choices.clone_from(choices);
        }
        Some(_) => {
            let message = format!("`choices` of the var `{name}` must be a list of values");
            draft.value_error(&child(path, "choices"), message, None);
        }
    }
    if let Some(default) = map.get("default").filter(|default| !default.is_null()) {
        match read.fault(default, "the default of the var") {
            Some((message, hint)) => draft.value_error(&child(path, "default"), message, hint),
            None => read.default = Some(default.clone()),
        }
    }
    if draft.errors.len() > before {
        // One mistake is enough: nothing is told of what it is used for.
        draft.broken.insert(path.clone());
    }
    read
}

/// The vars of a recipe that extends another one. A bare value for one that is declared there is its new default.
pub(crate) fn extended(base: Vec<Declaration>, mut own: Vec<Declaration>) -> Vec<Declaration> {
    let mut all = Vec::new();
    for mut based in base {
        match own.iter().position(|one| one.name == based.name) {
            None => all.push(based),
            Some(index) => {
                let given = own.remove(index);
                if given.declared.is_none() {
                    based.default = given.default;
                    all.push(based);
                } else {
                    all.push(given);
                }
            }
        }
    }
    all.extend(own);
    all
}

/// Tells of values that are not what the declarations of their vars say and, if values are needed, of declared vars that have none, all
/// as one mistake.
pub(crate) fn check(
    draft: &mut Draft,
    declarations: &[Declaration],
    vars: &Vars,
    needs_values: bool,
) {
    let mut missing: Vec<&Declaration> = Vec::new();
    for declaration in declarations {
        let path = keys(&["vars", &declaration.name]);
        if declaration.declared.is_none() || draft.broken.contains(&path) {
            continue;
        }
        match vars.get(&declaration.name) {
            None | Some(Value::Null) => {
                draft.broken.insert(path);
                missing.push(declaration);
            }
            Some(value) => {
                if let Some((message, hint)) = declaration.fault(value, "the var") {
                    draft.value_error(&path, message, hint);
                    draft.broken.insert(path);
                }
            }
        }
    }
    let Some(first) = missing.first().filter(|_| needs_values) else {
        return;
    };
    let names = missing.iter().map(|one| one.name.as_str());
    let sets: Vec<String> = missing
        .iter()
        .map(|one| format!("--set vars.{}=..", one.name))
        .collect();
    let sets = sets.join(" ");
    let (message, hint) = match (&missing[..], &first.help) {
        ([_], Some(help)) => (
            format!("the var `{}` has no value", first.name),
            format!("give one by `{sets}`: {help}"),
        ),
        ([_], None) => (
            format!("the var `{}` has no value", first.name),
            format!("give one by `{sets}`; it is {}", first.noun()),
        ),
        _ => (
            format!("the vars {} have no values", hints::list(names)),
            format!("give them by `{sets}`; `pipeline show RECIPE --vars` tells what they are for"),
        ),
    };
    draft.key_error(&keys(&["vars", &first.name]), message, Some(hint));
}

impl Declaration {
    fn noun(&self) -> &'static str {
        self.declared.map_or("a value", Type::noun)
    }

    /// What is wrong with a value, and what to do; `subject` stands before the name.
    fn fault(&self, value: &Value, subject: &str) -> Option<(String, Option<String>)> {
        let name = &self.name;
        let help = || Some(format!("`{name}`: {}", self.help.as_deref()?));
        if let Some(declared) = self.declared.filter(|declared| !declared.fits(value)) {
            let found = match value {
                Value::Number(_) if declared == Type::Integer => show(value),
                other => noun(other).to_owned(),
            };
            let message = format!(
                "{subject} `{name}` must be {}, not {found}",
                declared.noun()
            );
            let quotes = || {
                let text = super::sentence::scalar(value)?;
                (declared == Type::String).then(|| format!("a text in quotes: `\"{text}\"`"))
            };
            return Some((message, quotes().or_else(help)));
        }
        if !self.choices.is_empty() && !self.choices.contains(value) {
            let known: Vec<String> = self.choices.iter().map(show).collect();
            let message = format!(
                "{subject} `{name}` must be {}, not {}",
                one_of(&known),
                show(value)
            );
            let texts = self.choices.iter().filter_map(Value::as_str);
            let near = value.as_str().and_then(|text| hints::nearest(text, texts));
            let near = near.map(|near| format!("did you mean `{near}`?"));
            return Some((message, near.or_else(help)));
        }
        let number = value.as_f64()?;
        let bound = match (self.minimum, self.maximum) {
            (Some(least), _) if number < least => format!("at least {least}"),
            (_, Some(most)) if number > most => format!("at most {most}"),
            _ => return None,
        };
        let message = format!("{subject} `{name}` must be {bound}, not {}", show(value));
        Some((message, help()))
    }

    /// The var for people.
    pub(crate) fn shown(&self, draft: &Draft, vars: &Vars) -> Var {
        let path = keys(&["vars", &self.name]);
        let value = vars.get(&self.name).filter(|value| !value.is_null());
        let as_json = |value: &Value| json(value, || path.clone()).ok();
        let of_type = self.declared.or_else(|| Type::of(value?));
        Var {
            name: self.name.clone(),
            type_name: of_type.map(Type::name),
            value: value.and_then(as_json),
            default: self
                .default
                .as_ref()
                .filter(|value| !value.is_null())
                .and_then(as_json),
            from: value.map(|_| draft.source_of(&path)),
            help: self.help.clone(),
            choices: self.choices.iter().filter_map(as_json).collect(),
            minimum: self.minimum,
            maximum: self.maximum,
        }
    }
}

/// Values that are written already, with `or` before the last.
fn one_of(values: &[String]) -> String {
    match values {
        [] => String::new(),
        [one] => one.clone(),
        [all @ .., last] => format!("{} or {last}", all.join(", ")),
    }
}
