//! The engine with toy stages that write text files: fresh, stale, cut off, damaged, crashed, forced, two runners.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, LazyLock};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::remote::Shared;
use super::*;

mod changes;
mod collecting;
mod continuations;
mod damage;
mod failures;
mod known;

struct Text;

impl Artifact for Text {
    const NAME: &'static str = "text";

    fn show(_: &Path, _: usize) -> anyhow::Result<Vec<View>> {
        Ok(Vec::new())
    }
}

/// How often any toy stage ran, per test: tests hand the counter's name in by a neutral parameter.
static RUNS: [AtomicUsize; 64] = [const { AtomicUsize::new(0) }; 64];

#[derive(Serialize, Deserialize, JsonSchema)]
struct Read {
    file: SourcePath,
    #[serde(default)]
    upper: bool,
    #[serde(default)]
    counter: Neutral<usize>,
}

impl Stage for Read {
    const KIND: &'static str = "read";
    const VERSION: u32 = 1;
    type Output = Text;

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        RUNS[*self.counter].fetch_add(1, Ordering::SeqCst);
        let text = std::fs::read_to_string(cx.source(&self.file)?)?;
        let text = text
            .lines()
            .filter(|line| !line.starts_with('#'))
            .collect::<Vec<_>>()
            .join("\n");
        std::fs::write(
            cx.out().join("text"),
            if self.upper {
                text.to_uppercase()
            } else {
                text
            },
        )?;
        Ok(())
    }
}

#[derive(Serialize, Deserialize, JsonSchema)]
struct Join {
    inputs: Vec<Input<Text>>,
    #[serde(default)]
    separator: String,
    #[serde(default)]
    fail: Neutral<String>,
    #[serde(default)]
    counter: Neutral<usize>,
}

impl Stage for Join {
    const KIND: &'static str = "join";
    const VERSION: u32 = 1;
    const EXCLUSIVE: bool = true;
    type Output = Text;

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        RUNS[*self.counter].fetch_add(1, Ordering::SeqCst);
        std::fs::write(cx.out().join("half"), "half")?;
        match self.fail.as_str() {
            "error" => anyhow::bail!("told to fail"),
            "panic" => panic!("told to panic"),
            "slow" => std::thread::sleep(std::time::Duration::from_millis(300)),
            _ => {}
        }
        std::fs::remove_file(cx.out().join("half"))?;
        let mut parts = Vec::new();
        for input in &self.inputs {
            parts.push(std::fs::read_to_string(cx.input(input)?.join("text"))?);
        }
        std::fs::write(cx.out().join("text"), parts.join(&self.separator))?;
        Ok(())
    }
}

impl Options {
    fn for_test(jobs: usize) -> Self {
        Self {
            jobs,
            machine: Machine {
                cpus: jobs,
                memory: None,
                gpus: Vec::new(),
            },
            keep_going: false,
        }
    }
}

/// All kinds of toy stages.
const KINDS: &[Kind] = &[
    Kind::of::<Read>(),
    Kind::of::<Join>(),
    Kind::of::<changes::Watched>(),
    Kind::of::<changes::Spoils>(),
    Kind::of::<changes::Links>(),
    Kind::of::<collecting::Slow>(),
    Kind::of::<continuations::Count>(),
    Kind::of::<failures::Odd>(),
];

/// Without a program they run in this process.
static EXECUTORS: LazyLock<Executors> =
    LazyLock::new(|| Executors::new(KINDS, Arc::default(), None));

struct Toy {
    folder: tempfile::TempDir,
    counter: usize,
}

