//! `create_model`: a new model with random weights and a tokenizer.

use std::fs;
use std::sync::mpsc::{SyncSender, sync_channel};

use anyhow::{Context as _, anyhow, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::dtype::Dtype;
use super::family::FamilyName;
use crate::data::cell::Cell;
use crate::data::table::{BATCH_ROWS, Split};
use crate::engine::{Bytes, Context, Input, Problem, SourcePath, Stage};
use crate::ml::io::folder::{self, CONFIG, sorted_json};
use crate::ml::model::arch::{
    Activation, Arch, LayerArch, NormPlaces, QkNorm, Rope, default_score_scale, largest,
};
use crate::ml::model::{create, families};
use crate::stages::artifacts::{Dataset, Model};
use crate::stages::text::tokenizers;
use crate::text::bpe::train_llama3_tokenizer;

/// Makes a model with random weights, in the layout of a Hugging Face model folder.
///
/// Its tokenizer is trained on the texts of a dataset, of Llama 3's make and with its special tokens and chat template, or taken
/// from another model. Generation stops at the end of the text and at the end of a turn.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("examples" = [{"dataset": "split", "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}]))]
pub struct CreateModel {
    /// The dataset to train a tokenizer on: its columns `system`, `prompt`, `chosen`, `rejected`, `messages` and `text`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["split"]))]
    dataset: Option<Input<Dataset>>,
    /// The split whose texts teach the tokenizer.
    #[serde(default = "default_split")]
    split: String,
    /// The model whose tokenizer, special tokens and chat template are used instead of a trained one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["base"]))]
    tokenizer: Option<Input<Model>>,
    /// A file with the chat template of the trained tokenizer, instead of Llama 3's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["templates/mine.jinja"]))]
    chat_template: Option<SourcePath>,
    /// The number of tokens, special ones included. If the dataset has too few texts for so many, the tokenizer is smaller, and the
    /// model keeps rows for the rest. It is needed with `dataset`; with `tokenizer` it is that tokenizer's size unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minimum" = 1, "maximum" = largest("vocab_size")))]
    #[schemars(extend("examples" = [4096]))]
    vocab_size: Option<usize>,
    /// The family of the model: transformers' `model_type`.
    #[serde(default, skip_serializing_if = "FamilyName::is_default")]
    family: FamilyName,
    /// The width of the hidden states.
    #[schemars(extend("minimum" = 1, "maximum" = largest("hidden_size")))]
    #[schemars(extend("examples" = [256]))]
    hidden_size: usize,
    /// The width inside the feed-forward part of a layer.
    #[schemars(extend("minimum" = 1, "maximum" = largest("intermediate_size")))]
    #[schemars(extend("examples" = [768]))]
    intermediate_size: usize,
    /// The number of layers.
    #[schemars(extend("minimum" = 1, "maximum" = largest("num_hidden_layers")))]
    #[schemars(extend("examples" = [4]))]
    num_hidden_layers: usize,
    /// The number of query heads.
    #[schemars(extend("minimum" = 1, "maximum" = largest("num_attention_heads")))]
    #[schemars(extend("examples" = [4]))]
    num_attention_heads: usize,
    /// The number of key and value heads, each shared by equally many query heads. By default there are as many as query heads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minimum" = 1, "maximum" = largest("num_key_value_heads")))]
    #[schemars(extend("examples" = [2]))]
    num_key_value_heads: Option<usize>,
    /// The width of a head. By default it is `hidden_size / num_attention_heads`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minimum" = 1, "maximum" = largest("head_dim")))]
    #[schemars(extend("examples" = [64]))]
    head_dim: Option<usize>,
    /// The number of keys that a query sees, its own included, in the families that have sliding windows: in every layer, or in those
    /// that have a window in the family's models. By default a query sees all keys up to its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minimum" = 1, "maximum" = largest("sliding_window")))]
    #[schemars(extend("examples" = [1024]))]
    sliding_window: Option<usize>,
    /// The longest sequence that the model is made for, in tokens.
    #[serde(default = "default_positions")]
    #[schemars(extend("minimum" = 1, "maximum" = largest("max_position_embeddings")))]
    #[schemars(extend("examples" = [2048]))]
    max_position_embeddings: usize,
    /// The base of the rotary embedding's wavelengths. The default is Llama 3's; transformers' is the first Llama's 10000.
    #[serde(default = "default_theta")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    rope_theta: f64,
    /// A small number that keeps the division of a norm finite. The default is Llama 3's.
    #[serde(default = "default_eps")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    rms_norm_eps: f64,
    /// Whether the head shares the weights of the embeddings.
    #[serde(default)]
    tie_word_embeddings: bool,
    /// The standard deviation of the random weights.
    #[serde(default = "default_range")]
    #[schemars(extend("exclusiveMinimum" = 0, "maximum" = 1))]
    initializer_range: f64,
    /// The type that weights are stored in.
    #[serde(default)]
    dtype: Dtype,
    /// The seed of the weights.
    #[serde(default = "default_seed")]
    seed: u64,
    /// The size above which weights go into several files.
    #[serde(default = "default_shard")]
    #[schemars(extend("examples" = ["500MB"]))]
    max_shard_size: String,
}

fn default_split() -> String {
    "train".into()
}

fn default_positions() -> usize {
    2048
}

fn default_theta() -> f64 {
    500_000.
}

fn default_eps() -> f64 {
    1e-5
}

fn default_range() -> f64 {
    0.02
}

fn default_seed() -> u64 {
    42
}

fn default_shard() -> String {
    "5GB".into()
}

impl CreateModel {
    /// Bytes; a number without a unit is more likely a mistake than a size.
    fn shard_size(&self) -> Option<u64> {
        let unit = self.max_shard_size.ends_with('B');
        let size: Bytes = self.max_shard_size.parse().ok().filter(|_| unit)?;
        Some(size.0).filter(|size| *size > 0)
    }
}

/// The columns whose texts the tokenizer is trained on.
const COLUMNS: [&str; 6] = ["system", "prompt", "chosen", "rejected", "messages", "text"];
const GENERATION_CONFIG: &str = "generation_config.json";

/// What the model needs to know of its tokenizer.
struct Vocabulary {
    size: usize,
    bos: Option<u32>,
    eos: Option<u32>,
    eot: Option<u32>,
    pad: Option<u32>,
}

impl Stage for CreateModel {
    const KIND: &'static str = "create_model";
    const VERSION: u32 = 1;
    type Output = Model;

    fn check(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut rule = |holds: bool, parameter: &str, message: &str| {
            if !holds {
                problems.push(Problem::new(parameter, message));
            }
        };
        let trains = self.dataset.is_some();
        rule(
            trains != self.tokenizer.is_some(),
            "tokenizer",
            "expected either `dataset`, to train a tokenizer on, or `tokenizer`, to take a model's",
        );
        rule(
            !trains || self.vocab_size.is_some(),
            "vocab_size",
            "it is needed to train a tokenizer",
        );
        let template = trains || self.chat_template.is_none();
        rule(
            template,
            "chat_template",
            "the model of `tokenizer` has its own",
        );
        let heads = self.num_attention_heads.max(1);
        rule(
            heads.is_multiple_of(self.key_value_heads().max(1)),
            "num_key_value_heads",
            "expected a divisor of `num_attention_heads`",
        );
        rule(
            self.sliding_window.is_none() || self.family.0.has_windows(),
            "sliding_window",
            &format!("`{:?}` has no sliding windows", self.family),
        );
        let even = |width: usize| width > 0 && width.is_multiple_of(2);
        if let Some(width) = self.head_dim {
            rule(even(width), "head_dim", "expected an even number");
            rule(
                !self.family.is_default() || self.hidden_size.is_multiple_of(heads),
                "hidden_size",
                "expected a multiple of `num_attention_heads`, as transformers demands it of a Llama beside `head_dim` too",
            );
        } else {
            rule(
                self.hidden_size.is_multiple_of(heads) && even(self.hidden_size / heads),
                "hidden_size",
                "expected an even multiple of `num_attention_heads`, or `head_dim` beside it",
            );
        }
        let size = self.shard_size().is_some();
        rule(
            size,
            "max_shard_size",
            "expected a size such as `5GB` or `500MB`",
        );
        problems
    }

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        let vocabulary = match (&self.dataset, &self.tokenizer) {
            (Some(dataset), _) => self.train(cx, dataset)?,
            (None, Some(model)) => self.take(cx, model)?,
            (None, None) => return Err(anyhow!("there is neither a `dataset` nor a `tokenizer`")),
        };
        let config = families::complete(&self.config(&vocabulary))?;
        let settings = create::Settings {
            initializer_range: self.initializer_range,
            float: self.dtype.float(),
            seed: self.seed,
            max_shard_size: self.shard_size().unwrap_or(u64::MAX),
        };
        let report = create::create(&config, settings, cx.out(), &mut |done, total| {
            cx.progress(done, Some(total), "bytes");
            cx.check_cancelled()
        })?;
        let ends: Vec<u32> = vocabulary.eos.into_iter().chain(vocabulary.eot).collect();
        let generation = json!({
            "bos_token_id": vocabulary.bos,
            "eos_token_id": ends,
            "pad_token_id": vocabulary.pad,
        });
        fs::write(cx.out().join(GENERATION_CONFIG), sorted_json(&generation)?)
            .with_context(|| format!("could not write `{GENERATION_CONFIG}`"))?;
        for file in &report.files {
            cx.written(&file.name, &file.blake3)?;
        }
        cx.note("parameters", report.parameters);
        cx.note("vocab_size", config.vocab_size);
        Ok(())
    }
}

