//! The choice of the modules that get a pair of matrices, by PEFT's `target_modules`, `exclude_modules`, `layers_to_transform` and
//! `layers_pattern`.

use anyhow::{Context as _, bail, ensure};
use serde_json::{Map, Value};

use super::patterns::Pattern;
use crate::ml::model::arch::Projection;
use crate::ml::model::tensors::{is_projection, projection_name};

/// The value of `target_modules` that selects every projection of the layers.
pub const ALL_LINEAR: &str = "all-linear";
/// PEFT's default for all families here that it has one for (`TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING` in `peft/utils/constants.py`).
pub const DEFAULT_TARGETS: [Projection; 2] = [Projection::Q, Projection::V];

/// Names of modules or a regular expression.
#[derive(Debug, Clone, PartialEq)]
enum Names {
    /// Whole paths, or the last parts of paths.
    Ends(Vec<String>),
    /// A regular expression that must match a whole path.
    Pattern(Box<Pattern>),
    /// Every projection of the layers.
    AllLinear,
}

impl Names {
    fn parse(value: &Value, key: &str) -> anyhow::Result<Self> {
        match value {
            Value::String(text) => Ok(Self::Pattern(Box::new(
                Pattern::whole(text).with_context(|| format!("could not use `{key}`"))?,
            ))),
            Value::Array(_) => {
                let names = strings(value);
                let names = names.with_context(|| format!("`{key}` is no list of names"))?;
                Ok(Self::Ends(names))
            }
            _ => bail!("`{key}` is {value}, expected names of modules or a regular expression"),
        }
    }

    /// `None` if the path is not selected; else whether it is selected by its whole path or a pattern, in which case
    /// `layers_to_transform` does not apply.
    fn selects(&self, path: &str) -> Option<bool> {
        match self {
            Self::Ends(names) if names.iter().any(|name| name == path) => Some(true),
            Self::Ends(names) => {
                let mut names = names.iter();
                names.any(|name| ends_with(path, name)).then_some(false)
            }
            Self::Pattern(pattern) => pattern.matches(path).then_some(true),
            Self::AllLinear => is_projection(path).then_some(true),
        }
    }
}

/// Whether the last parts of a path are `name`.
fn ends_with(path: &str, name: &str) -> bool {
    let rest = path.strip_suffix(name);
    rest.is_some_and(|rest| rest.ends_with('.'))
}

fn strings(value: &Value) -> Option<Vec<String>> {
    let items = value.as_array()?.iter();
    items.map(|item| Some(item.as_str()?.to_owned())).collect()
}

/// PEFT's decision about a module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Selection {
    /// It gets matrices.
    Yes,
    /// It gets no matrices.
    No,
    /// It is excluded, by `exclude_modules` or because it is fully trained.
    Excluded,
}

/// The settings that decide which modules get matrices.
#[derive(Debug, Clone, PartialEq)]
pub struct Targets {
    names: Names,
    exclude: Option<Names>,
    /// The modules that are fully trained.
    whole: Vec<Pattern>,
    layers: Option<Vec<i64>>,
    layers_pattern: Vec<Pattern>,
}

