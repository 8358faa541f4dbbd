//! The record of one finished stage: its whole fingerprint, its result, and facts that don't affect freshness.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::canonical::Digest;
use super::fingerprint::{Fingerprint, Origin};

/// The format of records. Records of another format would be in another folder.
pub(super) const FORMAT: u32 = 1;

/// The largest size of a record in bytes; most have a few KB.
pub(super) const LONGEST_RECORD: usize = 16 << 20;

/// What is kept about a finished stage, under the digest of its fingerprint.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    /// [`FORMAT`].
    pub format: u32,
    /// The name the stage had when it ran.
    pub stage: String,
    /// Everything that determined the result.
    pub fingerprint: Fingerprint,
    /// Where the content digests in the fingerprint came from, by parameter.
    pub origins: BTreeMap<String, Origin>,
    /// The noun of what was made.
    pub output: String,
    /// The content digest of the artifact.
    pub artifact: Digest,
    /// What the stage noted: rows read, rows dropped, sizes.
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
