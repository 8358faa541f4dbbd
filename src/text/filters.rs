//! jinja2's filters, tests and functions for the template engine, with Python's behaviour. [`install`] adds them to an environment.

mod arguments;
mod characters;
mod containers;
mod format;
mod json;
mod methods;
mod objects;
mod operators;
mod predicates;
mod python;
mod sequences;
mod texts;
mod values;

use minijinja::value::{Kwargs, Rest, ValueKind, ValueOrKwargs, from_args};
use minijinja::{AutoEscape, Environment, Error, Output, State, Value};

use arguments::bind;
use python::fail;

/// Filters of the engine that jinja2 does not have.
const FOREIGN_FILTERS: [&str; 5] = ["bool", "chain", "lines", "split", "zip"];
/// Filters of jinja2 that make no sense in a chat template, or whose result is random.
const REFUSED_FILTERS: [&str; 4] = ["filesizeformat", "random", "urlize", "xmlattr"];

/// Python's `str.isspace` of a character.
pub(super) fn is_space(c: char) -> bool {
    characters::is_space(c)
}

/// Python's `str.strip()`.
pub(super) fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

/// Puts jinja2's filters, tests and functions as transformers has them into an environment.
pub(super) fn install(environment: &mut Environment<'static>) {
    environment.set_formatter(print);
    environment.set_unknown_method_callback(methods::method);
    for name in FOREIGN_FILTERS {
        environment.remove_filter(name);
    }
    for name in REFUSED_FILTERS {
        environment.add_filter(
            name,
            move |_: Rest<ValueOrKwargs>| -> Result<Value, Error> {
                Err(fail(format!(
                    "the filter `{name}` of jinja2 is not supported in chat templates"
                )))
            },
        );
    }
    texts::install(environment);
    sequences::install(environment);
    predicates::install(environment);
    operators::install(environment);
    add(environment, "tojson", json::tojson);
    add(environment, "trim", methods::trim);
    add(environment, "default", default);
    add(environment, "d", default);
    add(environment, "attr", attribute);
    environment.remove_global("debug");
    environment.add_global("dict", Value::from_object(objects::Dict));
    environment.add_function("range", |args: Rest<ValueOrKwargs>| {
        objects::range(&args.into_values())
    });
    environment.add_function("namespace", |state: &State, args: Rest<ValueOrKwargs>| {
        let args = args.into_values();
        let (args, kwargs): (Rest<Value>, Kwargs) = from_args(&args)?;
        objects::namespace(state, &args, &kwargs)
    });
    environment.add_function("cycler", |args: Rest<Value>| objects::Cycler::value(&args));
    environment.add_function("joiner", minijinja_contrib::globals::joiner);
    environment.add_function("lipsum", |_: Rest<Value>| -> Result<Value, Error> {
        Err(fail("`lipsum` makes another text each time"))
    });
}

/// A filter, called with the value that it is applied to and with its arguments.
type Filter = fn(&State, &Value, &[Value]) -> Result<Value, Error>;

fn add(environment: &mut Environment<'static>, name: &'static str, filter: Filter) {
    environment.add_filter(
        name,
        move |state: &State, value: &Value, args: Rest<ValueOrKwargs>| {
            filter(state, value, &args.into_values())
        },
    );
}

/// Prints a value as Python's `str` does.
fn print(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    let escapes = !matches!(state.auto_escape(), AutoEscape::None) && !value.is_safe();
    let written = match value.as_str() {
        Some(text) if !escapes => out.write_str(text),
        _ => {
            let text = python::text(state, value)?;
            out.write_str(&if escapes { texts::escaped(&text) } else { text })
        }
    };
    written.map_err(Error::from)
}

/// jinja2's `default`: for what is undefined, and with `boolean` for everything that counts as false.
fn default(_state: &State, value: &Value, args: &[Value]) -> Result<Value, Error> {
    let [other, boolean] = bind("default", args, ["default_value", "boolean"])?;
    let replaced = value.is_undefined() || (arguments::flag(boolean.as_ref()) && !value.is_true());
    Ok(if replaced {
        other.unwrap_or_else(|| Value::from(""))
    } else {
        value.clone()
    })
}

/// jinja2's `attr`, which finds attributes and no entries of dicts.
fn attribute(_state: &State, value: &Value, args: &[Value]) -> Result<Value, Error> {
    let [name] = bind("attr", args, ["name"])?;
    let name = name.ok_or_else(|| fail("`attr` takes a name"))?;
    if python::is_dict(value) || value.kind() == ValueKind::String {
        return Ok(Value::UNDEFINED);
    }
    value.get_attr(arguments::text("attr", &name)?)
}
