//! `publish`: puts a result on the Hugging Face hub, with a card made from its record.

mod card;
mod lineage;
mod secrets;

use std::collections::BTreeMap;
use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;
use serde_json::{Value, json};

use self::card::{Card, is_ours};
use self::lineage::Lineage;
use super::run::stop_waiting_on_interrupt;
use crate::cli::args::{ReadingArgs, RecipeArgs, StoreArgs};
use crate::cli::project::{Project, run_env};
use crate::cli::{Failure, eprint, eprint_note, eprint_warning, error, print, print_json};
use crate::engine::{Manifest, RunEnv, State};
use crate::hub::{Contents, Hub, HubSettings, NewFile, Publication, Pushed, RepoKind, Watch};
use crate::recipe::{PUBLISHED, Publish};
use crate::report::bytes;

const README: &str = "README.md";
const ADAPTER_CONFIG: &str = "adapter_config.json";
const BASE: &str = "base_model_name_or_path";
/// The longest file that is changed on its way.
const LONGEST_CONFIG: u64 = 1 << 20;

#[derive(clap::Args)]
#[command(after_help = "Examples:
  pipeline publish recipe.yaml tuned --repo me/my-adapter --private
  pipeline publish recipe.yaml              what the recipe's `publish:` names
  pipeline publish out/merged --repo me/my-model --license apache-2.0
  pipeline publish recipe.yaml merged --repo me/my-model --dry-run   shows the card and the files

The token is that of HF_TOKEN or of `hf auth login`, and needs write access. Files that are in the repository already are not sent again,
so the same command goes on after an interruption.")]
pub(in crate::cli) struct Args {
    /// A recipe, or a folder with a model, an adapter or a dataset
    #[arg(value_name = "RECIPE|FOLDER")]
    target: PathBuf,
    /// The stage whose result is published [default: all that the recipe's `publish:` names]
    stage: Option<String>,
    /// The repository, as owner/name; it is made if it isn't there [default: what the recipe's `publish:` says]
    #[arg(long, value_name = "OWNER/NAME")]
    repo: Option<String>,
    /// Makes the repository private; one that is there and open is refused
    #[arg(long)]
    private: bool,
    /// The branch; it is made if it isn't there [default: main]
    #[arg(long, value_name = "BRANCH")]
    revision: Option<String>,
    /// Proposes the change instead of making it
    #[arg(long)]
    create_pr: bool,
    /// The licence, by the hub's word for it, such as `apache-2.0` [default: the base model's]
    #[arg(long, value_name = "LICENSE")]
    license: Option<String>,
    /// The commit's first line
    #[arg(long, value_name = "TEXT")]
    message: Option<String>,
    /// Replaces a README.md in the repository that people wrote or changed
    #[arg(long)]
    overwrite_card: bool,
    /// Publishes a folder whose contents are a dataset
    #[arg(long)]
    dataset: bool,
    /// Shows what would be published, and sends nothing
    #[arg(long)]
    dry_run: bool,
    /// Tells what became of it as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    reading: ReadingArgs,
    #[command(flatten)]
    store: StoreArgs,
}

/// Something to publish.
struct Item {
    /// What people call it.
    name: String,
    /// `model`, `adapter`, `dataset` or `gguf`.
    noun: String,
    folder: PathBuf,
    /// Its files, below the folder.
    files: Vec<String>,
    publish: Publish,
    lineage: Option<Lineage>,
}

/// Ctrl-C ends waits and uploads.
struct Interruptible {
    cancel: Arc<AtomicBool>,
}

impl Watch for Interruptible {
    fn tick(&self) -> anyhow::Result<()> {
        anyhow::ensure!(!self.cancel.load(Ordering::Relaxed), "interrupted");
        Ok(())
    }

    fn tell(&self, text: &str) {
        eprint_note(text);
    }
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    let (items, env) = if args.target.is_dir() {
        (
            vec![of_folder(args)?],
            Arc::new(run_env(args.store.offline)),
        )
    } else {
        of_recipe(args)?
    };
    let variable = |name: &str| env.variables.get(name).cloned();
    let mut settings = HubSettings::from_variables(&variable, env.home.as_deref())?;
    settings.offline |= env.offline;
    let cancel = Arc::clone(&env.cancel);
    stop_waiting_on_interrupt(&cancel)?;
    let watch = Interruptible {
        cancel: Arc::clone(&cancel),
    };
    let hub = Hub::new(settings, &watch)?;
    if !args.dry_run {
        hub.check_may_publish()?;
    }
    let mut done = Vec::new();
    for item in &items {
        match publish(args, item, &hub, env.variable("HF_TOKEN")) {
            Err(Failure::Failed(_)) if cancel.load(Ordering::Relaxed) => {
                eprint("interrupted: what was sent stays there, and the same command goes on\n");
                return Err(Failure::Interrupted);
            }
            published => done.extend(published?),
        }
    }
    if args.json {
        print_json(&done)?;
    }
    Ok(())
}

