//! A reward model that scores answers: it reads each with its conversation, by its own chat template and tokenizer.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use candle_core::DType;

use super::models::Loaded;
use crate::data::table::{BATCH_ROWS, Split};
use crate::engine::{Context, Input, Row as Watched, watched};
use crate::ml::fused::Packing;
use crate::ml::model::batch::{Row, Sequence};
use crate::ml::model::linear::Pass;
use crate::ml::model::tied;
use crate::ml::place::Place;
use crate::ml::reward::score;
use crate::stages::artifacts::{Adapter, Model};
use crate::stages::model_input::{execution_on, pad_id};
use crate::stages::text::apply_chat_template::chat_row;
use crate::stages::text::{chat_template, tokenizers};
use crate::text::chat::{Asked, Renderer};
use crate::text::template::ChatTemplate;
use crate::text::tokenizer::{self, Tokenizer, special_tokens};

/// The longest CPU time for one conversation. Real ones take less than a thousandth of it.
const LONGEST: Duration = Duration::from_secs(5);

/// A reward model, and how it reads. Its weights are in memory only while it scores.
pub(super) struct RewardModel {
    folder: PathBuf,
    adapter: Option<PathBuf>,
    compute: DType,
    tokenizer: Tokenizer,
    renderer: Renderer,
    pad: u32,
    /// The number of ids that it knows.
    vocabulary: usize,
}

impl RewardModel {
    /// Opens the model, with the adapter if there is one. The chat template is the adapter's, which it was trained with, or else the model's.
    ///
    /// # Errors
    /// The model gives logits and no scores, lacks a tokenizer or a chat template, or can't be read.
    pub(super) fn open(
        cx: &Context,
        model: &Input<Model>,
        adapter: Option<&Input<Adapter>>,
        compute: DType,
    ) -> Result<Self> {
        let adapter = adapter.map(|adapter| cx.input(adapter)).transpose()?;
        Self::of_folders(cx.input(model)?, adapter, compute)
    }

    fn of_folders(folder: &Path, adapter: Option<&Path>, compute: DType) -> Result<Self> {
        let (arch, _) = tied::open(folder)?;
        ensure!(
            arch.scores,
            "the head of `reward_model` gives logits, expected one that gives scores; hint: `train_reward` makes reward models of those by \
             `add_score_head`, and an adapter that it makes is the `reward_adapter`"
        );
        let trained = adapter.map(chat_template::read).transpose()?.flatten();
        let source = match trained {
            Some(trained) => Some(trained),
            None => tokenizer::chat_template(folder)?,
        };
        let source = source.context(
            "the reward model has no chat template, by which it would read a conversation; hint: `train_reward` leaves the one that it was \
             trained with in its result",
        )?;
        let template = ChatTemplate::new(&source, special_tokens(folder)?, None)?;
        Ok(Self {
            folder: folder.to_path_buf(),
            adapter: adapter.map(Path::to_path_buf),
            compute,
            pad: pad_id(folder, &arch),
            vocabulary: arch.vocab_size,
            tokenizer: tokenizers::load(folder)?,
            renderer: Renderer::new(template, false),
        })
    }

