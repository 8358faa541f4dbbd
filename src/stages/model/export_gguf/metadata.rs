//! What a GGUF file says of the model beside its weights: where it comes from, and its tokens.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context as _;
use serde_json::Value as Json;

use crate::engine::Context;
use crate::ml::gguf::{Array, Value};
use crate::ml::model::arch::Arch;
use crate::ml::model::create::parameters;
use crate::stages::text::{chat_template, tokenizers};
use crate::text::template::ChatTemplate;
use crate::text::tokenizer::{self, SpecialToken, special_tokens};
use crate::text::vocabulary::export::TokenList;

/// Where a file comes from (`general.*`).
pub(super) struct About<'a> {
    pub(super) name: &'a str,
    /// llama.cpp's name of the architecture.
    pub(super) architecture: &'static str,
    pub(super) license: Option<&'a str>,
    pub(super) base_model: Option<&'a str>,
    /// The digest of what the file is made of: the stage's settings and the contents of the model, which in turn are made of what is above.
    pub(super) fingerprint: Option<String>,
}

fn text(value: &str) -> Value {
    Value::String(value.to_owned())
}

/// A number of parameters in short, as in llama.cpp's names of files (`135M`, `1.2B`).
fn size_label(parameters: u64) -> String {
    let units = [(1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")];
    let count = parameters as f64;
    let unit = units.into_iter().find(|(unit, _)| count > *unit);
    let (unit, suffix) = unit.unwrap_or((1e3, "K"));
    let scaled = count / unit;
    if scaled.round() >= 10. {
        format!("{scaled:.0}{suffix}")
    } else {
        format!("{scaled:.1}{suffix}")
    }
}

impl About<'_> {
    /// The keys, by the names of the GGUF specification.
    pub(super) fn metadata(&self, arch: &Arch) -> Vec<(String, Value)> {
        let mut keys = vec![
            ("general.architecture".to_owned(), text(self.architecture)),
            ("general.type".to_owned(), text("model")),
            ("general.name".to_owned(), text(self.name)),
            (
                "general.size_label".to_owned(),
                Value::String(size_label(parameters(arch))),
            ),
        ];
        if let Some(license) = self.license {
            keys.push(("general.license".to_owned(), text(license)));
        }
        if let Some(base) = self.base_model {
            keys.push(("general.base_model.count".to_owned(), Value::U32(1)));
            let name = match base.split_once('/') {
                Some((organization, name)) => {
                    keys.push((
                        "general.base_model.0.organization".to_owned(),
                        text(organization),
                    ));
                    name
                }
                None => base,
            };
            keys.push(("general.base_model.0.name".to_owned(), text(name)));
            let url = format!("https://huggingface.co/{base}");
            keys.push((
                "general.base_model.0.repo_url".to_owned(),
                Value::String(url),
            ));
        }
        if let Some(fingerprint) = &self.fingerprint {
            keys.push(("pipeline.fingerprint".to_owned(), text(fingerprint)));
        }
        keys
    }
}

/// The tokens of a model, those with a meaning among them, and its chat template (`tokenizer.*`).
pub(super) struct Tokens {
    vocabulary: TokenList,
    bos: Option<SpecialToken>,
    eos: Option<SpecialToken>,
    pad: Option<SpecialToken>,
    /// The tokens that end a text or a turn beside `eos`.
    more_ends: Vec<SpecialToken>,
    add_bos: bool,
    add_eos: bool,
    /// The chat template as it is in the model.
    pub(super) template: Option<String>,
    warnings: Vec<String>,
}

/// The keys of GGUF for further tokens that end a text: llama.cpp stops at each.
const ENDS: [&str; 2] = ["eot_token_id", "eom_token_id"];

impl Tokens {
    /// Reads the tokens of the folder `model`, whose weights have rows for `size` ids.
    pub(super) fn read(
        cx: &Context,
        model: &Path,
        size: usize,
        pre: Option<&str>,
    ) -> anyhow::Result<Self> {
        let tokenizer = tokenizers::load(model)?;
        let vocabulary = TokenList::new(&tokenizer, size, pre)
            .context("the tokenizer can't be put into a GGUF file")?;
        let template = tokenizer::chat_template(model)?;
        let mut ends: Vec<SpecialToken> = Vec::new();
        let mut add = |end: SpecialToken| {
            if !ends.contains(&end) {
                ends.push(end);
            }
        };
        if let Some(template) = &template
            && let Some(end) = chat_template::end_of_turns(cx, template, model)
        {
            add(end);
        }
        for id in end_ids(model)? {
            if let Some(text) = tokenizer.token_of(id) {
                add(SpecialToken { text, id });
            }
        }
        let eos = tokenizer.eos.clone().or_else(|| ends.first().cloned());
        ends.retain(|end| Some(end) != eos.as_ref());
        let mut warnings = vocabulary.warnings.clone();
        if let Some(end) = ends.get(ENDS.len()) {
            warnings.push(format!(
                "a GGUF file has room for three tokens that end a text; llama.cpp may go on after `{}`",
                end.text
            ));
        }
        let (before, behind) = tokenizer.surroundings().unwrap_or_default();
        let is = |ids: &[u32], token: &Option<SpecialToken>| {
            token.as_ref().is_some_and(|token| ids == [token.id])
        };
        let (add_bos, add_eos) = (is(before, &tokenizer.bos), is(behind, &tokenizer.eos));
        if (!before.is_empty() && !add_bos) || (!behind.is_empty() && !add_eos) {
            warnings.push(
                "the tokenizer puts tokens around a text that are not its BOS and EOS; llama.cpp does not put them".into(),
            );
        }
        Ok(Self {
            bos: tokenizer.bos.clone(),
            eos,
            pad: tokenizer.pad.clone(),
            more_ends: ends,
            add_bos,
            add_eos,
            vocabulary,
            template,
            warnings,
        })
    }

    /// What llama.cpp will do in another way.
    pub(super) fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The texts of all tokens that end a text or a turn.
    pub(super) fn ends(&self) -> impl Iterator<Item = &str> {
        let all = self.eos.iter().chain(&self.more_ends);
        all.map(|end| end.text.as_str())
    }

    /// The BOS that llama.cpp itself puts before a text.
    pub(super) fn added_bos(&self) -> Option<&str> {
        let bos = self.bos.as_ref().filter(|_| self.add_bos);
        bos.map(|bos| bos.text.as_str())
    }

    /// The chat template, to be rendered; `None` if there is none, or none that can be.
    pub(super) fn renderer(&self, model: &Path) -> anyhow::Result<Option<ChatTemplate>> {
        let Some(template) = &self.template else {
            return Ok(None);
        };
        Ok(ChatTemplate::new(template, special_tokens(model)?, None).ok())
    }

    /// The keys, by llama.cpp's names.
    pub(super) fn metadata(&self) -> Vec<(String, Value)> {
        let vocabulary = &self.vocabulary;
        let types = vocabulary.kinds.iter().map(|kind| kind.id()).collect();
        let texts = |texts: &[String]| Value::Array(Array::String(texts.to_vec()));
        let mut keys: Vec<(&str, Value)> = vec![
            ("model", text(vocabulary.model)),
            ("pre", text(&vocabulary.pre)),
            ("tokens", texts(&vocabulary.tokens)),
            ("token_type", Value::Array(Array::I32(types))),
        ];
        if let Some(scores) = &vocabulary.scores {
            keys.push(("scores", Value::Array(Array::F32(scores.clone()))));
        }
        if let Some(merges) = &vocabulary.merges {
            keys.push(("merges", texts(merges)));
        }
        let mut id = |name: &'static str, id: Option<u32>| {
            if let Some(id) = id {
                keys.push((name, Value::U32(id)));
            }
        };
        let of = |token: &Option<SpecialToken>| token.as_ref().map(|token| token.id);
        id("bos_token_id", of(&self.bos));
        id("eos_token_id", of(&self.eos));
        id("padding_token_id", of(&self.pad));
        id("unknown_token_id", vocabulary.unknown);
        for (name, end) in ENDS.into_iter().zip(&self.more_ends) {
            id(name, Some(end.id));
        }
        keys.push(("add_bos_token", Value::Bool(self.add_bos)));
        keys.push(("add_eos_token", Value::Bool(self.add_eos)));
        if let Some(adds) = vocabulary.add_space_prefix {
            keys.push(("add_space_prefix", Value::Bool(adds)));
        }
        let keys = keys
            .into_iter()
            .map(|(name, value)| (format!("tokenizer.ggml.{name}"), value));
        let template = self
            .template
            .iter()
            .map(|template| ("tokenizer.chat_template".to_owned(), text(template)));
        keys.chain(template).collect()
    }
}

