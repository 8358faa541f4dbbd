//! Local files and results that change while they are used: no result ever goes under the fingerprint of something else.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

use super::super::sources::Sources;
use super::*;

/// Copies all texts of a file or folder, and changes something while it does.
#[derive(Serialize, Deserialize, JsonSchema)]
pub(super) struct Watched {
    file: SourcePath,
    /// A stage that has to be done before.
    #[serde(default)]
    after: Option<Input<Text>>,
    /// What happens once the source was read.
    #[serde(default)]
    then: Neutral<Then>,
    #[serde(default)]
    counter: Neutral<usize>,
}

/// In parameters a text: a word and a path.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(into = "String", try_from = "String")]
enum Then {
    #[default]
    Nothing,
    /// More text at the end of a file.
    Append(PathBuf),
    /// Other text of the same length, and the old time.
    Edit(PathBuf),
    /// Other text, and the old again, and the old time.
    EditAndBack(PathBuf),
    /// Another file under its name.
    Replace(PathBuf),
    /// A new file.
    Add(PathBuf),
    Remove(PathBuf),
    /// A link leads elsewhere, and back.
    Turn(PathBuf),
    Fail(PathBuf),
}

impl From<Then> for String {
    fn from(then: Then) -> Self {
        let (word, path) = match then {
            Then::Nothing => ("Nothing", PathBuf::new()),
            Then::Append(path) => ("Append", path),
            Then::Edit(path) => ("Edit", path),
            Then::EditAndBack(path) => ("EditAndBack", path),
            Then::Replace(path) => ("Replace", path),
            Then::Add(path) => ("Add", path),
            Then::Remove(path) => ("Remove", path),
            Then::Turn(path) => ("Turn", path),
            Then::Fail(path) => ("Fail", path),
        };
        format!("{word} {}", path.display())
    }
}

impl TryFrom<String> for Then {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let (word, path) = text.split_once(' ').ok_or("expected a word and a path")?;
        let path = PathBuf::from(path);
        Ok(match word {
            "Nothing" => Self::Nothing,
            "Append" => Self::Append(path),
            "Edit" => Self::Edit(path),
            "EditAndBack" => Self::EditAndBack(path),
            "Replace" => Self::Replace(path),
            "Add" => Self::Add(path),
            "Remove" => Self::Remove(path),
            "Turn" => Self::Turn(path),
            "Fail" => Self::Fail(path),
            _ => return Err(format!("`{word}` is no change")),
        })
    }
}

impl Then {
    fn happen(&self) -> anyhow::Result<()> {
        match self {
            Self::Nothing => {}
            Self::Append(path) => fs::write(path, fs::read_to_string(path)? + "more")?,
            Self::Edit(path) => edit(path, "xyz"),
            Self::EditAndBack(path) => {
                let text = fs::read_to_string(path)?;
                edit(path, "xyz");
                edit(path, &text);
            }
            Self::Replace(path) => {
                let next = path.with_extension("next");
                fs::write(&next, "xyz")?;
                fs::rename(next, path)?;
            }
            Self::Add(path) => fs::write(path, "new")?,
            Self::Remove(path) => fs::remove_file(path)?,
            Self::Turn(path) => {
                let before = fs::read_link(path)?;
                next_tick(path);
                for target in [PathBuf::from("elsewhere"), before] {
                    fs::remove_file(path)?;
                    symlink(target, path)?;
                }
            }
            Self::Fail(path) => {
                fs::write(path, "half")?;
                anyhow::bail!("an odd text");
            }
        }
        Ok(())
    }
}

fn stat(path: &Path) -> Stat {
    Stat::from_metadata(&fs::symlink_metadata(path).unwrap())
}

/// Waits until a change to a file gets another time than its last one.
fn next_tick(path: &Path) {
    super::super::files::outlast(path.parent().unwrap(), stat(path).changed).unwrap();
}

/// Writes into a file in place, and sets its time back.
fn edit(path: &Path, text: &str) {
    next_tick(path);
    let before = fs::metadata(path).unwrap().modified().unwrap();
    fs::write(path, text).unwrap();
    let file = fs::File::options().write(true).open(path).unwrap();
    file.set_modified(before).unwrap();
}

fn texts(path: &Path) -> anyhow::Result<String> {
    if path.is_file() {
        return Ok(fs::read_to_string(path)?);
    }
    let mut paths = fs::read_dir(path)?
        .map(|entry| Ok(entry?.path()))
        .collect::<std::io::Result<Vec<_>>>()?;
    paths.sort();
    paths.iter().map(|path| texts(path)).collect()
}

