//! The fast path beside the reference: losses, metrics and gradients.

mod beside_base;
mod bits;
mod decode;
pub(super) mod dora;
mod families;
#[cfg(feature = "gpu")]
mod gpu;
mod ids;
mod options;

use candle_core::{DType, Tensor};

use super::backend::TOKENS;
use super::memory::saved_bytes;
use super::*;
use crate::ml::adapter::{Names, NewAdapter};
use crate::ml::backend::{Backend, Decoder, ForwardPass, PassSize};
use crate::ml::execution::{Execution, Kind};
use crate::ml::io::float::Float;
use crate::ml::io::weights::Weights;
use crate::ml::lora::init;
use crate::ml::loss::dft::Dft;
use crate::ml::loss::orpo::Orpo;
use crate::ml::loss::sft::{PackingStrategy, Sft, pack};
use crate::ml::loss::smoothed::Smoothed;
use crate::ml::loss::{Loss, Outcome};
use crate::ml::model::Trained;
use crate::ml::model::arch::{Arch, LayerArch, default_score_scale};
use crate::ml::model::batch::Row;
use crate::ml::model::create::{Settings, create};
use crate::ml::model::linear::DropoutSeed;
use crate::ml::testing::golden::{self, rows};
use crate::ml::testing::losses;

const PADDED: Packing = Packing {
    padding_free: false,
    share_prompts: false,
};
const FREE: Packing = Packing {
    padding_free: true,
    share_prompts: false,
};
const SHARED: Packing = Packing {
    padding_free: true,
    share_prompts: true,
};

/// Of two micro-batches.
struct Result {
    outcomes: Vec<Outcome>,
    gradients: Vec<Option<Tensor>>,
    evaluated: f64,
}

fn run(model: &CausalLm, kind: Kind, objective: &dyn Loss, checkpointing: bool) -> Result {
    run_dropping(&Execution::new(model, kind), objective, checkpointing, None)
}

fn run_dropping(
    execution: &Execution<'_>,
    objective: &dyn Loss,
    checkpointing: bool,
    dropout: Option<u64>,
) -> Result {
    let (model, kind) = (execution.model(), execution.kind());
    let rows = rows("trl-1.16");
    // Of unlike lengths, and more than one panel of tokens.
    let batches = [&[2, 7, 9][..], &[3, 4]].map(|indices: &[usize]| {
        let rows: Vec<_> = indices.iter().map(|&index| &rows[index]).collect();
        objective.batch(&rows, 1023).unwrap()
    });
    let mut gradients = Gradients::none(model);
    let mut outcomes = Vec::new();
    let pass = Pass::train(dropout.map(|seed| DropoutSeed { seed, batch: 0 }));
    let PassSize {
        micro_batches: count,
        tokens,
    } = execution.pass_size(&batches.each_ref(), pass, checkpointing);
    if let Kind::Fused(packing) = kind {
        let packing = Fused::new(model, packing).unwrap().packing(pass);
        assert_eq!(tokens, packing.tokens(&batches.each_ref()));
        assert!(!packing.share_prompts || dropout.is_none());
    }
    assert_eq!(count, if kind == Kind::Reference { 1 } else { 2 });
    for (number, batches) in batches.chunks(count).enumerate() {
        let drops = dropout.map(|seed| DropoutSeed {
            seed,
            batch: number,
        });
        let scaled: Vec<_> = batches
            .iter()
            .zip([1.5, 0.5].into_iter().skip(number))
            .collect();
        let add = &mut gradients;
        let some = losses::differentiate(objective, execution, &scaled, drops, checkpointing, add);
        outcomes.extend(some.unwrap());
    }
    let evaluated = losses::evaluate(objective, execution, &batches[0]);
    Result {
        outcomes,
        gradients: gradients.0,
        evaluated: evaluated.unwrap().loss,
    }
}

