//! `evaluate_answers`: how often a model's answers to prompts are the right ones.

use std::fs;
use std::ops::ControlFlow;

use anyhow::{Context as _, Result, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use self::judge::Judge;
use super::evaluate::explain;
use super::evaluation::{Evaluation, EvaluationArguments, Measure};
use super::models::{Models, Side};
use super::report::{self, Scored};
use super::reward::RewardModel;
use crate::engine::{Context, Implied, ImpliedBy, Input, Neutral};
use crate::ml::generate::{Finish, Generator, Listener};
use crate::ml::generation_config::stop_ids;
use crate::ml::model::batch::Row;
use crate::ml::place::Place;
use crate::ml::sampling::{Sampler, Sampling};
use crate::ml::train::bootstrap::RowScore;
use crate::stages::artifacts::{Adapter, Dataset, Model, Tokens};
use crate::stages::model_input::{BASE_OF_ADAPTER, note_work, place, rows, split_or_test};
use crate::stages::rules::Rules;
use crate::stages::text::{chat_template, tokenizers};
use crate::text::chat::Asked;
use crate::text::tokenizer::Tokenizer;

mod judge;

/// The scores that it makes in any case.
const METRICS: [&str; 3] = ["exact_match", "answer_tokens", "finished"];
/// That of `regex_pattern`.
const REGEX_MATCH: &str = "regex_match";
/// That of the reward model.
const REWARD: &str = "reward";

/// The stage.
pub type EvaluateAnswers = Evaluation<Parameters>;

/// Lets a model answer prompts, greedily or by sampling, and compares its answers with those of the rows: `scores.json`, and `answers.jsonl`
/// with all answers.
///
/// `exact_match` is the share of answers that are the row's answer, white space around them aside. With `regex_pattern`, `regex_match` is the
/// share in which the expression finds what it finds in the row's answer. `finished` is the share of answers that the model ended by itself,
/// and `answer_tokens` their mean length.
///
/// With `reward_model` or `reward_adapter`, `reward` is the mean score that this reward model gives to the answers. It reads each with its
/// conversation as its own chat template prints it, so it may have another template and tokenizer than the model that answers.
///
/// With `adapter`, the base alone and the base with the adapter answer, and the differences stand beside them; with `baseline` that model
/// and `model`. Intervals and p-values by the paired bootstrap stand in the record.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("examples" = [{"adapter": "tuned", "dataset": "tokens", "regex_pattern": "#### (-?[0-9.,]+)"}]))]
#[schemars(rename = "EvaluateAnswers")]
pub struct Parameters {
    /// The prompts, each with the answer that is right. Of preferences that is the chosen one.
    #[schemars(extend("examples" = ["tokens"]))]
    dataset: Input<Tokens>,
    /// The number of prompts that are answered, the first ones of the split. Without it all are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minimum" = 1))]
    #[schemars(extend("examples" = [100]))]
    num_answers: Option<usize>,
    /// The number of prompts that are answered at a time.
    #[serde(default = "batch_size")]
    #[schemars(extend("minimum" = 1))]
    #[schemars(extend("examples" = [16]))]
    per_device_eval_batch_size: Neutral<usize>,
    /// The most tokens of an answer.
    #[serde(default = "max_new_tokens")]
    #[schemars(extend("minimum" = 1))]
    #[schemars(extend("examples" = [512]))]
    max_new_tokens: usize,
    /// Whether tokens are drawn by their probability; else the likeliest is taken each time.
    #[serde(default)]
    do_sample: bool,
    /// What logits are divided by before tokens are drawn.
    #[serde(default = "one")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    #[schemars(extend("examples" = [0.7]))]
    temperature: f64,
    /// How many of the likeliest tokens one is drawn from; 0 for all.
    #[serde(default = "top_k")]
    top_k: usize,
    /// The probability that the tokens have together at least which one is drawn from.
    #[serde(default = "one")]
    #[schemars(extend("minimum" = 0, "maximum" = 1))]
    #[schemars(extend("examples" = [0.9]))]
    top_p: f64,
    /// The least probability of a token that may be drawn, as a part of the likeliest one's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("minimum" = 0, "maximum" = 1))]
    #[schemars(extend("examples" = [0.05]))]
    min_p: Option<f64>,
    /// What scores of tokens that occurred are divided by; 1 changes nothing.
    #[serde(default = "one")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    #[schemars(extend("examples" = [1.1]))]
    repetition_penalty: f64,
    /// What decides on the draws.
    #[serde(default = "seed")]
    seed: u64,
    /// Whether `exact_match` takes capital and small letters for the same.
    #[serde(default)]
    ignore_case: bool,
    /// Whether `exact_match` leaves out the punctuation of ASCII.
    #[serde(default)]
    ignore_punctuation: bool,
    /// A regular expression that finds the part of an answer that counts, its first group or else all of it. Where it finds nothing in a
    /// row's own answer, all of that counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["#### (-?[0-9.,]+)"]))]
    regex_pattern: Option<String>,
    /// Which of several places counts where the expression fits: from the first, 0, or backwards from the last, -1.
    #[serde(default)]
    #[schemars(extend("examples" = [-1]))]
    group_select: i64,
    /// A reward model that scores the answers. It may be left out where `reward_adapter` is given: then it is the model that the adapter was
    /// made for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["scoring"]))]
    reward_model: Option<Input<Model>>,
    /// The adapter of the reward model, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["reward"]))]
    reward_adapter: Option<Input<Adapter>>,
    /// The conversations that the reward model reads: the dataset from which `apply_chat_template` made the texts of these tokens. It may be
    /// left out where the recipe says which one that is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["split"]))]
    conversations: Option<Input<Dataset>>,
}

fn batch_size() -> Neutral<usize> {
    Neutral(8)
}

fn max_new_tokens() -> usize {
    256
}

fn one() -> f64 {
    1.
}

fn top_k() -> usize {
    50
}

fn seed() -> u64 {
    42
}

/// Stops a generation when the stage is cancelled.
struct Watch<'c>(&'c Context);

