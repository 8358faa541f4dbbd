//! NaN, infinities and overflow in every stage that reads weights: told by the tensor's name and its file.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};

use super::tests::write_tokens;
use crate::engine::{Context, Level, Stage};
use crate::ml::execution::Execution;
use crate::ml::generate::greedy;
use crate::ml::model::Trained;
use crate::ml::model::linear::Pass;
use crate::ml::testing::golden;
use crate::stages::adapter::attach_lora::AttachLora;
use crate::stages::adapter::import_adapter::ImportAdapter;
use crate::stages::model::merge::Merge;
use crate::stages::model::quantize::Quantize;
use crate::stages::scores::evaluate::Evaluate;
use crate::stages::train::train_orpo::TrainOrpo;
use crate::stages::train::train_sft::TrainSft;

const DOWN: &str = "model.layers.1.mlp.down_proj.weight";
const NORM: &str = "model.layers.2.input_layernorm.weight";
const Q: &str = "model.layers.0.self_attn.q_proj.weight";

/// A folder with tokens, a model and an adapter; any of the two may be broken.
struct Case {
    folder: tempfile::TempDir,
    model: PathBuf,
    adapter: PathBuf,
}

impl Case {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("tokens")).unwrap();
        write_tokens(&folder.path().join("tokens"));
        Self {
            folder,
            model: golden::folder("model"),
            adapter: golden::folder("adapter_final"),
        }
    }

    /// With one value of the model's tensor replaced.
    fn with(name: &str, at: usize, value: f32) -> Self {
        let mut case = Self::new();
        case.model = case.folder.path().join("broken");
        golden::altered("model", &case.model, |tensors| {
            golden::put(tensors, name, at, value);
        });
        case
    }

    fn context(&self) -> (tempfile::TempDir, Context) {
        let own = tempfile::tempdir().unwrap();
        let tokens = self.folder.path().join("tokens");
        let inputs: [(&str, &Path); 4] = [
            ("model", &self.model),
            ("adapter", &self.adapter),
            ("tokens", &tokens),
            ("dense", &self.model),
        ];
        let cx = Context::for_test(own.path(), &inputs, &[("a", &self.adapter)]);
        (own, cx)
    }

    fn fails<S: Stage + for<'de> serde::Deserialize<'de>>(&self, yaml: &str) -> String {
        let stage: S = serde_yaml::from_str(yaml).unwrap();
        let (_own, cx) = self.context();
        let error = stage.run(&cx).unwrap_err();
        format!("{error:#}")
    }
}

fn holds(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
}

const EVALUATE: &str = "{model: model, dataset: tokens, num_answers: 0}";

#[test]
fn an_evaluation_of_a_broken_model_fails_with_split_and_rows() {
    // EuroEval#106: it was preferred in 0 %.
    let case = Case::with(DOWN, 37, f32::NAN);
    let error = case.fails::<Evaluate>(EVALUATE);
    holds(
        &error,
        &[
            "rows [1, 2, 3, 4, 5] of `test`",
            &format!("`{DOWN}` in `model.safetensors` of the model holds a NaN (value 37 of 12288"),
        ],
    );
    let error = case.fails::<Evaluate>("{model: model, adapter: adapter, dataset: tokens}");
    holds(&error, &["of `test`", DOWN]);

    // Only some rows see the broken token.
    let rows = golden::rows("trl-1.16");
    let has = |row: &crate::ml::model::batch::Row, id: u32| {
        let rejected = row.rejected.iter().flatten();
        row.prompt
            .iter()
            .chain(&row.chosen)
            .chain(rejected)
            .any(|own| *own == id)
    };
    let id = (0..1000).find(|id| rows[..5].iter().filter(|row| has(row, *id)).count() == 1);
    let id = id.unwrap();
    let row = rows[..5].iter().position(|row| has(row, id)).unwrap();
    let case = Case::with("model.embed_tokens.weight", id as usize * 64, f32::INFINITY);
    let one = "{model: model, dataset: tokens, num_answers: 0, per_device_eval_batch_size: 1}";
    let error = case.fails::<Evaluate>(one);
    holds(
        &error,
        &[
            &format!("rows [{}] of `test`", row + 1),
            "`model.embed_tokens.weight`",
            "an infinity",
        ],
    );

    // Finite weights beyond the range of f16, which products are computed in.
    let case = Case::with(DOWN, 0, 1e6);
    let half = "{model: model, dataset: tokens, num_answers: 0, fp16: true}";
    let error = case.fails::<Evaluate>(half);
    holds(&error, &[DOWN, "65504", "bf16"]);
    let (_own, cx) = case.context();
    serde_yaml::from_str::<Evaluate>(EVALUATE)
        .unwrap()
        .run(&cx)
        .unwrap();
}

