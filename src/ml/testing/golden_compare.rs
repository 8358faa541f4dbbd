//! Logs of trainings beside those of TRL: what differs most, and whether that is too much.
//!
//! `cargo test --lib golden -- --nocapture --test-threads 1 | grep '|'` prints the measured differences as a table.

use std::collections::BTreeMap;

use super::golden::folder;
use crate::ml::execution::Kind;
use crate::ml::train::Log;

/// What may differ.
#[derive(Debug, Clone, Copy)]
pub(in crate::ml) struct Tolerance {
    /// Relative, of everything but the gradient's norm and the learning rate.
    pub(in crate::ml) relative: f64,
    /// Absolute, where the relative one is smaller.
    pub(in crate::ml) near_zero: f64,
    /// Absolute, of `log_odds_chosen`, which is a difference of much larger numbers and so has their errors; a tenth of it
    /// for the margins, which are beta times that, and for the mean logits.
    pub(in crate::ml) cancelled: f64,
    /// Relative, of the gradient's norm.
    pub(in crate::ml) grad_norm: f64,
    /// Absolute, of `rewards/accuracies`: rounding may turn a pair over that is almost a tie.
    pub(in crate::ml) accuracy: f64,
}

/// Two programs in f32.
pub(in crate::ml) const EXACT: Tolerance = Tolerance {
    relative: 2e-5,
    near_zero: 1e-6,
    cancelled: 1e-6,
    grad_norm: 1e-4,
    accuracy: 0.,
};

/// The largest differences of one number: absolute, and relative to the other program's.
type Measured = BTreeMap<String, (f64, f64)>;

/// Collects differences, and at the end says which are too large.
pub(in crate::ml) struct Comparison {
    run: String,
    tolerance: Tolerance,
    measured: Measured,
    allowed: BTreeMap<String, String>,
    wrong: Vec<String>,
    /// Whether the mean logits go over the same positions as the reference's, which counts padding.
    padded: bool,
    /// Whether rewards are differences to a reference model.
    against_reference: bool,
}

impl Comparison {
    pub(in crate::ml) fn new(run: &str, tolerance: Tolerance, kind: Kind) -> Self {
        let packing = match kind {
            Kind::Reference => None,
            Kind::Fused(packing) | Kind::Gpu(packing) => Some(packing),
        };
        let way = match packing {
            None => "plain",
            Some(packing) if packing.share_prompts => "fused, prompts shared",
            Some(packing) if packing.padding_free => "fused, no padding",
            Some(_) => "fused",
        };
        Self {
            run: format!("{run} ({way})"),
            padded: packing.is_none_or(|packing| !packing.padding_free),
            tolerance,
            measured: Measured::new(),
            allowed: BTreeMap::new(),
            wrong: Vec::new(),
            against_reference: false,
        }
    }

    /// Of a loss with a reference model: rewards are differences of much larger numbers, and mean logits leave out the padding, so
    /// that they are compared in any case.
    pub(in crate::ml) fn against_reference(mut self) -> Self {
        (self.padded, self.against_reference) = (true, true);
        self
    }

    /// One number of ours beside theirs.
    pub(in crate::ml) fn number(&mut self, place: &str, name: &str, ours: f64, theirs: f64) {
        let t = self.tolerance;
        let plain = name.strip_prefix("eval_").unwrap_or(name);
        if plain.starts_with("logits/") && !self.padded {
            return;
        }
        let (relative, absolute) = match plain {
            "learning_rate" => (0., 0.),
            "grad_norm" => (t.grad_norm, 0.),
            "rewards/accuracies" => (0., t.accuracy),
            // A difference between sums over whole answers, which no `beta` makes smaller.
            "kl" => (t.relative, 10. * t.cancelled),
            _ if self.against_reference && plain.starts_with("rewards/") => {
                (t.relative, t.near_zero.max(t.cancelled))
            }
            "log_odds_chosen" => (t.relative, t.cancelled),
            "rewards/margins" | "logits/chosen" | "logits/rejected" => {
                (t.relative, t.near_zero.max(0.1 * t.cancelled))
            }
            _ => (t.relative, t.near_zero),
        };
        let far = (ours - theirs).abs();
        let measured = self.measured.entry(name.to_owned()).or_default();
        measured.0 = measured.0.max(far);
        if theirs != 0. {
            measured.1 = measured.1.max(far / theirs.abs());
        }
        self.allowed.entry(name.to_owned()).or_insert_with(|| {
            match (relative > 0., absolute > 0.) {
                (true, true) => format!("{relative:e} relative or {absolute:e}"),
                (true, false) => format!("{relative:e} relative"),
                (false, true) => format!("{absolute:e}"),
                (false, false) => "exact".into(),
            }
        });
        // Not `>`, which a NaN would pass.
        let near = far <= (relative * theirs.abs()).max(absolute);
        if !near {
            self.wrong.push(format!(
                "{place}, {name}: {ours}, the reference has {theirs}"
            ));
        }
    }

