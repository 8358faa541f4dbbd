//! Which keys the tokens of a pass may attend to, checked when spans are put together.

use std::ops::{Deref, Range};

/// The keys of its span to which one token may attend: those in `first..to` that are before `prefix` or not before `from`.
///
/// Keys are counted from the first token of the span's context, or of the span where it has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Visible {
    /// The first key, in the prefix or in the token's own branch; 0 unless there is a sliding window.
    pub first: u32,
    /// The end of the prefix, which all branches share.
    pub prefix: u32,
    /// The start of the token's own branch.
    pub from: u32,
    /// The end of the keys; at least 1.
    pub to: u32,
}

impl Visible {
    /// Causal attention in a sequence of its own: token number `at` attends to all tokens before it and to itself.
    pub fn causal(at: u32) -> Self {
        Self {
            first: 0,
            prefix: 0,
            from: 0,
            to: at + 1,
        }
    }

    /// The number of keys to which it attends, without regard to a sliding window.
    pub fn count(self) -> u32 {
        self.prefix.min(self.from).min(self.to) + self.to.saturating_sub(self.from)
    }

    /// The same keys without the first `count` of them, of which the last one always stays. This is what a sliding window leaves,
    /// whether it begins in the prefix or in the token's own branch.
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

/// A run of tokens that may attend to each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// The index of the first token in the batch.
    pub start: usize,
    /// The keys of each token of the span.
    pub visible: Vec<Visible>,
    /// The numbers of earlier spans whose tokens are the first of this one's keys: a prefix of its sequences that is computed once
    /// for several spans.
    pub context: Vec<usize>,
}

impl Span {
    /// The tokens.
    pub(super) fn tokens(&self) -> Range<usize> {
        self.start..self.start + self.visible.len()
    }
}

/// The keys of a span.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Keys {
    /// Their tokens, as ranges one after the other.
    pub(super) ranges: Vec<Range<usize>>,
    /// The number of keys.
    pub(super) count: usize,
    /// The number of keys that belong to the context.
    pub(super) context: usize,
}

/// Spans in order, of which no two have a token in common.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Spans {
    all: Vec<Span>,
    keys: Vec<Keys>,
    /// The end of the last span.
    pub(super) end: usize,
}

impl Spans {
    /// Appends a span.
    ///
    /// # Panics
    /// If the span begins before the end of the one before it, if its context names a span that is not earlier, if it has more than
    /// 2^30 keys, or if one of its tokens attends to no key or to a key beyond the last one.
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

    /// The same spans with other limits. `limit` maps the index of a token in the batch and its keys to its new keys.
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

    /// For each span, the later spans in whose context it is, each with the index of its first key among theirs.
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
    /// Panics as [`Spans::push`] does.
    fn from_iter<T: IntoIterator<Item = Span>>(all: T) -> Self {
        let mut spans = Self::default();
        all.into_iter().for_each(|span| spans.push(span));
        spans
    }
}
