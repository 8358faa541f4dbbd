//! jinja2's filters of lists and dicts that the engine doesn't have or has in another way.

use std::borrow::Cow;

use minijinja::filters;
use minijinja::value::{Rest, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, State, Value};

use super::add;
use super::arguments::{bind, flag, integer_or, text};
use super::python::{self, comparable, compare, fail, is_dict, type_name};

pub(super) fn install(environment: &mut Environment<'static>) {
    // What counts as false has no items for these, whatever it is.
    environment.add_filter(
        "select",
        |state: &mut State, value: Value, test: Test, args: More| {
            some(value, |value| filters::select(state, value, test, args))
        },
    );
    environment.add_filter(
        "reject",
        |state: &mut State, value: Value, test: Test, args: More| {
            some(value, |value| filters::reject(state, value, test, args))
        },
    );
    environment.add_filter(
        "selectattr",
        |state: &mut State, value: Value, name: Name, test: Test, args: More| {
            some(value, |value| {
                filters::selectattr(state, value, name, test, args)
            })
        },
    );
    environment.add_filter(
        "rejectattr",
        |state: &mut State, value: Value, name: Name, test: Test, args: More| {
            some(value, |value| {
                filters::rejectattr(state, value, name, test, args)
            })
        },
    );
    environment.add_filter("map", |state: &mut State, value: Value, args: More| {
        some(value, |value| filters::map(state, value, args))
    });
    add(environment, "dictsort", dictsort);
    add(environment, "join", join);
    add(environment, "length", length);
    add(environment, "count", length);
    add(environment, "list", list);
    add(environment, "max", |_, value, args| {
        by_size("max", value, args)
    });
    add(environment, "min", |_, value, args| {
        by_size("min", value, args)
    });
    add(environment, "sort", sort);
    add(environment, "unique", unique);
    add(environment, "pprint", pprint);
    add(environment, "int", int);
    add(environment, "float", float);
    add(environment, "round", round);
}

type Name<'a> = Cow<'a, str>;
type Test<'a> = Option<Cow<'a, str>>;
type More = Rest<ValueOrKwargs>;

/// Applies `filter` to a value that is true in Python; returns an empty list for any other value.
fn some(
    value: Value,
    filter: impl FnOnce(Value) -> Result<Vec<Value>, Error>,
) -> Result<Vec<Value>, Error> {
    if value.is_true() {
        filter(value)
    } else {
        Ok(Vec::new())
    }
}

/// The items of a value. Nothing is no empty list in Python.
fn items(what: &str, value: &Value) -> Result<Vec<Value>, Error> {
    if value.is_none() {
        return Err(fail(format!(
            "`{what}` takes something to iterate over, and the value is none"
        )));
    }
    value.try_iter()?.checked().collect()
}

/// The attribute of an item by a path: `name`, `town.name`, `0`.
fn at_path(item: &Value, path: &Value) -> Result<Value, Error> {
    let Some(path) = path.as_str() else {
        return item.get_item(path);
    };
    let mut value = item.clone();
    for part in path.split('.') {
        value = match part.parse::<usize>() {
            Ok(index) => value.get_item_by_index(index)?,
            Err(_) => value.get_attr(part)?,
        };
    }
    Ok(value)
}

/// A text in lower case unless `case_sensitive`; anything else unchanged.
fn folded(value: Value, case_sensitive: bool) -> Value {
    match value.as_str() {
        Some(text) if !case_sensitive => Value::from(text.to_lowercase()),
        _ => value,
    }
}

fn dictsort(_state: &State, value: &Value, args: &[Value]) -> Result<Value, Error> {
    let [case_sensitive, by, reverse] =
        bind("dictsort", args, ["case_sensitive", "by", "reverse"])?;
    if !is_dict(value) {
        return Err(fail(format!(
            "`dictsort` takes a dict, not {}",
            type_name(value)
        )));
    }
    let by_value = match by.as_ref().and_then(Value::as_str) {
        None | Some("key") => false,
        Some("value") => true,
        Some(_) => return Err(fail("`dictsort` sorts by \"key\" or \"value\"")),
    };
    let mut entries = Vec::new();
    for key in value.try_iter()? {
        let item = value.get_item(&key)?;
        let sorted_by = if by_value { item.clone() } else { key.clone() };
        let sorted_by = folded(sorted_by, flag(case_sensitive.as_ref()));
        entries.push((sorted_by, Value::from((key, item))));
    }
    let sorted = in_order(entries, flag(reverse.as_ref()))?;
    Ok(Value::from(sorted))
}

