//! `attach_lora`: a new adapter.

mod modules;
mod tokens;

use std::fmt;

use anyhow::{Context as _, ensure};
use schemars::JsonSchema;
use serde::de::Visitor;
use serde::{Deserialize, Deserializer, Serialize};

use self::modules::{ByPattern, Modules, OneOrMany, TargetModules};
use self::tokens::Tokens;
use crate::engine::{Context, Input, Problem, Stage};
use crate::ml::adapter::{self, Names, NewAdapter, Patterns, Selection};
use crate::ml::io::weights::Weights;
use crate::ml::lora::attach::{self, Beginning};
use crate::ml::model::arch::{Arch, Projection};
use crate::ml::model::tensors::{
    self, ENDS, projection_name, projection_names, projection_path, weight_name,
};
use crate::ml::model::tied;
use crate::stages::artifacts::{Adapter, Model};

/// More than any model is wide. With a larger rank the random numbers that torch draws would keep a machine busy for days.
const LARGEST_RANK: usize = 1 << 20;

/// Makes an untrained LoRA adapter for a model: the same numbers that PEFT draws, in PEFT's folder layout.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("examples" = [{"model": "base4", "r": 16, "lora_alpha": 16, "target_modules": "all-linear"}]))]
pub struct AttachLora {
    /// The model to adapt, dense or in 4 bits.
    #[schemars(extend("examples" = ["base4"]))]
    model: Input<Model>,
    /// The rank: the inner width of the two matrices of each module. More rank means more trained parameters.
    #[serde(default = "default_r")]
    #[schemars(extend("minimum" = 1, "maximum" = LARGEST_RANK))]
    #[schemars(extend("examples" = [16, 64]))]
    r: usize,
    /// The scale of the update, which is multiplied by `lora_alpha / r`. Once or twice `r` is common.
    #[serde(default = "default_alpha")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    #[schemars(extend("examples" = [16]))]
    lora_alpha: f64,
    /// The probability with which a value that enters the adapter is dropped in training.
    #[serde(default)]
    #[schemars(extend("minimum" = 0, "exclusiveMaximum" = 1))]
    #[schemars(extend("examples" = [0.05]))]
    lora_dropout: f64,
    /// Which biases are trained beside the matrices. Most Llamas have none (`attention_bias` and `mlp_bias` in `config.json`).
    #[serde(default)]
    bias: Bias,
    /// The modules that get a pair of matrices: the ends of their paths, a regular expression that fits whole paths
    /// (`'.*layers\.[0-7]\..*_proj'`), or `all-linear` for every projection of the layers. `lm_head` and `embed_tokens` are
    /// possible beside them, but a training then takes the slower path, and merging a model whose head is its embeddings makes the
    /// head a tensor of its own. PEFT's default: none, which means these two for a Llama.
    #[serde(default)]
    #[schemars(extend("examples" = ["all-linear", ["q_proj", "k_proj", "v_proj", "o_proj"]]))]
    target_modules: TargetModules,
    /// Modules that get no matrices although `target_modules` names them, given in the same ways.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = [["down_proj"]]))]
    exclude_modules: Option<Modules>,
    /// The numbers of the layers that are adapted, from 0, with a list of `target_modules`. A module that is named by its whole
    /// path is adapted in any case, as in PEFT.
    #[serde(default, skip_serializing_if = "OneOrMany::is_empty")]
    #[schemars(extend("examples" = [[30, 31]]))]
    layers_to_transform: OneOrMany<usize>,
    /// With `layers_to_transform`, the names of the lists of layers whose numbers are meant (`layers` in a Llama). By default the
    /// first number in a path counts.
    #[serde(default, skip_serializing_if = "OneOrMany::is_empty")]
    layers_pattern: OneOrMany<String>,
    /// Whether the update is multiplied by `lora_alpha / sqrt(r)` instead (rank-stabilised LoRA).
    #[serde(default)]
    use_rslora: bool,
    /// Whether the norms of the rows of weight plus update are trained as well (`DoRA`, arXiv 2402.09353). It costs one more
    /// product of two matrices for each module and step.
    #[serde(default, skip_serializing_if = "is_off")]
    use_dora: bool,
    /// Ranks of some modules, by the ends of their paths or regular expressions. The first that fits counts, in the order in which
    /// they are written.
    #[serde(default, skip_serializing_if = "ByPattern::is_empty")]
    #[schemars(extend("additionalProperties" = {"type": "integer", "minimum": 1, "maximum": LARGEST_RANK}))]
    #[schemars(extend("examples" = [{"down_proj": 32}]))]
    rank_pattern: ByPattern<usize>,
    /// The `lora_alpha` of some modules, given in the same way as `rank_pattern`.
    #[serde(default, skip_serializing_if = "ByPattern::is_empty")]
    #[schemars(extend("additionalProperties" = {"type": "number", "exclusiveMinimum": 0}))]
    #[schemars(extend("examples" = [{"down_proj": 32.0}]))]
    alpha_pattern: ByPattern<f64>,
    /// Modules that are trained whole and saved with the adapter, by the ends of their paths (`norm` means every norm). They need
    /// as much memory as in a full training.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("examples" = [["embed_tokens", "lm_head"]]))]
    modules_to_save: Vec<String>,
    /// Tokens whose rows of the embeddings are trained, by text or id: those that `add_tokens` added, say. The other rows stay as they are. A
    /// head that is the embeddings follows them; one of its own is trained where it is named, as in
    /// `{embed_tokens: [..], lm_head: [..]}`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = [["<tool>", "</tool>"], {"embed_tokens": ["<tool>"], "lm_head": ["<tool>"]}]))]
    trainable_token_indices: Option<Tokens>,
    /// How the matrices begin. `true`: B is 0, so the adapter changes nothing at first. `false`: B is random too. `loftq`: with
    /// what quantisation took from the weights (arXiv 2310.08659, one iteration), which takes the time of a singular value
    /// decomposition for each module; the adapter then belongs to the 4-bit `model`, and PEFT gives the same for a model quantised
    /// with `double_quant: false`. `orthogonal`: with random matrices whose product is 0, for an even rank from 4 on. `pissa`: with the largest
    /// singular values of each weight (arXiv 2404.02948); `olora`: with the first columns of its QR decomposition (arXiv 2406.01775). These
    /// two are a part of the weights, so they are trained beside a model that lacks it: `merge` with `weight: -1` makes that, and
    /// `quantize` with `loftq` its 4 bits.
    #[serde(default)]
    init_lora_weights: Init,
    /// For `init_lora_weights: loftq`, the dense model that `model` was quantised from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["base"]))]
    loftq_from: Option<Input<Model>>,
    /// The seed of A's numbers, which are those after `torch.manual_seed(seed)`. PEFT has no seed of its own; 42 is the default of
    /// transformers' trainer.
    #[serde(default = "default_seed")]
    seed: u64,
    /// Where PEFT finds the base model, such as a repository of the hub. It is written to `adapter_config.json`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["meta-llama/Meta-Llama-3-8B"]))]
    base_model_name_or_path: Option<String>,
}

