//! The reference model of a training, as a stage loads it.

use std::path::{Path, PathBuf};

use anyhow::anyhow;
use candle_core::DType;

use crate::engine::{Context, Input};
use crate::ml::adapter::Adapter;
use crate::ml::execution::Execution;
use crate::ml::fused::Packing;
use crate::ml::model::{CausalLm, Trained, tied};
use crate::ml::place::Place;
use crate::ml::train::ReferenceModel;
use crate::stages::artifacts::{self as stages, Model};
use crate::stages::reference_columns::{Scorer, changes_nothing};

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
    /// The rows have its log-probabilities.
    Rows,
}

/// Where a reference model comes from.
pub(super) enum Source {
    /// There is none.
    None,
    /// The trained model without its adapter.
    Base,
    /// A model of its own: its folder, and its adapter if it has one.
    Own(PathBuf, Option<Box<Adapter>>),
    /// The rows have its log-probabilities ([`crate::stages::reference_columns`]).
    Rows,
}

impl Reference {
    /// The model and the adapter that a recipe names, or TRL's default if it names none.
    pub(super) fn named(
        cx: &Context,
        model: Option<&Input<Model>>,
        adapter: Option<&Input<stages::Adapter>>,
    ) -> anyhow::Result<Self> {
        if model.is_none() && adapter.is_none() {
            return Ok(Self::Initial);
        }
        let model = model.map(|model| cx.input(model)).transpose()?;
        let adapter = adapter.map(|adapter| cx.input(adapter)).transpose()?;
        Ok(Self::Other {
            model: model.map(Into::into),
            adapter: adapter.map(Into::into),
        })
    }

    /// Where the reference model comes from, and that in words. `model` and `adapter` are those that are trained.
    pub(super) fn source(
        &self,
        model: &Path,
        adapter: Option<&Adapter>,
    ) -> anyhow::Result<(Source, &'static str)> {
        let own = |adapter: Option<&Adapter>| {
            Source::Own(model.to_owned(), adapter.cloned().map(Box::new))
        };
        Ok(match (self, adapter) {
            (Self::None, _) => (Source::None, ""),
            (Self::Initial, Some(adapter)) if changes_nothing(adapter)? => (
                Source::Base,
                "the model without the adapter, which changes nothing before the first step",
            ),
            (Self::Initial, None) => (own(None), "the model before the first step"),
            (Self::Initial, adapter) => (
                own(adapter),
                "the model with the adapter before the first step",
            ),
            (
                Self::Other {
                    model: other,
                    adapter: own,
                },
                trained,
            ) => {
                let other = other.as_deref().unwrap_or(model);
                if own.is_none() && other == model && trained.is_some() {
                    return Ok((Source::Base, "the model without the adapter"));
                }
                let told = match own {
                    Some(_) => "a model with an adapter of its own",
                    None => "a model of its own",
                };
                let own = own.as_deref().map(Adapter::load).transpose()?;
                (Source::Own(other.to_owned(), own.map(Box::new)), told)
            }
        })
    }
}

impl Reference {
    /// What log-probabilities that rows have already must have been computed by, for a training whose reference comes from `source`. `model`
    /// and `adapter` are the folders of those that are trained.
    pub(super) fn scorer(
        &self,
        source: &Source,
        model: &Path,
        adapter: Option<&Path>,
        compute: DType,
    ) -> anyhow::Result<Scorer> {
        let Source::Own(folder, own) = source else {
            return Scorer::new(model, None, compute);
        };
        let adapter = match self {
            Self::Other { adapter, .. } => adapter.as_deref(),
            _ => adapter,
        };
        let plain = own.as_deref().map(changes_nothing).transpose()?;
        let adapter = adapter.filter(|_| plain == Some(false));
        Scorer::new(folder, adapter, compute)
    }
}

impl Loaded {
    /// Loads a reference model, to be run in a place.
    pub(super) fn new(
        cx: &Context,
        source: &Source,
        told: &str,
        compute: DType,
        place: &Place,
    ) -> anyhow::Result<Self> {
        if !told.is_empty() {
            let known = match source {
                Source::Rows => "; its log-probabilities come with the dataset",
                _ => "",
            };
            cx.info(format!("the reference is {told}{known}"));
        }
        let (folder, adapter) = match source {
            Source::None => return Ok(Self::None),
            Source::Base => return Ok(Self::Base),
            Source::Rows => return Ok(Self::Rows),
            Source::Own(folder, adapter) => (folder, adapter),
        };
        let (config, weights) = tied::open(folder)?;
        let device = candle_core::Device::Cpu;
        let mut loaded = CausalLm::load(
            &config,
            &weights,
            adapter.as_deref(),
            Trained::Nothing,
            compute,
            &device,
        )?;
        Execution::move_weights(&mut loaded, place)?;
        Ok(Self::Frozen(Box::new(loaded)))
    }

    /// The model to run, if it is one of its own.
    pub(super) fn execution(
        &self,
        packing: Packing,
        place: &Place,
    ) -> anyhow::Result<Option<Execution<'_>>> {
        match self {
            Self::Frozen(model) => match Execution::placed(model, packing, place) {
                Ok(execution) => Ok(Some(execution)),
                Err(why) => Err(anyhow!("the reference model can't run on the GPU: {why}")),
            },
            Self::None | Self::Base | Self::Rows => Ok(None),
        }
    }

    /// What the training is given. `execution` is that of [`Loaded::execution`].
    pub(super) fn model<'a>(&self, execution: Option<&'a Execution<'a>>) -> ReferenceModel<'a> {
        match (self, execution) {
            (Self::Base, _) => ReferenceModel::Base,
            (Self::Rows, _) => ReferenceModel::Rows,
            (Self::Frozen(_), Some(execution)) => ReferenceModel::Frozen(execution),
            _ => ReferenceModel::None,
        }
    }
}
