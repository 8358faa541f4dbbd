//! Stores and a remote in memory that fails on command.

mod arrivals;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use anyhow::bail;
use serde_json::json;

use super::super::manifest::Manifest;
use super::super::record::FORMAT;
use super::super::{Event, Fingerprint, Found, Record, Store};
use super::{Object, Remote, Settings, Shared};

#[derive(Default)]
struct Memory {
    objects: Mutex<BTreeMap<String, Vec<u8>>>,
    /// What was read and written, with offsets.
    reads: Mutex<Vec<(String, u64)>>,
    writes: Mutex<Vec<String>>,
    calls: AtomicUsize,
    dead: AtomicBool,
    sealed: AtomicBool,
    /// A blob breaks off after so many bytes; 0 for never.
    breaks: AtomicU64,
    /// `create` writes, and then fails.
    loses_answers: AtomicBool,
}

impl Memory {
    fn called(&self) -> anyhow::Result<()> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        if self.dead.load(Ordering::SeqCst) {
            bail!("nobody is there");
        }
        Ok(())
    }

    fn keys(&self, part: &str) -> Vec<String> {
        let objects = self.objects.lock().unwrap();
        objects
            .keys()
            .filter(|key| key.contains(part))
            .cloned()
            .collect()
    }

    fn change(&self, key: &str, change: impl FnOnce(&mut Vec<u8>)) {
        change(self.objects.lock().unwrap().get_mut(key).unwrap());
    }

    fn blob_reads(&self) -> Vec<(String, u64)> {
        let mut reads = std::mem::take(&mut *self.reads.lock().unwrap());
        reads.retain(|(key, _)| key.contains("/blobs/"));
        reads
    }

    fn blob_writes(&self) -> usize {
        let writes = std::mem::take(&mut *self.writes.lock().unwrap());
        writes.iter().filter(|key| key.contains("/blobs/")).count()
    }
}

impl Remote for Memory {
    fn address(&self) -> &'static str {
        "memory"
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read(
        &self,
        key: &str,
        from: u64,
        sink: &mut dyn FnMut(&[u8]) -> anyhow::Result<()>,
    ) -> anyhow::Result<bool> {
        self.called()?;
        self.reads.lock().unwrap().push((key.to_owned(), from));
        let Some(bytes) = self.objects.lock().unwrap().get(key).cloned() else {
            return Ok(false);
        };
        let rest = &bytes[from as usize..];
        let breaks = self.breaks.load(Ordering::SeqCst) as usize;
        if key.contains("/blobs/") && breaks > 0 && rest.len() > breaks {
            sink(&rest[..breaks])?;
            bail!("the line broke");
        }
        for piece in rest.chunks(7) {
            sink(piece)?;
        }
        Ok(true)
    }

    fn size(&self, key: &str) -> anyhow::Result<Option<u64>> {
        self.called()?;
        let objects = self.objects.lock().unwrap();
        Ok(objects.get(key).map(|bytes| bytes.len() as u64))
    }

    fn write(&self, key: &str, size: u64, source: &mut dyn Read) -> anyhow::Result<()> {
        self.called()?;
        if self.sealed.load(Ordering::SeqCst) {
            bail!("access denied");
        }
        let mut bytes = Vec::new();
        source.read_to_end(&mut bytes)?;
        assert_eq!(bytes.len() as u64, size);
        self.writes.lock().unwrap().push(key.to_owned());
        self.objects.lock().unwrap().insert(key.to_owned(), bytes);
        Ok(())
    }

    fn create(&self, key: &str, bytes: Vec<u8>) -> anyhow::Result<bool> {
        self.called()?;
        if self.sealed.load(Ordering::SeqCst) {
            bail!("access denied");
        }
        let mut objects = self.objects.lock().unwrap();
        if objects.contains_key(key) {
            return Ok(false);
        }
        objects.insert(key.to_owned(), bytes);
        if self.loses_answers.load(Ordering::SeqCst) {
            bail!("the answer got lost");
        }
        Ok(true)
    }