impl Listener for Watch<'_> {
    fn step(&mut self) -> Result<ControlFlow<()>> {
        self.0.check_cancelled()?;
        Ok(ControlFlow::Continue(()))
    }
}

/// An answer with its scores.
struct Answered {
    text: String,
    /// By the names of [`Measure::metrics`], in their order.
    scores: Vec<(&'static str, f64)>,
}

impl Parameters {
    fn sampling(&self) -> Sampling {
        Sampling {
            do_sample: self.do_sample,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
        }
    }

    /// The reward model, if there is one, and the conversations of the first `wanted` rows of a split.
    fn reward_model(
        &self,
        arguments: &EvaluationArguments,
        cx: &Context,
        (split, rows, wanted): (&str, &[Row], usize),
        tokenizer: &Tokenizer,
    ) -> Result<Option<(RewardModel, Vec<Asked>)>> {
        let Some(model) = &self.reward_model else {
            return Ok(None);
        };
        let conversations = self.conversations.as_ref();
        let dataset = cx.input(conversations.context("`conversations` is missing")?)?;
        let adapter = self.reward_adapter.as_ref();
        let rewards = RewardModel::open(cx, model, adapter, arguments.compute())?;
        let asked = rewards.conversations(dataset, split, rows, wanted, tokenizer)?;
        Ok(Some((rewards, asked)))
    }

    /// Lets a reward model score the answers of all sides.
    fn reward(
        &self,
        cx: &Context,
        place: &Place,
        (rewards, asked): &(RewardModel, Vec<Asked>),
        all: &mut [Vec<Answered>],
    ) -> Result<()> {
        let sides = all.iter();
        let pairs = sides.flat_map(|answers| {
            let texts = answers.iter().map(|answered| answered.text.as_str());
            asked.iter().zip(texts)
        });
        let pairs: Vec<(&Asked, &str)> = pairs.collect();
        let total = Some(pairs.len() as u64);
        let mut report = |done: usize| {
            cx.progress(done as u64, total, "rewards");
            cx.check_cancelled()
        };
        let size = *self.per_device_eval_batch_size;
        let scores = rewards.score(cx, place, &pairs, size, &mut report)?;
        for (answered, score) in all.iter_mut().flatten().zip(scores) {
            answered.scores.push((REWARD, score));
        }
        Ok(())
    }

