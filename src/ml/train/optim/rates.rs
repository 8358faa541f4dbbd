//! LoRA+ (Hayou, Ghosh and Yu 2024, arXiv 2402.12354): B learns faster than A.

use crate::ml::model::tensors::EMBED_TOKENS;

/// Learning rates of the tensors of an adapter, as factors of the rate of A.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraPlus {
    /// The factor for B, and for vectors such as biases and `DoRA`'s magnitudes.
    pub ratio: f64,
    /// The factor for both matrices beside the embeddings.
    pub embedding: f64,
}

impl LoraPlus {
    /// The factor for the parameter of this name and shape, by the groups of PEFT's `create_loraplus_optimizer`
    /// (`peft/optimizers/loraplus.py`).
    pub(super) fn factor(&self, name: &str, shape: &[usize]) -> f64 {
        let pair = name.rsplit_once(".lora_");
        match pair {
            Some((EMBED_TOKENS, _)) => self.embedding,
            Some((_, "B.weight")) => self.ratio,
            _ if shape.len() == 1 => self.ratio,
            _ => 1.,
        }
    }
}