impl Toy {
    fn new(counter: usize) -> Self {
        let toy = Self {
            folder: tempfile::tempdir().unwrap(),
            counter,
        };
        toy.write("a", "one");
        toy.write("b", "two");
        toy
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    fn store(&self) -> Store {
        Store::new(&self.path("store"))
    }

    fn graph(&self, separator: &str, fail: &str) -> Graph {
        let read = |name: &str| Node {
            name: name.to_owned(),
            stage: Arc::new(Read {
                file: SourcePath::new(name),
                upper: false,
                counter: Neutral(self.counter),
            }),
            sources: [(name.to_owned(), self.path(name))].into(),
            handling: Handling::default(),
        };
        let join = |name: &str, inputs: &[&str], fail: &str| Node {
            name: name.to_owned(),
            stage: Arc::new(Join {
                inputs: inputs.iter().copied().map(Input::new).collect(),
                separator: separator.to_owned(),
                fail: Neutral(fail.to_owned()),
                counter: Neutral(self.counter),
            }),
            sources: [].into(),
            handling: Handling::default(),
        };
        // Out of order on purpose.
        Graph::new(vec![
            join("last", &["both"], ""),
            join("both", &["a", "b"], fail),
            read("a"),
            read("b"),
        ])
        .unwrap()
    }

    fn session<'a>(
        graph: &'a Graph,
        store: &'a Store,
        shared: &'a Shared,
        forced: &[&str],
    ) -> Session<'a> {
        let forced = graph
            .nodes
            .iter()
            .map(|node| forced.contains(&node.name.as_str()))
            .collect();
        Session {
            graph,
            store,
            recipe: "toy",
            env: Arc::default(),
            forced,
            pins: Pins::new(),
            locked: false,
            verify: false,
            outputs: Vec::new(),
            shared,
            executors: &EXECUTORS,
        }
    }

    fn run_with(&self, separator: &str, fail: &str, forced: &[&str]) -> (Summary, Vec<Event>) {
        let (graph, store) = (self.graph(separator, fail), self.store());
        let (events, received) = channel();
        let summary = run(
            &Self::session(&graph, &store, &Shared::none(), forced),
            &[],
            &Options::for_test(2),
            &events,
            &Arc::new(AtomicBool::new(false)),
        )
        .unwrap();
        drop(events);
        (summary, received.into_iter().collect())
    }

    fn run(&self) -> Summary {
        self.run_with("+", "", &[]).0
    }

    fn text(&self, artifact: &Digest) -> String {
        std::fs::read_to_string(self.store().artifact(artifact).join("text")).unwrap()
    }

    fn plan(&self, separator: &str) -> Vec<State> {
        let (graph, store) = (self.graph(separator, ""), self.store());
        Self::session(&graph, &store, &Shared::none(), &[]).plan()
    }
}

fn ran(summary: &Summary) -> (usize, usize) {
    (summary.ran, summary.fresh)
}

#[test]
fn a_second_run_does_nothing_and_touching_a_file_changes_nothing() {
    let toy = Toy::new(0);
    let first = toy.run();
    assert_eq!(ran(&first), (4, 0));
    assert_eq!(toy.text(first.artifacts[0].as_ref().unwrap()), "one+two");
    assert_eq!(ran(&toy.run()), (0, 4));
    toy.write("a", "one");
    assert_eq!(ran(&toy.run()), (0, 4));
    assert_eq!(RUNS[0].load(Ordering::SeqCst), 4);
}

#[test]
fn upstream_rerun_with_same_bytes_leaves_downstream_fresh() {
    let toy = Toy::new(1);
    toy.run();
    toy.write("a", "# a comment\none");
    let (summary, events) = toy.run_with("+", "", &[]);
    assert_eq!(ran(&summary), (1, 3));
    assert!(events.iter().any(
        |event| matches!(event, Event::StageDone { stage, same_bytes: true, .. } if stage == "a")
    ));
}

#[test]
fn an_earlier_state_comes_back_for_free() {
    let toy = Toy::new(2);
    toy.run();
    assert_eq!(ran(&toy.run_with("-", "", &[]).0), (2, 2));
    let (summary, events) = toy.run_with("+", "", &[]);
    assert_eq!(ran(&summary), (0, 4));
    assert!(events.iter().any(
        |event| matches!(event, Event::StageFresh { stage, restored: true, .. } if stage == "both")
    ));
}

#[test]
fn neutral_settings_change_nothing() {
    let toy = Toy::new(3);
    toy.run();
    assert_eq!(ran(&toy.run_with("+", "anything", &[]).0), (0, 4));
}

