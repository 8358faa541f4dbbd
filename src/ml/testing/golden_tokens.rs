//! New tokens against transformers, PEFT and TRL (`tests/python/generate_tokens.py`): the rows that they begin with, and trainings of them.

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde::Deserialize;
use serde_json::Value;
use tempfile::TempDir;

use super::golden::{far, folder, logits, tensors};
use super::golden_compare::{Comparison, EXACT, json};
use super::golden_runs::{job, settings};
use super::kinds::kinds;
use crate::ml::adapter::{Adapter, DELTA, FILE, Names, NewAdapter};
use crate::ml::execution::{Execution, Kind};
use crate::ml::io::weights::{Weights, save};
use crate::ml::lora::attach::{Beginning, attach};
use crate::ml::lora::merge::merge;
use crate::ml::lora::verify::verify_merge;
use crate::ml::model::batch::{Batch, Row, Sequence};
use crate::ml::model::linear::Pass;
use crate::ml::model::resize::{NewRows, resize};
use crate::ml::model::tensors::{EMBED_TOKENS, EMBEDDINGS, HEAD, LM_HEAD};
use crate::ml::model::{CausalLm, Trained, logits_by_layer, tied};
use crate::ml::train::save::save_adapter;
use crate::ml::train::{Ending, Job, Log, train};

const SEED: u64 = 3407;
const BEFORE: usize = 1024;
const ROWS: usize = 1029;
const CASES: [&str; 2] = ["untied", "tied"];

fn theirs() -> BTreeMap<String, Tensor> {
    tensors("tokens/tensors.safetensors")
}

/// The golden model with its head tied or not, stored in `dtype`.
fn model(tied: bool, dtype: DType) -> TempDir {
    let out = tempfile::tempdir().unwrap();
    let source = folder("model");
    tied::carry(&source, out.path(), tied, |_| ()).unwrap();
    let mut weights = tensors("model/model.safetensors");
    if tied {
        weights.remove(HEAD);
    }
    for tensor in weights.values_mut() {
        *tensor = tensor.to_dtype(dtype).unwrap();
    }
    save(
        &out.path().join("model.safetensors"),
        &weights,
        &[("format", "pt")],
    )
    .unwrap();
    out
}

/// That model with rows for new tokens.
fn resized(tied: bool, dtype: DType, rows: usize, begin: NewRows) -> TempDir {
    let (source, out) = (model(tied, dtype), tempfile::tempdir().unwrap());
    let report = resize(source.path(), out.path(), rows, begin, SEED, &mut |_, _| {
        Ok(())
    })
    .unwrap();
    assert_eq!(report.before, BEFORE);
    tied::carry(source.path(), out.path(), tied, |config| {
        config.insert("vocab_size".into(), rows.into());
    })
    .unwrap();
    out
}

fn base(case: &str) -> TempDir {
    resized(case == "tied", DType::F32, ROWS, NewRows::Mean)
}

fn load(base: &Path, adapter: Option<&Adapter>, trained: Trained) -> CausalLm {
    let (arch, weights) = tied::open(base).unwrap();
    CausalLm::load(&arch, &weights, adapter, trained, DType::F32, &Device::Cpu).unwrap()
}

fn adapter(name: &str) -> Adapter {
    Adapter::load(&folder("tokens").join(name)).unwrap()
}

#[test]
fn new_rows_are_those_of_transformers() {
    let theirs = theirs();
    for (case, tied, dtype, rows, begin) in [
        ("untied", false, DType::F32, ROWS, NewRows::Mean),
        ("tied", true, DType::F32, 1040, NewRows::Mean),
        ("bf16", false, DType::BF16, ROWS, NewRows::Mean),
        ("normal", false, DType::F32, ROWS, NewRows::Normal(0.12)),
    ] {
        let out = resized(tied, dtype, rows, begin);
        let weights = Weights::open(out.path()).unwrap();
        let old = tensors("model/model.safetensors");
        for (end, name) in [("embeddings", EMBEDDINGS), ("head", HEAD)] {
            let Some(expected) = theirs.get(&format!("{case}.{end}")) else {
                assert!(!weights.contains(name));
                continue;
            };
            let whole = weights.tensor(name, &Device::Cpu).unwrap();
            assert_eq!((whole.dim(0).unwrap(), whole.dtype()), (rows, dtype));
            let kept = whole.narrow(0, 0, BEFORE).unwrap();
            let old = old[name]
                .to_dtype(dtype)
                .unwrap()
                .to_dtype(DType::F32)
                .unwrap();
            let kept = kept.to_dtype(DType::F32).unwrap();
            assert!(far(&kept, &old).to_bits() == 0);
            let new = whole.narrow(0, BEFORE, rows - BEFORE).unwrap();
            let float = |tensor: &Tensor| tensor.to_dtype(DType::F32).unwrap();
            let far = far(&float(&new), &float(expected));
            println!("| new rows, {case} {end} | {far:.1e} |");
            // The noise around the mean is 4e-6.
            let most = match case {
                "bf16" => 1e-4,
                "normal" => 1e-6,
                _ => 2e-8,
            };
            assert!(far <= most, "{case} {end}: {far}");
        }
    }
}

