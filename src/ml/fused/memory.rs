//! How much memory a pass takes: what it keeps for its backward, and the buffers that it works with beside that.
//!
//! The buffers are those of [`super::layer`] and [`super::head`], counted where most of them are in use at a time. They stay in the pool from
//! pass to pass, so the longest pass decides.

use candle_core::DType;
use pipeline_kernels::panels::size;

use super::head;
use crate::ml::adapter::Adapter;
use crate::ml::model::arch::{Arch, NormPlaces, QkNorm};
use crate::ml::model::linear::Pass;
use crate::ml::model::tensors::{EMBED_TOKENS, EMBEDDINGS, layer_path, projection_path};
use crate::ml::model::{self, CausalLm, Trained};

/// What of a model decides how much memory a pass takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PassSizes {
    hidden: usize,
    inner: usize,
    /// Features of all query heads, and of all key heads.
    queries: usize,
    keys: usize,
    heads: usize,
    vocabulary: usize,
    /// Of each layer that a backward goes through, the ranks of its pairs together.
    ranks: Vec<usize>,
    /// Whether products are in bf16, the adapter drops inputs, and queries and keys have norms.
    half: bool,
    drops: bool,
    head_norms: bool,
    /// The norms after a layer's blocks, and whether there are norms before them.
    norms_after: usize,
    norms_before: bool,
    /// Whether projections are fused.
    fused: bool,
    /// Whether the adapter is a `DoRA`.
    dora: bool,
}

/// The bytes of a pass.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PassMemory {
    /// What is kept for the backward.
    pub kept: usize,
    /// Buffers of the layer at work.
    pub working: usize,
    /// Logits, and what belongs to the scored tokens.
    pub head: usize,
}

impl PassMemory {
    /// All together.
    pub fn all(&self) -> usize {
        self.kept + self.working + self.head
    }
}

/// A pass, as far as its memory goes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PassLength {
    /// Tokens computed.
    pub tokens: usize,
    /// Targets, and the tokens that they are predicted from.
    pub targets: usize,
}

/// Bytes that a pass through a model keeps of each token for its backward.
pub(super) fn saved_bytes(model: &CausalLm, checkpointing: bool) -> usize {
    PassSizes::of_model(model).saved_bytes(checkpointing)
}

impl PassSizes {
    fn new(arch: &Arch, compute: DType, ranks: Vec<usize>, drops: bool) -> Self {
        Self {
            hidden: arch.hidden_size,
            inner: arch.intermediate_size,
            queries: arch.num_attention_heads * arch.head_dim,
            keys: arch.num_key_value_heads * arch.head_dim,
            heads: arch.num_attention_heads,
            vocabulary: arch.head_rows(),
            ranks,
            half: compute == DType::BF16,
            drops,
            head_norms: arch.qk_norm != QkNorm::None,
            norms_after: match arch.norm_places {
                NormPlaces::Before => 0,
                NormPlaces::After | NormPlaces::Both => 2,
            },
            norms_before: arch.norm_places != NormPlaces::After,
            fused: arch.fused_projections,
            dora: false,
        }
    }

    /// Those of a model in memory.
    fn of_model(model: &CausalLm) -> Self {
        let layers = model.layers.get(super::lowest(model)..).unwrap_or_default();
        let ranks = |layer: &model::Layer| {
            let linears = layer.linears().into_iter();
            let pairs = linears.filter_map(|linear| linear.lora.as_ref());
            let ranks = pairs.filter_map(|pair| pair.a.stored(Pass::INFER).dims().first());
            ranks.sum::<usize>()
        };
        let ranks = layers.iter().map(ranks).collect();
        let linears = model.layers.iter().flat_map(model::Layer::linears);
        let mut pairs = linears.filter_map(|linear| linear.lora.as_ref());
        Self {
            dora: pairs.any(|pair| pair.magnitude.is_some()),
            ..Self::new(&model.arch, model.compute, ranks, false)
        }
    }

