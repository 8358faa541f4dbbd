//! Putting files on a hub that refuses what the real one refuses.

use pipeline::hub::{Contents, NewFile, Publication, Pushed};

use super::*;
use crate::support::hub::READER;

const NEW: &str = "me/new-model";
const KEPT: &str = "models/me/new-model";

fn file(path: &str, bytes: &[u8]) -> NewFile {
    NewFile {
        path: path.into(),
        contents: Contents::Bytes(bytes.to_vec()),
    }
}

fn card(license: &str) -> NewFile {
    let text = format!("---\nlicense: {license}\ntags: [x]\n---\n# A model\n");
    file("README.md", text.as_bytes())
}

fn publication(files: Vec<NewFile>) -> Publication {
    Publication {
        kind: RepoKind::Model,
        repo: NEW.into(),
        branch: None,
        private: false,
        create_pr: false,
        message: "Upload".into(),
        files,
        replaces: vec![
            ("model", ".safetensors"),
            ("model", ".safetensors.index.json"),
        ],
    }
}

fn model() -> Publication {
    publication(vec![
        file("config.json", b"{\"a\": 1}\n"),
        file("empty.txt", b""),
        file(WEIGHTS, &weights()),
        card("mit"),
    ])
}

fn push(hub: &Hub<'_>, publication: &Publication) -> anyhow::Result<Pushed> {
    hub.publish(publication, &mut |_, _, _| {})
}

fn error(hub: &Hub<'_>, publication: &Publication) -> String {
    format!("{:#}", push(hub, publication).unwrap_err())
}

impl Scene {
    /// The bodies that large files were sent in.
    fn puts(&self) -> usize {
        let requests = self.server.requests();
        requests
            .iter()
            .filter(|asked| asked.method == "PUT")
            .count()
    }
}

#[test]
fn files_arrive_and_what_is_there_is_not_sent_again() {
    let scene = plain();
    let hub = scene.with_token(TOKEN);
    let pushed = push(&hub, &model()).unwrap();
    assert_eq!(
        pushed.changed,
        ["config.json", "empty.txt", WEIGHTS, "README.md"]
    );
    assert_eq!(pushed.sent, weights().len() as u64);
    assert!(pushed.url.contains(&pushed.commit));
    let files = scene.server.files(KEPT, "main").unwrap();
    assert_eq!(files[WEIGHTS], weights());
    assert_eq!(files["empty.txt"], b"");
    assert!(files.contains_key(".gitattributes"));
    assert_eq!(
        hub.resolve(RepoKind::Model, NEW, "main").unwrap(),
        pushed.commit
    );

    let again = push(&hub, &model()).unwrap();
    assert_eq!(
        (again.changed.len(), again.unchanged.len(), again.sent),
        (0, 4, 0)
    );
    assert_eq!(again.commit, pushed.commit);
    assert_eq!((scene.puts(), scene.server.commits(KEPT)), (1, 2));

    let mut changed = model();
    changed.files[0] = file("config.json", b"{\"a\": 2}\n");
    let pushed = push(&hub, &changed).unwrap();
    assert_eq!(pushed.changed, ["config.json"]);
    assert_eq!(scene.puts(), 1);
}

#[test]
fn large_files_go_in_parts_and_weights_of_before_go() {
    let scene = plain();
    let hub = scene.with_token(TOKEN);
    push(
        &hub,
        &publication(vec![
            file("model-00001-of-00002.safetensors", &weights()[..1000]),
            file("model-00002-of-00002.safetensors", &weights()[1000..3000]),
            file("model.safetensors.index.json", b"{}"),
            file("notes.safetensors", &weights()[..10]),
        ]),
    )
    .unwrap();
    scene.server.multipart(1_000_000, 1_000_000);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights");
    std::fs::write(&path, weights()).unwrap();
    let mut publication = model();
    publication.files[2].contents = Contents::File(path);
    let mut told = Vec::new();
    let pushed = hub
        .publish(&publication, &mut |path, done, size| {
            assert!(done <= size);
            if path == WEIGHTS {
                told.push(done);
            }
        })
        .unwrap();
    assert_eq!(
        pushed.removed,
        [
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json"
        ]
    );
    let files = scene.server.files(KEPT, "main").unwrap();
    assert_eq!(files[WEIGHTS], weights());
    assert!(
        files.contains_key("notes.safetensors")
            && !files.contains_key("model.safetensors.index.json")
    );
    // 2.4 MB in parts of 1 MB.
    assert_eq!(scene.puts(), 3 + 3);
    assert!(told.is_sorted() && *told.last().unwrap() > 2_000_000);
}

#[test]
fn what_breaks_is_tried_again_and_a_second_run_goes_on() {
    let scene = plain();
    scene.server.multipart(1_000_000, 1_000_000);
    let hub = scene.with_token(TOKEN);
    let busy = || Fault::Busy(503, Vec::new());
    for path in [
        "/preupload/",
        "partNumber=2",
        "objects/batch",
        "complete_multipart",
        "lfs-verify",
        "/commit/",
    ] {
        scene.server.fault(path, busy(), 2);
    }
    push(&hub, &model()).unwrap();
    assert_eq!(
        scene.server.files(KEPT, "main").unwrap()[WEIGHTS],
        weights()
    );

    // It ends before its commit: the large file is in the store already.
    let mut other = model();
    other.repo = "me/other".into();
    other.files[2] = file(WEIGHTS, &weights()[4..]);
    scene.server.fault("/commit/", busy(), ALWAYS);
    let said = error(&hub, &other);
    assert!(said.contains("503"), "{said}");
    scene.server.forgive();
    let puts = scene.puts();
    let pushed = push(&hub, &other).unwrap();
    assert_eq!((pushed.sent, scene.puts()), (0, puts));
    assert_eq!(
        scene.server.files("models/me/other", "main").unwrap()[WEIGHTS],
        &weights()[4..]
    );
}

