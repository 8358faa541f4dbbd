//! A new adapter, with the very numbers that PEFT draws after `torch.manual_seed(seed)`.

use std::collections::BTreeMap;

use anyhow::{Context as _, bail, ensure};
use candle_core::{Device, Tensor};

use crate::ml::adapter::{Adapter, AdapterConfig, LoraPair, Meant, NewAdapter};
use crate::ml::model::arch::{self, Arch};
use crate::ml::torch_rng::TorchRng;

/// A projection of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Projection {
    /// Which one it is.
    pub kind: arch::Projection,
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
pub fn projections(config: &Arch) -> [Projection; 7] {
    arch::Projection::ALL.map(|kind| Projection {
        kind,
        path: match kind {
            arch::Projection::Q => "self_attn.q_proj",
            arch::Projection::K => "self_attn.k_proj",
            arch::Projection::V => "self_attn.v_proj",
            arch::Projection::O => "self_attn.o_proj",
            arch::Projection::Gate => "mlp.gate_proj",
            arch::Projection::Up => "mlp.up_proj",
            arch::Projection::Down => "mlp.down_proj",
        },
        shape: config.shape(kind),
    })
}

/// The names of the projections.
pub const PROJECTIONS: [&str; 7] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
];

/// What a module is to an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Module {
    /// A product with a weight (out, in).
    Linear(usize, usize),
    /// Rows of a weight (vocabulary, hidden) that are looked up.
    Embedding(usize, usize),
    /// What can't have matrices: a norm, or modules together.
    Other,
}

/// All modules of a model, by their paths, in torch's order.
pub fn modules(config: &Arch) -> Vec<(String, Module)> {
    let (vocabulary, hidden) = (config.vocab_size, config.hidden_size);
    let other = |path: &str| (path.to_owned(), Module::Other);
    let mut modules = vec![
        other("model"),
        (
            "model.embed_tokens".into(),
            Module::Embedding(vocabulary, hidden),
        ),
        other("model.layers"),
    ];
    let projections = projections(config);
    for layer in 0..config.num_hidden_layers() {
        let path = format!("model.layers.{layer}");
        let below = |name: &str| format!("{path}.{name}");
        modules.push(other(&path));
        for projection in &projections {
            match projection.name() {
                "q_proj" => modules.push(other(&below("self_attn"))),
                "gate_proj" => modules.push(other(&below("mlp"))),
                _ => {}
            }
            let (out, input) = projection.shape;
            modules.push((below(projection.path), Module::Linear(out, input)));
        }
        for name in ["mlp.act_fn", "input_layernorm", "post_attention_layernorm"] {
            modules.push(other(&below(name)));
        }
    }
    modules.extend(["model.norm", "model.rotary_emb"].map(other));
    modules.push(("lm_head".into(), Module::Linear(vocabulary, hidden)));
    modules
}

/// Makes an adapter for the modules that `new` means, as PEFT chooses them.
///
/// torch's generator is used up as PEFT does it, module after module: `nn.Linear` draws A, then B; then A is drawn again
/// and B becomes 0. Without `init_lora_weights` the first draws of both stay. Embeddings draw normal numbers, of which B's stay.
pub fn adapter(config: &Arch, new: &NewAdapter, seed: u64) -> anyhow::Result<Adapter> {
    let settings = AdapterConfig::new(new)?;
    let mut rng = TorchRng::new(seed);
    let mut tensors = BTreeMap::new();
    let mut excluded = false;
    for (path, module) in modules(config) {
        match settings.targets.mean(&path) {
            Meant::No => continue,
            Meant::Excluded => {
                excluded = true;
                continue;
            }
            Meant::Yes => {}
        }
        ensure!(
            !settings.saves(&path) || module == Module::Other,
            "`modules_to_save` means `{path}` too, by its last letters, and `target_modules` does; expected one of both"
        );
        let r = settings.rank(&path);
        let pair = match module {
            Module::Linear(out, input) => pair(&mut rng, (out, input), r, new),
            Module::Embedding(rows, width) => embedding(&mut rng, (rows, width), r, new),
            Module::Other => bail!(
                "`target_modules` means `{path}` too ({}), beside which matrices can't stand; expected projections such as {}, \
                 `embed_tokens` or `lm_head`",
                settings.targets.told(),
                known()
            ),
        };
        let pair = pair.with_context(|| format!("could not make the matrices of `{path}`"))?;
        tensors.insert(path, pair);
    }
    ensure!(
        !tensors.is_empty(),
        "no module of the model gets matrices: `target_modules` names {}{}; expected some of {}, `embed_tokens` or `lm_head`, or \
         `all-linear`",
        settings.targets.told(),
        if excluded {
            ", and `exclude_modules` or `modules_to_save` takes what it means away"
        } else if new.layers_to_transform.is_empty() {
            ""
        } else {
            " in the layers of `layers_to_transform`"
        },
        known()
    );
    Ok(Adapter {
        config: settings,
        tensors,
        saved: BTreeMap::new(),
    })
}

fn known() -> String {
    PROJECTIONS.map(|name| format!("`{name}`")).join(", ")
}

/// The pair of embeddings (rows, width), turned around: PEFT's A is (r, rows), its B (width, r).
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
    let turned = |values, shape: (usize, usize)| -> candle_core::Result<Tensor> {
        Tensor::from_vec(values, shape, &Device::Cpu)?
            .t()?
            .contiguous()
    };
    Ok(LoraPair {
        a: turned(b, (width, r))?,
        b: turned(a, (r, rows))?,
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

    fn config() -> Arch {
        Arch::read(&golden::folder("model")).unwrap()
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
        for wrong in ["proj", "Wqkv", "embed", ""] {
            let error = adapter(&config(), &new(&[wrong]), 1)
                .unwrap_err()
                .to_string();
            assert!(
                error.contains(&format!("`{wrong}`")) && error.contains("`down_proj`"),
                "{error}"
            );
            // As in PEFT, one that is there is enough.
            let some = adapter(&config(), &new(&["q_proj", wrong]), 1).unwrap();
            assert_eq!(some.tensors.len(), 3);
        }
        let error = adapter(&config(), &new(&["layers.0"]), 1)
            .unwrap_err()
            .to_string();
        assert!(error.contains("`model.layers.0` too"), "{error}");
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
