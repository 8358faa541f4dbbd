//! A store that anything may have happened to: a record and a manifest are what they should be, or they don't count.
//! The input is a record, a zero byte, and a manifest.
#![no_main]

use std::fs;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use pipeline::engine::remote::{parse_manifest, parse_record};
use pipeline::engine::{Found, Manifest, Record, Store};
use tempfile::TempDir;

static FOLDER: LazyLock<TempDir> = LazyLock::new(|| {
    let folder = TempDir::new().expect("a temporary folder");
    for part in ["records", "artifacts"] {
        fs::create_dir_all(folder.path().join("v1").join(part)).expect("a folder");
    }
    folder
});

fuzz_target!(|data: &[u8]| {
    let mut parts = data.splitn(2, |byte| *byte == 0);
    let record = parts.next().unwrap_or_default();
    let manifest = parts.next().unwrap_or_default();
    let parsed: Option<Record> = serde_json::from_slice(record).ok();
    let fingerprint = parsed
        .as_ref()
        .map_or_else(|| "0".repeat(64), |record| record.fingerprint.digest());
    let content = match parsed.as_ref().map(|record| record.artifact.as_str()) {
        // Only a name that a manifest can have is a file's name here; others must be dealt with all the same.
        Some(artifact)
            if artifact.len() == 64 && artifact.bytes().all(|b| b.is_ascii_hexdigit()) =>
        {
            artifact.to_owned()
        }
        _ => "1".repeat(64),
    };
    let root = FOLDER.path().join("v1");
    let record_path = root.join("records").join(format!("{fingerprint}.json"));
    let manifest_path = root.join("artifacts").join(format!("{content}.json"));
    fs::write(&record_path, record).expect("a file");
    fs::write(&manifest_path, manifest).expect("a file");
    let store = Store::new(FOLDER.path());
    for thorough in [false, true] {
        match store.find(&fingerprint, thorough).expect("what is there can be read") {
            Found::Hit(record, _) => {
                // Only an artifact of no files can be sound: there is no folder with files.
                assert_eq!(record.fingerprint.digest(), fingerprint);
                let manifest: Manifest =
                    serde_json::from_slice(manifest).expect("a sound manifest");
                assert!(manifest.files.is_empty());
            }
            Found::Missing(record) | Found::Damaged(record, _) => {
                assert_eq!(record.fingerprint.digest(), fingerprint);
            }
            Found::Nothing => {}
        }
    }
    if let Some(record) = parsed {
        let text = serde_json::to_vec(&record).expect("what was read can be written");
        let again: Record = serde_json::from_slice(&text).expect("what was written can be read");
        assert_eq!(again.fingerprint.digest(), fingerprint);
    }
    let _ = fs::remove_file(record_path);
    let _ = fs::remove_file(manifest_path);
    if let Ok(record) = parse_record(&fingerprint, record) {
        assert!(record.artifact.bytes().all(|byte| byte.is_ascii_hexdigit()));
    }
    let inside = |path: &String| !path.starts_with('/') && path.split('/').all(|part| part != "..");
    if let Ok(manifest) = parse_manifest(&content, manifest) {
        assert!(manifest.files.keys().all(inside));
    }
    // The name of a manifest is its digest, which a fuzzer can't guess.
    if let Ok(parsed) = serde_json::from_slice::<Manifest>(manifest)
        && let Ok(manifest) = parse_manifest(&parsed.digest(), manifest)
    {
        assert!(manifest.files.keys().all(inside));
    }
});
