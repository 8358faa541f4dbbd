//! A config of another program as a recipe.

mod rows;
mod stages;

use std::path::Path;

use serde_json::{Value, json};

use super::foreign::{Meaning, Program, TRAINING};
use super::outline::Outline;
use super::read;
use super::source_map::{SourceMap, keys};
use super::typing::json as as_json;
use crate::engine::Kind;
pub use rows::CHATML;

/// What became of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    /// The key, as it is written.
    pub key: String,
    /// Its line in the config.
    pub line: usize,
    /// Why it has no place in the recipe.
    pub why: String,
    /// Whether the recipe does something else without it; otherwise it is not needed.
    pub matters: bool,
}

/// A recipe made of a config.
pub struct Translation {
    /// The recipe.
    pub outline: Outline,
    /// Its text, which this program's own reader has taken.
    pub text: String,
    /// Where keys went: line, key and place.
    pub carried: Vec<(usize, String, String)>,
    /// Keys without a place.
    pub lost: Vec<Lost>,
}

/// How a model is trained.
const METHODS: [Method; 10] = [
    Method::new("sft", "train_sft", &[]),
    Method::new("orpo", "train_orpo", &[]),
    Method::new("dpo", "train_dpo", &[]),
    Method::new("ipo", "train_dpo", &[("loss_type", "ipo")]),
    Method::new("hinge", "train_dpo", &[("loss_type", "hinge")]),
    Method::new("cpo", "train_cpo", &[]),
    Method::new("simpo", "train_cpo", &[("loss_type", "simpo")]),
    Method::new("kto", "train_kto", &[]),
    Method::new("reward", "train_reward", &[]),
    Method::new("rm", "train_reward", &[]),
];

/// A method of training by the name that other programs give it.
struct Method {
    name: &'static str,
    /// The kind of its stage.
    kind: &'static str,
    /// Its parameters there.
    parameters: &'static [(&'static str, &'static str)],
}

impl Method {
    const fn new(
        name: &'static str,
        kind: &'static str,
        parameters: &'static [(&'static str, &'static str)],
    ) -> Self {
        Self {
            name,
            kind,
            parameters,
        }
    }
}

/// The config while it is read.
struct Config<'a> {
    map: &'a serde_json::Map<String, Value>,
    folder: &'a Path,
    spans: &'a SourceMap,
    /// Values for parameters: the kind, the parameter, the value, the key.
    values: Vec<(String, String, Value, String)>,
    carried: Vec<(usize, String, String)>,
    lost: Vec<Lost>,
}

impl Config<'_> {
    /// The value of a key that is set to something.
    fn get(&self, key: &str) -> Option<&Value> {
        self.map
            .get(key)
            .filter(|value| !value.is_null() && **value != json!(""))
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.get(key).and_then(Value::as_str)
    }

    fn is_on(&self, key: &str) -> bool {
        self.get(key).is_some_and(is_true)
    }

    fn line(&self, key: &str) -> usize {
        self.spans.key(&keys(&[key])).map_or(1, |span| span.line)
    }

    /// Notes where a key went.
    fn went(&mut self, key: &str, place: &str) {
        let line = self.line(key);
        self.carried.push((line, key.to_owned(), place.to_owned()));
    }

    /// Notes that a key is lost.
    fn lose(&mut self, key: &str, why: impl Into<String>) {
        self.note(key, why.into(), true);
    }

    fn note(&mut self, key: &str, why: String, matters: bool) {
        let line = self.line(key);
        self.lost.push(Lost {
            key: key.to_owned(),
            line,
            why,
            matters,
        });
    }

    fn set(&mut self, key: &str, kind: &str, parameter: &str, value: Value) {
        self.went(key, &format!("{kind}.{parameter}"));
        self.values
            .push((kind.into(), parameter.into(), value, key.into()));
    }

    /// The values for a kind, taken out.
    fn values_of(&mut self, kinds: &[&str]) -> Vec<(String, Value)> {
        let (mine, others) = std::mem::take(&mut self.values)
            .into_iter()
            .partition(|(kind, ..)| kinds.contains(&kind.as_str()));
        self.values = others;
        mine.into_iter()
            .map(|(_, parameter, value, _)| (parameter, value))
            .collect()
    }
}

fn is_true(value: &Value) -> bool {
    match value {
        Value::Bool(value) => *value,
        Value::String(text) => ["true", "yes", "on"].contains(&text.to_lowercase().as_str()),
        _ => false,
    }
}

/// A model as a config names it: a folder beside it, or a repository.
fn is_local(folder: &Path, name: &str) -> bool {
    name.starts_with(['/', '.', '~']) || folder.join(name).exists()
}

