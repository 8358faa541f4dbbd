//! The output of the layers below the lowest trained one, kept on disk from one epoch to the next.
//!
//! These layers don't change, so a sequence's hidden states before the lowest trained layer are the same in every epoch. They are the same to
//! the last bit if the sequence's keys are split into the same panels, because the results of a token depend on the tokens to which it
//! attends and not on the others in its pass. If the keys are split differently ([`Layout::branches`]), states are computed and kept once more.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use candle_core::{Error, Result};
use pipeline_kernels::panels::{column, fill};

use super::layout::Layout;
use crate::ml::model::batch::{Batch, Sequence};

/// See [`Layout::branches`].
type Branch = (usize, usize);

/// The hidden states of whole sequences, in an unnamed temporary file that disappears with the process.
#[derive(Debug)]
pub(super) struct States {
    file: File,
    /// The number of features of a hidden state.
    width: usize,
    /// For each sequence, the offset of its states in the file, by its branch.
    starts: HashMap<Sequence, Vec<(Branch, u64)>>,
    end: u64,
}

impl States {
    /// An empty collection, with a file in `folder`.
    pub(super) fn new(folder: &Path, width: usize) -> std::io::Result<Self> {
        Ok(Self {
            file: tempfile::tempfile_in(folder)?,
            width,
            starts: HashMap::new(),
            end: 0,
        })
    }

    /// The number of sequences whose states are kept.
    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.starts.values().map(Vec::len).sum()
    }

    fn start(&self, sequence: &Sequence, branch: Branch) -> Option<u64> {
        let known = self.starts.get(sequence)?.iter();
        let mut same = known.filter(|(of, _)| *of == branch);
        same.next().map(|(_, start)| *start)
    }

    /// Truncates the file to nothing, so that reading states fails.
    #[cfg(test)]
    pub(super) fn cut(&self) {
        self.file.set_len(0).unwrap();
    }

    /// Reads the states of all tokens of a pass into the panels `x`. Returns false, and reads nothing, if a sequence's states are not kept.
    pub(super) fn load(&self, batches: &[&Batch], layout: &Layout, x: &mut [f32]) -> Result<bool> {
        let sequences = batches.iter().flat_map(|batch| &batch.sequences);
        let starts: Option<Vec<u64>> = sequences
            .zip(&layout.branches)
            .map(|(sequence, branch)| self.start(sequence, *branch))
            .collect();
        let Some(starts) = starts.filter(|_| is_free_of_padding(batches, layout)) else {
            return Ok(false);
        };
        let row = self.width * size_of::<f32>();
        let mut rows = vec![0f32; layout.ids.len() * self.width];
        let mut bytes = Vec::new();
        for (start, token_indices) in starts.into_iter().zip(&layout.token_indices) {
            bytes.resize(token_indices.len() * row, 0);
            self.file
                .read_exact_at(&mut bytes, start)
                .map_err(|error| io_error("read", &error))?;
            for (bytes, token) in bytes.chunks_exact(row).zip(token_indices) {
                let values = bytes.as_chunks().0.iter().map(|x| f32::from_ne_bytes(*x));
                let row = &mut rows[token * self.width..][..self.width];
                row.iter_mut().zip(values).for_each(|(x, value)| *x = value);
            }
        }
        fill(x, self.width, layout.ids.len(), |token| {
            &rows[token * self.width..][..self.width]
        });
        Ok(true)
    }

    /// Keeps the states, from the panels `x`, of those sequences of a pass whose states are not kept yet.
    pub(super) fn store(&mut self, batches: &[&Batch], layout: &Layout, x: &[f32]) -> Result<()> {
        if !is_free_of_padding(batches, layout) {
            return Ok(());
        }
        let sequences = batches.iter().flat_map(|batch| &batch.sequences);
        let token_indices = layout.token_indices.iter().zip(&layout.branches);
        for (sequence, (token_indices, branch)) in sequences.zip(token_indices) {
            if self.start(sequence, *branch).is_some() {
                continue;
            }
            let values = token_indices
                .iter()
                .flat_map(|&token| column(x, self.width, token));
            let bytes: Vec<u8> = values.flat_map(f32::to_ne_bytes).collect();
            self.file
                .write_all_at(&bytes, self.end)
                .map_err(|error| io_error("write", &error))?;
            let known = self.starts.entry(sequence.clone()).or_default();
            known.push((*branch, self.end));
            self.end += bytes.len() as u64;
        }
        Ok(())
    }
}

/// Whether a pass has no padding, whose states are not kept.
fn is_free_of_padding(batches: &[&Batch], layout: &Layout) -> bool {
    let sequences = batches.iter().flat_map(|batch| &batch.sequences);
    let mut both = sequences.zip(&layout.token_indices);
    both.all(|(sequence, token_indices)| token_indices.len() == sequence.ids.len())
}

fn io_error(what: &str, error: &std::io::Error) -> Error {
    let what =
        format!("could not {what} the frozen layers' hidden states in the scratch folder: {error}");
    Error::Msg(what)
}
