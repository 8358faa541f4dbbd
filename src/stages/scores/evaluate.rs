//! `evaluate`: how well a model prefers the chosen answers, or predicts the only ones, with and without an adapter.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::models::{Loaded, Models, Side};
use super::report::{self, Part, Scored};
use super::require::{Requirements, is_empty};
use crate::engine::{Context, Implied, Input, Neutral, Problem, Stage};
use crate::ml::fused::Packing;
use crate::ml::generate;
use crate::ml::generation_config::stop_ids;
use crate::ml::io::finite;
use crate::ml::loss::dpo::Dpo;
use crate::ml::loss::orpo::Orpo;
use crate::ml::loss::sft::Sft;
use crate::ml::loss::{Loss, Metrics};
use crate::ml::model::CausalLm;
use crate::ml::model::batch::Row;
use crate::ml::train::evaluate::{self, NotFinite};
use crate::ml::train::{Passes, ReferenceModel, compute_dtype};
use crate::stages::artifacts::{Adapter, Model, Scores, Tokens};
use crate::stages::model_input::{
    BASE_OF_ADAPTER, execution_on, note_work, pad_id, place, rows, split_or_test,
};
use crate::stages::rules::Rules;
use crate::stages::text::{chat_template, tokenizers};
use crate::text::tokenizer::Tokenizer;

/// Scores a model on rows: `scores.json` with TRL's numbers, and `answers.jsonl` with greedy answers to the first prompts.
///
/// Preference rows are scored by how well the model prefers the chosen answers. Rows without `rejected` are scored by how well it
/// predicts the answers: `loss` is the mean negative log-likelihood of their tokens, and `perplexity` its exponential.
///
/// With `adapter`, the base alone and the base with the adapter are scored, and the differences stand beside them; with `baseline` that model
/// and `model`. Intervals and p-values by the paired bootstrap stand in the record.
///
/// With `require` the stage fails where scores are not what they must be.
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
    /// Another model with the same tokens to compare with, in the place of the model without the adapter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["base"]))]
    baseline: Option<Input<Model>>,
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
    /// What scores must be, by their names: of the model with the adapter if there is one, and behind `difference/` the change against the
    /// base or the baseline. A run fails where one is not. The scores stay, and other requirements don't compute them again.
    #[serde(default, skip_serializing_if = "is_empty")]
    #[schemars(extend("examples" = [{"rewards/accuracies": ">= 0.6", "difference/perplexity": "<= 0"}]))]
    require: Neutral<Requirements>,
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

/// A line of `answers.jsonl`.
#[derive(Serialize)]
struct Answer {
    prompt: String,
    chosen: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    rejected: Option<String>,
    /// What the model alone answers, or the baseline.
    base: String,
    /// What it answers with the adapter.
    #[serde(skip_serializing_if = "Option::is_none")]
    adapter: Option<String>,
    /// What the model answers, beside a baseline.
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<String>,
}

impl Evaluate {
    /// The names of all scores of preferences and of single answers.
    fn metrics(&self) -> Vec<&'static str> {
        let answers = Sft {
            completion_only: true,
        };
        let of_loss = self.loss.loss(self.beta);
        let general = ["rewards/accuracies", "loss", "perplexity", "margin"];
        let all = [&general, of_loss.metrics(), answers.metrics()].concat();
        // Means of logits are for trainings alone.
        let mut all: Vec<_> = all
            .into_iter()
            .filter(|name| !name.starts_with("logits/"))
            .collect();
        all.sort_unstable();
        all.dedup();
        all
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
        sides: &[Side<'_>],
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
            let of = |part| -> anyhow::Result<Vec<Option<String>>> {
                let Some(side) = sides.iter().find(|side| side.part == part) else {
                    return Ok(vec![None; rows.len()]);
                };
                let mut tell = || cx.check_cancelled();
                let limit = self.max_new_tokens;
                let execution = side.execution;
                let all =
                    generate::greedy(execution, &prompts, limit, stops, side.pass, &mut tell)?;
                let texts = all.iter().map(|ids| tokenizer.decode(ids, true).map(Some));
                texts.collect()
            };
            let (base, adapter, model) = (of(Part::Base)?, of(Part::Adapter)?, of(Part::Model)?);
            let answers = base.into_iter().zip(adapter).zip(model);
            for (row, ((base, adapter), model)) in rows.iter().zip(answers) {
                let line = Answer {
                    prompt: tokenizer.decode(&row.prompt, false)?,
                    chosen: tokenizer.decode(&row.chosen, true)?,
                    rejected: match &row.rejected {
                        Some(ids) => Some(tokenizer.decode(ids, true)?),
                        None => None,
                    },
                    base: base.unwrap_or_default(),
                    adapter,
                    model,
                };
                lines.push_str(&serde_json::to_string(&line)?);
                lines.push('\n');
            }
        }
        Ok(lines)
    }
}

