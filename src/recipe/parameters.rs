//! The parameters of a kind, as its schema tells them.

use schemars::SchemaGenerator;
use serde_json::{Map, Value};

use crate::engine::{FILE_KEY, Implied, Kind, NEUTRAL_KEY, STAGE_KEY};

/// One parameter, as the schema tells it.
pub(crate) struct Parameter {
    pub(crate) name: String,
    /// Whether a stage can't be without it; the recipe may still leave it out where it is implied.
    pub(crate) required: bool,
    /// Whether the recipe may leave it out, because the rest of it says which stage is meant.
    pub(crate) implied: bool,
    pub(crate) description: String,
    pub(crate) schema: Value,
}

impl Parameter {
    /// The first sentence of its description.
    pub(crate) fn summary(&self) -> &str {
        let end = self.description.find(". ").map(|stop| stop + 1);
        let text = end.and_then(|end| self.description.get(..end));
        text.unwrap_or(&self.description)
    }

    /// The noun of the artifact that the parameter takes from another stage.
    pub(crate) fn artifact(&self) -> Option<&str> {
        self.schema.get("x-artifact")?.as_str()
    }
}

/// The parameters of a kind.
pub(crate) struct Parameters(pub(crate) Vec<Parameter>);

impl Parameters {
    /// The parameters in the order of the struct.
    pub(crate) fn from_kind(kind: &Kind) -> Self {
        let mut parameters = Self::read(&params(kind, &mut SchemaGenerator::default()));
        for parameter in &mut parameters.0 {
            let implied =
                |implied: &Implied| implied.parameter == parameter.name && implied.with.is_empty();
            parameter.implied = kind.implied.iter().any(implied);
        }
        parameters
    }

    /// The properties of a schema.
    pub(crate) fn read(schema: &Value) -> Self {
        let required = schema.get("required").and_then(Value::as_array);
        let properties = schema.get("properties").and_then(Value::as_object);
        let mut parameters: Vec<Parameter> = properties
            .into_iter()
            .flatten()
            .map(|(name, schema)| Parameter {
                name: name.clone(),
                required: required.is_some_and(|all| all.iter().any(|one| one == name)),
                implied: false,
                description: paragraphs(&description(schema)),
                schema: schema.clone(),
            })
            .collect();
        // The order of serde_json's maps depends on the features of other crates.
        parameters.sort_by(|a, b| (!a.required, &a.name).cmp(&(!b.required, &b.name)));
        Self(parameters)
    }

    /// Whether there is a parameter called `name`.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.0.iter().any(|parameter| parameter.name == name)
    }

    /// The noun of the artifact that the parameter `name` takes.
    pub(crate) fn artifact(&self, name: &str) -> Option<String> {
        let found = self.0.iter().find(|parameter| parameter.name == name)?;
        found.artifact().map(str::to_owned)
    }
}

/// The schema of a kind's parameters, with defaults as people write them.
pub(crate) fn params(kind: &Kind, generator: &mut SchemaGenerator) -> Value {
    let mut schema = (kind.schema)(generator).to_value();
    let properties = schema.get_mut("properties").and_then(Value::as_object_mut);
    for property in properties.into_iter().flat_map(Map::values_mut) {
        if let Some(default) = property.get_mut("default") {
            unmark(default);
        }
    }
    schema
}

/// Takes the engine's marks off a default.
fn unmark(value: &mut Value) {
    for key in [NEUTRAL_KEY, STAGE_KEY, FILE_KEY] {
        if let Some(inner) = value.get_mut(key) {
            *value = inner.take();
        }
    }
}

/// What a schema says of itself.
pub(crate) fn description(schema: &Value) -> String {
    let text = schema.get("description").and_then(Value::as_str);
    text.unwrap_or_default().to_owned()
}

/// A doc comment as running text: lines of a paragraph are joined.
pub(crate) fn paragraphs(text: &str) -> String {
    let paragraphs = text.split("\n\n").map(|paragraph| {
        let lines: Vec<&str> = paragraph.lines().map(str::trim).collect();
        lines.join(" ")
    });
    paragraphs.collect::<Vec<_>>().join("\n\n")
}

/// The definition that a schema refers to, or the schema itself.
pub(crate) fn resolve<'s>(schema: &'s Value, definitions: &'s Map<String, Value>) -> &'s Value {
    let name = schema.get("$ref").and_then(Value::as_str);
    let name = name.and_then(|reference| reference.rsplit('/').next());
    name.and_then(|name| definitions.get(name))
        .unwrap_or(schema)
}
