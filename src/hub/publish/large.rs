//! The store of large files (git LFS): what it lacks is sent to signed addresses, in one piece or in parts.

use std::collections::BTreeMap;
use std::io::Read;

use anyhow::{Context as _, bail};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use ureq::http::Uri;

use super::{AT_ONCE, Progress, Publication, Sending};
use crate::hub::Hub;
use crate::hub::http_error::HttpError;

#[derive(Deserialize)]
struct Batch {
    objects: Vec<Object>,
}

#[derive(Deserialize)]
struct Object {
    oid: String,
    actions: Option<Actions>,
    error: Option<ObjectError>,
}

#[derive(Deserialize)]
struct ObjectError {
    #[serde(default)]
    message: String,
}

#[derive(Deserialize)]
struct Actions {
    upload: Action,
    verify: Option<Action>,
}

#[derive(Deserialize)]
struct Action {
    href: String,
    #[serde(default)]
    header: Map<String, Value>,
}

impl Hub<'_> {
    /// Sends what the store of large files does not have; returns how many bytes.
    pub(super) fn send_large(
        &self,
        publication: &Publication,
        branch: &str,
        sending: &[Sending<'_>],
        tell: Progress<'_>,
    ) -> anyhow::Result<u64> {
        let Publication { kind, repo, .. } = publication;
        let address = format!(
            "{}/{}.git/info/lfs/objects/batch",
            self.endpoint.address,
            kind.page(repo)
        );
        let large: Vec<&Sending<'_>> = sending.iter().filter(|sending| sending.large).collect();
        let mut sent = 0;
        for large in large.chunks(AT_ONCE) {
            let objects = large
                .iter()
                .map(|sending| (sending.hash.as_str(), *sending))
                .collect::<BTreeMap<_, _>>();
            let wanted: Vec<Value> = objects
                .iter()
                .map(|(oid, sending)| json!({ "oid": oid, "size": sending.size }))
                .collect();
            let mut asked = json!({
                "operation": "upload", "transfers": ["basic", "multipart"], "objects": wanted, "hash_algo": "sha256",
            });
            // Who may only propose need not be allowed to write to the branch.
            if !publication.create_pr {
                asked["ref"] = json!({ "name": branch });
            }
            let uri: Uri = address.parse()?;
            let body = serde_json::to_vec(&asked)?;
            let batch: Batch = self
                .persist(|| self.http.post(&uri, "application/vnd.git-lfs+json", &body))?
                .map_err(|failure| {
                    self.explain_write(*kind, repo, "announcing large files", &failure)
                })?;
            for object in batch.objects {
                let sending = objects.get(object.oid.as_str()).with_context(|| {
                    format!(
                        "{} answers for a file that nobody asked about",
                        self.endpoint.address
                    )
                })?;
                let path = &sending.file.path;
                if let Some(error) = object.error {
                    bail!(
                        "{} refuses `{path}`: \"{}\"",
                        self.endpoint.address,
                        self.http.quotable(&error.message)
                    );
                }
                let Some(actions) = object.actions else {
                    continue;
                };
                self.send_one(sending, &actions, tell)
                    .map_err(|failure| match failure {
                        Failed::Hub(failure) => {
                            self.explain_write(*kind, repo, &format!("sending `{path}`"), &failure)
                        }
                        Failed::Here(error) => error.context(format!("could not send `{path}`")),
                    })?;
                sent += sending.size;
            }
        }
        Ok(sent)
    }

    fn send_one(
        &self,
        sending: &Sending<'_>,
        actions: &Actions,
        tell: Progress<'_>,
    ) -> Result<(), Failed> {
        let Action { href, header } = &actions.upload;
        let uri = |address: &str| -> Result<Uri, Failed> {
            let uri = address.parse();
            uri.map_err(|_| HttpError::Malformed("it names an address that is none".into()).into())
        };
        let mut put = |address: &Uri, start: u64, size: u64| -> Result<Option<String>, Failed> {
            let sent = self.persist(|| {
                let source = sending.file.contents.part(start, size);
                let source = source.map_err(|error| {
                    HttpError::Malformed(format!("the file can't be read: {error}"))
                })?;
                let mut watched = Watched {
                    source,
                    tick: &mut |read: u64| {
                        tell(&sending.file.path, start + read, sending.size);
                        self.watch.tick()
                    },
                    read: 0,
                };
                self.http.put(address, &mut watched, size)
            });
            sent.map_err(Failed::Here)?.map_err(Failed::Hub)
        };
        match header.get("chunk_size") {
            None => _ = put(&uri(href)?, 0, sending.size)?,
            Some(size) => {
                let size = size.as_u64().or_else(|| size.as_str()?.parse().ok());
                let size = size.filter(|size| *size > 0);
                let size = size.ok_or_else(|| {
                    HttpError::Malformed("it names no size of the parts of a file".into())
                })?;
                let mut parts: Vec<(u64, &str)> = header
                    .iter()
                    .filter_map(|(name, address)| Some((name.parse().ok()?, address.as_str()?)))
                    .collect();
                parts.sort_unstable();
                if parts.len() as u64 != sending.size.div_ceil(size) {
                    return Err(HttpError::Malformed(
                        "it names addresses for other parts than the file has".into(),
                    )
                    .into());
                }
                let mut etags = Vec::with_capacity(parts.len());
                for (number, (_, address)) in (0..).zip(&parts) {
                    let start = number * size;
                    let etag = put(&uri(address)?, start, size.min(sending.size - start))?;
                    let etag = etag.ok_or_else(|| {
                        HttpError::Malformed("it does not say what a part became".into())
                    })?;
                    etags.push(json!({ "partNumber": number + 1, "etag": etag }));
                }
                let body = json!({ "oid": sending.hash, "parts": etags });
                let body = serde_json::to_vec(&body).map_err(|error| Failed::Here(error.into()))?;
                let whole = uri(href)?;
                // Its address is signed, as those of the parts.
                let done = self.persist(|| self.http.post_signed(&whole, &body));
                done.map_err(Failed::Here)?.map_err(Failed::Hub)?;
            }
        }
        if let Some(verify) = &actions.verify {
            let body = json!({ "oid": sending.hash, "size": sending.size });
            let body = serde_json::to_vec(&body).map_err(|error| Failed::Here(error.into()))?;
            let address = uri(&verify.href)?;
            let done = self.persist(|| self.http.post_any(&address, "application/json", &body));
            done.map_err(Failed::Here)?.map_err(Failed::Hub)?;
        }
        Ok(())
    }
}

/// Why a file was not sent.
enum Failed {
    Hub(HttpError),
    /// The watch ended it, or the like.
    Here(anyhow::Error),
}

impl From<HttpError> for Failed {
    fn from(failure: HttpError) -> Self {
        Self::Hub(failure)
    }
}

/// A reader that tells how far it is, and ends when it is told to.
struct Watched<'r> {
    source: Box<dyn Read + 'r>,
    tick: &'r mut dyn FnMut(u64) -> anyhow::Result<()>,
    read: u64,
}

impl Read for Watched<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        (self.tick)(self.read).map_err(std::io::Error::other)?;
        let read = self.source.read(buffer)?;
        self.read += read as u64;
        Ok(read)
    }
}
