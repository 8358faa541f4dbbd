//! A new adapter, with the very numbers that PEFT draws after `torch.manual_seed(seed)`.

use std::collections::BTreeMap;

use anyhow::{Context as _, ensure};
use candle_core::{Device, Tensor};

use super::adapter::{Adapter, AdapterConfig, LoraPair, NewAdapter};
use super::config::LlamaConfig;
use super::torch_rng::TorchRng;

/// A projection of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Projection {
    /// Its path in the layer (`self_attn.q_proj`).
    pub path: &'static str,
    /// (out, in).
    pub shape: (usize, usize),
}

impl Projection {
    /// Its own name (`q_proj`).
    pub fn name(&self) -> &'static str {
        self.path
            .rsplit_once('.')
            .map_or(self.path, |(_, name)| name)
    }
}

/// The seven projections of a layer, in the order of torch's modules.
pub fn projections(config: &LlamaConfig) -> [Projection; 7] {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let q = config.num_attention_heads * config.head_dim;
    let kv = config.num_key_value_heads * config.head_dim;
    [
        ("self_attn.q_proj", (q, hidden)),
        ("self_attn.k_proj", (kv, hidden)),
        ("self_attn.v_proj", (kv, hidden)),
        ("self_attn.o_proj", (hidden, q)),
        ("mlp.gate_proj", (inner, hidden)),
        ("mlp.up_proj", (inner, hidden)),
        ("mlp.down_proj", (hidden, inner)),
    ]
    .map(|(path, shape)| Projection { path, shape })
}

/// Makes an adapter for the modules that `new` names (`q_proj`, or a longer path that ends so).
///
/// torch's generator is used up as PEFT does it, module after module: `nn.Linear` draws A, then B; then A is drawn again
/// and B becomes 0. Without `init_lora_weights` the first draws of both stay.
pub fn adapter(config: &LlamaConfig, new: &NewAdapter, seed: u64) -> anyhow::Result<Adapter> {
    let settings = AdapterConfig::new(new)?;
    let projections = projections(config);
    let meets = |path: &str, target: &str| {
        path == target
            || path
                .strip_suffix(target)
                .is_some_and(|rest| rest.ends_with('.'))
    };
    ensure!(
        !new.target_modules.is_empty(),
        "`target_modules` names no module"
    );
    let mut used = vec![false; new.target_modules.len()];
    let mut rng = TorchRng::new(seed);
    let mut tensors = BTreeMap::new();
    for layer in 0..config.num_hidden_layers {
        for projection in &projections {
            let path = format!("model.layers.{layer}.{}", projection.path);
            if settings.saves(&path) {
                continue; // trained whole, so it gets no matrices
            }
            let mut wanted = false;
            for (used, target) in used.iter_mut().zip(&new.target_modules) {
                if meets(&path, target) {
                    (*used, wanted) = (true, true);
                }
            }
            if wanted {
                let pair = pair(&mut rng, projection.shape, settings.rank(&path), new)
                    .with_context(|| format!("could not make the matrices of `{path}`"))?;
                tensors.insert(path, pair);
            }
        }
    }
    if let Some((_, target)) = used
        .iter()
        .zip(&new.target_modules)
        .find(|(used, _)| !**used)
    {
        let known: Vec<_> = projections
            .iter()
            .map(|one| format!("`{}`", one.name()))
            .collect();
        ensure!(
            false,
            "the model has no module `{target}` that an adapter can stand beside, expected some of {}, or `all-linear`",
            known.join(", ")
        );
    }
    Ok(Adapter {
        config: settings,
        tensors,
        saved: BTreeMap::new(),
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
    // Kaiming's uniform bound for a slope of sqrt(5): sqrt(3) * sqrt(2 / 6) / sqrt(inputs).
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ml::golden;

    fn new(target_modules: &[&str]) -> NewAdapter {
        NewAdapter {
            lora_alpha: 16.,
            target_modules: target_modules
                .iter()
                .map(|name| (*name).to_owned())
                .collect(),
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

    fn config() -> LlamaConfig {
        LlamaConfig::read(&golden::folder("model")).unwrap()
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn the_numbers_are_those_of_peft() {
        let ours = adapter(&config(), &new(&ALL), 3407).unwrap();
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
        let text = include_str!("../../tests/golden/lora_init_stats.json");
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
        let ours = adapter(&config(), &new(&ALL), 3407).unwrap();
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
        let one = adapter(&config(), &new(&["1.self_attn.v_proj"]), 1).unwrap();
        assert_eq!(
            one.tensors.keys().collect::<Vec<_>>(),
            ["model.layers.1.self_attn.v_proj"]
        );
        let three = adapter(&config(), &new(&["mlp.up_proj"]), 1).unwrap();
        assert_eq!(three.tensors.len(), 3);
        for wrong in ["proj", "Wqkv", "lm_head", ""] {
            let error = adapter(&config(), &new(&["q_proj", wrong]), 1)
                .unwrap_err()
                .to_string();
            assert!(
                error.contains(&format!("`{wrong}`")) && error.contains("`down_proj`"),
                "{error}"
            );
        }
        assert!(adapter(&config(), &new(&[]), 1).is_err());
    }

    #[test]
    fn without_initialisation_both_matrices_are_linear_s_own() {
        let raw = NewAdapter {
            init_lora_weights: false,
            ..new(&["q_proj"])
        };
        let pair = &adapter(&config(), &raw, 5).unwrap().tensors["model.layers.0.self_attn.q_proj"];
        let mut rng = TorchRng::new(5);
        assert_eq!(values(&pair.a), rng.uniform(8 * 64, -0.125, 0.125));
        assert!(
            values(&pair.b)
                .iter()
                .all(|x| x.abs() <= 1. / 8f32.sqrt() && *x != 0.)
        );
    }
}
