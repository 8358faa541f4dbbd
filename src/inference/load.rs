//! From folders to a model in memory with its tokenizer, template and settings.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use candle_core::{DType, Device};
use chrono::NaiveDate;

use crate::ml::adapter::Adapter;
use crate::ml::execution::Execution;
use crate::ml::generation_config::GenerationConfig;
use crate::ml::model::{CausalLm, Trained, tied};
use crate::ml::place::Place;
use crate::text::template::ChatTemplate;
use crate::text::tokenizer::{Tokenizer, chat_template, special_tokens};
use crate::text::turn_end::turn_end;

/// Where a model is: a Hugging Face folder, dense or in 4 bits, and perhaps a PEFT adapter's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Folders {
    /// The model.
    pub model: PathBuf,
    /// The adapter.
    pub adapter: Option<PathBuf>,
}

/// How a conversation becomes a prompt, and what ends an answer.
#[derive(Debug)]
pub(super) struct Manners {
    /// The chat template; a model without one only goes on with texts.
    pub(super) template: Option<ChatTemplate>,
    /// The ids that end an answer.
    pub(super) stops: Vec<u32>,
}

/// A model in memory.
pub struct Loaded {
    pub(super) model: CausalLm,
    pub(super) tokenizer: Tokenizer,
    /// Those of the model with its adapter, if it has one.
    pub(super) manners: Manners,
    /// Those of the model alone.
    pub(super) base_manners: Option<Manners>,
    generation: GenerationConfig,
}

impl Loaded {
    /// Opens folders. Matrix products run in bf16 if `bf16`, else in f32. `template` replaces the model's own, and `date` is what
    /// templates are told of the day.
    ///
    /// # Errors
    /// Whatever of it can't be read or used.
    pub fn open(
        folders: &Folders,
        bf16: bool,
        template: Option<&str>,
        date: NaiveDate,
    ) -> anyhow::Result<Self> {
        let folder = &folders.model;
        let (arch, weights) = tied::open(folder)?;
        let adapter = folders.adapter.as_deref().map(Adapter::load).transpose()?;
        let compute = if bf16 { DType::BF16 } else { DType::F32 };
        let device = Device::Cpu;
        let model = CausalLm::load(
            &arch,
            &weights,
            adapter.as_ref(),
            Trained::Nothing,
            compute,
            &device,
        )?;
        let tokenizer = Tokenizer::load(folder)?;
        let generation = GenerationConfig::read(folder, &arch)?;
        let manners = |own: Option<String>| -> anyhow::Result<Manners> {
            let source = template.map(str::to_owned).or(own);
            let mut stops = generation.eos_token_ids.clone();
            let template = source
                .map(|source| -> anyhow::Result<ChatTemplate> {
                    // A template that can't render so plain a chat has no such token.
                    if let Ok(Some(stop)) = turn_end(&source, folder) {
                        stops.push(stop.id);
                    }
                    ChatTemplate::new(&source, special_tokens(folder)?, Some(date))
                })
                .transpose()?;
            Ok(Manners { template, stops })
        };
        let own = chat_template(folder)?;
        let trained = match &folders.adapter {
            Some(adapter) => chat_template(adapter)
                .with_context(|| format!("could not read `{}`", adapter.display()))?,
            None => None,
        };
        let base_manners = match &folders.adapter {
            // A base that never had a template is asked as the tuned model is.
            Some(_) => Some(manners(own.clone().or_else(|| trained.clone()))?),
            None => None,
        };
        Ok(Self {
            manners: manners(trained.or(own))?,
            base_manners,
            model,
            tokenizer,
            generation,
        })
    }

    /// Moves the weights to the GPU of a place, if it is one: from then on the model has to be run there.
    ///
    /// # Errors
    /// The GPU has no memory for them.
    pub fn move_to(&mut self, place: &Place) -> anyhow::Result<()> {
        Ok(Execution::move_weights(&mut self.model, place)?)
    }

    /// The model.
    pub fn model(&self) -> &CausalLm {
        &self.model
    }

    /// What the model's makers say of generation.
    pub fn generation(&self) -> &GenerationConfig {
        &self.generation
    }

    /// Whether it has a chat template.
    pub fn has_template(&self) -> bool {
        self.manners.template.is_some()
    }

    /// The most tokens of a conversation with its answer.
    pub fn context(&self) -> usize {
        self.model.arch.max_position_embeddings
    }
}

impl Folders {
    /// A model alone.
    pub fn model(folder: impl Into<PathBuf>) -> Self {
        Self {
            model: folder.into(),
            adapter: None,
        }
    }

    /// A model with an adapter.
    pub fn with_adapter(model: impl Into<PathBuf>, adapter: impl AsRef<Path>) -> Self {
        Self {
            model: model.into(),
            adapter: Some(adapter.as_ref().to_owned()),
        }
    }
}
