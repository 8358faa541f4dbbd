//! The order of the tokens of a pass: one sequence after the other, without padding, and with common prefixes once for all of them.
//!
//! The sequences of a pass form a tree (tree training, arXiv 2511.00413): a token attends to those on the path from the root to itself. A
//! prefix of several rows, such as a system prompt, is a span of its own, and the context of the spans after it; a row's prompt and the two
//! answers to it are one span. The answers to a prompt stay together whatever rows are beside theirs, so that the bits of a row don't depend
//! on the other rows of a pass.

use std::collections::HashMap;

use pipeline_kernels::attention::{Span, Spans, Visible};

use crate::ml::model::batch::{Batch, Sequence};
use crate::ml::model::linear::BATCH_STRIDE;

/// What is left out of the computation of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packing {
    /// Whether padding is left out. Only `logits/*` differ then, because TRL's mean includes the padding.
    pub padding_free: bool,
    /// Whether common prefixes of sequences are computed once. Needs `padding_free`.
    pub share_prompts: bool,
}

impl Default for Packing {
    fn default() -> Self {
        Self {
            padding_free: true,
            share_prompts: true,
        }
    }
}

/// The number of tokens that a span of its own for a common prefix must save, because it needs panels and sums of its own.
const WORTHWHILE: usize = 16;

/// The tokens of a pass.
#[derive(Debug, Default)]
pub(super) struct Layout {
    /// The id of each token.
    pub(super) ids: Vec<u32>,
    /// The position of each token in its document.
    pub(super) positions: Vec<usize>,
    /// For each token the length of its batch (the first one, if it is in several): one more than the largest position, padding included.
    pub(super) lengths: Vec<usize>,
    /// The spans of tokens that may attend to each other.
    spans: Spans,
    /// The spans for each size of a sliding window.
    windows: Vec<Window>,
    /// For each sequence of all batches, the token at each of its positions.
    pub(super) token_indices: Vec<Vec<usize>>,
    /// For each token, its index in its padded batch (the first batch, if it is in several), plus [`BATCH_STRIDE`] for each batch before it.
    pub(super) padded_index: Vec<u64>,
    /// For each sequence, the number of keys before its branch, and the index of the branch's first key among those of its span. The
    /// panels over which sums over keys are split depend on these.
    pub(super) branches: Vec<(usize, usize)>,
}

/// A sliding window of layers.
#[derive(Debug)]
struct Window {
    /// Its size in keys, a query's own included.
    size: usize,
    spans: Spans,
    /// See [`Layout::averaging`].
    averaging: Vec<usize>,
}

impl Packing {
    fn shares(self) -> bool {
        self.padding_free && self.share_prompts
    }

    /// The number of tokens that one pass computes for these batches.
    pub(super) fn tokens(self, batches: &[&Batch]) -> usize {
        if self.shares() {
            return Layout::new(batches, self).ids.len();
        }
        let of = |batch: &&Batch| {
            if self.padding_free {
                batch.tokens()
            } else {
                batch.sequences.len() * batch.width
            }
        };
        batches.iter().map(of).sum()
    }
}

/// A sequence of a pass.
#[derive(Clone, Copy)]
struct Member<'a> {
    batch: &'a Batch,
    sequence: &'a Sequence,
    /// Its index in the batch, and (`number`) in the layout.
    row: usize,
    number: usize,
    /// The padded index of its batch's first token.
    first: u64,
    /// See [`Layout::lengths`].
    length: usize,
}

impl<'a> Member<'a> {
    fn ids(&self) -> &'a [u32] {
        &self.sequence.ids
    }

    /// The index in the layout of the other sequence of its pair.
    fn partner(&self) -> Option<usize> {
        let half = self.batch.sequences.len() / 2;
        let other = if self.row < half {
            self.number + half
        } else {
            self.number - half
        };
        self.batch.is_pairs().then_some(other)
    }
}

/// A common prefix of sequences that is already in the layout.
#[derive(Clone, Default)]
struct Start {
    tokens: Vec<usize>,
    spans: Vec<usize>,
}

