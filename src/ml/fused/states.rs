//! What the layers below the lowest trained one give, kept on disk from one epoch to the next.
//!
//! Nothing changes there, so a sequence's hidden states in front of the lowest trained layer are the same in every epoch, and to the
//! last bit where its keys lie in the same panels: what is computed of a token depends on the tokens that it sees and not on those
//! beside it in a pass. Where the keys lie otherwise ([`Layout::branches`]), states are computed and kept once more.

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

/// Hidden states of whole sequences, in a file without a name: it ends with the process.
#[derive(Debug)]
pub(super) struct States {
    file: File,
    /// Features of a hidden state.
    width: usize,
    /// Where a sequence's states begin, by its branch.
    starts: HashMap<Sequence, Vec<(Branch, u64)>>,
    end: u64,
}

impl States {
    /// None yet; their file goes into `folder`.
    pub(super) fn new(folder: &Path, width: usize) -> std::io::Result<Self> {
        Ok(Self {
            file: tempfile::tempfile_in(folder)?,
            width,
            starts: HashMap::new(),
            end: 0,
        })
    }

    /// How many sequences' states are there.
    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.starts.values().map(Vec::len).sum()
    }

    fn start(&self, sequence: &Sequence, branch: Branch) -> Option<u64> {
        let known = self.starts.get(sequence)?.iter();
        let mut same = known.filter(|(of, _)| *of == branch);
        same.next().map(|(_, start)| *start)
    }

    /// Empties the file, so that no states can be read.
    #[cfg(test)]
    pub(super) fn cut(&self) {
        self.file.set_len(0).unwrap();
    }

    /// The states of all tokens of a pass, into panels `x`, if all its sequences are there.
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
        for (start, places) in starts.into_iter().zip(&layout.places) {
            bytes.resize(places.len() * row, 0);
            self.file
                .read_exact_at(&mut bytes, start)
                .map_err(|error| told("read", &error))?;
            for (bytes, token) in bytes.chunks_exact(row).zip(places) {
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

    /// Takes in the states of those sequences of a pass that are not there yet.
    pub(super) fn store(&mut self, batches: &[&Batch], layout: &Layout, x: &[f32]) -> Result<()> {
        if !is_free_of_padding(batches, layout) {
            return Ok(());
        }
        let sequences = batches.iter().flat_map(|batch| &batch.sequences);
        let places = layout.places.iter().zip(&layout.branches);
        for (sequence, (places, branch)) in sequences.zip(places) {
            if self.start(sequence, *branch).is_some() {
                continue;
            }
            let values = places
                .iter()
                .flat_map(|&token| column(x, self.width, token));
            let bytes: Vec<u8> = values.flat_map(f32::to_ne_bytes).collect();
            self.file
                .write_all_at(&bytes, self.end)
                .map_err(|error| told("write", &error))?;
            let known = self.starts.entry(sequence.clone()).or_default();
            known.push((*branch, self.end));
            self.end += bytes.len() as u64;
        }
        Ok(())
    }
}

/// Padding has states of its own, which are not kept.
fn is_free_of_padding(batches: &[&Batch], layout: &Layout) -> bool {
    let sequences = batches.iter().flat_map(|batch| &batch.sequences);
    let mut both = sequences.zip(&layout.places);
    both.all(|(sequence, places)| places.len() == sequence.ids.len())
}

fn told(what: &str, error: &std::io::Error) -> Error {
    let what =
        format!("could not {what} the frozen layers' hidden states in the scratch folder: {error}");
    Error::Msg(what)
}
