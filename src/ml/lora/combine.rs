//! Several adapters as one, by the methods of PEFT's `add_weighted_adapter` (`peft/tuners/lora/model.py`, `peft/utils/merge_utils.py`): TIES
//! (Yadav et al. 2023, arXiv 2306.01708), DARE (Yu et al. 2023, arXiv 2311.03099), and simpler ones.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, bail, ensure};
use candle_core::{Device, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::svd;
use crate::ml::adapter::{Adapter, AdapterConfig, LoraPair, Names, NewAdapter, Selection};
use crate::ml::model::arch::Arch;
use crate::ml::model::tensors::modules;
use crate::ml::torch_rng::TorchRng;

/// How adapters become one. W is what the base has, `s B A` what an adapter adds to it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CombinationType {
    /// The weighted sum of `s B A`, brought back to one pair by its largest singular values.
    #[default]
    Svd,
    /// The weighted sums of the matrices A and of the matrices B. That is a rough approximation of the sum of their products.
    Linear,
    /// The matrices side by side: exactly the weighted sum of `s B A`, with the sum of the ranks.
    Cat,
    /// Of each matrix the largest values; of these, those of the sign that prevails.
    Ties,
    /// `ties` of `s B A`, brought back to one pair.
    TiesSvd,
    /// `ties` with values that are kept at random and scaled up.
    DareTies,
    /// `linear` with values that are kept at random and scaled up.
    DareLinear,
    /// `dare_ties` of `s B A`, brought back to one pair.
    DareTiesSvd,
    /// `dare_linear` of `s B A`, brought back to one pair.
    DareLinearSvd,
    /// `linear` with the largest values of each matrix.
    MagnitudePrune,
    /// `magnitude_prune` of `s B A`, brought back to one pair.
    MagnitudePruneSvd,
}

/// Which sign prevails, for TIES.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MajoritySignMethod {
    /// That of the sum of the values.
    #[default]
    Total,
    /// That of most values.
    Frequency,
}

/// What is left out of a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pruning {
    Nothing,
    /// All but the largest values.
    Magnitude,
    /// Values at random.
    Random,
}

impl CombinationType {
    /// Whether it needs a density.
    pub fn prunes(self) -> bool {
        self.pruning() != Pruning::Nothing
    }

    /// Whether it brings sums of products back to one pair.
    pub fn decomposes(self) -> bool {
        matches!(
            self,
            Self::Svd
                | Self::TiesSvd
                | Self::DareTiesSvd
                | Self::DareLinearSvd
                | Self::MagnitudePruneSvd
        )
    }

    fn pruning(self) -> Pruning {
        match self {
            Self::Svd | Self::Linear | Self::Cat => Pruning::Nothing,
            Self::Ties | Self::TiesSvd | Self::MagnitudePrune | Self::MagnitudePruneSvd => {
                Pruning::Magnitude
            }
            Self::DareTies | Self::DareTiesSvd | Self::DareLinear | Self::DareLinearSvd => {
                Pruning::Random
            }
        }
    }

    fn elects_signs(self) -> bool {
        matches!(
            self,
            Self::Ties | Self::TiesSvd | Self::DareTies | Self::DareTiesSvd
        )
    }
}

/// A way of combining adapters.
#[derive(Debug, Clone, Copy)]
pub struct Combination {
    /// The method.
    pub combination_type: CombinationType,
    /// The share of values that are kept, above 0 and at most 1, for methods that prune.
    pub density: f64,
    /// Which sign prevails, for TIES.
    pub majority_sign_method: MajoritySignMethod,
    /// The rank of what is brought back to one pair; by default the largest of the adapters.
    pub svd_rank: Option<usize>,
    /// The seed of what is random.
    pub seed: u64,
}

