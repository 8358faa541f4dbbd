//! Where the rows are that other programs train on, and how they are formed.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::Config;
use crate::recipe::foreign::Program;
use crate::recipe::outline::OutlineStage;

/// Rows of a file or a repository.
#[derive(Default)]
pub(super) struct Source {
    /// A path or a repository.
    pub(super) place: String,
    pub(super) is_local: bool,
    pub(super) name: Option<String>,
    pub(super) split: Option<String>,
    /// The form of the rows.
    pub(super) format: Option<String>,
    /// From our column to theirs.
    pub(super) columns: BTreeMap<String, String>,
    /// Whether the program learns all that the assistant says in a conversation.
    pub(super) all_answers: bool,
}

/// All that a config names, and the key that names them.
pub(super) struct Sources {
    pub(super) key: &'static str,
    pub(super) all: Vec<Source>,
}

/// axolotl's templates that render as a built-in one does, by their names without `_` and `-`.
const AXOLOTL_TEMPLATES: [(&str, &str); 8] = [
    ("chatml", "chatml"),
    ("llama3", "llama3"),
    ("gemma", "gemma"),
    ("gemma3", "gemma"),
    ("mistralv2v3", "mistral"),
    ("phi3", "phi3"),
    ("phi35", "phi3"),
    ("qwen3", "qwen3"),
];

/// The same of LLaMA-Factory.
const LLAMA_FACTORY_TEMPLATES: [(&str, &str); 10] = [
    ("alpaca", "alpaca"),
    ("chatml", "chatml"),
    ("llama3", "llama3"),
    ("gemma", "gemma"),
    ("gemma2", "gemma"),
    ("gemma3", "gemma"),
    ("mistral", "mistral"),
    ("phi", "phi3"),
    ("qwen3", "qwen3"),
    ("zephyr", "zephyr"),
];

/// The template that the name ChatML stands for.
pub const CHATML: &str = "\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
";

/// The endings of files with rows.
const ENDINGS: [&str; 8] = [
    ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst",
];

/// Whether a dataset is a file or a folder and not a repository.
fn is_local(folder: &Path, name: &str) -> bool {
    super::is_local(folder, name) || ENDINGS.iter().any(|ending| name.ends_with(ending))
}

/// Reads the datasets of a config.
pub(super) fn sources(
    config: &mut Config<'_>,
    program: Program,
    pairs: bool,
) -> Result<Sources, String> {
    let mut sources = match program {
        Program::Axolotl => axolotl(config)?,
        Program::LlamaFactory => llama_factory(config)?,
        Program::Trl => trl(config)?,
    };
    for source in &mut sources.all {
        let single = ["alpaca", "sharegpt", "text"];
        if pairs
            && source
                .format
                .as_deref()
                .is_some_and(|format| single.contains(&format))
        {
            source.format = None;
        }
    }
    Ok(sources)
}

fn text_of(value: &Value, key: &str) -> Option<String> {
    value.get(key).and_then(Value::as_str).map(str::to_owned)
}

fn axolotl(config: &mut Config<'_>) -> Result<Sources, String> {
    let key = "datasets";
    let listed = config.get(key).and_then(Value::as_array).cloned();
    let mut all = Vec::new();
    for dataset in listed.ok_or("it has no list of `datasets`")? {
        let path = text_of(&dataset, "path").ok_or("a dataset has no `path`")?;
        let mut files: Vec<String> = match dataset.get("data_files") {
            Some(Value::String(file)) => vec![file.clone()],
            Some(Value::Array(files)) => files
                .iter()
                .filter_map(Value::as_str)
                .map(str::to_owned)
                .collect(),
            _ => Vec::new(),
        };
        // `path: json` is the loader of `datasets`; the files are beside it.
        let loader = ["json", "csv", "parquet", "arrow", "text"].contains(&path.as_str());
        if !loader || files.is_empty() {
            files = vec![path];
        }
        let (format, columns) = form(config, key, &dataset);
        let all_answers = all_answers(config, key, &dataset);
        for place in files {
            let local =
                is_local(config.folder, &place) || loader || place.matches('/').count() != 1;
            all.push(Source {
                is_local: local,
                place,
                name: text_of(&dataset, "name"),
                split: text_of(&dataset, "split"),
                format: format.clone(),
                columns: columns.clone(),
                all_answers,
            });
        }
    }
    Ok(Sources { key, all })
}

