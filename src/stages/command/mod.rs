//! Programs of other people as stages.

mod layout;
pub mod run_command;
mod sandbox;
