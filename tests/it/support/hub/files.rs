//! Files: the address that everybody knows (`/owner/name/resolve/revision/file`), and where it leads to. Small files are
//! behind a redirect within the hub; large ones behind a signed address on another host.

use std::io::Write as _;
use std::sync::Arc;

use flate2::Compression;
use flate2::write::GzEncoder;

use super::api::{Place, at, check_token, find, is_hidden};
use super::wire::{Answer, Request, escape, pairs, unescape};
use super::{Gate, State, Stored, TOKEN, sha256};

const SIGNATURE: &str = "a1b2c3";

/// Answers for addresses that are no API's.
pub(super) fn answer(state: &State, request: &Request) -> Answer {
    let path = request.path();
    let cached = path.strip_prefix("/api/resolve-cache/");
    let (repo, rest) = match cached {
        Some(rest) => {
            let mut parts = rest.splitn(4, '/');
            let mut next = || parts.next().unwrap_or_default();
            (
                format!("{}/{}/{}", next(), next(), next()),
                next().to_owned(),
            )
        }
        None => match path.trim_start_matches('/').split_once("/resolve/") {
            Some((repo, rest)) if repo.starts_with("datasets/") => {
                (repo.to_owned(), rest.to_owned())
            }
            Some((repo, rest)) => (format!("models/{repo}"), rest.to_owned()),
            None => return Answer::text(404, "<html>no such page</html>"),
        },
    };
    if !["GET", "HEAD"].contains(&request.method.as_str()) {
        return Answer::text(405, "Method Not Allowed").with("Allow", "GET, HEAD");
    }
    if request.method == "HEAD" && state.mirror.no_head {
        return Answer::text(405, "Method Not Allowed").with("Allow", "GET");
    }
    if let Err(refusal) = check_token(state, request) {
        return refusal;
    }
    let (revision, file) = rest.split_once('/').unwrap_or((&rest, ""));
    let (Some(revision), Some(file)) = (unescape(revision), unescape(file)) else {
        return Answer::error(400, "", "Malformed address");
    };
    let repository = match find(state, request, &repo) {
        Place::Here(repository) => repository,
        Place::Moved(new) => {
            let public = |repo: &str| repo.strip_prefix("models/").unwrap_or(repo).to_owned();
            let target = request.target.replacen(&public(&repo), &public(new), 1);
            return Answer::redirect(307, &target);
        }
        Place::Nowhere => return is_hidden(request),
    };
    let name = repo.split_once('/').map_or("", |(_, name)| name);
    match (repository.gate, token(state, request)) {
        (Gate::Gated, Some(TOKEN)) | (Gate::Open | Gate::Private | Gate::Disabled, _) => {}
        (Gate::Refused, Some(TOKEN)) => {
            let message = format!(
                "Access to model {name} is restricted and you are not in the authorized list. Visit \
                 {}/{name} to ask for access.",
                state.endpoint
            );
            return Answer::error(403, "GatedRepo", &message);
        }
        (_, _) => {
            let message = format!(
                "Access to model {name} is restricted. You must have access to it and be authenticated to access it. Please \
                 log in."
            );
            return Answer::error(401, "GatedRepo", &message);
        }
    }
    let Some((commit, files)) = at(repository, &revision) else {
        return Answer::error(
            404,
            "RevisionNotFound",
            &format!("Invalid rev id: {revision}"),
        );
    };
    let Some(stored) = files.get(&file) else {
        return Answer::error(404, "EntryNotFound", "Entry not found")
            .with("X-Repo-Commit", commit);
    };
    if cached.is_some() {
        let about = pairs(request.query()).unwrap_or_default();
        let about = about.iter().find(|(name, _)| name.starts_with('/'));
        let Some((about, _)) = about else {
            return Answer::error(400, "", "Malformed address");
        };
        return content(state, request, stored, about).with("X-Repo-Commit", commit);
    }
    if state.mirror.no_redirects {
        return content(state, request, stored, path).with("X-Repo-Commit", commit);
    }
    let etag = stored.etag();
    if stored.large {
        let cdn = &state.cdn;
        let target = format!(
            "{cdn}/xet-bridge-us/{etag}?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Expires=3600&X-Amz-Signature={SIGNATURE}&for={}",
            escape(path)
        );
        let hub = &state.endpoint;
        let answer = Answer::redirect(302, &target)
            .with("X-Repo-Commit", &*commit)
            .with("Accept-Ranges", "bytes")
            .with("X-Linked-Size", stored.bytes.len().to_string());
        if state.mirror.no_hashes {
            return answer;
        }
        return answer
            .with("X-Linked-Etag", format!("\"{etag}\""))
            .with("X-Xet-Hash", sha256(etag.as_bytes()))
            .with(
                "Link",
                format!("<{hub}/api/{repo}/xet-read-token/{commit}>; rel=\"xet-auth\""),
            );
    }
    // The repository's own spelling of the file, and where it was asked for.
    let parts: Vec<String> = file.split('/').map(escape).collect();
    let target = format!(
        "/api/resolve-cache/{repo}/{commit}/{}?{}=&etag=%22{etag}%22",
        parts.join("/"),
        escape(path)
    );
    Answer::redirect(307, &target).with("X-Repo-Commit", commit)
}

