//! Where the work of many threads begins.

/// Runs something on one of the threads that share its work: called from another, each operation would wake and wait for them.
pub(super) fn in_pool<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    rayon::scope(|_| work())
}
