//! `merge`: an adapter into its model.

use std::path::Path;

use anyhow::Context as _;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::engine::{Context, Implied, ImpliedBy, Input, Problem, Stage};
use crate::ml::adapter::Adapter as LoraAdapter;
use crate::ml::lora::{combine, merge, verify};
use crate::ml::model::arch::Arch;
use crate::stages::artifacts::{Adapter, Model};
use crate::stages::text::{chat_template, tokenizers};

/// The prompts on which the merged model is compared with the base and its adapter.
const PROMPTS: [&str; 3] = [
    "What is the capital of France, and why did it become the capital?",
    "Write a function that returns the n-th Fibonacci number.\n\n```python\ndef fibonacci(n):",
    "Is it true that goldfish forget everything after three seconds?",
];
/// The number of tokens used of each prompt. Those of all prompts fill a panel of 32 rows, so that no lane of the kernels is empty.
const LONGEST: usize = 10;
/// A warning is given if more than this share of the adapter's change is lost in rounding.
const MUCH: f64 = 0.5;

/// Adds an adapter's update to the weights of a model, which gives a model folder that needs no adapter any more.
///
/// Weights keep their types and files. Tokenizer, chat template and generation config are carried along untouched, unless the
/// adapter was trained with another template: then the result has that one, without its comments, and the token that ends its
/// answers is added to `eos_token_id` in `generation_config.json`. A model in 4 bits becomes dense (Unsloth's `merged_16bit`), but
/// merging into the dense model that it was made from loses less.
///
/// Where the head of the model is its embeddings and the adapter changes one of them, the result has both (`tie_word_embeddings:
/// false`), as with PEFT. Matrices beside one of them count for that one alone, as they do in training; PEFT's `merge_and_unload`
/// adds them to the tensor that both share.
///
/// Sums are made in f32 and rounded once. PEFT does the same, except for matrices beside the embeddings: it rounds their product to
/// the weights' type before adding it, so that in bf16 and f16 its embeddings may differ by one rounding.
///
/// At the end the result is checked: its logits on a few fixed prompts are compared with those of the model with the adapter (both
/// in f32, a layer at a time). The difference stands in the record, and where it is more than rounding explains the stage fails.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("examples" = [{"adapter": "tuned"}]))]
pub struct Merge {
    /// The model to merge into. It may be left out: then it is the model that the adapter was made for, or, where that was made by
    /// `quantize`, the dense model before it, because merging into dense weights loses less.
    #[schemars(extend("examples" = ["base"]))]
    model: Input<Model>,
    /// The adapter.
    #[schemars(extend("examples" = ["tuned"]))]
    adapter: Input<Adapter>,
    /// What the adapter's update is multiplied by. -1 takes it away: of a new adapter with `init_lora_weights: pissa` or `olora` that leaves the
    /// model beside which it is trained.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    #[schemars(extend("default" = 1))]
    #[schemars(extend("examples" = [0.5, -1]))]
    weight: f64,
}

fn one() -> f64 {
    1.
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde's signature of a condition"
)]
fn is_one(weight: &f64) -> bool {
    weight.to_bits() == 1f64.to_bits()
}

impl Merge {
    /// Whether it takes the adapter's update away.
    pub(in crate::stages) fn subtracts(&self) -> bool {
        self.weight.to_bits() == (-1f64).to_bits()
    }
}

impl Stage for Merge {
    const KIND: &'static str = "merge";
    const VERSION: u32 = 3;
    type Output = Model;
    const IMPLIED: &'static [Implied] = &[Implied {
        parameter: "model",
        unless: &[],
        with: &[],
        sources: &[ImpliedBy::Input {
            input: "adapter",
            parameter: "model",
            before: Some("quantize"),
        }],
    }];

    fn check(&self) -> Vec<Problem> {
        if self.weight.is_finite() && self.weight != 0. {
            return Vec::new();
        }
        vec![Problem::new("weight", "expected a number other than 0")]
    }

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        let adapter_folder = cx.input(&self.adapter)?;
        let mut adapter = LoraAdapter::load(adapter_folder)?;
        if !is_one(&self.weight) {
            adapter = combine::weighted(adapter, self.weight).context("could not use `weight`")?;
        }
        let model = cx.input(&self.model)?;
        let report = merge::merge(model, &adapter, cx.out(), &mut |done, total| {
            cx.progress(done, Some(total), "bytes");
            cx.check_cancelled()
        })?;
        for file in &report.files {
            cx.written(&file.name, &file.blake3)?;
        }
        if let Some(template) = chat_template::read(adapter_folder)? {
            chat_template::install(cx, &template)?;
        }
        cx.note("merged_weights", report.merged);
        cx.note("weight_bytes", report.bytes);
        if report.untied {
            cx.note("untied", true);
            cx.info("the head was the embeddings; it is a tensor of its own now (`tie_word_embeddings: false`)");
        }
        if report.dequantised > 0 {
            cx.note("dequantised_weights", report.dequantised);
            cx.info(format!(
                "{} 4-bit weights were made dense with their error of quantisation; merging into the dense base avoids it",
                report.dequantised
            ));
        }
        let prompts = prompts(model)?;
        let mut progress = |done, total| {
            cx.progress(done, Some(total), "layers");
            cx.check_cancelled()
        };
        let files = report.files.iter().map(|file| &file.name);
        let check = cx.while_synced(files, || {
            verify::verify_merge(model, &adapter, cx.out(), &prompts, &mut progress)
        })?;
        cx.note("compared_logits_of_tokens", check.positions);
        cx.note("largest_logit_difference", check.largest);
        cx.note("logit_difference", check.relative);
        cx.note("logit_difference_allowed", check.bound);
        cx.note("logit_change_by_adapter", check.effect);
        if check.fraction_lost() > MUCH {
            cx.warn(format!(
                "rounding took {:.0} % of what the adapter changes, which is little (its logits change by {:.0e} of their size); \
                 keep the adapter beside the model, or merge into weights of more bits",
                100. * check.fraction_lost(),
                check.effect
            ));
        }
        Ok(())
    }
}