/// Values sorted by their keys as Python does: equal ones keep their order, also from the end.
fn in_order(mut entries: Vec<(Value, Value)>, reverse: bool) -> Result<Vec<Value>, Error> {
    comparable(entries.iter().map(|(key, _)| key))?;
    if reverse {
        entries.sort_by(|a, b| b.0.cmp(&a.0));
    } else {
        entries.sort_by(|a, b| a.0.cmp(&b.0));
    }
    Ok(entries.into_iter().map(|(_, value)| value).collect())
}

fn join(state: &State, value: &Value, args: &[Value]) -> Result<Value, Error> {
    let [separator, attribute] = bind("join", args, ["d", "attribute"])?;
    let separator = separator.map_or(Ok(String::new()), |separator| {
        python::text(state, &separator)
    })?;
    let attribute = attribute.filter(|attribute| !attribute.is_none());
    let mut printer = python::Printer::new(state);
    if value.is_none() {
        items("join", value)?;
    }
    for (index, item) in value.try_iter()?.checked().enumerate() {
        let mut item = item?;
        if let Some(attribute) = &attribute {
            item = at_path(&item, attribute)?;
        }
        if index > 0 {
            printer.text.push_str(&separator);
        }
        printer.value(&item, false, 0)?;
        printer.pay()?;
    }
    Ok(Value::from(printer.text))
}

fn length(_state: &State, value: &Value, args: &[Value]) -> Result<Value, Error> {
    bind::<0>("length", args, [])?;
    if value.is_undefined() {
        return Ok(Value::from(0));
    }
    let length = value.len().map(Value::from);
    length.ok_or_else(|| {
        fail(format!(
            "a value of the type {} has no length",
            type_name(value)
        ))
    })
}

fn list(state: &State, value: &Value, args: &[Value]) -> Result<Value, Error> {
    bind::<0>("list", args, [])?;
    let items = items("list", value)?;
    state.consume_fuel(items.len() as u64)?;
    Ok(Value::from(items))
}

fn by_size(what: &str, value: &Value, args: &[Value]) -> Result<Value, Error> {
    let [case_sensitive, attribute] = bind(what, args, ["case_sensitive", "attribute"])?;
    let attribute = attribute.filter(|attribute| !attribute.is_none());
    let keyed = |item: Value| {
        let key = match &attribute {
            Some(path) => at_path(&item, path)?,
            None => item.clone(),
        };
        Ok((folded(key, flag(case_sensitive.as_ref())), item))
    };
    let keyed: Result<Vec<(Value, Value)>, Error> =
        items(what, value)?.into_iter().map(keyed).collect();
    extreme(keyed?, what == "max")
}

/// The greatest or smallest value by Python's order; the first of equal ones.
fn extreme(values: Vec<(Value, Value)>, greatest: bool) -> Result<Value, Error> {
    let mut best: Option<(Value, Value)> = None;
    for (key, value) in values {
        let better = match &best {
            None => true,
            Some((other, _)) => {
                let order = compare(&key, other)?;
                if greatest {
                    order.is_gt()
                } else {
                    order.is_lt()
                }
            }
        };
        if better {
            best = Some((key, value));
        }
    }
    Ok(best.map_or(Value::UNDEFINED, |(_, value)| value))
}

