//! Recipes in git repositories that are reached by https, from a server on the loopback address with an authority of its own, and by ssh.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use super::{PREP, TEMPLATE, commit, git, main, rows};
use crate::support::program::Project;

/// A project with a repository beside it, in the folder `away`; gives its commit.
fn project() -> (Project, String) {
    let project = Project::empty();
    project.write("away/prep.yaml", PREP);
    project.write("away/data/pairs.jsonl", &rows(20));
    project.write("chat.jinja", TEMPLATE);
    git(&project.path("away"), &["init", "--quiet"]);
    // Servers give commits that no branch has any more where that is allowed, as the large ones do.
    git(
        &project.path("away"),
        &["config", "uploadpack.allowAnySHA1InWant", "true"],
    );
    let first = commit(&project, "away");
    (project, first)
}

/// A server of repositories by https, for as long as the test runs; gives its port and the certificate of its authority. With a password it
/// serves nobody who does not know it.
fn serve(repositories: PathBuf, password: Option<&'static str>) -> (u16, String) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let own = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let certificate = own.signed_by(&key, &authority).unwrap();
    let chain: Vec<CertificateDer<'static>> = vec![certificate.der().clone()];
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let connection = ServerConnection::new(Arc::clone(&config)).unwrap();
            // A client that does not trust the authority goes away.
            let _ = answer(
                StreamOwned::new(connection, stream),
                &repositories,
                password,
            );
        }
    });
    (port, authority.pem())
}

