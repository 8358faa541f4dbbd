//! Tests of `nf4`.

use candle_core::Device;
use proptest::prelude::*;

use super::encode::{Magnitudes, Part, block_absmax, from_memory, parts};
use super::*;
use crate::ml::quant::dynamic_map::Table;
use crate::ml::testing::golden;

const CASES: [&str; 7] = [
    "f32_256x192",
    "bf16_128x320",
    "f16_64x512",
    "f32_single_96x64",
    "f32_special_single_8x64",
    "f32_zero_block_8x64",
    "f32_ragged_5x14",
];

pub(in crate::ml) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Double quantisation as bitsandbytes 0.50 does it on the CPU that made the golden files.
pub(in crate::ml) fn nested_of_the_cpu(absmax: &[f32]) -> Magnitudes {
    let table = Table::get(true);
    Magnitudes::nested_by(absmax, mean_of_the_cpu(absmax), |x| {
        code_of_the_cpu(table, x)
    })
}

/// The nearest code of a grid of 65536 points.
fn code_of_the_cpu(table: &Table, x: f32) -> u8 {
    let t = (x.clamp(-1., 1.) + 1.) * 0.5;
    let point = f32::from((t * 65535. + 0.5) as u16);
    table.code(-1. + (2. * point) / 65535.)
}

/// torch's mean: sums in f32 in 4 vectors of 8 lanes, each in steps of 16 that are summed in turn.
fn mean_of_the_cpu(values: &[f32]) -> f32 {
    const LANES: usize = 8;
    let add = |sum: &mut [f32; LANES], x: &[f32; LANES]| {
        for (sum, x) in sum.iter_mut().zip(x) {
            *sum += x;
        }
    };
    let (vectors, rest) = values.as_chunks::<LANES>();
    let (fours, few) = vectors.as_chunks::<4>();
    assert!(fours.len() < 256, "longer sums have a third level");
    let mut levels = [[[0f32; LANES]; 4]; 2];
    for (number, four) in fours.iter().enumerate() {
        for (sum, vector) in levels[0].iter_mut().zip(four) {
            add(sum, vector);
        }
        if number % 16 == 15 {
            let [low, high] = &mut levels;
            for (high, low) in high.iter_mut().zip(low) {
                add(high, low);
                *low = [0.; LANES];
            }
        }
    }
    let [mut sums, high] = levels;
    for (sum, high) in sums.iter_mut().zip(&high) {
        add(sum, high);
    }
    let [mut whole, others @ ..] = sums;
    for vector in few {
        add(&mut whole, vector);
    }
    for other in &others {
        add(&mut whole, other);
    }
    let sum = rest.iter().chain(&whole).fold(0f32, |sum, x| sum + x);
    sum / values.len() as f32
}

/// All parts of a weight as bitsandbytes' CPU path makes them.
fn pack(float: Float, bytes: &[u8]) -> Vec<u8> {
    let mut packed = vec![0; (bytes.len() / float.size()).div_ceil(2)];
    encode::pack(float, bytes, &mut packed);
    packed
}

fn encode_as_the_cpu(
    name: &str,
    float: Float,
    shape: (usize, usize),
    bytes: &[u8],
    double: bool,
) -> Vec<Part> {
    let absmax = block_absmax(float, bytes.len(), from_memory(bytes)).unwrap();
    let magnitudes = if double {
        nested_of_the_cpu(&absmax)
    } else {
        Magnitudes::Plain(absmax)
    };
    let mut parts = parts(name, float, shape, &magnitudes).unwrap();
    parts[0].bytes = Some(pack(float, bytes));
    parts
}

#[test]
fn every_case_of_bitsandbytes_is_met_byte_for_byte() {
    let golden = Weights::open_file(&golden::folder("nf4.safetensors")).unwrap();
    for case in CASES {
        let input = golden.raw(&format!("{case}.input")).unwrap();
        let float = Float::from_safetensors(input.dtype).unwrap();
        let shape = (input.shape[0], input.shape[1]);
        let name = format!("{case}.weight");
        let own = |other: &&str| other.starts_with(&name);
        let theirs: Vec<&str> = golden.names().into_iter().filter(own).collect();
        let ours = encode_as_the_cpu(
            &name,
            float,
            shape,
            &input.bytes().unwrap(),
            !case.contains("single"),
        );
        assert_eq!(ours.len(), theirs.len(), "{case}");
        for part in ours {
            let theirs = golden.raw(&part.entry.name).unwrap();
            assert_eq!(
                (part.entry.dtype, &part.entry.shape[..]),
                (theirs.dtype, theirs.shape)
            );
            assert!(
                part.bytes.unwrap() == theirs.bytes().unwrap(),
                "{}",
                part.entry.name
            );
        }

        // And back.
        let nf4 = Nf4::load(&golden, &name).unwrap().unwrap();
        assert_eq!((nf4.shape, nf4.dtype), (shape, float.dtype()));
        let mut absmax = vec![0.; nf4.absmax.len()];
        float_values(&golden, &format!("{case}.absmax_f32"), &mut absmax);
        assert!(bits(&nf4.absmax) == bits(&absmax), "{case}");
        let mut values = vec![0.; shape.0 * shape.1];
        float_values(&golden, &format!("{case}.dequantised"), &mut values);
        assert!(bits(&nf4.dequantise()) == bits(&values), "{case}");
        // Rows by themselves; in the ragged case they begin within blocks and bytes.
        for row in 0..shape.0 {
            let mut out = vec![0.; shape.1];
            nf4.dequantise_rows(row..row + 1, &mut out);
            assert_eq!(
                bits(&out),
                bits(&values[row * shape.1..][..shape.1]),
                "{case} {row}"
            );
        }
    }
}

