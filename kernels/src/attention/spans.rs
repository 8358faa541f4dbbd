//! Which keys the tokens of a pass may see, checked when it is put together.

use std::ops::Deref;

/// What one token may see of its span: keys before `to` that are before `prefix` or not before `from`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Visible {
    /// The end of what all branches share.
    pub prefix: u32,
    /// The start of the token's own branch.
    pub from: u32,
    /// The end of what it may see; at least 1.
    pub to: u32,
}

/// A run of tokens that may see each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// The first token.
    pub start: usize,
    /// One entry a token.
    pub visible: Vec<Visible>,
}

/// Spans in order, of which no two have a token in common.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Spans {
    all: Vec<Span>,
    /// Where the last one ends.
    pub(super) end: usize,
}

impl Spans {
    /// Adds a span.
    ///
    /// # Panics
    /// If it begins before the end of the one before it, or if a token sees nothing, or something behind the span.
    pub fn push(&mut self, span: Span) {
        let length = span.visible.len();
        assert!(span.start >= self.end, "a span overlaps the one before it");
        // Twice as many tokens can still be counted in 32 bits with a sign.
        assert!(length <= 1 << 30, "a span of {length} tokens");
        for Visible { prefix, from, to } in &span.visible {
            let inside = (*prefix.max(from).max(to) as usize) <= length;
            let sees = prefix.min(to) > &0 || from < to;
            assert!(
                inside && sees,
                "a token of a span of {length} sees keys before {to} that are before {prefix} or from {from} on"
            );
        }
        let end = span.start.checked_add(length);
        assert!(end.is_some(), "a span behind all memory");
        self.end = end.unwrap_or(usize::MAX);
        self.all.push(span);
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
