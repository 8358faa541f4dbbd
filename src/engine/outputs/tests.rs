//! Places, and everything that people and kills do to them.

use std::panic::{AssertUnwindSafe, catch_unwind};

use serde_json::json;

use super::super::record::FORMAT;
use super::super::{Fingerprint, Record};
use super::*;

/// A store, and a folder for outputs.
struct Toy {
    folder: tempfile::TempDir,
    store: Store,
}

static NEVER: AtomicBool = AtomicBool::new(false);

type Swap<'a> = &'a dyn Fn(&Path, &Path) -> io::Result<()>;

impl Toy {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self {
            store: Store::new(&folder.path().join("store")),
            folder,
        }
    }

    /// An artifact with a text and, if it has a size, a large file.
    fn make(&self, text: &str, large: u64) -> Digest {
        let fingerprint = Fingerprint {
            kind: "toy".into(),
            version: 1,
            params: json!({ "text": text, "large": large }),
            outside: [].into(),
        };
        let miss = self
            .store
            .lock(&fingerprint.digest(), &NEVER, &mut |_| {})
            .unwrap();
        let partial = miss.partial().unwrap();
        fs::create_dir(partial.join("below")).unwrap();
        fs::write(partial.join("below/text"), text).unwrap();
        if large > 0 {
            let file = File::create(partial.join("large")).unwrap();
            file.set_len(large).unwrap();
        }
        let record = Record {
            format: FORMAT,
            stage: "toy".into(),
            fingerprint,
            origins: [].into(),
            output: "text".into(),
            artifact: String::new(),
            notes: [].into(),
            params: json!({}),
            started: 1,
            seconds: 1.0,
            pipeline: "0".into(),
        };
        let made = miss.commit(record, &[].into(), &NEVER, &mut |_| {});
        made.unwrap().0.artifact
    }

    fn folder(&self) -> PathBuf {
        self.folder.path().join("out/result")
    }

    fn text(&self) -> String {
        fs::read_to_string(self.folder().join("below/text")).unwrap()
    }

    fn put(&self, artifact: &str) -> anyhow::Result<Published> {
        self.put_so(artifact, PublishOptions::default())
    }

    fn put_so(&self, artifact: &str, how: PublishOptions) -> anyhow::Result<Published> {
        publish(
            &self.store,
            artifact,
            &self.folder(),
            how,
            &NEVER,
            &mut |_| {},
        )
    }

    fn put_by(&self, artifact: &str, swap: Swap<'_>) -> anyhow::Result<Published> {
        let folder = self.folder();
        let target = Target::open(&self.store, &folder, &NEVER).unwrap();
        let lock = target.lock(&mut |_| {});
        target.put(artifact, PublishOptions::default(), lock, swap)
    }

    #[track_caller]
    fn refuses(&self, artifact: &str, word: &str) {
        let error = self.put(artifact).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
        assert!(error.contains("--overwrite-outputs"), "{error}");
    }

    /// The names beside the output folder.
    fn beside(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder().parent().unwrap()).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != "result")
            .collect();
        names.sort_unstable();
        names
    }
}

const OVERWRITE: PublishOptions = PublishOptions {
    overwrite: true,
    verify: false,
};
const VERIFY: PublishOptions = PublishOptions {
    overwrite: false,
    verify: true,
};

/// Changes a byte of a file and nothing that a look at the file without reading it tells, but its ctime.
fn rot(path: &Path) {
    let times = fs::FileTimes::new().set_modified(fs::metadata(path).unwrap().modified().unwrap());
    let mode = fs::metadata(path).unwrap().permissions();
    fs::set_permissions(path, Permissions::from_mode(0o644)).unwrap();
    let mut bytes = fs::read(path).unwrap();
    bytes[0] ^= 1;
    let file = File::options().write(true).open(path).unwrap();
    io::Write::write_all(&mut &file, &bytes).unwrap();
    file.set_times(times).unwrap();
    fs::set_permissions(path, mode).unwrap();
}

#[test]
fn results_are_published_once_and_never_over_other_files() {
    let toy = Toy::new();
    let (first, second) = (toy.make("one", 0), toy.make("two", 0));
    let changed = |artifact: &str| toy.put(artifact).unwrap().changed;
    assert!(changed(&first));
    assert!(!changed(&first));
    assert!(changed(&second));
    assert_eq!(toy.text(), "two");
    let mine = toy.folder().join("mine");
    fs::write(&mine, "keep").unwrap();
    toy.refuses(&first, "`mine` does not belong there");
    toy.refuses(&second, "did not put there");
    assert!(mine.exists());
    assert!(toy.put_so(&first, OVERWRITE).unwrap().changed);
    assert!(!mine.exists());
    assert_eq!(toy.beside(), [""; 0]);
    // A file, and an empty folder, which nobody misses.
    fs::remove_dir_all(toy.folder()).unwrap();
    fs::write(toy.folder(), "keep").unwrap();
    toy.refuses(&first, "is a file");
    fs::remove_file(toy.folder()).unwrap();
    fs::create_dir(toy.folder()).unwrap();
    assert!(changed(&first));
    assert_eq!(toy.beside(), [""; 0]);
}

