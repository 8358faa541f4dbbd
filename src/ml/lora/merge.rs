//! The merge of an adapter into the weights of its model: W + s B A (Hu et al. 2021, arXiv 2106.09685, section 4.1).

mod not_finite;

use std::borrow::Cow;
use std::cell::RefCell;
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use candle_core::{DType, Tensor};
use pipeline_kernels::merge as kernel;
use rayon::prelude::*;

use crate::ml::adapter::{Adapter, LoraPair, TokenRows};
use crate::ml::io::float::Float;
use crate::ml::io::rewrite::{Output, Written, rewrite};
use crate::ml::io::weights::{Entry, RawTensor, Weights};
use crate::ml::model::tensors::{EMBEDDINGS, HEAD, is_used, module_path, weight_name};
use crate::ml::model::tied;
use crate::ml::quant::nf4::{Nf4, PARTS};

/// The values that a thread takes at once.
const SPAN: usize = 1 << 12;

/// The result of a merge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The number of weights to which an update was added.
    pub merged: usize,
    /// The number of tensors that the adapter replaced: fully trained modules, and biases.
    pub replaced: usize,
    /// The number of 4-bit weights that are dense now.
    pub dequantised: usize,
    /// Whether the model's head was tied to its embeddings and is a tensor of its own now.
    pub untied: bool,
    /// The size of all tensors of the result in bytes.
    pub bytes: u64,
    /// The files of weights that were written.
    pub files: Vec<Written>,
}

/// Merges `adapter` into the model in `source` and writes the folder `out`, with the same files and types. Sums are computed in f32 and
/// rounded once. Memory holds a few MiB of the result at a time, or one 4-bit tensor.
///
/// With `DoRA` the rows of the sum are scaled to their trained norms (Liu et al. 2024, arXiv 2402.09353, equation 5). Tensors that the
/// adapter replaces get the model's type. As in PEFT, a tied head becomes its own tensor if only one of both ends is replaced.
///
/// The weights of a 4-bit model become dense, in the type from which they were quantised, and `quantization_config` is removed (Unsloth
/// calls this `merged_16bit`). `progress` is called with the bytes of weights used so far and their total, and may stop with an error.
///
/// # Errors
/// The adapter does not fit the model, a merged value is not finite, or a file can't be read or written.
pub fn merge(
    source: &Path,
    adapter: &Adapter,
    out: &Path,
    progress: &mut dyn FnMut(u64, u64) -> anyhow::Result<()>,
) -> anyhow::Result<Report> {
    let (config, weights) = tied::open(source)?;
    let tied = config.tie_word_embeddings;
    let adapter = &*adapter.beside(tied)?;
    let untied = adapter.unties(tied);
    check(adapter, &weights, tied)?;
    let total = weights.bytes();
    let progress = RefCell::new((0u64, progress));
    let mut report = Report {
        merged: adapter.tensors.len(),
        replaced: adapter.saved.len() + adapter.token_rows.len(),
        dequantised: 0,
        untied: false,
        bytes: 0,
        files: Vec::new(),
    };
    let mut dequantised = 0;
    let mut output = |name: &str, stored: &str| -> anyhow::Result<Output<'_>> {
        let update = name.strip_suffix(".weight").and_then(|path| {
            let pair = adapter.tensors.get(path)?;
            Some(Update::new(pair, adapter.config.scaling(path)))
        });
        let update = update.transpose()?;
        let weights = &weights;
        let owned = stored.to_owned();
        if let Some(((rows, columns), float)) = Nf4::stored_shape(weights, stored)? {
            dequantised += 1;
            let entry = Entry::new(name, float.stored(), [rows, columns]);
            let load = move || {
                let nf4 = Nf4::load(weights, &owned)?;
                let nf4 = nf4.with_context(|| format!("`{owned}` is not 4-bit"))?;
                let read = move |first: usize, _: &[u8], values: &mut [f32]| {
                    nf4.dequantise_from(first, values);
                };
                Ok(read)
            };
            return Ok(summed(entry, float, update, None, load));
        }
        let own = adapter.saved.get(name);
        let rows = adapter.token_rows.get(module_path(name));
        if own.is_none() && update.is_none() && rows.is_none() {
            let mut kept = if is_used(&config, stored) {
                Output::finite(weights, stored)?
            } else {
                Output::same(weights, stored)?
            };
            name.clone_into(&mut kept.entry.name);
            return Ok(kept);
        }
        let raw = weights.raw(stored)?;
        let float = float_type(stored, raw.dtype)?;
        let entry = Entry::new(name, raw.dtype, raw.shape);
        if let Some(rows) = rows {
            return with_rows(entry, float, own, rows, raw);
        }
        if let Some(tensor) = own {
            return Ok(replaced(entry, float, tensor, update));
        }
        let load = move || {
            Ok(move |_: usize, stored: &[u8], values: &mut [f32]| float.read(stored, values))
        };
        Ok(summed(entry, float, update, Some(raw), load))
    };
    let outputs = |name: &str| -> anyhow::Result<Vec<Output<'_>>> {
        if is_part(&weights, name) {
            return Ok(Vec::new());
        }
        let mut outputs = vec![output(name, name)?];
        if untied && name == EMBEDDINGS {
            outputs.push(output(HEAD, EMBEDDINGS)?);
        }
        Ok(outputs)
    };
    let mut written = |name: &str| {
        let (done, progress) = &mut *progress.borrow_mut();
        *done += weights.size_of(name);
        for part in PARTS {
            *done += weights.size_of(&format!("{name}{part}"));
        }
        progress(*done, total)
    };
    report.files = rewrite(&weights, out, outputs, &mut written)?;
    report.bytes = Weights::open(out)?.bytes();

    report.dequantised = dequantised;
    report.untied = untied;
    tied::carry(source, out, tied && !untied, |raw| {
        raw.remove("quantization_config");
    })?;
    Ok(report)
}