/// The folder as an item.
fn of_folder(args: &Args) -> Result<Item, Failure> {
    let folder = &args.target;
    let usage = |message: &str, hint: &str| Failure::Usage(error::with_hint(message, hint));
    if args.stage.is_some() {
        let message = format!("`{}` is a folder and has no stages", folder.display());
        return Err(usage(&message, "give a recipe to name a stage"));
    }
    let Some(repo) = args.repo.clone() else {
        return Err(usage(
            "there is no repository to publish to",
            "give `--repo OWNER/NAME`",
        ));
    };
    let noun = if args.dataset {
        "dataset"
    } else if folder.join(ADAPTER_CONFIG).is_file() {
        "adapter"
    } else if folder.join("config.json").is_file() {
        "model"
    } else if gguf_file(folder).is_some() {
        "gguf"
    } else {
        let message = format!(
            "`{}` holds neither a model nor an adapter nor a GGUF file",
            folder.display()
        );
        return Err(usage(&message, "`--dataset` publishes a folder of data"));
    };
    let manifest =
        Manifest::read(folder).with_context(|| format!("could not read `{}`", folder.display()))?;
    let shown = |file: &String| !file.split('/').any(|part| part.starts_with('.'));
    let name = folder.canonicalize().ok();
    let name = name.and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
    Ok(Item {
        name: name.unwrap_or_else(|| "model".to_owned()),
        noun: noun.to_owned(),
        folder: folder.clone(),
        files: manifest.files.into_keys().filter(shown).collect(),
        publish: asked(
            args,
            Publish {
                repo,
                ..Publish::default()
            },
        ),
        lineage: None,
    })
}

/// What the recipe's section says, and what the command line says instead.
fn asked(args: &Args, mut publish: Publish) -> Publish {
    if let Some(repo) = &args.repo {
        publish.repo.clone_from(repo);
    }
    publish.private |= args.private;
    publish.create_pr |= args.create_pr;
    publish.revision = args.revision.clone().or(publish.revision);
    publish.license = args.license.clone().or(publish.license);
    publish
}

fn of_recipe(args: &Args) -> Result<(Vec<Item>, Arc<RunEnv>), Failure> {
    let recipe = RecipeArgs::of(&args.target, &args.reading);
    let project = Project::open(&recipe, &args.store)?;
    let path = project.recipe.path.display();
    let of = |stage: &str| {
        project
            .recipe
            .publish
            .iter()
            .find(|publish| publish.stage == stage)
            .cloned()
    };
    let wanted: Vec<Publish> = match &args.stage {
        Some(stage) => {
            let stage = &project.recipe.stages[project.find(stage)?].name;
            vec![of(stage).unwrap_or_else(|| Publish {
                stage: stage.clone(),
                ..Publish::default()
            })]
        }
        None => project.recipe.publish.clone(),
    };
    if wanted.is_empty() {
        let message = format!("`{path}` does not say what is published");
        let hint =
            "name a stage and `--repo OWNER/NAME`, or write both into the recipe's `publish:`";
        return Err(Failure::Usage(error::with_hint(&message, hint)));
    }
    if wanted.len() > 1 && args.repo.is_some() {
        let message = "`--repo` names one repository for several results";
        return Err(Failure::Usage(error::with_hint(
            message,
            "name the stage, too",
        )));
    }
    let plan = project.plan();
    let mut items = Vec::new();
    for publish in wanted {
        let publish = asked(args, publish);
        let name = publish.stage.clone();
        if publish.repo.is_empty() {
            let message = format!("there is no repository to publish `{name}` to");
            let hint = "give `--repo OWNER/NAME`, or write it into the recipe's `publish:`";
            return Err(Failure::Usage(error::with_hint(&message, hint)));
        }
        let index = project.find(&name)?;
        let noun = project.recipe.stages[index].stage.output();
        if !PUBLISHED.contains(&noun) {
            let message = format!("`{name}` makes {noun}, which the hub has no repositories for");
            let hint = "models, adapters, datasets and GGUF files can be published";
            return Err(Failure::Usage(error::with_hint(&message, hint)));
        }
        // What the world gets is what the recipe says now.
        match plan.get(index) {
            Some(State::Fresh { .. }) => warn_of_frozen(&project, &plan, index),
            Some(State::Fails { error, .. }) => {
                return Err(
                    anyhow::anyhow!("`{name}` fails what is required of it: {error}").into(),
                );
            }
            Some(State::Unknown { error }) => {
                return Err(anyhow::anyhow!(
                    "whether `{name}` is up to date can't be told: {error}"
                )
                .into());
            }
            _ => {
                return Err(anyhow::anyhow!(
                    "`{name}` is not up to date; `pipeline run {path} {name}` makes it, `pipeline why {path} {name}` tells why"
                )
                .into());
            }
        }
        let missing = || {
            anyhow::anyhow!(
                "the files of `{name}` are not here; `pipeline cache pull {path} {name}` fetches them"
            )
        };
        let record = project.record_of(index).with_context(missing)?;
        let folder = project.store.artifact(&record.artifact);
        let manifest = project
            .store
            .manifest(&record.artifact)
            .with_context(missing)?;
        if !folder.is_dir() {
            return Err(missing().into());
        }
        items.push(Item {
            noun: noun.to_owned(),
            folder,
            files: manifest.files.into_keys().collect(),
            lineage: Some(Lineage::of(&project, &record)),
            publish,
            name,
        });
    }
    Ok((items, Arc::clone(&project.env)))
}

