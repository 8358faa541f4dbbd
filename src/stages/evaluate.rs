//! `evaluate`: how well a model prefers the chosen answers, or predicts the only ones, with and without an adapter.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, ensure};
use candle_core::Device;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::artifacts::{Adapter, Model, Scores, Tokens};
use super::model_input::{
    BASE_OF_ADAPTER, execution_on, has_split, note_work, pad_id, place, rows,
};
use super::rules::Rules;
use super::text::{chat_template, tokenizers};
use crate::engine::{Context, Implied, Input, Problem, Stage};
use crate::ml::adapter::{Adapter as LoraAdapter, FILE};
use crate::ml::execution::Execution;
use crate::ml::fused::Packing;
use crate::ml::generate;
use crate::ml::generation_config::stop_ids;
use crate::ml::io::finite;
use crate::ml::loss::dpo::Dpo;
use crate::ml::loss::orpo::Orpo;
use crate::ml::loss::sft::Sft;
use crate::ml::loss::{Loss, Metrics};
use crate::ml::model::batch::Row;
use crate::ml::model::linear::Pass;
use crate::ml::model::{CausalLm, Trained, tied};
use crate::ml::train::bootstrap::intervals;
use crate::ml::train::evaluate::{self, NotFinite};
use crate::ml::train::{Passes, ReferenceModel, compute_dtype};
use crate::text::tokenizer::Tokenizer;

/// Scores a model on rows: `scores.json` with TRL's numbers, and `answers.jsonl` with greedy answers to the first prompts.
///
/// Preference rows are scored by how well the model prefers the chosen answers. Rows without `rejected` are scored by how well it
/// predicts the answers: `loss` is the mean negative log-likelihood of their tokens, and `perplexity` its exponential.
///
/// With `adapter`, the base alone and the base with the adapter are scored, and the differences stand beside them.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("examples" = [{"adapter": "tuned", "dataset": "tokens"}]))]
pub struct Evaluate {
    /// The model to score. It may be left out where `adapter` is given: then it is the model that the adapter was made for.
    #[schemars(extend("examples" = ["base4"]))]
    model: Input<Model>,
    /// An adapter to score beside the model alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["tuned"]))]
    adapter: Option<Input<Adapter>>,
    /// The rows to score: preferences, or one answer each.
    #[schemars(extend("examples" = ["tokens"]))]
    dataset: Input<Tokens>,
    /// The split to read. By default it is `test`, or `train` where there is no `test`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["test"]))]
    split: Option<String>,
    /// The number of rows in a batch.
    #[serde(default = "default_batch_size")]
    #[schemars(extend("minimum" = 1))]
    #[schemars(extend("examples" = [2]))]
    per_device_eval_batch_size: usize,
    /// The loss whose numbers the scores of preferences have beside the general ones, by default `orpo`.
    #[serde(default, skip_serializing_if = "ScoredLoss::is_default")]
    loss: ScoredLoss,
    /// The reference model of `loss: dpo`. By default it is `model` without the adapter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ref_model: Option<Input<Model>>,
    /// For ORPO, the weight of the odds ratio in `loss`; in general, the scale of `rewards/*`.
    #[serde(default = "default_beta")]
    #[schemars(extend("minimum" = 0))]
    beta: f64,
    /// The number of prompts that are answered, always with the most likely next token.
    #[serde(default = "default_num_answers")]
    #[schemars(extend("examples" = [10]))]
    num_answers: usize,
    /// The most tokens of an answer.
    #[serde(default = "default_max_new_tokens")]
    #[schemars(extend("examples" = [200]))]
    max_new_tokens: usize,
    /// Whether matrix products are computed in bf16. TRL's default: `true`, unless `fp16` is on.
    #[serde(default)]
    bf16: bool,
    /// Whether matrix products are computed in f16.
    #[serde(default)]
    fp16: bool,
}

/// A loss that preferences are scored by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScoredLoss {
    /// The odds ratio; `logps/*` are means over the tokens of an answer.
    #[default]
    Orpo,
    /// The log-ratio to the reference model; `logps/*` are sums over the tokens of an answer.
    Dpo,
}

