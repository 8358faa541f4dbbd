//! What a training will take, told before anything is loaded: steps, tokens, trained parameters, and the most memory, by part.
//!
//! Weights, gradients and moments follow from the files' headers and the settings. What passes take ([`crate::ml::fused::PassSizes`])
//! follows from the longest one, which is found by dealing out the rows as the training will. Memory is told for the moment when most of it
//! is in use: in the middle of a step, or while a checkpoint is written.

use std::collections::BTreeMap;

use candle_core::DType;
use serde::Serialize;

use super::resume::keeps_state;
use super::sampler::Sampler;
use super::settings::Settings;
use crate::ml::adapter::{Adapter, DELTA};
use crate::ml::fused::{Packing, PassLength, PassMemory, PassSizes, pass_size_of};
use crate::ml::io::float::Float;
use crate::ml::io::weights::Weights;
use crate::ml::loss::Loss;
use crate::ml::model::Trained;
use crate::ml::model::arch::Arch;
use crate::ml::model::batch::{Batch, Row};
use crate::ml::model::tensors::{EMBED_TOKENS, HEAD, LM_HEAD, Role, tensors, weight_name};
use crate::ml::quant::nf4::{BLOCK, Nf4};

/// A model that is not loaded: what its files say.
#[derive(Clone, Copy)]
pub struct Unloaded<'a> {
    /// What it computes.
    pub arch: &'a Arch,
    /// Its weights.
    pub weights: &'a Weights,
    /// Its adapter, if it has one.
    pub adapter: Option<&'a Adapter>,
    /// What of it is trained.
    pub trained: Trained,
    /// The dtype of products.
    pub compute: DType,
}

/// A training, as far as it decides what it takes.
pub struct Planned<'a> {
    /// The model.
    pub model: Unloaded<'a>,
    /// A reference model that is a model of its own.
    pub reference: Option<Unloaded<'a>>,
    /// Whether the reference model is the trained one without its adapter.
    pub base_is_reference: bool,
    /// What of a batch need not be computed.
    pub packing: Packing,
    /// What is minimised.
    pub loss: &'a dyn Loss,
    /// The settings.
    pub settings: &'a Settings,
    /// The rows to train on.
    pub rows: &'a [Row],
    /// The rows to evaluate on.
    pub eval_rows: &'a [Row],
    /// The id that fills batches up.
    pub pad: u32,
}

/// What a training will take.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Estimate {
    /// Trained numbers.
    pub trained_parameters: u64,
    /// Steps.
    pub steps: u64,
    /// Tokens of all steps, without padding.
    pub tokens: u64,
    /// Tokens of the longest pass.
    pub longest_pass: u64,
    /// Bytes by part, where the sum of all is largest.
    pub memory: BTreeMap<&'static str, u64>,
    /// Their sum.
    pub peak: u64,
    /// Bytes by part that a device with memory of its own holds in a step, if the passes run there.
    pub on_device: BTreeMap<&'static str, u64>,
}

/// The steps that are dealt out to find the longest pass; those behind them are much the same.
const STEPS: u64 = 2000;

/// Bytes of a model.
#[derive(Debug, Clone, Copy, Default)]
struct ModelBytes {
    /// Frozen weights.
    frozen: usize,
    /// Trained weights of the model.
    trained: usize,
    /// The adapter: as it was read, and as it is trained.
    adapter: usize,
    /// The largest tensor while it is read.
    reading: usize,
    /// Trained elements.
    elements: usize,
    /// Elements of the largest trained tensor.
    largest: usize,
    /// What the optimiser keeps.
    optimizer: usize,
}