#[test]
fn a_training_names_the_broken_tensor_before_the_learning_rate() {
    let orpo = "{model: model, adapter: adapter, dataset: tokens, max_steps: 2, per_device_train_batch_size: 2}";
    let case = Case::with(NORM, 3, f32::NAN);
    let error = case.fails::<TrainOrpo>(orpo);
    holds(
        &error,
        &[
            "in step 1",
            "of `train`",
            &format!("`{NORM}` in `model.safetensors` of the model holds a NaN"),
        ],
    );
    assert!(!error.contains("learning_rate"), "{error}");
    // Skipped steps say it too.
    let skipping = orpo.replace('}', ", skip_nan_steps: 1}");
    let stage: TrainOrpo = serde_yaml::from_str(&skipping).unwrap();
    let (_own, cx) = case.context();
    stage.run(&cx).unwrap_err();
    let warned = cx.messages(Level::Warning);
    assert!(warned.len() == 1 && warned[0].contains(NORM), "{warned:?}");

    // A token that no row has: the loss is finite, but the result would be broken.
    let case = Case::with("model.embed_tokens.weight", 1020 * 64, f32::NAN);
    let sft = "{model: model, dataset: tokens, max_steps: 1, per_device_train_batch_size: 1, learning_rate: 1.0e-5}";
    let rows = golden::rows("trl-1.16");
    assert!(rows.iter().all(|row| !row.chosen.contains(&1023)));
    let case_of_pad = Case::with("model.embed_tokens.weight", 1023 * 64, f32::NAN);
    for case in [case, case_of_pad] {
        let error = case.fails::<TrainSft>(sft);
        holds(
            &error,
            &["`model.embed_tokens.weight` in `model.safetensors` of the model holds a NaN"],
        );
        assert!(!error.contains("learning_rate"), "{error}");
    }

    let case = Case::with(DOWN, 0, 1e6);
    let error = case.fails::<TrainOrpo>(&orpo.replace('}', ", fp16: true, skip_nan_steps: 0}"));
    holds(&error, &[DOWN, "65504"]);
}

#[test]
fn a_training_s_result_has_to_fit_into_the_model_s_type() {
    let mut case = Case::new();
    case.model = case.folder.path().join("half");
    golden::altered("model", &case.model, |tensors| {
        for tensor in tensors.values_mut() {
            *tensor = tensor.to_dtype(DType::F16).unwrap();
        }
        golden::put(tensors, "model.norm.weight", 5, 65_504.);
    });
    let sft = "{model: model, dataset: tokens, max_steps: 1, per_device_train_batch_size: 1, learning_rate: 1.0e+3, \
        max_grad_norm: 0, lr_scheduler_type: constant, optim: sgd}";
    let error = case.fails::<TrainSft>(sft);
    holds(&error, &["float16 can't hold", "bfloat16"]);
}

#[test]
fn dropout_of_attention_weights_is_not_left_out_silently() {
    let mut case = Case::new();
    case.model = case.folder.path().join("dropping");
    golden::altered("model", &case.model, |_| ());
    let path = case.model.join("config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(
        &path,
        text.replace("\"attention_dropout\": 0.0", "\"attention_dropout\": 0.1"),
    )
    .unwrap();
    let error = case.fails::<TrainOrpo>("{model: model, adapter: adapter, dataset: tokens}");
    holds(&error, &["`attention_dropout` 0.1", "config.json"]);
    // It plays no part where nothing is trained.
    let (_own, cx) = case.context();
    serde_yaml::from_str::<Evaluate>(EVALUATE)
        .unwrap()
        .run(&cx)
        .unwrap();
}

#[test]
fn what_is_made_of_broken_weights_is_refused() {
    let merge = "{model: model, adapter: adapter}";
    let error = Case::with(NORM, 3, f32::NAN).fails::<Merge>(merge);
    holds(
        &error,
        &[NORM, "`model.safetensors`", "a NaN (value 3 of 64"],
    );
    let error = Case::with(Q, 4000, f32::NEG_INFINITY).fails::<Merge>(merge);
    holds(
        &error,
        &[Q, "the model holds an infinity there (value 4000"],
    );
    let error = Case::with(NORM, 3, f32::NAN).fails::<Quantize>("{model: model}");
    holds(&error, &[NORM, "a NaN (value 3 of 64"]);
    let error = Case::with(Q, 4000, f32::NAN).fails::<Quantize>("{model: model}");
    holds(&error, &[Q, "NaN"]);
    let case = Case::with(Q, 4000, f32::NAN);
    let error = case.fails::<AttachLora>("{model: model, use_dora: true}");
    holds(&error, &[Q, "a NaN (value 4000 of 4096"]);
    let case = Case::with(NORM, 3, f32::INFINITY);
    let error = case.fails::<AttachLora>("{model: model, modules_to_save: [norm]}");
    holds(&error, &[NORM, "an infinity"]);
    // LoftQ reads the dense model beside a good one in 4 bits.
    let mut case = Case::with(Q, 4000, f32::NAN);
    let broken = std::mem::replace(&mut case.model, golden::folder("model_nf4"));
    let own = tempfile::tempdir().unwrap();
    let inputs: [(&str, &Path); 2] = [("model", &case.model), ("dense", &broken)];
    let cx = Context::for_test(own.path(), &inputs, &[]);
    let stage: AttachLora =
        serde_yaml::from_str("{model: model, init_lora_weights: loftq, loftq_from: dense}")
            .unwrap();
    let error = format!("{:#}", stage.run(&cx).unwrap_err());
    holds(&error, &[Q, "a NaN (value 4000 of 4096"]);
}

