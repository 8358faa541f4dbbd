//! `doctor`: what this machine and its surroundings have, and what to do where something is missing.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pipeline_kernels::dispatch::Isa;
use serde::Serialize;

use crate::cli::console::output_columns;
use crate::cli::folders::root;
use crate::cli::project::own_store;
use crate::cli::remote::RemoteArgs;
use crate::cli::{Failure, default_recipe, machine, print_json, print_rendered, variable};
use crate::engine::{Found, Store};
use crate::hub::{Answered, Hub, HubSettings, TokenStore, shown_address};
use crate::ml::place;
use crate::report::style::{DIM, ERROR, GOOD, HINT, WARNING, paint};
use crate::report::{bytes, harmless, wrap};

/// How long the hub may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Less free space than this, in bytes, is too little for most models.
const LITTLE_DISK: u64 = 20_000_000_000;
/// Less memory than this, in bytes, is too little for most models.
const LITTLE_MEMORY: u64 = 8_000_000_000;

#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  pipeline doctor
  pipeline doctor --json --offline

It fails (exit code 1) where something keeps recipes from running; a warning does not.")]
pub(in crate::cli) struct Args {
    /// The findings as JSON
    #[arg(long)]
    json: bool,
    /// The store to look at [default: `.pipeline` in the project around the current folder]
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
    /// Does not access the network
    #[arg(long)]
    offline: bool,
    /// Reads every result in the store and compares it with its digest
    #[arg(long)]
    verify: bool,
}

