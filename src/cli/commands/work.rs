//! `work`: runs one task of an executor. From another process of this program it comes on standard input, with orders behind it, and
//! for a scheduler that starts this one it is a file. Events go to standard output, a line of JSON each. With `--job` the task, its events
//! and its result are files in the folder of a job. Not for people.

use std::io::{BufReader, stdin, stdout};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::anyhow;
use pipeline_kernels::dispatch::{Isa, limit};

use crate::cli::leaving::on_interrupt;
use crate::cli::{Failure, project, remote, variable};
use crate::engine::work::{
    Orders, Work, catch_panics, end_with_parent, give_way, launcher, read_task, read_task_file,
    run_job,
};
use crate::engine::{FarJob, explain_to_slurm, run_far_job};
use crate::stages::KINDS;

#[cfg(feature = "mpi")]
mod member;

/// One of the processes of a task, in a build that has no MPI.
#[cfg(not(feature = "mpi"))]
mod member {
    use std::path::Path;

    use crate::cli::Failure;

    pub(super) fn run(_: Option<&Path>) -> Result<(), Failure> {
        Err(anyhow::anyhow!(
            "this build of pipeline has no MPI, which the processes of a task find each other by; hint: build it with \
             `--features mpi` on every machine"
        )
        .into())
    }
}

/// The variable with the largest instruction set that the kernels may use, to measure what another processor would do. It changes
/// results by the order of sums at most, so no result is keyed by it.
const VARIABLE: &str = "PIPELINE_INSTRUCTION_SET";

/// The variable with the number of processors that Slurm gave to a job on its node.
const CPUS: &str = "SLURM_CPUS_ON_NODE";

#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    /// The task, a JSON file [default: the first line of standard input]
    task: Option<PathBuf>,
    /// Whether `mpirun` or `srun` started this process as one of several for the task
    #[arg(long, hide = true)]
    member: bool,
    /// The folder of a job: its task is run in a process of its own, and the folder gets its events and its result
    #[arg(long, value_name = "DIR", conflicts_with = "task")]
    job: Option<PathBuf>,
    /// The name of a job in the remote: its task is taken from there, and what it tells and makes goes there
    #[arg(long, value_name = "JOB", conflicts_with_all = ["task", "job"], requires = "digest")]
    far: Option<String>,
    /// The digest of that job's task
    #[arg(long, value_name = "DIGEST", requires = "far")]
    digest: Option<String>,
    /// Where this node keeps what jobs fetched from the remote [default: nothing is kept]
    #[arg(long, value_name = "DIR", requires = "far")]
    node_store: Option<PathBuf>,
}

pub(in crate::cli) fn run(args: &Args) -> Result<(), Failure> {
    if let Some(folder) = &args.job {
        return job(folder);
    }
    if let (Some(name), Some(digest)) = (&args.far, &args.digest) {
        let ended = far_job(name, digest, args.node_store.clone());
        if let Err(Failure::Failed(error)) = &ended {
            explain_to_slurm(variable, &format!("{error:#}"));
        }
        return ended;
    }
    if args.task.is_none() || args.member {
        end_with_parent();
    }
    give_way();
    catch_panics();
    if let Some(name) = variable(VARIABLE) {
        let names = Isa::ALL.map(Isa::name).join(", ");
        let isa = Isa::named(&name);
        limit(isa.ok_or_else(|| anyhow!("{VARIABLE} is `{name}`; it is one of {names}"))?);
    }
    if args.member {
        return member::run(args.task.as_deref());
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
            let task = read_task_file(path)?;
            let own = std::env::current_exe().map_err(anyhow::Error::from)?;
            if let Some((launcher, mut command)) = launcher(&task, path, &own, variable) {
                // This process becomes the one that starts the others; signals of the scheduler go to it.
                let error = anyhow::Error::from(command.exec());
                return Err(error
                    .context(format!("could not start `{launcher}`"))
                    .into());
            }
            (task, None)
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

/// Runs the task of a job, in a process of its own: whatever ends that one, this one tells it.
fn job(folder: &Path) -> Result<(), Failure> {
    let cancel = Arc::new(AtomicBool::new(false));
    let stop = Arc::clone(&cancel);
    // A scheduler ends its jobs by a signal.
    on_interrupt(move || stop.store(true, Ordering::Relaxed))?;
    let program = project::own_program().ok_or_else(|| anyhow!("this program can't be found"))?;
    let cpus = variable(CPUS).and_then(|cpus| cpus.parse().ok());
    if run_job(folder, program, cpus, variable, &cancel)? {
        Ok(())
    } else {
        Err(Failure::Reported)
    }
}

/// Runs a job whose task is in the remote.
fn far_job(name: &str, digest: &str, store: Option<PathBuf>) -> Result<(), Failure> {
    let cancel = Arc::new(AtomicBool::new(false));
    let stop = Arc::clone(&cancel);
    on_interrupt(move || stop.store(true, Ordering::Relaxed))?;
    let program = project::own_program().ok_or_else(|| anyhow!("this program can't be found"))?;
    let job = FarJob {
        shared: remote::of_job()?,
        job: name.to_owned(),
        digest: digest.to_owned(),
        store,
        program,
        cpus: variable(CPUS).and_then(|cpus| cpus.parse().ok()),
        lookup: variable,
        cancel,
    };
    if run_far_job(&job)? {
        Ok(())
    } else {
        Err(Failure::Reported)
    }
}

fn exit() -> ! {
    #[expect(clippy::exit, reason = "other threads may be stuck")]
    std::process::exit(1)
}
