//! What the tests of `ml` have in common, and those that compare it with the numbers of the reference.

pub(crate) mod counting;
mod eight_billion;
pub(crate) mod golden;
pub(in crate::ml) mod golden_adapters;
pub(in crate::ml) mod golden_compare;
mod golden_dpo;
pub(in crate::ml) mod golden_ends;
pub(in crate::ml) mod golden_families;
pub(in crate::ml) mod golden_four_bit;
mod golden_kto;
mod golden_losses;
mod golden_peft;
mod golden_reward;
pub(in crate::ml) mod golden_runs;
mod golden_tokens;
#[cfg(feature = "gpu")]
mod gpu_training;
pub(in crate::ml) mod kinds;
pub(in crate::ml) mod losses;
