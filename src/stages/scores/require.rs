//! `require`: what the scores of a model must be, so that a run fails where they are not.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use anyhow::bail;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::report::Report;
use crate::engine::{Neutral, Problem};

/// The parameter's name.
const NAME: &str = "require";
/// What a name begins with that means the change against the base or the baseline.
const DIFFERENCE: &str = "difference/";

/// Requirements by the names of scores: `{"rewards/accuracies": ">= 0.6", "difference/perplexity": "< 0"}`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub(super) struct Requirements(BTreeMap<String, Condition>);

/// Whether nothing is required.
pub(super) fn is_empty(require: &Neutral<Requirements>) -> bool {
    require.is_empty()
}

/// How a score compares with a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Comparison {
    Greater,
    AtLeast,
    Less,
    AtMost,
}

impl Comparison {
    /// Longer signs come before those that they begin with.
    const ALL: [(&'static str, Self); 4] = [
        (">=", Self::AtLeast),
        ("<=", Self::AtMost),
        (">", Self::Greater),
        ("<", Self::Less),
    ];

    fn holds(self, score: f64, bound: f64) -> bool {
        match self {
            Self::Greater => score > bound,
            Self::AtLeast => score >= bound,
            Self::Less => score < bound,
            Self::AtMost => score <= bound,
        }
    }
}

/// What a score must be: one comparison or several, as they were written.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Condition(String);

impl Condition {
    /// The comparisons, with their numbers.
    fn parts(&self) -> Result<Vec<(Comparison, f64)>, String> {
        let part = |text: &str| {
            let text = text.trim();
            let found = Comparison::ALL
                .iter()
                .find_map(|(sign, comparison)| Some((comparison, text.strip_prefix(sign)?)));
            let number = found.and_then(|(comparison, number)| {
                let number: f64 = number.trim().parse().ok()?;
                number.is_finite().then_some((*comparison, number))
            });
            number.ok_or_else(|| {
                format!(
                    "`{}` is no comparison, expected `>=`, `>`, `<=` or `<` and a number, as in \">= 0.6\" or \"> 0.5, < 0.9\"",
                    self.0
                )
            })
        };
        self.0.split(',').map(part).collect()
    }
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.trim())
    }
}

impl Serialize for Condition {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Condition {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self)
    }
}

impl JsonSchema for Condition {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Condition".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let number = r"\s*(>=|>|<=|<)\s*[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?\s*";
        schemars::json_schema!({
            "type": "string",
            "description": "`>=`, `>`, `<=` or `<` and a number; several comparisons stand side by side with commas between them.",
            "pattern": format!("^{number}(,{number})*$"),
            "examples": [">= 0.6"],
        })
    }

    fn inline_schema() -> bool {
        true
    }
}

impl Requirements {
    /// Whether nothing is required.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Names that no evaluation of the kind has among `known`, changes where nothing is compared, and comparisons that can't be read.
    pub(super) fn check(&self, known: &[&str], compares: bool) -> Vec<Problem> {
        let mut problems = Vec::new();
        for (name, condition) in &self.0 {
            let place = format!("{NAME}.{name}");
            let score = name.strip_prefix(DIFFERENCE).unwrap_or(name);
            if !known.contains(&score) {
                let nearest = known
                    .iter()
                    .min_by_key(|known| strsim::damerau_levenshtein(known, score));
                let names: Vec<String> = known.iter().map(|name| format!("`{name}`")).collect();
                let problem = Problem::new(
                    &place,
                    format!(
                        "there is no score `{score}`, expected one of {}",
                        names.join(", ")
                    ),
                );
                problems.push(match nearest {
                    Some(near) if strsim::damerau_levenshtein(near, score) <= 3 => {
                        problem.hint(format!("did you mean `{near}`?"))
                    }
                    _ => problem.hint(format!(
                        "`{DIFFERENCE}{}` is the change of a score",
                        known.first().copied().unwrap_or_default()
                    )),
                });
            } else if score.len() < name.len() && !compares {
                problems.push(
                    Problem::new(&place, "there is nothing that the model is compared with")
                        .hint("give an `adapter` or a `baseline`"),
                );
            }
            if let Err(message) = condition.parts() {
                problems.push(Problem::new(&place, message));
            }
        }
        problems
    }

