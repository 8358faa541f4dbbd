//! AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2) over all values of a buffer in one launch. A caller that keeps its
//! trained tensors one after the other in one buffer updates them all at once.

use cubecl::prelude::*;

use crate::buffer::Buffer;
use crate::device::{Device, UNITS};
use crate::error::Error;

/// The values that share their largest magnitude in a moment of 8 bits; a cube's units.
pub const MOMENT_BLOCK: usize = UNITS as usize;

/// The numbers of one step of AdamW.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// The decay rate of the first moment.
    pub beta1: f32,
    /// The decay rate of the second moment.
    pub beta2: f32,
    /// The factor by which weight decay multiplies a parameter, `1 - learning rate * weight decay`.
    pub keep: f32,
    /// The learning rate divided by the bias correction of the first moment, `1 - beta1^step`.
    pub step_size: f32,
    /// The square root of the bias correction of the second moment, `sqrt(1 - beta2^step)`.
    pub root: f32,
    /// The number that is added to the square root of the second moment.
    pub epsilon: f32,
    /// The factor of gradients, below 1 where their norm is clipped.
    pub grad_factor: f32,
}

/// [`AdamW`] as kernels take it.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
struct Numbers {
    beta1: f32,
    beta2: f32,
    keep: f32,
    step_size: f32,
    root: f32,
    epsilon: f32,
    grad_factor: f32,
}

impl AdamW {
    fn arg(self) -> NumbersLaunch {
        NumbersLaunch::new(
            self.beta1,
            self.beta2,
            self.keep,
            self.step_size,
            self.root,
            self.epsilon,
            self.grad_factor,
        )
    }
}

/// New values of a parameter and its moments: weight decay, moments, step, in the order of torch's `AdamW`.
#[cube]
fn updated(p: f32, g: f32, m: f32, v: f32, step: &Numbers) -> (f32, f32, f32) {
    let g = g * step.grad_factor;
    let m = m + (g - m) * (1.0f32 - step.beta1);
    let v = v * step.beta2 + g * g * (1.0f32 - step.beta2);
    let p = p * step.keep - step.step_size * m / (v.sqrt() / step.root + step.epsilon);
    (p, m, v)
}

#[cube(launch)]
fn adamw_kernel(
    parameters: &mut [f32],
    gradients: &[f32],
    first: &mut [f32],
    second: &mut [f32],
    step: Numbers,
) {
    let index = ABSOLUTE_POS;
    if index < parameters.len() {
        let (p, m, v) = updated(
            parameters[index],
            gradients[index],
            first[index],
            second[index],
            &step,
        );
        parameters[index] = p;
        first[index] = m;
        second[index] = v;
    }
}

