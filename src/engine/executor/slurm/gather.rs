//! Collects submissions that are alike and come at the same time, so that they are submitted as one.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The first submission waits for others at most this many times the quiet period, even if more keep coming.
const LONGEST: u32 = 15;
const TICK: Duration = Duration::from_millis(20);

/// Submissions of type `T` with answers of type `A`. Those with an equal key `K` are alike.
pub(super) struct Gathering<K, T, A> {
    groups: Mutex<BTreeMap<K, Group<T, A>>>,
}

struct Group<T, A> {
    others: Vec<(T, Sender<A>)>,
    first: Instant,
    last: Instant,
}

/// What a submission has to do after it was collected.
pub(super) enum Role<T, A> {
    /// It was the first of its group: it submits all of them, and answers the others.
    First(T, Vec<(T, Sender<A>)>),
    /// It waits for the answer of the first.
    Other(Receiver<A>),
}

impl<K, T, A> Default for Gathering<K, T, A> {
    fn default() -> Self {
        Self {
            groups: Mutex::default(),
        }
    }
}

impl<K: Ord + Clone, T, A> Gathering<K, T, A> {
    /// Waits for others with the same key until there are `most` of them, or none has come for `quiet`.
    pub(super) fn join(&self, like: &K, one: T, most: usize, quiet: Duration) -> Role<T, A> {
        let groups = || self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        {
            let mut groups = groups();
            if let Some(group) = groups.get_mut(like) {
                let (sender, answer) = channel();
                group.others.push((one, sender));
                group.last = Instant::now();
                return Role::Other(answer);
            }
            let now = Instant::now();
            let group = Group {
                others: Vec::new(),
                first: now,
                last: now,
            };
            groups.insert(like.clone(), group);
        }
        loop {
            std::thread::sleep(TICK);
            let mut groups = groups();
            let ready = groups.get(like).is_none_or(|group| {
                group.last.elapsed() >= quiet
                    || group.first.elapsed() >= quiet * LONGEST
                    || group.others.len() + 1 >= most
            });
            if ready {
                let group = groups.remove(like);
                return Role::First(one, group.map_or_else(Vec::new, |group| group.others));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn those_that_come_together_are_one_and_others_are_not() {
        let gathering: Gathering<&str, usize, usize> = Gathering::default();
        let quiet = Duration::from_millis(300);
        let (barrier, firsts) = (Barrier::new(6), Mutex::new(Vec::new()));
        std::thread::scope(|scope| {
            for number in 0..6 {
                let (gathering, barrier, firsts) = (&gathering, &barrier, &firsts);
                scope.spawn(move || {
                    barrier.wait();
                    let like = if number < 5 { "a" } else { "b" };
                    match gathering.join(&like, number, 100, quiet) {
                        Role::First(own, others) => {
                            firsts.lock().unwrap().push((own, others.len()));
                            for (other, answer) in others {
                                answer.send(other * 10).unwrap();
                            }
                        }
                        Role::Other(answer) => assert_eq!(answer.recv(), Ok(number * 10)),
                    }
                });
            }
        });
        let mut firsts = firsts.into_inner().unwrap();
        firsts.sort_unstable_by_key(|(_, others)| *others);
        assert_eq!(firsts[0], (5, 0));
        assert_eq!(firsts.len(), 2);
        assert_eq!(firsts[1].1, 4);
        // Nobody waits for more than there may be.
        let Role::First(7, none) = gathering.join(&"c", 7, 1, quiet) else {
            panic!("it is the only one")
        };
        assert!(none.is_empty());
    }
}
