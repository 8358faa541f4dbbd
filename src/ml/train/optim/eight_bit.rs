//! Moments in 8 bits: blocks of 256 values with one largest magnitude each, and a code into a table that is dense near 0
//! (Dettmers, Lewis, Shleifer and Zettlemoyer 2022, "8-bit optimizers via block-wise quantization"; bitsandbytes' tables).

use candle_core::{Device, Result, Tensor};
use rayon::prelude::*;

use crate::ml::quant::dynamic_map::Table;

/// Values that share a largest magnitude.
pub(crate) const BLOCK: usize = 256;

/// A moment of one parameter.
#[derive(Debug)]
pub(crate) struct Moment8 {
    codes: Vec<u8>,
    absmax: Vec<f32>,
    signed: bool,
}

/// One block of a moment.
pub(crate) struct Block<'a> {
    codes: &'a mut [u8],
    absmax: &'a mut f32,
    table: &'static Table,
}

impl Moment8 {
    /// All zeros.
    pub(crate) fn zero(count: usize, signed: bool) -> Self {
        Self {
            codes: vec![Table::of(signed).zero; count],
            absmax: vec![0.; count.div_ceil(BLOCK)],
            signed,
        }
    }

    /// Whether all values are finite.
    pub(crate) fn is_finite(&self) -> bool {
        self.absmax.iter().all(|value| value.is_finite())
    }

    /// The number of values.
    pub(crate) fn count(&self) -> usize {
        self.codes.len()
    }

    /// The blocks, in parallel.
    pub(crate) fn blocks(&mut self) -> impl IndexedParallelIterator<Item = Block<'_>> {
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
    pub(crate) fn tensors(&self) -> Result<(Tensor, Tensor)> {
        Ok((
            Tensor::from_slice(&self.codes, self.codes.len(), &Device::Cpu)?,
            Tensor::from_slice(&self.absmax, self.absmax.len(), &Device::Cpu)?,
        ))
    }

    /// Takes back what [`Moment8::tensors`] gave.
    pub(crate) fn restore(&mut self, codes: &Tensor, absmax: &Tensor) -> Result<()> {
        self.codes = codes.to_vec1()?;
        self.absmax = absmax.to_vec1()?;
        Ok(())
    }
}

impl Block<'_> {
    /// The values.
    pub(crate) fn read(&self) -> Vec<f32> {
        let table = &self.table.values;
        let value = |code: &u8| table.get(usize::from(*code)).copied().unwrap_or(0.);
        self.codes
            .iter()
            .map(|code| value(code) * *self.absmax)
            .collect()
    }

    /// Quantises new values with their own largest magnitude.
    pub(crate) fn write(&mut self, values: &[f32]) {
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
    fn codes_are_the_nearest() {
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