/// Makes a recipe of a config's text. `folder` is where its paths start, `method` the kind of training that somebody asked for.
/// Errors are sentences.
pub fn translate(
    program: Program,
    text: &str,
    folder: &Path,
    method: Option<&str>,
    kinds: &'static [Kind],
) -> Result<Translation, String> {
    let read = read::read(&text.into(), 0).map_err(|mistake| mistake.message)?;
    if let Some(mistake) = read.mistakes.first() {
        return Err(mistake.message.clone());
    }
    let value =
        as_json(&read.value, Vec::new).map_err(|_| "it holds a number that is not finite")?;
    let Value::Object(map) = &value else {
        return Err("it is not a map of keys".to_owned());
    };
    if map.contains_key("stages") && map.contains_key("version") {
        return Err("it is a recipe already".to_owned());
    }
    let mut config = Config {
        map,
        folder,
        spans: &read.source_map,
        values: Vec::new(),
        carried: Vec::new(),
        lost: Vec::new(),
    };
    let training = training(&mut config, program, method)?;
    simple_keys(&mut config, program);
    optim_args(&mut config);
    if config.is_on("use_dft_loss") {
        config.set("use_dft_loss", TRAINING, "loss_type", "dft".into());
    }
    let mut outline = stages::outline(&mut config, program, training)?;
    for (kind, parameter, _, key) in std::mem::take(&mut config.values) {
        config.carried.retain(|(_, carried, _)| *carried != key);
        config.lose(
            &key,
            format!("`{kind}.{parameter}` has no effect in this recipe"),
        );
    }
    let text = settle(&mut config, &mut outline, kinds)?;
    silent_keys(&mut config);
    config.carried.sort();
    config
        .lost
        .sort_by(|a, b| (a.line, &a.key).cmp(&(b.line, &b.key)));
    Ok(Translation {
        outline,
        text,
        carried: config.carried,
        lost: config.lost,
    })
}

/// The kind of training.
fn training(
    config: &mut Config<'_>,
    program: Program,
    asked: Option<&str>,
) -> Result<&'static str, String> {
    let named = |method: &str| METHODS.iter().find(|known| known.name == method);
    let found = match program {
        Program::Axolotl => config.text("rl").map(|method| ("rl", method.to_owned())),
        Program::LlamaFactory => match (config.text("stage"), config.text("pref_loss")) {
            (Some("dpo"), Some("orpo")) => Some(("pref_loss", "orpo".to_owned())),
            (Some("dpo"), Some(loss)) if loss != "sigmoid" => Some(("pref_loss", loss.to_owned())),
            (Some(stage), _) => Some(("stage", stage.to_owned())),
            (None, _) => None,
        },
        Program::Trl => None,
    };
    if config.get("rl").is_some() && program == Program::Axolotl {
        config.went("rl", "the kind of training");
    }
    for key in ["stage", "pref_loss"] {
        if program == Program::LlamaFactory && config.get(key).is_some() {
            config.went(key, "the kind of training");
        }
    }
    if let Some(method) = asked {
        let known = named(method).ok_or_else(|| format!("there is no method `{method}`"))?;
        return Ok(known.kind);
    }
    if let Some((key, method)) = found {
        let known = named(&method).ok_or_else(|| {
            let names: Vec<_> = METHODS.iter().map(|known| known.name).collect();
            format!(
                "`{key}: {method}` is not computed here; the methods are {}",
                names.join(", ")
            )
        })?;
        for (parameter, value) in known.parameters {
            config.set(key, known.kind, parameter, (*value).into());
        }
        // LLaMA-Factory's loss has no likelihood of its own.
        if program == Program::LlamaFactory && known.name == "simpo" {
            config.set(key, known.kind, "cpo_alpha", 0.into());
        }
        return Ok(known.kind);
    }
    if program == Program::Trl {
        let about_pairs = [
            "beta",
            "loss_type",
            "max_prompt_length",
            "precompute_ref_log_probs",
            "label_smoothing",
        ];
        if ["cpo_alpha", "simpo_gamma"]
            .iter()
            .any(|key| config.get(key).is_some())
        {
            return Ok("train_cpo");
        }
        if config.get("center_rewards_coefficient").is_some() {
            return Ok("train_reward");
        }
        let about_labels = ["desirable_weight", "undesirable_weight"];
        let is_kto = ["kto", "apo_zero_unpaired"]
            .map(Some)
            .contains(&config.text("loss_type"));
        if is_kto || about_labels.iter().any(|key| config.get(key).is_some()) {
            return Ok("train_kto");
        }
        let of_answers = config
            .text("loss_type")
            .is_some_and(|loss| ["nll", "dft", "chunked_nll"].contains(&loss));
        let mut about_pairs = about_pairs.iter();
        if about_pairs.any(|key| config.get(key).is_some() && !(of_answers && *key == "loss_type"))
        {
            return Ok("train_dpo");
        }
    }
    Ok("train_sft")
}

