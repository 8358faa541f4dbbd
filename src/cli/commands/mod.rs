//! The subcommands, one file each.

pub(super) mod cache;
pub(super) mod chat;
pub(super) mod completions;
pub(super) mod diff;
pub(super) mod doctor;
pub(super) mod gc;
pub(super) mod generate;
pub(super) mod graph;
pub(super) mod history;
pub(super) mod import;
pub(super) mod init;
pub(super) mod kinds;
pub(super) mod lock;
pub(super) mod log;
pub(super) mod login;
pub(super) mod man;
pub(super) mod plan;
pub(super) mod publish;
pub(super) mod reference;
pub(super) mod run;
pub(super) mod schema;
pub(super) mod show;
pub(super) mod validate;
pub(super) mod why;
pub(super) mod work;
