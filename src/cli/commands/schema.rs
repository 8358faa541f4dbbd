//! `schema`: the JSON Schema of recipes.

use crate::cli::{Failure, print};
use crate::stages::KINDS;

#[derive(clap::Args)]
pub(in crate::cli) struct Args {}

pub(in crate::cli) fn run(_: &Args) -> Result<(), Failure> {
    let schema = crate::recipe::schema(KINDS);
    let text = serde_json::to_string_pretty(&schema).map_err(anyhow::Error::from)?;
    print(&format!("{text}\n"));
    Ok(())
}
