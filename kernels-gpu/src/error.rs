//! What can go wrong on a GPU.

use std::fmt::Display;

/// Why an adapter could not be opened, or what failed on it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// There is no adapter with this number.
    #[error(
        "there is no GPU number {number}: this machine has {count} (Vulkan, Metal or DirectX 12)"
    )]
    NoAdapter {
        /// The number that was asked for, counted from 0.
        number: usize,
        /// The number of adapters.
        count: usize,
    },
    /// An adapter's limits are too small, or it gave no device.
    #[error("the GPU {name} can't be used: {reason}")]
    Unusable {
        /// The adapter's name.
        name: String,
        /// Why.
        reason: String,
    },
    /// A buffer is larger than the adapter binds.
    #[error("a buffer of {bytes} bytes is more than the {limit} that the GPU binds at a time")]
    TooLarge {
        /// The buffer's size.
        bytes: u64,
        /// The adapter's limit.
        limit: u64,
    },
    /// There is no memory left.
    #[error(
        "the GPU has no memory left for a buffer of {bytes} bytes, with {held} in use: {reason}"
    )]
    OutOfMemory {
        /// The size of the buffer that was asked for.
        bytes: u64,
        /// The bytes in use.
        held: u64,
        /// What the driver said.
        reason: String,
    },
    /// The device failed or was lost.
    #[error("the GPU failed: {0}")]
    Failed(String),
}

/// The first lines of an error's text: what follows "Backtrace" is about the source of a library.
pub(crate) fn text(error: &impl Display) -> String {
    let all = error.to_string();
    let lines = all
        .lines()
        .take_while(|line| !line.starts_with("Backtrace"));
    let lines: Vec<&str> = lines
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    lines.join("; ")
}
