//! Memory on the device.

use std::sync::Arc;

use cubecl::prelude::BufferArg;
use cubecl::server::Handle;

use crate::counters::Counters;

/// A buffer of 32-bit words on the device: floats, unsigned numbers, or packed smaller values. Its memory is given back when it is
/// dropped.
#[derive(Debug)]
pub struct Buffer {
    /// `None` where there was no memory; the device then launches nothing any more.
    pub(crate) handle: Option<Handle>,
    length: usize,
    counters: Arc<Counters>,
    held: u64,
}

/// The first word of a part of a buffer is a multiple of this: no adapter asks for more than 256 bytes.
pub const PART_ALIGNMENT: usize = 64;

impl Buffer {
    pub(crate) fn new(handle: Handle, length: usize, counters: Arc<Counters>) -> Self {
        counters.hold(Self::bytes_of(length));
        Self {
            handle: Some(handle),
            length,
            counters,
            held: Self::bytes_of(length),
        }
    }

    /// A buffer without memory.
    pub(crate) fn missing(length: usize, counters: Arc<Counters>) -> Self {
        Self {
            handle: None,
            length,
            counters,
            held: 0,
        }
    }

    pub(crate) fn bytes_of(length: usize) -> u64 {
        4 * length.max(1) as u64
    }

    /// The number of words.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether it has no words.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Leaves the first `length` words; the memory stays the same.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn shorten(&mut self, length: usize) {
        let all = self.length;
        assert!(length <= all, "{length} words of a buffer of {all}");
        self.length = length;
    }

    /// `length` words from word `first` on, in the same memory, which stays as long as one of the two does.
    ///
    /// # Panics
    /// If the buffer has not so many words, or `first` is no multiple of [`PART_ALIGNMENT`].
    #[must_use]
    pub fn part(&self, first: usize, length: usize) -> Self {
        let all = self.length;
        assert!(
            first.saturating_add(length) <= all && first.is_multiple_of(PART_ALIGNMENT),
            "{length} words from word {first} on of a buffer of {all}"
        );
        let before = 4 * first as u64;
        let handle = self.handle.clone().map(|handle| {
            let after = handle.size_in_used() - before - Self::bytes_of(length);
            handle.offset_start(before).offset_end(after)
        });
        Self {
            handle,
            length,
            counters: self.counters.clone(),
            held: 0,
        }
    }

    /// The buffer as an argument of a kernel.
    pub(crate) fn arg(&self) -> BufferArg {
        let Some(handle) = self.handle.clone() else {
            unreachable!("a device that failed launches nothing");
        };
        // SAFETY: `Device` allocated at least as many words as `length` says.
        unsafe { BufferArg::from_raw_parts(handle, self.length.max(1)) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.counters.free(self.held);
    }
}