/// The output of a tensor of the adapter that replaces the model's, in the model's type, with an update added if there is one.
fn replaced(entry: Entry, float: Float, tensor: &Tensor, update: Option<Update>) -> Output<'_> {
    let load = move || {
        let values = tensor.to_dtype(DType::F32)?.flatten_all()?;
        let values = values.to_vec1::<f32>()?;
        Ok(move |first: usize, _: &[u8], out: &mut [f32]| {
            out.copy_from_slice(&values[first..first + out.len()]);
        })
    };
    summed(entry, float, update, None, load)
}

/// The output of embeddings or a head with rows of the adapter's, in the model's type. The others are the adapter's `own`, or those of the
/// model.
fn with_rows<'a>(
    entry: Entry,
    float: Float,
    own: Option<&'a Tensor>,
    rows: &TokenRows,
    raw: RawTensor<'a>,
) -> anyhow::Result<Output<'a>> {
    let (places, values) = (rows.by_id(), rows.floats()?);
    let width = rows.values.dim(1)?;
    let overlay = move |first: usize, out: &mut [f32]| {
        let (begin, end) = (first / width, (first + out.len()).div_ceil(width));
        let ids = u32::try_from(begin).unwrap_or(u32::MAX)..u32::try_from(end).unwrap_or(u32::MAX);
        for (id, place) in places.range(ids) {
            let row = &values[place * width..][..width];
            // The part of the row that is among the values asked for.
            let start = *id as usize * width;
            let from = first.max(start);
            let to = (first + out.len()).min(start + width);
            out[from - first..to - first].copy_from_slice(&row[from - start..to - start]);
        }
    };
    let overlay = std::sync::Arc::new(overlay);
    let whole = own
        .map(|tensor| tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>())
        .transpose()?;
    let whole = std::sync::Arc::new(whole);
    let stored = whole.is_none().then_some(raw);
    let load = move || {
        let (overlay, whole) = (overlay.clone(), whole.clone());
        Ok(move |first: usize, stored: &[u8], out: &mut [f32]| {
            match &*whole {
                Some(whole) => out.copy_from_slice(&whole[first..first + out.len()]),
                None => float.read(stored, out),
            }
            overlay(first, out);
        })
    };
    Ok(summed(entry, float, None, stored, load))
}

/// Whether the tensor called `name` is a part of a 4-bit weight.
fn is_part(weights: &Weights, name: &str) -> bool {
    PARTS.iter().any(|part| {
        name.strip_suffix(part)
            .is_some_and(|owner| weights.contains(owner))
    })
}

