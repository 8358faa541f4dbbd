//! A recipe that is being written: stages with parameters, rendered as YAML in block style.

use std::fmt::Write as _;

use serde_json::Value;

/// Lists up to so many columns stand on one line.
const WIDEST_LIST: usize = 100;

/// A recipe to write.
#[derive(Debug, Clone, Default)]
pub struct Outline {
    /// Where editors find the schema, if they do: a path or an address.
    pub schema: Option<String>,
    /// What the recipe is for.
    pub description: String,
    /// Lines of a comment at the top.
    pub comment: Vec<String>,
    /// The stages, in the order of the file.
    pub stages: Vec<OutlineStage>,
    /// Stages and the folders that their results are put into.
    pub outputs: Vec<(String, String)>,
}

/// A stage of an [`Outline`].
#[derive(Debug, Clone)]
pub struct OutlineStage {
    /// Its name.
    pub name: String,
    /// Its kind.
    pub kind: String,
    /// Its parameters in order.
    pub parameters: Vec<(String, Value)>,
    /// Lines of a comment above it.
    pub comment: Vec<String>,
}

impl OutlineStage {
    /// A stage without parameters.
    pub fn new(name: &str, kind: &str) -> Self {
        Self {
            name: name.to_owned(),
            kind: kind.to_owned(),
            parameters: Vec::new(),
            comment: Vec::new(),
        }
    }

    /// The same with a parameter behind the others, in place of one of the same name.
    #[must_use]
    pub fn with(mut self, parameter: &str, value: impl Into<Value>) -> Self {
        self.set(parameter, value.into());
        self
    }

    /// The same with a comment above it.
    #[must_use]
    pub fn commented(mut self, line: &str) -> Self {
        self.comment.push(line.to_owned());
        self
    }

    /// Sets a parameter.
    pub fn set(&mut self, parameter: &str, value: Value) {
        self.parameters.retain(|(name, _)| name != parameter);
        self.parameters.push((parameter.to_owned(), value));
    }
}

/// A recipe's text, and where its parameters are in it.
pub struct Rendered {
    /// The text.
    pub text: String,
    /// The first line (from 1) of each parameter, with the positions of its stage and in it.
    pub lines: Vec<(usize, usize, usize)>,
}

impl Outline {
    /// The recipe as YAML.
    pub fn render(&self) -> Rendered {
        let mut text = String::new();
        let mut lines = Vec::new();
        if let Some(schema) = &self.schema {
            _ = writeln!(text, "# yaml-language-server: $schema={schema}");
        }
        text.push_str("version: 1\n");
        if !self.description.is_empty() {
            _ = writeln!(
                text,
                "description: {}",
                scalar(&self.description.clone().into())
            );
        }
        comment(&mut text, "", &self.comment);
        text.push_str("\nstages:\n");
        for (number, stage) in self.stages.iter().enumerate() {
            if number > 0 {
                text.push('\n');
            }
            comment(&mut text, "  ", &stage.comment);
            _ = writeln!(text, "  {}:", stage.name);
            let empty = if stage.parameters.is_empty() {
                " {}"
            } else {
                ""
            };
            _ = writeln!(text, "    {}:{empty}", stage.kind);
            for (index, (name, value)) in stage.parameters.iter().enumerate() {
                lines.push((text.lines().count() + 1, number, index));
                entry(&mut text, 6, name, value);
            }
        }
        if !self.outputs.is_empty() {
            text.push_str("\noutputs:\n");
            for (stage, folder) in &self.outputs {
                _ = writeln!(text, "  {stage}: {}", scalar(&folder.clone().into()));
            }
        }
        Rendered { text, lines }
    }
}

fn comment(text: &mut String, margin: &str, lines: &[String]) {
    for line in lines {
        let line = line.replace(['\r', '\n'], " ");
        text.push_str(format!("{margin}# {line}").trim_end());
        text.push('\n');
    }
}

/// `name: value` with what belongs to it.
fn entry(text: &mut String, margin: usize, name: &str, value: &Value) {
    let indent = " ".repeat(margin);
    let name = scalar(&name.into());
    match value {
        Value::Object(map) if !map.is_empty() => {
            _ = writeln!(text, "{indent}{name}:");
            for (name, value) in map {
                entry(text, margin + 2, name, value);
            }
        }
        Value::Array(values) if !is_short(values) => {
            _ = writeln!(text, "{indent}{name}:");
            for value in values {
                element(text, margin + 2, value);
            }
        }
        Value::String(long) if long.trim_end().contains('\n') && !long.contains('\r') => {
            let keep = if long.ends_with('\n') { "" } else { "-" };
            _ = writeln!(text, "{indent}{name}: |2{keep}");
            for line in long.trim_end_matches('\n').split('\n') {
                text.push_str(format!("{indent}  {line}").trim_end());
                text.push('\n');
            }
        }
        value => _ = writeln!(text, "{indent}{name}: {}", flow(value)),
    }
}

