//! The base alone beside the model with its adapter: the bits of two passes.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::ml::backend::WithBase;
use crate::ml::loss::dpo::Dpo;
use crate::ml::loss::kto::{Kto, LossType, pair_with_neighbours};

fn dpo() -> Dpo {
    Dpo::sigmoid(0.1, 0.)
}

/// Two micro-batches by DPO against the base, which goes along with the adapter, and against the base in passes of its own.
fn both_ways(
    fused: &Fused<'_>,
    packing: Packing,
    checkpointing: bool,
    dropout: Option<u64>,
) -> [Result; 2] {
    // `Seen` has no passes with the base beside them.
    let apart = Execution::with(fused.model, Kind::Fused(packing), Box::new(Seen(fused)));
    let beside = Execution::new(fused.model, Kind::Fused(packing));
    [&beside, &apart].map(|execution| run_dropping(execution, &dpo(), checkpointing, dropout))
}

fn goes_along(fused: &Fused<'_>, pass: Pass) -> bool {
    let rows = rows("trl-1.16");
    let batch = dpo().batch(&[&rows[2]], 1023).unwrap();
    let both = fused.forward_beside_base(&[&batch], pass, false).unwrap();
    both.is_some()
}

/// A model with a new adapter, whose matrices are random.
fn adapted(new: NewAdapter, dtype: DType) -> CausalLm {
    let config = Arch::read(&golden::folder("model")).unwrap();
    let new = NewAdapter {
        init_lora_weights: false,
        ..new
    };
    let adapter = init::adapter(&config, &new, 5).unwrap();
    let weights = Weights::open(&golden::folder("model")).unwrap();
    let device = candle_core::Device::Cpu;
    CausalLm::load(
        &config,
        &weights,
        Some(&adapter),
        Trained::Adapter,
        dtype,
        &device,
    )
    .unwrap()
}

fn on_the_last_layer() -> NewAdapter {
    NewAdapter {
        target_modules: Names::Pattern(r".*layers\.1\..*_proj".into()),
        ..NewAdapter::default()
    }
}

#[test]
fn one_pass_over_the_weights_has_the_bits_of_two() {
    let of_golden =
        |name, dtype| golden::model(name, Some("adapter_init"), Trained::Adapter, dtype);
    let every = || Names::Pattern(r".*_proj".into());
    let models = [
        of_golden("model", DType::F32),
        of_golden("model", DType::BF16),
        of_golden("model_nf4", DType::F32),
        adapted(on_the_last_layer(), DType::F32),
        // Tensors that stand in the place of the base's.
        adapted(
            NewAdapter {
                target_modules: every(),
                modules_to_save: vec!["embed_tokens".into(), "norm".into()],
                ..NewAdapter::default()
            },
            DType::F32,
        ),
        adapted(
            NewAdapter {
                target_modules: every(),
                trainable_token_indices: BTreeMap::from([("embed_tokens".into(), vec![5, 7, 9])]),
                ..NewAdapter::default()
            },
            DType::F32,
        ),
    ];
    for model in &models {
        for packing in [PADDED, FREE, SHARED] {
            let fused = Fused::new(model, packing).unwrap();
            assert!(goes_along(&fused, Pass::train(None)));
            for checkpointing in [false, true] {
                let [beside, apart] = both_ways(&fused, packing, checkpointing, None);
                compare(&beside, &apart, packing, 0., 1e-30);
            }
        }
    }
}

#[test]
fn the_base_drops_nothing() {
    let model = golden::dropping(0.3, Trained::Adapter);
    let pass = Pass::train(Some(DropoutSeed { seed: 7, batch: 0 }));
    for (packing, along) in [(PADDED, true), (FREE, true), (SHARED, false)] {
        let fused = Fused::new(&model, packing).unwrap();
        assert_eq!(goes_along(&fused, pass), along, "the base shares prompts");
        let [beside, apart] = both_ways(&fused, packing, false, Some(7));
        compare(&beside, &apart, packing, 0., 1e-30);
    }
}

#[test]
fn a_model_that_is_not_trained_has_a_pass_of_its_own() {
    let model = golden::model("model", Some("adapter_init"), Trained::Nothing, DType::F32);
    let fused = Fused::new(&model, SHARED).unwrap();
    assert!(!goes_along(&fused, Pass::INFER));
}

