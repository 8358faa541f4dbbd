//! shim nf4
use super::weights::Weights;
use candle_core::{DType, Device, Result, Tensor};
pub struct Nf4 {
    pub packed: Vec<u8>,
    pub absmax: Vec<f32>,
    pub shape: (usize, usize),
    pub dtype: DType,
}
const CODE: [f32; 16] = [
    -1.,
    -0.696_192_800_998_687_7,
    -0.525_073_051_452_636_7,
    -0.394_917_488_098_144_53,
    -0.284_441_381_692_886_35,
    -0.184_773_430_228_233_34,
    -0.091_050_036_251_544_95,
    0.,
    0.079_580_299_556_255_34,
    0.160_930_201_411_247_25,
    0.246_112_301_945_686_34,
    0.337_915_241_718_292_24,
    0.440_709_829_330_444_34,
    0.562_617_003_917_694_1,
    0.722_956_836_223_602_3,
    1.,
];
impl Nf4 {
    pub fn load(weights: &Weights, name: &str) -> anyhow::Result<Option<Self>> {
        let state = format!("{name}.quant_state.bitsandbytes__nf4");
        if !weights.contains(&state) {
            return Ok(None);
        }
        let d = Device::Cpu;
        let get = |n: &str| weights.tensor(&format!("{name}{n}"), &d);
        let j: serde_json::Value =
            serde_json::from_slice(&weights.tensor(&state, &d)?.to_vec1::<u8>()?)?;
        let shape = (
            j["shape"][0].as_u64().unwrap_or(0) as usize,
            j["shape"][1].as_u64().unwrap_or(0) as usize,
        );
        let packed = get("")?.flatten_all()?.to_vec1::<u8>()?;
        let absmax = if weights.contains(&format!("{name}.nested_absmax")) {
            let q = get(".absmax")?.to_vec1::<u8>()?;
            let na = get(".nested_absmax")?.to_vec1::<f32>()?;
            let map = get(".nested_quant_map")?.to_vec1::<f32>()?;
            let off = j["nested_offset"].as_f64().unwrap_or(0.) as f32;
            q.iter()
                .enumerate()
                .map(|(i, q)| map[*q as usize] * na[i / 256] + off)
                .collect()
        } else {
            get(".absmax")?.to_vec1::<f32>()?
        };
        Ok(Some(Self {
            packed,
            absmax,
            shape,
            dtype: DType::F32,
        }))
    }
    pub fn dequantise(&self) -> Vec<f32> {
        let n = self.shape.0 * self.shape.1;
        (0..n)
            .map(|i| {
                let b = self.packed[i / 2];
                let c = if i % 2 == 0 { b >> 4 } else { b & 15 };
                CODE[c as usize] * self.absmax[i / 64]
            })
            .collect()
    }
    pub fn to_tensor(&self, dtype: DType, device: &Device) -> Result<Tensor> {
        Tensor::from_vec(self.dequantise(), self.shape, device)?.to_dtype(dtype)
    }
}
