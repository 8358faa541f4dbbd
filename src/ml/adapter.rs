//! LoRA adapters in PEFT's folder layout: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use candle_core::{Device, Tensor};
use serde_json::{Map, Value, json};

use super::folder::sorted_json;
use super::weights::{self, Weights};

/// PEFT's prefix of every tensor name.
const PREFIX: &str = "base_model.model.";
/// The adapter's tensors.
pub const FILE: &str = "adapter_model.safetensors";
/// The adapter's settings.
pub const CONFIG: &str = "adapter_config.json";

/// Settings that change what an adapter computes in a way that this program does not: they have to be off.
const OFF: [&str; 12] = [
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
    "use_qalora",
];
/// More of them, of which PEFT writes an object or nothing.
const EMPTY: [&str; 5] = [
    "alpha_pattern",
    "monteclora_config",
    "rank_pattern",
    "use_bdlora",
    "velora_config",
];

/// What `adapter_config.json` says, and all its keys to write back.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// The rank.
    pub r: usize,
    /// The scaling's numerator.
    pub lora_alpha: f64,
    /// The probability of dropping an input value in training.
    pub lora_dropout: f64,
    /// Whether the scaling divides by the root of the rank.
    pub use_rslora: bool,
    /// The file as it was read.
    pub raw: Map<String, Value>,
}

/// The settings of a new adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct NewAdapter {
    /// The rank.
    pub r: usize,
    /// The scaling's numerator.
    pub lora_alpha: f64,
    /// The probability of dropping an input value in training.
    pub lora_dropout: f64,
    /// Whether the scaling divides by the root of the rank.
    pub use_rslora: bool,
    /// Whether A is drawn anew and B is zero, so that the adapter changes nothing before it is trained.
    pub init_lora_weights: bool,
    /// The names of the modules it stands beside (`q_proj`).
    pub target_modules: Vec<String>,
    /// Where PEFT finds the base.
    pub base_model_name_or_path: Option<String>,
}

impl AdapterConfig {
    /// The configuration of a new adapter, with the keys of PEFT 0.21.
    pub fn new(new: &NewAdapter) -> anyhow::Result<Self> {
        // A whole number without a fraction, as people give it to PEFT.
        let alpha = new.lora_alpha;
        let alpha = if alpha.fract() == 0. && alpha.abs() < 1e15 {
            json!(alpha as i64)
        } else {
            json!(alpha)
        };
        let raw = json!({
            "alora_invocation_tokens": null,
            "alpha_pattern": {},
            "arrow_config": null,
            "auto_mapping": null,
            "base_model_name_or_path": new.base_model_name_or_path,
            "bias": "none",
            "corda_config": null,
            "ensure_weight_tying": false,
            "eva_config": null,
            "exclude_modules": null,
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": new.init_lora_weights,
            "kasa_config": null,
            "layer_replication": null,
            "layers_pattern": null,
            "layers_to_transform": null,
            "loftq_config": {},
            "lora_alpha": alpha,
            "lora_bias": false,
            "lora_dropout": new.lora_dropout,
            "lora_ga_config": null,
            "megatron_config": null,
            "megatron_core": "megatron.core",
            "modules_to_save": null,
            "monteclora_config": null,
            "peft_type": "LORA",
            "peft_version": "0.21.2",
            "qalora_group_size": 16,
            "r": new.r,
            "rank_pattern": {},
            "revision": null,
            "target_modules": new.target_modules,
            "target_parameters": null,
            "task_type": "CAUSAL_LM",
            "trainable_token_indices": null,
            "use_bdlora": null,
            "use_dora": false,
            "use_qalora": false,
            "use_rslora": new.use_rslora,
            "velora_config": null,
        });
        match raw {
            Value::Object(raw) => Self::parse(raw),
            _ => bail!("an adapter's settings are an object"),
        }
    }

    /// What B A is multiplied by: alpha / r, or alpha / sqrt(r).
    pub fn scaling(&self) -> f64 {
        let r = self.r as f64;
        self.lora_alpha / if self.use_rslora { r.sqrt() } else { r }
    }

