//! The initial matrices of an adapter, with the same numbers that PEFT draws after `torch.manual_seed(seed)`.

use std::collections::BTreeMap;

use anyhow::{Context as _, bail, ensure};
use candle_core::{Device, Tensor};

use super::principal;
use crate::ml::adapter::{Adapter, AdapterConfig, LoraPair, NewAdapter, Selection};
use crate::ml::model::arch::Arch;
use crate::ml::model::tensors::{Module, modules, projection_names};
use crate::ml::torch_rng::TorchRng;

/// Makes an adapter for the modules that `new` selects, as PEFT selects them.
///
/// Numbers are drawn in PEFT's order (`peft/tuners/lora/layer.py`, `reset_lora_parameters`), module by module: `nn.Linear` draws A, then B;
/// then A is drawn again and B is set to 0. Without `init_lora_weights` the first draws of both are kept. Embeddings draw normal
/// numbers, of which those of B are kept.
///
/// # Errors
/// The settings select no module, or one that can't have matrices.
pub fn adapter(arch: &Arch, new: &NewAdapter, seed: u64) -> anyhow::Result<Adapter> {
    drawn(arch, new, seed, pair)
}

/// Makes an adapter like [`adapter`], in which A and B of each projection are random matrices whose product B A is 0 (PEFT's
/// `init_lora_weights: orthogonal`; `LoraLayer.orthogonal_init` in `peft/tuners/lora/layer.py`): their rows and columns are combinations of
/// different rows of one orthogonal matrix.
///
/// # Errors
/// As [`adapter`], and a rank is odd or 2.
pub fn orthogonal(arch: &Arch, new: &NewAdapter, seed: u64) -> anyhow::Result<Adapter> {
    drawn(arch, new, seed, orthogonal_pair)
}

/// Makes the matrices of a projection (out, in) of this rank.
type Draw = fn(&mut TorchRng, (usize, usize), usize, &NewAdapter) -> anyhow::Result<LoraPair>;

fn drawn(arch: &Arch, new: &NewAdapter, seed: u64, draw: Draw) -> anyhow::Result<Adapter> {
    let settings = AdapterConfig::new(new)?;
    let mut rng = TorchRng::new(seed);
    let mut tensors = BTreeMap::new();
    let mut excluded = false;
    for (path, module) in modules(arch) {
        match settings.targets.selection(&path) {
            Selection::No => continue,
            Selection::Excluded => {
                excluded = true;
                continue;
            }
            Selection::Yes => {}
        }
        ensure!(
            !settings.saves(&path) || module == Module::Other,
            "`modules_to_save` means `{path}` too, by its last letters, and `target_modules` does; expected one of both"
        );
        let r = settings.rank(&path);
        let pair = match module {
            Module::Linear(out, input) => draw(&mut rng, (out, input), r, new),
            Module::Embedding(rows, width) => embedding(&mut rng, (rows, width), r, new),
            Module::Other => bail!(
                "`target_modules` means `{path}` too ({}), beside which matrices can't stand; expected projections such as {}, \
                 `embed_tokens` or `lm_head`",
                settings.targets.description(),
                known(arch)
            ),
        };
        let pair = pair.with_context(|| format!("could not make the matrices of `{path}`"))?;
        tensors.insert(path, pair);
    }
    ensure!(
        !tensors.is_empty(),
        "no module of the model gets matrices: `target_modules` names {}{}; expected some of {}, `embed_tokens` or `lm_head`, or \
         `all-linear`",
        settings.targets.description(),
        if excluded {
            ", and `exclude_modules` or `modules_to_save` takes what it means away"
        } else if new.layers_to_transform.is_empty() {
            ""
        } else {
            " in the layers of `layers_to_transform`"
        },
        known(arch)
    );
    Ok(Adapter {
        config: settings,
        tensors,
        saved: BTreeMap::new(),
        token_rows: BTreeMap::new(),
    })
}

/// The names of a model's projections, for a message.
fn known(arch: &Arch) -> String {
    let names: Vec<_> = projection_names(arch)
        .map(|name| format!("`{name}`"))
        .collect();
    names.join(", ")
}

