//! Bits that flip anywhere in a store: never a panic, never a wrong result.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, SystemTime};

use super::*;

/// A small generator of our own numbers (Marsaglia 2003, xorshift64).
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % end as u64) as usize
    }
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = super::super::manifest::walk(folder)
        .unwrap()
        .into_iter()
        .map(|(_, path)| path)
        .filter(|path| !path.components().any(|part| part.as_os_str() == "locks"))
        .collect();
    files.sort_unstable();
    files
}

/// Flips a bit, or cuts the file off there. `hidden` leaves the old times.
fn damage(path: &Path, dice: &mut Dice, hidden: bool) {
    let mut bytes = fs::read(path).unwrap();
    if bytes.is_empty() {
        return;
    }
    let metadata = fs::metadata(path).unwrap();
    let at = dice.below(bytes.len());
    if dice.below(20) == 0 && !hidden {
        bytes.truncate(at);
    } else {
        bytes[at] ^= 1 << dice.below(8);
    }
    fs::set_permissions(path, Permissions::from_mode(0o644)).unwrap();
    fs::write(path, bytes).unwrap();
    if hidden {
        let file = fs::File::options().write(true).open(path).unwrap();
        file.set_modified(metadata.modified().unwrap()).unwrap();
    }
    fs::set_permissions(path, metadata.permissions()).unwrap();
}

#[test]
fn ten_thousand_damaged_bits_make_no_wrong_result() {
    let toy = Toy::new(28);
    // Old enough to be remembered by its time.
    for name in ["a", "b"] {
        let file = fs::File::options()
            .write(true)
            .open(toy.path(name))
            .unwrap();
        let old = SystemTime::now() - Duration::from_mins(1);
        file.set_modified(old).unwrap();
    }
    let right = toy.run().artifacts;
    toy.run_with("-", "", &[]);
    let mut dice = Dice(88_172_645_463_325_252);
    let (mut flips, mut noticed) = (0, 0);
    while flips < 10_000 {
        let hidden = dice.below(2) == 0;
        let files = files(&toy.path("store"));
        for _ in 0..=dice.below(40) {
            damage(&files[dice.below(files.len())], &mut dice, hidden);
            flips += 1;
        }
        let (graph, store) = (toy.graph("+", ""), toy.store());
        let shared = remote::Shared::none();
        let mut session = Toy::session(&graph, &store, &shared, &[]);
        session.verify = hidden;
        session.plan();
        let runs = store.runs("toy");
        if let [first, .., last] = &runs[..] {
            store.compare(first, last);
        }
        let events = channel().0;
        let summary = run(
            &session,
            &[],
            &Options::for_test(2),
            &events,
            &Arc::default(),
        );
        let summary = summary.unwrap();
        assert_eq!((summary.failed, summary.skipped), (0, 0));
        assert_eq!(summary.artifacts, right);
        for (artifact, text) in summary
            .artifacts
            .iter()
            .flatten()
            .zip(["one+two", "one+two", "one", "two"])
        {
            assert_eq!(toy.text(artifact), text);
        }
        noticed += summary.ran;
    }
    assert!(noticed > 100, "{noticed} stages ran again");
}
