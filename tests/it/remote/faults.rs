//! Remotes that are damaged, dead, read-only, or break off.

use std::fs;

use super::{NOTHING, contents, files, machine, member, names, run, warnings};
use crate::support::objects::ObjectServer;
use crate::support::program::{Project, stages};

const SECRET: &str = "a-very-secret-key";

/// A machine whose remote is a bucket of this server.
fn s3(endpoint: &str) -> Project {
    let mut project = member("s3://bucket/team");
    project.variable("AWS_ENDPOINT_URL", endpoint);
    project.variable("AWS_ACCESS_KEY_ID", "somebody");
    project.variable("AWS_SECRET_ACCESS_KEY", SECRET);
    project
}

/// No file of a project, and none of the server's, holds the secret.
#[track_caller]
fn hushed(project: &Project) {
    for (name, bytes) in contents(&project.path("")) {
        let found = bytes
            .windows(SECRET.len())
            .any(|part| part == SECRET.as_bytes());
        assert!(!found, "{} holds the secret", name.display());
    }
}

#[test]
fn damaged_files_are_made_again_and_healed() {
    let remote = tempfile::tempdir().unwrap();
    let url = remote.path().display().to_string();
    let first = member(&url);
    first.succeeds(&["run", "here/r.yaml"]);
    let blobs = files(&remote.path().join("v1/blobs"));
    let whole: Vec<_> = blobs.iter().map(|blob| fs::read(blob).unwrap()).collect();
    for (blob, whole) in blobs.iter().zip(&whole) {
        let mut bytes = whole.clone();
        bytes[whole.len() / 2] ^= 1;
        fs::write(blob, bytes).unwrap();
    }
    let second = member(&url);
    let (events, ended) = run(&second, &["here/r.yaml"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert_eq!(names(&events, "stage_done"), ["chats", "pairs", "split"]);
    let told = warnings(&events);
    assert!(
        !told.is_empty()
            && told
                .iter()
                .all(|text| text.contains("is damaged and counts as absent")),
        "{told:?}"
    );
    assert_eq!(
        contents(&first.path("out/chats")),
        contents(&second.path("out/chats"))
    );
    for (blob, whole) in blobs.iter().zip(&whole) {
        assert!(
            &fs::read(blob).unwrap() == whole,
            "what was sent did not heal {}",
            blob.display()
        );
    }
    second.succeeds(&["cache", "verify"]);
    assert_eq!(member(&url).ran(&["here/r.yaml"]), NOTHING);

    // A damaged result here comes back from the remote.
    let file = files(&second.path(".pipeline/v1/artifacts"))
        .into_iter()
        .find(|file| {
            file.extension()
                .is_some_and(|extension| extension == "parquet")
        })
        .unwrap();
    fs::remove_file(&file).unwrap();
    fs::write(&file, "rubbish").unwrap();
    let (events, _) = run(&second, &["here/r.yaml"]);
    assert_eq!(names(&events, "stage_done"), NOTHING);
}

#[test]
fn a_dead_remote_is_one_warning() {
    let mut web = member("http://me:a-very-secret-key@127.0.0.1:1/cache");
    web.variable("NO_COLOR", "1");
    for project in [s3("http://127.0.0.1:1"), web] {
        let ended = project.run(&["run", "here/r.yaml", "--remote-required"]);
        assert_eq!(ended.code, Some(1));
        assert!(ended.stderr.contains("can't be used"), "{}", ended.stderr);
        assert!(
            ended.stderr.contains("--remote-required"),
            "{}",
            ended.stderr
        );
        assert!(!ended.stderr.contains("done"), "{}", ended.stderr);

        let plain = project.run(&["plan", "here/r.yaml"]);
        assert_eq!(plain.code, Some(0));
        assert_eq!(
            plain.stderr.matches("warning:").count(),
            1,
            "{}",
            plain.stderr
        );

        let (events, ended) = run(&project, &["here/r.yaml"]);
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        assert_eq!(names(&events, "stage_done").len(), 3);
        let told = warnings(&events);
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(
            !told[0].contains(SECRET) && !told[0].contains("me:"),
            "{told:?}"
        );
        assert!(!ended.stdout.contains(SECRET));
        hushed(&project);

        let offline = project.run(&["run", "here/r.yaml", "--offline"]);
        assert_eq!(
            (offline.code, offline.stderr.contains("warning")),
            (Some(0), false)
        );
    }
}

#[test]
fn a_read_only_remote_serves_and_is_one_warning() {
    let server = ObjectServer::start();
    let first = s3(&server.endpoint);
    first.succeeds(&["run", "here/r.yaml"]);
    assert_eq!(server.keys("/bucket/team/v1/records/").len(), 3);
    server.seal(true);
    let second = s3(&server.endpoint);
    second.write("here/chat.jinja", "another");
    let (events, ended) = run(&second, &["here/r.yaml"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert_eq!(names(&events, "stage_done"), ["chats"]);
    assert_eq!(names(&events, "stage_fetched"), ["split"]);
    let told = warnings(&events);
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].contains("can't be written"), "{told:?}");
    let (events, ended) = run(
        &second,
        &[
            "here/r.yaml",
            "--set",
            "stages.split.split_dataset.seed=3",
            "--remote-required",
        ],
    );
    assert_eq!(ended.code, Some(1));
    assert_eq!(names(&events, "stage_done").len(), 2, "what was made stays");
    let (events, _) = run(&second, &["here/r.yaml", "--no-push"]);
    assert_eq!(warnings(&events), NOTHING);
    hushed(&first);
    hushed(&second);
    assert!(!server.text().contains(SECRET));
    assert!(
        server
            .asked()
            .iter()
            .all(|asked| !asked.headers.contains(SECRET))
    );

    // The same files behind plain HTTP: nothing is ever written there.
    let mut web = member(&format!("{}/bucket/team", server.endpoint));
    web.variable("NO_COLOR", "1");
    let (events, ended) = run(&web, &["here/r.yaml"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert_eq!(names(&events, "stage_done"), NOTHING);
    web.write("here/chat.jinja", "a third");
    let (events, _) = run(&web, &["here/r.yaml"]);
    assert_eq!(names(&events, "stage_done"), ["chats"]);
    assert_eq!(warnings(&events), NOTHING);
    assert!(
        server
            .asked()
            .iter()
            .all(|asked| ["GET", "HEAD"].contains(&asked.method.as_str()))
    );
    let refused = web.run(&["cache", "push", "here/r.yaml"]);
    assert!(refused.stderr.contains("read-only"), "{}", refused.stderr);
}

#[test]
fn an_interrupted_push_is_finished_by_the_next_run() {
    let server = ObjectServer::start();
    let first = s3(&server.endpoint);
    server.break_after(Some(2));
    let (events, ended) = run(&first, &["here/r.yaml"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert_eq!(warnings(&events).len(), 1, "{:?}", warnings(&events));
    let there = server.keys("/blobs/").len();
    assert!(server.keys("/records/").len() < 3);

    server.break_after(None);
    server.asked();
    let (events, _) = run(&first, &["here/r.yaml"]);
    assert_eq!(names(&events, "stage_done"), NOTHING);
    let writes = server.asked();
    let writes = writes
        .iter()
        .filter(|asked| asked.method == "PUT" && asked.path.contains("/blobs/"));
    assert_eq!(writes.count() + there, server.keys("/blobs/").len());
    assert_eq!(server.keys("/records/").len(), 3);
    let second = s3(&server.endpoint);
    assert_eq!(second.ran(&["here/r.yaml"]), NOTHING);
    assert_eq!(
        contents(&first.path("out/chats")),
        contents(&second.path("out/chats"))
    );
    // With nothing to send, nothing is asked.
    server.asked();
    first.succeeds(&["run", "here/r.yaml"]);
    assert_eq!(server.asked(), []);
}

#[test]
fn a_damaged_or_alien_record_is_absent() {
    let remote = tempfile::tempdir().unwrap();
    let url = remote.path().display().to_string();
    let first = member(&url);
    first.succeeds(&["run", "here/r.yaml"]);
    for (number, record) in files(&remote.path().join("v1/records")).iter().enumerate() {
        let text = fs::read_to_string(record).unwrap();
        let other = match number {
            0 => text.replace("\"version\": ", "\"version\": 7"),
            1 => text.replace("\"format\": ", "\"format\": 9"),
            _ => text[..text.len() / 2].to_owned(),
        };
        fs::write(record, other).unwrap();
    }
    let second = member(&url);
    let (events, ended) = run(&second, &["here/r.yaml"]);
    assert_eq!(names(&events, "stage_done").len(), 3, "{}", ended.stderr);
    assert_eq!(warnings(&events).len(), 3, "{:?}", warnings(&events));
    // The three are published anew.
    assert_eq!(stages(&events, "stage_sent").len(), 3);
    assert_eq!(member(&url).ran(&["here/r.yaml"]), NOTHING);
}

#[test]
fn a_folder_that_is_not_there_is_one_warning() {
    let project = machine("here");
    let (events, ended) = run(&project, &["here/r.yaml", "--remote", "no/such/folder"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert_eq!(names(&events, "stage_done").len(), 3);
    assert_eq!(warnings(&events).len(), 1);
    assert!(warnings(&events)[0].contains("there is no folder"));
}
