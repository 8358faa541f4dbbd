//! The tile against sums in the manual's order and rounding, bit by bit; the instructions' bytes; and what the emulated unit
//! refuses.

use super::emulated::Emulated;
use super::*;
use crate::product::tests::numbers;

/// Pairs of bf16 of very different sizes; some are denormal or have denormal products.
fn pairs(count: usize, seed: u64) -> Vec<u32> {
    let scales = [1., 1., 1e-3, 1e3, 1e-10, 1e-25, 1e-39, 1e10];
    let all = numbers(2 * count, seed);
    let bits = all.iter().enumerate().map(|(index, x)| {
        let scale = scales[(index * 7 + index / 64) % scales.len()];
        half::bf16::from_f32(x * scale).to_bits()
    });
    let bits: Vec<u16> = bits.collect();
    let (pairs, _) = bits.as_chunks::<2>();
    let pairs = pairs.iter();
    pairs
        .map(|[a, b]| u32::from(*a) | (u32::from(*b) << 16))
        .collect()
}

fn flushed(x: f32) -> f32 {
    if x.is_subnormal() {
        0f32.copysign(x)
    } else {
        x
    }
}

fn number(bits: u32) -> f32 {
    flushed(f32::from_bits(bits << 16))
}

/// One sum of the tile, from packed rows that are not arranged.
fn expected(a: &[u32], b: &[u32], (row, lane): (usize, usize)) -> f32 {
    let (a, _) = a.as_chunks::<TILE>();
    let (b, _) = b.as_chunks::<LANES>();
    let mut sum = 0f32;
    for (a, b) in a.chunks(16).zip(b.chunks(16)) {
        let (mut first, mut second) = (0f32, 0f32);
        for (a, b) in a.iter().zip(b) {
            let (a, b) = (a[row], b[lane]);
            first = flushed(number(a).mul_add(number(b), first));
            second = flushed(number(a >> 16).mul_add(number(b >> 16), second));
        }
        sum = flushed(sum + flushed(first + second));
    }
    sum
}

#[test]
fn sums_are_those_of_the_manual() {
    let mut emulated = Unit::new(Emulated::new());
    for depth in [0, 1, 3, 15, 16, 17, 32, 40, 256, 300] {
        let (a, b) = (pairs(depth * TILE, 1), pairs(depth * LANES, 2));
        let (mut arranged, mut spare) = (a.clone(), vec![7; 3]);
        arrange(&mut arranged, &mut spare, depth);
        let from = numbers(TILE * LANES, 3);
        for rows in [1, 5, TILE] {
            for onto in [false, true] {
                let mut c = vec![9f32; TILE * LANES];
                let tile = Tile {
                    a: arranged.as_ptr(),
                    b: b.as_ptr(),
                    depth,
                    c: c.as_mut_ptr(),
                    rows,
                    from: onto.then_some(from.as_ptr()),
                };
                // SAFETY: operands of the tile's size; the processor's own unit only where there is one.
                unsafe {
                    if rows == 5 {
                        multiply(tile);
                    } else {
                        emulated.multiply(tile);
                    }
                }
                for (index, c) in c.iter().enumerate() {
                    let (row, lane) = (index / LANES, index % LANES);
                    let expected = match (row < rows, onto) {
                        (false, _) => 9.,
                        (true, false) => expected(&a, &b, (row, lane)),
                        (true, true) => expected(&a, &b, (row, lane)) + from[index],
                    };
                    assert_eq!(
                        c.to_bits(),
                        expected.to_bits(),
                        "{depth} {rows} {onto}: {row}, {lane}"
                    );
                }
            }
        }
    }
    release();
}

#[test]
fn several_tiles_are_arranged() {
    for depth in [1, 16, 21] {
        let packed: Vec<u32> = (0..(3 * depth * TILE) as u32).collect();
        let (mut arranged, mut spare) = (packed.clone(), Vec::new());
        arrange(&mut arranged, &mut spare, depth);
        for (tile, (arranged, packed)) in arranged
            .chunks(depth * TILE)
            .zip(packed.chunks(depth * TILE))
            .enumerate()
        {
            for k in 0..depth {
                let (first, width) = (k / 16 * 16, (depth - k / 16 * 16).min(16));
                for i in 0..TILE {
                    let index = first * TILE + i * width + k % 16;
                    assert_eq!(
                        arranged[index],
                        packed[k * TILE + i],
                        "{depth} {tile} {k} {i}"
                    );
                }
            }
        }
    }
}

