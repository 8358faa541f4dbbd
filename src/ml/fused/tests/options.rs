//! Models with every option of [`Arch`], alone and together, beside the reference.

use std::collections::HashMap;

use candle_core::{Device, safetensors};
use pipeline_kernels::panels::column;
use pipeline_kernels::random::splitmix64;

use super::super::layerwise::MappedModel;
use super::super::memory::{PassLength, PassSizes};
use super::*;
use crate::ml::adapter::Adapter;
use crate::ml::backend::Token;
use crate::ml::model::arch::{
    Activation, Llama3Scaling, LongRopeScaling, NormPlaces, Projection, QkNorm, Rope, RopeScaling,
    YarnScaling,
};
use crate::ml::model::tensors::{Role, tensors};
use crate::ml::model::{Cache, logits_by_layer};

/// Numbers that look random, the same in each run.
struct Dice(u64);

impl Dice {
    fn throw(&mut self, sides: usize) -> usize {
        (splitmix64(&mut self.0) % sides as u64) as usize
    }
}

/// A tiny Llama of two layers, whose widths are no multiple of anything.
fn plain() -> Arch {
    Arch {
        vocab_size: 600,
        hidden_size: 40,
        intermediate_size: 75,
        layers: vec![LayerArch::default(); 2],
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 12,
        rotary_dim: 12,
        score_scale: default_score_scale(12),
        tie_word_embeddings: false,
        ..Arch::read(&golden::folder("model")).unwrap()
    }
}

fn rope(scaling: Option<RopeScaling>) -> Rope {
    Rope {
        theta: 500.,
        scaling,
    }
}

/// A name, and a change of a model's description.
type Option_ = (&'static str, fn(&mut Arch));

const OPTIONS: [Option_; 24] = [
    ("windows", |arch| arch.layers[1].window = Some(9)),
    ("no rope", |arch| arch.layers[0].rope = None),
    ("two ropes", |arch| {
        arch.ropes.push(rope(None));
        arch.layers[1].rope = Some(1);
    }),
    ("linear rope", |arch| {
        let factor = 3.;
        arch.ropes[0] = rope(Some(RopeScaling::Linear { factor }));
    }),
    ("yarn", |arch| {
        arch.ropes[0] = rope(Some(RopeScaling::Yarn(YarnScaling {
            factor: 4.,
            attention_factor: 1.3,
            beta_fast: 32.,
            beta_slow: 1.,
            original_max_position_embeddings: 64,
            truncate: true,
        })));
    }),
    ("llama3 rope", |arch| {
        arch.ropes[0] = rope(Some(RopeScaling::Llama3(Llama3Scaling {
            factor: 8.,
            low_freq_factor: 1.,
            high_freq_factor: 4.,
            original_max_position_embeddings: 64,
        })));
    }),
    ("longrope", |arch| arch.ropes[0] = long_rope(50)),
    ("dynamic rope", |arch| arch.ropes[0] = dynamic_rope(50)),
    ("partial rotary", |arch| arch.rotary_dim = 6),
    ("norms of heads", |arch| arch.qk_norm = QkNorm::PerHead),
    ("norms of all heads", |arch| arch.qk_norm = QkNorm::Whole),
    ("norms after", |arch| arch.norm_places = NormPlaces::After),
    ("norms before and after", |arch| {
        arch.norm_places = NormPlaces::Both;
    }),
    ("norms that add one", |arch| arch.norm_adds_one = true),
    ("gelu_tanh", |arch| arch.activation = Activation::GeluTanh),
    ("embedding scale", |arch| arch.embedding_scale = 3.7),
    ("residual scale", |arch| arch.residual_scale = 0.22),
    ("score scale", |arch| arch.score_scale = 0.5),
    ("score soft-cap", |arch| arch.score_softcap = Some(1.5)),
    ("logit scale", |arch| arch.logit_scale = 1. / 3.),
    ("logit soft-cap", |arch| arch.logit_softcap = Some(2.5)),
    ("fused projections", |arch| arch.fused_projections = true),
    ("biases", |arch| {
        arch.biases = vec![Projection::Q, Projection::K, Projection::V, Projection::O];
    }),
    ("tied head", |arch| arch.tie_word_embeddings = true),
];

fn long_rope(original: usize) -> Rope {
    rope(Some(RopeScaling::LongRope(LongRopeScaling {
        short_factor: vec![1., 1.1, 1.3, 1.5, 1.7, 2.],
        long_factor: vec![1., 2., 3., 4., 6., 8.],
        attention_factor: 1.2,
        original_max_position_embeddings: original,
    })))
}

fn dynamic_rope(longest: usize) -> Rope {
    rope(Some(RopeScaling::Dynamic {
        factor: 4.,
        max_position_embeddings: longest,
    }))
}

/// The description with these options, such that they fit each other.
fn with(options: &[Option_]) -> Arch {
    let mut arch = plain();
    for (_, option) in options {
        option(&mut arch);
    }
    for rope in &mut arch.ropes {
        if let Some(RopeScaling::LongRope(long)) = &mut rope.scaling {
            long.short_factor.truncate(arch.rotary_dim / 2);
            long.long_factor.truncate(arch.rotary_dim / 2);
        }
    }
    if arch.fused_projections && !arch.biases.is_empty() {
        arch.biases = vec![Projection::O, Projection::Qkv, Projection::GateUp];
    }
    arch
}

/// A folder with random weights, norms and biases.
fn folder(arch: &Arch, seed: u64) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut state = seed;
    let mut number = || (splitmix64(&mut state) >> 40) as f32 / (1 << 24) as f32 - 0.5;
    let mut all = HashMap::new();
    for spec in tensors(arch) {
        let (middle, spread) = match spec.role {
            Role::Norm(_) if arch.norm_adds_one => (0., 0.6),
            Role::Norm(_) => (1., 0.6),
            _ => (0., 0.5),
        };
        let count = spec.shape.iter().product();
        let values: Vec<f32> = (0..count).map(|_| middle + spread * number()).collect();
        let tensor = Tensor::from_vec(values, spec.shape, &Device::Cpu).unwrap();
        all.insert(spec.name, tensor);
    }
    safetensors::save(&all, folder.path().join("model.safetensors")).unwrap();
    folder
}

