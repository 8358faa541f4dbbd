//! https, with an authority made here: whom the program trusts, and what it says when it does not.

use std::fs;
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use super::*;
use crate::support::program::Project;

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority() -> Authority {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// A certificate of `authority` for `name`; `edit` changes what it says.
fn certificate(
    authority: &Authority,
    name: &str,
    edit: impl FnOnce(&mut CertificateParams),
) -> ServerConfig {
    let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
    edit(&mut params);
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, authority).unwrap();
    let chain: Vec<CertificateDer<'static>> = vec![certificate.der().clone()];
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap()
}

/// A hub by https with one model, whose certificate is for `name` and whose address is at `host`.
fn hub(authority: &Authority, name: &str, host: &str) -> Scene {
    scene(HubServer::start_tls(
        certificate(authority, name, |_| {}),
        host,
    ))
}

/// A file with the authority's certificate.
fn bundle(scene: &Scene, authority: &Authority) -> PathBuf {
    let path = scene.cache.path().join("authority.pem");
    fs::write(&path, authority.pem()).unwrap();
    path
}

fn resolved(scene: &Scene, trusted: Option<(&'static str, PathBuf)>) -> Result<String, String> {
    let mut settings = scene.settings();
    settings.authorities = trusted;
    let hub = Hub::new(settings, &()).map_err(|error| format!("{error:#}"))?;
    let commit = hub.resolve(RepoKind::Model, REPO, "main");
    commit.map_err(|error| format!("{error:#}"))
}

#[test]
fn a_trusted_authority_opens_the_hub_and_its_other_host() {
    let authority = authority();
    let scene = hub(&authority, "localhost", "localhost");
    let bundle = bundle(&scene, &authority);
    let mut settings = scene.settings();
    settings.authorities = Some(("SSL_CERT_FILE", bundle.clone()));
    let hub = Hub::new(settings, &()).unwrap();
    assert_eq!(
        hub.resolve(RepoKind::Model, REPO, "main").unwrap(),
        scene.snapshot.commit
    );
    for name in [WEIGHTS, "config.json"] {
        scene.fetch_by(&hub, name).unwrap();
    }
    // A folder of certificates serves, too.
    let folder = scene.cache.path().join("authorities");
    fs::create_dir(&folder).unwrap();
    fs::copy(&bundle, folder.join("corp.pem")).unwrap();
    resolved(&scene, Some(("SSL_CERT_DIR", folder))).unwrap();
}

#[test]
fn who_is_not_trusted_is_told_apart() {
    let authority = authority();
    let scene = hub(&authority, "localhost", "localhost");
    let error = resolved(&scene, None).unwrap_err();
    assert!(
        error.contains("not trusted here") && error.contains("SSL_CERT_FILE"),
        "{error}"
    );
    assert_eq!(scene.server.requests().len(), 0, "nothing was asked for");
    let stranger = self::authority();
    let theirs = bundle(&scene, &stranger);
    let error = resolved(&scene, Some(("SSL_CERT_FILE", theirs))).unwrap_err();
    assert!(error.contains("not trusted here"), "{error}");

    let elsewhere = hub(&authority, "mirror.example", "localhost");
    let ours = bundle(&elsewhere, &authority);
    let error = resolved(&elsewhere, Some(("SSL_CERT_FILE", ours))).unwrap_err();
    assert!(error.contains("is for another host"), "{error}");

    let old = certificate(&authority, "localhost", |params| {
        params.not_before = rcgen::date_time_ymd(2001, 1, 1);
        params.not_after = rcgen::date_time_ymd(2002, 1, 1);
    });
    let old = self::scene(HubServer::start_tls(old, "localhost"));
    let ours = bundle(&old, &authority);
    let error = resolved(&old, Some(("SSL_CERT_FILE", ours))).unwrap_err();
    assert!(error.contains("has expired"), "{error}");
}

#[test]
fn a_bundle_that_is_none_is_named() {
    let authority = authority();
    let scene = hub(&authority, "localhost", "localhost");
    let none = scene.cache.path().join("none.pem");
    let error = resolved(&scene, Some(("CURL_CA_BUNDLE", none.clone()))).unwrap_err();
    assert!(
        error.contains("`CURL_CA_BUNDLE`") && error.contains("none.pem"),
        "{error}"
    );
    fs::write(&none, "no certificate").unwrap();
    let error = resolved(&scene, Some(("REQUESTS_CA_BUNDLE", none))).unwrap_err();
    assert!(error.contains("holds no certificate"), "{error}");
}

#[test]
fn the_program_trusts_what_the_variable_names() {
    let authority = authority();
    let scene = hub(&authority, "localhost", "localhost");
    let rows = b"{\"prompt\":\"a\",\"chosen\":\"b\",\"rejected\":\"c\"}\n";
    scene.server.dataset("some/pairs", &[("train.jsonl", rows)]);
    let bundle = bundle(&scene, &authority);
    let mut project = Project::empty();
    project.write(
        "recipe.yaml",
        "version: 1\nstages:\n  pairs: { download_dataset: { repo: some/pairs } }\n",
    );
    project.variable("HF_ENDPOINT", &scene.server.endpoint);
    let ended = project.run(&["run", "recipe.yaml"]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains("SSL_CERT_FILE"), "{}", ended.stderr);
    for variable in ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"] {
        let mut project = Project::empty();
        project.write(
            "recipe.yaml",
            "version: 1\nstages:\n  pairs: { download_dataset: { repo: some/pairs } }\n",
        );
        project.variable("HF_ENDPOINT", &scene.server.endpoint);
        project.variable(variable, bundle.to_str().unwrap());
        project.succeeds(&["run", "recipe.yaml"]);
    }
}
