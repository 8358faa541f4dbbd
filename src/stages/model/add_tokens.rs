//! `add_tokens`: a model with new tokens.

use std::path::Path;

use anyhow::{Context as _, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::files::CONFIG;
use crate::engine::{Context, Input, Problem, Stage};
use crate::ml::io::folder;
use crate::ml::model::resize::{NewRows, resize};
use crate::ml::model::tied;
use crate::stages::artifacts::Model;
use crate::stages::text::tokenizers;
use crate::text::tokenizer::NewToken;

/// The settings beside the configuration with ids of tokens.
const GENERATION: &str = "generation_config.json";

/// Adds tokens to a model: to its tokenizer, and as new rows to its embeddings and its head, as transformers' `add_tokens` and
/// `resize_token_embeddings` do. A token that the tokenizer has already keeps its id.
///
/// The new rows mean nothing before they are trained: in a training of all weights, by `modules_to_save: [embed_tokens, lm_head]` of
/// `attach_lora`, or by its `trainable_token_indices`, which trains these rows alone.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("examples" = [{"model": "base", "special_tokens": ["<|im_start|>", "<|im_end|>"]}]))]
pub struct AddTokens {
    /// The model, dense or in 4 bits.
    #[schemars(extend("examples" = ["base"]))]
    model: Input<Model>,
    /// Words that become tokens of their own, such as terms of a field.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("examples" = [["<tool>", "</tool>"]]))]
    tokens: Vec<String>,
    /// Special tokens: marks of a chat template, say. They are left out of the text of answers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("examples" = [["<|im_start|>", "<|im_end|>"]]))]
    special_tokens: Vec<String>,
    /// The token that begins a text, made if it is not there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    bos_token: Option<String>,
    /// The token that ends an answer, made if it is not there. The model's settings get its id, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["<|im_end|>"]))]
    eos_token: Option<String>,
    /// The token that fills short sequences, made if it is not there. The model's settings get its id, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["<|pad|>"]))]
    pad_token: Option<String>,
    /// Makes the number of rows a multiple of this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minimum" = 1, "maximum" = 65536))]
    #[schemars(extend("examples" = [64]))]
    pad_to_multiple_of: Option<usize>,
    /// Whether new rows begin near the mean of the others, which changes the probabilities of other tokens least. `false`: with random numbers
    /// of a standard deviation of `initializer_range` in `config.json`.
    #[serde(default = "yes")]
    mean_resizing: bool,
    /// The seed of the rows' numbers, which are those after `torch.manual_seed(seed)`.
    #[serde(default = "default_seed")]
    seed: u64,
}

fn yes() -> bool {
    true
}

fn default_seed() -> u64 {
    42
}

impl AddTokens {
    /// All tokens: words first, then those with a name in transformers' order, then the other special ones.
    fn all(&self) -> Vec<NewToken> {
        let token = |text: &String, special, name| NewToken {
            text: text.clone(),
            special,
            name,
        };
        let named = [
            ("bos_token", &self.bos_token),
            ("eos_token", &self.eos_token),
            ("pad_token", &self.pad_token),
        ];
        let words = self.tokens.iter().map(|text| token(text, false, None));
        let named = named
            .into_iter()
            .filter_map(|(name, text)| Some(token(text.as_ref()?, true, Some(name))));
        let special = self.special_tokens.iter();
        let special = special.map(|text| token(text, true, None));
        words.chain(named).chain(special).collect()
    }
}

impl Stage for AddTokens {
    const KIND: &'static str = "add_tokens";
    const VERSION: u32 = 1;
    type Output = Model;

    fn check(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        let all = self.all();
        if all.is_empty() && self.pad_to_multiple_of.is_none() {
            problems.push(Problem::new(
                "tokens",
                "expected tokens to add, here, in `special_tokens` or by name (`pad_token`)",
            ));
        }
        for (name, list) in [
            ("tokens", &self.tokens),
            ("special_tokens", &self.special_tokens),
        ] {
            if list.iter().any(String::is_empty) {
                problems.push(Problem::new(name, "expected texts that are not empty"));
            }
            if let Some(twice) = (1..list.len()).find(|at| list[..*at].contains(&list[*at])) {
                let message = format!("`{}` stands there twice", list[twice]);
                problems.push(Problem::new(name, message));
            }
        }
        if let Some(both) = self
            .tokens
            .iter()
            .find(|token| self.special_tokens.contains(token))
        {
            problems.push(Problem::new(
                "special_tokens",
                format!("`{both}` is among `tokens`, too; expected it in one of both"),
            ));
        }
        problems
    }

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        let folder = cx.input(&self.model)?;
        let (arch, _) = tied::open(folder)?;
        let tokens = self.all();
        let mut tokenizer = tokenizers::load(folder)?;
        let before = tokenizer.end_of_ids();
        let ids = tokenizer.add(&tokens)?;
        let end = tokenizer.end_of_ids();
        // A vocabulary may have more rows than its tokenizer has tokens; these are taken first.
        let rows = match self.pad_to_multiple_of {
            Some(multiple) => end.max(arch.vocab_size).next_multiple_of(multiple),
            None => end.max(arch.vocab_size),
        };
        let begin = if self.mean_resizing {
            NewRows::Mean
        } else {
            NewRows::Normal(range(folder)?)
        };
        let report = resize(
            folder,
            cx.out(),
            rows,
            begin,
            self.seed,
            &mut |done, total| {
                cx.progress(done, Some(total), "bytes");
                cx.check_cancelled()
            },
        )?;
        for file in &report.files {
            cx.written(&file.name, &file.blake3)?;
        }
        let named: Vec<(&str, u32)> = tokens
            .iter()
            .zip(&ids)
            .filter_map(|(token, id)| Some((token.name?, *id)))
            .collect();
        let enter = |settings: &mut Map<String, Value>| {
            for (name, id) in &named {
                settings.insert(format!("{name}_id"), json!(id));
            }
        };
        tied::carry(folder, cx.out(), arch.tie_word_embeddings, |settings| {
            settings.insert("vocab_size".into(), rows.into());
            enter(settings);
        })?;
        set_ids(cx.out(), &named, enter)?;
        tokenizer.write_added(folder, &tokens, cx.out())?;
        let again = tokenizers::load(cx.out())?;
        for (token, id) in tokens.iter().zip(&ids) {
            let found = again.token(&token.text)?.id;
            ensure!(
                found == *id,
                "`{}` has the id {id}, but {found} where the tokenizer is read again, which is a bug in pipeline",
                token.text
            );
        }
        let new = ids.iter().filter(|id| **id as usize >= before).count();
        cx.note("new_tokens", new);
        cx.note("rows_before", report.before);
        cx.note("rows", rows);
        let list: Map<String, Value> = tokens
            .iter()
            .zip(&ids)
            .map(|(token, id)| (token.text.clone(), json!(id)))
            .collect();
        cx.note("ids", Value::Object(list));
        if new < tokens.len() {
            cx.info(format!(
                "{} of {} tokens are in the tokenizer already and keep their ids",
                tokens.len() - new,
                tokens.len()
            ));
        }
        Ok(())
    }
}

/// Enters ids in the generation settings in `out`, if there are such.
fn set_ids(
    out: &Path,
    named: &[(&str, u32)],
    enter: impl Fn(&mut Map<String, Value>),
) -> anyhow::Result<()> {
    let path = out.join(GENERATION);
    if named.is_empty() || !path.is_file() {
        return Ok(());
    }
    let read = || -> anyhow::Result<Map<String, Value>> {
        Ok(serde_json::from_slice(&std::fs::read(&path)?)?)
    };
    let mut settings = read().with_context(|| format!("could not read `{GENERATION}`"))?;
    enter(&mut settings);
    std::fs::write(&path, folder::sorted_json(&Value::Object(settings))?)
        .with_context(|| format!("could not write `{GENERATION}`"))
}

/// The standard deviation of new weights.
fn range(folder: &Path) -> anyhow::Result<f64> {
    let config = folder::config(folder)?;
    let range = config.get("initializer_range");
    let range = range.map_or(Some(0.02), Value::as_f64);
    range
        .filter(|range| range.is_finite() && *range >= 0.)
        .with_context(|| format!("`initializer_range` in `{CONFIG}` is no number"))
}
