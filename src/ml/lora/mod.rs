//! LoRA on a model: the initialisation of pairs, their attachment, their combination and merge, and the verification of a merge.

pub mod attach;
pub mod combine;
pub mod init;
pub mod merge;
mod principal;
mod qr;
pub mod svd;
pub mod verify;