impl Unloaded<'_> {
    /// The bytes of a frozen tensor in memory, see `Loader`: norms and biases in f32, matrices as they are stored where that loses nothing.
    fn frozen(&self, name: &str, role: Role, count: usize) -> anyhow::Result<usize> {
        let matrix = matches!(role, Role::Projection(_) | Role::Embeddings | Role::Head);
        if !matrix {
            return Ok(count * DType::F32.size_in_bytes());
        }
        let nf4 = Nf4::stored_shape(self.weights, name)?;
        if nf4.is_some() && matches!(role, Role::Projection(_)) {
            return Ok(count.div_ceil(2) + count.div_ceil(BLOCK) * size_of::<f32>());
        }
        let stored = match nf4 {
            Some((_, float)) => Some(float),
            None => Float::from_safetensors(self.weights.raw(name)?.dtype),
        };
        let stored = stored.map_or(DType::F32, Float::dtype);
        let only_rows = role == Role::Embeddings && !self.arch.tie_word_embeddings;
        let held = if self.compute == DType::F32 || only_rows {
            stored
        } else {
            self.compute
        };
        Ok(count * held.size_in_bytes())
    }

    fn bytes(&self, settings: &Settings) -> anyhow::Result<ModelBytes> {
        let mut all = ModelBytes::default();
        let float = size_of::<f32>();
        let train = |all: &mut ModelBytes, name: &str, shape: &[usize]| {
            let count = shape.iter().product();
            all.elements += count;
            all.largest = all.largest.max(count);
            all.optimizer += settings.optimizer.bytes(name, shape);
        };
        for tensor in tensors(self.arch) {
            let count = tensor.shape.iter().product::<usize>();
            // Embeddings come first, when nothing else is there.
            if tensor.role != Role::Embeddings {
                all.reading = all.reading.max(count * float);
            }
            if self.trained == Trained::Everything {
                all.trained += count * float;
                train(&mut all, &tensor.name, &tensor.shape);
            } else {
                all.frozen += self.frozen(&tensor.name, tensor.role, count)?;
            }
        }
        let Some(adapter) = self.adapter else {
            return Ok(all);
        };
        let is_trained = self.trained == Trained::Adapter;
        // Trained tensors are beside those that were read.
        let copies = if is_trained { 2 } else { 1 };
        for (path, pair) in &adapter.tensors {
            for (part, tensor) in [
                ("A", Some(&pair.a)),
                ("B", Some(&pair.b)),
                ("m", pair.magnitude.as_ref()),
            ] {
                let Some(tensor) = tensor else { continue };
                all.adapter += copies * tensor.elem_count() * float;
                if is_trained {
                    train(&mut all, &format!("{path}.{part}"), tensor.dims());
                }
            }
        }
        for (path, rows) in &adapter.token_rows {
            let count = rows.values.elem_count();
            // The weight is there with these rows and without.
            let whole = [self.arch.vocab_size, self.arch.hidden_size];
            all.adapter += copies * count * float;
            let tied = self.arch.tie_word_embeddings && path == LM_HEAD;
            let name = weight_name(if tied { EMBED_TOKENS } else { path });
            all.frozen += self.frozen(&name, Role::Embeddings, whole.iter().product())?;
            if is_trained {
                train(&mut all, &format!("{path}{DELTA}"), rows.values.dims());
            }
        }
        // Tensors in the place of the base's, and a head of the adapter's own beside tied embeddings.
        let own = tensors(self.arch).map(|tensor| (tensor.name, tensor.shape));
        let head = adapter.saved.get(HEAD);
        let head = head.filter(|_| self.arch.tie_word_embeddings);
        let head = head.map(|head| (HEAD.to_owned(), head.dims().to_vec()));
        for (name, shape) in own.chain(head) {
            let trains = is_trained && adapter.trains(&name);
            if trains || adapter.saved.contains_key(&name) {
                all.adapter += copies * shape.iter().product::<usize>() * float;
            }
            if trains {
                train(&mut all, &name, &shape);
            }
        }
        Ok(all)
    }
}

/// What the rows come to.
#[derive(Debug, Default)]
struct Dealt {
    tokens: u64,
    longest: PassLength,
    /// Whether a step has more than one pass.
    several: bool,
}

