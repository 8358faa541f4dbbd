//! The processor as a device: the crate `kernels` on vectors of floats that come from a pool.

use std::borrow::Cow;
use std::ops::Range;

use candle_core::{DType, Result, Tensor};
use pipeline_kernels::attention::{self, Gradients, Inputs, Spans};
use pipeline_kernels::dora;
use pipeline_kernels::dropout::Dropout;
use pipeline_kernels::elementwise;
use pipeline_kernels::gated::{self, Activation};
use pipeline_kernels::matrix::Matrix;
use pipeline_kernels::panels::{LANES, column, fill};
use pipeline_kernels::product::{self, Factor};
use pipeline_kernels::reduce::{self, Order};
use pipeline_kernels::vocabulary::{self, Summary};
use rayon::prelude::*;

use super::device::{Attention, Device, Onto, Part, Product, Rotary, Transpose};
use super::pool::Pool;
use super::weights::{BaseWeight, TensorView};
use crate::ml::model::CausalLm;
use crate::ml::model::autograd::scaled;
use crate::ml::model::linear::{Pass, Weight};

/// The processor.
#[derive(Debug, Default)]
pub(in crate::ml) struct Cpu {
    pub(super) pool: Pool,
}

impl Transpose for Matrix<'_> {
    fn transposed(self) -> Self {
        Matrix::transposed(self)
    }
}

/// Adds `factor` times a column to another.
fn add_column(out: &mut [f32], factor: f32, values: impl Iterator<Item = f32>) {
    for (out, value) in out.iter_mut().step_by(LANES).zip(values) {
        *out += factor * value;
    }
}

impl Device for Cpu {
    type Buffer = Vec<f32>;
    type Matrix<'a> = Matrix<'a>;
    type Vector<'a> = &'a [f32];
    type Rounded = Factor<'static>;
    type Spans = Spans;
    type Numbers = Vec<u64>;
    type Summaries = Vec<Summary>;

    const ON_HOST: bool = true;
    const HAS_F16: bool = false;

    fn expect(&self, panels: usize) {
        self.pool.expect(panels);
    }

    fn begin(&self, _: &CausalLm, panels: usize) {
        self.pool.begin(panels);
    }

    fn take(&self, length: usize) -> Vec<f32> {
        self.pool.take(length)
    }

    fn zeros(&self, length: usize) -> Vec<f32> {
        vec![0.; length]
    }

    fn give(&self, buffer: Vec<f32>) {
        self.pool.give(buffer);
    }

    fn length(&self, buffer: &Vec<f32>) -> usize {
        buffer.len()
    }

    fn shorten(&self, buffer: &mut Vec<f32>, length: usize) {
        buffer.truncate(length);
    }

    fn upload(&self, values: Vec<f32>) -> Vec<f32> {
        values
    }

    fn take_values(&self, buffers: Vec<Vec<f32>>) -> Result<Vec<Vec<f32>>> {
        Ok(buffers)
    }