/// A pair for each projection.
fn adapter(arch: &Arch) -> Adapter {
    let new = NewAdapter {
        r: 3,
        init_lora_weights: false,
        target_modules: Names::Pattern(".*proj".into()),
        ..NewAdapter::default()
    };
    init::adapter(arch, &new, 5).unwrap()
}

fn load(arch: &Arch, trained: Trained, compute: DType) -> CausalLm {
    let folder = folder(arch, 11);
    let weights = Weights::open(folder.path()).unwrap();
    let adapter = (trained != Trained::Everything).then(|| adapter(arch));
    CausalLm::load(
        arch,
        &weights,
        adapter.as_ref(),
        trained,
        compute,
        &Device::Cpu,
    )
    .unwrap()
}

/// Each option alone, and some at a time.
fn all_options(combinations: usize) -> Vec<(String, Arch)> {
    let mut dice = Dice(5);
    let mut choices: Vec<Vec<Option_>> = OPTIONS.iter().map(|option| vec![*option]).collect();
    for _ in 0..combinations {
        let some = OPTIONS.iter().filter(|_| dice.throw(3) == 0);
        choices.push(some.copied().collect());
    }
    let named = choices.into_iter().map(|options| {
        let names: Vec<&str> = options.iter().map(|(name, _)| *name).collect();
        (names.join(", "), with(&options))
    });
    named.collect()
}

const ORPO: &dyn Loss = &Orpo { beta: 0.1 };

/// Pairs of two micro-batches of unlike lengths, whose prompts begin alike.
fn pairs(loss: &dyn Loss) -> [Batch; 2] {
    let ids = |from: u32, count: u32| (from..from + count).map(|i| i * 31 % 590);
    let row = |system: u32, question: u32, chosen: u32, rejected: u32| Row {
        prompt: ids(1, system).chain(ids(question, 9)).collect(),
        chosen: ids(50, chosen).collect(),
        rejected: Some(ids(50, 3).chain(ids(7, rejected)).collect()),
        ..Row::default()
    };
    let batches = [
        [row(20, 60, 11, 2), row(20, 33, 5, 12)],
        [row(20, 60, 38, 4), row(0, 2, 3, 1)],
    ];
    batches.map(|rows| loss.batch(&rows.each_ref(), 599).unwrap())
}

fn learn(model: &CausalLm, kind: Kind, checkpointing: bool) -> Result {
    learn_by(ORPO, model, kind, checkpointing)
}

