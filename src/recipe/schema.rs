//! The JSON Schema of recipes, from the kinds' params structs: for editors, and for whoever writes recipes by a program.
//!
//! What it says beside types comes from the same places as everything else: texts from doc comments, bounds and examples from
//! attributes beside the parameters ([`crate::engine::Bounds`]).

use schemars::{JsonSchema as _, SchemaGenerator};
use serde_json::{Map, Value, json};

use crate::engine::{Bounds, Handling, Kind, sorted_keys};

use super::parameters::{Parameters, description, paragraphs, params};

/// The name of the schema, by which others may refer to it. It is not an address.
const ID: &str = "urn:pipeline:recipe:1";

/// The JSON Schema of recipes with these kinds (draft 2020-12). The same kinds give the same text.
pub fn schema(kinds: &[Kind]) -> Value {
    let mut generator = SchemaGenerator::default();
    let handling = Handling::json_schema(&mut generator).to_value();
    let handling = handling.get("properties").and_then(Value::as_object);
    let mut stage = Map::new();
    let mut complete = Map::new();
    let mut defaults = Map::new();
    let mut own = Map::new();
    let mut handling: Map<String, Value> = handling.cloned().unwrap_or_default();
    handling.insert("matrix".to_owned(), matrix());
    handling.insert("when".to_owned(), when());
    let names: Vec<&String> = handling.keys().collect();
    let mut alone = Map::new();
    for kind in kinds {
        let needed = needed(kind);
        own.insert(kind.name.to_owned(), parameters(kind, &mut generator));
        let reference = json!({ "$ref": format!("#/$defs/{}", kind.name) });
        stage.insert(kind.name.to_owned(), reference.clone());
        defaults.insert(kind.name.to_owned(), reference);
        if !needed.is_empty() {
            let known = needed.iter().map(|name| (name.clone(), json!({})));
            let known: Map<String, Value> = known.collect();
            let needed = json!({ "type": "object", "properties": known, "required": needed });
            complete.insert(kind.name.to_owned(), needed);
        }
        let mut beside: Vec<&str> = names.iter().map(|name| name.as_str()).collect();
        beside.insert(0, kind.name);
        let only = json!({ "propertyNames": { "enum": beside } });
        alone.insert(kind.name.to_owned(), only);
    }
    let names = json!(names);
    stage.extend(handling);
    let mut definitions = generator.take_definitions(true);
    definitions.extend(own);
    definitions.insert(
        "stage".to_owned(),
        json!({
            "title": "stage",
            "description": "One stage: its kind, and under it the kind's parameters. Settings of the runner stand beside the kind.",
            "type": "object",
            "properties": stage,
            "additionalProperties": false,
            "if": { "propertyNames": { "enum": names } },
            "then": { "const": "a kind", "errorMessage": "A stage needs a kind, such as `train_sft`, with its parameters below." },
            "dependentSchemas": alone,
        }),
    );
    definitions.insert(
        "complete_stage".to_owned(),
        json!({
            "description": "What a stage has to have, if no `defaults` give it.",
            "type": "object",
            "properties": complete,
        }),
    );
    for (name, definition) in &mut definitions {
        let title = json!(name);
        tidy(definition);
        if let Some(map) = definition.as_object_mut() {
            map.entry("title").or_insert(title);
        }
    }
    sorted_keys(recipe(
        &Value::Object(defaults),
        &Value::Object(definitions),
    ))
}

