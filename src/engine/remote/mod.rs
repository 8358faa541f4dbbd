//! A cache that machines share: what it looks like, and how a store gives to it and takes from it.
//!
//! ```text
//! v1/blobs/<2 digits>/<blake3>    the contents of one file
//! v1/manifests/<content>.json     the files of an artifact: path to digest and size
//! v1/records/<fingerprint>.json   published last, and only if nobody else has
//! v1/jobs/<job>/                  what a runner and a job on a node without the store tell each other, until it is over
//! ```
//!
//! A remote is a dumb [`Remote`]: named objects. Everything that comes from it is checked here against the digest that names it
//! before it is used, and what is not as it should be counts as absent.

mod bookkeeping;
mod fetch;
mod jobs;
mod layout;
mod pull;
mod push;
mod shared;
#[cfg(test)]
mod tests;
mod upkeep;

use std::io::Read;
use std::time::SystemTime;

pub(in crate::engine) use jobs::{LONGEST_TASK, Mailbox, TASK};
pub(crate) use layout::is_unfinished;
pub use layout::{parse_manifest, parse_record};
pub use push::Sent;
pub use shared::{Settings, Shared};
pub use upkeep::{Damage, Listed, Waste};

/// An object in a remote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    /// Its name, with `/` between parts.
    pub key: String,
    /// Bytes.
    pub size: u64,
    /// When it was written.
    pub modified: SystemTime,
}

/// Named objects somewhere else. Used by several threads at once; every call ends in bounded time.
pub trait Remote: Send + Sync {
    /// Where it is, for messages; without credentials.
    fn address(&self) -> &str;

    /// Whether it is of a sort that can't be written.
    fn read_only(&self) -> bool;

    /// Hands an object's bytes from an offset on to `sink`, piece by piece. `false` if there is no such object.
    fn read(
        &self,
        key: &str,
        from: u64,
        sink: &mut dyn FnMut(&[u8]) -> anyhow::Result<()>,
    ) -> anyhow::Result<bool>;

    /// The size of an object, if it is there.
    fn size(&self, key: &str) -> anyhow::Result<Option<u64>>;

    /// Writes an object of `size` bytes from `source`, whole or not at all. Nothing is left if `source` fails.
    fn write(&self, key: &str, size: u64, source: &mut dyn Read) -> anyhow::Result<()>;

    /// Writes a small object if there is none of that name; whether it did.
    fn create(&self, key: &str, bytes: Vec<u8>) -> anyhow::Result<bool>;

    /// The objects whose name starts with these parts.
    fn list(&self, prefix: &str) -> anyhow::Result<Vec<Object>>;

    /// Removes objects; one that is gone already is no error.
    fn delete(&self, keys: &[String]) -> anyhow::Result<()>;

    /// What writers that were killed left of objects (see [`layout::is_unfinished`]), where the remote doesn't clean up by itself.
    fn unfinished(&self) -> anyhow::Result<Vec<Object>> {
        Ok(Vec::new())
    }

    /// Removes what [`Remote::unfinished`] found.
    fn discard(&self, _unfinished: &[&Object]) -> anyhow::Result<()> {
        Ok(())
    }
}
