//! `adapter_config.json`. A setting that changes an adapter's numbers is either implemented or refused; all others are kept unchanged.

use std::collections::BTreeMap;

use anyhow::{Context as _, bail, ensure};
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::{Map, Value, json};

use super::patterns::{Orders, Pattern, Patterns};
use super::targets::Targets;
use super::token_rows;
use crate::ml::io::folder::sorted;

/// The keys with patterns, whose order matters.
const RANKS: &str = "rank_pattern";
const ALPHAS: &str = "alpha_pattern";
/// Settings that would change an adapter's numbers in a way that is not implemented. They must be off.
const OFF: [&str; 9] = [
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "target_parameters",
    "use_qalora",
];
/// More such settings, for which PEFT writes an object or nothing.
const EMPTY: [&str; 3] = ["monteclora_config", "use_bdlora", "velora_config"];

/// All other settings that PEFT knows: those that are implemented, and those that don't change a trained adapter's numbers.
const KNOWN: [&str; 33] = [
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
    // From PEFT's first versions.
    "enable_lora",
    "merge_weights",
    "model_type",
];

/// The biases that are trained with an adapter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Bias {
    /// No biases.
    #[default]
    None,
    /// All biases of the model.
    All,
    /// The biases of the modules with a pair of matrices.
    LoraOnly,
}

impl Bias {
    /// Its name in PEFT.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::All => "all",
            Self::LoraOnly => "lora_only",
        }
    }

    fn named(name: &str) -> Option<Self> {
        [Self::None, Self::All, Self::LoraOnly]
            .into_iter()
            .find(|bias| bias.name() == name)
    }
}

/// The settings of `adapter_config.json`, and all its keys to be written back.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// The rank of the modules without a pattern of their own.
    pub r: usize,
    /// The scaling's numerator for the modules without a pattern of their own.
    pub lora_alpha: f64,
    /// The probability of dropping an input value in training.
    pub lora_dropout: f64,
    /// Whether the scaling divides by the square root of the rank (Kalajdzievski 2023, arXiv 2312.03732).
    pub use_rslora: bool,
    /// Whether the row norms of W + s B A are trained (`DoRA`; Liu et al. 2024, arXiv 2402.09353).
    pub use_dora: bool,
    /// The biases that are trained.
    pub bias: Bias,
    /// The fully trained modules, by the last parts of their paths.
    pub modules_to_save: Vec<String>,
    /// The ids of the tokens whose rows are trained, by the ends of the paths of embeddings and head.
    pub trainable_token_indices: BTreeMap<String, Vec<u32>>,
    /// The ranks of some modules.
    pub rank_pattern: Patterns<usize>,
    /// The scaling's numerators of some modules.
    pub alpha_pattern: Patterns<f64>,
    /// Whether a tied head stays tied when the embeddings are fully trained.
    pub ensure_weight_tying: bool,
    /// The modules with a pair of matrices.
    pub targets: Targets,
    /// The file as it was read.
    pub raw: Map<String, Value>,
}

/// A choice of modules.
#[derive(Debug, Clone, PartialEq)]
pub enum Names {
    /// By the last parts of their paths.
    List(Vec<String>),
    /// By a regular expression that matches the whole path.
    Pattern(String),
}

impl Names {
    /// Fails if a pattern is not a regular expression, or one that takes too long.
    pub fn check(&self) -> anyhow::Result<()> {
        match self {
            Self::List(_) => Ok(()),
            Self::Pattern(text) => Pattern::whole(text).map(|_| ()),
        }
    }

