//! The log of a run's events in the store.

use super::Reporter;
use crate::engine::{Event, EventLog};

impl Reporter for EventLog {
    fn event(&mut self, event: &Event) {
        self.add(event);
    }
}
