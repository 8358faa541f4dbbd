//! What changes repositories: making them, announcing files, the store of large files, commits. It refuses what the real hub refuses.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use sha1::Digest as _;

use super::wire::{Answer, Request, escape, pairs, unescape};
use super::{Gate, READER, Repository, State, Stored, TOKEN, git_sha1, hex, sha256};

/// Larger files don't go into a commit.
const LONGEST_REGULAR: usize = 10 << 20;
/// What opens the store in a signed address.
const SIGNATURE: &str = "up1oad";
/// Owners that [`TOKEN`] may write for.
pub(super) const OWNERS: [&str; 2] = ["me", "some"];
/// Licences that a card may name; the real hub knows some dozens.
const LICENSES: [&str; 6] = ["apache-2.0", "mit", "llama3", "cc-by-4.0", "other", "gemma"];

/// Answers for requests that change something, and for those that only people who do ask; `None` where it is no such request.
pub(super) fn answer(state: &mut State, request: &Request) -> Option<Answer> {
    if request.method != "POST" {
        return None;
    }
    let path = request.path().to_owned();
    if let Some(repo) = path.strip_suffix(".git/info/lfs/objects/batch") {
        let repo = repo.trim_start_matches('/');
        let repo = if repo.starts_with("datasets/") {
            repo.to_owned()
        } else {
            format!("models/{repo}")
        };
        return Some(batch(state, request, &repo).unwrap_or_else(|refusal| refusal));
    }
    let rest = path.strip_prefix("/api/")?;
    let parts: Vec<&str> = rest.split('/').collect();
    let done = match parts[..] {
        ["validate-yaml"] => validate(request),
        ["repos", "create"] => create(state, request),
        ["complete_multipart"] => complete(state, request),
        ["lfs-verify"] => verify(state, request),
        [
            kind @ ("models" | "datasets"),
            owner,
            name,
            what @ ("preupload" | "commit" | "branch"),
            revision,
        ] => {
            let repo = format!("{kind}/{owner}/{name}");
            let revision = unescape(revision)?;
            match what {
                "preupload" => preupload(state, request, &repo, &revision),
                "commit" => commit(state, request, &repo, &revision),
                _ => branch(state, request, &repo, &revision),
            }
        }
        _ => return None,
    };
    Some(done.unwrap_or_else(|refusal| refusal))
}

/// The host of large files takes parts: by `PUT`, with a length, at signed addresses, without a token.
pub(super) fn put(state: &mut State, request: &Request) -> Answer {
    let refusal = |status, code: &str| {
        Answer::text(status, format!("<Error><Code>{code}</Code></Error>"))
            .with("Content-Type", "application/xml")
    };
    if request.header("authorization").is_some() {
        return refusal(400, "InvalidArgument");
    }
    if request.header("content-length").is_none() || request.header("transfer-encoding").is_some() {
        return refusal(411, "MissingContentLength");
    }
    let query = pairs(request.query()).unwrap_or_default();
    let of = |name: &str| {
        let found = query.iter().find(|(other, _)| other == name);
        found.map(|(_, value)| value.as_str())
    };
    let Some(oid) = request.path().strip_prefix("/store/") else {
        return refusal(404, "NoSuchKey");
    };
    if of("X-Amz-Signature") != Some(SIGNATURE) {
        return refusal(403, "SignatureDoesNotMatch");
    }
    let etag = format!("\"{}\"", &sha256(&request.body)[..32]);
    match of("partNumber").map(str::parse::<u32>) {
        None if sha256(&request.body) != oid => return refusal(400, "BadDigest"),
        None => {
            let body = Arc::new(request.body.clone());
            state.store.insert(oid.to_owned(), body);
        }
        Some(Ok(part)) => {
            let parts = state.parts.entry(oid.to_owned()).or_default();
            parts.insert(part, request.body.clone());
        }
        Some(Err(_)) => return refusal(400, "InvalidArgument"),
    }
    Answer::text(200, "").with("ETag", etag)
}

fn body(request: &Request) -> Result<Value, Answer> {
    serde_json::from_slice(&request.body).map_err(|_| Answer::error(400, "", "Invalid JSON"))
}

