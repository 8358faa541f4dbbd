//! The fast path as a [`Backend`].

use std::fmt;
use std::path::Path;
use std::sync::Mutex;

use candle_core::{DType, Result, bail};
use pipeline_kernels::panels::panels;

use super::device::Device;
use super::layout::Packing;
use super::memory::{PassSizes, saved_bytes};
use super::states::States;
use super::{Cpu, Forward, Scored, decode, lowest};
use crate::ml::backend::{Backend, Decoder, ForwardPass, PassSize, Scores, WithBase};
use crate::ml::model::batch::{Batch, Target};
use crate::ml::model::head::Positions;
use crate::ml::model::linear::Pass;
use crate::ml::model::{self, CausalLm, Gradients, have_same_angles};
use crate::ml::reference::CachedSequences;
use crate::ml::resident::{Resident, TrainedTensor};

/// The largest number of tokens in a pass of several micro-batches; larger passes would save nothing more.
pub(super) const TOKENS: usize = 2048;
/// The largest number of bytes that a pass of several micro-batches keeps for its backward pass.
const MAX_SAVED_BYTES: usize = 1 << 29;

/// A model on the fast path of a device, which holds the buffers that outlive a pass.
pub(in crate::ml) struct Fused<'m, D = Cpu> {
    pub(super) model: &'m CausalLm,
    pub(super) packing: Packing,
    pub(super) device: D,
    /// The kept output of the frozen layers, see [`Backend::keep_frozen_states`].
    pub(super) states: Mutex<Option<States>>,
}

/// The error of a model that the fast path does not support; it says what is not supported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unsupported(String);

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unsupported {}

/// The first feature of a model that the fast path of a device does not support, if there is one.
pub(in crate::ml) fn unsupported_feature<D: Device>(model: &CausalLm) -> Option<String> {
    if !model.device.is_cpu() {
        return Some("the model is not on the CPU".into());
    }
    let computes = match model.compute {
        DType::F32 | DType::BF16 => true,
        DType::F16 => D::HAS_F16,
        _ => false,
    };
    if !computes {
        return Some(format!(
            "products run in {}; the fast path has f32 and bf16",
            model.compute.as_str()
        ));
    }
    if model.has_pairs_at_ends() {
        return Some("the adapter has matrices beside the embeddings or the head".into());
    }
    None
}

impl<'m> Fused<'m> {
    /// Runs `model` on the fast path of the processor.
    ///
    /// # Errors
    /// The model has a feature that the fast path does not support.
    pub(in crate::ml) fn new(
        model: &'m CausalLm,
        packing: Packing,
    ) -> std::result::Result<Self, Unsupported> {
        Self::on(Cpu::default(), model, packing)
    }
}

impl<'m, D: Device> Fused<'m, D> {
    /// Runs `model` on the fast path of a device.
    ///
    /// # Errors
    /// The model has a feature that the fast path does not support.
    pub(in crate::ml) fn on(
        device: D,
        model: &'m CausalLm,
        packing: Packing,
    ) -> std::result::Result<Self, Unsupported> {
        match unsupported_feature::<D>(model) {
            Some(why) => Err(Unsupported(why)),
            None => Ok(Self {
                model,
                packing,
                device,
                states: Mutex::default(),
            }),
        }
    }

    /// The packing of a pass. With dropout or noise no prompts are shared, because each copy of a prompt has other values.
    pub(super) fn packing(&self, pass: Pass) -> Packing {
        let drops = |layer: &model::Layer| {
            let mut linears = layer.linears().into_iter();
            linears.any(|linear| linear.dropout(pass).is_some())
        };
        Packing {
            share_prompts: self.packing.share_prompts
                && pass.noise.is_none()
                && !self.model.layers.iter().any(drops),
            ..self.packing
        }
    }
}

/// The most tokens of several micro-batches in one pass that keeps so many bytes of each.
fn most_tokens(saved_bytes: usize) -> usize {
    TOKENS.min(MAX_SAVED_BYTES / saved_bytes.max(1))
}

/// How many of the first of these micro-batches, of which `alike` says whether a pass can share what they have in common, go through the
/// model in one pass of no more tokens, one in any case.
fn pass_size(
    batches: &[&Batch],
    packing: Packing,
    most: usize,
    alike: impl Fn(&Batch, &Batch) -> bool,
) -> PassSize {
    let all = (1..=batches.len()).map(|count| PassSize {
        micro_batches: count,
        tokens: packing.tokens(batches.get(..count).unwrap_or_default()),
    });
    let mut best = PassSize::default();
    for size in all {
        let last = size.micro_batches - 1;
        if last > 0 && (size.tokens > most || !alike(batches[0], batches[last])) {
            break;
        }
        best = size;
    }
    best
}

/// The same for a model of this architecture and of these sizes that is not loaded, in a pass with a backward.
pub fn pass_size_of(
    arch: &model::arch::Arch,
    batches: &[&Batch],
    packing: Packing,
    sizes: &PassSizes,
    checkpointing: bool,
) -> PassSize {
    let packing = Packing {
        share_prompts: packing.share_prompts && !sizes.drops(),
        ..packing
    };
    pass_size(
        batches,
        packing,
        most_tokens(sizes.saved_bytes(checkpointing)),
        |a, b| have_same_angles(arch, a.length(), b.length()),
    )
}