/// The schema of the whole file.
fn recipe(defaults: &Value, definitions: &Value) -> Value {
    let has = |key: &str| json!({ "properties": { key: {} }, "required": [key] });
    let mut schema = json!({
        "title": "pipeline recipe",
        "description": "Stages of a fine-tuning pipeline. A parameter that names a stage is an edge of the graph.",
        "type": "object",
        "properties": {
            "version": { "description": "The version of the recipe language.", "const": 1, "examples": [1] },
            "description": { "description": "What the recipe is for.", "type": "string" },
            "extends": {
                "description": "Another recipe, whose vars, defaults, stages, outputs and profiles this one has too, where it has none of the same name: a path, `git+https://host/owner/repo@rev#path` or `hf://owner/repo@rev/path`.",
                "type": "string",
                "minLength": 1,
                "examples": ["base.yaml"],
            },
            "overrides": {
                "description": "Changes to the recipe that this one extends: from paths, as for `--set`, to values.",
                "type": "object",
                "examples": [{ "stages.tuned.train_orpo.beta": 0.2 }],
            },
            "include": include(),
            "vars": {
                "description": "Values to use as `${name}` in defaults, stages and outputs; `--set vars.name=value` replaces one. A map with a `type` declares a var.",
                "type": ["object", "null"],
                "propertyNames": { "pattern": r"^[\p{L}_][\p{L}\p{N}_]*$" },
                "additionalProperties": var(),
                "examples": [{ "seed": 42, "base": "HuggingFaceTB/SmolLM2-135M-Instruct" }],
            },
            "defaults": {
                "description": "Parameters for all stages of a kind. A value in a stage wins.",
                "type": ["object", "null"],
                "properties": defaults,
                "additionalProperties": false,
                "examples": [{ "train_orpo": { "learning_rate": 0.000_008 } }],
            },
            "stages": {
                "description": "The stages by name. The key under the name is the kind. Their order in the file doesn't matter.",
                "type": "object",
                "minProperties": 1,
                "propertyNames": { "pattern": r"^[\p{L}\p{N}_-]+$" },
                "additionalProperties": { "$ref": "#/$defs/stage" },
            },
            "outputs": {
                "description": "Where results are put for people to use: the name of a stage, and a folder inside the project.",
                "type": ["object", "null"],
                "additionalProperties": { "type": "string", "minLength": 1 },
                "examples": [{ "merged": "out/my-model" }],
            },
            "publish": publish(),
            "profiles": {
                "description": "Sets of changes by name, for `--profile NAME`: from paths, as for `--set`, to values.",
                "type": ["object", "null"],
                "additionalProperties": { "type": "object" },
                "examples": [{ "smoke": { "stages.tuned.train_orpo.max_steps": 3 } }],
            },
        },
        "patternProperties": {
            "^x-": { "description": "Yours: `pipeline` does not read it. A place for values that YAML's anchors repeat." },
        },
        "required": ["version"],
        "anyOf": [has("stages"), has("extends"), has("include")],
        "additionalProperties": false,
        // Required parameters may come from `defaults`, which a schema can't follow; without any, they stand in the stage.
        "if": { "anyOf": [has("defaults"), has("extends")] },
        "else": {
            "properties": {
                "stages": { "type": "object", "additionalProperties": { "$ref": "#/$defs/complete_stage" } },
            },
        },
    });
    tidy(&mut schema);
    if let Some(map) = schema.as_object_mut() {
        let draft = "https://json-schema.org/draft/2020-12/schema";
        map.insert("$schema".to_owned(), json!(draft));
        map.insert("$id".to_owned(), json!(ID));
        map.insert("$defs".to_owned(), definitions.clone());
    }
    schema
}

/// A var. Whatever is no declaration is a value, so nothing is forbidden.
fn var() -> Value {
    json!({
        "description": "A value, or a declaration: a map with a `type`.",
        "type": ["object", "array", "string", "number", "boolean", "null"],
        "properties": {
            "type": { "description": "What the var is: `string`, `number`, `integer`, `boolean`, `list` or `map`.", "examples": ["number"] },
            "default": { "description": "Its value where nobody gives another one. Without a default it has to be given by `--set`." },
            "help": { "description": "What it is for." },
            "choices": { "description": "The values that it may have." },
            "minimum": { "description": "The smallest number that it may be." },
            "maximum": { "description": "The largest number that it may be." },
        },
    })
}

/// The section `include`.
fn include() -> Value {
    json!({
        "description": "Other recipes, whose stages this one has under the name of the include, as in `prep.chats`.",
        "type": ["object", "null"],
        "propertyNames": { "pattern": r"^[\p{L}\p{N}_-]+$" },
        "additionalProperties": {
            "description": "A path, `git+https://host/owner/repo@rev#path` or `hf://owner/repo@rev/path`; or a map with it and vars.",
            "type": ["string", "object"],
            "properties": {
                "recipe": { "description": "The recipe.", "type": "string", "minLength": 1 },
                "vars": { "description": "Values for its vars.", "type": ["object", "null"] },
            },
            "required": ["recipe"],
            "additionalProperties": false,
        },
        "examples": [{ "prep": "shared/prep.yaml" }],
    })
}

