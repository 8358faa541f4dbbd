//! How the runner treats a stage: what it takes of the machine, how often it is tried, how long a try may take. It stands
//! beside the kind in a recipe and is never part of a fingerprint.

use std::num::NonZeroUsize;

use anyhow::bail;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::device::DeviceChoice;
use super::units::{Bytes, Span};

/// The runner's own settings of one stage.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Handling {
    /// What the stage needs of the machine while it runs.
    #[serde(default)]
    pub resources: Resources,
    /// How many times a failed stage is tried again, after a pause that grows.
    #[serde(default)]
    #[schemars(extend("examples" = [2]))]
    pub retries: u32,
    /// The longest time that one attempt may take; a stage that takes longer is stopped and counts as failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["8h"]))]
    pub timeout: Option<Span>,
    /// Where a training or an evaluation computes: the processor, a GPU by its number, or with `auto` the first GPU, and the processor
    /// where there is none or it lacks something. The result counts as the same, and is within rounding.
    #[serde(default)]
    #[schemars(extend("examples" = ["auto"]))]
    pub device: DeviceChoice,
    /// Where the stage runs: an executor of `pipeline.config.yaml`, such as a cluster, or `local`, this machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["cluster"]))]
    pub executor: Option<String>,
    /// Whether the last result is taken whatever changed since. Plans, runs and reports show what changed; the stage never runs, and
    /// it is an error if the result is not there or was altered.
    #[serde(default)]
    pub frozen: bool,
}

/// What a stage takes of the machine while it runs. Stages that run at a time never take more than there is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Resources {
    /// The number of threads that the stage computes with. By default it may use all cores, and counts as one when stages are
    /// scheduled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = [8]))]
    pub cpus: Option<NonZeroUsize>,
    /// The number of processes that a training is divided among, each with its part of the micro-batches of a step
    /// (`gradient_accumulation_steps` divided by this) and of `cpus`: on this machine, or inside a job of Slurm on all its nodes. The result
    /// counts as the same, and is within rounding. It needs a pipeline that was built with the feature `mpi`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = [2]))]
    pub processes: Option<NonZeroUsize>,
    /// The number of tasks into which a stage of data is divided, each of which makes a part of its rows; another one joins them. The
    /// result is the same to the byte. Without it one task makes all rows, with all its threads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = [8]))]
    pub shards: Option<NonZeroUsize>,
    /// Memory to reserve for the stage. Used for scheduling only; not a limit. Stages that only read data, templates and models are
    /// limited to 4 GiB, or to this if it is more.
    #[serde(default)]
    #[schemars(extend("examples" = ["20GiB"]))]
    pub memory: Bytes,
    /// The number of devices that the stage has to itself.
    #[serde(default)]
    pub gpus: usize,
    /// Whether the stage runs in a process of its own: whatever ends that process is then an ordinary failure of the stage, and its
    /// memory is free afterwards. With `false` it runs in the runner's own process, which a crash ends, and no limit of memory
    /// holds.
    #[serde(default = "isolated")]
    pub isolated: bool,
}

fn isolated() -> bool {
    true
}

impl Default for Resources {
    fn default() -> Self {
        Self {
            cpus: None,
            processes: None,
            shards: None,
            memory: Bytes::default(),
            gpus: 0,
            isolated: isolated(),
        }
    }
}

/// What the stages of a run may take together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// Cores.
    pub cpus: usize,
    /// Memory in bytes; unlimited when unknown.
    pub memory: Option<Bytes>,
    /// The ids of devices.
    pub gpus: Vec<usize>,
}

impl Resources {
    /// The number of cores it counts as: each process computes on one at least.
    fn cpus(&self) -> usize {
        self.cpus.map_or(1, NonZeroUsize::get).max(self.processes())
    }

    /// The number of processes, 1 unless it says otherwise.
    pub fn processes(&self) -> usize {
        self.processes.map_or(1, NonZeroUsize::get)
    }
}

/// The resources that running stages leave free.
pub(super) struct Free {
    cpus: usize,
    memory: Option<u64>,
    gpus: Vec<usize>,
}

