//! Trainings: one file a method, and what they share.

pub mod arguments;
pub mod method;
mod reference;
pub mod report_to;
mod run;
pub mod stage;
pub mod train_dpo;
pub mod train_orpo;
pub mod train_sft;

#[cfg(test)]
mod dpo_tests;
#[cfg(test)]
mod not_finite;
#[cfg(test)]
pub(in crate::stages) mod tests;

pub use reference::Reference;

use crate::ml::model::batch::Row;

/// Refuses rows that lack one of two answers.
fn need_two_answers(kind: &str, rows: &[Row]) -> anyhow::Result<()> {
    for (number, row) in rows.iter().enumerate() {
        let answers = [Some(&row.chosen), row.rejected.as_ref()];
        anyhow::ensure!(
            answers
                .iter()
                .all(|ids| ids.is_some_and(|ids| !ids.is_empty())),
            "row {} of the tokens lacks a chosen or rejected answer, and `{kind}` needs both; hint: a preference dataset has \
             the column `rejected`, and `train_sft` learns answers alone",
            number + 1
        );
    }
    Ok(())
}