    fn host<'b>(&self, buffer: &'b mut Vec<f32>) -> Option<&'b mut Vec<f32>> {
        Some(buffer)
    }

    fn matrix<'a>(&'a self, weight: &'a BaseWeight<'_>) -> Result<Matrix<'a>> {
        weight.matrix()
    }

    fn rows<'a>(&'a self, weight: &'a TensorView<'_>, rows: Range<usize>) -> Result<Matrix<'a>> {
        weight.rows(rows)
    }

    fn vector<'a>(&'a self, values: &'a TensorView<'_>) -> Result<&'a [f32]> {
        values.floats()
    }

    fn spans(&self, spans: &Spans) -> Spans {
        spans.clone()
    }

    fn numbers(&self, numbers: &[u64]) -> Vec<u64> {
        numbers.to_vec()
    }

    fn round(&self, x: &Vec<f32>, features: usize) -> Factor<'static> {
        self.pool.rounded(x, features)
    }

    fn give_rounded(&self, rounded: Factor<'static>) {
        self.pool.give_rounded(rounded);
    }

    fn products(&self, all: Vec<Product<'_, '_, Self>>) {
        let terms = all.iter().flat_map(|each| &each.terms);
        let exact: Vec<Factor<'_>> = terms.map(|term| Factor::F32(term.x.x)).collect();
        let mut exact = exact.iter();
        let each = all.into_iter().map(|each| {
            let terms = each.terms.into_iter().zip(&mut exact);
            product::Product {
                out: each.out,
                terms: terms
                    .map(|(term, exact)| product::Term {
                        weight: term.weight,
                        x: term.x.rounded.as_ref().unwrap_or(exact),
                    })
                    .collect(),
                onto: match each.onto {
                    Onto::Zero => product::Onto::Zero,
                    Onto::Out => product::Onto::Out,
                    Onto::Values(values) => product::Onto::Values(values),
                },
                bias: each.bias,
            }
        });
        product::products(each.collect());
    }

    fn outer(
        &self,
        a: (&Vec<f32>, usize),
        b: (&Vec<f32>, usize),
        out: &mut Vec<f32>,
        first: usize,
        order: Order,
    ) {
        let out = &mut out[first..][..a.1 * b.1];
        reduce::outer((a.0, a.1), (b.0, b.1), out, order);
    }

    fn sum_over_tokens(&self, x: &Vec<f32>, tokens: usize, out: &mut Vec<f32>) {
        reduce::sum_over_tokens(x, tokens, out);
    }

    fn copy(&self, from: &Vec<f32>, to: &mut Vec<f32>) {
        const SPAN: usize = 1 << 14;
        to.par_chunks_mut(SPAN)
            .zip(from.par_chunks(SPAN))
            .for_each(|(to, from)| to.copy_from_slice(from));
    }

    fn copy_features(
        &self,
        (from, source): (&Vec<f32>, Part),
        (to, target): (&mut Vec<f32>, Part),
        count: usize,
    ) {
        let to = to.par_chunks_mut(target.features.max(1) * LANES);
        let from = from.par_chunks(source.features.max(1) * LANES);
        to.zip(from).for_each(|(to, from)| {
            let to = &mut to[target.first * LANES..][..count * LANES];
            to.copy_from_slice(&from[source.first * LANES..][..count * LANES]);
        });
    }

    fn clear(&self, x: &mut Vec<f32>) {
        x.fill(0.);
    }

    fn clear_last_panel(&self, x: &mut Vec<f32>, features: usize) {
        let last = x.len().saturating_sub(features * LANES);
        x[last..].fill(0.);
    }

    fn clear_tokens(&self, x: &mut Vec<f32>, features: usize, tokens: impl Iterator<Item = usize>) {
        for token in tokens {
            let panel = &mut x[token / LANES * features * LANES..][..features * LANES];
            for value in panel.iter_mut().skip(token % LANES).step_by(LANES) {
                *value = 0.;
            }
        }
    }

    fn dropout(&self, dropout: Dropout, x: &mut Vec<f32>, features: usize, numbers: &Vec<u64>) {
        dropout.apply(x, features, numbers);
    }

    fn scale(&self, x: &mut Vec<f32>, factor: f32) {
        elementwise::scale(x, factor);
    }

    fn add(&self, x: &mut Vec<f32>, y: &Vec<f32>, factor: f32) {
        elementwise::add(x, y, factor);
    }

    fn scale_and_add(&self, x: &mut Vec<f32>, factor: f32, y: &Vec<f32>) {
        elementwise::scale_and_add(x, factor, y);
    }

    fn rms_norm(
        &self,
        x: &Vec<f32>,
        weight: &[f32],
        eps: f32,
        out: &mut Vec<f32>,
        inverse: &mut Vec<f32>,
    ) {
        elementwise::rms_norm(x, weight, eps, out, inverse);
    }

    fn rms_norm_onto(
        &self,
        x: &Vec<f32>,
        weight: &[f32],
        eps: f32,
        (residual, factor): (&Vec<f32>, f32),
        out: &mut Vec<f32>,
        inverse: &mut Vec<f32>,
    ) {
        elementwise::rms_norm_onto(x, weight, eps, (residual, factor), out, inverse);
    }

    fn rms_norm_recompute(
        &self,
        x: &Vec<f32>,
        weight: &[f32],
        inverse: &Vec<f32>,
        out: &mut Vec<f32>,
    ) {
        elementwise::rms_norm_recompute(x, weight, inverse, out);
    }

    fn rms_norm_backward(
        &self,
        x: &Vec<f32>,
        weight: &[f32],
        inverse: &Vec<f32>,
        grad_out: &Vec<f32>,
        grad_x: &mut Vec<f32>,
    ) {
        elementwise::rms_norm_backward(x, weight, inverse, grad_out, grad_x);
    }

    fn rms_norm_grad_weight(
        &self,
        x: &Vec<f32>,
        inverse: &Vec<f32>,
        grad_out: &Vec<f32>,
        grad_weight: &mut Vec<f32>,
    ) {
        elementwise::rms_norm_grad_weight(x, inverse, grad_out, grad_weight);
    }

    fn rope(&self, x: &mut Vec<f32>, features: usize, rotary: Rotary<'_, Self>, back: bool) {
        let rotary = elementwise::Rotary {
            cos: rotary.cos,
            sin: rotary.sin,
            pairs: rotary.pairs,
            width: rotary.width,
        };
        elementwise::rope(x, features, rotary, back);
    }

    fn row_factors(
        &self,
        base: Matrix<'_>,
        pair: (Matrix<'_>, Matrix<'_>),
        scaling: f32,
        magnitude: &[f32],
    ) -> [Vec<f32>; 2] {
        let mut inverse = vec![0f32; base.height()];
        dora::row_norms(base, pair, scaling, &mut inverse);
        for norm in &mut inverse {
            *norm = norm.recip();
        }
        let factors = magnitude
            .iter()
            .zip(&inverse)
            .map(|(m, inverse)| m * inverse);
        [factors.collect(), inverse]
    }

    fn scale_features(
        &self,
        x: &Vec<f32>,
        factors: &Vec<f32>,
        bias: Option<&[f32]>,
        onto: &Onto<'_, Self>,
        out: &mut Vec<f32>,
    ) {
        let onto = match onto {
            Onto::Zero => dora::Onto::Zero,
            Onto::Out => dora::Onto::Out,
            Onto::Values(values) => dora::Onto::Values(values),
        };
        dora::scale_features(x, factors, bias, onto, out);
    }

    fn feature_dots(&self, a: &Vec<f32>, b: &Vec<f32>, factors: &Vec<f32>, out: &mut Vec<f32>) {
        dora::feature_dots(a, b, factors, out);
    }

    fn gated_unit(
        &self,
        activation: Activation,
        gate: &Vec<f32>,
        up: &Vec<f32>,
        out: &mut Vec<f32>,
    ) {
        gated::gated_unit(activation, gate, up, out);
    }

    fn gated_unit_backward(
        &self,
        activation: Activation,
        gate: &mut Vec<f32>,
        up: &mut Vec<f32>,
        grad_out: &mut Vec<f32>,
    ) {
        gated::gated_unit_backward(activation, gate, up, grad_out);
    }

    fn attention(&self, inputs: Attention<'_, Self>, out: &mut Vec<f32>, log_sums: &mut Vec<f32>) {
        let Attention {
            q,
            k,
            v,
            heads,
            scores,
            spans,
        } = inputs;
        attention::attention(Inputs { q, k, v }, heads, scores, spans, out, log_sums);
    }

    fn attention_backward(
        &self,
        inputs: Attention<'_, Self>,
        (out, log_sums, grad_out): (&Vec<f32>, &Vec<f32>, &Vec<f32>),
        [grad_q, grad_k, grad_v]: [&mut Vec<f32>; 3],
    ) {
        let Attention {
            q,
            k,
            v,
            heads,
            scores,
            spans,
        } = inputs;
        attention::attention_backward(
            Inputs { q, k, v },
            heads,
            scores,
            spans,
            (out, log_sums, grad_out),
            &mut Gradients {
                q: grad_q,
                k: grad_k,
                v: grad_v,
            },
        );
    }

    fn lookup(
        &self,
        weight: &Weight,
        pass: Pass,
        ids: &[u32],
        factor: f64,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let weight = weight.value(pass);
        let index = Tensor::from_slice(ids, ids.len(), weight.device())?;
        let rows = weight.index_select(&index, 0)?;
        let rows = scaled(rows.to_dtype(DType::F32)?, factor)?.contiguous()?;
        let view = TensorView::tensor(&rows);
        let (values, features) = (view.floats()?, rows.dim(1)?);
        fill(out, features, ids.len(), |token| {
            values
                .get(token * features..(token + 1) * features)
                .unwrap_or_default()
        });
        Ok(())
    }

    fn gather(
        &self,
        x: &Vec<f32>,
        features: usize,
        tokens: &[usize],
        factor: f32,
        out: &mut Vec<f32>,
    ) {
        let rows: Vec<Vec<f32>> = tokens
            .iter()
            .map(|&token| column(x, features, token).map(|x| x * factor).collect())
            .collect();
        fill(out, features, tokens.len(), |row| {
            rows.get(row).map_or(&[], Vec::as_slice)
        });
    }

    fn scatter(
        &self,
        x: &Vec<f32>,
        features: usize,
        factors: &[f32],
        tokens: &[usize],
        out: &mut Vec<f32>,
    ) {
        for (row, (&token, &factor)) in tokens.iter().zip(factors).enumerate() {
            let out = &mut out[token / LANES * features * LANES + token % LANES..];
            add_column(out, factor, column(x, features, row));
        }
    }

    fn add_to_rows(
        &self,
        x: &Vec<f32>,
        features: usize,
        all: &[(usize, f32, usize)],
        out: &mut Vec<f32>,
    ) {
        for &(token, factor, row) in all {
            let row = &mut out[row * features..][..features];
            for (sum, value) in row.iter_mut().zip(column(x, features, token)) {
                *sum += factor * value;
            }
        }
    }

    fn pick(&self, x: &Vec<f32>, all: &[(usize, usize)], out: &mut Vec<f32>) {
        for &(from, to) in all {
            out[to] = x[from];
        }
    }

    fn summaries(&self, panels: usize) -> Vec<Summary> {
        vec![Summary::EMPTY; panels]
    }

    fn same_summaries(&self, summaries: &Vec<Summary>) -> Vec<Summary> {
        summaries.clone()
    }

    fn online_softmax(
        &self,
        logits: &mut Vec<f32>,
        ids: Range<usize>,
        softcap: Option<f32>,
        summaries: &mut Vec<Summary>,
    ) -> Vec<f32> {
        vocabulary::online_softmax(logits, ids, softcap, summaries).into_flattened()
    }

    fn summary_values<'s>(&self, summaries: &'s Vec<Summary>) -> Result<Cow<'s, [Summary]>> {
        Ok(Cow::Borrowed(summaries))
    }

    fn multiply(&self, x: &mut Vec<f32>, features: usize, factors: &Vec<f32>) {
        let (factors, _) = factors.as_chunks::<LANES>();
        let panels = x.par_chunks_mut(features.max(1) * LANES).zip(factors);
        panels.for_each(|(panel, factors)| {
            if factors.iter().all(|x| x.to_bits() == 1f32.to_bits()) {
                return;
            }
            for row in panel.as_chunks_mut::<LANES>().0 {
                for (x, factor) in row.iter_mut().zip(factors) {
                    *x *= factor;
                }
            }
        });
    }

    fn sum_capped(&self, logits: &Vec<f32>, softcap: f32, sums: &mut [[f64; LANES]]) -> Result<()> {
        vocabulary::sum_capped(logits, softcap, sums);
        Ok(())
    }

    fn soft_cap_slopes(&self, products: &mut Vec<f32>, softcap: f32) {
        vocabulary::soft_cap_slopes(products, softcap);
    }

    fn token_dots(
        &self,
        x: &Vec<f32>,
        features: usize,
        tokens: &[usize],
        weights: &[f64],
    ) -> Result<Vec<f64>> {
        let dot = |&token: &usize| {
            let column = column(x, features, token);
            column.zip(weights).map(|(x, w)| f64::from(x) * w).sum()
        };
        Ok(tokens.iter().map(dot).collect())
    }

    fn weighted_sum(
        &self,
        x: &Vec<f32>,
        features: usize,
        of_tokens: Vec<f32>,
        of_features: &[f64],
    ) -> Result<f64> {
        let mut total = 0f64;
        let panels = x.chunks_exact(features.max(1) * LANES);
        for (panel, weights) in panels.zip(of_tokens.chunks_exact(LANES)) {
            for (row, factor) in panel.chunks_exact(LANES).zip(of_features) {
                let row = row.iter().zip(weights).map(|(x, w)| x * w);
                total += f64::from(row.sum::<f32>()) * factor;
            }
        }
        Ok(total)
    }
}