impl CreateModel {
    fn key_value_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    fn config(&self, vocabulary: &Vocabulary) -> Arch {
        let head_dim = self.hidden_size / self.num_attention_heads.max(1);
        let head_dim = self.head_dim.unwrap_or(head_dim);
        Arch {
            family: self.family.0.model_type,
            vocab_size: vocabulary.size,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            layers: vec![
                LayerArch {
                    window: self.sliding_window,
                    ..LayerArch::default()
                };
                self.num_hidden_layers
            ],
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: self.key_value_heads(),
            head_dim,
            rotary_dim: head_dim,
            rms_norm_eps: self.rms_norm_eps,
            ropes: vec![Rope {
                theta: self.rope_theta,
                scaling: None,
            }],
            // What the family prescribes comes in `families::complete`.
            qk_norm: QkNorm::None,
            norm_places: NormPlaces::Before,
            norm_adds_one: false,
            activation: Activation::Silu,
            embedding_scale: 1.,
            residual_scale: 1.,
            score_scale: default_score_scale(head_dim),
            score_softcap: None,
            logit_scale: 1.,
            logit_softcap: None,
            fused_projections: false,
            biases: Vec::new(),
            max_position_embeddings: self.max_position_embeddings,
            tie_word_embeddings: self.tie_word_embeddings,
            scores: false,
            attention_dropout: 0.,
            bos_token_id: vocabulary.bos,
            eos_token_ids: vocabulary.eos.into_iter().collect(),
            pad_token_id: vocabulary.pad,
            dtype: Some(self.dtype.float().dtype()),
            quantization: None,
        }
    }