/// Whether there is a token that may write for this owner.
fn may_write(request: &Request, owner: &str) -> Result<(), Answer> {
    match request
        .header("authorization")
        .and_then(|sent| sent.strip_prefix("Bearer "))
    {
        Some(TOKEN) if OWNERS.contains(&owner) => Ok(()),
        Some(TOKEN) => Err(Answer::error(
            403,
            "",
            &format!("You don't have the rights to create a model under the namespace \"{owner}\""),
        )),
        Some(READER) => Err(Answer::error(
            403,
            "",
            "Forbidden: you must use a write token to upload to a repository.",
        )),
        _ => Err(Answer::error(401, "", "Invalid username or password.")),
    }
}

fn owner(repo: &str) -> &str {
    repo.split('/').nth(1).unwrap_or_default()
}

fn repository<'s>(
    state: &'s mut State,
    request: &Request,
    repo: &str,
    proposes: bool,
) -> Result<&'s mut Repository, Answer> {
    let sent = request.header("authorization");
    if sent.is_none() {
        return Err(Answer::error(
            401,
            "RepoNotFound",
            "Invalid username or password.",
        ));
    }
    if let Some(new) = state.renamed.get(repo) {
        return Err(Answer::redirect(
            307,
            &request.target.replacen(repo, new, 1),
        ));
    }
    let Some(found) = state.repositories.get_mut(repo) else {
        return Err(Answer::error(404, "RepoNotFound", "Repository not found"));
    };
    if !proposes {
        may_write(request, owner(repo))?;
    }
    Ok(found)
}

fn proposes(request: &Request) -> bool {
    request.query().split('&').any(|part| part == "create_pr=1")
}

fn create(state: &mut State, request: &Request) -> Result<Answer, Answer> {
    let body = body(request)?;
    let text = |name: &str| body[name].as_str().unwrap_or_default().to_owned();
    let (name, kind) = (text("name"), text("type"));
    let owner = match text("organization") {
        empty if empty.is_empty() => "me".to_owned(),
        owner => owner,
    };
    may_write(request, &owner)?;
    let known = ["name", "organization", "type", "visibility"];
    if let Some(odd) = body
        .as_object()
        .and_then(|map| map.keys().find(|key| !known.contains(&key.as_str())))
    {
        return Err(Answer::error(400, "", &format!("Unrecognized key: {odd}")));
    }
    if name.is_empty() || name.contains("--") || name.ends_with(".git") {
        return Err(Answer::error(400, "", "Invalid repo name"));
    }
    let (folder, prefix) = match kind.as_str() {
        "model" => ("models", ""),
        "dataset" => ("datasets", "datasets/"),
        _ => return Err(Answer::error(400, "", "Invalid repo type")),
    };
    let url = format!("{}/{prefix}{owner}/{name}", state.endpoint);
    let repo = format!("{folder}/{owner}/{name}");
    if state.repositories.contains_key(&repo) {
        let mut answer = Answer::error(409, "", "You already created this model repo");
        answer.body = Arc::new(
            json!({ "error": "You already created this model repo", "url": url })
                .to_string()
                .into_bytes(),
        );
        return Err(answer);
    }
    let attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n".to_vec();
    let first = Stored {
        bytes: Arc::new(attributes),
        large: false,
    };
    let files = BTreeMap::from([(".gitattributes".to_owned(), first)]);
    let commit = hex(&sha1::Sha1::digest(&repo));
    let private = body["visibility"] == "private" && !state.ignores_private;
    state.repositories.insert(
        repo,
        Repository {
            branches: BTreeMap::from([("main".to_owned(), commit.clone())]),
            commits: BTreeMap::from([(commit, files)]),
            gate: if private { Gate::Private } else { Gate::Open },
        },
    );
    Ok(Answer::json(
        &json!({ "url": url, "name": format!("{owner}/{name}"), "id": "621ffdc136468d709f17ddb4" }),
    ))
}

fn branch(state: &mut State, request: &Request, repo: &str, name: &str) -> Result<Answer, Answer> {
    let found = repository(state, request, repo, false)?;
    if found.branches.contains_key(name) {
        return Err(Answer::error(
            409,
            "",
            &format!("Reference already exists: {name}"),
        ));
    }
    let main = found.branches["main"].clone();
    found.branches.insert(name.to_owned(), main);
    Ok(Answer::json(&json!({})))
}

