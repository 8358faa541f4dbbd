//! What families add to a Llama (biases, norms of heads, sliding windows) and the shapes of real models, beside the reference.

use candle_core::{Device, Var};
use pipeline_kernels::dispatch::{Isa, limited};
use pipeline_kernels::random::splitmix64;

use super::*;
use crate::ml::backend::Token;
use crate::ml::model::linear::Weight;
use crate::ml::model::{Cache, GateUp, Norm, Parameter, Qkv};

/// A tensor of random numbers around `middle`, trained or not.
fn weight(model: &mut CausalLm, name: String, length: usize, middle: f32, trained: bool) -> Weight {
    let mut state = name.len() as u64 + model.parameters.len() as u64 * 1000;
    let mut number = || (splitmix64(&mut state) >> 40) as f32 / (1 << 24) as f32 - 0.5;
    let values: Vec<f32> = (0..length).map(|_| middle + 0.6 * number()).collect();
    let tensor = Tensor::from_vec(values, length, &Device::Cpu).unwrap();
    if !trained {
        return Weight::Frozen(tensor);
    }
    let var = Var::from_tensor(&tensor).unwrap();
    model.parameters.push(Parameter {
        name,
        var: var.clone(),
        decays: false,
        adds_one: false,
    });
    Weight::Trained(var)
}

/// Gives each projection a bias, each layer norms of its heads, and all layers but the first a window.
pub(super) fn dress(model: &mut CausalLm, window: usize, trained: bool) {
    for number in 0..model.layers.len() {
        let mut layer = std::mem::take(&mut model.layers);
        let own = &mut layer[number];
        let width = own.head_dim;
        let Qkv::Separate { q, k, v } = &mut own.qkv else {
            panic!("the projections are fused");
        };
        let GateUp::Separate { gate, up } = &mut own.gate_up else {
            panic!("the projections are fused");
        };
        let linears = [q, k, v, &mut own.o, gate, up, &mut own.down];
        for (at, linear) in linears.into_iter().enumerate() {
            let out = match &linear.base {
                crate::ml::model::linear::Base::Dense(weight) => {
                    weight.stored(Pass::BASE).dims()[0]
                }
                crate::ml::model::linear::Base::Nf4(nf4) => nf4.shape.0,
            };
            let name = format!("layer {number} bias {at}");
            linear.bias = Some(weight(model, name, out, 0., trained));
        }
        for (norm, name) in [(&mut own.q_norm, "q"), (&mut own.k_norm, "k")] {
            let name = format!("layer {number} {name}_norm");
            *norm = Some(Norm {
                weight: weight(model, name, width, 1., trained),
                eps: 1e-6,
            });
        }
        own.window = (number > 0).then_some(window);
        model.layers = layer;
    }
}

const ORPO: &dyn Loss = &Orpo { beta: 0.1 };

#[test]
fn biases_norms_of_heads_and_windows_go_the_same_way() {
    for (base, adapter, trained, window) in [
        ("model", true, Trained::Adapter, 9),
        ("model_nf4", true, Trained::Adapter, 40),
        ("model", false, Trained::Everything, 33),
    ] {
        let adapter = adapter.then_some("adapter_init");
        let mut model = golden::model(base, adapter, trained, DType::F32);
        dress(&mut model, window, trained == Trained::Everything);
        let sft: &dyn Loss = &Sft {
            completion_only: false,
        };
        for objective in [ORPO, sft] {
            let plain = run(&model, Kind::Reference, objective, false);
            for packing in [PADDED, FREE, SHARED] {
                let fused = Kind::Fused(packing);
                let once = run(&model, fused, objective, false);
                compare(&once, &plain, packing, 1e-5, 2e-5);
                let again = run(&model, fused, objective, true);
                compare(&again, &once, packing, 0., 1e-30);
            }
        }
    }
}

#[test]
fn a_window_changes_what_a_model_says() {
    let loss = |window| {
        let mut model = golden::model("model", None, Trained::Nothing, DType::F32);
        dress(&mut model, window, false);
        let rows = rows("trl-1.16");
        let batch = ORPO.batch(&[&rows[2]], 1023).unwrap();
        let execution = Execution::fastest(&model);
        assert_ne!(execution.kind(), Kind::Reference);
        losses::evaluate(ORPO, &execution, &batch).unwrap().loss
    };
    assert!((loss(5) - loss(1000)).abs() > 1e-3);
    // One that is longer than the text leaves the same bits as none.
    assert_eq!(loss(1000).to_bits(), loss(100_000).to_bits());
}

#[test]
fn every_instruction_set_goes_the_same_way() {
    let mut model = golden::model("model", Some("adapter_init"), Trained::Adapter, DType::F32);
    dress(&mut model, 20, false);
    let plain = run(&model, Kind::Reference, ORPO, false);
    for isa in Isa::ALL.into_iter().filter(|isa| *isa <= Isa::best()) {
        limited(isa, || {
            let ours = run(&model, Kind::Fused(SHARED), ORPO, false);
            compare(&ours, &plain, SHARED, 1e-5, 2e-5);
        });
    }
}

