//! The API: descriptions of repositories, their trees and refs, and who may see them.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::wire::{Answer, Request, escape, pairs, unescape};
use super::write::head;
use super::{Gate, READER, Repository, State, Stored, TOKEN, git_sha1, sha256};

const NO_PAGE: &str = "Sorry, we can't find the page you are looking for.";

/// What a name means.
pub(super) enum Place<'a> {
    Here(&'a Repository),
    Moved(&'a str),
    Nowhere,
}

/// Answers for `/api/` with the rest of the path.
pub(super) fn answer(state: &State, request: &Request, rest: &str) -> Answer {
    if let Err(refusal) = check_token(state, request) {
        return refusal;
    }
    if rest == "whoami-v2" {
        return if may_see(request) {
            whoami()
        } else {
            Answer::error(401, "", "Invalid username or password.")
        };
    }
    let parts: Vec<&str> = rest.split('/').collect();
    let [kind @ ("models" | "datasets"), first, more @ ..] = &parts[..] else {
        return Answer::error(404, "", NO_PAGE);
    };
    // Some names of old have no owner.
    let short = format!("{kind}/{first}");
    let is_known = state.repositories.contains_key(&short) || state.renamed.contains_key(&short);
    let (repo, more) = match more {
        [name, more @ ..] if !is_known => (format!("{short}/{name}"), more),
        more => (short, more),
    };
    let repository = match find(state, request, &repo) {
        Place::Here(repository) => repository,
        Place::Moved(new) => {
            return Answer::redirect(307, &request.target.replacen(&repo, new, 1));
        }
        Place::Nowhere => return is_hidden(request),
    };
    if repository.gate == Gate::Disabled {
        return Answer::error(403, "", "Access to this resource is disabled.");
    }
    let posts = matches!(more, ["paths-info", _]);
    let method = request.method.as_str();
    if posts != (method == "POST") || !["GET", "HEAD", "POST"].contains(&method) {
        return Answer::error(404, "", "Cannot do that here");
    }
    let Some(query) = pairs(request.query()) else {
        return Answer::error(400, "", "Malformed query");
    };
    // A revision is one part of the path: its slashes are escaped.
    let revision = |part: &str| {
        let revision = unescape(part).unwrap_or_default();
        at(repository, &revision).ok_or_else(|| {
            let message = format!("Invalid rev id: {revision}");
            Answer::error(404, "RevisionNotFound", &message)
        })
    };
    let found = match more {
        [] => revision("main").and_then(|found| describe(state, &repo, repository, found, &query)),
        ["revision", part] => {
            revision(part).and_then(|found| describe(state, &repo, repository, found, &query))
        }
        ["tree", part, path @ ..] if !state.mirror.no_tree => revision(part).and_then(|found| {
            let path = unescape(&path.join("/")).unwrap_or_default();
            tree(state, request, found, &path, &query)
        }),
        ["paths-info", part] if !state.mirror.no_tree => {
            revision(part).and_then(|found| paths_info(request, found))
        }
        ["refs"] => Ok(refs(repository)),
        _ => Err(Answer::error(404, "", NO_PAGE)),
    };
    found.unwrap_or_else(|refusal| refusal)
}

/// A token that is none is refused everywhere, for public repositories too.
pub(super) fn check_token(state: &State, request: &Request) -> Result<(), Answer> {
    match request.header("authorization") {
        None => Ok(()),
        Some(sent) if [Some(TOKEN), Some(READER)].contains(&sent.strip_prefix("Bearer ")) => Ok(()),
        Some(_) if state.login.is_some() => Ok(()),
        Some(_) => Err(Answer::error(
            401,
            "",
            "Invalid credentials in Authorization header",
        )),
    }
}

/// The account of [`TOKEN`].
fn whoami() -> Answer {
    Answer::json(&json!({
        "type": "user",
        "name": "somebody",
        "fullname": "Some Body",
        "orgs": [{ "type": "org", "name": "some" }],
        "auth": { "type": "access_token", "accessToken": { "displayName": "laptop", "role": "write" } },
    }))
}

fn may_see(request: &Request) -> bool {
    request.header("authorization").is_some()
}

pub(super) fn find<'a>(state: &'a State, request: &Request, repo: &str) -> Place<'a> {
    let Some(repository) = state.repositories.get(repo) else {
        return match state.renamed.get(repo) {
            Some(new) => Place::Moved(new),
            None => Place::Nowhere,
        };
    };
    if repository.gate == Gate::Private && !may_see(request) {
        return Place::Nowhere;
    }
    Place::Here(repository)
}

