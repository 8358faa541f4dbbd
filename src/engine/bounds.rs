//! The bounds of numbers among a stage's parameters. They stand beside the parameter, as `#[schemars(extend("minimum" = 1))]` and the
//! like, and are checked from there: what reads a recipe, the schema in an editor and the reference say the same.

use std::any::TypeId;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Map, Value};

use super::params::NEUTRAL_KEY;
use super::{Problem, Stage};

/// The words of schemas for bounds.
const KEYS: [&str; 4] = ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"];

/// The bounds that a schema sets to a number.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    minimum: Option<f64>,
    maximum: Option<f64>,
    above: Option<f64>,
    below: Option<f64>,
    whole: bool,
}

impl Bounds {
    /// Those of a schema; `None` when it sets none.
    pub fn of(schema: &Value) -> Option<Self> {
        let number = |key: &str| schema.get(key).and_then(Value::as_f64);
        let whole = match schema.get("type") {
            Some(Value::Array(types)) => types.iter().any(|one| one == "integer"),
            Some(one) => one == "integer",
            None => false,
        };
        let bounds = Self {
            minimum: number("minimum"),
            maximum: number("maximum"),
            above: number("exclusiveMinimum"),
            below: number("exclusiveMaximum"),
            whole,
        };
        let all = [bounds.minimum, bounds.maximum, bounds.above, bounds.below];
        all.iter().any(Option::is_some).then_some(bounds)
    }

    fn hold(self, number: f64) -> bool {
        self.minimum.is_none_or(|bound| number >= bound)
            && self.maximum.is_none_or(|bound| number <= bound)
            && self.above.is_none_or(|bound| number > bound)
            && self.below.is_none_or(|bound| number < bound)
    }

    /// The bounds in words that go on from "a number", such as "from 0 to below 1". Empty for whole numbers from 0 on, where it goes
    /// without saying.
    pub fn words(self) -> String {
        let low = match (self.minimum, self.above) {
            (Some(bound), _) if bound == 0. && self.whole && self.maximum.is_none() => None,
            (Some(bound), _) => Some((format!("from {bound}"), format!("of at least {bound}"))),
            (_, Some(bound)) => Some((format!("above {bound}"), format!("above {bound}"))),
            _ => None,
        };
        let high = match (self.maximum, self.below) {
            (Some(bound), _) => Some((format!("to {bound}"), format!("of at most {bound}"))),
            (_, Some(bound)) => Some((format!("to below {bound}"), format!("below {bound}"))),
            _ => None,
        };
        match (low, high) {
            (Some((from, _)), Some((to, _))) if self.above.is_none() => format!("{from} {to}"),
            (Some((_, low)), Some((_, high))) => format!("{low} and {high}"),
            (Some((_, alone)), None) | (None, Some((_, alone))) => alone,
            (None, None) => String::new(),
        }
    }

    /// What was expected, as the message of a [`Problem`].
    fn expected(self) -> String {
        match (self.minimum, self.maximum, self.below) {
            (Some(bound), None, None) if self.whole => format!("expected at least {bound}"),
            (Some(bound), None, None) => format!("expected a number not below {bound}"),
            _ => format!("expected a number {}", self.words()),
        }
    }
}

/// What is wrong with a stage's parameters: numbers out of bounds, then [`Stage::check`].
pub fn check<S: Stage>(stage: &S) -> Vec<Problem> {
    check_written(stage, serde_json::to_value(stage).ok().as_ref())
}

/// [`check`] of a stage whose parameters are serialised already, if they can be.
pub(super) fn check_written<S: Stage>(stage: &S, params: Option<&Value>) -> Vec<Problem> {
    let mut problems = Vec::new();
    let schema = schema_of::<S>();
    match params {
        Some(Value::Object(params)) if schema.is_plain => {
            let bounded = schema.bounded.iter();
            for (name, own) in bounded {
                if let Some(value) = params.get(name) {
                    let at = At::Key(&At::Top, name);
                    look(own, &schema.definitions, &at, value, &mut problems);
                }
            }
        }
        Some(params) => {
            let (all, definitions) = (&schema.params, &schema.definitions);
            look(all, definitions, &At::Top, params, &mut problems);
        }
        None => {}
    }
    problems.extend(stage.check());
    problems
}

/// The schema of a kind's parameters, and what it refers to.
struct Described {
    params: Value,
    definitions: Map<String, Value>,
    /// Whether the parameters are a map of properties and nothing else.
    is_plain: bool,
    /// Those of the properties in which a bound may be, in the order of their names: in most there is none.
    bounded: Vec<(String, Value)>,
}

