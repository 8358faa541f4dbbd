//! The Hugging Face hub behind one struct, [`Hub`].
//!
//! hf-hub knows who asks and the layout of the cache that other programs share. What it does not do is done here, because
//! its download keeps no time limit, trusts names, sizes and ranges that a server sends, panics on a redirect without a target,
//! and verifies nothing: the body is streamed over the same HTTP library into a `.incomplete` file, resumed by range, checked
//! against the size and hash of the listing, and only then renamed into the cache. Knows nothing of stages, recipes or the
//! environment.

mod account;
mod client;
mod digest;
mod download;
mod endpoint;
mod explain;
mod headers;
mod http;
mod http_error;
mod http_write;
mod listing;
mod names;
mod proxies;
mod publish;
mod settings;
mod tls;
mod token_store;

pub use account::{Account, Answered};
pub use client::{Hub, Watch};
pub use http::agent_for;
pub use listing::Listing;
pub use names::{RemoteFile, RepoKind, Snapshot};
pub use proxies::Proxies;
pub use publish::{Contents, NewFile, Progress, Publication, Pushed};
pub(crate) use settings::is_offline;
pub use settings::{HubSettings, VARIABLES};
pub use token_store::TokenStore;

/// An address for people: without a name, a password and a query.
pub fn shown_address(address: &str) -> String {
    endpoint::shown(address)
}