impl Stage for Watched {
    const KIND: &'static str = "watched";
    const VERSION: u32 = 1;
    type Output = Text;

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        RUNS[*self.counter].fetch_add(1, Ordering::SeqCst);
        let text = texts(cx.source(&self.file)?)?;
        self.then.happen()?;
        fs::write(cx.out().join("text"), text)?;
        Ok(())
    }
}

fn node(toy: &Toy, name: &str, then: Then) -> Node {
    Node {
        name: name.to_owned(),
        stage: Arc::new(Watched {
            file: SourcePath::new(name),
            after: None,
            then: Neutral(then),
            counter: Neutral(toy.counter),
        }),
        sources: [(name.to_owned(), toy.path(name))].into(),
        handling: Handling::default(),
    }
}

fn run_nodes(toy: &Toy, nodes: Vec<Node>) -> (Summary, Vec<Event>) {
    let (graph, store) = (Graph::new(nodes).unwrap(), toy.store());
    let (events, received) = channel();
    let summary = run(
        &Toy::session(&graph, &store, &Shared::none(), &[]),
        &[],
        &Options::for_test(1),
        &events,
        &Arc::default(),
    );
    drop(events);
    (summary.unwrap(), received.into_iter().collect())
}

fn error_of(events: &[Event]) -> &str {
    let error = events.iter().find_map(|event| match event {
        Event::StageFailed { error, .. } => Some(error.as_str()),
        _ => None,
    });
    error.unwrap_or_default()
}

