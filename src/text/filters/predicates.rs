//! jinja2's tests.

use minijinja::value::ValueKind;
use minijinja::{Environment, Error, State, Value};

use super::python::{self, compare, is_callable, is_dict, is_float, is_list, is_namespace};

/// Tests of the engine that jinja2 does not have.
const FOREIGN: [&str; 4] = ["int", "safe", "startingwith", "endingwith"];

pub(super) fn install(environment: &mut Environment<'static>) {
    for name in FOREIGN {
        environment.remove_test(name);
    }
    environment.add_test("iterable", is_iterable);
    environment.add_test("sequence", is_sequence);
    environment.add_test("mapping", is_dict);
    environment.add_test("callable", is_callable);
    environment.add_test("number", |value: &Value| {
        matches!(value.kind(), ValueKind::Number | ValueKind::Bool)
    });
    environment.add_test("integer", |value: &Value| {
        value.kind() == ValueKind::Number && !is_float(value)
    });
    environment.add_test("float", is_float);
    environment.add_test("lower", |state: &State, value: &Value| {
        has_case(state, value, char::is_lowercase, char::is_uppercase)
    });
    environment.add_test("upper", |state: &State, value: &Value| {
        has_case(state, value, char::is_uppercase, char::is_lowercase)
    });
    for (names, test) in [
        (
            ["lt", "lessthan", "<"],
            (|order| order.is_lt()) as fn(std::cmp::Ordering) -> bool,
        ),
        (["le", "le", "<="], |order| order.is_le()),
        (["gt", "greaterthan", ">"], |order| order.is_gt()),
        (["ge", "ge", ">="], |order| order.is_ge()),
    ] {
        for name in names {
            environment.add_test(name, move |a: &Value, b: &Value| -> Result<bool, Error> {
                compare(a, b).map(test)
            });
        }
    }
}

fn is_iterable(value: &Value) -> bool {
    match value.kind() {
        ValueKind::Undefined
        | ValueKind::String
        | ValueKind::Bytes
        | ValueKind::Seq
        | ValueKind::Iterable => true,
        _ => is_dict(value),
    }
}

/// What has a length and items in Python: texts, lists, tuples, dicts and ranges, and no view of a dict.
fn is_sequence(value: &Value) -> bool {
    match value.kind() {
        ValueKind::Undefined | ValueKind::String | ValueKind::Bytes | ValueKind::Seq => true,
        ValueKind::Iterable => is_list(value),
        _ => is_dict(value) && !is_namespace(value),
    }
}

/// Python's `str.islower` and `str.isupper`: at least one letter of the wanted case and none of the other.
fn has_case(
    state: &State,
    value: &Value,
    wanted: fn(char) -> bool,
    other: fn(char) -> bool,
) -> Result<bool, Error> {
    let text = python::text(state, value)?;
    Ok(text.chars().any(wanted) && !text.chars().any(other))
}