    fn list(&self, prefix: &str) -> anyhow::Result<Vec<Object>> {
        self.called()?;
        let objects = self.objects.lock().unwrap();
        let under = objects.iter().filter(|(key, _)| key.starts_with(prefix));
        let object = |(key, bytes): (&String, &Vec<u8>)| Object {
            key: key.clone(),
            size: bytes.len() as u64,
            // Old enough for everything.
            modified: SystemTime::UNIX_EPOCH,
        };
        Ok(under.map(object).collect())
    }

    fn delete(&self, keys: &[String]) -> anyhow::Result<()> {
        self.called()?;
        let mut objects = self.objects.lock().unwrap();
        for key in keys {
            objects.remove(key);
        }
        Ok(())
    }
}

/// A machine: a store, and its side of the remote.
struct Machine {
    folder: tempfile::TempDir,
    store: Store,
    shared: Shared,
    events: Sender<Event>,
    received: Receiver<Event>,
}

impl Machine {
    fn new(remote: &Arc<Memory>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (events, received) = channel();
        let settings = Settings {
            pull: true,
            push: true,
            required: false,
        };
        Self {
            store: Store::new(&folder.path().join("store")),
            folder,
            shared: Shared::new(Arc::clone(remote) as Arc<dyn Remote>, settings),
            events,
            received,
        }
    }

