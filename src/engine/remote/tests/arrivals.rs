//! Results of very many files, and manifests that somebody made up.

use super::*;

#[test]
fn very_many_files_arrive_and_an_interruption_loses_none() {
    let remote = Arc::new(Memory::default());
    let here = Machine::new(&remote);
    // Some with the same contents, some in folders.
    let files: Vec<(String, String)> = (0..600)
        .map(|n| (format!("part-{}/{n}", n % 7), format!("text {}", n / 2)))
        .collect();
    let files: Vec<(&str, &str)> = files
        .iter()
        .map(|(a, b)| (a.as_str(), b.as_str()))
        .collect();
    let made = here.make("a", &files);
    here.push(&made);
    let there = Machine::new(&remote);
    there.pull(&made).unwrap();
    assert_eq!(remote.blob_reads().len(), 300);
    assert_eq!(
        texts(&there.folder_of(&made)),
        texts(&here.folder_of(&made))
    );
    assert!(there.store.names("incoming").is_empty());

    // Killed while the files got their names: none is fetched again.
    let (content, again) = (
        there.store.record(&made).unwrap().artifact,
        Machine::new(&remote),
    );
    let incoming = again.store.folder("incoming").join(&content).join("files");
    fs::create_dir_all(incoming.parent().unwrap()).unwrap();
    let copied = std::process::Command::new("cp")
        .arg("-r")
        .args([there.folder_of(&made), incoming.clone()])
        .status();
    assert!(copied.unwrap().success());
    fs::remove_dir_all(incoming.join("part-0")).unwrap();
    again.pull(&made).unwrap();
    let fetched = remote.blob_reads().len();
    assert!(fetched <= 86, "{fetched}");
    assert!(matches!(again.store.find(&made, true), Ok(Found::Hit(..))));
    assert_eq!(
        texts(&again.folder_of(&made)),
        texts(&here.folder_of(&made))
    );
}

#[test]
fn names_that_lead_outside_are_refused() {
    let remote = Arc::new(Memory::default());
    let here = Machine::new(&remote);
    let made = here.make("a", &FILES);
    here.push(&made);
    let record = remote.keys("records")[0].clone();
    let original = remote.objects.lock().unwrap()[&record].clone();
    let artifact = here.store.record(&made).unwrap().artifact;
    let text = String::from_utf8(original).unwrap();
    let blob = blake3::hash(b"{}").to_hex().to_string();
    let wrong_files = |files: &[(&str, u64)]| {
        let list: Vec<_> = files
            .iter()
            .map(|(name, size)| json!([name, size, blob]))
            .collect();
        let content = crate::engine::digest_json(&json!(list));
        let entry = |(name, size): &(&str, u64)| {
            let entry = json!({ "blake3": blob, "size": size });
            ((*name).to_owned(), entry)
        };
        let entries: BTreeMap<_, _> = files.iter().map(entry).collect();
        let manifest = json!({ "files": entries });
        let key = super::super::layout::manifest_key(&content);
        let mut objects = remote.objects.lock().unwrap();
        objects.insert(key, manifest.to_string().into_bytes());
        content
    };
    let wrong = |name: &str| wrong_files(&[(name, 2)]);
    let fine = wrong("config.json");
    for content in [
        wrong("../escaped"),
        wrong("/tmp/escaped"),
        wrong(&"x".repeat(300)),
        // A file that would have to be a folder as well.
        wrong_files(&[("a", 2), ("a/b", 2)]),
        // Sizes that can't be added up, or that no disk has.
        wrong_files(&[("a", u64::MAX), ("b", u64::MAX)]),
        wrong_files(&[("a", u64::MAX)]),
        wrong_files(&[("a", 2), ("b", 1 << 61)]),
        // And one that the object does not have.
        wrong_files(&[("a", 1 << 40)]),
        "../../escaped".to_owned(),
        fine.clone(),
    ] {
        let changed = text.replace(&artifact, &content).into_bytes();
        remote
            .objects
            .lock()
            .unwrap()
            .insert(record.clone(), changed);
        let there = Machine::new(&remote);
        assert_eq!(there.pull(&made).is_some(), content == fine, "{content}");
        assert!(!there.folder.path().join("escaped").exists());
    }
}
