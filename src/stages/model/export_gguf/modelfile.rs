//! The `Modelfile` beside a GGUF file, by which `ollama create` takes it.
//!
//! Ollama doesn't run chat templates in Jinja; its own are in Go's template language. Where the chat template puts constant texts around
//! turns ([`Turns`]), the same is written in Go's.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context as _;
use serde_json::Value;

use super::metadata::Tokens;
use crate::engine::Context;
use crate::text::turns::Turns;

/// The file's name, which `ollama create` looks for.
const NAME: &str = "Modelfile";
/// Settings of generation by transformers' and by Ollama's names.
const PARAMETERS: [(&str, &str); 5] = [
    ("temperature", "temperature"),
    ("top_p", "top_p"),
    ("top_k", "top_k"),
    ("min_p", "min_p"),
    ("repetition_penalty", "repeat_penalty"),
];

/// Writes the `Modelfile` for the file called `gguf`.
pub(super) fn write(cx: &Context, model: &Path, gguf: &str, tokens: &Tokens) -> anyhow::Result<()> {
    let mut text = format!("FROM ./{gguf}\n");
    let turns = match tokens.renderer(model)? {
        Some(template) => Turns::find(&template),
        None => None,
    };
    let template = turns
        .as_ref()
        .map(|turns| turns.go_template(tokens.added_bos()));
    match (template, &tokens.template) {
        (Some(template), _) if !template.contains("\"\"\"") => {
            if turns.is_some_and(|turns| turns.trims) {
                text.push_str(
                    "# The chat template removes white space around messages, which Ollama's language can't.\n",
                );
            }
            _ = writeln!(text, "TEMPLATE \"\"\"{template}\"\"\"");
            cx.note("modelfile_template", true);
        }
        (_, Some(_)) => {
            cx.note("modelfile_template", false);
            cx.warn(format!(
                "the chat template does more than put constant texts around turns, so the `{NAME}` has no TEMPLATE: Ollama will guess one; \
                 hint: write it by hand, or use llama.cpp, which reads the chat template in the file"
            ));
        }
        (_, None) => cx.info(format!(
            "the model has no chat template, so the `{NAME}` has no TEMPLATE: Ollama will complete texts"
        )),
    }
    for end in tokens.ends() {
        if !end.contains(['"', '\n', '\r']) {
            _ = writeln!(text, "PARAMETER stop \"{end}\"");
        }
    }
    for (name, value) in parameters(model)? {
        _ = writeln!(text, "PARAMETER {name} {value}");
    }
    std::fs::write(cx.out().join(NAME), text).with_context(|| format!("could not write `{NAME}`"))
}

/// The settings of sampling in `generation_config.json`, by Ollama's names.
fn parameters(model: &Path) -> anyhow::Result<Vec<(&'static str, Value)>> {
    let path = model.join("generation_config.json");
    if !path.is_file() {
        return Ok(Vec::new());
    }
    let read = || -> anyhow::Result<Value> { Ok(serde_json::from_slice(&std::fs::read(&path)?)?) };
    let config = read().with_context(|| format!("could not read `{}`", path.display()))?;
    let found = PARAMETERS.into_iter().filter_map(|(theirs, name)| {
        let value = config.get(theirs)?;
        value.is_number().then(|| (name, value.clone()))
    });
    Ok(found.collect())
}
