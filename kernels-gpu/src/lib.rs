//! The operations of crate `pipeline-kernels` on a GPU: kernels in Rust (`CubeCL`), compiled at run time for whatever graphics interface
//! the machine has (Vulkan, Metal, DirectX 12), without a toolkit of a vendor.
//!
//! Operations have the names, the arguments and the meaning of crate `pipeline-kernels`, as methods of [`Device`] on [`Buffer`]s.
//! Activations have its layout too, panels of 32 tokens (see [`pipeline_kernels::panels`]): feature `feature` of token
//! `panel * 32 + lane` is at `(panel * features + feature) * 32 + lane`. The 32 lanes of a row are neighbours in memory, so the units
//! of a GPU read them in one go, and a buffer is copied between the two without a transposition.
//!
//! Every sum is in f32 and has one order, fixed by the sizes alone: an operation gives the same bits each time on one adapter.
//! Sizes are checked where an operation begins; it panics with them in the sentence, as in `pipeline-kernels`.
//!
//! Operations are queued and return at once. What goes wrong on the device shows when something is read from it
//! ([`Device::read`], [`Device::wait`]); allocations report their failure themselves. Neither panics.

#![expect(
    unsafe_code,
    reason = "two functions of CubeCL, one that wants the length of a buffer repeated and one that chooses a device's queue, and Vulkan's \
              question for the memory of an adapter"
)]
#![allow(
    clippy::too_many_arguments,
    clippy::fn_params_excessive_bools,
    clippy::manual_is_multiple_of,
    clippy::manual_midpoint,
    reason = "a kernel's arguments are its buffers and numbers, and it knows no other functions than the device has"
)]

pub mod adapters;
mod attention;
mod buffer;
mod cached;
mod column_sums;
mod counters;
mod device;
mod dora;
mod elementwise;
mod error;
mod gated;
mod kernels;
mod norm;
mod optimiser;
mod product;
mod reduce;
mod spans;
mod tokens;
mod vocabulary;
mod weight;

pub use adapters::{Adapter, adapters};
pub use attention::Attention;
pub use buffer::{Buffer, PART_ALIGNMENT};
pub use cached::{CachedAttention, Seen};
pub use counters::Counts;
pub use device::Device;
pub use elementwise::{Features, Rotary};
pub use error::Error;
pub use optimiser::{AdamW, MOMENT_BLOCK, Moment8};
pub use product::{Onto, Product, Term};
pub use spans::Spans;
pub use vocabulary::Summaries;
pub use weight::{Matrix, Weight};

#[cfg(test)]
mod tests;