impl Described {
    fn new(params: Value, definitions: Map<String, Value>) -> Self {
        let others = ["$ref", "anyOf", "oneOf", "additionalProperties"];
        let is_map = |key: &&str| params.get(key).is_some_and(|value| !value.is_boolean());
        let properties = params.get("properties").and_then(Value::as_object);
        let bounded = properties.into_iter().flatten();
        let bounded = bounded.filter(|(_, own)| may_bound(own));
        let mut bounded: Vec<_> = bounded
            .map(|(name, own)| (name.clone(), own.clone()))
            .collect();
        bounded.sort_by(|a, b| a.0.cmp(&b.0));
        Self {
            is_plain: !others.iter().any(is_map),
            bounded,
            params,
            definitions,
        }
    }
}

/// Whether a schema bounds a number, or refers to another one, which may.
fn may_bound(schema: &Value) -> bool {
    match schema {
        Value::Object(map) => {
            let is_one = |key: &String| KEYS.contains(&key.as_str()) || key == "$ref";
            map.keys().any(is_one) || map.values().any(may_bound)
        }
        Value::Array(parts) => parts.iter().any(may_bound),
        _ => false,
    }
}

/// The schema of `S`, made once: a recipe may have thousands of stages.
fn schema_of<S: Stage>() -> Arc<Described> {
    static ALL: LazyLock<Mutex<HashMap<TypeId, Arc<Described>>>> = LazyLock::new(Mutex::default);
    let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
    let described = all.entry(TypeId::of::<S>()).or_insert_with(|| {
        let mut generator = SchemaGenerator::default();
        let params = <S as JsonSchema>::json_schema(&mut generator).to_value();
        let definitions = generator.take_definitions(true);
        Arc::new(Described::new(params, definitions))
    });
    Arc::clone(described)
}

/// Where a value stands among the parameters. It is written out only for a problem.
enum At<'a> {
    Top,
    Key(&'a At<'a>, &'a str),
    Index(&'a At<'a>, usize),
}

impl fmt::Display for At<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            At::Top => Ok(()),
            At::Key(At::Top, key) => f.write_str(key),
            At::Key(above, key) => write!(f, "{above}.{key}"),
            At::Index(above, index) => write!(f, "{above}[{index}]"),
        }
    }
}

/// Looks through a value by its schema. Of alternatives the one that has bounds, or parts, is meant: what fits none was refused before.
fn look(
    schema: &Value,
    definitions: &Map<String, Value>,
    at: &At<'_>,
    value: &Value,
    problems: &mut Vec<Problem>,
) {
    let name = schema.get("$ref").and_then(Value::as_str);
    let name = name.and_then(|reference| reference.rsplit('/').next());
    let schema = name
        .and_then(|name| definitions.get(name))
        .unwrap_or(schema);
    let value = value.get(NEUTRAL_KEY).unwrap_or(value);
    for key in ["anyOf", "oneOf"] {
        let parts = schema.get(key).and_then(Value::as_array);
        for part in parts.into_iter().flatten() {
            look(part, definitions, at, value, problems);
        }
    }
    match value {
        Value::Number(number) => {
            if let (Some(bounds), Some(number)) = (Bounds::of(schema), number.as_f64())
                && !bounds.hold(number)
            {
                problems.push(Problem::new(at.to_string(), bounds.expected()));
            }
        }
        Value::Array(values) => {
            if let Some(items) = schema.get("items") {
                for (index, value) in values.iter().enumerate() {
                    let at = At::Index(at, index);
                    look(items, definitions, &at, value, problems);
                }
            }
        }
        Value::Object(map) => {
            for (key, value) in map {
                let own = schema.get("properties").and_then(|known| known.get(key));
                if let Some(own) = own.or_else(|| schema.get("additionalProperties")) {
                    look(own, definitions, &At::Key(at, key), value, problems);
                }
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn bounds_in_words() {
        let words = |schema| Bounds::of(&schema).map(|bounds| (bounds.words(), bounds.expected()));
        for (schema, said, expected) in [
            (
                json!({ "type": "integer", "minimum": 1 }),
                "of at least 1",
                "expected at least 1",
            ),
            (
                json!({ "type": "number", "minimum": 0 }),
                "of at least 0",
                "expected a number not below 0",
            ),
            (
                json!({ "type": "number", "exclusiveMinimum": 0 }),
                "above 0",
                "expected a number above 0",
            ),
            (
                json!({ "type": "number", "minimum": 0, "exclusiveMaximum": 1 }),
                "from 0 to below 1",
                "expected a number from 0 to below 1",
            ),
            (
                json!({ "type": ["integer", "null"], "minimum": 1, "maximum": 9 }),
                "from 1 to 9",
                "expected a number from 1 to 9",
            ),
            (
                json!({ "type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1 }),
                "above 0 and below 1",
                "expected a number above 0 and below 1",
            ),
        ] {
            assert_eq!(words(schema), Some((said.into(), expected.into())));
        }
        assert!(words(json!({ "type": "integer" })).is_none());
        let count = Bounds::of(&json!({ "type": "integer", "minimum": 0 })).unwrap();
        assert_eq!(count.words(), "");
    }
}