fn learn_by(loss: &dyn Loss, model: &CausalLm, kind: Kind, checkpointing: bool) -> Result {
    let batches = pairs(loss);
    let execution = Execution::new(model, kind);
    assert_eq!(execution.kind(), kind);
    let mut gradients = Gradients::none(model);
    let mut outcomes = Vec::new();
    let mut rest: Vec<(&Batch, f64)> = batches.iter().zip([1.5, 0.5]).collect();
    while !rest.is_empty() {
        let some: Vec<&Batch> = rest.iter().map(|(batch, _)| *batch).collect();
        let size = execution.pass_size(&some, Pass::train(None), checkpointing);
        let behind = rest.split_off(size.micro_batches);
        let add = &mut gradients;
        let some = losses::differentiate(loss, &execution, &rest, None, checkpointing, add);
        outcomes.extend(some.unwrap());
        rest = behind;
    }
    // Without a rotary embedding, norm and soft-cap, a bias of all keys changes no probability: its gradient is what rounding leaves of 0.
    for (parameter, gradient) in model.parameters.iter().zip(&mut gradients.0) {
        let arch = &model.arch;
        let is_zero = |(number, layer): (usize, &LayerArch)| {
            let name = format!("layers.{number}.self_attn.k_proj.bias");
            layer.rope.is_none() && parameter.name.ends_with(&name)
        };
        let free = arch.qk_norm == QkNorm::None && arch.score_softcap.is_none();
        if free && arch.layers.iter().enumerate().any(is_zero) {
            *gradient = Some(Tensor::ones(1, DType::F32, &Device::Cpu).unwrap());
        }
    }
    let evaluated = losses::evaluate(loss, &execution, &batches[0]);
    Result {
        outcomes,
        gradients: gradients.0,
        evaluated: evaluated.unwrap().loss,
    }
}

#[test]
fn every_option_goes_the_same_way() {
    for (name, arch) in all_options(12) {
        for trained in [Trained::Adapter, Trained::Everything] {
            println!("{name}, {trained:?}");
            let model = load(&arch, trained, DType::F32);
            let plain = learn(&model, Kind::Reference, false);
            for packing in [PADDED, FREE, SHARED] {
                let once = learn(&model, Kind::Fused(packing), false);
                compare(&once, &plain, packing, 2e-5, 1e-4);
                let again = learn(&model, Kind::Fused(packing), true);
                compare(&again, &once, packing, 0., 1e-30);
            }
        }
    }
}

/// Whatever changes the logits or the head changes what label smoothing spreads.
#[test]
fn label_smoothing_goes_the_same_way_with_every_head() {
    let smoothed = Smoothed {
        sft: Sft {
            completion_only: true,
        },
        label_smoothing_factor: 0.3,
    };
    let heads = ["logit scale", "tied head", "logit soft-cap"];
    let [scaled, tied, capped] = heads.map(|name| {
        let option = OPTIONS.iter().find(|(own, _)| *own == name);
        *option.unwrap()
    });
    for options in [
        &[][..],
        &[scaled],
        &[tied],
        &[scaled, tied],
        &[capped],
        &[scaled, tied, capped],
    ] {
        let arch = with(options);
        for trained in [Trained::Adapter, Trained::Everything] {
            let model = load(&arch, trained, DType::F32);
            let plain = learn_by(&smoothed, &model, Kind::Reference, false);
            for packing in [PADDED, FREE, SHARED] {
                let once = learn_by(&smoothed, &model, Kind::Fused(packing), false);
                compare(&once, &plain, packing, 2e-5, 1e-4);
                let again = learn_by(&smoothed, &model, Kind::Fused(packing), true);
                compare(&again, &once, packing, 0., 1e-30);
            }
            #[cfg(feature = "gpu")]
            if crate::ml::place::Place::of_tests().is_some() {
                let ours = learn_by(&smoothed, &model, Kind::Gpu(SHARED), false);
                compare(&ours, &plain, SHARED, 2e-5, 1e-4);
            }
        }
    }
}

/// An option that leaves the loss as it is might not be computed at all.
#[test]
fn every_option_changes_the_loss() {
    let loss = |arch: &Arch| {
        let model = load(arch, Trained::Adapter, DType::F32);
        learn(&model, Kind::Fused(SHARED), false).evaluated
    };
    let without = loss(&plain());
    for (name, arch) in all_options(0) {
        if name != "norms that add one" {
            assert!((loss(&arch) - without).abs() > 1e-4, "{name}");
        }
    }
}

#[test]
fn in_bf16_every_option_is_as_near_as_the_reference() {
    for (name, arch) in all_options(6) {
        println!("{name}");
        let exact = load(&arch, Trained::Adapter, DType::F32);
        let exact = learn(&exact, Kind::Reference, false);
        let model = load(&arch, Trained::Adapter, DType::BF16);
        let ours = learn(&model, Kind::Fused(SHARED), false);
        compare(&ours, &exact, SHARED, 1e-2, 1e-1);
    }
}

