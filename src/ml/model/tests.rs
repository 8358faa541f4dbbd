//! Tests of `model`: where gradients go, and that they are right.

use std::collections::BTreeSet;

use super::*;
use crate::ml::golden::{self, rows};
use crate::ml::objective::Objective;

#[test]
fn adapters_alone_have_gradients() {
    let rows = rows("trl-1.16");
    let objective = Objective::Orpo { beta: 0.1 };
    let batch = objective.batch(&[&rows[0], &rows[1]], 1023).unwrap();
    let tokens = batch.sequences.len() * batch.width;
    assert!(
        ![32, 64, 192, 1024].contains(&tokens),
        "no size of a weight"
    );
    for base in ["model", "model_nf4"] {
        let model = golden::model(base, Some("adapter_init"), Trained::Adapter, DType::F32);
        assert!(model.parameters.iter().all(|p| p.name.contains(".lora_")));
        let trained: BTreeSet<_> = model
            .parameters
            .iter()
            .map(|p| format!("{:?}", p.var.as_tensor().id()))
            .collect();
        assert_eq!(trained.len(), 3 * 7 * 2);
        let tape = model.record(&batch, None, false).unwrap();
        let mut found = BTreeSet::new();
        for (number, (input, output)) in tape.segments.iter().enumerate() {
            // Nothing trained lies below the first layer.
            assert_eq!(input.track_op(), number > 0);
            let output = output.as_ref().unwrap();
            let store = vjp(output, &output.ones_like().unwrap()).unwrap();
            for id in store.get_ids() {
                let name = format!("{id:?}");
                if trained.contains(&name) {
                    found.insert(name);
                } else if *id != input.id() {
                    // What is left are activations, one row a token, and the vector; a weight or a norm has none.
                    let gradient = store.get_id(*id).unwrap();
                    let dims = gradient.dims();
                    assert!(
                        dims.len() > 2 || dims[0] == tokens,
                        "a constant of shape {dims:?} has a gradient"
                    );
                }
            }
        }
        assert_eq!(found, trained, "every variable has one");
        let store = vjp(&tape.normed, &tape.normed.ones_like().unwrap()).unwrap();
        let low = store
            .get_ids()
            .filter(|id| store.get_id(**id).unwrap().rank() <= 2);
        assert_eq!(low.count(), 0, "the last norm has none");
    }
}

/// `parameters` moved by `by` along `directions`.
fn shift(model: &Llama, start: &[Tensor], directions: &[Tensor], by: f64) {
    for ((parameter, start), direction) in model.parameters.iter().zip(start).zip(directions) {
        let moved = (start + (direction * by).unwrap()).unwrap();
        parameter.var.set(&moved).unwrap();
    }
}

fn dot(a: &Tensor, b: &Tensor) -> f64 {
    let a: Vec<f32> = a.flatten_all().unwrap().to_vec1().unwrap();
    let b: Vec<f32> = b.flatten_all().unwrap().to_vec1().unwrap();
    a.iter()
        .zip(&b)
        .map(|(a, b)| f64::from(*a) * f64::from(*b))
        .sum()
}