    /// Those of a model that is not loaded, with its adapter if it has one. None where the fast path lacks something.
    pub fn of_files(
        arch: &Arch,
        adapter: Option<&Adapter>,
        trained: Trained,
        compute: DType,
        dropout: bool,
    ) -> Option<Self> {
        let has_pairs_at_ends = adapter.is_some_and(|adapter| {
            let ends = crate::ml::model::tensors::ENDS;
            ends.iter().any(|path| adapter.tensors.contains_key(*path))
        });
        if !matches!(compute, DType::F32 | DType::BF16) || has_pairs_at_ends {
            return None;
        }
        let rank = |layer: usize| {
            let pairs = arch.projections().iter().filter_map(|projection| {
                let path = projection_path(layer, *projection);
                adapter?.tensors.get(&path)?.a.dims().first().copied()
            });
            pairs.sum::<usize>()
        };
        let count = arch.num_hidden_layers();
        let saves = |layer: usize| {
            let below = format!("{}.", layer_path(layer));
            let mut saved = adapter.iter().flat_map(|adapter| adapter.saved.keys());
            saved.any(|name| name.starts_with(&below))
        };
        let embeds = adapter.is_some_and(|adapter| {
            adapter.trains(EMBEDDINGS) || adapter.token_rows.contains_key(EMBED_TOKENS)
        });
        let lowest = if trained == Trained::Everything || embeds {
            0
        } else {
            let is_trained = |layer: &usize| rank(*layer) > 0 || saves(*layer);
            (0..count).find(is_trained).unwrap_or(count)
        };
        let drops = dropout && adapter.is_some_and(|adapter| adapter.config.lora_dropout > 0.);
        let ranks = (lowest..count).map(rank).collect();
        Some(Self {
            dora: adapter.is_some_and(|adapter| adapter.config.use_dora),
            ..Self::new(arch, compute, ranks, drops)
        })
    }

    /// Whether each copy of a prompt drops values of its own, so that none are shared.
    pub(super) fn drops(&self) -> bool {
        self.drops
    }

    /// Floats that a layer keeps of each token: see [`super::layer::Saved`].
    fn saved(&self, rank: usize) -> usize {
        let hidden = (2 + self.norms_after) * self.hidden;
        hidden + 2 * (self.queries + self.keys + self.inner) + rank
    }

    /// Bytes that a pass keeps of each token for its backward.
    pub(super) fn saved_bytes(&self, checkpointing: bool) -> usize {
        let all = self.ranks.iter().map(|rank| self.saved(*rank));
        let floats = if checkpointing {
            self.hidden * self.ranks.len() + all.max().unwrap_or(0)
        } else {
            all.sum()
        };
        floats * size_of::<f32>()
    }

    /// The results of fused projections before they are split, and their gradients after they are joined.
    fn joined(&self) -> usize {
        let (qkv, gate_up) = (self.queries + 2 * self.keys, 2 * self.inner);
        let (larger, smaller) = (qkv.max(gate_up), qkv.min(gate_up));
        if !self.fused {
            0
        } else if 2 * smaller >= larger {
            larger // the smaller ones find room in the buffer of the larger ones
        } else {
            larger + smaller
        }
    }

    /// The memory of a pass with a backward, and with `beside_base` of a pass of the base alone beside it.
    pub fn learning(&self, pass: PassLength, checkpointing: bool, beside_base: bool) -> PassMemory {
        // The norms' factors and the attention's sums of each layer.
        let small = if checkpointing { 1 } else { self.ranks.len() } * (2 + self.heads);
        let norms = if self.head_norms {
            self.queries + self.keys
        } else {
            0
        };
        let (h, i, q, k) = (self.hidden, self.inner, self.queries, self.keys);
        // The last and the final hidden states, the gradient of the former, two behind norms less the one that is given back by then;
        // one of the gated unit; and the gradients of attention.
        let mut working = 4 * h + i + 2 * q + 2 * k + norms + small;
        if beside_base {
            // The base's hidden states. What else its layers need goes back before the same layer of the model itself.
            working += h;
        }
        if self.drops {
            working += 3 * h;
        }
        if !self.norms_before {
            working -= h;
        }
        working += self.joined();
        if self.dora {
            // The gradients of gate and up as it scales them; what it scales of one of them finds room in what the attention takes later.
            working += 2 * i;
        }
        if self.half {
            // As factors: gate and up, an input, queries, keys and values.
            working += (2 * i + h + q + 2 * k) / 2;
        }
        PassMemory {
            kept: self.saved_bytes(checkpointing) * size(1, pass.tokens),
            working: working * size(1, pass.tokens) * size_of::<f32>(),
            head: self.head(pass, true),
        }
    }

