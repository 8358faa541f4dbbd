//! `evaluate`: how well a model prefers the chosen answers, or predicts the only ones, with and without an adapter.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::scored_loss::ScoredLoss;
use super::evaluation::{Evaluation, EvaluationArguments, Measure};
use super::models::{Loaded, Models, Side};
use super::report::{self, Part, Scored};
use crate::engine::{Context, Input};
use crate::ml::fused::Packing;
use crate::ml::generate;
use crate::ml::generation_config::stop_ids;
use crate::ml::io::finite;
use crate::ml::loss::Loss;
use crate::ml::loss::kto::pair_with_neighbours;
use crate::ml::loss::reward::Reward;
use crate::ml::loss::sft::Sft;
use crate::ml::model::batch::Row;
use crate::ml::model::{CausalLm, tied};
use crate::ml::train::evaluate::{self, NotFinite};
use crate::ml::train::{Passes, ReferenceModel};
use crate::stages::artifacts::{Model, Tokens};
use crate::stages::model_input::{execution_on, note_work, pad_id, place, rows, split_or_test};
use crate::stages::rules::Rules;
use crate::stages::text::added::Added;
use crate::stages::text::labelled::Labelled;
use crate::stages::text::{chat_template, tokenizers};
use crate::text::tokenizer::Tokenizer;

mod scored_loss;

/// The stage.
pub type Evaluate = Evaluation<Parameters>;

/// Scores a model on rows: `scores.json` with TRL's numbers, and `answers.jsonl` with greedy answers to the first prompts.
///
/// Preference rows are scored by how well the model prefers the chosen answers. Rows without `rejected` are scored by how well it
/// predicts the answers: `loss` is the mean negative log-likelihood of their tokens, and `perplexity` its exponential. With `loss: kto`
/// rows of `tokenize` with `trainer: kto` have the numbers of KTO.
///
/// A reward model scores preferences by what it gives to both answers: `accuracy` is the share of rows where the chosen one gets more, `margin` by
/// how much on average. It makes no answers.
///
/// With `adapter`, the base alone and the base with the adapter are scored, and the differences stand beside them; with `baseline` that model
/// and `model`. Intervals and p-values by the paired bootstrap stand in the record.
///
/// With `require` the stage fails where scores are not what they must be.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("examples" = [{"adapter": "tuned", "dataset": "tokens"}]))]
#[schemars(rename = "Evaluate")]
pub struct Parameters {
    /// The rows to score: preferences, one answer each, or labelled answers.
    #[schemars(extend("examples" = ["tokens"]))]
    dataset: Input<Tokens>,
    /// The number of rows in a batch.
    #[serde(default = "default_batch_size")]
    #[schemars(extend("minimum" = 1))]
    #[schemars(extend("examples" = [2]))]
    per_device_eval_batch_size: usize,
    /// The loss whose numbers the scores of preferences have beside the general ones, by default `orpo`; `kto` is for labelled rows.
    #[serde(default, skip_serializing_if = "ScoredLoss::is_default")]
    loss: ScoredLoss,
    /// The reference model of `loss: dpo` and `loss: kto`. By default it is `model` without the adapter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ref_model: Option<Input<Model>>,
    /// For ORPO, the weight of the odds ratio in `loss`; in general, the scale of `rewards/*`.
    #[serde(default = "default_beta")]
    #[schemars(extend("minimum" = 0))]
    beta: f64,
    /// The weight of the chosen answers' negative log-likelihood in `cpo` and `simpo`: 1 if it isn't given, as in TRL.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minimum" = 0, "examples" = [0]))]
    cpo_alpha: Option<f64>,
    /// The margin that `simpo` aims at: 0.5 if it isn't given, as in TRL.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minimum" = 0, "examples" = [1.0]))]
    simpo_gamma: Option<f64>,
    /// The weight of good answers in `kto`: 1 if it isn't given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minimum" = 0, "examples" = [1.0]))]
    desirable_weight: Option<f64>,
    /// The weight of bad answers in `kto`: 1 if it isn't given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minimum" = 0, "examples" = [1.5]))]
    undesirable_weight: Option<f64>,
    /// The number of prompts that are answered, always with the most likely next token.
    #[serde(default = "default_num_answers")]
    #[schemars(extend("examples" = [10]))]
    num_answers: usize,
    /// The most tokens of an answer.
    #[serde(default = "default_max_new_tokens")]
    #[schemars(extend("examples" = [200]))]
    max_new_tokens: usize,
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

impl Parameters {
    /// What the rows are scored as; an error where they are not alike, or lack what that needs. `scores` says whether the model is a reward
    /// model.
    fn form(&self, rows: &[Row], scores: bool, split: &str) -> anyhow::Result<Form> {
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
        let loss = self.loss.name();
        if scores {
            ensure!(
                self.loss.is_default(),
                "the model is a reward model, which gives no log-probabilities for `loss: {loss}`; without `loss` it is scored by what it \
                 gives to both answers"
            );
            ensure!(
                prefers,
                "the rows of the split `{split}` have no rejected answers, and a reward model is scored by the two; hint: \
                 `evaluate_answers` with `reward_model` lets it score what another model answers"
            );
            return Ok(Form::Rewards);
        }
        if self.loss == ScoredLoss::Kto {
            ensure!(
                !prefers && rows.iter().all(|row| row.label.is_some()),
                "the rows of the split `{split}` have no labels, which `loss: kto` needs; hint: `trainer: kto` in the `tokenize` that makes them"
            );
            return Ok(Form::Labelled);
        }
        ensure!(
            prefers || self.loss.is_default(),
            "the rows of the split `{split}` have no rejected answers, which `loss: {loss}` compares with; without `loss` the answers alone are scored"
        );
        Ok(if prefers {
            Form::Preferences
        } else {
            Form::Answers
        })
    }