impl ScoredLoss {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
    fn is_default(&self) -> bool {
        *self == Self::default()
    }

    fn loss(self, beta: f64) -> Box<dyn Loss> {
        match self {
            Self::Orpo => Box::new(Orpo { beta }),
            Self::Dpo => Box::new(Dpo::sigmoid(beta, 0.)),
        }
    }
}

fn default_batch_size() -> usize {
    8
}

fn default_beta() -> f64 {
    0.1
}

fn default_num_answers() -> usize {
    4
}

fn default_max_new_tokens() -> usize {
    64
}

/// The number of answers generated together. A token of each then takes little longer than a token of one.
const AT_A_TIME: usize = 16;

/// The contents of `scores.json`.
#[derive(Serialize)]
struct Report {
    split: String,
    rows: usize,
    /// The model alone.
    base: Metrics,
    /// The model with the adapter.
    #[serde(skip_serializing_if = "Option::is_none")]
    adapter: Option<Metrics>,
    /// `adapter` minus `base`.
    #[serde(skip_serializing_if = "Option::is_none")]
    difference: Option<Metrics>,
}

/// A line of `answers.jsonl`.
#[derive(Serialize)]
struct Answer {
    prompt: String,
    chosen: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    rejected: Option<String>,
    /// What the model alone answers.
    base: String,
    /// What it answers with the adapter.
    #[serde(skip_serializing_if = "Option::is_none")]
    adapter: Option<String>,
}

impl Evaluate {
    fn split(&self, dataset: &Path) -> anyhow::Result<String> {
        Ok(match &self.split {
            Some(split) => split.clone(),
            None if has_split(dataset, "test")? => "test".into(),
            None => "train".into(),
        })
    }

    /// Whether the rows are preferences; an error where some are and others are not, or an answer is empty.
    fn check_rows(&self, rows: &[Row], split: &str) -> anyhow::Result<bool> {
        let prefers = rows.iter().any(|row| row.rejected.is_some());
        let answered = |ids: Option<&Vec<u32>>| ids.is_some_and(|ids| !ids.is_empty());
        for (number, row) in rows.iter().enumerate() {
            let number = number + 1;
            if prefers {
                ensure!(
                    answered(Some(&row.chosen)) && answered(row.rejected.as_ref()),
                    "row {number} of the split `{split}` lacks a chosen or rejected answer; `evaluate` compares the two"
                );
            }
            // The first token of a text has nothing that it could be predicted from.
            ensure!(
                !row.chosen.is_empty() && row.prompt.len() + row.chosen.len() > 1,
                "row {number} of the split `{split}` has no answer to predict"
            );
        }
        ensure!(
            prefers || self.loss == ScoredLoss::Orpo,
            "the rows of the split `{split}` have no rejected answers, which `loss: dpo` compares with; without `loss` the answers alone are scored"
        );
        Ok(prefers)
    }

    fn answers(
        &self,
        cx: &Context,
        execution: &Execution<'_>,
        tokenizer: &Tokenizer,
        rows: &[Row],
        stops: &[u32],
    ) -> anyhow::Result<String> {
        let mut lines = String::new();
        // A row that is a text has no prompt to answer.
        let rows = rows.iter().filter(|row| !row.prompt.is_empty());
        let rows: Vec<&Row> = rows.take(self.num_answers).collect();
        for rows in rows.chunks(AT_A_TIME) {
            let prompts: Vec<&[u32]> = rows.iter().map(|row| row.prompt.as_slice()).collect();
            let answers = |pass| {
                let mut tell = || cx.check_cancelled();
                let limit = self.max_new_tokens;
                let all = generate::greedy(execution, &prompts, limit, stops, pass, &mut tell)?;
                let texts = all.iter().map(|ids| tokenizer.decode(ids, true));
                texts.collect::<anyhow::Result<Vec<_>>>()
            };
            let base = answers(Pass::BASE)?;
            let adapted = match &self.adapter {
                Some(_) => answers(Pass::INFER)?.into_iter().map(Some).collect(),
                None => vec![None; rows.len()],
            };
            for ((row, base), adapter) in rows.iter().zip(base).zip(adapted) {
                let line = Answer {
                    prompt: tokenizer.decode(&row.prompt, false)?,
                    chosen: tokenizer.decode(&row.chosen, true)?,
                    rejected: match &row.rejected {
                        Some(ids) => Some(tokenizer.decode(ids, true)?),
                        None => None,
                    },
                    base,
                    adapter,
                };
                lines.push_str(&serde_json::to_string(&line)?);
                lines.push('\n');
            }
        }
        Ok(lines)
    }
}