    fn parse(raw: Map<String, Value>) -> anyhow::Result<Self> {
        let kind = raw.get("peft_type").and_then(Value::as_str);
        ensure!(
            kind == Some("LORA"),
            "its type is `{}`, expected `LORA`",
            kind.unwrap_or("not named")
        );
        let off = |value: &Value| match value {
            Value::Null | Value::Bool(false) => true,
            Value::Array(items) => items.is_empty(),
            _ => false,
        };
        for name in OFF {
            let is_off = raw.get(name).is_none_or(off);
            ensure!(is_off, "`{name}` is not supported, expected it to be off");
        }
        for name in EMPTY {
            let empty = raw
                .get(name)
                .is_none_or(|value| off(value) || value.as_object().is_some_and(Map::is_empty));
            ensure!(empty, "`{name}` is not supported, expected it to be empty");
        }
        if let Some(bias) = raw.get("bias").filter(|bias| !bias.is_null()) {
            ensure!(
                bias == "none",
                "`bias: {bias}` is not supported, expected `none`"
            );
        }
        // These begin by changing the base, so that the adapter is worth nothing beside the base as it is.
        let init = raw
            .get("init_lora_weights")
            .and_then(Value::as_str)
            .unwrap_or_default();
        for changes in ["pissa", "olora", "corda", "lora_ga"] {
            ensure!(
                !init.to_lowercase().starts_with(changes),
                "`init_lora_weights: {init}` changes the base model and is not supported; convert the adapter by PEFT's \
                 `path_initial_model_for_weight_conversion`"
            );
        }
        let number = |name: &str| -> anyhow::Result<Option<f64>> {
            let Some(value) = raw.get(name).filter(|value| !value.is_null()) else {
                return Ok(None);
            };
            let number = value.as_f64().filter(|number| number.is_finite());
            Ok(Some(number.with_context(|| {
                format!("`{name}` is {value}, expected a number")
            })?))
        };
        let r = raw.get("r").and_then(Value::as_u64).filter(|r| *r > 0);
        let r = r.context("`r` is missing or not a whole number above 0")?;
        let lora_dropout = number("lora_dropout")?.unwrap_or(0.);
        ensure!(
            (0. ..1.).contains(&lora_dropout),
            "`lora_dropout` is {lora_dropout}, expected a number from 0 to below 1"
        );
        Ok(Self {
            r: usize::try_from(r)?,
            lora_alpha: number("lora_alpha")?.context("`lora_alpha` is missing")?,
            lora_dropout,
            use_rslora: raw.get("use_rslora").and_then(Value::as_bool) == Some(true),
            raw,
        })
    }
}

/// The two matrices beside one projection.
#[derive(Debug, Clone)]
pub struct LoraPair {
    /// A, (r, in).
    pub a: Tensor,
    /// B, (out, r).
    pub b: Tensor,
}

/// An adapter: pairs by module path (`model.layers.0.self_attn.q_proj`).
#[derive(Debug, Clone)]
pub struct Adapter {
    /// Its settings.
    pub config: AdapterConfig,
    /// Its pairs.
    pub tensors: BTreeMap<String, LoraPair>,
}

impl Adapter {
    /// Reads an adapter folder.
    pub fn load(folder: &Path) -> anyhow::Result<Self> {
        let read = || -> anyhow::Result<Self> {
            let text = std::fs::read(folder.join(CONFIG))
                .with_context(|| format!("could not read `{CONFIG}`"))?;
            let raw = serde_json::from_slice(&text);
            let config = raw
                .map_err(anyhow::Error::from)
                .and_then(AdapterConfig::parse);
            let config = config.with_context(|| format!("could not use `{CONFIG}`"))?;
            let weights = Weights::open_file(&folder.join(FILE))?;
            let tensors = pairs(&weights, config.r)?;
            Ok(Self { config, tensors })
        };
        read().with_context(|| format!("could not load the adapter `{}`", folder.display()))
    }

    /// Writes an adapter folder; the same adapter makes the same bytes. PEFT keeps `target_modules` in a set, whose order
    /// differs from run to run; here it is sorted.
    pub fn save(&self, folder: &Path) -> anyhow::Result<()> {
        let mut raw = self.config.raw.clone();
        if let Some(Value::Array(modules)) = raw.get_mut("target_modules") {
            modules.sort_by_key(ToString::to_string);
        }
        std::fs::write(folder.join(CONFIG), sorted_json(&Value::Object(raw))?)
            .with_context(|| format!("could not write `{CONFIG}` to `{}`", folder.display()))?;
        let mut tensors = BTreeMap::new();
        for (path, pair) in &self.tensors {
            tensors.insert(format!("{PREFIX}{path}.lora_A.weight"), pair.a.clone());
            tensors.insert(format!("{PREFIX}{path}.lora_B.weight"), pair.b.clone());
        }
        weights::save(&folder.join(FILE), &tensors, &[("format", "pt")])
    }
}

