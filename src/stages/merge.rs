//! `merge`: an adapter into its model.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::artifacts::{Adapter, Model};
use crate::engine::{Context, Input, Stage};
use crate::ml::adapter::Adapter as LoraAdapter;
use crate::ml::merge;

/// Adds an adapter's update into the weights of a model: a model folder that needs no adapter any more.
///
/// Weights keep their types and files; tokenizer, chat template and generation config are carried along untouched. A model in
/// 4 bits becomes dense (Unsloth's `merged_16bit`), but merging into the dense model that it was made from loses less.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Merge {
    /// The model that the adapter stands beside.
    model: Input<Model>,
    /// The adapter.
    adapter: Input<Adapter>,
}

impl Stage for Merge {
    const KIND: &'static str = "merge";
    const VERSION: u32 = 2;
    type Output = Model;

    fn run(&self, cx: &Context) -> anyhow::Result<()> {
        let adapter = LoraAdapter::load(cx.input(&self.adapter)?)?;
        let model = cx.input(&self.model)?;
        let report = merge::merge(model, &adapter, cx.out(), &mut |done, total| {
            cx.progress(done, Some(total), "bytes");
            cx.check_cancelled()
        })?;
        cx.note("merged_weights", report.merged);
        cx.note("weight_bytes", report.bytes);
        if report.dequantised > 0 {
            cx.note("dequantised_weights", report.dequantised);
            cx.info(format!(
                "{} 4-bit weights were made dense with their error of quantisation; merging into the dense base avoids it",
                report.dequantised
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::ml::config::LlamaConfig;
    use crate::ml::golden;
    use crate::ml::linear::Pass;
    use crate::ml::model::{Llama, Trained};
    use crate::ml::weights::Weights;

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
            assert_eq!(cx.notes.lock().unwrap()["merged_weights"], 21);

            let config = LlamaConfig::read(cx.out()).unwrap();
            let weights = Weights::open(cx.out()).unwrap();
            let (nothing, device) = (Trained::Nothing, Device::Cpu);
            let merged = Llama::load(&config, &weights, None, nothing, DType::F32, &device);
            let theirs = golden::tensors(file);
            let batch = golden::prompt(&theirs["input_ids"]);
            let ours = golden::logits(&merged.unwrap(), &batch, Pass::INFER);
            let far = golden::far(&ours, &theirs[name]);
            assert!(far < 1e-4, "{base} {far}");
        }
    }
}