impl Free {
    pub(super) fn all(machine: &Machine) -> Self {
        Self {
            cpus: machine.cpus,
            memory: machine.memory.map(|memory| memory.0),
            gpus: machine.gpus.clone(),
        }
    }

    /// Reserves what a stage needs and returns the ids of its devices, the smallest free ones; `None` if not enough is free now.
    pub(super) fn take(&mut self, wanted: &Resources) -> Option<Vec<usize>> {
        let cpus = self.cpus.checked_sub(wanted.cpus())?;
        let memory = match self.memory {
            Some(free) => Some(free.checked_sub(wanted.memory.0)?),
            None => None,
        };
        if self.gpus.len() < wanted.gpus {
            return None;
        }
        self.cpus = cpus;
        self.memory = memory;
        Some(self.gpus.drain(..wanted.gpus).collect())
    }

    /// Releases what a stage reserved.
    pub(super) fn give(&mut self, wanted: &Resources, gpus: &[usize]) {
        self.cpus += wanted.cpus();
        self.memory = self.memory.map(|free| free + wanted.memory.0);
        self.gpus.extend(gpus);
        self.gpus.sort_unstable();
    }
}

impl Machine {
    /// Fails if a stage needs more than the machine has, since it could never start.
    pub fn check(&self, stage: &str, wanted: &Resources) -> anyhow::Result<()> {
        if Free::all(self).take(wanted).is_some() {
            return Ok(());
        }
        let more = |what: &str, wanted: String, have: String, flag: &str| {
            format!(
                "`{stage}` wants {wanted} {what}, and this run has {have}; lower its `resources` or give more with `{flag}`"
            )
        };
        if wanted.cpus() > self.cpus {
            let (want, have) = (wanted.cpus().to_string(), self.cpus.to_string());
            bail!(more("cpus", want, have, "--cpus"));
        }
        if wanted.gpus > self.gpus.len() {
            let (want, have) = (wanted.gpus.to_string(), self.gpus.len().to_string());
            bail!(more("gpus", want, have, "--gpus"));
        }
        let have = self.memory.unwrap_or_default().to_string();
        bail!(more(
            "of memory",
            wanted.memory.to_string(),
            have,
            "--memory"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wants(cpus: usize, memory: u64, gpus: usize) -> Resources {
        Resources {
            cpus: NonZeroUsize::new(cpus),
            memory: Bytes(memory),
            gpus,
            ..Resources::default()
        }
    }

    #[test]
    fn what_is_taken_comes_back_and_never_runs_over() {
        let machine = Machine {
            cpus: 3,
            memory: Some(Bytes(100)),
            gpus: vec![0, 2, 5],
        };
        let mut free = Free::all(&machine);
        let first = wants(1, 60, 2);
        let ids = free.take(&first).unwrap();
        assert_eq!(ids, [0, 2]);
        assert_eq!(free.take(&wants(1, 41, 0)), None, "memory");
        assert_eq!(free.take(&wants(1, 0, 2)), None, "gpus");
        assert_eq!(free.take(&wants(3, 0, 0)), None, "cpus");
        assert_eq!(free.take(&wants(2, 40, 1)), Some(vec![5]));
        assert_eq!(free.take(&wants(0, 0, 0)), None, "a stage counts as one");
        free.give(&first, &ids);
        assert_eq!(free.take(&wants(1, 60, 1)), Some(vec![0]));
    }

    #[test]
    fn what_could_never_start_is_told_with_the_flag_that_helps() {
        let machine = Machine {
            cpus: 2,
            memory: Some(Bytes(8_000_000_000)),
            gpus: Vec::new(),
        };
        let messages = |wanted| machine.check("tuned", &wanted).unwrap_err().to_string();
        assert!(messages(wants(3, 0, 0)).contains("wants 3 cpus, and this run has 2"));
        assert!(messages(wants(1, 0, 1)).contains("wants 1 gpus, and this run has 0"));
        let memory = messages(wants(1, 9_000_000_000, 0));
        assert!(
            memory.contains("9.0 GB of memory") && memory.contains("--memory"),
            "{memory}"
        );
        assert!(machine.check("tuned", &wants(2, 1, 0)).is_ok());
    }
}
