//! The hub client against a hub on this machine, for each way in which the real one or something before it misbehaves.

mod manners;
mod mirrors;
mod proxies;
mod publishing;
mod refusals;
mod tls;

use std::path::{Path, PathBuf};
use std::time::Duration;

use pipeline::hub::{Hub, HubSettings, RemoteFile, RepoKind, Snapshot};
use tempfile::TempDir;

use crate::support::hub::alone::obey;
use crate::support::hub::{Fault, Gate, HubServer, TOKEN, git_sha1, sha256};

const ALWAYS: usize = usize::MAX;
const REPO: &str = "some/model";
const WEIGHTS: &str = "model.safetensors";

fn weights() -> Vec<u8> {
    (0..600_000_u32)
        .flat_map(|i| (i ^ (i >> 7)).to_le_bytes())
        .collect()
}

struct Scene {
    server: HubServer,
    cache: TempDir,
    snapshot: Snapshot,
}

/// A hub with one model of a small and a large file.
fn scene(server: HubServer) -> Scene {
    let commit = server.model(
        REPO,
        &[("config.json", b"{\"a\": 1}\n"), (WEIGHTS, &weights())],
    );
    Scene {
        server,
        cache: tempfile::tempdir().unwrap(),
        snapshot: model_at(&commit),
    }
}

fn model_at(commit: &str) -> Snapshot {
    Snapshot {
        kind: RepoKind::Model,
        repo: REPO.into(),
        commit: commit.into(),
    }
}

impl Scene {
    fn settings(&self) -> HubSettings {
        let mut settings = HubSettings::new(self.cache.path());
        settings.endpoint = Some(self.server.endpoint.clone());
        settings.retry_wait = Duration::from_millis(1);
        settings.timeout = Duration::from_secs(10);
        settings
    }

    fn hub(&self) -> Hub<'static> {
        Hub::new(self.settings(), &()).unwrap()
    }

    fn with_token(&self, token: &str) -> Hub<'static> {
        let mut settings = self.settings();
        settings.token = Some(token.into());
        Hub::new(settings, &()).unwrap()
    }

    fn offline(&self) -> Hub<'static> {
        let mut settings = self.settings();
        settings.offline = true;
        Hub::new(settings, &()).unwrap()
    }

    fn file(&self, hub: &Hub<'_>, name: &str) -> RemoteFile {
        let listing = hub.list(&self.snapshot).unwrap();
        listing
            .files
            .into_iter()
            .find(|file| file.path == name)
            .unwrap()
    }

    fn fetch(&self, name: &str) -> anyhow::Result<PathBuf> {
        self.fetch_by(&self.hub(), name)
    }

    fn fetch_by(&self, hub: &Hub<'_>, name: &str) -> anyhow::Result<PathBuf> {
        hub.fetch(&self.snapshot, &self.file(hub, name), &mut |_| Ok(()))
    }

    fn fetch_error(&self, name: &str) -> String {
        format!("{:#}", self.fetch(name).unwrap_err())
    }

    fn folder(&self) -> PathBuf {
        self.cache.path().join("models--some--model")
    }

    /// Nothing that could be taken for the file.
    fn assert_nothing_kept(&self) {
        assert!(
            !self
                .folder()
                .join("blobs")
                .join(sha256(&weights()))
                .exists()
        );
        assert!(
            !self
                .folder()
                .join("snapshots")
                .join(&self.snapshot.commit)
                .join(WEIGHTS)
                .exists()
        );
    }

    /// How often the body of `name` was asked for, with the first byte of each.
    fn bodies(&self, name: &str) -> Vec<Option<u64>> {
        let requests = self.server.requests().into_iter();
        let requests = requests.filter(|asked| {
            let file = asked.file.as_deref();
            file.is_some_and(|file| file.ends_with(name))
        });
        requests.map(|asked| asked.range).collect()
    }
}

fn plain() -> Scene {
    scene(HubServer::start())
}

