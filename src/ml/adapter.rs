//! LoRA adapters in PEFT's folder layout: `adapter_config.json` and `adapter_model.safetensors`.

mod config;
mod ends;
mod patterns;
mod targets;

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use candle_core::{Device, Tensor};
pub use config::{AdapterConfig, Bias, Names, NewAdapter, is_meant};
pub use patterns::Patterns;
pub use targets::{ALL_LINEAR, DEFAULT_TARGETS, Meant};

use super::io::finite;
use super::io::weights::{self, Weights};
use super::model::arch::Projection;
use super::model::tensors::{EMBED_TOKENS, ENDS, is_plausible, projection_path};

/// PEFT's prefix of every tensor name.
const PREFIX: &str = "base_model.model.";
/// The adapter's tensors.
pub const FILE: &str = "adapter_model.safetensors";
/// The adapter's settings.
pub const CONFIG: &str = "adapter_config.json";

/// Behind a module's path, the names of what stands beside it.
const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";
const MAGNITUDE: &str = ".lora_magnitude_vector";
/// The same of embeddings, whose rows are looked up: transposed, B A is added to the weight's transpose.
const ROWS_A: &str = ".lora_embedding_A";
const ROWS_B: &str = ".lora_embedding_B";

/// The two matrices beside one projection, beside the head, or beside the embeddings, whose own are transposed in the file.
#[derive(Debug, Clone)]
pub struct LoraPair {
    /// A, (r, in).
    pub a: Tensor,
    /// B, (out, r).
    pub b: Tensor,
    /// The norms of the rows of W + s B A (out), where they are trained (`DoRA`).
    pub magnitude: Option<Tensor>,
}

/// An adapter: pairs by module path (`model.layers.0.self_attn.q_proj`).
#[derive(Debug, Clone)]
pub struct Adapter {
    /// Its settings.
    pub config: AdapterConfig,
    /// Its pairs.
    pub tensors: BTreeMap<String, LoraPair>,
    /// What it puts in the place of the model's tensors, by their names (`lm_head.weight`): modules that are trained whole, and
    /// biases.
    pub saved: BTreeMap<String, Tensor>,
}

impl Adapter {
    /// Reads an adapter folder.
    pub fn load(folder: &Path) -> anyhow::Result<Self> {
        let adapter = Self::read(folder);
        adapter.with_context(|| format!("could not load the adapter `{}`", folder.display()))
    }

    /// The same, for callers who have a better name for the folder in their errors.
    pub fn read(folder: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read(folder.join(CONFIG))
            .with_context(|| format!("could not read `{CONFIG}`"))?;
        let config = AdapterConfig::read(&text);
        let config = config.with_context(|| format!("could not use `{CONFIG}`"))?;
        let weights = Weights::open_file(&folder.join(FILE))?;
        if let Some(found) = finite::find(&weights)? {
            bail!("{found}; the adapter may have diverged in its training");
        }
        let (tensors, saved) = tensors(&weights, &config)?;
        let adapter = Self {
            config,
            tensors,
            saved,
        };
        adapter.check()?;
        Ok(adapter)
    }

    /// Settings and tensors have to tell the same.
    fn check(&self) -> anyhow::Result<()> {
        for (path, pair) in &self.tensors {
            ensure!(
                !self.config.saves(path),
                "the module `{path}` has LoRA matrices, and `modules_to_save` means it too"
            );
            // PEFT goes by the settings, and would leave these out without an error.
            let tied = self.config.ensure_weight_tying && ENDS.contains(&path.as_str());
            ensure!(
                tied || self.config.targets.mean(path) == Meant::Yes,
                "`{FILE}` has matrices for `{path}`, which `{CONFIG}` does not mean ({}), so that PEFT leaves them out; \
                 expected settings and matrices of the same modules",
                self.config.targets.told()
            );
            ensure!(
                !self.config.use_dora || !ENDS.contains(&path.as_str()),
                no_dora(path)
            );
            let says = if self.config.use_dora {
                "true"
            } else {
                "false"
            };
            ensure!(
                pair.magnitude.is_some() == self.config.use_dora,
                "`use_dora` is {says}, but `{path}` {} a `lora_magnitude_vector`",
                if self.config.use_dora { "lacks" } else { "has" }
            );
        }
        for name in &self.config.modules_to_save {
            let path = |tensor: &str| tensor.rsplit_once('.').map_or(0, |(path, _)| path.len());
            let found = self
                .saved
                .keys()
                .any(|tensor| is_meant(name, &tensor[..path(tensor)]));
            ensure!(
                found,
                "`modules_to_save` names `{name}`, but `{FILE}` has no tensor of it"
            );
        }
        ensure!(!self.tensors.is_empty(), "`{FILE}` has no LoRA matrices");
        Ok(())
    }

