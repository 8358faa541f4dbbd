//! Files on their way: downloads piece by piece, uploads in parts, with few pieces in memory at a time.

use std::io::{Read, Seek as _, SeekFrom};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use bytes::Bytes;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt as _, StreamExt as _};
use object_store::path::Path;
use object_store::{
    GetOptions, GetRange, GetResultPayload, ObjectStore, ObjectStoreExt as _, PutPayload,
};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use super::{Client, SHORT};

/// Bytes of a part; larger ones for files that would have more than [`PARTS`].
const PART: u64 = 8 << 20;
/// S3 allows 10,000.
const PARTS: u64 = 9000;
/// Pieces of all uploads together.
pub(super) const PIECES: usize = 12;
/// Parts of one file on the wire.
const IN_FLIGHT: usize = 3;
/// The longest that one part may take, all tries together.
const LIMIT: Duration = Duration::from_mins(5);

/// The longest pause in the middle of a file.
const STALL: Duration = Duration::from_mins(1);

/// What comes from the thread of the remote.
enum Piece {
    Bytes(Bytes),
    /// A file of this machine, to be read from an offset on, and its size.
    File(std::fs::File, u64, u64),
    Absent,
    Failed(String),
    End,
}

pub(super) fn read(
    client: &Client,
    key: &str,
    from: u64,
    sink: &mut dyn FnMut(&[u8]) -> anyhow::Result<()>,
) -> anyhow::Result<bool> {
    let (pieces, mut received) = mpsc::channel(4);
    let (store, path) = (Arc::clone(&client.store), client.path(key));
    client.handle.spawn(fetch(store, path, from, pieces));
    loop {
        match received.blocking_recv() {
            Some(Piece::Bytes(bytes)) => sink(&bytes)?,
            Some(Piece::File(file, from, size)) => {
                return copy(file, from, size, sink).map(|()| true);
            }
            Some(Piece::Absent) => return Ok(false),
            Some(Piece::End) => return Ok(true),
            Some(Piece::Failed(why)) => return Err(client.error(&why)),
            None => bail!("the thread of the remote is gone"),
        }
    }
}

/// [`read`] for a remote that is a folder of this machine.
pub(super) fn read_file(
    path: &std::path::Path,
    from: u64,
    sink: &mut dyn FnMut(&[u8]) -> anyhow::Result<()>,
) -> anyhow::Result<bool> {
    let cannot = || format!("could not read `{}`", path.display());
    let found = match std::fs::metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error).with_context(cannot),
    };
    // A pipe or a device has no end.
    if !found.is_file() {
        return Ok(false);
    }
    let file = std::fs::File::open(path).with_context(cannot)?;
    copy(file, from, found.len(), sink).map(|()| true)
}

fn copy(
    mut file: std::fs::File,
    from: u64,
    size: u64,
    sink: &mut dyn FnMut(&[u8]) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    if from > 0 {
        file.seek(SeekFrom::Start(from))
            .context("could not read a file of the remote")?;
    }
    // One byte more than there should be, to meet the end with the first look.
    let mut buffer = vec![0; size.saturating_add(1).min(1 << 20) as usize];
    loop {
        let count = file
            .read(&mut buffer)
            .context("could not read a file of the remote")?;
        if count == 0 {
            return Ok(());
        }
        sink(&buffer[..count])?;
    }
}

async fn fetch(store: Arc<dyn ObjectStore>, path: Path, from: u64, pieces: mpsc::Sender<Piece>) {
    let options = GetOptions {
        range: (from > 0).then_some(GetRange::Offset(from)),
        ..GetOptions::default()
    };
    let last = match tokio::time::timeout(SHORT, store.get_opts(&path, options)).await {
        Err(_) => Piece::Failed(format!("no answer for {} s", SHORT.as_secs())),
        Ok(Err(object_store::Error::NotFound { .. })) => Piece::Absent,
        Ok(Err(error)) => Piece::Failed(error.to_string()),
        Ok(Ok(found)) => match found.payload {
            GetResultPayload::File(file, _) => {
                Piece::File(file, found.range.start, found.meta.size)
            }
            GetResultPayload::Stream(mut stream) => loop {
                match tokio::time::timeout(STALL, stream.next()).await {
                    Ok(Some(Ok(bytes))) => {
                        if pieces.send(Piece::Bytes(bytes)).await.is_err() {
                            return;
                        }
                    }
                    Ok(Some(Err(error))) => break Piece::Failed(error.to_string()),
                    Ok(None) => break Piece::End,
                    Err(_) => break Piece::Failed(format!("nothing for {} s", STALL.as_secs())),
                }
            },
        },
    };
    // Whoever waited may be gone.
    let _ = pieces.send(last).await;
}

