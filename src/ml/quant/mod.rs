//! bitsandbytes' 4-bit weights: their codes, their quantised magnitudes, and the quantisation of whole models.

pub(in crate::ml) mod dynamic_map;
pub mod nf4;
pub mod quantize;
