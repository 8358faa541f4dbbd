//! What was found in one look at the store and at local files, so that what several stages have in common is looked at once.
//!
//! A look is short: what was found more than a moment ago may have changed, and is looked at again.

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// How long what was found counts.
const MOMENT: Duration = Duration::from_secs(1);

/// What was found within the last moment.
pub(super) struct OneLook<K, V> {
    began: Instant,
    found: BTreeMap<K, V>,
}

impl<K: Ord, V> OneLook<K, V> {
    /// Nothing yet.
    pub(super) fn new() -> Self {
        Self {
            began: Instant::now(),
            found: BTreeMap::new(),
        }
    }

    /// What was found a moment ago.
    pub(super) fn get<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        if self.began.elapsed() > MOMENT {
            self.end();
        }
        self.found.get(key)
    }

    /// Notes what was found by a look that began at `time`.
    pub(super) fn note(&mut self, time: Instant, key: K, value: V) {
        if self.found.is_empty() {
            self.began = time;
        }
        self.found.insert(key, value);
    }

    /// Ends the look: from now on all is looked at again.
    pub(super) fn end(&mut self) {
        self.found.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_found_counts_for_a_moment() {
        let mut look = OneLook::new();
        assert_eq!(look.get("a"), None);
        let now = Instant::now();
        look.note(now, "a".to_owned(), 1);
        let found = look.get("a").copied();
        // A machine that was stopped meanwhile proves nothing.
        if now.elapsed() < MOMENT {
            assert_eq!(found, Some(1));
        }
        assert_eq!(look.get("b"), None);
        look.end();
        assert_eq!(look.get("a"), None);
        if let Some(before) = now.checked_sub(2 * MOMENT) {
            look.note(before, "a".to_owned(), 1);
            look.note(now, "b".to_owned(), 1);
            assert_eq!(look.get("a"), None);
            assert_eq!(look.get("b"), None);
        }
    }
}