#[test]
fn a_commit_of_somebody_else_in_between_is_kept() {
    let scene = plain();
    let hub = scene.with_token(TOKEN);
    push(&hub, &publication(vec![file("config.json", b"1")])).unwrap();
    // When the first commit is refused, the second looks again.
    scene
        .server
        .fault("/commit/", Fault::Busy(412, Vec::new()), 1);
    push(&hub, &publication(vec![file("config.json", b"2")])).unwrap();
    assert_eq!(
        scene.server.files(KEPT, "main").unwrap()["config.json"],
        b"2"
    );
    scene
        .server
        .fault("/commit/", Fault::Busy(412, Vec::new()), ALWAYS);
    let said = error(&hub, &publication(vec![file("config.json", b"3")]));
    assert!(said.contains("others keep changing"), "{said}");
}

#[test]
fn private_means_private_or_nothing_is_sent() {
    let scene = plain();
    let hub = scene.with_token(TOKEN);
    let mut private = model();
    private.private = true;
    push(&hub, &private).unwrap();
    assert!(scene.server.is_private(KEPT));

    // One that is open already.
    let mut open = model();
    open.repo = "me/open".into();
    push(&hub, &open).unwrap();
    open.private = true;
    let puts = scene.puts();
    let said = error(&hub, &open);
    assert!(said.contains("open to everybody"), "{said}");

    // A hub that does not know the word.
    scene.server.ignore_private();
    let mut ignored = model();
    ignored.private = true;
    ignored.repo = "me/ignored".into();
    ignored.files[2] = file(WEIGHTS, b"secret weights");
    let said = error(&hub, &ignored);
    assert!(said.contains("open to everybody"), "{said}");
    assert_eq!(scene.puts(), puts);
    assert_eq!(
        scene
            .server
            .files("models/me/ignored", "main")
            .unwrap()
            .len(),
        1
    );
}

#[test]
fn branches_are_made_and_changes_can_be_proposed() {
    let scene = plain();
    let hub = scene.with_token(TOKEN);
    let mut publication = model();
    publication.branch = Some("v1/beta".into());
    push(&hub, &publication).unwrap();
    assert!(
        scene
            .server
            .files(KEPT, "v1/beta")
            .unwrap()
            .contains_key(WEIGHTS)
    );
    assert_eq!(scene.server.files(KEPT, "main").unwrap().len(), 1);

    // Who may only read can propose.
    let reader = scene.with_token(READER);
    let mut proposal = publication.clone();
    proposal.branch = None;
    proposal.create_pr = true;
    let pushed = push(&reader, &proposal).unwrap();
    assert!(pushed.pull_request.unwrap().ends_with("/discussions/1"));
    assert!(
        scene
            .server
            .files(KEPT, "refs/pr/1")
            .unwrap()
            .contains_key(WEIGHTS)
    );
    assert_eq!(scene.server.files(KEPT, "main").unwrap().len(), 1);
}

#[test]
fn refusals_say_what_to_do() {
    let scene = plain();
    let offline = scene.offline();
    assert!(error(&offline, &model()).contains("--offline"));
    let said = error(&scene.hub(), &model());
    assert!(said.contains("HF_TOKEN"), "{said}");
    let said = error(&scene.with_token("hf_wrong_token"), &model());
    assert!(
        said.contains("(401)") && !said.contains("hf_wrong_token"),
        "{said}"
    );
    let said = error(&scene.with_token(READER), &model());
    assert!(said.contains("write"), "{said}");
    let hub = scene.with_token(TOKEN);
    let mut theirs = model();
    theirs.repo = "openai/model".into();
    let said = error(&hub, &theirs);
    assert!(said.contains("(403)") && said.contains("openai"), "{said}");
    let mut card_with_odd_license = model();
    card_with_odd_license.files[3] = card("mine");
    let said = error(&hub, &card_with_odd_license);
    assert!(said.contains("license") && scene.puts() == 0, "{said}");
    for repo in ["model", "a/b/c", "../x"] {
        let mut odd = model();
        odd.repo = repo.into();
        push(&hub, &odd).unwrap_err();
    }
    let mut escaping = model();
    escaping.files[0].path = "../config.json".into();
    push(&hub, &escaping).unwrap_err();

    // A file that the repository leaves out.
    push(
        &hub,
        &publication(vec![file(".gitignore", b"config.json\n")]),
    )
    .unwrap();
    let said = error(&hub, &model());
    assert!(said.contains(".gitignore"), "{said}");

    // Nothing of it goes to another machine without encryption.
    let mut settings = scene.settings();
    settings.endpoint = Some("http://hub.example".into());
    settings.token = Some(TOKEN.into());
    let open = Hub::new(settings, &()).unwrap();
    assert!(error(&open, &model()).contains("without encryption"));
}

#[test]
fn the_token_stays_with_the_hub_while_files_are_sent() {
    let scene = plain();
    scene.server.multipart(1_000_000, 1_000_000);
    push(&scene.with_token(TOKEN), &model()).unwrap();
    let requests = scene.server.requests();
    assert!(requests.iter().filter(|asked| asked.cdn).count() == 3);
    assert!(
        requests
            .iter()
            .filter(|asked| asked.cdn)
            .all(|asked| asked.authorization.is_none())
    );
}
