//! Tests of `sft`.

use std::ops::ControlFlow;

use candle_core::DType;

use super::*;
use crate::ml::execution::{Execution, Kind};
use crate::ml::fused::Packing;
use crate::ml::loss::dft::Dft;
use crate::ml::loss::smoothed::Smoothed;
use crate::ml::model::linear::Pass;
use crate::ml::model::{Gradients, Trained};
use crate::ml::testing::golden::{far, model, rows as golden_rows};
use crate::ml::testing::golden_compare::{Comparison, EXACT, json};
use crate::ml::testing::golden_runs::{job, settings};
use crate::ml::testing::kinds::kinds;
use crate::ml::testing::losses;
use crate::ml::train::{Ending, Job, Settings, train};

fn chosen() -> Vec<Row> {
    rows(&golden_rows("trl-1.16"), Answers::Chosen).unwrap()
}

/// One of the golden runs: `packing` is the length to pack to.
fn run(name: &str, completion_only: bool, packing: Option<usize>) {
    let golden = &json("sft/sft.json")[name];
    let rows = match packing {
        None => chosen(),
        Some(length) => {
            let packed = pack(chosen(), length, completion_only, PackingStrategy::Bfd);
            assert_eq!((packed.cut, packed.dropped), (0, 0));
            let lengths: Vec<Vec<usize>> = packed.rows.iter().map(document_lengths).collect();
            let theirs: Vec<Vec<usize>> =
                serde_json::from_value(golden["seq_lengths"].clone()).unwrap();
            assert_eq!(lengths, theirs);
            packed.rows
        }
    };
    let settings = Settings {
        epochs: 1.,
        batch_size: if packing.is_some() { 1 } else { 2 },
        ..settings()
    };
    for kind in kinds() {
        let model = model("model", Some("adapter_init"), Trained::Adapter, DType::F32);
        let execution = Execution::new(&model, kind);
        let job = Job {
            loss: &Sft { completion_only },
            ..job(&execution, &rows)
        };
        train_and_compare(name, &job, &settings);
    }
}

fn train_and_compare(name: &str, job: &Job<'_>, settings: &Settings) {
    compare(
        name,
        &json("sft/sft.json")[name]["log_history"],
        job,
        settings,
    );
}

fn compare(name: &str, logged: &serde_json::Value, job: &Job<'_>, settings: &Settings) {
    let mut logs = Vec::new();
    let ending = train(job, settings, &mut |step| {
        logs.extend(step.logs.clone());
        ControlFlow::Continue(())
    });
    assert!(matches!(ending.unwrap(), Ending::Finished { .. }));
    let mut theirs = logged.as_array().unwrap().clone();
    for log in &mut theirs {
        // A count of all tokens so far, which the program keeps elsewhere.
        log.as_object_mut().unwrap().remove("num_tokens").unwrap();
    }
    let mut comparison = Comparison::new(&format!("sft {name}"), EXACT, job.execution.kind());
    comparison.logs(&logs, &theirs);
    comparison.end();
}

#[test]
fn whole_sequences_are_learnt_as_trl_does() {
    run("full", false, None);
}

#[test]
fn answers_are_learnt_as_trl_does() {
    run("completion_only", true, None);
}

#[test]
fn what_the_assistant_says_is_learnt_as_trl_does() {
    let golden = json("sft/assistant.json");
    let row = |row: &serde_json::Value| {
        let labels: Vec<i64> = serde_json::from_value(row["labels"].clone()).unwrap();
        Row {
            chosen: serde_json::from_value(row["ids"].clone()).unwrap(),
            mask: Some(labels.iter().map(|label| *label != -100).collect()),
            ..Row::default()
        }
    };
    let rows: Vec<Row> = golden["rows"].as_array().unwrap().iter().map(row).collect();
    for (name, packing) in [("log_history", false), ("packed_log_history", true)] {
        let rows = if packing {
            pack(rows.clone(), 256, true, PackingStrategy::Bfd).rows
        } else {
            rows.clone()
        };
        let settings = Settings {
            epochs: 1.,
            batch_size: if packing { 1 } else { 2 },
            ..settings()
        };
        for kind in kinds() {
            let model = model("model", Some("adapter_init"), Trained::Adapter, DType::F32);
            let execution = Execution::new(&model, kind);
            let job = Job {
                loss: &Sft {
                    completion_only: true,
                },
                ..job(&execution, &rows)
            };
            compare(&format!("assistant {name}"), &golden[name], &job, &settings);
        }
    }
}

