//! The reference model of a training, as a stage loads it.

use std::path::{Path, PathBuf};

use candle_core::DType;

use crate::engine::Context;
use crate::ml::adapter::Adapter;
use crate::ml::execution::{Execution, Kind};
use crate::ml::model::{CausalLm, Trained, tied};
use crate::ml::train::ReferenceModel;

/// Which model a training compares its own with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reference {
    /// None.
    None,
    /// The model, or the base with the adapter, as it is before the first step. TRL's default.
    Initial,
    /// Another model, with an adapter or without.
    Other {
        /// The model's folder; none for that of the trained model.
        model: Option<PathBuf>,
        /// The adapter's folder.
        adapter: Option<PathBuf>,
    },
}

/// A reference model in memory.
pub(super) enum Loaded {
    None,
    /// The trained model without its adapter.
    Base,
    /// A model of its own.
    Frozen(Box<CausalLm>),
}

/// Whether a model with this adapter computes what it computes without.
fn changes_nothing(adapter: &Adapter) -> anyhow::Result<bool> {
    let is_zero = |tensor: &candle_core::Tensor| -> candle_core::Result<bool> {
        Ok(tensor
            .abs()?
            .flatten_all()?
            .max(0)?
            .to_dtype(DType::F64)?
            .to_scalar::<f64>()?
            == 0.)
    };
    if !adapter.saved.is_empty() {
        return Ok(false);
    }
    for pair in adapter.tensors.values() {
        if pair.magnitude.is_some() || !(is_zero(&pair.b)? || is_zero(&pair.a)?) {
            return Ok(false);
        }
    }
    Ok(true)
}

impl Loaded {
    /// Loads the reference model. `model` and `adapter` are those that are trained.
    pub(super) fn new(
        cx: &Context,
        reference: &Reference,
        model: &Path,
        adapter: Option<&Adapter>,
        compute: DType,
    ) -> anyhow::Result<Self> {
        let report = |what: &str| cx.info(format!("the reference is {what}"));
        let (folder, other) = match (reference, adapter) {
            (Reference::None, _) => return Ok(Self::None),
            (Reference::Initial, Some(adapter)) if changes_nothing(adapter)? => {
                report(
                    "the model without the adapter, which changes nothing before the first step",
                );
                return Ok(Self::Base);
            }
            (Reference::Initial, None) => {
                report("the model before the first step");
                (model, None)
            }
            (Reference::Initial, Some(adapter)) => {
                report("the model with the adapter before the first step");
                (model, Some(adapter.clone()))
            }
            (
                Reference::Other {
                    model: other,
                    adapter: own,
                },
                trained,
            ) => {
                let other = other.as_deref().unwrap_or(model);
                if own.is_none() && other == model && trained.is_some() {
                    report("the model without the adapter");
                    return Ok(Self::Base);
                }
                report(match own {
                    Some(_) => "a model with an adapter of its own",
                    None => "a model of its own",
                });
                (other, own.as_deref().map(Adapter::load).transpose()?)
            }
        };
        let (config, weights) = tied::open(folder)?;
        let device = candle_core::Device::Cpu;
        let loaded = CausalLm::load(
            &config,
            &weights,
            other.as_ref(),
            Trained::Nothing,
            compute,
            &device,
        )?;
        Ok(Self::Frozen(Box::new(loaded)))
    }

    /// The model to run, if it is one of its own.
    pub(super) fn execution(&self, kind: Kind) -> Option<Execution<'_>> {
        match self {
            Self::Frozen(model) => Some(Execution::new(model, kind)),
            Self::None | Self::Base => None,
        }
    }

    /// What the training is given. `execution` is that of [`Loaded::execution`].
    pub(super) fn model<'a>(&self, execution: Option<&'a Execution<'a>>) -> ReferenceModel<'a> {
        match (self, execution) {
            (Self::Base, _) => ReferenceModel::Base,
            (Self::Frozen(_), Some(execution)) => ReferenceModel::Frozen(execution),
            _ => ReferenceModel::None,
        }
    }
}
