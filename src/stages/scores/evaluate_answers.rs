//! `evaluate_answers`: how often a model's answers to prompts are the right ones.

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use regex::Regex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::evaluate::explain;
use super::models::{Models, Side};
use super::report::{self, Scored};
use super::require::{Requirements, is_empty};
use crate::engine::{Context, Implied, Input, Neutral, Problem, Stage};
use crate::ml::generate::{Finish, Generator, Listener};
use crate::ml::generation_config::stop_ids;
use crate::ml::model::batch::Row;
use crate::ml::sampling::{Sampler, Sampling};
use crate::ml::train::bootstrap::RowScore;
use crate::ml::train::compute_dtype;
use crate::stages::artifacts::{Adapter, Model, Scores, Tokens};
use crate::stages::model_input::{BASE_OF_ADAPTER, note_work, place, rows, split_or_test};
use crate::stages::rules::Rules;
use crate::stages::text::{chat_template, tokenizers};
use crate::text::tokenizer::Tokenizer;

/// The scores that it makes, the last one with `regex_pattern` alone.
const METRICS: [&str; 4] = ["exact_match", "answer_tokens", "finished", "regex_match"];
/// The most bytes of a regular expression when it is compiled.
const LARGEST_PATTERN: usize = 1 << 20;

/// Lets a model answer prompts, greedily or by sampling, and compares its answers with those of the rows: `scores.json`, and `answers.jsonl`
/// with all answers.
///
/// `exact_match` is the share of answers that are the row's answer, white space around them aside. With `regex_pattern`, `regex_match` is the
/// share in which the expression finds what it finds in the row's answer. `finished` is the share of answers that the model ended by itself,
/// and `answer_tokens` their mean length.
///
/// With `adapter`, the base alone and the base with the adapter answer, and the differences stand beside them; with `baseline` that model
/// and `model`. Intervals and p-values by the paired bootstrap stand in the record.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("examples" = [{"adapter": "tuned", "dataset": "tokens", "regex_pattern": "#### (-?[0-9.,]+)"}]))]
pub struct EvaluateAnswers {
    /// The model that answers. It may be left out where `adapter` is given: then it is the model that the adapter was made for.
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
    /// The prompts, each with the answer that is right. Of preferences that is the chosen one.
    #[schemars(extend("examples" = ["tokens"]))]
    dataset: Input<Tokens>,
    /// The split to read. By default it is `test`, or `train` where there is no `test`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["test"]))]
    split: Option<String>,
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
    /// Whether matrix products are computed in bf16. TRL's default: `true`, unless `fp16` is on.
    #[serde(default)]
    bf16: bool,
    /// Whether matrix products are computed in f16.
    #[serde(default)]
    fp16: bool,
    /// What scores must be, by their names: of the model with the adapter if there is one, and behind `difference/` the change against the
    /// base or the baseline. A run fails where one is not. The scores stay, and other requirements don't compute them again.
    #[serde(default, skip_serializing_if = "is_empty")]
    #[schemars(extend("examples" = [{"regex_match": ">= 0.3", "finished": ">= 0.9"}]))]
    require: Neutral<Requirements>,
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

/// How answers are compared.
struct Judge<'s> {
    parameters: &'s EvaluateAnswers,
    pattern: Option<Regex>,
}

impl Judge<'_> {
    fn is_exact(&self, answer: &str, expected: &str) -> bool {
        self.plain(answer) == self.plain(expected)
    }

    fn plain(&self, text: &str) -> String {
        let mut text = text.to_owned();
        if self.parameters.ignore_case {
            text = text.to_lowercase();
        }
        if self.parameters.ignore_punctuation {
            text.retain(|letter| !letter.is_ascii_punctuation());
        }
        text.trim().to_owned()
    }

    /// What the expression finds in a text.
    fn found<'t>(&self, text: &'t str) -> Option<&'t str> {
        let all: Vec<_> = self.pattern.as_ref()?.captures_iter(text).collect();
        let place = self.parameters.group_select;
        let place = if place < 0 {
            all.len()
                .checked_sub(usize::try_from(place.unsigned_abs()).ok()?)?
        } else {
            usize::try_from(place).ok()?
        };
        let captures = all.into_iter().nth(place)?;
        let group = captures.iter().skip(1).flatten();
        let group = group
            .map(|group| group.as_str())
            .find(|text| !text.is_empty());
        let whole = if captures.len() == 1 {
            captures.get(0).map(|whole| whole.as_str())
        } else {
            None
        };
        group.or(whole).map(str::trim)
    }

    fn matches(&self, answer: &str, expected: &str) -> bool {
        let expected = self.found(expected).unwrap_or(expected.trim());
        self.found(answer) == Some(expected)
    }
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
    /// By the names of [`METRICS`].
    scores: Vec<(&'static str, f64)>,
}

