//! `work`: runs one stage for another process of this program, which gives the task on standard input and listens on standard
//! output. Not for people.

use std::io::{BufReader, stdin, stdout};

use anyhow::anyhow;
use pipeline_kernels::dispatch::{Isa, limit};

use super::run::on_interrupt;
use crate::cli::{Failure, project, variable};
use crate::engine::work::{begin, serve};
use crate::stages::KINDS;

/// The variable with the largest instruction set that the kernels may use, to measure what another processor would do. It changes
/// results by the order of sums at most, so no result is keyed by it.
const VARIABLE: &str = "PIPELINE_INSTRUCTION_SET";

#[derive(clap::Args)]
pub(in crate::cli) struct Args {}

pub(in crate::cli) fn run(_: &Args) -> Result<(), Failure> {
    begin();
    if let Some(name) = variable(VARIABLE) {
        let names = Isa::ALL.map(Isa::name).join(", ");
        let isa = Isa::named(&name);
        limit(isa.ok_or_else(|| anyhow!("{VARIABLE} is `{name}`; it is one of {names}"))?);
    }
    // Ctrl-C at a terminal goes to all its processes; the one that started this one decides.
    on_interrupt(|| {})?;
    serve(
        BufReader::new(stdin()),
        stdout(),
        KINDS,
        project::run_env,
        stop,
    )?;
    Ok(())
}

fn stop() -> ! {
    #[expect(clippy::exit, reason = "other threads may be stuck")]
    std::process::exit(1)
}