#[test]
fn files_arrive_in_the_layout_that_other_programs_share() {
    let scene = plain();
    let hub = scene.hub();
    assert_eq!(
        hub.resolve(RepoKind::Model, REPO, "main").unwrap(),
        scene.snapshot.commit
    );
    hub.remember(&scene.snapshot, "main").unwrap();
    let mut last = 0;
    let file = scene.file(&hub, WEIGHTS);
    let path = hub
        .fetch(&scene.snapshot, &file, &mut |done| {
            last = done;
            Ok(())
        })
        .unwrap();
    assert_eq!(last, weights().len() as u64);
    assert_eq!(
        path,
        scene
            .folder()
            .join("snapshots")
            .join(&scene.snapshot.commit)
            .join(WEIGHTS)
    );
    assert_eq!(std::fs::read(&path).unwrap(), weights());
    let target = std::fs::read_link(&path).unwrap();
    assert_eq!(target, Path::new("../../blobs").join(sha256(&weights())));
    let config = scene.fetch("config.json").unwrap();
    let target = std::fs::read_link(config).unwrap();
    assert_eq!(
        target,
        Path::new("../../blobs").join(git_sha1(b"{\"a\": 1}\n"))
    );
    let kept = std::fs::read_to_string(scene.folder().join("refs/main")).unwrap();
    assert_eq!(kept, scene.snapshot.commit);

    // hf-hub's own reader finds it, too.
    let cache = hf_hub::Cache::new(scene.cache.path().to_path_buf());
    assert_eq!(cache.model(REPO.into()).get(WEIGHTS), Some(path));
}

#[test]
fn what_is_in_the_cache_is_not_fetched_again() {
    let scene = plain();
    scene.fetch(WEIGHTS).unwrap();
    let before = scene.server.requests().len();
    scene.fetch(WEIGHTS).unwrap();
    assert_eq!(scene.server.requests().len(), before);
}

#[test]
fn a_moving_branch_is_followed_and_a_commit_stays() {
    let scene = plain();
    let hub = scene.hub();
    let old = hub.resolve(RepoKind::Model, REPO, "main").unwrap();
    let new = scene.server.model(REPO, &[("config.json", b"{}")]);
    assert_ne!(old, new);
    assert_eq!(hub.resolve(RepoKind::Model, REPO, "main").unwrap(), new);
    let before = scene.server.requests().len();
    assert_eq!(hub.resolve(RepoKind::Model, REPO, &old).unwrap(), old);
    assert_eq!(
        scene.server.requests().len(),
        before,
        "a commit needs no network"
    );
    scene.fetch(WEIGHTS).unwrap();
}

#[test]
fn revisions_and_files_with_odd_names_are_reached() {
    let scene = plain();
    let commit = scene.server.commit(
        "models/some/model",
        "refs/pr/1",
        &[("a dir/b #1?.json", b"{}")],
    );
    let hub = scene.hub();
    assert_eq!(
        hub.resolve(RepoKind::Model, REPO, "refs/pr/1").unwrap(),
        commit
    );
    let snapshot = model_at(&commit);
    let listing = hub.list(&snapshot).unwrap();
    let path = hub
        .fetch(&snapshot, &listing.files[0], &mut |_| Ok(()))
        .unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"{}");
    assert!(
        std::fs::read_link(&path)
            .unwrap()
            .starts_with("../../../blobs")
    );
}

#[test]
fn datasets_have_their_own_address() {
    let scene = plain();
    let commit = scene
        .server
        .dataset("some/pairs", &[("data.jsonl", b"{}\n")]);
    let hub = scene.hub();
    let snapshot = Snapshot {
        kind: RepoKind::Dataset,
        repo: "some/pairs".into(),
        commit: hub
            .resolve(RepoKind::Dataset, "some/pairs", "main")
            .unwrap(),
    };
    assert_eq!(snapshot.commit, commit);
    let listing = hub.list(&snapshot).unwrap();
    let path = hub
        .fetch(&snapshot, &listing.files[0], &mut |_| Ok(()))
        .unwrap();
    assert!(path.starts_with(scene.cache.path().join("datasets--some--pairs/snapshots")));
}

#[test]
fn an_error_page_is_never_a_file() {
    for status in [404, 500, 403, 401] {
        let scene = plain();
        scene.file(&scene.hub(), WEIGHTS);
        scene.server.fault(
            "/resolve/",
            Fault::Page(status, "<html>no</html>".into()),
            ALWAYS,
        );
        let error = scene.fetch_error(WEIGHTS);
        assert!(
            error.contains(&status.to_string()) && error.contains(REPO),
            "{error}"
        );
        scene.assert_nothing_kept();
    }
}

