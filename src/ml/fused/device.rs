//! A device: memory, and the operations that the layers of [`super`] are made of.
//!
//! The forward and backward passes are written once, over this trait. [`super::cpu::Cpu`] calls the crate `kernels` on vectors of floats.
//! Operations have the names of that crate and mean what they mean there; the sizes of arguments are those that it documents. Activations are
//! panels of 32 tokens on every device ([`pipeline_kernels::panels`]): `size(features, tokens)` floats, of which feature `f` of token `t` is
//! number `(t / 32 * features + f) * 32 + t % 32`.
//!
//! Operations are queued in order and don't fail: a device on which one fails remembers that, and the next function that returns values to the
//! host ([`Device::read`] and those that say so) returns the error. So nothing waits for the device but what needs its numbers.

use std::borrow::Cow;
use std::ops::Range;

use candle_core::{Result, Var};
use pipeline_kernels::attention::{Heads, Scores, Spans};
use pipeline_kernels::dropout::Dropout;
use pipeline_kernels::gated::Activation;
use pipeline_kernels::panels::LANES;
use pipeline_kernels::reduce::Order;
use pipeline_kernels::vocabulary::Summary;

use super::weights::{BaseWeight, TensorView};
use crate::ml::backend::Decoder;
use crate::ml::model::CausalLm;
use crate::ml::model::linear::{Pass, Weight};
use crate::ml::resident::{Resident, TrainedTensor};

/// A weight (rows, columns), or its transpose, as the left factor of a product.
pub(in crate::ml) trait Transpose: Clone {
    /// The transpose; nothing is copied.
    #[must_use]
    fn transposed(self) -> Self;
}

/// Activations as the right factor of products.
pub(in crate::ml) struct Factor<'a, D: Device> {
    /// Panels of as many features as the weight is deep.
    pub(in crate::ml) x: &'a D::Buffer,
    /// The same values rounded to the type of products, if they are to be computed with those.
    pub(in crate::ml) rounded: Option<D::Rounded>,
}

/// One term of a sum of products, `weight * x`.
pub(in crate::ml) struct Term<'p, 'w, D: Device + 'w> {
    /// The weight (height, depth).
    pub(in crate::ml) weight: D::Matrix<'w>,
    /// Panels of `depth` features.
    pub(in crate::ml) x: &'p Factor<'p, D>,
}

/// The values to which the sum of a product's terms is added.
pub(in crate::ml) enum Onto<'p, D: Device> {
    /// Zeros: the output is overwritten.
    Zero,
    /// The values in the output.
    Out,
    /// Other panels, of the output's size.
    Values(&'p D::Buffer),
}

impl<D: Device> Onto<'_, D> {
    /// The same values, for another product.
    pub(in crate::ml) fn same(&self) -> Self {
        match self {
            Self::Zero => Self::Zero,
            Self::Out => Self::Out,
            Self::Values(values) => Self::Values(values),
        }
    }
}

/// One product: `out = onto + bias + sum over terms of weight * x`.
pub(in crate::ml) struct Product<'p, 'w, D: Device + 'w> {
    /// Panels of as many features as each weight has rows.
    pub(in crate::ml) out: &'p mut D::Buffer,
    /// The terms, whose weights all have the same number of rows.
    pub(in crate::ml) terms: Vec<Term<'p, 'w, D>>,
    /// The values to which the sum is added.
    pub(in crate::ml) onto: Onto<'p, D>,
    /// A number for each feature of the output, which is added to that feature of all tokens.
    pub(in crate::ml) bias: Option<D::Vector<'w>>,
}

/// A rotary embedding for the tokens of a pass.
pub(in crate::ml) struct Rotary<'p, D: Device> {
    /// The cosines and sines of the angles, panels of `pairs` features each.
    pub(in crate::ml) cos: &'p D::Buffer,
    pub(in crate::ml) sin: &'p D::Buffer,
    /// The number of rotated pairs of features of a head: feature `i` with feature `i + pairs`.
    pub(in crate::ml) pairs: usize,
    /// The number of features of a head.
    pub(in crate::ml) width: usize,
}

