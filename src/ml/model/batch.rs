//! Rows of token ids, and the padded batches that are made from them.

use candle_core::{Device, Result, Tensor, bail};

/// One row of training data: the ids of a prompt and of its answers.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Row {
    /// The ids of the prompt.
    pub prompt: Vec<u32>,
    /// The ids of the preferred (or only) answer, without the prompt.
    pub chosen: Vec<u32>,
    /// The ids of the rejected answer, without the prompt.
    pub rejected: Option<Vec<u32>>,
    /// The ids of the rejected answer's prompt, if truncation made it differ from `prompt`.
    pub rejected_prompt: Option<Vec<u32>>,
    /// For each id of the prompt and the preferred answer, whether it may be scored; all may if there is none.
    pub mask: Option<Vec<bool>>,
    /// Rows that are packed into the same sequence after this one; none of them attends to another.
    pub packed: Vec<Row>,
    /// The log-probabilities of the answers' tokens under a reference model, if they are known.
    pub reference_logps: Option<ReferenceLogps>,
    /// Whether the answer is desirable, of rows with one answer of which that is known.
    pub label: Option<bool>,
    /// The answer of another row, if it is scored behind this prompt too.
    pub mismatched: Option<Mismatched>,
    /// By how much the reward of the preferred answer shall exceed that of the rejected one, if that is known.
    pub margin: Option<f64>,
}

/// The answer of another row behind a row's prompt.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Mismatched {
    /// The ids of the answer.
    pub answer: Vec<u32>,
    /// The log-probabilities of the answer's tokens under a reference model, in nats, if they are known.
    pub reference_logps: Option<Vec<f32>>,
}

/// The log-probabilities of the answers' tokens of a pair under a reference model, in nats.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ReferenceLogps {
    /// Those of the preferred answer, one for each token.
    pub chosen: Vec<f32>,
    /// Those of the rejected answer, one for each token.
    pub rejected: Vec<f32>,
}

/// A prompt and one answer, or several such documents one after the other.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Sequence {
    /// All ids.
    pub ids: Vec<u32>,
    /// The number of ids of the first document's prompt.
    pub prompt: usize,
    /// For each document after the first, the position at which it starts, and that at which its answer starts.
    behind: Vec<(usize, usize)>,
    /// For each id, whether it may be scored; empty if all may.
    mask: Vec<bool>,
}

/// The positions of one document in a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Document {
    start: usize,
    answer: usize,
    end: usize,
}

impl Sequence {
    /// A sequence of one document, whose first `prompt` ids are the prompt.
    pub fn new(ids: Vec<u32>, prompt: usize) -> Self {
        Self {
            ids,
            prompt,
            behind: Vec::new(),
            mask: Vec::new(),
        }
    }

    /// The same sequence in which only the ids may be scored for which `mask` is true.
    ///
    /// # Panics
    /// There are not as many values in `mask` as there are ids.
    #[must_use]
    pub fn masked(self, mask: Vec<bool>) -> Self {
        assert_eq!(
            mask.len(),
            self.ids.len(),
            "a mask needs a value for each id"
        );
        Self { mask, ..self }
    }

    fn append(&mut self, other: &Self) {
        // An empty document would have no key to attend to.
        if other.ids.is_empty() {
            return;
        }
        let start = self.ids.len();
        let first = std::iter::once((0, other.prompt));
        let starts = first.chain(other.behind.iter().copied());
        self.behind
            .extend(starts.map(|(from, answer)| (start + from, start + answer)));
        self.ids.extend(&other.ids);
        if !self.mask.is_empty() || !other.mask.is_empty() {
            self.mask.resize(start, true);
            self.mask.extend(&other.mask);
            self.mask.resize(self.ids.len(), true);
        }
    }

    /// Whether there is more than one document.
    pub(in crate::ml) fn is_packed(&self) -> bool {
        !self.behind.is_empty()
    }

    fn documents(&self) -> Vec<Document> {
        let starts = std::iter::once((0, self.prompt)).chain(self.behind.iter().copied());
        let ends = self.behind.iter().map(|(start, _)| *start);
        starts
            .zip(ends.chain(std::iter::once(self.ids.len())))
            .map(|((start, answer), end)| Document { start, answer, end })
            .collect()
    }

