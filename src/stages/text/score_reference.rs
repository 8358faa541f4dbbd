//! `score_reference`: the log-probabilities of answers under a reference model, once for all trainings that compare with it.

use std::collections::BTreeMap;

use anyhow::{Context as _, ensure};
use arrow_array::RecordBatch;
use candle_core::Device;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::added::Added;
use super::chat_template;
use super::labelled::Labelled;
use crate::data::reference_logps::{self, Logps};
use crate::data::table::{Split, Writer, pass, splits};
use crate::data::tokens;
use crate::engine::{Context, Implied, Input, Problem, Stage};
use crate::ml::adapter::Adapter as LoraAdapter;
use crate::ml::execution::Execution;
use crate::ml::fused::Packing;
use crate::ml::loss::Loss;
use crate::ml::loss::dpo::Dpo;
use crate::ml::loss::kto::{Kto, LossType};
use crate::ml::model::batch::Row;
use crate::ml::model::{CausalLm, Trained, tied};
use crate::ml::train::process_group::Alone;
use crate::ml::train::{Passes, ReferenceModel, compute_dtype};
use crate::stages::artifacts::{Adapter, Model, Tokens};
use crate::stages::model_input::{BASE_OF_ADAPTER, execution_on, note_work, pad_id, place, row};
use crate::stages::reference_columns::{Made, RowsDigest, Scorer, changes_nothing};
use crate::stages::rules::Rules;

/// Scores answers by a reference model, for trainings that compare their model with it: the tokens with a log-probability for each token
/// of an answer beside them, in the columns `ref_chosen_logps` and, for preferences, `ref_rejected_logps`.
///
/// `train_dpo` with these tokens as its `dataset` neither loads nor runs a reference model, and has the same numbers to the last bit, so that
/// a search for `beta` or a loss computes the reference once. `train_kto` does the same with labelled rows for `apo_zero_unpaired`; `kto`
/// computes the answers behind other rows' prompts, which depend on its batch size, once before the first step. A training takes the columns
/// only if they were computed by its own reference model: for a new adapter the model without it, else the model or adapter before the first
/// step, or what `ref_model` and `ref_adapter` name. Every split is scored. TRL's `precompute_ref_log_probs` keeps the sum over an answer
/// alone, which holds for one `ld_alpha`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("examples" = [{"model": "base4", "dataset": "tokens"}]))]
pub struct ScoreReference {
    /// The reference model. It may be left out where `adapter` is given: then it is the model that the adapter was made for.
    #[schemars(extend("examples" = ["base4"]))]
    model: Input<Model>,
    /// The adapter of the reference model. A new one, which changes nothing, is as good as none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("examples" = ["sft"]))]
    adapter: Option<Input<Adapter>>,
    /// The rows to score: preferences, or labelled answers for `train_kto`.
    #[schemars(extend("examples" = ["tokens"]))]
    dataset: Input<Tokens>,
    /// The number of rows in a batch.
    #[serde(default = "default_batch_size")]
    #[schemars(extend("minimum" = 1))]
    #[schemars(extend("examples" = [2]))]
    per_device_eval_batch_size: usize,
    /// Whether matrix products are computed in bf16, which has to be as in the training. TRL's default: `true`, unless `fp16` is on.
    #[serde(default)]
    bf16: bool,
    /// Whether matrix products are computed in f16, which has to be as in the training.
    #[serde(default)]
    fp16: bool,
}

fn default_batch_size() -> usize {
    8
}

impl Stage for ScoreReference {
    const KIND: &'static str = "score_reference";
    const VERSION: u32 = 1;
    const EXCLUSIVE: bool = true;
    type Output = Tokens;
    const IMPLIED: &'static [Implied] = BASE_OF_ADAPTER;