/// Combines adapters of the model `arch`, each with its weight. The result has no scaling (`lora_alpha` is its rank), and other settings of the
/// first adapter. `progress` is called before each module with the number of finished ones and their total, and may stop with an error.
///
/// What is random is what torch draws after `torch.manual_seed(seed)` where `add_weighted_adapter` follows at once, for adapters on
/// projections.
///
/// # Errors
/// An adapter is more than pairs of matrices, doesn't fit the model or the method, or `progress` returns an error.
pub fn combine(
    arch: &Arch,
    adapters: &[(&Adapter, f64)],
    how: &Combination,
    progress: &mut dyn FnMut(usize, usize) -> anyhow::Result<()>,
) -> anyhow::Result<Adapter> {
    let (first, _) = adapters.first().context("there is no adapter")?;
    for (number, (adapter, _)) in adapters.iter().enumerate() {
        pairs_alone(adapter).with_context(|| format!("adapter {}", number + 1))?;
    }
    let mut method = *how;
    if adapters.len() == 1 {
        // As in PEFT: of one adapter there is nothing to combine.
        method.combination_type = CombinationType::Linear;
    }
    let largest = |adapter: &Adapter| {
        let ranks = adapter.tensors.values().map(|pair| pair.a.dim(0));
        ranks
            .collect::<candle_core::Result<Vec<_>>>()
            .map(|ranks| ranks.into_iter().max())
    };
    let mut ranks = Vec::new();
    for (adapter, _) in adapters {
        ranks.push(largest(adapter)?.context("an adapter has no matrices")?);
    }
    let most = ranks.iter().copied().max().unwrap_or_default();
    let rank = match method.combination_type {
        CombinationType::Cat => ranks.iter().sum(),
        kind if kind.decomposes() => method.svd_rank.unwrap_or(most),
        _ => most,
    };
    let paths: BTreeSet<&String> = adapters
        .iter()
        .flat_map(|(adapter, _)| adapter.tensors.keys())
        .collect();
    let order = modules(arch).into_iter().map(|(path, _)| path);
    let order: Vec<String> = order.filter(|path| paths.contains(path)).collect();
    ensure!(
        order.len() == paths.len(),
        "an adapter has matrices for `{}`, which the model does not have",
        paths
            .iter()
            .find(|path| !order.contains(path))
            .map_or("", |path| path.as_str())
    );
    let mut rng = TorchRng::new(method.seed);
    for path in &order {
        // The new adapter is drawn first.
        let pair = adapters
            .iter()
            .find_map(|(adapter, _)| adapter.tensors.get(path));
        let pair = pair.context("a module has no matrices")?;
        rng.skip(rank * (2 * pair.a.dim(1)? + pair.b.dim(0)?));
    }
    let mut tensors = BTreeMap::new();
    for (done, path) in order.iter().enumerate() {
        progress(done, order.len())?;
        let own = adapters.iter().filter_map(|(adapter, weight)| {
            let pair = adapter.tensors.get(path)?;
            Some((pair, *weight, adapter.config.scaling(path)))
        });
        let pair = module(&own.collect::<Vec<_>>(), &method, rank, &mut rng);
        tensors.insert(
            path.clone(),
            pair.with_context(|| format!("could not combine the matrices of `{path}`"))?,
        );
    }
    Ok(Adapter {
        config: config(first, arch, &order, rank)?,
        tensors,
        saved: BTreeMap::new(),
        token_rows: BTreeMap::new(),
    })
}

/// The adapter that adds `weight` times what this one adds.
///
/// # Errors
/// It is more than pairs of matrices.
pub fn weighted(mut adapter: Adapter, weight: f64) -> anyhow::Result<Adapter> {
    pairs_alone(&adapter)?;
    for pair in adapter.tensors.values_mut() {
        pair.b = (&pair.b * weight)?;
    }
    Ok(adapter)
}

/// Fails if an adapter is more than pairs of matrices.
pub fn pairs_alone(adapter: &Adapter) -> anyhow::Result<()> {
    let what = if adapter.config.use_dora {
        "is a DoRA, whose norms"
    } else if !adapter.saved.is_empty() {
        "has tensors in the place of the model's (`modules_to_save`, `bias`), which"
    } else if !adapter.token_rows.is_empty() {
        "has rows of single tokens (`trainable_token_indices`), which"
    } else {
        return Ok(());
    };
    bail!("it {what} can't be weighted; expected pairs of matrices alone")
}

