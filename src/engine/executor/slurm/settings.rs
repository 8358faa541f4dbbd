//! The settings of a Slurm cluster in `pipeline.config.yaml`, and the options of `sbatch` that follow from them.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use serde::Deserialize;

use super::super::super::{Resources, Span};

/// A Slurm cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlurmSettings {
    /// The partition.
    #[serde(default)]
    pub partition: Option<String>,
    /// The account that is charged.
    #[serde(default)]
    pub account: Option<String>,
    /// The quality of service.
    #[serde(default)]
    pub qos: Option<String>,
    /// The time limit of stages without a `timeout`.
    #[serde(default)]
    pub time: Option<Span>,
    /// Further options of `sbatch`, each written as `--option` or `--option=value`.
    #[serde(default)]
    pub extra: Vec<String>,
    /// The most jobs of a run that are in the queue at once.
    #[serde(default)]
    pub jobs: Option<NonZeroUsize>,
    /// The names of further environment variables that jobs get.
    #[serde(default)]
    pub env: Vec<String>,
    /// Whether the nodes see the project and its store; true if not given. If they don't, inputs and results go through the
    /// remote.
    #[serde(default)]
    pub shared: Option<bool>,
    /// Where nodes that don't see the store keep what they fetched, and the checkpoints of stopped trainings. Without it, nothing is kept.
    #[serde(default)]
    pub node_store: Option<PathBuf>,
}

/// The most jobs of a run in the queue unless the settings say otherwise.
const JOBS: usize = 100;

/// The options that `extra` may have: those that say where, when and with what a job runs. Options that would start something else, or
/// change what the runner relies on, are not among them, because the file may have come with somebody else's project.
const EXTRA: [&str; 40] = [
    "acctg-freq",
    "begin",
    "comment",
    "constraint",
    "contiguous",
    "core-spec",
    "cores-per-socket",
    "cpu-freq",
    "cpus-per-gpu",
    "deadline",
    "delay-boot",
    "distribution",
    "exclude",
    "exclusive",
    "gpu-bind",
    "gpu-freq",
    "gpus-per-node",
    "gpus-per-task",
    "gres",
    "hint",
    "licenses",
    "mail-type",
    "mail-user",
    "mem-bind",
    "mem-per-cpu",
    "mem-per-gpu",
    "mincpus",
    "network",
    "nice",
    "nodelist",
    "oversubscribe",
    "prefer",
    "priority",
    "requeue",
    "reservation",
    "signal",
    "switches",
    "threads-per-core",
    "tmp",
    "wckey",
];

impl SlurmSettings {
    /// The first mistake in the settings, if there is one: its key, a message, and a hint.
    pub fn check(&self) -> Option<(String, String, String)> {
        for (at, option) in self.extra.iter().enumerate() {
            let key = format!("extra[{at}]");
            let Some(name) = option.strip_prefix("--") else {
                let message = format!("`{option}` is no long option of sbatch");
                let hint = "one such as `--constraint=a100`, each an item of the list".to_owned();
                return Some((key, message, hint));
            };
            let name = name.split('=').next().unwrap_or_default();
            if !EXTRA.contains(&name) {
                let message = format!("`--{name}` can't be given here");
                let hint = format!("those that can are {}", EXTRA.join(", "));
                return Some((key, message, hint));
            }
        }
        for (at, name) in self.env.iter().enumerate() {
            if !is_variable(name) {
                let message = format!("`{name}` is not the name of an environment variable");
                let hint = "the value comes from the environment that `pipeline` runs in";
                return Some((format!("env[{at}]"), message, hint.to_owned()));
            }
        }
        if let Some(store) = &self.node_store {
            let key = "node_store".to_owned();
            if self.is_shared() {
                let message = "nodes that see the project use its own store".to_owned();
                let hint = "leave it out, or say `shared: false`".to_owned();
                return Some((key, message, hint));
            }
            if !store.is_absolute() {
                let message = format!("`{}` does not start at the root", store.display());
                let hint =
                    "a folder of the nodes, as in `node_store: /scratch/pipeline`".to_owned();
                return Some((key, message, hint));
            }
        }
        let words = [
            ("partition", &self.partition),
            ("account", &self.account),
            ("qos", &self.qos),
        ];
        let empty = words
            .into_iter()
            .find(|(_, word)| word.as_ref().is_some_and(|word| word.trim().is_empty()));
        empty.map(|(key, _)| {
            let hint = "leave it out where the cluster has a default".to_owned();
            (key.to_owned(), "it is empty".to_owned(), hint)
        })
    }