#[test]
fn reasons_tell_old_and_new_values() {
    let toy = Toy::new(4);
    toy.run();
    let states = toy.plan("-");
    let State::Runs { reasons } = &states[1] else {
        panic!("{states:?}")
    };
    assert_eq!(
        reasons.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["`separator` changed from \"+\" to \"-\""]
    );
    let State::WaitsOn { stages, reasons } = &states[0] else {
        panic!("{states:?}")
    };
    assert_eq!(
        (stages.as_slice(), reasons.len()),
        (&["both".to_owned()][..], 1)
    );
    toy.write("a", "other");
    let states = toy.plan("+");
    let State::Runs { reasons } = &states[2] else {
        panic!("{states:?}")
    };
    assert!(
        matches!(&reasons[..], [Reason::FileChanged { path, .. }] if path == "a"),
        "{reasons:?}"
    );
    toy.run();
    assert!(matches!(
        &toy.plan("+")[1],
        State::Fresh {
            restored: false,
            ..
        }
    ));
}

#[test]
fn a_plan_writes_nothing() {
    let toy = Toy::new(5);
    let states = toy.plan("+");
    assert!(matches!(&states[2], State::Runs { reasons } if reasons == &[Reason::NeverRan]));
    assert!(!toy.path("store").exists());
}

#[test]
fn damage_is_noticed_and_rebuilt() {
    let toy = Toy::new(6);
    let first = toy.run();
    let both = toy
        .store()
        .artifact(first.artifacts[1].as_ref().unwrap())
        .join("text");
    std::fs::remove_file(&both).unwrap();
    std::fs::write(&both, "altered").unwrap();
    assert!(
        matches!(&toy.plan("+")[1], State::Runs { reasons } if matches!(reasons[..], [Reason::ArtifactDamaged { .. }]))
    );
    let second = toy.run();
    // `last` joins one input, so its bytes are those of `both`: one artifact, damaged for both stages.
    assert_eq!(second.artifacts, first.artifacts);
    assert_eq!(std::fs::read_to_string(&both).unwrap(), "one+two");
    std::fs::remove_dir_all(both.parent().unwrap()).unwrap();
    assert_eq!(toy.run().artifacts, first.artifacts);
    assert_eq!(std::fs::read_to_string(&both).unwrap(), "one+two");
}

#[test]
fn a_flipped_bit_with_the_old_time_is_found() {
    let toy = Toy::new(12);
    let first = toy.run();
    let store = toy.store();
    let content = first.artifacts[2].as_ref().unwrap();
    let path = store.artifact(content).join("text");
    let before = std::fs::metadata(&path).unwrap().modified().unwrap();
    let mode = std::fs::metadata(&path).unwrap().permissions();
    let mut writable = mode.clone();
    #[expect(
        clippy::permissions_set_readonly_false,
        reason = "a test's own temporary file"
    )]
    writable.set_readonly(false);
    std::fs::set_permissions(&path, writable).unwrap();
    std::fs::write(&path, "onf").unwrap();
    std::fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_modified(before)
        .unwrap();
    std::fs::set_permissions(&path, mode).unwrap();
    let manifest = store.manifest(content).unwrap();
    for thorough in [false, true] {
        let check = manifest.check(&store.artifact(content), thorough);
        assert!(matches!(check, Check::Damaged(_)), "{thorough}: {check:?}");
    }
}

#[test]
fn what_a_crash_left_is_swept_and_does_not_count() {
    let toy = Toy::new(9);
    let partial = toy.path("store/v1/partial/0123");
    std::fs::create_dir_all(&partial).unwrap();
    std::fs::write(partial.join("text"), "half").unwrap();
    assert_eq!(ran(&toy.run()), (4, 0));
    assert!(!partial.exists());
}

#[test]
fn force_runs_one_stage_and_cuts_off_below() {
    let toy = Toy::new(10);
    toy.run();
    assert_eq!(ran(&toy.run_with("+", "", &["both"]).0), (1, 3));
}

