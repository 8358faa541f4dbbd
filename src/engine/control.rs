//! What ends a stage before it is done: an interrupted run, or its time limit.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::bail;

use super::Span;

/// Says when a stage has to stop.
#[derive(Debug, Clone, Default)]
pub struct Control {
    cancel: Arc<AtomicBool>,
    /// Stops this part of the stage alone.
    own: Option<Arc<AtomicBool>>,
    /// When the stage has to be done, and how long it had.
    deadline: Option<(Instant, Span)>,
}

impl Control {
    /// Stops when `cancel` is set, or when `timeout` from now is over.
    pub fn new(cancel: Arc<AtomicBool>, timeout: Option<Span>) -> Self {
        let deadline = timeout.and_then(|span| Some((Instant::now().checked_add(span.0)?, span)));
        Self {
            cancel,
            own: None,
            deadline,
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

    /// An error when the stage has to stop.
    pub fn check(&self) -> anyhow::Result<()> {
        let own = self.own.as_ref();
        if self.cancel.load(Ordering::Relaxed) || own.is_some_and(|own| own.load(Ordering::Relaxed))
        {
            bail!("interrupted");
        }
        match self.deadline {
            Some((deadline, span)) if Instant::now() >= deadline => {
                bail!("it took longer than its `timeout` of {span}")
            }
            _ => Ok(()),
        }
    }
}
