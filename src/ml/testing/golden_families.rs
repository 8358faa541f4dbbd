//! Models of every family beside transformers, TRL, PEFT and bitsandbytes: `tests/golden/families`.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use candle_core::{DType, Device, Tensor};

use super::golden::{far, folder, logits, prompt, rows, tensors};
use super::golden_compare::{Comparison, EXACT, Tolerance, json};
use super::golden_runs::{LOOSE, job, settings};
use super::kinds::kinds;
use super::losses;
use crate::ml::adapter::Adapter;
use crate::ml::execution::{Execution, Kind};
use crate::ml::generate;
use crate::ml::io::weights::Weights;
use crate::ml::lora::{init, merge, verify};
use crate::ml::model::arch::{Arch, Projection, QkNorm};
use crate::ml::model::batch::Target;
use crate::ml::model::compare::compare;
use crate::ml::model::linear::Pass;
use crate::ml::model::tensors::layer_tensors;
use crate::ml::model::{CausalLm, Trained, angles, logits_by_layer, tied};
use crate::ml::quant::quantize;
use crate::ml::train::{Ending, Settings, save, train};

const FAMILIES: [&str; 12] = [
    "qwen2",
    "qwen2_window",
    "qwen3",
    "mistral",
    "smollm3",
    "granite",
    "gemma",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "olmo3",
    "phi3",
];

fn path(family: &str) -> std::path::PathBuf {
    folder("families").join(family)
}

fn golden(family: &str) -> BTreeMap<String, Tensor> {
    tensors(&format!("families/{family}/outputs.safetensors"))
}

fn adapter(family: &str, name: &str) -> Adapter {
    Adapter::load(&path(family).join(name)).unwrap()
}

fn load(base: &std::path::Path, adapter: Option<&Adapter>, trained: Trained) -> CausalLm {
    let (arch, weights) = tied::open(base).unwrap();
    CausalLm::load(&arch, &weights, adapter, trained, DType::F32, &Device::Cpu).unwrap()
}

fn model(family: &str, name: &str, trained: Trained) -> CausalLm {
    load(&path(family), Some(&adapter(family, name)), trained)
}

/// Prints a largest difference as [`Comparison::end`] does, and fails if it is too large.
fn check(family: &str, what: &str, far: f64, allowed: f64) {
    println!("| {family} | {what} | {far:.1e} | | {allowed:e} |");
    assert!(far < allowed, "{family}, {what}: {far}");
}

/// The number of projections of a model.
fn projections(family: &str) -> usize {
    let arch = Arch::read(&path(family)).unwrap();
    arch.projections().len() * arch.num_hidden_layers()
}

#[expect(clippy::unnecessary_wraps, reason = "the type of a progress callback")]
fn ignore(_: u64, _: u64) -> anyhow::Result<()> {
    Ok(())
}

/// As [`EXACT`]; but four models have more chances than one to be two roundings of a log-probability (of 7.5 each) apart.
const NEAR: Tolerance = Tolerance {
    cancelled: 2e-6,
    ..EXACT
};

/// The last rows of logits (length, vocabulary), as many as the golden ones.
fn last(logits: &Tensor, golden: &Tensor) -> Tensor {
    let (length, count) = (logits.dim(0).unwrap(), golden.dim(0).unwrap());
    logits.narrow(0, length - count, count).unwrap()
}

#[test]
fn the_descriptions_are_those_of_transformers() {
    let read = |family: &str| Arch::read(&path(family)).unwrap();
    let windows =
        |arch: &Arch| -> Vec<_> { arch.layers.iter().map(|layer| layer.window).collect() };
    let qwen2 = read("qwen2");
    assert_eq!((qwen2.family, qwen2.qk_norm), ("qwen2", QkNorm::None));
    let biases = [Projection::Q, Projection::K, Projection::V];
    assert_eq!(qwen2.biases, biases);
    assert_eq!(windows(&qwen2), [None, None]);
    assert_eq!(windows(&read("qwen2_window")), [None, Some(20), Some(20)]);
    let qwen3 = read("qwen3");
    assert_eq!((qwen3.qk_norm, qwen3.head_dim), (QkNorm::PerHead, 32));
    assert!(qwen3.biases.is_empty() && qwen3.tie_word_embeddings);
    assert_eq!(windows(&read("mistral")), [Some(16), Some(16)]);
    for family in FAMILIES {
        let weights = Weights::open(&path(family)).unwrap();
        assert!(compare(&read(family), &weights).unwrap().is_empty());
    }
}

