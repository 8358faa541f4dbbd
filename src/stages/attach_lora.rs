//! `attach_lora`: a new adapter.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Context as _, ensure};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::artifacts::{Adapter, Model};
use crate::engine::{Context, Input, Problem, Stage};
use crate::ml::adapter::{self, NewAdapter, Patterns};
use crate::ml::config::LlamaConfig;
use crate::ml::weights::Weights;
use crate::ml::{attach, lora_init};

/// Makes an untrained LoRA adapter for a model: the same numbers that PEFT draws, in PEFT's folder layout.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AttachLora {
    /// The model to adapt, dense or in 4 bits.
    model: Input<Model>,
    /// The rank: the inner width of the two matrices.
    #[serde(default = "default_r")]
    r: usize,
    /// The update is multiplied by `lora_alpha / r`.
    #[serde(default = "default_alpha")]
    lora_alpha: f64,
    /// The probability of dropping an input value of the adapter, in training.
    #[serde(default)]
    lora_dropout: f64,
    /// Which biases are trained beside the matrices. Most Llamas have none (`attention_bias` and `mlp_bias` in `config.json`).
    #[serde(default)]
    bias: Bias,
    /// The modules that get a pair of matrices, by the ends of their paths; or `all-linear` for every projection of the layers.
    /// PEFT's default: none, which means these two for a Llama.
    #[serde(default)]
    target_modules: TargetModules,
    /// Multiply the update by `lora_alpha / sqrt(r)` instead (rank-stabilised LoRA).
    #[serde(default)]
    use_rslora: bool,
    /// Train the lengths of the rows of weight plus update as well (`DoRA`, arXiv 2402.09353). Costs a product of two matrices a
    /// module and step.
    #[serde(default, skip_serializing_if = "is_off")]
    use_dora: bool,
    /// Ranks of some modules, by the ends of their paths or regular expressions; sorted, and the first that fits counts.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    rank_pattern: BTreeMap<String, usize>,
    /// The `lora_alpha` of some modules, likewise.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    alpha_pattern: BTreeMap<String, f64>,
    /// Modules that are trained whole and saved with the adapter, such as `embed_tokens` and `lm_head`, by the ends of their paths
    /// (`norm` means every norm). They need as much memory as in a full training.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    modules_to_save: Vec<String>,
    /// `true`: start with B = 0, so that the adapter changes nothing at first. `false`: B is random too. `loftq`: start with what
    /// quantisation took from the weights (arXiv 2310.08659, one iteration), which takes the time of a singular value
    /// decomposition a module; the adapter belongs to the 4-bit `model`, and PEFT's equal is one quantised with
    /// `double_quant: false`.
    #[serde(default)]
    init_lora_weights: Init,
    /// For `init_lora_weights: loftq`, the dense model that `model` was quantised from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    loftq_from: Option<Input<Model>>,
    /// The seed of A's numbers, which are those after `torch.manual_seed(seed)`. PEFT has none of its own; 42 is the default of
    /// transformers' trainer.
    #[serde(default = "default_seed")]
    seed: u64,
    /// Where PEFT finds the base model, such as a repository of the hub; written to `adapter_config.json`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    base_model_name_or_path: Option<String>,
}

/// Which biases are trained.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Bias {
    /// None.
    #[default]
    None,
    /// All that the model has.
    All,
    /// Those of the modules that get matrices.
    LoraOnly,
}

impl Bias {
    fn of_peft(self) -> adapter::Bias {
        match self {
            Self::None => adapter::Bias::None,
            Self::All => adapter::Bias::All,
            Self::LoraOnly => adapter::Bias::LoraOnly,
        }
    }
}

/// How the matrices begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(untagged)]
pub(super) enum Init {
    /// B = 0, or both random.
    Zero(bool),
    /// By a method.
    Named(Method),
}

/// A way to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Method {
    /// From the error of quantisation.
    Loftq,
}