#[test]
fn in_bf16_they_are_as_near_as_the_reference() {
    let mut exact = golden::model("model", Some("adapter_init"), Trained::Adapter, DType::F32);
    dress(&mut exact, 20, false);
    let exact = run(&exact, Kind::Reference, ORPO, false);
    let mut model = golden::model("model", Some("adapter_init"), Trained::Adapter, DType::BF16);
    dress(&mut model, 20, false);
    let plain = run(&model, Kind::Reference, ORPO, false);
    let ours = run(&model, Kind::Fused(SHARED), ORPO, false);
    compare(&ours, &plain, SHARED, 4e-3, 4e-2);
    compare(&ours, &exact, SHARED, 4e-3, 4e-2);
}

#[test]
fn decoding_with_them_gives_the_reference_s_logits() {
    for (compute, within) in [(DType::F32, 2e-5), (DType::BF16, 3e-2)] {
        let mut model = golden::model("model", Some("adapter_init"), Trained::Nothing, compute);
        dress(&mut model, 7, false);
        let sequences: [&[u32]; 2] = [
            &[5, 900, 31, 7, 7, 44, 3, 512, 6, 81, 2, 2, 300, 18, 1, 77],
            &[17, 4, 1000],
        ];
        for pass in [Pass::BASE, Pass::INFER] {
            let execution = Execution::fastest(&model);
            let mut decoder = execution.decoder(sequences.len(), 16, pass).unwrap();
            for (sequence, ids) in sequences.iter().enumerate() {
                // A few tokens at first, then one by one.
                let mut cache = Cache::default();
                let (first, rest) = ids.split_at(2);
                for ids in std::iter::once(first).chain(rest.chunks(1)) {
                    let tokens: Vec<Token> = ids.iter().map(|&id| Token { sequence, id }).collect();
                    let ours = decoder.step(&tokens, &[tokens.len() - 1]).unwrap();
                    let plain = model.next_logits(ids, &mut cache, pass).unwrap();
                    let largest = plain.iter().fold(0f32, |most, x| most.max(x.abs()));
                    let pairs = plain.iter().zip(&ours);
                    let far = pairs.fold(0f32, |far, (a, b)| far.max((a - b).abs()));
                    assert!(far < within * largest, "{compute:?} {sequence}: {far}");
                }
            }
        }
    }
}

/// One pair of rows, forward and backward, on the reference and on the fast path.
fn same_way(model: &CausalLm, row: &Row, bound: f64) {
    let batch = ORPO.batch(&[row], 0).unwrap();
    let run = |kind| {
        let execution = Execution::new(model, kind);
        assert_eq!(execution.kind(), kind);
        let mut gradients = Gradients::none(model);
        let outcomes = losses::differentiate(
            ORPO,
            &execution,
            &[(&batch, 1.)],
            None,
            false,
            &mut gradients,
        );
        (outcomes.unwrap()[0].loss, gradients.0)
    };
    let (loss, gradients) = run(Kind::Reference);
    let (ours, our_gradients) = run(Kind::Fused(SHARED));
    assert!((ours - loss).abs() < 1e-5 * loss.abs(), "{ours} {loss}");
    for (number, (a, b)) in our_gradients.iter().zip(&gradients).enumerate() {
        let far = far(a.as_ref().unwrap(), b.as_ref().unwrap());
        let name = &model.parameters[number].name;
        assert!(far < bound, "the gradient of {name}: {far}");
    }
}

fn row(vocabulary: u32, prompt: u32, chosen: u32, rejected: u32) -> Row {
    let ids = |from: u32, count: u32| (from..from + count).map(|i| i * 31 % vocabulary).collect();
    Row {
        prompt: ids(1, prompt),
        chosen: ids(50, chosen),
        rejected: Some(ids(7, rejected)),
        ..Row::default()
    }
}

/// Heads of 64 and 128 that eight queries share, over more than 512 tokens, with a window shorter and longer than a panel.
#[test]
fn real_heads_with_windows_go_the_same_way() {
    for (width, window) in [(64, 500), (128, 20)] {
        let mut model = of_shape(8, 1, width);
        dress(&mut model, window, true);
        same_way(&model, &row(97, 530, 40, 9), 1e-4);
    }
}

/// A vocabulary of more than 100,000 ids.
#[test]
fn a_large_vocabulary_goes_the_same_way() {
    let model = of_vocabulary(100_003, 4, 2, 8);
    same_way(&model, &row(100_003, 20, 13, 9), 1e-4);
}

/// Rows that end at every place of a panel.
#[test]
fn rows_of_every_length_go_the_same_way() {
    let mut model = of_shape(2, 1, 8);
    dress(&mut model, 17, true);
    for length in 1..=32 {
        same_way(&model, &row(97, 30, length, 33 - length), 1e-4);
    }
}
