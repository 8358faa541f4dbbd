//! `PIPELINE_INSTRUCTION_SET`: another processor's kernels give the same training up to the order of sums, and no other result.

use crate::support::program::{Project, events};

/// A short training of the quickstart's base, and the losses it tells.
fn losses(project: &Project, more: &[&str]) -> Vec<f64> {
    let arguments = [
        "run",
        "recipes/quickstart.yaml",
        "base",
        "--json",
        "--set",
        "stages.base.train_sft.max_steps=2",
    ];
    let events = events(&project.succeeds(&[&arguments[..], more].concat()));
    let told = events.iter().filter(|event| event["stage"] == "base");
    told.filter_map(|event| event["values"]["loss"].as_f64())
        .collect()
}

#[test]
fn a_smaller_instruction_set_gives_the_same_losses_and_a_fresh_result_stays_fresh() {
    let (best, mut portable) = (Project::with_recipes(), Project::with_recipes());
    portable.variable("PIPELINE_INSTRUCTION_SET", "portable");
    let (with, without) = (losses(&best, &[]), losses(&portable, &[]));
    assert!(!with.is_empty() && with.len() == without.len(), "{with:?}");
    for (a, b) in with.iter().zip(&without) {
        assert!((a - b).abs() < 1e-4 * a.abs(), "{a} with, {b} without");
    }
    let mut later = best;
    later.variable("PIPELINE_INSTRUCTION_SET", "portable");
    assert_eq!(losses(&later, &[]), [0f64; 0], "it ran again");
}

#[test]
fn an_unknown_instruction_set_is_told_with_those_there_are() {
    let mut project = Project::with_recipes();
    project.variable("PIPELINE_INSTRUCTION_SET", "avx3");
    let ended = project.run(&["run", "recipes/quickstart.yaml", "pairs"]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    let told = "PIPELINE_INSTRUCTION_SET is `avx3`; it is one of portable, ";
    assert!(ended.stderr.contains(told), "{}", ended.stderr);
}
