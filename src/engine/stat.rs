//! The stat of a file, and the clock that its times are compared with.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// The stat of a file when its digest was computed. A file with an equal stat has not changed and is not read again: a writer can reset
/// the modification time of a file, but not its ctime.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stat {
    /// Bytes.
    pub size: u64,
    /// Modification time in nanoseconds since 1970.
    pub modified: i64,
    /// The time of the last change to contents, mode, owner, times or number of links (ctime), in nanoseconds since 1970.
    pub changed: i64,
    /// The inode number.
    pub inode: u64,
}

/// A file changed within this many nanoseconds may change again without getting a new time, on file systems with times in seconds. The
/// digest of such a file is not remembered.
const SETTLING: i64 = 2_000_000_000;

impl Stat {
    /// The stat of a file.
    pub fn from_metadata(metadata: &Metadata) -> Self {
        let nanoseconds = |seconds: i64, rest: i64| {
            let whole = seconds.saturating_mul(1_000_000_000);
            whole.saturating_add(rest)
        };
        Self {
            size: metadata.len(),
            modified: nanoseconds(metadata.mtime(), metadata.mtime_nsec()),
            changed: nanoseconds(metadata.ctime(), metadata.ctime_nsec()),
            inode: metadata.ino(),
        }
    }

    /// Whether the last change of the file was so long before `time` that every later change gets another time. If so, what was read
    /// since `time` is valid as long as the stat is the same.
    pub(super) fn settled_at(&self, time: i64) -> bool {
        is_settled(self.changed, time)
    }
}

/// [`Stat::settled_at`] of a time of the last change.
pub(super) fn is_settled(changed: i64, time: i64) -> bool {
    changed.saturating_add(SETTLING) < time
}

/// The system's time in nanoseconds since 1970.
pub(super) fn nanoseconds_now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
    })
}

/// The system's time in seconds since 1970.
pub(super) fn seconds_now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}