#[test]
fn logits_are_those_of_transformers() {
    for family in FAMILIES {
        let golden = golden(family);
        let batch = prompt(&golden["input_ids"]);
        let check = |model: &CausalLm, pass, name: &str| {
            let ours = logits(model, &batch, pass);
            let far = far(&last(&ours, &golden[name]), &golden[name]);
            self::check(family, &format!("logits, {name}"), far, 1e-4);
        };
        let model = model(family, "adapter_init", Trained::Nothing);
        check(&model, Pass::BASE, "base");
        check(&model, Pass::INFER, "adapter_init");
        let (arch, weights) = tied::open(&path(family)).unwrap();
        let adapter = adapter(family, "adapter_final");
        check(
            &load(&path(family), Some(&adapter), Trained::Nothing),
            Pass::INFER,
            "merged",
        );
        let go_on = &mut |_| Ok(());
        let passes = [Pass::BASE, Pass::INFER];
        let by_layer = logits_by_layer(&arch, &weights, Some(&adapter), &batch, &passes, go_on);
        for (logits, name) in by_layer.unwrap().iter().zip(["base", "merged"]) {
            let logits = logits.squeeze(0).unwrap();
            let far = far(&last(&logits, &golden[name]), &golden[name]);
            self::check(family, &format!("logits, {name}, by layer"), far, 1e-4);
        }
    }
}

#[test]
fn hidden_states_are_those_of_transformers() {
    let mut compared = 0;
    for family in FAMILIES {
        let golden = golden(family);
        let Some(theirs) = golden.get("hidden_states") else {
            continue;
        };
        let model = load(&path(family), None, Trained::Nothing);
        let batch = prompt(&golden["input_ids"]);
        let ours = model.hidden_states(&batch, Pass::BASE).unwrap();
        assert_eq!(ours.len(), theirs.dim(0).unwrap());
        let layers = ours.iter().enumerate().map(|(layer, ours)| {
            let theirs = theirs.get(layer).unwrap();
            far(&last(&ours.squeeze(0).unwrap(), &theirs), &theirs)
        });
        check(family, "hidden states", layers.fold(0., f64::max), 1e-4);
        compared += 1;
    }
    assert_eq!(compared, 8);
}

/// Every type of scaling, in sequences that are shorter and longer than the original length.
#[test]
fn rotary_angles_are_those_of_transformers() {
    let cases = json("families/ropes.json");
    let folder = tempfile::tempdir().unwrap();
    for case in cases.as_array().unwrap() {
        let text = serde_json::to_string(&case["config"]).unwrap();
        std::fs::write(folder.path().join("config.json"), text).unwrap();
        let arch = Arch::read(folder.path()).unwrap();
        let positions: Vec<usize> = serde_json::from_value(case["positions"].clone()).unwrap();
        let length = case["length"].as_u64().unwrap() as usize;
        let theirs: Vec<[Vec<Vec<f32>>; 2]> =
            serde_json::from_value(case["ropes"].clone()).unwrap();
        assert_eq!(arch.ropes.len(), theirs.len());
        for (rope, theirs) in theirs.iter().enumerate() {
            let positions = positions.iter().copied();
            let (cos, sin) = angles(&arch, rope, positions, length, &Device::Cpu).unwrap();
            for (ours, theirs) in [cos, sin].iter().zip(theirs) {
                let theirs = Tensor::new(theirs.clone(), &Device::Cpu).unwrap();
                let far = far(ours, &theirs);
                // A few roundings of an angle of some hundred radians.
                assert!(far < 1e-4, "{:?}, {length}: {far}", arch.ropes[rope]);
            }
        }
    }
}