    /// Whether it is made of LoRA pairs beside projections of the layers alone.
    pub fn is_lora_only(&self) -> bool {
        let ends = ENDS.iter().any(|path| self.tensors.contains_key(*path));
        !self.config.use_dora && self.saved.is_empty() && !ends
    }

    /// Whether a tensor of the model, in whose place the adapter has its own, is trained in a training of the adapter.
    pub fn trains(&self, name: &str) -> bool {
        match name.rsplit_once('.') {
            Some((path, "bias")) if !self.config.saves(path) => match self.config.bias {
                Bias::None => false,
                Bias::All => true,
                Bias::LoraOnly => self.tensors.contains_key(path),
            },
            Some((path, _)) => self.config.saves(path),
            None => false,
        }
    }

    /// Writes an adapter folder; the same adapter makes the same bytes.
    pub fn save(&self, folder: &Path) -> anyhow::Result<()> {
        std::fs::write(folder.join(CONFIG), self.config.json()?)
            .with_context(|| format!("could not write `{CONFIG}` to `{}`", folder.display()))?;
        let mut tensors = BTreeMap::new();
        for (path, pair) in &self.tensors {
            if path == EMBED_TOKENS {
                let transposed = |tensor: &Tensor| tensor.t()?.contiguous();
                tensors.insert(format!("{PREFIX}{path}{ROWS_A}"), transposed(&pair.b)?);
                tensors.insert(format!("{PREFIX}{path}{ROWS_B}"), transposed(&pair.a)?);
                continue;
            }
            tensors.insert(format!("{PREFIX}{path}{A}"), pair.a.clone());
            tensors.insert(format!("{PREFIX}{path}{B}"), pair.b.clone());
            if let Some(magnitude) = &pair.magnitude {
                tensors.insert(format!("{PREFIX}{path}{MAGNITUDE}"), magnitude.clone());
            }
        }
        for (name, tensor) in &self.saved {
            // PEFT wraps a module that gets matrices; its own tensors are in the wrapped one.
            let name = match name.rsplit_once('.') {
                Some((path, kind)) if self.tensors.contains_key(path) => {
                    format!("{path}.base_layer.{kind}")
                }
                _ => name.clone(),
            };
            tensors.insert(format!("{PREFIX}{name}"), tensor.clone());
        }
        weights::save(&folder.join(FILE), &tensors, &[("format", "pt")])
    }
}

type Tensors = (BTreeMap<String, LoraPair>, BTreeMap<String, Tensor>);

/// The tensors of a file by what they are for.
fn tensors(weights: &Weights, config: &AdapterConfig) -> anyhow::Result<Tensors> {
    let (mut pairs, mut saved) = (BTreeMap::new(), BTreeMap::new());
    let mut plain = Vec::new();
    for name in weights.names() {
        let own = name.strip_prefix(PREFIX).unwrap_or(name);
        ensure!(
            is_plausible(own),
            "`{name}` belongs to no module of a causal language model; expected a name such as `{PREFIX}{}{A}`, as PEFT gives it to an \
             adapter of a whole one (`LlamaForCausalLM`)",
            projection_path(0, Projection::Q)
        );
        if let Some(path) = own.strip_suffix(A) {
            pairs.insert(path.to_owned(), pair(weights, name, path, config)?);
        } else if let Some(path) = own.strip_suffix(ROWS_A) {
            pairs.insert(path.to_owned(), rows(weights, name, path, config)?);
        } else if [".lora_A.", ".lora_B.", MAGNITUDE, ROWS_B]
            .iter()
            .any(|part| own.contains(part))
        {
            let (path, part) = own.split_once(".lora_").unwrap_or_default();
            let beside = if part.starts_with("embedding") {
                ROWS_A
            } else {
                A
            };
            let a = format!("{}{path}{beside}", &name[..name.len() - own.len()]);
            ensure!(weights.contains(&a), "`{name}` has no `{a}` beside it");
        } else if !own.contains("lora_") && (own.ends_with(".weight") || own.ends_with(".bias")) {
            let tensor = weights.tensor(name, &Device::Cpu)?;
            ensure!(
                tensor.dtype().is_float(),
                "the tensor `{name}` has no floats"
            );
            // PEFT saves the base's embeddings and head with matrices beside them.
            let wrapped = own.replace(".base_layer.", ".");
            let path = wrapped.rsplit_once('.').map_or("", |(path, _)| path);
            let known = own == wrapped || own.ends_with(".bias") || ENDS.contains(&path);
            ensure!(
                known,
                "the tensor `{name}` is no LoRA matrix, weight or bias"
            );
            if own == wrapped && own.ends_with(".weight") {
                plain.push(path.to_owned());
            }
            saved.insert(wrapped, tensor);
        } else {
            bail!("the tensor `{name}` is no LoRA matrix, weight or bias");
        }
    }
    for path in plain {
        ensure!(
            !pairs.contains_key(&path),
            "the module `{path}` has both LoRA matrices and a weight of its own"
        );
    }
    Ok((pairs, saved))
}