#[derive(Deserialize)]
struct Pair {
    prompt: Vec<u32>,
    chosen: Vec<u32>,
    rejected: Vec<u32>,
}

fn rows(facts: &Value) -> Vec<Row> {
    let pairs: Vec<Pair> = serde_json::from_value(facts["rows"].clone()).unwrap();
    let rows: Vec<Row> = pairs
        .into_iter()
        .map(|pair| Row {
            prompt: pair.prompt,
            chosen: pair.chosen,
            rejected: Some(pair.rejected),
            ..Row::default()
        })
        .collect();
    assert_eq!(rows.len(), 24);
    rows
}

fn logs(model: &CausalLm, kind: Kind, rows: &[Row]) -> Vec<Log> {
    let execution = Execution::new(model, kind);
    let job = Job {
        pad: 1027,
        ..job(&execution, rows)
    };
    let mut logs = Vec::new();
    let ending = train(&job, &settings(), &mut |step| {
        logs.extend(step.logs.clone());
        ControlFlow::Continue(())
    });
    assert!(matches!(ending.unwrap(), Ending::Finished { .. }));
    logs
}

#[test]
fn trainings_of_tokens_are_those_of_trl() {
    let facts = json("tokens/facts.json");
    let rows = rows(&facts);
    for case in CASES {
        let base = base(case);
        let expected = tensors(&format!("tokens/{case}_final/{FILE}"));
        for kind in kinds() {
            let start = adapter(&format!("{case}_init"));
            let model = load(base.path(), Some(&start), Trained::Adapter);
            let logs = logs(&model, kind, &rows);
            let mut comparison = Comparison::new(&format!("tokens {case}"), EXACT, kind);
            comparison.logs(&logs, facts["runs"][case].as_array().unwrap());
            let out = tempfile::tempdir().unwrap();
            save_adapter(&model, start, out.path()).unwrap();
            let ours = Weights::open_file(&out.path().join(FILE)).unwrap();
            assert_eq!(ours.names(), expected.keys().collect::<Vec<_>>());
            let mut largest = 0f64;
            for (name, expected) in &expected {
                let tensor = ours.tensor(name, &Device::Cpu).unwrap();
                largest = largest.max(far(&tensor, expected));
            }
            comparison.largest("adapter after step 12", largest, 2e-4);
            comparison.end();
        }
    }
}

fn batch(facts: &Value) -> Batch {
    let ids: Vec<u32> = serde_json::from_value(facts["input"].clone()).unwrap();
    Batch::new(vec![Sequence::new(ids, 1)], 0).unwrap()
}

/// The logits at the last three positions.
fn last(logits: &Tensor) -> Tensor {
    logits.narrow(0, logits.dim(0).unwrap() - 3, 3).unwrap()
}