#[test]
fn an_error_page_that_says_200_is_never_a_file() {
    let scene = plain();
    scene.server.fault(
        "/resolve/",
        Fault::Page(200, "<html>log in to the wifi</html>".into()),
        ALWAYS,
    );
    let error = scene.fetch_error(WEIGHTS);
    assert!(error.contains("announces"), "{error}");
    scene.assert_nothing_kept();
}

/// `tests/python/check_hub.py` gives the orders.
#[test]
#[ignore = "serves another program until standard input ends"]
fn serve_another_program() {
    let server = HubServer::start();
    println!("HUB {}", serde_json::json!({ "endpoint": server.endpoint }));
    for line in std::io::stdin().lines() {
        let done = match obey(&server, &line.unwrap()) {
            Ok(done) => done,
            Err(error) => serde_json::json!({ "error": error }),
        };
        println!("HUB {done}");
    }
}

#[test]
fn a_server_that_stumbles_once_is_asked_again() {
    let scene = plain();
    scene
        .server
        .fault("/resolve/", Fault::Page(503, "busy".into()), 2);
    scene
        .server
        .fault("/api/", Fault::Page(500, "busy".into()), 2);
    assert_eq!(
        std::fs::read(scene.fetch(WEIGHTS).unwrap()).unwrap(),
        weights()
    );
}

#[test]
fn a_cut_download_goes_on_where_it_ended() {
    let scene = plain();
    scene
        .server
        .fault("/resolve/", Fault::CutAfter(1_000_000), 1);
    assert_eq!(
        std::fs::read(scene.fetch(WEIGHTS).unwrap()).unwrap(),
        weights()
    );
    assert_eq!(scene.bodies(WEIGHTS), [None, Some(1_000_000)]);
}

#[test]
fn a_download_that_is_cut_each_time_still_ends() {
    let scene = plain();
    scene
        .server
        .fault("/resolve/", Fault::CutAfter(300_000), ALWAYS);
    assert_eq!(
        std::fs::read(scene.fetch(WEIGHTS).unwrap()).unwrap(),
        weights()
    );
    assert_eq!(scene.bodies(WEIGHTS).len(), weights().len() / 300_000);

    let scene = plain();
    scene.server.fault("/resolve/", Fault::CutAfter(0), ALWAYS);
    let error = scene.fetch_error(WEIGHTS);
    assert!(
        error.contains("broke off after 0 of 2400000 bytes"),
        "{error}"
    );
    scene.assert_nothing_kept();
}

#[test]
fn a_stopped_download_goes_on_in_the_next_process() {
    let scene = plain();
    let hub = scene.hub();
    let file = scene.file(&hub, WEIGHTS);
    let error = hub
        .fetch(&scene.snapshot, &file, &mut |done| {
            anyhow::ensure!(done < 700_000, "interrupted");
            Ok(())
        })
        .unwrap_err();
    assert_eq!(error.to_string(), "interrupted");
    scene.assert_nothing_kept();
    assert_eq!(
        std::fs::read(scene.fetch(WEIGHTS).unwrap()).unwrap(),
        weights()
    );
    let bodies = scene.bodies(WEIGHTS);
    assert_eq!(bodies.len(), 2);
    assert!(
        bodies[1].is_some_and(|start| start >= 700_000),
        "{bodies:?}"
    );
}

#[test]
fn a_damaged_beginning_is_thrown_away() {
    for left in [vec![9; 5000], vec![9; 2_400_000], vec![9; 3_000_000]] {
        let scene = plain();
        let blobs = scene.folder().join("blobs");
        std::fs::create_dir_all(&blobs).unwrap();
        let part = blobs.join(format!("{}.incomplete", sha256(&weights())));
        std::fs::write(&part, left).unwrap();
        assert_eq!(
            std::fs::read(scene.fetch(WEIGHTS).unwrap()).unwrap(),
            weights()
        );
        assert!(!part.exists());
    }
}

#[test]
fn a_server_without_ranges_does_no_harm() {
    for fault in [Fault::IgnoreRange, Fault::WrongRange] {
        let scene = plain();
        scene
            .server
            .fault("/resolve/", Fault::CutAfter(1_000_000), 1);
        scene.server.fault("/resolve/", fault, 1);
        assert_eq!(
            std::fs::read(scene.fetch(WEIGHTS).unwrap()).unwrap(),
            weights()
        );
    }
}