/// Norms that are stored as w and used as 1 + w come back as they were, alone and in an adapter.
#[test]
fn norms_are_saved_as_they_are_stored() {
    for family in ["gemma", "gemma2", "gemma3_text", "olmo2", "phi3"] {
        let out = tempfile::tempdir().unwrap();
        let model = load(&path(family), None, Trained::Everything);
        save::save_model(&model, &path(family), out.path()).unwrap();
        let [before, after] = [&path(family), out.path()].map(|at| Weights::open(at).unwrap());
        assert_eq!(before.names(), after.names());
        for name in before.names() {
            let [before, after] = [&before, &after].map(|all| {
                all.tensor(name, &Device::Cpu)
                    .unwrap()
                    .to_dtype(DType::F32)
                    .unwrap()
            });
            assert!(far(&before, &after) < 1e-6, "{family}, {name}");
        }
    }
}

#[test]
fn log_probabilities_are_those_of_transformers_on_every_path() {
    for family in FAMILIES {
        let golden = golden(family);
        let batch = prompt(&golden["input_ids"]);
        let theirs = candle_nn::ops::log_softmax(&golden["adapter_init"], 1).unwrap();
        let theirs: Vec<Vec<f32>> = theirs.to_vec2().unwrap();
        let ids = &batch.sequences[0].ids;
        let first = ids.len() - theirs.len() + 1;
        let targets: Vec<Target> = (first..ids.len())
            .map(|position| Target {
                row: 0,
                position,
                id: ids[position],
            })
            .collect();
        let model = model(family, "adapter_init", Trained::Nothing);
        for kind in kinds() {
            let execution = execute(&model, kind);
            let mut forward = execution.forward(&[&batch], Pass::INFER, false).unwrap();
            let scores = forward.score(&targets, false).unwrap();
            for ((logp, theirs), target) in scores.logps.iter().zip(&theirs).zip(&targets) {
                let far = (logp - theirs[target.id as usize]).abs();
                assert!(far < 1e-4, "{family}, {kind:?}, {target:?}: {far}");
            }
        }
    }
}

/// The execution of a kind, which must be able to take the model.
fn execute(model: &CausalLm, kind: Kind) -> Execution<'_> {
    let execution = Execution::new(model, kind);
    assert_eq!((execution.kind(), execution.fallback()), (kind, None));
    execution
}

/// Trains, and compares each line of the log with TRL's.
fn run(
    family: &str,
    execution: &Execution<'_>,
    settings: &Settings,
    log: &str,
    tolerance: Tolerance,
) -> Comparison {
    let (rows, mut logs) = (rows("trl-1.16"), Vec::new());
    let ending = train(&job(execution, &rows), settings, &mut |step| {
        logs.extend(step.logs.clone());
        ControlFlow::Continue(())
    });
    assert!(matches!(ending.unwrap(), Ending::Finished { .. }));
    let golden = json(&format!("families/{family}/run.json"));
    let mut comparison = Comparison::new(&format!("{family}, {log}"), tolerance, execution.kind());
    comparison.logs(&logs, golden[log].as_array().unwrap());
    comparison
}

#[test]
fn trainings_are_those_of_trl() {
    for family in FAMILIES {
        let golden = adapter(family, "adapter_final");
        for kind in kinds() {
            let model = model(family, "adapter_init", Trained::Adapter);
            let execution = execute(&model, kind);
            let mut comparison = run(family, &execution, &settings(), "log_history", NEAR);
            for parameter in &model.parameters {
                let (path, part) = parameter.name.split_once(".lora_").unwrap();
                let pair = &golden.tensors[path];
                let theirs = match part {
                    "A.weight" => &pair.a,
                    _ => &pair.b,
                };
                let far = far(&parameter.var.as_detached_tensor(), theirs);
                comparison.largest("adapter after step 12", far, 2e-4);
            }
            comparison.end();
        }
    }
}

