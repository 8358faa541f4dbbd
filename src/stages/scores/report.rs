//! What an evaluation leaves: `scores.json`, and intervals and p-values as notes in the record.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::engine::Context;
use crate::ml::loss::Metrics;
use crate::ml::train::bootstrap::{RowScores, intervals};

/// The file of scores.
const FILE: &str = "scores.json";

/// A part of the scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// The model alone or, in a comparison, what is compared with.
    Base,
    /// The model with its adapter.
    Adapter,
    /// The model without an adapter, beside another model.
    Model,
}

impl Part {
    /// Its key in `scores.json`.
    pub(super) fn key(self) -> &'static str {
        match self {
            Self::Base => "base",
            Self::Adapter => "adapter",
            Self::Model => "model",
        }
    }
}

/// The scores of one side of a comparison.
pub(super) struct Scored {
    /// Which part it is.
    pub(super) part: Part,
    /// The scores of all rows.
    pub(super) metrics: Metrics,
    /// Those that have intervals, by row.
    pub(super) by_row: RowScores,
}

/// Scores by name.
pub(super) type Numbers = BTreeMap<String, Option<f64>>;

/// The contents of `scores.json`, as other stages and requirements read them.
#[derive(Serialize, Deserialize)]
pub(super) struct Report {
    pub(super) split: String,
    pub(super) rows: usize,
    /// The model alone or, in a comparison, what is compared with. A score that is not finite is null.
    pub(super) base: Numbers,
    /// The model with the adapter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) adapter: Option<Numbers>,
    /// The model, beside a baseline.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) model: Option<Numbers>,
    /// `adapter` or `model` minus `base`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) difference: Option<Numbers>,
}

impl Report {
    /// Reads the scores in a folder.
    pub(super) fn read(folder: &Path) -> anyhow::Result<Self> {
        let path = folder.join(FILE);
        let text = fs::read(&path);
        let text = text.with_context(|| format!("could not read `{}`", path.display()))?;
        serde_json::from_slice(&text)
            .with_context(|| format!("`{}` does not hold scores", path.display()))
    }

    /// The scores of the model in question: the last of a comparison.
    pub(super) fn scored(&self) -> &Numbers {
        let compared = self.adapter.as_ref().or(self.model.as_ref());
        compared.unwrap_or(&self.base)
    }
}

/// Writes the scores of one side, or of a base and what is compared with it, and notes intervals. `shown` are the metrics that are noted
/// with the run.
pub(super) fn write(
    cx: &Context,
    split: &str,
    rows: usize,
    sides: &[Scored],
    shown: &[&str],
) -> anyhow::Result<()> {
    let (base, compared) = match sides {
        [base] => (base, None),
        [base, compared] => (base, Some(compared)),
        _ => anyhow::bail!("{} sides were scored, expected one or two", sides.len()),
    };
    if let Some(found) = intervals(&base.by_row, compared.map(|side| &side.by_row)) {
        let mut note = Map::new();
        note.insert("confidence".into(), found.confidence.into());
        note.insert("resamples".into(), found.resamples.into());
        note.insert("seed".into(), found.seed.into());
        note.insert(base.part.key().into(), serde_json::to_value(&found.base)?);
        if let (Some(side), Some(paired)) = (compared, &found.paired) {
            let of = |ends| serde_json::to_value(ends);
            note.insert(side.part.key().into(), of(&paired.compared)?);
            note.insert("difference".into(), of(&paired.difference)?);
            let p_values = serde_json::to_value(&paired.p_values)?;
            note.insert("p_values".into(), p_values);
        }
        cx.note("intervals", Value::Object(note));
    }
    for name in shown {
        cx.note(name, compared.unwrap_or(base).metrics.get(name));
    }
    let named = |metrics: &Metrics| -> Numbers {
        let pairs = metrics.iter();
        pairs
            .map(|(name, value)| ((*name).to_owned(), Some(*value)))
            .collect()
    };
    let of = |part| {
        let side = compared.filter(|side| side.part == part);
        side.map(|side| named(&side.metrics))
    };
    let report = Report {
        split: split.to_owned(),
        rows,
        base: named(&base.metrics),
        adapter: of(Part::Adapter),
        model: of(Part::Model),
        difference: compared.map(|side| {
            let pairs = side.metrics.iter();
            let pairs = pairs.filter_map(|(name, value)| {
                let difference = value - base.metrics.get(name)?;
                Some(((*name).to_owned(), Some(difference)))
            });
            pairs.collect()
        }),
    };
    let text = serde_json::to_string_pretty(&report)? + "\n";
    fs::write(cx.out().join(FILE), text).with_context(|| format!("could not write `{FILE}`"))
}