    /// A largest absolute difference that was measured elsewhere.
    pub(in crate::ml) fn largest(&mut self, name: &str, far: f64, allowed: f64) {
        let measured = self.measured.entry(name.to_owned()).or_default();
        measured.0 = measured.0.max(far);
        self.allowed.insert(name.to_owned(), format!("{allowed:e}"));
        let near = far <= allowed;
        if !near {
            self.wrong.push(format!("{name}: {far}"));
        }
    }

    /// Every number of `logs` that have a loss beside the lines of the reference.
    pub(in crate::ml) fn logs(&mut self, logs: &[Log], theirs: &[serde_json::Value]) {
        let theirs = theirs.iter().filter(|log| log.get("loss").is_some());
        let theirs: Vec<_> = theirs.collect();
        let logs = logs.iter().filter(|log| log.values.contains_key("loss"));
        let logs: Vec<_> = logs.collect();
        assert_eq!(logs.len(), theirs.len());
        for (ours, theirs) in logs.iter().zip(&theirs) {
            assert_eq!(theirs["step"], ours.step);
            assert!((theirs["epoch"].as_f64().unwrap() - ours.epoch).abs() < 1e-12);
            for name in theirs.as_object().unwrap().keys() {
                let known = ours.values.contains_key(name) || name == "step" || name == "epoch";
                assert!(known, "`{name}` is not logged");
            }
            let place = format!("step {}", ours.step);
            for (name, value) in &ours.values {
                self.number(&place, name, *value, theirs[name].as_f64().unwrap());
            }
        }
    }

    /// Every number of the last evaluation among `logs` beside that of the reference: the same names, and what they are.
    pub(in crate::ml) fn evaluation(&mut self, logs: &[Log], theirs: &serde_json::Value) {
        let ours = logs.iter().rfind(|log| is_evaluation(log)).unwrap();
        self.evaluated("the evaluation", ours, theirs);
    }

    /// As [`Comparison::evaluation`], of all evaluations of a training, after the same steps.
    pub(in crate::ml) fn evaluations(&mut self, logs: &[Log], theirs: &[serde_json::Value]) {
        let ours: Vec<_> = logs.iter().filter(|log| is_evaluation(log)).collect();
        assert_eq!(ours.len(), theirs.len(), "{}", self.run);
        for (ours, theirs) in ours.into_iter().zip(theirs) {
            assert_eq!(theirs["step"], ours.step, "{}", self.run);
            assert!((theirs["epoch"].as_f64().unwrap() - ours.epoch).abs() < 1e-12);
            self.evaluated(
                &format!("the evaluation after step {}", ours.step),
                ours,
                theirs,
            );
        }
    }

    fn evaluated(&mut self, place: &str, ours: &Log, theirs: &serde_json::Value) {
        let theirs = theirs.as_object().unwrap();
        let names: Vec<&String> = ours.values.keys().collect();
        let expected = theirs.keys().filter(|name| name.starts_with("eval_"));
        let mut expected: Vec<&String> = expected.collect();
        expected.sort_unstable();
        assert_eq!(names, expected, "{}", self.run);
        for (name, value) in &ours.values {
            let theirs = theirs[name].as_f64().unwrap();
            self.number(place, name, *value, theirs);
        }
    }

    /// Prints the largest differences, and fails if one was too large.
    pub(in crate::ml) fn end(self) {
        let run = self.run.clone();
        let wrong = self.wrong();
        assert!(wrong.is_empty(), "{run}: {wrong:#?}");
    }

    /// Prints the largest differences; says which were too large.
    pub(in crate::ml) fn wrong(self) -> Vec<String> {
        for (name, (absolute, relative)) in &self.measured {
            let allowed = &self.allowed[name];
            println!(
                "| {} | {name} | {absolute:.1e} | {relative:.1e} | {allowed} |",
                self.run
            );
        }
        self.wrong
    }
}

fn is_evaluation(log: &Log) -> bool {
    log.values.contains_key("eval_loss")
}

/// A file of golden numbers.
pub(in crate::ml) fn json(name: &str) -> serde_json::Value {
    let text = std::fs::read_to_string(folder(name)).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// Compares a training with one of `tests/golden/runs`.
pub(in crate::ml) fn compare(
    name: &str,
    logs: &[Log],
    tolerance: Tolerance,
    kind: Kind,
) -> Comparison {
    let golden = json(&format!("runs/{name}.json"));
    let mut comparison = Comparison::new(name, tolerance, kind);
    comparison.logs(logs, golden["log_history"].as_array().unwrap());
    comparison
}
