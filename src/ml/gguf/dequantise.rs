//! From the blocks of a GGUF file to f32, to the bit as the `gguf` package computes it (`quants.py`, `dequantize_blocks`).

use anyhow::bail;
use half::f16;

use super::GgmlType;
use super::codebooks::{IQ1, IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS, IQ4, MXFP4, SIGNS_OF_EIGHT};

/// Computes the values of one block.
type Block = fn(&[u8], &mut [f32]);

/// Computes values of the type `kind`. `bytes` are whole blocks; `out` has room for exactly their values, in the order of a row.
///
/// # Errors
/// The type can't be read; the error says why and what to do.
///
/// # Panics
/// The sizes of `bytes` and `out` don't belong together.
pub fn dequantise(kind: GgmlType, bytes: &[u8], out: &mut [f32]) -> anyhow::Result<()> {
    let block = block(kind)?;
    let (size, values) = (kind.block_bytes(), kind.block());
    assert!(
        bytes.len().is_multiple_of(size) && bytes.len() / size * values == out.len(),
        "{} bytes of the type {kind} are not {} values",
        bytes.len(),
        out.len()
    );
    for (bytes, out) in bytes.chunks_exact(size).zip(out.chunks_exact_mut(values)) {
        block(bytes, out);
    }
    Ok(())
}

/// Fails if the type can't be read.
///
/// # Errors
/// The type can't be read; the error says why and what to do.
pub fn check(kind: GgmlType) -> anyhow::Result<()> {
    block(kind).map(drop)
}

