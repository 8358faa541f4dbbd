//! Converts a row of a table into a chat, with the messages that transformers would pass to the template.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, bail, ensure};
use arrow_array::RecordBatch;
use minijinja::Value;
use minijinja::value::Serde;

use crate::data::cell::Cell;
use crate::data::messages::{is_speaker, part_text};
use crate::text::chat::{ChatRow, Renderer, Side};
use crate::text::template::Extras;

/// The names that templates and libraries use for a model's reasoning before an answer. Most read the first.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];
/// Names that a row's `chat_template_kwargs` can't set: they are not variables, or this stage sets them itself.
const OWN: [&str; 12] = [
    "messages",
    "conversation",
    "tools",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
];

/// The chat in a row, and those parts of it that the template does not read.
pub(crate) fn chat_row(
    renderer: &Renderer,
    batch: &RecordBatch,
    row: usize,
) -> Result<(ChatRow, BTreeSet<String>)> {
    let mut unread = BTreeSet::new();
    let schema = batch.schema();
    let cell = |name: &str| match schema.column_with_name(name) {
        None => Ok(Cell::Null),
        Some((index, field)) => Cell::of_column(field, batch.column(index), row)
            .with_context(|| format!("the column `{name}` can't be read")),
    };
    let mut side = |name: &str| match cell(name)? {
        Cell::Null => Ok(None),
        Cell::Text(text) => Ok(Some(Side::Text(text))),
        Cell::List(items) => Ok(Some(Side::Messages(messages(
            renderer,
            name,
            items,
            &mut unread,
        )?))),
        other => bail!(
            "`{name}` is {}: expected text or a list of messages",
            other.noun()
        ),
    };
    let system = match cell("system")? {
        Cell::Null => None,
        Cell::Text(text) => Some(text),
        other => bail!("`system` is {}: expected text", other.noun()),
    };
    let whole = match side("messages")? {
        None => None,
        Some(Side::Messages(messages)) => Some(messages),
        Some(Side::Text(_)) => bail!("`messages` is text: expected a list of messages"),
    };
    let (chosen, rejected) = (side("chosen")?, side("rejected")?);
    let prompt = side("prompt")?;
    let extras = extras(cell("tools")?, cell("chat_template_kwargs")?)?;
    if extras.tools.is_some() && !renderer.reads("tools") {
        unread.insert("`tools`".to_owned());
    }
    let unread_variables = extras.variables.keys().filter(|name| !renderer.reads(name));
    unread.extend(unread_variables.map(|name| format!("`{name}` of `chat_template_kwargs`")));
    let row = ChatRow {
        system,
        prompt,
        chosen,
        rejected,
        messages: whole,
        extras,
    };
    Ok((row, unread))
}

fn extras(tools: Cell, variables: Cell) -> Result<Extras> {
    let tools = match tools {
        Cell::Null => None,
        // As in TRL, an empty list of tools is passed as none, since templates would print the introduction of tools for it.
        Cell::List(tools) if tools.is_empty() => None,
        tools @ Cell::List(_) => Some(Value::from(Serde(tools))),
        other => bail!("`tools` is {}: expected a list", other.noun()),
    };
    let mut given = BTreeMap::new();
    match variables {
        Cell::Null => {}
        Cell::Map(entries) => {
            for (name, value) in entries {
                ensure!(
                    !OWN.contains(&name.as_str()),
                    "`chat_template_kwargs` has `{name}`, which is no variable of a template"
                );
                given.insert(name, Value::from(Serde(value)));
            }
        }
        other => bail!(
            "`chat_template_kwargs` is {}: expected an object",
            other.noun()
        ),
    }
    Ok(Extras {
        tools,
        variables: given,
    })
}

fn messages(
    renderer: &Renderer,
    name: &str,
    items: Vec<Cell>,
    unread: &mut BTreeSet<String>,
) -> Result<Vec<Value>> {
    let mut made = Vec::with_capacity(items.len());
    for (number, item) in (1..).zip(items) {
        let message = message(renderer, item, unread)
            .with_context(|| format!("message {number} of `{name}` can't be used"))?;
        made.push(Value::from(Serde(message)));
    }
    Ok(made)
}

/// A message as it is passed to the template: without null values, with its reasoning under all names, and with text or parts as content.
fn message(renderer: &Renderer, item: Cell, unread: &mut BTreeSet<String>) -> Result<Cell> {
    let Cell::Map(mut entries) = item else {
        bail!("it is {}: expected an object", item.noun());
    };
    entries.retain(|(_, value)| *value != Cell::Null);
    let message = Cell::Map(entries);
    let role = match message.get("role") {
        Some(Cell::Text(role)) => role.clone(),
        Some(other) => bail!("its `role` is {}: expected text", other.noun()),
        None => bail!("it has no `role`"),
    };
    if !renderer.knows_role(&role) {
        let hint = if is_speaker(&role) {
            "; hint: `format: sharegpt` where the data is imported reads it"
        } else {
            ""
        };
        bail!(
            "its role is `{}`, which the chat template doesn't name: expected `system`, `user`, `assistant` or `tool`{hint}",
            role.chars().take(40).collect::<String>()
        );
    }
    let reasoning = REASONING.iter().find_map(|name| message.get(name)).cloned();
    let Cell::Map(entries) = message else {
        bail!("it is no object");
    };
    for (name, _) in &entries {
        let read = match name.as_str() {
            "role" | "content" => true,
            name if REASONING.contains(&name) => REASONING.iter().any(|name| renderer.reads(name)),
            name => renderer.reads(name),
        };
        if !read {
            unread.insert(format!("`{name}` of messages"));
        }
    }
    let mut made = Vec::with_capacity(entries.len() + 2);
    if let Some(reasoning) = &reasoning
        && !entries.iter().any(|(name, _)| name == "thinking")
    {
        made.push(("thinking".to_owned(), reasoning.clone()));
    }
    for (name, value) in entries {
        let value = match name.as_str() {
            "content" => content(renderer, &role, value)?,
            _ => value,
        };
        made.push((name, value));
    }
    if let Some(reasoning) = reasoning {
        match made.iter_mut().find(|(name, _)| name == REASONING[0]) {
            Some((_, value)) => *value = reasoning,
            None => made.push((REASONING[0].to_owned(), reasoning)),
        }
    }
    Ok(Cell::Map(made))
}

/// The content of a message. Parts of text stay parts for a template that reads them, and are joined by a space for others, as
/// transformers does for models of text (cli/serving/utils.py). What a tool answered may be anything.
fn content(renderer: &Renderer, role: &str, value: Cell) -> Result<Cell> {
    let parts = match value {
        Cell::Text(_) => return Ok(value),
        Cell::List(parts) => parts,
        value if is_tool(role) => return Ok(value),
        other => bail!(
            "its `content` is {}: expected text, or a list of parts with text",
            other.noun()
        ),
    };
    let mut texts = Vec::with_capacity(parts.len());
    for (number, part) in (1..).zip(&parts) {
        match part_text(number, part) {
            Ok(text) => texts.push(text),
            Err(_) if is_tool(role) => return Ok(Cell::List(parts)),
            Err(error) => return Err(error),
        }
    }
    ensure!(!texts.is_empty(), "its `content` is an empty list");
    if renderer.reads_parts() {
        return Ok(Cell::List(parts));
    }
    Ok(Cell::Text(texts.join(" ")))
}

fn is_tool(role: &str) -> bool {
    matches!(role, "tool" | "function" | "ipython" | "observation")
}