    /// For each of `width` positions, padding included, the position at which its document starts.
    pub(in crate::ml) fn starts(&self, width: usize) -> Vec<usize> {
        let mut starts = Vec::with_capacity(width);
        for document in self.documents() {
            starts.resize(document.end, document.start);
        }
        let last = self.behind.last().map_or(0, |(start, _)| *start);
        starts.resize(width, last);
        starts
    }
}

impl Row {
    fn sequence(prompt: &[u32], answer: &[u32]) -> Sequence {
        Sequence::new([prompt, answer].concat(), prompt.len())
    }

    /// The sequence of the prompt and the preferred answer, followed by those of the packed rows.
    pub fn chosen(&self) -> Sequence {
        let mut sequence = Self::sequence(&self.prompt, &self.chosen);
        if let Some(mask) = &self.mask {
            sequence = sequence.masked(mask.clone());
        }
        for row in &self.packed {
            sequence.append(&row.chosen());
        }
        sequence
    }

    /// The sequence of the prompt and the rejected answer, if there is one.
    pub fn rejected(&self) -> Option<Sequence> {
        let prompt = self.rejected_prompt.as_ref().unwrap_or(&self.prompt);
        self.rejected
            .as_ref()
            .map(|answer| Self::sequence(prompt, answer))
    }
}

/// An id that is scored: the logits before it predict it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// The index of its sequence in the batch or, for several batches, among the sequences of all of them.
    pub row: usize,
    /// Its position in the sequence, at least 1; the logits at `position - 1` predict it.
    pub position: usize,
    /// The token id.
    pub id: u32,
}

/// Sequences padded on the right to the longest.
#[derive(Debug, Clone)]
pub struct Batch {
    /// The sequences without padding.
    pub sequences: Vec<Sequence>,
    /// The common length in tokens, padding included.
    pub width: usize,
    pad: u32,
    pairs: bool,
    /// The log-probabilities of each sequence's answer under a reference model, in nats, if they are known.
    reference: Option<Vec<Vec<f32>>>,
    /// For each sequence, whether its answer is desirable; empty if that is not known.
    labels: Vec<bool>,
    /// The same prompts with the answers of other rows, if these are scored, too.
    mismatched: Option<Box<Batch>>,
    /// For each pair, by how much the rewards of its answers shall differ; empty if that is not known.
    margins: Vec<f64>,
}

impl Batch {
    /// A batch of `sequences`, padded with the id `pad`.
    ///
    /// # Errors
    /// There is no sequence, or one is empty.
    pub fn new(sequences: Vec<Sequence>, pad: u32) -> Result<Self> {
        let width = sequences.iter().map(|s| s.ids.len()).max().unwrap_or(0);
        if sequences.iter().any(|sequence| sequence.ids.is_empty()) {
            bail!("a sequence has no tokens");
        }
        if width == 0 {
            bail!("a batch needs at least one sequence");
        }
        Ok(Self {
            sequences,
            width,
            pad,
            pairs: false,
            reference: None,
            labels: Vec::new(),
            mismatched: None,
            margins: Vec::new(),
        })
    }

    /// A batch of the sequences of `rows`, each with a label. With `mismatched` it has a second batch beside it
    /// ([`Batch::mismatched`]), of the same prompts with the answers in [`Row::mismatched`].
    ///
    /// # Errors
    /// There is no row, or one is empty or lacks its label or the other answer.
    pub fn unpaired(rows: &[&Row], mismatched: bool, pad: u32) -> Result<Self> {
        let Some(labels) = rows.iter().map(|row| row.label).collect() else {
            bail!("a row has no label that says whether its answer is desirable");
        };
        let known = rows
            .iter()
            .map(|row| Some(row.reference_logps.as_ref()?.chosen.clone()));
        let mut batch = Self {
            labels,
            reference: known.collect(),
            ..Self::new(rows.iter().map(|row| row.chosen()).collect(), pad)?
        };
        if mismatched {
            let others: Option<Vec<&Mismatched>> =
                rows.iter().map(|row| row.mismatched.as_ref()).collect();
            let Some(others) = others else {
                bail!("a row has no answer of another row");
            };
            let sequences = rows.iter().zip(&others);
            let sequences = sequences.map(|(row, other)| Row::sequence(&row.prompt, &other.answer));
            let known = others.iter().map(|other| other.reference_logps.clone());
            batch.mismatched = Some(Box::new(Self {
                reference: known.collect(),
                ..Self::new(sequences.collect(), pad)?
            }));
        }
        Ok(batch)
    }