/// Whether axolotl learns all answers of a dataset's conversations: those of `roles_to_train`, by default the assistant's.
fn all_answers(config: &mut Config<'_>, key: &str, dataset: &Value) -> bool {
    let kind = text_of(dataset, "type").unwrap_or_default();
    let assistant = ["assistant", "gpt", "model", "chatbot"];
    let other = match dataset.get("roles_to_train") {
        None | Some(Value::Null) => false,
        Some(Value::Array(roles)) => {
            !roles
                .iter()
                .all(|role| role.as_str().is_some_and(|role| assistant.contains(&role)))
                || roles.is_empty()
        }
        Some(_) => true,
    };
    if other {
        config.lose(
            key,
            "the `roles_to_train` of a dataset: what the assistant says is learnt, or whole conversations (`completion_only_loss: false`)",
        );
    }
    let conversations = kind.starts_with("chat_template") || kind.starts_with("sharegpt");
    conversations && !config.is_on("train_on_inputs")
}

/// The form of rows by axolotl's `type`.
fn form(
    config: &mut Config<'_>,
    key: &str,
    dataset: &Value,
) -> (Option<String>, BTreeMap<String, String>) {
    let mut columns = BTreeMap::new();
    let mut set = |ours: &str, theirs: &str| _ = columns.insert(ours.to_owned(), theirs.to_owned());
    let named = match dataset.get("type") {
        Some(Value::String(named)) => named.clone(),
        Some(Value::Object(fields)) => {
            for (ours, field) in [
                ("system", "field_system"),
                ("prompt", "field_instruction"),
                ("chosen", "field_output"),
            ] {
                if let Some(theirs) = fields.get(field).and_then(Value::as_str) {
                    set(ours, theirs);
                }
            }
            for (ours, field) in [
                ("prompt", "field_prompt"),
                ("chosen", "field_chosen"),
                ("rejected", "field_rejected"),
            ] {
                if let Some(theirs) = fields.get(field).and_then(Value::as_str) {
                    set(ours, theirs);
                }
            }
            if fields.contains_key("format") || fields.contains_key("prompt_format") {
                config.lose(
                    key,
                    "the prompt's `format` of a dataset: a chat template renders rows",
                );
            }
            return (None, columns);
        }
        _ => return (None, columns),
    };
    let (first, second) = named.split_once('.').unwrap_or((&named, ""));
    let format = match (first, second) {
        ("alpaca" | "alpaca_chat", _) => Some("alpaca"),
        ("sharegpt", _) => Some("sharegpt"),
        ("completion", _) => {
            if let Some(field) = text_of(dataset, "field") {
                set("text", &field);
            }
            Some("text")
        }
        ("chat_template", _) => {
            let field = text_of(dataset, "field_messages");
            match field.as_deref() {
                None | Some("messages") => Some("messages"),
                Some("conversations") => Some("sharegpt"),
                Some(other) => {
                    set("messages", other);
                    None
                }
            }
        }
        (_, "intel") => {
            set("prompt", "question");
            None
        }
        (_, "argilla" | "argilla_chat") => {
            set("prompt", "instruction");
            set("chosen", "chosen_response");
            set("rejected", "rejected_response");
            None
        }
        ("chatml" | "llama3" | "orpo" | "zephyr" | "user_defined" | "", _) => None,
        _ => {
            config.lose(
                key,
                format!("the form `{named}` of a dataset: rows are read by their columns"),
            );
            None
        }
    };
    for (ours, field) in [("chosen", "field_chosen"), ("rejected", "field_rejected")] {
        if let Some(theirs) = text_of(dataset, field) {
            set(ours, &theirs);
        }
    }
    (format.map(str::to_owned), columns)
}

