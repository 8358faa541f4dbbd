//! Embeddings and head with rows for new tokens, as by transformers' `resize_token_embeddings` (`modeling_utils.py`).

use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::tensors::{EMBEDDINGS, HEAD};
use super::tied;
use crate::ml::io::float::Float;
use crate::ml::io::rewrite::{Output, Written, rewrite};
use crate::ml::io::weights::{Entry, RawTensor};
use crate::ml::quant::nf4::Nf4;
use crate::ml::torch_rng::TorchRng;

/// The factor of the covariance from which new rows are drawn.
const EPSILON: f64 = 1e-9;
/// The rows that are read at a time.
const ROWS: usize = 4096;
/// The numbers that torch draws together, see [`TorchRng::normal`].
const GROUP: usize = 16;

/// How new rows begin.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum NewRows {
    /// Near the mean of the rows that are there (`mean_resizing`): drawn from the normal distribution with their mean and 1e-9 of their
    /// covariance (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models"). Where that is not positive definite, as
    /// with fewer rows than columns, they are the mean itself.
    Mean,
    /// Drawn from the normal distribution with a mean of 0 and this standard deviation (`initializer_range`).
    Normal(f64),
}

/// The result of resizing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The rows before.
    pub before: usize,
    /// The files of weights that were written.
    pub files: Vec<Written>,
}

/// Writes the model in `source` to the folder `out` with `rows` rows in its embeddings, and in its head if that is its own; the other tensors
/// and all types stay. `rows` is at least what there is. The files beside the weights are copied by `carry`, which is told whether the head is
/// tied.
///
/// The random numbers are those after `torch.manual_seed(seed)`, so that rows differ from transformers' by no more than rounding.
/// `progress` is called with the bytes of weights that were written and their total, and may stop with an error.
///
/// # Errors
/// The model has fewer rows than `rows` asks for, stores embeddings or head in 4 bits, or a file can't be read or written.
pub fn resize(
    source: &Path,
    out: &Path,
    rows: usize,
    begin: NewRows,
    seed: u64,
    progress: &mut dyn FnMut(u64, u64) -> anyhow::Result<()>,
) -> anyhow::Result<Report> {
    let (arch, weights) = tied::open(source)?;
    let (before, width) = (arch.vocab_size, arch.hidden_size);
    let added = rows
        .checked_sub(before)
        .with_context(|| format!("the model has {before} rows already, more than {rows}"))?;
    let mut rng = TorchRng::new(seed);
    let mut new = Vec::new();
    for name in [EMBEDDINGS, HEAD] {
        if !weights.contains(name) {
            continue;
        }
        ensure!(
            Nf4::stored_shape(&weights, name)?.is_none(),
            "`{name}` is stored in 4 bits and can't get new rows; add tokens to the dense model, and quantise it afterwards"
        );
        let raw = weights.raw(name)?;
        let float = Float::from_safetensors(raw.dtype).with_context(|| {
            format!(
                "the tensor `{name}` is stored as {:?}, expected F32, F16 or BF16",
                raw.dtype
            )
        })?;
        ensure!(
            raw.shape == [before, width],
            "the tensor `{name}` has the shape {:?}, expected {:?} from config.json",
            raw.shape,
            [before, width]
        );
        let values = if added == 0 {
            Vec::new()
        } else {
            // transformers first makes a module of the new size, whose own beginning takes random numbers: normal ones for embeddings, uniform
            // ones for a head.
            let all = rows * width;
            if name == EMBEDDINGS && !all.is_multiple_of(GROUP) {
                rng.skip(all + GROUP);
            } else {
                rng.skip(all);
            }
            let drawn = drawn(&raw, float, added, begin, &mut rng);
            drawn.with_context(|| format!("could not make rows for `{name}`"))?
        };
        let mut bytes = vec![0; values.len() * float.size()];
        float.write(&values, &mut bytes);
        new.push((name, raw, bytes));
    }
    let total = weights.bytes();
    let mut done = 0;
    let outputs = |name: &str| -> anyhow::Result<Vec<Output<'_>>> {
        let Some((_, raw, new)) = new.iter().find(|(own, ..)| *own == name) else {
            return Ok(vec![Output::same(&weights, name)?]);
        };
        let entry = Entry::new(name, raw.dtype, [rows, width]);
        let fill = move |first: usize, bytes: &mut [u8]| {
            let old = raw.size().saturating_sub(first).min(bytes.len());
            raw.read(first, &mut bytes[..old])?;
            let start = first + old - raw.size().min(first + old);
            let rest = bytes.len() - old;
            bytes[old..].copy_from_slice(&new[start..start + rest]);
            Ok(())
        };
        Ok(vec![Output::pieces(entry, fill)])
    };
    let mut written = |name: &str| {
        done += weights.size_of(name);
        progress(done, total)
    };
    let files = rewrite(&weights, out, outputs, &mut written)?;
    Ok(Report { before, files })
}

