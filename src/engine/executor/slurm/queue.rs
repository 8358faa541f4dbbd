//! Asks Slurm for the states of all jobs of a run at once, so that a thousand stages don't cause a thousand requests.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use super::client::{Client, JobId, JobState, Trouble};

/// The time between two requests, and what each job adds to it.
const BETWEEN: Duration = Duration::from_secs(2);
const FOR_EACH: Duration = Duration::from_millis(50);

/// The jobs of a run.
#[derive(Default)]
pub(super) struct Queue {
    jobs: Mutex<BTreeSet<JobId>>,
    answer: Mutex<Answer>,
}

/// The last request, and its answer.
#[derive(Default)]
struct Answer {
    at: Option<Instant>,
    asked: BTreeSet<JobId>,
    states: BTreeMap<JobId, JobState>,
    trouble: Option<Trouble>,
}

/// What is known of a job.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// There is nothing new.
    Nothing,
    /// Its state.
    State(JobState),
    /// Slurm knows no such job.
    Unknown,
    /// Slurm does not answer.
    Trouble(Trouble),
}

impl Queue {
    /// Includes a job in the requests.
    pub(super) fn add(&self, job: JobId) {
        self.jobs
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(job);
    }

    /// Leaves a job out of the requests from now on.
    pub(super) fn remove(&self, job: JobId) {
        self.jobs
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&job);
    }

    /// What is known of a job. Asks Slurm if the last answer is too old, unless another thread is asking.
    pub(super) fn look(&self, client: &Client, job: JobId) -> Look {
        let mut answer = match self.answer.try_lock() {
            Ok(answer) => answer,
            Err(TryLockError::WouldBlock) => return Look::Nothing,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        };
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        let jobs = jobs.clone();
        let between = BETWEEN + FOR_EACH * jobs.len() as u32;
        if answer.at.is_none_or(|at| at.elapsed() >= between) {
            let states = client.states(&jobs);
            *answer = Answer {
                at: Some(Instant::now()),
                asked: jobs,
                trouble: states.as_ref().err().cloned(),
                states: states.unwrap_or_default().into_iter().collect(),
            };
        }
        if !answer.asked.contains(&job) {
            return Look::Nothing;
        }
        match (&answer.trouble, answer.states.get(&job)) {
            (Some(trouble), _) => Look::Trouble(trouble.clone()),
            (None, Some(state)) => Look::State(state.clone()),
            (None, None) => Look::Unknown,
        }
    }
}
