//! The format of checkpoints: those in `tests/golden/checkpoint` were written once and must stay readable. If they can't,
//! [`VERSION`] increases, and older checkpoints are passed over.

use std::ops::ControlFlow;

use candle_core::DType;

use super::*;
use crate::ml::adapter::{Names, NewAdapter};
use crate::ml::execution::Execution;
use crate::ml::io::weights::Weights;
use crate::ml::lora::init;
use crate::ml::model::Trained;
use crate::ml::model::arch::Arch;
use crate::ml::testing::golden::{folder, rows};
use crate::ml::testing::golden_runs::{job, settings};
use crate::ml::train::{Ending, Every, Job, Settings, Step, Watch, train};

/// The golden model with an adapter of few numbers.
fn model() -> CausalLm {
    let arch = Arch::read(&folder("model")).unwrap();
    let new = NewAdapter {
        r: 1,
        lora_alpha: 2.,
        target_modules: Names::List(vec!["k_proj".into()]),
        layers_to_transform: vec![2],
        ..NewAdapter::default()
    };
    let adapter = init::adapter(&arch, &new, 3).unwrap();
    let weights = Weights::open(&folder("model")).unwrap();
    let trained = Trained::Adapter;
    CausalLm::load(
        &arch,
        &weights,
        Some(&adapter),
        trained,
        DType::F32,
        &Device::Cpu,
    )
    .unwrap()
}

/// The settings of the training that wrote the golden checkpoint after its second step of four.
fn golden_settings() -> Settings {
    Settings {
        max_steps: Some(4),
        eval_every: Some(Every::Steps(1)),
        watch: Some(Watch {
            metric: "loss".into(),
            greater: false,
            load: true,
            patience: None,
            threshold: 0.,
        }),
        ..settings()
    }
}

/// Trains with checkpoints in `scratch`. `report` is called after each step.
fn train_in(
    scratch: &Path,
    model: &CausalLm,
    report: &mut dyn FnMut(&Step) -> ControlFlow<()>,
) -> Ending {
    let (rows, execution) = (rows("trl-1.16"), Execution::fastest(model));
    let job = Job {
        eval_rows: &rows[..5],
        scratch: Some(scratch),
        ..job(&execution, &rows)
    };
    train(&job, &golden_settings(), report).unwrap()
}

#[test]
#[ignore = "writes tests/golden/checkpoint"]
fn write_the_golden_checkpoint() {
    let ending = train_in(&folder("checkpoint"), &model(), &mut |step| {
        if step.step == 2 && step.micro_batches == 0 {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    });
    assert_eq!(ending, Ending::Interrupted { step: 2 });
}

/// A copy of the golden checkpoint, with its `state.json` changed.
fn copied(change: impl Fn(&mut serde_json::Map<String, serde_json::Value>)) -> tempfile::TempDir {
    let scratch = tempfile::tempdir().unwrap();
    let files = fs::read_dir(folder("checkpoint")).unwrap().flatten();
    for file in files.filter(|file| file.path().is_file()) {
        fs::copy(file.path(), scratch.path().join(file.file_name())).unwrap();
    }
    let (from, to) = [folder("checkpoint"), scratch.path().to_path_buf()]
        .map(|folder| folder_of_step(&folder, 2))
        .into();
    fs::create_dir(&to).unwrap();
    for name in [TENSORS, STATE, DIGEST] {
        fs::copy(from.join(name), to.join(name)).unwrap();
    }
    let json = fs::read(to.join(STATE)).unwrap();
    let mut state = serde_json::from_slice(&json).unwrap();
    let before = serde_json::to_vec(&state).unwrap();
    change(&mut state);
    let after = serde_json::to_vec(&state).unwrap();
    if after != before {
        fs::write(to.join(STATE), &after).unwrap();
        fs::write(to.join(DIGEST), blake3::hash(&after).to_string()).unwrap();
    }
    scratch
}

#[test]
fn a_checkpoint_of_this_version_is_read_and_would_be_written_again() {
    let scratch = copied(|_| ());
    let model = model();
    let mut optimizer = Optimizer::new(settings().optimizer, &model.parameters);
    let resumed = resume(scratch.path(), &model, &mut optimizer).unwrap();
    assert!(resumed.passed_over.is_empty(), "{:?}", resumed.passed_over);
    let state = resumed.state.unwrap();
    assert_eq!((state.step, state.scheduled, state.skipped), (2, 2, 0));
    assert!(state.tokens > 0 && state.best.step.is_some());
    // Every step and its evaluation.
    assert_eq!(state.history.len(), 4);
    let again = tempfile::tempdir().unwrap();
    write(again.path(), &model, &optimizer, &state).unwrap();
    let golden = folder_of_step(&folder("checkpoint"), 2);
    let written = folder_of_step(again.path(), 2);
    for name in [TENSORS, STATE, DIGEST] {
        let [golden, written] = [&golden, &written].map(|folder| fs::read(folder.join(name)));
        assert!(golden.unwrap() == written.unwrap(), "{name}");
    }
}

#[test]
fn a_training_continues_from_a_checkpoint_of_this_version() {
    let scratch = copied(|_| ());
    let mut first = None;
    let ending = train_in(scratch.path(), &model(), &mut |step| {
        first.get_or_insert(step.step);
        ControlFlow::Continue(())
    });
    assert_eq!(first, Some(2));
    assert!(matches!(ending, Ending::Finished { step: 4, .. }));
}

#[test]
fn a_checkpoint_of_another_version_is_passed_over() {
    for version in [VERSION - 1, VERSION + 1] {
        let scratch = copied(|state| {
            state["version"] = version.into();
            // As in version 1.
            state["history"] = ["{\"loss\":1}"].into();
        });
        let mut first = None;
        train_in(scratch.path(), &model(), &mut |step| {
            first.get_or_insert_with(|| step.clone());
            ControlFlow::Continue(())
        });
        let first = first.unwrap();
        assert_eq!(first.step, 0);
        let [sentence] = &first.passed_over[..] else {
            panic!("{:?}", first.passed_over)
        };
        assert!(
            sentence.contains("another version of the format"),
            "{sentence}"
        );
    }
}

/// The first checkpoints of version 2 did not count tokens.
#[test]
fn a_checkpoint_without_a_field_that_came_later_is_read() {
    let scratch = copied(|state| {
        state.remove("tokens").unwrap();
    });
    let model = model();
    let mut optimizer = Optimizer::new(settings().optimizer, &model.parameters);
    let resumed = resume(scratch.path(), &model, &mut optimizer).unwrap();
    assert_eq!(resumed.state.unwrap().tokens, 0);
}
