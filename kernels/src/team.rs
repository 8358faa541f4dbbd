//! Threads that share the work of many short jobs in a row without being woken for each.
//!
//! A step of text generation is some hundred products of a few tens of microseconds each, with short work of one thread between them.
//! Waking a sleeping thread takes as long as such a product, so the members of a [`Team`] stay awake between the jobs of a step. A
//! member that waits for long lets other threads of the machine run, and one that never comes is not waited for.

use std::cell::{Cell, UnsafeCell};
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// The threads of the current thread pool that share a step's work.
pub struct Team<'a> {
    /// What the helpers look at, if there are helpers.
    jobs: Option<&'a Jobs>,
    /// Only the thread that gathered the team opens jobs, and a task opens none.
    not_sync: PhantomData<Cell<()>>,
}

type Task<'t> = &'t (dyn Fn(usize) + Sync);

/// What the members look at.
#[derive(Default)]
struct Jobs {
    /// The number of the last job in the upper 32 bits, [`OPEN`] while it may be joined, and below how many helpers are in it; or
    /// [`DISMISSED`].
    state: Line<AtomicU64>,
    /// The next task of the job that nobody has taken.
    next: Line<AtomicUsize>,
    job: UnsafeCell<Option<Job>>,
}

/// Values on cache lines of their own, since several threads write them.
#[derive(Default)]
#[repr(align(128))]
struct Line<T>(T);

#[derive(Clone, Copy)]
struct Job {
    task: Task<'static>,
    count: usize,
}

const OPEN: u64 = 1 << 31;
const HELPERS: u64 = OPEN - 1;
const DISMISSED: u64 = u64::MAX;

// SAFETY: the cell is written by the gathering thread alone, while no job is open and no helper is in one; helpers read it only inside
// an open job. `state` orders the two. A task may be called from every thread.
unsafe impl Sync for Jobs {}

impl Team<'_> {
    /// Runs `work` with a team of the current thread pool's threads, which stay awake. Those that are busy with other work take no part.
    /// Meanwhile nothing else runs on them.
    ///
    /// # Panics
    /// If `work` or a task panics.
    pub fn gather<T>(work: impl FnOnce(&Team<'_>) -> T) -> T {
        let jobs = Jobs::default();
        let helpers = rayon::current_num_threads().saturating_sub(1);
        rayon::in_place_scope(|scope| {
            // Helpers that were not started yet find it at once when they are.
            let _dismissal = Dismissal(&jobs);
            for _ in 0..helpers {
                scope.spawn(|_| jobs.help());
            }
            work(&Team {
                jobs: Some(&jobs).filter(|_| helpers > 0),
                not_sync: PhantomData,
            })
        })
    }

    /// Calls `task` once with each number below `count`, in any order, on all threads of the team.
    pub fn share(&self, count: usize, task: &(dyn Fn(usize) + Sync)) {
        let Some(jobs) = self.jobs.filter(|_| count > 1) else {
            return (0..count).for_each(task);
        };
        // SAFETY: the job is closed, and all helpers have left it, before this function returns or panics.
        let task = unsafe { std::mem::transmute::<Task<'_>, Task<'static>>(task) };
        let job = Job { task, count };
        // SAFETY: no job is open and no helper is in one, and nobody else opens any: a team is not `Sync`.
        unsafe { *jobs.job.get() = Some(job) };
        jobs.next.0.store(0, Ordering::Relaxed);
        let number = (jobs.state.0.load(Ordering::Relaxed) >> 32) + 1;
        jobs.state.0.store(number << 32 | OPEN, Ordering::Release);
        let _closing = Closing(jobs);
        jobs.work(job);
    }

    /// Calls `task` once with each chunk of `size` values (the last one may be shorter) and its number, on all threads of the team.
    ///
    /// # Panics
    /// If `size` is 0.
    pub fn share_chunks<T: Send>(
        &self,
        values: &mut [T],
        size: usize,
        task: impl Fn(usize, &mut [T]) + Sync,
    ) {
        assert!(size > 0, "chunks of no values");
        let chunks = Chunks {
            first: values.as_mut_ptr(),
            length: values.len(),
            size,
        };
        self.share(values.len().div_ceil(size), &|number| {
            // SAFETY: each number is used once, while `values` is borrowed.
            task(number, unsafe { chunks.get(number) });
        });
    }
}

/// The chunks of a slice, which several threads write.
struct Chunks<T> {
    first: *mut T,
    length: usize,
    size: usize,
}

// SAFETY: each chunk goes to one thread.
unsafe impl<T: Send> Sync for Chunks<T> {}

impl<T> Chunks<T> {
    /// # Safety
    /// The slice is still borrowed, and nobody else has the chunk of this number, which is there.
    #[expect(clippy::mut_from_ref, reason = "see the safety")]
    unsafe fn get(&self, number: usize) -> &mut [T] {
        let start = number * self.size;
        debug_assert!(start < self.length);
        let length = self.size.min(self.length - start);
        // SAFETY: a part of the slice; the rest is the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(start), length) }
    }
}

