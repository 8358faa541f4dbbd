//! Buffers that are used again: fresh memory would have to be cleared by the system, page by page, at every operation.

use std::sync::Mutex;

/// Free buffers, the smallest first.
#[derive(Debug, Default)]
pub(in crate::ml) struct Pool(Mutex<Vec<Vec<f32>>>);

impl Pool {
    /// A buffer of this length, with anything in it.
    pub(super) fn take(&self, length: usize) -> Vec<f32> {
        let mut free = self.free();
        let place = free.partition_point(|buffer| buffer.capacity() < length);
        // One much too large would be missed where it is needed.
        let fits = |buffer: &Vec<f32>| buffer.capacity() <= 2 * length.max(1 << 10);
        let mut buffer = match free.get(place) {
            Some(buffer) if fits(buffer) => free.remove(place),
            // None is large enough: the largest of about this size makes room for it.
            _ => match place.checked_sub(1) {
                Some(before) if free[before].capacity() > length / 2 => {
                    drop(free.remove(before));
                    Vec::with_capacity(length)
                }
                _ => Vec::with_capacity(length),
            },
        };
        drop(free);
        buffer.resize(length, 0.);
        buffer
    }

    /// Takes a buffer back.
    pub(super) fn give(&self, buffer: Vec<f32>) {
        if buffer.capacity() > 0 {
            let mut free = self.free();
            let place = free.partition_point(|other| other.capacity() < buffer.capacity());
            free.insert(place, buffer);
        }
    }

    /// How many buffers are free.
    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.free().len()
    }

    fn free(&self) -> std::sync::MutexGuard<'_, Vec<Vec<f32>>> {
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
        let place = first.as_ptr();
        pool.give(first);
        assert_eq!(pool.take(10).capacity(), 10);
        let again = pool.take(4000);
        assert_eq!((again.as_ptr(), again.len()), (place, 4000));
        pool.give(again);
        assert_eq!(pool.take(6000).len(), 6000);
    }
}
