//! What a training is made of, read from the folders of its inputs: everything but the weights.

use std::path::{Path, PathBuf};

use anyhow::ensure;
use candle_core::DType;

use super::arguments::TrainingArguments;
use super::method::{Common as _, Compares as _, Method, Prepared, Use};
use super::reference::Source;
use crate::engine::Context;
use crate::ml::adapter::Adapter;
use crate::ml::fused::Packing;
use crate::ml::io::weights::Weights;
use crate::ml::model::arch::Arch;
use crate::ml::model::batch::Row;
use crate::ml::model::{Trained, tied};
use crate::ml::train::{Settings, compute_dtype};
use crate::stages::model_input::{pad_id, rows};
use crate::stages::reference_columns::{Made, check_lengths};

/// A training before its weights are read.
pub(super) struct Inputs {
    /// The model's folder, what it computes, and the headers of its weights.
    pub(super) folder: PathBuf,
    pub(super) arch: Arch,
    pub(super) weights: Weights,
    /// The adapter and its folder, if one is trained.
    pub(super) adapter: Option<Adapter>,
    pub(super) adapter_folder: Option<PathBuf>,
    pub(super) dataset: PathBuf,
    /// The rows to train on, and to evaluate on.
    pub(super) train: Prepared,
    pub(super) eval_rows: Vec<Row>,
    pub(super) settings: Settings,
    pub(super) packing: Packing,
    pub(super) compute: DType,
    pub(super) pad: u32,
    /// Where the reference model comes from, and that in words.
    pub(super) reference: (Source, &'static str),
    /// Whether the reference model's log-probabilities are computed for all rows before the first step.
    pub(super) precomputes: bool,
}

impl Inputs {
    /// Reads them. Rows that can't be trained on are told before the weights are read.
    pub(super) fn read<M: Method>(
        cx: &Context,
        method: &M,
        compared: &M::Reference,
        common: &M::Common,
        arguments: &TrainingArguments,
    ) -> anyhow::Result<Self> {
        let folder = cx.input(&arguments.model)?;
        let dataset = cx.input(&arguments.dataset)?;
        let adapter_folder = arguments.adapter.as_ref().map(|a| cx.input(a));
        let adapter_folder = adapter_folder.transpose()?;
        let settings = Settings {
            neftune_noise_alpha: common.neftune_noise_alpha(),
            ..arguments.settings(common.learning_rate(), common.dropout())
        };
        let (arch, weights) = tied::open(folder)?;
        let pad = pad_id(folder, &arch);
        ensure!(
            arch.attention_dropout <= 0.,
            "the model's `config.json` has `attention_dropout` {}, which drops attention weights in trainings by transformers and is \
             not computed here; hint: set it to 0 there if it is not meant",
            arch.attention_dropout
        );
        ensure!(
            arch.scores || !M::SCORES,
            "the model's head gives logits, and `{}` trains one that gives scores; hint: `add_score_head` makes such a model of it",
            M::KIND
        );
        ensure!(
            M::SCORES || !arch.scores,
            "the model's head gives scores (`score.weight`), and `{}` trains one that gives logits; hint: name the language model that it \
             was made of",
            M::KIND
        );
        let adapter = adapter_folder.map(Adapter::load).transpose()?;
        let compute = compute_dtype(arguments.bf16, arguments.fp16);
        let named = compared.reference(cx)?;
        let mut reference = named.source(folder, adapter.as_ref())?;
        let compares = !matches!(reference.0, Source::None);
        let columns = Made::read(dataset)?.filter(|_| compares);
        if let Some(columns) = &columns {
            let adapter = adapter_folder;
            let scorer = named.scorer(&reference.0, folder, adapter, compute)?;
            columns.check(&scorer, reference.1)?;
        }
        let read = |split: &str, purpose| -> anyhow::Result<Prepared> {
            let mut rows = rows(dataset, split, arch.vocab_size)?;
            if let Some(columns) = &columns {
                columns.attach(dataset, split, &mut rows)?;
            }
            let prepared = method.prepare(cx, arguments, rows, purpose)?;
            if columns.is_some() {
                check_lengths(&prepared.rows, split)?;
            }
            Ok(prepared)
        };
        let train = read(&arguments.train_split, Use::Training)?;
        let eval_rows = match settings.eval_every {
            Some(_) => read(&arguments.eval_split, Use::Evaluation)?.rows,
            None => Vec::new(),
        };
        let mut precomputes = compared.precomputes();
        if columns.is_some() {
            // Answers behind the prompts of other rows have no columns, so that they need the reference model once.
            let first = train.rows.first().into_iter().collect::<Vec<_>>();
            precomputes = method.loss().batch(&first, pad)?.mismatched().is_some();
            if !precomputes {
                reference = (Source::Rows, reference.1);
            }
        }
        Ok(Self {
            folder: folder.to_owned(),
            weights,
            adapter_folder: adapter_folder.map(Path::to_owned),
            dataset: dataset.to_owned(),
            train,
            eval_rows,
            settings,
            packing: Packing {
                padding_free: arguments.padding_free,
                share_prompts: common.share_prompts(),
            },
            compute,
            pad,
            reference,
            precomputes,
            arch,
            adapter,
        })
    }

    /// What is trained.
    pub(super) fn trained(&self) -> Trained {
        match self.adapter {
            Some(_) => Trained::Adapter,
            None => Trained::Everything,
        }
    }
}
