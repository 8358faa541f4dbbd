//! Carries the chat template from `apply_chat_template` along with the chats, the tokens and the adapter to the trained model, so that
//! the model is used with the template that it was trained with.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, anyhow};
use serde_json::{Map, Value, json};

use crate::engine::Context;
use crate::ml::io::folder::{self, sorted_json};
use crate::text::comments::without_comments;
use crate::text::tokenizer::{SpecialToken, chat_template, read_template};
use crate::text::turn_end::turn_end;

/// The file, which transformers reads before all others and TRL saves beside an adapter too.
pub(in crate::stages) const FILE: &str = "chat_template.jinja";
pub(in crate::stages) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const GENERATION_CONFIG: &str = "generation_config.json";
/// Named templates; with them transformers may choose another one than the default.
const NAMED: &str = "additional_chat_templates";

/// Puts a template into an artifact, without its comments: with others nothing below is stale.
pub(in crate::stages) fn write(template: &str, out: &Path) -> anyhow::Result<()> {
    fs::write(out.join(FILE), without_comments(template))
        .with_context(|| format!("could not write `{FILE}`"))
}

/// The template in an artifact, if there is one.
pub(in crate::stages) fn read(artifact: &Path) -> anyhow::Result<Option<String>> {
    let path = artifact.join(FILE);
    if !path.is_file() {
        return Ok(None);
    }
    let text = read_template(&path);
    let text = text.map_err(|error| anyhow!("could not read `{FILE}`: {error:#}"));
    text.map(Some)
}

/// Puts the template of one artifact, if it has one, into another.
pub(in crate::stages) fn carry(from: &Path, to: &Path) -> anyhow::Result<()> {
    match read(from)? {
        Some(template) => write(&template, to),
        None => Ok(()),
    }
}

/// The token that ends an answer in the template beside some tokens, as the tokenizer of `model` knows it.
pub(in crate::stages) fn stop_token(
    cx: &Context,
    artifact: &Path,
    model: &Path,
) -> anyhow::Result<Option<SpecialToken>> {
    let template = read(artifact)?;
    Ok(template.and_then(|template| end_of_turns(cx, &template, model)))
}

/// The token that ends an answer. A template that came with an adapter need not be one that this program can render.
pub(in crate::stages) fn end_of_turns(
    cx: &Context,
    template: &str,
    model: &Path,
) -> Option<SpecialToken> {
    if !model.join("tokenizer.json").is_file() {
        return None;
    }
    turn_end(template, model).unwrap_or_else(|error| {
        cx.warn(format!(
            "the token that ends the chat template's answers could not be found: {error:#}"
        ));
        None
    })
}

/// Makes `template` the chat template of the model folder in the stage's output, and adds the token that ends its answers to
/// those that end a generation. What says the same already stays as it is, to the byte.
pub(in crate::stages) fn install(cx: &Context, template: &str) -> anyhow::Result<()> {
    let out = cx.out();
    let replaced = !is_installed(template, out)?;
    if replaced {
        write(template, out)?;
        forget_others(out)?;
        cx.note("chat_template", "of the training");
    }
    let stop = end_of_turns(cx, template, out);
    let added = match &stop {
        Some(stop) => add_stop(out, stop.id)?,
        None => false,
    };
    if let Some(stop) = &stop {
        cx.note("stop_token", &stop.text);
    }
    let what = format!("the chat template of the training is in the result as `{FILE}`");
    let ends = stop.as_ref().map(|stop| {
        let text = &stop.text;
        if added {
            format!(
                "`{text}`, which ends its answers, is a stop token in `{GENERATION_CONFIG}` now"
            )
        } else {
            format!("its answers end with `{text}`, which was a stop token already")
        }
    });
    match (replaced, ends) {
        (true, Some(ends)) => cx.info(format!("{what}; {ends}")),
        (true, None) => cx.info(format!(
            "{what}; its answers end with no token of the tokenizer, so the stop tokens stay as they were"
        )),
        (false, Some(ends)) if added => cx.info(ends),
        (false, _) => {}
    }
    Ok(())
}

/// Whether `template` is what every version of transformers finds in a model folder.
fn is_installed(template: &str, folder: &Path) -> anyhow::Result<bool> {
    // Several named ones without a default are another way of having another one.
    let own = chat_template(folder).ok().flatten();
    if own.is_none_or(|own| without_comments(&own) != without_comments(template)) {
        return Ok(false);
    }
    let config = object(&folder.join(TOKENIZER_CONFIG))?;
    Ok(
        match config
            .as_ref()
            .and_then(|config| config.get("chat_template"))
        {
            Some(Value::String(older)) => without_comments(older) == without_comments(template),
            _ => true,
        },
    )
}

/// Removes the other places where a template may stand, for they would contradict.
fn forget_others(folder: &Path) -> anyhow::Result<()> {
    let path = folder.join(TOKENIZER_CONFIG);
    if let Some(mut config) = object(&path)?
        && config.remove("chat_template").is_some()
    {
        fs::write(&path, sorted_json(&Value::Object(config))?)
            .with_context(|| format!("could not write `{TOKENIZER_CONFIG}`"))?;
    }
    let named = folder.join(NAMED);
    if named.is_dir() {
        fs::remove_dir_all(&named).with_context(|| format!("could not remove `{NAMED}`"))?;
    }
    let old = folder.join("chat_template.json");
    if old.is_file() {
        fs::remove_file(&old).context("could not remove `chat_template.json`")?;
    }
    Ok(())
}

/// Adds an id to those that end a generation; tells whether it was new.
fn add_stop(folder: &Path, id: u32) -> anyhow::Result<bool> {
    let path = folder.join(GENERATION_CONFIG);
    let model = folder::config(folder)?;
    // Where the file is missing, transformers makes it up of the model's configuration.
    let mut config = match object(&path)? {
        Some(config) => config,
        None => ["bos_token_id", "eos_token_id", "pad_token_id"]
            .into_iter()
            .filter_map(|name| Some((name.to_owned(), model.get(name)?.clone())))
            .collect(),
    };
    let set = |config: &Map<String, Value>| match config.get("eos_token_id") {
        None | Some(Value::Null) => None,
        Some(Value::Array(ids)) => Some(ids.clone()),
        Some(one) => Some(vec![one.clone()]),
    };
    let mut stops = set(&config).or_else(|| set(&model)).unwrap_or_default();
    if stops.contains(&json!(id)) {
        return Ok(false);
    }
    stops.push(json!(id));
    config.insert("eos_token_id".into(), Value::Array(stops));
    fs::write(&path, sorted_json(&Value::Object(config))?)
        .with_context(|| format!("could not write `{GENERATION_CONFIG}`"))?;
    Ok(true)
}

/// A JSON object, if the file is there.
fn object(path: &Path) -> anyhow::Result<Option<Map<String, Value>>> {
    if !path.is_file() {
        return Ok(None);
    }
    let read = || -> anyhow::Result<_> { Ok(serde_json::from_slice(&fs::read(path)?)?) };
    read()
        .with_context(|| {
            format!(
                "could not read `{}`",
                path.file_name().unwrap_or_default().display()
            )
        })
        .map(Some)
}

#[cfg(test)]
mod tests;
