//! The record of one finished stage: its whole fingerprint, what came out, and facts that don't count.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::canonical::Digest;
use super::fingerprint::{Fingerprint, Origin};

/// The format of the records below; another format is another folder.
pub(super) const FORMAT: u32 = 1;

/// The most bytes of a record; usual are a few KB. A longer file is none.
pub(super) const LONGEST_RECORD: usize = 16 << 20;

/// What is kept of a finished stage. A few KB, under the fingerprint's digest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    /// [`FORMAT`].
    pub format: u32,
    /// The name the stage had when it ran.
    pub stage: String,
    /// Everything that decided the result.
    pub fingerprint: Fingerprint,
    /// Where the content digests in the fingerprint came from, by parameter.
    pub origins: BTreeMap<String, Origin>,
    /// The noun of what was made.
    pub output: String,
    /// The content digest of the artifact.
    pub artifact: Digest,
    /// What the stage wrote down: rows read, rows dropped, sizes.
    pub notes: BTreeMap<String, Value>,
    /// Every parameter as it was, neutral ones included.
    pub params: Value,
    /// Seconds since 1970 when the stage started.
    pub started: u64,
    /// Seconds the stage took.
    pub seconds: f64,
    /// The program's version.
    pub pipeline: String,
}
