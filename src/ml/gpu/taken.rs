//! Frozen weights that are on a GPU alone: all of a model's are copied there, and the host gives up their values.
//!
//! What is left of them in the host's memory is their shapes. So nothing but the fast path of that device may run the model then.

use std::sync::{Arc, Mutex};

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Tensor, bail};
use pipeline_kernels::matrix::Values;
use pipeline_kernels_gpu as gpu;

use super::copies::{Copies, Key};
use crate::ml::fused::weights::TensorView;
use crate::ml::model::linear::{Base, Pass, Weight};
use crate::ml::model::{CausalLm, Layer, have_same_angles};
use crate::ml::quant::nf4::Nf4;

/// Empties the memory of a tensor on the processor.
struct GiveUp;

impl InplaceOp1 for GiveUp {
    fn name(&self) -> &'static str {
        "give-up"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> Result<()> {
        match storage {
            CpuStorage::F32(values) => *values = Vec::new(),
            CpuStorage::BF16(values) => *values = Vec::new(),
            CpuStorage::F16(values) => *values = Vec::new(),
            _ => bail!("a weight is neither f32, bf16 nor f16"),
        }
        Ok(())
    }
}

/// A frozen weight.
enum Frozen<'m> {
    Dense(&'m Tensor),
    Nf4(&'m mut Arc<Nf4>),
}

impl Frozen<'_> {
    fn key(&self) -> Key {
        match self {
            Self::Dense(tensor) => Key::Tensor(tensor.id()),
            Self::Nf4(weight) => Key::of(weight),
        }
    }

    fn copy(&self, device: &gpu::Device, copies: &mut Copies) -> Result<()> {
        match self {
            Self::Dense(tensor) => {
                let view = TensorView::tensor(tensor);
                copies.weight(device, self.key(), || view.values(), view.shape()?)?;
            }
            Self::Nf4(weight) => {
                let values = || Ok(Values::Nf4(weight.kernel()));
                copies.weight(device, self.key(), values, weight.shape)?;
            }
        }
        Ok(())
    }

    fn give_up(self) -> Result<()> {
        match self {
            Self::Dense(tensor) => tensor.inplace_op1(&GiveUp)?,
            Self::Nf4(weight) => {
                // One that is used elsewhere too stays.
                if let Some(weight) = Arc::get_mut(weight) {
                    weight.packed = Vec::new();
                    weight.absmax = Vec::new();
                }
            }
        }
        Ok(())
    }
}

/// The copies of a model's weights that are on a device already.
pub(super) fn copies(model: &CausalLm) -> Arc<Mutex<Copies>> {
    let taken = model.on_device.clone();
    let taken = taken.and_then(|taken| taken.downcast().ok());
    taken.unwrap_or_default()
}

/// Copies all frozen weights of a model to a device, and has the host give them up. Nothing happens where rotary embeddings depend on the
/// length of a text, because the processor may then have to continue one.
pub(in crate::ml) fn take_weights(device: &gpu::Device, model: &mut CausalLm) -> Result<()> {
    if !have_same_angles(&model.arch, 1, usize::MAX) {
        return Ok(());
    }
    if model.head().is_frozen() {
        // From now on it is known.
        model.column_sum(Pass::BASE)?;
    }
    let mut copies = Copies::default();
    let ends = [Some(&model.embed), model.head.as_ref()];
    let ends = ends
        .into_iter()
        .flatten()
        .filter_map(|weight| match weight {
            Weight::Frozen(tensor) => Some(Frozen::Dense(tensor)),
            _ => None,
        });
    let linears = model.layers.iter_mut().flat_map(Layer::linears_mut);
    let bases = linears.filter_map(|linear| match &mut linear.base {
        Base::Dense(Weight::Frozen(tensor)) => Some(Frozen::Dense(tensor)),
        Base::Dense(_) => None,
        Base::Nf4(weight) => Some(Frozen::Nf4(weight)),
    });
    let all: Vec<Frozen<'_>> = ends.chain(bases).collect();
    for weight in &all {
        weight.copy(device, &mut copies)?;
        copies.keep(weight.key());
    }
    for weight in all {
        weight.give_up()?;
    }
    model.on_device = Some(Arc::new(Mutex::new(copies)));
    Ok(())
}