/// The distance of two gradients, relative to the size of the second.
fn far(a: &Tensor, b: &Tensor) -> f64 {
    let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let (a, b) = (values(a), values(b));
    let both = a.iter().zip(&b);
    let difference: f64 = both.map(|(a, b)| f64::from(a - b).powi(2)).sum();
    let size: f64 = b.iter().map(|b| f64::from(*b).powi(2)).sum();
    (difference / size.max(1e-30)).sqrt()
}

fn compare(ours: &Result, plain: &Result, packing: Packing, bound: f64, of_gradient: f64) {
    // Differences of larger numbers have those numbers' errors.
    let floor = if bound > 1e-4 { 5. } else { 0.1 };
    let near = |name: &str, a: f64, b: f64| {
        let far = (a - b).abs();
        assert!(
            far <= bound * b.abs().max(floor),
            "{packing:?} {name}: {a} {b}"
        );
    };
    near("evaluated", ours.evaluated, plain.evaluated);
    assert_eq!((ours.outcomes.len(), plain.outcomes.len()), (2, 2));
    for (ours, plain) in ours.outcomes.iter().zip(&plain.outcomes) {
        near("loss", ours.loss, plain.loss);
        assert_eq!(ours.metrics.len(), plain.metrics.len());
        for (name, value) in &ours.metrics {
            // Without padding these two are means over other positions.
            if !packing.padding_free || !name.starts_with("logits/") {
                near(name, *value, plain.metrics[name]);
            }
            assert!(value.is_finite());
        }
    }
    for (index, (a, b)) in ours.gradients.iter().zip(&plain.gradients).enumerate() {
        let (a, b) = (a.as_ref().unwrap(), b.as_ref().unwrap());
        let far = far(a, b);
        assert!(
            far < of_gradient,
            "{packing:?}, the gradient of {index}: {far}"
        );
    }
}

#[test]
fn the_fast_path_is_the_plain_one() {
    let sft = |completion_only| Sft { completion_only };
    let smoothed = Smoothed {
        sft: sft(false),
        label_smoothing_factor: 0.2,
    };
    let losses: [&dyn Loss; 5] = [
        &Orpo { beta: 0.1 },
        &sft(false),
        &sft(true),
        &Dft(sft(true)),
        &smoothed,
    ];
    for (base, adapter, trained) in [
        ("model", true, Trained::Adapter),
        ("model_nf4", true, Trained::Adapter),
        ("model", false, Trained::Everything),
    ] {
        let adapter = adapter.then_some("adapter_init");
        let model = golden::model(base, adapter, trained, DType::F32);
        for objective in losses {
            let plain = run(&model, Kind::Reference, objective, false);
            for packing in [PADDED, FREE, SHARED] {
                let fused = Kind::Fused(packing);
                let once = run(&model, fused, objective, false);
                compare(&once, &plain, packing, 1e-5, 1e-5);
                let again = run(&model, fused, objective, true);
                compare(&again, &once, packing, 0., 1e-30);
            }
        }
    }
}

#[test]
fn both_paths_drop_the_same_values() {
    let objective: &dyn Loss = &Orpo { beta: 0.1 };
    let model = golden::dropping(0.3, Trained::Adapter);
    let learn = |kind, checkpointing, seed| {
        let execution = Execution::new(&model, kind);
        run_dropping(&execution, objective, checkpointing, Some(seed))
    };
    let plain = learn(Kind::Reference, false, 7);
    for packing in [PADDED, FREE, SHARED] {
        let once = learn(Kind::Fused(packing), false, 7);
        compare(&once, &plain, packing, 1e-5, 1e-5);
        let again = learn(Kind::Fused(packing), true, 7);
        compare(&again, &once, packing, 0., 1e-30);
    }
    let other = learn(Kind::Fused(SHARED), false, 8);
    for (other, plain) in other.outcomes.iter().zip(&plain.outcomes) {
        assert!((other.loss - plain.loss).abs() > 1e-5);
    }
}

