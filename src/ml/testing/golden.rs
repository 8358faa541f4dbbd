//! The model and the losses against the numbers of the real Python stack.

use std::collections::BTreeMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};

use crate::ml::adapter::Adapter;
use crate::ml::execution::{Execution, Kind};
use crate::ml::fused::Packing;
use crate::ml::generate;
use crate::ml::io::weights::Weights;
use crate::ml::loss::orpo::Orpo;
use crate::ml::loss::sft::Sft;
use crate::ml::loss::{Loss, Outcome};
use crate::ml::model::arch::{Arch, Llama3Scaling, Rope, RopeScaling};
use crate::ml::model::batch::{Batch, Row, Sequence};
use crate::ml::model::linear::Pass;
use crate::ml::model::{CausalLm, Gradients, Trained};
use crate::ml::testing::losses;
use crate::ml::train::{Passes, ReferenceModel, evaluate};

pub(crate) fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

pub(crate) fn tensors(name: &str) -> BTreeMap<String, Tensor> {
    let tensors = candle_core::safetensors::load(folder(name), &Device::Cpu).unwrap();
    tensors.into_iter().collect()
}

/// A copy of a golden model folder in `out`, with other tensors.
pub(crate) fn altered(
    base: &str,
    out: &std::path::Path,
    change: impl FnOnce(&mut BTreeMap<String, Tensor>),
) {
    std::fs::create_dir_all(out).unwrap();
    for entry in std::fs::read_dir(folder(base)).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), out.join(entry.file_name())).unwrap();
    }
    let mut all = tensors(&format!("{base}/model.safetensors"));
    change(&mut all);
    crate::ml::io::weights::save(&out.join("model.safetensors"), &all, &[("format", "pt")])
        .unwrap();
}

/// Puts `value` in the place of a tensor's value number `at`.
pub(crate) fn put(tensors: &mut BTreeMap<String, Tensor>, name: &str, at: usize, value: f32) {
    let old = &tensors[name];
    let (dtype, shape) = (old.dtype(), old.dims().to_vec());
    let flat = old.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
    let mut values: Vec<f32> = flat.to_vec1().unwrap();
    values[at] = value;
    let new = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
    tensors.insert(name.into(), new.to_dtype(dtype).unwrap());
}

pub(crate) fn model(
    base: &str,
    adapter: Option<&str>,
    trained: Trained,
    compute: DType,
) -> CausalLm {
    let config = Arch::read(&folder(base)).unwrap();
    let weights = Weights::open(&folder(base)).unwrap();
    let adapter = adapter.map(|adapter| Adapter::load(&folder(adapter)).unwrap());
    let device = Device::Cpu;
    CausalLm::load(
        &config,
        &weights,
        adapter.as_ref(),
        trained,
        compute,
        &device,
    )
    .unwrap()
}

/// The golden model and adapter, with dropout.
pub(crate) fn dropping(p: f64, trained: Trained) -> CausalLm {
    let mut adapter = Adapter::load(&folder("adapter_init")).unwrap();
    adapter.config.lora_dropout = p;
    CausalLm::load(
        &Arch::read(&folder("model")).unwrap(),
        &Weights::open(&folder("model")).unwrap(),
        Some(&adapter),
        trained,
        DType::F32,
        &Device::Cpu,
    )
    .unwrap()
}

/// `adapter_init` with rank-stabilised scaling.
pub(crate) fn rslora_model() -> CausalLm {
    let mut adapter = Adapter::load(&folder("adapter_init")).unwrap();
    adapter.config.use_rslora = true;
    let config = Arch::read(&folder("model")).unwrap();
    let weights = Weights::open(&folder("model")).unwrap();
    let (trained, device) = (Trained::Adapter, Device::Cpu);
    CausalLm::load(
        &config,
        &weights,
        Some(&adapter),
        trained,
        DType::F32,
        &device,
    )
    .unwrap()
}

/// The largest difference.
pub(crate) fn far(a: &Tensor, b: &Tensor) -> f64 {
    let difference = (a - b).unwrap().abs().unwrap().flatten_all().unwrap();
    f64::from(difference.max(0).unwrap().to_scalar::<f32>().unwrap())
}

