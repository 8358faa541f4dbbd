//! LoRA on a model: how pairs begin, how they are attached, how they are merged, and how a merge is verified.

pub mod attach;
pub mod init;
pub mod merge;
pub mod svd;
pub mod verify;
