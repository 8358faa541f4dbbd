//! One of several processes that `mpirun` or `srun` started for a task. The first one reads the task, hears orders and tells events, as the
//! only process of a task does; the others write their warnings to standard error, from where the executor takes those that the first one
//! does not have.
//!
//! A process that fails ends all others, because they would wait for it for ever.

use std::ffi::c_int;
use std::io::{self, BufReader, Write, stdin, stdout};
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::anyhow;

use crate::cli::leaving::on_interrupt;
use crate::cli::{Failure, eprint, project};
use crate::engine::work::{Orders, Work, failure, panicked, prefix, text_of_orders};
use crate::engine::{Event, Level, Task};
use crate::ml::train::process_group::mpi::{Member, World, abort};
use crate::ml::train::process_group::{self, ProcessGroup as _};
use crate::stages::KINDS;

/// The exit code of all processes when one of them failed.
const FAILED: c_int = 1;
/// How long a process that failed waits before it ends the others. A mistake in what all of them read fails all of them, and is told by the
/// first one alone.
const WAIT: Duration = Duration::from_secs(2);

/// Runs the task at `path`, or the one on the first process's standard input, together with the other processes.
pub(super) fn run(path: Option<&Path>) -> Result<(), Failure> {
    let member = Member::start()?;
    let world = member.world;
    end_all_on_panic(world);
    process_group::join(Box::new(world));
    match work(world, path) {
        // The others may still be at work: dropping the member waits for them.
        Ok(()) => {
            drop(member);
            Ok(())
        }
        Err(error) => end_all(world, &error),
    }
}

fn work(world: World, path: Option<&Path>) -> anyhow::Result<()> {
    let cancel = Arc::new(AtomicBool::new(false));
    let mut orders = None;
    let mut text = Vec::new();
    if path.is_some() {
        let cancel = Arc::clone(&cancel);
        on_interrupt(move || cancel.store(true, Ordering::Relaxed))?;
    } else {
        on_interrupt(|| {})?;
    }
    if world.rank() == 0 {
        text = if let Some(path) = path {
            std::fs::read(path)?
        } else {
            let mut input: Orders = Box::new(BufReader::new(stdin()));
            let text = text_of_orders(&mut *input)?;
            orders = Some(input);
            text
        };
    }
    let text = world.gather(&text).swap_remove(0);
    let mut task = Task::read(&text)?;
    task.cpus = Some(threads(task.cpus, world));
    let work = Work {
        kinds: KINDS,
        env: project::run_env,
        cancel,
        exit,
    };
    if world.rank() == 0 {
        if work.serve(&task, orders, stdout())? {
            return Ok(());
        }
        // It has told why, and the executor hears nobody else.
        abort(FAILED)
    }
    let told = Arc::<Mutex<Vec<String>>>::default();
    let other = OtherProcess {
        world,
        failed: Arc::clone(&told),
    };
    if work.serve(&task, orders, other)? {
        return Ok(());
    }
    let causes = told.lock().unwrap_or_else(PoisonError::into_inner);
    Err(anyhow!(causes.join(": ")))
}

/// The threads of a process: its part of those that the task may have, or of the machine's.
fn threads(cpus: Option<NonZeroUsize>, world: World) -> NonZeroUsize {
    let threads = match cpus {
        Some(cpus) => cpus.get() / world.size(),
        None => {
            std::thread::available_parallelism().map_or(1, NonZeroUsize::get)
                / world.on_this_machine()
        }
    };
    NonZeroUsize::new(threads).unwrap_or(NonZeroUsize::MIN)
}

/// Has a panic of any thread end all processes: unwinding would end in a wait for the others.
fn end_all_on_panic(world: World) {
    let note = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        note(panic);
        end_all(world, &panicked())
    }));
}

/// Tells an error and ends all processes.
fn end_all(world: World, error: &anyhow::Error) -> ! {
    let failed = if world.rank() == 0 {
        failure(error)
    } else {
        std::thread::sleep(WAIT);
        let text = format!("{}{error:#}", prefix(world.rank(), world.size()));
        eprint(&format!("{text}\n"));
        failure(&anyhow!(text))
    };
    let mut output = stdout().lock();
    let _ = output.write_all(&failed).and_then(|()| output.flush());
    // What was written has to reach the launcher before it is told to end everything.
    std::thread::sleep(WAIT / 10);
    abort(FAILED)
}

fn exit() -> ! {
    abort(FAILED)
}

/// The output of any process but the first one, which takes events: warnings go to standard error, and what failed is kept.
struct OtherProcess {
    world: World,
    failed: Arc<Mutex<Vec<String>>>,
}

