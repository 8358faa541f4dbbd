//! Functions that make Python's objects: `range`, `dict`, `namespace`, and jinja2's `cycler`.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use minijinja::value::{Kwargs, Object, ObjectRepr, Rest, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

use super::arguments::bind;
use super::python::{fail, is_dict, is_namespace, type_name};
use super::values::Range;

/// The longest range that jinja2's sandbox makes.
const LONGEST_RANGE: i128 = 100_000;

/// `range(..)`.
pub(super) fn range(args: &[Value]) -> Result<Value, Error> {
    let whole = |value: &Value| {
        let number = value
            .as_i64()
            .filter(|_| value.is_integer() || value.kind() == ValueKind::Bool);
        number.ok_or_else(|| fail(format!("`range` takes integers, not {}", type_name(value))))
    };
    let (start, stop, step) = match args {
        [stop] => (0, whole(stop)?, 1),
        [start, stop] => (whole(start)?, whole(stop)?, 1),
        [start, stop, step] => (whole(start)?, whole(stop)?, whole(step)?),
        _ => return Err(fail("`range` takes one to three integers")),
    };
    if step == 0 {
        return Err(fail("the step of `range` must not be 0"));
    }
    let distance = i128::from(stop) - i128::from(start);
    let step_wide = i128::from(step);
    let length = if (distance > 0) == (step > 0) && distance != 0 {
        (distance.abs() - 1) / step_wide.abs() + 1
    } else {
        0
    };
    if length > LONGEST_RANGE {
        return Err(fail(format!(
            "the range has too many elements: {length}, and the sandbox of jinja2 allows {LONGEST_RANGE}"
        )));
    }
    Ok(Value::from_object(Range::new(
        start,
        stop,
        step,
        length as usize,
    )))
}

/// The name `dict`: a function, and the place of `dict.fromkeys`.
#[derive(Debug)]
pub(super) struct Dict;

impl Object for Dict {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn call(self: &Arc<Self>, state: &mut State, args: &[Value]) -> Result<Value, Error> {
        let (rest, kwargs): (Rest<Value>, Kwargs) = minijinja::value::from_args(args)?;
        dict(state, &rest, &kwargs, "dict")
    }

    fn call_method(
        self: &Arc<Self>,
        _state: &mut State,
        name: &str,
        args: &[Value],
    ) -> Result<Value, Error> {
        if name == "fromkeys" {
            return from_keys(args);
        }
        Err(Error::from(ErrorKind::UnknownMethod))
    }
}

/// `dict.fromkeys(keys, value)`.
pub(super) fn from_keys(args: &[Value]) -> Result<Value, Error> {
    let [keys, value] = bind("fromkeys", args, ["iterable", "value"])?;
    let keys = keys.ok_or_else(|| fail("`fromkeys` takes the keys"))?;
    let value = value.unwrap_or(Value::from(()));
    let pairs = keys.try_iter()?.map(|key| (key, value.clone()));
    Ok(Value::from_pairs(pairs))
}

/// The entries of a `dict` made of another one or of pairs, and of keyword arguments.
fn dict(state: &State, args: &[Value], kwargs: &Kwargs, what: &str) -> Result<Value, Error> {
    let mut entries: Vec<(Value, Value)> = Vec::new();
    match args {
        [] => {}
        [map] if is_dict(map) => {
            for key in map.try_iter()? {
                let value = map.get_item(&key)?;
                entries.push((key, value));
            }
        }
        [pairs] if !pairs.is_none() && !pairs.is_undefined() => {
            for pair in pairs.try_iter()?.checked() {
                let pair: Vec<Value> = pair?.try_iter()?.collect();
                let [key, value] = pair.as_slice() else {
                    return Err(fail(format!("`{what}` takes pairs of a key and a value")));
                };
                entries.push((key.clone(), value.clone()));
            }
        }
        _ => {
            return Err(fail(format!(
                "`{what}` takes one dict or pairs, and keyword arguments"
            )));
        }
    }
    for name in kwargs.args() {
        entries.push((Value::from(name), kwargs.peek::<Value>(name)?));
    }
    state.consume_fuel(entries.len() as u64)?;
    Ok(Value::from_pairs(entries))
}

/// `namespace(..)`, whose names transformers does not let begin with an underscore.
pub(super) fn namespace(state: &State, args: &[Value], kwargs: &Kwargs) -> Result<Value, Error> {
    let entries = dict(state, args, kwargs, "namespace")?;
    for name in entries.try_iter()? {
        check_name(name.as_str().unwrap_or_default())?;
    }
    let entries = minijinja::value::from_args::<(minijinja::value::ValueOrKwargs,)>(
        std::slice::from_ref(&entries),
    )?;
    let made = minijinja::functions::namespace(Some(entries.0))?;
    debug_assert!(is_namespace(&made));
    Ok(made)
}

/// Refuses the names that transformers refuses.
fn check_name(name: &str) -> Result<(), Error> {
    if name.starts_with('_') {
        return Err(fail(format!(
            "a namespace can't have the attribute `{name}`: transformers refuses names with an underscore first"
        )));
    }
    Ok(())
}

/// jinja2's `cycler`.
#[derive(Debug)]
pub(super) struct Cycler {
    items: Vec<Value>,
    place: AtomicUsize,
}

impl Cycler {
    pub(super) fn value(items: &[Value]) -> Result<Value, Error> {
        if items.is_empty() {
            return Err(fail("`cycler` takes at least one item"));
        }
        Ok(Value::from_object(Self {
            items: items.to_vec(),
            place: AtomicUsize::new(0),
        }))
    }

    fn current(&self) -> Value {
        let place = self.place.load(Ordering::Relaxed);
        self.items.get(place).cloned().unwrap_or_default()
    }
}

impl Object for Cycler {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        (key.as_str() == Some("current")).then(|| self.current())
    }

    fn call_method(
        self: &Arc<Self>,
        _state: &mut State,
        name: &str,
        _args: &[Value],
    ) -> Result<Value, Error> {
        match name {
            "next" => {
                let current = self.current();
                let next = (self.place.load(Ordering::Relaxed) + 1) % self.items.len();
                self.place.store(next, Ordering::Relaxed);
                Ok(current)
            }
            "reset" => {
                self.place.store(0, Ordering::Relaxed);
                Ok(Value::from(()))
            }
            _ => Err(Error::from(ErrorKind::UnknownMethod)),
        }
    }
}
