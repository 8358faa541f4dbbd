//! Moments in 8 bits: blocks of 256 values with one largest magnitude each, and a code into a table that is dense near 0
//! (Dettmers, Lewis, Shleifer and Zettlemoyer 2022, "8-bit optimizers via block-wise quantization"; bitsandbytes' tables).

use std::sync::LazyLock;

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

/// Values that share a largest magnitude.
pub(super) const BLOCK: usize = 256;

/// A table of 256 values in rising order, and the midpoints between neighbours.
struct Table {
    values: Vec<f32>,
    midpoints: Vec<f32>,
    zero: u8,
}

static SIGNED: LazyLock<Table> = LazyLock::new(|| Table::new(true));
static UNSIGNED: LazyLock<Table> = LazyLock::new(|| Table::new(false));

impl Table {
    /// For each power of ten from 1e-6 to 1: evenly spaced fractions, twice as many as for the power below.
    fn new(signed: bool) -> Self {
        let mut values = vec![0f32, 1.];
        for power in 0..7i32 {
            let count = (1usize << (power + i32::from(!signed))) + 1;
            let step = (1f32 - 0.1) / (count - 1) as f32;
            let edge = |i: usize| {
                // torch's `linspace`: from both ends, each value rounded once (fused multiply-add).
                if i < count / 2 {
                    step.mul_add(i as f32, 0.1)
                } else {
                    (-step).mul_add((count - 1 - i) as f32, 1.)
                }
            };
            for i in 0..count - 1 {
                let middle = f32::midpoint(edge(i), edge(i + 1));
                let value = (10f64.powi(power - 6) as f32) * middle;
                values.push(value);
                if signed {
                    values.push(-value);
                }
            }
        }
        values.sort_by(f32::total_cmp);
        let midpoints = values
            .windows(2)
            .map(|pair| f32::midpoint(pair[0], pair[1]))
            .collect();
        let zero = values.iter().position(|value| *value == 0.).unwrap_or(0) as u8;
        Self {
            values,
            midpoints,
            zero,
        }
    }

    fn of(signed: bool) -> &'static Self {
        if signed { &SIGNED } else { &UNSIGNED }
    }

    /// The code of the nearest value.
    fn code(&self, x: f32) -> u8 {
        self.midpoints.partition_point(|midpoint| *midpoint < x) as u8
    }
}

/// A moment of one parameter.
#[derive(Debug)]
pub(super) struct Moment8 {
    codes: Vec<u8>,
    absmax: Vec<f32>,
    signed: bool,
}

/// One block of a moment.
pub(super) struct Block<'a> {
    codes: &'a mut [u8],
    absmax: &'a mut f32,
    table: &'static Table,
}

impl Moment8 {
    /// All zeros.
    pub(super) fn zero(count: usize, signed: bool) -> Self {
        Self {
            codes: vec![Table::of(signed).zero; count],
            absmax: vec![0.; count.div_ceil(BLOCK)],
            signed,
        }
    }

    /// The number of values.
    pub(super) fn count(&self) -> usize {
        self.codes.len()
    }

    /// The blocks, in parallel.
    pub(super) fn blocks(&mut self) -> impl IndexedParallelIterator<Item = Block<'_>> {
        let table = Table::of(self.signed);
        let codes = self.codes.par_chunks_mut(BLOCK);
        codes
            .zip(&mut self.absmax)
            .map(move |(codes, absmax)| Block {
                codes,
                absmax,
                table,
            })
    }

    /// Codes and magnitudes.
    pub(super) fn tensors(&self) -> Result<(Tensor, Tensor)> {
        Ok((
            Tensor::from_slice(&self.codes, self.codes.len(), &Device::Cpu)?,
            Tensor::from_slice(&self.absmax, self.absmax.len(), &Device::Cpu)?,
        ))
    }

    /// Takes back what [`Moment8::tensors`] gave.
    pub(super) fn restore(&mut self, codes: &Tensor, absmax: &Tensor) -> Result<()> {
        self.codes = codes.to_vec1()?;
        self.absmax = absmax.to_vec1()?;
        Ok(())
    }
}

impl Block<'_> {
    /// The values.
    pub(super) fn read(&self) -> Vec<f32> {
        let table = &self.table.values;
        let value = |code: &u8| table.get(usize::from(*code)).copied().unwrap_or(0.);
        self.codes
            .iter()
            .map(|code| value(code) * *self.absmax)
            .collect()
    }

    /// Quantises new values with their own largest magnitude.
    pub(super) fn write(&mut self, values: &[f32]) {
        let absmax = values.iter().fold(0f32, |most, x| most.max(x.abs()));
        *self.absmax = absmax;
        let inverse = if absmax > 0. { 1. / absmax } else { 0. };
        for (code, x) in self.codes.iter_mut().zip(values) {
            *code = self.table.code(x * inverse);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_those_of_bitsandbytes() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/nf4.safetensors");
        let golden = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
        for (name, signed) in [("signed", true), ("unsigned", false)] {
            let theirs: Vec<f32> = golden[&format!("dynamic_map_{name}")].to_vec1().unwrap();
            let ours = &Table::of(signed).values;
            for (code, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
                assert_eq!(ours.to_bits(), theirs.to_bits(), "{name} {code}");
            }
            assert_eq!(theirs.len(), 256);
        }
    }

    #[test]
    fn codes_are_the_nearest() {
        let table = Table::of(true);
        for (code, value) in table.values.iter().enumerate() {
            assert_eq!(usize::from(table.code(*value)), code);
        }
        let mut moment = Moment8::zero(300, true);
        let values: Vec<f32> = (0..300).map(|i| (i as f32 * 0.37).sin()).collect();
        let mut blocks: Vec<Block<'_>> = moment.blocks().collect();
        assert_eq!(blocks.len(), 2);
        blocks[1].write(&values[256..]);
        let read = blocks[1].read();
        assert_eq!(read.len(), 44);
        for (a, b) in read.iter().zip(&values[256..]) {
            assert!((a - b).abs() < 0.02);
        }
        assert!(blocks[0].read().iter().all(|x| *x == 0.));
    }
}
