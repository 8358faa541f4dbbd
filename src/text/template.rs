//! A chat template in the environment that transformers gives it, so that real templates print the same here. Its one entry
//! is [`ChatTemplate`].

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use chrono::NaiveDate;
use chrono::format::{Item, StrftimeItems};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Object;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, UndefinedBehavior, Value};

use super::generation::{BEGIN, END, MARKS, unmark};
use super::{depth, dialect, filters};

/// The Llama 3 template in our own words.
pub const LLAMA3: &str = include_str!("../../recipes/templates/llama3.jinja");

/// Steps that one rendering may take; 64 bytes that it makes count as one. Real templates take some dozens a message; an endless
/// one is stopped within a second, and holds no more than 256 MiB.
const FUEL: u64 = 4 << 20;
/// The longest template, in bytes; the longest real ones have some ten thousand.
pub const LONGEST: usize = 1 << 20;
const NAME: &str = "chat template";

/// A compiled chat template with the tokenizer's special tokens.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    special_tokens: Arc<BTreeMap<String, Value>>,
    /// Whether it has `{% generation %}` tags.
    generation: bool,
}

/// What a template is given beside the messages.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Extras {
    /// The tools that the model may call.
    pub tools: Option<Value>,
    /// Variables of the row's own, before special tokens of the same name.
    pub variables: BTreeMap<String, Value>,
}

/// The variables of one rendering. Most templates read a few, a few times.
#[derive(Debug)]
struct Variables {
    special_tokens: Arc<BTreeMap<String, Value>>,
    messages: Value,
    add_generation_prompt: bool,
    extras: Extras,
    /// Whether `{% generation %}` tags print their marks.
    marked: bool,
}

impl Object for Variables {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.get_value_by_str(key.as_str()?)
    }

    fn get_value_by_str(self: &Arc<Self>, key: &str) -> Option<Value> {
        match key {
            "messages" => Some(self.messages.clone()),
            "tools" => Some(self.extras.tools.clone().unwrap_or(Value::from(()))),
            "add_generation_prompt" => Some(Value::from(self.add_generation_prompt)),
            BEGIN => self.marked.then(|| Value::from(MARKS[0])),
            END => self.marked.then(|| Value::from(MARKS[1])),
            _ => {
                let given = self.extras.variables.get(key);
                let found = given.or_else(|| self.special_tokens.get(key)).cloned();
                found.or_else(|| (key == "documents").then(|| Value::from(())))
            }
        }
    }
}

impl ChatTemplate {
    /// Compiles `source`. `special_tokens` become variables (`bos_token`, ..); `date` is what `strftime_now` says, without it
    /// a template that calls it fails: a result must not depend on the day it was made.
    pub fn new(
        source: &str,
        special_tokens: BTreeMap<String, String>,
        date: Option<NaiveDate>,
    ) -> Result<Self> {
        ensure!(
            source.len() <= LONGEST,
            "the chat template has {} bytes; the limit is 1 MiB",
            source.len()
        );
        if let Some(line) = depth::too_deep(source) {
            bail!(
                "the chat template can't be read: an expression or a chain of `elif` that begins in line {line} is nested too deeply"
            );
        }
        let mut environment = Environment::new();
        let mut syntax = SyntaxConfig::builder();
        syntax.trim_blocks(true).lstrip_blocks(true);
        environment.set_syntax(syntax.build()?);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_fuel(Some(FUEL));
        filters::install(&mut environment);
        environment.add_function(
            "raise_exception",
            |message: &Value| -> Result<Value, Error> {
                Err(Error::new(
                    ErrorKind::InvalidOperation,
                    format!("{RAISED}{message}"),
                ))
            },
        );
        environment.add_function("strftime_now", move |format: &str| strftime(date, format));
        let translated = dialect::translate(source)?;
        let generation = translated.contains(&format!("{{{{ {BEGIN} }}}}"));
        environment
            .add_template_owned(NAME, translated)
            .map_err(|error| explain(&error, source))
            .context("the chat template can't be read")?;
        Ok(Self {
            environment,
            source: source.to_owned(),
            generation,
            special_tokens: Arc::new(
                special_tokens
                    .into_iter()
                    .map(|(name, token)| (name, Value::from(token)))
                    .collect(),
            ),
        })
    }

    /// The template as it was written.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// A special token's text, by the name of its variable.
    pub fn special_token(&self, name: &str) -> Option<&str> {
        self.special_tokens.get(name)?.as_str()
    }

    /// The conversation as text.
    pub fn render(&self, messages: &[Value], add_generation_prompt: bool) -> Result<String> {
        self.render_with(messages, add_generation_prompt, &Extras::default())
    }

    /// The same with tools and variables of the row's own.
    pub fn render_with(
        &self,
        messages: &[Value],
        add_generation_prompt: bool,
        extras: &Extras,
    ) -> Result<String> {
        let variables = Variables {
            extras: extras.clone(),
            special_tokens: self.special_tokens.clone(),
            messages: Value::from(messages.to_vec()),
            add_generation_prompt,
            marked: false,
        };
        self.text(Value::from_object(variables))
    }

