//! A shared cache in a folder, S3, Google Cloud Storage, Azure or behind plain HTTP, by `object_store`.
//!
//! It knows named objects and nothing of what is in them. `object_store` is asynchronous; here it lives on one thread of its own, and
//! callers wait. What travels is handed over in pieces, so that memory stays bounded however large the files are.

mod address;
mod cloud;
mod transfer;

use std::collections::BTreeMap;
use std::fmt::Display;
use std::future::Future;
use std::io::{ErrorKind, Read};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use futures_util::{StreamExt as _, TryStreamExt as _};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt as _, PutMode, PutOptions};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, oneshot};

use crate::engine::remote::{Object, Remote, is_unfinished};

pub use address::Address;

/// The longest that a request without much of a body may take, all tries together.
const SHORT: Duration = Duration::from_secs(30);
/// The longest that a listing or a removal may take.
const LONG: Duration = Duration::from_mins(10);

/// A remote by `object_store`.
pub struct ObjectRemote {
    client: Client,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    shown: String,
    read_only: bool,
    /// The folder, if it is one of this machine.
    folder: Option<PathBuf>,
}

/// What calls need.
struct Client {
    store: Arc<dyn ObjectStore>,
    folder: Path,
    handle: Handle,
    secrets: Vec<String>,
    /// Pieces of uploads in memory.
    pieces: Arc<Semaphore>,
}

impl ObjectRemote {
    /// A client for an address. `variables` are the environment's: `AWS_..`, `GOOGLE_..`, `AZURE_..`, as the clouds' own tools name
    /// them. Sends nothing yet.
    pub fn open(address: &Address, variables: &BTreeMap<String, String>) -> anyhow::Result<Self> {
        let secrets = address.secrets(variables);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(8)
            .build()
            .context("could not start the thread of the remote")?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("remote".into())
            .spawn(move || {
                // Either way it is over.
                let _ = runtime.block_on(stopped);
                runtime.shutdown_background();
            })
            .context("could not start the thread of the remote")?;
        // Some clients look for their runtime when they are made.
        let entered = handle.enter();
        let opened = address.open(variables);
        drop(entered);
        let (store, folder) = opened.map_err(|error| {
            let why = address::clean(&format!("{error:#}"), &secrets);
            anyhow!("the remote `{}` can't be opened: {why}", address.shown())
        })?;
        Ok(Self {
            client: Client {
                store,
                folder,
                handle,
                secrets,
                pieces: Arc::new(Semaphore::new(transfer::PIECES)),
            },
            stop: Some(stop),
            thread: Some(thread),
            shown: address.shown(),
            read_only: address.is_read_only(),
            folder: address.folder().map(std::path::Path::to_owned),
        })
    }
}

impl Drop for ObjectRemote {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // A thread that is gone needs no telling.
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Client {
    /// The place of a key in the store.
    fn path(&self, key: &str) -> Path {
        key.split('/').fold(self.folder.clone(), Path::join)
    }

    /// An error as it may be shown.
    fn error(&self, error: &impl Display) -> anyhow::Error {
        anyhow!(address::clean(&error.to_string(), &self.secrets))
    }

    /// Waits for a future, at most so long.
    fn wait<T: Send + 'static>(
        &self,
        limit: Duration,
        future: impl Future<Output = object_store::Result<T>> + Send + 'static,
    ) -> anyhow::Result<object_store::Result<T>> {
        let (done, result) = mpsc::sync_channel(1);
        self.handle.spawn(async move {
            // Whoever waited may be gone.
            let _ = done.send(tokio::time::timeout(limit, future).await);
        });
        let result = result.recv().context("the thread of the remote is gone")?;
        result.map_err(|_| anyhow!("no answer for {} s", limit.as_secs()))
    }

    fn done<T: Send + 'static>(
        &self,
        limit: Duration,
        future: impl Future<Output = object_store::Result<T>> + Send + 'static,
    ) -> anyhow::Result<T> {
        self.wait(limit, future)?
            .map_err(|error| self.error(&error))
    }
}