/// The outcome in a sentence.
fn told(prefers: bool, rows: usize, base: &Metrics, with_adapter: Option<&Metrics>) -> String {
    let of = |metrics: &Metrics, name: &str| metrics.get(name).copied().unwrap_or(f64::NAN);
    if prefers {
        let accuracy = |metrics| 100. * of(metrics, "rewards/accuracies");
        let prefers = "the chosen answer is preferred in";
        return match with_adapter {
            Some(with) => format!(
                "{prefers} {:.0} % of {rows} rows with the adapter, in {:.0} % without",
                accuracy(with),
                accuracy(base)
            ),
            None => format!("{prefers} {:.0} % of {rows} rows", accuracy(base)),
        };
    }
    let perplexity = |metrics| of(metrics, "perplexity");
    match with_adapter {
        Some(with) => format!(
            "the answers of {rows} rows have a perplexity of {:.3} with the adapter, of {:.3} without",
            perplexity(with),
            perplexity(base)
        ),
        None => format!(
            "the answers of {rows} rows have a perplexity of {:.3}",
            perplexity(base)
        ),
    }
}

/// Says which split's rows have scores that are no numbers, or that answers can't be made, and which tensor is to blame.
fn explain(
    error: anyhow::Error,
    model: &CausalLm,
    fp16: bool,
    split: &str,
    sources: &[(&str, PathBuf)],
) -> anyhow::Error {
    let what = if let Some(NotFinite { rows }) = error.downcast_ref() {
        format!("the log-probabilities of the rows {rows:?} of `{split}` are not finite")
    } else if let Some(found) = error.downcast_ref::<generate::NotFinite>() {
        format!("{found} of `{split}`")
    } else {
        return error;
    };
    let sources: Vec<(&str, &Path)> = sources
        .iter()
        .map(|(noun, path)| (*noun, path.as_path()))
        .collect();
    let cause = match (finite::blame(&sources), model.overflown()) {
        (Ok(Some(found)), _) => found,
        (Err(failed), _) => format!("and the weights could not be looked through: {failed:#}"),
        (_, Ok(Some(name))) => format!(
            "`{name}` has values beyond 65504, where f16 ends; use bf16, or neither bf16 nor fp16"
        ),
        _ if fp16 => {
            "f16 ends at 65504 and the model leaves it; use bf16, or neither bf16 nor fp16".into()
        }
        _ => "the weights are finite, so these rows lead beyond the range of numbers".into(),
    };
    anyhow!("{what}: {cause}")
}

impl Stage for Evaluate {
    const KIND: &'static str = "evaluate";
    const VERSION: u32 = 3;
    const EXCLUSIVE: bool = true;
    type Output = Scores;
    const IMPLIED: &'static [Implied] = BASE_OF_ADAPTER;