/// What is hidden and what is not there look the same.
pub(super) fn is_hidden(request: &Request) -> Answer {
    if may_see(request) {
        Answer::error(404, "RepoNotFound", "Repository not found")
    } else {
        Answer::error(401, "RepoNotFound", "Invalid username or password.")
    }
}

/// The commit and files of a branch or a commit.
pub(super) fn at<'a>(
    repository: &'a Repository,
    revision: &str,
) -> Option<(String, &'a BTreeMap<String, Stored>)> {
    let commit = repository
        .branches
        .get(revision)
        .map_or(revision, String::as_str);
    Some((commit.to_owned(), repository.commits.get(commit)?))
}

type Found<'a> = (String, &'a BTreeMap<String, Stored>);
type Query = [(String, String)];

fn is_set(query: &Query, name: &str) -> Result<bool, Answer> {
    let found = query.iter().find(|(other, _)| other == name);
    match found.map(|(_, value)| value.to_lowercase()).as_deref() {
        None | Some("false" | "0") => Ok(false),
        Some("true" | "1") => Ok(true),
        Some(_) => Err(Answer::error(
            400,
            "",
            &format!("{name}: expected a boolean"),
        )),
    }
}

fn check_names(query: &Query, known: &[&str]) -> Result<(), Answer> {
    let unknown = query
        .iter()
        .find(|(name, _)| !known.contains(&name.as_str()));
    unknown.map_or(Ok(()), |(name, _)| {
        Err(Answer::error(400, "", &format!("Unrecognized key: {name}")))
    })
}

fn describe(
    state: &State,
    repo: &str,
    repository: &Repository,
    (commit, files): Found<'_>,
    query: &Query,
) -> Result<Answer, Answer> {
    check_names(query, &["blobs", "expand", "securityStatus"])?;
    let blobs = is_set(query, "blobs")? && !state.mirror.no_sizes;
    let siblings: Vec<Value> = files
        .iter()
        .map(|(path, file)| {
            let mut sibling = json!({ "rfilename": path });
            if blobs {
                let size = file.bytes.len();
                sibling["size"] = size.into();
                sibling["blobId"] = blob_id(file).into();
                if file.large {
                    sibling["lfs"] =
                        json!({ "sha256": file.etag(), "size": size, "pointerSize": 134 });
                }
            }
            sibling
        })
        .collect();
    let id = repo.split_once('/').map_or(repo, |(_, id)| id);
    let gated = matches!(repository.gate, Gate::Gated | Gate::Refused);
    let all = json!({
        "_id": "621ffdc136468d709f17ddb4",
        "id": id,
        "author": id.split('/').next(),
        "sha": commit,
        "lastModified": "2024-01-02T03:04:05.000Z",
        "createdAt": "2024-01-02T03:04:05.000Z",
        "private": repository.gate == Gate::Private,
        "gated": if gated { json!("manual") } else { json!(false) },
        "disabled": false,
        "downloads": 3,
        "likes": 2,
        "tags": ["safetensors"],
        "siblings": siblings,
        "cardData": files.get("README.md").and_then(|card| head(&String::from_utf8_lossy(&card.bytes))),
    });
    let wanted: BTreeSet<&str> = query
        .iter()
        .filter(|(name, _)| name == "expand")
        .map(|(_, value)| value.as_str())
        .collect();
    if wanted.is_empty() {
        return Ok(Answer::json(&all));
    }
    let known = all.as_object().cloned().unwrap_or_default();
    if let Some(odd) = wanted.iter().find(|name| !known.contains_key(**name)) {
        return Err(Answer::error(400, "", &format!("expand: unknown {odd}")));
    }
    let kept: Map<String, Value> = known
        .into_iter()
        .filter(|(name, _)| {
            ["_id", "id"].contains(&name.as_str()) || wanted.contains(name.as_str())
        })
        .collect();
    Ok(Answer::json(&Value::Object(kept)))
}

/// The git object: a large file's is that of its pointer.
fn blob_id(file: &Stored) -> String {
    if !file.large {
        return git_sha1(&file.bytes);
    }
    let pointer = format!(
        "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n",
        sha256(&file.bytes),
        file.bytes.len()
    );
    git_sha1(pointer.as_bytes())
}