    fn json(&self) -> Value {
        match self {
            Self::List(names) => json!(names),
            Self::Pattern(pattern) => json!(pattern),
        }
    }
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
    /// Whether the scaling divides by the square root of the rank.
    pub use_rslora: bool,
    /// Whether the row norms are trained (`DoRA`).
    pub use_dora: bool,
    /// The biases that are trained.
    pub bias: Bias,
    /// Whether A is drawn a second time and B is set to zero, so that the adapter changes nothing before it is trained.
    pub init_lora_weights: bool,
    /// The modules that get matrices.
    pub target_modules: Names,
    /// The modules among these that get none.
    pub exclude_modules: Option<Names>,
    /// The numbers of the layers whose modules get matrices; if empty, those of all layers.
    pub layers_to_transform: Vec<usize>,
    /// The names of the lists of layers, for `layers_to_transform`.
    pub layers_pattern: Vec<String>,
    /// The modules that are fully trained.
    pub modules_to_save: Vec<String>,
    /// The ids of the tokens whose rows are trained, by the names of modules (`embed_tokens`, `lm_head`).
    pub trainable_token_indices: BTreeMap<String, Vec<u32>>,
    /// The ranks of some modules, by pattern.
    pub rank_pattern: Vec<(String, usize)>,
    /// The scaling's numerators of some modules, by pattern.
    pub alpha_pattern: Vec<(String, f64)>,
    /// The name or the folder from which PEFT loads the base.
    pub base_model_name_or_path: Option<String>,
}

impl Default for NewAdapter {
    /// PEFT's defaults, with no target modules.
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.,
            lora_dropout: 0.,
            use_rslora: false,
            use_dora: false,
            bias: Bias::None,
            init_lora_weights: true,
            target_modules: Names::List(Vec::new()),
            exclude_modules: None,
            layers_to_transform: Vec::new(),
            layers_pattern: Vec::new(),
            modules_to_save: Vec::new(),
            trainable_token_indices: BTreeMap::new(),
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            base_model_name_or_path: None,
        }
    }
}

/// Whether a name of `modules_to_save` selects the module at `path` or one that contains it. PEFT compares the ends of strings, not
/// parts of the path, so `norm` selects every norm.
pub fn names_module(name: &str, path: &str) -> bool {
    let mut around = path.match_indices('.').map(|(end, _)| &path[..end]);
    path.ends_with(name) || around.any(|around| around.ends_with(name))
}

/// A list, or `null` if it is empty.
fn some<T: Serialize>(items: &[T]) -> Value {
    if items.is_empty() {
        Value::Null
    } else {
        json!(items)
    }
}

/// The configuration in the form in which it is serialised.
struct Written<'a>(&'a AdapterConfig);

impl Serialize for Written<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let config = self.0;
        let mut entries: Vec<_> = config.raw.iter().collect();
        entries.sort_unstable_by_key(|(key, _)| *key);
        let mut map = serializer.serialize_map(Some(entries.len()))?;
        for (key, value) in entries {
            let order: Vec<&str> = match key.as_str() {
                RANKS => config.rank_pattern.texts().collect(),
                ALPHAS => config.alpha_pattern.texts().collect(),
                _ => Vec::new(),
            };
            match value {
                Value::Object(items) if !order.is_empty() => {
                    map.serialize_entry(key, &Ordered(&order, items))?;
                }
                Value::Array(items) if key == "target_modules" => {
                    let mut items = items.clone();
                    items.sort_by_key(ToString::to_string);
                    map.serialize_entry(key, &items)?;
                }
                value => map.serialize_entry(key, &sorted(value))?,
            }
        }
        map.end()
    }
}

/// The entries of an object in the given order.
struct Ordered<'a>(&'a [&'a str], &'a Map<String, Value>);

impl Serialize for Ordered<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for key in self.0 {
            map.serialize_entry(key, &self.1.get(*key))?;
        }
        map.end()
    }
}

/// A number as JSON, without a fraction if it is an integer, as people write it for PEFT.
fn plain(number: f64) -> Value {
    if number.fract() == 0. && number.abs() < 1e15 {
        json!(number as i64)
    } else {
        json!(number)
    }
}

