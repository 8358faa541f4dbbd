//! Tests of `model`: where gradients go, and that they are right.

use std::collections::BTreeSet;

use super::batch::Row;
use super::linear::DropoutSeed;
use super::*;
use crate::ml::adapter::Adapter;
use crate::ml::execution::{Execution, Kind};
use crate::ml::io::weights::{Weights, save};
use crate::ml::loss::Loss;
use crate::ml::loss::orpo::Orpo;
use crate::ml::loss::sft::Sft;
use crate::ml::model::arch::LayerArch;
use crate::ml::testing::counting::peak;
use crate::ml::testing::golden::{self, rows};
use crate::ml::testing::losses;

#[test]
fn adapters_alone_have_gradients() {
    let rows = rows("trl-1.16");
    let objective: &dyn Loss = &Orpo { beta: 0.1 };
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
        let tape = model.record(&batch, Pass::INFER, false).unwrap();
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
fn shift(model: &CausalLm, start: &[Tensor], directions: &[Tensor], by: f64) {
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
        (&Orpo { beta: 0.1 } as &dyn Loss, true),
        (&Orpo { beta: 2. }, false),
        (
            &Sft {
                completion_only: true,
            },
            false,
        ),
    ] {
        let batch = objective.batch(&[&rows[2], &rows[3]], 1023).unwrap();
        let mut gradients = Gradients::none(&model);
        let add = &mut gradients;
        let outcome = losses::differentiate(
            objective,
            &Execution::fastest(&model),
            &[(&batch, 1.)],
            None,
            checkpointing,
            add,
        );
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
                let outcome = losses::evaluate(objective, &Execution::fastest(&model), &batch);
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
                "{name}: {quotient}, the gradient has {slope}"
            );
        }
    }
}

/// The golden model, with its last layer repeated until it has so many; the adapter too.
fn deeper(layers: usize) -> (Arch, tempfile::TempDir, Adapter) {
    let copies = |name: &str| -> Vec<String> {
        match name.split_once("model.layers.2.") {
            Some((before, after)) => (2..layers)
                .map(|number| format!("{before}model.layers.{number}.{after}"))
                .collect(),
            None => vec![name.to_owned()],
        }
    };
    let folder = tempfile::tempdir().unwrap();
    let tensors = golden::tensors("model/model.safetensors");
    let tensors = tensors
        .iter()
        .flat_map(|(name, tensor)| copies(name).into_iter().map(|name| (name, tensor.clone())));
    let tensors = tensors.collect();
    save(&folder.path().join("model.safetensors"), &tensors, &[]).unwrap();
    let mut adapter = Adapter::load(&golden::folder("adapter_init")).unwrap();
    let pairs = adapter.tensors.iter();
    adapter.tensors = pairs
        .flat_map(|(name, pair)| copies(name).into_iter().map(|name| (name, pair.clone())))
        .collect();
    let config = Arch {
        layers: vec![LayerArch::default(); layers],
        ..Arch::read(&golden::folder("model")).unwrap()
    };
    (config, folder, adapter)
}

#[test]
fn layer_by_layer_a_deep_model_takes_no_more_memory_than_a_flat_one() {
    let batch = golden::prompt(&Tensor::new(&[1i64, 2, 3, 4, 5], &Device::Cpu).unwrap());
    let used = |layers: usize| {
        let (config, folder, adapter) = deeper(layers);
        let weights = Weights::open(folder.path()).unwrap();
        let passes = [Pass::BASE, Pass::INFER];
        let (adapter, done) = (Some(&adapter), &mut |_| Ok(()));
        let work = || logits_by_layer(&config, &weights, adapter, &batch, &passes, done);
        let (logits, most) = peak(work);
        assert_eq!(logits.unwrap().len(), 2);
        most
    };
    used(3); // what a thread takes once, such as the buffers of matrix products
    let (few, many) = (used(4), used(12));
    println!("| one layer at a time | 4 layers {few} bytes | 12 layers {many} | |");
    assert!(many < few + few / 20, "{few} {many}");
}

#[test]
fn checkpointing_holds_the_activations_of_one_layer() {
    holds_one_layer(Kind::Reference, 20);
    holds_one_layer(Kind::default(), 5);
}