    /// The memory of a pass without a backward.
    pub fn scoring(&self, pass: PassLength) -> PassMemory {
        let rank = self.ranks.iter().max().copied().unwrap_or(0);
        let half = if self.half { self.inner / 2 } else { 0 };
        let scaled = if self.dora { self.inner } else { 0 };
        let working =
            self.saved(rank) + 2 * self.hidden + self.inner + half + scaled + self.joined();
        PassMemory {
            kept: 0,
            working: working * size(1, pass.tokens) * size_of::<f32>(),
            head: self.head(pass, false),
        }
    }

    fn head(&self, pass: PassLength, gradient: bool) -> usize {
        let tokens = pass.targets.min(pass.tokens);
        let logits = head::logits_at_once(self.vocabulary, tokens);
        let mut floats = logits;
        if 2 * tokens <= pass.tokens {
            // Hidden states of these tokens, and the expected rows of the head. Longer ones find room in the layers' buffers.
            floats += 2 * self.hidden * size(1, tokens);
        }
        if gradient {
            // The head's rows at the targets, twice.
            floats += 2 * self.hidden * pass.targets;
        }
        if self.half {
            // As factors, two values in the place of one.
            floats += logits / 2 + self.hidden * size(1, tokens) / 2;
        }
        floats * size_of::<f32>()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::dora;
    use super::super::{Fused, Packing};
    use super::*;
    use crate::ml::backend::Backend as _;
    use crate::ml::loss::Loss as _;
    use crate::ml::loss::orpo::Orpo;
    use crate::ml::model::Gradients;
    use crate::ml::testing::golden;

    /// After a step the pool holds what was estimated, but for a tenth: so a buffer that is added there has to be counted here.
    #[test]
    fn the_pool_holds_what_is_estimated() {
        let rows = golden::rows("trl-1.16");
        let rows: Vec<_> = rows.iter().take(12).collect();
        let loss = Orpo { beta: 0.1 };
        let batch = loss.batch(&rows, 1023).unwrap();
        let targets = loss.targets(&batch);
        let (folder, adapter) = (golden::folder("model"), golden::folder("adapter_init"));
        let arch = Arch::read(&folder).unwrap();
        let plain = Adapter::load(&adapter).unwrap();
        let scaled = dora::adapter(0.);
        let cases = [DType::F32, DType::BF16].into_iter().flat_map(|compute| {
            [false, true].into_iter().flat_map(move |checkpointing| {
                let both = [(false, false), (true, false), (false, true)];
                both.map(|(beside_base, dora)| (compute, checkpointing, beside_base, dora))
            })
        });
        for (compute, checkpointing, beside_base, dora) in cases {
            let trained = Trained::Adapter;
            let (model, adapter) = if dora {
                (dora::model("model", 0., trained, compute), &scaled)
            } else {
                let model = golden::model("model", Some("adapter_init"), trained, compute);
                (model, &plain)
            };
            let fused = Fused::new(&model, Packing::default()).unwrap();
            let pass = Pass::train(None);
            let mut forward = if beside_base {
                let both = fused.forward_beside_base(&[&batch], pass, checkpointing);
                let mut both = both.unwrap().unwrap();
                both.base.score(&targets, false).unwrap();
                both.adapted
            } else {
                fused.forward(&[&batch], pass, checkpointing).unwrap()
            };
            forward.score(&targets, false).unwrap();
            let mut gradients = Gradients::none(&model);
            let grad_logps = vec![0.1; targets.len()];
            forward.backward(&grad_logps, &mut gradients).unwrap();
            let sizes = PassSizes::of_files(&arch, Some(adapter), trained, compute, false);
            let sizes = sizes.unwrap();
            assert_eq!(sizes, PassSizes::of_model(&model));
            let length = PassLength {
                tokens: Packing::default().tokens(&[&batch]),
                targets: targets.len(),
            };
            let estimate = sizes.learning(length, checkpointing, beside_base).all();
            // The head's rows at the targets are no buffers of the pool.
            let at_targets = 2 * targets.len() * arch.hidden_size * size_of::<f32>();
            let ratio = (estimate - at_targets) as f64 / fused.device.pool.bytes() as f64;
            assert!(
                (0.9..1.1).contains(&ratio),
                "{compute:?}, checkpointing {checkpointing}, beside {beside_base}, DoRA {dora}: {ratio}"
            );
        }
    }
}