/// The key `when` beside a kind.
fn when() -> Value {
    json!({
        "description": "Whether the stage is part of the recipe: an expression over vars and the values of its matrix. What takes from a stage that is left out needs a `when` as well.",
        "type": ["string", "boolean"],
        "examples": ["beta > 0.1 and not smoke"],
    })
}

/// The key `matrix` beside a kind.
fn matrix() -> Value {
    json!({
        "description": "Makes one stage for each combination of values. `${axis}` in the parameters is the value of the combination. A stage that takes from this one is made once for each, too.",
        "type": "object",
        "minProperties": 1,
        "propertyNames": { "pattern": r"^[\p{L}_][\p{L}\p{N}_]*$" },
        "additionalProperties": {
            "description": "The values of an axis: a list, or a map from names to values.",
            "type": ["array", "object"],
            "items": { "type": ["string", "number", "boolean"] },
            "minItems": 1,
            "minProperties": 1,
        },
        "examples": [{ "beta": [0.05, 0.1, 0.2], "seed": [1, 2] }],
    })
}

/// The section `publish`.
fn publish() -> Value {
    json!({
        "description": "Where `pipeline publish` puts results: the name of a stage that makes a model, an adapter or a dataset, and a repository of the Hugging Face hub. `run` publishes nothing.",
        "type": ["object", "null"],
        "additionalProperties": {
            "type": "object",
            "properties": {
                "repo": { "description": "The repository, as `owner/name`. It is made if it isn't there.", "type": "string", "minLength": 3 },
                "private": { "description": "Whether only its owner may see it.", "type": "boolean", "default": false },
                "revision": { "description": "The branch. It is made if it isn't there.", "type": "string", "minLength": 1, "default": "main" },
                "license": { "description": "The licence, by the hub's word for it, such as `apache-2.0`. By default that of the base model.", "type": "string", "minLength": 1 },
                "create_pr": { "description": "Whether the change is proposed instead of made.", "type": "boolean", "default": false },
            },
            "required": ["repo"],
            "additionalProperties": false,
        },
    })
}

/// The parameters that a stage of the kind has to give.
fn needed(kind: &Kind) -> Vec<String> {
    let parameters = Parameters::from_kind(kind).0.into_iter();
    let needed = parameters.filter(|parameter| parameter.required && !parameter.implied);
    needed.map(|parameter| parameter.name).collect()
}

/// The schema of a kind's parameters, without a word on which of them are needed.
fn parameters(kind: &Kind, generator: &mut SchemaGenerator) -> Value {
    let mut schema = params(kind, generator);
    let about = paragraphs(&description(&schema));
    let Some(map) = schema.as_object_mut() else {
        return schema;
    };
    map.remove("required");
    map.insert("title".to_owned(), json!(kind.name));
    map.insert("type".to_owned(), json!(["object", "null"]));
    let makes = format!("{about}\n\nMakes: `{}`.", kind.output);
    map.insert("description".to_owned(), json!(makes));
    let properties = map.get_mut("properties").and_then(Value::as_object_mut);
    for (name, property) in properties.into_iter().flatten() {
        if let Some(property) = property.as_object_mut() {
            property.insert("title".to_owned(), json!(name));
        }
    }
    schema
}

/// Makes a schema fit for people and for strict readers: texts in Markdown with defaults and bounds, one list for the values of an enum,
/// none of Rust's formats of numbers, and vars wherever something else than any text is wanted.
fn tidy(schema: &mut Value) {
    let Some(map) = schema.as_object_mut() else {
        return;
    };
    for key in ["properties", "patternProperties"] {
        let properties = map.get_mut(key).and_then(Value::as_object_mut);
        for property in properties.into_iter().flat_map(Map::values_mut) {
            tidy(property);
            allow_vars(property);
        }
    }
    for key in ["items", "additionalProperties"] {
        if let Some(inner) = map.get_mut(key).filter(|inner| inner.is_object()) {
            tidy(inner);
            allow_vars(inner);
        }
    }
    for key in ["anyOf", "oneOf", "allOf"] {
        let parts = map.get_mut(key).and_then(Value::as_array_mut);
        parts.into_iter().flatten().for_each(tidy);
    }
    one_list(map);
    let format = map.get("format").and_then(Value::as_str);
    if format.is_some_and(|format| {
        format.starts_with("uint") || format.starts_with("int") || format == "double"
    }) {
        map.remove("format");
    }
    tell(map);
}

