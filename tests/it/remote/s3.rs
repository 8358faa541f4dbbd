//! What every remote promises, tried on a folder always, and on a real S3 server where one is installed:
//! `pip install 'moto[s3,server]==5.2.5'`, then `moto_server` on the path or its place in `MOTO_SERVER`.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use pipeline::engine::remote::Remote as _;
use pipeline::remote::{Address, ObjectRemote};

use super::{NOTHING, contents, member, names, run, warnings};
use crate::support::program::Project;

const SECRET: &str = "a-very-secret-key";
const BUCKET: &str = "teamcache";

/// A real S3 server, in memory.
struct Moto {
    process: Child,
    endpoint: String,
}

impl Moto {
    /// `None`, and a line that says so, where it is not installed.
    #[expect(clippy::disallowed_methods, reason = "a switch of the tests")]
    fn start() -> Option<Self> {
        let program = std::env::var("MOTO_SERVER").unwrap_or_else(|_| "moto_server".into());
        let port = {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            listener.local_addr().unwrap().port()
        };
        let process = Command::new(&program)
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let Ok(process) = process else {
            println!(
                "skipped: no `{program}`; `pip install 'moto[s3,server]==5.2.5'` and set MOTO_SERVER to test against S3"
            );
            return None;
        };
        let moto = Self {
            process,
            endpoint: format!("http://127.0.0.1:{port}"),
        };
        let began = Instant::now();
        let mut stream = loop {
            match TcpStream::connect(("127.0.0.1", port)) {
                Ok(stream) => break stream,
                Err(error) => {
                    assert!(began.elapsed() < Duration::from_mins(2), "{error}");
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        };
        let request = format!(
            "PUT /{BUCKET} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        Some(moto)
    }

    fn variables(&self) -> BTreeMap<String, String> {
        [
            ("AWS_ENDPOINT_URL", self.endpoint.as_str()),
            ("AWS_ACCESS_KEY_ID", "somebody"),
            ("AWS_SECRET_ACCESS_KEY", SECRET),
            ("AWS_REGION", "us-east-1"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into()
    }

    fn member(&self) -> Project {
        let mut project = member(&format!("s3://{BUCKET}/team"));
        for (name, value) in self.variables() {
            project.variable(&name, &value);
        }
        project
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Bytes that no two places share.
fn noise(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes
}

/// A file that fails before its end.
struct Failing<'a>(&'a [u8]);

impl Read for Failing<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self.0.read(buffer)? {
            0 => Err(std::io::Error::other("the disk broke")),
            count => Ok(count),
        }
    }
}

fn keeps_its_promises(url: &str, variables: &BTreeMap<String, String>) {
    let address = Address::parse(url, Path::new("/")).unwrap();
    let open = || ObjectRemote::open(&address, variables).unwrap();
    let remote = open();
    let read = |key: &str, from| {
        let mut bytes = Vec::new();
        let found = remote.read(key, from, &mut |piece| {
            bytes.extend_from_slice(piece);
            Ok(())
        });
        found.unwrap().then_some(bytes)
    };
    assert_eq!(read("v1/nothing", 0), None);
    assert_eq!(remote.size("v1/nothing").unwrap(), None);
    assert_eq!(remote.list("v1").unwrap(), []);

    // Nothing, a little, one part exactly, and several parts.
    for length in [0, 10, 8 << 20, 20_000_000] {
        let (key, bytes) = (format!("v1/blobs/x/{length}"), noise(length));
        let size = length as u64;
        remote.write(&key, size, &mut bytes.as_slice()).unwrap();
        assert_eq!(remote.size(&key).unwrap(), Some(size));
        assert!(read(&key, 0) == Some(bytes.clone()), "{length}");
        if length > 7 {
            assert!(read(&key, 7).unwrap() == bytes[7..], "{length}");
        }
        // A source that fails leaves nothing; neither does one of another size.
        let broken = format!("v1/broken/{length}");
        let error = remote
            .write(&broken, size, &mut Failing(&bytes))
            .unwrap_err();
        assert!(format!("{error:#}").contains("the disk broke"), "{error:#}");
        assert!(
            remote
                .write(&broken, size + 1, &mut bytes.as_slice())
                .is_err()
        );
        assert_eq!(remote.size(&broken).unwrap(), None);
    }
    let listed = remote.list("v1/blobs").unwrap();
    assert_eq!(listed.len(), 4);
    assert!(
        listed
            .iter()
            .all(|object| object.key.starts_with("v1/blobs/x/"))
    );
    // Whoever listens may stop listening.
    let mut pieces = 0;
    let stopped = remote.read("v1/blobs/x/20000000", 0, &mut |_| {
        pieces += 1;
        anyhow::bail!("enough")
    });
    assert_eq!(
        (stopped.unwrap_err().to_string().as_str(), pieces),
        ("enough", 1)
    );

    // Of many that publish at once, one does.
    for round in 0..8 {
        let key = format!("v1/records/{round}");
        let winners = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for writer in 0..12 {
                let (key, winners) = (&key, &winners);
                let remote = open();
                scope.spawn(move || {
                    let bytes = vec![writer; 500];
                    if remote.create(key, bytes).unwrap() {
                        winners.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(winners.load(Ordering::SeqCst), 1, "round {round}");
    }
    let keys: Vec<String> = remote
        .list("v1")
        .unwrap()
        .into_iter()
        .map(|object| object.key)
        .collect();
    assert_eq!(keys.len(), 12);
    remote.delete(&keys).unwrap();
    remote.delete(&keys).unwrap();
    assert_eq!(remote.list("v1").unwrap(), []);
}

#[test]
fn a_folder_keeps_its_promises() {
    let folder = tempfile::tempdir().unwrap();
    keeps_its_promises(&folder.path().display().to_string(), &BTreeMap::new());
}

#[test]
fn s3_keeps_its_promises() {
    let Some(moto) = Moto::start() else { return };
    keeps_its_promises(&format!("s3://{BUCKET}/some/folder"), &moto.variables());
}

#[test]
fn machines_share_a_bucket() {
    let Some(moto) = Moto::start() else { return };
    // Two that make the same results, and publish them at once.
    let pushers = [moto.member(), moto.member()];
    for project in &pushers {
        project.succeeds(&["run", "here/r.yaml", "--remote", ""]);
    }
    let pushed: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = pushers
            .iter()
            .map(|project| scope.spawn(|| project.run(&["cache", "push", "--all"])))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    for ended in &pushed {
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        assert!(
            ended.stdout.contains("3 results are there"),
            "{}",
            ended.stdout
        );
        assert_eq!(ended.stderr, "");
    }
    let list = pushers[0].succeeds(&["cache", "ls"]);
    assert!(list.contains("3 results, "), "{list}");
    pushers[0].succeeds(&["cache", "verify"]);

    let third = moto.member();
    let (events, ended) = run(&third, &["here/r.yaml", "--remote-required"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert_eq!(names(&events, "stage_done"), NOTHING);
    assert_eq!(names(&events, "stage_fetched"), ["chats"]);
    assert_eq!(
        contents(&pushers[0].path("out/chats")),
        contents(&third.path("out/chats"))
    );
    third.write("here/chat.jinja", "another");
    let (events, _) = run(&third, &["here/r.yaml"]);
    assert_eq!(names(&events, "stage_sent"), ["chats"]);
    let told = third.succeeds(&["cache", "gc", "--older-than", "0", "--dry-run"]);
    assert_eq!(told.matches("record  ").count(), 4, "{told}");

    // A wrong bucket is one warning, with no secret in it.
    let mut wrong = moto.member();
    wrong.variable("PIPELINE_REMOTE", "s3://no-such-bucket/x");
    let (events, ended) = run(&wrong, &["here/r.yaml"]);
    assert_eq!(ended.code, Some(0));
    assert_eq!(warnings(&events).len(), 1, "{:?}", warnings(&events));
    for project in pushers.iter().chain([&third, &wrong]) {
        for (name, bytes) in contents(&project.path("")) {
            let text = String::from_utf8_lossy(&bytes);
            assert!(
                !text.contains(SECRET),
                "{} holds the secret",
                name.display()
            );
        }
    }
    assert!(!ended.stdout.contains(SECRET) && !ended.stderr.contains(SECRET));
}
