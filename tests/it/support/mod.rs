//! What the tests share.

pub(crate) mod hub;
pub(crate) mod program;
