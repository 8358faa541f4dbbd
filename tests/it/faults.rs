//! What the world does to a store: full disks, missing rights, other users, odd clocks, other versions, damage. Always the
//! right result or a clear error, and the next run carries on.

use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use crate::support::program::{Ended, Project};

const RECIPE: &str = "version: 1
stages:
  pairs: { import_dataset: { path: pairs.jsonl } }
  split: { split_dataset: { dataset: pairs, test_size: 0.5 } }
outputs:
  split: out
";
const RUN: [&str; 2] = ["run", "recipe.yaml"];

fn project() -> Project {
    let project = Project::empty();
    project.write("recipe.yaml", RECIPE);
    project.write("pairs.jsonl", &rows(400));
    project
}

/// Rows that don't compress to nothing.
fn rows(count: u64) -> String {
    let row = |index: u64| {
        let text = blake3::hash(&index.to_le_bytes()).to_hex();
        format!(
            "{{\"prompt\": \"{text}\", \"chosen\": \"yes {text}\", \"rejected\": \"no {text}\"}}\n"
        )
    };
    (0..count).map(row).collect()
}

/// The bytes of the placed result.
fn result(project: &Project) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(project.path("out"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| {
            (
                path.file_name().unwrap().to_string_lossy().into_owned(),
                fs::read(path).unwrap(),
            )
        })
        .collect();
    files.sort_unstable();
    files
}

/// The program's command line behind a shell that first does `before`.
fn behind(project: &Project, shell: &[&str], before: &str) -> Command {
    let inner = project.command(&RUN);
    let mut command = Command::new(shell[0]);
    command
        .args(&shell[1..])
        .args(["sh", "-c", &format!("{before}; exec \"$@\""), "sh"])
        .arg(inner.get_program())
        .args(inner.get_args())
        .current_dir(project.path(""))
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    for (name, value) in inner.get_envs() {
        command.env(name, value.unwrap_or(OsStr::new("")));
    }
    command
}

/// A failed run says what could not be written and where, without panicking.
#[track_caller]
fn assert_told(ended: &Ended, words: &[&str]) {
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
    let told = words.iter().any(|word| ended.stderr.contains(word));
    assert!(told, "{}", ended.stderr);
}

#[test]
fn a_write_that_fails_at_any_size_is_told_and_the_next_run_carries_on() {
    let whole = project();
    whole.succeeds(&RUN);
    let mut failed = 0;
    for blocks in [0, 1, 2, 4, 8, 16, 32, 64, 128] {
        let project = project();
        // No file may grow beyond so many blocks: as good as a disk that is full at that moment.
        let limit = format!("trap '' XFSZ; ulimit -f {blocks}");
        let ended: Ended = behind(&project, &["env"], &limit).output().unwrap().into();
        if ended.code != Some(0) {
            failed += 1;
            assert_told(&ended, &["File too large"]);
        }
        project.succeeds(&RUN);
        assert_eq!(result(&project), result(&whole), "{blocks} blocks");
    }
    assert!(failed >= 4, "only {failed} runs met the limit");
}

#[test]
fn a_full_disk_is_told_and_with_more_room_the_next_run_carries_on() {
    let able = Command::new("unshare").args(["-Urm", "true"]).status();
    if !able.is_ok_and(|status| status.success()) {
        eprintln!("skipped: this machine does not allow to mount a small file system");
        return;
    }
    let whole = project();
    whole.succeeds(&RUN);
    let (mut failed, mut advised) = (0, 0);
    for kilobytes in [16, 32, 48, 64, 96, 128, 192, 256] {
        let project = project();
        let first = format!(
            "mount -t tmpfs -o size={kilobytes}k none .pipeline; \"$@\"; code=$?; mount -o remount,size=64m .pipeline; \"$@\" || exit 7; exit $code"
        );
        // The store lives no longer than the mount, so both runs are in one shell.
        let mut command = behind(&project, &["unshare", "-Urm"], &first);
        let ended: Ended = command.output().unwrap().into();
        assert_ne!(ended.code, Some(7), "the second run: {}", ended.stderr);
        if ended.code != Some(0) {
            failed += 1;
            assert_told(&ended, &["No space left on device"]);
            if ended.stderr.contains("   failed  ") {
                advised += 1;
                assert_told(&ended, &["`pipeline gc` removes results"]);
            }
        }
        assert_eq!(result(&project), result(&whole), "{kilobytes} kB");
    }
    assert!(failed >= 2, "only {failed} runs met the end of the disk");
    assert!(advised >= 1, "no stage met the end of the disk");
}

/// A user and group that own nothing.
pub(crate) const NOBODY: u32 = 65534;

/// Whether this process may act as another user, and the other user may run the program from here.
pub(crate) fn may_be_nobody(project: &Project) -> bool {
    let mut command = project.command(&["--version"]);
    let may = command.uid(NOBODY).gid(NOBODY).status();
    let may = may.is_ok_and(|status| status.success());
    if !may {
        eprintln!("skipped: this process may not act as another user");
    }
    may
}

/// Opens a folder and all above it in the temporary project to everybody.
pub(crate) fn open_to_all(project: &Project, mode: u32) {
    for path in [project.path(""), project.path(".pipeline")] {
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }
}

