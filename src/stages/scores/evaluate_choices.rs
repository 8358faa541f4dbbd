//! `evaluate_choices`: how often a model finds the right one of several answers likeliest.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::evaluate::explain;
use super::evaluation::{Evaluation, EvaluationArguments, Measure};
use super::models::{Models, Side};
use super::report::{self, Scored};
use crate::data::expression::Expression;
use crate::data::questions::{Question, questions};
use crate::data::table::splits;
use crate::engine::{Context, Input};
use crate::ml::model::batch::Row;
use crate::ml::train::bootstrap::RowScore;
use crate::ml::train::evaluate::log_likelihoods;
use crate::stages::artifacts::Dataset;
use crate::stages::model_input::{note_work, pad_id, place, split_or_test};
use crate::stages::rules::Rules;
use crate::stages::text::tokenizers;
use crate::text::tokenizer::{Tokenizer, special_tokens};

/// The scores that it makes.
const METRICS: [&str; 2] = ["acc", "acc_norm"];

/// The stage.
pub type EvaluateChoices = Evaluation<Parameters>;

/// Scores a model on questions with several answers of which one is right: `scores.json` with the numbers of lm-evaluation-harness.
///
/// The model answers a question with the choice whose log-likelihood behind the question is largest (`acc`), or whose log-likelihood divided
/// by the number of its characters is (`acc_norm`). `answers.jsonl` has the choices that were taken, with all log-likelihoods.
///
/// With `num_fewshot` the first questions of `fewshot_split` stand before each, with their answers (the harness's sampler `first_n`).
///
/// Rows have a `question`, `choices` (a list of texts, or `text` and `label` lists) and an `answer`: the number of the right choice from 0,
/// its label, or its text. `columns` of `import_dataset` and `download_dataset` renames other columns.
///
/// With `adapter`, the base alone and the base with the adapter are scored, and the differences stand beside them; with `baseline` that
/// model and `model`. Intervals and p-values by the paired bootstrap stand in the record.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("examples" = [{"adapter": "tuned", "dataset": "questions"}]))]
#[schemars(rename = "EvaluateChoices")]
pub struct Parameters {
    /// The questions.
    #[schemars(extend("examples" = ["questions"]))]
    dataset: Input<Dataset>,
    /// The text before a choice, as a template on the columns of a row. No chat template is applied.
    #[serde(default = "doc_to_text")]
    #[schemars(extend("examples" = ["{{question}}\nAnswer:"]))]
    doc_to_text: String,
    /// What stands between that text and a choice.
    #[serde(default = "target_delimiter")]
    target_delimiter: String,
    /// The number of questions with their answers that stand before each question, as examples: the first ones of `fewshot_split`, without the
    /// question itself.
    #[serde(default, skip_serializing_if = "is_zero")]
    #[schemars(extend("default" = 0))]
    #[schemars(extend("examples" = [5]))]
    num_fewshot: usize,
    /// The split of these examples. By default it is `train`, or `split` where there is no `train`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["train"]))]
    fewshot_split: Option<String>,
    /// What stands behind each example.
    #[serde(
        default = "fewshot_delimiter",
        skip_serializing_if = "is_fewshot_delimiter"
    )]
    fewshot_delimiter: String,
    /// The number of choices in a batch.
    #[serde(default = "batch_size")]
    #[schemars(extend("minimum" = 1))]
    #[schemars(extend("examples" = [16]))]
    per_device_eval_batch_size: usize,
}

fn doc_to_text() -> String {
    "Question: {{question}}\nAnswer:".to_owned()
}

