//! What the tests of `ml` share, and those that hold it against the reference's numbers.

pub(in crate::ml) mod counting;
pub(crate) mod golden;
pub(in crate::ml) mod golden_adapters;
pub(in crate::ml) mod golden_compare;
mod golden_dpo;
pub(in crate::ml) mod golden_ends;
pub(in crate::ml) mod golden_families;
pub(in crate::ml) mod golden_four_bit;
pub(in crate::ml) mod golden_runs;
pub(in crate::ml) mod losses;
