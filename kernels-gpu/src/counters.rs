//! What a device was made to do: launches, copies and the memory that is held.

use std::sync::atomic::{AtomicU64, Ordering};

/// What a device was made to do since it was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// The kernels that were launched.
    pub launches: u64,
    /// The copies to the device.
    pub uploads: u64,
    /// The bytes that were copied to the device.
    pub uploaded_bytes: u64,
    /// The copies from the device.
    pub downloads: u64,
    /// The bytes that were copied from the device.
    pub downloaded_bytes: u64,
    /// The buffers that were asked for.
    pub allocations: u64,
    /// The bytes of the buffers that are held now.
    pub held_bytes: u64,
    /// The most bytes that were held at a time.
    pub peak_bytes: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) launches: AtomicU64,
    pub(crate) uploads: AtomicU64,
    pub(crate) uploaded: AtomicU64,
    pub(crate) downloads: AtomicU64,
    pub(crate) downloaded: AtomicU64,
    pub(crate) allocations: AtomicU64,
    pub(crate) held: AtomicU64,
    pub(crate) peak: AtomicU64,
}

impl Counters {
    pub(crate) fn hold(&self, bytes: u64) {
        let held = self.held.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.peak.fetch_max(held, Ordering::Relaxed);
        self.allocations.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn free(&self, bytes: u64) {
        self.held.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// What was counted so far.
    pub(crate) fn counts(&self) -> Counts {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            launches: of(&self.launches),
            uploads: of(&self.uploads),
            uploaded_bytes: of(&self.uploaded),
            downloads: of(&self.downloads),
            downloaded_bytes: of(&self.downloaded),
            allocations: of(&self.allocations),
            held_bytes: of(&self.held),
            peak_bytes: of(&self.peak),
        }
    }
}