#[test]
fn rows_without_a_scored_id_are_dropped_from_packs() {
    let masked = |mask: &[bool]| Row {
        chosen: vec![1; mask.len()],
        mask: Some(mask.to_vec()),
        ..Row::default()
    };
    let (learnt, late) = (masked(&[true, true]), masked(&[false, false, false, true]));
    assert!(has_target(&learnt, true) && has_target(&late, false));
    // Nothing predicts the first id.
    assert!(!has_target(&masked(&[true, false]), true));
    let packed = pack(vec![learnt.clone(), late], 3, true, PackingStrategy::Bfd);
    assert_eq!((packed.rows, packed.dropped), (vec![learnt], 1));
}

#[test]
fn packed_sequences_are_learnt_as_trl_does() {
    run("packed_full", false, Some(192));
    run("packed_completion_only", true, Some(256));
}

/// One of the runs of `more.json`.
fn run_more(name: &str, loss: &dyn Loss, rows: &[Row]) {
    let packed = rows.iter().any(|row| !row.packed.is_empty());
    let settings = Settings {
        epochs: if packed { 1. } else { 2. },
        batch_size: if packed { 1 } else { 2 },
        ..settings()
    };
    for kind in kinds() {
        let model = model("model", Some("adapter_init"), Trained::Adapter, DType::F32);
        let execution = Execution::new(&model, kind);
        let job = Job {
            loss,
            ..job(&execution, rows)
        };
        let golden = &json("sft/more.json")[name]["log_history"];
        compare(name, golden, &job, &settings);
    }
}

#[test]
fn dynamic_fine_tuning_is_that_of_trl() {
    let completion_only = true;
    run_more("dft", &Dft(Sft { completion_only }), &chosen());
}

fn smoothed(label_smoothing_factor: f64, completion_only: bool) -> Smoothed {
    Smoothed {
        sft: Sft { completion_only },
        label_smoothing_factor,
    }
}

#[test]
fn label_smoothing_is_that_of_transformers() {
    run_more("smoothed", &smoothed(0.1, true), &chosen());
}

/// The gradient of all weights, the head's included, by the difference quotient.
#[test]
fn the_gradient_of_label_smoothing_is_its_slope() {
    for kind in [Kind::Reference, Kind::Fused(Packing::default())] {
        slope_of_smoothing(kind);
    }
}

fn slope_of_smoothing(kind: Kind) {
    let model = model("model", None, Trained::Everything, DType::F32);
    let execution = Execution::new(&model, kind);
    let smoothed = smoothed(0.3, false);
    let batch = smoothed.batch(&[&chosen()[0]], 1023).unwrap();
    let mut gradients = Gradients::none(&model);
    let pass = &[(&batch, 1.)];
    losses::differentiate(&smoothed, &execution, pass, None, false, &mut gradients).unwrap();
    for (parameter, gradient) in model.parameters.iter().zip(&gradients.0) {
        if !["lm_head.weight", "model.norm.weight"].contains(&parameter.name.as_str()) {
            continue;
        }
        let gradient = gradient.as_ref().unwrap();
        let before = parameter.var.as_detached_tensor().copy().unwrap();
        let size = gradient.sqr().unwrap().sum_all().unwrap();
        let size = f64::from(size.to_scalar::<f32>().unwrap()).sqrt();
        let loss = |along: f64| {
            let moved = (&before + (gradient * (along / size)).unwrap()).unwrap();
            parameter.var.set(&moved).unwrap();
            losses::evaluate(&smoothed, &execution, &batch)
                .unwrap()
                .loss
        };
        let step = 2e-2;
        let slope = (loss(step) - loss(-step)) / (2. * step);
        parameter.var.set(&before).unwrap();
        assert!(
            (slope - size).abs() < 5e-3 * size,
            "{kind:?} {}: {slope} {size}",
            parameter.name
        );
    }
}