    /// Another model's tokenizer.
    fn take(&self, cx: &Context, model: &Input<Model>) -> anyhow::Result<Vocabulary> {
        let source = cx.input(model)?;
        let tokenizer = tokenizers::load(source)?;
        folder::carry(source, cx.out(), &[CONFIG, GENERATION_CONFIG])?;
        let ids = [&tokenizer.bos, &tokenizer.eos, &tokenizer.pad];
        let ids = ids.map(|token| token.as_ref().map(|token| token.id));
        let eot = tokenizer.token("<|eot_id|>").ok().map(|token| token.id);
        let largest = ids.into_iter().chain([eot]).flatten().max().unwrap_or(0);
        let own = tokenizer.vocab_size().max(largest as usize + 1);
        let size = self.vocab_size.unwrap_or(own);
        ensure!(
            size >= own,
            "`vocab_size` is {size}, but the tokenizer has {own} tokens; expected at least as many"
        );
        let [bos, eos, pad] = ids;
        let eot = eot.filter(|eot| Some(*eot) != eos);
        Ok(Vocabulary {
            size,
            bos,
            eos,
            eot,
            pad,
        })
    }

    /// A tokenizer trained on the dataset. Texts are read on a thread of their own and go through a short queue.
    fn train(&self, cx: &Context, dataset: &Input<Dataset>) -> anyhow::Result<Vocabulary> {
        let split = Split::open(cx.input(dataset)?, &self.split)?;
        let template = match &self.chat_template {
            Some(path) => {
                let text = fs::read_to_string(cx.source(path)?);
                let name = path.as_written();
                Some(text.with_context(|| format!("could not read the chat template `{name}`"))?)
            }
            None => None,
        };
        let wanted = self.vocab_size.context("`vocab_size` is missing")?;
        let (queue, texts) = sync_channel(1024);
        let trained = std::thread::scope(|scope| {
            let reader = std::thread::Builder::new()
                .spawn_scoped(scope, || send_texts(cx, &split, queue))
                .context("could not start a thread")?;
            let texts = texts.into_iter();
            let trained = train_llama3_tokenizer(texts, wanted, cx.out(), template.as_deref());
            let read = reader
                .join()
                .map_err(|_| anyhow!("the reader of the texts stopped"))?;
            read.and(trained)
        })?;
        if trained.vocab_size < wanted {
            cx.warn(format!(
                "the texts of `{}` hold only {} different tokens; the model keeps rows for {wanted}, of which the rest stay unused",
                self.split, trained.vocab_size
            ));
        }
        cx.note("tokens", trained.vocab_size);
        Ok(Vocabulary {
            size: wanted.max(trained.vocab_size),
            bos: Some(trained.bos_id),
            eos: Some(trained.eos_id),
            eot: Some(trained.eot_id),
            pad: Some(trained.pad_id),
        })
    }
}