impl Write for OtherProcess {
    /// Takes one whole line.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match serde_json::from_slice(line) {
            Ok(Event::Message {
                level: Level::Warning,
                text,
                ..
            }) => {
                let text = text.replace('\n', " ");
                eprint(&format!(
                    "{}{text}\n",
                    prefix(self.world.rank(), self.world.size())
                ));
            }
            Ok(Event::WorkFailed { causes, .. }) => {
                *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = causes;
            }
            _ => {}
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use super::*;

    /// How long processes that end each other may take.
    const PATIENCE: Duration = Duration::from_mins(2);

    /// Runs a test of this file in two processes at once; gives whether they succeeded and what they wrote. `None` where there is no `mpirun`
    /// and none is asked for.
    #[expect(clippy::disallowed_methods, reason = "a switch of the tests alone")]
    fn in_two_processes(test: &str) -> Option<(bool, String)> {
        let name = format!("cli::commands::work::member::tests::{test}");
        let child = Command::new("mpirun")
            .args(["-n", "2", "--oversubscribe", "--bind-to", "none"])
            .args(["--mca", "oob_tcp_if_include", "lo"])
            .args(["--mca", "btl_tcp_if_include", "lo"])
            .arg(std::env::current_exe().unwrap())
            .args([
                "--exact",
                &name,
                "--ignored",
                "--nocapture",
                "--test-threads=1",
            ])
            // Tests may run as root in a container.
            .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
            .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let Ok(mut child) = child else {
            let needed = std::env::var_os("PIPELINE_NEEDS_MPI").is_some_and(|value| value == "1");
            assert!(!needed, "there is no `mpirun`");
            println!("not run: there is no `mpirun`");
            return None;
        };
        let until = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() >= until {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("the processes of `{test}` wait for each other");
            }
            std::thread::sleep(Duration::from_millis(50));
        };
        let mut text = String::new();
        child.stdout.unwrap().read_to_string(&mut text).unwrap();
        child.stderr.unwrap().read_to_string(&mut text).unwrap();
        Some((status.success(), text))
    }

    fn start() -> Member {
        let member = Member::start().unwrap();
        end_all_on_panic(member.world);
        member
    }

    #[test]
    fn what_processes_exchange_arrives_everywhere_in_the_order_of_ranks() {
        if let Some((succeeded, text)) = in_two_processes("exchanges") {
            assert!(succeeded && text.matches("1 passed").count() == 2, "{text}");
        }
    }

    #[test]
    #[ignore = "run by another test, in two processes"]
    fn exchanges() {
        let member = start();
        let world = member.world;
        assert_eq!((world.size(), world.on_this_machine()), (2, 2));
        let rank = world.rank();
        // More than one piece, and not a multiple of the number of processes.
        let count = (5 << 20) + 3;
        let own = |rank: usize| move |index: usize| (index % 1000 + rank) as f32 * 0.1;
        let mut values: Vec<f32> = (0..count).map(own(rank)).collect();
        world.sum(&mut values);
        let expected = (0..count).map(|index| own(0)(index) + own(1)(index));
        assert!(values.iter().copied().eq(expected));
        world.sum(&mut []);
        let bytes = |rank: usize| vec![rank as u8 + 1; rank * ((2 << 20) + 5) + 1];
        assert!(world.gather(&bytes(rank)) == [bytes(0), bytes(1)]);
        assert_eq!(world.gather(&[]), [[0u8; 0]; 2]);
    }

    #[test]
    fn a_panic_of_one_process_ends_the_other_which_waits_for_it() {
        if let Some((succeeded, text)) = in_two_processes("one_panics") {
            assert!(!succeeded);
            assert!(
                text.contains("process 2 of 2: the stage panicked"),
                "{text}"
            );
            assert!(text.contains("\"event\":\"work_failed\""), "{text}");
        }
    }

    #[test]
    #[ignore = "run by another test, in two processes"]
    fn one_panics() {
        let member = start();
        let world = member.world;
        if world.rank() == 1 {
            let thread = std::thread::spawn(|| panic!("on purpose"));
            let _ = thread.join();
        }
        world.gather(&[1]);
    }

    #[test]
    fn an_error_of_one_process_ends_the_other_which_waits_for_it() {
        if let Some((succeeded, text)) = in_two_processes("one_fails") {
            assert!(!succeeded);
            assert!(text.contains("process 2 of 2: step 3: no more"), "{text}");
        }
    }

    #[test]
    #[ignore = "run by another test, in two processes"]
    fn one_fails() {
        let member = start();
        let world = member.world;
        if world.rank() == 1 {
            end_all(world, &anyhow!("no more").context("step 3"));
        }
        world.gather(&[1]);
    }
}