    /// Holds the scores in a folder against all requirements.
    ///
    /// # Errors
    /// Every requirement that is not met, with its number.
    pub(super) fn accept(&self, folder: &Path) -> anyhow::Result<()> {
        if self.is_empty() {
            return Ok(());
        }
        let report = Report::read(folder)?;
        let mut failures = Vec::new();
        for (name, condition) in &self.0 {
            let numbers = match name.strip_prefix(DIFFERENCE) {
                Some(score) => report.difference.as_ref().map(|numbers| (numbers, score)),
                None => Some((report.scored(), name.as_str())),
            };
            let found = numbers.and_then(|(numbers, score)| numbers.get(score));
            let failure = match found {
                None => {
                    let names: Vec<String> = report
                        .scored()
                        .keys()
                        .map(|name| format!("`{name}`"))
                        .collect();
                    format!(
                        "there is no `{name}` among the scores of these rows, which are {}",
                        names.join(", ")
                    )
                }
                Some(None) => format!("`{name}` is not finite, required is {condition}"),
                Some(Some(score)) => {
                    let parts = condition.parts().map_err(anyhow::Error::msg)?;
                    if parts.iter().all(|(how, bound)| how.holds(*score, *bound)) {
                        continue;
                    }
                    let base = match name.strip_prefix(DIFFERENCE) {
                        None => report.difference.is_some().then(|| report.base.get(name)),
                        Some(_) => None,
                    };
                    let base = base.flatten().copied().flatten();
                    let base = base.map_or_else(String::new, |base| format!(" (base: {base:.6})"));
                    format!("`{name}` is {score:.6}{base}, required is {condition}")
                }
            };
            failures.push(failure);
        }
        if failures.is_empty() {
            return Ok(());
        }
        bail!(
            "the scores of {} rows of the split `{}` are not what `{NAME}` asks for: {}",
            report.rows,
            report.split,
            failures.join("; ")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn requirements(json: &str) -> Requirements {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn what_is_not_met_is_told_with_its_numbers() {
        let folder = tempfile::tempdir().unwrap();
        let scores = r#"{"split": "test", "rows": 60, "base": {"acc": 0.25, "x": null}, "adapter": {"acc": 0.5, "x": 1.0},
            "difference": {"acc": 0.25, "x": null}}"#;
        std::fs::write(folder.path().join("scores.json"), scores).unwrap();
        for met in [
            r#"{"acc": ">= 0.5"}"#,
            r#"{"acc": ">0.4,<= .5"}"#,
            r#"{"acc": "< 1", "difference/acc": "> 1e-3"}"#,
            "{}",
        ] {
            requirements(met).accept(folder.path()).unwrap();
        }
        for (not_met, expected) in [
            (
                r#"{"acc": ">= 0.6"}"#,
                "the scores of 60 rows of the split `test` are not what `require` asks for: `acc` is 0.500000 (base: 0.250000), required is >= 0.6",
            ),
            (r#"{"acc": "> 0.4, < 0.5"}"#, "required is > 0.4, < 0.5"),
            (
                r#"{"difference/acc": "> 0.25"}"#,
                "`difference/acc` is 0.250000, required is > 0.25",
            ),
            (r#"{"difference/x": "> 0"}"#, "`difference/x` is not finite"),
            (r#"{"y": "> 0"}"#, "there is no `y` among the scores"),
        ] {
            let error = requirements(not_met).accept(folder.path()).unwrap_err();
            let error = error.to_string();
            assert!(error.contains(expected), "{error}");
        }
        let two = requirements(r#"{"acc": "> 1", "x": "< 0"}"#);
        let error = two.accept(folder.path()).unwrap_err().to_string();
        assert!(error.contains("`acc` is") && error.contains("; `x` is"));
    }

    #[test]
    fn mistakes_are_known_before_anything_runs() {
        let known = ["rewards/accuracies", "loss"];
        let of = |json: &str, compares| {
            let problems = requirements(json).check(&known, compares);
            let texts = problems.into_iter().map(|problem| {
                format!(
                    "{}: {} {}",
                    problem.parameter,
                    problem.message,
                    problem.hint.unwrap_or_default()
                )
            });
            texts.collect::<Vec<_>>().join("\n")
        };
        assert_eq!(
            of(r#"{"loss": "< 1", "difference/loss": "<= 0"}"#, true),
            ""
        );
        let unknown = of(r#"{"rewards/acuracies": "> 0"}"#, false);
        assert!(
            unknown.starts_with("require.rewards/acuracies: there is no score `rewards/acuracies`")
                && unknown.ends_with("did you mean `rewards/accuracies`?"),
            "{unknown}"
        );
        let alone = of(r#"{"difference/loss": "< 0"}"#, false);
        assert!(alone.contains("nothing that the model is compared with"));
        for bad in ["0.5", "= 1", "> x", "> inf", "", ">= 1,", "> 1 and < 2"] {
            let json = serde_json::json!({ "loss": bad }).to_string();
            let found = of(&json, false);
            assert!(found.contains("is no comparison"), "{bad}: {found}");
        }
    }
}