pub(super) fn write(
    client: &Client,
    key: &str,
    size: u64,
    source: &mut dyn Read,
) -> anyhow::Result<()> {
    let path = client.path(key);
    let part = PART.max(size.div_ceil(PARTS));
    // A source is read beyond its end, where it may object; a full piece does not tell that it was the last.
    if size < part {
        let _permit = permit(client)?;
        let bytes = piece(source, part)?;
        whole(size, bytes.len() as u64)?;
        let store = Arc::clone(&client.store);
        return client
            .done(LIMIT, async move { store.put(&path, bytes.into()).await })
            .map(drop);
    }
    let (parts, received) = mpsc::channel(1);
    let (done, result) = oneshot::channel();
    let store = Arc::clone(&client.store);
    client.handle.spawn(async move {
        // Whoever waited may be gone.
        let _ = done.send(upload(store, path, received).await);
    });
    let handed = hand_over(client, size, part, source, &parts);
    // A channel that closes without the word `finish` makes the upload stop and clean up.
    drop(parts);
    let result = result
        .blocking_recv()
        .context("the thread of the remote is gone")?;
    match (handed, result) {
        (Ok(()), Ok(())) => Ok(()),
        (_, Err(Some(why))) => Err(client.error(&why)),
        (Err(error), _) => Err(error),
        (Ok(()), Err(None)) => Err(anyhow!("the upload ended early")),
    }
}

/// A part, or the word that all parts were handed over.
type Part = Option<(Bytes, OwnedSemaphorePermit)>;

fn hand_over(
    client: &Client,
    size: u64,
    part: u64,
    source: &mut dyn Read,
    parts: &mpsc::Sender<Part>,
) -> anyhow::Result<()> {
    let mut sent = 0;
    loop {
        let permit = permit(client)?;
        let bytes = piece(source, part)?;
        if bytes.is_empty() {
            whole(size, sent)?;
            parts
                .blocking_send(None)
                .context("the upload ended early")?;
            return Ok(());
        }
        sent += bytes.len() as u64;
        let handed = parts.blocking_send(Some((bytes, permit)));
        handed.ok().context("the upload ended early")?;
    }
}

fn permit(client: &Client) -> anyhow::Result<OwnedSemaphorePermit> {
    let pieces = Arc::clone(&client.pieces);
    let permit = client.handle.block_on(pieces.acquire_owned());
    permit.context("the thread of the remote is gone")
}

/// The next piece of a file, shorter only at its end.
fn piece(source: &mut dyn Read, length: u64) -> anyhow::Result<Bytes> {
    let mut bytes = Vec::new();
    source
        .take(length)
        .read_to_end(&mut bytes)
        .context("could not read what is sent")?;
    Ok(bytes.into())
}

fn whole(size: u64, sent: u64) -> anyhow::Result<()> {
    if size != sent {
        bail!("the file has {sent} bytes, where {size} were expected");
    }
    Ok(())
}

/// Sends parts until all are there. `Err(None)` means that the caller gave up.
async fn upload(
    store: Arc<dyn ObjectStore>,
    path: Path,
    mut received: mpsc::Receiver<Part>,
) -> Result<(), Option<String>> {
    let began = tokio::time::timeout(SHORT, store.put_multipart(&path)).await;
    let mut upload = began
        .map_err(|_| Some(format!("no answer for {} s", SHORT.as_secs())))?
        .map_err(|error| Some(error.to_string()))?;
    let mut flying = FuturesUnordered::new();
    let result = loop {
        if flying.len() >= IN_FLIGHT
            && let Some(Err(why)) = flying.next().await
        {
            break Err(Some(why));
        }
        match received.recv().await {
            Some(Some((bytes, permit))) => {
                let part = upload.put_part(PutPayload::from(bytes));
                let part = tokio::time::timeout(LIMIT, part).map(|result| match result {
                    Err(_) => Err(format!("no answer for {} s", LIMIT.as_secs())),
                    Ok(result) => result.map_err(|error| error.to_string()),
                });
                // On its own, so that it goes on while the next part is waited for.
                let part = tokio::spawn(async move {
                    let _permit = permit;
                    part.await
                });
                flying.push(part.map(|joined| {
                    joined.unwrap_or_else(|_| Err("the thread of the remote is gone".to_owned()))
                }));
            }
            Some(None) => break Ok(()),
            None => break Err(None),
        }
    };
    let mut result = result;
    while let Some(part) = flying.next().await {
        if let (Ok(()), Err(why)) = (&result, part) {
            result = Err(Some(why));
        }
    }
    if result.is_ok() {
        result = match tokio::time::timeout(LIMIT, upload.complete()).await {
            Err(_) => Err(Some(format!("no answer for {} s", LIMIT.as_secs()))),
            Ok(completed) => completed.map(drop).map_err(|error| Some(error.to_string())),
        };
    }
    if result.is_err() {
        // What can't be cleaned up is for the store's own rules on unfinished uploads.
        let _ = tokio::time::timeout(SHORT, upload.abort()).await;
    }
    result
}
