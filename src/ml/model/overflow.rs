//! The search for weights that overflow in the type in which products are computed.

use candle_core::DType;
use half::f16;

use super::CausalLm;
use super::linear::{Base, Pass};
use super::tensors::{HEAD, projection_path, weight_name};
use crate::ml::io::finite;

impl CausalLm {
    /// The name of the first frozen weight with values beyond the range of f16, if products are computed in f16. Values that are not finite
    /// in the file count too.
    pub fn overflown(&self) -> candle_core::Result<Option<String>> {
        if self.compute != DType::F16 {
            return Ok(None);
        }
        for (number, layer) in self.layers.iter().enumerate() {
            for (projection, linear) in self.arch.projections().iter().zip(layer.linears()) {
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
                    return Ok(Some(weight_name(&projection_path(number, *projection))));
                }
            }
        }
        let head = self.head().stored(Pass::BASE);
        let overflown = head.dtype() == DType::F16 && finite::in_memory(head)?.is_some();
        Ok(overflown.then(|| HEAD.to_owned()))
    }
}
