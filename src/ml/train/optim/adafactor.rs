//! Adafactor (Shazeer and Stern 2018, arXiv 1804.04235) as transformers' trainer sets it up: `scale_parameter` and `relative_step` off, so that
//! the learning rate is that of the schedule; no first moment; a decay rate of `1 - t^-0.8` (algorithm 4 of the paper and its section 7.2).
//!
//! Sums are in f64 and in the order of memory, so bits don't depend on the number of threads.

use rayon::prelude::*;

use super::{Rule, Slot, Step, Update};

/// The number that is added to squared gradients (`eps[0]` in transformers).
const EPSILON: f64 = 1e-30;
/// The largest root mean square of an update before the learning rate (`clip_threshold`).
const CLIP_THRESHOLD: f64 = 1.;
/// The exponent of the decay rate (`decay_rate`).
const DECAY_EXPONENT: f64 = -0.8;

/// Adafactor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Adafactor;

impl Rule for Adafactor {
    /// For a matrix the means over its rows and over its columns, for a vector one value for each element.
    fn slots(&self, shape: &[usize]) -> Vec<Slot> {
        let slot = |name, count| Slot {
            name,
            signed: false,
            count,
        };
        match *shape {
            [rows, columns] => vec![slot("rows", rows), slot("columns", columns)],
            _ => vec![slot("v", shape.iter().product())],
        }
    }

    fn update(&self, step: Step, shape: &[usize]) -> Update {
        let beta2 = 1. - (step.number as f64).powf(DECAY_EXPONENT);
        let columns = match *shape {
            [_, columns] => Some(columns.max(1)),
            _ => None,
        };
        Update::Whole(Box::new(move |p, g, slots| {
            let mut update = match (columns, slots) {
                (Some(columns), [of_rows, of_columns]) => {
                    factored(g, columns, of_rows, of_columns, beta2)
                }
                (_, [v]) => {
                    for (v, g) in v.iter_mut().zip(g) {
                        *v = mean(*v, square(*g), beta2);
                    }
                    let update = g.iter().zip(v.iter());
                    update.map(|(g, v)| g / v.sqrt()).collect::<Vec<f32>>()
                }
                _ => unreachable!("a matrix has two slots, a vector one"),
            };
            let squares: f64 = update.iter().map(|x| f64::from(*x).powi(2)).sum();
            let rms = (squares / update.len().max(1) as f64).sqrt();
            let factor = step.learning_rate / (rms / CLIP_THRESHOLD).max(1.);
            let keep = (1. - step.weight_decay * step.learning_rate) as f32;
            for (p, update) in p.iter_mut().zip(&mut update) {
                *p = *p * keep - *update * factor as f32;
            }
        }))
    }
}

/// The square of a gradient, kept above 0.
fn square(g: f32) -> f64 {
    f64::from(g).powi(2) + EPSILON
}

/// A running mean after another value.
fn mean(before: f32, value: f64, beta2: f64) -> f32 {
    (f64::from(before) * beta2 + value * (1. - beta2)) as f32
}

/// Renews the means over rows and columns of the squares of the gradient `g` (rows, columns), and returns the gradient divided by the root of
/// their product, as in the paper's algorithm 4.
fn factored(
    g: &[f32],
    columns: usize,
    of_rows: &mut [f32],
    of_columns: &mut [f32],
    beta2: f64,
) -> Vec<f32> {
    let rows = of_rows.len().max(1) as f64;
    let lines = of_rows.par_iter_mut().zip(g.par_chunks(columns));
    lines.for_each(|(of_row, line)| {
        let sum: f64 = line.iter().map(|g| square(*g)).sum();
        *of_row = mean(*of_row, sum / columns as f64, beta2);
    });
    let mut sums = vec![0f64; columns];
    for line in g.chunks(columns) {
        for (sum, g) in sums.iter_mut().zip(line) {
            *sum += square(*g);
        }
    }
    for (of_column, sum) in of_columns.iter_mut().zip(sums) {
        *of_column = mean(*of_column, sum / rows, beta2);
    }
    let all: f64 = of_rows.iter().map(|x| f64::from(*x)).sum();
    let middle = (all / rows) as f32;
    let of_columns: Vec<f32> = of_columns.iter().map(|x| x.sqrt().recip()).collect();
    let mut update = g.to_vec();
    let lines = update.par_chunks_mut(columns).zip(of_rows.par_iter());
    lines.for_each(|(line, of_row)| {
        let of_row = (of_row / middle).sqrt().recip();
        for (update, of_column) in line.iter_mut().zip(&of_columns) {
            *update *= of_row * of_column;
        }
    });
    update
}