impl Jobs {
    /// Takes part in each job that is open, until the team is dismissed.
    fn help(&self) {
        let mut last = 0;
        let mut wait = Wait::default();
        loop {
            let state = self.state.0.load(Ordering::Acquire);
            if state == DISMISSED {
                return;
            }
            if state & OPEN == 0 || state >> 32 == last {
                wait.once();
                continue;
            }
            let joined = state + 1;
            let joining = (Ordering::Acquire, Ordering::Relaxed);
            let join = self
                .state
                .0
                .compare_exchange_weak(state, joined, joining.0, joining.1);
            if join.is_err() {
                continue;
            }
            last = state >> 32;
            let _leaving = Leaving(self);
            // SAFETY: the job was open when this thread joined, so the cell does not change until it leaves.
            if let Some(job) = unsafe { *self.job.get() } {
                self.work(job);
            }
            wait = Wait::default();
        }
    }

    fn work(&self, job: Job) {
        loop {
            let number = self.next.0.fetch_add(1, Ordering::Relaxed);
            if number >= job.count {
                return;
            }
            (job.task)(number);
        }
    }
}

/// Leaves a job, also when a task panics.
struct Leaving<'a>(&'a Jobs);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.state.0.fetch_sub(1, Ordering::Release);
    }
}

/// Closes the open job and waits for the helpers that are in it, also when a task panics.
struct Closing<'a>(&'a Jobs);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        let state = &self.0.state.0;
        state.fetch_and(!OPEN, Ordering::Relaxed);
        let mut wait = Wait::default();
        while state.load(Ordering::Acquire) & HELPERS > 0 {
            wait.once();
        }
    }
}

/// Sends all helpers home, also when the work panics.
struct Dismissal<'a>(&'a Jobs);

impl Drop for Dismissal<'_> {
    fn drop(&mut self) {
        self.0.state.0.store(DISMISSED, Ordering::Release);
    }
}

/// The turns of waiting in which a thread keeps its core: some tens of microseconds.
const TURNS: u32 = 1000;

/// Waits for what another thread is about to do.
#[derive(Default)]
struct Wait(u32);

impl Wait {
    fn once(&mut self) {
        if self.0 < TURNS {
            self.0 += 1;
            std::hint::spin_loop();
        } else {
            // Perhaps the other thread needs this core.
            std::thread::yield_now();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;
    use crate::dispatch::tests::with_threads;

    #[test]
    fn each_task_of_each_job_is_done_once() {
        for threads in [1, 2, 7] {
            with_threads(threads, || {
                for _ in 0..20 {
                    let counts: Vec<AtomicUsize> = (0..97).map(|_| AtomicUsize::new(0)).collect();
                    Team::gather(|team| {
                        for job in 1..200 {
                            let count = job % counts.len();
                            team.share(count, &|number| {
                                counts[number].fetch_add(1, Ordering::Relaxed);
                            });
                        }
                    });
                    for (number, count) in counts.iter().enumerate() {
                        let jobs = (1..200).filter(|job| job % 97 > number).count();
                        assert_eq!(count.load(Ordering::Relaxed), jobs, "{number}");
                    }
                }
            });
        }
    }

    #[test]
    fn chunks_are_all_there_and_apart() {
        let expected: Vec<usize> = (0..103).map(|at| at / 10 * 100).collect();
        let work = |team: &Team<'_>| {
            let mut values = vec![0; 103];
            for _ in 0..100 {
                team.share_chunks(&mut values, 10, |number, chunk| {
                    for value in chunk {
                        *value += number;
                    }
                });
            }
            team.share_chunks(&mut values[..0], 1, |_, _| panic!("there is no chunk"));
            assert_eq!(values, expected);
        };
        with_threads(3, || {
            Team::gather(work);
        });
    }

    #[test]
    fn a_panic_of_any_task_comes_out_and_leaves_no_thread_behind() {
        with_threads(3, || {
            for bad in 0..50 {
                let gathered = catch_unwind(AssertUnwindSafe(|| {
                    Team::gather(|team| {
                        team.share(50, &|number| assert_ne!(number, bad, "the bad one"));
                    });
                }));
                assert!(gathered.is_err(), "{bad}");
            }
            Team::gather(|team| team.share(3, &|_| ()));
        });
    }

    #[test]
    fn a_team_does_without_threads_that_are_busy() {
        with_threads(2, || {
            let done = AtomicUsize::new(0);
            // The other thread gathers a team of its own, whose helper never comes.
            let work = || {
                Team::gather(|team| {
                    for _ in 0..100 {
                        team.share(10, &|_| _ = done.fetch_add(1, Ordering::Relaxed));
                    }
                });
            };
            rayon::join(work, work);
            assert_eq!(done.load(Ordering::Relaxed), 2000);
        });
    }
}
