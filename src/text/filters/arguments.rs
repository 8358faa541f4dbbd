//! Arguments of filters and methods by place or by name, as Python binds them.

use minijinja::value::{Kwargs, Rest, ValueKind, from_args};
use minijinja::{Error, Value};

use super::python::{fail, type_name};

/// The arguments of `what` in the order of its parameters' `names`.
pub(super) fn bind<const N: usize>(
    what: &str,
    args: &[Value],
    names: [&str; N],
) -> Result<[Option<Value>; N], Error> {
    let (by_place, by_name): (Rest<Value>, Kwargs) = from_args(args)?;
    if by_place.len() > N {
        return Err(fail(format!(
            "`{what}` takes at most {N} arguments, and {} are given",
            by_place.len()
        )));
    }
    let mut bound = [const { None }; N];
    for (bound, value) in bound.iter_mut().zip(by_place.0) {
        *bound = Some(value);
    }
    for name in by_name.args() {
        let index = names.iter().position(|known| *known == name);
        let Some(index) = index.filter(|_| !name.is_empty()) else {
            return Err(fail(format!("`{what}` has no argument `{name}`")));
        };
        if bound[index].is_some() {
            return Err(fail(format!(
                "`{what}` is given the argument `{name}` twice"
            )));
        }
        bound[index] = Some(by_name.peek::<Value>(name)?);
    }
    Ok(bound)
}

/// An integer argument.
pub(super) fn integer(what: &str, value: &Value) -> Result<i64, Error> {
    let whole = value.is_integer() || value.kind() == ValueKind::Bool;
    let number = value
        .as_i64()
        .or_else(|| (value.kind() == ValueKind::Bool).then(|| i64::from(value.is_true())));
    number.filter(|_| whole).ok_or_else(|| {
        fail(format!(
            "`{what}` takes an integer, not {}",
            type_name(value)
        ))
    })
}

/// An integer argument or what stands for it.
pub(super) fn integer_or(what: &str, value: Option<&Value>, default: i64) -> Result<i64, Error> {
    value.map_or(Ok(default), |value| integer(what, value))
}

/// A text argument.
pub(super) fn text<'a>(what: &str, value: &'a Value) -> Result<&'a str, Error> {
    value
        .as_str()
        .ok_or_else(|| fail(format!("`{what}` takes a text, not {}", type_name(value))))
}

/// Whether a flag is given and true.
pub(super) fn flag(value: Option<&Value>) -> bool {
    value.is_some_and(Value::is_true)
}

/// An argument that has no default.
pub(super) fn required(name: &str, value: Option<Value>) -> Result<Value, Error> {
    value.ok_or_else(|| fail(format!("`{name}` takes an argument")))
}