    /// For each sequence, whether its answer is desirable; empty if that is not known.
    pub fn labels(&self) -> &[bool] {
        &self.labels
    }

    /// The same prompts with the answers of other rows, if these are scored, too: without a gradient, for an estimate of how far the trained
    /// model is from the reference model.
    pub fn mismatched(&self) -> Option<&Self> {
        self.mismatched.as_deref()
    }

    /// For each pair, by how much the rewards of its answers shall differ; empty if that is not known of each.
    pub fn margins(&self) -> &[f64] {
        &self.margins
    }

    /// A batch of the preferred sequences of `rows`, followed by the rejected ones, so that one pass computes both (TRL's
    /// `concatenated_forward`).
    ///
    /// # Errors
    /// There is no row, or one is empty or lacks the rejected answer.
    pub fn pairs(rows: &[&Row], pad: u32) -> Result<Self> {
        let mut sequences: Vec<_> = rows.iter().map(|row| row.chosen()).collect();
        for row in rows {
            match row.rejected() {
                Some(sequence) => sequences.push(sequence),
                None => bail!("a preference row has no rejected answer"),
            }
        }
        let known: Option<Vec<&ReferenceLogps>> = rows
            .iter()
            .map(|row| row.reference_logps.as_ref())
            .collect();
        let reference = known.map(|known| {
            let chosen = known.iter().map(|logps| logps.chosen.clone());
            let rejected = known.iter().map(|logps| logps.rejected.clone());
            chosen.chain(rejected).collect()
        });
        let margins: Option<Vec<f64>> = rows.iter().map(|row| row.margin).collect();
        Ok(Self {
            pairs: true,
            reference,
            margins: margins.unwrap_or_default(),
            ..Self::new(sequences, pad)?
        })
    }

    /// The log-probabilities under the reference model of `targets`, which must be in answers, if the rows have them.
    pub(in crate::ml) fn reference_logps(&self, targets: &[Target]) -> Option<Vec<f64>> {
        let reference = self.reference.as_ref()?;
        let logps = targets.iter().map(|target| {
            let prompt = self.sequences.get(target.row)?.prompt;
            let logps = reference.get(target.row)?;
            let logp = logps.get(target.position.checked_sub(prompt)?)?;
            Some(f64::from(*logp))
        });
        logps.collect()
    }

    /// Whether the sequences are pairs: those of the second half belong to those of the first, one by one.
    pub(in crate::ml) fn is_pairs(&self) -> bool {
        self.pairs
    }

    /// The id of the padding.
    pub(in crate::ml) fn pad(&self) -> u32 {
        self.pad
    }

    /// The ids with padding, as a tensor (batch, length) of u32.
    pub fn ids(&self, device: &Device) -> Result<Tensor> {
        let padded = self.sequences.iter().flat_map(|sequence| {
            let padding = self.width - sequence.ids.len();
            let padding = std::iter::repeat_n(self.pad, padding);
            sequence.ids.iter().copied().chain(padding)
        });
        let ids: Vec<u32> = padded.collect();
        Tensor::from_vec(ids, (self.sequences.len(), self.width), device)
    }

    /// Whether a sequence holds more than one document.
    fn packed(&self) -> bool {
        self.sequences.iter().any(Sequence::is_packed)
    }

