//! Starts a program several times at once, as processes that find each other by MPI: by `srun` inside a job of Slurm, else by `mpirun`.

use std::path::Path;
use std::process::Command;

/// How an environment variable is looked up.
pub(in crate::engine) type Lookup = Option<fn(&str) -> Option<String>>;

/// Open MPI's settings for processes of several threads each, which are to share what cores there are: no core is one process's alone,
/// more processes than cores may be started, and one that waits for others leaves its core to them. The second names are those of Open MPI 5.
const SETTINGS: [(&str, &str); 5] = [
    ("OMPI_MCA_hwloc_base_binding_policy", "none"),
    ("PRTE_MCA_hwloc_default_binding_policy", "none"),
    ("OMPI_MCA_rmaps_base_oversubscribe", "1"),
    ("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe"),
    ("OMPI_MCA_mpi_yield_when_idle", "1"),
];

/// The program that starts others, and the command that has it start `program` so often. Arguments of `program` go behind it; what is
/// written to the command's standard input goes to the first process.
pub(in crate::engine) fn command(
    program: &Path,
    processes: usize,
    lookup: Lookup,
) -> (&'static str, Command) {
    let variable = |name: &str| lookup.and_then(|lookup| lookup(name));
    let (launcher, arguments): (_, &[&str]) = if variable("SLURM_JOB_ID").is_some() {
        let arguments = &[
            "--mpi=pmix",
            "--input=0",
            "--cpu-bind=none",
            "--kill-on-bad-exit=1",
        ];
        ("srun", arguments)
    } else {
        ("mpirun", &[])
    };
    // A name such as /proc/self/exe means another program to the one that is started.
    let program = std::fs::read_link(program).unwrap_or_else(|_| program.to_owned());
    let mut command = Command::new(launcher);
    command.args(arguments).arg("-n").arg(processes.to_string());
    // srun does not take this over from the job.
    if let Some(cpus) = variable("SLURM_CPUS_PER_TASK").filter(|_| launcher == "srun") {
        command.arg(format!("--cpus-per-task={cpus}"));
    }
    command.arg(program);
    for (name, value) in SETTINGS {
        if variable(name).is_none() {
            command.env(name, value);
        }
    }
    (launcher, command)
}

/// What stands before the words of a process that is one of several; `rank` is counted from 0, and people count from 1.
pub fn prefix(rank: usize, size: usize) -> String {
    format!("process {} of {size}: ", rank + 1)
}

/// What a launcher says of the process that ended the others, out of all that was written to its standard error.
pub(super) fn culprit(words: &str) -> Option<&str> {
    let tells = |line: &&str| {
        line.contains("noticed that process rank")
            || line.contains("srun: error:") && line.contains("task")
    };
    words.lines().find(tells).map(str::trim)
}

/// The lines that processes other than the first one wrote to standard error for the executor, each with what it says behind its prefix.
pub(super) fn of_others(words: &str, processes: usize) -> impl Iterator<Item = (&str, &str)> {
    words.lines().filter_map(move |line| {
        let mut ranks = 1..processes;
        let said = ranks.find_map(|rank| line.strip_prefix(&prefix(rank, processes)));
        said.map(|said| (line, said))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(command: &Command) -> String {
        let all = std::iter::once(command.get_program()).chain(command.get_args());
        let all: Vec<_> = all.map(|part| part.to_string_lossy()).collect();
        all.join(" ")
    }

    #[test]
    fn a_job_of_slurm_starts_its_processes_by_srun_and_all_else_by_mpirun() {
        let program = Path::new("/no/such/pipeline");
        let (launcher, plain) = command(program, 2, Some(|_| None));
        assert_eq!(launcher, "mpirun");
        assert_eq!(text(&plain), "mpirun -n 2 /no/such/pipeline");
        assert_eq!(plain.get_envs().count(), SETTINGS.len());
        let in_job = |name: &str| (name == "SLURM_JOB_ID").then(|| "7".to_owned());
        let (launcher, in_job) = command(program, 4, Some(in_job));
        assert_eq!(launcher, "srun");
        let text = text(&in_job);
        assert!(text.ends_with("-n 4 /no/such/pipeline"), "{text}");
        // What somebody set stays.
        let set = |name: &str| name.starts_with("OMPI_MCA_mpi").then(|| "0".to_owned());
        let (_, own) = command(program, 2, Some(set));
        assert_eq!(own.get_envs().count(), SETTINGS.len() - 1);
    }

    #[test]
    fn the_process_that_ended_the_others_is_found_in_what_a_launcher_says() {
        let mpirun = "-----\nPrimary job  terminated normally\n-----\nmpirun noticed that process rank 1 with PID 7 on node a exited on \
                      signal 9 (Killed).\n-----\n";
        assert!(culprit(mpirun).is_some_and(|line| line.starts_with("mpirun noticed")));
        let srun = "slurmstepd: error: x\nsrun: error: n2: task 1: Killed\n";
        assert_eq!(culprit(srun), Some("srun: error: n2: task 1: Killed"));
        assert_eq!(culprit("a\nb"), None);
    }

    #[test]
    fn what_other_processes_say_is_told_apart_from_what_libraries_print() {
        let words = "process 1 of 3: a\nprocess 2 of 3: b: c\nprocess 3 of 3: d\nnoise\n";
        let said: Vec<_> = of_others(words, 3).map(|(_, said)| said).collect();
        assert_eq!(said, ["b: c", "d"]);
        assert_eq!(of_others(words, 1).count(), 0);
    }
}