/// What an attention layer computes with: queries in panels of `queries * width` features, keys and values of `keys * width`.
pub(in crate::ml) struct Attention<'p, D: Device> {
    pub(in crate::ml) q: &'p D::Buffer,
    pub(in crate::ml) k: &'p D::Buffer,
    pub(in crate::ml) v: &'p D::Buffer,
    pub(in crate::ml) heads: Heads,
    pub(in crate::ml) scores: Scores,
    pub(in crate::ml) spans: &'p D::Spans,
}

/// Some features of panels.
#[derive(Debug, Clone, Copy)]
pub(in crate::ml) struct Part {
    /// The number of features of the panels.
    pub(in crate::ml) features: usize,
    /// The first of the features that are meant.
    pub(in crate::ml) first: usize,
}

/// A device, see the module.
pub(in crate::ml) trait Device: Send + Sync + Sized {
    /// Floats in the device's memory; the default is none.
    type Buffer: Default;
    /// A weight.
    type Matrix<'a>: Transpose
    where
        Self: 'a;
    /// The weight of a norm, or a bias.
    type Vector<'a>: Clone
    where
        Self: 'a;
    /// Panels rounded to the type of products, as these take them.
    type Rounded;
    /// The spans of tokens that may attend to each other.
    type Spans;
    /// A number for each token.
    type Numbers;
    /// For each of some panels, what [`Summary`] holds.
    type Summaries;

    /// Announces that passes of up to `panels` panels are to come.
    fn expect(&self, panels: usize);

    /// Begins a pass of `panels` panels through `model`, whose trained tensors may have changed since the last one.
    fn begin(&self, model: &CausalLm, panels: usize);

    /// A buffer of `length` floats, contents unspecified.
    fn take(&self, length: usize) -> Self::Buffer;

    /// A buffer of zeros that is not to stay with the device: for gradients.
    fn zeros(&self, length: usize) -> Self::Buffer;

    /// Returns a buffer.
    fn give(&self, buffer: Self::Buffer);

    /// Returns several buffers.
    fn give_all(&self, buffers: impl IntoIterator<Item = Self::Buffer>) {
        buffers.into_iter().for_each(|buffer| self.give(buffer));
    }

    /// The number of floats in a buffer.
    fn length(&self, buffer: &Self::Buffer) -> usize;

    /// Leaves the first `length` floats of a buffer, which has at least as many.
    fn shorten(&self, buffer: &mut Self::Buffer, length: usize);

    /// A buffer with these values, which is not to stay with the device.
    fn upload(&self, values: Vec<f32>) -> Self::Buffer;

    /// The values of several buffers, which are given up.
    ///
    /// # Errors
    /// An operation before this failed, or the device is lost.
    fn take_values(&self, buffers: Vec<Self::Buffer>) -> Result<Vec<Vec<f32>>>;

    /// Whether a buffer is the host's memory, so that reading it costs nothing.
    const ON_HOST: bool;

    /// Whether products can be computed in f16.
    const HAS_F16: bool;

