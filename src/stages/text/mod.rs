//! From messages to tokens.

pub(in crate::stages) mod added;
pub mod apply_chat_template;
pub(in crate::stages) mod chat_template;
pub(in crate::stages) mod labelled;
pub mod score_reference;
mod shards;
pub mod tokenize;
pub(in crate::stages) mod tokenizers;
