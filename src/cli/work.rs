//! `work`: runs one stage for another process of this program, which gives the task on standard input and listens on standard
//! output. Not for people.

use std::io::{BufReader, stdin, stdout};

use super::run::on_interrupt;
use super::{Failure, project};
use crate::engine::work::{begin, serve};
use crate::stages::KINDS;

#[derive(clap::Args)]
pub(super) struct Args {}

pub(super) fn run(_: &Args) -> Result<(), Failure> {
    begin();
    // Ctrl-C at a terminal goes to all its processes; the one that started this one decides.
    on_interrupt(|| {})?;
    serve(
        BufReader::new(stdin()),
        stdout(),
        KINDS,
        project::world,
        stop,
    )?;
    Ok(())
}

fn stop() -> ! {
    #[expect(clippy::exit, reason = "other threads may be stuck")]
    std::process::exit(1)
}
