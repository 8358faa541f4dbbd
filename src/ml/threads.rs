//! The entry to parallel work.

/// Runs `work` on one of the pool's threads. Called from any other thread, each parallel operation would have to wake the pool and
/// wait for it.
pub(super) fn in_pool<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    rayon::scope(|_| work())
}