/// The pair of embeddings (rows, width). PEFT's A is (r, rows) and its B (width, r); the result is their transpose.
fn embedding(
    rng: &mut TorchRng,
    (rows, width): (usize, usize),
    r: usize,
    new: &NewAdapter,
) -> anyhow::Result<LoraPair> {
    let too_large = "it is too large";
    let a_count = r.checked_mul(rows).context(too_large)?;
    let b_count = r.checked_mul(width).context(too_large)?;
    let (mut a, mut b) = (rng.normal(a_count)?, rng.normal(b_count)?);
    if new.init_lora_weights {
        a.fill(0.);
        b = rng.normal(b_count)?;
    }
    let transposed = |values, shape: (usize, usize)| -> candle_core::Result<Tensor> {
        Tensor::from_vec(values, shape, &Device::Cpu)?
            .t()?
            .contiguous()
    };
    Ok(LoraPair {
        a: transposed(b, (width, r))?,
        b: transposed(a, (r, rows))?,
        magnitude: None,
    })
}

fn pair(
    rng: &mut TorchRng,
    (out, input): (usize, usize),
    r: usize,
    new: &NewAdapter,
) -> anyhow::Result<LoraPair> {
    let too_large = "it is too large";
    let a_count = r.checked_mul(input).context(too_large)?;
    let b_count = r.checked_mul(out).context(too_large)?;
    // The bound of `kaiming_uniform_` with a slope of sqrt(5): sqrt(3) * sqrt(2 / 6) / sqrt(inputs).
    let bound = |inputs: usize| {
        let gain = (2f64 / (1. + 5f64.sqrt().powi(2))).sqrt();
        (3f64.sqrt() * (gain / (inputs as f64).sqrt())) as f32
    };
    let (a, b) = if new.init_lora_weights {
        rng.skip(a_count);
        rng.skip(b_count);
        (
            rng.uniform(a_count, -bound(input), bound(input)),
            vec![0.; b_count],
        )
    } else {
        let a = rng.uniform(a_count, -bound(input), bound(input));
        (a, rng.uniform(b_count, -bound(r), bound(r)))
    };
    Ok(LoraPair {
        a: Tensor::from_vec(a, (r, input), &Device::Cpu)?,
        b: Tensor::from_vec(b, (out, r), &Device::Cpu)?,
        magnitude: None,
    })
}

