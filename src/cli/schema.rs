//! `schema`: the JSON Schema of recipes.

use super::{Failure, print};
use crate::stages::KINDS;

#[derive(clap::Args)]
pub(super) struct Args {}

pub(super) fn run(_: &Args) -> Result<(), Failure> {
    let schema = crate::recipe::schema(KINDS);
    let text = serde_json::to_string_pretty(&schema).map_err(anyhow::Error::from)?;
    print(&format!("{text}\n"));
    Ok(())
}