/// Where the findings begin, in columns.
const INDENT: usize = 22;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Level {
    Ok,
    Warning,
    Error,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Finding {
    /// What was looked at: one word.
    what: &'static str,
    level: Level,
    /// What was found.
    found: String,
    /// What to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

impl Finding {
    fn ok(what: &'static str, found: impl Into<String>) -> Self {
        Self {
            what,
            level: Level::Ok,
            found: found.into(),
            advice: None,
        }
    }

    fn new(
        what: &'static str,
        level: Level,
        found: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self {
            what,
            level,
            found: found.into(),
            advice: Some(advice.into()),
        }
    }
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    let here = std::env::current_dir()
        .map_err(|error| anyhow::anyhow!("there is no current folder: {error}"))?;
    let root = root(&here);
    let mut findings = vec![
        Finding::ok(
            "program",
            format!(
                "pipeline {}, for {} on {}",
                env!("CARGO_PKG_VERSION"),
                std::env::consts::ARCH,
                std::env::consts::OS
            ),
        ),
        processor(),
        memory(),
    ];
    findings.extend(devices());
    let place = if let Some(store) = &args.store {
        Ok(here.join(store))
    } else {
        let real = root.canonicalize().unwrap_or_else(|_| root.clone());
        own_store(&root, &|path| path.starts_with(&real), "")
    };
    match place {
        Ok(place) => {
            findings.push(disk("disk", &place));
            findings.push(store(&place, args.verify));
        }
        Err(_) => findings.push(Finding::new(
            "store",
            Level::Error,
            format!(
                "`{}` is a link that leaves the project",
                root.join(".pipeline").display()
            ),
            "name the store by `--store DIR`",
        )),
    }
    findings.push(recipe(&here));
    findings.extend(hub(args.offline));
    findings.push(remote(&root, args.offline));
    let is_bad = findings.iter().any(|finding| finding.level == Level::Error);
    if args.json {
        print_json(&findings)?;
    } else {
        let text: String = findings.iter().map(line).collect();
        print_rendered(&text);
    }
    if is_bad {
        Err(Failure::Reported)
    } else {
        Ok(())
    }
}

fn line(finding: &Finding) -> String {
    let (word, style) = match finding.level {
        Level::Ok => ("ok     ", GOOD),
        Level::Warning => ("warning", WARNING),
        Level::Error => ("error  ", ERROR),
    };
    let room = output_columns().map_or(usize::MAX, |columns| columns.saturating_sub(INDENT));
    let mut text = format!("{}  {:12} ", paint(style, word), finding.what);
    for (number, line) in wrap(&harmless(&finding.found), room).iter().enumerate() {
        let indent = if number == 0 { 0 } else { INDENT };
        _ = writeln!(text, "{:indent$}{line}", "");
    }
    if let Some(advice) = &finding.advice {
        let style = if finding.level == Level::Ok {
            DIM
        } else {
            HINT
        };
        for line in wrap(advice, room) {
            _ = writeln!(text, "{:INDENT$}{}", "", paint(style, &line));
        }
    }
    text
}

fn processor() -> Finding {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let isa = Isa::current();
    let found = format!("{cores} cores, computing with {}", isa.name());
    if isa != Isa::best() {
        let advice = format!(
            "this processor can do {}; a setting limits it",
            Isa::best().name()
        );
        return Finding::new("processor", Level::Warning, found, advice);
    }
    if Isa::best() == Isa::Portable {
        let advice = "without AVX2 a training takes many times as long; take another machine for large models";
        return Finding::new("processor", Level::Warning, found, advice);
    }
    Finding::ok("processor", found)
}

fn memory() -> Finding {
    let Some(all) = machine::memory() else {
        return Finding::ok("memory", "this system does not tell how much there is");
    };
    let free = machine::available_memory()
        .map_or(String::new(), |free| format!(", {} free", bytes(free.0)));
    let found = format!("{}{free}", bytes(all.0));
    if all.0 < LITTLE_MEMORY {
        let advice = "enough for models of some hundred million parameters; `quantize` takes a quarter of the memory";
        return Finding::new("memory", Level::Warning, found, advice);
    }
    Finding::ok("memory", found)
}

/// The GPUs that trainings can run on.
fn devices() -> Vec<Finding> {
    let Some(adapters) = place::adapters() else {
        let found =
            "this program was built without the feature `gpu`: trainings run on the processor";
        return vec![Finding::ok("devices", found)];
    };
    if adapters.is_empty() {
        let found = "no GPU that Vulkan, Metal or DirectX 12 finds: trainings run on the processor";
        return vec![Finding::ok("devices", found)];
    }
    let each = adapters.iter().enumerate().map(|(number, adapter)| {
        let software = if adapter.software {
            ", a software driver"
        } else {
            ""
        };
        let memory = adapter.memory.map(bytes);
        let memory = memory.map_or_else(String::new, |memory| format!("{memory} of memory, "));
        let found = format!(
            "gpu:{number}: {}{software} ({}, {}); {memory}buffers to {}, {} shared by a workgroup",
            adapter.name,
            adapter.driver,
            adapter.interface,
            bytes(adapter.largest_binding),
            bytes(u64::from(adapter.shared_memory)),
        );
        Finding::ok("devices", found)
    });
    each.collect()
}

/// The nearest folder that exists.
fn existing(path: &Path) -> &Path {
    path.ancestors()
        .find(|path| path.is_dir())
        .unwrap_or(Path::new("/"))
}

fn disk(what: &'static str, place: &Path) -> Finding {
    let folder = existing(place);
    let shown = folder.display();
    let about = match rustix::fs::statvfs(folder) {
        Ok(about) => about,
        Err(error) => {
            return Finding::new(
                what,
                Level::Warning,
                format!("`{shown}` tells nothing: {error}"),
                "is it mounted?",
            );
        }
    };
    let free = about.f_bavail.saturating_mul(about.f_frsize);
    let found = format!("{} free at `{shown}`", bytes(free));
    if tempfile::tempfile_in(folder).is_err() {
        let advice = "results can't be written there; make it writable, or name another place by `--store DIR`";
        return Finding::new(what, Level::Error, format!("{found}, not writable"), advice);
    }
    if free < LITTLE_DISK {
        let advice = "an 8B model takes 16 GB; `pipeline gc RECIPE` frees what is not needed any more, `--store DIR` names another disk";
        return Finding::new(what, Level::Warning, found, advice);
    }
    Finding::ok(what, found)
}

/// The sizes of all files below a folder.
fn size(folder: &Path) -> (u64, usize) {
    let (mut bytes, mut files, mut open) = (0_u64, 0, vec![folder.to_owned()]);
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            match entry.metadata() {
                Ok(about) if about.is_dir() => open.push(entry.path()),
                Ok(about) => {
                    bytes = bytes.saturating_add(about.len());
                    files += 1;
                }
                Err(_) => {}
            }
        }
    }
    (bytes, files)
}