#[test]
fn wrong_content_is_fetched_once_more_and_never_kept() {
    let scene = plain();
    scene.server.fault("/resolve/", Fault::WrongBytes, 1);
    assert_eq!(
        std::fs::read(scene.fetch(WEIGHTS).unwrap()).unwrap(),
        weights()
    );

    let scene = plain();
    scene.server.fault("/resolve/", Fault::WrongBytes, ALWAYS);
    for name in [WEIGHTS, "config.json"] {
        let error = scene.fetch_error(name);
        assert!(error.contains("twice with the wrong content"), "{error}");
        assert_eq!(scene.bodies(name).len(), 2);
    }
    scene.assert_nothing_kept();
    let left = std::fs::read_dir(scene.folder().join("blobs"))
        .unwrap()
        .count();
    assert_eq!(left, 0);
}

#[test]
fn another_size_than_listed_is_an_error() {
    for fault in [Fault::Longer(3), Fault::LongerUnannounced(3)] {
        let scene = plain();
        scene.server.fault("/resolve/", fault.clone(), ALWAYS);
        let error = scene.fetch_error(WEIGHTS);
        assert!(
            error.contains("announces") || error.contains("sends more"),
            "{error}"
        );
        scene.assert_nothing_kept();
    }
}

#[test]
fn silence_counts_as_broken() {
    let scene = plain();
    let mut settings = scene.settings();
    settings.timeout = Duration::from_millis(300);
    let hub = Hub::new(settings, &()).unwrap();
    scene
        .server
        .fault("/resolve/", Fault::Silence(1_000_000), 1);
    let path = scene.fetch_by(&hub, WEIGHTS).unwrap();
    assert_eq!(std::fs::read(path).unwrap(), weights());
    assert_eq!(scene.bodies(WEIGHTS), [None, Some(1_000_000)]);
}

#[test]
fn bad_redirects_are_errors() {
    for fault in [Fault::RedirectNowhere, Fault::RedirectForever] {
        let scene = plain();
        scene.server.fault("/resolve/", fault, ALWAYS);
        let error = scene.fetch_error(WEIGHTS);
        assert!(error.contains("redirects"), "{error}");
        scene.assert_nothing_kept();
    }
}

#[test]
fn damage_in_the_cache_is_noticed_and_mended() {
    for name in [WEIGHTS, "config.json"] {
        let scene = plain();
        let path = scene.fetch(name).unwrap();
        let whole = std::fs::read(&path).unwrap();
        let mut bytes = whole.clone();
        bytes[3] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let offline = scene.offline();
        let file = scene.file(&offline, name);
        let copy = path.with_extension("copy");
        std::fs::copy(&path, &copy).unwrap();
        assert_eq!(std::fs::read(scene.fetch(name).unwrap()).unwrap(), whole);
        std::fs::copy(&copy, &path).unwrap();
        let error = offline
            .fetch(&scene.snapshot, &file, &mut |_| Ok(()))
            .unwrap_err();
        assert!(error.to_string().contains("damaged"), "{error}");
    }
}

#[test]
fn the_token_goes_to_the_hub_and_nowhere_else() {
    let scene = plain();
    scene.server.gate("models/some/model", Gate::Gated);
    let hub = scene.with_token(TOKEN);
    let path = scene.fetch_by(&hub, WEIGHTS).unwrap();
    assert_eq!(std::fs::read(path).unwrap(), weights());
    let requests = scene.server.requests();
    let (cdn, own): (Vec<_>, Vec<_>) = requests.iter().partition(|asked| asked.cdn);
    assert!(own.iter().all(|asked| asked.authorization.is_some()));
    assert_eq!(cdn.len(), 1);
    assert_eq!(cdn[0].authorization, None);
    assert!(!format!("{hub:?}").contains(TOKEN));
}

#[test]
fn a_cut_download_goes_on_behind_a_redirect() {
    let scene = plain();
    scene
        .server
        .fault("/xet-bridge-us/", Fault::CutAfter(1_000_000), 1);
    assert_eq!(
        std::fs::read(scene.fetch(WEIGHTS).unwrap()).unwrap(),
        weights()
    );
    let requests = scene
        .server
        .requests()
        .into_iter()
        .filter(|asked| asked.cdn);
    let ranges: Vec<_> = requests.map(|asked| asked.range).collect();
    assert_eq!(ranges, [None, Some(1_000_000)]);
}
