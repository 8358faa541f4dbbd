//! Memory on the device.

use std::sync::Arc;

use cubecl::prelude::BufferArg;
use cubecl::server::Handle;

use crate::device::Counters;

/// A buffer of 32-bit words on the device: floats, unsigned numbers, or packed smaller values. Its memory is given back when it is
/// dropped.
#[derive(Debug)]
pub struct Buffer {
    pub(crate) handle: Handle,
    length: usize,
    counters: Arc<Counters>,
}

impl Buffer {
    pub(crate) fn new(handle: Handle, length: usize, counters: Arc<Counters>) -> Self {
        counters.hold(Self::bytes_of(length));
        Self {
            handle,
            length,
            counters,
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

    /// The buffer as an argument of a kernel.
    pub(crate) fn arg(&self) -> BufferArg {
        // SAFETY: `Device` allocated at least as many words as `length` says.
        unsafe { BufferArg::from_raw_parts(self.handle.clone(), self.length.max(1)) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.counters.free(Self::bytes_of(self.length));
    }
}