    /// The answers of a side. `before` are those of other sides, for the progress, of which there are `total` in all.
    fn answers(
        &self,
        cx: &Context,
        side: &Side<'_>,
        rows: &[Row],
        judge: &Judge<'_>,
        coding: &Coding<'_>,
        (before, total): (usize, usize),
    ) -> Result<Vec<Answered>> {
        let Coding { tokenizer, stops } = coding;
        let mut all = Vec::with_capacity(rows.len());
        for (number, rows) in rows
            .chunks((*self.per_device_eval_batch_size).max(1))
            .enumerate()
        {
            let first = number * *self.per_device_eval_batch_size;
            let prompts: Vec<&[u32]> = rows.iter().map(|row| row.prompt.as_slice()).collect();
            let longest = prompts.iter().map(|prompt| prompt.len()).max().unwrap_or(0);
            let longest = longest + self.max_new_tokens;
            let mut generator = Generator::new(side.execution, rows.len(), longest, side.pass)?;
            // Each row has draws of its own, however many are answered at a time.
            let mut samplers: Vec<Sampler> = (first..first + rows.len())
                .map(|row| Sampler::new(self.sampling(), self.seed, row as u64))
                .collect();
            let limit = self.max_new_tokens;
            let answers =
                generator.answer(&prompts, limit, stops, &mut samplers, &mut Watch(cx))?;
            for (row, answer) in rows.iter().zip(answers) {
                let text = tokenizer.decode(&answer.ids, true)?;
                let expected = tokenizer.decode(&row.chosen, true)?;
                let share = |holds: bool| f64::from(u8::from(holds));
                let values = [
                    share(judge.is_exact(&text, &expected)),
                    answer.ids.len() as f64,
                    share(answer.finish == Finish::Stop),
                ];
                let mut scores: Vec<_> = METRICS.into_iter().zip(values).collect();
                if self.regex_pattern.is_some() {
                    scores.push((REGEX_MATCH, share(judge.matches(&text, &expected))));
                }
                all.push(Answered { text, scores });
            }
            cx.progress((before + all.len()) as u64, Some(total as u64), "answers");
        }
        Ok(all)
    }
}

/// What prompts and answers are read and ended by.
struct Coding<'t> {
    tokenizer: &'t Tokenizer,
    stops: Vec<u32>,
}