/// The 24 training rows as TRL 1.16 or 0.24 tokenised them.
pub(crate) fn rows(semantics: &str) -> Vec<Row> {
    let text = std::fs::read_to_string(folder("tokenised.jsonl")).unwrap();
    let mut rows = Vec::new();
    for line in text.lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        if line["semantics"] != semantics
            || line["eos"] != "end_of_text"
            || line["row"].as_u64().unwrap() >= 24
            || line["truncation_mode"] == "keep_start"
        {
            continue;
        }
        let ids = |name: &str| -> Vec<u32> { serde_json::from_value(line[name].clone()).unwrap() };
        let split = |side: &str| {
            let labels: Vec<i64> =
                serde_json::from_value(line[format!("{side}_labels")].clone()).unwrap();
            let prompt = labels.iter().filter(|label| **label == -100).count();
            let all = ids(&format!("{side}_input_ids"));
            (all[..prompt].to_vec(), all[prompt..].to_vec())
        };
        let (prompt, chosen) = split("chosen");
        let (rejected_prompt, rejected) = split("rejected");
        rows.push(Row {
            prompt,
            chosen,
            rejected: Some(rejected),
            rejected_prompt: Some(rejected_prompt),
            ..Row::default()
        });
    }
    assert_eq!(rows.len(), 24);
    rows
}

pub(crate) fn prompt(ids: &Tensor) -> Batch {
    let ids: Vec<u32> = ids.to_dtype(DType::U32).unwrap().to_vec1().unwrap();
    Batch::new(vec![Sequence::new(ids, 1)], 0).unwrap()
}

pub(crate) fn logits(model: &CausalLm, batch: &Batch, pass: Pass) -> Tensor {
    let hidden = model.hidden(batch, pass).unwrap().squeeze(0).unwrap();
    model.head_matrix(pass).unwrap().logits(&hidden).unwrap()
}

#[test]
fn logits_and_hidden_states_are_those_of_transformers() {
    let golden = tensors("logits_base.safetensors");
    let batch = prompt(&golden["input_ids"]);
    let model = model("model", Some("adapter_init"), Trained::Nothing, DType::F32);
    for (pass, name) in [(Pass::BASE, "logits"), (Pass::INFER, "logits_adapter_init")] {
        let far = far(&logits(&model, &batch, pass), &golden[name]);
        println!("\n| llama | {name} | {far:.1e} | | 1e-4 |");
        assert!(far < 1e-4, "{name}: {far}");
    }

    let golden = tensors("hidden_base.safetensors");
    let states = model.hidden_states(&batch, Pass::BASE).unwrap();
    assert_eq!(states.len(), golden.len());
    for (number, state) in states.iter().enumerate() {
        let state = state.squeeze(0).unwrap();
        let far = far(&state, &golden[&format!("hidden.{number}")]);
        println!("| llama | hidden states {number} | {far:.1e} | | 1e-4 |");
        assert!(far < 1e-4, "{number}: {far}");
    }
}

#[test]
fn logits_are_those_of_candle_with_scaled_rope_and_either_head() {
    use candle_transformers::models::llama as candle;

    let golden = tensors("logits_base.safetensors");
    let batch = prompt(&golden["input_ids"]);
    let base = Arch::read(&folder("model")).unwrap();
    let weights = Weights::open(&folder("model")).unwrap();
    let mut last = Vec::new();
    for tied in [false, true] {
        let config = Arch {
            ropes: vec![Rope {
                theta: base.ropes[0].theta,
                scaling: Some(RopeScaling::Llama3(Llama3Scaling {
                    factor: 8.,
                    low_freq_factor: 1.,
                    high_freq_factor: 4.,
                    original_max_position_embeddings: 256,
                })),
            }],
            tie_word_embeddings: tied,
            ..base.clone()
        };
        let (nothing, device) = (Trained::Nothing, Device::Cpu);
        let ours = CausalLm::load(&config, &weights, None, nothing, DType::F32, &device).unwrap();
        let ours = logits(&ours, &batch, Pass::BASE);
        let ours = ours.get(ours.dim(0).unwrap() - 1).unwrap();

        let theirs = candle::Config {
            hidden_size: 64,
            intermediate_size: 192,
            vocab_size: 1024,
            num_hidden_layers: 3,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            use_flash_attn: false,
            rms_norm_eps: 1e-5,
            rope_theta: 500_000.,
            bos_token_id: None,
            eos_token_id: None,
            rope_scaling: Some(candle::Llama3RopeConfig {
                factor: 8.,
                low_freq_factor: 1.,
                high_freq_factor: 4.,
                original_max_position_embeddings: 256,
                rope_type: candle::Llama3RopeType::Llama3,
            }),
            max_position_embeddings: 512,
            tie_word_embeddings: tied,
        };
        let file = folder("model/model.safetensors");
        let file = candle_core::safetensors::load(file, &device).unwrap();
        let builder = candle_nn::VarBuilder::from_tensors(file, DType::F32, &device);
        let llama = candle::Llama::load(builder, &theirs).unwrap();
        let mut cache = candle::Cache::new(false, DType::F32, &theirs, &device).unwrap();
        let ids = batch.ids(&device).unwrap();
        let theirs = llama.forward(&ids, 0, &mut cache).unwrap();
        assert!(far(&ours, &theirs.squeeze(0).unwrap()) < 1e-4);
        last.push(ours);
    }
    let plain = golden["logits"]
        .get(golden["logits"].dim(0).unwrap() - 1)
        .unwrap();
    assert!(far(&last[0], &plain) > 1e-2, "the scaling does something");
    assert!(
        far(&last[0], &last[1]) > 1e-2,
        "the head makes a difference"
    );
}

