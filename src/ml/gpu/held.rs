//! Trained tensors, their gradients and moments on a GPU. Tensors of a group lie one after the other in as few buffers as the adapter's limit
//! allows, so that a step is one launch for each of these.

use std::sync::{Arc, Mutex};

use candle_core::{Result, TensorId, Var, bail};
use pipeline_kernels_gpu as gpu;

use super::copies::{Copies, HeldTensor, failed, lock};
use crate::ml::fused::weights::TensorView;
use crate::ml::quant::dynamic_map::Table;
use crate::ml::resident::{
    AdamWStep, MomentRef, MomentValues, Resident, TrainedTensor, TrainedValues,
};

/// Tensors begin at multiples of this: those of 8-bit moments with a block.
const ALIGNMENT: usize = gpu::MOMENT_BLOCK.next_multiple_of(gpu::PART_ALIGNMENT);

/// The two moments of a chunk.
#[expect(clippy::large_enum_variant, reason = "there are few chunks")]
enum Moments {
    Full([gpu::Buffer; 2]),
    Eight([gpu::Moment8; 2]),
}

/// Buffers of tensors of one group, whose moments are in one form.
struct Chunk {
    group: usize,
    values: gpu::Buffer,
    gradients: gpu::Buffer,
    moments: Moments,
}

/// What the tensors of a chunk have in common, and its words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Size {
    group: usize,
    is_eight_bit: bool,
    words: usize,
}

/// Where a tensor is: its chunk, its first word there and the number of its elements.
#[derive(Debug, Clone, Copy)]
struct Place {
    id: TensorId,
    chunk: usize,
    start: usize,
    count: usize,
}

/// See [`Resident`].
pub(super) struct Held {
    device: Arc<gpu::Device>,
    copies: Arc<Mutex<Copies>>,
    chunks: Vec<Chunk>,
    places: Vec<Place>,
}

/// Finds a place for each tensor in chunks of at most `most` words, unless it is larger itself.
fn places(tensors: &[TrainedTensor<'_>], most: usize) -> (Vec<Place>, Vec<Size>) {
    let mut chunks: Vec<Size> = Vec::new();
    let place = |tensor: &TrainedTensor<'_>| {
        let count = tensor.var.elem_count();
        let (group, is_eight_bit) = (tensor.group, matches!(tensor.first, MomentRef::Eight(..)));
        let last = chunks
            .iter()
            .rposition(|size| (size.group, size.is_eight_bit) == (group, is_eight_bit));
        let fits = |chunk: &usize| chunks[*chunk].words.next_multiple_of(ALIGNMENT) + count <= most;
        let chunk = last.filter(fits).unwrap_or_else(|| {
            chunks.push(Size {
                group,
                is_eight_bit,
                words: 0,
            });
            chunks.len() - 1
        });
        let start = chunks[chunk].words.next_multiple_of(ALIGNMENT);
        chunks[chunk].words = start + count;
        Place {
            id: tensor.var.as_tensor().id(),
            chunk,
            start,
            count,
        }
    };
    let places = tensors.iter().map(place).collect();
    (places, chunks)
}

/// Copies a tensor's part of a whole.
fn put<T: Copy>(whole: &mut [T], start: usize, part: &[T], count: usize) -> Result<()> {
    match whole.get_mut(start..start + count) {
        Some(whole) if part.len() == count => {
            whole.copy_from_slice(part);
            Ok(())
        }
        _ => bail!("{} values of a trained tensor that has {count}", part.len()),
    }
}