#[test]
fn trainings_on_a_4_bit_base_are_those_of_trl() {
    let settings = Settings {
        epochs: 1.,
        ..settings()
    };
    for family in FAMILIES {
        let out = tempfile::tempdir().unwrap();
        let plain = quantize::Settings {
            double_quant: false,
            compute_dtype: None,
        };
        let report = quantize::quantize(&path(family), out.path(), plain, None, &mut ignore);
        assert_eq!(report.unwrap().quantised, projections(family));
        let adapter = adapter(family, "adapter_init");
        for kind in kinds() {
            let model = load(out.path(), Some(&adapter), Trained::Adapter);
            let execution = execute(&model, kind);
            run(family, &execution, &settings, "nf4_log_history", LOOSE).end();
        }
    }
}

#[test]
fn the_codes_of_4_bit_weights_are_those_of_bitsandbytes() {
    for family in FAMILIES {
        let out = tempfile::tempdir().unwrap();
        let plain = quantize::Settings {
            double_quant: false,
            compute_dtype: None,
        };
        quantize::quantize(&path(family), out.path(), plain, None, &mut ignore).unwrap();
        let ours = Weights::open(out.path()).unwrap();
        let theirs = Weights::open_file(&path(family).join("nf4.safetensors")).unwrap();
        // A weight's codes and its magnitudes.
        assert_eq!(theirs.names().len(), 2 * projections(family), "{family}");
        for name in theirs.names() {
            let [ours, theirs] = [&ours, &theirs].map(|weights| weights.raw(name).unwrap());
            assert_eq!(
                ours.bytes().unwrap(),
                theirs.bytes().unwrap(),
                "{family}, {name}"
            );
        }
    }
}

#[test]
fn merged_models_are_those_of_peft() {
    for family in FAMILIES {
        let (out, golden) = (tempfile::tempdir().unwrap(), golden(family));
        let (source, adapter) = (path(family), adapter(family, "adapter_final"));
        merge::merge(&source, &adapter, out.path(), &mut ignore).unwrap();
        let (before, after) = (
            Weights::open(&source).unwrap(),
            Weights::open(out.path()).unwrap(),
        );
        assert_eq!(before.names(), after.names());
        assert_eq!(
            Arch::read(&source).unwrap(),
            Arch::read(out.path()).unwrap()
        );
        let (mut compared, mut furthest) = (0, 0f64);
        for name in after.names() {
            let ours = after.tensor(name, &Device::Cpu).unwrap();
            if let Some(theirs) = golden.get(&format!("merged.{name}")) {
                furthest = furthest.max(far(&ours, theirs));
                compared += 1;
            }
        }
        self::check(family, "merged weights", furthest, 1e-6);
        let arch = Arch::read(&source).unwrap();
        let all = layer_tensors(&arch, arch.num_hidden_layers() - 1);
        assert_eq!(compared, all.len(), "{family}");
        // Layer by layer, with the adapter and merged.
        let ids: Vec<u32> = (3..60).map(|id| id * 17 % 1000).collect();
        let check =
            verify::verify_merge(&source, &adapter, out.path(), &[ids], &mut ignore).unwrap();
        assert!(check.relative < 1e-5 && check.effect > 1e-3, "{check:?}");
    }
}

#[test]
fn greedy_text_is_that_of_transformers() {
    for family in FAMILIES {
        let golden = json(&format!("families/{family}/greedy.json"));
        let ids =
            |name: &str| -> Vec<u32> { serde_json::from_value(golden[name].clone()).unwrap() };
        let prompt = ids("prompt_ids");
        let model = model(family, "adapter_final", Trained::Nothing);
        let prompts = [prompt.as_slice(), &prompt[..5]];
        let go_on = &mut || Ok(());
        for kind in [Kind::Reference, Kind::default()] {
            let execution = execute(&model, kind);
            let mut greedy = |prompts: &[&[u32]]| {
                generate::greedy(&execution, prompts, 20, &[], Pass::INFER, go_on).unwrap()
            };
            let answers = greedy(&prompts);
            assert_eq!(answers[0], ids("ids"), "{family}, {kind:?}");
            println!("| {family} | greedy ids, {kind:?} | equal | | equal |");
            assert_eq!(answers[1], greedy(&prompts[1..])[0], "{family}, {kind:?}");
        }
    }
}

