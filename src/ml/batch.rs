//! From rows of token ids to padded batches.

use candle_core::{Device, Result, Tensor, bail};

/// One row of training data: ids of a prompt and of its answers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Row {
    /// The prompt.
    pub prompt: Vec<u32>,
    /// The preferred (or only) answer, without the prompt.
    pub chosen: Vec<u32>,
    /// The other answer.
    pub rejected: Option<Vec<u32>>,
    /// The other answer's prompt, where truncation made it differ.
    pub rejected_prompt: Option<Vec<u32>>,
}

/// A prompt and one answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequence {
    /// All ids.
    pub ids: Vec<u32>,
    /// How many of them are the prompt.
    pub prompt: usize,
}

impl Row {
    fn sequence(prompt: &[u32], answer: &[u32]) -> Sequence {
        Sequence {
            ids: [prompt, answer].concat(),
            prompt: prompt.len(),
        }
    }

    /// The prompt with the preferred answer.
    pub fn chosen(&self) -> Sequence {
        Self::sequence(&self.prompt, &self.chosen)
    }

    /// The prompt with the other answer.
    pub fn rejected(&self) -> Option<Sequence> {
        let prompt = self.rejected_prompt.as_ref().unwrap_or(&self.prompt);
        self.rejected
            .as_ref()
            .map(|answer| Self::sequence(prompt, answer))
    }
}

/// The id that a logit vector is to be scored against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// Which sequence.
    pub row: usize,
    /// The place of the id in it, at least 1; the logits at `position - 1` predict it.
    pub position: usize,
    /// The id.
    pub id: u32,
}

/// Sequences padded on the right to the longest.
#[derive(Debug, Clone)]
pub struct Batch {
    /// The sequences without padding.
    pub sequences: Vec<Sequence>,
    /// The common length.
    pub width: usize,
    pad: u32,
}

impl Batch {
    /// A batch of `sequences`, padded with `pad`.
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
        })
    }

    /// The preferred answers of `rows`, and after them the others: one forward for both (TRL's concatenated forward).
    pub fn pairs(rows: &[&Row], pad: u32) -> Result<Self> {
        let mut sequences: Vec<_> = rows.iter().map(|row| row.chosen()).collect();
        for row in rows {
            match row.rejected() {
                Some(sequence) => sequences.push(sequence),
                None => bail!("a preference row has no rejected answer"),
            }
        }
        Self::new(sequences, pad)
    }

    /// The ids, (batch, length).
    pub fn ids(&self, device: &Device) -> Result<Tensor> {
        let padded = self.sequences.iter().flat_map(|sequence| {
            let padding = self.width - sequence.ids.len();
            let padding = std::iter::repeat_n(self.pad, padding);
            sequence.ids.iter().copied().chain(padding)
        });
        let ids: Vec<u32> = padded.collect();
        Tensor::from_vec(ids, (self.sequences.len(), self.width), device)
    }

    /// What is added to the attention scores: 0 where a position may look, -inf where it may not (later ones, padding).
    /// (batch or 1, 1, length, length)
    pub fn mask(&self, device: &Device) -> Result<Tensor> {
        let ragged = self.sequences.iter().any(|s| s.ids.len() < self.width);
        let lengths: Vec<usize> = if ragged {
            self.sequences.iter().map(|s| s.ids.len()).collect()
        } else {
            vec![self.width]
        };
        let mut mask = Vec::with_capacity(lengths.len() * self.width * self.width);
        for &length in &lengths {
            for from in 0..self.width {
                mask.extend((0..self.width).map(|to| {
                    if to <= from && to < length {
                        0f32
                    } else {
                        f32::NEG_INFINITY
                    }
                }));
            }
        }
        Tensor::from_vec(mask, (lengths.len(), 1, self.width, self.width), device)
    }

    /// The ids of one sequence that have a logit before them; only those of the answer if `answer_only`.
    pub fn targets(&self, row: usize, answer_only: bool) -> impl Iterator<Item = Target> {
        let sequence = self.sequences.get(row);
        let ids = sequence.map_or(&[][..], |sequence| &sequence.ids);
        let prompt = sequence.map_or(0, |sequence| sequence.prompt);
        let first = if answer_only { prompt.max(1) } else { 1 };
        let targets = ids.iter().enumerate().skip(first);
        targets.map(move |(position, &id)| Target { row, position, id })
    }

    /// How many ids the batch has without padding.
    pub fn tokens(&self) -> usize {
        self.sequences.iter().map(|s| s.ids.len()).sum()
    }
}
