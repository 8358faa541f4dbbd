//! The processes that train one model together, each on some of a step's micro-batches.
//!
//! A training calls the functions of a [`ProcessGroup`] at the same places in all processes, so that none waits for another that never
//! comes. A process that fails does not call the next one: whoever started the processes has to end all of them then.

#[cfg(feature = "mpi")]
pub mod mpi;

use std::sync::OnceLock;

use anyhow::Context as _;
use candle_core::Tensor;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The number of gradient values that are summed in one exchange, unless a single tensor has more.
const BUCKET: usize = 1 << 22;

/// A group of processes as one of them sees it. In each, the functions that exchange something must be called in the same order.
pub trait ProcessGroup: Sync {
    /// The number of this process, from 0.
    fn rank(&self) -> usize;

    /// The number of processes, at least 1.
    fn size(&self) -> usize;

    /// The number of processes on the machine of this one, which share its memory and its cores.
    fn on_this_machine(&self) -> usize {
        self.size()
    }

    /// Replaces `values` by their sums over all processes. The values of an index are added in f32 in the order of the ranks, and all
    /// processes get the same bits. All must give the same number of values.
    fn sum(&self, values: &mut [f32]);

    /// The bytes that each process gives, in the order of the ranks.
    fn gather(&self, own: &[u8]) -> Vec<Vec<u8>>;
}

/// A process that trains by itself.
#[derive(Debug, Clone, Copy, Default)]
pub struct Alone;

impl ProcessGroup for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn sum(&self, _: &mut [f32]) {}

    fn gather(&self, own: &[u8]) -> Vec<Vec<u8>> {
        vec![own.to_vec()]
    }
}

/// The group that this process joined.
static JOINED: OnceLock<Box<dyn ProcessGroup + Send>> = OnceLock::new();

/// Makes this process a member of a group for the rest of its life, if it is none yet.
pub fn join(group: Box<dyn ProcessGroup + Send>) {
    let _ = JOINED.set(group);
}

/// The group of this process; [`Alone`] if it joined none.
pub fn of_this_process() -> &'static dyn ProcessGroup {
    JOINED.get().map_or(&Alone, |group| &**group)
}

/// Whether this is the process that writes files and reports.
pub(super) fn is_first(group: &dyn ProcessGroup) -> bool {
    group.rank() == 0
}

/// The numbers of the parts, out of `count`, that are this process's: as accelerate's `BatchSamplerShard` deals batches, part i goes to the
/// process i mod size. Parts are not repeated to give all processes the same number (`even_batches=False`).
pub fn dealt(group: &dyn ProcessGroup, count: usize) -> impl Iterator<Item = usize> + use<> {
    (group.rank()..count).step_by(group.size())
}

/// What each process gives, in the order of the ranks.
///
/// # Errors
/// Something can't be written as JSON, or is not read back.
pub(super) fn exchange<T: Serialize + DeserializeOwned>(
    group: &dyn ProcessGroup,
    own: T,
) -> anyhow::Result<Vec<T>> {
    if group.size() == 1 {
        return Ok(vec![own]);
    }
    let all = group.gather(&serde_json::to_vec(&own)?);
    all.iter()
        .map(|bytes| serde_json::from_slice(bytes).context("another process sent something else"))
        .collect()
}

/// Whether any of the processes says so.
pub(super) fn any(group: &dyn ProcessGroup, own: bool) -> bool {
    if group.size() == 1 {
        return own;
    }
    group.gather(&[u8::from(own)]).concat().contains(&1)
}

/// Sums gradients, f32 and one for each parameter, over all processes. `has` says for each process which of them it has; a gradient that
/// another process lacks counts as zeros there, and one that all lack stays away.
///
/// # Errors
/// A tensor can't be read or made.
pub(super) fn sum_gradients(
    group: &dyn ProcessGroup,
    parameters: &[Tensor],
    gradients: &mut [Option<Tensor>],
    has: &[Vec<bool>],
) -> candle_core::Result<()> {
    if group.size() == 1 {
        return Ok(());
    }
    let present = |index: usize| has.iter().any(|of| of.get(index) == Some(&true));
    let wanted: Vec<usize> = (0..gradients.len())
        .filter(|&index| present(index))
        .collect();
    let mut rest = &wanted[..];
    while !rest.is_empty() {
        let mut values = Vec::new();
        let mut count = 0;
        for &index in rest {
            let elements = parameters[index].elem_count();
            if count > 0 && values.len() + elements > BUCKET {
                break;
            }
            match &gradients[index] {
                Some(gradient) => values.extend(gradient.flatten_all()?.to_vec1::<f32>()?),
                None => values.resize(values.len() + elements, 0.),
            }
            count += 1;
        }
        group.sum(&mut values);
        let (now, later) = rest.split_at(count);
        let mut values = &values[..];
        for &index in now {
            let like = &parameters[index];
            let (own, others) = values.split_at(like.elem_count());
            let sum = Tensor::from_slice(own, like.shape(), like.device())?;
            gradients[index] = Some(sum);
            values = others;
        }
        rest = later;
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod threads;