#[test]
fn a_broken_adapter_is_refused_wherever_it_comes_in() {
    let mut case = Case::new();
    let good = std::mem::replace(&mut case.adapter, case.folder.path().join("adapter"));
    std::fs::create_dir(&case.adapter).unwrap();
    let config = "adapter_config.json";
    std::fs::copy(good.join(config), case.adapter.join(config)).unwrap();
    let mut tensors = golden::tensors("adapter_final/adapter_model.safetensors");
    let name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight";
    golden::put(&mut tensors, name, 9, f32::NAN);
    let file = case.adapter.join("adapter_model.safetensors");
    crate::ml::io::weights::save(&file, &tensors, &[]).unwrap();
    let both = "{model: model, adapter: adapter, dataset: tokens}";
    let errors = [
        case.fails::<ImportAdapter>("{path: a}"),
        case.fails::<Merge>("{model: model, adapter: adapter}"),
        case.fails::<Evaluate>(both),
        case.fails::<TrainOrpo>(both),
    ];
    for error in errors {
        holds(
            &error,
            &[
                name,
                "`adapter_model.safetensors`",
                "a NaN (value 9 of 1536",
            ],
        );
    }
}

#[test]
fn merging_into_f16_tells_what_it_cannot_hold() {
    let mut case = Case::new();
    case.model = case.folder.path().join("half");
    let halved = |value: f32| {
        golden::altered("model", &case.model, |tensors| {
            for tensor in tensors.values_mut() {
                *tensor = tensor.to_dtype(DType::F16).unwrap();
            }
            golden::put(tensors, Q, 0, value);
        });
    };
    // The largest value of f16 and an update beyond half a step (16) lead to infinity.
    halved(65_504.);
    let mut tensors = golden::tensors("adapter_final/adapter_model.safetensors");
    let wide = |tensor: &Tensor| (tensor.ones_like().unwrap() * 10.).unwrap();
    for part in ["A", "B"] {
        let name = format!("base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight");
        let new = wide(&tensors[&name]);
        tensors.insert(name, new);
    }
    let good = std::mem::replace(&mut case.adapter, case.folder.path().join("adapter"));
    std::fs::create_dir(&case.adapter).unwrap();
    let config = "adapter_config.json";
    std::fs::copy(good.join(config), case.adapter.join(config)).unwrap();
    crate::ml::io::weights::save(
        &case.adapter.join("adapter_model.safetensors"),
        &tensors,
        &[],
    )
    .unwrap();
    let error = case.fails::<Merge>("{model: model, adapter: adapter}");
    holds(
        &error,
        &[Q, "value 0 (from 0) becomes", "float16 can't hold"],
    );
}

#[test]
fn an_answer_that_meets_a_broken_token_is_not_made() {
    // Ids that the model answers with, but no row has: all scores are finite.
    let model = golden::model("model", None, Trained::Nothing, DType::F32);
    let rows = &golden::rows("trl-1.16")[..5];
    let ids = rows.iter().flat_map(|row| {
        row.prompt
            .iter()
            .chain(&row.chosen)
            .chain(row.rejected.iter().flatten())
    });
    let known: BTreeSet<u32> = ids.copied().collect();
    let prompts: Vec<&[u32]> = rows.iter().map(|row| row.prompt.as_slice()).collect();
    let answers = greedy(
        &Execution::fastest(&model),
        &prompts,
        8,
        &[],
        Pass::BASE,
        &mut || Ok(()),
    )
    .unwrap();
    // The last id of an answer is not looked up any more.
    let looked_up = answers.iter().flat_map(|answer| &answer[..7]);
    let id = looked_up.copied().find(|id| !known.contains(id)).unwrap();
    let case = Case::with("model.embed_tokens.weight", id as usize * 64 + 1, f32::NAN);
    let error = case
        .fails::<Evaluate>("{model: model, dataset: tokens, num_answers: 5, max_new_tokens: 8}");
    holds(
        &error,
        &[
            "answers a prompt of `test`",
            "`model.embed_tokens.weight` in `model.safetensors`",
        ],
    );
}
