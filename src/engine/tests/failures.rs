//! Stages that fail, are tried again, take too long or wait for room.

use std::num::NonZeroUsize;
use std::sync::Mutex;
use std::time::Duration;

use super::*;

/// Fails so often, takes so long, and writes down who ran beside it.
#[derive(Serialize, Deserialize, JsonSchema)]
pub(super) struct Odd {
    name: String,
    #[serde(default)]
    fails: Neutral<usize>,
    #[serde(default)]
    milliseconds: Neutral<u64>,
    #[serde(default)]
    inputs: Vec<Input<Text>>,
    counter: Neutral<usize>,
}

struct Running {
    counter: usize,
    name: String,
    gpus: Vec<usize>,
    threads: usize,
}

/// Who runs, and by counter the most threads there were at a time.
static BESIDE: Mutex<Vec<Running>> = Mutex::new(Vec::new());
static MOST: [AtomicUsize; 32] = [const { AtomicUsize::new(0) }; 32];

impl Stage for Odd {
    const KIND: &'static str = "odd";
    const VERSION: u32 = 1;
    type Output = Text;

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        let tries = RUNS[*self.counter].fetch_add(1, Ordering::SeqCst);
        std::fs::write(cx.out().join("text"), &self.name)?;
        cx.warn("about to be odd");
        {
            let mut beside = BESIDE.lock().unwrap();
            let mine = |one: &&Running| one.counter == *self.counter;
            for Running { name, gpus, .. } in beside.iter().filter(mine) {
                let shared = gpus.iter().any(|gpu| cx.gpus().contains(gpu));
                anyhow::ensure!(!shared, "`{name}` has the same device");
            }
            beside.push(Running {
                counter: *self.counter,
                name: self.name.clone(),
                gpus: cx.gpus().to_vec(),
                threads: rayon::current_num_threads(),
            });
            let threads = beside.iter().filter(mine).map(|one| one.threads).sum();
            MOST[*self.counter].fetch_max(threads, Ordering::SeqCst);
        }
        let mut result = if tries < *self.fails {
            // As a disk or a connection fails: the next attempt may go well.
            Err(std::io::Error::other("told to fail").into())
        } else {
            Ok(())
        };
        for _ in 0..*self.milliseconds {
            std::thread::sleep(Duration::from_millis(1));
            if cx.cancelled() {
                result = cx.check_cancelled();
                break;
            }
        }
        let mut beside = BESIDE.lock().unwrap();
        beside.retain(|one| (one.counter, &one.name) != (*self.counter, &self.name));
        result
    }
}

fn odd(name: &str, counter: usize, fails: usize, milliseconds: u64, inputs: &[&str]) -> Node {
    Node {
        name: name.to_owned(),
        stage: Arc::new(Odd {
            name: name.to_owned(),
            fails: Neutral(fails),
            milliseconds: Neutral(milliseconds),
            inputs: inputs.iter().copied().map(Input::new).collect(),
            counter: Neutral(counter),
        }),
        sources: [].into(),
        handling: Handling::default(),
    }
}

fn run_nodes(toy: &Toy, nodes: Vec<Node>, options: &Options) -> (Summary, Vec<Event>) {
    let (graph, store) = (Graph::new(nodes).unwrap(), toy.store());
    let (events, received) = channel();
    let shared = remote::Shared::none();
    let session = Toy::session(&graph, &store, &shared, &[]);
    let summary = run(&session, &[], options, &events, &Arc::default()).unwrap();
    drop(events);
    (summary, received.into_iter().collect())
}

fn failure(events: &[Event]) -> (String, Option<String>) {
    let found = events.iter().find_map(|event| match event {
        Event::StageFailed { error, kept, .. } => Some((error.clone(), kept.clone())),
        _ => None,
    });
    found.unwrap()
}

#[test]
fn a_failure_is_set_aside_and_stops_what_depends_on_it() {
    for (fail, counter) in [("error", 7), ("panic", 8)] {
        let toy = Toy::new(counter);
        let (summary, events) = toy.run_with("+", fail, &[]);
        assert_eq!((summary.ran, summary.failed, summary.skipped), (2, 1, 1));
        let (error, kept) = failure(&events);
        assert!(error.contains("told to"), "{error}");
        let kept = PathBuf::from(kept.unwrap());
        let half = std::fs::read_to_string(kept.join("output/half")).unwrap();
        assert_eq!(half, "half");
        let log = std::fs::read_to_string(kept.join("log.jsonl")).unwrap();
        assert!(log.contains("told to"), "{log}");
        let partial = toy.path("store/v1/partial");
        assert_eq!(std::fs::read_dir(partial).unwrap().count(), 0);
        assert_eq!(ran(&toy.run()), (2, 2));
        assert!(!kept.exists(), "gone with the success");
    }
}

#[test]
fn with_keep_going_only_what_needs_the_failure_is_left() {
    let toy = Toy::new(22);
    let nodes = |fails| {
        vec![
            odd("bad", 22, fails, 0, &[]),
            odd("good", 23, 0, 20, &[]),
            odd("needs_bad", 23, 0, 0, &["bad"]),
            odd("needs_good", 23, 0, 0, &["good"]),
        ]
    };
    let mut options = Options::for_test(1);
    let (summary, _) = run_nodes(&toy, nodes(1), &options);
    assert_eq!((summary.ran, summary.failed, summary.skipped), (0, 1, 3));
    RUNS[22].store(0, Ordering::SeqCst);
    options.keep_going = true;
    let (summary, _) = run_nodes(&toy, nodes(1), &options);
    assert_eq!((summary.ran, summary.failed, summary.skipped), (2, 1, 1));
    let (summary, _) = run_nodes(&toy, nodes(0), &options);
    assert_eq!((summary.ran, summary.fresh), (2, 2));
}