/// An element of a list in block style.
fn element(text: &mut String, margin: usize, value: &Value) {
    let indent = " ".repeat(margin);
    match value {
        Value::Object(map) if !map.is_empty() => {
            let mut inner = String::new();
            for (name, value) in map {
                entry(&mut inner, margin + 2, name, value);
            }
            let inner = inner.get(margin + 2..).unwrap_or_default();
            _ = write!(text, "{indent}- {inner}");
        }
        value => _ = writeln!(text, "{indent}- {}", flow(value)),
    }
}

fn is_short(values: &[Value]) -> bool {
    let plain = |value: &Value| !value.is_object() && !value.is_array();
    let width: usize = values.iter().map(|value| flow(value).len() + 2).sum();
    values.iter().all(plain) && width <= WIDEST_LIST
}

/// A value on one line.
fn flow(value: &Value) -> String {
    match value {
        Value::Array(values) => {
            let values: Vec<String> = values.iter().map(flow).collect();
            format!("[{}]", values.join(", "))
        }
        Value::Object(map) => {
            let entries = map.iter();
            let entries = entries
                .map(|(name, value)| format!("{}: {}", scalar(&name.as_str().into()), flow(value)));
            format!("{{{}}}", entries.collect::<Vec<_>>().join(", "))
        }
        value => scalar(value),
    }
}

/// A scalar, quoted where it would be read as something else.
fn scalar(value: &Value) -> String {
    match value {
        Value::String(text) => {
            let first = text
                .chars()
                .next()
                .is_some_and(|c| c.is_alphanumeric() || matches!(c, '/' | '.' | '_'));
            let plain = |c: char| {
                c.is_alphanumeric()
                    || matches!(
                        c,
                        ' ' | '/' | '.' | '_' | '-' | '+' | '(' | ')' | '\'' | '%'
                    )
            };
            let is_plain = first
                && text.chars().all(plain)
                && !text.ends_with(' ')
                && serde_yaml::from_str::<serde_yaml::Value>(text)
                    .is_ok_and(|read| read.as_str() == Some(text))
                && !["y", "n", "yes", "no", "on", "off"].contains(&text.to_lowercase().as_str());
            // JSON's texts are YAML's, in double quotes.
            if is_plain {
                text.clone()
            } else {
                value.to_string()
            }
        }
        // Other readers of YAML take `1e-6` for a text.
        Value::Number(number) if number.is_f64() => {
            let number = number.to_string();
            match number.split_once('e') {
                Some((digits, power)) if !digits.contains('.') => format!("{digits}.0e{power}"),
                _ => number,
            }
        }
        value => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let values = json!({
            "text": "a b", "number": "1", "yes": "yes", "colon": "a: b", "star": "*.jsonl", "empty": "", "var": "${x}",
            "quote": "say \"no\"", "null": "null", "hash": "a #b", "rate": 8e-6, "whole": 3, "float": 1.0, "on": true,
            "list": ["q_proj", "k_proj", 3], "long": vec!["a_long_name_of_a_module"; 9], "map": {"prompt": "question", "a b": "c"},
            "datasets": [{"path": "a.jsonl", "weight": 0.5}, {"path": "b.jsonl", "columns": {"prompt": "x"}}],
            "template": "{% for m in messages %}\n  {{ m }}\n{% endfor %}", "ends": "a\nb\n", "nothing": [],
        });
        let mut stage = OutlineStage::new("a", "kind").commented("a comment");
        for (name, value) in values.as_object().unwrap() {
            stage.set(name, value.clone());
        }
        let outline = Outline {
            schema: Some("s.json".into()),
            description: "What: it is".into(),
            stages: vec![stage, OutlineStage::new("b", "bare")],
            outputs: vec![("a".into(), "out/a".into())],
            ..Outline::default()
        };
        let rendered = outline.render();
        let read: Value = serde_yaml::from_str(&rendered.text).unwrap();
        assert_eq!(read["stages"]["a"]["kind"], values, "{}", rendered.text);
        assert_eq!(read["stages"]["b"]["bare"], json!({}));
        assert_eq!(read["description"], "What: it is");
        assert_eq!(read["outputs"]["a"], "out/a");
        assert!(
            rendered
                .text
                .starts_with("# yaml-language-server: $schema=s.json\n")
        );
        let lines: Vec<&str> = rendered.text.lines().collect();
        for (line, stage, index) in rendered.lines {
            let name = &outline.stages[stage].parameters[index].0;
            assert!(lines[line - 1].contains(name.as_str()), "{name}");
        }
        assert!(
            rendered.text.contains("rate: 8.0e-6\n"),
            "{}",
            rendered.text
        );
    }
}