fn pairs(weights: &Weights, r: usize) -> anyhow::Result<BTreeMap<String, LoraPair>> {
    let mut pairs = BTreeMap::new();
    for name in weights.names() {
        let own = name.strip_prefix(PREFIX).unwrap_or(name);
        if let Some(path) = own.strip_suffix(".lora_B.weight") {
            let other = name.replace(".lora_B.", ".lora_A.");
            ensure!(
                weights.contains(&other),
                "`{name}` has no `{other}` beside it"
            );
            ensure!(
                path.starts_with("model.") || path == "lm_head",
                "`{name}` belongs to no module of a Llama"
            );
            continue;
        }
        let Some(path) = own.strip_suffix(".lora_A.weight") else {
            bail!("the tensor `{name}` is no LoRA matrix");
        };
        let other = name.replace(".lora_A.", ".lora_B.");
        ensure!(
            weights.contains(&other),
            "`{name}` has no `{other}` beside it"
        );
        let a = weights.tensor(name, &Device::Cpu)?;
        let b = weights.tensor(&other, &Device::Cpu)?;
        ensure!(
            matches!((a.dims(), b.dims()), ([rank, _], [_, also]) if *rank == r && *also == r),
            "the matrices of `{path}` have the shapes {:?} and {:?}, expected the rank {r} of `{CONFIG}`",
            a.dims(),
            b.dims()
        );
        ensure!(
            a.dtype().is_float() && b.dtype().is_float(),
            "the matrices of `{path}` are no floats"
        );
        pairs.insert(path.to_owned(), LoraPair { a, b });
    }
    ensure!(!pairs.is_empty(), "`{FILE}` has no LoRA matrices");
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::ml::golden;

    fn golden_raw() -> Map<String, Value> {
        let text = include_str!("../../tests/golden/adapter_init/adapter_config.json");
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn an_adapter_is_written_as_peft_does() {
        let folder = tempfile::tempdir().unwrap();
        let theirs = golden::folder("adapter_init");
        Adapter::load(&theirs).unwrap().save(folder.path()).unwrap();
        let read = |folder: &Path, name: &str| fs::read(folder.join(name)).unwrap();
        assert!(read(folder.path(), FILE) == read(&theirs, FILE));
        // Their order of the modules is that of a set.
        let ours: Value = serde_json::from_slice(&read(folder.path(), CONFIG)).unwrap();
        let mut expected = golden_raw();
        let modules = [
            "down_proj",
            "gate_proj",
            "k_proj",
            "o_proj",
            "q_proj",
            "up_proj",
            "v_proj",
        ];
        expected["target_modules"] = json!(modules);
        assert_eq!(ours, Value::Object(expected));

        let again = tempfile::tempdir().unwrap();
        Adapter::load(folder.path())
            .unwrap()
            .save(again.path())
            .unwrap();
        assert!(read(again.path(), CONFIG) == read(folder.path(), CONFIG));
    }

    #[test]
    fn a_new_adapter_has_the_keys_of_peft() {
        let new = NewAdapter {
            r: 8,
            lora_alpha: 16.,
            lora_dropout: 0.,
            use_rslora: false,
            init_lora_weights: true,
            target_modules: vec!["q_proj".into()],
            base_model_name_or_path: None,
        };
        let ours = AdapterConfig::new(&new).unwrap();
        let mut theirs = golden_raw();
        theirs["target_modules"] = json!(["q_proj"]);
        assert_eq!(ours.raw, theirs);
        assert!((ours.scaling() - 2.).abs() < 1e-12);
        let rslora = AdapterConfig {
            use_rslora: true,
            ..ours
        };
        assert!((rslora.scaling() - 16. / 8f64.sqrt()).abs() < 1e-12);
    }

    #[test]
    fn what_is_not_computed_is_refused_by_name() {
        for (name, value) in [
            ("use_dora", json!(true)),
            ("modules_to_save", json!(["lm_head"])),
            ("bias", json!("all")),
            ("rank_pattern", json!({"q_proj": 4})),
            ("init_lora_weights", json!("pissa_niter_4")),
            ("lora_dropout", json!(1.)),
            ("lora_alpha", json!("16")),
            ("r", json!(0)),
            ("peft_type", json!("LOHA")),
        ] {
            let mut raw = golden_raw();
            raw[name] = value.clone();
            let error = AdapterConfig::parse(raw).expect_err(name).to_string();
            let named = error.contains(name) || error.contains("LOHA");
            assert!(named, "{name} {value}: {error}");
        }
        for (name, value) in [
            ("modules_to_save", json!([])),
            ("init_lora_weights", json!("gaussian")),
        ] {
            let mut raw = golden_raw();
            raw[name] = value;
            AdapterConfig::parse(raw).unwrap();
        }
    }

    #[test]
    fn tensors_that_make_no_pairs_are_told() {
        let good = "base_model.model.model.layers.0.self_attn.q_proj";
        let tensor = |shape: (usize, usize)| {
            Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu).unwrap()
        };
        for (tensors, expected) in [
            (vec![(format!("{good}.lora_A.weight"), (8, 64))], "has no"),
            (vec![(format!("{good}.lora_B.weight"), (64, 8))], "has no"),
            (
                vec![(format!("{good}.lora_magnitude_vector"), (64, 1))],
                "is no LoRA matrix",
            ),
            (
                vec![
                    (format!("{good}.lora_A.weight"), (4, 64)),
                    (format!("{good}.lora_B.weight"), (64, 4)),
                ],
                "expected the rank 8",
            ),
            (vec![], "has no LoRA matrices"),
        ] {
            let folder = tempfile::tempdir().unwrap();
            fs::copy(
                golden::folder("adapter_init").join(CONFIG),
                folder.path().join(CONFIG),
            )
            .unwrap();
            let tensors = tensors
                .into_iter()
                .map(|(name, shape)| (name, tensor(shape)));
            weights::save(&folder.path().join(FILE), &tensors.collect(), &[]).unwrap();
            let error = format!("{:#}", Adapter::load(folder.path()).unwrap_err());
            assert!(error.contains(expected), "{error}");
        }
    }
}
