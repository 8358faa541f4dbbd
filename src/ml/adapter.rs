//! LoRA adapters in PEFT's folder layout: `adapter_config.json` and `adapter_model.safetensors`.

mod config;
mod ends;
mod patterns;
mod targets;
mod token_rows;

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use candle_core::{Device, Tensor};
pub use config::{AdapterConfig, Bias, Names, NewAdapter, names_module};
pub use patterns::Patterns;
pub use targets::{ALL_LINEAR, DEFAULT_TARGETS, Selection};
pub use token_rows::{DELTA, TokenRows};

use super::io::finite;
use super::io::weights::{self, Weights};
use super::model::arch::Projection;
use super::model::tensors::{EMBED_TOKENS, ENDS, SCORE, is_plausible, projection_path};

/// The prefix that PEFT gives to every tensor name.
const PREFIX: &str = "base_model.model.";
/// The file of an adapter's tensors.
pub const FILE: &str = "adapter_model.safetensors";
/// The file of an adapter's settings.
pub const CONFIG: &str = "adapter_config.json";

/// The suffixes that the names of an adapter's tensors add to the path of their module.
const A: &str = ".lora_A.weight";
const B: &str = ".lora_B.weight";
const MAGNITUDE: &str = ".lora_magnitude_vector";
/// Like [`A`], for embeddings. Their matrices are transposed: B A is added to the transpose of the weight.
const ROWS_A: &str = ".lora_embedding_A";
const ROWS_B: &str = ".lora_embedding_B";

/// The two LoRA matrices of a projection, of the head or of the embeddings (Hu et al. 2021, arXiv 2106.09685).
#[derive(Debug, Clone)]
pub struct LoraPair {
    /// The matrix A (r, in).
    pub a: Tensor,
    /// The matrix B (out, r).
    pub b: Tensor,
    /// `DoRA`'s trained norms (out) of the rows of W + s B A (Liu et al. 2024, arXiv 2402.09353, equation 5), if it is used.
    pub magnitude: Option<Tensor>,
}

/// A LoRA adapter.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// Its settings.
    pub config: AdapterConfig,
    /// Its pairs, by the path of their module (`model.layers.0.self_attn.q_proj`).
    pub tensors: BTreeMap<String, LoraPair>,
    /// The tensors that replace those of the model with the same names (`lm_head.weight`): fully trained modules, and biases.
    pub saved: BTreeMap<String, Tensor>,
    /// The rows of embeddings and head that replace those of some tokens, by the path of their module.
    pub token_rows: BTreeMap<String, TokenRows>,
}

impl Adapter {
    /// Reads an adapter folder. Errors name the folder.
    ///
    /// # Errors
    /// A file is missing or damaged, a setting is not supported, or settings and tensors contradict each other.
    pub fn load(folder: &Path) -> anyhow::Result<Self> {
        let adapter = Self::read(folder);
        adapter.with_context(|| format!("could not load the adapter `{}`", folder.display()))
    }

    /// Like [`Adapter::load`], with errors that don't name the folder, for callers who have a better name for it.
    ///
    /// # Errors
    /// As [`Adapter::load`].
    pub fn read(folder: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read(folder.join(CONFIG))
            .with_context(|| format!("could not read `{CONFIG}`"))?;
        let config = AdapterConfig::read(&text);
        let config = config.with_context(|| format!("could not use `{CONFIG}`"))?;
        let weights = Weights::open_file(&folder.join(FILE))?;
        if let Some(found) = finite::find(&weights)? {
            bail!("{found}; the adapter may have diverged in its training");
        }
        let mut adapter = Self {
            config,
            tensors: BTreeMap::new(),
            saved: BTreeMap::new(),
            token_rows: BTreeMap::new(),
        };
        adapter.take(&weights)?;
        adapter.check()?;
        Ok(adapter)
    }

