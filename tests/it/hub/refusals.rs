//! What can't be had from a hub: the sentences people read, and what is done without it.

use super::*;
use crate::support::hub::Mirror;
use crate::support::program::Project;

#[test]
fn closed_doors_say_what_to_do() {
    let scene = plain();
    let page = format!("{}/{REPO}", scene.server.endpoint);
    scene.server.gate("models/some/model", Gate::Gated);
    let error = scene.fetch_error("config.json");
    assert!(
        error.contains("gated") && error.contains("HF_TOKEN") && error.contains(&page),
        "{error}"
    );

    let wrong = scene.with_token("hf_wrong");
    let error = format!("{:#}", scene.fetch_by(&wrong, "config.json").unwrap_err());
    assert!(
        error.contains("refuses the token") && !error.contains("hf_wrong"),
        "{error}"
    );

    scene.server.gate("models/some/model", Gate::Refused);
    let error = format!(
        "{:#}",
        scene
            .fetch_by(&scene.with_token(TOKEN), "config.json")
            .unwrap_err()
    );
    assert!(
        error.contains("accept its licence") && error.contains(&page),
        "{error}"
    );
    assert!(!error.contains(TOKEN), "{error}");

    scene.server.gate("models/some/model", Gate::Private);
    let error = scene
        .hub()
        .resolve(RepoKind::Model, REPO, "main")
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("401") && error.contains("HF_TOKEN"),
        "{error}"
    );
    let token = scene.with_token(TOKEN);
    assert_eq!(
        token.resolve(RepoKind::Model, REPO, "main").unwrap(),
        scene.snapshot.commit
    );
    scene.fetch_by(&token, "config.json").unwrap();
}

#[test]
fn what_is_not_there_is_named() {
    let scene = plain();
    let token = scene.with_token(TOKEN);
    let error = token
        .resolve(RepoKind::Model, "some/modle", "main")
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("404") && error.contains("some/modle"),
        "{error}"
    );
    let error = token
        .resolve(RepoKind::Model, REPO, "mian")
        .unwrap_err()
        .to_string();
    assert!(error.contains("no revision `mian`"), "{error}");
    let error = token
        .resolve(RepoKind::Model, "../etc", "main")
        .unwrap_err()
        .to_string();
    assert!(error.contains("no repository"), "{error}");
}

#[test]
fn no_hub_at_the_address_is_an_error() {
    let cache = tempfile::tempdir().unwrap();
    // Bound and closed again: nobody listens there.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut settings = HubSettings::new(cache.path());
    settings.endpoint = Some(format!("http://{}", listener.local_addr().unwrap()));
    settings.retry_wait = Duration::from_millis(1);
    drop(listener);
    let hub = Hub::new(settings.clone(), &()).unwrap();
    let error = hub
        .resolve(RepoKind::Model, REPO, "main")
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("HF_ENDPOINT") && error.contains("--offline"),
        "{error}"
    );
    for endpoint in ["", "huggingface.co", "ftp://x", "http://", "no address"] {
        settings.endpoint = Some(endpoint.into());
        let error = format!("{:#}", Hub::new(settings.clone(), &()).unwrap_err());
        assert!(error.contains("HF_ENDPOINT"), "{endpoint}: {error}");
    }
    settings.token = Some("two\nlines".into());
    let error = Hub::new(settings, &()).unwrap_err().to_string();
    assert!(
        error.contains("token") && !error.contains("lines"),
        "{error}"
    );
}

#[test]
fn https_to_a_server_without_it_is_an_error() {
    let scene = plain();
    let mut settings = scene.settings();
    settings.endpoint = Some(scene.server.endpoint.replace("http://", "https://"));
    settings.timeout = Duration::from_secs(2);
    let hub = Hub::new(settings, &()).unwrap();
    let error = hub.resolve(RepoKind::Model, REPO, "main").unwrap_err();
    assert!(error.to_string().contains("could not fetch"), "{error}");
}