/// The name of the first GGUF file in a folder.
fn gguf_file(folder: &Path) -> Option<String> {
    let names = std::fs::read_dir(folder).ok()?.filter_map(|entry| {
        let name = entry.ok()?.file_name().into_string().ok()?;
        Some(name).filter(|name| name.ends_with(".gguf"))
    });
    names.min()
}

fn publish(
    args: &Args,
    item: &Item,
    hub: &Hub<'_>,
    token: Option<&str>,
) -> Result<Option<Value>, Failure> {
    let Item { publish, .. } = item;
    let kind = match item.noun.as_str() {
        "dataset" => RepoKind::Dataset,
        _ => RepoKind::Model,
    };
    let branch = publish.revision.as_deref().unwrap_or("main");
    let own_card = item.files.iter().any(|file| file == README);
    let license = license(item, hub, own_card)?;
    let card = Card {
        name: item.publish.repo.rsplit('/').next().unwrap_or(&item.name),
        repo: &publish.repo,
        noun: &item.noun,
        license: license.as_deref(),
        lineage: item.lineage.as_ref(),
        folder: &item.folder,
    };
    let card = Card::sealed(&secrets::masked(&card.text()?, token));
    if args.dry_run {
        let files: Vec<String> = item
            .files
            .iter()
            .map(|file| {
                let size = std::fs::metadata(item.folder.join(file)).map_or(0, |found| found.len());
                format!("{file} ({})", bytes(size))
            })
            .collect();
        print(&format!(
            "{} `{}` would go to {} `{}`{}, branch {branch}:\n  {}\n\n{card}",
            item.noun,
            item.name,
            if publish.private {
                "the private repository"
            } else {
                "the repository"
            },
            publish.repo,
            if publish.create_pr {
                " as a proposal"
            } else {
                ""
            },
            files.join("\n  ")
        ));
        return Ok(None);
    }
    let mut files: Vec<NewFile> = Vec::new();
    for path in &item.files {
        files.push(NewFile {
            contents: contents(item, path)?,
            path: path.clone(),
        });
    }
    let there = hub.read_file(kind, &publish.repo, branch, README)?;
    let is_theirs = there.as_deref().is_some_and(|text| !is_ours(text));
    if is_theirs && !args.overwrite_card {
        files.retain(|file| file.path != README);
        eprint_note(&format!(
            "the `{README}` of `{}` was written or changed by people and stays; `--overwrite-card` replaces it",
            publish.repo
        ));
    } else if !own_card {
        files.push(NewFile {
            path: README.to_owned(),
            contents: Contents::Bytes(card.into_bytes()),
        });
    }
    let publication = Publication {
        kind,
        repo: publish.repo.clone(),
        branch: publish.revision.clone(),
        private: publish.private,
        create_pr: publish.create_pr,
        message: args
            .message
            .clone()
            .unwrap_or_else(|| format!("Upload {} with pipeline", item.noun)),
        files,
        replaces: match item.noun.as_str() {
            "model" => vec![
                ("model", ".safetensors"),
                ("model", ".safetensors.index.json"),
            ],
            "adapter" => vec![("adapter_model", ".safetensors"), ("adapter_model", ".bin")],
            _ => Vec::new(),
        },
    };
    let shows = std::io::stderr().is_terminal() && !args.json;
    let mut last = None;
    let mut tell = |path: &str, done: u64, size: u64| {
        let percent = (done * 100).checked_div(size).unwrap_or(100);
        let now = (path.to_owned(), percent);
        if shows && size > 1 << 20 && last.as_ref() != Some(&now) {
            let text = format!("{path} {percent} % of {}", bytes(size));
            eprint_line(&text);
            last = Some(now);
        }
    };
    let pushed = hub.publish(&publication, &mut tell);
    if last.is_some() {
        eprint_line("");
    }
    let pushed = pushed?;
    if !args.json {
        print(&told(item, &pushed));
    }
    Ok(Some(json!({
        "stage": item.publish.stage, "repo": publish.repo, "commit": pushed.commit, "url": pushed.url,
        "pull_request": pushed.pull_request, "changed": pushed.changed, "removed": pushed.removed,
        "unchanged": pushed.unchanged, "sent": pushed.sent,
    })))
}

