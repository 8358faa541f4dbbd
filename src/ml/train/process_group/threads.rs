//! Threads as processes of a group, for tests.

use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Duration;

use super::ProcessGroup;

/// How long a thread waits for the others before its test fails.
const PATIENCE: Duration = Duration::from_mins(5);

/// One exchange.
#[derive(Default)]
struct Round {
    /// What each thread gave.
    given: Vec<Option<Vec<u8>>>,
    /// How many have read what the others gave.
    readers: usize,
}

/// What the threads of a group share.
struct Shared {
    size: usize,
    round: Mutex<Round>,
    changed: Condvar,
}

impl Shared {
    fn wait<'a>(
        &self,
        round: MutexGuard<'a, Round>,
        until: impl Fn(&Round) -> bool,
    ) -> MutexGuard<'a, Round> {
        let waits = |round: &mut Round| !until(round);
        let waited = self.changed.wait_timeout_while(round, PATIENCE, waits);
        let (round, over) = waited.unwrap();
        assert!(!over.timed_out(), "another thread of the group is gone");
        round
    }
}

/// One of the threads.
struct Member<'a> {
    rank: usize,
    shared: &'a Shared,
}

impl ProcessGroup for Member<'_> {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.shared.size
    }

    fn sum(&self, values: &mut [f32]) {
        let own = values.iter().flat_map(|value| value.to_le_bytes());
        let all = self.gather(&own.collect::<Vec<u8>>());
        for (index, value) in values.iter_mut().enumerate() {
            let of = |bytes: &Vec<u8>| {
                f32::from_le_bytes(bytes[4 * index..4 * index + 4].try_into().unwrap())
            };
            *value = all[1..].iter().fold(of(&all[0]), |sum, one| sum + of(one));
        }
    }

    fn gather(&self, own: &[u8]) -> Vec<Vec<u8>> {
        let round = self.shared.round.lock().unwrap();
        let mut round = self
            .shared
            .wait(round, |round| round.given[self.rank].is_none());
        round.given[self.rank] = Some(own.to_vec());
        self.shared.changed.notify_all();
        let mut round = self
            .shared
            .wait(round, |round| round.given.iter().all(Option::is_some));
        let all = round.given.iter().flatten().cloned().collect();
        round.readers += 1;
        if round.readers == self.shared.size {
            round.readers = 0;
            round.given.fill(None);
            self.shared.changed.notify_all();
        }
        all
    }
}

/// What `size` threads return from `work`, in the order of their ranks.
///
/// # Panics
/// One of them panics, or does not take part in an exchange.
pub(in crate::ml) fn together<T: Send>(
    size: usize,
    work: impl Fn(&dyn ProcessGroup) -> T + Sync,
) -> Vec<T> {
    let shared = Shared {
        size,
        round: Mutex::new(Round {
            given: vec![None; size],
            readers: 0,
        }),
        changed: Condvar::new(),
    };
    std::thread::scope(|scope| {
        let start = |rank| {
            let (work, shared) = (&work, &shared);
            scope.spawn(move || work(&Member { rank, shared }))
        };
        let members: Vec<_> = (0..size).map(start).collect();
        members.into_iter().map(|one| one.join().unwrap()).collect()
    })
}
