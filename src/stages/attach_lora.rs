//! `attach_lora`: a new adapter.

use std::borrow::Cow;
use std::fmt;

use anyhow::Context as _;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::artifacts::{Adapter, Model};
use crate::engine::{Context, Input, Problem, Stage};
use crate::ml::adapter::NewAdapter;
use crate::ml::config::LlamaConfig;
use crate::ml::lora_init;
use crate::ml::weights::Weights;

/// Makes an untrained LoRA adapter for a model: the same numbers that PEFT draws, in PEFT's folder layout.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AttachLora {
    /// The model to adapt, dense or in 4 bits. Only its shape counts.
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
    /// Which biases are trained: none, for a Llama has none.
    #[serde(default)]
    bias: Bias,
    /// The modules that get a pair of matrices, by the ends of their paths; or `all-linear` for every projection of the layers.
    #[serde(default)]
    target_modules: TargetModules,
    /// Multiply the update by `lora_alpha / sqrt(r)` instead (rank-stabilised LoRA).
    #[serde(default)]
    use_rslora: bool,
    /// Start with B = 0, so that the adapter changes nothing at first. Without it B is random too.
    #[serde(default = "yes")]
    init_lora_weights: bool,
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

fn yes() -> bool {
    true
}

impl Stage for AttachLora {
    const KIND: &'static str = "attach_lora";
    const VERSION: u32 = 1;
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
        problems
    }

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        let Bias::None = self.bias;
        let folder = cx.input(&self.model)?;
        let config = LlamaConfig::read(folder)?;
        let target_modules = match &self.target_modules {
            TargetModules::Named(names) => names.clone(),
            TargetModules::AllLinear => {
                let all = lora_init::projections(&config);
                all.iter().map(|one| one.name().to_owned()).collect()
            }
        };
        let new = NewAdapter {
            r: self.r,
            lora_alpha: self.lora_alpha,
            lora_dropout: self.lora_dropout,
            use_rslora: self.use_rslora,
            init_lora_weights: self.init_lora_weights,
            target_modules,
            base_model_name_or_path: self.base_model_name_or_path.clone(),
        };
        let weights = Weights::open(folder)?;
        for layer in 0..config.num_hidden_layers {
            let name = format!("model.layers.{layer}.self_attn.q_proj.weight");
            weights
                .raw(&name)
                .context("the model lacks a layer that its `config.json` has")?;
        }
        let adapter = lora_init::adapter(&config, &new, self.seed)?;
        let pairs = adapter.tensors.values();
        let count = pairs.map(|pair| pair.a.elem_count() + pair.b.elem_count());
        cx.note("modules", adapter.tensors.len());
        cx.note("parameters", count.sum::<usize>());
        cx.check_cancelled()?;
        adapter.save(cx.out())
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
        assert_eq!(ours.config.raw, raw);
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
        assert!(read("{model: base, bias: all}").is_err());
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