#[test]
fn kept_states_of_frozen_layers_serve_both() {
    let model = adapted(on_the_last_layer(), DType::F32);
    let plain = Fused::new(&model, SHARED).unwrap();
    let [expected, _] = both_ways(&plain, SHARED, false, None);
    let folder = tempfile::tempdir().unwrap();
    let fused = Fused::new(&model, SHARED).unwrap();
    assert_eq!(fused.keep_frozen_states(folder.path()).unwrap(), Some(1));
    let execution = Execution::with(&model, Kind::Fused(SHARED), Box::new(fused));
    for _ in 0..2 {
        let ours = run_dropping(&execution, &dpo(), false, None);
        compare(&ours, &expected, SHARED, 0., 1e-30);
    }
}

/// A backend that runs with the base beside the adapter, or else in passes of its own, and counts both.
struct Counted<'a> {
    fused: &'a Fused<'a>,
    beside: bool,
    forwards: Arc<AtomicUsize>,
    besides: Arc<AtomicUsize>,
}

impl Backend for Counted<'_> {
    fn pass_size(&self, batches: &[&Batch], pass: Pass, checkpointing: bool) -> PassSize {
        self.fused.pass_size(batches, pass, checkpointing)
    }

    fn forward<'a>(
        &'a self,
        batches: &[&Batch],
        pass: Pass,
        checkpointing: bool,
    ) -> candle_core::Result<Box<dyn ForwardPass + 'a>> {
        self.forwards.fetch_add(1, Ordering::Relaxed);
        self.fused.forward(batches, pass, checkpointing)
    }

    fn forward_beside_base<'a>(
        &'a self,
        batches: &[&Batch],
        pass: Pass,
        checkpointing: bool,
    ) -> candle_core::Result<Option<WithBase<'a>>> {
        if !self.beside {
            return Ok(None);
        }
        self.besides.fetch_add(1, Ordering::Relaxed);
        self.fused.forward_beside_base(batches, pass, checkpointing)
    }

    fn decoder<'a>(
        &'a self,
        sequences: usize,
        longest: usize,
        pass: Pass,
    ) -> candle_core::Result<Box<dyn Decoder + 'a>> {
        self.fused.decoder(sequences, longest, pass)
    }
}

/// KTO scores the answers of other rows by both models, too.
#[test]
fn kto_has_the_bits_of_passes_apart_and_half_of_them() {
    let kto = Kto {
        loss_type: LossType::Kto,
        beta: 0.1,
        desirable_weight: 1.,
        undesirable_weight: 1.5,
    };
    let mut rows = rows("trl-1.16");
    rows.truncate(5);
    for (number, row) in rows.iter_mut().enumerate() {
        row.label = Some(number % 3 != 1);
        row.rejected = None;
    }
    pair_with_neighbours(&mut rows, 3, usize::MAX);
    let rows: Vec<&Row> = rows.iter().collect();
    let batches = rows.chunks(3).map(|rows| kto.batch(rows, 1023).unwrap());
    let batches: Vec<Batch> = batches.collect();
    let scaled: Vec<(&Batch, f64)> = batches.iter().zip([1.5, 0.5]).collect();
    for dtype in [DType::F32, DType::BF16] {
        let model = golden::model("model", Some("adapter_final"), Trained::Adapter, dtype);
        for packing in [PADDED, FREE, SHARED] {
            let fused = Fused::new(&model, packing).unwrap();
            let run = |beside| {
                let (forwards, besides) = (Arc::default(), Arc::default());
                let counted = Counted {
                    fused: &fused,
                    beside,
                    forwards: Arc::clone(&forwards),
                    besides: Arc::clone(&besides),
                };
                let execution = Execution::with(&model, Kind::Fused(packing), Box::new(counted));
                let mut gradients = Gradients::none(&model);
                let add = &mut gradients;
                let outcomes =
                    losses::differentiate(&kto, &execution, &scaled, None, false, add).unwrap();
                let evaluated = losses::evaluate(&kto, &execution, &batches[0]).unwrap();
                let count = |passes: Arc<AtomicUsize>| passes.load(Ordering::Relaxed);
                let result = Result {
                    outcomes,
                    gradients: gradients.0,
                    evaluated: evaluated.loss,
                };
                (result, count(forwards), count(besides))
            };
            let (beside, none, four) = run(true);
            let (apart, eight, never) = run(false);
            // A step and an evaluation have two passes each, of the rows and of the mismatched answers.
            assert_eq!((none, four, eight, never), (0, 4, 8, 0));
            compare(&beside, &apart, packing, 0., 1e-30);
            assert!(beside.outcomes.iter().any(|one| one.metrics["kl"] > 0.));
        }
    }
}