fn float_type(name: &str, dtype: safetensors::Dtype) -> anyhow::Result<Float> {
    let float = Float::from_safetensors(dtype);
    float.with_context(|| {
        format!("the tensor `{name}` is stored as {dtype:?}, expected F32, F16 or BF16")
    })
}

/// The name of the model's tensor that corresponds to a name in the adapter: a tied head is stored as the embeddings.
fn stored(name: &str, tied: bool) -> &str {
    if tied && name == HEAD {
        EMBEDDINGS
    } else {
        name
    }
}

/// Fails unless every pair of the adapter, and every tensor that it replaces, has a weight of its shape in the model.
fn check(adapter: &Adapter, weights: &Weights, tied: bool) -> anyhow::Result<()> {
    for (name, tensor) in &adapter.saved {
        let name = stored(name, tied);
        ensure!(
            weights.contains(name),
            "the adapter replaces `{name}`, which the model does not have; was it trained for another model?"
        );
        ensure!(
            Nf4::stored_shape(weights, name)?.is_none(),
            "the adapter replaces `{name}`, which the model stores in 4 bits; merge it into the dense model"
        );
        let raw = weights.raw(name)?;
        float_type(name, raw.dtype)?;
        ensure!(
            raw.shape == tensor.dims(),
            "the adapter's `{name}` has the shape {:?}, but the model's has {:?}; was it trained for another model?",
            tensor.dims(),
            raw.shape
        );
    }
    for (path, rows) in &adapter.token_rows {
        let name = weight_name(path);
        let name = stored(&name, tied);
        ensure!(
            weights.contains(name) && Nf4::stored_shape(weights, name)?.is_none(),
            "the adapter has rows for `{path}`, which the model lacks or stores in 4 bits; was it trained for another model?"
        );
        let raw = weights.raw(name)?;
        float_type(name, raw.dtype)?;
        match *raw.shape {
            [vocabulary, hidden] => rows.check(path, vocabulary, hidden)?,
            _ => bail!("`{name}` has the shape {:?}, expected a matrix", raw.shape),
        }
    }
    for (path, pair) in &adapter.tensors {
        let name = format!("{path}.weight");
        let name = stored(&name, tied);
        ensure!(
            weights.contains(name),
            "the adapter changes `{path}`, which the model does not have; was it trained for another model?"
        );
        let shape = if let Some(((rows, columns), _)) = Nf4::stored_shape(weights, name)? {
            vec![rows, columns]
        } else {
            let raw = weights.raw(name)?;
            float_type(name, raw.dtype)?;
            raw.shape.to_vec()
        };
        let fits = matches!(
            (pair.b.dims(), pair.a.dims(), &shape[..]),
            ([out, r], [rank, input], [rows, columns]) if out == rows && input == columns && r == rank
        );
        ensure!(
            fits,
            "the adapter's matrices for `{path}` have the shapes {:?} and {:?}, but the model's weight has {shape:?}; was it \
             trained for another model?",
            pair.b.dims(),
            pair.a.dims()
        );
    }
    Ok(())
}

/// The update s B A of one weight.
struct Update {
    a: Vec<f32>,
    b: Vec<f32>,
    columns: usize,
    scaling: f32,
    /// With `DoRA`, the norms that the rows of the sum get.
    magnitudes: Option<Vec<f32>>,
}