fn token<'a>(state: &State, request: &'a Request) -> Option<&'a str> {
    // A proxy's name and password open nothing here.
    let sent = request.header("authorization")?.strip_prefix("Bearer ");
    sent.filter(|_| state.login.is_none())
}

/// The body of a file. Text is compressed for those who take that, and then has no length.
fn content(state: &State, request: &Request, stored: &Stored, about: &str) -> Answer {
    let tag = if state.mirror.no_hashes {
        format!("W/\"{}-1\"", stored.bytes.len())
    } else {
        format!("\"{}\"", stored.etag())
    };
    if request.header("if-none-match") == Some(tag.as_str()) {
        return Answer::text(304, "").with("ETag", tag);
    }
    let mut answer = Answer::text(200, "").with("ETag", tag);
    answer.file = Some(about.to_owned());
    answer.body = Arc::clone(&stored.bytes);
    let takes = request.header("accept-encoding").unwrap_or_default();
    if takes.contains("gzip") && !stored.large && request.header("range").is_none() {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(&stored.bytes).unwrap();
        answer.body = Arc::new(encoder.finish().unwrap());
        return answer
            .with("Content-Encoding", "gzip")
            .with("Unannounced", "");
    }
    if state.mirror.no_lengths {
        answer.file = answer.file.filter(|_| request.header("range").is_none());
        return answer.with("Unannounced", "");
    }
    answer.with("Accept-Ranges", "bytes")
}

/// The host of large files: it takes signed addresses, as often as wanted, by `GET`, and no token.
pub(super) fn from_cdn(state: &State, request: &Request) -> Answer {
    let refusal = |status, code: &str| {
        Answer::text(status, format!("<Error><Code>{code}</Code></Error>"))
            .with("Content-Type", "application/xml")
    };
    if request.header("authorization").is_some() || request.header("cookie").is_some() {
        return refusal(400, "InvalidArgument");
    }
    let query = pairs(request.query()).unwrap_or_default();
    let of = |name: &str| {
        let found = query.iter().find(|(other, _)| other == name);
        found.map(|(_, value)| value.as_str())
    };
    if request.method != "GET" || of("X-Amz-Signature") != Some(SIGNATURE) {
        return refusal(403, "SignatureDoesNotMatch");
    }
    let wanted = request.path().strip_prefix("/xet-bridge-us/");
    let stored = state
        .repositories
        .values()
        .flat_map(|repository| repository.commits.values())
        .flat_map(std::collections::BTreeMap::values)
        .find(|file| file.large && Some(sha256(&file.bytes).as_str()) == wanted);
    let (Some(stored), Some(about)) = (stored, of("for")) else {
        return refusal(404, "NoSuchKey");
    };
    let mut answer = Answer::text(200, "")
        // No hash of the contents.
        .with("ETag", format!("\"{}-2\"", &sha256(b"parts")[..32]))
        .with("Accept-Ranges", "bytes")
        .with("Content-Type", "application/octet-stream");
    answer.body = Arc::clone(&stored.bytes);
    answer.file = Some(about.to_owned());
    answer
}