#[test]
fn new_adapters_are_those_of_peft() {
    for family in FAMILIES {
        let theirs = adapter(family, "adapter_init");
        let new = crate::ml::adapter::NewAdapter {
            r: 4,
            lora_alpha: 8.,
            target_modules: crate::ml::adapter::Names::Pattern("all-linear".into()),
            ..crate::ml::adapter::NewAdapter::default()
        };
        let ours = init::adapter(&Arch::read(&path(family)).unwrap(), &new, 3407).unwrap();
        assert_eq!(ours.tensors.len(), theirs.tensors.len());
        for (path, pair) in &ours.tensors {
            assert!(
                far(&pair.a, &theirs.tensors[path].a) <= 0.,
                "{family}, {path}"
            );
        }
    }
}

/// Everything is trained: norms, biases and scaled or fused matrices get the gradients that a difference quotient has.
#[test]
fn gradients_are_difference_quotients() {
    use crate::ml::loss::Loss as _;
    use crate::ml::loss::orpo::Orpo;
    use crate::ml::model::Gradients;

    let rows = rows("trl-1.16");
    let objective = Orpo { beta: 0.1 };
    let batch = objective.batch(&[&rows[0]], 1023).unwrap();
    for (family, name) in [
        ("qwen2", "model.layers.0.self_attn.q_proj.bias"),
        ("qwen2", "model.layers.1.self_attn.v_proj.bias"),
        ("qwen3", "model.layers.0.self_attn.q_norm.weight"),
        ("qwen3", "model.layers.1.self_attn.k_norm.weight"),
        ("granite", "model.layers.1.mlp.up_proj.bias"),
        ("gemma", "model.norm.weight"),
        ("gemma2", "model.layers.1.post_feedforward_layernorm.weight"),
        ("gemma2", "model.layers.0.input_layernorm.weight"),
        ("gemma3_text", "model.layers.0.self_attn.q_norm.weight"),
        ("olmo2", "model.layers.0.self_attn.q_norm.weight"),
        ("olmo2", "model.layers.1.post_attention_layernorm.weight"),
        ("phi3", "model.layers.0.input_layernorm.weight"),
        ("phi3", "model.layers.0.self_attn.qkv_proj.weight"),
        // Looked up with a scale, and multiplied in a head with a soft-cap.
        ("gemma2", "model.embed_tokens.weight"),
        ("granite", "model.embed_tokens.weight"),
    ] {
        let model = load(&path(family), None, Trained::Everything);
        let execution = execute(&model, Kind::Reference);
        let parameter = model.parameters.iter().position(|p| p.name == name);
        let number = parameter.unwrap();
        let matrix = name.contains("_proj.weight") || name.contains("embed");
        assert_eq!(model.parameters[number].decays, matrix);
        let mut gradients = Gradients::none(&model);
        let all = &[(&batch, 1.)];
        losses::differentiate(&objective, &execution, all, None, false, &mut gradients).unwrap();
        let gradient: Vec<f32> = gradients.0[number]
            .as_ref()
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1()
            .unwrap();
        let var = &model.parameters[number].var;
        let start: Vec<f32> = var
            .as_detached_tensor()
            .flatten_all()
            .unwrap()
            .to_vec1()
            .unwrap();
        // Along the gradient itself, whose slope is its squared length.
        let squares: f32 = gradient.iter().map(|g| g * g).sum();
        let step = 1e-2 / squares.sqrt();
        let loss = |sign: f32| {
            let moved = start.iter().zip(&gradient);
            let moved: Vec<f32> = moved.map(|(x, g)| x + sign * step * g).collect();
            let moved = Tensor::from_vec(moved, var.shape(), &Device::Cpu).unwrap();
            var.set(&moved).unwrap();
            losses::evaluate(&objective, &execution, &batch)
                .unwrap()
                .loss
        };
        let slope = (loss(1.) - loss(-1.)) / f64::from(2. * step);
        let far = (slope / f64::from(squares) - 1.).abs();
        assert!(far < 2e-2, "{family}, {name}: {slope} {squares}");
    }
}