    /// A result with these files; the digest of its fingerprint.
    fn make(&self, name: &str, files: &[(&str, &str)]) -> String {
        let fingerprint = Fingerprint {
            kind: "toy".into(),
            version: 1,
            params: json!({ "name": name }),
            outside: BTreeMap::new(),
        };
        let digest = fingerprint.digest();
        let miss = self
            .store
            .lock(&digest, &AtomicBool::new(false), &mut |_| {})
            .unwrap();
        let partial = miss.partial().unwrap();
        for (file, text) in files {
            let path = partial.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let record = Record {
            format: FORMAT,
            stage: name.into(),
            fingerprint,
            origins: BTreeMap::new(),
            output: "text".into(),
            artifact: String::new(),
            notes: BTreeMap::new(),
            params: json!({}),
            started: 1,
            seconds: 2.0,
            pipeline: "0".into(),
        };
        miss.commit(
            record,
            &BTreeMap::new(),
            &AtomicBool::new(false),
            &mut |_| {},
        )
        .unwrap();
        digest
    }

    fn push(&self, fingerprint: &str) -> super::Sent {
        let cancel = AtomicBool::new(false);
        let pushed = self.shared.push(&self.store, fingerprint, true, &cancel);
        pushed.unwrap().unwrap().1
    }

    fn pull(&self, fingerprint: &str) -> Option<Record> {
        self.try_to_pull(fingerprint).unwrap()
    }

    fn try_to_pull(&self, fingerprint: &str) -> anyhow::Result<Option<Record>> {
        let cancel = AtomicBool::new(false);
        self.shared
            .restore(&self.store, fingerprint, ("stage", &self.events), &cancel)
    }

    fn fetched(&self) -> Vec<(usize, u64)> {
        let fetched = |event| match event {
            Event::StageFetched { files, bytes, .. } => Some((files, bytes)),
            _ => None,
        };
        self.received.try_iter().filter_map(fetched).collect()
    }

    fn folder_of(&self, fingerprint: &str) -> PathBuf {
        self.store
            .artifact(&self.store.record(fingerprint).unwrap().artifact)
    }
}

fn texts(folder: &Path) -> BTreeMap<String, String> {
    let manifest = Manifest::read(folder).unwrap();
    let text = |name: String| {
        let text = fs::read_to_string(folder.join(&name)).unwrap();
        (name, text)
    };
    manifest.files.into_keys().map(text).collect()
}

const FILES: [(&str, &str); 3] = [
    ("config.json", "{}"),
    ("deep/empty", ""),
    ("model-1", "the first shard, which is long enough to break"),
];

#[test]
fn a_result_travels_whole_and_once() {
    let remote = Arc::new(Memory::default());
    let (here, there) = (Machine::new(&remote), Machine::new(&remote));
    let made = here.make("a", &FILES);
    let sent = here.push(&made);
    assert_eq!((sent.files, sent.record), (3, true));
    assert_eq!(here.push(&made), super::Sent::default());

    let record = there.pull(&made).unwrap();
    assert_eq!(record.stage, "a");
    assert_eq!(there.fetched(), [(3, 48)]);
    assert_eq!(
        texts(&there.folder_of(&made)),
        texts(&here.folder_of(&made))
    );
    assert!(matches!(there.store.find(&made, true), Ok(Found::Hit(..))));
    assert!(there.store.names("incoming").is_empty());
    assert!(remote.keys("v1/").iter().all(|key| !key.contains("toy")));
}

#[test]
fn unchanged_files_do_not_travel_again() {
    let remote = Arc::new(Memory::default());
    let (here, there) = (Machine::new(&remote), Machine::new(&remote));
    let first = here.make("a", &FILES);
    here.push(&first);
    there.pull(&first).unwrap();
    let second = here.make(
        "b",
        &[FILES[0], FILES[2], ("model-2", "new"), ("copy-of-2", "new")],
    );
    remote.blob_writes();
    assert_eq!(here.push(&second).files, 1);
    assert_eq!(remote.blob_writes(), 1);
    remote.blob_reads();
    there.pull(&second).unwrap();
    assert_eq!(remote.blob_reads().len(), 1);
    assert_eq!(texts(&there.folder_of(&second)).len(), 4);
    assert!(matches!(
        there.store.find(&second, true),
        Ok(Found::Hit(..))
    ));
}

#[test]
fn a_transfer_that_breaks_goes_on_where_it_was() {
    let remote = Arc::new(Memory::default());
    let (here, there) = (Machine::new(&remote), Machine::new(&remote));
    let made = here.make("a", &FILES);
    here.push(&made);
    remote.breaks.store(20, Ordering::SeqCst);
    there.pull(&made).unwrap();
    let offsets: BTreeSet<u64> = remote
        .blob_reads()
        .into_iter()
        .map(|(_, from)| from)
        .collect();
    assert_eq!(offsets, [0, 20, 40].into());

    // The rest of an earlier attempt at a file that is not small, right or wrong.
    let text = FILES[2].1.repeat(10_000);
    let made = here.make("b", &[("model-2", &text)]);
    here.push(&made);
    remote.breaks.store(150_000, Ordering::SeqCst);
    remote.blob_reads();
    there.pull(&made).unwrap();
    let offsets: Vec<u64> = remote.blob_reads().iter().map(|(_, from)| *from).collect();
    assert_eq!(offsets, [0, 150_000, 300_000, 450_000]);
    remote.breaks.store(0, Ordering::SeqCst);
    let content = there.store.record(&made).unwrap().artifact;
    let blob = blake3::hash(text.as_bytes()).to_hex().to_string();
    for rest in [&text[..9], "something else", &text.repeat(3)] {
        remote.blob_reads();
        let machine = Machine::new(&remote);
        let incoming = machine.store.folder("incoming").join(&content);
        fs::create_dir_all(&incoming).unwrap();
        fs::write(incoming.join(format!("{blob}.part")), rest).unwrap();
        machine.pull(&made).unwrap();
        let from = if rest.len() < text.len() {
            rest.len() as u64
        } else {
            0
        };
        assert_eq!(remote.blob_reads()[0].1, from);
        assert!(matches!(
            machine.store.find(&made, true),
            Ok(Found::Hit(..))
        ));
    }
}

#[test]
fn what_is_damaged_is_told_and_counts_as_absent() {
    let remote = Arc::new(Memory::default());
    let here = Machine::new(&remote);
    let made = here.make("a", &FILES);
    here.push(&made);
    let long = blake3::hash(FILES[2].1.as_bytes()).to_hex().to_string();
    let blob = remote.keys(&long)[0].clone();
    let (manifest, record) = (
        remote.keys("manifests")[0].clone(),
        remote.keys("records")[0].clone(),
    );
    let flip = |bytes: &mut Vec<u8>| bytes[5] ^= 1;
    let cut = |bytes: &mut Vec<u8>| bytes.truncate(9);
    let grow = |bytes: &mut Vec<u8>| bytes.extend([b'x'; 4096]);
    let changes: [fn(&mut Vec<u8>); 3] = [flip, cut, grow];
    for key in [&blob, &manifest, &record] {
        for change in changes {
            remote.change(key, change);
            let there = Machine::new(&remote);
            assert!(there.pull(&made).is_none(), "{key}");
            let told = there.shared.take_warnings();
            assert_eq!(told.len(), 1, "{told:?}");
            assert!(told[0].contains("damaged"), "{told:?}");
            assert!(there.pull(&made).is_none());
            let (damage, ..) = there.shared.verify().unwrap();
            assert!(!damage.is_empty());

            // It makes the result itself, and what it sends heals the remote.
            assert_eq!(there.make("a", &FILES), made);
            there.push(&made);
            assert_eq!(there.shared.verify().unwrap().0, [], "{key}");
            assert!(Machine::new(&remote).pull(&made).is_some());
        }
    }
    remote.delete(&[blob]).unwrap();
    assert!(Machine::new(&remote).pull(&made).is_none());
}

#[test]
fn a_dead_remote_is_told_once_and_asked_once() {
    let remote = Arc::new(Memory::default());
    remote.dead.store(true, Ordering::SeqCst);
    let here = Machine::new(&remote);
    assert!(here.pull("a").is_none() && here.pull("b").is_none());
    assert_eq!(remote.calls.load(Ordering::SeqCst), 1);
    let told = here.shared.take_warnings();
    assert_eq!(
        told,
        ["the remote `memory` can't be used: nobody is there; going on without it"]
    );
    here.shared.check().unwrap();
}

#[test]
fn what_cannot_be_looked_at_is_an_error_and_not_absent() {
    let remote = Arc::new(Memory::default());
    let here = Machine::new(&remote);
    let made = here.make("a", &FILES);
    let record = here.store.record(&made).unwrap();
    assert!(!here.store.is_remote_only(&made).unwrap() && !here.store.has_remote_only().unwrap());
    here.store.note_remote_only(&made, &record).unwrap();
    assert!(here.store.is_remote_only(&made).unwrap() && here.store.has_remote_only().unwrap());
    let offered = |record| here.shared.offer(&here.store, &made, record);
    assert!(offered(Some(&record)).unwrap().is_some());
    // A way that leads to itself can't be followed, whoever looks.
    let unreadable = |folder: &str| {
        let folder = here.store.folder(folder);
        fs::remove_dir_all(&folder).unwrap();
        std::os::unix::fs::symlink(&folder, &folder).unwrap();
    };
    unreadable("left");
    for error in [
        here.store.is_remote_only(&made).unwrap_err(),
        here.store.has_remote_only().unwrap_err(),
        here.store.note_remote_only(&made, &record).unwrap_err(),
        offered(Some(&record)).unwrap_err(),
        here.try_to_pull(&made).unwrap_err(),
    ] {
        let text = format!("{error:#}");
        assert!(text.contains("left"), "{text}");
    }
    assert_eq!(remote.calls.load(Ordering::SeqCst), 0, "nobody was asked");
    assert_eq!(here.store.fingerprints().unwrap(), [made]);
    unreadable("records");
    here.store.fingerprints().unwrap_err();
}

#[test]
fn results_that_could_not_be_sent_are_sent_by_the_next_run() {
    let remote = Arc::new(Memory::default());
    let here = Machine::new(&remote);
    let cancel = AtomicBool::new(false);
    let run = |shared: &Shared, made: Option<&str>| {
        let (open, queued) = shared.open(&here.store, &here.events);
        if let Some(made) = made {
            shared.made(&here.store, made);
        }
        open.close();
        shared.send_all(&here.store, &queued, &here.events, &cancel);
    };
    let made = [here.make("a", &FILES), here.make("b", &FILES)];
    remote.sealed.store(true, Ordering::SeqCst);
    run(&here.shared, Some(&made[0]));
    let warnings = here.received.try_iter();
    let warnings = warnings.filter(|event| matches!(event, Event::Warning { .. }));
    assert_eq!(warnings.count(), 1);
    assert!(remote.keys("records").is_empty());

    remote.sealed.store(false, Ordering::SeqCst);
    let next = Machine::new(&remote).shared;
    run(&next, Some(&made[1]));
    assert_eq!(remote.keys("records").len(), 2);
    let calls = remote.calls.load(Ordering::SeqCst);
    run(&Machine::new(&remote).shared, None);
    assert_eq!(
        calls,
        remote.calls.load(Ordering::SeqCst),
        "nothing is left"
    );
}

#[test]
fn whoever_publishes_first_stays() {
    let remote = Arc::new(Memory::default());
    let (here, there) = (Machine::new(&remote), Machine::new(&remote));
    let made = here.make("a", &FILES);
    assert_eq!(there.make("a", &[("config.json", "other")]), made);
    remote.loses_answers.store(true, Ordering::SeqCst);
    assert!(
        !here.push(&made).record,
        "it was there when it was asked for"
    );
    remote.loses_answers.store(false, Ordering::SeqCst);
    assert!(!there.push(&made).record);
    let told = there.shared.take_warnings();
    assert!(told[0].contains("made other bytes"), "{told:?}");
    let third = Machine::new(&remote);
    assert_eq!(
        third.pull(&made).unwrap().artifact,
        here.store.record(&made).unwrap().artifact
    );
}

#[test]
fn a_result_altered_here_is_never_sent() {
    use std::os::unix::fs::PermissionsExt as _;
    let remote = Arc::new(Memory::default());
    let here = Machine::new(&remote);
    let made = here.make("a", &FILES);
    let file = here.folder_of(&made).join("model-1");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    let text = FILES[2].1.replace("first", "worst");
    fs::write(&file, text).unwrap();
    let cancel = AtomicBool::new(false);
    let sent = here.shared.push(&here.store, &made, true, &cancel);
    assert!(matches!(sent, Ok(None)), "{sent:?}");
    // Even where nothing tells, as when a disk loses a bit.
    let content = here.store.record(&made).unwrap().artifact;
    let mut manifest = here.store.manifest(&content).unwrap();
    let entry = manifest.files.get_mut("model-1").unwrap();
    entry.stat = super::super::stat::Stat::from_metadata(&fs::metadata(&file).unwrap());
    here.store.write_manifest(&content, &manifest).unwrap();
    let cancel = AtomicBool::new(false);
    let error = here
        .shared
        .push(&here.store, &made, true, &cancel)
        .unwrap_err();
    assert!(
        format!("{error:#}").contains("was changed since"),
        "{error:#}"
    );
    assert!(remote.keys("records").is_empty());
    assert_eq!(here.shared.verify().unwrap().0, []);
}

#[test]
fn old_results_and_loose_files_go() {
    let remote = Arc::new(Memory::default());
    let here = Machine::new(&remote);
    let (old, new) = (
        here.make("a", &FILES),
        here.make("b", &[FILES[0], ("x", "y")]),
    );
    here.push(&old);
    here.push(&new);
    let keep = BTreeSet::from([new.clone()]);
    let day = Duration::from_hours(24);
    let would = here.shared.collect(&keep, day, false).unwrap();
    let mut what: Vec<_> = would.iter().map(|waste| waste.what).collect();
    what.sort_unstable();
    assert_eq!(what, ["file", "file", "manifest", "record"]);
    assert_eq!(here.shared.list().unwrap().len(), 2);

    here.shared.collect(&keep, day, true).unwrap();
    assert_eq!(here.shared.verify().unwrap().0, []);
    let there = Machine::new(&remote);
    assert!(there.pull(&old).is_none() && there.pull(&new).is_some());
    let listed = there.shared.list().unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].stage.as_str(), listed[0].bytes), ("b", Some(3)));
}