impl AdapterConfig {
    /// The configuration of a new adapter. It has the keys that every PEFT since 0.4 knows, and later ones only where they are needed,
    /// because PEFT before 0.14 refuses keys that it does not know.
    ///
    /// # Errors
    /// A pattern is not a regular expression.
    pub fn new(new: &NewAdapter) -> anyhow::Result<Self> {
        let save = &new.modules_to_save;
        let raw = json!({
            "auto_mapping": null,
            "base_model_name_or_path": new.base_model_name_or_path,
            "bias": new.bias.name(),
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": new.init_lora_weights,
            "layers_pattern": some(&new.layers_pattern),
            "layers_to_transform": some(&new.layers_to_transform),
            "lora_alpha": plain(new.lora_alpha),
            "lora_dropout": new.lora_dropout,
            "modules_to_save": (!save.is_empty()).then_some(save),
            "peft_type": "LORA",
            "r": new.r,
            "revision": null,
            "target_modules": new.target_modules.json(),
            "task_type": "CAUSAL_LM",
        });
        let Value::Object(mut raw) = raw else {
            bail!("an adapter's settings are an object");
        };
        let mut later = |name: &str, value: Value| raw.insert(name.into(), value);
        if !new.rank_pattern.is_empty() {
            let ranks = new.rank_pattern.iter();
            let ranks = ranks.map(|(pattern, rank)| (pattern.clone(), json!(rank)));
            later("rank_pattern", Value::Object(ranks.collect())); // 0.5
        }
        if !new.alpha_pattern.is_empty() {
            let alphas = new.alpha_pattern.iter();
            let alphas = alphas.map(|(pattern, alpha)| (pattern.clone(), plain(*alpha)));
            later("alpha_pattern", Value::Object(alphas.collect())); // 0.5
        }
        if let Some(exclude) = &new.exclude_modules {
            later("exclude_modules", exclude.json()); // 0.14
        }
        if !new.trainable_token_indices.is_empty() {
            let written = token_rows::written(&new.trainable_token_indices);
            later(token_rows::SETTING, written); // 0.15
        }
        if new.use_rslora {
            later("use_rslora", true.into()); // 0.8
        }
        if new.use_dora {
            later("use_dora", true.into()); // 0.9
        }
        let texts = |key| -> Vec<String> {
            match key {
                RANKS => new
                    .rank_pattern
                    .iter()
                    .map(|(text, _)| text.clone())
                    .collect(),
                _ => new
                    .alpha_pattern
                    .iter()
                    .map(|(text, _)| text.clone())
                    .collect(),
            }
        };
        let orders = [RANKS, ALPHAS].into_iter();
        let orders = orders.fold(Orders::default(), |orders, key| {
            orders.with(key, texts(key).into_iter())
        });
        Self::parse(raw, &orders)
    }

    /// Reads the contents of an `adapter_config.json`.
    ///
    /// # Errors
    /// It is not JSON, a value has the wrong type, or a setting is not supported.
    pub fn read(text: &[u8]) -> anyhow::Result<Self> {
        Self::parse(serde_json::from_slice(text)?, &Orders::read(text)?)
    }

    /// The contents of `adapter_config.json` with keys sorted, as PEFT writes it, except for the patterns, whose order matters. PEFT
    /// keeps `target_modules` in a set, whose order differs from run to run; here it is sorted.
    ///
    /// # Errors
    /// The settings can't be serialised.
    pub fn json(&self) -> anyhow::Result<String> {
        let mut text = serde_json::to_string_pretty(&Written(self))?;
        text.push('\n');
        Ok(text)
    }

    /// The rank of the pair of the module at `path` (`model.layers.0.self_attn.q_proj`).
    pub fn rank(&self, path: &str) -> usize {
        self.rank_pattern.find(path).unwrap_or(self.r)
    }