fn block(kind: GgmlType) -> anyhow::Result<Block> {
    Ok(match kind {
        GgmlType::F32 => {
            |bytes, out| out[0] = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
        }
        GgmlType::F16 => |bytes, out| out[0] = half(bytes, 0),
        GgmlType::BF16 => |bytes, out| out[0] = f32::from_bits(u32::from(u16_at(bytes, 0)) << 16),
        GgmlType::F64 => f64_value,
        GgmlType::Q4_0 => q4_0,
        GgmlType::Q4_1 => q4_1,
        GgmlType::Q5_0 => q5_0,
        GgmlType::Q5_1 => q5_1,
        GgmlType::Q8_0 => q8_0,
        GgmlType::Q2_K => q2_k,
        GgmlType::Q3_K => q3_k,
        GgmlType::Q4_K => q4_k,
        GgmlType::Q5_K => q5_k,
        GgmlType::Q6_K => q6_k,
        GgmlType::IQ4_NL => iq4_nl,
        GgmlType::IQ4_XS => iq4_xs,
        GgmlType::IQ2_XXS => iq2_xxs,
        GgmlType::IQ2_XS => iq2_xs,
        GgmlType::IQ2_S => iq2_s,
        GgmlType::IQ3_XXS => iq3_xxs,
        GgmlType::IQ3_S => iq3_s,
        GgmlType::IQ1_S => iq1_s,
        GgmlType::IQ1_M => iq1_m,
        GgmlType::TQ1_0 => tq1_0,
        GgmlType::TQ2_0 => tq2_0,
        GgmlType::MXFP4 => mxfp4,
        GgmlType::I8 | GgmlType::I16 | GgmlType::I32 | GgmlType::I64 => {
            bail!("the type {kind} holds whole numbers, which no weight of a model does")
        }
        GgmlType::Q8_1 | GgmlType::Q8_K => {
            bail!("the type {kind} is for intermediate results of llama.cpp, not for files")
        }
        GgmlType::NVFP4 | GgmlType::Q1_0 => bail!(
            "the type {kind} is not supported; hint: take another quantisation of the model, or the model itself with its safetensors"
        ),
    })
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The f16 at a place.
fn half(bytes: &[u8], at: usize) -> f32 {
    f16::from_bits(u16_at(bytes, at)).to_f32()
}

fn signed(byte: u8) -> f32 {
    f32::from(byte as i8)
}

/// The values of 4 bits in ggml's order: the low halves of all bytes, then the high halves.
fn nibbles(bytes: &[u8], out: &mut [f32], value: impl Fn(u8) -> f32) {
    let (low, high) = out.split_at_mut(bytes.len());
    for ((byte, low), high) in bytes.iter().zip(low).zip(high) {
        *low = value(byte & 15);
        *high = value(byte >> 4);
    }
}

fn f64_value(bytes: &[u8], out: &mut [f32]) {
    if let Some((bytes, _)) = bytes.split_first_chunk() {
        out[0] = f64::from_le_bytes(*bytes) as f32;
    }
}

fn q4_0(bytes: &[u8], out: &mut [f32]) {
    let d = half(bytes, 0);
    nibbles(&bytes[2..], out, |q| d * (f32::from(q) - 8.));
}

fn q4_1(bytes: &[u8], out: &mut [f32]) {
    let (d, m) = (half(bytes, 0), half(bytes, 2));
    nibbles(&bytes[4..], out, |q| d * f32::from(q) + m);
}

/// The values of 5 bits: `low` has four of them in the order of [`nibbles`], bit i of `high` is the fifth of value i.
fn fives(high: u32, low: &[u8], out: &mut [f32], value: impl Fn(u8) -> f32) {
    for (i, out) in out.iter_mut().enumerate() {
        let byte = low[i % 16];
        let q = if i < 16 { byte & 15 } else { byte >> 4 };
        *out = value(q | ((high >> i & 1) as u8) << 4);
    }
}

fn q5_0(bytes: &[u8], out: &mut [f32]) {
    let d = half(bytes, 0);
    fives(u32_at(bytes, 2), &bytes[6..], out, |q| {
        d * (f32::from(q) - 16.)
    });
}

fn q5_1(bytes: &[u8], out: &mut [f32]) {
    let (d, m) = (half(bytes, 0), half(bytes, 2));
    fives(u32_at(bytes, 4), &bytes[8..], out, |q| d * f32::from(q) + m);
}

fn q8_0(bytes: &[u8], out: &mut [f32]) {
    let d = half(bytes, 0);
    for (out, q) in out.iter_mut().zip(&bytes[2..]) {
        *out = signed(*q) * d;
    }
}

/// 16 scales and minima of 4 bits, 64 bytes with four values of 2 bits, two f16.
fn q2_k(bytes: &[u8], out: &mut [f32]) {
    let (scales, low) = bytes[..80].split_at(16);
    let (d, minimum) = (half(bytes, 80), half(bytes, 82));
    for (i, out) in out.iter_mut().enumerate() {
        let scale = scales[i / 16];
        let q = low[i / 128 * 32 + i % 32] >> (2 * (i / 32 % 4)) & 3;
        let (scale, minimum) = (d * f32::from(scale & 15), minimum * f32::from(scale >> 4));
        *out = scale * f32::from(q) - minimum;
    }
}

/// 32 bytes of third bits (a 1 means that nothing is subtracted), 64 bytes with four values of 2 bits, 16 scales of 6 bits, an f16.
fn q3_k(bytes: &[u8], out: &mut [f32]) {
    let (mask, rest) = bytes.split_at(32);
    let (low, scales) = rest[..76].split_at(64);
    let d = half(bytes, 108);
    let scale = |i: usize| {
        let low = if i < 8 {
            scales[i] & 15
        } else {
            scales[i - 8] >> 4
        };
        let high = scales[8 + i % 4] >> (2 * (i / 4)) & 3;
        d * (f32::from(low | high << 4) - 32.)
    };
    for (i, out) in out.chunks_exact_mut(16).enumerate() {
        let scale = scale(i);
        for (j, out) in out.iter_mut().enumerate() {
            let i = i * 16 + j;
            let q = low[i / 128 * 32 + i % 32] >> (2 * (i / 32 % 4)) & 3;
            let kept = mask[i % 32] >> (i / 32) & 1;
            *out = scale * (f32::from(q) - if kept == 1 { 0. } else { 4. });
        }
    }
}

/// The scale and the minimum of sub-block i of `Q4_K` and `Q5_K`: 6 bits each in 12 bytes.
fn scale_and_minimum(packed: &[u8], i: usize) -> (f32, f32) {
    let (scale, minimum) = if i < 4 {
        (packed[i] & 63, packed[i + 4] & 63)
    } else {
        (
            packed[i + 4] & 15 | packed[i - 4] >> 6 << 4,
            packed[i + 4] >> 4 | packed[i] >> 6 << 4,
        )
    };
    (f32::from(scale), f32::from(minimum))
}

/// Two f16, 12 bytes of scales and minima, 128 bytes with two values of 4 bits.
fn q4_k(bytes: &[u8], out: &mut [f32]) {
    let (d, minimum) = (half(bytes, 0), half(bytes, 2));
    for (i, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, m) = scale_and_minimum(&bytes[4..16], i);
        let (scale, m) = (d * scale, minimum * m);
        let low = &bytes[16 + i / 2 * 32..];
        for (out, byte) in out.iter_mut().zip(low) {
            *out = scale * f32::from(byte >> (4 * (i % 2)) & 15) - m;
        }
    }
}

