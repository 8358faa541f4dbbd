//! Puts the reason why a job did not start its stage into the comment of the job, where the runner can't see the job's folder.

use std::process::{Command, Stdio};

/// The beginning of a comment that is such a reason.
pub(super) const SAYS: &str = "pipeline: ";

/// The longest comment, in characters.
const LONGEST: usize = 2000;

/// Makes `sentence` the comment of the Slurm job that this process runs in, if any. `lookup` reads the environment.
pub fn explain_to_slurm(lookup: fn(&str) -> Option<String>, sentence: &str) {
    let Some(job) = lookup("SLURM_JOB_ID") else {
        return;
    };
    // The number of the job alone may mean the whole array.
    let element = lookup("SLURM_ARRAY_JOB_ID").zip(lookup("SLURM_ARRAY_TASK_ID"));
    let id = element.map_or(job, |(array, element)| format!("{array}_{element}"));
    let sentence: String = sentence.chars().take(LONGEST).collect();
    let mut command = Command::new("scontrol");
    command
        .arg("update")
        .arg(format!("jobid={id}"))
        .arg(format!("comment={SAYS}{}", sentence.replace('\n', " ")))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // Then the runner only knows that the job failed.
    let _ = command.status();
}
