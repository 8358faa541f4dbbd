//! Every parameter's default against that of the library whose name it has. `tests/python/dump_defaults.py` writes the golden file.

use std::fs;

use pipeline::stages::KINDS;
use serde_json::Value;

use crate::support::program::repository;

/// A parameter's name here and in the class.
type Renamed = (&'static str, &'static str);
/// A kind, the class that has its parameters, whose it is, and parameters that have another name there.
type Class = (&'static str, &'static str, &'static str, &'static [Renamed]);

const CLASSES: [Class; 10] = [
    ("train_orpo", "ORPOConfig", "TRL", &[]),
    ("train_dpo", "DPOConfig", "TRL", &[]),
    ("train_cpo", "CPOConfig", "TRL", &[]),
    ("train_kto", "KTOConfig", "TRL", &[]),
    ("train_reward", "RewardConfig", "TRL", &[]),
    ("train_sft", "SFTConfig", "TRL", &[]),
    ("evaluate", "ORPOConfig", "TRL", &[]),
    ("tokenize", "ORPOConfig", "TRL", &[]),
    ("attach_lora", "LoraConfig", "PEFT", &[]),
    (
        "quantize",
        "BitsAndBytesConfig",
        "transformers",
        &[
            ("scheme", "bnb_4bit_quant_type"),
            ("double_quant", "bnb_4bit_use_double_quant"),
            ("compute_dtype", "bnb_4bit_compute_dtype"),
        ],
    ),
];

/// Parameters of ours that the class doesn't know but another of the library's does.
const ELSEWHERE: [(&str, &str, &str); 4] = [
    ("train_orpo", "padding_free", "SFTConfig"),
    ("train_cpo", "padding_free", "SFTConfig"),
    ("train_kto", "padding_free", "SFTConfig"),
    ("train_reward", "padding_free", "SFTConfig"),
];

fn parameters(schema: &Value, kind: &str) -> Vec<(String, Value, String)> {
    let params = &schema["$defs"][kind];
    let properties = params["properties"].as_object().unwrap();
    let one = |(name, schema): (&String, &Value)| {
        let text = schema["description"].as_str().unwrap_or_default();
        // A flag that is not written while it is off.
        let off = schema["type"] == serde_json::json!(["boolean", "string"]);
        let absent = if off { Value::Bool(false) } else { Value::Null };
        let default = schema.get("default").cloned().unwrap_or(absent);
        (name.clone(), default, text.replace('\n', " "))
    };
    let complete = &schema["$defs"]["complete_stage"]["properties"][kind];
    let required = complete["required"].as_array().cloned().unwrap_or_default();
    let optional = properties
        .iter()
        .filter(|(name, _)| !required.contains(&Value::String((*name).clone())));
    optional.map(one).collect()
}

/// Whether two defaults mean the same: nothing given is nothing given, and 1 is 1.0.
fn same(ours: &Value, theirs: &Value) -> bool {
    let empty = |value: &Value| match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(items) => items.is_empty(),
        _ => false,
    };
    match (ours.as_f64(), theirs.as_f64()) {
        (Some(a), Some(b)) => (a - b).abs() <= 1e-12 * b.abs(),
        _ => ours == theirs || empty(ours) && empty(theirs),
    }
}

fn named(value: &Value) -> String {
    match value {
        Value::Null => "none".to_owned(),
        Value::String(text) => format!("`{text}`"),
        other => format!("`{other}`"),
    }
}

#[test]
fn a_default_is_the_library_s_or_the_reference_says_what_that_is() {
    let text = fs::read_to_string(repository().join("tests/golden/defaults.json")).unwrap();
    let defaults: Value = serde_json::from_str(&text).unwrap();
    let schema = pipeline::recipe::schema(KINDS);
    let (mut compared, mut wrong) = (0, Vec::new());
    for (kind, class, library, renamed) in CLASSES {
        for (name, ours, description) in parameters(&schema, kind) {
            let there = renamed.iter().find(|(own, _)| *own == name);
            let there = there.map_or(name.as_str(), |(_, there)| there);
            let elsewhere = ELSEWHERE
                .iter()
                .find(|(k, n, _)| (*k, *n) == (kind, name.as_str()));
            let class = elsewhere.map_or(class, |(_, _, class)| class);
            let of = if library.ends_with('s') { "'" } else { "'s" };
            let mark = format!("{library}{of} default: ");
            let Some(theirs) = defaults[class].get(there) else {
                if description.contains(&mark) {
                    wrong.push(format!(
                        "{kind}.{name} names a default that {class} doesn't have"
                    ));
                }
                continue;
            };
            compared += 1;
            let marked = description.contains(&format!("{mark}{}", named(theirs)));
            if same(&ours, theirs) {
                if description.contains(&mark) {
                    wrong.push(format!(
                        "{kind}.{name} has the default of {library}, and its text says that it differs"
                    ));
                }
            } else if !marked {
                wrong.push(format!(
                    "{kind}.{name} is {ours} here; its text lacks \"{mark}{}\"",
                    named(theirs)
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(compared > 80, "only {compared} defaults were compared");
}

#[test]
fn the_comparison_can_fail() {
    assert!(same(&Value::from(1), &Value::from(1.0)) && same(&Value::Null, &serde_json::json!([])));
    assert!(!same(&Value::from(true), &Value::Null) && !same(&Value::from(2), &Value::Null));
    assert!(!same(
        &Value::from("adamw_torch"),
        &Value::from("adamw_torch_fused")
    ));
}
