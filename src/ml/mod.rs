//! Models, LoRA, NF4, losses, optimisers and the training loop. This layer knows no YAML, no store and no tables.

pub mod adapter;
pub mod backend;
pub mod execution;
pub mod fused;
pub mod generate;
pub mod generation_config;
pub mod gguf;
#[cfg(feature = "gpu")]
mod gpu;
pub mod io;
pub mod lora;
pub mod loss;
pub mod model;
pub mod place;
pub mod quant;
pub mod reference;
pub mod resident;
pub mod reward;
pub mod sampling;
mod threads;
pub mod torch_rng;
pub mod train;

#[cfg(test)]
pub(crate) mod testing;
