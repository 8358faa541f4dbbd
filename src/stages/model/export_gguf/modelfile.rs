//! The `Modelfile` beside a GGUF file, by which `ollama create` takes it.
//!
//! Ollama doesn't run chat templates in Jinja; its own are in Go's template language. Where the chat template puts constant texts around
//! turns ([`PlainTemplate`]), the same is written in Go's.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context as _;

use super::metadata::{Tokens, sampling};
use crate::engine::Context;
use crate::text::plain_template::PlainTemplate;

/// The file's name, which `ollama create` looks for.
const NAME: &str = "Modelfile";
/// Writes the `Modelfile` for the file called `gguf`.
pub(super) fn write(cx: &Context, model: &Path, gguf: &str, tokens: &Tokens) -> anyhow::Result<()> {
    let mut text = format!("FROM ./{gguf}\n");
    let turns = match tokens.renderer(model)? {
        Some(template) => PlainTemplate::find(&template),
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
    for (setting, value) in sampling(model)? {
        _ = writeln!(text, "PARAMETER {} {value}", setting.ollama);
    }
    std::fs::write(cx.out().join(NAME), text).with_context(|| format!("could not write `{NAME}`"))
}