#[test]
fn trained_tokens_are_read_and_merged_as_by_peft() {
    let (facts, theirs) = (json("tokens/facts.json"), theirs());
    let batch = batch(&facts);
    for case in CASES {
        let base = base(case);
        let adapter = adapter(&format!("{case}_final"));
        let model = load(base.path(), Some(&adapter), Trained::Nothing);
        let ours = logits(&model, &batch, Pass::INFER);
        let apart = far(&last(&ours), &theirs[&format!("{case}.logits")]);
        println!("| logits with trained tokens, {case} | {apart:.1e} |");
        assert!(apart < 2e-5, "{case} {apart}");
        let alone = logits(&model, &batch, Pass::BASE);
        let plain = load(base.path(), None, Trained::Nothing);
        assert!(far(&alone, &logits(&plain, &batch, Pass::BASE)).to_bits() == 0);
        let (arch, weights) = tied::open(base.path()).unwrap();
        let passes = [Pass::BASE, Pass::INFER];
        let ignore = &mut |_| Ok(());
        let layers = logits_by_layer(&arch, &weights, Some(&adapter), &batch, &passes, ignore);
        for (one, all) in layers.unwrap().iter().zip([&alone, &ours]) {
            assert!(far(&one.get(0).unwrap(), all) < 1e-5, "{case}");
        }

        let out = tempfile::tempdir().unwrap();
        let report = merge(base.path(), &adapter, out.path(), &mut |_, _| Ok(())).unwrap();
        assert!(!report.untied);
        let merged = load(out.path(), None, Trained::Nothing);
        let apart = far(&logits(&merged, &batch, Pass::BASE), &ours);
        assert!(apart < 1e-5, "{case} {apart}");
        assert_eq!(merged.arch.tie_word_embeddings, case == "tied");
        // All but the trained rows are the base's to the bit.
        let (new, old) = (Weights::open(out.path()).unwrap(), &weights);
        let row = |weights: &Weights, id| {
            let tensor = weights.tensor(EMBEDDINGS, &Device::Cpu).unwrap();
            tensor.get(id).unwrap().to_vec1::<f32>().unwrap()
        };
        assert_eq!(row(&new, 1023), row(old, 1023));
        assert_ne!(row(&new, 1024), row(old, 1024));
        assert_eq!(row(&new, 1028), row(old, 1028));
        let prompts = [batch.sequences[0].ids.clone()];
        let ignore = &mut |_, _| Ok(());
        verify_merge(base.path(), &adapter, out.path(), &prompts, ignore).unwrap();
    }
}

/// PEFT also writes the embeddings themselves where the folder of the base has fewer.
#[test]
fn the_layout_with_the_embeddings_is_read() {
    let facts = json("tokens/facts.json");
    let batch = batch(&facts);
    for case in CASES {
        let base = base(case);
        let name = format!("{case}_final");
        let small = adapter(&name);
        let mut tensors = tensors(&format!("tokens/{name}/{FILE}"));
        let weights = tied::open(base.path()).unwrap().1;
        for (path, tensor) in [(EMBED_TOKENS, EMBEDDINGS), (LM_HEAD, HEAD)] {
            let stored = if weights.contains(tensor) {
                tensor
            } else {
                EMBEDDINGS
            };
            let whole = weights.tensor(stored, &Device::Cpu).unwrap();
            let prefix = format!("base_model.model.{path}");
            tensors.insert(format!("{prefix}.token_adapter.base_layer.weight"), whole);
        }
        if case == "tied" {
            let rows = tensors[&format!("base_model.model.{EMBED_TOKENS}{DELTA}")].clone();
            tensors.insert(format!("base_model.model.{LM_HEAD}{DELTA}"), rows);
        }
        let out = tempfile::tempdir().unwrap();
        fs::copy(
            folder("tokens").join(&name).join("adapter_config.json"),
            out.path().join("adapter_config.json"),
        )
        .unwrap();
        save(&out.path().join(FILE), &tensors, &[]).unwrap();
        let large = Adapter::load(out.path()).unwrap();
        let of = |adapter: &Adapter, trained| {
            let model = load(base.path(), Some(adapter), trained);
            logits(&model, &batch, Pass::INFER)
        };
        for trained in [Trained::Nothing, Trained::Adapter] {
            let apart = far(&of(&large, trained), &of(&small, trained));
            assert!(apart.to_bits() == 0, "{case} {apart}");
        }
        let again = tempfile::tempdir().unwrap();
        large.save(again.path()).unwrap();
        let names = |folder: &Path| -> Vec<String> {
            let weights = Weights::open_file(&folder.join(FILE)).unwrap();
            weights.names().into_iter().map(str::to_owned).collect()
        };
        assert_eq!(names(again.path()), names(out.path()));
        let merged = tempfile::tempdir().unwrap();
        merge(base.path(), &large, merged.path(), &mut |_, _| Ok(())).unwrap();
        let model = load(merged.path(), None, Trained::Nothing);
        let apart = far(
            &logits(&model, &batch, Pass::BASE),
            &of(&small, Trained::Nothing),
        );
        assert!(apart < 1e-5, "{case} {apart}");
    }
}