/// The settings of the result.
fn config(
    first: &Adapter,
    arch: &Arch,
    paths: &[String],
    rank: usize,
) -> anyhow::Result<AdapterConfig> {
    let raw = &first.config.raw;
    let text = |key: &str| raw.get(key).and_then(serde_json::Value::as_str);
    let new = NewAdapter {
        r: rank,
        lora_alpha: rank as f64,
        lora_dropout: raw
            .get("lora_dropout")
            .and_then(serde_json::Value::as_f64)
            .unwrap_or(0.),
        base_model_name_or_path: text("base_model_name_or_path").map(str::to_owned),
        ..NewAdapter::default()
    };
    // The last parts of paths where these mean the same modules.
    let names = paths
        .iter()
        .map(|path| path.rsplit('.').next().unwrap_or(path));
    let names: BTreeSet<String> = names.map(str::to_owned).collect();
    let short = AdapterConfig::new(&NewAdapter {
        target_modules: Names::List(names.into_iter().collect()),
        ..new.clone()
    })?;
    let all = modules(arch).into_iter().map(|(path, _)| path);
    let meant = all.filter(|path| short.targets.selection(path) == Selection::Yes);
    if meant.eq(paths.iter().cloned()) {
        return Ok(short);
    }
    AdapterConfig::new(&NewAdapter {
        target_modules: Names::List(paths.to_vec()),
        ..new
    })
}

fn values(tensor: &Tensor) -> candle_core::Result<Vec<f32>> {
    tensor
        .to_dtype(candle_core::DType::F32)?
        .flatten_all()?
        .to_vec1()
}

/// The pair of a module, from those of the adapters that have one, with their weights and scalings.
fn module(
    pairs: &[(&LoraPair, f64, f64)],
    how: &Combination,
    rank: usize,
    rng: &mut TorchRng,
) -> anyhow::Result<LoraPair> {
    let (first, ..) = pairs.first().context("no adapter has matrices for it")?;
    let (input, out) = (first.a.dim(1)?, first.b.dim(0)?);
    for (pair, ..) in pairs {
        ensure!(
            (pair.a.dim(1)?, pair.b.dim(0)?) == (input, out),
            "they have other sizes: {} x {} and {out} x {input}",
            pair.b.dim(0)?,
            pair.a.dim(1)?
        );
    }
    let (a, b) = if how.combination_type == CombinationType::Cat {
        side_by_side(pairs, (out, input), rank)?
    } else if how.combination_type.decomposes() {
        let mut deltas = Vec::new();
        for (pair, _, scaling) in pairs {
            let product = pair.b.matmul(&pair.a)?;
            deltas.push(values(&(product * *scaling)?)?);
        }
        let weights: Vec<f32> = pairs.iter().map(|(_, weight, _)| *weight as f32).collect();
        let sum = merged(deltas, &weights, how, rng);
        decomposed(&sum, (out, input), rank)?
    } else {
        let own = first.a.dim(0)?;
        for (pair, ..) in pairs {
            ensure!(
                pair.a.dim(0)? == own,
                "they have the ranks {} and {own}, expected the same; `cat` and `svd` take any",
                pair.a.dim(0)?
            );
        }
        let root = |(_, weight, scaling): &(&LoraPair, f64, f64)| (weight * scaling).abs().sqrt();
        let of_b: Vec<f32> = pairs.iter().map(|pair| root(pair) as f32).collect();
        // The sign goes to one side alone.
        let of_a = pairs.iter().map(|pair| {
            let negative = pair.1 * pair.2 < 0.;
            (if negative { -root(pair) } else { root(pair) }) as f32
        });
        let of_a: Vec<f32> = of_a.collect();
        let all = |side: fn(&LoraPair) -> &Tensor| -> candle_core::Result<Vec<Vec<f32>>> {
            pairs.iter().map(|(pair, ..)| values(side(pair))).collect()
        };
        let a = merged(all(|pair| &pair.a)?, &of_a, how, rng);
        let b = merged(all(|pair| &pair.b)?, &of_b, how, rng);
        (
            widened(&a, (own, input), (rank, input)),
            widened(&b, (out, own), (out, rank)),
        )
    };
    Ok(LoraPair {
        a: Tensor::from_vec(a, (rank, input), &Device::Cpu)?,
        b: Tensor::from_vec(b, (out, rank), &Device::Cpu)?,
        magnitude: None,
    })
}