impl<'de> Deserialize<'de> for Init {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl Visitor<'_> for Either {
            type Value = Init;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`true`, `false` or `loftq`")
            }

            fn visit_bool<E: serde::de::Error>(self, zero: bool) -> Result<Init, E> {
                Ok(Init::Zero(zero))
            }

            fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<Init, E> {
                match name {
                    "loftq" => Ok(Init::Named(Method::Loftq)),
                    _ => Err(E::unknown_variant(name, &["true", "false", "loftq"])),
                }
            }
        }
        deserializer.deserialize_any(Either)
    }
}

impl Default for Init {
    fn default() -> Self {
        Self::Zero(true)
    }
}

/// The modules that get a pair of matrices. Order means nothing, so it is not kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum TargetModules {
    /// Every projection of the layers.
    AllLinear,
    /// Those whose paths end so.
    Named(Vec<String>),
}

const ALL_LINEAR: &str = "all-linear";

impl Default for TargetModules {
    /// PEFT's for a Llama.
    fn default() -> Self {
        Self::Named(vec!["q_proj".into(), "v_proj".into()])
    }
}

impl Serialize for TargetModules {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::AllLinear => serializer.serialize_str(ALL_LINEAR),
            Self::Named(names) => names.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for TargetModules {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = TargetModules;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of module names, or `{ALL_LINEAR}`")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<TargetModules, E> {
                if text == ALL_LINEAR {
                    Ok(TargetModules::AllLinear)
                } else {
                    Err(E::invalid_value(serde::de::Unexpected::Str(text), &self))
                }
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<TargetModules, A::Error> {
                let mut names = Vec::new();
                while let Some(name) = items.next_element::<String>()? {
                    names.push(name);
                }
                names.sort_unstable();
                names.dedup();
                Ok(TargetModules::Named(names))
            }
        }
        deserializer.deserialize_any(Names)
    }
}

impl JsonSchema for TargetModules {
    fn schema_name() -> Cow<'static, str> {
        "TargetModules".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        schemars::json_schema!({
            "oneOf": [
                { "const": ALL_LINEAR },
                { "type": "array", "items": { "type": "string" }, "minItems": 1 },
            ],
        })
    }

    fn inline_schema() -> bool {
        true
    }
}

fn default_r() -> usize {
    8
}

fn default_alpha() -> f64 {
    8.
}

fn default_seed() -> u64 {
    42
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde's signature of a condition"
)]
fn is_off(on: &bool) -> bool {
    !on
}

impl Stage for AttachLora {
    const KIND: &'static str = "attach_lora";
    const VERSION: u32 = 2;
    type Output = Adapter;