/// The number of the table's value that is nearest to `x`: that of the midpoints below it.
#[cube]
fn nearest(table: &[f32], x: f32) -> u32 {
    let mut low = 0u32;
    let mut high = 255u32;
    for _step in 0..8u32 {
        if low < high {
            let middle = (low + high) / 2;
            if table[256 + middle as usize] < x {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
    }
    low
}

/// Quantises a cube's values into its block of a moment.
#[cube]
fn keep_moment(
    shared: &mut Shared<[f32]>,
    codes: &mut [u32],
    magnitudes: &mut [f32],
    table: &[f32],
    value: f32,
) {
    let unit = UNIT_POS as usize;
    sync_cube();
    shared[unit] = value.abs();
    sync_cube();
    let mut largest = 0.0f32;
    for other in 0..MOMENT_BLOCK {
        largest = largest.max(shared[other]);
    }
    let mut inverse = 0.0f32;
    if largest > 0.0f32 {
        inverse = 1.0f32 / largest;
    }
    let code = nearest(table, value * inverse);
    sync_cube();
    shared[unit] = f32::cast_from(code);
    sync_cube();
    if unit == 0 {
        magnitudes[CUBE_POS] = largest;
    }
    if unit % 4 == 0 {
        let mut word = 0u32;
        #[unroll]
        for byte in 0..4usize {
            word |= u32::cast_from(shared[unit + byte]) << (byte as u32 * 8);
        }
        codes[(CUBE_POS * MOMENT_BLOCK + unit) / 4] = word;
    }
}

/// The value of a moment whose code is at this index, in a word of four.
#[cube]
fn moment(word: u32, magnitude: f32, table: &[f32], index: usize) -> f32 {
    let code = (word >> ((index as u32 % 4) * 8)) & 255;
    table[code as usize] * magnitude
}

/// A cube for each block. A table holds the values of the codes, then the midpoints between neighbours.
#[cube(launch)]
fn adamw_8bit_kernel(
    parameters: &mut [f32],
    gradients: &[f32],
    first_codes: &mut [u32],
    first_magnitudes: &mut [f32],
    second_codes: &mut [u32],
    second_magnitudes: &mut [f32],
    signed: &[f32],
    unsigned: &[f32],
    step: Numbers,
) {
    let index = CUBE_POS * MOMENT_BLOCK + UNIT_POS as usize;
    let mut shared = Shared::<[f32]>::new_slice(MOMENT_BLOCK);
    if CUBE_POS < first_magnitudes.len() {
        let mut m = 0.0f32;
        let mut v = 0.0f32;
        if index < parameters.len() {
            let old_m = moment(
                first_codes[index / 4],
                first_magnitudes[CUBE_POS],
                signed,
                index,
            );
            let old_v = moment(
                second_codes[index / 4],
                second_magnitudes[CUBE_POS],
                unsigned,
                index,
            );
            let (p, new_m, new_v) =
                updated(parameters[index], gradients[index], old_m, old_v, &step);
            parameters[index] = p;
            m = new_m;
            v = new_v;
        }
        keep_moment(&mut shared, first_codes, first_magnitudes, signed, m);
        keep_moment(&mut shared, second_codes, second_magnitudes, unsigned, v);
    }
}

/// A moment in 8 bits (Dettmers, Lewis, Shleifer and Zettlemoyer 2022, arXiv 2110.02861, section 2): a code for each value, and the largest
/// magnitude of each [`MOMENT_BLOCK`] values.
#[derive(Debug)]
pub struct Moment8 {
    codes: Buffer,
    magnitudes: Buffer,
    table: Buffer,
    count: usize,
}

impl Device {
    /// A moment of `count` zeros, whose codes stand for the 256 ascending `values`, of which one is 0.
    ///
    /// # Errors
    /// As [`Device::allocate`].
    ///
    /// # Panics
    /// If 0 is not among the values.
    pub fn moment_8bit(&self, count: usize, values: &[f32; 256]) -> Result<Moment8, Error> {
        let zero = values.iter().position(|value| *value == 0.);
        assert!(zero.is_some(), "a table of 8-bit values has no 0");
        let blocks = count.div_ceil(MOMENT_BLOCK);
        let codes = vec![zero.unwrap_or(0) as u8; blocks * MOMENT_BLOCK];
        self.moment_8bit_of(count, values, &codes, &vec![0.; blocks])
    }

    /// A moment with these codes, one for each value, and magnitudes, one for each block. Codes may be filled up to whole blocks.
    ///
    /// # Errors
    /// As [`Device::allocate`].
    ///
    /// # Panics
    /// If there are too few codes or another number of magnitudes.
    pub fn moment_8bit_of(
        &self,
        count: usize,
        values: &[f32; 256],
        codes: &[u8],
        magnitudes: &[f32],
    ) -> Result<Moment8, Error> {
        let (blocks, found) = (count.div_ceil(MOMENT_BLOCK), codes.len());
        assert!(found >= count, "{found} codes for {count} values");
        assert_eq!(magnitudes.len(), blocks, "magnitudes of a moment's blocks");
        let mut whole = codes.to_vec();
        whole.resize(blocks * MOMENT_BLOCK, 0);
        let midpoints = values
            .windows(2)
            .map(|pair| f32::midpoint(pair[0], pair[1]));
        let table: Vec<f32> = values.iter().copied().chain(midpoints).collect();
        Ok(Moment8 {
            codes: self.upload_bytes(&whole)?,
            magnitudes: self.upload(magnitudes)?,
            table: self.upload(&table)?,
            count,
        })
    }

    /// A moment's codes (values) and magnitudes (blocks).
    ///
    /// # Errors
    /// As [`Device::read`].
    pub fn read_moment_8bit(&self, moment: &Moment8) -> Result<(Vec<u8>, Vec<f32>), Error> {
        let words = self.read_words(&moment.codes)?;
        let bytes = words.iter().flat_map(|word| word.to_le_bytes());
        let codes = bytes.take(moment.count).collect();
        Ok((codes, self.read(&moment.magnitudes)?))
    }

    /// One step of AdamW for all parameters; their gradients and moments are of the same length.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn adamw(
        &self,
        step: AdamW,
        parameters: &mut Buffer,
        gradients: &Buffer,
        first: &mut Buffer,
        second: &mut Buffer,
    ) {
        for other in [gradients, &*first, &*second] {
            assert_eq!(other.len(), parameters.len(), "lengths of AdamW's buffers");
        }
        if self.idle(parameters.len()) {
            return;
        }
        let (cubes, units) = self.units(parameters.len());
        adamw_kernel::launch(
            &self.client,
            cubes,
            units,
            parameters.arg(),
            gradients.arg(),
            first.arg(),
            second.arg(),
            step.arg(),
        );
    }

    /// As [`Device::adamw`] with moments in 8 bits. Where a buffer holds several tensors, each must begin with a block.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn adamw_8bit(
        &self,
        step: AdamW,
        parameters: &mut Buffer,
        gradients: &Buffer,
        first: &mut Moment8,
        second: &mut Moment8,
    ) {
        for other in [gradients.len(), first.count, second.count] {
            assert_eq!(other, parameters.len(), "lengths of AdamW's buffers");
        }
        if self.idle(parameters.len()) {
            return;
        }
        adamw_8bit_kernel::launch(
            &self.client,
            self.cubes(first.magnitudes.len()),
            CubeDim::new_1d(UNITS),
            parameters.arg(),
            gradients.arg(),
            first.codes.arg(),
            first.magnitudes.arg(),
            second.codes.arg(),
            second.magnitudes.arg(),
            first.table.arg(),
            second.table.arg(),
            step.arg(),
        );
    }
}