    /// The factor of B A for the module at `path`: alpha / r, or alpha / sqrt(r) with `use_rslora`.
    pub fn scaling(&self, path: &str) -> f64 {
        let r = self.rank(path) as f64;
        let alpha = self.alpha_pattern.find(path).unwrap_or(self.lora_alpha);
        alpha / if self.use_rslora { r.sqrt() } else { r }
    }

    /// Whether the module at `path`, or one that contains it, is fully trained.
    pub fn saves(&self, path: &str) -> bool {
        let mut names = self.modules_to_save.iter();
        names.any(|name| names_module(name, path))
    }

    /// The ids of the tokens whose rows are trained in the module at `path`, if there are such.
    pub fn token_ids(&self, path: &str) -> Option<&[u32]> {
        let mut names = self.trainable_token_indices.iter();
        let found = names.find(|(name, _)| token_rows::names_end(name, path));
        found.map(|(_, ids)| ids.as_slice())
    }

    /// Whether it is for a sequence classification, that is, a model whose head gives scores.
    pub fn is_classifier(&self) -> bool {
        self.raw.get("task_type").and_then(Value::as_str) == Some("SEQ_CLS")
    }

    /// Makes it one for a sequence classification.
    #[must_use]
    pub fn classifying(mut self) -> Self {
        self.raw.insert("task_type".into(), "SEQ_CLS".into());
        self
    }

    /// The settings that no known version of PEFT has, and that are not off.
    pub fn unknown(&self) -> impl Iterator<Item = &str> {
        let entries = self.raw.iter().filter(|(key, value)| {
            let known = [&KNOWN[..], &OFF, &EMPTY];
            !known.iter().any(|known| known.contains(&key.as_str())) && !says_nothing(value)
        });
        entries.map(|(key, _)| key.as_str())
    }

    /// Whether only A is trained and B keeps its initial values (`MiCA`).
    pub fn keeps_b(&self) -> bool {
        let init = self.raw.get("init_lora_weights").and_then(Value::as_str);
        init.is_some_and(|init| init.to_lowercase() == "mica")
    }

    /// Whether the adapter was initialised by `LoftQ`, which needs a quantised base.
    pub fn is_loftq(&self) -> bool {
        self.raw.get("init_lora_weights").and_then(Value::as_str) == Some("loftq")
    }

    /// Reads the keys of `adapter_config.json`.
    pub(super) fn parse(raw: Map<String, Value>, orders: &Orders) -> anyhow::Result<Self> {
        let kind = raw.get("peft_type").and_then(Value::as_str);
        ensure!(
            kind == Some("LORA"),
            "its type is `{}`, expected `LORA`",
            kind.unwrap_or("not named")
        );
        refuse(&raw)?;
        let r = raw.get("r").and_then(Value::as_u64).filter(|r| *r > 0);
        let r = r.context("`r` is missing or not a whole number above 0")?;
        let lora_dropout = number(&raw, "lora_dropout")?.unwrap_or(0.);
        ensure!(
            (0. ..1.).contains(&lora_dropout),
            "`lora_dropout` is {lora_dropout}, expected a number from 0 to below 1"
        );
        let on = |name: &str| raw.get(name).and_then(Value::as_bool) == Some(true);
        Ok(Self {
            r: usize::try_from(r)?,
            lora_alpha: number(&raw, "lora_alpha")?.context("`lora_alpha` is missing")?,
            lora_dropout,
            use_rslora: on("use_rslora"),
            use_dora: on("use_dora"),
            bias: bias(&raw)?,
            modules_to_save: modules_to_save(&raw)?,
            trainable_token_indices: token_rows::parse(&raw)?,
            rank_pattern: patterns(&raw, RANKS, orders, |value| {
                let rank = value.as_u64().filter(|rank| *rank > 0)?;
                usize::try_from(rank).ok()
            })?,
            alpha_pattern: patterns(&raw, ALPHAS, orders, |value| {
                value.as_f64().filter(|alpha| alpha.is_finite())
            })?,
            ensure_weight_tying: on("ensure_weight_tying"),
            targets: Targets::parse(&raw)?,
            raw,
        })
    }
}