    /// The positions (batch * length) for the rotary embedding, if sequences hold several documents: they start again at 0 with each
    /// document. `None` if positions are just counted.
    pub fn positions(&self) -> Option<Vec<usize>> {
        let of = |sequence: &Sequence| {
            let starts = sequence.starts(self.width);
            let positions = starts.iter().enumerate();
            positions.map(|(at, start)| at - start).collect::<Vec<_>>()
        };
        self.packed()
            .then(|| self.sequences.iter().flat_map(of).collect())
    }

    /// One more than the largest position, padding included, on which some rotary embeddings depend.
    pub fn length(&self) -> usize {
        let last = self.positions().and_then(|all| all.into_iter().max());
        last.map_or(self.width, |last| last + 1)
    }

    /// The attention mask (batch or 1, 1, length, length), which is added to the scores: 0 where a query may attend to a key, -inf where
    /// it may not (later keys, padding, other documents, and keys outside a sliding window of `window` keys up to its own).
    ///
    /// Padding whose window contains no id attends to everything alike, as in transformers' eager attention. That matters because the mean
    /// logits that TRL logs count padding.
    pub fn mask(&self, window: Option<usize>, device: &Device) -> Result<Tensor> {
        let uniform = self.sequences.iter().all(|s| s.ids.len() == self.width);
        let count = if uniform && !self.packed() {
            1
        } else {
            self.sequences.len()
        };
        let mut mask = Vec::with_capacity(count * self.width * self.width);
        for sequence in self.sequences.iter().take(count) {
            let length = sequence.ids.len();
            for (from, start) in sequence.starts(self.width).into_iter().enumerate() {
                let reach = window.map_or(0, |window| (from + 1).saturating_sub(window));
                let first = start.max(reach);
                // Added to the lowest float, scores make no difference, so that all keys count alike.
                let hidden = if first < length {
                    f32::NEG_INFINITY
                } else {
                    f32::MIN
                };
                mask.extend((0..self.width).map(|to| {
                    if first <= to && to <= from && to < length {
                        0f32
                    } else {
                        hidden
                    }
                }));
            }
        }
        Tensor::from_vec(mask, (count, 1, self.width, self.width), device)
    }

    /// The targets in the answers of all sequences, in their order.
    pub fn answer_targets(&self) -> Vec<Target> {
        let rows = 0..self.sequences.len();
        rows.flat_map(|row| self.targets(row, true)).collect()
    }

    /// The targets in the sequence `row`: all its ids but the first one of each document, or with `answer_only` those in answers alone.
    /// Ids that a mask leaves out are no targets.
    pub fn targets(&self, row: usize, answer_only: bool) -> Vec<Target> {
        let Some(sequence) = self.sequences.get(row) else {
            return Vec::new();
        };
        let mut targets = Vec::new();
        for document in sequence.documents() {
            let answer = if answer_only { document.answer } else { 0 };
            let first = answer.max(document.start + 1);
            let ids = sequence.ids.iter().enumerate();
            let ids = ids.take(document.end).skip(first);
            let ids = ids.filter(|(at, _)| sequence.mask.get(*at).is_none_or(|scored| *scored));
            targets.extend(ids.map(|(position, &id)| Target { row, position, id }));
        }
        targets
    }