#[test]
fn listings_that_lie_are_errors() {
    let scene = plain();
    for name in ["../evil", "/etc/passwd", "a\\b", "C:evil"] {
        let commit = scene.server.model(REPO, &[(name, b"x")]);
        let error = format!("{:#}", scene.hub().list(&model_at(&commit)).unwrap_err());
        assert!(error.contains("unsafe name"), "{error}");
    }
    // A tree.
    let answers = [
        ("<html>".to_owned(), "no description"),
        ("{}".to_owned(), "no description"),
        (
            "[{\"type\": \"file\", \"path\": \"x\", \"size\": -1}]".to_owned(),
            "no description",
        ),
        (
            "[{\"type\": \"file\", \"path\": \"../x\", \"size\": 1}]".to_owned(),
            "unsafe name",
        ),
    ];
    let hub = scene.hub();
    for (answer, expected) in answers {
        scene.server.fault("/tree/", Fault::Page(200, answer), 1);
        // A page that is none looks like a mirror without trees; its description is none either.
        scene
            .server
            .fault("/revision/", Fault::Page(200, "<html>".into()), 1);
        let error = format!("{:#}", hub.list(&scene.snapshot).unwrap_err());
        assert!(error.contains(expected), "{error}");
        scene.server.forgive();
    }
    // A description, of a mirror without trees.
    scene.server.mirror(Mirror {
        no_tree: true,
        ..Mirror::default()
    });
    let other = "0123456789012345678901234567890123456789";
    let answers = [
        ("<html>".to_owned(), "no description"),
        (
            format!("{{\"sha\": \"{other}\", \"siblings\": []}}"),
            "answered with",
        ),
        ("{}".to_owned(), "answered with"),
    ];
    for (answer, expected) in answers {
        scene
            .server
            .fault("/revision/", Fault::Page(200, answer), 1);
        let error = format!("{:#}", hub.list(&scene.snapshot).unwrap_err());
        assert!(error.contains(expected), "{error}");
    }
    scene.server.mirror(Mirror::default());
    scene
        .server
        .fault("/api/", Fault::Page(200, "{\"sha\": \"main\"}".into()), 1);
    let error = scene
        .hub()
        .resolve(RepoKind::Model, REPO, "main")
        .unwrap_err()
        .to_string();
    assert!(error.contains("names no commit"), "{error}");
    assert!(!scene.cache.path().join("evil").exists());
}

#[test]
fn offline_uses_the_cache_and_asks_nobody() {
    let scene = plain();
    let offline = scene.offline();
    let error = offline
        .resolve(RepoKind::Model, REPO, "main")
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("--offline") && error.contains("main"),
        "{error}"
    );
    let error = offline.list(&scene.snapshot).unwrap_err().to_string();
    assert!(error.contains("--offline"), "{error}");
    assert!(scene.server.requests().is_empty());

    let hub = scene.hub();
    hub.remember(&scene.snapshot, "main").unwrap();
    scene.fetch("config.json").unwrap();
    let before = scene.server.requests().len();
    assert_eq!(
        offline.resolve(RepoKind::Model, REPO, "main").unwrap(),
        scene.snapshot.commit
    );
    let listing = offline.list(&scene.snapshot).unwrap();
    assert!(listing.complete);
    assert_eq!(listing.files.len(), 2);
    scene.fetch_by(&offline, "config.json").unwrap();
    let error = scene.fetch_by(&offline, WEIGHTS).unwrap_err().to_string();
    assert!(
        error.contains(WEIGHTS) && error.contains("--offline"),
        "{error}"
    );

    // What another program fetched is found by its links, and is not taken for all there is.
    std::fs::remove_dir_all(scene.folder().join(".listings")).unwrap();
    let listing = offline.list(&scene.snapshot).unwrap();
    assert!(!listing.complete);
    assert_eq!(listing.files.len(), 1);
    assert_eq!(listing.files[0].git_sha1, Some(git_sha1(b"{\"a\": 1}\n")));
    scene.fetch_by(&offline, "config.json").unwrap();
    assert_eq!(scene.server.requests().len(), before);
}

#[test]
fn two_programs_at_once_fetch_a_file_once() {
    let scene = plain();
    let file = scene.file(&scene.hub(), WEIGHTS);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let path = scene
                    .hub()
                    .fetch(&scene.snapshot, &file, &mut |_| Ok(()))
                    .unwrap();
                assert_eq!(std::fs::read(path).unwrap(), weights());
            });
        }
    });
    assert_eq!(scene.bodies(WEIGHTS).len(), 1);
}

#[test]
fn only_what_may_pass_is_tried_again() {
    let scene = plain();
    let passes = |path: &str, fault: Fault| {
        scene.server.fault(path, fault, 99);
        let error = scene.fetch(WEIGHTS).unwrap_err();
        scene.server.forgive();
        let mut causes = error.chain();
        causes.any(<dyn std::error::Error>::is::<std::io::Error>)
    };
    for (status, expected) in [
        (401, false),
        (403, false),
        (404, false),
        (429, true),
        (500, true),
        (503, true),
    ] {
        let page = Fault::Page(status, "no".into());
        assert_eq!(passes("/resolve/", page), expected, "{status}");
    }
    assert!(passes("/resolve/", Fault::CutAfter(0)));
    // Another content comes again.
    assert!(!passes("/resolve/", Fault::WrongBytes));

    // A stage that is told to try again asks once where that can't help.
    let mut project = Project::empty();
    project.variable("HF_ENDPOINT", &scene.server.endpoint);
    let recipe = format!(
        "version: 1\nstages:\n  base: {{ download_model: {{ repo: {REPO} }}, retries: 3 }}\noutputs: {{ base: out/base }}\n"
    );
    project.write("r.yaml", &recipe);
    scene
        .server
        .fault("/resolve/", Fault::Page(403, "no".into()), 99);
    let ended = project.run(&["run", "r.yaml"]);
    assert_eq!(ended.code, Some(1));
    assert!(
        ended
            .stderr
            .contains("not tried again, because it would fail in the same way"),
        "{}",
        ended.stderr
    );
}