fn float_values(weights: &Weights, name: &str, out: &mut [f32]) {
    let raw = weights.raw(name).unwrap();
    assert_eq!(
        raw.size(),
        out.len() * Float::from_safetensors(raw.dtype).unwrap().size()
    );
    Float::from_safetensors(raw.dtype)
        .unwrap()
        .read(&raw.bytes().unwrap(), out);
}

#[test]
fn values_at_the_edges_get_the_codes_of_bitsandbytes() {
    let golden = Weights::open_file(&golden::folder("nf4.safetensors")).unwrap();
    let input = golden.raw("edges.input").unwrap().bytes().unwrap();
    let theirs = golden.raw("edges.weight").unwrap().bytes().unwrap();
    assert!(pack(Float::F32, &input) == theirs);
}

#[test]
fn the_cpu_s_grid_is_met_and_the_nearest_codes_are_close_to_it() {
    let golden = Weights::open_file(&golden::folder("nf4.safetensors")).unwrap();
    for (name, signed) in [("signed", true), ("unsigned", false)] {
        let table = Table::get(signed);
        let raw = |part: &str| {
            let raw = golden.raw(&format!("dyn8_{name}.{part}")).unwrap();
            raw.bytes().unwrap()
        };
        let mut input = vec![0.; 1000];
        Float::F32.read(&raw("input"), &mut input);
        let mut others = 0;
        let q = raw("q");
        for (block, codes) in input.chunks(256).zip(q.chunks(256)) {
            let absmax = block.iter().fold(0f32, |most, x| most.max(x.abs()));
            for (x, theirs) in block.iter().zip(codes) {
                if absmax > 0. {
                    assert_eq!(code_of_the_cpu(table, x * (1. / absmax)), *theirs);
                    let nearest = table.code(x * (1. / absmax));
                    others += usize::from(*x != 0. && nearest != *theirs);
                }
            }
        }
        // Beside the zeros, which the grid has no point for.
        assert!(others < 10, "{others}");
    }
}

#[test]
fn the_model_of_bitsandbytes_is_read() {
    let theirs = golden::tensors("nf4_model_outputs.safetensors");
    let theirs = theirs["dequantised.layers.0.q_proj.weight"]
        .flatten_all()
        .unwrap();
    let theirs: Vec<f32> = theirs.to_vec1().unwrap();
    let weights = Weights::open(&golden::folder("model_nf4")).unwrap();
    let name = "model.layers.0.self_attn.q_proj.weight";
    let nf4 = Nf4::load(&weights, name).unwrap().unwrap();
    assert_eq!(
        Nf4::stored_shape(&weights, name).unwrap(),
        Some(((64, 64), Float::F32))
    );
    assert!(bits(&nf4.dequantise()) == bits(&theirs));
    let tensor = nf4.to_tensor(DType::F32, &Device::Cpu).unwrap();
    assert_eq!(tensor.dims(), [64, 64]);
    let mut rows = vec![0.; 3 * 64];
    nf4.dequantise_rows(5..8, &mut rows);
    assert!(bits(&rows) == bits(&theirs[5 * 64..8 * 64]));
    // Rows that are not there give nothing.
    let mut none = vec![7.; 4];
    nf4.dequantise_rows(64..80, &mut none);
    assert_eq!(none, [7.; 4]);
    assert!(Nf4::load(&weights, "lm_head.weight").unwrap().is_none());
}

proptest! {
    #[test]
    fn no_value_moves_further_than_the_widest_gap(values in prop::collection::vec(-3f32..3., 1..300), double in any::<bool>()) {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let absmax = block_absmax(Float::F32, bytes.len(), from_memory(&bytes)).unwrap();
        let packed = pack(Float::F32, &bytes);
        let stored = if double {
            let Magnitudes::Nested { codes, absmax, offset } = Magnitudes::nested(&absmax) else {
                panic!("nested magnitudes are expected")
            };
            let map = &Table::get(true).values;
            let value = |(index, code): (usize, &u8)| map[usize::from(*code)] * absmax[index / 256] + offset;
            codes.iter().enumerate().map(value).collect()
        } else {
            absmax.clone()
        };
        let nf4 = Nf4 { packed, absmax: stored.clone(), shape: (1, values.len()), dtype: DType::F32 };
        for (index, (back, value)) in nf4.dequantise().iter().zip(&values).enumerate() {
            let (exact, stored) = (absmax[index / 64], stored[index / 64]);
            // Half of the widest gap between two codes, and the error of the magnitude.
            let bound = 0.1521 * exact + (exact - stored).abs();
            prop_assert!((back - value).abs() <= bound, "{back} {value} {exact}");
        }
    }
}
