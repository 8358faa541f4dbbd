//! The parameters that name a training's reference model, the same for every method that has one.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::method::Compares;
use super::reference::Reference;
use crate::engine::{Context, Input};
use crate::stages::artifacts::{Adapter, Model};

/// Which model a training compares its own with, and when that is computed.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ReferenceArguments {
    /// The reference model. By default it is the trained model before its first step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ref_model: Option<Input<Model>>,
    /// The adapter of the reference model. Without `ref_model` it stands beside `model`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ref_adapter: Option<Input<Adapter>>,
    /// Whether the reference model's log-probabilities are computed once for all rows before the first step, instead of anew in
    /// each epoch. A reference model of its own is then not kept in memory.
    #[serde(default)]
    precompute_ref_log_probs: bool,
}

impl Compares for ReferenceArguments {
    fn reference(&self, cx: &Context) -> anyhow::Result<Reference> {
        Reference::named(cx, self.ref_model.as_ref(), self.ref_adapter.as_ref())
    }

    fn precomputes(&self) -> bool {
        self.precompute_ref_log_probs
    }
}
