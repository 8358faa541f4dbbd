//! A GPU as a device of [`super::fused`]: crate `kernels-gpu` on whatever graphics interface the machine has.
//!
//! Weights are copied to the device in the type in which they are stored: by the first pass that needs one, or all frozen ones at once, which
//! the host then gives up ([`taken`]). A training with `AdamW` keeps the trained tensors, their gradients and moments there
//! ([`held`]): a step copies ids, tables of them and a few numbers of each target. With other optimisers, which work on the host, trained
//! tensors are copied anew when a pass begins, and their gradients come out.

mod arguments;
mod cache;
mod copies;
mod held;
mod matrix;
mod tables;
mod taken;

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use candle_core::{DType, Result, Var};
use pipeline_kernels::FloatType;
use pipeline_kernels::attention::Spans;
use pipeline_kernels::dropout::Dropout;
use pipeline_kernels::gated::Activation;
use pipeline_kernels::matrix::Values;
use pipeline_kernels::panels::{LANES, size};
use pipeline_kernels::reduce::Order;
use pipeline_kernels::vocabulary::Summary;
use pipeline_kernels_gpu as gpu;

pub(in crate::ml) use arguments::Floats;
use arguments::words;
pub(in crate::ml) use copies::Copies;
use copies::{Key, failed, lock};
use held::Held;
pub(in crate::ml) use matrix::GpuMatrix;
use tables::Tables;
pub(in crate::ml) use taken::take_weights;

use super::backend::Decoder;
use super::fused::cached::CachedDecoder;
use super::fused::device::{Attention, Device, Onto, Part, Product, Rotary};
use super::fused::weights::{BaseWeight, TensorView};
use super::model::CausalLm;
use super::model::linear::{Pass, Weight};
use super::resident::{Resident, TrainedTensor};

/// An opened GPU and the weights that were copied to it.
pub(in crate::ml) struct Gpu {
    device: Arc<gpu::Device>,
    copies: Arc<Mutex<Copies>>,
    tables: Mutex<Tables>,
    /// Stands for buffers that were not taken.
    none: gpu::Buffer,
    /// The type of the factors of products that are rounded.
    compute: FloatType,
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gpu")
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

impl Gpu {
    /// Works on an opened device, with the copies of the model's weights that are there already.
    pub(in crate::ml) fn new(device: Arc<gpu::Device>, model: &CausalLm) -> Self {
        Self {
            none: device.take(0),
            device,
            copies: taken::copies(model),
            compute: match model.compute {
                DType::F16 => FloatType::F16,
                _ => FloatType::Bf16,
            },
            tables: Mutex::default(),
        }
    }

    fn copies(&self) -> MutexGuard<'_, Copies> {
        lock(&self.copies)
    }
}

impl Device for Gpu {
    type Buffer = Floats;
    type Matrix<'a> = GpuMatrix;
    type Vector<'a> = Arc<gpu::Buffer>;
    type Rounded = ();
    type Spans = gpu::Spans;
    type Numbers = gpu::Buffer;
    type Summaries = gpu::Summaries;

    const ON_HOST: bool = false;
    const HAS_F16: bool = true;

    fn expect(&self, _: usize) {}

    fn begin(&self, model: &CausalLm, _: usize) {
        let parameters = model.parameters.iter();
        let trained = parameters.map(|parameter| parameter.var.as_tensor().id());
        // Trained rows are written into the whole weight.
        let whole = [&model.embed, model.head()].into_iter();
        let whole = whole.filter(|weight| weight.trained().is_some());
        let whole = whole.map(|weight| weight.stored(Pass::INFER).id());
        self.copies().begin(trained.chain(whole));
    }

    fn take(&self, length: usize) -> Floats {
        Floats(Some(self.device.take(length)))
    }

    fn zeros(&self, length: usize) -> Floats {
        let mut zeros = self.take(length);
        self.clear(&mut zeros);
        zeros
    }

    fn give(&self, buffer: Floats) {
        drop(buffer);
    }

    fn length(&self, buffer: &Floats) -> usize {
        self.of(buffer).len()
    }

    fn shorten(&self, buffer: &mut Floats, length: usize) {
        self.of_mut(buffer).shorten(length);
    }