/// A layer more costs `times` less than without checkpointing.
fn holds_one_layer(kind: Kind, times: usize) {
    let ids = |seed: u32, count: u32| (0..count).map(|at| (at * 37 + seed) % 1000).collect();
    let row = Row {
        prompt: ids(1, 150),
        chosen: ids(2, 100),
        rejected: Some(ids(3, 100)),
        ..Row::default()
    };
    let objective: &dyn Loss = &Orpo { beta: 0.1 };
    let batch = objective.batch(&[&row], 1023).unwrap();
    // The most bytes held while a loss and its gradient are made, and the gradients' own.
    let used = |layers: usize, checkpointing: bool| {
        let (config, folder, adapter) = deeper(layers);
        let weights = Weights::open(folder.path()).unwrap();
        let (adapter, trained, device) = (Some(&adapter), Trained::Adapter, Device::Cpu);
        let model =
            CausalLm::load(&config, &weights, adapter, trained, DType::F32, &device).unwrap();
        let execution = Execution::new(&model, kind);
        let mut gradients = Gradients::none(&model);
        let add = &mut gradients;
        let work = || {
            losses::differentiate(
                objective,
                &execution,
                &[(&batch, 1.)],
                None,
                checkpointing,
                add,
            )
        };
        // What a thread allocates is counted, so one has to do it all.
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build();
        let (outcome, most) = pool.unwrap().install(|| peak(work));
        outcome.unwrap();
        let sizes = gradients.0.iter().flatten().map(|g| g.elem_count() * 4);
        (most, sizes.sum::<usize>())
    };
    used(3, true); // what a thread takes once, such as the buffers of matrix products
    let ((few, few_gradients), (many, many_gradients)) = (used(4, true), used(12, true));
    let ((plain_few, _), (plain_many, _)) = (used(4, false), used(12, false));
    let states = 2 * 250 * 64 * 4; // of two sequences, in f32
    // What a layer more costs: its input and its gradients, which are no activations.
    let gradients = (many_gradients - few_gradients) / 8;
    let layer = (many - few) / 8;
    let plain_layer = (plain_many - plain_few) / 8;
    println!(
        "| checkpointing, {kind:?} | a layer more | {layer} bytes, of which {gradients} are gradients and {states} its input | without {plain_layer} |"
    );
    let bookkeeping = 16 << 10;
    assert!(layer <= states + gradients + bookkeeping);
    assert!(plain_layer > times * layer, "{plain_layer} {layer}");
    // Twelve layers take less than four do without checkpointing.
    assert!(many < plain_few, "{many} {plain_few}");
}

#[test]
fn dropout_follows_its_seed_and_nothing_else() {
    let rows = rows("trl-1.16");
    let objective: &dyn Loss = &Orpo { beta: 0.1 };
    let batch = objective.batch(&[&rows[0], &rows[1]], 1023).unwrap();
    let model = golden::dropping(0.3, Trained::Adapter);
    let learn = |seed: Option<u64>, checkpointing: bool| {
        let mut gradients = Gradients::none(&model);
        let add = &mut gradients;
        let seed = seed.map(|seed| DropoutSeed { seed, batch: 0 });
        let outcome = losses::differentiate(
            objective,
            &Execution::fastest(&model),
            &[(&batch, 1.)],
            seed,
            checkpointing,
            add,
        );
        let bits = gradients.0.iter().flatten().flat_map(|gradient| {
            let values: Vec<f32> = gradient.flatten_all().unwrap().to_vec1().unwrap();
            values.into_iter().map(f32::to_bits)
        });
        (outcome.unwrap()[0].loss.to_bits(), bits.collect::<Vec<_>>())
    };
    let first = learn(Some(1), false);
    assert!(learn(Some(1), false) == first);
    assert!(
        learn(Some(1), true) == first,
        "a layer made again drops the same values"
    );
    assert!(learn(Some(2), false) != first);
    // Off: what a model without dropout learns, and what an evaluation measures.
    let off = learn(None, false);
    assert_ne!(off.0, first.0);
    let evaluated = losses::evaluate(objective, &Execution::fastest(&model), &batch).unwrap();
    assert!((f64::from_bits(off.0) - evaluated.loss).abs() < 1e-12);
}

