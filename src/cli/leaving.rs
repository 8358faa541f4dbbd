//! Ctrl-C, and what it means while jobs are on a cluster: they can be cancelled, or left, to be joined by the same command later.

use std::io::{BufRead as _, IsTerminal as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;

use super::eprint;
use crate::engine::Jobs;
use crate::report::above;

/// Calls `act` at every Ctrl-C (or SIGTERM).
pub(super) fn on_interrupt(act: impl FnMut() + Send + 'static) -> anyhow::Result<()> {
    let listening = ctrlc::set_handler(act).map_err(|error| match error {
        // Its own sentence leaves out what the system says.
        ctrlc::Error::System(error) => anyhow::Error::from(error),
        error => error.into(),
    });
    listening.context("could not listen to Ctrl-C")
}

/// The first Ctrl-C (or SIGTERM) stops the run, and is answered if `answers`; the second ends the process, which the store survives.
/// While there are jobs, the first one asks at a terminal whether to cancel or to leave them.
pub(super) fn stop_on_signal(
    cancel: &Arc<AtomicBool>,
    answers: bool,
    jobs: &Arc<Jobs>,
    leave: bool,
) -> anyhow::Result<()> {
    if leave {
        jobs.leave();
    }
    let asks = !leave && std::io::stdin().is_terminal() && std::io::stderr().is_terminal();
    let (cancel, jobs) = (Arc::clone(cancel), Arc::clone(jobs));
    let (mut stopping, mut asking) = (false, false);
    on_interrupt(move || {
        if std::mem::replace(&mut stopping, true) {
            if !asking {
                // Nothing that moved stays on the terminal. The question has seen to that.
                eprint("");
            }
            #[expect(clippy::exit, reason = "the user asked twice")]
            std::process::exit(130);
        }
        let stop = {
            let cancel = Arc::clone(&cancel);
            move || {
                cancel.store(true, Ordering::Relaxed);
                if answers {
                    eprint(
                        "interrupted: waiting for stages to stop; press Ctrl-C again to stop at once\n",
                    );
                }
            }
        };
        let count = jobs.count();
        if !asks || count == 0 {
            stop();
            return;
        }
        let jobs = Arc::clone(&jobs);
        // On a thread of its own, so that another Ctrl-C still counts.
        asking = true;
        let thread = std::thread::Builder::new().spawn(move || {
            if !wants_to_cancel(count) {
                jobs.leave();
            }
            stop();
        });
        if thread.is_err() {
            // Nothing is lost by leaving them.
            eprint("the jobs are left\n");
            #[expect(clippy::exit, reason = "the user asked for it")]
            std::process::exit(130);
        }
    })
}

/// Asks until there is an answer. Without a terminal any more (a lost connection), the jobs are left.
fn wants_to_cancel(count: usize) -> bool {
    let jobs = match count {
        1 => "1 job is".to_owned(),
        count => format!("{count} jobs are"),
    };
    above(|| {
        loop {
            anstream::eprint!(
                "{jobs} on the cluster: cancel (c), or leave and come back with the same command (l)? "
            );
            let mut answer = String::new();
            match std::io::stdin().lock().read_line(&mut answer) {
                Ok(1..) => {}
                _ => return false,
            }
            match answer.trim().to_lowercase().chars().next() {
                Some('c') => return true,
                Some('l') => return false,
                _ => {}
            }
        }
    })
}
