//! A runner of copy stages, for `benches/runner.py`: what the engine itself costs, with stages that do next to nothing.
//!
//!     copies chain DIR N   runs a chain of N stages, each of which copies one small file
//!     copies files DIR N   runs one stage that writes N files, and one that counts them
//!
//! The store is in DIR, so that a second call is a no-op.

#![expect(clippy::print_stderr, reason = "a program of its own")]

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;

use pipeline::engine::remote::Shared;
use pipeline::engine::{
    Artifact, Context, Executors, Graph, Handling, Input, Kind, Machine, Node, Options, Pins,
    RunEnv, Session, SourcePath, Stage, Store, View, run,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

struct Files;

impl Artifact for Files {
    const NAME: &'static str = "files";

    fn show(_: &Path, _: usize) -> anyhow::Result<Vec<View>> {
        Ok(Vec::new())
    }
}

/// Copies a file from the disk or from another stage.
#[derive(Serialize, Deserialize, JsonSchema)]
struct Copy {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    file: Option<SourcePath>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    input: Option<Input<Files>>,
    position: usize,
}

impl Stage for Copy {
    const KIND: &'static str = "copy";
    const VERSION: u32 = 1;
    type Output = Files;

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        let from = match (&self.file, &self.input) {
            (Some(file), _) => cx.source(file)?.to_owned(),
            (_, Some(input)) => cx.input(input)?.join("file"),
            _ => anyhow::bail!("nothing to copy"),
        };
        std::fs::copy(from, cx.out().join("file"))?;
        Ok(())
    }
}

/// Writes many small files, a thousand a folder.
#[derive(Serialize, Deserialize, JsonSchema)]
struct Many {
    files: usize,
}

impl Stage for Many {
    const KIND: &'static str = "many";
    const VERSION: u32 = 1;
    type Output = Files;

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        for index in 0..self.files {
            let folder = cx.out().join((index / 1000).to_string());
            if index % 1000 == 0 {
                std::fs::create_dir(&folder)?;
            }
            std::fs::write(folder.join(index.to_string()), index.to_string())?;
        }
        Ok(())
    }
}

/// Counts the folders of another stage's files.
#[derive(Serialize, Deserialize, JsonSchema)]
struct Count {
    input: Input<Files>,
}

impl Stage for Count {
    const KIND: &'static str = "count";
    const VERSION: u32 = 1;
    type Output = Files;

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        let count = std::fs::read_dir(cx.input(&self.input)?)?.count();
        std::fs::write(cx.out().join("count"), count.to_string())?;
        Ok(())
    }
}

fn node<S: Stage>(name: String, stage: S, file: Option<&Path>) -> Node {
    let sources = file.map(|file| ("source".to_owned(), file.to_owned()));
    Node {
        name,
        stage: Arc::new(stage),
        sources: sources.into_iter().collect(),
        handling: Handling::default(),
    }
}

fn nodes(shape: &str, folder: &Path, count: usize) -> anyhow::Result<Vec<Node>> {
    match shape {
        "chain" => {
            let source = folder.join("source");
            let copy = |position: usize| {
                let before = position.checked_sub(1);
                let stage = Copy {
                    file: before.is_none().then(|| SourcePath::new("source")),
                    input: before.map(|before| Input::new(format!("s{before}"))),
                    position,
                };
                let file = before.is_none().then_some(source.as_path());
                node(format!("s{position}"), stage, file)
            };
            Ok((0..count).map(copy).collect())
        }
        "files" => {
            let counted = Count {
                input: Input::new("many"),
            };
            Ok(vec![
                node("many".to_owned(), Many { files: count }, None),
                node("count".to_owned(), counted, None),
            ])
        }
        _ => anyhow::bail!("expected `chain` or `files`, found `{shape}`"),
    }
}

const KINDS: &[Kind] = &[Kind::of::<Copy>(), Kind::of::<Many>(), Kind::of::<Count>()];

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, shape, folder, count, ..] = arguments.as_slice() else {
        // `cargo bench` alone: the timings are the script's.
        eprintln!("run benches/runner.py, which calls this");
        return Ok(());
    };
    let folder = std::path::absolute(folder)?;
    let graph = Graph::new(nodes(shape, &folder, count.parse()?)?)?;
    let store = Store::new(&folder.join("store"));
    let shared = Shared::none();
    let env = Arc::new(RunEnv::default());
    // Without a program stages run in this process.
    let executors = Executors::new(KINDS, Arc::clone(&env), None);
    let session = Session {
        forced: vec![false; graph.nodes.len()],
        graph: &graph,
        store: &store,
        recipe: shape,
        env,
        pins: Pins::new(),
        locked: false,
        verify: false,
        outputs: Vec::new(),
        shared: &shared,
        executors: &executors,
    };
    let options = Options {
        jobs: 2,
        machine: Machine {
            cpus: 2,
            memory: None,
            gpus: Vec::new(),
        },
        keep_going: false,
    };
    let (events, received) = channel();
    let drain = std::thread::spawn(move || received.iter().count());
    let summary = run(&session, &[], &options, &events, &Arc::default())?;
    drop(events);
    let told = drain.join();
    anyhow::ensure!(summary.failed == 0 && told.is_ok(), "a stage failed");
    eprintln!("{} ran, {} fresh", summary.ran, summary.fresh);
    Ok(())
}