/// Whether a setting is off.
fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(items) => items.is_empty(),
        _ => false,
    }
}

/// Fails on settings that would change the numbers and are not implemented.
fn refuse(raw: &Map<String, Value>) -> anyhow::Result<()> {
    let off = |value: &Value| !value.is_object() && says_nothing(value);
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
    // These methods change the base at initialisation, so the adapter means nothing with the unchanged base.
    let init = raw.get("init_lora_weights").and_then(Value::as_str);
    let init = init.unwrap_or_default();
    for changes in ["pissa", "olora", "corda", "lora_ga"] {
        ensure!(
            !init.to_lowercase().starts_with(changes),
            "`init_lora_weights: {init}` changes the base model and is not supported; convert the adapter by PEFT's \
             `path_initial_model_for_weight_conversion`"
        );
    }
    if init == "loftq" {
        let loftq = raw.get("loftq_config");
        let setting = |name: &str| {
            loftq
                .and_then(|loftq| loftq.get(name))
                .and_then(Value::as_u64)
        };
        let (bits, iterations) = (setting("loftq_bits"), setting("loftq_iter"));
        ensure!(
            bits.is_none_or(|bits| bits == 4)
                && iterations.is_none_or(|iterations| iterations == 1),
            "`init_lora_weights: loftq` with {} bits and {} iterations changes the base model in a way that can't be made again; \
             expected 4 bits and 1 iteration, or an adapter saved with `init_lora_weights: true` beside its own base",
            bits.unwrap_or(4),
            iterations.unwrap_or(1)
        );
    }
    Ok(())
}

fn number(raw: &Map<String, Value>, name: &str) -> anyhow::Result<Option<f64>> {
    let Some(value) = raw.get(name).filter(|value| !value.is_null()) else {
        return Ok(None);
    };
    let number = value.as_f64().filter(|number| number.is_finite());
    let number = number.with_context(|| format!("`{name}` is {value}, expected a number"))?;
    Ok(Some(number))
}

fn bias(raw: &Map<String, Value>) -> anyhow::Result<Bias> {
    let Some(value) = raw.get("bias").filter(|value| !value.is_null()) else {
        return Ok(Bias::None);
    };
    let bias = value.as_str().and_then(Bias::named);
    bias.with_context(|| format!("`bias` is {value}, expected `none`, `all` or `lora_only`"))
}

fn modules_to_save(raw: &Map<String, Value>) -> anyhow::Result<Vec<String>> {
    let name = "modules_to_save";
    let modules = match raw.get(name) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(modules)) => modules
            .iter()
            .map(Value::as_str)
            .collect::<Option<Vec<_>>>(),
        Some(_) => None,
    };
    let modules = modules.filter(|modules| !modules.contains(&""));
    let modules = modules.with_context(|| format!("`{name}` is no list of modules' names"))?;
    Ok(modules.into_iter().map(str::to_owned).collect())
}

fn patterns<T: Copy>(
    raw: &Map<String, Value>,
    name: &str,
    orders: &Orders,
    value: impl Fn(&Value) -> Option<T>,
) -> anyhow::Result<Patterns<T>> {
    let items = match raw.get(name) {
        None | Some(Value::Null) => return Patterns::new([]),
        Some(Value::Object(items)) => orders.entries(name, items),
        Some(_) => bail!("`{name}` is no object of patterns and numbers"),
    };
    let items = items.into_iter().map(|(pattern, number)| {
        let value = value(number);
        let value = value.with_context(|| {
            format!("`{name}` gives {number} to `{pattern}`, expected a number above 0")
        })?;
        Ok((pattern.clone(), value))
    });
    let items = items.collect::<anyhow::Result<Vec<_>>>()?;
    Patterns::new(items).with_context(|| format!("could not use `{name}`"))
}