/// Which biases are trained.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::stages) enum Bias {
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
pub(in crate::stages) enum Init {
    /// B = 0, or both random.
    Zero(bool),
    /// By a method.
    Named(Method),
}

/// A way to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::stages) enum Method {
    /// From the error of quantisation.
    Loftq,
    /// With matrices whose product is 0.
    Orthogonal,
    /// With the largest singular values of the weight.
    Pissa,
    /// With the QR decomposition of the weight.
    Olora,
}

impl<'de> Deserialize<'de> for Init {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl Visitor<'_> for Either {
            type Value = Init;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`true`, `false`, `loftq`, `orthogonal`, `pissa` or `olora`")
            }

            fn visit_bool<E: serde::de::Error>(self, zero: bool) -> Result<Init, E> {
                Ok(Init::Zero(zero))
            }

            fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<Init, E> {
                match name {
                    "loftq" => Ok(Init::Named(Method::Loftq)),
                    "orthogonal" => Ok(Init::Named(Method::Orthogonal)),
                    "pissa" => Ok(Init::Named(Method::Pissa)),
                    "olora" => Ok(Init::Named(Method::Olora)),
                    _ => Err(E::unknown_variant(
                        name,
                        &["true", "false", "loftq", "orthogonal", "pissa", "olora"],
                    )),
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
    const VERSION: u32 = 3;
    type Output = Adapter;

    fn check(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut rule = |holds: bool, parameter: &str, message: &str| {
            if !holds {
                problems.push(Problem::new(parameter, message));
            }
        };
        let some = self.target_modules != TargetModules::Some(Modules::Named(Vec::new()));
        rule(
            some,
            "target_modules",
            "expected at least one module, or `all-linear`",
        );
        let listed = matches!(self.target_modules, TargetModules::Some(Modules::Named(_)));
        rule(
            listed || self.layers_to_transform.is_empty(),
            "layers_to_transform",
            "goes with a list of `target_modules` only; a regular expression names layers itself",
        );
        rule(
            self.layers_pattern.is_empty() || !self.layers_to_transform.is_empty(),
            "layers_pattern",
            "needs `layers_to_transform` beside it",
        );
        let saved = self.modules_to_save.iter().all(|name| !name.is_empty());
        rule(saved, "modules_to_save", "expected names of modules");
        let mistake = self
            .trainable_token_indices
            .as_ref()
            .and_then(Tokens::mistake);
        rule(
            mistake.is_none(),
            "trainable_token_indices",
            mistake.as_deref().unwrap_or_default(),
        );
        let ranks = 1..=LARGEST_RANK;
        let bounded = self.rank_pattern.values().all(|rank| ranks.contains(rank));
        let expected = format!("expected ranks from 1 to {LARGEST_RANK}");
        rule(bounded, "rank_pattern", &expected);
        let positive = self
            .alpha_pattern
            .values()
            .all(|alpha| *alpha > 0. && alpha.is_finite());
        rule(positive, "alpha_pattern", "expected numbers above 0");
        let mut regular = |name: &str, error: Option<anyhow::Error>| {
            let text = error.map(|error| error.to_string());
            rule(text.is_none(), name, text.as_deref().unwrap_or_default());
        };
        regular(
            "rank_pattern",
            Patterns::new(self.rank_pattern.0.clone()).err(),
        );
        regular(
            "alpha_pattern",
            Patterns::new(self.alpha_pattern.0.clone()).err(),
        );
        if let TargetModules::Some(modules) = &self.target_modules {
            regular("target_modules", modules.of_peft().check().err());
        }
        if let Some(modules) = &self.exclude_modules {
            regular("exclude_modules", modules.of_peft().check().err());
        }
        let loftq = self.init_lora_weights == Init::Named(Method::Loftq);
        rule(
            loftq == self.loftq_from.is_some(),
            "loftq_from",
            "`init_lora_weights: loftq` and `loftq_from` go together",
        );
        rule(
            !self.takes_from_model() || !self.use_dora,
            "use_dora",
            "DoRA can't begin with a part of the weights (`init_lora_weights: pissa` or `olora`)",
        );
        // Paths have dots but for the head's, so a name alone fits none.
        if let TargetModules::Some(Modules::Pattern(text)) = &self.target_modules
            && text != "lm_head"
            && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        {
            let message = format!(
                "the text `{text}` is a regular expression for whole paths of modules, and fits none of them"
            );
            let problem = Problem::new("target_modules", message);
            problems.push(problem.hint(format!(
                "write `[{text}]` for the modules of that name, or `all-linear` for all projections"
            )));
        }
        problems
    }

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        let folder = cx.input(&self.model)?;
        let (config, weights) = tied::open(folder)?;
        let mut new = self.settings(&config);
        if let Some(tokens) = &self.trainable_token_indices {
            new.trainable_token_indices = tokens.ids(folder)?;
        }
        for layer in 0..config.num_hidden_layers() {
            let name = weight_name(&projection_path(layer, Projection::O));
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
        let beginning = match (self.init_lora_weights, &dense) {
            (Init::Named(Method::Pissa), _) => Beginning::Pissa,
            (Init::Named(Method::Olora), _) => Beginning::Olora,
            (Init::Named(Method::Orthogonal), _) => Beginning::Orthogonal,
            (_, Some(dense)) => Beginning::Loftq(dense),
            (_, None) => Beginning::Drawn,
        };
        let adapter = attach::attach(
            &config,
            &weights,
            &new,
            self.seed,
            beginning,
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
    /// Whether the matrices begin with a part of the model's weights, which the model that they are trained beside must lack.
    pub(in crate::stages) fn takes_from_model(&self) -> bool {
        matches!(
            self.init_lora_weights,
            Init::Named(Method::Pissa | Method::Olora)
        )
    }

    fn settings(&self, arch: &Arch) -> NewAdapter {
        let target_modules = match &self.target_modules {
            // The projection that holds what the default means.
            all if arch.fused_projections && *all == TargetModules::default() => {
                Names::List(vec![projection_name(Projection::Qkv).to_owned()])
            }
            TargetModules::Some(modules) => modules.of_peft(),
            TargetModules::AllLinear => {
                let names = projection_names(arch).map(str::to_owned);
                let whole = |name: &str| {
                    let mut saved = self.modules_to_save.iter();
                    saved.any(|saved| name.ends_with(saved.as_str()))
                };
                Names::List(names.filter(|name| !whole(name)).collect())
            }
        };
        NewAdapter {
            r: self.r,
            lora_alpha: self.lora_alpha,
            lora_dropout: self.lora_dropout,
            use_rslora: self.use_rslora,
            use_dora: self.use_dora,
            bias: self.bias.of_peft(),
            // The start is done, and the base is what it has to be: PEFT must not do it again.
            init_lora_weights: self.init_lora_weights != Init::Zero(false),
            target_modules,
            modules_to_save: self.modules_to_save.clone(),
            trainable_token_indices: std::collections::BTreeMap::new(),
            exclude_modules: self.exclude_modules.as_ref().map(Modules::of_peft),
            layers_to_transform: self.layers_to_transform.0.clone(),
            layers_pattern: self.layers_pattern.0.clone(),
            rank_pattern: self.rank_pattern.0.clone(),
            alpha_pattern: self.alpha_pattern.0.clone(),
            base_model_name_or_path: self.base_model_name_or_path.clone(),
        }
    }

    /// Notes what there is to train, and warns of what may not be meant.
    fn tell(&self, cx: &Context, config: &Arch, adapter: &adapter::Adapter) {
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
        let rows = adapter
            .token_rows
            .values()
            .map(|rows| rows.values.elem_count());
        let rows: usize = rows.sum();
        cx.note("parameters", count.sum::<usize>() + whole + rows);
        if rows > 0 {
            cx.note("parameters_of_token_rows", rows);
        }
        if let Some(tokens) = &self.trainable_token_indices
            && !config.tie_word_embeddings
            && !tokens.has_head()
        {
            cx.warn(
                "the model's head is its own, so that the probabilities of these tokens are not learnt, or not how they are read; hint: \
                 `trainable_token_indices: {embed_tokens: [..], lm_head: [..]}` trains both rows of a token",
            );
        }
        if whole > 0 {
            cx.note("parameters_of_whole_tensors", whole);
        }
        for warning in unused(config, adapter) {
            cx.warn(warning);
        }
        let ends = ENDS
            .iter()
            .filter(|path| adapter.tensors.contains_key(**path));
        if config.tie_word_embeddings && ends.count() > 0 {
            cx.warn(
                "the model's head is its embeddings, and matrices stand beside one of them: they count for that one alone, and `merge` \
                 makes the head a tensor of its own",
            );
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

/// What was asked for and changes nothing, as PEFT warns of it.
fn unused(config: &Arch, adapter: &adapter::Adapter) -> Vec<String> {
    let settings = &adapter.config;
    let with = adapter.tensors.keys().map(String::as_str);
    let modules = tensors::modules(config);
    let all = modules.iter().map(|(path, _)| path.as_str());
    let mut warnings = Vec::new();
    for (name, unused) in [
        ("rank_pattern", settings.rank_pattern.unused(&with)),
        ("alpha_pattern", settings.alpha_pattern.unused(&with)),
    ] {
        for pattern in unused {
            warnings.push(format!(
                "`{name}` has the pattern `{pattern}`, which fits none of the modules with matrices and changes nothing"
            ));
        }
    }
    for name in settings.targets.unused(&all) {
        warnings.push(format!(
            "`target_modules` names `{name}`, which the model does not have"
        ));
    }
    let mut all = all;
    if settings.targets.excludes()
        && !all.any(|path| settings.targets.selection(path) == Selection::Excluded)
    {
        warnings.push("`exclude_modules` leaves out no module of the model".to_owned());
    }
    warnings
}

#[cfg(test)]
mod tests;
