//! `generation_config.json`: how a model's makers let it answer.

use std::fs;
use std::path::Path;

use anyhow::Context as _;
use serde_json::{Map, Value};

use super::model::arch::Arch;
use super::sampling::Sampling;

const FILE: &str = "generation_config.json";

/// Keys that change what transformers answers and that this program does not compute, with the value that changes nothing.
const LEFT_OUT: [(&str, &str); 17] = [
    ("bad_words_ids", "null"),
    ("begin_suppress_tokens", "null"),
    ("encoder_repetition_penalty", "1"),
    ("epsilon_cutoff", "0"),
    ("eta_cutoff", "0"),
    ("exponential_decay_length_penalty", "null"),
    ("forced_bos_token_id", "null"),
    ("forced_eos_token_id", "null"),
    ("guidance_scale", "1"),
    ("min_length", "0"),
    ("min_new_tokens", "0"),
    ("no_repeat_ngram_size", "0"),
    ("num_beams", "1"),
    ("sequence_bias", "null"),
    ("suppress_tokens", "null"),
    ("top_h", "null"),
    ("typical_p", "1"),
];

/// What a model folder says of generation.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationConfig {
    /// The ids that end an answer: those of `config.json` and of `generation_config.json`.
    pub eos_token_ids: Vec<u32>,
    /// How ids are chosen.
    pub sampling: Sampling,
    /// The most ids of an answer, if it says so.
    pub max_new_tokens: Option<usize>,
    /// Keys with a value that would change answers and is not computed here.
    pub left_out: Vec<String>,
}

impl GenerationConfig {
    /// Reads the file in a model folder. Where it is missing, `arch` and transformers' defaults count.
    ///
    /// # Errors
    /// A file that can't be read, or a number outside its bounds.
    pub fn read(folder: &Path, arch: &Arch) -> anyhow::Result<Self> {
        let map = file(folder)?;
        let read = Self::of(&map, arch);
        read.with_context(|| format!("could not read `{}`", folder.join(FILE).display()))
    }

    fn of(map: &Map<String, Value>, arch: &Arch) -> anyhow::Result<Self> {
        let number = |name: &str| map.get(name).and_then(Value::as_f64);
        let count = |name: &str| map.get(name).and_then(Value::as_u64);
        let default = Sampling::default();
        let mut sampling = Sampling {
            do_sample: map
                .get("do_sample")
                .and_then(Value::as_bool)
                .unwrap_or(default.do_sample),
            temperature: number("temperature").unwrap_or(default.temperature),
            top_k: count("top_k").map_or(default.top_k, |count| count as usize),
            top_p: number("top_p").unwrap_or(default.top_p),
            min_p: number("min_p"),
            repetition_penalty: number("repetition_penalty").unwrap_or(default.repetition_penalty),
        };
        // Written beside `do_sample: false`, it means "greedy" and divides nothing.
        if !sampling.do_sample && sampling.temperature == 0. {
            sampling.temperature = default.temperature;
        }
        sampling.check()?;
        let changes = |(name, neutral): &&(&str, &str)| match map.get(*name) {
            None | Some(Value::Null) => false,
            Some(Value::Number(number)) => number.as_f64() != neutral.parse().ok(),
            Some(_) => true,
        };
        let odd = LEFT_OUT.iter().filter(changes);
        Ok(Self {
            eos_token_ids: eos_token_ids(map, arch),
            sampling,
            max_new_tokens: count("max_new_tokens").map(|count| count as usize),
            left_out: odd.map(|(name, _)| (*name).to_owned()).collect(),
        })
    }
}

/// The ids that end an answer: those of `config.json` and of `generation_config.json` in a model folder.
///
/// # Errors
/// A file that can't be read.
pub fn stop_ids(folder: &Path, arch: &Arch) -> anyhow::Result<Vec<u32>> {
    Ok(eos_token_ids(&file(folder)?, arch))
}

/// What the file says; nothing where it is missing.
fn file(folder: &Path) -> anyhow::Result<Map<String, Value>> {
    let path = folder.join(FILE);
    if !path.is_file() {
        return Ok(Map::new());
    }
    let read = || -> anyhow::Result<_> { Ok(serde_json::from_slice(&fs::read(&path)?)?) };
    let map = read();
    map.with_context(|| format!("could not read `{}`", path.display()))
}

fn eos_token_ids(map: &Map<String, Value>, arch: &Arch) -> Vec<u32> {
    let mut all = arch.eos_token_ids.clone();
    let eos = match map.get("eos_token_id") {
        Some(Value::Array(many)) => many.iter().collect(),
        one => one.into_iter().collect::<Vec<_>>(),
    };
    let ids = eos.into_iter().filter_map(Value::as_u64);
    for id in ids.filter_map(|id| u32::try_from(id).ok()) {
        if !all.contains(&id) {
            all.push(id);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/model");

    fn read(text: Option<&str>) -> anyhow::Result<GenerationConfig> {
        let folder = tempfile::tempdir().unwrap();
        if let Some(text) = text {
            fs::write(folder.path().join(FILE), text).unwrap();
        }
        let arch = Arch::read(Path::new(MODEL)).unwrap();
        GenerationConfig::read(folder.path(), &arch)
    }

    #[test]
    fn without_a_file_the_models_configuration_counts() {
        let arch = Arch::read(Path::new(MODEL)).unwrap();
        let found = read(None).unwrap();
        assert_eq!(found.eos_token_ids, arch.eos_token_ids);
        assert_eq!(found.sampling, Sampling::default());
    }

    #[test]
    fn settings_and_all_end_tokens_are_read() {
        let text = r#"{"eos_token_id": [1022, 1019], "do_sample": true, "temperature": 0.6, "top_p": 0.9, "top_k": 20,
            "repetition_penalty": 1.05, "max_new_tokens": 7, "num_beams": 1, "typical_p": 0.9, "suppress_tokens": [3]}"#;
        let found = read(Some(text)).unwrap();
        assert!(found.eos_token_ids.contains(&1022) && found.eos_token_ids.contains(&1019));
        let expected = Sampling {
            do_sample: true,
            temperature: 0.6,
            top_k: 20,
            top_p: 0.9,
            min_p: None,
            repetition_penalty: 1.05,
        };
        assert_eq!(found.sampling, expected);
        assert_eq!(found.max_new_tokens, Some(7));
        assert_eq!(found.left_out, ["suppress_tokens", "typical_p"]);
    }

    #[test]
    fn numbers_outside_their_bounds_are_refused() {
        for text in [
            r#"{"do_sample": true, "temperature": 0}"#,
            r#"{"top_p": 1.5}"#,
            r#"{"min_p": -1}"#,
            r#"{"repetition_penalty": 0}"#,
            "[]",
        ] {
            let error = format!("{:#}", read(Some(text)).unwrap_err());
            assert!(error.contains(FILE), "{error}");
        }
        read(Some(r#"{"do_sample": false, "temperature": 0}"#)).unwrap();
    }
}