fn sort(state: &State, value: &Value, args: &[Value]) -> Result<Value, Error> {
    let [reverse, case_sensitive, attribute] =
        bind("sort", args, ["reverse", "case_sensitive", "attribute"])?;
    let attribute = attribute.filter(|attribute| !attribute.is_none());
    let paths: Vec<Value> = match &attribute {
        None => Vec::new(),
        Some(path) => match path.as_str() {
            Some(paths) => paths.split(',').map(Value::from).collect(),
            None => vec![path.clone()],
        },
    };
    let items = items("sort", value)?;
    state.consume_fuel(items.len() as u64)?;
    let case_sensitive = flag(case_sensitive.as_ref());
    // By several attributes: sorted by the last one first, as equal ones keep their order.
    let mut sorted = items;
    let steps: Vec<Option<&Value>> = if paths.is_empty() {
        vec![None]
    } else {
        paths.iter().rev().map(Some).collect()
    };
    for path in steps {
        let keyed = |item: Value| {
            let key = match path {
                Some(path) => at_path(&item, path)?,
                None => item.clone(),
            };
            Ok((folded(key, case_sensitive), item))
        };
        let keyed: Result<Vec<(Value, Value)>, Error> = sorted.into_iter().map(keyed).collect();
        sorted = in_order(keyed?, flag(reverse.as_ref()))?;
    }
    Ok(Value::from(sorted))
}

fn unique(state: &State, value: &Value, args: &[Value]) -> Result<Value, Error> {
    let [case_sensitive, attribute] = bind("unique", args, ["case_sensitive", "attribute"])?;
    let attribute = attribute.filter(|attribute| !attribute.is_none());
    let mut seen = std::collections::BTreeSet::new();
    let mut kept = Vec::new();
    for item in items("unique", value)? {
        state.consume_fuel(1)?;
        let key = match &attribute {
            Some(path) => at_path(&item, path)?,
            None => item.clone(),
        };
        if is_dict(&key) || python::is_list(&key) {
            return Err(fail(format!(
                "`unique` can't tell values of the type {} apart",
                type_name(&key)
            )));
        }
        if seen.insert(folded(key, flag(case_sensitive.as_ref()))) {
            kept.push(item);
        }
    }
    Ok(Value::from(kept))
}

/// Python's `pprint`, where it writes one line.
fn pprint(state: &State, value: &Value, args: &[Value]) -> Result<Value, Error> {
    bind::<0>("pprint", args, [])?;
    let line = python::repr(state, &sorted_keys(state, value, 0)?)?;
    if line.chars().count() > 80 {
        return Err(fail(
            "`pprint` of a value that takes more than a line is not supported; `tojson(indent=2)` is",
        ));
    }
    Ok(Value::from(line))
}

fn sorted_keys(state: &State, value: &Value, depth: usize) -> Result<Value, Error> {
    state.consume_fuel(1)?;
    if depth > 50 {
        return Err(fail("the value is nested too deeply to be printed"));
    }
    if is_dict(value) {
        let keyed = value.try_iter()?.map(|key| (key.clone(), key)).collect();
        let keys = in_order(keyed, false)?;
        let entries: Result<Vec<(Value, Value)>, Error> = keys
            .into_iter()
            .map(|key| {
                let item = value.get_item(&key)?;
                Ok((key, sorted_keys(state, &item, depth + 1)?))
            })
            .collect();
        return Ok(Value::from_pairs(entries?));
    }
    if python::is_list(value) {
        let items = value
            .try_iter()?
            .map(|item| sorted_keys(state, &item, depth + 1));
        return items.collect::<Result<Vec<_>, _>>().map(Value::from);
    }
    Ok(value.clone())
}

/// Whether the digits of a number stand as Python wants them: single underscores between digits.
fn digits_of(text: &str) -> Option<String> {
    let text = super::strip(text);
    let well = !text.starts_with('_') && !text.ends_with('_') && !text.contains("__");
    let beside = text
        .split('_')
        .all(|part| part.ends_with(|c: char| c.is_ascii_alphanumeric()) || part == text);
    (well && beside).then(|| text.replace('_', ""))
}

fn parse_float(text: &str) -> Option<f64> {
    let text = digits_of(text)?;
    text.parse().ok()
}

fn int(_state: &State, value: &Value, args: &[Value]) -> Result<Value, Error> {
    let [other, base] = bind("int", args, ["default", "base"])?;
    let other = other.unwrap_or_else(|| Value::from(0));
    let base = integer_or("int", base.as_ref(), 10)?;
    let whole = |float: f64| {
        if !float.is_finite() {
            return Ok(None);
        }
        if float.abs() >= 1e38 {
            return Err(fail("an integer of more than 38 digits is not supported"));
        }
        Ok(Some(Value::from(float.trunc() as i128)))
    };
    let made = match value.kind() {
        ValueKind::Bool => Some(Value::from(i64::from(value.is_true()))),
        ValueKind::Number if python::is_float(value) => whole(f64::try_from(value.clone())?)?,
        ValueKind::Number => Some(value.clone()),
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            match parse_int(text, base) {
                Some(number) => Some(Value::from(number)),
                None => parse_float(text).map_or(Ok(None), whole)?,
            }
        }
        _ => None,
    };
    Ok(made.unwrap_or(other))
}