#[test]
fn noise_on_embeddings_is_the_same_on_every_path() {
    let rows = chosen();
    let losses = |kind: Kind, checkpointing: bool, alpha: Option<f64>| -> Vec<f64> {
        let model = model("model", Some("adapter_init"), Trained::Adapter, DType::F32);
        let execution = Execution::new(&model, kind);
        let settings = Settings {
            epochs: 1.,
            checkpointing,
            neftune_noise_alpha: alpha,
            ..settings()
        };
        let job = Job {
            loss: &Sft {
                completion_only: true,
            },
            ..job(&execution, &rows)
        };
        let ending = train(&job, &settings, &mut |_| ControlFlow::Continue(())).unwrap();
        let Ending::Finished { history, .. } = ending else {
            panic!("interrupted")
        };
        history.iter().map(|log| log.values["loss"]).collect()
    };
    let fused = Kind::Fused(Packing::default());
    let noisy = losses(fused, false, Some(5.));
    assert_eq!(noisy, losses(fused, true, Some(5.)), "to the bit");
    let plain = losses(fused, false, None);
    let reference = losses(Kind::Reference, false, Some(5.));
    for ((noisy, plain), reference) in noisy.iter().zip(&plain).zip(&reference) {
        assert!(
            (noisy - reference).abs() < 2e-5 * reference,
            "{noisy} {reference}"
        );
        assert!((noisy - plain).abs() > 1e-4 * plain, "{noisy} {plain}");
    }
}

#[test]
fn the_weights_of_dynamic_fine_tuning_are_constants() {
    let logps = [-0.25, -3.0, -1e-6];
    let batch = Batch::new(vec![chosen()[0].chosen()], 0).unwrap();
    let scored = Scored {
        batch: &batch,
        targets: &batch.targets(0, false)[..3],
        logps: &logps,
        reference_logps: None,
        token_stats: None,
        target_logits: None,
        sequence_logits: None,
        mismatched: None,
    };
    let sft = Sft {
        completion_only: true,
    };
    let outcome = Dft(sft).loss(&scored).unwrap();
    let expected: f64 = logps.iter().map(|x| -x * x.exp()).sum::<f64>() / 3.;
    assert!((outcome.loss - expected).abs() < 1e-12);
    // By the difference quotient of sum -p0 log p, where p0 stays.
    for (logp, gradient) in logps.iter().zip(&outcome.gradient) {
        let at = |x: f64| -logp.exp() * x / 3.;
        let quotient = (at(logp + 1e-4) - at(logp - 1e-4)) / 2e-4;
        assert!((quotient - f64::from(*gradient)).abs() < 1e-6);
    }
}

#[test]
fn split_rows_are_learnt_as_trl_does() {
    let packed = pack(chosen(), 96, false, PackingStrategy::BfdSplit);
    assert!(packed.cut > 0 && packed.dropped == 0);
    let lengths: Vec<Vec<usize>> = packed.rows.iter().map(document_lengths).collect();
    let theirs = json("sft/more.json")["split"]["seq_lengths"].clone();
    assert_eq!(serde_json::json!(lengths), theirs);
    let ids = |rows: &[Row]| {
        let all = rows.iter().flat_map(|row| row.chosen().ids);
        let mut all: Vec<u32> = all.collect();
        all.sort_unstable();
        all
    };
    assert_eq!(ids(&packed.rows), ids(&chosen()), "no token is lost");
    run_more(
        "split",
        &Sft {
            completion_only: false,
        },
        &packed.rows,
    );
}

#[test]
fn parts_of_prompts_alone_are_no_sequences() {
    let row = Row {
        prompt: vec![1; 9],
        chosen: vec![2; 3],
        mask: Some((0..12).map(|at| at != 10).collect()),
        ..Row::default()
    };
    let parts = split(&row, 4);
    let lengths = parts
        .iter()
        .map(|part| (part.prompt.len(), part.chosen.len()));
    assert_eq!(lengths.collect::<Vec<_>>(), [(4, 0), (4, 0), (1, 3)]);
    assert_eq!(
        parts[2].mask.as_deref(),
        Some(&[true, true, false, true][..])
    );
    let packed = pack(vec![row.clone()], 4, true, PackingStrategy::BfdSplit);
    assert_eq!((packed.rows.len(), packed.cut), (1, 1));
    let packed = pack(vec![row], 4, false, PackingStrategy::BfdSplit);
    assert_eq!(packed.rows.len(), 3);
}

/// The lengths of the rows in a packed one.
fn document_lengths(row: &Row) -> Vec<usize> {
    let all = std::iter::once(row).chain(&row.packed);
    all.map(|row| row.prompt.len() + row.chosen.len()).collect()
}