impl Remote for ObjectRemote {
    fn address(&self) -> &str {
        &self.shown
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read(
        &self,
        key: &str,
        from: u64,
        sink: &mut dyn FnMut(&[u8]) -> anyhow::Result<()>,
    ) -> anyhow::Result<bool> {
        match &self.folder {
            // A file of this machine needs no thread to wait for: that is most of the time of a small one.
            Some(folder) => transfer::read_file(&folder.join(key), from, sink),
            None => transfer::read(&self.client, key, from, sink),
        }
    }

    fn size(&self, key: &str) -> anyhow::Result<Option<u64>> {
        let (store, path) = (Arc::clone(&self.client.store), self.client.path(key));
        let found = self
            .client
            .wait(SHORT, async move { store.head(&path).await })?;
        match found {
            Ok(meta) => Ok(Some(meta.size)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.client.error(&error)),
        }
    }

    fn write(&self, key: &str, size: u64, source: &mut dyn Read) -> anyhow::Result<()> {
        transfer::write(&self.client, key, size, source)
    }

    fn create(&self, key: &str, bytes: Vec<u8>) -> anyhow::Result<bool> {
        let (store, path) = (Arc::clone(&self.client.store), self.client.path(key));
        let options = PutOptions::from(PutMode::Create);
        let created = self.client.wait(SHORT, async move {
            store.put_opts(&path, bytes.into(), options).await
        })?;
        match created {
            Ok(_) => Ok(true),
            Err(
                object_store::Error::AlreadyExists { .. }
                | object_store::Error::Precondition { .. },
            ) => Ok(false),
            Err(error) => Err(self.client.error(&error)),
        }
    }

    fn list(&self, prefix: &str) -> anyhow::Result<Vec<Object>> {
        let (store, path) = (Arc::clone(&self.client.store), self.client.path(prefix));
        let found = self.client.done(LONG, async move {
            store.list(Some(&path)).try_collect::<Vec<_>>().await
        })?;
        let folder = self.client.folder.clone();
        let object = |meta: object_store::ObjectMeta| {
            let inside = meta.location.prefix_match(&folder)?;
            let key: Vec<_> = inside.map(|part| part.as_ref().to_owned()).collect();
            Some(Object {
                key: key.join("/"),
                size: meta.size,
                modified: meta.last_modified.into(),
            })
        };
        Ok(found.into_iter().filter_map(object).collect())
    }

    fn delete(&self, keys: &[String]) -> anyhow::Result<()> {
        let paths: Vec<_> = keys.iter().map(|key| Ok(self.client.path(key))).collect();
        let store = Arc::clone(&self.client.store);
        self.client.done(LONG, async move {
            let paths = futures_util::stream::iter(paths).boxed();
            let mut gone = store.delete_stream(paths);
            while let Some(result) = gone.next().await {
                match result {
                    Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        })
    }

    /// `object_store` writes a file of a folder under its name and `#1`, and hides such files from its lists. Object stores
    /// have rules of their own for uploads that were not finished.
    fn unfinished(&self) -> anyhow::Result<Vec<Object>> {
        let Some(root) = &self.folder else {
            return Ok(Vec::new());
        };
        let mut found = Vec::new();
        let mut open = vec![root.join("v1")];
        while let Some(folder) = open.pop() {
            let entries = match std::fs::read_dir(&folder) {
                Ok(entries) => entries,
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => {
                    return Err(error)
                        .with_context(|| format!("could not read `{}`", folder.display()));
                }
            };
            for entry in entries.flatten() {
                let path = entry.path();
                // What is gone meanwhile was finished.
                let Ok(metadata) = std::fs::symlink_metadata(&path) else {
                    continue;
                };
                let key = path.strip_prefix(root).ok().and_then(|key| key.to_str());
                if metadata.is_dir() {
                    open.push(path);
                } else if let Some(key) = key.filter(|key| is_unfinished(key))
                    && metadata.is_file()
                    && let Ok(modified) = metadata.modified()
                {
                    found.push(Object {
                        key: key.to_owned(),
                        size: metadata.len(),
                        modified,
                    });
                }
            }
        }
        found.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(found)
    }

    fn discard(&self, unfinished: &[&Object]) -> anyhow::Result<()> {
        let Some(root) = &self.folder else {
            return Ok(());
        };
        for object in unfinished
            .iter()
            .filter(|object| is_unfinished(&object.key))
        {
            let path = root.join(&object.key);
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(error)
                        .with_context(|| format!("could not remove `{}`", path.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }
}