/// A matrix with zeros beside it, up to another size.
fn widened(
    values: &[f32],
    (rows, columns): (usize, usize),
    (tall, wide): (usize, usize),
) -> Vec<f32> {
    let mut out = vec![0f32; tall * wide];
    for row in 0..rows {
        let line = &values[row * columns..(row + 1) * columns];
        out[row * wide..row * wide + columns].copy_from_slice(line);
    }
    out
}

/// The matrices of all pairs side by side, with weights and scalings in A: A (rank, in) and B (out, rank).
fn side_by_side(
    pairs: &[(&LoraPair, f64, f64)],
    (out, input): (usize, usize),
    rank: usize,
) -> anyhow::Result<(Vec<f32>, Vec<f32>)> {
    let (mut a, mut b) = (vec![0f32; rank * input], vec![0f32; out * rank]);
    let mut at = 0;
    for (pair, weight, scaling) in pairs {
        let own = pair.a.dim(0)?;
        let (weight, scaling) = (*weight as f32, *scaling as f32);
        let lines = a[at * input..].iter_mut().zip(values(&pair.a)?);
        lines.for_each(|(to, x)| *to = x * weight * scaling);
        for (row, line) in values(&pair.b)?.chunks(own).enumerate() {
            b[row * rank + at..row * rank + at + own].copy_from_slice(line);
        }
        at += own;
    }
    Ok((a, b))
}

/// The pair of this rank whose product is nearest to `sum` (out, in): A are right singular vectors, B left ones times the singular values.
fn decomposed(
    sum: &[f32],
    (out, input): (usize, usize),
    rank: usize,
) -> anyhow::Result<(Vec<f32>, Vec<f32>)> {
    let svd = svd::largest_singular_values(sum, (out, input), rank)?;
    let a = svd.right.iter().flatten().map(|x| *x as f32).collect();
    let mut b = vec![0f32; out * rank];
    for (k, (value, vector)) in svd.values.iter().zip(&svd.left).enumerate() {
        for (to, u) in b[k..].iter_mut().step_by(rank).zip(vector) {
            *to = (value * u) as f32;
        }
    }
    Ok((a, b))
}

/// One matrix of those of all adapters.
fn merged(
    mut tensors: Vec<Vec<f32>>,
    weights: &[f32],
    how: &Combination,
    rng: &mut TorchRng,
) -> Vec<f32> {
    for values in &mut tensors {
        prune(values, how, rng);
    }
    let count = tensors.first().map_or(0, Vec::len);
    let signs = how.combination_type.elects_signs();
    let at = |index: usize| {
        let values = tensors.iter().map(|values| values[index]);
        if !signs {
            return values.zip(weights).map(|(x, weight)| x * weight).sum();
        }
        let total: f32 = match how.majority_sign_method {
            MajoritySignMethod::Total => values.clone().sum(),
            MajoritySignMethod::Frequency => values.clone().map(sign).sum(),
        };
        let (mut sum, mut kept) = (0f32, 0f32);
        for (x, weight) in values.zip(weights) {
            if x != 0. && (x > 0.) == (total >= 0.) {
                sum += x * weight;
                kept += 1.;
            }
        }
        sum / kept.max(1.)
    };
    (0..count).map(at).collect()
}

/// -1, 0 or 1.
fn sign(x: f32) -> f32 {
    if x == 0. { 0. } else { x.signum() }
}

/// Leaves out some of the values.
fn prune(values: &mut [f32], how: &Combination, rng: &mut TorchRng) {
    if how.density >= 1. {
        return;
    }
    match how.combination_type.pruning() {
        Pruning::Nothing => {}
        Pruning::Magnitude => {
            let keep = (how.density * values.len() as f64) as usize;
            let mut order: Vec<usize> = (0..values.len()).collect();
            let size = |index: &usize| values[*index].abs();
            order.sort_by(|a, b| size(b).total_cmp(&size(a)));
            for index in order.split_off(keep) {
                values[index] = 0.;
            }
        }
        Pruning::Random => {
            let density = how.density as f32;
            let draws = rng.uniform(values.len(), 0., 1.);
            for (value, draw) in values.iter_mut().zip(draws) {
                *value = if draw < density { *value / density } else { 0. };
            }
        }
    }
}

#[cfg(test)]
mod tests;
