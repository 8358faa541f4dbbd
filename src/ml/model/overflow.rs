//! Weights that don't fit into the type in which products are computed.

use candle_core::DType;
use half::f16;

use super::Llama;
use super::linear::{Base, Pass};
use crate::ml::io::finite;
use crate::ml::lora::init::projections;

impl Llama {
    /// The first frozen weight with values beyond the range of f16, if that is what products run in; values that were no numbers
    /// in the file count too.
    pub fn overflown(&self) -> candle_core::Result<Option<String>> {
        if self.compute != DType::F16 {
            return Ok(None);
        }
        let names = projections(&self.arch).map(|projection| projection.path);
        for (number, layer) in self.layers.iter().enumerate() {
            for (name, linear) in names.iter().zip(layer.linears()) {
                let overflown = match &linear.base {
                    Base::Dense(weight) => {
                        let weight = weight.stored(Pass::BASE);
                        weight.dtype() == DType::F16 && finite::in_memory(weight)?.is_some()
                    }
                    Base::Nf4(weight) => {
                        let most = f32::from(f16::MAX);
                        !weight.absmax.iter().all(|absmax| absmax.abs() <= most)
                    }
                };
                if overflown {
                    return Ok(Some(format!("model.layers.{number}.{name}.weight")));
                }
            }
        }
        let head = self.head().stored(Pass::BASE);
        let overflown = head.dtype() == DType::F16 && finite::in_memory(head)?.is_some();
        Ok(overflown.then(|| super::tensors::HEAD.to_owned()))
    }
}
