//! The models of an evaluation: one alone, or two that are compared on the same rows.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};

use super::evaluation::EvaluationArguments;
use super::report::Part;
use crate::engine::{Context, Input};
use crate::ml::adapter::{Adapter as LoraAdapter, FILE};
use crate::ml::execution::Execution;
use crate::ml::fused::Packing;
use crate::ml::model::linear::Pass;
use crate::ml::model::{CausalLm, Trained, tied};
use crate::ml::place::Place;
use crate::stages::artifacts::Model;
use crate::stages::model_input::execution_on;

/// A model in memory with the folder that it comes from.
pub(super) struct Loaded {
    pub(super) model: CausalLm,
    pub(super) folder: PathBuf,
}

/// The models of an evaluation in memory.
pub(super) struct Models {
    /// The model that is scored, with its adapter if there is one.
    pub(super) scored: Loaded,
    /// The adapter's folder.
    pub(super) adapter: Option<PathBuf>,
    /// The model that it is compared with, if that is another.
    pub(super) baseline: Option<Loaded>,
}

/// One model of a comparison, as it computes.
pub(super) struct Side<'m> {
    /// Which part of the scores it has.
    pub(super) part: Part,
    /// The model with its backend.
    pub(super) execution: &'m Execution<'m>,
    /// Whether its adapter takes part.
    pub(super) pass: Pass,
    /// Where it comes from.
    pub(super) loaded: &'m Loaded,
}

impl Loaded {
    /// Loads a model, with `adapter` if there is one, to be run in a place; its products are computed in `compute`.
    pub(super) fn open(
        folder: &Path,
        adapter: Option<&Path>,
        compute: DType,
        place: &Place,
    ) -> anyhow::Result<Self> {
        let (arch, weights) = tied::open(folder)?;
        let adapter = adapter.map(LoraAdapter::load).transpose()?;
        let nothing = Trained::Nothing;
        let device = Device::Cpu;
        let mut model =
            CausalLm::load(&arch, &weights, adapter.as_ref(), nothing, compute, &device)?;
        Execution::move_weights(&mut model, place)?;
        Ok(Self {
            model,
            folder: folder.to_path_buf(),
        })
    }
}

impl Models {
    /// Loads the models that the parameters name, to be run in a place.
    pub(super) fn open(
        cx: &Context,
        arguments: &EvaluationArguments,
        place: &Place,
    ) -> anyhow::Result<Self> {
        let compute = arguments.compute();
        let adapter = arguments.adapter.as_ref();
        let adapter = adapter.map(|adapter| cx.input(adapter)).transpose()?;
        let scored = Loaded::open(cx.input(&arguments.model)?, adapter, compute, place)?;
        let baseline = match &arguments.baseline {
            Some(baseline) => Some(Loaded::open(cx.input(baseline)?, None, compute, place)?),
            None => None,
        };
        Ok(Self {
            scored,
            adapter: adapter.map(Path::to_path_buf),
            baseline,
        })
    }

    /// The ids that all models know: those below this number. It reads no weights.
    pub(super) fn vocabulary(
        cx: &Context,
        arguments: &EvaluationArguments,
    ) -> anyhow::Result<usize> {
        let of = |model: &Input<Model>| anyhow::Ok(tied::open(cx.input(model)?)?.0.vocab_size);
        let own = of(&arguments.model)?;
        Ok(match &arguments.baseline {
            Some(baseline) => own.min(of(baseline)?),
            None => own,
        })
    }

    /// The backends of the models: that of the scored one, and that of the baseline.
    pub(super) fn executions(
        &self,
        cx: &Context,
        place: &Place,
    ) -> anyhow::Result<(Execution<'_>, Option<Execution<'_>>)> {
        let packing = Packing::default();
        let scored = execution_on(cx, &self.scored.model, packing, place)?;
        let baseline = self.baseline.as_ref();
        let baseline = baseline.map(|other| execution_on(cx, &other.model, packing, place));
        Ok((scored, baseline.transpose()?))
    }

    /// Who is compared with whom: what it is compared with, if anything, comes first.
    pub(super) fn sides<'m>(
        &'m self,
        (scored, baseline): &'m (Execution<'m>, Option<Execution<'m>>),
    ) -> Vec<Side<'m>> {
        let of = |part, execution, pass, loaded| Side {
            part,
            execution,
            pass,
            loaded,
        };
        let mut sides = Vec::new();
        if let (Some(execution), Some(loaded)) = (baseline, &self.baseline) {
            sides.push(of(Part::Base, execution, Pass::BASE, loaded));
        }
        if self.adapter.is_some() {
            if sides.is_empty() {
                sides.push(of(Part::Base, scored, Pass::BASE, &self.scored));
            }
            sides.push(of(Part::Adapter, scored, Pass::INFER, &self.scored));
        } else {
            let part = if sides.is_empty() {
                Part::Base
            } else {
                Part::Model
            };
            sides.push(of(part, scored, Pass::BASE, &self.scored));
        }
        sides
    }

    /// Files to look into where a number of this side is not finite, each with a noun.
    pub(super) fn sources(&self, side: &Side<'_>) -> Vec<(&'static str, PathBuf)> {
        let mut sources = vec![("model", side.loaded.folder.clone())];
        if let (Some(adapter), Part::Adapter) = (&self.adapter, side.part) {
            sources.push(("adapter", adapter.join(FILE)));
        }
        sources
    }
}