#[test]
fn what_changes_while_it_is_read_fails_the_stage_and_leaves_no_result() {
    type Case = (&'static str, fn(&Path) -> Then);
    let cases: [Case; 11] = [
        ("a", |at| Then::Append(at.join("a"))),
        ("a", |at| Then::Edit(at.join("a"))),
        ("a", |at| Then::EditAndBack(at.join("a"))),
        ("a", |at| Then::Replace(at.join("a"))),
        ("a", |at| Then::Remove(at.join("a"))),
        ("folder", |at| Then::Add(at.join("folder/in/new"))),
        ("folder", |at| Then::Remove(at.join("folder/in/one"))),
        ("folder", |at| Then::EditAndBack(at.join("folder/in/one"))),
        ("folder", |at| Then::EditAndBack(at.join("b"))),
        ("link", |at| Then::Turn(at.join("link"))),
        ("way/one", |at| Then::Turn(at.join("way"))),
    ];
    for (index, (source, then)) in cases.into_iter().enumerate() {
        let toy = Toy::new(47);
        fs::create_dir_all(toy.path("folder/in")).unwrap();
        toy.write("folder/in/one", "one");
        symlink(toy.path("b"), toy.path("folder/linked")).unwrap();
        symlink(toy.path("b"), toy.path("link")).unwrap();
        symlink(toy.path("folder/in"), toy.path("way")).unwrap();
        let then = then(toy.folder.path());
        let what = format!("case {index}, {then:?}");
        let (summary, events) = run_nodes(&toy, vec![node(&toy, source, then)]);
        assert_eq!((summary.failed, summary.ran), (1, 0), "{what}");
        let error = error_of(&events);
        assert!(
            error.contains("changed while it was read"),
            "{what}: {error}"
        );
        assert!(toy.store().fingerprints().unwrap().is_empty(), "{what}");
        if toy.path(source).exists() {
            let (summary, _) = run_nodes(&toy, vec![node(&toy, source, Then::Nothing)]);
            assert_eq!(ran(&summary), (1, 0), "{what}");
            let artifact = summary.artifacts[0].as_ref().unwrap();
            assert_eq!(toy.text(artifact), texts(&toy.path(source)).unwrap());
        }
    }
}

#[test]
fn a_stage_that_fails_over_a_changed_file_says_that_it_changed() {
    let toy = Toy::new(48);
    let mut failing = node(&toy, "a", Then::Fail(toy.path("a")));
    failing.handling.retries = 3;
    let (_, events) = run_nodes(&toy, vec![failing]);
    let error = error_of(&events);
    assert!(
        error.contains("an odd text") && error.contains("`a` changed"),
        "{error}"
    );
    // The same again would read the same half.
    assert_eq!(RUNS[48].load(Ordering::SeqCst), 1);
}

#[test]
fn what_changes_while_a_stage_waits_for_its_turn_is_looked_at_again() {
    let toy = Toy::new(49);
    let late = Then::Edit(toy.path("b"));
    let stages = |then| vec![node(&toy, "a", then), node(&toy, "b", Then::Nothing)];
    let (summary, events) = run_nodes(&toy, stages(late));
    assert_eq!(ran(&summary), (2, 0), "{events:?}");
    assert_eq!(toy.text(summary.artifacts[1].as_ref().unwrap()), "xyz");
    assert_eq!(ran(&run_nodes(&toy, stages(Then::Nothing)).0), (0, 2));
    // Back to what it was when the first run looked: that was never made.
    toy.write("b", "two");
    let (summary, _) = run_nodes(&toy, stages(Then::Nothing));
    assert_eq!(ran(&summary), (1, 1));
    assert_eq!(toy.text(summary.artifacts[1].as_ref().unwrap()), "two");
}

#[test]
fn nothing_but_what_is_pinned_is_read_where_that_is_asked_for() {
    let toy = Toy::new(39);
    let late = Then::Edit(toy.path("b"));
    let nodes = vec![node(&toy, "a", late), node(&toy, "b", Then::Nothing)];
    let (graph, store, shared) = (Graph::new(nodes).unwrap(), toy.store(), Shared::none());
    let mut session = Toy::session(&graph, &store, &shared, &[]);
    session.pins = session.pin(&|_| true).unwrap();
    session.locked = true;
    let (events, received) = channel();
    let options = Options::for_test(1);
    let summary = run(&session, &[], &options, &events, &Arc::default()).unwrap();
    drop(events);
    assert_eq!((summary.ran, summary.failed), (1, 1));
    let events: Vec<_> = received.into_iter().collect();
    let error = error_of(&events);
    assert!(
        error.contains("`b` is not as the lock file pins it"),
        "{error}"
    );
}

#[test]
fn a_result_that_changes_while_it_is_read_makes_no_other() {
    let toy = Toy::new(50);
    let (first, _) = run_nodes(&toy, vec![node(&toy, "a", Then::Nothing)]);
    let made = toy.store().artifact(first.artifacts[0].as_ref().unwrap());
    fs::set_permissions(made.join("text"), fs::Permissions::from_mode(0o644)).unwrap();
    // `b` begins as soon as `a` is found to be there; what it does hits the input of its reader.
    let reads = Node {
        name: "reads".into(),
        stage: Arc::new(Spoils {
            input: Input::new("a"),
        }),
        sources: [].into(),
        handling: Handling::default(),
    };
    let (summary, events) = run_nodes(&toy, vec![node(&toy, "a", Then::Nothing), reads]);
    assert_eq!((summary.failed, summary.fresh), (1, 1));
    let error = error_of(&events);
    assert!(
        error.contains("the result of `a` changed while it was read"),
        "{error}"
    );
    assert_eq!(toy.store().fingerprints().unwrap().len(), 1);
    let (again, _) = run_nodes(&toy, vec![node(&toy, "a", Then::Nothing)]);
    assert_eq!(again.artifacts, first.artifacts);
    assert_eq!(toy.text(again.artifacts[0].as_ref().unwrap()), "one");
}

/// Writes into what it reads.
#[derive(Serialize, Deserialize, JsonSchema)]
pub(super) struct Spoils {
    input: Input<Text>,
}

impl Stage for Spoils {
    const KIND: &'static str = "spoils";
    const VERSION: u32 = 1;
    type Output = Text;

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        edit(&cx.input(&self.input)?.join("text"), "xyz");
        fs::write(cx.out().join("text"), "made of xyz")?;
        Ok(())
    }
}

#[test]
fn a_digest_is_remembered_by_all_that_a_change_can_not_hide() {
    let toy = Toy::new(51);
    let (store, path) = (toy.store(), toy.path("a"));
    let digest = |sources: &mut Sources, anew| sources.digest(&path, anew).unwrap().0;
    let right = blake3::hash(b"one").to_hex().to_string();
    // A memo that is wrong shows where it is trusted: as long as nothing shows in the stat.
    let remember = |sources: &mut Sources| sources.pretend(&path, "remembered");
    let mut sources = Sources::open(&store, false);
    remember(&mut sources);
    assert_eq!(digest(&mut sources, false), "remembered");
    sources.save().unwrap();
    assert_eq!(digest(&mut Sources::open(&store, false), true), right);
    assert_eq!(
        digest(&mut Sources::open(&store, false), false),
        "remembered"
    );
    assert_eq!(digest(&mut Sources::open(&store, true), false), right);

    edit(&path, "eno");
    let wrong = blake3::hash(b"eno").to_hex().to_string();
    assert_eq!(digest(&mut Sources::open(&store, false), false), wrong);
    edit(&path, "one");
    remember(&mut sources);
    next_tick(&path);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    sources.look_again();
    assert_eq!(digest(&mut sources, false), right);
    // Changed a moment ago: it is not remembered, for it may be changed again within the same tick.
    assert_ne!(sources.known(&path)[&path].stat, stat(&path));
}

