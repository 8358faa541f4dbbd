//! Small inputs that ask for far more than they hold: each ends its own stage in seconds, with a sentence, and nothing else. All
//! other stages go on. Each input is a stage of one recipe that runs with `--keep-going`.

mod data;
mod recipes;
mod templates;
mod tokenizers;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};

use crate::support::program::{Project, events, stages};

/// The most memory of one process, in KiB: the limit of a stage, and what a process has beside it.
const MOST: i64 = 5 << 20;

/// One input: the stage's name, the stage, and words of its error. Words that are empty stand for an input that is accepted.
struct Attack {
    name: String,
    stage: String,
    words: &'static str,
}

impl Attack {
    fn new(name: impl Into<String>, stage: impl Into<String>, words: &'static str) -> Self {
        Self {
            name: name.into(),
            stage: stage.into(),
            words,
        }
    }
}

/// Runs all attacks, with `before` as further stages, beside a harmless one.
fn run(project: &Project, before: &str, attacks: &[Attack]) {
    let mut recipe = format!("version: 1\nstages:\n{before}");
    for attack in attacks {
        let _ = writeln!(recipe, "  {}: {}", attack.name, attack.stage);
    }
    recipe += "  harmless: { import_dataset: { path: harmless.jsonl } }\n";
    project.write("attacks.yaml", &recipe);
    project.write(
        "harmless.jsonl",
        "{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"c\"}\n",
    );
    let started = Instant::now();
    let ended = project.run(&[
        "run",
        "attacks.yaml",
        "--keep-going",
        "--json",
        "--jobs",
        "2",
    ]);
    let took = started.elapsed();
    let fails = attacks.iter().any(|attack| !attack.words.is_empty());
    assert_eq!(ended.code, Some(i32::from(fails)), "{}", ended.stderr);
    let told = events(&ended.stdout);
    let failed = stages(&told, "stage_failed");
    let done = stages(&told, "stage_done");
    assert!(done.contains_key("harmless"), "{}", ended.stderr);
    let mut wrong = Vec::new();
    let mut table = BTreeMap::new();
    for attack in attacks {
        let error = failed.get(&attack.name);
        let error = error.map_or("", |event| event["error"].as_str().unwrap());
        table.insert(&attack.name, error);
        let accepted = attack.words.is_empty();
        let right = error.contains(attack.words) && accepted == error.is_empty();
        let crude = error.contains("bug in pipeline") || error.contains("by signal");
        if !right || crude || (accepted && !done.contains_key(&attack.name)) {
            wrong.push(format!("{}: {error:.600}", attack.name));
        }
    }
    println!("{took:?} {table:#?}");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
    // Far above what it takes, so that it holds on a busy machine.
    assert!(took < Duration::from_mins(10), "{took:?}");
    let peak = getrusage(UsageWho::RUSAGE_CHILDREN).unwrap().max_rss();
    assert!(peak < MOST, "{peak} KiB");
}
