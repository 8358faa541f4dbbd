//! Models, LoRA, NF4, losses, optimisers and training loops. Knows no YAML, no cache and no tables.

pub mod adapter;
pub mod attach;
pub mod batch;
mod checkpoint;
pub mod config;
pub mod create;
mod dynamic_map;
pub mod evaluate;
pub mod finite;
pub mod float;
pub mod folder;
pub mod forward;
pub mod fused;
pub mod generate;
pub mod head;
pub mod linear;
pub mod lora_init;
pub mod merge;
pub mod model;
pub mod nf4;
pub mod objective;
pub mod ops;
pub mod optim;
pub mod orpo;
pub mod prove;
pub mod quantize;
mod rewrite;
pub mod sampler;
pub mod save;
pub mod schedule;
pub mod sft;
pub mod svd;
pub mod tensors;
pub mod tied;
pub mod torch_rng;
pub mod train;
pub mod weights;

#[cfg(test)]
mod counting;
#[cfg(test)]
pub(crate) mod golden;
#[cfg(test)]
mod golden_adapters;
#[cfg(test)]
mod golden_compare;
#[cfg(test)]
mod golden_ends;
#[cfg(test)]
mod golden_four_bit;
#[cfg(test)]
mod golden_runs;