#[test]
fn a_pattern_counts_the_files_that_fit_and_which_there_are() {
    let toy = Toy::new(53);
    let (store, pattern) = (toy.store(), toy.path("data/*/x-?.txt"));
    for folder in ["data/one", "data/two/deep"] {
        fs::create_dir_all(toy.path(folder)).unwrap();
    }
    let digest = || Sources::open(&store, false).digest(&pattern, false);
    assert!(digest().unwrap_err().to_string().contains("no file fits"));
    toy.write("data/one/x-1.txt", "a");
    let (first, seen) = digest().unwrap();
    // What doesn't fit doesn't count.
    for other in [
        "data/one/y.txt",
        "data/x-1.txt",
        "data/two/deep/x-1.txt",
        "data/one/.x-2.txt",
    ] {
        toy.write(other, "b");
    }
    assert_eq!(digest().unwrap().0, first);
    assert_eq!(seen.changed(&pattern), None);
    toy.write("data/two/x-2.txt", "a");
    let (second, _) = digest().unwrap();
    assert_ne!(second, first, "another file fits");
    assert_eq!(seen.changed(&pattern), Some(toy.path("data/two/x-2.txt")));
    fs::rename(toy.path("data/two/x-2.txt"), toy.path("data/two/x-3.txt")).unwrap();
    assert_ne!(digest().unwrap().0, second, "names count");
    fs::remove_file(toy.path("data/two/x-3.txt")).unwrap();
    assert_eq!(digest().unwrap().0, first);
    edit(&toy.path("data/one/x-1.txt"), "c");
    assert_ne!(digest().unwrap().0, first, "contents count");
    let names: Vec<_> = super::super::sources::files_at(&pattern).unwrap();
    assert_eq!(
        names,
        [("one/x-1.txt".to_owned(), toy.path("data/one/x-1.txt"))]
    );
}

#[test]
fn force_and_verify_read_local_files() {
    let toy = Toy::new(52);
    let first = toy.run();
    let trick = || {
        let mut sources = Sources::open(&toy.store(), false);
        sources.pretend(&toy.path("a"), "remembered");
        sources.save().unwrap();
    };
    trick();
    let (graph, store, shared) = (toy.graph("+", ""), toy.store(), Shared::none());
    let pins = |verify| {
        let mut session = Toy::session(&graph, &store, &shared, &[]);
        session.verify = verify;
        session.pin(&|_| true).unwrap()["a"].files["a"].clone()
    };
    let right = blake3::hash(b"one").to_hex().to_string();
    assert_eq!(pins(false), right);
    let states = |forced: &[&str], verify| {
        let mut session = Toy::session(&graph, &store, &shared, forced);
        session.verify = verify;
        session.plan()
    };
    let stale = |state: &State| matches!(state, State::Runs { .. });
    assert!(stale(&states(&[], false)[2]));
    assert!(!stale(&states(&[], true)[2]));
    let (summary, _) = toy.run_with("+", "", &["a"]);
    assert_eq!(summary.artifacts, first.artifacts);
}

#[test]
fn a_result_is_not_trusted_within_the_tick_of_its_own_record() {
    let toy = Toy::new(53);
    let summary = toy.run();
    let store = toy.store();
    for artifact in summary.artifacts.iter().flatten() {
        let manifest = store.manifest(artifact).unwrap();
        let now = super::super::files::clock(&toy.path("store")).unwrap();
        assert!(manifest.newest() < now);
        // Both kinds of change show, with the old times put back.
        let folder = store.artifact(artifact);
        assert_eq!(manifest.check(&folder, false), Check::Sound);
        let before = fs::metadata(&folder).unwrap().modified().unwrap();
        fs::write(folder.join("extra"), "").unwrap();
        fs::File::open(&folder)
            .unwrap()
            .set_modified(before)
            .unwrap();
        assert!(matches!(manifest.check(&folder, false), Check::Damaged(_)));
        fs::remove_file(folder.join("extra")).unwrap();
        // New times of the same bytes are remembered only when no later change can have them.
        assert_eq!(manifest.check(&folder, false), Check::Sound);
    }
}