/// New rows in f32, one after the other.
fn drawn(
    raw: &RawTensor<'_>,
    float: Float,
    added: usize,
    begin: NewRows,
    rng: &mut TorchRng,
) -> anyhow::Result<Vec<f32>> {
    let [before, width] = *raw.shape else {
        bail!(
            "the tensor has the shape {:?}, expected a matrix",
            raw.shape
        );
    };
    let count = added * width;
    match begin {
        NewRows::Normal(std) => {
            let old = before * width;
            let mut values = if old.is_multiple_of(GROUP) && count.is_multiple_of(GROUP) {
                rng.skip(old);
                normal(rng, count)?
            } else {
                normal(rng, old + count)?.split_off(old)
            };
            for x in &mut values {
                *x *= std as f32;
            }
            Ok(values)
        }
        NewRows::Mean => {
            let mean = mean(raw, float)?;
            let factor = factor(&covariance(raw, float, &mean)?, width);
            let mut values = mean.repeat(added);
            if let Some(factor) = factor {
                let draws = normal(rng, count)?;
                let rows = values.par_chunks_mut(width).zip(draws.par_chunks(width));
                rows.for_each(|(row, draws)| {
                    for (i, x) in row.iter_mut().enumerate() {
                        let factor = &factor[i * width..=i * width + i];
                        let noise = factor.iter().zip(draws).map(|(l, z)| l * f64::from(*z));
                        *x += noise.sum::<f64>() as f32;
                    }
                });
            }
            Ok(values)
        }
    }
}

/// Standard normal numbers as torch draws them; it has another way for fewer than [`GROUP`], of which the first of a group stand in here.
fn normal(rng: &mut TorchRng, count: usize) -> anyhow::Result<Vec<f32>> {
    let mut values = rng.normal(count.max(GROUP))?;
    values.truncate(count);
    Ok(values)
}

/// Calls `take` with some rows after the other (rows, width), in f32.
fn each_part(
    raw: &RawTensor<'_>,
    float: Float,
    take: &mut dyn FnMut(Vec<f32>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let part = raw.shape.last().map_or(1, |width| width * ROWS) * float.size();
    for first in (0..raw.size()).step_by(part.max(1)) {
        let mut bytes = vec![0; part.min(raw.size() - first)];
        raw.read(first, &mut bytes)?;
        let mut values = vec![0f32; bytes.len() / float.size()];
        float.read(&bytes, &mut values);
        ensure!(
            values.iter().all(|x| x.is_finite()),
            "it holds a NaN or an infinity, so that its mean is none; look at where the model comes from"
        );
        take(values)?;
    }
    Ok(())
}

/// The mean of the rows (width).
fn mean(raw: &RawTensor<'_>, float: Float) -> anyhow::Result<Vec<f32>> {
    let [before, width] = *raw.shape else {
        return Ok(Vec::new());
    };
    let mut sums = vec![0f64; width];
    each_part(raw, float, &mut |values| {
        for row in values.chunks_exact(width) {
            for (sum, x) in sums.iter_mut().zip(row) {
                *sum += f64::from(*x);
            }
        }
        Ok(())
    })?;
    Ok(sums
        .into_iter()
        .map(|sum| (sum / before as f64) as f32)
        .collect())
}

/// The covariance of the rows (width, width), times [`EPSILON`].
fn covariance(raw: &RawTensor<'_>, float: Float, mean: &[f32]) -> anyhow::Result<Vec<f64>> {
    let (before, width) = (raw.shape.first().copied().unwrap_or(1), mean.len());
    let mut sums = vec![0f64; width * width];
    each_part(raw, float, &mut |mut values| {
        for row in values.chunks_exact_mut(width) {
            for (x, mean) in row.iter_mut().zip(mean) {
                *x -= mean;
            }
        }
        let rows = values.len() / width;
        let centred = Tensor::from_vec(values, (rows, width), &Device::Cpu)?;
        let product = centred.t()?.matmul(&centred)?;
        let product = product.flatten_all()?.to_vec1::<f32>()?;
        for (sum, x) in sums.iter_mut().zip(product) {
            *sum += f64::from(x);
        }
        Ok(())
    })?;
    let scale = EPSILON / before as f64;
    for sum in &mut sums {
        *sum *= scale;
    }
    Ok(sums)
}

/// The lower triangular matrix L (width, width) with L L^T = `matrix` (Cholesky's), if the matrix is positive definite in f32.
fn factor(matrix: &[f64], width: usize) -> Option<Vec<f64>> {
    let mut factor = vec![0f64; width * width];
    for j in 0..width {
        let (above, rest) = factor.split_at_mut((j + 1) * width);
        let row = above.get_mut(j * width..)?;
        let squares: f64 = row.iter().take(j).map(|x| x * x).sum();
        let own = matrix.get(j * width + j)?;
        let pivot = own - squares;
        // What is left is rounding where the matrix has not its full rank.
        let is_positive = pivot > own * f64::from(f32::EPSILON) * width as f64;
        if !is_positive {
            return None;
        }
        let diagonal = pivot.sqrt();
        row[j] = diagonal;
        let row = &row[..j];
        let below = rest.par_chunks_mut(width).enumerate();
        below.for_each(|(i, other)| {
            let dot: f64 = other.iter().zip(row).map(|(a, b)| a * b).sum();
            let at = (j + 1 + i) * width + j;
            other[j] = (matrix[at] - dot) / diagonal;
        });
    }
    Some(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_positive_definite_matrix_is_the_square_of_its_factor() {
        let matrix = [4., 2., -2., 2., 10., 2., -2., 2., 6.];
        let factor = factor(&matrix, 3).unwrap();
        for i in 0..3 {
            for j in 0..3 {
                let dot: f64 = (0..3).map(|k| factor[i * 3 + k] * factor[j * 3 + k]).sum();
                assert!((dot - matrix[i * 3 + j]).abs() < 1e-12);
            }
        }
        // Two equal rows.
        assert_eq!(super::factor(&[1., 1., 1., 1.], 2), None);
        assert_eq!(super::factor(&[0.], 1), None);
    }
}