    fn upload(&self, values: Vec<f32>) -> Floats {
        Floats(Some(self.device.take_with(&values)))
    }

    fn take_values(&self, buffers: Vec<Floats>) -> Result<Vec<Vec<f32>>> {
        let read = |buffer: &Floats| self.device.read(self.of(buffer)).map_err(failed);
        buffers.iter().map(read).collect()
    }

    fn host<'b>(&self, _: &'b mut Floats) -> Option<&'b mut Vec<f32>> {
        None
    }

    fn matrix<'a>(&'a self, weight: &'a BaseWeight<'_>) -> Result<GpuMatrix> {
        let copy = match weight {
            BaseWeight::Dense(view) => self.dense(view)?,
            BaseWeight::Nf4(nf4) => {
                let values = || Ok(Values::Nf4(nf4.kernel()));
                self.copies()
                    .weight(&self.device, Key::of(nf4), values, nf4.shape)?
            }
            BaseWeight::Bare(_) => candle_core::bail!("a weight without a tensor"),
        };
        Ok(GpuMatrix {
            rows: 0..weight.shape()?.0,
            weight: copy,
            transposed: false,
        })
    }

    fn rows<'a>(&'a self, weight: &'a TensorView<'_>, rows: Range<usize>) -> Result<GpuMatrix> {
        let all = weight.shape()?.0;
        if rows.start > rows.end || rows.end > all {
            candle_core::bail!("a weight of {all} rows has no rows {rows:?}")
        }
        Ok(GpuMatrix {
            weight: self.dense(weight)?,
            rows,
            transposed: false,
        })
    }

    fn vector<'a>(&'a self, values: &'a TensorView<'_>) -> Result<Arc<gpu::Buffer>> {
        let floats = || values.floats();
        self.copies().vector(&self.device, values.id, floats)
    }

    fn spans(&self, spans: &Spans) -> gpu::Spans {
        self.device.spans(spans)
    }

    fn numbers(&self, numbers: &[u64]) -> gpu::Buffer {
        self.device.numbers(numbers)
    }

    fn round(&self, _: &Floats, _: usize) {}

    fn give_rounded(&self, (): ()) {}

    fn products(&self, all: Vec<Product<'_, '_, Self>>) {
        for each in all {
            let rounds = each.terms.iter().any(|term| term.x.rounded.is_some());
            let terms = each.terms.iter().map(|term| gpu::Term {
                weight: term.weight.borrow(),
                x: self.of(term.x.x),
            });
            self.device.product(gpu::Product {
                terms: terms.collect(),
                onto: self.onto(&each.onto),
                bias: each.bias.as_deref(),
                rounding: self.rounding(rounds),
                out: self.of_mut(each.out),
            });
        }
    }

    fn outer(
        &self,
        (a, rows): (&Floats, usize),
        (b, columns): (&Floats, usize),
        out: &mut Floats,
        first: usize,
        order: Order,
    ) {
        let (a, b) = ((self.of(a), rows), (self.of(b), columns));
        self.device.outer(a, b, self.of_mut(out), first, order);
    }

    fn sum_over_tokens(&self, x: &Floats, tokens: usize, out: &mut Floats) {
        let (x, out) = (self.of(x), self.of_mut(out));
        self.device.sum_over_tokens(x, tokens, out);
    }

    fn copy(&self, from: &Floats, to: &mut Floats) {
        self.device.copy(self.of(from), self.of_mut(to));
    }

    fn copy_features(
        &self,
        (from, source): (&Floats, Part),
        (to, target): (&mut Floats, Part),
        count: usize,
    ) {
        let features = |part: Part| gpu::Features {
            all: part.features,
            first: part.first,
        };
        let from = (self.of(from), features(source));
        let to = (self.of_mut(to), features(target));
        self.device.copy_features(from, to, count);
    }

    fn clear(&self, x: &mut Floats) {
        self.device.clear(self.of_mut(x));
    }

    fn clear_last_panel(&self, x: &mut Floats, features: usize) {
        self.device.clear_last_panel(self.of_mut(x), features);
    }

    fn clear_tokens(&self, x: &mut Floats, features: usize, tokens: impl Iterator<Item = usize>) {
        let tokens: Vec<u32> = tokens.map(|token| token as u32).collect();
        if tokens.is_empty() {
            return;
        }
        self.device.clear_tokens(self.of_mut(x), features, &tokens);
    }

    fn dropout(&self, dropout: Dropout, x: &mut Floats, features: usize, numbers: &gpu::Buffer) {
        self.device
            .dropout(dropout, self.of_mut(x), features, numbers);
    }

    fn scale(&self, x: &mut Floats, factor: f32) {
        self.device.scale(self.of_mut(x), factor);
    }

    fn add(&self, x: &mut Floats, y: &Floats, factor: f32) {
        self.device.add(self.of_mut(x), self.of(y), factor);
    }

    fn scale_and_add(&self, x: &mut Floats, factor: f32, y: &Floats) {
        self.device
            .scale_and_add(self.of_mut(x), factor, self.of(y));
    }

    fn rms_norm(
        &self,
        x: &Floats,
        weight: Arc<gpu::Buffer>,
        eps: f32,
        out: &mut Floats,
        inverse: &mut Floats,
    ) {
        let (out, inverse) = (self.of_mut(out), self.of_mut(inverse));
        self.device.rms_norm(self.of(x), &weight, eps, out, inverse);
    }

    fn rms_norm_onto(
        &self,
        x: &Floats,
        weight: Arc<gpu::Buffer>,
        eps: f32,
        (residual, factor): (&Floats, f32),
        out: &mut Floats,
        inverse: &mut Floats,
    ) {
        let onto = (self.of(residual), factor);
        let (out, inverse) = (self.of_mut(out), self.of_mut(inverse));
        self.device
            .rms_norm_onto(self.of(x), &weight, eps, onto, out, inverse);
    }

    fn rms_norm_recompute(
        &self,
        x: &Floats,
        weight: Arc<gpu::Buffer>,
        inverse: &Floats,
        out: &mut Floats,
    ) {
        let (x, inverse, out) = (self.of(x), self.of(inverse), self.of_mut(out));
        self.device.rms_norm_recompute(x, &weight, inverse, out);
    }

    fn rms_norm_backward(
        &self,
        x: &Floats,
        weight: Arc<gpu::Buffer>,
        inverse: &Floats,
        grad_out: &Floats,
        grad_x: &mut Floats,
    ) {
        let (x, inverse, grad_out) = (self.of(x), self.of(inverse), self.of(grad_out));
        let grad_x = self.of_mut(grad_x);
        self.device
            .rms_norm_backward(x, &weight, inverse, grad_out, grad_x);
    }

    fn rms_norm_grad_weight(
        &self,
        x: &Floats,
        inverse: &Floats,
        grad_out: &Floats,
        grad_weight: &mut Floats,
    ) {
        let (x, inverse, grad_out) = (self.of(x), self.of(inverse), self.of(grad_out));
        let grad_weight = self.of_mut(grad_weight);
        self.device
            .rms_norm_grad_weight(x, inverse, grad_out, grad_weight);
    }

    fn rope(&self, x: &mut Floats, features: usize, rotary: Rotary<'_, Self>, back: bool) {
        let rotary = gpu::Rotary {
            cos: self.of(rotary.cos),
            sin: self.of(rotary.sin),
            pairs: rotary.pairs,
            width: rotary.width,
        };
        self.device.rope(self.of_mut(x), features, rotary, back);
    }

    fn row_factors(
        &self,
        base: GpuMatrix,
        (a, b): (GpuMatrix, GpuMatrix),
        scaling: f32,
        magnitude: Arc<gpu::Buffer>,
    ) -> [Floats; 2] {
        let (base, a, b) = (base.borrow(), a.borrow(), b.borrow());
        let made = self
            .device
            .row_factors(&base, (&a, &b), scaling, &magnitude);
        made.map(|values| Floats(Some(values)))
    }

    fn scale_features(
        &self,
        x: &Floats,
        factors: &Floats,
        bias: Option<Arc<gpu::Buffer>>,
        onto: &Onto<'_, Self>,
        out: &mut Floats,
    ) {
        let (x, factors, onto) = (self.of(x), self.of(factors), self.onto(onto));
        let (bias, out) = (bias.as_deref(), self.of_mut(out));
        self.device.scale_features(x, factors, bias, onto, out);
    }

    fn feature_dots(&self, a: &Floats, b: &Floats, factors: &Floats, out: &mut Floats) {
        let (a, b, factors) = (self.of(a), self.of(b), self.of(factors));
        let out = self.of_mut(out);
        self.device.feature_dots(a, b, factors, out);
    }

    fn gated_unit(&self, activation: Activation, gate: &Floats, up: &Floats, out: &mut Floats) {
        let (gate, up, out) = (self.of(gate), self.of(up), self.of_mut(out));
        self.device.gated_unit(activation, gate, up, out);
    }

    fn gated_unit_backward(
        &self,
        activation: Activation,
        gate: &mut Floats,
        up: &mut Floats,
        grad_out: &mut Floats,
    ) {
        let (gate, up, grad_out) = (self.of_mut(gate), self.of_mut(up), self.of_mut(grad_out));
        self.device
            .gated_unit_backward(activation, gate, up, grad_out);
    }

    fn attention(&self, inputs: Attention<'_, Self>, out: &mut Floats, log_sums: &mut Floats) {
        let (out, log_sums) = (self.of_mut(out), self.of_mut(log_sums));
        self.device.attention(self.inputs(&inputs), out, log_sums);
    }

    fn attention_backward(
        &self,
        inputs: Attention<'_, Self>,
        (out, log_sums, grad_out): (&Floats, &Floats, &Floats),
        gradients: [&mut Floats; 3],
    ) {
        let result = (self.of(out), self.of(log_sums), self.of(grad_out));
        let gradients = gradients.map(|gradient| self.of_mut(gradient));
        self.device
            .attention_backward(self.inputs(&inputs), result, gradients);
    }

    fn lookup(
        &self,
        weight: &Weight,
        pass: Pass,
        ids: &[u32],
        factor: f64,
        out: &mut Floats,
    ) -> Result<()> {
        let view = TensorView::weight(weight, pass)?;
        let rows = view.shape()?.0;
        if let Some(id) = ids.iter().find(|id| **id as usize >= rows) {
            candle_core::bail!("the id {id} lies outside the vocabulary of {rows}")
        }
        let copy = self.dense(&view)?;
        let out = self.of_mut(out);
        self.device.lookup(&copy, ids, factor as f32, out);
        Ok(())
    }

    fn gather(&self, x: &Floats, features: usize, tokens: &[usize], factor: f32, out: &mut Floats) {
        let (x, tokens) = (self.of(x), words(tokens.iter()));
        let out = self.of_mut(out);
        self.device.gather(x, features, &tokens, factor, out);
    }

    fn scatter(
        &self,
        x: &Floats,
        features: usize,
        factors: &[f32],
        tokens: &[usize],
        out: &mut Floats,
    ) {
        let (x, tokens) = (self.of(x), words(tokens.iter()));
        let out = self.of_mut(out);
        self.device.scatter(x, features, factors, &tokens, out);
    }

    fn add_to_rows(
        &self,
        x: &Floats,
        features: usize,
        all: &[(usize, f32, usize)],
        out: &mut Floats,
    ) {
        let all = all.iter();
        let all = all.map(|&(token, factor, row)| (token as u32, factor, row as u32));
        let all: Vec<(u32, f32, u32)> = all.collect();
        let (x, out) = (self.of(x), self.of_mut(out));
        self.device.add_to_rows(x, features, &all, out);
    }

    fn pick(&self, x: &Floats, all: &[(usize, usize)], out: &mut Floats) {
        let all = all.iter().map(|&(from, to)| (from as u32, to as u32));
        let all: Vec<(u32, u32)> = all.collect();
        self.device.pick(self.of(x), &all, self.of_mut(out));
    }

    fn summaries(&self, panels: usize) -> gpu::Summaries {
        self.device.summaries(panels)
    }

    fn same_summaries(&self, summaries: &gpu::Summaries) -> gpu::Summaries {
        self.device.same_summaries(summaries)
    }

    fn online_softmax(
        &self,
        logits: &mut Floats,
        ids: Range<usize>,
        softcap: Option<f32>,
        summaries: &mut gpu::Summaries,
    ) -> Floats {
        let logits = self.of_mut(logits);
        let factors = self.device.online_softmax(logits, ids, softcap, summaries);
        Floats(Some(factors))
    }

    fn summary_values<'s>(&self, summaries: &'s gpu::Summaries) -> Result<Cow<'s, [Summary]>> {
        let values = self.device.summary_values(summaries).map_err(failed)?;
        Ok(Cow::Owned(values))
    }

    fn multiply(&self, x: &mut Floats, features: usize, factors: &Floats) {
        self.device
            .multiply(self.of_mut(x), features, self.of(factors));
    }

    fn sum_capped(&self, logits: &Floats, softcap: f32, sums: &mut [[f64; LANES]]) -> Result<()> {
        let logits = self.of(logits);
        let ids = logits.len() / (sums.len() * LANES).max(1);
        let part = self.device.sum_capped(logits, softcap, ids);
        let part = self.device.read(&part).map_err(failed)?;
        for (sum, part) in sums.as_flattened_mut().iter_mut().zip(part) {
            *sum += f64::from(part);
        }
        Ok(())
    }

    fn soft_cap_slopes(&self, products: &mut Floats, softcap: f32) {
        let products = self.of_mut(products);
        self.device.soft_cap_slopes(products, softcap);
    }

    fn token_dots(
        &self,
        x: &Floats,
        features: usize,
        tokens: &[usize],
        weights: &[f64],
    ) -> Result<Vec<f64>> {
        let mut some = self.take(size(features, tokens.len()));
        self.gather(x, features, tokens, 1., &mut some);
        let dots = self.dots(self.of(&some), weights)?;
        let dots = dots.into_iter().take(tokens.len());
        Ok(dots.map(f64::from).collect())
    }

    fn weighted_sum(
        &self,
        x: &Floats,
        _: usize,
        of_tokens: Vec<f32>,
        of_features: &[f64],
    ) -> Result<f64> {
        let dots = self.dots(self.of(x), of_features)?;
        // What is behind the last token has no weight, and may be anything.
        let pairs = dots.into_iter().zip(of_tokens);
        let pairs = pairs.filter(|(_, factor)| *factor != 0.);
        Ok(pairs
            .map(|(dot, factor)| f64::from(dot) * f64::from(factor))
            .sum())
    }

    fn decoder<'a>(
        &'a self,
        model: &'a CausalLm,
        sequences: usize,
        longest: usize,
        pass: Pass,
    ) -> Result<Option<Box<dyn Decoder + 'a>>> {
        let made = CachedDecoder::new(self, model, sequences, longest, pass)?;
        Ok(made.map(|decoder| -> Box<dyn Decoder + 'a> { Box::new(decoder) }))
    }

    fn hold(&self, tensors: &[TrainedTensor<'_>]) -> Result<Option<Box<dyn Resident>>> {
        let held = Held::new(&self.device, &self.copies, tensors)?;
        Ok(Some(Box::new(held)))
    }

    fn held_gradient(&self, var: &Var) -> Option<Floats> {
        held::gradient(&self.copies(), var).map(|gradient| Floats(Some(gradient)))
    }

    fn held_column_sums(&self, weight: &TensorView<'_>, rounds: bool) -> Result<Option<Vec<f64>>> {
        let held = self.copies();
        let held = held.held(weight.id).and_then(|held| held.weight.clone());
        let Some(held) = held else {
            return Ok(None);
        };
        let sums = self.device.column_sums(&held, self.rounding(rounds));
        let sums = self.device.read(&sums).map_err(failed)?;
        Ok(Some(sums.into_iter().map(f64::from).collect()))
    }

    fn table_rows(
        &self,
        number: usize,
        features: usize,
        rows: &[usize],
        make: &dyn Fn(usize) -> Result<Vec<f32>>,
    ) -> Result<Option<Floats>> {
        let rows = words(rows.iter());
        let mut tables = lock(&self.tables);
        let out = tables.rows(&self.device, number, features, &rows, make)?;
        Ok(Some(Floats(Some(out))))
    }
}