/// A setting of sampling by everybody's names.
pub(super) struct Sampling {
    transformers: &'static str,
    gguf: &'static str,
    pub(super) ollama: &'static str,
}

const SAMPLING: [Sampling; 5] = [
    Sampling {
        transformers: "temperature",
        gguf: "temp",
        ollama: "temperature",
    },
    Sampling {
        transformers: "top_k",
        gguf: "top_k",
        ollama: "top_k",
    },
    Sampling {
        transformers: "top_p",
        gguf: "top_p",
        ollama: "top_p",
    },
    Sampling {
        transformers: "min_p",
        gguf: "min_p",
        ollama: "min_p",
    },
    Sampling {
        transformers: "repetition_penalty",
        gguf: "penalty_repeat",
        ollama: "repeat_penalty",
    },
];

/// A JSON file of a model folder, if there is one.
fn json_of(model: &Path, name: &str) -> anyhow::Result<BTreeMap<String, Json>> {
    let path = model.join(name);
    if !path.is_file() {
        return Ok(BTreeMap::new());
    }
    let read = || anyhow::Ok(serde_json::from_slice(&std::fs::read(&path)?)?);
    read().with_context(|| format!("could not read `{}`", path.display()))
}

/// The settings of sampling in `generation_config.json`.
pub(super) fn sampling(model: &Path) -> anyhow::Result<Vec<(&'static Sampling, Json)>> {
    let config = json_of(model, "generation_config.json")?;
    let found = SAMPLING.iter().filter_map(|setting| {
        let value = config.get(setting.transformers)?;
        value.is_number().then(|| (setting, value.clone()))
    });
    Ok(found.collect())
}

