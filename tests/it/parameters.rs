//! The parameters of stages as they stand in fingerprints. Another spelling of the same would make every result of yesterday stale.

use std::sync::Arc;

use pipeline::stages::kind;
use serde::Deserialize;
use serde_json::{Map, Value, json};

/// Parameters as a recipe has them, and what a run put into the record of the stage, with a stage's name in place of the digest of its
/// result.
#[derive(Deserialize)]
struct Case {
    kind: String,
    version: u32,
    given: Value,
    fingerprint: Value,
}

/// Serialised parameters without what is neutral.
fn counted(value: Value) -> Option<Value> {
    match value {
        Value::Object(map) if map.contains_key("$neutral") => None,
        Value::Object(map) => {
            if let Some(stage) = map.get("$stage") {
                return Some(json!({ "$content": stage }));
            }
            let entries = map.into_iter();
            let entries = entries.filter_map(|(key, value)| Some((key, counted(value)?)));
            Some(Value::Object(entries.collect::<Map<_, _>>()))
        }
        scalar => Some(scalar),
    }
}

#[test]
fn what_a_fingerprint_has_of_the_parameters_stays() {
    let cases: Vec<Case> = serde_json::from_str(include_str!("parameters.json")).unwrap();
    assert_eq!(cases.len(), 6);
    for case in cases {
        let kind = kind(&case.kind).unwrap();
        let stage = (kind.parse)(case.given).unwrap();
        let counted = counted(Arc::unwrap_or_clone(stage.params().unwrap())).unwrap();
        assert_eq!(
            counted, case.fingerprint,
            "`{}` has other parameters than before; raise its VERSION if they mean something else",
            case.kind
        );
        assert_eq!(kind.version, case.version, "{}", case.kind);
    }
}