#[test]
fn dropout_keeps_the_mean_and_drops_its_share() {
    let p = 0.3;
    let model = golden::dropping(p, Trained::Nothing);
    let linears: Vec<&Linear> = model.layers.iter().flat_map(Layer::linears).collect();
    let (count, width) = (400, 64);
    let ones = Tensor::ones((1, count, width), DType::F32, &Device::Cpu).unwrap();
    let pass = Pass {
        dropout: Some(DropoutSeed { seed: 7, batch: 0 }),
        ..Pass::INFER
    };
    let mut masks = Vec::new();
    for linear in linears
        .iter()
        .filter(|linear| linear.lora.as_ref().unwrap().a.value(Pass::INFER).dims()[1] == width)
    {
        let dropped = super::linear::apply_dropout(&ones, linear.dropout(pass).unwrap()).unwrap();
        let values: Vec<f32> = dropped.flatten_all().unwrap().to_vec1().unwrap();
        let zeros = values.iter().filter(|value| **value == 0.).count() as f64;
        let share = zeros / values.len() as f64;
        // Five standard deviations.
        let deviation = (p * (1. - p) / values.len() as f64).sqrt();
        assert!((share - p).abs() < 5. * deviation, "{share}");
        let kept = ((1. / (1. - p)) as f32).to_bits();
        assert!(values.iter().all(|x| [0, kept].contains(&x.to_bits())));
        masks.push(values);
    }
    // Each projection drops values of its own.
    assert_eq!(masks.len(), 18);
    for (number, mask) in masks.iter().enumerate() {
        assert!(!masks[..number].contains(mask));
    }
}

#[test]
fn the_row_of_the_padding_is_not_learnt_from_lookups() {
    // The id of `pad_token_id` in the midst of a text: torch's `Embedding(padding_idx=..)` gives its row no gradient.
    let rows = rows("trl-1.16");
    let pad = rows[0].prompt[5];
    let objective: &dyn Loss = &Sft {
        completion_only: false,
    };
    let batch = objective.batch(&[&rows[0]], 1023).unwrap();
    for kind in [Kind::Reference, Kind::default()] {
        let gradient = |pad: u32| {
            let mut model = golden::model("model", None, Trained::Everything, DType::F32);
            model.arch.pad_token_id = Some(pad);
            let execution = Execution::new(&model, kind);
            let mut gradients = Gradients::none(&model);
            let outcome = losses::differentiate(
                objective,
                &execution,
                &[(&batch, 1.)],
                None,
                false,
                &mut gradients,
            );
            outcome.unwrap();
            let mut parameters = model.parameters.iter();
            let embeddings = |parameter: &Parameter| parameter.name == "model.embed_tokens.weight";
            let index = parameters.position(embeddings).unwrap();
            let all = gradients.0[index].clone().unwrap();
            all.to_vec2::<f32>().unwrap()
        };
        let (with, without) = (gradient(1023), gradient(pad));
        for (id, (with, without)) in (0u32..).zip(with.iter().zip(&without)) {
            if id == pad {
                assert!(with.iter().any(|g| *g != 0.) && without.iter().all(|g| *g == 0.));
            } else {
                assert!(with == without, "{id}");
            }
        }
    }
}

#[test]
fn norms_do_not_decay() {
    let decays = |adapter: Option<&str>, trained| {
        let model = golden::model("model", adapter, trained, DType::F32);
        let parameters = model.parameters.iter();
        parameters
            .map(|parameter| (parameter.name.clone(), parameter.decays))
            .collect::<Vec<_>>()
    };
    // transformers counts 42 tensors with decay and none without.
    let adapter = decays(Some("adapter_init"), Trained::Adapter);
    assert_eq!(adapter.len(), 42);
    assert!(adapter.iter().all(|(_, decays)| *decays));
    let all = decays(None, Trained::Everything);
    let without: Vec<&str> = all
        .iter()
        .filter(|(_, decays)| !decays)
        .map(|(name, _)| name.as_str())
        .collect();
    assert_eq!((all.len(), without.len()), (30, 7));
    assert!(without.iter().all(|name| name.ends_with("norm.weight")));
}