/// The prompts as ids of the model's tokenizer; if it has none, ids from all over the vocabulary.
pub(super) fn prompts(model: &Path) -> anyhow::Result<Vec<Vec<u32>>> {
    let config = Arch::read(model)?;
    let longest = LONGEST.min(config.max_position_embeddings).max(1);
    let vocabulary = config.vocab_size.max(1);
    let tokenizer = tokenizers::load(model).ok();
    let prompts = PROMPTS.iter().zip(1..).map(|(text, number)| {
        let ids = tokenizer
            .as_ref()
            .and_then(|t| t.encode_with_special(text).ok());
        let mut ids = ids.unwrap_or_default();
        ids.truncate(longest);
        let known = ids.iter().all(|&id| (id as usize) < vocabulary);
        if ids.is_empty() || !known {
            // The steps are coprime to the usual sizes of vocabularies.
            let steps = (0..longest).map(|at| (at * 10_007 + number * 7_919) % vocabulary);
            ids = steps.map(|id| id as u32).collect();
        }
        ids
    });
    Ok(prompts.collect())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use candle_core::{DType, Device};

    use super::*;
    use crate::ml::io::weights::Weights;
    use crate::ml::model::arch::Arch;
    use crate::ml::model::linear::Pass;
    use crate::ml::model::{CausalLm, Trained};
    use crate::ml::testing::golden;

    #[test]
    fn a_merged_model_gives_the_logits_of_the_reference() {
        let adapter = golden::folder("adapter_final");
        for (base, file, name) in [
            ("model", "logits_merged.safetensors", "logits"),
            (
                "model_nf4",
                "nf4_model_outputs.safetensors",
                "logits_dequantised_merged_f32",
            ),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let model = golden::folder(base);
            let inputs = [("base", model.as_path()), ("tuned", adapter.as_path())];
            let cx = Context::for_test(folder.path(), &inputs, &[]);
            let stage: Merge = serde_yaml::from_str("{model: base, adapter: tuned}").unwrap();
            stage.run(&cx).unwrap();
            let note = |name: &str| cx.notes.lock().unwrap()[name].as_f64().unwrap();
            assert_eq!(note("merged_weights").to_bits(), 21f64.to_bits());
            // The comparison is in the record.
            assert!(note("compared_logits_of_tokens") >= 24.);
            assert!(note("logit_difference") < 5e-6);
            assert!(note("logit_difference") < note("logit_difference_allowed"));
            assert!(note("largest_logit_difference") < 1e-4);
            assert!(note("logit_change_by_adapter") > 0.1);
            // Tokenizer, template and generation config are the base's, byte for byte.
            let mut names = Vec::new();
            for entry in fs::read_dir(&model).unwrap() {
                let name = entry.unwrap().file_name().into_string().unwrap();
                let read = |folder: &Path| fs::read(folder.join(&name)).unwrap();
                if name != "model.safetensors" && (base == "model" || name != "config.json") {
                    assert!(read(&model) == read(cx.out()), "{name}");
                }
                names.push(name);
            }
            assert_eq!(fs::read_dir(cx.out()).unwrap().count(), names.len());
            assert!(names.contains(&"generation_config.json".to_owned()));
            // And of its config nothing but the way of storing is gone: eos and pad stay.
            let config = |folder: &Path| -> serde_json::Value {
                serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap()
            };
            let mut kept = config(&model);
            kept.as_object_mut().unwrap().remove("quantization_config");
            assert_eq!(config(cx.out()), kept);
            assert!(kept["eos_token_id"].is_number() && kept["pad_token_id"].is_number());

            let config = Arch::read(cx.out()).unwrap();
            let weights = Weights::open(cx.out()).unwrap();
            let (nothing, device) = (Trained::Nothing, Device::Cpu);
            let merged = CausalLm::load(&config, &weights, None, nothing, DType::F32, &device);
            let theirs = golden::tensors(file);
            let batch = golden::prompt(&theirs["input_ids"]);
            let ours = golden::logits(&merged.unwrap(), &batch, Pass::INFER);
            let far = golden::far(&ours, &theirs[name]);
            assert!(far < 1e-4, "{base} {far}");
        }
    }
}
