//! LoRA on a model: the initialisation of pairs, their attachment, their merge, and the verification of a merge.

pub mod attach;
pub mod init;
pub mod merge;
pub mod svd;
pub mod verify;