#[test]
fn manifests_and_memos_of_before_are_read_once_and_mean_the_same() {
    let toy = Toy::new(54);
    let summary = toy.run();
    let store = toy.store();
    let artifact = summary.artifacts[2].as_ref().unwrap();
    let path = store.artifact(&format!("{artifact}.json"));
    let mut old: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let files = old["files"].as_object_mut().unwrap();
    for file in files.values_mut() {
        assert!(file.as_object_mut().unwrap().remove("changed").is_some());
    }
    let folders = old.as_object_mut().unwrap().remove("folders_changed");
    old["folders"] = folders.unwrap();
    fs::write(&path, old.to_string()).unwrap();
    assert_eq!(ran(&toy.run()), (0, 4));
    let text = store.artifact(artifact).join("text");
    fs::set_permissions(&text, fs::Permissions::from_mode(0o644)).unwrap();
    edit(&text, "onf");
    assert_eq!(ran(&toy.run()), (1, 3));
    assert_eq!(toy.text(artifact), "one");
}

/// Links a file of somebody else's into its result.
#[derive(Serialize, Deserialize, JsonSchema)]
pub(super) struct Links {
    theirs: Neutral<PathBuf>,
}

impl Stage for Links {
    const KIND: &'static str = "links";
    const VERSION: u32 = 1;
    type Output = Text;

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        fs::hard_link(&*self.theirs, cx.out().join("text"))?;
        Ok(())
    }
}

#[test]
fn a_file_of_somebody_else_keeps_its_mode_and_is_watched() {
    let toy = Toy::new(55);
    let theirs = toy.path("theirs");
    toy.write("theirs", "large");
    fs::set_permissions(&theirs, fs::Permissions::from_mode(0o664)).unwrap();
    let look = || {
        let found = fs::metadata(&theirs).unwrap();
        (
            found.mode(),
            found.mtime_nsec(),
            found.mtime(),
            found.uid(),
            found.gid(),
        )
    };
    let before = look();
    let links = |then| Node {
        name: "links".into(),
        stage: Arc::new(Links {
            theirs: Neutral(then),
        }),
        sources: [].into(),
        handling: Handling::default(),
    };
    let go = || run_nodes(&toy, vec![links(theirs.clone())]);
    let (first, _) = go();
    let artifact = first.artifacts[0].clone().unwrap();
    assert_eq!(fs::metadata(&theirs).unwrap().nlink(), 2);
    assert_eq!(ran(&go().0), (0, 1));
    let verify = |thorough| {
        toy.store()
            .manifest(&artifact)
            .unwrap()
            .check(&toy.store().artifact(&artifact), thorough)
    };
    assert_eq!((verify(false), verify(true)), (Check::Sound, Check::Sound));
    assert_eq!(look(), before);
    // Another name for it changes its times, not its bytes.
    fs::hard_link(&theirs, toy.path("more")).unwrap();
    assert_eq!(ran(&go().0), (0, 1));
    // An edit in place damages the result, which is made again of what is there now.
    edit(&theirs, "LARGE");
    assert_eq!(ran(&go().0), (1, 0));
    assert_eq!(fs::read_to_string(&theirs).unwrap(), "LARGE");
    assert_eq!(look(), before);
    toy.store()
        .collect(&gc::Needs::default(), gc::Limits::default(), true)
        .unwrap();
    assert!(!toy.store().artifact(&artifact).exists());
    assert_eq!(
        (look(), fs::read_to_string(&theirs).unwrap().as_str()),
        (before, "LARGE")
    );
}

/// What was looked at holds until a stage ends.
#[test]
fn a_file_that_a_stage_changes_is_looked_at_again_after_it() {
    let toy = Toy::new(17);
    let nodes = |then: Then| {
        let last = Watched {
            file: SourcePath::new("b"),
            after: Some(Input::new("a")),
            then: Neutral(Then::Nothing),
            counter: Neutral(toy.counter),
        };
        let last = Node {
            name: "last".to_owned(),
            stage: Arc::new(last),
            ..node(&toy, "b", Then::Nothing)
        };
        vec![node(&toy, "b", Then::Nothing), node(&toy, "a", then), last]
    };
    let (first, _) = run_nodes(&toy, nodes(Then::Nothing));
    assert_eq!(ran(&first), (3, 0));
    let graph = Graph::new(nodes(Then::Edit(toy.path("b")))).unwrap();
    let (store, shared, (events, _received)) = (toy.store(), Shared::none(), channel());
    let session = Toy::session(&graph, &store, &shared, &["a"]);
    let options = Options::for_test(1);
    let second = run(&session, &[], &options, &events, &Arc::default()).unwrap();
    assert_eq!(ran(&second), (2, 1));
    assert_eq!(toy.text(second.artifacts[2].as_ref().unwrap()), "xyz");
}