    /// The values of a buffer in the host's memory, for a device whose memory that is.
    fn host<'b>(&self, buffer: &'b mut Self::Buffer) -> Option<&'b mut Vec<f32>>;

    /// The weight (out, in) of a projection.
    ///
    /// # Errors
    /// The weight has a type that the device does not know, or there is no room for it.
    fn matrix<'a>(&'a self, weight: &'a BaseWeight<'_>) -> Result<Self::Matrix<'a>>;

    /// Some rows of a weight (rows, columns).
    ///
    /// # Errors
    /// Those of [`Device::matrix`]; the weight has no such rows.
    fn rows<'a>(
        &'a self,
        weight: &'a TensorView<'_>,
        rows: Range<usize>,
    ) -> Result<Self::Matrix<'a>>;

    /// The weight of a norm, or a bias, in f32.
    ///
    /// # Errors
    /// Those of [`Device::matrix`].
    fn vector<'a>(&'a self, values: &'a TensorView<'_>) -> Result<Self::Vector<'a>>;

    /// Spans.
    fn spans(&self, spans: &Spans) -> Self::Spans;

    /// Numbers of tokens.
    fn numbers(&self, numbers: &[u64]) -> Self::Numbers;

    /// Rounds panels of `features` to the type of products.
    fn round(&self, x: &Self::Buffer, features: usize) -> Self::Rounded;

    /// Returns rounded panels.
    fn give_rounded(&self, rounded: Self::Rounded);

    /// Panels `x` of `features` as a factor of products, which are computed with rounded factors if `half`.
    fn factor<'a>(&self, half: bool, x: &'a Self::Buffer, features: usize) -> Factor<'a, Self> {
        Factor {
            x,
            rounded: half.then(|| self.round(x, features)),
        }
    }

    /// Returns what factors took.
    fn give_factors<'a>(&self, factors: impl IntoIterator<Item = Factor<'a, Self>>)
    where
        Self: 'a,
    {
        let rounded = factors.into_iter().filter_map(|factor| factor.rounded);
        rounded.for_each(|rounded| self.give_rounded(rounded));
    }

    /// Computes several products that don't depend on each other.
    fn products(&self, all: Vec<Product<'_, '_, Self>>);

    /// The gradient of a weight: adds `sum over tokens of a[i] * b[j]` to the matrix that begins at `first` in `out`. Both factors come with
    /// their number of features; the lanes after the last token are zero in one of them.
    fn outer(
        &self,
        a: (&Self::Buffer, usize),
        b: (&Self::Buffer, usize),
        out: &mut Self::Buffer,
        first: usize,
        order: Order,
    );

    /// The gradient of a bias: adds the sum over `tokens` of each feature to `out`.
    fn sum_over_tokens(&self, x: &Self::Buffer, tokens: usize, out: &mut Self::Buffer);

    /// Copies values from buffer to buffer of the same length.
    fn copy(&self, from: &Self::Buffer, to: &mut Self::Buffer);

    /// Copies `count` features of each token.
    fn copy_features(
        &self,
        from: (&Self::Buffer, Part),
        to: (&mut Self::Buffer, Part),
        count: usize,
    );

    /// Sets a buffer to zero.
    fn clear(&self, x: &mut Self::Buffer);

    /// Sets the last panel of `features` to zero.
    fn clear_last_panel(&self, x: &mut Self::Buffer, features: usize);

    /// Sets all `features` of some tokens to zero.
    fn clear_tokens(
        &self,
        x: &mut Self::Buffer,
        features: usize,
        tokens: impl Iterator<Item = usize>,
    );

    /// Multiplies panels of `features` by the factors of a dropout; the number of a token decides where in the stream its factors begin.
    fn dropout(
        &self,
        dropout: Dropout,
        x: &mut Self::Buffer,
        features: usize,
        numbers: &Self::Numbers,
    );

    /// `x *= factor`.
    fn scale(&self, x: &mut Self::Buffer, factor: f32);

    /// `x += factor * y`.
    fn add(&self, x: &mut Self::Buffer, y: &Self::Buffer, factor: f32);

    /// `x = factor * x + y`.
    fn scale_and_add(&self, x: &mut Self::Buffer, factor: f32, y: &Self::Buffer);

    /// RMS norm over as many features as the weight has: `out = weight * x * inverse` with the factors `inverse` of tokens and heads.
    fn rms_norm(
        &self,
        x: &Self::Buffer,
        weight: Self::Vector<'_>,
        eps: f32,
        out: &mut Self::Buffer,
        inverse: &mut Self::Buffer,
    );

    /// `out = residual + factor * norm(x)`.
    fn rms_norm_onto(
        &self,
        x: &Self::Buffer,
        weight: Self::Vector<'_>,
        eps: f32,
        onto: (&Self::Buffer, f32),
        out: &mut Self::Buffer,
        inverse: &mut Self::Buffer,
    );

    /// The norm again, with the factors that [`Device::rms_norm`] found.
    fn rms_norm_recompute(
        &self,
        x: &Self::Buffer,
        weight: Self::Vector<'_>,
        inverse: &Self::Buffer,
        out: &mut Self::Buffer,
    );

    /// Adds the gradient with respect to the norm's argument to `grad_x`.
    fn rms_norm_backward(
        &self,
        x: &Self::Buffer,
        weight: Self::Vector<'_>,
        inverse: &Self::Buffer,
        grad_out: &Self::Buffer,
        grad_x: &mut Self::Buffer,
    );

    /// Adds the gradient with respect to the norm's weight to `grad_weight`.
    fn rms_norm_grad_weight(
        &self,
        x: &Self::Buffer,
        inverse: &Self::Buffer,
        grad_out: &Self::Buffer,
        grad_weight: &mut Self::Buffer,
    );

    /// Applies a rotary embedding to the heads of panels of `features`, in place, or with `back` its transpose.
    fn rope(&self, x: &mut Self::Buffer, features: usize, rotary: Rotary<'_, Self>, back: bool);

    /// What `DoRA` scales the rows of a weight (rows, columns) by, of which the pair A (rank, columns) and B (rows, rank) is a part: for each row
    /// of `W + scaling B A` the factor from its norm to `magnitude`, and the reciprocal of the norm. Both are not to stay with the device.
    fn row_factors(
        &self,
        base: Self::Matrix<'_>,
        pair: (Self::Matrix<'_>, Self::Matrix<'_>),
        scaling: f32,
        magnitude: Self::Vector<'_>,
    ) -> [Self::Buffer; 2];

    /// `out = onto + bias + factors * x`, with a factor and a number of the bias for each feature.
    fn scale_features(
        &self,
        x: &Self::Buffer,
        factors: &Self::Buffer,
        bias: Option<Self::Vector<'_>>,
        onto: &Onto<'_, Self>,
        out: &mut Self::Buffer,
    );

    /// Adds to `out`, for each feature, the sum over tokens of `a * b`, times its factor. The lanes after the last token are zero in one of the
    /// two.
    fn feature_dots(
        &self,
        a: &Self::Buffer,
        b: &Self::Buffer,
        factors: &Self::Buffer,
        out: &mut Self::Buffer,
    );

    /// `out = activation(gate) * up`.
    fn gated_unit(
        &self,
        activation: Activation,
        gate: &Self::Buffer,
        up: &Self::Buffer,
        out: &mut Self::Buffer,
    );

    /// Replaces the gate and the up projection by the gradients with respect to them, and the gradient with respect to the unit's result by
    /// that result.
    fn gated_unit_backward(
        &self,
        activation: Activation,
        gate: &mut Self::Buffer,
        up: &mut Self::Buffer,
        grad_out: &mut Self::Buffer,
    );

    /// Attention: panels of `queries * width` features, and the logarithm of each token's and query head's sum of exponentials.
    fn attention(
        &self,
        inputs: Attention<'_, Self>,
        out: &mut Self::Buffer,
        log_sums: &mut Self::Buffer,
    );

    /// The gradients with respect to queries, keys and values; `result` is what the forward pass computed (its result and `log_sums`), and the
    /// gradient with respect to its result.
    fn attention_backward(
        &self,
        inputs: Attention<'_, Self>,
        result: (&Self::Buffer, &Self::Buffer, &Self::Buffer),
        gradients: [&mut Self::Buffer; 3],
    );

    /// Rows `ids` of a weight (rows, features), times `factor`, as panels of tokens. Lanes after the last token are zero.
    ///
    /// # Errors
    /// An id is outside the weight.
    fn lookup(
        &self,
        weight: &Weight,
        pass: Pass,
        ids: &[u32],
        factor: f64,
        out: &mut Self::Buffer,
    ) -> Result<()>;

    /// Some tokens of panels of `features`, times `factor`, as panels of their own. Lanes after the last token are zero.
    fn gather(
        &self,
        x: &Self::Buffer,
        features: usize,
        tokens: &[usize],
        factor: f32,
        out: &mut Self::Buffer,
    );

    /// Adds token `i` of `x`, times `factors[i]`, to token `tokens[i]` of `out`, one after the other; both are panels of `features`.
    fn scatter(
        &self,
        x: &Self::Buffer,
        features: usize,
        factors: &[f32],
        tokens: &[usize],
        out: &mut Self::Buffer,
    );

    /// Adds token `token` of panels `x` of `features`, times `factor`, to row `row` of `out` (rows, features), for each `(token, factor, row)`
    /// one after the other.
    fn add_to_rows(
        &self,
        x: &Self::Buffer,
        features: usize,
        all: &[(usize, f32, usize)],
        out: &mut Self::Buffer,
    );

    /// Copies single values: for each `(from, to)`, `out[to] = x[from]`.
    fn pick(&self, x: &Self::Buffer, all: &[(usize, usize)], out: &mut Self::Buffer);

    /// The summaries of no ids, for so many panels.
    fn summaries(&self, panels: usize) -> Self::Summaries;

    /// A copy of summaries.
    fn same_summaries(&self, summaries: &Self::Summaries) -> Self::Summaries;

    /// [`pipeline_kernels::vocabulary::online_softmax`]; the factors are a float for each lane of each panel.
    fn online_softmax(
        &self,
        logits: &mut Self::Buffer,
        ids: Range<usize>,
        softcap: Option<f32>,
        summaries: &mut Self::Summaries,
    ) -> Self::Buffer;

    /// The summaries as values.
    ///
    /// # Errors
    /// Those of [`Device::take_values`].
    fn summary_values<'s>(&self, summaries: &'s Self::Summaries) -> Result<Cow<'s, [Summary]>>;

    /// Multiplies all `features` of each token by its factor, a float for each lane of each panel.
    fn multiply(&self, x: &mut Self::Buffer, features: usize, factors: &Self::Buffer);

    /// Adds the sum of each token's logits, with a soft-cap, to its sum.
    ///
    /// # Errors
    /// Those of [`Device::take_values`].
    fn sum_capped(
        &self,
        logits: &Self::Buffer,
        softcap: f32,
        sums: &mut [[f64; LANES]],
    ) -> Result<()>;

    /// Replaces products of the head by the derivatives of the logits that a soft-cap makes of them.
    fn soft_cap_slopes(&self, products: &mut Self::Buffer, softcap: f32);

    /// The products in f64 of the features of some tokens with `weights` (features).
    ///
    /// # Errors
    /// Those of [`Device::take_values`].
    fn token_dots(
        &self,
        x: &Self::Buffer,
        features: usize,
        tokens: &[usize],
        weights: &[f64],
    ) -> Result<Vec<f64>>;

    /// The sum over tokens and features of `x * of_tokens[token] * of_features[feature]`; `of_tokens` has a number for each lane.
    ///
    /// # Errors
    /// Those of [`Device::take_values`].
    fn weighted_sum(
        &self,
        x: &Self::Buffer,
        features: usize,
        of_tokens: Vec<f32>,
        of_features: &[f64],
    ) -> Result<f64>;

    /// See [`crate::ml::backend::Backend::decoder`]. `None` for what the device has no way of its own.
    ///
    /// # Errors
    /// There is no room for what it needs.
    fn decoder<'a>(
        &'a self,
        _model: &'a CausalLm,
        _sequences: usize,
        _longest: usize,
        _: Pass,
    ) -> Result<Option<Box<dyn Decoder + 'a>>> {
        Ok(None)
    }

    /// See [`crate::ml::backend::Backend::hold`].
    ///
    /// # Errors
    /// There is no room for them.
    fn hold(&self, _: &[TrainedTensor<'_>]) -> Result<Option<Box<dyn Resident>>> {
        Ok(None)
    }

    /// The sum of the gradients with respect to a trained tensor that the device holds.
    fn held_gradient(&self, _: &Var) -> Option<Self::Buffer> {
        None
    }

    /// The sum of the rows of a weight that the device holds, with `half` of its values rounded to the type of products.
    ///
    /// # Errors
    /// An operation before this failed.
    fn held_column_sums(&self, _: &TensorView<'_>, _half: bool) -> Result<Option<Vec<f64>>> {
        Ok(None)
    }

    /// Panels of `features` that are, for each token, a row of table `number`, which the device keeps: `make` gives the first rows of it, as many
    /// as it is asked for, in panels. `None` where a table is not worth keeping.
    ///
    /// # Errors
    /// `make` fails, or there is no room for the table.
    fn table_rows(
        &self,
        _number: usize,
        _features: usize,
        _rows: &[usize],
        _make: &dyn Fn(usize) -> Result<Vec<f32>>,
    ) -> Result<Option<Self::Buffer>> {
        Ok(None)
    }
}
