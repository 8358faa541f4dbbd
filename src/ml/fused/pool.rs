//! A pool of buffers. Without it the system would have to clear fresh memory, page by page, at every operation.
//!
//! Passes differ in their number of tokens, and growing buffers would fragment the memory. So each buffer gets the capacity for the longest
//! pass; the system allocates memory only for what is written.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard};

use pipeline_kernels::product::{Factor, Pairs};

/// Free buffers.
#[derive(Debug, Default)]
pub(super) struct Pool {
    floats: Free<f32>,
    bits: Free<u32>,
    /// The number of panels of this pass, and that of the longest pass.
    panels: AtomicUsize,
    most: AtomicUsize,
}

impl Pool {
    /// Announces that passes will have up to `panels` panels.
    pub(super) fn expect(&self, panels: usize) {
        self.most.fetch_max(panels, Relaxed);
    }

    /// Announces the beginning of a pass of `panels` panels.
    pub(super) fn begin(&self, panels: usize) {
        self.panels.store(panels, Relaxed);
        self.expect(panels);
    }

    /// The capacity for a buffer of this length: the length that it would have in the longest pass.
    fn capacity(&self, length: usize) -> usize {
        let panels = self.panels.load(Relaxed);
        if panels > 0 && length.is_multiple_of(panels) {
            length / panels * self.most.load(Relaxed)
        } else {
            length
        }
    }

    /// A buffer of this length, contents unspecified.
    pub(super) fn take(&self, length: usize) -> Vec<f32> {
        self.floats.take(length, self.capacity(length))
    }

    /// Returns a buffer to the pool.
    pub(super) fn give(&self, buffer: Vec<f32>) {
        self.floats.give(buffer);
    }

    /// Panels `x` of `features` as a factor of a product that is computed in bf16.
    pub(super) fn rounded(&self, x: &[f32], features: usize) -> Factor<'static> {
        Factor::Pairs(Pairs::round(x, features, |length| {
            self.bits.take(length, self.capacity(length))
        }))
    }

    /// Returns the buffer of a factor to the pool.
    pub(super) fn give_rounded(&self, factor: Factor<'static>) {
        if let Factor::Pairs(pairs) = factor
            && let Some(buffer) = pairs.into_buffer()
        {
            self.bits.give(buffer);
        }
    }

    /// The bytes of free buffers.
    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        let floats = self.floats.lock().iter().map(Vec::capacity).sum::<usize>();
        let bits = self.bits.lock().iter().map(Vec::capacity).sum::<usize>();
        (floats + bits) * size_of::<f32>()
    }

    /// The number of free buffers.
    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.floats.lock().len() + self.bits.lock().len()
    }
}

/// Free buffers of one type, the smallest first.
#[derive(Debug)]
struct Free<T>(Mutex<Vec<Vec<T>>>);

impl<T> Default for Free<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T: Copy + Default> Free<T> {
    fn take(&self, length: usize, capacity: usize) -> Vec<T> {
        let mut free = self.lock();
        let index = free.partition_point(|buffer| buffer.capacity() < capacity);
        // A buffer that is much too large would be missing where it is needed.
        let fits = |buffer: &Vec<T>| buffer.capacity() <= 2 * capacity.max(1 << 10);
        let mut buffer = match free.get(index) {
            Some(buffer) if fits(buffer) => free.remove(index),
            // None is large enough, so the largest one of about this size is replaced.
            _ => match index.checked_sub(1) {
                Some(before) if free[before].capacity() > capacity / 2 => {
                    drop(free.remove(before));
                    Vec::with_capacity(capacity)
                }
                _ => Vec::with_capacity(capacity),
            },
        };
        drop(free);
        buffer.resize(length, T::default());
        buffer
    }

    fn give(&self, buffer: Vec<T>) {
        if buffer.capacity() > 0 {
            let mut free = self.lock();
            let index = free.partition_point(|other| other.capacity() < buffer.capacity());
            free.insert(index, buffer);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Vec<T>>> {
        match self.0.lock() {
            Ok(free) => free,
            Err(poisoned) => poisoned.into_inner(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back() {
        let pool = Pool::default();
        let first = pool.take(5000);
        let index = first.as_ptr();
        pool.give(first);
        assert_eq!(pool.take(10).capacity(), 10);
        let again = pool.take(4000);
        assert_eq!((again.as_ptr(), again.len()), (index, 4000));
        pool.give(again);
        assert_eq!(pool.take(6000).len(), 6000);
    }

    #[test]
    fn a_longer_pass_finds_room_in_the_buffers_of_a_shorter_one() {
        let pool = Pool::default();
        pool.expect(10);
        pool.begin(3);
        let buffers = [64, 512].map(|width| pool.take(3 * width));
        let token_indices = buffers.each_ref().map(Vec::as_ptr);
        for buffer in buffers {
            pool.give(buffer);
        }
        pool.begin(10);
        let longer = [512, 64].map(|width| pool.take(10 * width));
        assert_eq!(longer[0].as_ptr(), token_indices[1]);
        assert_eq!(longer[1].as_ptr(), token_indices[0]);
    }
}