/// Answers one request by `git http-backend`.
fn answer(
    stream: StreamOwned<ServerConnection, TcpStream>,
    repositories: &Path,
    password: Option<&str>,
) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    stream.read_line(&mut line)?;
    let mut words = line.split_whitespace();
    let (method, target) = (
        words.next().unwrap_or_default(),
        words.next().unwrap_or_default(),
    );
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line)?;
        let Some((name, value)) = line.trim().split_once(':') else {
            break;
        };
        headers.insert(name.to_lowercase(), value.trim().to_owned());
    }
    let header = |name: &str| headers.get(name).cloned().unwrap_or_default();
    if password.is_some_and(|password| header("authorization") != format!("Basic {password}")) {
        let refusal = "HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"x\"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
        return stream.get_mut().write_all(refusal.as_bytes());
    }
    let length: u64 = header("content-length").parse().unwrap_or(0);
    let mut body = Vec::new();
    (&mut stream).take(length).read_to_end(&mut body)?;
    let mut backend = Command::new("git")
        .arg("http-backend")
        .env("GIT_PROJECT_ROOT", repositories)
        .env("GIT_HTTP_EXPORT_ALL", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("REQUEST_METHOD", method)
        .env("PATH_INFO", path)
        .env("QUERY_STRING", query)
        .env("CONTENT_TYPE", header("content-type"))
        .env("CONTENT_LENGTH", length.to_string())
        .env("HTTP_CONTENT_ENCODING", header("content-encoding"))
        .env("GIT_PROTOCOL", header("git-protocol"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    backend.stdin.take().unwrap().write_all(&body)?;
    let output = backend.wait_with_output()?;
    let end = output
        .stdout
        .windows(4)
        .position(|four| four == b"\r\n\r\n")
        .unwrap();
    let head = String::from_utf8_lossy(&output.stdout[..end]).into_owned();
    let status = head.lines().find_map(|line| line.strip_prefix("Status: "));
    let length = output.stdout.len() - end - 4;
    let stream = stream.get_mut();
    let status = status.unwrap_or("200 OK");
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n{head}\r\n\r\n"
    )?;
    stream.write_all(&output.stdout[end + 4..])?;
    stream.conn.send_close_notify();
    stream.flush()
}

#[test]
fn a_recipe_comes_by_https_from_a_server_that_is_trusted() {
    let (mut project, first) = project();
    let (port, authority) = serve(project.path(""), None);
    let source = format!("git+https://localhost:{port}/away@main#prep.yaml");
    project.write("r.yaml", &main(&source));
    // Whose authority nobody knows is not believed.
    project.refuses(&["plan", "r.yaml"], "could not be had: git failed");
    project.write("authority.pem", &authority);
    let bundle = project.path("authority.pem").display().to_string();
    project.variable("GIT_SSL_CAINFO", &bundle);
    project.succeeds(&["lock", "r.yaml"]);
    assert!(project.read("r.yaml.lock").contains(&first));
    assert_eq!(
        project.ran(&["r.yaml", "--locked"]),
        ["chats", "prep.pairs", "prep.split"]
    );
    // What is pinned is had by its commit, also when the branch went on and nothing of it is in the cache.
    project.write(
        "away/prep.yaml",
        &PREP.replace("pairs, test", "pairs, seed: 9, test"),
    );
    let second = commit(&project, "away");
    fs::remove_dir_all(project.path("home/.cache/pipeline/recipes")).unwrap();
    let nothing: [&str; 0] = [];
    assert_eq!(project.ran(&["r.yaml", "--locked"]), nothing);
    project.succeeds(&["lock", "r.yaml", "--update"]);
    assert!(project.read("r.yaml.lock").contains(&second));
    // Without a network it is in the cache.
    project.variable("GIT_SSL_CAINFO", "/nonexistent");
    assert_eq!(
        project.ran(&["r.yaml", "--offline"]),
        ["chats", "prep.split"]
    );
    project.write("r.yaml", &main(&source.replace("away", "none")));
    project.variable("GIT_SSL_CAINFO", &bundle);
    project.refuses(&["plan", "r.yaml"], "could not be had: git failed");
}

#[test]
fn a_private_repository_asks_the_credential_helper_and_nobody_else() {
    let (mut project, _) = project();
    // `user` and `word`, as a browser would say it.
    let (port, authority) = serve(project.path(""), Some("dXNlcjp3b3Jk"));
    project.write("authority.pem", &authority);
    let bundle = project.path("authority.pem").display().to_string();
    project.variable("GIT_SSL_CAINFO", &bundle);
    let source = format!("git+https://localhost:{port}/away#prep.yaml");
    project.write("r.yaml", &main(&source));
    // It fails, and waits for no answer.
    project.refuses(&["plan", "r.yaml"], "could not be had: git failed");
    project.write(
        "home/.gitconfig",
        "[credential]\n\thelper = \"!f() { echo username=user; echo password=word; }; f\"\n",
    );
    assert_eq!(
        project.ran(&["r.yaml"]),
        ["chats", "prep.pairs", "prep.split"]
    );
}

#[test]
fn a_recipe_comes_by_ssh() {
    let (mut project, first) = project();
    // What `ssh` would start on the other machine, and nothing else that git or an address might make of it.
    project.write(
        "ssh",
        "#!/bin/sh\n[ \"$1\" = -G ] && exit 0\necho \"$*\" >>\"$HOME/calls\"\nwhile [ $# -gt 2 ]; do\n  case $1 in -o | -p) shift 2 ;; *) exit \
         9 ;; esac\ndone\n[ \"$1\" = git@example.test ] || exit 8\ncase $2 in \"git-upload-pack '/\"*\"'\") exec sh -c \"$2\" ;; esac\nexit 7\n",
    );
    fs::set_permissions(project.path("ssh"), fs::Permissions::from_mode(0o755)).unwrap();
    let ssh = project.path("ssh").display().to_string();
    project.variable("GIT_SSH_COMMAND", &ssh);
    let path = project.path("away").display().to_string();
    project.write(
        "r.yaml",
        &main(&format!(
            "git+ssh://git@example.test:2222{path}@main#prep.yaml"
        )),
    );
    project.succeeds(&["lock", "r.yaml"]);
    assert!(project.read("r.yaml.lock").contains(&first));
    assert_eq!(
        project.ran(&["r.yaml", "--locked"]),
        ["chats", "prep.pairs", "prep.split"]
    );
    let calls = project.read("home/calls");
    assert!(
        calls.contains("-p 2222") && calls.contains("git-upload-pack"),
        "{calls}"
    );
    // Another user is another address, and refused there.
    project.write(
        "r.yaml",
        &main(&format!("git+ssh://root@example.test{path}@main#prep.yaml")),
    );
    project.refuses(&["plan", "r.yaml"], "could not be had: git failed");
}
