//! `init`: a recipe from data, a model and a method.

use std::fmt::Write as _;
use std::io::{ErrorKind, IsTerminal as _};
use std::path::{Component, Path, PathBuf};

use anyhow::Context as _;

use crate::cli::folders::{normal, root};
use crate::cli::{Failure, default_recipe, eprint_warning, error, print};
use crate::data::import::{ImportOptions, import_files};
use crate::recipe::outline::{Outline, OutlineStage};
use crate::recipe::translate::CHATML;
use crate::stages::KINDS;

/// A file up to this size, in bytes, is read whole, to know how many rows it has.
const SMALL: u64 = 16 << 20;
/// With fewer rows none are held out.
const FEW_ROWS: usize = 20;

#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  pipeline init                                                     # asks for what it needs
  pipeline init --data pairs.jsonl                                  # a small model of its own: runs at once
  pipeline init --data chats.jsonl --model Qwen/Qwen3-0.6B          # LoRA on a model of the hub
  pipeline init --data pairs.csv --model models/my-llama --method dpo --adapter qlora")]
pub(in crate::cli) struct Args {
    /// Where the recipe is written
    #[arg(default_value = default_recipe::NAME)]
    output: PathBuf,
    /// The rows: a file (Parquet, JSONL, JSON, CSV, ..), or a dataset of the hub, `OWNER/NAME`
    #[arg(long, value_name = "FILE|REPO")]
    data: Option<String>,
    /// The model: a folder, or a model of the hub, `OWNER/NAME` [default: a small new one, to try things]
    #[arg(long, value_name = "DIR|REPO")]
    model: Option<String>,
    /// How it is trained [default: `orpo` for rows with a rejected answer, else `sft`]
    #[arg(long)]
    method: Option<Method>,
    /// What is trained: LoRA beside the model, the same on 4-bit weights, or all weights [default: `lora`; `none` for a new model]
    #[arg(long)]
    adapter: Option<Adapter>,
    /// Writes over a recipe that is there
    #[arg(long)]
    force: bool,
}

/// How a model is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(in crate::cli) enum Method {
    /// On answers
    Sft,
    /// On preferences, by the odds ratio
    Orpo,
    /// On preferences, against a reference model
    Dpo,
}

