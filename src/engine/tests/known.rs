//! Results that are not read again: whatever changes about them is seen.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;

use super::super::files::outlast;
use super::super::known_results::{KnownResults, Lookup};
use super::*;

/// Writes as many bytes into a file again and leaves the time of its last modification, as some tools do.
fn rewrite(path: &Path, change: impl Fn(&mut Vec<u8>)) {
    let before = fs::metadata(path).unwrap();
    let modified = before.modified().unwrap();
    let folder = path.parent().unwrap();
    outlast(folder, Stat::from_metadata(&before).changed).unwrap();
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::set_permissions(path, Permissions::from_mode(0o644)).unwrap();
    fs::write(path, bytes).unwrap();
    let file = fs::File::options().write(true).open(path).unwrap();
    file.set_modified(modified).unwrap();
}

/// The record, the manifest and the folder of a result.
type Paths<'a> = [&'a Path; 3];

/// Does something to the paths.
type Change<'a> = &'a dyn Fn(Paths<'_>);

#[test]
fn a_known_result_is_read_again_after_any_change() {
    let flip = |bytes: &mut Vec<u8>| bytes[0] ^= 1;
    let changes: [(&str, Change<'_>); 9] = [
        ("the same record anew", &|[record, ..]| {
            rewrite(record, |_| ());
        }),
        ("another record", &|[record, ..]| rewrite(record, flip)),
        ("no record", &|[record, ..]| {
            fs::remove_file(record).unwrap();
        }),
        ("a link as record", &|[record, ..]| {
            let moved = record.with_extension("moved");
            fs::rename(record, &moved).unwrap();
            std::os::unix::fs::symlink(moved, record).unwrap();
        }),
        ("another manifest", &|[_, manifest, _]| {
            rewrite(manifest, flip);
        }),
        ("another text", &|[.., folder]| {
            rewrite(&folder.join("text"), flip);
        }),
        ("one more file", &|[.., folder]| {
            fs::write(folder.join("more"), "more").unwrap();
        }),
        ("no text", &|[.., folder]| {
            fs::remove_file(folder.join("text")).unwrap();
        }),
        ("no folder", &|[.., folder]| {
            fs::rename(folder, folder.with_extension("moved")).unwrap();
        }),
    ];
    for (what, change) in changes {
        let toy = Toy::new(63);
        toy.run();
        let store = toy.store();
        let run = store.runs("toy").pop().unwrap();
        let stage = &run.stages["both"];
        let artifact = stage.artifact.as_ref().unwrap();
        let mut known = KnownResults::open(&store, "toy");
        let find = |known: &KnownResults, thorough| {
            let found = known.find(&store, &stage.fingerprint, thorough);
            found.unwrap()
        };
        let first = find(&known, false);
        assert!(matches!(first, Lookup::Read(Found::Hit(_, None))), "{what}");
        known.trust_all(&store);
        assert!(
            matches!(find(&known, false), Lookup::Known { artifact: found, .. } if found == *artifact),
            "before: {what}"
        );
        let read = find(&known, true);
        assert!(matches!(read, Lookup::Read(Found::Hit(..))), "{what}");
        let paths = (
            store.record_path(&stage.fingerprint),
            store.manifest_path(artifact),
            store.artifact(artifact),
        );
        change([&paths.0, &paths.1, &paths.2]);
        known.look_again();
        assert!(matches!(find(&known, false), Lookup::Read(_)), "{what}");
    }
}

/// What was written just now may change again without a new time, so that it is not remembered on the disk.
#[test]
fn new_results_are_remembered_only_when_their_times_tell_changes() {
    let toy = Toy::new(63);
    toy.run();
    let store = toy.store();
    let run = store.runs("toy").pop().unwrap();
    let fingerprint = &run.stages["both"].fingerprint;
    let known = KnownResults::open(&store, "toy");
    known.find(&store, fingerprint, false).unwrap();
    known.save(&store).unwrap();
    let again = KnownResults::open(&store, "toy").find(&store, fingerprint, false);
    let seconds_since = |path: &Path| fs::metadata(path).unwrap().modified().unwrap().elapsed();
    // A machine that was stopped meanwhile proves nothing.
    if seconds_since(&store.record_path(fingerprint))
        .unwrap()
        .as_secs()
        < 2
    {
        assert!(matches!(again, Ok(Lookup::Read(_))));
    }
}