/// A line that the next one replaces.
fn eprint_line(text: &str) {
    let mut out = std::io::stderr().lock();
    let _ = write!(out, "\r\u{1b}[K{}", crate::report::harmless(text));
    let _ = out.flush();
}

fn told(item: &Item, pushed: &Pushed) -> String {
    let commit = pushed.commit.get(..8).unwrap_or(&pushed.commit);
    if pushed.changed.is_empty() && pushed.removed.is_empty() {
        return format!(
            "`{}` is at {} already (commit {commit}); nothing was sent\n",
            item.name, pushed.url
        );
    }
    let removed = if pushed.removed.is_empty() {
        String::new()
    } else {
        format!("removed what they replace: {}\n", pushed.removed.join(", "))
    };
    format!(
        "published `{}`: {} {}, {} of large files sent, {} unchanged\n{removed}{}\n",
        item.name,
        pushed.changed.len(),
        if pushed.changed.len() == 1 {
            "file"
        } else {
            "files"
        },
        bytes(pushed.sent),
        pushed.unchanged.len(),
        pushed.pull_request.as_ref().unwrap_or(&pushed.url)
    )
}

/// A file as it is published: an adapter that doesn't name its base is told the base's name on the hub.
fn contents(item: &Item, path: &str) -> anyhow::Result<Contents> {
    let file = item.folder.join(path);
    let base = item.lineage.as_ref().and_then(Lineage::base_repo);
    let (true, Some(base)) = (path == ADAPTER_CONFIG, base) else {
        return Ok(Contents::File(file));
    };
    let named = named_base(&file)?;
    if named.as_deref().is_some_and(|named| !named.is_empty()) {
        return Ok(Contents::File(file));
    }
    let text = std::fs::read(&file).with_context(|| format!("could not read `{path}`"))?;
    let mut config: BTreeMap<String, Value> =
        serde_json::from_slice(&text).with_context(|| format!("could not read `{path}`"))?;
    config.insert(BASE.to_owned(), base.into());
    let mut text = serde_json::to_vec_pretty(&config)?;
    text.push(b'\n');
    Ok(Contents::Bytes(text))
}

/// What an adapter's settings name as its base.
fn named_base(file: &Path) -> anyhow::Result<Option<String>> {
    let text = crate::cli::read_text(file, LONGEST_CONFIG)
        .with_context(|| format!("could not read `{}`", file.display()))?;
    let config: Value = serde_json::from_str(&text)
        .with_context(|| format!("could not read `{}`", file.display()))?;
    Ok(config[BASE].as_str().map(str::to_owned))
}

/// The licence: as asked for, else the base's on the hub, else what the person at the terminal says.
fn license(item: &Item, hub: &Hub<'_>, own_card: bool) -> Result<Option<String>, Failure> {
    if own_card || item.publish.license.is_some() {
        return Ok(item.publish.license.clone());
    }
    if let Some(lineage) = &item.lineage
        && item.noun != "dataset"
        && let Some((repo, commit)) = lineage.base_on_hub()
        && let Some(license) = hub.license(RepoKind::Model, repo, commit)
    {
        return Ok(Some(license));
    }
    if item.publish.private || item.noun == "dataset" {
        return Ok(None);
    }
    if std::io::stdin().is_terminal() && std::io::stderr().is_terminal() {
        eprint(
            "The base's licence is not known. Under which one is this published (as `apache-2.0`)? ",
        );
        let mut line = String::new();
        std::io::stdin()
            .read_line(&mut line)
            .map_err(anyhow::Error::from)?;
        if !line.trim().is_empty() {
            return Ok(Some(line.trim().to_owned()));
        }
    }
    let message = format!(
        "under which licence `{}` is published is not known",
        item.name
    );
    let hint = "give `--license`, such as `--license apache-2.0`, or publish it as private";
    Err(Failure::Usage(error::with_hint(&message, hint)))
}

/// Says of a result that it comes from a frozen stage for which something changed since.
fn warn_of_frozen(project: &Project, plan: &[State], index: usize) {
    let needed = project.graph.needed(&[index]);
    for (number, state) in plan.iter().enumerate() {
        if let State::Fresh {
            frozen: Some(reasons),
            ..
        } = state
            && needed.get(number) == Some(&true)
            && !reasons.is_empty()
            && let Some(stage) = project.recipe.stages.get(number)
        {
            eprint_warning(&format!(
                "`{}` is frozen: what is published comes from its last result, which is not what the recipe says now",
                stage.name
            ));
        }
    }
}