    /// Brings rows into the form in which trainings have them.
    fn prepare(&self, form: Form, dataset: &Path, rows: &mut [Row]) -> anyhow::Result<()> {
        match form {
            Form::Preferences | Form::Answers => {}
            Form::Rewards => {
                let added = Added::read(dataset)?;
                for row in rows {
                    added.take_off(row);
                }
            }
            Form::Labelled => {
                let labelled = Labelled::read(dataset, Self::KIND)?;
                let size = self.per_device_eval_batch_size;
                pair_with_neighbours(rows, size, labelled.max_length);
                for row in rows {
                    labelled.cut(row);
                }
            }
        }
        Ok(())
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

/// What rows are scored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// Preferences, by the log-probabilities of both answers.
    Preferences,
    /// Single answers, by their log-probabilities.
    Answers,
    /// Answers that are labelled as good or bad.
    Labelled,
    /// Preferences, by what a reward model gives to both answers.
    Rewards,
}

impl Form {
    /// The scores that are noted with the run.
    fn noted(self) -> &'static [&'static str] {
        match self {
            Self::Preferences => &["rewards/accuracies", "margin", "perplexity"],
            Self::Answers => &["loss", "mean_token_accuracy", "perplexity"],
            Self::Labelled => &["rewards/margins", "kl", "loss"],
            Self::Rewards => &["accuracy", "margin", "mean_reward"],
        }
    }
}

/// The outcome in a sentence.
fn told(form: Form, rows: usize, sides: &[Scored]) -> String {
    let (Some(base), Some(last)) = (sides.first(), sides.last()) else {
        return String::new();
    };
    let (what, by, name, is_share) = match form {
        Form::Preferences => (
            "the chosen answer is preferred".to_owned(),
            "in",
            "rewards/accuracies",
            true,
        ),
        Form::Answers => (
            format!("the answers of {rows} rows have a perplexity"),
            "of",
            "perplexity",
            false,
        ),
        Form::Labelled => (
            format!("of {rows} answers, the good ones are rewarded above the bad ones"),
            "by",
            "rewards/margins",
            false,
        ),
        Form::Rewards => (
            "the chosen answer gets the higher score".to_owned(),
            "in",
            "accuracy",
            true,
        ),
    };
    let of = |side: &Scored| {
        let value = side.metrics.get(name).copied().unwrap_or(f64::NAN);
        if is_share {
            format!("{:.0} %", 100. * value)
        } else {
            format!("{value:.3}")
        }
    };
    let of_rows = if is_share {
        format!(" of {rows} rows")
    } else {
        String::new()
    };
    let (with, without) = match last.part {
        Part::Base => return format!("{what} {by} {}{of_rows}", of(base)),
        Part::Adapter => ("with the adapter", "without"),
        Part::Model => ("by the model", "by the baseline"),
    };
    format!(
        "{what} {by} {}{of_rows} {with}, {by} {} {without}",
        of(last),
        of(base)
    )
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

impl Measure for Parameters {
    const KIND: &'static str = "evaluate";
    const VERSION: u32 = 3;

    fn check(&self, arguments: &EvaluationArguments, rules: &mut Rules) {
        let (loss, compares) = (self.loss.name(), self.loss.compares());
        let has_reference = self.ref_model.is_some();
        rules.rule(
            !compares || has_reference || arguments.adapter.is_some(),
            "loss",
            &format!(
                "`{loss}` compares with a reference model, expected an `adapter` or a `ref_model`"
            ),
        );
        rules.rule(
            compares || !has_reference,
            "ref_model",
            "expected only with `loss: dpo` or `loss: kto`",
        );
        rules.rule(
            !compares || arguments.baseline.is_none() || has_reference,
            "loss",
            &format!("`{loss}` with a `baseline` needs a `ref_model` for both"),
        );
        self.check_loss(rules);
    }

    /// Those of all forms of rows.
    fn metrics(&self) -> Vec<&'static str> {
        let answers = Sft {
            completion_only: true,
        };
        let of_loss = self.scored_loss();
        let general = ["rewards/accuracies", "loss", "perplexity", "margin"];
        let mut all = [&general, of_loss.metrics(), answers.metrics()].concat();
        if self.loss.is_default() {
            all.extend(Reward::default().metrics());
        }
        // Means of logits are for trainings alone.
        all.retain(|name| !name.starts_with("logits/"));
        all.sort_unstable();
        all.dedup();
        all
    }

    fn run(&self, arguments: &EvaluationArguments, cx: &Context) -> anyhow::Result<()> {
        let dataset = cx.input(&self.dataset)?;
        let split = split_or_test(dataset, arguments.split.as_deref())?;
        let known = Models::vocabulary(cx, arguments)?;
        let mut rows = rows(dataset, &split, known)?;
        let (arch, _) = tied::open(cx.input(&arguments.model)?)?;
        let form = self.form(&rows, arch.scores, &split)?;
        self.prepare(form, dataset, &mut rows)?;
        let place = place(cx)?;
        let models = Models::open(cx, arguments, &place)?;
        let executions = models.executions(cx, &place)?;
        let sides = models.sides(&executions);
        let compute = arguments.compute();
        let reference = match &self.ref_model {
            Some(reference) => Some(Loaded::open(cx.input(reference)?, None, compute, &place)?),
            None => None,
        };
        let reference = reference
            .as_ref()
            .map(|loaded| execution_on(cx, &loaded.model, Packing::default(), &place))
            .transpose()?;
        let loss: Box<dyn Loss> = match form {
            Form::Preferences | Form::Labelled => self.scored_loss(),
            Form::Rewards => Box::new(Reward::default()),
            Form::Answers => Box::new(Sft {
                completion_only: true,
            }),
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
            let score = match form {
                Form::Preferences => evaluate::preferences,
                Form::Answers => evaluate::completions,
                Form::Labelled => evaluate::labelled,
                Form::Rewards => evaluate::rewards,
            };
            let scores = score(&passes, &rows, size, pad, side.pass, &mut report);
            let explained = |error| {
                let model = &side.loaded.model;
                explain(error, model, arguments.fp16, &split, &models.sources(side))
            };
            let (metrics, by_row) = scores.map_err(explained)?;
            scored.push(Scored {
                part: side.part,
                metrics,
                by_row,
            });
        }
        report::write(cx, &split, rows.len(), &scored, form.noted())?;
        cx.info(told(form, rows.len(), &scored));
        if self.num_answers > 0 && form != Form::Rewards {
            let tokenizer = tokenizers::load(folder)?;
            let mut stops = stop_ids(folder, &models.scored.model.arch)?;
            stops.extend(chat_template::stop_token(cx, dataset, folder)?.map(|stop| stop.id));
            let lines = self.answers(cx, &sides, &tokenizer, &rows, &stops);
            let lines = lines.map_err(|error| {
                let (model, sources) = match sides.last() {
                    Some(side) => (&side.loaded.model, models.sources(side)),
                    None => (&models.scored.model, Vec::new()),
                };
                explain(error, model, arguments.fp16, &split, &sources)
            })?;
            fs::write(cx.out().join("answers.jsonl"), lines)
                .context("could not write `answers.jsonl`")?;
        }
        note_work(cx, &place);
        Ok(())
    }
}