/// The first or the second moments of a chunk's tensors, as they are copied to the device.
fn eight_bit<'a>(
    device: &gpu::Device,
    words: usize,
    signed: bool,
    own: impl Iterator<Item = (&'a MomentRef<'a>, &'a Place)>,
) -> Result<gpu::Moment8> {
    let table = Table::get(signed);
    let Ok(values) = <&[f32; 256]>::try_from(table.values.as_slice()) else {
        bail!("a table of {} values of 8 bits", table.values.len())
    };
    let mut codes = vec![table.zero; words];
    let mut magnitudes = vec![0f32; words.div_ceil(gpu::MOMENT_BLOCK)];
    for (moment, place) in own {
        let MomentRef::Eight(own, absmax) = moment else {
            bail!("moments of one chunk are in two forms")
        };
        put(&mut codes, place.start, own, place.count)?;
        let blocks = place.count.div_ceil(gpu::MOMENT_BLOCK);
        put(
            &mut magnitudes,
            place.start / gpu::MOMENT_BLOCK,
            absmax,
            blocks,
        )?;
    }
    let made = device.moment_8bit_of(words, values, &codes, &magnitudes);
    made.map_err(failed)
}

/// The same in f32.
fn full<'a>(
    device: &gpu::Device,
    words: usize,
    own: impl Iterator<Item = (&'a MomentRef<'a>, &'a Place)>,
) -> Result<gpu::Buffer> {
    let mut all = vec![0f32; words];
    for (moment, place) in own {
        let MomentRef::Full(own) = moment else {
            bail!("moments of one chunk are in two forms")
        };
        put(&mut all, place.start, own, place.count)?;
    }
    device.upload(&all).map_err(failed)
}

impl Chunk {
    /// Copies those of the tensors that belong to chunk `number`.
    fn new(
        device: &gpu::Device,
        number: usize,
        size: Size,
        tensors: &[TrainedTensor<'_>],
        places: &[Place],
    ) -> Result<Self> {
        let words = size.words;
        let own = || {
            let all = tensors.iter().zip(places);
            all.filter(move |(_, place)| place.chunk == number)
        };
        let mut values = vec![0f32; words];
        for (tensor, place) in own() {
            let view = TensorView::tensor(tensor.var);
            put(&mut values, place.start, view.floats()?, place.count)?;
        }
        let first = || own().map(|(tensor, place)| (&tensor.first, place));
        let second = || own().map(|(tensor, place)| (&tensor.second, place));
        let moments = if size.is_eight_bit {
            Moments::Eight([
                eight_bit(device, words, true, first())?,
                eight_bit(device, words, false, second())?,
            ])
        } else {
            Moments::Full([
                full(device, words, first())?,
                full(device, words, second())?,
            ])
        };
        let values = device.upload(&values).map_err(failed)?;
        let mut gradients = device.allocate(words).map_err(failed)?;
        device.clear(&mut gradients);
        Ok(Self {
            group: size.group,
            values,
            gradients,
            moments,
        })
    }

    /// Copies its tensors back: for each place of this chunk what is there.
    fn read(
        &self,
        device: &gpu::Device,
        mut each: impl FnMut(&dyn Fn(&Place) -> TrainedValues),
    ) -> Result<()> {
        let values = device.read(&self.values).map_err(failed)?;
        let part = |all: &[f32], place: &Place| all[place.start..][..place.count].to_vec();
        match &self.moments {
            Moments::Full([first, second]) => {
                let first = device.read(first).map_err(failed)?;
                let second = device.read(second).map_err(failed)?;
                each(&|place| TrainedValues {
                    values: part(&values, place),
                    first: MomentValues::Full(part(&first, place)),
                    second: MomentValues::Full(part(&second, place)),
                });
            }
            Moments::Eight([first, second]) => {
                let first = device.read_moment_8bit(first).map_err(failed)?;
                let second = device.read_moment_8bit(second).map_err(failed)?;
                let moment = |(codes, absmax): &(Vec<u8>, Vec<f32>), place: &Place| {
                    let blocks = place.count.div_ceil(gpu::MOMENT_BLOCK);
                    let block = place.start / gpu::MOMENT_BLOCK;
                    MomentValues::Eight(
                        codes[place.start..][..place.count].to_vec(),
                        absmax[block..][..blocks].to_vec(),
                    )
                };
                each(&|place| TrainedValues {
                    values: part(&values, place),
                    first: moment(&first, place),
                    second: moment(&second, place),
                });
            }
        }
        Ok(())
    }
}

impl Held {
    /// Copies trained tensors and their moments to the device, and has passes use them there.
    pub(super) fn new(
        device: &Arc<gpu::Device>,
        copies: &Arc<Mutex<Copies>>,
        tensors: &[TrainedTensor<'_>],
    ) -> Result<Self> {
        let most = usize::try_from(device.adapter().largest_binding / 4).unwrap_or(usize::MAX);
        let (places, sizes) = places(tensors, most);
        let chunks = sizes.into_iter().enumerate();
        let chunks =
            chunks.map(|(number, size)| Chunk::new(device, number, size, tensors, &places));
        let chunks = chunks.collect::<Result<Vec<_>>>()?;
        let mut known = lock(copies);
        for (tensor, place) in tensors.iter().zip(&places) {
            let chunk = &chunks[place.chunk];
            let part = |buffer: &gpu::Buffer| buffer.part(place.start, place.count);
            let weight = match tensor.var.dims() {
                [rows, columns] => {
                    let weight = gpu::Device::weight_in(part(&chunk.values), *rows, *columns);
                    Some(Arc::new(weight))
                }
                _ => None,
            };
            let held = HeldTensor {
                weight,
                values: Arc::new(part(&chunk.values)),
                gradient: part(&chunk.gradients),
            };
            known.hold(place.id, held);
        }
        drop(known);
        Ok(Self {
            device: Arc::clone(device),
            copies: Arc::clone(copies),
            chunks,
            places,
        })
    }
}

impl Resident for Held {
    fn squared_norm(&self) -> Result<f64> {
        let all = self.chunks.iter().map(|chunk| &chunk.gradients);
        let all: Vec<&gpu::Buffer> = all.collect();
        self.device.sum_of_squares(&all).map_err(failed)
    }

