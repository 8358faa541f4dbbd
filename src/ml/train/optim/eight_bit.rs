//! Moments in 8 bits: blocks of 256 values that share their largest magnitude, and for each value a code of a data type that is dense near
//! 0 (Dettmers, Lewis, Shleifer and Zettlemoyer 2022, arXiv 2110.02861, section 2; bitsandbytes' data types).

use candle_core::{Device, Result, Tensor};

use crate::ml::quant::dynamic_map::Table;

/// The number of values in a block.
pub(crate) const BLOCK: usize = 256;

/// A quantised moment of one parameter.
#[derive(Debug)]
pub(crate) struct Moment8 {
    codes: Vec<u8>,
    absmax: Vec<f32>,
    signed: bool,
}

/// A span of a moment: whole blocks, of which the last one of the parameter may be incomplete.
pub(crate) struct Span<'a> {
    codes: &'a mut [u8],
    absmax: &'a mut [f32],
    table: &'static Table,
}

impl Moment8 {
    /// A moment of `count` zeros.
    pub(crate) fn zero(count: usize, signed: bool) -> Self {
        Self {
            codes: vec![Table::get(signed).zero; count],
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

    /// Splits the moment into spans of `length` values, a multiple of [`BLOCK`]; the last one may be shorter.
    pub(crate) fn spans(&mut self, length: usize) -> impl Iterator<Item = Span<'_>> {
        let table = Table::get(self.signed);
        let codes = self.codes.chunks_mut(length);
        let spans = codes.zip(self.absmax.chunks_mut(length / BLOCK));
        spans.map(move |(codes, absmax)| Span {
            codes,
            absmax,
            table,
        })
    }

    /// The codes (values) and the largest magnitudes (blocks).
    pub(crate) fn parts(&self) -> (&[u8], &[f32]) {
        (&self.codes, &self.absmax)
    }

    /// A moment of these codes and magnitudes.
    pub(crate) fn of_parts(codes: Vec<u8>, absmax: Vec<f32>, signed: bool) -> Self {
        Self {
            codes,
            absmax,
            signed,
        }
    }

    /// The codes (values) and the largest magnitudes (blocks) as tensors.
    pub(crate) fn tensors(&self) -> Result<(Tensor, Tensor)> {
        Ok((
            Tensor::from_slice(&self.codes, self.codes.len(), &Device::Cpu)?,
            Tensor::from_slice(&self.absmax, self.absmax.len(), &Device::Cpu)?,
        ))
    }

    /// The moment of the tensors that [`Moment8::tensors`] returned, of as many values as this one; other sizes are an error.
    pub(crate) fn with(&self, codes: &Tensor, absmax: &Tensor) -> Result<Self> {
        Ok(Self {
            codes: codes.to_vec1()?,
            absmax: absmax.to_vec1()?,
            signed: self.signed,
        })
    }
}

/// The indices of a block in a slice of `length` values.
fn block_of(number: usize, length: usize) -> std::ops::Range<usize> {
    number * BLOCK..((number + 1) * BLOCK).min(length)
}

impl Span<'_> {
    /// Dequantises one block into the start of `values`.
    pub(crate) fn read(&self, block: usize, values: &mut [f32; BLOCK]) {
        let table = &self.table.values;
        let absmax = self.absmax[block];
        let codes = &self.codes[block_of(block, self.codes.len())];
        for (value, code) in values.iter_mut().zip(codes) {
            *value = table[usize::from(*code)] * absmax;
        }
    }

    /// Quantises the new values of one block, with their own largest magnitude.
    pub(crate) fn write(&mut self, block: usize, values: &[f32]) {
        let absmax = values.iter().fold(0f32, |most, x| most.max(x.abs()));
        self.absmax[block] = absmax;
        let inverse = if absmax > 0. { 1. / absmax } else { 0. };
        let range = block_of(block, self.codes.len());
        for (code, x) in self.codes[range].iter_mut().zip(values) {
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
        let mut spans: Vec<Span<'_>> = moment.spans(256).collect();
        assert_eq!(spans.len(), 2);
        spans[1].write(0, &values[256..]);
        let mut read = [9.; BLOCK];
        spans[1].read(0, &mut read);
        for (a, b) in read.iter().zip(&values[256..]) {
            assert!((a - b).abs() < 0.02);
        }
        assert!(read[44..].iter().all(|x| x.to_bits() == 9f32.to_bits()));
        spans[0].read(0, &mut read);
        assert!(read.iter().all(|x| *x == 0.));
    }
}
