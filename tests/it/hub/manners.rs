//! What the real hub does all day: pages, other names, waits, other hosts, words about who may read what.

use std::sync::Mutex;
use std::time::Instant;

use pipeline::hub::Watch;

use super::*;

/// Notes what is told, and ends a wait after a while if it should.
#[derive(Default)]
struct Listener {
    told: Mutex<Vec<String>>,
    ends: Option<Instant>,
}

impl Watch for Listener {
    fn tick(&self) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.ends.is_none_or(|end| Instant::now() < end),
            "interrupted"
        );
        Ok(())
    }

    fn tell(&self, text: &str) {
        self.told.lock().unwrap().push(text.to_owned());
    }
}

impl Listener {
    fn told(&self) -> Vec<String> {
        self.told.lock().unwrap().clone()
    }
}

fn busy(status: u16, pairs: &[(&'static str, &str)]) -> Fault {
    let headers = pairs
        .iter()
        .map(|(name, value)| (*name, (*value).to_owned()));
    Fault::Busy(status, headers.collect())
}

#[test]
fn a_listing_has_the_size_and_hash_of_every_file() {
    let scene = plain();
    let listing = scene.hub().list(&scene.snapshot).unwrap();
    let found: Vec<_> = listing
        .files
        .iter()
        .map(|file| (file.path.as_str(), file.size, file.sha256.is_some()))
        .collect();
    assert_eq!(
        found,
        [
            ("config.json", Some(9), false),
            (WEIGHTS, Some(2_400_000), true)
        ]
    );
    assert_eq!(listing.files[0].git_sha1, Some(git_sha1(b"{\"a\": 1}\n")));
    assert_eq!(listing.files[1].sha256, Some(sha256(&weights())));
}

#[test]
fn large_trees_come_page_by_page() {
    let scene = plain();
    let names: Vec<String> = (0..25)
        .map(|number| format!("data/part {number:02}/rows+ü&.jsonl"))
        .collect();
    let files: Vec<(&str, &[u8])> = names
        .iter()
        .map(|name| (name.as_str(), name.as_bytes()))
        .collect();
    let snapshot = model_at(&scene.server.model(REPO, &files));
    scene.server.page(7);
    let listing = scene.hub().list(&snapshot).unwrap();
    let found: Vec<_> = listing.files.iter().map(|file| &file.path).collect();
    assert_eq!(found, names.iter().collect::<Vec<_>>());
    let pages = scene.server.requests();
    let pages = pages.iter().filter(|asked| asked.path.contains("/tree/"));
    // 25 files and as many folders, and the one above them.
    assert_eq!(pages.count(), 51_usize.div_ceil(7));
    for file in [&listing.files[0], &listing.files[24]] {
        let path = scene.hub().fetch(&snapshot, file, &mut |_| Ok(())).unwrap();
        assert_eq!(std::fs::read(path).unwrap(), file.path.as_bytes());
    }
}

#[test]
fn a_list_that_is_cut_or_never_ends_is_none() {
    let scene = plain();
    scene.server.page(1);
    scene.server.fault(
        "cursor=",
        Fault::Header(
            "Link",
            "<https://x/api/models/some/model/tree/y?cursor=a>; rel=\"next\"".into(),
        ),
        ALWAYS,
    );
    let error = format!("{:#}", scene.hub().list(&scene.snapshot).unwrap_err());
    assert!(error.contains("404") || error.contains("circle"), "{error}");
    scene.server.forgive();
    scene
        .server
        .fault("cursor=", Fault::Page(500, "busy".into()), ALWAYS);
    let error = format!("{:#}", scene.hub().list(&scene.snapshot).unwrap_err());
    assert!(error.contains("500"), "{error}");
    scene.server.forgive();
    let round = format!(
        "</api/models/{REPO}/tree/{}?cursor=config.json>; rel=\"next\"",
        scene.snapshot.commit
    );
    scene
        .server
        .fault("/tree/", Fault::Header("Link", round), ALWAYS);
    let error = format!("{:#}", scene.hub().list(&scene.snapshot).unwrap_err());
    assert!(error.contains("circle"), "{error}");
    scene.server.forgive();
    assert_eq!(scene.hub().list(&scene.snapshot).unwrap().files.len(), 2);
}

#[test]
fn a_renamed_repository_is_followed_and_its_new_name_told() {
    let scene = plain();
    scene
        .server
        .rename("models/some/model", "models/new-owner/model");
    let listener = Listener::default();
    let hub = Hub::new(scene.settings(), &listener).unwrap();
    assert_eq!(
        hub.resolve(RepoKind::Model, REPO, "main").unwrap(),
        scene.snapshot.commit
    );
    for name in [WEIGHTS, "config.json"] {
        scene.fetch_by(&hub, name).unwrap();
    }
    assert_eq!(listener.told().len(), 1);
    assert!(listener.told()[0].contains("`new-owner/model`"));
    // The cache keeps the name that was asked for, as huggingface_hub's does.
    assert!(scene.folder().join("snapshots").exists());
}

#[test]
fn names_of_old_without_an_owner_are_followed() {
    let scene = plain();
    let files: [(&str, &[u8]); 2] = [("config.json", b"{}"), (WEIGHTS, b"weights")];
    let commit = scene.server.commit("models/gpt2", "main", &files);
    scene
        .server
        .rename("models/gpt2", "models/openai-community/gpt2");
    let hub = scene.hub();
    let found = hub.resolve(RepoKind::Model, "gpt2", "main").unwrap();
    assert_eq!(found, commit);
    let snapshot = Snapshot {
        repo: "gpt2".into(),
        commit,
        ..scene.snapshot.clone()
    };
    let listing = hub.list(&snapshot).unwrap();
    for file in &listing.files {
        hub.fetch(&snapshot, file, &mut |_| Ok(())).unwrap();
    }
    assert_eq!(listing.files.len(), 2);
}

#[test]
fn a_hub_that_asks_to_wait_is_waited_for() {
    for answer in [
        busy(429, &[("Retry-After", "1")]),
        busy(429, &[("RateLimit", "\"resolvers\";r=0;t=1")]),
        busy(503, &[("Retry-After", "1")]),
    ] {
        let scene = plain();
        for path in ["/revision/", "/tree/", "/resolve/"] {
            scene.server.fault(path, answer.clone(), 1);
        }
        let hub = scene.hub();
        let started = Instant::now();
        hub.resolve(RepoKind::Model, REPO, "main").unwrap();
        scene.fetch_by(&hub, WEIGHTS).unwrap();
        assert!(started.elapsed() >= Duration::from_secs(3));
    }
}

#[test]
fn a_long_wait_is_told_and_ends_with_the_run() {
    let scene = plain();
    let limit = [
        ("RateLimit", "\"api\";r=0;t=290"),
        ("RateLimit-Policy", "\"fixed window\";\"api\";q=500;w=300"),
    ];
    scene.server.fault("/api/", busy(429, &limit), ALWAYS);
    let listener = Listener {
        ends: Some(Instant::now() + Duration::from_millis(300)),
        ..Listener::default()
    };
    let hub = Hub::new(scene.settings(), &listener).unwrap();
    let error = hub.resolve(RepoKind::Model, REPO, "main").unwrap_err();
    assert_eq!(error.to_string(), "interrupted");
    let told = listener.told();
    assert!(
        told.len() == 1 && told[0].contains("wait 290 seconds"),
        "{told:?}"
    );

    // Nobody waits for hours.
    scene.server.forgive();
    let hours = busy(429, &[("Retry-After", "7200")]);
    scene.server.fault("/api/", hours, ALWAYS);
    let before = scene.server.requests().len();
    let error = scene.hub().resolve(RepoKind::Model, REPO, "main");
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("429") && error.contains("wait 7200 seconds") && error.contains("HF_TOKEN"),
        "{error}"
    );
    assert_eq!(scene.server.requests().len(), before + 1);
}

#[test]
fn a_wait_in_words_we_do_not_read_is_no_wait() {
    let scene = plain();
    for header in [
        ("Retry-After", "Wed, 21 Oct 2015 07:28:00 GMT"),
        ("RateLimit", "\"api\";r=17;t=290"),
        ("Retry-After", "18446744073709551616"),
    ] {
        scene.server.fault("/api/", busy(429, &[header]), 1);
        let started = Instant::now();
        scene.hub().resolve(RepoKind::Model, REPO, "main").unwrap();
        assert!(started.elapsed() < Duration::from_secs(20));
    }
}

#[test]
fn a_file_of_another_commit_or_size_is_refused_before_it_is_fetched() {
    let other = "0123456789012345678901234567890123456789";
    for (header, value, expected) in [
        ("X-Repo-Commit", other.to_owned(), other),
        ("X-Linked-Size", "2400001".to_owned(), "2400001"),
        (
            "X-Linked-Etag",
            format!("\"{}\"", sha256(b"other")),
            "lists the hash",
        ),
    ] {
        let scene = plain();
        let fault = Fault::Header(header, value);
        scene.server.fault("/resolve/", fault, ALWAYS);
        let error = scene.fetch_error(WEIGHTS);
        assert!(error.contains(expected), "{error}");
        scene.assert_nothing_kept();
    }
}

#[test]
fn a_disabled_repository_and_unknown_refusals_say_what_the_hub_says() {
    let scene = plain();
    scene.server.gate("models/some/model", Gate::Disabled);
    let error = scene.hub().list(&scene.snapshot).unwrap_err().to_string();
    assert!(
        error.contains("Access to this resource is disabled"),
        "{error}"
    );

    // A sentence of the server can't bring anything to the terminal, nor show the token.
    scene.server.gate("models/some/model", Gate::Open);
    let says = format!("no \t for {TOKEN} {}", "x".repeat(5000));
    let refusal = busy(403, &[("X-Error-Message", &says)]);
    scene.server.fault("/api/", refusal, ALWAYS);
    let error = scene.with_token(TOKEN).list(&scene.snapshot).unwrap_err();
    let error = error.to_string();
    assert!(error.contains("no  for (token)"), "{error}");
    assert!(!error.contains(TOKEN) && error.len() < 700, "{error}");
}

#[test]
fn a_secret_on_an_open_line_is_told() {
    let cache = tempfile::tempdir().unwrap();
    let told = |endpoint: &str, token: Option<&str>| {
        let mut settings = HubSettings::new(cache.path());
        settings.endpoint = Some(endpoint.into());
        settings.token = token.map(str::to_owned);
        let listener = Listener::default();
        let hub = Hub::new(settings, &listener).unwrap();
        let shown = format!("{hub:?}");
        assert!(
            !shown.contains("hf_x") && !shown.contains("s3cret"),
            "{shown}"
        );
        listener.told()
    };
    let [open] = &told("http://mirror.example", Some("hf_x"))[..] else {
        panic!("not told once");
    };
    assert!(open.contains("without encryption") && open.contains("http://mirror.example"));
    for (endpoint, token) in [
        ("http://mirror.example", None),
        ("https://mirror.example", Some("hf_x")),
        ("http://127.0.0.1:1", Some("hf_x")),
        ("http://[::1]:1", Some("hf_x")),
        ("http://localhost:1", Some("hf_x")),
        ("https://me:s3cret@mirror.example", None),
    ] {
        assert_eq!(told(endpoint, token), Vec::<String>::new(), "{endpoint}");
    }
    let login = told("http://me:s3cret@mirror.example", None);
    assert!(
        login.len() == 1 && login[0].contains("HF_ENDPOINT"),
        "{login:?}"
    );
    assert!(!login[0].contains("s3cret"), "{login:?}");
    let both = told("https://me:s3cret@mirror.example", Some("hf_x"));
    assert!(
        both.len() == 1 && both[0].contains("instead of"),
        "{both:?}"
    );
}

#[test]
fn a_name_and_a_password_in_the_address_are_sent_and_never_shown() {
    let scene = plain();
    // printf 'me:s3/cr:et' | base64
    scene.server.login("bWU6czMvY3I6ZXQ=");
    let with = |login: &str| {
        let mut settings = scene.settings();
        let endpoint = scene.server.endpoint.replace("http://", login);
        settings.endpoint = Some(endpoint);
        settings
    };
    let hub = Hub::new(with("http://me:s3%2Fcr%3Aet@"), &()).unwrap();
    assert_eq!(
        hub.resolve(RepoKind::Model, REPO, "main").unwrap(),
        scene.snapshot.commit
    );
    for name in [WEIGHTS, "config.json"] {
        scene.fetch_by(&hub, name).unwrap();
    }
    let requests = scene.server.requests();
    assert!(requests.iter().filter(|asked| asked.cdn).count() == 1);
    assert!(
        requests
            .iter()
            .all(|asked| asked.authorization.is_none() == asked.cdn)
    );

    let hub = Hub::new(with("http://me:wr0ng@"), &()).unwrap();
    let error = format!(
        "{:#}",
        hub.resolve(RepoKind::Model, REPO, "main").unwrap_err()
    );
    assert!(
        error.contains("refuses the name and password") && !error.contains("wr0ng"),
        "{error}"
    );
    let hub = Hub::new(with("http://"), &()).unwrap();
    let error = format!(
        "{:#}",
        hub.resolve(RepoKind::Model, REPO, "main").unwrap_err()
    );
    assert!(error.contains("401"), "{error}");
}

#[test]
fn a_token_that_is_kept_back_is_named() {
    let scene = plain();
    scene.server.gate("models/some/model", Gate::Gated);
    let mut settings = scene.settings();
    settings.token_withheld = true;
    let hub = Hub::new(settings, &()).unwrap();
    let error = format!("{:#}", scene.fetch_by(&hub, WEIGHTS).unwrap_err());
    assert!(error.contains("HF_HUB_DISABLE_IMPLICIT_TOKEN"), "{error}");
}

#[test]
fn a_cache_without_links_holds_plain_files() {
    let scene = plain();
    let mut settings = scene.settings();
    settings.links = false;
    let hub = Hub::new(settings, &()).unwrap();
    for _ in 0..2 {
        let path = scene.fetch_by(&hub, WEIGHTS).unwrap();
        assert!(!path.is_symlink());
        assert_eq!(std::fs::read(path).unwrap(), weights());
    }
    assert_eq!(scene.bodies(WEIGHTS).len(), 1);
}