#[test]
fn bins_are_those_of_trl() {
    let golden = &json("sft/sft.json")["bins"];
    let lengths: Vec<usize> = serde_json::from_value(golden["lengths"].clone()).unwrap();
    assert!(lengths.contains(&0), "empty rows are left out");
    let theirs: Vec<Vec<usize>> = serde_json::from_value(golden["bins"].clone()).unwrap();
    assert_eq!(bins(&lengths, 32), theirs);

    // Rows that are longer than a sequence are cut.
    let golden = &golden["truncated"];
    let lengths: Vec<usize> = serde_json::from_value(golden["lengths"].clone()).unwrap();
    let rows: Vec<Row> = lengths
        .iter()
        .map(|&length| Row {
            prompt: vec![1; 2.min(length - 1)],
            chosen: vec![2; length - 2.min(length - 1)],
            ..Row::default()
        })
        .collect();
    let packed = pack(rows.clone(), 16, true, PackingStrategy::Bfd);
    assert_eq!((packed.cut, packed.dropped), (2, 1));
    let lengths = packed.rows.iter().map(|row| row.chosen().ids.len());
    assert_eq!(lengths.collect::<Vec<_>>(), [16, 16, 16, 3]);
    assert_eq!(
        golden["seq_lengths"],
        serde_json::json!([[16], [16], [16], [3, 1]])
    );
    // A prompt that fills the sequence leaves nothing to learn of the answer.
    let all_prompt = Row {
        prompt: vec![1; 20],
        chosen: vec![2; 4],
        ..Row::default()
    };
    let packed = pack(vec![all_prompt.clone()], 16, true, PackingStrategy::Bfd);
    assert_eq!((packed.rows.len(), packed.cut, packed.dropped), (0, 1, 1));
    let packed = pack(vec![all_prompt], 16, false, PackingStrategy::Bfd);
    assert_eq!(packed.rows[0].prompt.len(), 16);
}

#[test]
fn packed_gradients_are_the_sum_of_those_alone() {
    let model = model("model", Some("adapter_init"), Trained::Adapter, DType::F32);
    let rows = &chosen()[..6];
    for completion_only in [false, true] {
        let objective: &dyn Loss = &Sft { completion_only };
        let total = |rows: &[Row]| {
            let mut gradients = Gradients::none(&model);
            let mut loss = 0.;
            for row in rows {
                let batch = objective.batch(&[row], 1023).unwrap();
                let count = objective.weight(objective.targets(&batch).len());
                let add = &mut gradients;
                let outcome = losses::differentiate(
                    objective,
                    &Execution::fastest(&model),
                    &[(&batch, count)],
                    None,
                    false,
                    add,
                );
                loss += count * outcome.unwrap()[0].loss;
            }
            (loss, gradients)
        };
        let (loss, alone) = total(rows);
        let packed = pack(rows.to_vec(), 400, completion_only, PackingStrategy::Bfd).rows;
        assert!(packed.len() < 3);
        let (packed_loss, together) = total(&packed);
        assert!(
            (loss - packed_loss).abs() < 1e-6 * loss,
            "{loss} {packed_loss}"
        );
        for ((parameter, a), b) in model.parameters.iter().zip(&alone.0).zip(&together.0) {
            let (a, b) = (a.as_ref().unwrap(), b.as_ref().unwrap());
            let size = a.abs().unwrap().max_all().unwrap();
            let size = f64::from(size.to_scalar::<f32>().unwrap());
            assert!(far(a, b) < 1e-5 * size, "{}: {}", parameter.name, far(a, b));
        }
    }
}

#[test]
fn a_packed_row_sees_nothing_of_its_neighbours() {
    let model = model("model", Some("adapter_init"), Trained::Nothing, DType::F32);
    let (mut first, second) = (chosen()[0].clone(), chosen()[1].clone());
    let (start, length) = (first.chosen().ids.len(), second.chosen().ids.len());
    let states = |row: &Row| {
        let batch = Batch::new(vec![row.chosen()], 0).unwrap();
        let states = model.hidden(&batch, Pass::INFER).unwrap();
        let states: Vec<Vec<f32>> = states.squeeze(0).unwrap().to_vec2().unwrap();
        states
    };
    let alone = states(&second);
    first.packed.push(second);
    let before = states(&first);
    first.prompt.fill(7);
    let after = states(&first);
    assert_eq!(before.len(), start + length);
    assert!(before[..start] != after[..start]);
    assert!(before[start..] == after[start..], "to the bit");
    for (a, b) in before[start..].iter().zip(&alone) {
        for (a, b) in a.iter().zip(b) {
            assert!((a - b).abs() < 1e-5);
        }
    }
}
