//! What the tests share.

pub(crate) mod heard;
pub(crate) mod hub;
pub(crate) mod objects;
pub(crate) mod program;
pub(crate) mod slurm;
pub(crate) mod terminal;