    /// Whether the template says by `{% generation %}` tags what the assistant says.
    pub fn has_generation(&self) -> bool {
        self.generation
    }

    /// The ranges of bytes in `{% generation %}` tags of `text`, which is the conversation as [`Self::render_with`] prints it.
    ///
    /// # Errors
    /// A template that fails, and one that changes what stands in its tags after it printed it.
    pub fn generated(
        &self,
        messages: &[Value],
        extras: &Extras,
        text: &str,
    ) -> Result<Vec<Range<usize>>> {
        let variables = Variables {
            extras: extras.clone(),
            special_tokens: self.special_tokens.clone(),
            messages: Value::from(messages.to_vec()),
            add_generation_prompt: false,
            marked: true,
        };
        let (unmarked, ranges) = unmark(&self.text(Value::from_object(variables))?)?;
        ensure!(
            unmarked == text,
            "the template changes what stands in its `generation` tags after it printed it, so what the assistant says can't be found"
        );
        Ok(ranges)
    }

    /// The template's text with these variables.
    fn text(&self, variables: Value) -> Result<String> {
        let template = self
            .environment
            .get_template(NAME)
            .map_err(|error| explain(&error, &self.source))?;
        template
            .render(variables)
            .map_err(|error| explain(&error, &self.source))
    }

    /// What a rendered conversation is known by: the special tokens, and everything like `<|..|>` in the template's source.
    pub fn markers(&self) -> Vec<String> {
        let mut markers: Vec<String> = self
            .special_tokens
            .values()
            .filter_map(Value::as_str)
            .filter(|token| token.len() > 2)
            .map(str::to_owned)
            .collect();
        let mut rest = self.source.as_str();
        while let Some(start) = rest.find("<|") {
            rest = &rest[start..];
            let marker = rest.find("|>").map(|end| &rest[..end + 2]);
            match marker.filter(|marker| !marker.contains(char::is_whitespace)) {
                Some(marker) => {
                    markers.push(marker.to_owned());
                    rest = &rest[marker.len()..];
                }
                None => rest = &rest[2..],
            }
        }
        markers.extend(
            ["[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>"]
                .iter()
                .filter(|m| self.source.contains(**m))
                .map(|m| (*m).to_owned()),
        );
        markers.sort();
        markers.dedup();
        markers
    }
}

/// Marks an error that the template raised on purpose.
const RAISED: &str = "raise_exception: ";

fn strftime(date: Option<NaiveDate>, format: &str) -> Result<String, Error> {
    let fail = |text: String| Error::new(ErrorKind::InvalidOperation, text);
    let date = date.ok_or_else(|| {
        fail("`strftime_now` asks for today's date, which would make the result change every day; hint: set `date: \"2024-07-26\"` beside the template".to_owned())
    })?;
    let items: Vec<Item<'_>> = StrftimeItems::new(format).collect();
    let time = date
        .and_hms_opt(0, 0, 0)
        .filter(|_| !items.contains(&Item::Error));
    let time =
        time.ok_or_else(|| fail(format!("`strftime_now` can't use the format `{format}`")))?;
    let mut output = String::new();
    let written = std::fmt::Write::write_fmt(
        &mut output,
        format_args!("{}", time.format_with_items(items.iter())),
    );
    written.map_err(|_| fail(format!("`strftime_now` can't use the format `{format}`")))?;
    Ok(output)
}

/// The error as a sentence with the place and the line of the template.
fn explain(error: &Error, source: &str) -> anyhow::Error {
    let detail = match error.kind() {
        ErrorKind::OutOfFuel => format!("it took more than {FUEL} steps and was stopped"),
        kind => error.detail().map_or_else(
            || kind.to_string(),
            |detail| match (detail.strip_prefix(RAISED), kind) {
                (Some(message), _) => format!("the template refuses the row: {message}"),
                // These say everything already.
                (
                    None,
                    ErrorKind::InvalidOperation
                    | ErrorKind::UnknownFilter
                    | ErrorKind::UnknownFunction
                    | ErrorKind::UnknownMethod
                    | ErrorKind::UnknownTest,
                ) => detail.to_owned(),
                (None, kind) => format!("{kind}: {detail}"),
            },
        ),
    };
    let mut causes = String::new();
    let mut cause = std::error::Error::source(error);
    // A template that includes itself has hundreds of them, all alike; the last one says why.
    let mut last = None;
    while let Some(error) = cause {
        last = Some(error.to_string());
        cause = error.source();
    }
    if let Some(last) = last {
        causes.push_str(": ");
        causes.push_str(&last);
    }
    match error.line() {
        None => anyhow!("{detail}{causes}"),
        Some(number) => {
            let line = source
                .lines()
                .nth(number.saturating_sub(1))
                .unwrap_or_default();
            let line: String = line.chars().take(160).collect();
            anyhow!("line {number} of the chat template: {detail}{causes}\n  {number} | {line}")
        }
    }
}

/// A message with two fields.
pub fn message(role: &str, content: &str) -> Value {
    Value::from_pairs([("role", role), ("content", content)])
}

#[cfg(test)]
mod differences;
#[cfg(test)]
mod tests;
