//! The methods of Python's `list`, `dict` and numbers.

use minijinja::value::ValueIter;
use minijinja::{Error, State, Value};

use super::arguments::{bind, integer_or, required};
use super::objects::from_keys;
use super::python::{self, fail, is_list};
use super::values::View;

pub(super) fn list(
    state: &State,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Option<Value>, Error> {
    let items = || value.try_iter().map(ValueIter::checked);
    Ok(Some(match name {
        "count" => {
            let [wanted] = bind(name, args, [""])?;
            let wanted = required(name, wanted)?;
            let mut count = 0;
            for item in items()? {
                state.consume_fuel(1)?;
                count += usize::from(item? == wanted);
            }
            Value::from(count)
        }
        "index" => {
            let [wanted, start, stop] = bind(name, args, ["", "", ""])?;
            let wanted = required(name, wanted)?;
            let count = items()?.count() as i64;
            let place = |at: i64| if at < 0 { (count + at).max(0) } else { at };
            let start = place(integer_or(name, start.as_ref(), 0)?);
            let stop = place(integer_or(name, stop.as_ref(), count)?);
            for (at, item) in items()?.enumerate() {
                state.consume_fuel(1)?;
                if item? == wanted && (start..stop).contains(&(at as i64)) {
                    return Ok(Some(Value::from(at)));
                }
            }
            return Err(fail("`index` does not find the value"));
        }
        "copy" if is_list(value) => {
            bind::<0>(name, args, [])?;
            let copy: Result<Vec<Value>, Error> = items()?.collect();
            Value::from(copy?)
        }
        _ => return Ok(None),
    }))
}

pub(super) fn dict(value: &Value, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let keys = || -> Result<Vec<Value>, Error> { Ok(value.try_iter()?.collect()) };
    let none = || bind::<0>(name, args, []);
    Ok(Some(match name {
        "keys" => {
            none()?;
            View::value("dict_keys", keys()?)
        }
        "values" => {
            none()?;
            let values: Result<Vec<Value>, Error> =
                keys()?.iter().map(|key| value.get_item(key)).collect();
            View::value("dict_values", values?)
        }
        "items" => {
            none()?;
            let pair = |key: Value| {
                let item = value.get_item(&key)?;
                Ok(Value::from((key, item)))
            };
            let pairs: Result<Vec<Value>, Error> = keys()?.into_iter().map(pair).collect();
            View::value("dict_items", pairs?)
        }
        "get" => {
            let [key, default] = bind(name, args, ["", ""])?;
            let key = required(name, key)?;
            let found = value.get_item(&key)?;
            let known = !found.is_undefined() || keys()?.contains(&key);
            if known {
                found
            } else {
                default.unwrap_or(Value::from(()))
            }
        }
        "copy" => {
            none()?;
            value.clone()
        }
        "fromkeys" => from_keys(args)?,
        _ => return Ok(None),
    }))
}

pub(super) fn number(value: &Value, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    bind::<0>(name, args, [])?;
    Ok(match (name, python::is_float(value)) {
        ("is_integer", true) => {
            let number = f64::try_from(value.clone())?;
            Some(Value::from(number.is_finite() && number.fract() == 0.0))
        }
        ("is_integer", false) => Some(Value::from(true)),
        ("bit_length", false) => {
            let number = i128::try_from(value.clone())?.unsigned_abs();
            Some(Value::from(128 - number.leading_zeros()))
        }
        _ => None,
    })
}