#[test]
fn folders_of_others_beside_an_output_stay() {
    let toy = Toy::new();
    let out = toy.folder.path().join("out");
    let theirs = [".pipeline-mine", ".result.next", ".result.old"];
    for name in theirs {
        fs::create_dir_all(out.join(name)).unwrap();
        fs::write(out.join(name).join("keep.txt"), "keep").unwrap();
    }
    for text in ["one", "two", "three"] {
        toy.put(&toy.make(text, 0)).unwrap();
    }
    assert_eq!(toy.beside(), theirs);
    assert!(
        theirs
            .iter()
            .all(|name| out.join(name).join("keep.txt").exists())
    );
}

#[test]
fn what_people_edit_is_theirs_and_the_store_stays_sound() {
    let toy = Toy::new();
    let artifact = toy.make("one", LARGE + 1);
    let put = toy.put(&artifact).unwrap();
    let (text, large) = (toy.folder().join("below/text"), toy.folder().join("large"));
    let sound = || toy.store.is_sound(&artifact);
    let shared = put.links == 0;
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o222;
    assert_ne!(mode(&text), 0, "people may edit it");
    // Where blocks can't be shared, a large file is the store's own and read-only.
    assert_eq!(mode(&large) == 0, !shared);
    let kept = toy.store.artifact(&artifact).join("large");
    let inode = |path: &Path| fs::metadata(path).unwrap().ino();
    assert_eq!(inode(&large) == inode(&kept), !shared);
    // The store knows that its file has one more name: nothing has to be read again.
    let manifest = toy.store.manifest(&artifact).unwrap();
    let check = manifest.check(&toy.store.artifact(&artifact), false);
    assert_eq!(check, Check::Sound);

    fs::write(&text, "mine").unwrap();
    assert!(sound());
    toy.refuses(&artifact, "`below/text` was changed");
    toy.refuses(&toy.make("two", 0), "`below/text` was changed");
    assert_eq!(toy.text(), "mine");
    toy.put_so(&artifact, OVERWRITE).unwrap();
    assert_eq!(toy.text(), "one");

    // The same with its time taken back: told at the latest when everything is read.
    rot(&text);
    let error = toy.put_so(&artifact, VERIFY).unwrap_err().to_string();
    assert!(error.contains("was changed"), "{error}");
    assert_eq!(toy.text(), "nne");
}

#[test]
fn bytes_that_rot_in_the_store_and_its_links_are_restored() {
    let toy = Toy::new();
    let artifact = toy.make("one", LARGE + 1);
    if toy.put(&artifact).unwrap().links == 0 {
        eprintln!(
            "skipped: this file system shares blocks, so that outputs have none of the store's bytes"
        );
        return;
    }
    let large = toy.folder().join("large");
    rot(&large);
    // As a run with --verify does it: the damage is seen, and the result made again.
    assert_eq!(toy.make("one", LARGE + 1), artifact);
    assert!(toy.put_so(&artifact, VERIFY).unwrap().changed);
    assert_eq!(fs::read(&large).unwrap()[0], 0);
    assert!(!toy.put_so(&artifact, VERIFY).unwrap().changed);

    // Whoever writes into such a file leaves a time, and keeps what was written.
    fs::set_permissions(&large, Permissions::from_mode(0o644)).unwrap();
    let file = File::options().write(true).open(&large).unwrap();
    io::Write::write_all(&mut &file, b"mine").unwrap();
    let later =
        fs::metadata(&large).unwrap().modified().unwrap() + std::time::Duration::from_secs(5);
    file.set_modified(later).unwrap();
    assert_eq!(toy.make("one", LARGE + 1), artifact);
    toy.refuses(&artifact, "`large` was changed");
}

#[test]
fn a_link_in_the_way_is_somebody_elses() {
    let toy = Toy::new();
    let elsewhere = toy.folder.path().join("elsewhere");
    fs::create_dir_all(&elsewhere).unwrap();
    fs::create_dir_all(toy.folder().parent().unwrap()).unwrap();
    std::os::unix::fs::symlink(&elsewhere, toy.folder()).unwrap();
    let artifact = toy.make("one", 0);
    toy.refuses(&artifact, "is a link");
    assert!(toy.folder().is_symlink());
    // Replaced is the link, not what it leads to.
    toy.put_so(&artifact, OVERWRITE).unwrap();
    assert!(!toy.folder().is_symlink());
    assert!(is_empty_folder(&elsewhere));
    // And one that leads nowhere.
    fs::remove_dir_all(toy.folder()).unwrap();
    std::os::unix::fs::symlink("nowhere", toy.folder()).unwrap();
    toy.refuses(&artifact, "is a link");
}