impl EvaluateAnswers {
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

    fn pattern(&self) -> Result<Option<Regex>> {
        let compiled = self.regex_pattern.as_ref().map(|pattern| {
            let mut builder = regex::RegexBuilder::new(pattern);
            builder.size_limit(LARGEST_PATTERN).build()
        });
        compiled.transpose().map_err(|error| {
            // The library draws the place over several lines.
            let text = error.to_string();
            let last = text.lines().last().unwrap_or_default();
            let last = last.strip_prefix("error: ").unwrap_or(last);
            anyhow::anyhow!("it can't be read as a regular expression: {last}")
        })
    }

    /// The names of the scores of these parameters.
    fn metrics(&self) -> &'static [&'static str] {
        match self.regex_pattern {
            Some(_) => &METRICS,
            None => &METRICS[..3],
        }
    }

    /// The answers of a side. `before` are those of other sides, for the progress, of which there are `total` in all.
    fn answers(
        &self,
        cx: &Context,
        side: &Side<'_>,
        rows: &[Row],
        judge: &Judge<'_>,
        asked: &Asked<'_>,
        (before, total): (usize, usize),
    ) -> Result<Vec<Answered>> {
        let Asked { tokenizer, stops } = asked;
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
                    share(judge.matches(&text, &expected)),
                ];
                let scores = self.metrics().iter().copied().zip(values).collect();
                all.push(Answered { text, scores });
            }
            cx.progress((before + all.len()) as u64, Some(total as u64), "answers");
        }
        Ok(all)
    }
}

/// What prompts and answers are read and ended by.
struct Asked<'t> {
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

impl Stage for EvaluateAnswers {
    const KIND: &'static str = "evaluate_answers";
    const VERSION: u32 = 1;
    const EXCLUSIVE: bool = true;
    type Output = Scores;
    const IMPLIED: &'static [Implied] = BASE_OF_ADAPTER;

    fn check(&self) -> Vec<Problem> {
        let mut rules = Rules::default();
        rules.one_precision(self.bf16, self.fp16);
        if let Err(error) = self.pattern() {
            rules.rule(false, "regex_pattern", &error.to_string());
        }
        rules.rule(
            self.group_select == 0 || self.regex_pattern.is_some(),
            "group_select",
            "expected only with `regex_pattern`",
        );
        let compares = self.adapter.is_some() || self.baseline.is_some();
        let problems = self.require.check(self.metrics(), compares);
        rules.0.extend(problems);
        rules.0
    }

    fn has_requirements(&self) -> bool {
        !self.require.is_empty()
    }

    fn accept(&self, result: &Path) -> Result<()> {
        self.require.accept(result)
    }

