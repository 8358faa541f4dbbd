//! `work`: runs one task of an executor. From another process of this program it comes on standard input, with orders behind it, and
//! for a scheduler that starts this one it is a file. Events go to standard output, a line of JSON each. Not for people.

use std::io::{BufReader, stdin, stdout};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::anyhow;
use pipeline_kernels::dispatch::{Isa, limit};

use super::run::on_interrupt;
use crate::cli::{Failure, project, variable};
use crate::engine::work::{Orders, Work, catch_panics, end_with_parent, read_task, read_task_file};
use crate::stages::KINDS;

/// The variable with the largest instruction set that the kernels may use, to measure what another processor would do. It changes
/// results by the order of sums at most, so no result is keyed by it.
const VARIABLE: &str = "PIPELINE_INSTRUCTION_SET";

#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    /// The task, a JSON file [default: the first line of standard input]
    task: Option<PathBuf>,
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    if args.task.is_none() {
        end_with_parent();
    }
    catch_panics();
    if let Some(name) = variable(VARIABLE) {
        let names = Isa::ALL.map(Isa::name).join(", ");
        let isa = Isa::named(&name);
        limit(isa.ok_or_else(|| anyhow!("{VARIABLE} is `{name}`; it is one of {names}"))?);
    }
    let cancel = Arc::new(AtomicBool::new(false));
    let (task, orders) = match &args.task {
        None => {
            // Ctrl-C at a terminal goes to all its processes; the one that started this one decides.
            on_interrupt(|| {})?;
            let mut orders: Orders = Box::new(BufReader::new(stdin()));
            (read_task(&mut *orders)?, Some(orders))
        }
        Some(path) => {
            // A scheduler ends its jobs by a signal.
            let cancel = Arc::clone(&cancel);
            on_interrupt(move || cancel.store(true, Ordering::Relaxed))?;
            (read_task_file(path)?, None)
        }
    };
    let work = Work {
        kinds: KINDS,
        env: project::run_env,
        cancel,
        exit,
    };
    let succeeded = work.serve(&task, orders, stdout())?;
    // The process that started this one reads the reason among the events, and a scheduler looks at the exit code.
    if succeeded || args.task.is_none() {
        Ok(())
    } else {
        Err(Failure::Reported)
    }
}

fn exit() -> ! {
    #[expect(clippy::exit, reason = "other threads may be stuck")]
    std::process::exit(1)
}