impl Targets {
    /// Reads the keys of `adapter_config.json`. What PEFT refuses is an error.
    pub(super) fn parse(raw: &Map<String, Value>) -> anyhow::Result<Self> {
        let some = |key: &str| raw.get(key).filter(|value| !value.is_null());
        let names = match some("target_modules") {
            None => {
                let names = DEFAULT_TARGETS.map(projection_name);
                Names::Ends(names.map(str::to_owned).to_vec())
            }
            Some(Value::String(text)) if text.to_lowercase() == ALL_LINEAR => Names::AllLinear,
            Some(value) => Names::parse(value, "target_modules")?,
        };
        let exclude = some("exclude_modules").filter(|value| match value {
            Value::String(text) => !text.is_empty(),
            Value::Array(items) => !items.is_empty(),
            _ => true,
        });
        let exclude = exclude.map(|value| Names::parse(value, "exclude_modules"));
        let whole = some("modules_to_save").and_then(strings);
        let whole = whole.unwrap_or_default().into_iter().map(|name| {
            // `re.match(rf"(^|.*\.){m}($|\..*)", path)`
            let pattern = Pattern::new(&name, r"^(?:(?:^|.*\.)", r"(?:$|\..*))");
            pattern.context("could not use `modules_to_save`")
        });
        let layers = some("layers_to_transform").map(|value| {
            let one = value.as_i64().map(|layer| vec![layer]);
            let many = || value.as_array()?.iter().map(Value::as_i64).collect();
            let layers = one.or_else(many);
            layers.with_context(|| {
                format!("`layers_to_transform` is {value}, expected numbers of layers")
            })
        });
        let layers = layers.transpose()?;
        let pattern = some("layers_pattern").map(|value| {
            let one = value.as_str().map(|name| vec![name.to_owned()]);
            let names = one.or_else(|| strings(value));
            names.with_context(|| {
                format!("`layers_pattern` is {value}, expected the name of the list of layers")
            })
        });
        let pattern = pattern.transpose()?;
        if !matches!(names, Names::Ends(_)) {
            for (key, given) in [
                ("layers_to_transform", layers.is_some()),
                ("layers_pattern", pattern.is_some()),
            ] {
                ensure!(
                    !given,
                    "`{key}` goes with a list of `target_modules` only; a regular expression names layers itself"
                );
            }
        }
        let pattern: Vec<String> = pattern.unwrap_or_default();
        let pattern: Vec<_> = pattern
            .into_iter()
            .filter(|name| !name.is_empty())
            .collect();
        ensure!(
            pattern.is_empty() || layers.is_some(),
            "`layers_pattern` needs `layers_to_transform` beside it"
        );
        let layers_pattern = pattern.iter().map(|name| {
            // `re.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", path)`
            let pattern = Pattern::new(name, r"^(?:(?:^|.*?\.)", r"\.(?<index>\d+)\.)");
            pattern.context("could not use `layers_pattern`")
        });
        Ok(Self {
            names,
            exclude: exclude.transpose()?,
            whole: whole.collect::<anyhow::Result<_>>()?,
            // As in PEFT, an empty list means all layers.
            layers: layers.filter(|layers| !layers.is_empty()),
            layers_pattern: layers_pattern.collect::<anyhow::Result<_>>()?,
        })
    }

    /// Decides about the module at `path` (`check_target_module_exists` in `peft/tuners/tuners_utils.py`).
    pub fn selection(&self, path: &str) -> Selection {
        let excluded = self.exclude.as_ref().and_then(|names| names.selects(path));
        if excluded.is_some() || self.whole.iter().any(|pattern| pattern.matches(path)) {
            return Selection::Excluded;
        }
        let matches = match (self.names.selects(path), &self.layers) {
            (None, _) => false,
            (Some(true), _) | (_, None) => true,
            (Some(false), Some(layers)) => self
                .layer(path)
                .is_some_and(|layer| layers.contains(&layer)),
        };
        if matches {
            Selection::Yes
        } else {
            Selection::No
        }
    }

    /// The number of the layer that a module is in.
    fn layer(&self, path: &str) -> Option<i64> {
        if self.layers_pattern.is_empty() {
            // `re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", path)`: the first number with two parts before it and one after it.
            let mut parts = path.split('.').skip(2).peekable();
            while let Some(part) = parts.next() {
                if parts.peek().is_some() && is_number(part) {
                    return part.parse().ok();
                }
            }
            return None;
        }
        let mut patterns = self.layers_pattern.iter();
        let found = patterns.find(|pattern| pattern.matches(path))?;
        found.number(path, "index")
    }

    /// The names of `target_modules` that select none of `paths`.
    pub fn unused<'a>(&self, paths: &(impl Iterator<Item = &'a str> + Clone)) -> Vec<&str> {
        let Names::Ends(names) = &self.names else {
            return Vec::new();
        };
        let used = |name: &str| {
            let mut paths = paths.clone();
            paths.any(|path| path == name || ends_with(path, name))
        };
        let unused = names.iter().filter(|name| !used(name));
        unused.map(String::as_str).collect()
    }

    /// Whether `exclude_modules` is given.
    pub fn excludes(&self) -> bool {
        self.exclude.is_some()
    }

    /// The value of `target_modules`, for a message.
    pub fn description(&self) -> String {
        match &self.names {
            Names::Ends(names) => {
                let names: Vec<_> = names.iter().map(|name| format!("`{name}`")).collect();
                names.join(", ")
            }
            Names::Pattern(pattern) => format!("the regular expression `{}`", pattern.text),
            Names::AllLinear => format!("`{ALL_LINEAR}`"),
        }
    }
}

fn is_number(part: &str) -> bool {
    !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit())
}
