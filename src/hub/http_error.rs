//! Why a request brought nothing.

use std::time::Duration;

/// Why a request brought nothing.
#[derive(Debug)]
pub(super) enum HttpError {
    /// The server answered, but not with what was asked for.
    Status {
        status: u16,
        /// The hub's own word for it: `GatedRepo`, `RepoNotFound`, `RevisionNotFound`, `EntryNotFound`.
        code: Option<String>,
        /// The hub's sentence.
        says: Option<String>,
        /// How long it asks to wait.
        wait: Option<Duration>,
    },
    /// The connection failed or fell silent; another try may work.
    Connection(String),
    /// The server's certificate is not trusted.
    Certificate(String),
    /// An answer that makes no sense.
    Malformed(String),
}

impl HttpError {
    /// Whether the same request may work a little later.
    pub(super) fn is_transient(&self) -> bool {
        match self {
            Self::Status { status, .. } => *status == 408 || *status == 429 || *status >= 500,
            Self::Connection(_) => true,
            Self::Certificate(_) | Self::Malformed(_) => false,
        }
    }

    /// What happened, in a few words.
    pub(super) fn reason(&self) -> String {
        match self {
            Self::Status { status, .. } => format!("status {status}"),
            Self::Connection(reason) | Self::Certificate(reason) | Self::Malformed(reason) => {
                reason.clone()
            }
        }
    }

    /// Whether it looks as if the server knew nothing of such addresses at all: a mirror of a part of the hub.
    pub(super) fn is_unsupported(&self) -> bool {
        match self {
            Self::Status { status, code, .. } => {
                [400, 404, 405, 501].contains(status) && code.is_none()
            }
            Self::Malformed(_) => true,
            Self::Connection(_) | Self::Certificate(_) => false,
        }
    }
}