    /// Fails if settings and tensors contradict each other.
    fn check(&self) -> anyhow::Result<()> {
        for (path, pair) in &self.tensors {
            ensure!(
                !self.config.saves(path),
                "the module `{path}` has LoRA matrices, and `modules_to_save` means it too"
            );
            // PEFT goes by the settings and would ignore these tensors without an error.
            let tied = self.config.ensure_weight_tying && ENDS.contains(&path.as_str());
            ensure!(
                tied || self.config.targets.selection(path) == Selection::Yes,
                "`{FILE}` has matrices for `{path}`, which `{CONFIG}` does not mean ({}), so that PEFT leaves them out; \
                 expected settings and matrices of the same modules",
                self.config.targets.description()
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
        for path in self.token_rows.keys() {
            ensure!(
                !self.config.saves(path) && !self.tensors.contains_key(path),
                "`trainable_token_indices` means `{path}`, which {} too; expected one of both",
                if self.config.saves(path) {
                    "`modules_to_save` means"
                } else {
                    "has LoRA matrices,"
                }
            );
        }
        if let Some(ids) = self.config.token_ids(EMBED_TOKENS) {
            ensure!(
                self.token_rows.contains_key(EMBED_TOKENS),
                "`trainable_token_indices` means {} tokens, but `{FILE}` has no rows of them",
                ids.len()
            );
        }
        for name in &self.config.modules_to_save {
            // PEFT adds both names of a head to those of every sequence classification, which has one of them.
            if self.config.is_classifier()
                && ["classifier", "score"].contains(&name.as_str())
                && self.saved.contains_key(SCORE)
            {
                continue;
            }
            let path = |tensor: &str| tensor.rsplit_once('.').map_or(0, |(path, _)| path.len());
            let found = self
                .saved
                .keys()
                .any(|tensor| names_module(name, &tensor[..path(tensor)]));
            ensure!(
                found,
                "`modules_to_save` names `{name}`, but `{FILE}` has no tensor of it"
            );
        }
        ensure!(!self.tensors.is_empty(), "`{FILE}` has no LoRA matrices");
        Ok(())
    }

    /// Whether it consists of LoRA pairs of the layers' projections alone.
    pub fn is_lora_only(&self) -> bool {
        let ends = ENDS.iter().any(|path| self.tensors.contains_key(*path));
        !self.config.use_dora && self.saved.is_empty() && self.token_rows.is_empty() && !ends
    }

    /// Whether a training of the adapter trains the tensor called `name` of the model, which the adapter replaces.
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

    /// Writes an adapter folder. The same adapter always gives the same bytes.
    ///
    /// # Errors
    /// A file can't be written.
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
        for (path, rows) in &self.token_rows {
            tensors.insert(format!("{PREFIX}{path}{DELTA}"), rows.values.clone());
        }
        for (name, tensor) in &self.saved {
            // PEFT wraps a module that has matrices or rows; the module's own tensors are in the wrapped one.
            let name = match name.rsplit_once('.') {
                Some((path, kind)) if self.token_rows.contains_key(path) => {
                    format!("{path}{}.{kind}", token_rows::BASE)
                }
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

impl Adapter {
    /// Sorts the tensors of a file into pairs, rows and replacements.
    fn take(&mut self, weights: &Weights) -> anyhow::Result<()> {
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
                self.tensors
                    .insert(path.to_owned(), pair(weights, name, path, &self.config)?);
            } else if let Some(path) = own.strip_suffix(ROWS_A) {
                self.tensors
                    .insert(path.to_owned(), rows(weights, name, path, &self.config)?);
            } else if let Some(path) = own.strip_suffix(DELTA) {
                let rows = token_rows(weights, name, path, &self.config)?;
                self.token_rows.insert(path.to_owned(), rows);
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
            } else if !own.contains("lora_") && (own.ends_with(".weight") || own.ends_with(".bias"))
            {
                let tensor = weights.tensor(name, &Device::Cpu)?;
                ensure!(
                    tensor.dtype().is_float(),
                    "the tensor `{name}` has no floats"
                );
                // PEFT also saves the base's embeddings and head if they have matrices.
                let wrapped = own.replace(&format!("{}.", token_rows::BASE), ".");
                let wrapped = wrapped.replace(".base_layer.", ".");
                let path = wrapped.rsplit_once('.').map_or("", |(path, _)| path);
                let known = own == wrapped || own.ends_with(".bias") || ENDS.contains(&path);
                ensure!(
                    known,
                    "the tensor `{name}` is no LoRA matrix, weight or bias"
                );
                if own == wrapped && own.ends_with(".weight") {
                    plain.push(path.to_owned());
                }
                self.saved.insert(wrapped, tensor);
            } else {
                bail!("the tensor `{name}` is no LoRA matrix, weight or bias");
            }
        }
        for path in plain {
            ensure!(
                !self.tensors.contains_key(&path),
                "the module `{path}` has both LoRA matrices and a weight of its own"
            );
        }
        Ok(())
    }
}

/// Reads the rows of some tokens.
fn token_rows(
    weights: &Weights,
    name: &str,
    path: &str,
    config: &AdapterConfig,
) -> anyhow::Result<TokenRows> {
    ensure!(
        ENDS.contains(&path),
        "the tensor `{name}` holds rows of tokens, which `{path}` does not have"
    );
    let values = weights.tensor(name, &Device::Cpu)?;
    // PEFT writes those of a head that follows the embeddings, too, where it writes the embeddings.
    let ids = config
        .token_ids(path)
        .or_else(|| config.token_ids(EMBED_TOKENS));
    let ids = ids.with_context(|| {
        format!("the tensor `{name}` holds rows of tokens, and `trainable_token_indices` does not say which")
    })?;
    let fits = matches!(values.dims(), [rows, _] if *rows == ids.len());
    ensure!(
        values.dtype().is_float() && fits,
        "the tensor `{name}` has the shape {:?}, expected floats with {} rows as in `trainable_token_indices`",
        values.dims(),
        ids.len()
    );
    Ok(TokenRows {
        ids: ids.to_vec(),
        values,
    })
}

/// Reads the pair of embeddings, whose file has A (r, vocabulary) and B (hidden, r), and transposes it.
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
    // This is checked before the settings, because no other pair would use these magnitudes, and they would be reported as unknown.
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

/// The name of the tensor of `DoRA`'s magnitudes of a module, if there is one.
fn magnitude_name(weights: &Weights, stem: &str) -> Option<String> {
    // Inside PEFT it is the weight of a module, and some programs write it so.
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

/// Reads two tensors of floating-point values.
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