/// Keys whose values are ours, and those that have no place.
fn simple_keys(config: &mut Config<'_>, program: Program) {
    let mut all: Vec<String> = config.map.keys().cloned().collect();
    all.sort_by_key(|key| config.line(key));
    for key in all {
        match program.meaning(&key) {
            Some(Meaning::Is(kind, parameter)) => {
                if let Some(value) = config.get(&key).cloned() {
                    config.set(&key, kind, parameter, value);
                } else {
                    config.note(&key, "it is empty, so the default counts".to_owned(), false);
                }
            }
            Some(Meaning::Needless(why)) => config.note(&key, why.to_owned(), false),
            Some(Meaning::Lacks(why)) => {
                let off = config.get(&key).is_none_or(|value| *value == json!(false));
                config.note(&key, why.to_owned(), !off);
            }
            // Whether it is set to something is up to who reads it.
            Some(Meaning::Becomes(_)) => {}
            None => config.lose(
                &key,
                format!(
                    "{} has no such key, as far as is known here",
                    program.name()
                ),
            ),
        }
    }
}

/// transformers' text of an optimiser's settings, `momentum=0.9,nesterov=true`, as a map.
fn optim_args(config: &mut Config<'_>) {
    let Some(text) = config.text("optim_args").map(str::to_owned) else {
        return;
    };
    let pairs = text.split(',').filter_map(|pair| pair.split_once('='));
    let typed = |value: &str| match value.parse::<f64>() {
        Ok(number) => json!(number),
        Err(_) => json!(["true", "1", "yes"].contains(&value.to_lowercase().as_str())),
    };
    let map = pairs.map(|(key, value)| (key.trim().to_owned(), typed(value.trim())));
    let map: serde_json::Map<String, Value> = map.collect();
    config.set("optim_args", TRAINING, "optim_args", Value::Object(map));
}

/// Tells of keys that nothing was told of yet.
fn silent_keys(config: &mut Config<'_>) {
    let told = |config: &Config<'_>, key: &str| {
        let carried = config.carried.iter().any(|(_, other, _)| other == key);
        carried || config.lost.iter().any(|lost| lost.key == key)
    };
    for key in config.map.keys() {
        if told(config, key) {
            continue;
        }
        match config.get(key) {
            None => config.note(key, "it is empty, so the default counts".to_owned(), false),
            Some(value) if *value == json!(false) => {
                config.note(key, "it is off".to_owned(), false);
            }
            Some(_) => config.lose(key, "it has no effect in this recipe"),
        }
    }
}

/// The text of a recipe that this program's own reader takes: parameters that it refuses are left out and told.
fn settle(
    config: &mut Config<'_>,
    outline: &mut Outline,
    kinds: &'static [Kind],
) -> Result<String, String> {
    loop {
        let rendered = outline.render();
        let Err(errors) = super::parse(Path::new("recipe"), &rendered.text, &[], kinds) else {
            return Ok(rendered.text);
        };
        let mut refused = Vec::new();
        for error in &errors.0 {
            let Some(span) = error.span else { continue };
            // The last parameter that begins at or above the line.
            let at = rendered
                .lines
                .iter()
                .rev()
                .find(|(line, ..)| *line <= span.line);
            if let Some((_, stage, place)) = at
                && !refused.iter().any(|(s, p, _)| (s, p) == (stage, place))
            {
                refused.push((*stage, *place, error.message.clone()));
            }
        }
        if refused.is_empty() {
            return Err(format!(
                "the recipe that was made of it can't be read: {errors}"
            ));
        }
        refused.sort_by_key(|(stage, place, _)| std::cmp::Reverse((*stage, *place)));
        for (stage, place, message) in refused {
            let stage = &mut outline.stages[stage];
            let (parameter, _) = stage.parameters.remove(place);
            let places = [
                format!("{}.{parameter}", stage.kind),
                format!("{TRAINING}.{parameter}"),
            ];
            let key = config.carried.iter().find(|(_, _, to)| places.contains(to));
            let Some((_, key, _)) = key.cloned() else {
                return Err(format!(
                    "the recipe that was made of it can't be read: {message}"
                ));
            };
            config.carried.retain(|(_, carried, _)| *carried != key);
            config.lose(&key, message);
        }
    }
}
