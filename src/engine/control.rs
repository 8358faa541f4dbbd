//! What ends a stage before it is done: an interrupted run, or its time limit.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::bail;

use super::Span;

/// How much later than a stage's process the process of its job may be told to stop.
const LATEST_SIGNAL: Duration = Duration::from_secs(2);

/// Whether the job of a stage that failed is being ended from outside, so that the failure is not the stage's own. A scheduler signals the
/// processes of a job one after another, and the stage's may have died of it before this one hears of it.
pub(super) fn is_ended_from_outside(cancel: &AtomicBool) -> bool {
    let start = Instant::now();
    while !cancel.load(Ordering::Relaxed) {
        if start.elapsed() >= LATEST_SIGNAL {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    true
}

/// Says when a stage has to stop.
#[derive(Debug, Clone, Default)]
pub struct Control {
    cancel: Arc<AtomicBool>,
    /// Stops this part of the stage alone.
    own: Option<Arc<AtomicBool>>,
    /// When the time of the stage began, and how long it has.
    limit: Option<(Arc<Mutex<Instant>>, Span)>,
}

impl Control {
    /// Stops when `cancel` is set, or when `timeout` from now is over.
    pub fn new(cancel: Arc<AtomicBool>, timeout: Option<Span>) -> Self {
        let limit = timeout.map(|span| (Arc::new(Mutex::new(Instant::now())), span));
        Self {
            cancel,
            own: None,
            limit,
        }
    }

    /// The same for a part of the stage, which `own` stops, too.
    pub(super) fn or(&self, own: Arc<AtomicBool>) -> Self {
        Self {
            own: Some(own),
            ..self.clone()
        }
    }

    /// Makes the stage stop.
    pub fn cancel(&self) {
        self.cancel.store(true, Ordering::Relaxed);
    }

    /// What is set when the run is told to stop.
    pub(super) fn flag(&self) -> &AtomicBool {
        &self.cancel
    }

    /// Whether the stage was told to stop, whatever its time limit.
    pub fn is_cancelled(&self) -> bool {
        let own = self.own.as_ref();
        self.cancel.load(Ordering::Relaxed) || own.is_some_and(|own| own.load(Ordering::Relaxed))
    }

    /// Lets the time of the stage begin now: it has only waited so far.
    pub fn restart(&self) {
        if let Some((start, _)) = &self.limit {
            *start.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        }
    }

    /// An error when the stage has to stop.
    pub fn check(&self) -> anyhow::Result<()> {
        if self.is_cancelled() {
            bail!("interrupted");
        }
        if let Some((start, span)) = &self.limit {
            let start = *start.lock().unwrap_or_else(PoisonError::into_inner);
            if start.elapsed() >= span.0 {
                bail!("it took longer than its `timeout` of {span}");
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_that_comes_after_the_failure_counts() {
        let cancel = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(100));
                cancel.store(true, Ordering::Relaxed);
            });
            assert!(is_ended_from_outside(&cancel));
        });
        assert!(!is_ended_from_outside(&AtomicBool::new(false)));
    }
}
