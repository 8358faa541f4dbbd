//! What the golden tests of adapters have in common: rows of the printed table, a tied base, and gradients beside PEFT's.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::Tensor;

use super::golden::{far, folder};
use super::losses;
use crate::ml::execution::Execution;
use crate::ml::loss::sft::Sft;
use crate::ml::model::batch::Batch;
use crate::ml::model::{CausalLm, Gradients};

/// Prints a measured difference as a row of the table, and fails if it is too large.
pub(super) fn row(what: &str, case: &str, far: f64, tolerance: f64) {
    println!("| {what} | {case} | {far:.1e} | {tolerance:.0e} |");
    assert!(far <= tolerance, "{what} of {case}: {far}");
}

/// Writes the base's `config.json` to `out`, with embeddings and head tied.
pub(super) fn write_tied_config(out: &Path) {
    fs::create_dir_all(out).unwrap();
    let config = fs::read_to_string(folder("adapters/model/config.json")).unwrap();
    let key = "\"tie_word_embeddings\": ";
    let config = config.replace(&format!("{key}false"), &format!("{key}true"));
    fs::write(out.join("config.json"), config).unwrap();
}

/// Compares the loss of `batch` and its gradients with PEFT's, `<case>.loss` and `<case>.grad.<name>` of `theirs`, with checkpointing and
/// without. `ours` maps PEFT's name and gradient to ours. Differences are relative to the largest value of a gradient, or to `floor` if that
/// is larger. Returns the number of gradients.
pub(super) fn gradients_are_near(
    model: &CausalLm,
    batch: &Batch,
    case: &str,
    theirs: &BTreeMap<String, Tensor>,
    floor: f64,
    ours: impl Fn(&str, &Tensor) -> (String, Tensor),
) -> usize {
    let prefix = format!("{case}.grad.");
    let all = theirs.iter().filter_map(|(name, gradient)| {
        let name = name.strip_prefix(&prefix)?;
        Some(ours(name, gradient))
    });
    let all: Vec<(String, Tensor)> = all.collect();
    assert!(!all.is_empty(), "{case} has gradients");
    for checkpointing in [false, true] {
        let mut gradients = Gradients::none(model);
        let outcome = losses::differentiate(
            &Sft {
                completion_only: false,
            },
            &Execution::fastest(model),
            &[(batch, 1.)],
            None,
            checkpointing,
            &mut gradients,
        );
        let loss = theirs[&format!("{case}.loss")].to_scalar::<f32>().unwrap();
        let apart = (outcome.unwrap()[0].loss / f64::from(loss) - 1.).abs();
        row("loss, relative", case, apart, 2e-5);
        let mut most = 0f64;
        for (name, theirs) in &all {
            let index = model.parameters.iter().position(|p| p.name == *name);
            let index = index.unwrap_or_else(|| panic!("{case} does not train `{name}`"));
            let ours = gradients.0[index].as_ref().expect(name);
            let size = theirs.abs().unwrap().max_all().unwrap();
            let size = f64::from(size.to_scalar::<f32>().unwrap());
            assert!(size > 0., "{case} {name}");
            most = most.max(far(ours, theirs) / size.max(floor));
        }
        row("gradient, relative", case, most, 1e-4);
    }
    all.len()
}
