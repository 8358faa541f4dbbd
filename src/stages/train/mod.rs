//! Trainings: one file a method, and what they share.

pub mod arguments;
mod estimate;
mod first_steps;
mod inputs;
mod loss_types;
pub mod method;
mod on_gpu;
mod preferences;
mod process;
mod reference;
mod reference_arguments;
pub mod report_to;
mod run;
pub mod stage;
pub mod train_cpo;
pub mod train_dpo;
pub mod train_kto;
pub mod train_orpo;
pub mod train_reward;
pub mod train_sft;

#[cfg(test)]
mod dpo_tests;
#[cfg(test)]
mod fixture;
#[cfg(test)]
mod not_finite;
#[cfg(test)]
mod precomputed_tests;
#[cfg(test)]
mod reference_tests;
#[cfg(test)]
pub(in crate::stages) mod tests;

pub use reference::Reference;
