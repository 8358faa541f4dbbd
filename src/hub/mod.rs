//! The Hugging Face hub behind one struct, [`Hub`].
//!
//! hf-hub knows the hub: URLs, the authorization header, the repository's description and the layout of the cache that
//! other programs share. What it does not do is done here, because its download keeps no time limit, trusts names, sizes
//! and ranges that a server sends, panics on a redirect without a target, and verifies nothing: the body is streamed over
//! the same HTTP library into a `.incomplete` file, resumed by range, checked against the size and hash of the listing,
//! and only then renamed into the cache. Knows nothing of stages, recipes or the environment.

mod client;
mod digest;
mod download;
mod http;
mod names;
mod settings;

pub use client::{Hub, Listing};
pub use names::{RemoteFile, RepoKind, Snapshot};
pub use settings::HubSettings;
pub(crate) use settings::is_true;