#[test]
fn decoding_with_every_option_gives_the_reference_s_logits() {
    let sequences: [&[u32]; 2] = [
        &[5, 590, 31, 7, 7, 44, 3, 512, 6, 81, 2, 2, 300, 18, 1, 77],
        &[17, 4, 100],
    ];
    for (name, arch) in all_options(6) {
        for (compute, within) in [(DType::F32, 2e-5), (DType::BF16, 4e-2)] {
            let model = load(&arch, Trained::Adapter, compute);
            for pass in [Pass::BASE, Pass::INFER] {
                let decoder = decode_or_none(&model, sequences.len(), pass);
                let mut decoder = decoder.unwrap_or_else(|| panic!("no decoder for {name}"));
                for (sequence, ids) in sequences.iter().enumerate() {
                    // A few tokens at first, then one by one.
                    let mut cache = Cache::default();
                    let (first, rest) = ids.split_at(2);
                    for ids in std::iter::once(first).chain(rest.chunks(1)) {
                        let tokens: Vec<Token> =
                            ids.iter().map(|&id| Token { sequence, id }).collect();
                        let ours = decoder.step(&tokens, &[tokens.len() - 1]).unwrap();
                        let plain = model.next_logits(ids, &mut cache, pass).unwrap();
                        let largest = plain.iter().fold(0f32, |most, x| most.max(x.abs()));
                        let pairs = plain.iter().zip(&ours);
                        let far = pairs.fold(0f32, |far, (a, b)| far.max((a - b).abs()));
                        assert!(far < within * largest, "{name} {compute:?}: {far}");
                    }
                }
            }
        }
    }
}

fn decode_or_none(
    model: &CausalLm,
    sequences: usize,
    pass: Pass,
) -> Option<super::super::decode::Decoder<'_>> {
    super::super::decode::Decoder::new(model, sequences, 16, pass).unwrap()
}

/// A rotary embedding that changes on the way is left to the reference path.
#[test]
fn decoding_past_a_change_of_the_angles_is_the_reference_s() {
    for rope in [long_rope(10), dynamic_rope(10)] {
        let mut arch = plain();
        arch.ropes = vec![rope];
        let model = load(&arch, Trained::Adapter, DType::F32);
        assert!(decode_or_none(&model, 1, Pass::INFER).is_none());
        let fused = Fused::new(&model, SHARED).unwrap();
        let mut decoder = fused.decoder(1, 16, Pass::INFER).unwrap();
        let mut cache = Cache::default();
        for id in 0..16 {
            let ours = decoder.step(&[Token { sequence: 0, id }], &[0]).unwrap();
            assert_eq!(
                ours,
                model.next_logits(&[id], &mut cache, Pass::INFER).unwrap()
            );
        }
    }
}

/// The states of frozen layers would be those of a sequence in some other batch.
#[test]
fn states_that_depend_on_the_batch_are_not_kept() {
    for (rope, kept) in [
        (rope(None), Some(1)),
        (long_rope(10), None),
        (dynamic_rope(10), None),
    ] {
        let mut arch = plain();
        arch.ropes = vec![rope];
        let folder = folder(&arch, 3);
        let weights = Weights::open(folder.path()).unwrap();
        let new = NewAdapter {
            target_modules: Names::Pattern(r".*layers\.1\..*proj".into()),
            ..NewAdapter::default()
        };
        let adapter = init::adapter(&arch, &new, 5).unwrap();
        let trained = Trained::Adapter;
        let (with, cpu) = (Some(&adapter), &Device::Cpu);
        let model = CausalLm::load(&arch, &weights, with, trained, DType::F32, cpu).unwrap();
        let fused = Fused::new(&model, SHARED).unwrap();
        assert_eq!(fused.keep_frozen_states(folder.path()).unwrap(), kept);
    }
}

