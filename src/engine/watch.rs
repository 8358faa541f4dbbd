//! Detects work that does not end and can't be interrupted, such as a library call on one row. Only stages in their own process are
//! watched, since only a process can be killed. CPU time is measured, so that nothing looks stuck because the machine is busy.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike as _;

/// The interval between two checks.
const TICK: Duration = Duration::from_millis(100);

/// The work of one thread.
#[derive(Default)]
struct Slot {
    /// A counter that is odd while the thread does watched work.
    turn: AtomicU64,
    /// The largest number of microseconds that the work may take.
    most: AtomicU64,
    number: AtomicU64,
    of: Mutex<Option<Arc<str>>>,
}

static SLOTS: Mutex<Vec<Arc<Slot>>> = Mutex::new(Vec::new());

thread_local! {
    static OWN: RefCell<Option<Arc<Slot>>> = const { RefCell::new(None) };
}

/// What is worked on, for the message.
#[derive(Debug, Clone)]
pub struct Row {
    /// Its number, from 1; 0 where there is nothing to count.
    pub number: u64,
    /// What it is part of, such as the words "of the split `train`"; or what is worked on, where there is no number.
    pub of: Arc<str>,
}

/// Does work that can't be interrupted. A watched process ends with an error if the work takes more CPU time than `most`.
pub fn watched<R>(row: Row, most: Duration, work: impl FnOnce() -> R) -> R {
    let slot = OWN.with_borrow_mut(|own| {
        let made = || {
            let slot = Arc::new(Slot::default());
            let mut slots = SLOTS.lock().unwrap_or_else(PoisonError::into_inner);
            slots.push(Arc::clone(&slot));
            slot
        };
        Arc::clone(own.get_or_insert_with(made))
    });
    slot.most.store(most.as_micros() as u64, Ordering::Relaxed);
    slot.number.store(row.number, Ordering::Relaxed);
    *slot.of.lock().unwrap_or_else(PoisonError::into_inner) = Some(row.of);
    let _turn = Turn::begin(&slot);
    work()
}

/// Ends the turn, panic or not.
struct Turn<'a>(&'a Slot);

impl<'a> Turn<'a> {
    fn begin(slot: &'a Slot) -> Self {
        slot.turn.fetch_add(1, Ordering::Release);
        Self(slot)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.turn.fetch_add(1, Ordering::Release);
    }
}

/// Checks forever, and calls `stuck` with a message once some work took too long.
pub(super) fn look_on(stuck: impl Fn(String)) {
    // The turn of each slot, and what it has taken so far.
    let mut seen: Vec<(u64, u64)> = Vec::new();
    let mut before = processor_time();
    loop {
        std::thread::sleep(TICK);
        let slots = SLOTS.lock().unwrap_or_else(PoisonError::into_inner).clone();
        seen.resize(slots.len(), (0, 0));
        let mut busy = Vec::new();
        for (slot, seen) in slots.iter().zip(&mut seen) {
            let turn = slot.turn.load(Ordering::Acquire);
            if turn == seen.0 && turn % 2 == 1 {
                busy.push((slot, seen));
            } else {
                *seen = (turn, 0);
            }
        }
        let now = processor_time();
        let share = now.saturating_sub(before) / (busy.len() as u64).max(1);
        before = now;
        for (slot, seen) in busy {
            seen.1 += share;
            let most = slot.most.load(Ordering::Relaxed);
            if seen.1 > most {
                stuck(sentence(slot, Duration::from_micros(most)));
                seen.1 = 0;
            }
        }
    }
}

/// The CPU time of this process in microseconds; 0 if the system does not report it.
fn processor_time() -> u64 {
    getrusage(UsageWho::RUSAGE_SELF).map_or(0, |usage| {
        let time = usage.user_time() + usage.system_time();
        u64::try_from(time.num_microseconds()).unwrap_or(0)
    })
}

fn sentence(slot: &Slot, most: Duration) -> String {
    let of = slot
        .of
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    let of = of.unwrap_or_else(|| Arc::from("it"));
    let seconds = most.as_secs();
    match slot.number.load(Ordering::Relaxed) {
        0 => format!("{of} took longer than {seconds} s and was stopped"),
        number => format!("row {number} {of} took longer than {seconds} s and was stopped"),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_row_that_does_not_end_is_named() {
        let (sender, stuck) = channel::<String>();
        std::thread::spawn(move || look_on(move |text| _ = sender.send(text)));
        let of: Arc<str> = Arc::from("of the split `slow`");
        let row = |number| Row {
            number,
            of: Arc::clone(&of),
        };
        let short = Duration::from_millis(200);
        assert_eq!(watched(row(1), short, || 5), 5);
        let text = watched(row(2), short, || {
            loop {
                // Other tests may be slow, too.
                match stuck.try_recv() {
                    Ok(text) if text.contains("`slow`") => break text,
                    _ => std::hint::spin_loop(),
                }
            }
        });
        assert_eq!(
            text,
            "row 2 of the split `slow` took longer than 0 s and was stopped"
        );
    }
}
