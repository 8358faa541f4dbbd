//! Chat templates and tokenizers, exactly as transformers and TRL use them. Knows no tables and no cache.
//!
//! A row's way: [`chat`] renders it through a [`template`], [`preference`] turns the texts into token ids with a
//! [`tokenizer`]; [`bpe`] trains a new tokenizer.

pub mod bpe;
pub mod builtin;
mod characters;
pub mod chat;
pub mod comments;
mod declared;
mod depth;
mod dialect;
mod expressions;
mod fast_bpe;
mod files;
mod filters;
mod generation;
pub mod plain_template;
pub mod preference;
mod rendered;
mod split;
pub mod template;
pub mod text_stream;
pub mod tokenizer;
pub mod turn_end;
mod turns;
pub mod vocabulary;