#[test]
fn in_bf16_the_fast_path_is_as_near_as_the_plain_one() {
    let objective: &dyn Loss = &Orpo { beta: 0.1 };
    let exact = golden::model("model", Some("adapter_init"), Trained::Adapter, DType::F32);
    let exact = run(&exact, Kind::Reference, objective, false);
    for base in ["model", "model_nf4"] {
        let model = golden::model(base, Some("adapter_init"), Trained::Adapter, DType::BF16);
        let plain = run(&model, Kind::Reference, objective, false);
        let ours = run(&model, Kind::Fused(SHARED), objective, false);
        compare(&ours, &plain, SHARED, 2e-3, 3e-2);
        if base == "model" {
            compare(&ours, &exact, SHARED, 2e-3, 3e-2);
        }
    }
}

#[test]
fn a_pass_of_micro_batches_has_a_bound() {
    let mut model = golden::model("model", Some("adapter_init"), Trained::Adapter, DType::F32);
    let rows = rows("trl-1.16");
    let objective: &dyn Loss = &Orpo { beta: 0.1 };
    let batch = objective
        .batch(&[&rows[2], &rows[7], &rows[9]], 1023)
        .unwrap();
    let many = vec![&batch; 100];
    let pass = Pass::train(None);
    let count = |model: &CausalLm, kind: Kind| {
        let execution = Execution::new(model, kind);
        assert_eq!(execution.kind(), kind);
        execution.pass_size(&many, pass, false).micro_batches
    };
    let fused = |packing| Kind::Fused(packing);
    let shared = count(&model, fused(SHARED));
    assert_eq!(shared, 100, "the same rows again cost nothing");
    let free = count(&model, fused(FREE));
    assert_eq!(free, TOKENS / FREE.tokens(&[&batch]));
    assert!((1..free).contains(&count(&model, fused(PADDED))));
    assert_eq!(count(&model, Kind::Reference), 1);
    // A larger model keeps more of each token, and less with checkpointing.
    let [all, inputs] = [false, true].map(|inputs| saved_bytes(&model, inputs));
    model.arch.intermediate_size *= 1000;
    assert!(saved_bytes(&model, false) > 100 * all && inputs < all);
    assert!(count(&model, fused(FREE)) < free);
    model.arch.intermediate_size *= 1000;
    assert_eq!(
        count(&model, fused(FREE)),
        1,
        "one goes through in any case"
    );
}

#[test]
fn packed_rows_keep_to_themselves() {
    let mut rows = rows("trl-1.16");
    for row in &mut rows {
        row.rejected = None;
    }
    let objective: &dyn Loss = &Sft {
        completion_only: true,
    };
    let packed = pack(rows[..6].to_vec(), 192, true, PackingStrategy::Bfd);
    let rows: Vec<_> = packed.rows.iter().collect();
    let batch = objective.batch(&rows, 1023).unwrap();
    assert!(batch.positions().is_some());
    let model = golden::model("model", Some("adapter_init"), Trained::Adapter, DType::F32);
    let loss = |kind| {
        let execution = Execution::new(&model, kind);
        let outcome = losses::evaluate(objective, &execution, &batch);
        outcome.unwrap().loss
    };
    let plain = loss(Kind::Reference);
    for packing in [PADDED, FREE, SHARED] {
        let far = (loss(Kind::Fused(packing)) - plain).abs();
        assert!(far < 1e-5 * plain, "{far}");
    }
}

/// A backend of the test's own, so that it can look into it.
struct Seen<'a>(&'a Fused<'a>);