/// Sends all texts of these columns, row by row.
#[expect(
    clippy::needless_pass_by_value,
    reason = "the queue must close when the last text is sent"
)]
fn send_texts(cx: &Context, split: &Split, queue: SyncSender<String>) -> anyhow::Result<()> {
    let schema = split.schema();
    let fields = schema.fields().iter().enumerate();
    let columns: Vec<_> = fields
        .filter(|(_, field)| COLUMNS.contains(&field.name().as_str()))
        .collect();
    ensure!(
        !columns.is_empty(),
        "the split `{}` has no column of texts, expected some of: {}",
        split.name(),
        COLUMNS.join(", ")
    );
    let mut done = 0;
    for batch in split.batches(BATCH_ROWS) {
        let batch = batch?;
        cx.check_cancelled()?;
        for row in 0..batch.num_rows() {
            for (column, field) in &columns {
                let mut texts = Vec::new();
                collect(
                    Cell::of_column(field, batch.column(*column), row)?,
                    &mut texts,
                );
                for text in texts {
                    if queue.send(text).is_err() {
                        // The training failed, and returns its own error.
                        return Ok(());
                    }
                }
            }
        }
        done += batch.num_rows();
        cx.progress(done as u64, Some(split.rows() as u64), "rows");
    }
    Ok(())
}

/// The texts in a value: itself, those of a list, the `content` of a message, the `text` of a part of it.
fn collect(cell: Cell, texts: &mut Vec<String>) {
    match cell {
        Cell::Text(text) => texts.push(text),
        Cell::List(items) => items.into_iter().for_each(|item| collect(item, texts)),
        Cell::Map(entries) => {
            let content = entries
                .into_iter()
                .filter(|(name, _)| name == "content" || name == "text");
            content.for_each(|(_, content)| collect(content, texts));
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests;