fn entry(path: &str, file: &Stored) -> Value {
    let size = file.bytes.len();
    let mut entry = json!({ "type": "file", "oid": blob_id(file), "size": size, "path": path });
    if file.large {
        entry["lfs"] = json!({ "oid": file.etag(), "size": size, "pointerSize": 134 });
        entry["xetHash"] = sha256(file.etag().as_bytes()).into();
    }
    entry
}

fn folder(path: &str) -> Value {
    json!({ "type": "directory", "oid": git_sha1(path.as_bytes()), "size": 0, "path": path })
}

/// Files and folders below `path`, by pages with a link to the next one.
fn tree(
    state: &State,
    request: &Request,
    (_, files): Found<'_>,
    path: &str,
    query: &Query,
) -> Result<Answer, Answer> {
    check_names(query, &["recursive", "expand", "cursor", "limit"])?;
    let (recursive, expand) = (is_set(query, "recursive")?, is_set(query, "expand")?);
    let below = if path.is_empty() {
        String::new()
    } else {
        format!("{path}/")
    };
    let mut entries = BTreeMap::new();
    for (name, file) in files {
        let Some(rest) = name.strip_prefix(&below) else {
            continue;
        };
        let parts: Vec<&str> = rest.split('/').collect();
        for depth in 1..parts.len() {
            let name = format!("{below}{}", parts[..depth].join("/"));
            if recursive || depth == 1 {
                entries.insert(name.clone(), folder(&name));
            }
        }
        if recursive || parts.len() == 1 {
            entries.insert(name.clone(), entry(name, file));
        }
    }
    if entries.is_empty() && !path.is_empty() {
        return Err(Answer::error(404, "EntryNotFound", "Entry not found"));
    }
    let of = |name: &str| {
        let found = query.iter().find(|(other, _)| other == name);
        found.map(|(_, value)| value.as_str())
    };
    let after = of("cursor").unwrap_or_default();
    let limit = of("limit").and_then(|limit| limit.parse().ok());
    // What is expanded costs the hub more.
    let most = if expand { 50 } else { 1000 };
    let limit: usize = limit.unwrap_or(state.page).min(state.page).min(most);
    let mut left = entries
        .into_iter()
        .filter(|(name, _)| name.as_str() > after);
    let page: Vec<(String, Value)> = left.by_ref().take(limit).collect();
    let last = page.last().map(|(name, _)| name.clone());
    let mut answer = Answer::json(&Value::Array(
        page.into_iter().map(|(_, entry)| entry).collect(),
    ));
    if let (Some(_), Some(last)) = (left.next(), last) {
        let next = format!(
            "<{}{}?expand={expand}&recursive={recursive}&limit={limit}&cursor={}>; rel=\"next\"",
            state.endpoint,
            request.path(),
            escape(&last)
        );
        answer = answer.with("Link", next);
    }
    Ok(answer)
}

fn paths_info(request: &Request, (_, files): Found<'_>) -> Result<Answer, Answer> {
    let malformed = || Answer::error(400, "", "Malformed body");
    let form = String::from_utf8_lossy(&request.body).into_owned();
    let form = pairs(&form).ok_or_else(malformed)?;
    check_names(&form, &["paths", "expand"])?;
    let wanted = form.iter().filter(|(name, _)| name == "paths");
    let found = wanted.filter_map(|(_, path)| {
        let inside = format!("{path}/");
        match files.get(path) {
            Some(file) => Some(entry(path, file)),
            None if files.keys().any(|name| name.starts_with(&inside)) => Some(folder(path)),
            None => None,
        }
    });
    Ok(Answer::json(&Value::Array(found.collect())))
}

fn refs(repository: &Repository) -> Answer {
    let of = |kind: &str, tail: &str| -> Vec<Value> {
        let named = repository.branches.iter().filter(|(name, _)| {
            name.starts_with("refs/convert/") == (kind == "convert")
                && !name.starts_with("refs/pr/")
        });
        named
            .map(|(name, commit)| {
                json!({ "name": name, "ref": format!("refs/{tail}/{name}"), "targetCommit": commit })
            })
            .collect()
    };
    Answer::json(
        &json!({ "branches": of("branch", "heads"), "converts": of("convert", "convert"), "tags": [] }),
    )
}