fn scored(side: &Side<'_>, names: &[&'static str], answers: &[Answered]) -> Scored {
    let by_row = names.iter().enumerate().map(|(at, name)| {
        let values = answers.iter().filter_map(|one| Some(one.scores.get(at)?.1));
        (*name, RowScore::mean(values.collect()))
    });
    let by_row: Vec<(&'static str, RowScore)> = by_row.collect();
    let metrics = by_row.iter();
    let metrics = metrics.map(|(name, score)| (*name, score.value(0..answers.len())));
    Scored {
        part: side.part,
        metrics: metrics.collect(),
        by_row: by_row.iter().cloned().collect(),
    }
}

impl Measure for Parameters {
    const KIND: &'static str = "evaluate_answers";
    const VERSION: u32 = 1;
    const IMPLIED: &'static [Implied] = &[
        BASE_OF_ADAPTER[0],
        Implied {
            parameter: "reward_model",
            unless: &[],
            with: &["reward_adapter"],
            sources: &[ImpliedBy::Input {
                input: "reward_adapter",
                parameter: "model",
                before: None,
            }],
        },
        Implied {
            parameter: "conversations",
            unless: &[],
            with: &["reward_model", "reward_adapter"],
            sources: &[ImpliedBy::Input {
                input: "dataset",
                parameter: "dataset",
                before: Some("apply_chat_template"),
            }],
        },
    ];

    fn check(&self, _: &EvaluationArguments, rules: &mut Rules) {
        if let Err(error) = Judge::new(self) {
            rules.rule(false, "regex_pattern", &error.to_string());
        }
        rules.rule(
            self.group_select == 0 || self.regex_pattern.is_some(),
            "group_select",
            "expected only with `regex_pattern`",
        );
        rules.rule(
            self.reward_model.is_some() || self.reward_adapter.is_none(),
            "reward_model",
            "the model of `reward_adapter` is not known; hint: name it",
        );
        rules.rule(
            self.conversations.is_some() || self.reward_model.is_none(),
            "conversations",
            "the reward model needs the conversations that the prompts were made of; hint: name the dataset that `apply_chat_template` took",
        );
        rules.rule(
            self.conversations.is_none() || self.reward_model.is_some(),
            "conversations",
            "expected only with `reward_model` or `reward_adapter`",
        );
    }

    /// Those of these parameters.
    fn metrics(&self) -> Vec<&'static str> {
        let regex = self.regex_pattern.as_ref().map(|_| REGEX_MATCH);
        let reward = self.reward_model.as_ref().map(|_| REWARD);
        METRICS.into_iter().chain(regex).chain(reward).collect()
    }

    fn run(&self, arguments: &EvaluationArguments, cx: &Context) -> Result<()> {
        let dataset = cx.input(&self.dataset)?;
        let split = split_or_test(dataset, arguments.split.as_deref())?;
        let known = Models::vocabulary(cx, arguments)?;
        let all_rows = rows(dataset, &split, known)?;
        let most = self.num_answers.unwrap_or(all_rows.len());
        let rows = &all_rows[..most.min(all_rows.len())];
        for (number, row) in (1..).zip(rows) {
            ensure!(
                !row.prompt.is_empty(),
                "row {number} of the split `{split}` is a text without a prompt to answer; hint: `evaluate` tells the perplexity of texts"
            );
        }
        let place = place(cx)?;
        let models = Models::open(cx, arguments, &place)?;
        let folder = &models.scored.folder;
        let tokenizer = tokenizers::load(folder)?;
        let wanted = (split.as_str(), &all_rows[..], rows.len());
        let rewards = self.reward_model(arguments, cx, wanted, &tokenizer)?;
        let mut stops = stop_ids(folder, &models.scored.model.arch)?;
        stops.extend(chat_template::stop_token(cx, dataset, folder)?.map(|stop| stop.id));
        let coding = Coding {
            tokenizer: &tokenizer,
            stops,
        };
        let judge = Judge::new(self)?;
        let executions = models.executions(cx, &place)?;
        let sides = models.sides(&executions);
        let total = rows.len() * sides.len();
        let mut all = Vec::with_capacity(sides.len());
        for (number, side) in sides.iter().enumerate() {
            let progress = (number * rows.len(), total);
            let answers = self.answers(cx, side, rows, &judge, &coding, progress);
            all.push(answers.map_err(|error| {
                let model = &side.loaded.model;
                explain(error, model, arguments.fp16, &split, &models.sources(side))
            })?);
        }
        if let Some(rewards) = &rewards {
            self.reward(cx, &place, rewards, &mut all)?;
        }
        let mut lines = String::new();
        for (number, row) in rows.iter().enumerate() {
            let mut line = Map::new();
            line.insert(
                "prompt".into(),
                tokenizer.decode(&row.prompt, false)?.into(),
            );
            line.insert("chosen".into(), tokenizer.decode(&row.chosen, true)?.into());
            let mut scores = Map::new();
            for (side, answers) in sides.iter().zip(&all) {
                let answered = &answers[number];
                line.insert(side.part.key().into(), answered.text.as_str().into());
                let named = answered.scores.iter();
                let named = named.map(|(name, value)| ((*name).to_owned(), Value::from(*value)));
                scores.insert(side.part.key().into(), Value::Object(named.collect()));
            }
            line.insert("scores".into(), scores.into());
            lines.push_str(&serde_json::to_string(&line)?);
            lines.push('\n');
        }
        fs::write(cx.out().join("answers.jsonl"), lines)
            .context("could not write `answers.jsonl`")?;
        let names = self.metrics();
        let scored: Vec<Scored> = sides
            .iter()
            .zip(&all)
            .map(|(side, answers)| scored(side, &names, answers))
            .collect();
        note_work(cx, &place);
        report::write(cx, &split, rows.len(), &scored, &names)?;
        let told = match self.regex_pattern {
            Some(_) => REGEX_MATCH,
            None => "exact_match",
        };
        let of_all = |name: &str, shown: fn(f64) -> String| {
            let values = scored.iter().map(|side| side.metrics.get(name).copied());
            let values: Vec<String> = values.map(|x| shown(x.unwrap_or(f64::NAN))).collect();
            values.join(", then ")
        };
        cx.info(format!(
            "{} of {} answers are right (`{told}`)",
            of_all(told, |share| format!("{:.1} %", 100. * share)),
            rows.len()
        ));
        if self.reward_model.is_some() {
            let rewards = of_all(REWARD, |reward| format!("{reward:.3}"));
            cx.info(format!("the reward model gives them {rewards} on average"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Stage as _;

    pub(super) fn parameters(more: &str) -> EvaluateAnswers {
        let mut all = serde_json::json!({"model": "m", "dataset": "d"});
        let more: Value = serde_json::from_str(more).unwrap();
        for (name, value) in more.as_object().unwrap() {
            all[name] = value.clone();
        }
        serde_json::from_value(all).unwrap()
    }

    #[test]
    fn mistakes_are_told_at_their_places() {
        for (json, place, expected) in [
            (
                r#"{"regex_pattern": "("}"#,
                "regex_pattern",
                "unclosed group",
            ),
            (
                r#"{"group_select": -1}"#,
                "group_select",
                "only with `regex_pattern`",
            ),
            (
                r#"{"require": {"regex_match": "> 0"}}"#,
                "require.regex_match",
                "there is no score `regex_match`",
            ),
        ] {
            let problems = parameters(json).check();
            let [problem] = &problems[..] else {
                panic!("{problems:?}");
            };
            assert_eq!(problem.parameter, place);
            assert!(problem.message.contains(expected), "{}", problem.message);
        }
        assert_eq!(parameters(r#"{"regex_pattern": "x"}"#).check(), []);
    }
}
