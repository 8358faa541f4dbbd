//! The copies of weights that a GPU keeps from pass to pass.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use candle_core::{Error, Result, TensorId};
use pipeline_kernels::matrix::Values;
use pipeline_kernels_gpu as gpu;

use crate::ml::quant::nf4::Nf4;

#[expect(
    clippy::needless_pass_by_value,
    reason = "the signature that `map_err` takes"
)]
pub(super) fn failed(error: gpu::Error) -> Error {
    Error::Msg(error.to_string())
}

/// What a lock guards, also after a panic of another thread.
pub(super) fn lock<T>(guarded: &Mutex<T>) -> MutexGuard<'_, T> {
    match guarded.lock() {
        Ok(guard) => guard,
        Err(poisoned) => poisoned.into_inner(),
    }
}

/// A copy that no pass of so many used is dropped.
const PASSES: u64 = 32;

/// Which weight a copy belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Key {
    /// A dense one.
    Tensor(TensorId),
    /// One in 4 bits, by its address in the model, which outlives the copies.
    Nf4(usize),
}

impl Key {
    /// That of a weight in 4 bits.
    pub(super) fn of(weight: &Nf4) -> Self {
        Self::Nf4(std::ptr::from_ref(weight).addr())
    }
}

/// A copy, whether its values are still the host's, and the last pass that used it.
struct Copied<T> {
    copy: Arc<T>,
    fresh: bool,
    used: u64,
    /// Whether it is the only one, because the host has given up the values.
    only: bool,
}

/// A trained tensor whose values are the device's own.
pub(super) struct HeldTensor {
    /// It as a weight, if it is a matrix.
    pub(super) weight: Option<Arc<gpu::Weight>>,
    pub(super) values: Arc<gpu::Buffer>,
    /// The sum of its gradients.
    pub(super) gradient: gpu::Buffer,
}

/// Copies of weights and of vectors.
#[derive(Default)]
pub(in crate::ml) struct Copies {
    weights: HashMap<Key, Copied<gpu::Weight>>,
    vectors: HashMap<TensorId, Copied<gpu::Buffer>>,
    held: HashMap<TensorId, HeldTensor>,
    pass: u64,
}

impl Copies {
    /// Begins a pass, before which these tensors may have changed.
    pub(super) fn begin(&mut self, changed: impl Iterator<Item = TensorId>) {
        self.pass += 1;
        let first = self.pass.saturating_sub(PASSES);
        self.weights
            .retain(|_, entry| entry.only || entry.used >= first);
        self.vectors.retain(|_, entry| entry.used >= first);
        for id in changed {
            if let Some(entry) = self.weights.get_mut(&Key::Tensor(id)) {
                entry.fresh = false;
            }
            if let Some(entry) = self.vectors.get_mut(&id) {
                entry.fresh = false;
            }
        }
    }

    /// From now on takes a tensor's values from the device.
    pub(super) fn hold(&mut self, id: TensorId, tensor: HeldTensor) {
        self.weights.remove(&Key::Tensor(id));
        self.vectors.remove(&id);
        self.held.insert(id, tensor);
    }

    /// Takes a tensor's values from the host again.
    pub(super) fn release(&mut self, id: TensorId) {
        self.held.remove(&id);
    }

    /// A tensor whose values are the device's own.
    pub(super) fn held(&self, id: TensorId) -> Option<&HeldTensor> {
        self.held.get(&id)
    }

    /// Keeps the copy of a weight whatever passes use: the host gives its values up.
    pub(super) fn keep(&mut self, key: Key) {
        if let Some(entry) = self.weights.get_mut(&key) {
            entry.only = true;
        }
    }

    /// The copy of a weight (rows, columns), which is made or brought up to date; `values` are its values in the host's memory.
    pub(super) fn weight<'v>(
        &mut self,
        device: &gpu::Device,
        key: Key,
        values: impl FnOnce() -> Result<Values<'v>>,
        (rows, columns): (usize, usize),
    ) -> Result<Arc<gpu::Weight>> {
        if let Key::Tensor(id) = key
            && let Some(HeldTensor {
                weight: Some(weight),
                ..
            }) = self.held.get(&id)
        {
            return Ok(Arc::clone(weight));
        }
        let used = self.pass;
        if let Some(entry) = self.weights.get_mut(&key) {
            entry.used = used;
            if entry.fresh {
                return Ok(Arc::clone(&entry.copy));
            }
        }
        let values = values()?;
        if let Some(entry) = self.weights.get_mut(&key)
            && let (Some(copy), Values::F32(values)) = (Arc::get_mut(&mut entry.copy), values)
        {
            device.write_weight(copy, values);
            entry.fresh = true;
            return Ok(Arc::clone(&entry.copy));
        }
        let made = device.upload_weight(values, rows, columns);
        let copy = Arc::new(made.map_err(failed)?);
        let entry = Copied {
            copy: Arc::clone(&copy),
            fresh: true,
            used,
            only: false,
        };
        self.weights.insert(key, entry);
        Ok(copy)
    }

    /// The copy of a norm's weight or a bias, which is made or brought up to date.
    pub(super) fn vector<'v>(
        &mut self,
        device: &gpu::Device,
        id: TensorId,
        values: impl FnOnce() -> Result<&'v [f32]>,
    ) -> Result<Arc<gpu::Buffer>> {
        if let Some(held) = self.held.get(&id) {
            return Ok(Arc::clone(&held.values));
        }
        let used = self.pass;
        if let Some(entry) = self.vectors.get_mut(&id)
            && entry.fresh
        {
            entry.used = used;
            return Ok(Arc::clone(&entry.copy));
        }
        let copy = Arc::new(device.upload(values()?).map_err(failed)?);
        let entry = Copied {
            copy: Arc::clone(&copy),
            fresh: true,
            used,
            only: false,
        };
        self.vectors.insert(id, entry);
        Ok(copy)
    }
}