/// The outcome in a sentence.
fn told(prefers: bool, rows: usize, sides: &[Scored]) -> String {
    let (Some(base), Some(last)) = (sides.first(), sides.last()) else {
        return String::new();
    };
    let of = |metrics: &Metrics, name: &str| metrics.get(name).copied().unwrap_or(f64::NAN);
    let names = match last.part {
        Part::Base => None,
        Part::Adapter => Some(("with the adapter", "without")),
        Part::Model => Some(("by the model", "by the baseline")),
    };
    if prefers {
        let accuracy = |side: &Scored| 100. * of(&side.metrics, "rewards/accuracies");
        let prefers = "the chosen answer is preferred in";
        return match names {
            Some((with, without)) => format!(
                "{prefers} {:.0} % of {rows} rows {with}, in {:.0} % {without}",
                accuracy(last),
                accuracy(base)
            ),
            None => format!("{prefers} {:.0} % of {rows} rows", accuracy(base)),
        };
    }
    let perplexity = |side: &Scored| of(&side.metrics, "perplexity");
    match names {
        Some((with, without)) => format!(
            "the answers of {rows} rows have a perplexity of {:.3} {with}, of {:.3} {without}",
            perplexity(last),
            perplexity(base)
        ),
        None => format!(
            "the answers of {rows} rows have a perplexity of {:.3}",
            perplexity(base)
        ),
    }
}

/// Says which split's rows have scores that are no numbers, or that answers can't be made, and which tensor is to blame.
pub(super) fn explain(
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
        rules.rule(
            self.loss == ScoredLoss::Orpo || self.baseline.is_none() || self.ref_model.is_some(),
            "loss",
            "`dpo` with a `baseline` needs a `ref_model` for both",
        );
        rules.one_precision(self.bf16, self.fp16);
        let compares = self.adapter.is_some() || self.baseline.is_some();
        rules
            .0
            .extend(self.require.check(&self.metrics(), compares));
        rules.0
    }

    fn has_requirements(&self) -> bool {
        !self.require.is_empty()
    }

    fn accept(&self, result: &Path) -> anyhow::Result<()> {
        self.require.accept(result)
    }

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        let dataset = cx.input(&self.dataset)?;
        let split = split_or_test(dataset, self.split.as_deref())?;
        let compute = compute_dtype(self.bf16, self.fp16);
        let (adapter, baseline) = (self.adapter.as_ref(), self.baseline.as_ref());
        let known = Models::vocabulary(cx, &self.model, baseline)?;
        let rows = rows(dataset, &split, known)?;
        let prefers = self.check_rows(&rows, &split)?;
        let place = place(cx)?;
        let models = Models::open(cx, &self.model, adapter, baseline, compute)?;
        let executions = models.executions(cx, &place)?;
        let sides = models.sides(&executions);
        let reference = match &self.ref_model {
            Some(reference) => Some(Loaded::open(cx.input(reference)?, None, compute)?),
            None => None,
        };
        let reference = reference
            .as_ref()
            .map(|loaded| execution_on(cx, &loaded.model, Packing::default(), &place))
            .transpose()?;
        let loss: Box<dyn Loss> = if prefers {
            self.loss.loss(self.beta)
        } else {
            Box::new(Sft {
                completion_only: true,
            })
        };
        let folder = &models.scored.folder;
        let pad = pad_id(folder, &models.scored.model.arch);
        let total = Some((rows.len() * sides.len()) as u64);
        let mut scored = Vec::with_capacity(sides.len());
        for (number, side) in sides.iter().enumerate() {
            let passes = Passes {
                execution: side.execution,
                loss: &*loss,
                reference: match &reference {
                    Some(reference) => ReferenceModel::Frozen(reference),
                    None => ReferenceModel::Base,
                },
            };
            let size = self.per_device_eval_batch_size;
            let before = number * rows.len();
            let mut report = |done| {
                cx.progress((before + done) as u64, total, "rows");
                cx.check_cancelled()
            };
            let scores = if prefers {
                evaluate::preferences(&passes, &rows, size, pad, side.pass, &mut report)
            } else {
                evaluate::completions(&passes, &rows, size, pad, side.pass, &mut report)
            };
            let explained = |error| {
                let model = &side.loaded.model;
                explain(error, model, self.fp16, &split, &models.sources(side))
            };
            let (metrics, by_row) = scores.map_err(explained)?;
            scored.push(Scored {
                part: side.part,
                metrics,
                by_row,
            });
        }
        note_work(cx, &place);
        let names: &[&str] = if prefers {
            &["rewards/accuracies", "margin", "perplexity"]
        } else {
            &["loss", "mean_token_accuracy", "perplexity"]
        };
        report::write(cx, &split, rows.len(), &scored, names)?;
        cx.info(told(prefers, rows.len(), &scored));
        if self.num_answers > 0 {
            let tokenizer = tokenizers::load(folder)?;
            let mut stops = stop_ids(folder, &models.scored.model.arch)?;
            stops.extend(chat_template::stop_token(cx, dataset, folder)?.map(|stop| stop.id));
            let lines = self.answers(cx, &sides, &tokenizer, &rows, &stops);
            let lines = lines.map_err(|error| {
                let (model, sources) = match sides.last() {
                    Some(side) => (&side.loaded.model, models.sources(side)),
                    None => (&models.scored.model, Vec::new()),
                };
                explain(error, model, self.fp16, &split, &sources)
            })?;
            fs::write(cx.out().join("answers.jsonl"), lines)
                .context("could not write `answers.jsonl`")?;
        }
        Ok(())
    }
}
