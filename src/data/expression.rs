//! Columns computed from others, by minijinja's expressions on a row: `"${instruction}\n\n${input}"`, `meta.question`, `answers[0].text`.

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, ValueKind};
use minijinja::{AutoEscape, Environment, UndefinedBehavior, Value};

use super::cell::Cell;

/// The number of steps that the evaluation for one row may take.
const FUEL: u64 = 100_000;
/// The longest expression in bytes.
const LONGEST: usize = 4096;
const NAME: &str = "column";

/// The expression for one column in `columns`.
pub struct Expression {
    environment: Environment<'static>,
    /// The expression that gives the value itself, if the text is a single expression; otherwise the template `NAME` gives a text.
    alone: Option<String>,
    written: String,
    /// The columns that it reads.
    pub reads: Vec<String>,
}

/// Whether a text that is not the name of a column is meant as an expression.
pub(super) fn is_expression(text: &str) -> bool {
    let path = || {
        let name = text.split(['.', '[']).next().unwrap_or_default();
        name.len() < text.len()
            && !name.is_empty()
            && name.chars().all(|c| c.is_alphanumeric() || c == '_')
    };
    text.contains("${") || text.contains("{{") || text.contains("{%") || path()
}

impl Expression {
    /// Parses the text that was written for a column.
    ///
    /// # Errors
    /// The text is too long, or no expression.
    pub fn new(written: &str) -> Result<Self> {
        ensure!(
            written.len() <= LONGEST,
            "it has {} bytes; at most {LONGEST} are read",
            written.len()
        );
        let source = if written.contains("${") || written.contains("{{") || written.contains("{%") {
            braces(written)?
        } else {
            format!("{{{{ {written} }}}}")
        };
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        let mut syntax = SyntaxConfig::builder();
        syntax.keep_trailing_newline(true);
        environment.set_syntax(syntax.build()?);
        environment.set_fuel(Some(FUEL));
        environment.set_formatter(|out, state, value| match value.kind() {
            // A missing value is an empty text inside a longer one.
            ValueKind::None => Ok(()),
            ValueKind::String | ValueKind::Number | ValueKind::Bool | ValueKind::Undefined => {
                minijinja::escape_formatter(out, state, value)
            }
            kind => Err(minijinja::Error::new(
                minijinja::ErrorKind::InvalidOperation,
                format!("{kind} can't stand in a text"),
            )),
        });
        let explained =
            |error: minijinja::Error| anyhow!("`{written}` can't be read: {}", sentence(&error));
        environment
            .add_template_owned(NAME, source.clone())
            .map_err(explained)?;
        let template = environment.get_template(NAME).map_err(explained)?;
        let mut reads: Vec<String> = template.undeclared_variables(false).into_iter().collect();
        reads.sort();
        // With anything around the expression, even a space or a line break, the result is a text.
        let alone = source
            .strip_prefix("{{")
            .and_then(|text| text.strip_suffix("}}"))
            .filter(|text| !text.contains("{{") && !text.contains("}}") && !text.contains("{%"))
            .map(str::to_owned);
        if let Some(alone) = &alone {
            environment.compile_expression(alone).map_err(explained)?;
        }
        Ok(Self {
            environment,
            alone,
            written: written.to_owned(),
            reads,
        })
    }

    /// Whether its result is a value of any type, and not always a text.
    pub(super) fn is_alone(&self) -> bool {
        self.alone.is_some()
    }

    /// Evaluates it for a row with these columns.
    ///
    /// # Errors
    /// It has no value in this row, or takes too many steps.
    pub fn evaluate(&self, columns: Vec<(String, Cell)>) -> Result<Cell> {
        let written = &self.written;
        let failed =
            |error: minijinja::Error| anyhow!("`{written}` has no value: {}", sentence(&error));
        let row = Value::from(Serde(Cell::Map(columns)));
        let Some(alone) = &self.alone else {
            let template = self.environment.get_template(NAME).map_err(failed)?;
            return template.render(row).map(Cell::Text).map_err(failed);
        };
        let expression = self.environment.compile_expression(alone).map_err(failed)?;
        let value = expression.eval(row).map_err(failed)?;
        if value.is_undefined() {
            bail!("`{written}` has no value in this row");
        }
        let text = serde_json::to_string(&value)
            .with_context(|| format!("`{written}` gives {}", value.kind()))?;
        Cell::parse(&text)
    }
}

/// Replaces `${..}` by `{{ .. }}`.
fn braces(text: &str) -> Result<String> {
    let mut made = String::new();
    let mut rest = text;
    while let Some(start) = rest.find("${") {
        made.push_str(&rest[..start]);
        let after = &rest[start + 2..];
        let end = after
            .find('}')
            .with_context(|| format!("`{text}` has a `${{` without its `}}`"))?;
        made.push_str("{{ ");
        made.push_str(&after[..end]);
        made.push_str(" }}");
        rest = &after[end + 1..];
    }
    made.push_str(rest);
    Ok(made)
}

fn sentence(error: &minijinja::Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn evaluated(written: &str, row: &str) -> Result<Cell> {
        let Cell::Map(columns) = Cell::parse(row).unwrap() else {
            panic!("{row}");
        };
        Expression::new(written)?.evaluate(columns)
    }

    #[test]
    fn texts_are_joined_and_values_kept() {
        let row = r#"{"a": "x", "b": null, "n": 12345678901234567890123, "m": {"q": ["<y>", {"t": [1.0]}]}}"#;
        let text = |text: &str| Cell::Text(text.to_owned());
        assert_eq!(
            evaluated("${a}\n\n${m.q[0]}\n", row).unwrap(),
            text("x\n\n<y>\n")
        );
        assert_eq!(
            evaluated("{{ a | upper }}-{{ b }}", row).unwrap(),
            text("X-")
        );
        assert_eq!(
            evaluated("{% if b %}{{ b }}{% else %}none{% endif %}", row).unwrap(),
            text("none")
        );
        assert_eq!(evaluated("m.q[0]", row).unwrap(), text("<y>"));
        assert_eq!(
            evaluated("m.q[1]", row).unwrap(),
            Cell::parse(r#"{"t": [1.0]}"#).unwrap()
        );
        assert_eq!(
            evaluated("${n}", row).unwrap(),
            Cell::Int(12_345_678_901_234_567_890_123)
        );
        assert_eq!(evaluated("${b}", row).unwrap(), Cell::Null);
        assert_eq!(evaluated("{{ a }}\n", row).unwrap(), text("x\n"));
        assert_eq!(Expression::new("${a} ${m.q}").unwrap().reads, ["a", "m"]);
    }

    #[test]
    fn what_is_not_there_is_an_error() {
        for (written, expected) in [
            ("${a.b.c}", "no value"),
            ("m[3]", "no value"),
            ("${a}${c}", "no value"),
            ("${m} x", "can't stand in a text"),
            ("${a", "without its `}`"),
            ("${a +}", "can't be read"),
            (
                "{% for i in range(100000) %}{{ a }}{% endfor %}",
                "no value",
            ),
        ] {
            let error = evaluated(written, r#"{"a": "x", "m": [1]}"#).unwrap_err();
            assert!(
                format!("{error:#}").contains(expected),
                "{written}: {error:#}"
            );
        }
        assert!(is_expression("a.b") && is_expression("${a}") && is_expression("a[0]"));
        assert!(
            !is_expression("question") && !is_expression(".a") && !is_expression("my question")
        );
    }
}