    fn check(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut rule = |holds: bool, parameter: &str, message: &str| {
            if !holds {
                problems.push(Problem::new(parameter, message));
            }
        };
        rule(self.r > 0, "r", "expected at least 1");
        let alpha = self.lora_alpha > 0. && self.lora_alpha.is_finite();
        rule(alpha, "lora_alpha", "expected a number above 0");
        let dropout = (0. ..1.).contains(&self.lora_dropout);
        rule(
            dropout,
            "lora_dropout",
            "expected a number from 0 to below 1",
        );
        let some = self.target_modules != TargetModules::Named(Vec::new());
        rule(
            some,
            "target_modules",
            "expected at least one module, or `all-linear`",
        );
        let saved = self.modules_to_save.iter().all(|name| !name.is_empty());
        rule(saved, "modules_to_save", "expected names of modules");
        let ranks = self.rank_pattern.iter().map(|(a, b)| (a.clone(), *b));
        let alphas = self.alpha_pattern.iter().map(|(a, b)| (a.clone(), *b));
        let positive = self.rank_pattern.values().all(|rank| *rank > 0);
        rule(positive, "rank_pattern", "expected ranks of at least 1");
        let positive = self
            .alpha_pattern
            .values()
            .all(|alpha| *alpha > 0. && alpha.is_finite());
        rule(positive, "alpha_pattern", "expected numbers above 0");
        let mut regular = |name: &str, error: Option<anyhow::Error>| {
            let text = error.map(|error| error.to_string());
            rule(text.is_none(), name, text.as_deref().unwrap_or_default());
        };
        regular("rank_pattern", Patterns::new(ranks).err());
        regular("alpha_pattern", Patterns::new(alphas).err());
        let loftq = self.init_lora_weights == Init::Named(Method::Loftq);
        rule(
            loftq == self.loftq_from.is_some(),
            "loftq_from",
            "`init_lora_weights: loftq` and `loftq_from` go together",
        );
        problems
    }

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        let folder = cx.input(&self.model)?;
        let config = LlamaConfig::read(folder)?;
        let new = self.settings(&config);
        let weights = Weights::open(folder)?;
        for layer in 0..config.num_hidden_layers {
            let name = format!("model.layers.{layer}.self_attn.q_proj.weight");
            weights
                .raw(&name)
                .context("the model lacks a layer that its `config.json` has")?;
        }
        let dense = self.loftq_from.as_ref().map(|dense| cx.input(dense));
        let dense = dense.transpose()?.map(Weights::open).transpose()?;
        ensure!(
            dense.is_none() || config.quantization.is_some(),
            "`init_lora_weights: loftq` is for a model in 4 bits, but `model` is dense; hint: let `model` be the `quantize` stage and \
             `loftq_from` its own model"
        );
        let adapter = attach::attach(
            &config,
            &weights,
            &new,
            self.seed,
            dense.as_ref(),
            &mut |done, total| {
                cx.progress(done as u64, Some(total as u64), "modules");
                cx.check_cancelled()
            },
        )?;
        self.tell(cx, &config, &adapter);
        cx.check_cancelled()?;
        adapter.save(cx.out())
    }
}

impl AttachLora {
    fn settings(&self, config: &LlamaConfig) -> NewAdapter {
        let target_modules = match &self.target_modules {
            TargetModules::Named(names) => names.clone(),
            TargetModules::AllLinear => {
                let all = lora_init::projections(config);
                let names = all.iter().map(|one| one.name().to_owned());
                let whole = |name: &str| {
                    let mut saved = self.modules_to_save.iter();
                    saved.any(|saved| name.ends_with(saved.as_str()))
                };
                names.filter(|name| !whole(name)).collect()
            }
        };
        let ranks = self.rank_pattern.iter().map(|(a, b)| (a.clone(), *b));
        let alphas = self.alpha_pattern.iter().map(|(a, b)| (a.clone(), *b));
        NewAdapter {
            r: self.r,
            lora_alpha: self.lora_alpha,
            lora_dropout: self.lora_dropout,
            use_rslora: self.use_rslora,
            use_dora: self.use_dora,
            bias: self.bias.of_peft(),
            // LoftQ's start is done, and the base is what it has to be: PEFT must not do it again.
            init_lora_weights: self.init_lora_weights != Init::Zero(false),
            target_modules,
            modules_to_save: self.modules_to_save.clone(),
            rank_pattern: ranks.collect(),
            alpha_pattern: alphas.collect(),
            base_model_name_or_path: self.base_model_name_or_path.clone(),
        }
    }