    fn check(&self) -> Vec<Problem> {
        let mut rules = Rules::default();
        let compares = self.ref_model.is_some() || self.adapter.is_some();
        rules.rule(
            self.loss == ScoredLoss::Orpo || compares,
            "loss",
            "`dpo` compares with a reference model, expected an `adapter` or a `ref_model`",
        );
        rules.rule(
            self.loss == ScoredLoss::Dpo || self.ref_model.is_none(),
            "ref_model",
            "expected only with `loss: dpo`",
        );
        let both = self.bf16 && self.fp16;
        rules.rule(!both, "fp16", "`bf16` and `fp16` exclude each other");
        rules.0
    }

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        let folder = cx.input(&self.model)?;
        let dataset = cx.input(&self.dataset)?;
        let (config, weights) = tied::open(folder)?;
        let split = self.split(dataset)?;
        let rows = rows(dataset, &split, config.vocab_size)?;
        let prefers = self.check_rows(&rows, &split)?;
        let adapter = match &self.adapter {
            Some(adapter) => Some(LoraAdapter::load(cx.input(adapter)?)?),
            None => None,
        };
        let model = CausalLm::load(
            &config,
            &weights,
            adapter.as_ref(),
            Trained::Nothing,
            compute_dtype(self.bf16, self.fp16),
            &Device::Cpu,
        )?;
        drop(weights);
        let place = place(cx)?;
        let packing = Packing::default();
        let execution = execution_on(cx, &model, packing, &place)?;
        let reference = match &self.ref_model {
            Some(reference) => {
                let (config, weights) = tied::open(cx.input(reference)?)?;
                let compute = compute_dtype(self.bf16, self.fp16);
                let nothing = Trained::Nothing;
                let device = Device::Cpu;
                Some(CausalLm::load(
                    &config, &weights, None, nothing, compute, &device,
                )?)
            }
            None => None,
        };
        let reference = (reference.as_ref())
            .map(|reference| execution_on(cx, reference, packing, &place))
            .transpose()?;
        let loss: Box<dyn Loss> = if prefers {
            self.loss.loss(self.beta)
        } else {
            Box::new(Sft {
                completion_only: true,
            })
        };
        let passes = Passes {
            execution: &execution,
            loss: &*loss,
            reference: match &reference {
                Some(reference) => ReferenceModel::Frozen(reference),
                None => ReferenceModel::Base,
            },
        };
        let pad = pad_id(folder, &config);
        let mut sources = vec![("model", folder.to_path_buf())];
        if let Some(adapter) = &self.adapter {
            sources.push(("adapter", cx.input(adapter)?.join(FILE)));
        }

        let times = if adapter.is_some() { 2 } else { 1 };
        let total = Some((rows.len() * times) as u64);
        let score = |pass, before: usize| {
            let size = self.per_device_eval_batch_size;
            let mut report = |done| {
                cx.progress((before + done) as u64, total, "rows");
                cx.check_cancelled()
            };
            let scores = if prefers {
                evaluate::preferences(&passes, &rows, size, pad, pass, &mut report)
            } else {
                evaluate::completions(&passes, &rows, size, pad, pass, &mut report)
            };
            scores.map_err(|error| explain(error, &model, self.fp16, &split, &sources))
        };
        let (base, base_rows) = score(Pass::BASE, 0)?;
        let (with_adapter, adapter_rows) = match &adapter {
            Some(_) => {
                let (metrics, by_row) = score(Pass::INFER, rows.len())?;
                (Some(metrics), Some(by_row))
            }
            None => (None, None),
        };
        if let Some(intervals) = intervals(&base_rows, adapter_rows.as_ref()) {
            cx.note("intervals", intervals);
        }
        note_work(cx, &place);
        let difference = with_adapter.as_ref().map(|scores| {
            let pairs = scores.iter().zip(&base);
            pairs.map(|((name, a), (_, b))| (*name, a - b)).collect()
        });
        let shown = with_adapter.as_ref().unwrap_or(&base);
        let names: &[&str] = if prefers {
            &["rewards/accuracies", "margin", "perplexity"]
        } else {
            &["loss", "mean_token_accuracy", "perplexity"]
        };
        for name in names {
            cx.note(name, shown.get(name));
        }
        cx.info(told(prefers, rows.len(), &base, with_adapter.as_ref()));
        let report = Report {
            split,
            rows: rows.len(),
            base,
            adapter: with_adapter,
            difference,
        };
        let text = serde_json::to_string_pretty(&report)? + "\n";
        fs::write(cx.out().join("scores.json"), text).context("could not write `scores.json`")?;
        if self.num_answers > 0 {
            let tokenizer = tokenizers::load(folder)?;
            let mut stops = stop_ids(folder, &config)?;
            stops.extend(chat_template::stop_token(cx, dataset, folder)?.map(|stop| stop.id));
            let lines = self.answers(cx, &execution, &tokenizer, &rows, &stops);
            let lines = lines
                .map_err(|error| explain(error, &model, self.fp16, &report.split, &sources))?;
            fs::write(cx.out().join("answers.jsonl"), lines)
                .context("could not write `answers.jsonl`")?;
        }
        Ok(())
    }
}
