//! A GGUF file becomes a model folder: weights and configuration by `ml::gguf`, the tokenizer by `text::vocabulary`.

use std::fs;
use std::path::Path;

use anyhow::Context as _;

use super::dtype::Dtype;
use crate::engine::Context;
use crate::ml::gguf::Array;
use crate::ml::gguf::config::model_type;
use crate::ml::gguf::import::{import, suggested};
use crate::ml::gguf::read::File;
use crate::text::vocabulary::{TokenKind, Vocabulary};

/// The ending of GGUF files.
const ENDING: &str = ".gguf";
/// The size above which weights go into several files.
const MAX_SHARD_SIZE: u64 = 5_000_000_000;

/// Whether a path or the name of a file is that of a GGUF file.
pub(in crate::stages) fn is_gguf(name: &str) -> bool {
    let start = name.len().saturating_sub(ENDING.len());
    let ending = name.as_bytes().get(start..).unwrap_or_default();
    ending.eq_ignore_ascii_case(ENDING.as_bytes())
}

/// Writes the model in the file `path` to the stage's output, in the type `dtype` or in one like the file's.
pub(super) fn import_file(cx: &Context, path: &Path, dtype: Option<Dtype>) -> anyhow::Result<()> {
    let file = File::open(path)?;
    let float = dtype.map_or_else(|| suggested(&file), Dtype::float);
    let report = import(
        &file,
        float,
        MAX_SHARD_SIZE,
        cx.out(),
        &mut |done, total| {
            cx.progress(done, Some(total), "bytes");
            cx.check_cancelled()
        },
    )?;
    for written in &report.files {
        cx.written(&written.name, &written.blake3)?;
    }
    cx.note("gguf_architecture", report.arch);
    let kinds = report.kinds.iter();
    let kinds: Vec<_> = kinds
        .map(|(kind, count)| format!("{count} {kind}"))
        .collect();
    cx.note("gguf_types", kinds.join(", "));
    cx.note("dtype", float.name());
    // The weights are of use with another model's tokenizer.
    let warning = write_tokenizer(&file, cx.out())
        .unwrap_or_else(|error| Some(format!("the file's tokenizer can't be made: {error:#}")));
    if let Some(warning) = warning {
        cx.warn(warning);
    }
    for warning in write_templates(&file, cx.out())? {
        cx.warn(warning);
    }
    Ok(())
}

/// Writes the tokenizer and the chat template of the file `path` to the folder `out`, without the weights.
pub(in crate::stages) fn tokenizer_alone(path: &Path, out: &Path) -> anyhow::Result<()> {
    let file = File::open(path)?;
    write_tokenizer(&file, out)?;
    write_templates(&file, out).map(drop)
}

/// Why the model in the file `path` is not supported, as far as its metadata tell. What can't be read at all is for the stage to refuse.
pub(in crate::stages) fn unsupported(path: &Path) -> Option<anyhow::Error> {
    model_type(&File::open(path).ok()?).err()
}

/// Writes the tokenizer. Returns what is to be warned of.
fn write_tokenizer(file: &File, out: &Path) -> anyhow::Result<Option<String>> {
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let model = file.text(&key("model"))?;
    let model = model.context("it has none (`tokenizer.ggml.model`)")?;
    let id = |name: &str| -> anyhow::Result<Option<u32>> {
        let id = file.unsigned(&key(&format!("{name}_token_id")))?;
        Ok(id.map(u32::try_from).transpose()?)
    };
    let kinds = file.array(&key("token_type"))?.and_then(Array::unsigned);
    let kinds = kinds.unwrap_or_default().into_iter();
    let scores = file.array(&key("scores"))?.and_then(Array::singles);
    let name = file.text("general.name")?.unwrap_or_default();
    let name = name.to_lowercase();
    let arch = file.text("general.architecture")?.unwrap_or_default();
    let vocabulary = Vocabulary {
        model,
        pre: file.text(&key("pre"))?,
        tokens: file.texts(&key("tokens"))?.unwrap_or_default(),
        kinds: kinds.map(TokenKind::from_id).collect(),
        scores: scores.unwrap_or_default(),
        merges: file.texts(&key("merges"))?.unwrap_or_default(),
        bos: id("bos")?,
        eos: id("eos")?,
        unk: id("unknown")?,
        pad: id("padding")?,
        add_bos: file.flag(&key("add_bos_token"))?,
        add_eos: file.flag(&key("add_eos_token"))?,
        add_space_prefix: file.flag(&key("add_space_prefix"))?,
        // llama.cpp, too, knows it by the name alone.
        strips_right: name.contains("phi-3") || name.contains("phi3"),
        model_max_length: file.unsigned(&format!("{arch}.context_length"))?,
    };
    vocabulary.write(out)?;
    let splits = vocabulary.model == "gpt2" && [None, Some("default")].contains(&vocabulary.pre);
    Ok(splits.then(|| {
        "the file doesn't say how texts are split into words (`tokenizer.ggml.pre`), so they are split as llama.cpp does it then, which \
         needn't be what the model was trained with; a newer file of the model may say it"
            .to_owned()
    }))
}

/// Writes the chat template, and named ones beside it. Returns what is to be warned of.
fn write_templates(file: &File, out: &Path) -> anyhow::Result<Vec<String>> {
    const KEY: &str = "tokenizer.chat_template";
    let mut warnings = Vec::new();
    if let Some(text) = file.text(KEY)? {
        fs::write(out.join("chat_template.jinja"), text)
            .context("could not write `chat_template.jinja`")?;
    } else {
        warnings.push(
            "the file has no chat template: `apply_chat_template` needs a `template`".to_owned(),
        );
    }
    let folder = out.join("additional_chat_templates");
    for key in file.metadata().keys() {
        let Some(name) = key
            .strip_prefix(KEY)
            .and_then(|rest| rest.strip_prefix('.'))
        else {
            continue;
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        let Some(text) = file.text(key)?.filter(|_| name.chars().all(plain)) else {
            warnings.push(format!(
                "the chat template `{name}` is left out: a file can't be called that"
            ));
            continue;
        };
        let write = || -> std::io::Result<()> {
            fs::create_dir_all(&folder)?;
            fs::write(folder.join(format!("{name}.jinja")), text)
        };
        write().with_context(|| format!("could not write the chat template `{name}`"))?;
    }
    Ok(warnings)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endings_are_found_in_any_case() {
        for (name, is) in [
            ("a.gguf", true),
            ("models/B.Q4_K_M.GGUF", true),
            (".gguf", true),
            ("gguf", false),
            ("a.gguf/", false),
            ("", false),
            ("ü.ggu", false),
        ] {
            assert_eq!(is_gguf(name), is, "{name}");
        }
    }
}