impl Backend for Seen<'_> {
    fn pass_size(&self, batches: &[&Batch], pass: Pass, checkpointing: bool) -> PassSize {
        self.0.pass_size(batches, pass, checkpointing)
    }

    fn forward<'a>(
        &'a self,
        batches: &[&Batch],
        pass: Pass,
        checkpointing: bool,
    ) -> candle_core::Result<Box<dyn ForwardPass + 'a>> {
        self.0.forward(batches, pass, checkpointing)
    }

    fn decoder<'a>(
        &'a self,
        sequences: usize,
        longest: usize,
        pass: Pass,
    ) -> candle_core::Result<Box<dyn Decoder + 'a>> {
        self.0.decoder(sequences, longest, pass)
    }
}

fn run_seen(fused: &Fused<'_>, packing: Packing, objective: &dyn Loss) -> Result {
    let kind = Kind::Fused(packing);
    let execution = Execution::with(fused.model, kind, Box::new(Seen(fused)));
    run_dropping(&execution, objective, false, None)
}

#[test]
fn buffers_do_not_pile_up() {
    let model = golden::model("model", Some("adapter_init"), Trained::Adapter, DType::F32);
    let objective: &dyn Loss = &Orpo { beta: 0.1 };
    let fused = Fused::new(&model, SHARED).unwrap();
    run_seen(&fused, SHARED, objective);
    let after = fused.device.pool.count();
    for _ in 0..3 {
        run_seen(&fused, SHARED, objective);
    }
    assert!(after > 0);
    assert_eq!(fused.device.pool.count(), after);
}

/// A new model with heads of a shape, and widths that are no multiple of anything.
fn of_shape(heads: usize, keys: usize, width: usize) -> CausalLm {
    of_vocabulary(97, heads, keys, width)
}

fn of_vocabulary(vocabulary: usize, heads: usize, keys: usize, width: usize) -> CausalLm {
    let folder = tempfile::tempdir().unwrap();
    let config = Arch {
        vocab_size: vocabulary,
        hidden_size: 40,
        intermediate_size: 75,
        layers: vec![LayerArch::default(); 2],
        num_attention_heads: heads,
        num_key_value_heads: keys,
        head_dim: width,
        rotary_dim: width,
        score_scale: default_score_scale(width),
        ..Arch::read(&golden::folder("model")).unwrap()
    };
    let settings = Settings {
        initializer_range: 0.2,
        float: Float::F32,
        seed: 3,
        max_shard_size: u64::MAX,
    };
    create(&config, settings, folder.path(), &mut |_, _| Ok(())).unwrap();
    let weights = Weights::open(folder.path()).unwrap();
    let device = candle_core::Device::Cpu;
    CausalLm::load(
        &config,
        &weights,
        None,
        Trained::Everything,
        DType::F32,
        &device,
    )
    .unwrap()
}

/// Llama 3's heads over more than 512 tokens, and heads whose width is no multiple of a vector.
#[test]
fn shapes_of_real_models_go_the_same_way() {
    let objective: &dyn Loss = &Orpo { beta: 0.1 };
    for (heads, keys, width, prompt) in [
        (8, 1, 128, 520),
        (4, 2, 80, 40),
        (1, 1, 96, 33),
        (10, 5, 6, 3),
    ] {
        let model = of_shape(heads, keys, width);
        let ids = |from: u32, count: u32| (from..from + count).map(|i| i * 31 % 97).collect();
        let row = Row {
            prompt: ids(1, prompt),
            chosen: ids(50, 41),
            rejected: Some(ids(7, 23)),
            ..Row::default()
        };
        let batch = objective.batch(&[&row], 0).unwrap();
        let run = |kind| {
            let execution = Execution::new(&model, kind);
            let mut gradients = Gradients::none(&model);
            let outcomes = losses::differentiate(
                objective,
                &execution,
                &[(&batch, 1.)],
                None,
                false,
                &mut gradients,
            )
            .unwrap();
            (outcomes[0].loss, gradients.0)
        };
        let (loss, gradients) = run(Kind::Reference);
        let (ours, our_gradients) = run(Kind::Fused(SHARED));
        assert!((ours - loss).abs() < 1e-5 * loss.abs(), "{ours} {loss}");
        for (index, (a, b)) in our_gradients.iter().zip(&gradients).enumerate() {
            let far = far(a.as_ref().unwrap(), b.as_ref().unwrap());
            assert!(
                far < 1e-4,
                "{heads} {keys} {width}, the gradient of {index}: {far}"
            );
        }
    }
}

