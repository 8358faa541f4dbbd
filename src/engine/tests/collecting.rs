//! What a collection leaves, what waits for it, and what happens when the store can't be read.

use std::fs;

use super::super::gc::Needs;
use super::*;

/// Counts in its scratch folder, and fails before it is done.
#[derive(Serialize, Deserialize, JsonSchema)]
pub(super) struct Slow {
    input: Input<Text>,
    setting: u32,
    #[serde(default)]
    until: Neutral<usize>,
}

impl Stage for Slow {
    const KIND: &'static str = "slow";
    const VERSION: u32 = 1;
    type Output = Text;

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        let state = cx.scratch()?.join("state");
        let done = fs::read_to_string(&state).unwrap_or_default().len() + 1;
        fs::write(&state, "x".repeat(done))?;
        anyhow::ensure!(done >= *self.until, "stopped at {done}");
        fs::write(cx.out().join("text"), done.to_string())?;
        Ok(())
    }
}

fn graph(toy: &Toy, setting: u32, until: usize) -> Graph {
    let mut nodes = toy.graph("+", "").nodes;
    nodes.push(Node {
        name: "slow".into(),
        stage: Arc::new(Slow {
            input: Input::new("both"),
            setting,
            until: Neutral(until),
        }),
        sources: [].into(),
        handling: Handling::default(),
    });
    Graph::new(nodes).unwrap()
}

fn go(toy: &Toy, graph: &Graph) -> (Summary, Vec<Event>) {
    let store = toy.store();
    let (events, received) = channel();
    let shared = Shared::none();
    let session = Toy::session(graph, &store, &shared, &[]);
    let options = Options {
        keep_going: true,
        ..Options::for_test(2)
    };
    let summary = run(&session, &[], &options, &events, &Arc::default()).unwrap();
    drop(events);
    (summary, received.into_iter().collect())
}

/// Collects with the recipe at hand; what went.
fn collect(toy: &Toy, graph: &Graph, keep_runs: usize) -> Vec<&'static str> {
    let store = toy.store();
    let shared = Shared::none();
    let mut needs = Needs::default();
    Toy::session(graph, &store, &shared, &[]).needs(&mut needs);
    let limits = gc::Limits {
        keep_runs,
        max_size: 0,
    };
    let garbage = store.collect(&needs, limits, true).unwrap();
    garbage.into_iter().map(|garbage| garbage.what).collect()
}

fn scratches(toy: &Toy) -> usize {
    let names = toy.store().names("scratch");
    names.iter().filter(|name| !name.ends_with(".json")).count()
}

#[test]
fn unfinished_work_stays_where_it_would_be_gone_on_with() {
    let toy = Toy::new(56);
    let stopped = graph(&toy, 1, 3);
    assert_eq!(go(&toy, &stopped).0.failed, 1);
    // What it wrote into its output goes, the checkpoint stays, run or no run.
    assert_eq!(collect(&toy, &stopped, 0), ["unfinished work"]);
    assert_eq!(scratches(&toy), 1);
    // An input that has to be made again may have the same bytes.
    let both = toy.store().last("toy", "both").unwrap();
    let both = toy.store().record(&both).unwrap().artifact;
    fs::remove_dir_all(toy.store().artifact(&both)).unwrap();
    collect(&toy, &stopped, 0);
    assert_eq!(scratches(&toy), 1);
    assert_eq!(go(&toy, &stopped).0.failed, 1);
    let (summary, _) = go(&toy, &stopped);
    assert_eq!(summary.failed, 0);
    assert_eq!(toy.text(summary.artifacts[4].as_ref().unwrap()), "3");
    assert_eq!(toy.store().names("scratch"), [""; 0]);

    // Of other parameters it is of no use, even while an input is missing; but the last run had them.
    go(&toy, &graph(&toy, 2, 9));
    assert_eq!(scratches(&toy), 1);
    collect(&toy, &stopped, 1);
    assert_eq!(scratches(&toy), 1);
    fs::remove_dir_all(toy.store().artifact(&both)).unwrap();
    collect(&toy, &stopped, 0);
    assert_eq!(toy.store().names("scratch"), [""; 0]);
}

#[test]
fn results_that_wait_for_an_input_stay() {
    let toy = Toy::new(57);
    let done = graph(&toy, 1, 1);
    let (summary, _) = go(&toy, &done);
    let both = summary.artifacts[1].clone().unwrap();
    fs::remove_dir_all(toy.store().artifact(&both)).unwrap();
    assert_eq!(collect(&toy, &done, 0), [""; 0]);
    // `both` and `last` have the same bytes, so that one run makes both whole.
    assert_eq!(ran(&go(&toy, &done).0), (1, 4));
}

