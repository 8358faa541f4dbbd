//! What ends a stage before it is done: an interrupted run, or its time limit.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::bail;

use super::Span;

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