/// As `Q4_K`, with 32 bytes of fifth bits before the values.
fn q5_k(bytes: &[u8], out: &mut [f32]) {
    let (d, minimum) = (half(bytes, 0), half(bytes, 2));
    let high = &bytes[16..48];
    for (i, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, m) = scale_and_minimum(&bytes[4..16], i);
        let (scale, m) = (d * scale, minimum * m);
        let low = &bytes[48 + i / 2 * 32..];
        for ((out, low), high) in out.iter_mut().zip(low).zip(high) {
            let q = low >> (4 * (i % 2)) & 15 | (high >> i & 1) << 4;
            *out = scale * f32::from(q) - m;
        }
    }
}

/// 128 bytes of low halves, 64 bytes of two further bits, 16 signed scales, an f16.
fn q6_k(bytes: &[u8], out: &mut [f32]) {
    let (low, high, scales) = (&bytes[..128], &bytes[128..192], &bytes[192..208]);
    let d = half(bytes, 208);
    for (i, out) in out.chunks_exact_mut(16).enumerate() {
        let scale = d * signed(scales[i]);
        for (j, out) in out.iter_mut().enumerate() {
            let i = i * 16 + j;
            let (part, i) = (i / 128, i % 128);
            let four = low[part * 64 + i % 64] >> (4 * (i / 64)) & 15;
            let two = high[part * 32 + i % 32] >> (2 * (i / 32)) & 3;
            *out = scale * (f32::from(four | two << 4) - 32.);
        }
    }
}

fn iq4_nl(bytes: &[u8], out: &mut [f32]) {
    let d = half(bytes, 0);
    nibbles(&bytes[2..], out, |q| d * f32::from(IQ4[usize::from(q)]));
}

/// An f16, a u16 and 4 bytes with 8 scales of 6 bits, 128 bytes with two codes.
fn iq4_xs(bytes: &[u8], out: &mut [f32]) {
    let (d, high) = (half(bytes, 0), u16_at(bytes, 2));
    for (i, out) in out.chunks_exact_mut(32).enumerate() {
        let low = bytes[4 + i / 2] >> (4 * (i % 2)) & 15;
        let scale = low | ((high >> (2 * i) & 3) as u8) << 4;
        let scale = d * (f32::from(scale) - 32.);
        let codes = &bytes[8 + 16 * i..24 + 16 * i];
        nibbles(codes, out, |q| scale * f32::from(IQ4[usize::from(q)]));
    }
}

/// Writes the product of a scale, an entry of a codebook and signs, of which bit i belongs to value i.
fn signed_entry(scale: f32, entry: &[f32], signs: u8, out: &mut [f32]) {
    for (i, (out, value)) in out.iter_mut().zip(entry).enumerate() {
        let sign = if signs >> i & 1 == 1 { -1. } else { 1. };
        *out = scale * value * sign;
    }
}

/// An f16; for each 32 values four indices of entries and a u32 with four indices of signs and a scale of 4 bits.
fn iq2_xxs(bytes: &[u8], out: &mut [f32]) {
    let d = half(bytes, 0);
    for (group, out) in bytes[2..].chunks_exact(8).zip(out.chunks_exact_mut(32)) {
        let packed = u32_at(group, 4);
        let scale = d * (0.5 + (packed >> 28) as f32) * 0.25;
        for (i, out) in out.chunks_exact_mut(8).enumerate() {
            let entry = IQ2_XXS.entry::<8>(usize::from(group[i]));
            let signs = SIGNS_OF_EIGHT[(packed >> (7 * i) & 127) as usize];
            signed_entry(scale, &entry, signs, out);
        }
    }
}

/// The scale of each 16 values, in 4 bits.
fn scale_of_sixteen(d: f32, scales: &[u8], i: usize) -> f32 {
    d * (0.5 + f32::from(scales[i / 2] >> (4 * (i % 2)) & 15)) * 0.25
}

