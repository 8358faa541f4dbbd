//! What the tests share.

pub(crate) mod hub;
pub(crate) mod objects;
pub(crate) mod program;
