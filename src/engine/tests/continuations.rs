//! Stages that go on where one of their family ended.

use super::*;

/// Writes the numbers up to `to`, and counts those it had to make itself.
#[derive(Serialize, Deserialize, JsonSchema)]
pub(super) struct Count {
    to: u64,
    unit: String,
    #[serde(default)]
    counter: Neutral<usize>,
}

impl Stage for Count {
    const KIND: &'static str = "count";
    const VERSION: u32 = 1;
    const LENGTH_PARAMETERS: &'static [&'static str] = &["to"];
    type Output = Text;

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        let continuations = cx.continuations()?;
        assert!(continuations.len() <= 1, "only the last end is kept");
        let read = |end: &PathBuf| std::fs::read_to_string(end.join("text"));
        let mut text = continuations
            .first()
            .map(read)
            .transpose()?
            .unwrap_or_default();
        if text.lines().count() as u64 > self.to {
            text.clear();
        }
        for number in text.lines().count() as u64..self.to {
            RUNS[*self.counter].fetch_add(1, Ordering::SeqCst);
            text += &[number.to_string().as_str(), " ", &self.unit, "\n"].concat();
        }
        if self.unit == "fails" {
            std::fs::write(cx.continuation()?.join("text"), &text)?;
            anyhow::bail!("told to fail");
        }
        std::fs::write(cx.out().join("text"), &text)?;
        std::fs::write(cx.continuation()?.join("text"), &text)?;
        Ok(())
    }
}

/// Counts, and gives the result's digest and how many numbers were made.
fn count(toy: &Toy, to: u64, unit: &str, forced: &[&str]) -> (Option<Digest>, usize) {
    let stage = Count {
        to,
        unit: unit.to_owned(),
        counter: Neutral(toy.counter),
    };
    let node = Node {
        name: "count".to_owned(),
        stage: Arc::new(stage),
        sources: [].into(),
        handling: Handling::default(),
    };
    let (graph, store) = (Graph::new(vec![node]).unwrap(), toy.store());
    let shared = Shared::none();
    let session = Toy::session(&graph, &store, &shared, forced);
    let before = RUNS[toy.counter].load(Ordering::SeqCst);
    let (events, _received) = channel();
    let cancel = Arc::new(AtomicBool::new(false));
    run(&session, &[], &Options::for_test(1), &events, &cancel).unwrap();
    let made = RUNS[toy.counter].load(Ordering::SeqCst) - before;
    let artifact = match Toy::session(&graph, &store, &shared, &[]).plan().pop() {
        Some(State::Fresh { artifact, .. }) => Some(artifact),
        _ => None,
    };
    (artifact, made)
}

#[test]
fn a_stage_that_goes_further_finds_where_its_family_ended() {
    let toy = Toy::new(14);
    assert_eq!(count(&toy, 3, "apples", &[]).1, 3);
    let (further, made) = count(&toy, 5, "apples", &[]);
    assert_eq!(made, 2);
    // Another unit is another family; less is made anew; the last end is the one that is kept.
    assert_eq!(count(&toy, 4, "pears", &[]).1, 4);
    assert_eq!(count(&toy, 2, "apples", &[]).1, 2);
    assert_eq!(count(&toy, 6, "apples", &[]).1, 4);
    // Who forces a stage gets it from the beginning, to the same bytes.
    assert_eq!(count(&toy, 5, "apples", &["count"]), (further.clone(), 5));
    let alone = Toy::new(14);
    assert_eq!(count(&alone, 5, "apples", &[]).0, further);
}

#[test]
fn a_failed_stage_leaves_no_end() {
    let toy = Toy::new(15);
    assert_eq!(count(&toy, 3, "fails", &[]), (None, 3));
    assert_eq!(count(&toy, 4, "fails", &[]), (None, 4));
    assert!(!toy.path("store/v1/ends").exists());
}

#[test]
fn an_end_goes_with_its_result() {
    let toy = Toy::new(16);
    let (apples, _) = count(&toy, 3, "apples", &[]);
    count(&toy, 3, "pears", &[]);
    let continuations = |toy: &Toy| toy.store().names("ends").len();
    assert_eq!(continuations(&toy), 2);
    let needed = gc::Needs {
        results: apples.into_iter().collect(),
        ..gc::Needs::default()
    };
    let collect = |remove_it| {
        let garbage = toy
            .store()
            .collect(&needed, gc::Limits::default(), remove_it);
        let garbage = garbage.unwrap().into_iter();
        let continuations = garbage.filter(|garbage| garbage.what == "end state");
        continuations
            .map(|garbage| (garbage.stage, garbage.size))
            .collect::<Vec<_>>()
    };
    let pears = vec![(Some("count".to_owned()), 24)];
    assert_eq!(collect(false), pears);
    assert_eq!(continuations(&toy), 2);
    assert_eq!(collect(true), pears);
    assert_eq!(collect(true), []);
    assert_eq!(continuations(&toy), 1);
    assert_eq!(count(&toy, 4, "apples", &[]).1, 1);
    assert_eq!(count(&toy, 4, "pears", &[]).1, 4);
}