#[test]
fn the_whole_loss_has_the_slope_of_its_gradient_in_random_directions() {
    let rows = rows("trl-1.16");
    let model = golden::model("model", Some("adapter_init"), Trained::Adapter, DType::F32);
    for (objective, checkpointing) in [
        (Objective::Orpo { beta: 0.1 }, true),
        (Objective::Orpo { beta: 2. }, false),
        (
            Objective::Sft {
                completion_only: true,
            },
            false,
        ),
    ] {
        let batch = objective.batch(&[&rows[2], &rows[3]], 1023).unwrap();
        let mut gradients = Gradients::none(&model);
        let add = &mut gradients;
        let outcome = objective.differentiate(&model, &batch, 1., None, checkpointing, add);
        outcome.unwrap();
        let gradients: Vec<Tensor> = gradients.0.into_iter().map(Option::unwrap).collect();
        let start: Vec<Tensor> = model
            .parameters
            .iter()
            .map(|p| p.var.as_detached_tensor().copy().unwrap())
            .collect();
        let mut random = crate::ml::torch_rng::TorchRng::new(1);
        let random: Vec<Tensor> = start
            .iter()
            .map(|start| {
                let values = random.uniform(start.elem_count(), -1., 1.);
                Tensor::from_vec(values, start.shape(), &Device::Cpu).unwrap()
            })
            .collect();
        let zero: Vec<Tensor> = start.iter().map(|s| s.zeros_like().unwrap()).collect();
        // All variables at once, and each by itself: a random direction finds what a gradient leaves out.
        for only in std::iter::once(None).chain((0..start.len()).map(Some)) {
            let directions: Vec<Tensor> = (0..start.len())
                .map(|at| {
                    let wanted = only.is_none_or(|only| only == at);
                    if wanted { &random[at] } else { &zero[at] }.clone()
                })
                .collect();
            let length: f64 = directions.iter().map(|d| dot(d, d)).sum::<f64>().sqrt();
            let slope = directions.iter().zip(&gradients);
            let slope = slope.map(|(d, g)| dot(d, g)).sum::<f64>() / length;
            let loss = |by: f64| {
                shift(&model, &start, &directions, by / length);
                let outcome = objective.evaluate(&model, &batch, Pass::INFER);
                outcome.unwrap().loss
            };
            // Of fourth order, so that a step can be long beside the rounding of f32.
            let by = 0.05;
            let quotient =
                (8. * (loss(by) - loss(-by)) - (loss(2. * by) - loss(-2. * by))) / (12. * by);
            shift(&model, &start, &directions, 0.);
            let size: f64 = only.map_or_else(
                || gradients.iter().map(|g| dot(g, g)).sum::<f64>().sqrt(),
                |only| dot(&gradients[only], &gradients[only]).sqrt(),
            );
            assert!(size > 0.);
            let name = only.map_or("all", |only| &model.parameters[only].name);
            assert!(
                (quotient - slope).abs() < 2e-4 + 5e-3 * slope.abs(),
                "{objective:?} {name}: {quotient}, the gradient has {slope}"
            );
        }
    }
}

#[test]
fn decoding_gives_the_logits_of_the_plain_path() {
    let texts: [&[u32]; 3] = [&[5, 90, 7, 300, 41, 2], &[1000], &[12, 13, 14]];
    for (base, compute, within) in [
        ("model", DType::F32, 1e-4),
        ("model_nf4", DType::F32, 1e-4),
        ("model", DType::BF16, 3e-2),
    ] {
        let model = golden::model(base, Some("adapter_final"), Trained::Nothing, compute);
        for pass in [Pass::BASE, Pass::INFER] {
            let mut decoder = decode::Decoder::new(&model, texts.len(), 6, pass)
                .unwrap()
                .unwrap();
            // A token of each text at a time, as long as it has some, so that they stand beside each other.
            let mut last = vec![Vec::new(); texts.len()];
            for at in 0..6 {
                let tokens: Vec<decode::Token> = (0..texts.len())
                    .filter_map(|text| Some((text, texts[text].get(at)?)))
                    .map(|(text, &id)| decode::Token { text, id })
                    .collect();
                let places: Vec<usize> = (0..tokens.len()).collect();
                let logits = decoder.step(&tokens, &places).unwrap();
                for (token, logits) in tokens.iter().zip(logits.chunks_exact(1024)) {
                    last[token.text] = logits.to_vec();
                }
            }
            for (text, ids) in texts.iter().enumerate() {
                let plain = model.next_logits(ids, &mut Cache::default(), pass).unwrap();
                let largest = plain.iter().fold(0f32, |most, x| most.max(x.abs()));
                let pairs = plain.iter().zip(&last[text]);
                let far = pairs.fold(0f32, |far, (a, b)| far.max((a - b).abs()));
                assert!(far < within * largest, "{base} {compute:?} {text}: {far}");
            }
            let full = decode::Token { text: 0, id: 1 };
            let error = decoder.step(&[full], &[]).unwrap_err().to_string();
            assert!(error.contains("has no place"), "{error}");
        }
    }
    let half = golden::model("model", None, Trained::Nothing, DType::F16);
    let none = decode::Decoder::new(&half, 1, 1, Pass::BASE).unwrap();
    assert!(none.is_none(), "the kernels don't multiply in f16");
}