fn target_delimiter() -> String {
    " ".to_owned()
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
fn is_zero(count: &usize) -> bool {
    *count == 0
}

fn fewshot_delimiter() -> String {
    "\n\n".to_owned()
}

fn is_fewshot_delimiter(text: &str) -> bool {
    text == fewshot_delimiter()
}

fn batch_size() -> usize {
    8
}

/// A question as it is asked.
#[derive(Clone, PartialEq)]
struct Asked {
    text: String,
    question: Question,
}

impl Parameters {
    /// The questions of a split, with examples before them.
    fn asked(&self, dataset: &Path, split: &str) -> Result<Vec<Asked>> {
        let mut asked = self.questions(dataset, split)?;
        if self.num_fewshot == 0 {
            return Ok(asked);
        }
        let of_examples = match &self.fewshot_split {
            Some(given) => given.as_str(),
            None if splits(dataset)?.contains_key("train") => "train",
            None => split,
        };
        let examples = if of_examples == split {
            asked.clone()
        } else {
            self.questions(dataset, of_examples)?
        };
        for (number, one) in (1..).zip(&mut asked) {
            let others = examples.iter().filter(|other| **other != *one);
            let shown: Vec<String> = others
                .take(self.num_fewshot)
                .map(|example| self.shown(example))
                .collect();
            ensure!(
                shown.len() == self.num_fewshot,
                "row {number} of the split `{split}` would have {} examples before it, expected `num_fewshot` {}: the split `{of_examples}` has \
                 no more questions",
                shown.len(),
                self.num_fewshot
            );
            one.text.insert_str(0, &shown.concat());
        }
        Ok(asked)
    }

    /// A question with its answer, as it stands before another.
    fn shown(&self, example: &Asked) -> String {
        let question = &example.question;
        let answer = &question.choices[question.answer];
        [
            &example.text,
            &self.target_delimiter,
            answer,
            &self.fewshot_delimiter,
        ]
        .map(String::as_str)
        .concat()
    }

    /// The questions of a split.
    fn questions(&self, dataset: &Path, split: &str) -> Result<Vec<Asked>> {
        let template = Expression::new(&self.doc_to_text).context("in `doc_to_text`")?;
        let mut all = Vec::new();
        for (number, found) in questions(dataset, split, &template)?.enumerate() {
            let at = || format!("row {} of the split `{split}`", number + 1);
            let (text, question) = found.with_context(at)?;
            ensure!(
                !text.trim().is_empty(),
                "{}: `doc_to_text` gives no text",
                at()
            );
            all.push(Asked { text, question });
        }
        ensure!(!all.is_empty(), "the split `{split}` has no rows");
        Ok(all)
    }

    /// The rows of all choices, question by question, for the tokenizer of a side.
    fn rows(&self, cx: &Context, side: &Side<'_>, asked: &[Asked]) -> Result<Vec<Row>> {
        let folder = &side.loaded.folder;
        let tokenizer = tokenizers::load(folder)?;
        let bos = special_tokens(folder)?.remove("bos_token");
        let arch = &side.loaded.model.arch;
        let most = arch.max_position_embeddings;
        let mut rows = Vec::new();
        let mut cut = 0;
        for (number, one) in asked.iter().enumerate() {
            cx.check_cancelled()?;
            for choice in &one.question.choices {
                let continuation = format!("{}{choice}", self.target_delimiter);
                let (mut prompt, chosen) =
                    encode(&tokenizer, bos.as_deref(), &one.text, &continuation)?;
                ensure!(
                    !chosen.is_empty(),
                    "row {}: the choice {choice:?} has no token of its own",
                    number + 1
                );
                ensure!(
                    chosen.len() <= most,
                    "row {}: a choice has {} tokens, and the model has places for {most}",
                    number + 1,
                    chosen.len()
                );
                let largest = prompt.iter().chain(&chosen).max();
                ensure!(
                    largest.is_none_or(|id| (*id as usize) < arch.vocab_size),
                    "row {}: the tokenizer gives ids beyond the {} that the model knows",
                    number + 1,
                    arch.vocab_size
                );
                // The last token is only predicted, and needs no place.
                let excess = (prompt.len() + chosen.len()).saturating_sub(most + 1);
                if excess > 0 {
                    cut += 1;
                    prompt.drain(..excess);
                }
                rows.push(Row {
                    prompt,
                    chosen,
                    ..Row::default()
                });
            }
        }
        if cut > 0 {
            cx.warn(format!(
                "{cut} of {} choices lost the beginning of their questions, since the model has places for {most} tokens",
                rows.len()
            ));
        }
        Ok(rows)
    }
}

/// The ids of a text and of what goes on behind it, as lm-evaluation-harness 0.4.13 has them (`TemplateLM._encode_pair`): white space at the
/// end of the text goes to what follows, and the ids of what follows are those by which the whole is longer than the text alone.
fn encode(
    tokenizer: &Tokenizer,
    bos: Option<&str>,
    text: &str,
    continuation: &str,
) -> Result<(Vec<u32>, Vec<u32>)> {
    let context = text.trim_end();
    let whole = format!("{text}{continuation}");
    let starts = bos.is_some_and(|bos| !bos.is_empty() && text.starts_with(bos));
    let ids = |text: &str| {
        if starts {
            tokenizer.encode(text)
        } else {
            tokenizer.encode_with_special(text)
        }
    };
    let prompt = ids(context)?;
    let mut whole = ids(&whole)?;
    if prompt.is_empty() {
        bail!("the text before a choice has no token");
    }
    let continuation = whole.split_off(prompt.len().min(whole.len()));
    Ok((prompt, continuation))
}

/// The index of the largest value; of equal ones the first.
fn largest(values: impl Iterator<Item = f64>) -> usize {
    let best = values
        .enumerate()
        .reduce(|best, next| if next.1 > best.1 { next } else { best });
    best.map_or(0, |(index, _)| index)
}

/// What a side took, question by question.
struct Taken {
    log_likelihoods: Vec<Vec<f64>>,
    /// The likeliest choices.
    choices: Vec<usize>,
    scored: Scored,
}

fn taken(side: &Side<'_>, asked: &[Asked], all: &[f64]) -> Taken {
    let mut rest = all;
    let mut log_likelihoods = Vec::with_capacity(asked.len());
    let (mut choices, mut acc, mut acc_norm) = (Vec::new(), Vec::new(), Vec::new());
    for one in asked {
        let question = &one.question;
        let (own, others) = rest.split_at(question.choices.len());
        rest = others;
        let likeliest = largest(own.iter().copied());
        let lengths = question.choices.iter().map(|text| text.chars().count());
        let normed = largest(own.iter().zip(lengths).map(|(sum, n)| sum / n as f64));
        let score = |choice: usize| f64::from(u8::from(choice == question.answer));
        acc.push(score(likeliest));
        acc_norm.push(score(normed));
        choices.push(likeliest);
        log_likelihoods.push(own.to_vec());
    }
    let by_row = [("acc", acc), ("acc_norm", acc_norm)];
    let by_row = by_row.map(|(name, values)| (name, RowScore::mean(values)));
    let metrics = by_row.iter();
    let metrics = metrics.map(|(name, score)| (*name, score.value(0..asked.len())));
    Taken {
        log_likelihoods,
        choices,
        scored: Scored {
            part: side.part,
            metrics: metrics.collect(),
            by_row: by_row.into_iter().collect(),
        },
    }
}

impl Measure for Parameters {
    const KIND: &'static str = "evaluate_choices";
    const VERSION: u32 = 1;

    fn check(&self, _: &EvaluationArguments, rules: &mut Rules) {
        if let Err(error) = Expression::new(&self.doc_to_text) {
            rules.rule(false, "doc_to_text", &format!("{error:#}"));
        }
        rules.rule(
            self.num_fewshot > 0 || self.fewshot_split.is_none(),
            "fewshot_split",
            "expected only with `num_fewshot`",
        );
    }

    fn metrics(&self) -> Vec<&'static str> {
        METRICS.to_vec()
    }

    fn run(&self, arguments: &EvaluationArguments, cx: &Context) -> Result<()> {
        let dataset = cx.input(&self.dataset)?;
        let split = split_or_test(dataset, arguments.split.as_deref())?;
        let asked = self.asked(dataset, &split)?;
        let place = place(cx)?;
        let models = Models::open(cx, arguments, &place)?;
        let executions = models.executions(cx, &place)?;
        let sides = models.sides(&executions);
        let count: usize = asked.iter().map(|one| one.question.choices.len()).sum();
        let total = Some((count * sides.len()) as u64);
        let mut all = Vec::with_capacity(sides.len());
        for (number, side) in sides.iter().enumerate() {
            let rows = self.rows(cx, side, &asked)?;
            let pad = pad_id(&side.loaded.folder, &side.loaded.model.arch);
            let mut report = |done| {
                cx.progress((number * count + done) as u64, total, "choices");
                cx.check_cancelled()
            };
            let size = self.per_device_eval_batch_size;
            let found = log_likelihoods(side.execution, &rows, size, pad, side.pass, &mut report);
            let found = found.map_err(|error| {
                let model = &side.loaded.model;
                explain(error, model, arguments.fp16, &split, &models.sources(side))
            })?;
            all.push(taken(side, &asked, &found));
        }
        let mut lines = String::new();
        for (row, one) in asked.iter().enumerate() {
            let choice = |index: usize| Value::from(one.question.choices[index].as_str());
            let mut line = Map::new();
            line.insert("prompt".into(), one.text.as_str().into());
            line.insert("chosen".into(), choice(one.question.answer));
            let mut sums = Map::new();
            for taken in &all {
                let key = taken.scored.part.key();
                line.insert(key.into(), choice(taken.choices[row]));
                sums.insert(key.into(), taken.log_likelihoods[row].clone().into());
            }
            line.insert("log_likelihoods".into(), sums.into());
            lines.push_str(&serde_json::to_string(&line)?);
            lines.push('\n');
        }
        fs::write(cx.out().join("answers.jsonl"), lines)
            .context("could not write `answers.jsonl`")?;
        let shares: Vec<String> = all
            .iter()
            .map(|taken| format!("{:.1} %", 100. * taken.scored.metrics["acc"]))
            .collect();
        let scored: Vec<Scored> = all.into_iter().map(|taken| taken.scored).collect();
        note_work(cx, &place);
        report::write(cx, &split, asked.len(), &scored, &METRICS)?;
        cx.info(format!(
            "the right one of the choices is likeliest in {} of {} questions",
            shares.join(", then "),
            asked.len()
        ));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::import::{ImportOptions, import_files};
    use crate::engine::Stage as _;
    use crate::ml::testing::golden;

    #[test]
    fn log_likelihoods_and_accuracies_are_those_of_lm_evaluation_harness() {
        compare("", "choices/expected.json");
    }

    /// The questions are the examples of each other, and none of itself.
    #[test]
    fn examples_before_the_question_are_those_of_lm_evaluation_harness() {
        compare(", num_fewshot: 2", "choices/expected_fewshot.json");
    }

    fn compare(more: &str, expected: &str) {
        let file = golden::folder("choices/questions.jsonl");
        let expected = fs::read(golden::folder(expected)).unwrap();
        let expected: Value = serde_json::from_slice(&expected).unwrap();
        let own = tempfile::tempdir().unwrap();
        let dataset = own.path().join("questions");
        fs::create_dir(&dataset).unwrap();
        let options = ImportOptions::default();
        let table = dataset.join("train.parquet");
        import_files(&[file], &options, &table, &mut |_| Ok(())).unwrap();
        let model = golden::folder("model");
        let adapter = golden::folder("adapter_final");
        let inputs = [
            ("model", model.as_path()),
            ("adapter", adapter.as_path()),
            ("questions", dataset.as_path()),
        ];
        let cx = Context::for_test(own.path(), &inputs, &[]);
        let stage: EvaluateChoices = serde_yaml::from_str(&format!(
            "{{model: model, adapter: adapter, dataset: questions, per_device_eval_batch_size: 7{more}}}"
        ))
        .unwrap();
        stage.run(&cx).unwrap();
        let scores = fs::read(cx.out().join("scores.json")).unwrap();
        let scores: Value = serde_json::from_slice(&scores).unwrap();
        for name in METRICS {
            let number = |value: &Value| value[name].as_f64().unwrap();
            assert!(
                (number(&scores["base"]) - number(&expected)).abs() < 1e-12,
                "{name}"
            );
        }
        let answers = fs::read_to_string(cx.out().join("answers.jsonl")).unwrap();
        let all = expected["log_likelihoods"].as_array().unwrap();
        assert_eq!(answers.lines().count(), all.len());
        for (line, expected) in answers.lines().zip(all) {
            let line: Value = serde_json::from_str(line).unwrap();
            let found = line["log_likelihoods"]["base"].as_array().unwrap();
            assert_eq!(found.len(), expected.as_array().unwrap().len());
            for (found, expected) in found.iter().zip(expected.as_array().unwrap()) {
                let (found, expected) = (found.as_f64().unwrap(), expected.as_f64().unwrap());
                let far = (found - expected).abs() / expected.abs().max(1.);
                assert!(far < 1e-5, "{found} {expected}");
            }
        }
    }

    #[test]
    fn the_first_of_equal_choices_counts() {
        assert_eq!(largest([1., 3., 3.].into_iter()), 1);
        assert_eq!(largest([-1.].into_iter()), 0);
    }

    #[test]
    fn a_template_that_can_t_be_read_is_a_mistake_at_its_place() {
        let stage: EvaluateChoices =
            serde_yaml::from_str("{model: m, dataset: d, doc_to_text: '{{question'}").unwrap();
        let problems = stage.check();
        assert_eq!(problems.len(), 1);
        assert_eq!(problems[0].parameter, "doc_to_text");
    }
}