    fn step(&mut self, grad_factor: f32, steps: &[AdamWStep]) {
        for chunk in &mut self.chunks {
            let Some(step) = steps.get(chunk.group) else {
                continue;
            };
            let step = gpu::AdamW {
                beta1: step.beta1,
                beta2: step.beta2,
                keep: step.keep,
                step_size: step.step_size,
                root: step.root,
                epsilon: step.epsilon,
                grad_factor,
            };
            let (values, gradients) = (&mut chunk.values, &chunk.gradients);
            match &mut chunk.moments {
                Moments::Full([first, second]) => {
                    self.device.adamw(step, values, gradients, first, second);
                }
                Moments::Eight([first, second]) => {
                    self.device
                        .adamw_8bit(step, values, gradients, first, second);
                }
            }
        }
        self.clear_gradients();
    }

    fn clear_gradients(&mut self) {
        for chunk in &mut self.chunks {
            self.device.clear(&mut chunk.gradients);
        }
    }

    fn read(&self) -> Result<Vec<TrainedValues>> {
        let mut all = vec![None; self.places.len()];
        for (number, chunk) in self.chunks.iter().enumerate() {
            chunk.read(&self.device, |tensor| {
                for (place, out) in self.places.iter().zip(&mut all) {
                    if place.chunk == number {
                        *out = Some(tensor(place));
                    }
                }
            })?;
        }
        Ok(all.into_iter().flatten().collect())
    }
}

impl Drop for Held {
    /// The host's values count again.
    fn drop(&mut self) {
        let mut copies = lock(&self.copies);
        for place in &self.places {
            copies.release(place.id);
        }
    }
}

/// The gradient of a tensor that is held.
pub(super) fn gradient(copies: &Copies, var: &Var) -> Option<gpu::Buffer> {
    let gradient = &copies.held(var.as_tensor().id())?.gradient;
    Some(gradient.part(0, gradient.len()))
}