pub(crate) fn as_nobody(project: &Project, arguments: &[&str]) -> Ended {
    let mut command = project.command(arguments);
    command.uid(NOBODY).gid(NOBODY).output().unwrap().into()
}

#[test]
fn a_store_that_can_not_be_written_serves_what_it_has() {
    let project = project();
    open_to_all(&project, 0o755);
    if !may_be_nobody(&project) {
        return;
    }
    project.succeeds(&RUN);
    let ended = as_nobody(&project, &RUN);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stderr.contains("2 fresh, 0 ran"), "{}", ended.stderr);
    project.write("pairs.jsonl", &rows(10));
    assert_told(&as_nobody(&project, &RUN), &["Permission denied"]);
    project.succeeds(&RUN);
}

#[test]
fn two_users_share_one_store() {
    let project = project();
    open_to_all(&project, 0o777);
    if !may_be_nobody(&project) {
        return;
    }
    let arguments = ["run", "recipe.yaml", "pairs"];
    let mut first = behind(&project, &["env"], "umask 0");
    assert!(first.output().unwrap().status.success());
    let ended = as_nobody(&project, &arguments);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stderr.contains("1 fresh, 0 ran"), "{}", ended.stderr);
    // The other one adds a result, and the first one uses it.
    project.write("pairs.jsonl", &rows(10));
    let ended = as_nobody(&project, &arguments);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stderr.contains("1 ran"), "{}", ended.stderr);
    assert!(project.run(&arguments).stderr.contains("1 fresh, 0 ran"));
}

#[test]
fn what_may_not_be_read_is_told() {
    let project = project();
    open_to_all(&project, 0o777);
    if !may_be_nobody(&project) {
        return;
    }
    let data = project.path("pairs.jsonl");
    fs::set_permissions(&data, Permissions::from_mode(0o000)).unwrap();
    let ended = as_nobody(&project, &RUN);
    assert_told(&ended, &["pairs.jsonl"]);
    assert!(
        ended.stderr.contains("Permission denied"),
        "{}",
        ended.stderr
    );
}

#[test]
fn a_store_on_another_file_system_works() {
    let project = project();
    let Ok(elsewhere) = tempfile::tempdir_in("/dev/shm") else {
        eprintln!("skipped: there is no /dev/shm");
        return;
    };
    let device = |path: &Path| fs::metadata(path).unwrap().dev();
    if device(elsewhere.path()) == device(&project.path("")) {
        eprintln!("skipped: /dev/shm is no other file system");
        return;
    }
    let store = elsewhere.path().join("store");
    let arguments = [&RUN[..], &["--store", store.to_str().unwrap()]].concat();
    project.succeeds(&arguments);
    let other = self::project();
    other.succeeds(&RUN);
    assert_eq!(result(&project), result(&other));
    assert!(project.run(&arguments).stderr.contains("2 fresh, 0 ran"));
}

fn every_file(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut open = vec![folder.to_owned()];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else {
                files.push(path);
            }
        }
    }
    files
}

#[test]
fn a_clock_that_went_back_hides_no_edit() {
    let project = project();
    project.succeeds(&RUN);
    let set = |path: &Path, time: SystemTime| {
        let mode = fs::metadata(path).unwrap().permissions();
        fs::set_permissions(path, Permissions::from_mode(0o644)).unwrap();
        fs::File::options()
            .write(true)
            .open(path)
            .unwrap()
            .set_modified(time)
            .unwrap();
        fs::set_permissions(path, mode).unwrap();
    };
    // All that was made so far is from the future.
    let now = SystemTime::now();
    let future = now + Duration::from_hours(1000);
    for path in every_file(&project.path(".pipeline")) {
        set(&path, future);
    }
    set(&project.path("pairs.jsonl"), future);
    assert!(project.run(&RUN).stderr.contains("2 fresh, 0 ran"));
    // An edit of the same size, older than what was recorded.
    let text = project.read("pairs.jsonl").replacen("yes", "yea", 1);
    project.write("pairs.jsonl", &text);
    set(
        &project.path("pairs.jsonl"),
        now - Duration::from_hours(1000),
    );
    assert!(project.run(&RUN).stderr.contains("2 ran"));
    assert!(project.run(&RUN).stderr.contains("2 fresh, 0 ran"));
}

#[test]
fn other_versions_of_records_and_stores_are_left_alone() {
    let project = project();
    project.write(".pipeline/v0/records/old.json", "{\"format\": 0}");
    project.succeeds(&RUN);
    let records = every_file(&project.path(".pipeline/v1/records"));
    assert_eq!(records.len(), 2);
    for path in &records {
        let newer = fs::read_to_string(path).unwrap().replacen(
            "\"format\": 1",
            "\"format\": 2, \"more\": [1]",
            1,
        );
        assert!(newer.contains("more"));
        fs::write(path, newer).unwrap();
    }
    let ended = project.run(&RUN);
    assert!(ended.stderr.contains("2 ran"), "{}", ended.stderr);
    assert!(project.run(&RUN).stderr.contains("2 fresh, 0 ran"));
    assert_eq!(
        project.read(".pipeline/v0/records/old.json"),
        "{\"format\": 0}"
    );
}
