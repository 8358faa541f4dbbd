//! One micro-batch or some through a model and a loss, as the trainer does it.

use crate::ml::execution::Execution;
use crate::ml::loss::{Loss, Outcome};
use crate::ml::model::Gradients;
use crate::ml::model::batch::Batch;
use crate::ml::model::linear::{DropoutSeed, Pass};
use crate::ml::train::{Passes, ReferenceModel};

fn passes<'a>(loss: &'a dyn Loss, execution: &'a Execution<'a>) -> Passes<'a> {
    Passes {
        execution,
        loss,
        reference: ReferenceModel::Base,
    }
}

/// The loss without a gradient, with the adapter. A reference model is the base without the adapter.
pub(in crate::ml) fn evaluate(
    loss: &dyn Loss,
    execution: &Execution<'_>,
    batch: &Batch,
) -> anyhow::Result<Outcome> {
    passes(loss, execution).evaluate(batch)
}

/// The losses of some micro-batches of one pass, whose gradients times their scales are added to `gradients`.
pub(in crate::ml) fn differentiate(
    loss: &dyn Loss,
    execution: &Execution<'_>,
    batches: &[(&Batch, f64)],
    dropout: Option<DropoutSeed>,
    checkpointing: bool,
    gradients: &mut Gradients,
) -> anyhow::Result<Vec<Outcome>> {
    passes(loss, execution).differentiate(batches, Pass::train(dropout), checkpointing, gradients)
}
