//! Operators that the engine computes in another way than Python, as functions that [`super::super::dialect`] writes in their place.

use std::cmp::Ordering;

use minijinja::value::{Rest, ValueKind};
use minijinja::{Environment, Error, State, Value};

use super::super::dialect::EACH;
use super::super::expressions::{
    ATTRIBUTE, CONCAT, DICT_METHODS, MODULO, ORDERS, OTHER_METHODS, POSITIVE,
};
use super::python::{self, compare, fail, is_dict, is_float, is_list, type_name};
use super::values::BoundMethod;
use super::{format, methods};

pub(super) fn install(environment: &mut Environment<'static>) {
    environment.add_function(EACH, |value: &Value| -> Result<Value, Error> {
        match value.kind() {
            ValueKind::None => Err(fail(
                "none can't be iterated over; hint: the template may want `or []` behind it",
            )),
            _ => Ok(value.clone()),
        }
    });
    environment.add_function(MODULO, modulo);
    environment.add_function(CONCAT, |state: &State, values: Rest<Value>| {
        concat(state, &values)
    });
    environment.add_function(POSITIVE, |value: &Value| -> Result<Value, Error> {
        match value.kind() {
            ValueKind::Number => Ok(value.clone()),
            ValueKind::Bool => Ok(Value::from(i64::from(value.is_true()))),
            _ => Err(fail(format!(
                "a value of the type {} has no sign",
                type_name(value)
            ))),
        }
    });
    environment.add_function(ATTRIBUTE, attribute);
    let orders: [fn(Ordering) -> bool; 4] = [
        Ordering::is_lt,
        Ordering::is_le,
        Ordering::is_gt,
        Ordering::is_ge,
    ];
    for ((_, name), order) in ORDERS.into_iter().zip(orders) {
        environment.add_function(name, move |a: &Value, b: &Value| compare(a, b).map(order));
    }
}

/// Python's `a % b`.
fn modulo(state: &State, a: &Value, b: &Value) -> Result<Value, Error> {
    if let Some(text) = a.as_str() {
        return format::percent(state, text, b);
    }
    let number = |value: &Value| matches!(value.kind(), ValueKind::Number | ValueKind::Bool);
    if !number(a) || !number(b) {
        return Err(fail(format!(
            "Python has no `%` for values of the types {} and {}",
            type_name(a),
            type_name(b)
        )));
    }
    if is_float(a) || is_float(b) {
        let (a, b) = (as_float(a)?, as_float(b)?);
        if b == 0.0 {
            return Err(fail("the remainder of a division by zero"));
        }
        let rest = a % b;
        return Ok(Value::from(if rest == 0.0 {
            0.0_f64.copysign(b)
        } else if (rest < 0.0) == (b < 0.0) {
            rest
        } else {
            rest + b
        }));
    }
    let (a, b) = (i128::try_from(a.clone())?, i128::try_from(b.clone())?);
    let rest = a
        .checked_rem(b)
        .ok_or_else(|| fail("the remainder of a division by zero"))?;
    Ok(Value::from(if rest != 0 && (rest < 0) != (b < 0) {
        rest + b
    } else {
        rest
    }))
}

fn as_float(value: &Value) -> Result<f64, Error> {
    if value.kind() == ValueKind::Bool {
        return Ok(f64::from(u8::from(value.is_true())));
    }
    f64::try_from(value.clone())
}

/// jinja2's `a ~ b ~ ..`.
fn concat(state: &State, values: &[Value]) -> Result<Value, Error> {
    let size: usize = values.iter().filter_map(Value::as_str).map(str::len).sum();
    state.consume_fuel((size / 64) as u64)?;
    let mut printer = python::Printer::new(state);
    printer.text.reserve(size);
    for value in values {
        match value.as_str() {
            Some(text) => printer.free(text),
            None => printer.value(value, false, 0)?,
        }
    }
    Ok(Value::from(printer.text))
}

/// `value.name` where Python's value has a method of that name; anything else as the engine finds it.
fn attribute(value: &Value, name: &str) -> Result<Value, Error> {
    let method = if is_dict(value) {
        DICT_METHODS.contains(&name)
    } else if value.kind() == ValueKind::String {
        OTHER_METHODS.contains(&name)
    } else {
        is_list(value)
            && [
                "append", "clear", "copy", "count", "extend", "index", "insert", "pop", "remove",
                "reverse", "sort",
            ]
            .contains(&name)
    };
    // The sandbox shows no method that would change the value.
    if method && methods::CHANGES.contains(&name) {
        return Ok(Value::UNDEFINED);
    }
    if method {
        return Ok(Value::from_object(BoundMethod::new(
            value,
            name,
            methods::method,
        )));
    }
    if value.is_none() {
        return Ok(Value::UNDEFINED);
    }
    value.get_attr(name)
}
