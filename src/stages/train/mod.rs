//! Trainings: one file a method, and what they share.

pub(in crate::stages) mod common;
pub mod train_orpo;
pub mod train_sft;