    fn check(&self) -> Vec<Problem> {
        let mut rules = Rules::default();
        rules.one_precision(self.bf16, self.fp16);
        rules.0
    }

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        let folder = cx.input(&self.model)?;
        let dataset = cx.input(&self.dataset)?;
        let adapter_folder = self.adapter.as_ref().map(|adapter| cx.input(adapter));
        let mut adapter = None;
        if let Some(folder) = adapter_folder.transpose()? {
            let loaded = LoraAdapter::load(folder)?;
            if !changes_nothing(&loaded)? {
                adapter = Some((folder, loaded));
            }
        }
        let compute = compute_dtype(self.bf16, self.fp16);
        let by = Scorer::new(folder, adapter.as_ref().map(|(folder, _)| *folder), compute)?;
        let (arch, weights) = tied::open(folder)?;
        let mut model = CausalLm::load(
            &arch,
            &weights,
            adapter.as_ref().map(|(_, adapter)| adapter),
            Trained::Nothing,
            compute,
            &Device::Cpu,
        )?;
        drop(weights);
        let place = place(cx)?;
        Execution::move_weights(&mut model, &place)?;
        let execution = execution_on(cx, &model, Packing::default(), &place)?;
        let splits = splits(dataset)?.into_iter();
        let splits = splits.map(|(name, files)| Split::of_files(&name, files));
        let splits = splits.collect::<anyhow::Result<Vec<Split>>>()?;
        ensure!(!splits.is_empty(), "there is no split to score");
        let labelled = Labelled::find(dataset)?;
        // Any loss that needs a reference model: what is scored are the tokens of answers.
        let loss: Box<dyn Loss> = match labelled {
            None => Box::new(Dpo::sigmoid(1., 0.)),
            Some(_) => Box::new(Kto {
                loss_type: LossType::ApoZeroUnpaired,
                beta: 1.,
                desirable_weight: 1.,
                undesirable_weight: 1.,
            }),
        };
        let scoring = Scoring {
            cx,
            passes: Passes {
                execution: &execution,
                loss: &*loss,
                reference: ReferenceModel::Frozen(&execution),
            },
            added: Added::read(dataset)?,
            labelled,
            pad: pad_id(folder, &arch),
            batch_size: self.per_device_eval_batch_size,
            total: splits.iter().map(Split::rows).sum(),
        };
        let mut digests = BTreeMap::new();
        let mut done = 0;
        for split in &splits {
            digests.insert(split.name().to_owned(), scoring.split(split, done)?);
            done += split.rows();
        }
        cx.note("rows", done);
        note_work(cx, &place);
        Made::new(by, digests).write(cx.out())?;
        scoring.added.write(cx.out())?;
        if let Some(labelled) = labelled {
            labelled.write(cx.out())?;
        }
        chat_template::carry(dataset, cx.out())
    }
}

/// The scoring of all splits.
struct Scoring<'a> {
    cx: &'a Context,
    passes: Passes<'a>,
    added: Added,
    labelled: Option<Labelled>,
    pad: u32,
    batch_size: usize,
    /// The number of rows of all splits.
    total: usize,
}

impl Scoring<'_> {
    /// Writes the rows of a split with their log-probabilities. `before` rows of other splits are done.
    fn split(&self, split: &Split, before: usize) -> anyhow::Result<RowsDigest> {
        let schema = reference_logps::schema(split.schema());
        let writer = Writer::create(self.cx.out(), split.name(), schema)?;
        let mut digest = RowsDigest::default();
        let mut done = 0;
        pass(split, writer, |batch| {
            let scored = self.batch(split, before, done, &batch, &mut digest)?;
            done += batch.num_rows();
            Ok(scored)
        })?;
        Ok(digest)
    }

    /// Scores the rows after the first `done` ones of a split.
    fn batch(
        &self,
        split: &Split,
        before: usize,
        done: usize,
        batch: &RecordBatch,
        digest: &mut RowsDigest,
    ) -> anyhow::Result<RecordBatch> {
        let vocabulary = self.passes.execution.model().arch.vocab_size;
        let mut rows = Vec::with_capacity(batch.num_rows());
        for (number, tokens) in (done + 1..).zip(tokens::unpack(batch)?) {
            let mut row: Row = row(tokens, number, split.name(), vocabulary)?;
            digest.add(&row);
            // What the training takes off isn't scored.
            self.added.take_off(&mut row);
            let answered = |ids: Option<&Vec<u32>>| ids.is_some_and(|ids| !ids.is_empty());
            let is_whole = match self.labelled {
                None => answered(Some(&row.chosen)) && answered(row.rejected.as_ref()),
                Some(labelled) => {
                    labelled.cut(&mut row);
                    answered(Some(&row.chosen)) && row.label.is_some()
                }
            };
            ensure!(
                is_whole,
                "row {number} of the split `{}` lacks a chosen or rejected answer, and `score_reference` scores preferences; hint: `tokenize` with                  `trainer: kto` makes labelled answers for `train_kto`",
                split.name()
            );
            rows.push(row);
        }
        let mut report = |scored: usize| {
            let done = (before + done + scored) as u64;
            self.cx.progress(done, Some(self.total as u64), "rows");
            self.cx.check_cancelled()
        };
        self.passes.precompute_reference(
            &mut rows,
            self.batch_size,
            self.pad,
            &Alone,
            &mut report,
        )?;
        let mut all = Vec::with_capacity(rows.len());
        for (row, number) in rows.into_iter().zip(done + 1..) {
            let logps = row.reference_logps.context("a row was not scored")?;
            let logps = Logps {
                chosen: logps.chosen,
                rejected: row.rejected.map(|_| logps.rejected),
            };
            let values = logps.chosen.iter().chain(logps.rejected.iter().flatten());
            ensure!(
                values.copied().all(f32::is_finite),
                "the log-probabilities of row {number} of the split `{}` are not finite; hint: use `bf16`, or neither `bf16` nor `fp16`, and see \
                 whether the weights are finite (`pipeline doctor`)",
                split.name()
            );
            all.push(logps);
        }
        reference_logps::add(batch, &all)
    }
}