/// A system prompt of several rows, prompts with several pairs of answers, answers that begin alike, over two micro-batches.
#[test]
fn what_rows_begin_with_is_computed_once() {
    let ids = |from: u32, count: u32| (from..from + count).map(|i| i * 31 % 97);
    let row = |system: u32, question: u32, answers: u32| Row {
        prompt: ids(1, system).chain(ids(question, 20)).collect(),
        chosen: ids(answers, 21).collect(),
        rejected: Some(ids(answers, 5).chain(ids(answers + 9, 12)).collect()),
        ..Row::default()
    };
    let rows = [
        row(70, 60, 50),
        row(70, 60, 11),
        row(70, 33, 50),
        row(0, 60, 50),
        row(70, 60, 50),
        row(40, 2, 3),
    ];
    for (trained_whole, window) in [
        (false, None),
        (true, None),
        (false, Some(33)),
        (true, Some(7)),
    ] {
        let mut model = if trained_whole {
            of_shape(4, 2, 12)
        } else {
            golden::model("model", Some("adapter_init"), Trained::Adapter, DType::F32)
        };
        if let Some(window) = window {
            families::dress(&mut model, window, trained_whole);
        }
        for objective in [
            &Orpo { beta: 0.1 } as &dyn Loss,
            &Sft {
                completion_only: false,
            },
        ] {
            let batches = [&rows[..3], &rows[3..]].map(|rows| {
                let rows: Vec<&Row> = rows.iter().collect();
                objective.batch(&rows, 0).unwrap()
            });
            let both = batches.each_ref();
            let (shared, free) = (SHARED.tokens(&both), FREE.tokens(&both));
            assert!(3 * shared < 2 * free, "{shared} {free}");
            let run = |kind, checkpointing| {
                let execution = Execution::new(&model, kind);
                let mut gradients = Gradients::none(&model);
                let scaled = [(both[0], 1.5), (both[1], 0.5)];
                let pass = Pass::train(None);
                let count = execution
                    .pass_size(&both, pass, checkpointing)
                    .micro_batches;
                let mut outcomes = Vec::new();
                for some in scaled.chunks(count) {
                    let add = &mut gradients;
                    let all = losses::differentiate(
                        objective,
                        &execution,
                        some,
                        None,
                        checkpointing,
                        add,
                    );
                    outcomes.extend(all.unwrap());
                }
                let losses: Vec<f64> = outcomes.iter().map(|outcome| outcome.loss).collect();
                (losses, gradients.0)
            };
            let (losses, gradients) = run(Kind::Reference, false);
            for checkpointing in [false, true] {
                let (ours, our_gradients) = run(Kind::Fused(SHARED), checkpointing);
                for (a, b) in ours.iter().zip(&losses) {
                    assert!((a - b).abs() < 1e-5 * b.abs(), "{a} {b}");
                }
                for (index, (a, b)) in our_gradients.iter().zip(&gradients).enumerate() {
                    let far = far(a.as_ref().unwrap(), b.as_ref().unwrap());
                    assert!(far < 2e-5, "the gradient of {index}: {far}");
                }
            }
        }
    }
}

