//! A group of processes that MPI started.

use std::ffi::c_int;

use anyhow::{Context as _, ensure};
use mpi::Threading;
use mpi::collective::CommunicatorCollectives as _;
use mpi::environment::{Universe, initialize_with_threading};
use mpi::topology::{Communicator as _, SimpleCommunicator};

use super::ProcessGroup;

/// The number of values, and of bytes, that a process gives in one exchange. What is longer takes several, so that the buffers stay small and
/// MPI's counts, which are 32 bits wide, suffice.
const PIECE: usize = 1 << 20;

/// The processes of MPI's `MPI_COMM_WORLD`.
#[derive(Debug, Clone, Copy)]
pub struct World {
    rank: usize,
    size: usize,
    on_this_machine: usize,
}

/// MPI as long as this process uses it. When this is dropped the process waits until all others are done, too.
pub struct Member {
    /// The group.
    pub world: World,
    _universe: Universe,
}

impl Member {
    /// Makes this process a member of the group with which it was started. MPI lets a process do so once.
    ///
    /// # Errors
    /// It did so before, or MPI can't be called from several threads.
    pub fn start() -> anyhow::Result<Self> {
        // The training calls MPI from its own thread, and a panic may end all processes from any other.
        let started = initialize_with_threading(Threading::Multiple);
        let (universe, threading) = started.context("this process has started MPI before")?;
        ensure!(
            threading >= Threading::Serialized,
            "this MPI can't be called from the thread of a training ({threading:?}); hint: use one that was built with support of threads"
        );
        let all = SimpleCommunicator::world();
        let here = all.split_shared(all.rank());
        let world = World {
            rank: usize::try_from(all.rank())?,
            size: usize::try_from(all.size())?,
            on_this_machine: usize::try_from(here.size())?,
        };
        Ok(Self {
            world,
            _universe: universe,
        })
    }
}

/// Ends all processes of the group, wherever they are, with this exit code.
pub fn abort(code: c_int) -> ! {
    SimpleCommunicator::world().abort(code)
}

impl ProcessGroup for World {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn on_this_machine(&self) -> usize {
        self.on_this_machine
    }

    /// Each process sums one part of all values, so that the order of the sums is known and the bits are the same everywhere; MPI's own
    /// reductions promise neither.
    fn sum(&self, values: &mut [f32]) {
        let all = SimpleCommunicator::world();
        for values in values.chunks_mut(PIECE * self.size) {
            let part = values.len().div_ceil(self.size);
            let mut sent = values.to_vec();
            sent.resize(part * self.size, 0.);
            let mut received = vec![0f32; part * self.size];
            all.all_to_all_into(&sent[..], &mut received[..]);
            let (sums, others) = received.split_at_mut(part);
            for other in others.chunks(part) {
                for (sum, value) in sums.iter_mut().zip(other) {
                    *sum += value;
                }
            }
            all.all_gather_into(&sums[..], &mut sent[..]);
            let count = values.len();
            values.copy_from_slice(&sent[..count]);
        }
    }

    fn gather(&self, own: &[u8]) -> Vec<Vec<u8>> {
        let all = SimpleCommunicator::world();
        let mut lengths = vec![0u64; self.size];
        all.all_gather_into(&(own.len() as u64), &mut lengths[..]);
        let longest = lengths.iter().copied().max().unwrap_or(0) as usize;
        let mut gathered = vec![Vec::new(); self.size];
        let mut start = 0;
        while start < longest {
            let length = PIECE.min(longest - start);
            let own = own.get(start..).unwrap_or_default();
            let mut sent = own[..length.min(own.len())].to_vec();
            sent.resize(length, 0);
            let mut received = vec![0u8; length * self.size];
            all.all_gather_into(&sent[..], &mut received[..]);
            for (whole, piece) in gathered.iter_mut().zip(received.chunks(length)) {
                whole.extend_from_slice(piece);
            }
            start += length;
        }
        for (whole, length) in gathered.iter_mut().zip(lengths) {
            whole.truncate(length as usize);
        }
        gathered
    }
}