fn store(place: &Path, verify: bool) -> Finding {
    let shown = place.display();
    if !place.is_dir() {
        return Finding::ok(
            "store",
            format!("`{shown}` is not there yet; the first run makes it"),
        );
    }
    let store = Store::new(place);
    let fingerprints = match store.fingerprints() {
        Ok(fingerprints) => fingerprints,
        Err(error) => {
            return Finding::new(
                "store",
                Level::Error,
                format!("{error:#}"),
                "look at the disk and the permissions of the store",
            );
        }
    };
    let (mut sound, mut damaged, mut unreadable) = (0, Vec::new(), Vec::new());
    for fingerprint in &fingerprints {
        match store.find(fingerprint, verify) {
            Ok(Found::Hit(..)) => sound += 1,
            // Collected or not fetched yet.
            Ok(Found::Missing(_) | Found::Nothing) => {}
            Ok(Found::Damaged(record, what)) => damaged.push(format!("`{}`: {what}", record.stage)),
            Err(error) => unreadable.push(format!("{error:#}")),
        }
    }
    let (all, files) = size(place);
    let found = format!(
        "{sound} results, {files} files, {} in `{shown}`",
        bytes(all)
    );
    if let Some(first) = unreadable.first() {
        let found = format!("{found}; {} can't be read: {first}", unreadable.len());
        return Finding::new(
            "store",
            Level::Error,
            found,
            "look at the disk and the permissions of the store",
        );
    }
    if let Some(first) = damaged.first() {
        let found = format!("{found}; {} were altered: {first}", damaged.len());
        return Finding::new(
            "store",
            Level::Warning,
            found,
            "the next run makes them again",
        );
    }
    Finding::ok("store", found)
}

fn recipe(here: &Path) -> Finding {
    if let Some(path) = default_recipe::find(here) {
        return Finding::ok("recipe", format!("`{}`", path.display()));
    }
    let found = format!("no `{}` here or in a folder above", default_recipe::NAME);
    let mut finding = Finding::ok("recipe", found);
    let advice = "`pipeline init` writes one; or name recipes on the command line";
    finding.advice = Some(advice.to_owned());
    finding
}