    fn run(&self, cx: &Context) -> Result<()> {
        let dataset = cx.input(&self.dataset)?;
        let split = split_or_test(dataset, self.split.as_deref())?;
        let compute = compute_dtype(self.bf16, self.fp16);
        let (adapter, baseline) = (self.adapter.as_ref(), self.baseline.as_ref());
        let known = Models::vocabulary(cx, &self.model, baseline)?;
        let mut rows = rows(dataset, &split, known)?;
        if let Some(most) = self.num_answers {
            rows.truncate(most);
        }
        for (number, row) in (1..).zip(&rows) {
            ensure!(
                !row.prompt.is_empty(),
                "row {number} of the split `{split}` is a text without a prompt to answer; hint: `evaluate` tells the perplexity of texts"
            );
        }
        let models = Models::open(cx, &self.model, adapter, baseline, compute)?;
        let folder = &models.scored.folder;
        let tokenizer = tokenizers::load(folder)?;
        let mut stops = stop_ids(folder, &models.scored.model.arch)?;
        stops.extend(chat_template::stop_token(cx, dataset, folder)?.map(|stop| stop.id));
        let asked = Asked {
            tokenizer: &tokenizer,
            stops,
        };
        let judge = Judge {
            parameters: self,
            pattern: self.pattern()?,
        };
        let place = place(cx)?;
        let executions = models.executions(cx, &place)?;
        let sides = models.sides(&executions);
        let total = rows.len() * sides.len();
        let mut all = Vec::with_capacity(sides.len());
        for (number, side) in sides.iter().enumerate() {
            let progress = (number * rows.len(), total);
            let answers = self.answers(cx, side, &rows, &judge, &asked, progress);
            all.push(answers.map_err(|error| {
                let model = &side.loaded.model;
                explain(error, model, self.fp16, &split, &models.sources(side))
            })?);
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
            .map(|(side, answers)| scored(side, names, answers))
            .collect();
        note_work(cx, &place);
        report::write(cx, &split, rows.len(), &scored, names)?;
        let told = if self.regex_pattern.is_some() {
            "regex_match"
        } else {
            "exact_match"
        };
        let shares: Vec<String> = scored
            .iter()
            .map(|side| {
                format!(
                    "{:.1} %",
                    100. * side.metrics.get(told).copied().unwrap_or(f64::NAN)
                )
            })
            .collect();
        cx.info(format!(
            "{} of {} answers are right (`{told}`)",
            shares.join(", then "),
            rows.len()
        ));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters(more: &str) -> EvaluateAnswers {
        let mut all = serde_json::json!({"model": "m", "dataset": "d"});
        let more: Value = serde_json::from_str(more).unwrap();
        for (name, value) in more.as_object().unwrap() {
            all[name] = value.clone();
        }
        serde_json::from_value(all).unwrap()
    }

    fn judge(parameters: &EvaluateAnswers) -> Judge<'_> {
        Judge {
            parameters,
            pattern: parameters.pattern().unwrap(),
        }
    }

    #[test]
    fn answers_are_compared_as_asked() {
        let plain = parameters("{}");
        let judge_plain = judge(&plain);
        assert!(judge_plain.is_exact(" Paris\n", "Paris"));
        assert!(!judge_plain.is_exact("paris", "Paris"));
        assert!(!judge_plain.is_exact("Paris.", "Paris"));
        let loose = parameters(r#"{"ignore_case": true, "ignore_punctuation": true}"#);
        assert!(judge(&loose).is_exact("paris!", "Paris."));
    }

    #[test]
    fn an_expression_finds_what_counts() {
        let first = parameters(r#"{"regex_pattern": "= (-?[0-9.,]+)"}"#);
        let judge_first = judge(&first);
        assert!(judge_first.matches("so = 42 and = 43", "= 42"));
        assert!(!judge_first.matches("so 42", "= 42"));
        assert!(judge_first.matches("= 7", "7"), "a bare reference");
        let last = parameters(r#"{"regex_pattern": "[0-9]+", "group_select": -1}"#);
        let judge_last = judge(&last);
        assert!(judge_last.matches("1 and 2 make 3", "= 3"));
        assert!(!judge_last.matches("3 is 1 and 2", "= 3"));
        assert!(!judge_last.matches("none", "= 3"));
        let second = parameters(r#"{"regex_pattern": "(a)|(b)", "group_select": 1}"#);
        let judge_second = judge(&second);
        assert_eq!(judge_second.found("xaxb"), Some("b"));
        assert_eq!(judge_second.found("xax"), None);
        let far = parameters(r#"{"regex_pattern": "a", "group_select": -2}"#);
        assert_eq!(judge(&far).found("a"), None);
        assert_eq!(judge(&far).found("aba"), Some("a"));
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
