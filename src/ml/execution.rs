//! The execution of a model: the only module that knows the backends, and chooses among them.

use std::fmt;
use std::path::Path;

use candle_core::Result;

use super::backend::{Backend, Decoder, ForwardPass, WithBase};
pub use super::backend::{PassSize, Scores, Token};
use super::fused::{Fused, Packing};
use super::model::CausalLm;
use super::model::batch::Batch;
use super::model::linear::Pass;
use super::place::Place;
use super::reference::Reference;
use super::resident::{Resident, TrainedTensor};

/// A kind of backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// See [`super::reference`].
    Reference,
    /// See [`super::fused`].
    Fused(Packing),
    /// See [`super::gpu`]; made by [`Execution::placed`] alone, and in tests also by [`Execution::new`].
    Gpu(Packing),
}

impl Default for Kind {
    /// The fastest backend.
    fn default() -> Self {
        Self::Fused(Packing::default())
    }
}

/// A model with the backend that runs it, which is chosen once. The model holds weights only; buffers and whatever else outlives a
/// pass are here.
///
/// Each pass says whether the adapter takes part ([`Pass::BASE`] leaves it out), so the base model is scored by the same execution,
/// without a second set of weights.
pub struct Execution<'m> {
    model: &'m CausalLm,
    kind: Kind,
    backend: Box<dyn Backend + 'm>,
    fallback: Option<String>,
}

impl<'m> Execution<'m> {
    /// Runs `model` with the `wanted` backend, or with the reference if that backend does not support the model; see
    /// [`Execution::fallback`].
    pub fn new(model: &'m CausalLm, wanted: Kind) -> Self {
        #[cfg(all(test, feature = "gpu"))]
        if let Kind::Gpu(packing) = wanted
            && let Some(place) = Place::of_tests()
        {
            let placed = Self::placed(model, packing, &place);
            return placed.expect("a GPU runs what a test asks it for");
        }
        let (kind, backend, fallback): (_, Box<dyn Backend + 'm>, _) = match wanted {
            Kind::Reference => (wanted, Box::new(Reference::new(model)), None),
            Kind::Fused(packing) | Kind::Gpu(packing) => match Fused::new(model, packing) {
                Ok(fused) => (Kind::Fused(packing), Box::new(fused), None),
                Err(why) => (
                    Kind::Reference,
                    Box::new(Reference::new(model)),
                    Some(why.to_string()),
                ),
            },
        };
        Self {
            model,
            kind,
            backend,
            fallback,
        }
    }

    /// Runs `model` in a place. The processor, which also takes the place of a GPU that was not asked for by name, computes on the reference
    /// path what the fast one lacks.
    ///
    /// # Errors
    /// A GPU that was asked for by name does not support the model; the error is a clause that says what it lacks.
    pub fn placed(
        model: &'m CausalLm,
        packing: Packing,
        place: &Place,
    ) -> std::result::Result<Self, String> {
        #[cfg(feature = "gpu")]
        if let Some(device) = &place.gpu {
            let gpu = super::gpu::Gpu::new(std::sync::Arc::clone(device), model);
            match Fused::on(gpu, model, packing) {
                Ok(backend) => {
                    return Ok(Self {
                        model,
                        kind: Kind::Gpu(packing),
                        backend: Box::new(backend),
                        fallback: None,
                    });
                }
                Err(why) if matches!(place.wanted, super::place::Wanted::Gpu(_)) => {
                    return Err(why.to_string());
                }
                Err(_) => {}
            }
        }
        #[cfg(not(feature = "gpu"))]
        let _ = place;
        Ok(Self::new(model, Kind::Fused(packing)))
    }

    /// Moves the frozen weights of a model to the GPU of a place: the host's memory has them no longer. Nothing happens on the processor, or
    /// where the GPU can't run the model. From then on the model has to be run there.
    ///
    /// # Errors
    /// The GPU has no memory for them.
    pub fn move_weights(model: &mut CausalLm, place: &Place) -> Result<()> {
        #[cfg(feature = "gpu")]
        if let Some(device) = &place.gpu
            && super::fused::unsupported_feature::<super::gpu::Gpu>(model).is_none()
        {
            super::gpu::take_weights(device, model)?;
        }
        let _ = (model, place);
        Ok(())
    }

    /// Runs `model` with a backend that a test made.
    #[cfg(test)]
    pub(in crate::ml) fn with(
        model: &'m CausalLm,
        kind: Kind,
        backend: Box<dyn Backend + 'm>,
    ) -> Self {
        Self {
            model,
            kind,
            backend,
            fallback: None,
        }
    }

    /// Runs `model` with the fastest backend that supports it.
    pub fn fastest(model: &'m CausalLm) -> Self {
        Self::new(model, Kind::default())
    }

    /// The model.
    pub fn model(&self) -> &'m CausalLm {
        self.model
    }

    /// The kind of backend that runs the model.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The type in which products are computed.
    pub fn precision(&self) -> &'static str {
        self.model.compute.as_str()
    }

    /// If the wanted backend does not run the model: what it does not support, as a clause for a message.
    pub fn fallback(&self) -> Option<&str> {
        self.fallback.as_deref()
    }

    /// See [`Backend::pass_size`].
    pub fn pass_size(&self, batches: &[&Batch], pass: Pass, checkpointing: bool) -> PassSize {
        self.backend.pass_size(batches, pass, checkpointing)
    }

    /// See [`Backend::expect`].
    pub fn expect(&self, tokens: usize) {
        self.backend.expect(tokens);
    }

    /// See [`Backend::forward`].
    pub fn forward<'a>(
        &'a self,
        batches: &[&Batch],
        pass: Pass,
        checkpointing: bool,
    ) -> Result<Box<dyn ForwardPass + 'a>> {
        self.backend.forward(batches, pass, checkpointing)
    }

    /// See [`Backend::forward_beside_base`].
    pub fn forward_beside_base<'a>(
        &'a self,
        batches: &[&Batch],
        pass: Pass,
        checkpointing: bool,
    ) -> Result<Option<WithBase<'a>>> {
        self.backend
            .forward_beside_base(batches, pass, checkpointing)
    }

    /// See [`Backend::decoder`].
    pub fn decoder<'a>(
        &'a self,
        sequences: usize,
        longest: usize,
        pass: Pass,
    ) -> Result<Box<dyn Decoder + 'a>> {
        if self.model.arch.scores {
            candle_core::bail!("the model gives scores and no text: its head is `score.weight`")
        }
        self.backend.decoder(sequences, longest, pass)
    }

    /// See [`Backend::hold`].
    pub fn hold(&self, tensors: &[TrainedTensor<'_>]) -> Result<Option<Box<dyn Resident>>> {
        self.backend.hold(tensors)
    }

    /// See [`Backend::keep_frozen_states`].
    pub fn keep_frozen_states(&self, folder: &Path) -> std::io::Result<Option<usize>> {
        self.backend.keep_frozen_states(folder)
    }
}

impl fmt::Debug for Execution<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Execution")
            .field("kind", &self.kind)
            .field("fallback", &self.fallback)
            .finish_non_exhaustive()
    }
}
