//! `login`, `logout`, `whoami` and `doctor`, against a hub on this machine.

use std::os::unix::fs::PermissionsExt as _;

use serde_json::Value;

use crate::support::hub::{HubServer, TOKEN};
use crate::support::program::Project;

fn project(server: &HubServer) -> Project {
    let mut project = Project::empty();
    project.variable("HF_ENDPOINT", &server.endpoint);
    project
}

#[test]
fn a_token_is_kept_where_other_programs_keep_it() {
    let server = HubServer::start();
    let mut project = project(&server);
    let nobody = project.run(&["whoami"]);
    assert!(
        nobody.code == Some(1) && nobody.stderr.contains("pipeline login"),
        "{}",
        nobody.stderr
    );
    let wrong = project.with_input(&["login"], "hf_wrong\n");
    assert!(
        wrong.code == Some(1) && wrong.stderr.contains("does not know this token"),
        "{}",
        wrong.stderr
    );
    assert!(!wrong.stderr.contains("hf_wrong"));
    for bad in ["", "api_org_x"] {
        assert_eq!(project.with_input(&["login"], bad).code, Some(2));
    }
    assert!(!project.path("home/.cache/huggingface/token").exists());

    let ended = project.with_input(&["login"], &format!("{TOKEN}\n"));
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(
        ended.stdout.contains("as `somebody`") && !ended.stdout.contains(TOKEN),
        "{}",
        ended.stdout
    );
    let kept = "home/.cache/huggingface/token";
    assert_eq!(project.read(kept), TOKEN);
    let stored = project.read("home/.cache/huggingface/stored_tokens");
    assert_eq!(stored, format!("[laptop]\nhf_token = {TOKEN}\n\n"));
    let mode = std::fs::metadata(project.path(kept))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let who: Value = serde_json::from_str(&project.succeeds(&["whoami", "--json"])).unwrap();
    assert_eq!(who["account"]["name"], "somebody");
    assert_eq!(who["account"]["token_name"], "laptop");
    assert!(
        project
            .succeeds(&["whoami"])
            .contains("organisations: some\n")
    );

    let unknown = project.run(&["logout", "desktop"]);
    assert!(
        unknown.code == Some(2) && unknown.stderr.contains("kept are laptop"),
        "{}",
        unknown.stderr
    );
    project.succeeds(&["logout", "laptop"]);
    assert!(!project.path(kept).exists());
    project.succeeds(&["login", "--token", TOKEN]);
    project.succeeds(&["logout"]);
    assert!(
        !project
            .path("home/.cache/huggingface/stored_tokens")
            .exists()
    );
    assert!(project.succeeds(&["logout"]).contains("no token was kept"));

    project.variable("HF_TOKEN", TOKEN);
    assert!(
        project
            .succeeds(&["whoami"])
            .contains("from the variable HF_TOKEN")
    );
    let ended = project.run(&["logout"]);
    assert!(
        ended.stderr.contains("HF_TOKEN is still set"),
        "{}",
        ended.stderr
    );
    project.variable("HF_HUB_OFFLINE", "1");
    assert!(project.run(&["whoami"]).stderr.contains("forbids"));
}

fn doctor(project: &Project, arguments: &[&str]) -> (Option<i32>, Value) {
    let ended = project.run(&[&["doctor", "--json"], arguments].concat());
    let findings =
        serde_json::from_str(&ended.stdout).unwrap_or_else(|_| panic!("{}", ended.stderr));
    (ended.code, findings)
}

fn finding<'a>(findings: &'a Value, what: &str) -> &'a Value {
    let mut all = findings.as_array().unwrap().iter();
    all.find(|finding| finding["what"] == what)
        .unwrap_or_else(|| panic!("{findings}"))
}

#[test]
fn a_doctor_tells_what_is_there_and_what_to_do() {
    let server = HubServer::start();
    let mut project = project(&server);
    let (code, findings) = doctor(&project, &[]);
    assert_eq!(code, Some(0), "{findings}");
    for what in [
        "program",
        "processor",
        "memory",
        "disk",
        "store",
        "recipe",
        "hub cache",
        "hub",
        "token",
        "remote",
    ] {
        assert!(finding(&findings, what)["found"].is_string(), "{findings}");
    }
    assert_eq!(finding(&findings, "hub")["level"], "ok");
    assert!(
        finding(&findings, "token")["found"]
            .as_str()
            .unwrap()
            .starts_with("none")
    );
    assert!(
        finding(&findings, "recipe")["advice"]
            .as_str()
            .unwrap()
            .contains("pipeline init")
    );

    project.variable("HF_TOKEN", TOKEN);
    project.variable("HTTPS_PROXY", "http://me:secret@proxy.example:3128");
    project.write("rows.jsonl", "{\"prompt\": \"a\", \"chosen\": \"b\"}\n");
    project.write(
        "pipeline.yaml",
        "version: 1\nstages:\n  rows: { import_dataset: { path: rows.jsonl } }\n",
    );
    project.succeeds(&["run"]);
    let (code, findings) = doctor(&project, &["--verify"]);
    assert_eq!(code, Some(0), "{findings}");
    assert!(
        finding(&findings, "token")["found"]
            .as_str()
            .unwrap()
            .contains("somebody")
    );
    assert!(
        finding(&findings, "store")["found"]
            .as_str()
            .unwrap()
            .starts_with("1 results")
    );
    let proxies = finding(&findings, "proxies")["found"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(
        proxies.contains("proxy.example") && !proxies.contains("secret"),
        "{proxies}"
    );

    // What was altered is found.
    let artifacts = std::fs::read_dir(project.path(".pipeline/v1/artifacts")).unwrap();
    let artifact = artifacts
        .map(|entry| entry.unwrap().path())
        .find(|path| path.is_dir())
        .unwrap();
    let file = artifact.join("train.parquet");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
    std::fs::write(&file, "other").unwrap();
    let (_, findings) = doctor(&project, &[]);
    assert_eq!(
        finding(&findings, "store")["level"],
        "warning",
        "{findings}"
    );

    project.variable("HF_TOKEN", "hf_wrong");
    let (code, findings) = doctor(&project, &[]);
    assert_eq!(
        (code, &finding(&findings, "token")["level"]),
        (Some(1), &Value::from("error")),
        "{findings}"
    );
    project.variable("HF_ENDPOINT", "http://127.0.0.1:1");
    project.variable(
        "PIPELINE_REMOTE",
        project.path("shared").to_str().unwrap().to_owned().as_str(),
    );
    let (code, findings) = doctor(&project, &[]);
    assert_eq!(
        (code, &finding(&findings, "hub")["level"]),
        (Some(0), &Value::from("warning")),
        "{findings}"
    );
    assert!(
        finding(&findings, "remote")["found"]
            .as_str()
            .unwrap()
            .contains("shared"),
        "{findings}"
    );
    let ended = project.run(&["doctor", "--offline"]);
    assert!(
        ended.stdout.contains("ok       hub          not asked"),
        "{}",
        ended.stdout
    );
}