/// A choice between texts that each have a description, as one list.
fn one_list(map: &mut Map<String, Value>) {
    let Some(parts) = map.get("oneOf").and_then(Value::as_array) else {
        return;
    };
    let values: Option<Vec<&Value>> = parts.iter().map(|part| part.get("const")).collect();
    let Some(values) = values else { return };
    let texts: Vec<String> = parts
        .iter()
        .map(|part| paragraphs(&description(part)))
        .collect();
    let (values, texts) = (json!(values), json!(texts));
    map.remove("oneOf");
    map.insert("type".to_owned(), json!("string"));
    map.insert("enum".to_owned(), values);
    map.insert("enumDescriptions".to_owned(), texts.clone());
    map.insert("markdownEnumDescriptions".to_owned(), texts);
}

/// The description as running text, and for editors with what else there is to know.
fn tell(map: &mut Map<String, Value>) {
    let Some(text) = map.get("description").and_then(Value::as_str) else {
        return;
    };
    let text = paragraphs(text);
    let mut told = text;
    let mut more = Vec::new();
    match map.get("default") {
        None | Some(Value::Null | Value::Object(_)) => {}
        Some(Value::String(default)) => more.push(format!("Default: `{default}`.")),
        Some(default) => more.push(format!("Default: `{default}`.")),
    }
    let schema = Value::Object(map.clone());
    if let Some(words) = Bounds::of(&schema).map(Bounds::words)
        && !words.is_empty()
    {
        more.push(format!("A number {words}."));
    }
    if map.contains_key("x-neutral") {
        more.push("Changing it re-runs nothing.".to_owned());
    }
    if !more.is_empty() {
        told = format!("{told}\n\n{}", more.join(" "));
    }
    // Some editors show the one, some the other.
    map.insert("description".to_owned(), json!(told));
    map.insert("markdownDescription".to_owned(), json!(told));
}

/// What is told about a parameter, which stays outside of alternatives, where editors look for it.
const TOLD: [&str; 7] = [
    "title",
    "description",
    "markdownDescription",
    "default",
    "examples",
    "x-neutral",
    "x-artifact",
];

/// Lets `${name}` stand where something else than any text is wanted.
fn allow_vars(schema: &mut Value) {
    let Some(map) = schema.as_object_mut() else {
        return;
    };
    let text = |kind: &Value| kind == "string";
    let any_text = match map.get("type") {
        Some(Value::Array(kinds)) => kinds.iter().any(text),
        Some(kind) => text(kind),
        None => !["enum", "const", "$ref", "anyOf", "oneOf", "allOf"]
            .iter()
            .any(|key| map.contains_key(*key)),
    };
    let bound = ["enum", "const", "pattern", "format"];
    if any_text && !bound.iter().any(|key| map.contains_key(*key)) {
        return;
    }
    let var = r"\$\{";
    // Bounds are for numbers and the pattern is for texts, so both can stand side by side.
    let with_text = match map.get("type") {
        Some(kind) if !bound.iter().any(|key| map.contains_key(*key)) => match kind {
            Value::Array(kinds) => Some([&kinds[..], &[json!("string")]].concat()),
            kind => Some(vec![kind.clone(), json!("string")]),
        },
        _ => None,
    };
    if let Some(kinds) = with_text {
        map.insert("type".to_owned(), json!(kinds));
        map.insert("pattern".to_owned(), json!(var));
        return;
    }
    let mut outer = Map::new();
    for key in TOLD {
        if let Some(value) = map.remove(key) {
            outer.insert(key.to_owned(), value);
        }
    }
    let var = json!({ "type": "string", "pattern": var });
    // Alternatives stand side by side, so that a reader finds the one that was meant.
    let mut parts = match map.remove("anyOf") {
        Some(Value::Array(parts)) if map.is_empty() => parts,
        Some(parts) => {
            map.insert("anyOf".to_owned(), parts);
            vec![Value::Object(std::mem::take(map))]
        }
        None => vec![Value::Object(std::mem::take(map))],
    };
    parts.push(var);
    outer.insert("anyOf".to_owned(), json!(parts));
    *map = outer;
}