/// The pair of embeddings: A (r, vocabulary) and B (hidden, r), transposed.
fn rows(
    weights: &Weights,
    name: &str,
    path: &str,
    config: &AdapterConfig,
) -> anyhow::Result<LoraPair> {
    ensure!(
        path == EMBED_TOKENS,
        "the tensor `{name}` is a LoRA matrix of embeddings, which `{path}` are not"
    );
    let stem = name.strip_suffix(ROWS_A).unwrap_or(name);
    // Looked at before the settings: these magnitudes belong to no other pair, and would be taken for strays.
    ensure!(magnitude_name(weights, stem).is_none(), no_dora(path));
    let (b, a) = two(weights, [name, &format!("{stem}{ROWS_B}")])?;
    let pair = LoraPair {
        a: a.t()?.contiguous()?,
        b: b.t()?.contiguous()?,
        magnitude: None,
    };
    has_rank(&pair, path, config)?;
    Ok(pair)
}

/// The tensor of `DoRA`'s magnitudes beside a module's matrices, if it is there.
fn magnitude_name(weights: &Weights, stem: &str) -> Option<String> {
    // Inside PEFT it is a layer's weight, and some programs write it so.
    let names = [MAGNITUDE.to_owned(), format!("{MAGNITUDE}.weight")];
    let mut names = names.map(|suffix| format!("{stem}{suffix}")).into_iter();
    names.find(|name| weights.contains(name))
}

fn no_dora(path: &str) -> String {
    format!(
        "`use_dora` beside `{path}` is not supported; expected it beside projections of the layers, or the adapter merged by PEFT's \
         `merge_and_unload`"
    )
}

/// Two tensors of floats that stand beside each other.
fn two(weights: &Weights, names: [&str; 2]) -> anyhow::Result<(Tensor, Tensor)> {
    let [first, second] = names.map(|name| -> anyhow::Result<Tensor> {
        ensure!(
            weights.contains(name),
            "`{}` has no `{name}` beside it",
            names[0]
        );
        let tensor = weights.tensor(name, &Device::Cpu)?;
        ensure!(
            tensor.dtype().is_float() && tensor.rank() == 2,
            "`{name}` is no matrix of floats"
        );
        Ok(tensor)
    });
    Ok((first?, second?))
}

fn has_rank(pair: &LoraPair, path: &str, config: &AdapterConfig) -> anyhow::Result<()> {
    let (a, b, r) = (&pair.a, &pair.b, config.rank(path));
    ensure!(
        matches!((a.dims(), b.dims()), ([rank, _], [_, also]) if *rank == r && *also == r),
        "the matrices of `{path}` have the shapes {:?} and {:?}, expected the rank {r} of `{CONFIG}`",
        a.dims(),
        b.dims()
    );
    Ok(())
}

fn pair(
    weights: &Weights,
    name: &str,
    path: &str,
    config: &AdapterConfig,
) -> anyhow::Result<LoraPair> {
    let stem = name.strip_suffix(A).unwrap_or(name);
    ensure!(
        path != EMBED_TOKENS,
        "the tensor `{name}` is no LoRA matrix of embeddings"
    );
    let (a, b) = two(weights, [name, &format!("{stem}{B}")])?;
    let magnitude = magnitude_name(weights, stem).map(|name| -> anyhow::Result<Tensor> {
        let tensor = weights.tensor(&name, &Device::Cpu)?.flatten_all()?;
        ensure!(
            tensor.dtype().is_float() && tensor.dim(0)? == b.dim(0)?,
            "`{name}` has {} values, expected {} floats",
            tensor.elem_count(),
            b.dim(0)?
        );
        Ok(tensor)
    });
    let pair = LoraPair {
        a,
        b,
        magnitude: magnitude.transpose()?,
    };
    has_rank(&pair, path, config)?;
    Ok(pair)
}

#[cfg(test)]
mod tests;