    /// What the rows of a split ask: the conversations of the dataset that they were made of, of which some may have been left out. `tokenizer`
    /// is that of the rows, and the first `wanted` of them are asked for.
    ///
    /// # Errors
    /// The dataset has no such split, a row can't be read, or it is not what the rows were made of.
    pub(super) fn conversations(
        &self,
        dataset: &Path,
        split: &str,
        rows: &[Row],
        wanted: usize,
        tokenizer: &Tokenizer,
    ) -> Result<Vec<Asked>> {
        let all = Split::open(dataset, split)?;
        let whole = all.rows() == rows.len();
        let mut found = Vec::with_capacity(wanted);
        let mut number = 0;
        for batch in all.batches(BATCH_ROWS) {
            let batch = batch?;
            for row in 0..batch.num_rows() {
                let Some(tokens) = rows.get(found.len()).filter(|_| found.len() < wanted) else {
                    return Ok(found);
                };
                number += 1;
                let watch = Watched {
                    number,
                    of: Arc::from(format!("of the split `{split}` of `conversations`")),
                };
                let read = || {
                    self.renderer
                        .asked(chat_row(&self.renderer, &batch, row)?.0)
                };
                let asked = watched(watch, LONGEST, read).with_context(|| {
                    format!("row {number} of the split `{split}` of `conversations`")
                })?;
                let prompt = tokenizer.decode(&tokens.prompt, false)?;
                let answer = if whole {
                    None
                } else {
                    Some(tokenizer.decode(&tokens.chosen, true)?)
                };
                if is_of(&asked, &prompt, answer.as_deref()) {
                    found.push(asked);
                } else if whole {
                    bail!(
                        "row {number} of the split `{split}` does not hold what row {number} of `conversations` asks; hint: `conversations` is \
                         the dataset that `apply_chat_template` made these tokens' texts of"
                    );
                }
            }
        }
        ensure!(
            found.len() >= wanted.min(rows.len()),
            "row {} of the split `{split}` is not among the rows of `conversations`; hint: `conversations` is the dataset that \
             `apply_chat_template` made these tokens' texts of, in its order",
            found.len() + 1
        );
        Ok(found)
    }

    /// The score of each conversation with its answer, in their order. `report` is called with the number of scores, and may stop with an
    /// error.
    ///
    /// # Errors
    /// A conversation can't be rendered, or its score is not finite.
    pub(super) fn score(
        &self,
        cx: &Context,
        place: &Place,
        answers: &[(&Asked, &str)],
        batch_size: usize,
        report: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<f64>> {
        let known = self.vocabulary;
        let mut sequences = Vec::with_capacity(answers.len());
        for ((asked, answer), number) in answers.iter().zip(1..) {
            let watch = Watched {
                number,
                of: Arc::from("of the answers, as the reward model reads it"),
            };
            let text = watched(watch, LONGEST, || {
                self.renderer.render_answer(asked, answer)
            });
            let text =
                text.with_context(|| format!("answer {number} can't be read by the reward model"))?;
            let ids = self.tokenizer.encode(&text)?;
            ensure!(
                ids.iter().all(|id| (*id as usize) < known),
                "the reward model's tokenizer gives ids beyond the {known} that the model knows"
            );
            let count = ids.len();
            sequences.push(Sequence::new(ids, count));
        }
        let loaded = Loaded::open(&self.folder, self.adapter.as_deref(), self.compute, place)?;
        let execution = execution_on(cx, &loaded.model, Packing::default(), place)?;
        let pass = Pass::INFER;
        let scores = score(&execution, &sequences, batch_size, self.pad, pass, report)?;
        if let Some(number) = scores.iter().position(|score| !score.is_finite()) {
            bail!(
                "the reward model's score of answer {} is not finite",
                number + 1
            );
        }
        Ok(scores.into_iter().map(f64::from).collect())
    }
}

/// Whether a row with this prompt, and with this answer if that is given, was made of a conversation. Templates may strip what they print, and
/// answers may be cut at their end.
fn is_of(asked: &Asked, prompt: &str, answer: Option<&str>) -> bool {
    let asks = asked
        .question()
        .is_none_or(|question| prompt.contains(question.trim()));
    let own = || match (answer, asked.own_answer()) {
        (Some(answer), Some(own)) => {
            let (answer, own) = (answer.trim(), own.trim());
            answer.starts_with(own) || own.starts_with(answer)
        }
        _ => true,
    };
    asks && own()
}

#[cfg(test)]
mod tests {
    use candle_core::Tensor;
    use serde::Deserialize;

    use super::*;
    use crate::ml::io::weights::{self, Weights};
    use crate::ml::model::tensors::SCORE;
    use crate::ml::reward::add_score_head;
    use crate::ml::testing::golden;
    use crate::text::chat::{ChatRow, Side};
    use crate::text::template::message;

    #[derive(Deserialize)]
    struct Golden {
        prompt: Vec<Message>,
        answer: String,
        ids: Vec<u32>,
        score: f64,
    }