#[test]
fn logits_of_a_4_bit_model_are_those_of_bitsandbytes() {
    let golden = tensors("nf4_model_outputs.safetensors");
    let batch = prompt(&golden["input_ids"]);
    let model = model(
        "model_nf4",
        Some("adapter_final"),
        Trained::Nothing,
        DType::F32,
    );
    assert!(far(&logits(&model, &batch, Pass::BASE), &golden["logits_4bit"]) < 1e-4);
    let with_adapter = logits(&model, &batch, Pass::INFER);
    assert!(far(&with_adapter, &golden["logits_4bit_plus_adapter"]) < 1e-4);
}

#[test]
fn first_micro_batch_has_the_loss_of_trl() {
    let rows = rows("trl-1.16");
    let model = model("model", Some("adapter_init"), Trained::Adapter, DType::F32);
    let objective: &dyn Loss = &Orpo { beta: 0.1 };
    let pad = model.arch.pad_token_id.unwrap();
    let batch = objective.batch(&[&rows[0], &rows[1]], pad).unwrap();
    let golden = tensors("runs/a_first_microbatch.safetensors");
    let ids = batch
        .ids(&Device::Cpu)
        .unwrap()
        .to_dtype(DType::I64)
        .unwrap();
    let ids: Vec<Vec<i64>> = ids.to_vec2().unwrap();
    let expected: Vec<Vec<i64>> = golden["concatenated_input_ids"].to_vec2().unwrap();
    assert_eq!(ids, expected);

    let text = std::fs::read_to_string(folder("runs/a_f32.json")).unwrap();
    let run: serde_json::Value = serde_json::from_str(&text).unwrap();
    let first = &run["micro_batches"][0];
    let padded = Packing {
        padding_free: false,
        share_prompts: false,
    };
    for kind in [Kind::Reference, Kind::Fused(padded)] {
        let execution = Execution::new(&model, kind);
        let outcome = losses::evaluate(objective, &execution, &batch).unwrap();
        is_first(first, &outcome);
    }
}

fn is_first(first: &serde_json::Value, outcome: &Outcome) {
    let near = |name: &str, ours: f64, tolerance: f64| {
        let theirs = first[name].as_f64().unwrap();
        assert!(
            (ours - theirs).abs() <= tolerance,
            "{name}: {ours}, TRL has {theirs}"
        );
    };
    near("loss", outcome.loss, 2e-5 * outcome.loss);
    assert_eq!(outcome.metrics.len(), 11);
    for (name, value) in &outcome.metrics {
        near(name, *value, 2e-5 * value.abs().max(0.1));
    }
}

#[test]
fn gradients_of_the_first_step_are_those_of_trl() {
    let rows = rows("trl-1.16");
    let model = model("model", Some("adapter_init"), Trained::Adapter, DType::F32);
    let objective: &dyn Loss = &Orpo { beta: 0.1 };
    let gradients = |checkpointing| {
        let mut gradients = Gradients::none(&model);
        for rows in [[&rows[0], &rows[1]], [&rows[2], &rows[3]]] {
            let batch = objective.batch(&rows, 1023).unwrap();
            let add = &mut gradients;
            let outcome = losses::differentiate(
                objective,
                &Execution::fastest(&model),
                &[(&batch, 0.5)],
                None,
                checkpointing,
                add,
            );
            outcome.unwrap();
        }
        gradients
    };
    let (kept, remade) = (gradients(false), gradients(true));
    let golden = tensors("runs/a_grads_step1.safetensors");
    assert_eq!(model.parameters.len(), golden.len());
    for ((parameter, kept), remade) in model.parameters.iter().zip(&kept.0).zip(&remade.0) {
        let (kept, remade) = (kept.as_ref().unwrap(), remade.as_ref().unwrap());
        let same = far(kept, remade).to_bits() == 0;
        assert!(same, "checkpointing changed {}", parameter.name);
        let theirs = &golden[&format!("base_model.model.{}", parameter.name)];
        let size = theirs
            .abs()
            .unwrap()
            .max_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap();
        assert!(size > 0.);
        let far = far(kept, theirs);
        assert!(
            far <= 1e-5 + 1e-4 * f64::from(size),
            "{}: {far}",
            parameter.name
        );
    }
}