impl<D: Device> Backend for Fused<'_, D> {
    /// Several micro-batches in one pass save time: each block of a weight is packed once for all of them, fewer panels are partly empty,
    /// and common prefixes are computed once. They also cost memory, so their number is limited.
    fn pass_size(&self, batches: &[&Batch], pass: Pass, checkpointing: bool) -> PassSize {
        let bytes_per_token = if pass.tape {
            saved_bytes(self.model, checkpointing)
        } else {
            0
        };
        let most = most_tokens(bytes_per_token);
        let best = pass_size(batches, self.packing(pass), most, |a, b| {
            have_same_angles(&self.model.arch, a.length(), b.length())
        });
        if best.micro_batches > 1 {
            self.device.expect(panels(most));
        }
        best
    }

    fn expect(&self, tokens: usize) {
        self.device.expect(panels(tokens));
    }

    fn forward<'a>(
        &'a self,
        batches: &[&Batch],
        pass: Pass,
        checkpointing: bool,
    ) -> Result<Box<dyn ForwardPass + 'a>> {
        let (forward, _) = Forward::new(self, batches, pass, checkpointing, false)?;
        Ok(Box::new(Run {
            forward,
            scored: None,
        }))
    }

    /// Memory stays bounded: the base keeps nothing but the hidden states of the layer at work. With dropout no prompts are shared, but the
    /// base, which drops nothing, can share them; in passes of its own it has fewer tokens.
    fn forward_beside_base<'a>(
        &'a self,
        batches: &[&Batch],
        pass: Pass,
        checkpointing: bool,
    ) -> Result<Option<WithBase<'a>>> {
        let trains_none = lowest(self.model) == self.model.layers.len();
        if trains_none || self.packing(pass) != self.packing(Pass::BASE) {
            return Ok(None);
        }
        let (forward, base) = Forward::new(self, batches, pass, checkpointing, true)?;
        let run = |forward| -> Box<dyn ForwardPass + 'a> {
            Box::new(Run {
                forward,
                scored: None,
            })
        };
        Ok(base.map(|base| WithBase {
            adapted: run(forward),
            base: run(base),
        }))
    }

    fn decoder<'a>(
        &'a self,
        sequences: usize,
        longest: usize,
        pass: Pass,
    ) -> Result<Box<dyn Decoder + 'a>> {
        let own = self.device.decoder(self.model, sequences, longest, pass)?;
        if let Some(decoder) = own {
            return Ok(decoder);
        }
        // There is no kernel that multiplies single vectors in bf16 by a weight that is trained in f32.
        Ok(
            match decode::Decoder::new(self.model, sequences, longest, pass)? {
                Some(decoder) => Box::new(decoder),
                None => Box::new(CachedSequences::new(self.model, sequences, longest, pass)),
            },
        )
    }

    fn keep_frozen_states(&self, folder: &Path) -> std::io::Result<Option<usize>> {
        let lowest = lowest(self.model);
        // Where angles depend on the batch, so do the states of a sequence.
        let varies = !have_same_angles(&self.model.arch, 1, usize::MAX);
        if !D::ON_HOST || lowest == 0 || lowest == self.model.layers.len() || varies {
            return Ok(None);
        }
        let states = States::new(folder, self.model.arch.hidden_size)?;
        if let Ok(mut slot) = self.states.lock() {
            *slot = Some(states);
        }
        Ok(Some(lowest))
    }

    fn hold(&self, tensors: &[TrainedTensor<'_>]) -> Result<Option<Box<dyn Resident>>> {
        let is_part = |weight: &model::linear::Weight| {
            let whole = weight.stored(Pass::INFER).id();
            let trained = weight.trained();
            trained.is_some_and(|var| var.as_tensor().id() != whole)
        };
        if [&self.model.embed, self.model.head()]
            .into_iter()
            .any(is_part)
        {
            return Ok(None);
        }
        self.device.hold(tensors)
    }
}

/// A pass and its scored targets.
struct Run<'m, D: Device> {
    forward: Forward<'m, D>,
    scored: Option<Scored<D>>,
}

impl<D: Device> ForwardPass for Run<'_, D> {
    fn score(&mut self, targets: &[Target], token_stats: bool) -> Result<Scores> {
        let mut scored = self
            .forward
            .score(targets, token_stats, self.forward.pass.tape)?;
        let scores = Scores {
            logps: scored.logps.clone(),
            token_stats: scored.token_stats.take(),
        };
        self.scored = Some(scored);
        Ok(scores)
    }

    fn target_mean_logits(&self, targets: &[Target]) -> Result<Vec<f64>> {
        self.forward.target_mean_logits(targets)
    }

    fn mean_logit(&self, from: usize, count: usize, positions: Positions) -> Result<f64> {
        self.forward.mean_logit(from, count, positions)
    }

    fn backward(self: Box<Self>, grad_logps: &[f32], gradients: &mut Gradients) -> Result<()> {
        match self.scored {
            Some(scored) if self.forward.pass.tape => {
                self.forward.backward(scored, grad_logps, gradients)
            }
            _ => bail!("there is no way back: nothing was recorded or scored"),
        }
    }

    fn backward_scores(
        self: Box<Self>,
        targets: &[Target],
        grad_scores: &[f32],
        gradients: &mut Gradients,
    ) -> Result<()> {
        if !self.forward.pass.tape {
            bail!("there is no way back: nothing was recorded");
        }
        self.forward
            .backward_scores(targets, grad_scores, gradients)
    }
}