fn is_large(path: &str, sample: &[u8], size: usize) -> bool {
    let ends = [".safetensors", ".parquet", ".bin"];
    ends.iter().any(|end| path.ends_with(end)) || size > LONGEST_REGULAR || sample.contains(&0)
}

fn preupload(
    state: &mut State,
    request: &Request,
    repo: &str,
    revision: &str,
) -> Result<Answer, Answer> {
    let found = repository(state, request, repo, proposes(request))?;
    let Some(commit) = found.branches.get(revision) else {
        return Err(Answer::error(
            404,
            "RevisionNotFound",
            &format!("Invalid rev id: {revision}"),
        ));
    };
    let there = &found.commits[commit];
    let ignored = there
        .get(".gitignore")
        .map(|file| String::from_utf8_lossy(&file.bytes).into_owned());
    let body = body(request)?;
    let files = body["files"]
        .as_array()
        .ok_or_else(|| Answer::error(400, "", "files: Required"))?;
    if files.len() > 256 {
        return Err(Answer::error(400, "", "files: too many"));
    }
    let mut ways = Vec::new();
    for file in files {
        let (Some(path), Some(size), Some(sample)) = (
            file["path"].as_str(),
            file["size"].as_u64(),
            file["sample"].as_str(),
        ) else {
            return Err(Answer::error(
                400,
                "",
                "files: expected path, size and sample",
            ));
        };
        let sample = STANDARD
            .decode(sample)
            .map_err(|_| Answer::error(400, "", "sample: expected base64"))?;
        if sample.len() != (size as usize).min(512) {
            return Err(Answer::error(
                400,
                "",
                "sample: expected the first 512 bytes",
            ));
        }
        let mode = if is_large(path, &sample, size as usize) {
            "lfs"
        } else {
            "regular"
        };
        let ignored = ignored
            .as_ref()
            .is_some_and(|text| text.lines().any(|line| line == path));
        let mut way = json!({ "path": path, "uploadMode": mode, "shouldIgnore": ignored });
        if let Some(stored) = there.get(path) {
            way["oid"] = stored.etag().into();
        }
        ways.push(way);
    }
    Ok(Answer::json(&json!({ "files": ways, "commitOid": commit })))
}

fn batch(state: &mut State, request: &Request, repo: &str) -> Result<Answer, Answer> {
    let body = body(request)?;
    let names_branch = body.get("ref").is_some();
    repository(state, request, repo, !names_branch)?;
    if body["operation"] != "upload" || body["hash_algo"] != "sha256" {
        return Err(Answer::error(400, "", "Only uploads by sha256"));
    }
    let accept = request.header("accept").unwrap_or_default();
    if !accept.contains("application/vnd.git-lfs+json") {
        return Err(Answer::error(
            406,
            "",
            "Expected Accept: application/vnd.git-lfs+json",
        ));
    }
    let (endpoint, cdn) = (state.endpoint.clone(), state.cdn.clone());
    let (threshold, chunk) = state.multipart;
    let objects = body["objects"].as_array().cloned().unwrap_or_default();
    let answers: Vec<Value> = objects
        .iter()
        .map(|object| {
            let (oid, size) = (object["oid"].as_str().unwrap_or_default(), object["size"].as_u64().unwrap_or_default());
            if size == 0 || oid.len() != 64 {
                return json!({ "oid": oid, "size": size, "error": { "code": 422, "message": "Invalid object" } });
            }
            if state.store.contains_key(oid) {
                return json!({ "oid": oid, "size": size });
            }
            let signed = format!("{cdn}/store/{oid}?X-Amz-Signature={SIGNATURE}");
            let verify = json!({ "href": format!("{endpoint}/api/lfs-verify?for={}", escape(repo)) });
            let upload = if size > threshold {
                let mut header = serde_json::Map::new();
                header.insert("chunk_size".into(), chunk.to_string().into());
                for part in 1..=size.div_ceil(chunk) {
                    header.insert(format!("{part:05}"), format!("{signed}&partNumber={part}").into());
                }
                json!({ "href": format!("{endpoint}/api/complete_multipart?oid={oid}&signature={SIGNATURE}"), "header": header })
            } else {
                json!({ "href": signed })
            };
            json!({ "oid": oid, "size": size, "authenticated": true, "actions": { "upload": upload, "verify": verify } })
        })
        .collect();
    let transfer = if objects
        .iter()
        .any(|object| object["size"].as_u64().unwrap_or_default() > threshold)
    {
        "multipart"
    } else {
        "basic"
    };
    Ok(Answer::json(
        &json!({ "transfer": transfer, "objects": answers }),
    ))
}