/// The first bytes of a function.
fn code(function: *const u8) -> [u8; 48] {
    // SAFETY: code can be read, and there is more of it behind these small functions.
    unsafe { function.cast::<[u8; 48]>().read_unaligned() }
}

/// Functions of one instruction each, which are never run.
mod alone {
    use super::*;

    #[inline(never)]
    pub(super) unsafe extern "C" fn configure(shapes: &Configuration) {
        // SAFETY: not run.
        unsafe { Processor.configure(shapes) };
    }

    #[inline(never)]
    pub(super) unsafe extern "C" fn release() {
        // SAFETY: not run.
        unsafe { Processor.release() };
    }

    #[inline(never)]
    pub(super) unsafe extern "C" fn zero() {
        // SAFETY: not run.
        unsafe { Processor.zero::<3>() };
    }

    #[inline(never)]
    pub(super) unsafe extern "C" fn load(from: *const u32, stride: usize) {
        // SAFETY: not run.
        unsafe { Processor.load::<3>(from, stride) };
    }

    #[inline(never)]
    pub(super) unsafe extern "C" fn store(to: *mut f32, stride: usize) {
        // SAFETY: not run.
        unsafe { Processor.store::<3>(to, stride) };
    }

    #[inline(never)]
    pub(super) unsafe extern "C" fn multiply() {
        // SAFETY: not run.
        unsafe { Processor.multiply::<0, 2, 3>() };
    }
}

/// The encodings of the manual, volume 2: `VEX.128.<prefix>.0F38.W0 <opcode> <ModRM>`. Which general registers hold addresses is the
/// compiler's choice: the bits that say so are left out.
#[test]
fn instructions_are_encoded_as_the_manual_says() {
    let found = |function: *const u8, wanted: [u8; 5]| {
        let masked = |bytes: &[u8]| {
            let memory = bytes[4] < 0xc0;
            let mut bytes: [u8; 5] = [bytes[0], bytes[1], bytes[2], bytes[3], bytes[4]];
            // `R`, `X`, `B` and the map; then the register of an address, if it has no index.
            bytes[1] |= 0b0110_0000;
            if memory && bytes[3] == 0x49 {
                bytes[4] &= 0b1111_1000;
            }
            bytes
        };
        let code = code(function);
        let at = code.windows(5).any(|bytes| masked(bytes) == wanted);
        assert!(at, "{wanted:x?} in {code:x?}");
    };
    // `vvvv` and the prefix are in the third byte: none 78, F3 7a, F2 7b; of the product's, `vvvv` is its third register.
    found(
        alone::configure as *const u8,
        [0xc4, 0xe2, 0x78, 0x49, 0x00],
    );
    found(alone::release as *const u8, [0xc4, 0xe2, 0x78, 0x49, 0xc0]);
    found(alone::zero as *const u8, [0xc4, 0xe2, 0x7b, 0x49, 0xd8]);
    found(alone::load as *const u8, [0xc4, 0xe2, 0x7b, 0x4b, 0x1c]);
    found(alone::store as *const u8, [0xc4, 0xe2, 0x7a, 0x4b, 0x1c]);
    found(alone::multiply as *const u8, [0xc4, 0xe2, 0x62, 0x5c, 0xc2]);
}

#[test]
fn a_configuration_has_the_manual_s_places() {
    let shapes = Configuration::new(5);
    // SAFETY: 64 bytes without padding.
    let bytes: [u8; 64] = unsafe { std::mem::transmute(shapes) };
    let mut expected = [0; 64];
    expected[0] = 1;
    for register in 0..8 {
        expected[16 + 2 * register] = 64;
        expected[48 + register] = [12, 12, 12, 16, 16, 12, 5, 5][register];
    }
    expected[16 + 2 * 5] = 20;
    assert_eq!(bytes, expected);
}

#[test]
#[should_panic(expected = "#UD: nothing is configured")]
fn nothing_goes_before_a_configuration() {
    // SAFETY: emulated.
    unsafe { Emulated::new().zero::<0>() };
}

#[test]
#[should_panic(expected = "#UD: register 5 is not configured")]
fn a_register_without_a_shape_is_refused() {
    let mut emulated = Emulated::new();
    // SAFETY: emulated.
    unsafe {
        emulated.configure(&Configuration::new(0));
        emulated.zero::<LAST_ROWS>();
    }
}

#[test]
#[should_panic(expected = "#UD: the depths of the factors")]
fn factors_of_different_depths_are_refused() {
    let mut emulated = Emulated::new();
    // SAFETY: emulated.
    unsafe {
        emulated.configure(&Configuration::new(4));
        emulated.multiply::<LOW_SUMS, LAST_ROWS, LOW_LANES>();
    }
}