/// An f16; for each 8 values a u16 with the indices of an entry and of signs; 16 scales of 4 bits.
fn iq2_xs(bytes: &[u8], out: &mut [f32]) {
    let d = half(bytes, 0);
    for (i, out) in out.chunks_exact_mut(8).enumerate() {
        let packed = usize::from(u16_at(bytes, 2 + 2 * i));
        let scale = scale_of_sixteen(d, &bytes[66..], i / 2);
        let entry = IQ2_XS.entry::<8>(packed & 511);
        signed_entry(scale, &entry, SIGNS_OF_EIGHT[packed >> 9], out);
    }
}

/// An f16; for each 8 values the low 8 bits of an index, then signs; two further bits of each index; 16 scales of 4 bits.
fn iq2_s(bytes: &[u8], out: &mut [f32]) {
    let d = half(bytes, 0);
    for (i, out) in out.chunks_exact_mut(8).enumerate() {
        let high = bytes[66 + i / 4] >> (2 * (i % 4)) & 3;
        let index = usize::from(bytes[2 + i]) | usize::from(high) << 8;
        let scale = scale_of_sixteen(d, &bytes[74..], i / 2);
        signed_entry(scale, &IQ2_S.entry::<8>(index), bytes[34 + i], out);
    }
}

/// An f16; for each 4 values an index; for each 32 a u32 with four indices of signs and a scale of 4 bits.
fn iq3_xxs(bytes: &[u8], out: &mut [f32]) {
    let d = half(bytes, 0);
    for (i, out) in out.chunks_exact_mut(32).enumerate() {
        let packed = u32_at(bytes, 66 + 4 * i);
        let scale = d * (0.5 + (packed >> 28) as f32) * 0.5;
        for (j, out) in out.chunks_exact_mut(4).enumerate() {
            let entry = IQ3_XXS.entry::<4>(usize::from(bytes[2 + 8 * i + j]));
            let signs = SIGNS_OF_EIGHT[(packed >> (7 * (j / 2)) & 127) as usize];
            signed_entry(scale, &entry, signs >> (4 * (j % 2)), out);
        }
    }
}

/// An f16; for each 4 values the low 8 bits of an index; the ninth bits; signs; 8 scales of 4 bits.
fn iq3_s(bytes: &[u8], out: &mut [f32]) {
    let d = half(bytes, 0);
    for (i, out) in out.chunks_exact_mut(4).enumerate() {
        let high = bytes[66 + i / 8] >> (i % 8) & 1;
        let index = usize::from(bytes[2 + i]) | usize::from(high) << 8;
        let scale = bytes[106 + i / 16] >> (4 * (i / 8 % 2)) & 15;
        let scale = d * f32::from(1 + 2 * scale);
        let signs = bytes[74 + i / 2] >> (4 * (i % 2));
        signed_entry(scale, &IQ3_S.entry::<4>(index), signs, out);
    }
}

/// Writes the product of a scale and an entry of the ternary codebook, moved by an eighth.
fn moved_entry(scale: f32, index: usize, down: bool, out: &mut [f32]) {
    let delta = if down { -0.125 } else { 0.125 };
    for (out, value) in out.iter_mut().zip(IQ1.entry::<8>(index)) {
        *out = scale * (value + delta);
    }
}

/// An f16; for each 8 values the low 8 bits of an index; for each 32 a u16 with three further bits of four indices, a scale of 3 bits
/// and a direction.
fn iq1_s(bytes: &[u8], out: &mut [f32]) {
    let d = half(bytes, 0);
    for (i, out) in out.chunks_exact_mut(8).enumerate() {
        let packed = u16_at(bytes, 34 + i / 4 * 2);
        let scale = d * f32::from(2 * (packed >> 12 & 7) + 1);
        let index = usize::from(bytes[2 + i]) | usize::from(packed >> (3 * (i % 4)) & 7) << 8;
        moved_entry(scale, index, packed & 0x8000 != 0, out);
    }
}