/// The pair of a projection that begins with orthogonal matrices. `nn.Linear` draws numbers of both before.
fn orthogonal_pair(
    rng: &mut TorchRng,
    (out, input): (usize, usize),
    r: usize,
    _: &NewAdapter,
) -> anyhow::Result<LoraPair> {
    let too_large = "it is too large";
    rng.skip(r.checked_mul(input).context(too_large)?);
    rng.skip(r.checked_mul(out).context(too_large)?);
    let square = r.checked_mul(r).context(too_large)?;
    let (even, odd) = principal::halves(&rng.normal(square)?, r)?;
    let half = r / 2;
    let matrix =
        |values: Vec<f32>, shape: (usize, usize)| Tensor::from_vec(values, shape, &Device::Cpu);
    let of_input = matrix(rng.normal(input * half)?, (input, half))?;
    let of_output = matrix(rng.normal(half * out)?, (half, out))?;
    let a = (of_input.matmul(&matrix(even, (half, r))?)?.t()? / 10.)?;
    let b = (of_output.t()?.matmul(&matrix(odd, (half, r))?)? / 10.)?;
    Ok(LoraPair {
        a: a.contiguous()?,
        b: b.contiguous()?,
        magnitude: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ml::adapter::Names;
    use crate::ml::testing::golden;

    fn new(target_modules: &[&str]) -> NewAdapter {
        NewAdapter {
            lora_alpha: 16.,
            target_modules: Names::List(target_modules.iter().map(|&name| name.into()).collect()),
            ..NewAdapter::default()
        }
    }

    const ALL: [&str; 7] = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ];

    fn arch() -> Arch {
        Arch::read(&golden::folder("model")).unwrap()
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn the_numbers_are_those_of_peft() {
        let ours = adapter(&arch(), &new(&ALL), 3407).unwrap();
        assert_eq!(ours.tensors.len(), 21);
        let theirs = golden::tensors("lora_init_seed3407.safetensors");
        assert_eq!(theirs.len(), 7);
        for (name, theirs) in theirs {
            let path = name.strip_prefix("base_model.model.").unwrap();
            let pair = &ours.tensors[path.strip_suffix(".lora_A.weight").unwrap()];
            let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
            assert!(bits(values(&pair.a)) == bits(values(&theirs)), "{name}");
            assert!(values(&pair.b).iter().all(|x| *x == 0.));
        }
        // Of the other layers the extremes are known, which are single draws.
        let text = include_str!("../../../tests/golden/lora_init_stats.json");
        let stats: BTreeMap<String, serde_json::Value> = serde_json::from_str(text).unwrap();
        assert_eq!(stats.len(), 21);
        for (name, stats) in stats {
            let path = name.strip_prefix("base_model.model.").unwrap();
            let pair = &ours.tensors[path.strip_suffix(".lora_A.default.weight").unwrap()];
            let values = values(&pair.a);
            let extreme = |key: &str| stats[key].as_f64().unwrap() as f32;
            let least = values.iter().copied().fold(f32::MAX, f32::min);
            let most = values.iter().copied().fold(f32::MIN, f32::max);
            assert_eq!((least, most), (extreme("min"), extreme("max")), "{name}");
        }
        assert!(ours.config.scaling("model.layers.0.mlp.up_proj") > 1.99);
    }

    #[test]
    fn the_adapter_of_the_golden_runs_is_found_again() {
        let ours = adapter(&arch(), &new(&ALL), 3407).unwrap();
        let theirs = Adapter::load(&golden::folder("adapter_init")).unwrap();
        for (path, pair) in &ours.tensors {
            assert!(values(&pair.a) == values(&theirs.tensors[path].a), "{path}");
        }
        let mut raw = theirs.config.raw;
        raw["target_modules"] = serde_json::json!(ALL);
        for (key, value) in &ours.config.raw {
            assert_eq!(*value, raw[key], "{key}");
        }
    }

    #[test]
    fn modules_are_chosen_by_the_end_of_their_path() {
        let one = adapter(&arch(), &new(&["1.self_attn.v_proj"]), 1).unwrap();
        assert_eq!(
            one.tensors.keys().collect::<Vec<_>>(),
            ["model.layers.1.self_attn.v_proj"]
        );
        let three = adapter(&arch(), &new(&["mlp.up_proj"]), 1).unwrap();
        assert_eq!(three.tensors.len(), 3);
        for wrong in ["proj", "Wqkv", "embed", ""] {
            let error = adapter(&arch(), &new(&[wrong]), 1).unwrap_err().to_string();
            assert!(
                error.contains(&format!("`{wrong}`")) && error.contains("`down_proj`"),
                "{error}"
            );
            // As in PEFT, one that is there is enough.
            let some = adapter(&arch(), &new(&["q_proj", wrong]), 1).unwrap();
            assert_eq!(some.tensors.len(), 3);
        }
        let error = adapter(&arch(), &new(&["layers.0"]), 1)
            .unwrap_err()
            .to_string();
        assert!(error.contains("`model.layers.0` too"), "{error}");
        assert!(adapter(&arch(), &new(&[]), 1).is_err());
    }

    #[test]
    fn without_initialisation_both_matrices_are_linear_s_own() {
        let raw = NewAdapter {
            init_lora_weights: false,
            ..new(&["q_proj"])
        };
        let pair = &adapter(&arch(), &raw, 5).unwrap().tensors["model.layers.0.self_attn.q_proj"];
        let mut rng = TorchRng::new(5);
        assert_eq!(values(&pair.a), rng.uniform(8 * 64, -0.125, 0.125));
        assert!(
            values(&pair.b)
                .iter()
                .all(|x| x.abs() <= 1. / 8f32.sqrt() && *x != 0.)
        );
    }
}