impl Planned<'_> {
    fn batches(&self, groups: &[Vec<usize>]) -> anyhow::Result<Vec<Batch>> {
        let rows = groups.iter().map(|indices| {
            let rows = indices.iter().filter_map(|&index| self.rows.get(index));
            self.loss.batch(&rows.collect::<Vec<_>>(), self.pad)
        });
        rows.collect()
    }

    /// Deals out the rows as the training will.
    fn deal(&self, sizes: Option<&PassSizes>, total: u64) -> anyhow::Result<Dealt> {
        let settings = self.settings;
        let grouping = settings.grouping(self.rows.len());
        let mut sampler = Sampler::new(settings.sampling, settings.data_seed, grouping);
        let mut dealt = Dealt::default();
        let steps = total.min(STEPS);
        for step in 0..steps {
            let batches = self.batches(&sampler.group(step).micro_batches)?;
            dealt.tokens += batches.iter().map(Batch::tokens).sum::<usize>() as u64;
            let mut done = 0;
            while let Some(rest) = batches.get(done..).filter(|rest| !rest.is_empty()) {
                let rest: Vec<&Batch> = rest.iter().collect();
                let (count, tokens) = match sizes {
                    Some(sizes) => {
                        let size = pass_size_of(
                            self.model.arch,
                            &rest,
                            self.packing,
                            sizes,
                            settings.checkpointing,
                        );
                        (size.micro_batches.max(1), size.tokens)
                    }
                    None => (1, rest[0].sequences.len() * rest[0].width),
                };
                let targets = rest.iter().take(count);
                let targets = targets.map(|batch| self.loss.targets(batch).len()).sum();
                dealt.longest.tokens = dealt.longest.tokens.max(tokens);
                dealt.longest.targets = dealt.longest.targets.max(targets);
                dealt.several |= done > 0;
                done += count;
            }
        }
        if steps > 0 {
            dealt.tokens =
                (u128::from(dealt.tokens) * u128::from(total) / u128::from(steps)) as u64;
        }
        Ok(dealt)
    }

    /// The longest pass of an evaluation.
    fn evaluated(&self) -> anyhow::Result<PassLength> {
        let mut longest = PassLength::default();
        let size = self.settings.eval_batch_size.max(1);
        for rows in self.eval_rows.chunks(size).take(STEPS as usize) {
            let batch = self
                .loss
                .batch(&rows.iter().collect::<Vec<_>>(), self.pad)?;
            longest.tokens = longest.tokens.max(batch.tokens());
            longest.targets = longest.targets.max(self.loss.targets(&batch).len());
        }
        Ok(longest)
    }

    /// What the rows come to and what the passes take, if products are computed in the type that `of` makes of the model's.
    fn passes(&self, of: impl Fn(DType) -> DType) -> anyhow::Result<(Dealt, PassMemory)> {
        let settings = self.settings;
        let sizes = |model: &Unloaded<'_>| {
            let Unloaded {
                arch,
                adapter,
                trained,
                compute,
                ..
            } = *model;
            PassSizes::of_files(arch, adapter, trained, of(compute), settings.dropout)
        };
        let own_sizes = sizes(&self.model);
        let dealt = self.deal(own_sizes.as_ref(), settings.total_steps(self.rows.len()))?;
        let pass = |of: &dyn Fn(&PassSizes) -> PassMemory| own_sizes.as_ref().map(of);
        let learning = pass(&|sizes| {
            sizes.learning(
                dealt.longest,
                settings.checkpointing,
                self.base_is_reference,
            )
        });
        let evaluated = self.evaluated()?;
        let scoring = pass(&|sizes| sizes.scoring(evaluated)).unwrap_or_default();
        let mut passes = learning.unwrap_or_default();
        if scoring.all() > passes.all() {
            passes = scoring;
        }
        if let Some(sizes) = self.reference.as_ref().and_then(sizes) {
            passes.working += sizes.scoring(dealt.longest).all();
        }
        Ok((dealt, passes))
    }

    /// What the training will take. `base` is what the process has already, in bytes, the rows included.
    ///
    /// # Errors
    /// The headers of the weights can't be read, or a row lacks an answer that the loss needs.
    pub fn estimate(&self, base: u64) -> anyhow::Result<Estimate> {
        let (model, settings) = (&self.model, self.settings);
        let total = settings.total_steps(self.rows.len());
        let (dealt, passes) = self.passes(|compute| compute)?;
        // The fast path of a device that is no processor has f16 too, and its buffers are the same.
        let of_device = |compute| match compute {
            DType::F16 => DType::F32,
            other => other,
        };
        let on_device = if model.compute == DType::F16 {
            self.passes(of_device)?.1
        } else {
            passes
        };
        let bytes = model.bytes(settings)?;
        let reference = match &self.reference {
            Some(reference) => reference.bytes(settings)?,
            None => ModelBytes::default(),
        };
        let float = size_of::<f32>();
        let weights = bytes.frozen + bytes.trained + reference.frozen + reference.adapter;
        let gradients = bytes.elements * float;
        let largest = bytes.largest * float;
        let optimizer = if settings.optimizer.is_held() {
            bytes.optimizer
        } else {
            0
        };
        let on_device = [
            (
                "weights",
                bytes.frozen + reference.frozen + reference.adapter,
            ),
            ("trained tensors", gradients),
            ("gradients", gradients),
            ("optimiser", optimizer),
            ("kept activations", on_device.kept),
            // What the head needs is given back before the layers' backward takes as much, and memory that is given back is taken again.
            ("working buffers", on_device.working.max(on_device.head)),
        ];
        let on_device = on_device.into_iter().filter(|(_, bytes)| *bytes > 0);
        let always = [
            ("base of the process", base as usize),
            ("weights", weights),
            ("adapter", bytes.adapter),
        ];
        let of_steps = [
            ("optimiser", bytes.optimizer),
            ("kept activations", passes.kept),
            ("working buffers", passes.working),
            ("head", passes.head),
        ];
        // A gradient of a further pass before it is added, or value and gradient of the largest tensor while it is updated.
        let several = if dealt.several { 3 } else { 2 };
        let step = [("gradients", gradients), ("copies", several * largest)];
        // Moments once more, and then parameters and moments in the form of the file.
        let checkpoint = bytes.elements * float + 2 * bytes.optimizer;
        let saves = total > settings.save_every || keeps_state(settings, total);
        let checkpoint = [("copies", if saves { checkpoint } else { 0 })];
        let loading = [("copies", bytes.reading)];
        let moments: [Vec<(&'static str, usize)>; 3] = [
            [&always[..], &of_steps, &step].concat(),
            [&always[..], &of_steps, &checkpoint].concat(),
            [&always[..], &loading].concat(),
        ];
        let sum = |parts: &[(&str, usize)]| parts.iter().map(|(_, bytes)| *bytes as u64).sum();
        let highest = moments.iter().max_by_key(|parts| -> u64 { sum(parts) });
        let parts = highest.map(Vec::as_slice).unwrap_or_default();
        let peak = sum(parts);
        let memory = parts.iter().filter(|(_, bytes)| *bytes > 0);
        Ok(Estimate {
            trained_parameters: bytes.elements as u64,
            steps: total,
            tokens: dealt.tokens,
            longest_pass: dealt.longest.tokens as u64,
            memory: memory.map(|(part, bytes)| (*part, *bytes as u64)).collect(),
            peak,
            on_device: on_device
                .map(|(part, bytes)| (part, bytes as u64))
                .collect(),
        })
    }

    /// Whether the training runs the fast way, whose memory is known; the reference path takes more than is estimated.
    pub fn is_known(&self) -> bool {
        let Unloaded {
            arch,
            adapter,
            trained,
            compute,
            ..
        } = self.model;
        PassSizes::of_files(arch, adapter, trained, compute, self.settings.dropout).is_some()
    }
}
