//! `quantize`: a dense model to 4 bits.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::dtype::Dtype;
use crate::engine::{Context, Input, Problem, Stage};
use crate::ml::adapter::Adapter as LoraAdapter;
use crate::ml::quant::quantize;
use crate::stages::artifacts::{Adapter, Model};

/// Quantises the projections of a model to bitsandbytes' 4-bit NF4, as transformers' `load_in_4bit` does. Embeddings, norms and the
/// head stay as they are.
///
/// The result is a model folder with the same files, which transformers with bitsandbytes loads, too.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("examples" = [{"model": "base"}]))]
pub struct Quantize {
    /// The dense model, stored in float32, float16 or bfloat16.
    #[schemars(extend("examples" = ["base"]))]
    model: Input<Model>,
    /// The data type of the 4-bit values. transformers' default: `fp4`.
    #[serde(default)]
    scheme: Scheme,
    /// Whether the scales of the blocks are quantised too, to 8 bits, which saves 0.37 bits for each weight. QLoRA has it on.
    /// transformers' default: `false`.
    #[serde(default = "yes")]
    double_quant: bool,
    /// The number of weights that share a scale. transformers reads only blocks of 64.
    #[serde(default = "default_blocksize")]
    #[schemars(extend("enum" = [64]))]
    blocksize: usize,
    /// The type that transformers is told to compute in (`bnb_4bit_compute_dtype`). By default it is the type of the dense weights.
    /// Trainings here have settings of their own. transformers' default: `float32`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    compute_dtype: Option<Dtype>,
    /// An adapter that `attach_lora` made with `init_lora_weights: loftq` for an earlier 4-bit version of the model. What it adds
    /// is taken away before quantising, which is LoftQ's next iteration. A new adapter follows, made for the result.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    loftq: Option<Input<Adapter>>,
}

/// The data type of the 4-bit values.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::stages) enum Scheme {
    /// `NormalFloat`: the quantiles of a normal distribution.
    #[default]
    Nf4,
}

fn yes() -> bool {
    true
}

fn default_blocksize() -> usize {
    64
}

impl Stage for Quantize {
    const KIND: &'static str = "quantize";
    const VERSION: u32 = 2;
    type Output = Model;

    fn check(&self) -> Vec<Problem> {
        if self.blocksize == default_blocksize() {
            return Vec::new();
        }
        vec![Problem::new(
            "blocksize",
            "expected 64, the only size that transformers reads",
        )]
    }

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        let Scheme::Nf4 = self.scheme;
        let settings = quantize::Settings {
            double_quant: self.double_quant,
            compute_dtype: self.compute_dtype.map(Dtype::float),
        };
        let model = cx.input(&self.model)?;
        let loftq = self.loftq.as_ref().map(|adapter| cx.input(adapter));
        let loftq = loftq.transpose()?.map(LoraAdapter::load).transpose()?;
        let report = quantize::quantize(
            model,
            cx.out(),
            settings,
            loftq.as_ref(),
            &mut |done, total| {
                cx.progress(done, Some(total), "bytes");
                cx.check_cancelled()
            },
        )?;
        for file in &report.files {
            cx.written(&file.name, &file.blake3)?;
        }
        cx.note("quantised_weights", report.quantised);
        cx.note("bytes_before", report.bytes_before);
        cx.note("bytes_after", report.bytes_after);
        Ok(())
    }
}

#[cfg(test)]
mod tests {

    use super::*;
    use crate::ml::io::weights::Weights;
    use crate::ml::testing::golden;

    #[test]
    fn a_model_becomes_smaller_and_the_record_tells_it() {
        let folder = tempfile::tempdir().unwrap();
        let model = golden::folder("model");
        let cx = Context::for_test(folder.path(), &[("base", &model)], &[]);
        let stage: Quantize = serde_yaml::from_str("{model: base}").unwrap();
        assert_eq!(stage.check(), []);
        stage.run(&cx).unwrap();
        let notes = cx.notes.lock().unwrap().clone();
        assert_eq!(notes["quantised_weights"], 21);
        let bytes = Weights::open(cx.out()).unwrap().bytes();
        assert_eq!(notes["bytes_after"], bytes);
        assert!(bytes < 640_000 && cx.out().join("tokenizer.json").is_file());

        let single: Quantize = serde_yaml::from_str("{model: base, double_quant: false}").unwrap();
        let folder = tempfile::tempdir().unwrap();
        let cx = Context::for_test(folder.path(), &[("base", &model)], &[]);
        single.run(&cx).unwrap();
        let weights = Weights::open(cx.out()).unwrap();
        assert!(!weights.names().iter().any(|name| name.contains("nested")));

        cx.control.cancel();
        let error = format!("{:#}", single.run(&cx).unwrap_err());
        assert!(error.contains("interrupted"), "{error}");
    }

    #[test]
    fn another_block_size_is_refused() {
        let stage: Quantize = serde_yaml::from_str("{model: base, blocksize: 128}").unwrap();
        assert_eq!(stage.check()[0].parameter, "blocksize");
        assert!(serde_yaml::from_str::<Quantize>("{model: base, scheme: fp4}").is_err());
    }
}