/// Python's `int(text, base)`.
fn parse_int(text: &str, base: i64) -> Option<i128> {
    let text = digits_of(text)?.to_lowercase();
    let (sign, digits) = match text.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, text.strip_prefix('+').unwrap_or(&text)),
    };
    let prefixes = [("0x", 16), ("0o", 8), ("0b", 2)];
    let prefix = prefixes
        .iter()
        .find(|(prefix, of)| digits.starts_with(prefix) && (base == *of || base == 0));
    let (digits, base) = match prefix {
        Some((prefix, of)) => (&digits[prefix.len()..], *of),
        None if base == 0 => (digits, 10),
        None => (digits, base),
    };
    let radix = u32::try_from(base)
        .ok()
        .filter(|radix| (2..=36).contains(radix))?;
    if digits.starts_with(['+', '-']) {
        return None;
    }
    i128::from_str_radix(digits, radix)
        .ok()
        .map(|number| sign * number)
}

fn float(_state: &State, value: &Value, args: &[Value]) -> Result<Value, Error> {
    let [other] = bind("float", args, ["default"])?;
    let made = match value.kind() {
        ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        ValueKind::Number => Some(f64::try_from(value.clone())?),
        ValueKind::String => parse_float(value.as_str().unwrap_or_default()),
        _ => None,
    };
    Ok(made.map_or_else(|| other.unwrap_or_else(|| Value::from(0.0)), Value::from))
}

fn round(state: &State, value: &Value, args: &[Value]) -> Result<Value, Error> {
    let [precision, method] = bind("round", args, ["precision", "method"])?;
    let method = method.unwrap_or_else(|| Value::from("common"));
    let places = integer_or("round", precision.as_ref(), 0)?;
    let way: fn(f64) -> f64 = match text("round", &method)? {
        "common" => return rounded(state, value, places),
        "floor" => f64::floor,
        "ceil" => f64::ceil,
        other => {
            return Err(fail(format!(
                "`round` knows the methods common, floor and ceil, not `{other}`"
            )));
        }
    };
    let number = match value.kind() {
        ValueKind::Bool => f64::from(u8::from(value.is_true())),
        _ => f64::try_from(value.clone())?,
    };
    let factor = 10_f64.powi(i32::try_from(places).unwrap_or(i32::MAX));
    Ok(Value::from(way(number * factor) / factor))
}

/// Python's `round(number, places)`, which rounds what lies in the middle to the even side.
fn rounded(state: &State, value: &Value, places: i64) -> Result<Value, Error> {
    state.consume_fuel(places.unsigned_abs() / 64)?;
    let factor = |places: i64| 10_f64.powi(i32::try_from(places).unwrap_or(i32::MAX));
    match value.kind() {
        ValueKind::Number if python::is_float(value) => {
            let number = f64::try_from(value.clone())?;
            let most = places.min(400) as usize;
            Ok(Value::from(if !number.is_finite() {
                number
            } else if places >= 0 {
                format!("{number:.most$}").parse().unwrap_or(number)
            } else {
                let factor = factor(-places);
                (number / factor).round_ties_even() * factor
            }))
        }
        ValueKind::Number | ValueKind::Bool => {
            let number = i128::try_from(value.clone())?;
            let unit = u32::try_from(-places).ok().filter(|_| places < 0);
            let Some(unit) = unit.map(|power| 10_i128.checked_pow(power)) else {
                return Ok(Value::from(number));
            };
            let Some(unit) = unit else {
                return Ok(Value::from(0));
            };
            let (below, rest) = (number.div_euclid(unit), number.rem_euclid(unit));
            let up = rest * 2 > unit || (rest * 2 == unit && below % 2 != 0);
            Ok(Value::from((below + i128::from(up)) * unit))
        }
        _ => Err(fail(format!(
            "`round` takes a number, not {}",
            type_name(value)
        ))),
    }
}