fn complete(state: &mut State, request: &Request) -> Result<Answer, Answer> {
    let query = pairs(request.query()).unwrap_or_default();
    if !query.contains(&("signature".to_owned(), SIGNATURE.to_owned())) {
        return Err(Answer::error(403, "", "Invalid signature"));
    }
    let body = body(request)?;
    let oid = body["oid"].as_str().unwrap_or_default();
    let parts = state.parts.remove(oid).unwrap_or_default();
    let told: Vec<(u32, String)> = body["parts"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|part| {
            (
                part["partNumber"].as_u64().unwrap_or_default() as u32,
                part["etag"].as_str().unwrap_or_default().to_owned(),
            )
        })
        .collect();
    let known: Vec<(u32, String)> = parts
        .iter()
        .map(|(number, bytes)| (*number, format!("\"{}\"", &sha256(bytes)[..32])))
        .collect();
    let whole: Vec<u8> = parts.into_values().flatten().collect();
    if told != known || sha256(&whole) != oid {
        return Err(Answer::error(400, "", "Invalid parts"));
    }
    state.store.insert(oid.to_owned(), Arc::new(whole));
    Ok(Answer::json(&json!({ "success": true })))
}

fn verify(state: &mut State, request: &Request) -> Result<Answer, Answer> {
    if request.header("authorization").is_none() {
        return Err(Answer::error(401, "", "Invalid username or password."));
    }
    let body = body(request)?;
    let stored = state.store.get(body["oid"].as_str().unwrap_or_default());
    match stored {
        Some(bytes) if Some(bytes.len() as u64) == body["size"].as_u64() => {
            Ok(Answer::json(&json!({})))
        }
        _ => Err(Answer::error(404, "", "Object not found")),
    }
}