/// For each 8 values the low 8 bits of an index; for each 16 a byte with three further bits of two indices and two directions; four
/// u16 with four scales of 3 bits each and a quarter of an f16.
fn iq1_m(bytes: &[u8], out: &mut [f32]) {
    let packed: [u16; 4] = std::array::from_fn(|i| u16_at(bytes, 48 + 2 * i));
    let d = packed[0] >> 12 | packed[1] >> 8 & 0xf0 | packed[2] >> 4 & 0xf00 | packed[3] & 0xf000;
    let d = f16::from_bits(d).to_f32();
    for (i, out) in out.chunks_exact_mut(8).enumerate() {
        let scale = packed[i / 8] >> (3 * (i / 2 % 4)) & 7;
        let scale = d * f32::from(2 * scale + 1);
        let high = bytes[32 + i / 2] >> (4 * (i % 2));
        let index = usize::from(bytes[i]) | usize::from(high & 7) << 8;
        moved_entry(scale, index, high & 8 != 0, out);
    }
}

/// Five values from 0 to 2 a byte in 48 bytes, four in 4 bytes, an f16. The byte is a fraction in base 3, of which a product takes
/// the next digit.
fn tq1_0(bytes: &[u8], out: &mut [f32]) {
    const POWERS: [u8; 5] = [1, 3, 9, 27, 81];
    let d = half(bytes, 52);
    let digit = |byte: u8, power: u8| {
        let digit = (u16::from(byte.wrapping_mul(power)) * 3) >> 8;
        d * (f32::from(digit) - 1.)
    };
    for (i, out) in out.iter_mut().enumerate() {
        *out = match i {
            0..160 => digit(bytes[i % 32], POWERS[i / 32]),
            160..240 => digit(bytes[32 + (i - 160) % 16], POWERS[(i - 160) / 16]),
            _ => digit(bytes[48 + (i - 240) % 4], POWERS[(i - 240) / 4]),
        };
    }
}

/// 64 bytes with four values from 0 to 2, an f16.
fn tq2_0(bytes: &[u8], out: &mut [f32]) {
    let d = half(bytes, 64);
    for (i, out) in out.iter_mut().enumerate() {
        let q = bytes[i / 128 * 32 + i % 32] >> (2 * (i / 32 % 4)) & 3;
        *out = d * (f32::from(q) - 1.);
    }
}

/// An exponent of 8 bits, 16 bytes with two codes of E2M1, which are stored doubled: so the power of 2 is one less.
fn mxfp4(bytes: &[u8], out: &mut [f32]) {
    let exponent = u32::from(bytes[0]);
    // The two smallest powers are no normal numbers.
    let bits = if exponent < 2 {
        0x0020_0000 << exponent
    } else {
        (exponent - 1) << 23
    };
    let d = f32::from_bits(bits);
    nibbles(&bytes[1..], out, |q| d * f32::from(MXFP4[usize::from(q)]));
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::ml::io::weights::Weights;

    /// Blocks of each type with what the `gguf` package makes of them (`tests/python/generate_gguf.py`).
    #[test]
    fn values_are_those_of_the_gguf_package_to_the_bit() {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/gguf/blocks.safetensors");
        let golden = Weights::open_file(&path).unwrap();
        let mut seen = 0;
        for kind in GgmlType::all().filter(|kind| check(*kind).is_ok()) {
            let bytes = golden
                .raw(&format!("{kind}.blocks"))
                .unwrap()
                .bytes()
                .unwrap();
            let expected = golden.raw(&format!("{kind}.values")).unwrap();
            let expected: Vec<f32> = expected.values_from(0, expected.size() / 4).unwrap();
            let mut values = vec![0.; expected.len()];
            dequantise(kind, &bytes, &mut values).unwrap();
            for (i, (value, expected)) in values.iter().zip(&expected).enumerate() {
                assert_eq!(value.to_bits(), expected.to_bits(), "{kind} {i}");
            }
            seen += 1;
        }
        assert_eq!(seen, 26);
    }

    #[test]
    fn what_can_not_be_read_is_refused_by_name() {
        for (kind, why) in [
            (GgmlType::NVFP4, "another quantisation"),
            (GgmlType::I32, "whole numbers"),
            (GgmlType::Q8_K, "intermediate"),
        ] {
            let error = check(kind).unwrap_err().to_string();
            assert!(
                error.contains(kind.name()) && error.contains(why),
                "{error}"
            );
        }
    }

    #[test]
    #[should_panic(expected = "17 bytes of the type Q4_0 are not 32 values")]
    fn sizes_belong_together() {
        let _ = dequantise(GgmlType::Q4_0, &[0; 17], &mut [0.; 32]);
    }
}