fn hub(offline: bool) -> Vec<Finding> {
    let home = std::env::home_dir();
    let settings = HubSettings::from_variables(&|name| variable(name), home.as_deref());
    let mut settings = match settings {
        Ok(settings) => settings,
        Err(error) => {
            return vec![Finding::new(
                "hub",
                Level::Error,
                format!("{error:#}"),
                "mend the variable",
            )];
        }
    };
    settings.offline |= offline;
    settings.answer_timeout = PATIENCE;
    settings.timeout = PATIENCE;
    let mut findings = vec![disk("hub cache", &settings.cache)];
    if let Some(found) = findings.first_mut() {
        found.found = format!("`{}`, {}", settings.cache.display(), found.found);
    }
    findings.extend(proxies());
    if let Some((name, path)) = &settings.authorities {
        let found = format!(
            "those in `{}` ({name}), instead of the system's",
            path.display()
        );
        findings.push(if path.exists() {
            Finding::ok("certificates", found)
        } else {
            Finding::new(
                "certificates",
                Level::Error,
                format!("{found}: there is nothing"),
                format!("mend or unset {name}"),
            )
        });
    }
    let has_token = settings.token.is_some();
    let withheld = settings.token_withheld;
    if settings.offline {
        findings.push(Finding::ok("hub", "not asked: the network is forbidden"));
        findings.push(Finding::ok(
            "token",
            if has_token { "there is one" } else { "none" },
        ));
        return findings;
    }
    let hub = match Hub::new(settings, &()) {
        Ok(hub) => hub,
        Err(error) => {
            findings.push(Finding::new(
                "hub",
                Level::Error,
                format!("{error:#}"),
                "mend the setting",
            ));
            return findings;
        }
    };
    let address = hub.endpoint_address().to_owned();
    let kept = TokenStore::from_variables(&|name| variable(name), home.as_deref());
    let kept = kept
        .map(|kept| kept.path().display().to_string())
        .unwrap_or_default();
    let from = if variable("HF_TOKEN").is_some_and(|token| !token.trim().is_empty()) {
        "the variable HF_TOKEN".to_owned()
    } else {
        format!("`{kept}`")
    };
    match hub.ask_account() {
        Err(error) => {
            let advice =
                "recipes that download nothing new run all the same; `--offline` doesn't ask";
            findings.push(Finding::new(
                "hub",
                Level::Warning,
                format!("{error:#}"),
                advice,
            ));
        }
        Ok(answered) => {
            findings.push(Finding::ok("hub", format!("{address} answers")));
            findings.push(match answered {
                Answered::Account(account) => Finding::ok("token", format!("of `{}`, from {from}", account.name)),
                Answered::Refused if has_token => Finding::new(
                    "token",
                    Level::Error,
                    format!("the hub does not know the one from {from}"),
                    "`pipeline login` keeps another one; a wrong token is refused for public models too",
                ),
                Answered::Refused | Answered::NoAccounts if withheld => Finding::new(
                    "token",
                    Level::Warning,
                    "there is one, and `HF_HUB_DISABLE_IMPLICIT_TOKEN` keeps it back",
                    "unset the variable for gated models",
                ),
                Answered::NoAccounts => Finding::ok("token", "the hub is a mirror without accounts"),
                Answered::Refused => {
                    let mut finding = Finding::ok("token", "none; public models need none");
                    finding.advice = Some("`pipeline login` keeps one, for gated and private models".to_owned());
                    finding
                }
            });
        }
    }
    findings
}

fn proxies() -> Option<Finding> {
    let names = [
        "HTTPS_PROXY",
        "https_proxy",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
        "all_proxy",
        "NO_PROXY",
        "no_proxy",
    ];
    let set = names.into_iter().filter_map(|name| {
        let value = variable(name).filter(|value| !value.trim().is_empty())?;
        let shown = if name.eq_ignore_ascii_case("no_proxy") {
            value
        } else {
            shown_address(&value)
        };
        Some(format!("{name}={shown}"))
    });
    let set: Vec<String> = set.collect();
    (!set.is_empty()).then(|| Finding::ok("proxies", set.join(" ")))
}

fn remote(root: &Path, offline: bool) -> Finding {
    let args = RemoteArgs {
        remote: None,
        no_pull: false,
        remote_required: true,
    };
    let shared = match args.open(root, offline, false) {
        Ok(shared) => shared,
        Err(Failure::Failed(error)) => {
            return Finding::new(
                "remote",
                Level::Error,
                format!("{error:#}"),
                "mend the settings of the remote",
            );
        }
        Err(Failure::Usage(text)) => {
            let text = crate::report::style::stripped(&text);
            let text = text
                .trim()
                .trim_start_matches("error: ")
                .replace("\n  ", " ");
            let (found, advice) = text
                .split_once("\nhint: ")
                .unwrap_or((&text, "mend the settings of the remote"));
            return Finding::new("remote", Level::Warning, found, advice);
        }
        Err(_) => return Finding::ok("remote", "not looked at"),
    };
    if let Err(error) = shared.check() {
        let advice = "runs go on without it; look at its address and credentials";
        return Finding::new("remote", Level::Warning, format!("{error:#}"), advice);
    }
    let Some(address) = shared.address().map(str::to_owned) else {
        return Finding::ok("remote", "none: results stay on this machine");
    };
    match shared.list() {
        Ok(results) => Finding::ok(
            "remote",
            format!("`{address}` has {} results", results.len()),
        ),
        Err(error) => Finding::new(
            "remote",
            Level::Warning,
            format!("`{address}` can't be used: {error:#}"),
            "runs go on without it; look at its address and credentials",
        ),
    }
}