#[test]
fn a_new_adapter_with_tokens_is_that_of_peft() {
    let indices = [
        [
            ("embed_tokens".to_owned(), vec![1024, 1025, 1026, 1027]),
            ("lm_head".to_owned(), vec![1025, 1026, 1024]),
        ]
        .into(),
        [("embed_tokens".to_owned(), vec![1024, 1026, 1025, 1027])].into(),
    ];
    for (case, indices) in CASES.into_iter().zip(indices) {
        let base = base(case);
        let (arch, weights) = tied::open(base.path()).unwrap();
        let new = NewAdapter {
            r: 4,
            target_modules: Names::List(vec!["q_proj".into(), "v_proj".into()]),
            trainable_token_indices: indices,
            ..NewAdapter::default()
        };
        let made = attach(
            &arch,
            &weights,
            &new,
            SEED,
            Beginning::Drawn,
            &mut |_, _| Ok(()),
        )
        .unwrap();
        let theirs = adapter(&format!("{case}_init"));
        assert_eq!(
            made.config
                .trainable_token_indices
                .values()
                .collect::<Vec<_>>(),
            theirs
                .config
                .trainable_token_indices
                .values()
                .collect::<Vec<_>>()
        );
        assert_eq!(
            made.config.raw["trainable_token_indices"],
            theirs.config.raw["trainable_token_indices"]
        );
        assert_eq!(made.token_rows.len(), theirs.token_rows.len());
        for (path, rows) in &theirs.token_rows {
            let ours = &made.token_rows[path];
            assert_eq!(ours.ids, rows.ids);
            assert!(far(&ours.values, &rows.values) < 2e-8);
        }
        for (path, pair) in &theirs.tensors {
            assert!(far(&made.tensors[path].a, &pair.a).to_bits() == 0, "{path}");
        }
        // Beside a head that follows the embeddings the same tokens need not be named twice.
        let both = NewAdapter {
            trainable_token_indices: [
                ("embed_tokens".to_owned(), vec![1024, 1025]),
                ("lm_head".to_owned(), vec![1024, 1025]),
            ]
            .into(),
            ..new.clone()
        };
        let made = attach(
            &arch,
            &weights,
            &both,
            SEED,
            Beginning::Drawn,
            &mut |_, _| Ok(()),
        )
        .unwrap();
        assert_eq!(made.token_rows.contains_key(LM_HEAD), case == "untied");
        let beyond = NewAdapter {
            trainable_token_indices: [("embed_tokens".to_owned(), vec![1029])].into(),
            ..new
        };
        let error = attach(
            &arch,
            &weights,
            &beyond,
            SEED,
            Beginning::Drawn,
            &mut |_, _| Ok(()),
        )
        .unwrap_err();
        assert!(format!("{error:#}").contains("the token 1029"), "{error:#}");
    }
}

/// With other tokens of the head than of the embeddings a head that was tied becomes its own.
#[test]
fn a_tied_head_with_rows_of_its_own_is_untied() {
    let facts = json("tokens/facts.json");
    let (batch, base) = (batch(&facts), base("tied"));
    let (arch, weights) = tied::open(base.path()).unwrap();
    for indices in [
        vec![("lm_head", vec![1024u32, 300])],
        vec![("embed_tokens", vec![1024]), ("lm_head", vec![300, 1024])],
    ] {
        let indices = indices
            .into_iter()
            .map(|(name, ids)| (name.to_owned(), ids));
        let new = NewAdapter {
            target_modules: Names::List(vec!["q_proj".into()]),
            trainable_token_indices: indices.collect(),
            ..NewAdapter::default()
        };
        let mut adapter = attach(
            &arch,
            &weights,
            &new,
            SEED,
            Beginning::Drawn,
            &mut |_, _| Ok(()),
        )
        .unwrap();
        for rows in adapter.token_rows.values_mut() {
            rows.values = (&rows.values + 0.5).unwrap();
        }
        let model = load(base.path(), Some(&adapter), Trained::Adapter);
        let ours = logits(&model, &batch, Pass::INFER);
        let plain = logits(
            &load(base.path(), None, Trained::Nothing),
            &batch,
            Pass::BASE,
        );
        assert!(far(&ours, &plain) > 0.1);
        let out = tempfile::tempdir().unwrap();
        let report = merge(base.path(), &adapter, out.path(), &mut |_, _| Ok(())).unwrap();
        assert!(report.untied);
        let merged = load(out.path(), None, Trained::Nothing);
        let apart = far(&logits(&merged, &batch, Pass::BASE), &ours);
        assert!(apart < 1e-5, "{apart}");
    }
}