#[test]
fn a_stage_is_tried_again_as_often_as_it_may() {
    let toy = Toy::new(24);
    let mut node = odd("shy", 24, 1, 0, &[]);
    node.handling.retries = 1;
    let (summary, events) = run_nodes(&toy, vec![node], &Options::for_test(1));
    assert_eq!((summary.ran, summary.failed), (1, 0));
    let retried = |event: &Event| matches!(event, Event::StageRetried { error, left: 0, .. } if error == "told to fail");
    assert!(events.iter().any(retried));
}

#[test]
fn what_would_fail_in_the_same_way_is_not_tried_again() {
    let toy = Toy::new(62);
    let mut node = Node {
        name: "joined".into(),
        stage: Arc::new(Join {
            inputs: Vec::new(),
            separator: String::new(),
            fail: Neutral("error".into()),
            counter: Neutral(62),
        }),
        sources: [].into(),
        handling: Handling::default(),
    };
    node.handling.retries = 3;
    let (summary, events) = run_nodes(&toy, vec![node], &Options::for_test(1));
    assert_eq!((summary.ran, summary.failed), (0, 1));
    assert_eq!(RUNS[62].load(Ordering::SeqCst), 1);
    let (error, _) = failure(&events);
    assert_eq!(
        error,
        "not tried again, because it would fail in the same way: told to fail"
    );
}

#[test]
fn a_stage_that_takes_too_long_is_stopped_and_says_so() {
    let toy = Toy::new(25);
    let mut node = odd("slow", 25, 0, 60_000, &[]);
    node.handling.timeout = Some(Span(Duration::from_millis(30)));
    let (summary, events) = run_nodes(&toy, vec![node], &Options::for_test(1));
    assert_eq!((summary.ran, summary.failed), (0, 1));
    let (error, kept) = failure(&events);
    assert!(
        error.contains("longer than its `timeout` of 30ms"),
        "{error}"
    );
    let log = std::fs::read_to_string(PathBuf::from(kept.unwrap()).join("log.jsonl")).unwrap();
    assert!(
        log.contains("about to be odd") && log.contains("30ms"),
        "{log}"
    );
}

#[test]
fn stages_never_take_more_than_there_is() {
    let toy = Toy::new(26);
    let nodes = (0..8).map(|index| {
        let mut node = odd(&format!("s{index}"), 26, 0, 5, &[]);
        node.handling.resources = Resources {
            cpus: NonZeroUsize::new(1 + index % 2),
            memory: Bytes(if index == 3 { 90 } else { 30 }),
            gpus: index % 3,
            ..Resources::default()
        };
        node
    });
    let options = Options {
        jobs: 8,
        machine: Machine {
            cpus: 3,
            memory: Some(Bytes(100)),
            gpus: vec![1, 4],
        },
        keep_going: false,
    };
    // Each looks whether another has its device, and how many threads there are in all.
    let (summary, _) = run_nodes(&toy, nodes.collect(), &options);
    assert_eq!((summary.ran, summary.failed), (8, 0));
    let most = MOST[26].load(Ordering::SeqCst);
    assert!((2..=3).contains(&most), "{most} threads");
}

#[test]
fn what_could_never_start_is_an_error_before_anything_runs() {
    let toy = Toy::new(27);
    let mut greedy = odd("greedy", 27, 0, 0, &["first"]);
    greedy.handling.resources.gpus = 1;
    let graph = Graph::new(vec![odd("first", 27, 0, 0, &[]), greedy]).unwrap();
    let (store, events) = (toy.store(), channel().0);
    let shared = remote::Shared::none();
    let session = Toy::session(&graph, &store, &shared, &[]);
    let error = run(
        &session,
        &[],
        &Options::for_test(1),
        &events,
        &Arc::default(),
    );
    let error = error.unwrap_err().to_string();
    assert!(error.contains("`greedy` wants 1 gpus"), "{error}");
    assert_eq!(RUNS[27].load(Ordering::SeqCst), 0);
}

#[test]
fn many_runners_put_one_result_in_its_place() {
    let toy = Toy::new(31);
    let (summary, _) = toy.run_with("+", "", &[]);
    let artifact = summary.artifacts[0].clone().unwrap();
    let store = toy.store();
    for round in 0..50 {
        let to = toy.path(&format!("out{round}"));
        let start = std::sync::Barrier::new(4);
        std::thread::scope(|scope| {
            let put = || {
                start.wait();
                publish(
                    &store,
                    &artifact,
                    &to,
                    PublishOptions::default(),
                    &AtomicBool::new(false),
                    &mut |_| {},
                )
                .unwrap()
            };
            let placers: Vec<_> = (0..4).map(|_| scope.spawn(put)).collect();
            let changed = placers.into_iter().map(|placer| placer.join().unwrap());
            assert_eq!(changed.filter(|put| put.changed).count(), 1);
        });
        assert_eq!(std::fs::read_to_string(to.join("text")).unwrap(), "one+two");
    }
}