impl Update {
    fn new(pair: &LoraPair, scaling: f64) -> anyhow::Result<Self> {
        let values = |matrix: &Tensor| -> anyhow::Result<Vec<f32>> {
            Ok(matrix.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
        };
        Ok(Self {
            a: values(&pair.a)?,
            b: values(&pair.b)?,
            columns: pair.a.dim(1)?,
            scaling: scaling as f32,
            magnitudes: pair.magnitude.as_ref().map(values).transpose()?,
        })
    }

    /// Scales the rows of a complete sum to the norms that DoRA trained.
    fn rescale_rows(&self, values: &mut [f32]) {
        let magnitudes = self.magnitudes.as_deref().unwrap_or_default();
        let rows = values.par_chunks_mut(self.columns.max(1)).zip(magnitudes);
        rows.for_each(|(row, magnitude)| {
            let squares = row.iter().map(|x| f64::from(*x).powi(2));
            let factor = (f64::from(*magnitude) / squares.sum::<f64>().sqrt()) as f32;
            for x in row {
                *x *= factor;
            }
        });
    }

    /// Adds the update to the weight's values from index `first` on.
    fn add(&self, first: usize, values: &mut [f32]) {
        let update = kernel::Update {
            a: &self.a,
            b: &self.b,
            columns: self.columns,
            scaling: self.scaling,
        };
        kernel::add(update, first, values);
    }
}

/// The output W + s B A of one weight, computed in pieces, or at once if rows are scaled. `load` returns the function that computes values
/// of W from the index of the first one and, where W is `stored` as plain numbers of type `float`, their bytes.
fn summed<'a, R>(
    entry: Entry,
    float: Float,
    update: Option<Update>,
    stored: Option<RawTensor<'a>>,
    mut load: impl FnMut() -> anyhow::Result<R> + 'a,
) -> Output<'a>
where
    R: Fn(usize, &[u8], &mut [f32]) + Sync + 'a,
{
    if update
        .as_ref()
        .is_some_and(|update| update.magnitudes.is_some())
    {
        let count = entry.shape.iter().product();
        return Output::whole(entry, move || {
            let update = update.as_ref();
            let read = load()?;
            let mut bytes = vec![0; count * float.size()];
            if let Some(stored) = stored {
                stored.read(0, &mut bytes)?;
            }
            let mut values = vec![0f32; count];
            let stored = bytes.par_chunks(SPAN * float.size());
            let spans = values.par_chunks_mut(SPAN).zip(stored).enumerate();
            spans.for_each(|(span, (values, stored))| {
                read(span * SPAN, stored, values);
                if let Some(update) = update {
                    update.add(span * SPAN, values);
                }
            });
            if let Some(update) = update {
                update.rescale_rows(&mut values);
            }
            let read = |first: usize, _: &[u8], out: &mut [f32]| {
                out.copy_from_slice(&values[first..first + out.len()]);
            };
            sum(0, &mut bytes, float, None, None, &read)?;
            Ok(Cow::Owned(bytes))
        });
    }
    let mut read = None;
    Output::pieces(entry, move |first, bytes| {
        let read = match &mut read {
            Some(read) => read,
            none => none.insert(load()?),
        };
        if let Some(stored) = stored {
            stored.read(first, bytes)?;
        }
        let first = first / float.size();
        sum(first, bytes, float, update.as_ref(), stored, read)
    })
}

/// Computes values of W from the index of the first one and, where W is stored as plain numbers, their bytes.
type Read<'a> = dyn Fn(usize, &[u8], &mut [f32]) + Sync + 'a;

/// Computes the bytes of W + s B A from value `first` on. `read` computes the values of W, whose bytes are in `bytes` if it is `stored` as
/// plain numbers.
fn sum(
    first: usize,
    bytes: &mut [u8],
    float: Float,
    update: Option<&Update>,
    stored: Option<RawTensor<'_>>,
    read: &Read<'_>,
) -> anyhow::Result<()> {
    let spans = bytes.par_chunks_mut(SPAN * float.size()).enumerate();
    let finite = spans.map(|(span, bytes)| {
        let mut values = [0f32; SPAN];
        let values = &mut values[..bytes.len() / float.size()];
        let first = first + span * SPAN;
        read(first, bytes, values);
        if let Some(update) = update {
            update.add(first, values);
        }
        float.write(values, bytes);
        float.all_finite(bytes)
    });
    let finite = finite.reduce(|| true, |a, b| a && b);
    if finite {
        return Ok(());
    }
    let one = |at: usize| -> anyhow::Result<f32> {
        let (mut bytes, mut value) = (vec![0; float.size()], [0f32]);
        if let Some(stored) = stored {
            stored.read(at * float.size(), &mut bytes)?;
        }
        read(at, &bytes, &mut value);
        Ok(value[0])
    };
    bail!(not_finite::why(first, bytes, float, update, &one)?)
}

#[cfg(test)]
mod tests;