/// The length of the common prefix of sequences.
fn common(members: &[Member<'_>]) -> usize {
    let Some((first, others)) = members.split_first() else {
        return 0;
    };
    others.iter().fold(first.ids().len(), |most, other| {
        let both = first.ids().iter().zip(other.ids()).take(most);
        both.take_while(|(a, b)| a == b).count()
    })
}

/// Groups sequences by their id at position `at`, in the order in which the ids occur.
fn split<'a>(members: &[Member<'a>], at: usize) -> Vec<Vec<Member<'a>>> {
    let mut groups: Vec<(Option<u32>, Vec<Member<'a>>)> = Vec::new();
    for member in members {
        let id = member.ids().get(at).copied();
        match groups.iter_mut().find(|(of, _)| *of == id) {
            Some((_, group)) => group.push(*member),
            None => groups.push((id, vec![*member])),
        }
    }
    groups.into_iter().map(|(_, group)| group).collect()
}

/// The pairs among sequences with a common prefix whose two sequences part right behind it, those with equal ids together, and the other
/// sequences.
fn parting_pairs<'a>(
    members: &[Member<'a>],
    common: usize,
) -> (Vec<Vec<[Member<'a>; 2]>>, Vec<Member<'a>>) {
    let by_number: HashMap<usize, Member<'a>> = members
        .iter()
        .map(|member| (member.number, *member))
        .collect();
    let parts_from = |member: &Member<'a>| {
        let partner = by_number.get(&member.partner()?)?;
        (member.ids().get(common) != partner.ids().get(common)).then_some(*partner)
    };
    let mut pairs: Vec<Vec<[Member<'a>; 2]>> = Vec::new();
    let mut known: HashMap<[&'a [u32]; 2], usize> = HashMap::new();
    let mut rest = Vec::new();
    for member in members {
        let Some(partner) = parts_from(member) else {
            rest.push(*member);
            continue;
        };
        if member.number > partner.number {
            continue;
        }
        let ids = [member.sequence.ids.as_slice(), &partner.sequence.ids];
        let index = *known.entry(ids).or_insert_with(|| {
            pairs.push(Vec::new());
            pairs.len() - 1
        });
        pairs[index].push([*member, partner]);
    }
    (pairs, rest)
}

impl Layout {
    /// Adds the spans for sliding windows of the given sizes in keys, a query's own included.
    pub(super) fn add_windows(&mut self, windows: impl IntoIterator<Item = usize>) {
        let longest = self.positions.iter().max().map_or(0, |last| last + 1);
        for window in windows {
            // A window that is not shorter than the longest sequence changes nothing.
            if window >= longest || self.windows.iter().any(|known| known.size == window) {
                continue;
            }
            let outside = |token: usize| {
                let seen = self.positions.get(token).map_or(0, |position| position + 1);
                seen.saturating_sub(window) as u32
            };
            // Padding whose window contains no id attends to everything, see `Batch::mask`.
            let mut averaging = Vec::new();
            let mut lengths = vec![0; self.ids.len()];
            for span in self.spans.iter() {
                for (token, visible) in (span.start..).zip(&span.visible) {
                    if outside(token) >= visible.count() {
                        averaging.push(token);
                    }
                    lengths[token] = span.visible.len() as u32;
                }
            }
            let spans = self.spans.limited(|token, visible| {
                if outside(token) < visible.count() {
                    visible.without_first(outside(token))
                } else {
                    Visible {
                        first: 0,
                        prefix: 0,
                        from: 0,
                        to: lengths[token],
                    }
                }
            });
            self.windows.push(Window {
                size: window,
                spans,
                averaging,
            });
        }
    }

    fn window(&self, window: Option<usize>) -> Option<&Window> {
        self.windows.iter().find(|known| Some(known.size) == window)
    }

    /// The sizes of the windows that were added by [`Layout::add_windows`] and change something.
    pub(super) fn window_sizes(&self) -> impl Iterator<Item = usize> {
        self.windows.iter().map(|window| window.size)
    }

    /// The spans for a window that was added by [`Layout::add_windows`], or without a window.
    pub(super) fn spans(&self, window: Option<usize>) -> &Spans {
        self.window(window)
            .map_or(&self.spans, |known| &known.spans)
    }

    /// The tokens whose attention is the mean of all values: padding whose window contains no id, see
    /// [`crate::ml::model::batch::Batch::mask`]. Their queries have to be zero.
    pub(super) fn averaging(&self, window: Option<usize>) -> &[usize] {
        self.window(window).map_or(&[], |known| &known.averaging)
    }

    pub(super) fn new(batches: &[&Batch], packing: Packing) -> Self {
        let mut members = Vec::new();
        for (&batch, number) in batches.iter().zip(0u64..) {
            let from = members.len();
            let count = batch.sequences.len();
            let length = batch.length();
            let member = |row: usize| {
                Some(Member {
                    batch,
                    sequence: batch.sequences.get(row)?,
                    row,
                    number: from + row,
                    first: number * BATCH_STRIDE,
                    length,
                })
            };
            if packing.shares() && batch.is_pairs() {
                members.extend(
                    (0..count / 2)
                        .flat_map(|row| [row, row + count / 2])
                        .filter_map(member),
                );
            } else {
                members.extend((0..count).filter_map(member));
            }
        }
        let mut layout = Self::default();
        layout.token_indices.resize_with(members.len(), Vec::new);
        layout.branches.resize(members.len(), (0, 0));
        if packing.shares() {
            // Sequences that hold several documents share no prefix.
            let (plain, packed): (Vec<_>, Vec<_>) = members
                .into_iter()
                .partition(|member| !member.sequence.is_packed());
            layout.grow(&plain, &Start::default());
            for member in &packed {
                layout.single(member, false);
            }
        } else {
            for member in &members {
                layout.single(member, !packing.padding_free);
            }
        }
        layout
    }

    fn push(&mut self, member: &Member<'_>, id: u32, position: usize) {
        let token = self.ids.len();
        let token_indices = &mut self.token_indices[member.number];
        let index = member.row * member.batch.width + token_indices.len();
        token_indices.push(token);
        self.padded_index.push(member.first + index as u64);
        self.ids.push(id);
        self.positions.push(position);
        self.lengths.push(member.length);
    }

    /// Adds one sequence as a span, with its padding if `padded`.
    fn single(&mut self, member: &Member<'_>, padded: bool) {
        let length = member.ids().len();
        let width = if padded { member.batch.width } else { length };
        let start = self.ids.len();
        let mut visible = Vec::with_capacity(width);
        for (at, from) in member.sequence.starts(width).into_iter().enumerate() {
            let id = member.ids().get(at).copied();
            self.push(member, id.unwrap_or(member.batch.pad()), at - from);
            visible.push(Visible {
                first: 0,
                prefix: 0,
                from: from as u32,
                to: (at + 1).min(length) as u32,
            });
        }
        self.spans.push(Span {
            start,
            visible,
            context: Vec::new(),
        });
    }

    /// Adds the rest of sequences with the prefix `start`.
    fn grow(&mut self, members: &[Member<'_>], start: &Start) {
        let Some(first) = members.first() else {
            return;
        };
        let common = common(members);
        let pair = members.len() == 2 && members.last().map(|last| last.number) == first.partner();
        if pair || members.iter().all(|member| member.ids().len() == common) {
            self.branching_span(members, start, common);
            return;
        }
        let (pairs, rest) = parting_pairs(members, common);
        let groups = split(&rest, common);
        let mut start = start.clone();
        if (pairs.len() + groups.len() - 1) * (common - start.tokens.len()) >= WORTHWHILE {
            let from = self.ids.len();
            // The prefix is added for the first sequence alone, whose tokens are listed again together with the rest.
            self.span(&[*first], &start, common, common);
            start.tokens.extend(from..self.ids.len());
            start.spans.push(self.spans.len() - 1);
            self.token_indices[first.number].clear();
        }
        for same in pairs {
            self.branching_span(&same[0], &start, common);
            for (side, known) in same[0].iter().enumerate() {
                for other in &same[1..] {
                    let tokens = self.token_indices[known.number].clone();
                    self.token_indices[other[side].number] = tokens;
                    self.branches[other[side].number] = self.branches[known.number];
                }
            }
        }
        for group in groups {
            self.grow(&group, &start);
        }
    }

    /// Adds one span for sequences with a common prefix: their first `common` ids once, then the rest of each.
    fn branching_span(&mut self, members: &[Member<'_>], start: &Start, common: usize) {
        let longest = members.iter().map(|member| member.ids().len()).max();
        self.span(members, start, common, longest.unwrap_or(0));
    }

    /// Adds one span for the ids of sequences after `start` and before `end`; the first `common` ids are added once.
    fn span(&mut self, members: &[Member<'_>], start: &Start, common: usize, end: usize) {
        let known = start.tokens.len();
        let from = self.ids.len();
        let mut visible = Vec::new();
        let mut shared = start.tokens.clone();
        for (number, member) in members.iter().enumerate() {
            let skipped = if number > 0 { common } else { known };
            // Among the span's keys, this sequence's own branch starts after the common part, or after the branch before it.
            let branch = if number > 0 { known + visible.len() } else { 0 };
            self.token_indices[member.number].clone_from(&shared);
            if number > 0 {
                self.branches[member.number] = (common, branch);
            }
            for (at, &id) in member.ids().iter().enumerate().take(end).skip(skipped) {
                self.push(member, id, at);
                visible.push(Visible {
                    first: 0,
                    prefix: common as u32,
                    from: branch as u32,
                    to: (known + visible.len() + 1) as u32,
                });
            }
            if number == 0 {
                shared.extend(from..from + (common - known));
            }
        }
        if !visible.is_empty() {
            self.spans.push(Span {
                start: from,
                visible,
                context: start.spans.clone(),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ml::model::batch::Row;

    #[test]
    fn prompts_are_shared_and_padding_is_left_out() {
        let row = |prompt: &[u32], chosen: &[u32], rejected: &[u32]| Row {
            prompt: prompt.to_vec(),
            chosen: chosen.to_vec(),
            rejected: Some(rejected.to_vec()),
            ..Row::default()
        };
        let rows = [row(&[1, 2], &[3, 4], &[3, 5, 6]), row(&[7], &[8], &[9])];
        let batch = Batch::pairs(&[&rows[0], &rows[1]], 0).unwrap();
        let layout = Layout::new(&[&batch], Packing::default());
        assert_eq!(Packing::default().tokens(&[&batch]), 9);
        assert_eq!(layout.ids, [1, 2, 3, 4, 5, 6, 7, 8, 9]);
        assert_eq!(layout.positions, [0, 1, 2, 3, 3, 4, 0, 1, 1]);
        assert_eq!(layout.token_indices[0], [0, 1, 2, 3]);
        assert_eq!(layout.token_indices[2], [0, 1, 2, 4, 5]);
        assert_eq!(layout.token_indices[3], [6, 8]);
        let seen = |span: usize, token: usize| -> Vec<u32> {
            let v = layout.spans[span].visible[token];
            (0..v.to)
                .filter(|key| *key < v.prefix || *key >= v.from)
                .collect()
        };
        assert_eq!(seen(0, 3), [0, 1, 2, 3]);
        assert_eq!(seen(0, 5), [0, 1, 2, 4, 5]);
        assert_eq!(seen(1, 2), [0, 2]);
        assert_eq!((layout.spans[1].start, layout.spans.len()), (6, 2));

        let free = Packing {
            padding_free: true,
            share_prompts: false,
        };
        assert_eq!(Layout::new(&[&batch], free).ids.len(), 4 + 2 + 5 + 2);
        assert_eq!(free.tokens(&[&batch]), 4 + 2 + 5 + 2);
        let padded = Packing {
            padding_free: false,
            share_prompts: false,
        };
        let layout = Layout::new(&[&batch], padded);
        assert_eq!(padded.tokens(&[&batch]), 4 * 5);
        assert_eq!(layout.ids.len(), 4 * 5);
        assert_eq!(layout.padded_index, (0..20).collect::<Vec<u64>>());
        let last = layout.spans[1].visible[4];
        assert_eq!((last.from, last.to), (0, 2), "padding sees the tokens only");

        // A second batch stands behind the first, and looks the same from its own start.
        let both = Layout::new(&[&batch, &batch], free);
        assert_eq!(both.ids[13..], both.ids[..13]);
        assert_eq!(both.positions[13..], both.positions[..13]);
        assert_eq!(both.token_indices[4 + 1], [13 + 4, 13 + 5]);
        assert_eq!(both.spans[4 + 1].start, 13 + 4);
        assert_eq!(
            both.padded_index[13 + 4],
            both.padded_index[4] + BATCH_STRIDE
        );
    }

    /// The tokens that a token sees, found through its span.
    fn seen(layout: &Layout, token: usize) -> Vec<usize> {
        let spans: Vec<&Span> = layout.spans.iter().collect();
        let tokens = |span: &Span| span.start..span.start + span.visible.len();
        let span = spans
            .iter()
            .find(|span| tokens(span).contains(&token))
            .unwrap();
        let context = span.context.iter().map(|number| spans[*number]);
        let keys: Vec<usize> = context.chain([*span]).flat_map(tokens).collect();
        let v = span.visible[token - span.start];
        let numbered = (0u32..).zip(keys).take(v.to as usize);
        let visible = numbered.filter(|(key, _)| *key < v.prefix || *key >= v.from);
        visible.map(|(_, token)| token).collect()
    }

    /// Whatever sequences have in common, each of their tokens sees the ones before it in its sequence, and no others.
    #[test]
    fn sequences_are_a_tree() {
        let mut state = 3u64;
        let mut dice = |sides: u64| pipeline_kernels::random::splitmix64(&mut state) % sides;
        for case in 0..200 {
            // Starts of starts, so that much is common at several depths, and some ids that are anything.
            let mut known: Vec<Vec<u32>> = vec![vec![1]];
            let mut sequence = |least: u64| {
                let mut ids = known[dice(known.len() as u64) as usize].clone();
                if dice(4) == 0 {
                    ids.truncate(dice(20) as usize + 1);
                }
                let more = dice(if case % 2 == 0 { 6 } else { 30 }) + least;
                ids.extend((0..more).map(|_| dice(3) as u32));
                known.push(ids.clone());
                ids
            };
            let mut rows = |count: usize| -> Vec<Row> {
                let row = |_| {
                    let prompt = sequence(0);
                    let end = |ids: Vec<u32>| match ids.strip_prefix(&prompt[..]) {
                        Some(answer) if !answer.is_empty() => answer.to_vec(),
                        _ => vec![ids[0]],
                    };
                    let (chosen, rejected) = (end(sequence(1)), end(sequence(1)));
                    let (rejected, rejected_prompt) = (Some(rejected), None);
                    Row {
                        prompt,
                        chosen,
                        rejected,
                        rejected_prompt,
                        ..Row::default()
                    }
                };
                (0..count).map(row).collect()
            };
            let (pairs, mut single) = (rows(4), rows(3));
            let inner = single[1].clone();
            single[2].packed.push(Row {
                rejected: None,
                ..inner
            });
            let pairs = Batch::pairs(&pairs.iter().collect::<Vec<_>>(), 0).unwrap();
            let single = single.iter().map(Row::chosen).collect();
            let single = Batch::new(single, 0).unwrap();
            let layout = Layout::new(&[&pairs, &single], Packing::default());
            let sequences = pairs.sequences.iter().chain(&single.sequences);
            let mut used = vec![false; layout.ids.len()];
            for (sequence, token_indices) in sequences.zip(&layout.token_indices) {
                let starts = sequence.starts(sequence.ids.len());
                assert_eq!(token_indices.len(), sequence.ids.len());
                for (at, (&token, start)) in token_indices.iter().zip(starts).enumerate() {
                    used[token] = true;
                    assert_eq!(layout.ids[token], sequence.ids[at]);
                    assert_eq!(layout.positions[token], at - start);
                    assert_eq!(seen(&layout, token), token_indices[start..=at]);
                }
            }
            assert!(used.into_iter().all(|used| used));
            assert_eq!(layout.padded_index.len(), layout.ids.len());
            // A pair's keys lie where they lie without other rows.
            for row in 0..4 {
                let [chosen, rejected] = [row, row + 4].map(|row| &pairs.sequences[row].ids);
                let both = chosen.iter().zip(rejected);
                let common = both.take_while(|(a, b)| a == b).count();
                if chosen != rejected {
                    assert_eq!(layout.branches[row], (0, 0));
                    assert_eq!(layout.branches[row + 4], (common, chosen.len()));
                }
            }
        }
    }

    #[test]
    fn what_rows_begin_with_is_computed_once_where_it_is_worth_it() {
        let row = |system: u32, question: u32| Row {
            prompt: (100..100 + system)
                .chain([question, question + 1])
                .collect(),
            chosen: vec![5, question],
            rejected: Some(vec![5, 6, question]),
            ..Row::default()
        };
        // Each pair: 2 of the prompt, 1 that both answers begin with, 1 and 2.
        for (system, count, expected, spans) in [
            (16, 2, 16 + 2 * 6, 3),
            (15, 2, 2 * (15 + 6), 2),
            (8, 3, 8 + 3 * 6, 4),
            (0, 3, 3 * 6, 3),
        ] {
            let rows: Vec<Row> = (0..count)
                .map(|number| row(system, 7 + 10 * number))
                .collect();
            let batches: Vec<Batch> = rows
                .iter()
                .map(|row| Batch::pairs(&[row], 0).unwrap())
                .collect();
            let batches: Vec<&Batch> = batches.iter().collect();
            let layout = Layout::new(&batches, Packing::default());
            assert_eq!(layout.ids.len(), expected as usize, "{system} {count}");
            assert_eq!(layout.spans.len(), spans);
            assert_eq!(Packing::default().tokens(&batches), expected as usize);
        }
    }
}
