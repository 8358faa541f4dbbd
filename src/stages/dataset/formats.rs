//! Other people's models and adapters on their way through the stages.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};

use crate::engine::{Context, Stage};
use crate::ml::adapter::Adapter;
use crate::ml::io::weights::Weights;
use crate::ml::model::arch::Arch;
use crate::ml::model::linear::Pass;
use crate::ml::model::{CausalLm, Trained};
use crate::ml::testing::golden;
use crate::stages::adapter::attach_lora::AttachLora;
use crate::stages::adapter::import_adapter::ImportAdapter;
use crate::stages::model::import_model::ImportModel;
use crate::stages::model::merge::Merge;
use crate::stages::model::quantize::Quantize;
use crate::stages::train::tests::write_tokens;
use crate::stages::train::train_orpo::TrainOrpo;

/// Runs a stage in a folder of its own, and gives its output.
fn run<S: Stage>(root: &Path, name: &str, yaml: &str, inputs: &[(&str, &Path)]) -> PathBuf {
    let stage: S = serde_yaml::from_str(yaml).unwrap();
    assert_eq!(stage.check(), [], "{yaml}");
    let sources = inputs;
    let cx = Context::for_test(&root.join(name), inputs, sources);
    stage.run(&cx).unwrap();
    cx.out().to_path_buf()
}

fn logits(model: &Path, adapter: Option<&Path>) -> candle_core::Tensor {
    let config = Arch::read(model).unwrap();
    let adapter = adapter.map(|adapter| Adapter::load(adapter).unwrap());
    let (weights, device) = (Weights::open(model).unwrap(), Device::Cpu);
    let model = CausalLm::load(
        &config,
        &weights,
        adapter.as_ref(),
        Trained::Nothing,
        DType::F32,
        &device,
    );
    let ids = &golden::tensors("logits_base.safetensors")["input_ids"];
    golden::logits(&model.unwrap(), &golden::prompt(ids), Pass::INFER)
}

const TRAIN: &str =
    "{model: base, adapter: start, dataset: tokens, max_steps: 2, learning_rate: 1.0e-2,
    lr_scheduler_type: constant, per_device_train_batch_size: 2}";

#[test]
fn a_model_that_is_4_bit_already_needs_no_quantize_stage() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let tokens = root.join("tokens");
    std::fs::create_dir(&tokens).unwrap();
    write_tokens(&tokens);
    // What transformers and bitsandbytes saved, as in `unsloth/llama-3-8b-bnb-4bit`.
    let theirs = golden::folder("model_nf4");
    let base = run::<ImportModel>(root, "base", "{path: theirs}", &[("theirs", &theirs)]);
    let attach = "{model: base, r: 4, target_modules: all-linear, use_dora: true, modules_to_save: [lm_head]}";
    let start = run::<AttachLora>(root, "start", attach, &[("base", &base)]);
    let before = logits(&base, Some(&start));
    let far = golden::far(&before, &logits(&base, None));
    assert!(far < 1e-4, "a new adapter changes nothing: {far}");

    let inputs: [(&str, &Path); 3] = [("base", &base), ("start", &start), ("tokens", &tokens)];
    let tuned = run::<TrainOrpo>(root, "tuned", TRAIN, &inputs);
    let after = logits(&base, Some(&tuned));
    assert!(golden::far(&before, &after) > 1e-2, "it learned something");
    let [first, last] = [&start, &tuned].map(|folder| Adapter::load(folder).unwrap());
    let moved = golden::far(
        &first.saved["lm_head.weight"],
        &last.saved["lm_head.weight"],
    );
    assert!(moved > 1e-3, "the head is trained whole");
    let lengths = |adapter: &Adapter| {
        let pair = &adapter.tensors["model.layers.0.self_attn.q_proj"];
        pair.magnitude.clone().unwrap()
    };
    assert!(golden::far(&lengths(&first), &lengths(&last)) > 1e-3);

    let inputs: [(&str, &Path); 2] = [("base", &base), ("tuned", &tuned)];
    let merged = run::<Merge>(root, "merged", "{model: base, adapter: tuned}", &inputs);
    assert_eq!(Arch::read(&merged).unwrap().quantization, None);
    let far = golden::far(&after, &logits(&merged, None));
    assert!(far < 1e-4, "{far}");
}

/// The whole way of a Qwen3 folder, and of a Mistral one with a window shorter than the rows.
#[test]
fn models_of_other_families_go_the_whole_way() {
    for family in ["qwen3", "mistral"] {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let tokens = root.join("tokens");
        std::fs::create_dir(&tokens).unwrap();
        write_tokens(&tokens);
        let theirs = golden::folder("families").join(family);
        let base = run::<ImportModel>(root, "base", "{path: theirs}", &[("theirs", &theirs)]);
        assert_eq!(Arch::read(&base).unwrap().family, family);
        let small = run::<Quantize>(root, "small", "{model: base}", &[("base", &base)]);
        let quantised = Arch::read(&small).unwrap();
        assert!(quantised.quantization.is_some());
        let attach = "{model: small, r: 4, target_modules: all-linear}";
        let start = run::<AttachLora>(root, "start", attach, &[("small", &small)]);
        let before = logits(&small, Some(&start));
        assert!(golden::far(&before, &logits(&small, None)) < 1e-4);

        let inputs: [(&str, &Path); 3] = [("base", &small), ("start", &start), ("tokens", &tokens)];
        let tuned = run::<TrainOrpo>(root, "tuned", TRAIN, &inputs);
        let after = logits(&small, Some(&tuned));
        assert!(
            golden::far(&before, &after) > 1e-2,
            "{family} learned something"
        );
        let inputs: [(&str, &Path); 2] = [("small", &small), ("tuned", &tuned)];
        let merged = run::<Merge>(root, "merged", "{model: small, adapter: tuned}", &inputs);
        let arch = Arch::read(&merged).unwrap();
        assert_eq!((arch.family, &arch.quantization), (family, &None));
        let far = golden::far(&after, &logits(&merged, None));
        assert!(far < 1e-4, "{family}: {far}");
    }
}

#[test]
fn a_training_goes_on_from_somebody_else_s_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let tokens = root.join("tokens");
    std::fs::create_dir(&tokens).unwrap();
    write_tokens(&tokens);
    let (theirs, base) = (golden::folder("adapter_final"), golden::folder("model"));
    let start = run::<ImportAdapter>(root, "start", "{path: theirs}", &[("theirs", &theirs)]);
    let inputs: [(&str, &Path); 3] = [("base", &base), ("start", &start), ("tokens", &tokens)];
    let tuned = run::<TrainOrpo>(root, "tuned", TRAIN, &inputs);
    let [first, last] = [&theirs, &tuned].map(|folder| Adapter::load(folder).unwrap());
    let settings = |adapter: &Adapter| {
        let mut raw = adapter.config.raw.clone();
        raw.remove("target_modules"); // a set
        raw
    };
    assert_eq!(settings(&first), settings(&last));
    for (path, pair) in &first.tensors {
        let (a, b) = (&last.tensors[path].a, &last.tensors[path].b);
        let moved = golden::far(&pair.a, a).max(golden::far(&pair.b, b));
        // Two steps of Adam move a number by about twice the learning rate.
        assert!((1e-3..3e-2).contains(&moved), "{path} {moved}");
    }
}
