//! The slots of one parameter, in f32 or in 8 bits, and the spans of it that are updated by different tasks.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Result, Tensor, bail};

use super::eight_bit::{self, BLOCK, Moment8};
use super::{Change, Slot};
use crate::ml::resident::{MomentRef, MomentValues};

/// The number of elements that one task updates; a multiple of the 8-bit block.
pub(super) const SPAN: usize = 1 << 14;

/// The bytes of a slot of so many elements in 8 bits.
pub(super) fn eight_bit_bytes(count: usize) -> usize {
    count + count.div_ceil(BLOCK) * size_of::<f32>()
}

/// The values of one slot.
#[derive(Debug)]
pub(super) enum Values {
    Full(Vec<f32>),
    Eight(Moment8),
}

/// The slots of one parameter.
#[derive(Debug)]
pub(super) struct State(pub(super) Vec<Values>);

/// A span of all slots of a parameter, which are all in f32 or all in 8 bits.
#[derive(Default)]
pub(super) struct Span<'a> {
    full: Vec<&'a mut [f32]>,
    eight: Vec<eight_bit::Span<'a>>,
}

impl Values {
    pub(super) fn is_finite(&self) -> bool {
        match self {
            Self::Full(values) => values.iter().all(|value| value.is_finite()),
            Self::Eight(moment) => moment.is_finite(),
        }
    }

    /// The values as a moment of `AdamW`.
    pub(super) fn moment(&self) -> MomentRef<'_> {
        match self {
            Self::Full(values) => MomentRef::Full(values),
            Self::Eight(moment) => {
                let (codes, absmax) = moment.parts();
                MomentRef::Eight(codes, absmax)
            }
        }
    }

    /// The values of a moment of `AdamW`.
    pub(super) fn of_moment(moment: MomentValues, signed: bool) -> Self {
        match moment {
            MomentValues::Full(values) => Self::Full(values),
            MomentValues::Eight(codes, absmax) => {
                Self::Eight(Moment8::of_parts(codes, absmax, signed))
            }
        }
    }

    /// Adds the values to the tensors of a checkpoint.
    pub(super) fn save(&self, name: &str, tensors: &mut BTreeMap<String, Tensor>) -> Result<()> {
        match self {
            Self::Full(values) => {
                let tensor = Tensor::from_slice(values, values.len(), &Device::Cpu)?;
                tensors.insert(name.to_owned(), tensor);
            }
            Self::Eight(moment) => {
                let (codes, absmax) = moment.tensors()?;
                tensors.insert(name.to_owned(), codes);
                tensors.insert(format!("{name}.absmax"), absmax);
            }
        }
        Ok(())
    }

    /// Reads the values called `name` from the tensors of a checkpoint. It is an error if they have another type or size than these.
    pub(super) fn load(&self, name: &str, tensors: &BTreeMap<String, Tensor>) -> Result<Self> {
        let get = |name: &str, dtype: DType, count: usize| match tensors.get(name) {
            Some(tensor) if tensor.dtype() == dtype && tensor.dims() == [count] => Ok(tensor),
            _ => bail!("the checkpoint has no fitting `{name}`"),
        };
        Ok(match self {
            Self::Full(values) => Self::Full(get(name, DType::F32, values.len())?.to_vec1()?),
            Self::Eight(moment) => {
                let count = moment.count();
                let blocks = count.div_ceil(BLOCK);
                let codes = get(name, DType::U8, count)?;
                let absmax = get(&format!("{name}.absmax"), DType::F32, blocks)?;
                Self::Eight(moment.with(codes, absmax)?)
            }
        })
    }
}

impl State {
    /// Slots of zeros. Only those of rules that update spans can be in 8 bits.
    pub(super) fn new(slots: Vec<Slot>, eight_bit: bool) -> Self {
        let values = slots.into_iter().map(|slot| {
            if eight_bit {
                Values::Eight(Moment8::zero(slot.count, slot.signed))
            } else {
                Values::Full(vec![0.; slot.count])
            }
        });
        Self(values.collect())
    }

    /// Splits the slots of a parameter of `count` elements into spans of [`SPAN`] elements; the last one may be shorter.
    pub(super) fn spans(&mut self, count: usize) -> Vec<Span<'_>> {
        let mut spans: Vec<Span<'_>> = Vec::new();
        spans.resize_with(count.div_ceil(SPAN), Span::default);
        for values in &mut self.0 {
            match values {
                Values::Full(values) => {
                    for (span, part) in spans.iter_mut().zip(values.chunks_mut(SPAN)) {
                        span.full.push(part);
                    }
                }
                Values::Eight(moment) => {
                    for (span, part) in spans.iter_mut().zip(moment.spans(SPAN)) {
                        span.eight.push(part);
                    }
                }
            }
        }
        spans
    }

    /// Updates the whole parameter, given its values and gradients, by slots in f32.
    pub(super) fn update(&mut self, p: &mut [f32], g: &[f32], update: &Change) {
        let slots = self.0.iter_mut().filter_map(|values| match values {
            Values::Full(values) => Some(values.as_mut_slice()),
            Values::Eight(_) => None,
        });
        update(p, g, &mut slots.collect::<Vec<_>>());
    }
}

impl Span<'_> {
    /// Updates the same span of the parameter, given its values and gradients.
    pub(super) fn update(mut self, p: &mut [f32], g: &[f32], update: &Change) {
        if self.eight.is_empty() {
            update(p, g, &mut self.full);
            return;
        }
        let mut buffers = vec![[0f32; BLOCK]; self.eight.len()];
        let blocks = p.chunks_mut(BLOCK).zip(g.chunks(BLOCK));
        for (block, (p, g)) in blocks.enumerate() {
            for (span, buffer) in self.eight.iter().zip(&mut buffers) {
                span.read(block, buffer);
            }
            let mut slots: Vec<&mut [f32]> = buffers
                .iter_mut()
                .map(|buffer| &mut buffer[..p.len()])
                .collect();
            update(p, g, &mut slots);
            for (span, values) in self.eight.iter_mut().zip(&slots) {
                span.write(block, values);
            }
        }
    }
}