    /// Whether the nodes see the store.
    pub fn is_shared(&self) -> bool {
        self.shared.unwrap_or(true)
    }

    /// The most jobs of a run in the queue.
    pub(super) fn jobs(&self) -> usize {
        self.jobs.map_or(JOBS, NonZeroUsize::get)
    }

    /// The options of `sbatch` for a stage with these resources and this timeout.
    pub fn options(&self, resources: &Resources, timeout: Option<Span>) -> Vec<String> {
        let processes = resources.processes();
        let mut options = vec![format!("--ntasks={processes}")];
        // Processes on other nodes would look for inputs that only the first one has.
        if processes == 1 || !self.is_shared() {
            options.insert(0, "--nodes=1".to_owned());
        }
        for (name, value) in [
            ("partition", &self.partition),
            ("account", &self.account),
            ("qos", &self.qos),
        ] {
            options.extend(value.as_ref().map(|value| format!("--{name}={value}")));
        }
        if let Some(cpus) = resources.cpus {
            // Those of a stage are for all of its processes.
            let each = cpus.get().div_ceil(processes);
            options.push(format!("--cpus-per-task={each}"));
        }
        if resources.memory.0 > 0 {
            options.push(format!("--mem={}M", resources.memory.0.div_ceil(1 << 20)));
        }
        if resources.gpus > 0 {
            options.push(format!("--gres=gpu:{}", resources.gpus));
        }
        if let Some(time) = timeout.or(self.time) {
            // Slurm counts in minutes.
            let minutes = time.0.as_millis().div_ceil(60_000).max(1);
            options.push(format!("--time={minutes}"));
        }
        options.push("--no-requeue".to_owned());
        options.extend(self.extra.iter().cloned());
        options
    }
}

/// Whether a text is the name of a variable.
pub(super) fn is_variable(name: &str) -> bool {
    let mut letters = name.chars();
    letters
        .next()
        .is_some_and(|first| first.is_ascii_alphabetic() || first == '_')
        && letters.all(|c| c.is_ascii_alphanumeric() || c == '_')
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::super::super::Bytes;
    use super::*;

    #[test]
    fn what_a_stage_needs_becomes_options() {
        let settings = SlurmSettings {
            partition: Some("main".into()),
            time: Some(Span(Duration::from_hours(2))),
            extra: vec!["--constraint=a100".into()],
            ..SlurmSettings::default()
        };
        let plain = settings.options(&Resources::default(), None);
        assert_eq!(
            plain.join(" "),
            "--nodes=1 --ntasks=1 --partition=main --time=120 --no-requeue --constraint=a100"
        );
        let resources = Resources {
            cpus: NonZeroUsize::new(4),
            memory: Bytes(1_500_000_000),
            gpus: 2,
            ..Resources::default()
        };
        let all = settings
            .options(&resources, Some(Span(Duration::from_secs(61))))
            .join(" ");
        assert!(
            all.contains("--cpus-per-task=4 --mem=1431M --gres=gpu:2 --time=2 "),
            "{all}"
        );
        let short = settings.options(&resources, Some(Span(Duration::from_millis(5))));
        assert!(short.contains(&"--time=1".to_owned()));
        let shared = Resources {
            processes: NonZeroUsize::new(4),
            cpus: NonZeroUsize::new(10),
            ..Resources::default()
        };
        let shared = settings.options(&shared, None).join(" ");
        assert!(
            shared.starts_with("--ntasks=4 --partition=main --cpus-per-task=3 "),
            "{shared}"
        );
    }

    #[test]
    fn options_that_would_start_something_else_are_refused() {
        let with = |option: &str| SlurmSettings {
            extra: vec!["--nice".into(), option.to_owned()],
            ..SlurmSettings::default()
        };
        for option in [
            "--wrap=x",
            "--export=ALL",
            "--exp=ALL",
            "-pmain",
            "x",
            "--",
            "--output=x",
        ] {
            let (key, ..) = with(option).check().unwrap();
            assert_eq!(key, "extra[1]", "{option}");
        }
        assert_eq!(with("--gres=gpu:a100:1").check(), None);
        let env = SlurmSettings {
            env: vec!["A B".into()],
            ..SlurmSettings::default()
        };
        assert_eq!(env.check().unwrap().0, "env[0]");
        let store = |store: &str, shared| SlurmSettings {
            node_store: Some(store.into()),
            shared,
            ..SlurmSettings::default()
        };
        assert_eq!(store("/a", None).check().unwrap().0, "node_store");
        assert_eq!(store("a", Some(false)).check().unwrap().0, "node_store");
        assert_eq!(store("/a", Some(false)).check(), None);
    }
}