impl Method {
    pub(in crate::cli) fn name(self) -> &'static str {
        match self {
            Self::Sft => "sft",
            Self::Orpo => "orpo",
            Self::Dpo => "dpo",
        }
    }

    fn kind(self) -> &'static str {
        match self {
            Self::Sft => "train_sft",
            Self::Orpo => "train_orpo",
            Self::Dpo => "train_dpo",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Adapter {
    Lora,
    Qlora,
    None,
}

/// Where the rows are.
enum Data {
    File {
        path: String,
        columns: Vec<String>,
        rows: Option<usize>,
    },
    Repository(String),
}

/// What is trained.
enum Model {
    New,
    Folder { path: String, has_template: bool },
    Repository(String),
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    if args.output.exists() && !args.force {
        return Err(there_is_one(&args.output));
    }
    let asks = std::io::stdin().is_terminal() && std::io::stderr().is_terminal();
    let data = match &args.data {
        Some(data) => data.clone(),
        None if asks => question("the rows: a file, or OWNER/NAME of the hub", None)?,
        None => {
            let hint = "`--data FILE` names a file, `--data OWNER/NAME` a dataset of the hub";
            return Err(Failure::Usage(error::with_hint("no data is named", hint)));
        }
    };
    let data = data_of(&data, &args.output)?;
    let model = match &args.model {
        Some(model) => model.clone(),
        None if asks && args.data.is_none() => question(
            "the model: a folder, or OWNER/NAME of the hub; empty for a small new one",
            Some(""),
        )?,
        None => String::new(),
    };
    let model = model_of(&model, &args.output)?;
    let method = match args.method {
        Some(method) => method,
        None if asks && args.data.is_none() => ask_method(suggested(&data))?,
        None => suggested(&data),
    };
    if let Data::File { path, columns, .. } = &data
        && method != Method::Sft
        && !columns.iter().any(|column| column == "rejected")
    {
        let message = format!(
            "`--method {}` learns from preferences, and the rows of `{path}` have no rejected answer",
            method.name()
        );
        let hint = format!(
            "they have {}; `--method sft` learns from single answers",
            columns.join(", ")
        );
        return Err(Failure::Usage(error::with_hint(&message, &hint)));
    }
    let adapter = args.adapter.unwrap_or(match model {
        Model::New => Adapter::None,
        _ => Adapter::Lora,
    });
    let mut outline = outline(&data, &model, method, adapter);
    outline.schema = Some(schema_beside(&args.output)?);
    let text = outline.render().text;
    crate::recipe::parse(&args.output, &text, &[], KINDS)
        .map_err(|errors| Failure::Usage(error::render(&errors)))?;
    write_recipe(&args.output, &text, args.force)?;
    let named = if args.output == Path::new(default_recipe::NAME) {
        String::new()
    } else {
        format!(" {}", args.output.display())
    };
    let mut told = format!("wrote `{}`\n\n", args.output.display());
    _ = writeln!(told, "  pipeline plan{named}     shows what will be done");
    _ = writeln!(told, "  pipeline run{named}      does it");
    if let Model::Repository(_) = model {
        _ = writeln!(
            told,
            "  pipeline login{}    once, for models that need an account",
            " ".repeat(named.len())
        );
    }
    print(&told);
    Ok(())
}

fn there_is_one(path: &Path) -> Failure {
    let message = format!("`{}` is there already", path.display());
    Failure::Usage(error::with_hint(
        &message,
        "`--force` writes over it; another name may be given",
    ))
}

/// Writes a recipe that is not there yet.
pub(super) fn write_recipe(path: &Path, text: &str, force: bool) -> Result<(), Failure> {
    let file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .create_new(!force)
        .open(path);
    let written = file.and_then(|mut file| std::io::Write::write_all(&mut file, text.as_bytes()));
    match written {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Err(there_is_one(path)),
        Err(error) => Err(anyhow::Error::new(error)
            .context(format!("could not write `{}`", path.display()))
            .into()),
    }
}

/// Puts the schema of this version into the project, for editors. Gives its path as the recipe has it.
pub(super) fn schema_beside(recipe: &Path) -> Result<String, Failure> {
    let here = std::env::current_dir().context("there is no current folder")?;
    let file = normal(&here.join(recipe));
    let folder = file.parent().unwrap_or(&here);
    let root = root(folder);
    let schema =
        serde_json::to_string_pretty(&crate::recipe::schema(KINDS)).map_err(anyhow::Error::from)?;
    let place = root.join(".pipeline");
    let write = || -> std::io::Result<()> {
        std::fs::create_dir_all(&place)?;
        std::fs::write(place.join("recipe.schema.json"), schema + "\n")
    };
    write().with_context(|| format!("could not write into `{}`", place.display()))?;
    let up = folder
        .strip_prefix(&root)
        .map_or(0, |below| below.components().count());
    Ok(format!("{}.pipeline/recipe.schema.json", "../".repeat(up)))
}

fn question(prompt: &str, default: Option<&str>) -> Result<String, Failure> {
    let input = dialoguer::Input::<String>::new().with_prompt(prompt);
    let input = match default {
        Some(default) => input
            .default(default.to_owned())
            .show_default(false)
            .allow_empty(true),
        None => input,
    };
    Ok(input
        .interact_text()
        .context("could not read from the terminal")?)
}

fn ask_method(suggested: Method) -> Result<Method, Failure> {
    let all = [Method::Sft, Method::Orpo, Method::Dpo];
    let shown = [
        "sft    on answers",
        "orpo   on preferences, by the odds ratio",
        "dpo    on preferences, against a reference model",
    ];
    let chosen = dialoguer::Select::new()
        .with_prompt("how it is trained")
        .items(shown)
        .default(
            all.iter()
                .position(|method| *method == suggested)
                .unwrap_or(0),
        )
        .interact()
        .context("could not read from the terminal")?;
    Ok(all[chosen])
}

fn suggested(data: &Data) -> Method {
    match data {
        Data::File { columns, .. } if columns.iter().any(|column| column == "rejected") => {
            Method::Orpo
        }
        _ => Method::Sft,
    }
}

/// Whether a name is a repository's and nothing on this machine's.
fn is_repository(name: &str) -> bool {
    let plain = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    let parts: Vec<&str> = name.split('/').collect();
    matches!(parts[..], [owner, name] if plain(owner) && plain(name)) && !Path::new(name).exists()
}

/// A path from the current folder as one from the recipe's.
fn from_recipe(path: &str, recipe: &Path) -> Result<String, Failure> {
    let here = std::env::current_dir().context("there is no current folder")?;
    let folder = normal(&here.join(recipe));
    let folder = folder.parent().unwrap_or(&here);
    let path = normal(&here.join(path));
    let root = root(folder);
    if !path.starts_with(&root) {
        eprint_warning(&format!(
            "`{}` is outside the project `{}`: `--allow-path` allows to read it, or move it there",
            path.display(),
            root.display()
        ));
        return Ok(path.display().to_string());
    }
    let common = folder
        .components()
        .zip(path.components())
        .take_while(|(a, b)| a == b)
        .count();
    let up = folder.components().count() - common;
    let mut relative: PathBuf = std::iter::repeat_n(Component::ParentDir, up).collect();
    relative.extend(path.components().skip(common));
    if relative.as_os_str().is_empty() {
        relative.push(Component::CurDir);
    }
    Ok(relative.display().to_string())
}

fn data_of(data: &str, recipe: &Path) -> Result<Data, Failure> {
    let path = Path::new(data);
    if is_repository(data) {
        return Ok(Data::Repository(data.to_owned()));
    }
    let about = std::fs::metadata(path).map_err(|error| {
        let message = format!("there is no data at `{data}`: {error}");
        let hint = "give a file, or a dataset of the hub as OWNER/NAME";
        Failure::Usage(error::with_hint(&message, hint))
    })?;
    if about.is_dir() {
        // Its files are found and read by the stage.
        return Ok(Data::File {
            path: from_recipe(data, recipe)?,
            columns: Vec::new(),
            rows: None,
        });
    }
    let small = about.len() <= SMALL;
    let options = ImportOptions {
        max_rows: (!small).then_some(1),
        ..ImportOptions::default()
    };
    let folder = tempfile::tempdir().context("could not make a temporary folder")?;
    let destination = folder.path().join("rows.parquet");
    let report = import_files(&[path.to_owned()], &options, &destination, &mut |_| Ok(()))?;
    Ok(Data::File {
        path: from_recipe(data, recipe)?,
        columns: report.columns,
        rows: small.then_some(report.rows),
    })
}

fn model_of(model: &str, recipe: &Path) -> Result<Model, Failure> {
    if model.is_empty() {
        return Ok(Model::New);
    }
    let folder = Path::new(model);
    if is_repository(model) {
        return Ok(Model::Repository(model.to_owned()));
    }
    if !folder.join("config.json").is_file() {
        let message = format!("`{model}` is no folder with a `config.json`");
        let hint =
            "give a model folder as transformers saves it, or a model of the hub as OWNER/NAME";
        return Err(Failure::Usage(error::with_hint(&message, hint)));
    }
    let config = std::fs::read_to_string(folder.join("tokenizer_config.json"));
    let has_template = folder.join("chat_template.jinja").is_file()
        || config.is_ok_and(|config| config.contains("\"chat_template\""));
    Ok(Model::Folder {
        path: from_recipe(model, recipe)?,
        has_template,
    })
}

/// The recipe.
fn outline(data: &Data, model: &Model, method: Method, adapter: Adapter) -> Outline {
    let mut stages = Vec::new();
    let (name, rows) = match data {
        Data::File { path, rows, .. } => {
            stages.push(OutlineStage::new("rows", "import_dataset").with("path", path.clone()));
            (path.as_str(), *rows)
        }
        Data::Repository(repo) => {
            stages.push(OutlineStage::new("rows", "download_dataset").with("repo", repo.clone()));
            (repo.as_str(), None)
        }
    };
    let is_held_out = rows.is_none_or(|rows| rows >= FEW_ROWS);
    let dataset = if is_held_out {
        let split = OutlineStage::new("split", "split_dataset")
            .commented("A tenth of the rows is held out, to see what the training brought.");
        stages.push(split.with("dataset", "rows").with("test_size", 0.1));
        "split"
    } else {
        "rows"
    };
    let is_new = matches!(model, Model::New);
    let first = if is_new { "blank" } else { "base" };
    stages.push(match model {
        Model::New => OutlineStage::new("blank", "create_model")
            .commented("A small new model with a tokenizer of its own, to try things. Instead of it:")
            .commented("  base: { download_model: { repo: OWNER/NAME } } or { import_model: { path: FOLDER } }")
            .with("dataset", dataset)
            .with("vocab_size", 1024)
            .with("hidden_size", 128)
            .with("intermediate_size", 384)
            .with("num_hidden_layers", 4)
            .with("num_attention_heads", 4)
            .with("num_key_value_heads", 2)
            .with("max_position_embeddings", 512),
        Model::Folder { path, .. } => OutlineStage::new("base", "import_model").with("path", path.clone()),
        Model::Repository(repo) => OutlineStage::new("base", "download_model").with("repo", repo.clone()),
    });
    let mut chats = OutlineStage::new("chats", "apply_chat_template")
        .with("dataset", dataset)
        .with("tokenizer", first);
    match model {
        Model::Folder {
            has_template: false,
            ..
        } => {
            chats = chats
                .commented("The model has no chat template of its own; this is ChatML.")
                .with("chat_template", CHATML);
        }
        Model::Repository(_) => {
            chats = chats.commented(
                "A model without a chat template of its own needs one here: `template: FILE`.",
            );
        }
        _ => {}
    }
    stages.push(chats);
    let mut tokens = OutlineStage::new("tokens", "tokenize")
        .with("dataset", "chats")
        .with("tokenizer", first)
        .with("max_length", if is_new { 512 } else { 1024 });
    if method == Method::Dpo {
        tokens.set("trainer", "dpo".into());
    }
    stages.push(tokens);
    let training = |stage: OutlineStage, rate: f64, epochs: usize| {
        stage
            .with("dataset", "tokens")
            .with("learning_rate", rate)
            .with("num_train_epochs", epochs)
            .with("per_device_train_batch_size", 4)
            .with("gradient_accumulation_steps", if is_new { 1 } else { 4 })
            .with("lr_scheduler_type", "cosine")
            .with("warmup_ratio", 0.1)
    };
    let mut start = first;
    if is_new && method != Method::Sft {
        let base = OutlineStage::new("base", "train_sft")
            .commented("It learns the language of both answers first, so that it prefers neither.")
            .with("model", first);
        stages.push(
            training(base, 1e-3, 3)
                .with("answers", "both")
                .with("completion_only_loss", false),
        );
        start = "base";
    }
    let mut beside = start;
    if adapter == Adapter::Qlora {
        let base4 = OutlineStage::new("base4", "quantize")
            .commented("The frozen weights in 4 bits: a quarter of the memory.");
        stages.push(base4.with("model", start));
        beside = "base4";
    }
    let has_adapter = adapter != Adapter::None;
    if has_adapter {
        let lora = OutlineStage::new("lora", "attach_lora")
            .with("model", beside)
            .with("r", 16)
            .with("lora_alpha", 32)
            .with("target_modules", "all-linear");
        stages.push(lora);
    }
    let mut tuned = OutlineStage::new("tuned", method.kind()).with("model", beside);
    if has_adapter {
        tuned.set("adapter", "lora".into());
    }
    let rate = match (is_new, method, has_adapter) {
        (true, ..) => 1e-3,
        (_, Method::Sft, true) => 2e-4,
        (_, Method::Sft, false) => 2e-5,
        (_, Method::Orpo, _) => 8e-6,
        (_, Method::Dpo, true) => 5e-6,
        (_, Method::Dpo, false) => 1e-6,
    };
    let mut tuned = training(tuned, rate, if is_new { 3 } else { 1 });
    if method == Method::Sft && is_held_out {
        tuned.set("eval_strategy", "epoch".into());
    }
    stages.push(tuned);
    if is_held_out {
        let told = match method {
            Method::Sft => "How well the model predicts the answers, on rows it has not seen.",
            _ => "How often the model prefers the chosen answer, on rows it has not seen.",
        };
        let mut scores = OutlineStage::new("scores", "evaluate").commented(told);
        if has_adapter {
            scores = scores.with("model", beside).with("adapter", "tuned");
        } else {
            scores.set("model", "tuned".into());
        }
        scores.set("dataset", "tokens".into());
        if method == Method::Dpo {
            scores.set("loss", "dpo".into());
            if !has_adapter {
                scores.set("ref_model", start.into());
            }
        }
        stages.push(scores);
    }
    let result = if has_adapter {
        let merged = OutlineStage::new("merged", "merge")
            .commented("A model folder that transformers loads without the adapter.");
        stages.push(merged.with("model", start).with("adapter", "tuned"));
        "merged"
    } else {
        "tuned"
    };
    Outline {
        schema: None,
        description: format!("{} on {name}", method.name().to_uppercase()),
        comment: Vec::new(),
        stages,
        outputs: vec![(result.to_owned(), format!("out/{result}"))],
    }
}