    #[derive(Deserialize)]
    struct Message {
        role: String,
        content: String,
    }

    /// The reward model of the golden runs, with its tokenizer and chat template.
    fn reward_model() -> (tempfile::TempDir, RewardModel) {
        let base = tempfile::tempdir().unwrap();
        let source = golden::folder("model");
        add_score_head(&source, base.path(), 0.12, 42, 1023, &mut |_, _| Ok(())).unwrap();
        let file = base.path().join(weights::SINGLE);
        let made = Weights::open_file(&file).unwrap();
        let device = candle_core::Device::Cpu;
        let mut tensors: std::collections::BTreeMap<String, Tensor> = made
            .names()
            .into_iter()
            .map(|name| (name.to_owned(), made.tensor(name, &device).unwrap()))
            .collect();
        let own = golden::tensors("reward/score.safetensors");
        tensors.insert(SCORE.to_owned(), own[SCORE].clone());
        weights::save(&file, &tensors, &[("format", "pt")]).unwrap();
        let adapter = golden::folder("reward/adapter");
        let model = RewardModel::of_folders(base.path(), Some(&adapter), DType::F32).unwrap();
        (base, model)
    }

    fn row(golden: &Golden) -> ChatRow {
        let messages = golden.prompt.iter();
        let messages = messages.map(|own| message(&own.role, &own.content));
        ChatRow {
            prompt: Some(Side::Messages(messages.collect())),
            chosen: Some(Side::Messages(vec![message("assistant", "another")])),
            ..ChatRow::default()
        }
    }

    /// `tests/python/generate_reward.py`: PEFT's model on transformers' sequence classification.
    #[test]
    fn conversations_get_the_logits_of_a_sequence_classification() {
        let (base, model) = reward_model();
        let text = std::fs::read_to_string(golden::folder("reward/conversations.json")).unwrap();
        let theirs: Vec<Golden> = serde_json::from_str(&text).unwrap();
        assert_eq!(theirs.len(), 16);
        let asked = theirs
            .iter()
            .map(|one| model.renderer.asked(row(one)).unwrap());
        let asked: Vec<Asked> = asked.collect();
        for (asked, one) in asked.iter().zip(&theirs) {
            let text = model.renderer.render_answer(asked, &one.answer).unwrap();
            assert_eq!(model.tokenizer.encode(&text).unwrap(), one.ids);
        }
        let pairs = asked.iter().zip(&theirs);
        let pairs: Vec<(&Asked, &str)> = pairs.map(|(asked, one)| (asked, &*one.answer)).collect();
        let cx = Context::for_test(base.path(), &[], &[]);
        let mut done = 0;
        let scores = model.score(&cx, &Place::cpu(), &pairs, 5, &mut |count| {
            done = count;
            Ok(())
        });
        assert_eq!(done, 16);
        for (ours, one) in scores.unwrap().iter().zip(&theirs) {
            assert!((ours - one.score).abs() < 2e-4, "{ours} {}", one.score);
        }
    }

    #[test]
    fn a_model_that_gives_logits_is_refused() {
        let folder = golden::folder("model");
        let refused = RewardModel::of_folders(&folder, None, DType::F32);
        let error = refused.err().unwrap().to_string();
        assert!(error.contains("`add_score_head`"), "{error}");
    }

    #[test]
    fn rows_are_found_by_what_they_ask() {
        let (_base, model) = reward_model();
        let row = ChatRow {
            prompt: Some(Side::Text(" What is it? ".into())),
            chosen: Some(Side::Text("It is blue.".into())),
            ..ChatRow::default()
        };
        let asked = model.renderer.asked(row).unwrap();
        let prompt = "<|user|>\nWhat is it?<|end|>";
        assert!(is_of(&asked, prompt, None));
        assert!(is_of(&asked, prompt, Some("It is bl")), "cut");
        assert!(is_of(&asked, prompt, Some("It is blue. ")));
        assert!(!is_of(&asked, prompt, Some("It is red.")));
        assert!(!is_of(&asked, "What was it?", None));
    }
}