/// The same as keys of the file (`general.sampling.*`).
pub(super) fn sampling_keys(model: &Path) -> anyhow::Result<Vec<(String, Value)>> {
    let keys = sampling(model)?.into_iter().filter_map(|(setting, value)| {
        let value = if setting.gguf == "top_k" {
            Value::I32(i32::try_from(value.as_i64()?).ok()?)
        } else {
            Value::F32(value.as_f64()? as f32)
        };
        Some((format!("general.sampling.{}", setting.gguf), value))
    });
    Ok(keys.collect())
}

/// The ids that end a generation by `generation_config.json` and `config.json`.
fn end_ids(model: &Path) -> anyhow::Result<Vec<u32>> {
    let mut ids = Vec::new();
    for name in ["generation_config.json", "config.json"] {
        let config = json_of(model, name)?;
        let found = match config.get("eos_token_id") {
            Some(Json::Array(ids)) => ids.iter().filter_map(Json::as_u64).collect(),
            Some(id) => id.as_u64().into_iter().collect(),
            None => Vec::new(),
        };
        ids.extend(found.into_iter().filter_map(|id| u32::try_from(id).ok()));
    }
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_told_as_llama_cpp_tells_them() {
        // gguf's `model_weight_count_rounded_notation`.
        for (count, label) in [
            (134_515_008, "135M"),
            (1_235_814_400, "1.2B"),
            (9_950_000, "10M"),
            (9_440_000, "9.4M"),
            (70_553_706_496, "71B"),
            (128_000, "128K"),
            (500, "0.5K"),
        ] {
            assert_eq!(size_label(count), label);
        }
    }
}
