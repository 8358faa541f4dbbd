//! `schema`: the JSON Schema of recipes, or of events.

use crate::cli::{Failure, print};
use crate::report::events_schema;
use crate::stages::KINDS;

#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    /// The schema of the events that `--json` writes, one line of them
    #[arg(long)]
    events: bool,
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    let schema = if args.events {
        events_schema()
    } else {
        crate::recipe::schema(KINDS)
    };
    let text = serde_json::to_string_pretty(&schema).map_err(anyhow::Error::from)?;
    print(&format!("{text}\n"));
    Ok(())
}