#[test]
fn every_trained_tensor_has_the_gradient_of_the_difference_quotient() {
    let rows = rows("trl-1.16");
    for trained in [Trained::Adapter, Trained::Everything] {
        let adapter = (trained == Trained::Adapter).then_some("adapter_init");
        let model = model("model", adapter, trained, DType::F32);
        let objective: &dyn Loss = &Orpo { beta: 0.5 };
        let batch = objective.batch(&[&rows[0], &rows[1]], 1023).unwrap();
        let mut gradients = Gradients::none(&model);
        let add = &mut gradients;
        let outcome = losses::differentiate(
            objective,
            &Execution::fastest(&model),
            &[(&batch, 1.)],
            None,
            true,
            add,
        );
        outcome.unwrap();
        assert_eq!(
            model.parameters.len(),
            if trained == Trained::Adapter { 42 } else { 30 }
        );
        for (parameter, gradient) in model.parameters.iter().zip(&gradients.0) {
            let gradient = gradient.as_ref().expect(&parameter.name);
            // Along the gradient the loss rises by the gradient's length.
            let length = gradient
                .sqr()
                .unwrap()
                .sum_all()
                .unwrap()
                .to_scalar::<f32>()
                .unwrap();
            let length = f64::from(length).sqrt();
            assert!(length > 0., "{}", parameter.name);
            let start = parameter.var.as_detached_tensor().copy().unwrap();
            let loss = |by: f64| {
                let moved = (&start + (gradient * (by / length)).unwrap()).unwrap();
                parameter.var.set(&moved).unwrap();
                losses::evaluate(objective, &Execution::fastest(&model), &batch)
                    .unwrap()
                    .loss
            };
            let by = 2e-2;
            let quotient = (loss(by) - loss(-by)) / (2. * by);
            parameter.var.set(&start).unwrap();
            assert!(
                (quotient - length).abs() < 2e-2 * length + 5e-4,
                "{}: {quotient}, gradient {length}",
                parameter.name
            );
        }
    }
}

#[test]
fn greedy_tokens_are_those_of_transformers() {
    let text = std::fs::read_to_string(folder("greedy.json")).unwrap();
    let golden: serde_json::Value = serde_json::from_str(&text).unwrap();
    let ids = |name: &str| -> Vec<u32> { serde_json::from_value(golden[name].clone()).unwrap() };
    let prompt = ids("prompt_ids");
    let model = model("model", Some("adapter_final"), Trained::Nothing, DType::F32);
    for (pass, name) in [(Pass::BASE, "base_ids"), (Pass::INFER, "merged_ids")] {
        let go_on = &mut || Ok(());
        // Beside a shorter prompt, which ends another time.
        let prompts = [prompt.as_slice(), &prompt[..5]];
        let answers =
            generate::greedy(&Execution::fastest(&model), &prompts, 20, &[], pass, go_on).unwrap();
        assert_eq!(answers[0], ids(name));
        assert_eq!(answers[1].len(), 20);
        let stops = [answers[0][3]];
        let stopped = generate::greedy(
            &Execution::fastest(&model),
            &prompts,
            20,
            &stops,
            pass,
            go_on,
        )
        .unwrap();
        assert_eq!(stopped[0], answers[0][..3]);
        let alone = generate::greedy(
            &Execution::fastest(&model),
            &prompts[1..],
            20,
            &stops,
            pass,
            go_on,
        )
        .unwrap();
        assert_eq!(stopped[1], alone[0]);
    }
}

#[test]
fn answers_are_as_probable_as_in_transformers() {
    let text = std::fs::read_to_string(folder("sampling/completions.json")).unwrap();
    let golden: serde_json::Value = serde_json::from_str(&text).unwrap();
    let ids =
        |value: &serde_json::Value| -> Vec<u32> { serde_json::from_value(value.clone()).unwrap() };
    let rows: Vec<Row> = golden["rows"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| Row {
            prompt: ids(&row["prompt"]),
            chosen: ids(&row["chosen"]),
            ..Row::default()
        })
        .collect();
    let model = model("model", Some("adapter_final"), Trained::Nothing, DType::F32);
    for kind in [Kind::Reference, Kind::default()] {
        let execution = Execution::new(&model, kind);
        let passes = Passes {
            execution: &execution,
            loss: &Sft {
                completion_only: true,
            },
            reference: ReferenceModel::None,
        };
        for (name, pass) in [("base", Pass::BASE), ("tuned", Pass::INFER)] {
            for batch_size in [1, 3, 8] {
                let found =
                    evaluate::completions(&passes, &rows, batch_size, 1023, pass, &mut |_| Ok(()));
                let (found, _) = found.unwrap();
                for metric in ["loss", "entropy", "mean_token_accuracy"] {
                    let expected = golden[name][metric].as_f64().unwrap();
                    let far = (found[metric] - expected).abs();
                    assert!(
                        far < 2e-6 * expected.abs().max(1.),
                        "{kind:?} {name} {metric}: {far}"
                    );
                }
                assert!((found["perplexity"].ln() - found["loss"]).abs() < 1e-12);
            }
        }
    }
}