fn commit(
    state: &mut State,
    request: &Request,
    repo: &str,
    revision: &str,
) -> Result<Answer, Answer> {
    let proposes = proposes(request);
    let bad = |message: &str| Answer::error(400, "", message);
    if request.header("content-type") != Some("application/x-ndjson") {
        return Err(bad("Expected application/x-ndjson"));
    }
    let store = state.store.clone();
    let endpoint = state.endpoint.clone();
    let found = repository(state, request, repo, proposes)?;
    let Some(parent) = found.branches.get(revision).cloned() else {
        return Err(Answer::error(
            404,
            "RevisionNotFound",
            &format!("Invalid rev id: {revision}"),
        ));
    };
    let text = String::from_utf8(request.body.clone()).map_err(|_| bad("Not UTF-8"))?;
    let mut files = found.commits[&parent].clone();
    let mut seen = BTreeSet::new();
    for (number, line) in text.lines().enumerate() {
        let line: Value = serde_json::from_str(line).map_err(|_| bad("Invalid NDJSON"))?;
        let value = &line["value"];
        let key = line["key"].as_str().unwrap_or_default();
        if (key == "header") != (number == 0) {
            return Err(bad("Expected the header first, and once"));
        }
        if key == "header" {
            if value["summary"].as_str().is_none_or(str::is_empty) {
                return Err(bad("summary: Required"));
            }
            if value["parentCommit"]
                .as_str()
                .is_some_and(|told| told != parent)
            {
                return Err(Answer::error(
                    412,
                    "",
                    "A commit has happened since. Please refresh and try again.",
                ));
            }
            continue;
        }
        let path = value["path"].as_str().unwrap_or_default().to_owned();
        if path.is_empty()
            || path
                .split('/')
                .any(|part| ["", ".", "..", ".git"].contains(&part))
        {
            return Err(bad("Invalid path"));
        }
        if !seen.insert(path.clone()) {
            return Err(bad("The same file twice"));
        }
        match key {
            "file" => {
                let bytes = (value["encoding"] == "base64")
                    .then(|| STANDARD.decode(value["content"].as_str().unwrap_or_default()));
                let Some(Ok(bytes)) = bytes else {
                    return Err(bad("content: expected base64"));
                };
                if !bytes.is_empty() && is_large(&path, &bytes[..bytes.len().min(512)], bytes.len())
                {
                    return Err(bad(
                        "Your push was rejected because it contains binary files. Please use https://huggingface.co/docs/hub/xet to store binary files.",
                    ));
                }
                files.insert(
                    path,
                    Stored {
                        bytes: Arc::new(bytes),
                        large: false,
                    },
                );
            }
            "lfsFile" => {
                let stored = store.get(value["oid"].as_str().unwrap_or_default());
                let Some(bytes) = stored.filter(|_| value["algo"] == "sha256") else {
                    return Err(bad(&format!(
                        "LFS pointer pointed to a file that does not exist: {path}"
                    )));
                };
                files.insert(
                    path,
                    Stored {
                        bytes: Arc::clone(bytes),
                        large: true,
                    },
                );
            }
            "deletedFile" => {
                if files.remove(&path).is_none() {
                    return Err(Answer::error(
                        404,
                        "EntryNotFound",
                        "A file with this name doesn't exist",
                    ));
                }
            }
            _ => return Err(bad("Unknown operation")),
        }
    }
    if seen.is_empty() {
        return Err(bad("Nothing to commit"));
    }
    let mut name = format!("{repo} {parent}");
    for (path, file) in &files {
        let _ = write!(name, " {path} {}", git_sha1(&file.bytes));
    }
    let commit = hex(&sha1::Sha1::digest(name));
    found.commits.insert(commit.clone(), files);
    let id = repo.split_once('/').map_or(repo, |(_, id)| id);
    let page = if repo.starts_with("datasets/") {
        repo
    } else {
        id
    };
    let mut answer = json!({ "success": true, "commitOid": commit, "commitUrl": format!("{endpoint}/{page}/commit/{commit}"), "hookOutput": "" });
    if proposes {
        let number = 1 + found
            .branches
            .keys()
            .filter(|name| name.starts_with("refs/pr/"))
            .count();
        found.branches.insert(format!("refs/pr/{number}"), commit);
        answer["pullRequestUrl"] = format!("{endpoint}/{page}/discussions/{number}").into();
    } else {
        found.branches.insert(revision.to_owned(), commit);
    }
    Ok(Answer::json(&answer))
}

/// Looks at a card's head.
fn validate(request: &Request) -> Result<Answer, Answer> {
    let body = body(request)?;
    let content = body["content"].as_str().unwrap_or_default();
    let mut errors = Vec::new();
    match head(content) {
        None => errors.push("Missing YAML metadata".to_owned()),
        Some(head) => {
            if head.get("license").is_some_and(|license| {
                !license
                    .as_str()
                    .is_some_and(|word| LICENSES.contains(&word))
            }) {
                errors.push("\"license\" must be one of [apache-2.0, mit, ..]".to_owned());
            }
            let texts = |value: &Value| {
                value
                    .as_array()
                    .is_some_and(|all| all.iter().all(Value::is_string))
            };
            for name in ["tags", "datasets"] {
                if head.get(name).is_some_and(|value| !texts(value)) {
                    errors.push(format!("\"{name}\" must be an array"));
                }
            }
            for name in ["library_name", "pipeline_tag", "base_model_relation"] {
                if head.get(name).is_some_and(|value| !value.is_string()) {
                    errors.push(format!("\"{name}\" must be a string"));
                }
            }
            let relations = ["adapter", "merge", "quantized", "finetune"];
            if head
                .get("base_model_relation")
                .and_then(Value::as_str)
                .is_some_and(|word| !relations.contains(&word))
            {
                errors.push(
                    "\"base_model_relation\" must be one of [adapter, merge, quantized, finetune]"
                        .to_owned(),
                );
            }
        }
    }
    let listed: Vec<Value> = errors
        .iter()
        .map(|message| json!({ "message": message }))
        .collect();
    Ok(Answer::json(&json!({ "errors": listed, "warnings": [] })))
}

/// The head of a card.
pub(super) fn head(card: &str) -> Option<serde_json::Map<String, Value>> {
    let (head, _) = card.strip_prefix("---\n")?.split_once("\n---")?;
    let value: serde_yaml::Value = serde_yaml::from_str(head).ok()?;
    serde_json::to_value(value).ok()?.as_object().cloned()
}