#[test]
fn a_run_that_waits_for_a_collection_says_so() {
    let toy = Toy::new(59);
    toy.run();
    let lock = super::super::store::open_lock(&toy.store().lock_path("in-use"));
    let mut lock = lock.unwrap();
    lock.lock().unwrap();
    super::super::store::sign(&mut lock, "`pipeline gc`, ");
    let (graph, store) = (toy.graph("+", ""), toy.store());
    let cancel = Arc::new(AtomicBool::new(false));
    let start = |events, cancel: &Arc<AtomicBool>| {
        let shared = Shared::none();
        let session = Toy::session(&graph, &store, &shared, &[]);
        run(&session, &[], &Options::for_test(1), &events, cancel)
    };
    std::thread::scope(|scope| {
        let (events, received) = channel();
        let runner = scope.spawn(|| start(events, &cancel));
        let Ok(Event::RunWaiting { holder }) = received.recv() else {
            panic!("it does not wait")
        };
        let process = std::process::id();
        let expected = format!("`pipeline gc`, process {process}");
        assert!(holder.starts_with(&expected), "{holder}");
        // Whoever does not want to wait need not.
        cancel.store(true, Ordering::Relaxed);
        let error = runner.join().unwrap().unwrap_err().to_string();
        assert!(error.contains("interrupted"), "{error}");
        drop(lock);
        let (events, _received) = channel();
        assert_eq!(ran(&start(events, &Arc::default()).unwrap()), (0, 4));
    });
}

#[test]
fn what_killed_writes_left_goes() {
    let toy = Toy::new(60);
    let summary = toy.run();
    let left = [
        "records/.tmpaB3",
        "artifacts/.tmpxY1",
        "state/runs/toy/.tmpq",
        "last/toy/.tmp0",
    ];
    for left in left {
        toy.write(&format!("store/v1/{left}"), "half");
    }
    // A result may have a file of such a name.
    let artifact = summary.artifacts[0].as_ref().unwrap();
    let inside = toy.store().artifact(artifact).join(".tmpmine");
    fs::write(&inside, "mine").unwrap();
    let everything = toy.graph("+", "");
    assert_eq!(collect(&toy, &everything, 1), ["unfinished work"; 4]);
    assert!(inside.exists());
    for left in left {
        assert!(!toy.path(&format!("store/v1/{left}")).exists(), "{left}");
    }
}

#[test]
fn names_may_be_longer_than_those_of_files() {
    let toy = Toy::new(61);
    let name = |end: &str| "ü".repeat(300) + end;
    let node = |end: &str| Node {
        name: name(end),
        stage: Arc::new(Read {
            file: SourcePath::new("a"),
            upper: end == "2",
            counter: Neutral(61),
        }),
        sources: [("a".to_owned(), toy.path("a"))].into(),
        handling: Handling::default(),
    };
    let graph = Graph::new(vec![node("1"), node("2")]).unwrap();
    let (summary, events) = go(&toy, &graph);
    assert_eq!(ran(&summary), (2, 0), "{events:?}");
    assert_eq!(ran(&go(&toy, &graph).0), (0, 2));
    let last = |end| toy.store().last("toy", &name(end)).unwrap();
    assert_ne!(last("1"), last("2"));
}

/// Reading from it fails with an I/O error, whoever asks.
#[cfg(target_os = "linux")]
fn fails(path: &Path) {
    fs::remove_file(path).unwrap();
    std::os::unix::fs::symlink("/proc/self/mem", path).unwrap();
}

#[cfg(target_os = "linux")]
#[test]
fn a_store_that_can_not_be_read_is_told_and_nothing_is_made_again() {
    for (what, place) in [("record", "records/"), ("manifest", "artifacts/")] {
        let toy = Toy::new(38);
        let first = toy.run();
        let fingerprint = toy.store().last("toy", "a").unwrap();
        let name = match what {
            "record" => fingerprint,
            _ => first.artifacts[2].clone().unwrap(),
        };
        let path = toy.path(&format!("store/v1/{place}{name}.json"));
        let whole = fs::read(&path).unwrap();
        fails(&path);
        let State::Unknown { error } = &toy.plan("+")[2] else {
            panic!("{what}: {:?}", toy.plan("+")[2])
        };
        assert!(error.contains("could not read"), "{what}: {error}");
        let (summary, events) = toy.run_with("+", "", &[]);
        assert_eq!((summary.failed, summary.ran), (1, 0), "{what}: {events:?}");
        fs::remove_file(&path).unwrap();
        fs::write(&path, whole).unwrap();
        assert_eq!(ran(&toy.run()), (0, 4), "{what}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn nothing_is_collected_while_the_history_can_not_be_read() {
    let toy = Toy::new(37);
    toy.run();
    toy.run_with("-", "", &[]);
    let run = toy.path("store/v1/state/runs/toy/000002.json");
    assert!(run.exists());
    fails(&run);
    let error = toy
        .store()
        .collect(&Needs::default(), gc::Limits::default(), true);
    let error = format!("{:#}", error.unwrap_err());
    assert!(error.contains("history"), "{error}");
    assert_eq!(ran(&toy.run()), (0, 4));
}