/// One layer at a time, as `verify` does it.
#[test]
fn layers_one_by_one_give_the_reference_s_logits() {
    for (name, arch) in all_options(12) {
        let (folder, adapter) = (folder(&arch, 3), adapter(&arch));
        let weights = Weights::open(folder.path()).unwrap();
        let [_, batch] = pairs(ORPO);
        let mapped = MappedModel {
            arch: &arch,
            weights: &weights,
            adapter: Some(&adapter),
        };
        assert!(mapped.is_supported());
        let tokens = batch.tokens();
        let hidden = mapped.hidden(&[&batch], tokens, &mut |_| Ok(())).unwrap();
        let head = mapped.head(None, 0..arch.vocab_size).unwrap();
        let mut logits = vec![0.; size(arch.vocab_size, tokens)];
        let factor = pipeline_kernels::product::Factor::F32(&hidden);
        let term = pipeline_kernels::product::Term {
            weight: head.matrix().unwrap(),
            x: &factor,
        };
        let zero = pipeline_kernels::product::Onto::Zero;
        pipeline_kernels::product::product(&mut logits, vec![term], zero);
        mapped.finish_logits(&mut logits);
        let passes = [Pass::INFER];
        let with = Some(&adapter);
        let plain =
            logits_by_layer(&arch, &weights, with, &batch, &passes, &mut |_| Ok(())).unwrap();
        let mut token = 0;
        for (row, sequence) in batch.sequences.iter().enumerate() {
            for at in 0..sequence.ids.len() {
                let plain = plain[0].get(row).unwrap().get(at).unwrap();
                let plain = plain.to_vec1::<f32>().unwrap();
                let largest = plain.iter().fold(0f32, |most, x| most.max(x.abs()));
                let ours = column(&logits, arch.vocab_size, token);
                for (a, b) in ours.zip(&plain) {
                    assert!((a - b).abs() < 2e-5 * largest, "{name}: {a} {b}");
                }
                token += 1;
            }
        }
        assert_eq!(token, tokens);
    }
}

/// The ratio of what is estimated for a pass to what the pool holds after it.
fn estimated(arch: &Arch, compute: DType, checkpointing: bool) -> f64 {
    let [_, batch] = pairs(ORPO);
    let targets = ORPO.targets(&batch);
    let model = load(arch, Trained::Adapter, compute);
    let fused = Fused::new(&model, SHARED).unwrap();
    let mut forward = fused
        .forward(&[&batch], Pass::train(None), checkpointing)
        .unwrap();
    forward.score(&targets, false).unwrap();
    let grad_logps = vec![0.1; targets.len()];
    let mut gradients = Gradients::none(&model);
    forward.backward(&grad_logps, &mut gradients).unwrap();
    let adapter = adapter(arch);
    let sizes = PassSizes::of_files(arch, Some(&adapter), Trained::Adapter, compute, false);
    let length = PassLength {
        tokens: SHARED.tokens(&[&batch]),
        targets: targets.len(),
    };
    let estimate = sizes.unwrap().learning(length, checkpointing, false).all();
    // The head's rows at the targets are no buffers of the pool.
    let at_targets = 2 * targets.len() * arch.hidden_size * size_of::<f32>();
    (estimate - at_targets) as f64 / fused.device.pool.bytes() as f64
}

/// As near as for a Llama of these sizes, which are such that layers count for more than the logits.
#[test]
fn the_memory_of_every_option_is_estimated() {
    let sized = |arch: &Arch| Arch {
        hidden_size: 256,
        intermediate_size: 600,
        ..arch.clone()
    };
    let mut failures = Vec::new();
    for (compute, checkpointing) in [(DType::F32, false), (DType::F32, true), (DType::BF16, true)] {
        let llama = estimated(&sized(&plain()), compute, checkpointing);
        for (name, arch) in all_options(8) {
            let ratio = estimated(&sized(&arch), compute, checkpointing) / llama;
            println!("{name} {compute:?} {checkpointing}: {ratio} of {llama}");
            if !(0.92..1.11).contains(&ratio) {
                failures.push((name, compute, checkpointing, ratio));
            }
        }
    }
    assert!(failures.is_empty(), "{failures:?}");
}

/// Micro-batches whose angles differ go through the model one after the other, and are estimated so.
#[test]
fn passes_are_estimated_as_they_are_made() {
    let batches = pairs(ORPO);
    let both = batches.each_ref();
    assert!(both[0].length() < both[1].length());
    for (rope, expected) in [
        (rope(None), 2),
        (long_rope(both[0].length()), 1),
        (long_rope(both[1].length()), 2),
        (dynamic_rope(both[0].length()), 1),
    ] {
        let mut arch = plain();
        arch.ropes = vec![rope];
        let model = load(&arch, Trained::Adapter, DType::F32);
        let fused = Fused::new(&model, SHARED).unwrap();
        let made = fused.pass_size(&both, Pass::train(None), false);
        let adapter = adapter(&arch);
        let trained = Trained::Adapter;
        let sizes = PassSizes::of_files(&arch, Some(&adapter), trained, DType::F32, false).unwrap();
        let estimated = pass_size_of(&arch, &both, SHARED, &sizes, false);
        assert_eq!(made.micro_batches, expected);
        assert_eq!(
            (estimated.micro_batches, estimated.tokens),
            (made.micro_batches, made.tokens)
        );
    }
}