    /// Notes what there is to train, and warns of what may not be meant.
    fn tell(&self, cx: &Context, config: &LlamaConfig, adapter: &adapter::Adapter) {
        let pairs = adapter.tensors.values();
        let count = pairs.map(|pair| {
            let lengths = pair
                .magnitude
                .as_ref()
                .map_or(0, candle_core::Tensor::elem_count);
            pair.a.elem_count() + pair.b.elem_count() + lengths
        });
        let whole: usize = adapter
            .saved
            .values()
            .map(candle_core::Tensor::elem_count)
            .sum();
        cx.note("modules", adapter.tensors.len());
        cx.note("parameters", count.sum::<usize>() + whole);
        if whole > 0 {
            cx.note("parameters_of_whole_tensors", whole);
        }
        if attach::lacks_biases(config, self.bias.of_peft()) {
            cx.warn("the model has no biases, so `bias` changes nothing");
        }
        let scalings = adapter
            .tensors
            .keys()
            .map(|path| adapter.config.scaling(path));
        if self.loftq_from.is_some()
            && let Some(other) = scalings
                .into_iter()
                .find(|scaling| (scaling - 1.).abs() > 1e-9)
        {
            cx.warn(format!(
                "LoftQ's matrices make up for the error of quantisation where the scaling `lora_alpha / r` is 1; here it is {other}, so \
                 the error is overdone or underdone (PEFT does the same)"
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ml::adapter::Adapter as LoraAdapter;
    use crate::ml::golden;

    fn run(yaml: &str, model: &str) -> anyhow::Result<LoraAdapter> {
        let folder = tempfile::tempdir().unwrap();
        let model = golden::folder(model);
        let cx = Context::for_test(folder.path(), &[("base", &model)], &[]);
        let stage: AttachLora = serde_yaml::from_str(yaml).unwrap();
        assert_eq!(stage.check(), []);
        stage.run(&cx)?;
        let adapter = LoraAdapter::load(cx.out()).unwrap();
        let notes = cx.notes.lock().unwrap();
        assert_eq!(notes["modules"], adapter.tensors.len());
        Ok(adapter)
    }

    #[test]
    fn an_adapter_starts_with_the_numbers_of_peft() {
        let yaml = "{model: base, r: 8, lora_alpha: 16, seed: 3407, target_modules: all-linear}";
        let ours = run(yaml, "model").unwrap();
        let theirs = LoraAdapter::load(&golden::folder("adapter_init")).unwrap();
        for (path, pair) in &theirs.tensors {
            let difference = (&ours.tensors[path].a - &pair.a).unwrap().abs().unwrap();
            let largest = difference.flatten_all().unwrap().max(0).unwrap();
            assert!(largest.to_scalar::<f32>().unwrap() == 0., "{path}");
        }
        let mut raw = theirs.config.raw;
        raw["target_modules"]
            .as_array_mut()
            .unwrap()
            .sort_by_key(ToString::to_string);
        for (key, value) in &ours.config.raw {
            assert_eq!(*value, raw[key], "{key}");
        }
        // The 4-bit model has the same shape, so the same adapter.
        let quantised = run(yaml, "model_nf4").unwrap();
        assert_eq!(quantised.config, ours.config);
        assert_eq!(quantised.tensors.len(), 21);
    }

    #[test]
    fn defaults_are_those_of_peft() {
        let adapter = run("{model: base}", "model").unwrap();
        assert_eq!(adapter.tensors.len(), 6);
        assert_eq!(
            adapter.config.raw["target_modules"],
            serde_json::json!(["q_proj", "v_proj"])
        );
        assert_eq!(
            (adapter.config.r, adapter.config.raw["lora_alpha"].clone()),
            (8, 8.into())
        );
    }

    #[test]
    fn an_unknown_module_is_told_with_those_there_are() {
        let error = run("{model: base, target_modules: [c_attn]}", "model")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("`c_attn`") && error.contains("`gate_proj`"),
            "{error}"
        );
    }

    #[test]
    fn modules_are_a_set_and_rules_are_kept() {
        let read = |yaml: &str| serde_yaml::from_str::<AttachLora>(yaml);
        let one = read("{model: base, target_modules: [v_proj, q_proj, q_proj]}").unwrap();
        assert_eq!(one.target_modules, TargetModules::default());
        let params = serde_json::to_value(&one).unwrap();
        assert_eq!(
            params["target_modules"],
            serde_json::json!(["q_proj", "v_proj"])
        );
        let error = read("{model: base, target_modules: '.*_proj'}")
            .unwrap_err()
            .to_string();
        assert!(error.contains("or `all-linear`"), "{error}");
        assert!(read("{model: base, bias: some}").is_err());
        let wrong = "{model: base, r: 0, lora_alpha: 0, lora_dropout: 1, target_modules: []}";
        let problems = read(wrong).unwrap().check();
        let parameters: Vec<_> = problems
            .iter()
            .map(|problem| problem.parameter.as_str())
            .collect();
        assert_eq!(
            parameters,
            ["r", "lora_alpha", "lora_dropout", "target_modules"]
        );
    }
}