/// Adapters on upper layers, on an upper layer's gated unit alone, and on a lower one's beside it.
#[test]
fn nothing_is_kept_below_the_lowest_adapter() {
    let whole = golden::model("model", Some("adapter_init"), Trained::Adapter, DType::F32);
    assert_eq!(lowest(&whole), 0);
    let all = [false, true].map(|checkpointing| saved_bytes(&whole, checkpointing));
    let objective: &dyn Loss = &Orpo { beta: 0.1 };
    let last = whole.layers.len() - 1;
    let config = Arch::read(&golden::folder("model")).unwrap();
    for (modules, first) in [
        (format!(r".*layers\.{last}\..*_proj"), last),
        (format!(r".*layers\.{last}\.mlp\..*_proj"), last),
        (format!(r".*layers\.(0\.mlp|{last}\.self_attn)\..*_proj"), 0),
    ] {
        let new = NewAdapter {
            init_lora_weights: false,
            target_modules: Names::Pattern(modules),
            ..NewAdapter::default()
        };
        let adapter = init::adapter(&config, &new, 5).unwrap();
        let model = CausalLm::load(
            &config,
            &Weights::open(&golden::folder("model")).unwrap(),
            Some(&adapter),
            Trained::Adapter,
            DType::F32,
            &candle_core::Device::Cpu,
        )
        .unwrap();
        assert_eq!(lowest(&model), first);
        assert_eq!(model.parameters.len(), 2 * adapter.tensors.len());
        let plain = run(&model, Kind::Reference, objective, false);
        for checkpointing in [false, true] {
            let ours = run(&model, Kind::Fused(SHARED), objective, checkpointing);
            compare(&ours, &plain, SHARED, 1e-5, 1e-5);
            let bytes = saved_bytes(&model, checkpointing);
            assert!(bytes < all[usize::from(checkpointing)]);
            let rows = rows("trl-1.16");
            let batch = objective.batch(&[&rows[2]], 1023).unwrap();
            let pass = Pass::train(None);
            let fused = Fused::new(&model, SHARED).unwrap();
            let forward = Forward::new(&fused, &[&batch], pass, checkpointing, false);
            let (forward, _) = forward.unwrap();
            assert_eq!(forward.saved.len(), model.layers.len() - first);
        }
        the_frozen_layers_states_are_the_same(&model, objective, first);
    }
}

/// With hidden states kept on disk: the same bits, whatever passes they come from.
fn the_frozen_layers_states_are_the_same(model: &CausalLm, objective: &dyn Loss, frozen: usize) {
    let [padded, free, shared] =
        [PADDED, FREE, SHARED].map(|packing| run(model, Kind::Fused(packing), objective, false));
    let folder = tempfile::tempdir().unwrap();
    let mut fused = Fused::new(model, PADDED).unwrap();
    let found = fused.keep_frozen_states(folder.path()).unwrap();
    assert_eq!(found, (frozen > 0).then_some(frozen));
    let count = |fused: &Fused<'_>| {
        let states = fused.states.lock().unwrap();
        states.as_ref().map_or(0, states::States::count)
    };
    let again = run_seen(&fused, PADDED, objective);
    compare(&again, &padded, PADDED, 0., 1e-30);
    assert_eq!(count(&fused), 0, "padding is not kept");
    // The rejected answers' keys lie in other places when they share their span.
    let each = if frozen > 0 { 5 } else { 0 };
    for (packing, without, expected) in [
        (SHARED, &shared, 2 * each),
        (FREE, &free, 3 * each),
        (SHARED, &shared, 3 * each),
    ] {
        fused.packing = packing;
        let ours = run_seen(&fused, packing, objective);
        compare(&ours, without, packing, 0., 1e-30);
        assert_eq!(count(&fused), expected);
    }
    if let Some(states) = fused.states.lock().unwrap().as_ref() {
        states.cut();
    }
    let rows = rows("trl-1.16");
    let batch = objective.batch(&[&rows[3], &rows[4]], 1023).unwrap();
    let execution = Execution::with(model, Kind::Fused(SHARED), Box::new(Seen(&fused)));
    let evaluated = losses::evaluate(objective, &execution, &batch);
    if frozen > 0 {
        let error = format!("{:#}", evaluated.unwrap_err());
        assert!(error.contains("hidden states"), "{error}");
    } else {
        evaluated.unwrap();
    }
}
