//! Buffers that end at, or begin behind, a page that nobody may touch: whoever reads or writes beyond them ends the test.

use std::ops::{Deref, DerefMut};

/// On which side the untouchable page lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Before,
    Behind,
}

impl Side {
    pub(super) const BOTH: [Self; 2] = [Self::Before, Self::Behind];

    /// A copy of `values` on this side.
    pub(super) fn copy<T: Copy>(self, values: &[T]) -> Guarded<T> {
        Guarded::new(self, values)
    }
}

#[cfg(unix)]
pub(super) struct Guarded<T> {
    map: *mut libc::c_void,
    size: usize,
    first: *mut T,
    count: usize,
}

// SAFETY: it owns its memory, and gives it out only as it is borrowed itself.
#[cfg(unix)]
unsafe impl<T: Send> Send for Guarded<T> {}
// SAFETY: the same.
#[cfg(unix)]
unsafe impl<T: Sync> Sync for Guarded<T> {}

#[cfg(unix)]
impl<T: Copy> Guarded<T> {
    fn new(side: Side, values: &[T]) -> Self {
        // SAFETY: only asks.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
        let bytes = size_of_val(values).next_multiple_of(page).max(page);
        let size = bytes + 2 * page;
        // SAFETY: new memory, which overlaps nothing.
        let map = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANON;
            libc::mmap(std::ptr::null_mut(), size, libc::PROT_NONE, flags, -1, 0)
        };
        assert!(map != libc::MAP_FAILED, "memory for a test");
        // SAFETY: the pages between the first and the last one of this map.
        let opened = unsafe {
            let inside = map.byte_add(page);
            libc::mprotect(inside, bytes, libc::PROT_READ | libc::PROT_WRITE)
        };
        assert_eq!(opened, 0, "memory for a test");
        let start = match side {
            Side::Before => page,
            Side::Behind => page + bytes - size_of_val(values),
        };
        // SAFETY: within the map. Pages and sizes are multiples of what `T` is aligned to.
        let first = unsafe { map.byte_add(start) }.cast::<T>();
        assert!(first.is_aligned());
        // SAFETY: as many values as there is room for.
        unsafe { first.copy_from_nonoverlapping(values.as_ptr(), values.len()) };
        Self {
            map,
            size,
            first,
            count: values.len(),
        }
    }
}

#[cfg(unix)]
impl<T> Deref for Guarded<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: written in `new`, and borrowed like `self`.
        unsafe { std::slice::from_raw_parts(self.first, self.count) }
    }
}

#[cfg(unix)]
impl<T> DerefMut for Guarded<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and nobody else has it.
        unsafe { std::slice::from_raw_parts_mut(self.first, self.count) }
    }
}

#[cfg(unix)]
impl<T> Drop for Guarded<T> {
    fn drop(&mut self) {
        // SAFETY: the map of `new`, of which no borrow is left.
        unsafe { libc::munmap(self.map, self.size) };
    }
}

/// Elsewhere, plain memory.
#[cfg(not(unix))]
pub(super) struct Guarded<T>(Vec<T>);

#[cfg(not(unix))]
impl<T: Copy> Guarded<T> {
    fn new(_: Side, values: &[T]) -> Self {
        Self(values.to_vec())
    }
}

#[cfg(not(unix))]
impl<T> Deref for Guarded<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

#[cfg(not(unix))]
impl<T> DerefMut for Guarded<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.0
    }
}

#[test]
fn values_lie_at_the_end_or_the_start_of_their_pages() {
    for side in Side::BOTH {
        let mut guarded = side.copy(&[1f32, 2., 3.]);
        guarded[2] = 4.;
        assert_eq!(guarded[..], [1., 2., 4.]);
        assert!(side.copy::<u8>(&[]).is_empty());
    }
}