#[test]
fn killed_at_any_moment_the_output_is_whole_and_the_next_run_clears_up() {
    let before: Swap<'_> = &|_, _| panic!("killed before");
    let after: Swap<'_> = &|one, other| {
        exchange(one, other)?;
        panic!("killed after");
    };
    let between: Swap<'_> = &|_, folder| {
        fs::rename(folder, folder.with_file_name("moved")).unwrap();
        panic!("killed between two renames");
    };
    for (swap, left) in [(before, "one"), (after, "two"), (between, "")] {
        let toy = Toy::new();
        let (first, second) = (toy.make("one", 0), toy.make("two", 0));
        toy.put(&first).unwrap();
        let killed = catch_unwind(AssertUnwindSafe(|| toy.put_by(&second, swap)));
        assert!(killed.is_err());
        if !left.is_empty() {
            assert_eq!(toy.text(), left);
        }
        assert!(!toy.beside().is_empty());
        // Whatever is wanted next.
        let wanted = if left == "two" { &first } else { &second };
        toy.put(wanted).unwrap();
        assert_eq!(toy.text(), if left == "two" { "one" } else { "two" });
        let moved = usize::from(left.is_empty());
        assert_eq!(toy.beside().len(), moved, "{:?}", toy.beside());
    }
}

#[test]
fn without_an_exchange_two_renames_do() {
    let toy = Toy::new();
    let unsupported: Swap<'_> = &|_, _| Err(ErrorKind::Unsupported.into());
    for text in ["one", "two", "three"] {
        assert!(toy.put_by(&toy.make(text, 0), unsupported).unwrap().changed);
        assert_eq!(toy.text(), text);
        assert_eq!(toy.beside(), [""; 0]);
    }
}

#[test]
fn what_comes_in_between_goes_back() {
    let slow: Swap<'_> = &|_, folder| {
        fs::write(folder.join("mine"), "keep").unwrap();
        Err(ErrorKind::Unsupported.into())
    };
    let quick: Swap<'_> = &|next, folder| {
        // Only before the first exchange.
        if folder.join("below").exists() && !next.join("mine").exists() {
            fs::write(folder.join("mine"), "keep").unwrap();
        }
        exchange(next, folder)
    };
    for swap in [slow, quick] {
        let toy = Toy::new();
        toy.put(&toy.make("one", 0)).unwrap();
        let error = toy.put_by(&toy.make("two", 0), swap).unwrap_err();
        assert!(error.to_string().contains("was changed while"), "{error}");
        assert_eq!(toy.text(), "one");
        assert!(toy.folder().join("mine").exists());
        assert_eq!(toy.beside(), [""; 0]);
    }
}

#[test]
fn an_output_is_never_missing_while_its_result_is_replaced() {
    let toy = Toy::new();
    let artifacts = [toy.make("one", 0), toy.make("two", 0)];
    toy.put(&artifacts[0]).unwrap();
    let unsupported = exchange(&toy.folder(), &toy.store.artifact(&artifacts[0]));
    if unsupported.is_err_and(|error| error.kind() == ErrorKind::Unsupported) {
        eprintln!("skipped: this file system can't exchange two names");
        return;
    }
    exchange(&toy.folder(), &toy.store.artifact(&artifacts[0])).unwrap();
    let done = AtomicBool::new(false);
    let text = toy.folder().join("below/text");
    std::thread::scope(|scope| {
        let missing = scope.spawn(|| {
            let mut missing = 0;
            while !done.load(Ordering::Relaxed) {
                missing += usize::from(fs::symlink_metadata(&text).is_err());
            }
            missing
        });
        for round in 1..40 {
            toy.put(&artifacts[round % 2]).unwrap();
        }
        done.store(true, Ordering::Relaxed);
        assert_eq!(missing.join().unwrap(), 0);
    });
}

#[test]
fn runs_with_one_output_wait_for_each_other_or_say_why_not() {
    let toy = Toy::new();
    let artifact = toy.make("one", 0);
    toy.put(&artifact).unwrap();
    let folder = toy.folder();
    let target = Target::open(&toy.store, &folder, &NEVER).unwrap();
    let path = target.path.with_extension("lock");
    let held = take_lock(&path, &NEVER, &mut |_| {}).unwrap();
    std::thread::scope(|scope| {
        let (told, waits) = std::sync::mpsc::channel();
        let second = toy.make("two", 0);
        let (toy, folder) = (&toy, &folder);
        let putting = scope.spawn(move || {
            let mut waiting = |_: &str| told.send(()).unwrap();
            publish(
                &toy.store,
                &second,
                folder,
                PublishOptions::default(),
                &NEVER,
                &mut waiting,
            )
        });
        waits.recv().unwrap();
        assert_eq!(toy.text(), "one");
        drop(held);
        assert!(putting.join().unwrap().unwrap().changed);
    });
    // No lock can be had: what is there stays good, and nothing is put there.
    let folder = path.parent().unwrap();
    fs::remove_dir_all(folder).unwrap();
    fs::write(folder, "").unwrap();
    let error = format!("{:#}", toy.put(&artifact).unwrap_err());
    assert!(error.contains("could not reserve"), "{error}");
    assert_eq!(toy.text(), "two");
    let second = toy.make("two", 0);
    assert!(!toy.put(&second).unwrap().changed);
}