#[test]
fn two_runners_make_each_result_once() {
    let toy = Toy::new(11);
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..2)
            .map(|_| scope.spawn(|| toy.run_with("+", "slow", &[]).0))
            .collect();
        let artifacts: Vec<_> = runs
            .into_iter()
            .map(|run| run.join().unwrap().artifacts)
            .collect();
        assert_eq!(artifacts[0], artifacts[1]);
        assert!(artifacts[0].iter().all(Option::is_some));
    });
    assert_eq!(RUNS[11].load(Ordering::SeqCst), 4);
}

#[test]
fn who_waits_says_for_whom_and_goes_on_when_the_holder_is_gone() {
    let (other, toy) = (Toy::new(14), Toy::new(15));
    other.run();
    // Contents decide: the same stage has the same fingerprint in both.
    let fingerprint = other.store().last("toy", "a").unwrap();
    let (graph, store) = (toy.graph("+", ""), toy.store());
    let miss = store
        .lock(&fingerprint, &AtomicBool::new(false), &mut |_| {})
        .unwrap();
    std::thread::scope(|scope| {
        let (events, received) = channel();
        let (graph, store) = (&graph, &store);
        let runner = scope.spawn(move || {
            let shared = Shared::none();
            let session = Toy::session(graph, store, &shared, &[]);
            run(
                &session,
                &[],
                &Options::for_test(2),
                &events,
                &Arc::default(),
            )
            .unwrap()
        });
        let holder = received.iter().find_map(|event| match event {
            Event::StageWaiting { stage, holder } if stage == "a" => Some(holder),
            _ => None,
        });
        let process = format!("process {}", std::process::id());
        let holder = holder.unwrap();
        assert!(holder.starts_with(&process), "{holder}");
        drop(miss);
        assert_eq!(ran(&runner.join().unwrap()), (4, 0));
    });
    assert_eq!(ran(&toy.run()), (0, 4));
}

#[test]
fn a_graph_may_be_deeper_than_any_stack() {
    const STAGES: usize = 20_000;
    let toy = Toy::new(16);
    let node = |index: usize| Node {
        name: format!("s{index}"),
        stage: Arc::new(Join {
            inputs: (index > 0)
                .then(|| Input::new(format!("s{}", index - 1)))
                .into_iter()
                .collect(),
            separator: String::new(),
            fail: Neutral::default(),
            counter: Neutral(toy.counter),
        }),
        sources: [].into(),
        handling: Handling::default(),
    };
    // The last first, so that the order has to be found.
    let nodes = (0..STAGES).rev().map(node).collect();
    let store = toy.store();
    std::thread::scope(|scope| {
        let look = move || {
            let graph = Graph::new(nodes).unwrap();
            assert_eq!(graph.needed(&[0]), vec![true; STAGES]);
            let states = Toy::session(&graph, &store, &Shared::none(), &[]).plan();
            let waits = |state: &&State| matches!(state, State::WaitsOn { .. });
            assert_eq!(states.iter().filter(waits).count(), STAGES - 1);
        };
        let small = std::thread::Builder::new().stack_size(256 << 10);
        small.spawn_scoped(scope, look).unwrap().join().unwrap();
    });
}

#[test]
fn cycles_and_unknown_stages_are_refused() {
    let join = |name: &str, input: &str| Node {
        name: name.to_owned(),
        stage: Arc::new(Join {
            inputs: vec![Input::new(input)],
            separator: String::new(),
            fail: Neutral::default(),
            counter: Neutral::default(),
        }),
        sources: [].into(),
        handling: Handling::default(),
    };
    assert!(matches!(
        Graph::new(vec![join("a", "b"), join("b", "a")]),
        Err(GraphError::Cycle(_))
    ));
    assert!(matches!(
        Graph::new(vec![join("a", "c")]),
        Err(GraphError::Unknown { .. })
    ));
    assert!(matches!(
        Graph::new(vec![join("a", "a")]),
        Err(GraphError::Cycle(_))
    ));
}
