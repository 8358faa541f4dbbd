//! Which keys the tokens of a pass may see, checked when it is put together.

use std::ops::{Deref, Range};

/// What one token may see of its span's keys: those in `first..to` that are before `prefix` or not before `from`.
///
/// Keys are counted from the first token of the span's context, or of the span where it has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Visible {
    /// The first key that it may see, in the prefix or in its own branch; 0 but for a sliding window.
    pub first: u32,
    /// The end of what all branches share.
    pub prefix: u32,
    /// The start of the token's own branch.
    pub from: u32,
    /// The end of what it may see; at least 1.
    pub to: u32,
}

impl Visible {
    /// The token with number `at` of a sequence of its own: it sees all tokens before it, and itself.
    pub fn causal(at: u32) -> Self {
        Self {
            first: 0,
            prefix: 0,
            from: 0,
            to: at + 1,
        }
    }

    /// How many keys it sees, but for a window.
    pub fn count(self) -> u32 {
        self.prefix.min(self.from).min(self.to) + self.to.saturating_sub(self.from)
    }

    /// The same without the first `count` of the keys that it sees, but for the last one: what a sliding window leaves, whether
    /// the window begins in the prefix or in the token's own branch.
    #[must_use]
    pub fn without_first(self, count: u32) -> Self {
        let shared = self.prefix.min(self.from).min(self.to);
        let count = count.min(self.count().saturating_sub(1));
        let first = if count < shared {
            count
        } else {
            self.from + (count - shared)
        };
        Self {
            first: first.max(self.first),
            ..self
        }
    }
}

/// A run of tokens that may see each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// The first token.
    pub start: usize,
    /// One entry a token.
    pub visible: Vec<Visible>,
    /// Earlier spans, by their numbers, whose tokens are the first of this one's keys: what its sequences begin with, computed
    /// once for several spans.
    pub context: Vec<usize>,
}

impl Span {
    /// The tokens.
    pub(super) fn tokens(&self) -> Range<usize> {
        self.start..self.start + self.visible.len()
    }
}

/// Where the keys of a span are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Keys {
    /// The tokens, one range behind the other.
    pub(super) ranges: Vec<Range<usize>>,
    /// How many there are.
    pub(super) count: usize,
    /// How many of them are the context's.
    pub(super) context: usize,
}

/// Spans in order, of which no two have a token in common.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Spans {
    all: Vec<Span>,
    keys: Vec<Keys>,
    /// Where the last one ends.
    pub(super) end: usize,
}

impl Spans {
    /// Adds a span.
    ///
    /// # Panics
    /// If the span begins before the end of the one before it, if its context is no earlier span, or if a token sees nothing, or
    /// something behind the span.
    pub fn push(&mut self, span: Span) {
        let length = span.visible.len();
        assert!(span.start >= self.end, "a span overlaps the one before it");
        let end = span.start.checked_add(length);
        assert!(end.is_some(), "a span behind all memory");
        let mut keys = Keys::default();
        for &number in &span.context {
            let earlier = self.all.get(number);
            assert!(
                earlier.is_some(),
                "the context of span {} is span {number}",
                self.all.len()
            );
            keys.add(earlier.map_or(0..0, Span::tokens));
        }
        keys.context = keys.count;
        keys.add(span.tokens());
        let count = keys.count;
        // Twice as many tokens can still be counted in 32 bits with a sign.
        assert!(count <= 1 << 30, "a span of {count} keys");
        for Visible {
            first,
            prefix,
            from,
            to,
        } in &span.visible
        {
            let inside = (*prefix.max(from).max(to) as usize) <= count;
            let sees = prefix.min(to) > first || from.max(first) < to;
            assert!(
                inside && sees,
                "a token of a span of {count} keys sees keys from {first} on and before {to} that are before {prefix} or from {from} on"
            );
        }
        self.end = end.unwrap_or(usize::MAX);
        self.keys.push(keys);
        self.all.push(span);
    }

    /// The same spans with other limits: `limit` gets the token and what it may see.
    ///
    /// # Panics
    /// As [`Spans::push`] does.
    #[must_use]
    pub fn limited(&self, limit: impl Fn(usize, Visible) -> Visible) -> Self {
        let spans = self.all.iter().map(|span| Span {
            start: span.start,
            visible: (span.start..)
                .zip(&span.visible)
                .map(|(token, visible)| limit(token, *visible))
                .collect(),
            context: span.context.clone(),
        });
        spans.collect()
    }

    /// Each span with its keys.
    pub(super) fn with_keys(&self) -> impl Iterator<Item = (&Span, &Keys)> {
        self.all.iter().zip(&self.keys)
    }

    /// For each span the later ones in whose context it is, and which of their keys is its first.
    pub(super) fn users(&self) -> Vec<Vec<(usize, usize)>> {
        let mut users = vec![Vec::new(); self.all.len()];
        for (number, span) in self.all.iter().enumerate() {
            let mut first = 0;
            for &earlier in &span.context {
                users[earlier].push((number, first));
                first += self.all[earlier].visible.len();
            }
        }
        users
    }
}

impl Keys {
    fn add(&mut self, tokens: Range<usize>) {
        self.count = self.count.saturating_add(tokens.len());
        match self.ranges.last_mut() {
            Some(last) if last.end == tokens.start => last.end = tokens.end,
            _ => self.ranges.push(tokens),
        }
    }
}

impl Deref for Spans {
    type Target = [Span];

    fn deref(&self) -> &[Span] {
        &self.all
    }
}

impl FromIterator<Span> for Spans {
    /// See [`Spans::push`] for what is refused.
    fn from_iter<T: IntoIterator<Item = Span>>(all: T) -> Self {
        let mut spans = Self::default();
        all.into_iter().for_each(|span| spans.push(span));
        spans
    }
}