fn llama_factory(config: &mut Config<'_>) -> Result<Sources, String> {
    let key = "dataset";
    let names: Vec<String> = match config.get(key) {
        Some(Value::String(names)) => names
            .split(',')
            .map(|name| name.trim().to_owned())
            .collect(),
        Some(Value::Array(names)) => names
            .iter()
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect(),
        _ => return Err("it names no `dataset`".to_owned()),
    };
    let written = config.text("dataset_dir").unwrap_or("data").to_owned();
    let folder = config.folder.join(&written);
    let known = std::fs::read(folder.join("dataset_info.json")).ok();
    let known: Option<Value> = known.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    if config.get("dataset_dir").is_some() {
        config.went("dataset_dir", "import_dataset.path");
    }
    let mut all = Vec::new();
    for name in names {
        let about = known.as_ref().and_then(|known| known.get(&name));
        let Some(about) = about else {
            let place = format!("{written}/{name}.json");
            config.lose(
                key,
                format!("`{name}` is not in `{written}/dataset_info.json`; `{place}` stands in its place: name its file"),
            );
            all.push(Source {
                place,
                is_local: true,
                ..Source::default()
            });
            continue;
        };
        let file = text_of(about, "file_name");
        let repo = text_of(about, "hf_hub_url");
        let (place, is_local) = match (file, repo) {
            (Some(file), _) => (format!("{written}/{file}"), true),
            (None, Some(repo)) => (repo, false),
            (None, None) => {
                return Err(format!(
                    "`{name}` in `dataset_info.json` names no file and no repository"
                ));
            }
        };
        let sharegpt = text_of(about, "formatting").as_deref() == Some("sharegpt");
        let ranking = about.get("ranking").is_some_and(|ranking| *ranking == true);
        let theirs = about.get("columns").cloned().unwrap_or_default();
        let mut columns = BTreeMap::new();
        let ours = if ranking {
            [
                ("chosen", "chosen"),
                ("rejected", "rejected"),
                ("system", "system"),
                ("prompt", if sharegpt { "messages" } else { "prompt" }),
            ]
        } else if sharegpt {
            [
                ("messages", "messages"),
                ("system", "system"),
                ("", ""),
                ("", ""),
            ]
        } else {
            [
                ("prompt", "prompt"),
                ("chosen", "response"),
                ("system", "system"),
                ("", ""),
            ]
        };
        for (ours, column) in ours {
            if let Some(column) = text_of(&theirs, column).filter(|_| !ours.is_empty()) {
                columns.insert(ours.to_owned(), column);
            }
        }
        if !ranking && text_of(&theirs, "query").is_some() {
            config.lose(key, format!("the column `query` of `{name}`: join it as in `prompt: \"${{instruction}}\\n\\n${{input}}\"`"));
        }
        if about.get("tags").is_some() {
            config.lose(
                key,
                format!("the `tags` of `{name}`: roles are known by their usual names"),
            );
        }
        let format = match (sharegpt, ranking, columns.is_empty()) {
            (true, false, true) => Some("sharegpt"),
            (false, false, true) => Some("alpaca"),
            _ => None,
        };
        all.push(Source {
            place,
            is_local,
            name: text_of(about, "subset"),
            split: text_of(about, "split"),
            format: format.map(str::to_owned),
            columns,
            all_answers: sharegpt
                && !config.is_on("mask_history")
                && !config.is_on("train_on_prompt"),
        });
    }
    Ok(Sources { key, all })
}

fn trl(config: &mut Config<'_>) -> Result<Sources, String> {
    let split = config.text("dataset_train_split").map(str::to_owned);
    let mut columns = BTreeMap::new();
    if let Some(field) = config.text("dataset_text_field").map(str::to_owned) {
        config.went("dataset_text_field", "columns.text");
        if field != "text" {
            columns.insert("text".to_owned(), field);
        }
    }
    if split.is_some() {
        config.went("dataset_train_split", "download_dataset.split");
    }
    let source =
        |config: &Config<'_>, place: String, name: Option<String>, split: Option<String>| Source {
            is_local: is_local(config.folder, &place),
            place,
            name,
            split,
            format: None,
            columns: columns.clone(),
            all_answers: false,
        };
    if let Some(listed) = config.get("datasets").and_then(Value::as_array).cloned() {
        let mut all = Vec::new();
        for dataset in listed {
            let place = text_of(&dataset, "path").ok_or("a dataset has no `path`")?;
            all.push(source(
                config,
                place,
                text_of(&dataset, "name"),
                text_of(&dataset, "split"),
            ));
        }
        return Ok(Sources {
            key: "datasets",
            all,
        });
    }
    let place = config
        .text("dataset_name")
        .ok_or("it names no `dataset_name`")?
        .to_owned();
    let all = vec![source(config, place, None, split)];
    Ok(Sources {
        key: "dataset_name",
        all,
    })
}

/// The chat template by its name.
pub(super) fn template(config: &mut Config<'_>, program: Program, chats: &mut OutlineStage) {
    for key in ["chat_template", "template"] {
        let Some(name) = config.text(key).map(str::to_owned) else {
            continue;
        };
        // A template of axolotl beside its name.
        if name == "jinja" || name.starts_with("tokenizer_default") {
            config.went(key, "apply_chat_template");
            continue;
        }
        let known: &[_] = match program {
            Program::LlamaFactory => &LLAMA_FACTORY_TEMPLATES,
            Program::Axolotl | Program::Trl => &AXOLOTL_TEMPLATES,
        };
        let plain = name.replace(['_', '-'], "").to_lowercase();
        match known.iter().find(|(known, _)| *known == plain) {
            Some((_, ours)) => {
                config.went(key, "apply_chat_template.template");
                chats.set("template", (*ours).into());
            }
            None => config.lose(
                key,
                format!("`{name}`: the model's own chat template is used; `template: FILE` of `apply_chat_template` takes another"),
            ),
        }
    }
}
