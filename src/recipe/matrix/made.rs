//! The stages that a matrix makes: which of them a name means, and how those of several inputs come together.

use std::collections::{BTreeMap, BTreeSet};

use serde_yaml::Value;

use super::axes::{self, Picked, picked};
use crate::recipe::combination::Combination;
use crate::recipe::draft::Draft;
use crate::recipe::source_map::RecipePath;

/// A stage that is made of a declared one.
pub(super) struct Made {
    pub(super) combination: Combination,
    /// What stands in the places of inputs, by the position of the input.
    pub(super) inputs: Vec<(usize, Value)>,
    /// Whether its `when` leaves it out, or that of what it is made for.
    pub(super) left_out: bool,
    /// Whether something that it takes is left out.
    pub(super) lacks: bool,
}

/// The declared stage that a name means, and what it picks.
pub(super) fn resolve<'n>(
    name: &'n str,
    index: &BTreeMap<&str, usize>,
) -> Option<(usize, Picked<'n>)> {
    let picked = picked(name)?;
    Some((*index.get(picked.stage)?, picked))
}

/// The stages that have the picked values, with the values that are left open. That there are none is told.
pub(super) fn picks<'m>(
    draft: &mut Draft,
    path: &RecipePath,
    picked: &Picked<'_>,
    made: &'m [Made],
) -> Option<Vec<(&'m Made, Combination)>> {
    let fitting = made.iter().filter(|made| picked.fits(&made.combination));
    let taken: Vec<(&Made, Combination)> = fitting
        .map(|made| {
            let open = made.combination.iter();
            let open = open.filter(|value| !picked.has(&value.axis)).cloned();
            (made, open.collect())
        })
        .collect();
    if taken.is_empty() && !made.is_empty() {
        let all: Vec<&Combination> = made.iter().map(|made| &made.combination).collect();
        let (message, hint) = picked.wrong(&all);
        draft.value_error(path, message, Some(hint));
        draft.broken.insert(path.clone());
    }
    (!taken.is_empty()).then_some(taken)
}

/// Each of `partial` with each of the stages taken that has the same values of the axes that both have. Nothing when that is more than
/// there is room for.
pub(super) fn joined(
    partial: Vec<Made>,
    taken: &[(&Made, Combination)],
    read: &str,
    position: usize,
    room: usize,
) -> Option<Vec<Made>> {
    // By the labels of the axes that are shared, so that not every pair is looked at.
    type ByLabels<'t> = BTreeMap<Vec<&'t str>, Vec<&'t (&'t Made, Combination)>>;
    let mut by_axes: BTreeMap<Vec<String>, ByLabels<'_>> = BTreeMap::new();
    let open = taken.iter().flat_map(|(_, open)| open);
    let open: BTreeSet<&str> = open.map(|value| value.axis.as_str()).collect();
    let mut all = Vec::new();
    for one in partial {
        let axes = one.combination.iter().map(|value| value.axis.clone());
        let shared: Vec<String> = axes.filter(|axis| open.contains(axis.as_str())).collect();
        let label = |combination: &'_ Combination, axis: &String| -> Option<usize> {
            combination.iter().position(|value| value.axis == *axis)
        };
        let by_labels = by_axes.entry(shared.clone()).or_insert_with(|| {
            let mut by_labels = ByLabels::new();
            for pair in taken {
                let labels: Option<Vec<&str>> = shared
                    .iter()
                    .map(|axis| Some(pair.1[label(&pair.1, axis)?].label.as_str()))
                    .collect();
                if let Some(labels) = labels {
                    by_labels.entry(labels).or_default().push(pair);
                }
            }
            by_labels
        });
        let own: Vec<&str> = shared
            .iter()
            .filter_map(|axis| {
                Some(
                    one.combination[label(&one.combination, axis)?]
                        .label
                        .as_str(),
                )
            })
            .collect();
        for (made, open) in by_labels.get(&own).into_iter().flatten() {
            if all.len() >= room {
                return None;
            }
            let mut combination = one.combination.clone();
            let new = open
                .iter()
                .filter(|value| !shared.contains(&value.axis))
                .cloned();
            combination.extend(new);
            let mut inputs = one.inputs.clone();
            inputs.push((position, axes::name(read, &made.combination).into()));
            all.push(Made {
                combination,
                inputs,
                left_out: false,
                lacks: one.lacks || made.left_out,
            });
        }
    }
    Some(all)
}
