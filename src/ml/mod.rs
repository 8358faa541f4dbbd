//! Models, LoRA, NF4, losses, optimisers and training loops. Knows no YAML, no cache and no tables.

pub mod adapter;
pub mod backend;
pub mod execution;
pub mod fused;
pub mod generate;
pub mod generation_config;
pub mod io;
pub mod lora;
pub mod loss;
pub mod model;
pub mod quant;
pub mod reference;
pub mod sampling;
mod threads;
pub mod torch_rng;
pub mod train;

#[cfg(test)]
pub(crate) mod testing;
