//! Pairs that begin with a part of the weight that they stand beside. What they add must be taken from the weight, so that nothing changes at
//! first.

use anyhow::{Context as _, ensure};
use candle_core::{Device, Tensor};

use super::{qr, svd};

/// The matrices A (r, in) and B (out, r) of a weight (out, in) and a scaling.
type Pair = (Tensor, Tensor);

fn flat(weight: &Tensor) -> anyhow::Result<(Vec<f32>, (usize, usize))> {
    Ok((weight.flatten_all()?.to_vec1()?, weight.dims2()?))
}

fn pair(
    a: Vec<f32>,
    b: Vec<f32>,
    (out, input): (usize, usize),
    r: usize,
) -> candle_core::Result<Pair> {
    Ok((
        Tensor::from_vec(a, (r, input), &Device::Cpu)?,
        Tensor::from_vec(b, (out, r), &Device::Cpu)?,
    ))
}

/// The pair whose product, times `scaling`, is nearest to the weight (out, in): its largest singular values and their vectors (`PiSSA`, Meng, Wang
/// and Zhang 2024, arXiv 2404.02948, equations 2 and 3; PEFT's `pissa_init`). PEFT's pair may have other signs, in A and B alike.
///
/// # Errors
/// The weight is no matrix, or its smaller dimension is below `r`.
pub(super) fn singular(weight: &Tensor, r: usize, scaling: f64) -> anyhow::Result<Pair> {
    let (values, shape) = flat(weight)?;
    let svd = svd::largest_singular_values(&values, shape, r)?;
    let scaled: Vec<f64> = svd.values.iter().map(|value| value / scaling).collect();
    let (a, b) = factors(&scaled, &svd, shape, r);
    Ok(pair(a, b, shape, r)?)
}

/// The matrices A (r, in) and B (out, r), row-major, of singular vectors, each times the roots of `values`.
pub(super) fn factors(
    values: &[f64],
    svd: &svd::Svd,
    (out, input): (usize, usize),
    r: usize,
) -> (Vec<f32>, Vec<f32>) {
    let (mut a, mut b) = (vec![0f32; r * input], vec![0f32; out * r]);
    for (k, value) in values.iter().enumerate() {
        let root = value.sqrt();
        let row = a[k * input..].iter_mut().zip(&svd.right[k]);
        row.for_each(|(a, v)| *a = (root * v) as f32);
        let column = b[k..].iter_mut().step_by(r).zip(&svd.left[k]);
        column.for_each(|(b, u)| *b = (root * u) as f32);
    }
    (a, b)
}

/// The first rows of R as A and the first columns of Q as B, of the decomposition of the weight (out, in) (`OLoRA`, Büyükakyüz 2024, arXiv
/// 2406.01775, algorithm 1; PEFT's `olora_init`).
///
/// # Errors
/// The weight is no matrix, or its smaller dimension is below `r`.
pub(super) fn orthonormal(weight: &Tensor, r: usize) -> anyhow::Result<Pair> {
    let (values, shape) = flat(weight)?;
    let qr = qr::leading(&values, shape, r)?;
    let narrow = |values: Vec<f64>| values.into_iter().map(|x| x as f32).collect();
    Ok(pair(narrow(qr.r), narrow(qr.q), shape, r)?)
}

/// The rows of a random orthogonal matrix (r, r) at even and at odd places, each (r / 2, r), row-major, of normal numbers (r, r).
///
/// # Errors
/// `r` is odd, or there are not `r * r` numbers.
pub(super) fn halves(normal: &[f32], r: usize) -> anyhow::Result<(Vec<f32>, Vec<f32>)> {
    ensure!(
        r.is_multiple_of(2) && r > 0,
        "`init_lora_weights: orthogonal` halves the rank, which is {r}; expected an even one"
    );
    let q = qr::leading(normal, (r, r), r)
        .context("could not make an orthogonal matrix")?
        .q;
    let rows = |first: usize| {
        let rows = q.chunks(r).skip(first).step_by(2).flatten();
        rows.map(|x| *x as f32).collect()
    };
    Ok((rows(0), rows(1)))
}
