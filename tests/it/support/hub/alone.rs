//! The hub for another program: orders come as lines of JSON, each answered with one line.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};

use super::{Fault, Gate, HubServer, Mirror};

/// What can be ordered.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Order {
    /// Puts the files of a folder on a branch of `models/owner/name` or `datasets/owner/name`.
    Commit {
        repo: String,
        branch: String,
        folder: String,
    },
    /// `open`, `gated`, `refused`, `private` or `disabled`.
    Gate {
        repo: String,
        gate: String,
    },
    Rename {
        old: String,
        new: String,
    },
    /// Answers the next `times` requests for `path` with a status and headers.
    Busy {
        path: String,
        status: u16,
        headers: BTreeMap<String, String>,
        times: usize,
    },
    /// Cuts the next `times` bodies for `path`.
    Cut {
        path: String,
        after: usize,
        times: usize,
    },
    Page {
        entries: usize,
    },
    /// The names of what a mirror leaves out.
    Mirror {
        without: Vec<String>,
    },
    /// From which size on large files are sent in parts, and of which size these are.
    Multipart {
        threshold: u64,
        chunk: u64,
    },
    /// The hashes of the files of a branch.
    Files {
        repo: String,
        branch: String,
    },
    /// How many requests there were.
    Requests {},
}

/// Does what a line orders.
pub(crate) fn obey(hub: &HubServer, line: &str) -> Result<Value, String> {
    let order: Order = serde_json::from_str(line).map_err(|error| error.to_string())?;
    match order {
        Order::Commit {
            repo,
            branch,
            folder,
        } => {
            let mut files = Vec::new();
            collect(Path::new(&folder), "", &mut files).map_err(|error| error.to_string())?;
            let files: Vec<(&str, &[u8])> = files
                .iter()
                .map(|(name, bytes)| (name.as_str(), bytes.as_slice()))
                .collect();
            return Ok(json!({ "commit": hub.commit(&repo, &branch, &files) }));
        }
        Order::Gate { repo, gate } => {
            let gate = match gate.as_str() {
                "open" => Gate::Open,
                "gated" => Gate::Gated,
                "refused" => Gate::Refused,
                "private" => Gate::Private,
                "disabled" => Gate::Disabled,
                _ => return Err(format!("no gate {gate}")),
            };
            hub.gate(&repo, gate);
        }
        Order::Rename { old, new } => hub.rename(&old, &new),
        Order::Busy {
            path,
            status,
            headers,
            times,
        } => {
            let headers = headers
                .into_iter()
                .map(|(name, value)| (&*name.leak(), value))
                .collect();
            hub.fault(&path, Fault::Busy(status, headers), times);
        }
        Order::Cut { path, after, times } => hub.fault(&path, Fault::CutAfter(after), times),
        Order::Page { entries } => hub.page(entries),
        Order::Mirror { without } => {
            let has = |name: &str| without.iter().any(|other| other == name);
            hub.mirror(Mirror {
                no_tree: has("tree"),
                no_sizes: has("sizes"),
                no_head: has("head"),
                no_hashes: has("hashes"),
                no_redirects: has("redirects"),
                no_lengths: has("lengths"),
            });
        }
        Order::Multipart { threshold, chunk } => hub.multipart(threshold, chunk),
        Order::Files { repo, branch } => {
            let files = hub.files(&repo, &branch);
            let files = files.ok_or_else(|| format!("no {branch} of {repo}"))?;
            let hashes: BTreeMap<&String, String> = files
                .iter()
                .map(|(path, bytes)| (path, super::sha256(bytes)))
                .collect();
            return Ok(json!({ "files": hashes }));
        }
        Order::Requests {} => return Ok(json!({ "requests": hub.requests().len() })),
    }
    Ok(json!({}))
}

fn collect(folder: &Path, below: &str, files: &mut Vec<(String, Vec<u8>)>) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = format!("{below}{}", entry.file_name().to_string_lossy());
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), &format!("{name}/"), files)?;
        } else {
            files.push((name, fs::read(entry.path())?));
        }
    }
    Ok(())
}