    /// The number of ids without padding.
    pub fn tokens(&self) -> usize {
        self.sequences.iter().map(|s| s.ids.len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(prompt: &[u32], answer: &[u32]) -> Row {
        Row {
            prompt: prompt.to_vec(),
            chosen: answer.to_vec(),
            ..Row::default()
        }
    }

    #[test]
    fn packed_rows_keep_to_themselves() {
        let packed = Row {
            packed: vec![row(&[4], &[5, 6]), row(&[], &[7])],
            ..row(&[1, 2], &[3])
        };
        let long = row(&[1], &[2, 3, 4, 5, 6, 7, 8]);
        let batch = Batch::new(vec![packed.chosen(), long.chosen()], 0).unwrap();
        assert_eq!(batch.sequences[0].ids, [1, 2, 3, 4, 5, 6, 7]);
        let positions = [0, 1, 2, 0, 1, 2, 0, 1, 0, 1, 2, 3, 4, 5, 6, 7];
        assert_eq!(batch.positions().unwrap(), positions);
        let starts = |row, answer_only| -> Vec<_> {
            let targets = batch.targets(row, answer_only);
            targets.iter().map(|t| (t.position, t.id)).collect()
        };
        // Nothing predicts the first id of a document.
        assert_eq!(starts(0, false), [(1, 2), (2, 3), (4, 5), (5, 6)]);
        assert_eq!(starts(0, true), [(2, 3), (4, 5), (5, 6)]);
        assert_eq!(starts(1, true).len(), 7);
        assert_eq!(starts(2, false), []);

        let mask = batch.mask(None, &Device::Cpu).unwrap().squeeze(1).unwrap();
        let mask: Vec<Vec<Vec<f32>>> = mask.to_vec3().unwrap();
        let seen = |row: usize, from: usize| -> Vec<usize> {
            (0..8).filter(|&to| mask[row][from][to] == 0.).collect()
        };
        assert_eq!(seen(0, 2), [0, 1, 2]);
        assert_eq!(seen(0, 5), [3, 4, 5]);
        assert_eq!(seen(0, 6), [6]);
        assert_eq!(seen(0, 7), [6], "padding sees something, but no padding");
        assert_eq!(seen(1, 7).len(), 8);

        let plain = Batch::new(vec![long.chosen(), long.chosen()], 0).unwrap();
        assert!(plain.positions().is_none());
        assert_eq!(plain.mask(None, &Device::Cpu).unwrap().dims(), [1, 1, 8, 8]);
    }

    #[test]
    fn masks_leave_targets_out_of_packed_rows_too() {
        let masked = |row: Row, mask: &[bool]| Row {
            mask: Some(mask.to_vec()),
            ..row
        };
        let packed = Row {
            packed: vec![
                masked(row(&[], &[4, 5, 6]), &[true, true, false]),
                row(&[7], &[8]),
            ],
            ..row(&[1], &[2, 3])
        };
        let alone = masked(row(&[1, 2], &[3, 4]), &[true, true, false, true]);
        let batch = Batch::new(vec![packed.chosen(), alone.chosen()], 0).unwrap();
        let ids = |row, answer_only| -> Vec<u32> {
            let targets = batch.targets(row, answer_only);
            targets.iter().map(|target| target.id).collect()
        };
        assert_eq!(ids(0, false), [2, 3, 5, 8]);
        assert_eq!(ids(0, true), [2, 3, 5, 8]);
        assert_eq!(ids(1, false), [2, 4]);
        assert_eq!(ids(1, true), [4]);
    }

    #[test]
    fn windows_end_at_documents_and_padding_sees_all_alike() {
        let packed = Row {
            packed: vec![row(&[5], &[6])],
            ..row(&[1, 2], &[3, 4])
        };
        let batch = Batch::new(vec![packed.chosen(), row(&[1], &[2; 8]).chosen()], 0).unwrap();
        let mask = batch
            .mask(Some(2), &Device::Cpu)
            .unwrap()
            .squeeze(1)
            .unwrap();
        let mask: Vec<Vec<Vec<f32>>> = mask.to_vec3().unwrap();
        let seen = |row: usize, from: usize| -> Vec<usize> {
            (0..9).filter(|&to| mask[row][from][to] == 0.).collect()
        };
        // As many keys as the window says, its own included.
        let expected: [&[usize]; 7] = [&[0], &[0, 1], &[1, 2], &[2, 3], &[4], &[4, 5], &[5]];
        for (from, expected) in expected.into_iter().enumerate() {
            assert_eq!(seen(0, from), expected, "{from}");
        }
        assert_eq!(mask[0][7], [f32::MIN; 9]);
        assert_eq!(seen(1, 8), [7, 8]);
    }

    #[test]
    fn empty_sequences_and_pairs_without_a_second_answer_are_refused() {
        assert!(Batch::new(vec![], 0).is_err());
        assert!(Batch::new(vec![row(&[], &[]).chosen()], 0).is_err());
        assert!(Batch::pairs(&[&row(&[1], &[2])], 0).is_err());
    }
}
