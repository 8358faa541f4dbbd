//! Proxies: which one is taken, that its password reaches it, and that nobody sees it.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use pipeline::hub::Proxies;

use super::*;

/// A proxy that connects everybody to `hub`, whatever host they name. Gives its address and the heads of requests.
fn proxy(hub: &str) -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let heads = Arc::new(Mutex::new(Vec::new()));
    let (noted, hub) = (Arc::clone(&heads), hub.replace("http://", ""));
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (noted, hub) = (Arc::clone(&noted), hub.clone());
            std::thread::spawn(move || connect(&stream, &hub, &noted));
        }
    });
    (address, heads)
}

fn connect(mut stream: &TcpStream, hub: &str, noted: &Mutex<Vec<String>>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).unwrap_or(0) == 0 {
            return;
        }
    }
    noted.lock().unwrap().push(head.clone());
    if !head.starts_with("CONNECT ") {
        let _ = stream.write_all(b"HTTP/1.1 405 no\r\nContent-Length: 0\r\n\r\n");
        return;
    }
    let mut there = TcpStream::connect(hub).unwrap();
    let _ = stream.write_all(b"HTTP/1.1 200 ok\r\n\r\n");
    let mut back = there.try_clone().unwrap();
    let mut answers = stream.try_clone().unwrap();
    std::thread::spawn(move || std::io::copy(&mut back, &mut answers));
    let _ = std::io::copy(&mut reader, &mut there);
}

#[test]
fn requests_go_through_the_proxy_of_the_scheme() {
    let scene = plain();
    let (address, heads) = proxy(&scene.server.endpoint);
    let settings = |proxies| {
        let mut settings = scene.settings();
        settings.endpoint = Some("http://hub.example".into());
        settings.proxies = proxies;
        settings
    };
    let own = Proxies {
        http: Some(format!("http://me:s3cret@{address}")),
        ..Proxies::default()
    };
    let hub = Hub::new(settings(own.clone()), &()).unwrap();
    let commit = hub.resolve(RepoKind::Model, REPO, "main").unwrap();
    assert_eq!(commit, scene.snapshot.commit);
    // Its large files are on this machine, which is reached directly.
    scene.fetch_by(&hub, WEIGHTS).unwrap();
    let asked = heads.lock().unwrap().clone();
    assert!(!asked.is_empty());
    for head in &asked {
        assert!(head.starts_with("CONNECT hub.example:80 "), "{head}");
        // printf 'me:s3cret' | base64
        assert!(head.contains("Basic bWU6czNjcmV0"), "{head}");
    }

    // `NO_PROXY`: nobody knows the host, and the sentence has no password.
    let none = Proxies {
        none: vec!["hub.example".into()],
        ..own
    };
    let mut settings = settings(none);
    settings.timeout = Duration::from_secs(1);
    settings.answer_timeout = Duration::from_secs(1);
    let hub = Hub::new(settings, &()).unwrap();
    let error = format!(
        "{:#}",
        hub.resolve(RepoKind::Model, REPO, "main").unwrap_err()
    );
    assert!(
        error.contains("could not fetch") && !error.contains("s3cret"),
        "{error}"
    );
    assert_eq!(heads.lock().unwrap().len(), asked.len());
}

#[test]
fn a_proxy_that_is_none_shows_no_password() {
    let scene = plain();
    for (proxy, expected) in [
        ("http://me:s3cret@127.0.0.1:1", "could not fetch"),
        ("me:s3cret@:x", "could not fetch"),
        ("gopher://me:s3cret@x", "makes no sense"),
    ] {
        let mut settings = scene.settings();
        settings.endpoint = Some("http://hub.example".into());
        settings.proxies.all = Some(proxy.into());
        let found =
            Hub::new(settings, &()).and_then(|hub| hub.resolve(RepoKind::Model, REPO, "main"));
        let error = format!("{:#}", found.unwrap_err());
        assert!(error.contains(expected), "{error}");
        assert!(
            !error.contains("s3cret") && !error.contains("me:"),
            "{error}"
        );
    }
}
