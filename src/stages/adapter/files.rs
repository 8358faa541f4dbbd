//! The files of an adapter folder from any source, and the check that it can be used.

use std::path::Path;

use anyhow::{Context as _, bail};

use crate::engine::Context;
use crate::ml::adapter::{Adapter, Bias, CONFIG, FILE};
use crate::ml::model::tensors::ENDS;
use crate::stages::text::chat_template;

/// The files of an adapter, if `names` has all of them. Other files there describe its training or its base model.
pub(in crate::stages) fn choose_files(names: &[&str]) -> anyhow::Result<[&'static str; 2]> {
    let has = |name: &str| names.contains(&name);
    if !has(CONFIG) {
        let hint = if has("config.json") {
            "; it holds a whole model, for which there are `import_model` and `download_model`"
        } else {
            ""
        };
        bail!("it has no `{CONFIG}`, expected a folder that PEFT saved{hint}");
    }
    if !has(FILE) {
        let hint = if has("adapter_model.bin") {
            "; its matrices are only there as `adapter_model.bin`: load it once by PEFT and save it by `save_pretrained`"
        } else {
            ""
        };
        bail!("it has no `{FILE}`{hint}");
    }
    Ok([CONFIG, FILE])
}

/// Copies the chat template beside an adapter. One that can't be read is only a warning, since the adapter works without it.
pub(in crate::stages) fn take_template(
    cx: &Context,
    read: impl FnOnce() -> anyhow::Result<Option<String>>,
) {
    let took = read().and_then(|template| match template {
        Some(template) => chat_template::write(&template, cx.out()),
        None => Ok(()),
    });
    if let Err(error) = took {
        cx.warn(format!(
            "the chat template beside the adapter was left behind: {error:#}"
        ));
    }
}

/// Reads the adapter in the stage's output, and notes what it contains.
pub(in crate::stages) fn check(cx: &Context) -> anyhow::Result<()> {
    let adapter = Adapter::read(cx.out())?;
    let config = &adapter.config;
    let pairs = adapter.tensors.values();
    let count = pairs.map(|pair| pair.a.elem_count() + pair.b.elem_count());
    cx.note("modules", adapter.tensors.len());
    cx.note("parameters", count.sum::<usize>());
    cx.note("r", config.r);
    if !adapter.saved.is_empty() {
        cx.note("whole_tensors", adapter.saved.len());
    }
    if !adapter.token_rows.is_empty() {
        let rows = adapter.token_rows.values().map(|rows| rows.ids.len());
        cx.note("token_rows", rows.sum::<usize>());
    }
    if config.use_dora {
        cx.note("use_dora", true);
    }
    if config.bias != Bias::None && !adapter.saved.keys().any(|name| name.ends_with(".bias")) {
        cx.warn(format!(
            "`bias` is `{}`, but the adapter has no biases; older versions of PEFT did not save them",
            config.bias.name()
        ));
    }
    let paths = adapter.tensors.keys().map(String::as_str);
    for (name, unused) in [
        ("rank_pattern", config.rank_pattern.unused(&paths)),
        ("alpha_pattern", config.alpha_pattern.unused(&paths)),
    ] {
        for pattern in unused {
            cx.warn(format!(
                "`{name}` has the pattern `{pattern}`, which fits none of the modules with matrices and changes nothing"
            ));
        }
    }
    let own = adapter.saved.keys().filter(|name| {
        let path = name.strip_suffix(".weight").unwrap_or(name);
        !adapter.trains(name) && !ENDS.contains(&path)
    });
    for name in own {
        cx.warn(format!(
            "`{FILE}` has `{name}`, of which its settings say nothing; as with PEFT it takes the place of the model's"
        ));
    }
    for name in config.unknown() {
        cx.warn(format!(
            "`{CONFIG}` has the setting `{name}`, which is not known here; if it changes what the adapter computes, its numbers are wrong"
        ));
    }
    Ok(())
}

/// The files in a folder, sorted.
pub(in crate::stages) fn names_in(folder: &Path) -> anyhow::Result<Vec<String>> {
    let entries = std::fs::read_dir(folder)
        .with_context(|| format!("could not list `{}`", folder.display()))?;
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry?;
        // Links are followed, since folders of the hub's cache consist of them.
        if let Ok(name) = entry.file_name().into_string()
            && entry.path().is_file()
        {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}
