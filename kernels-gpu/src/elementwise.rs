//! The operations between products: sums, copies, rotary embeddings and dropout, see [`pipeline_kernels::elementwise`] and
//! [`pipeline_kernels::dropout`]. Each has a unit for each value (or pair of values) that it writes.

use cubecl::prelude::*;
use pipeline_kernels::dropout::Dropout;
use pipeline_kernels::panels::LANES;

use crate::buffer::Buffer;
use crate::device::Device;
use crate::kernels::LANES as WIDE;

/// `x = x * a + y * b`.
#[cube(launch)]
fn combine_kernel(x: &mut [f32], y: &[f32], a: f32, b: f32, #[comptime] both: bool) {
    let index = ABSOLUTE_POS;
    if index < x.len() {
        let mut value = x[index] * a;
        if comptime!(both) {
            value += y[index] * b;
        }
        x[index] = value;
    }
}

#[cube(launch)]
fn copy_kernel(from: &[f32], to: &mut [f32]) {
    let index = ABSOLUTE_POS;
    if index < to.len() {
        to[index] = from[index];
    }
}

#[cube(launch)]
fn fill_kernel(x: &mut [f32], first: u32, value: f32) {
    let index = ABSOLUTE_POS + first as usize;
    if index < x.len() {
        x[index] = value;
    }
}

#[cube(launch)]
fn copy_features_kernel(
    from: &[f32],
    to: &mut [f32],
    from_features: u32,
    from_first: u32,
    to_features: u32,
    to_first: u32,
    count: u32,
    all: u32,
) {
    let index = ABSOLUTE_POS;
    if index < all as usize {
        let lane = index % WIDE;
        let feature = (index / WIDE) % count as usize;
        let panel = index / WIDE / count as usize;
        let source = panel * from_features as usize + from_first as usize + feature;
        let target = panel * to_features as usize + to_first as usize + feature;
        to[target * WIDE + lane] = from[source * WIDE + lane];
    }
}

/// A unit for each feature of each of some tokens.
#[cube(launch)]
fn clear_tokens_kernel(x: &mut [f32], tokens: &[u32], features: u32) {
    let index = ABSOLUTE_POS;
    let features = features as usize;
    if index < tokens.len() * features {
        let token = tokens[index / features] as usize;
        let place = (token / WIDE * features + index % features) * WIDE + token % WIDE;
        x[place] = 0.0f32;
    }
}

#[cube(launch)]
fn multiply_kernel(x: &mut [f32], factors: &[f32], features: u32) {
    let index = ABSOLUTE_POS;
    if index < x.len() {
        let panel = index / WIDE / features as usize;
        x[index] *= factors[panel * WIDE + index % WIDE];
    }
}

/// A unit for each pair of features of each head and token.
#[cube(launch)]
fn rope_kernel(
    x: &mut [f32],
    cos: &[f32],
    sin: &[f32],
    heads: u32,
    pairs: u32,
    width: u32,
    sign: f32,
    all: u32,
) {
    let index = ABSOLUTE_POS;
    if index < all as usize {
        let (heads, pairs, width) = (heads as usize, pairs as usize, width as usize);
        let lane = index % WIDE;
        let pair = (index / WIDE) % pairs;
        let head = (index / WIDE / pairs) % heads;
        let panel = index / WIDE / pairs / heads;
        let angle = (panel * pairs + pair) * WIDE + lane;
        let low = ((panel * heads + head) * width + pair) * WIDE + lane;
        let high = low + pairs * WIDE;
        let c = cos[angle];
        let s = sin[angle] * sign;
        let a = x[low];
        let b = x[high];
        x[low] = a * c - b * s;
        x[high] = b * c + a * s;
    }
}

/// The low and the high half of the product of two 64-bit numbers, modulo 2^64, each in halves.
#[cube]
fn multiply_64(a_low: u32, a_high: u32, b_low: u32, b_high: u32) -> (u32, u32) {
    // The product of the low halves, from 16-bit digits.
    let a0 = a_low & 0xffff;
    let a1 = a_low >> 16;
    let b0 = b_low & 0xffff;
    let b1 = b_low >> 16;
    let p00 = a0 * b0;
    let p01 = a0 * b1;
    let p10 = a1 * b0;
    let p11 = a1 * b1;
    let middle = (p00 >> 16) + (p01 & 0xffff) + (p10 & 0xffff);
    let carried = p11 + (p01 >> 16) + (p10 >> 16) + (middle >> 16);
    let low = (p00 & 0xffff) | (middle << 16);
    (low, carried + a_low * b_high + a_high * b_low)
}

/// The sum of two 64-bit numbers modulo 2^64, each in halves.
#[cube]
fn add_64(a_low: u32, a_high: u32, b_low: u32, b_high: u32) -> (u32, u32) {
    let low = a_low + b_low;
    let mut carry = 0u32;
    if low < a_low {
        carry = 1u32;
    }
    (low, a_high + b_high + carry)
}

/// The exclusive or of a 64-bit number and itself shifted to the right by fewer than 32 bits.
#[cube]
fn shifted_xor_64(low: u32, high: u32, #[comptime] by: u32) -> (u32, u32) {
    let shifted = (low >> by) | (high << comptime!(32 - by));
    (low ^ shifted, high ^ (high >> by))
}

/// Multiplies by the factors of a dropout: splitmix64 at `start + (number * features + feature + 1) * GAMMA`.
#[cube(launch)]
fn dropout_kernel(
    x: &mut [f32],
    numbers: &[u32],
    features: u32,
    start_low: u32,
    start_high: u32,
    limit_low: u32,
    limit_high: u32,
    scale: f32,
) {
    let index = ABSOLUTE_POS;
    if index < x.len() {
        let lane = index % WIDE;
        let feature = (index / WIDE) % features as usize;
        let token = index / WIDE / features as usize * WIDE + lane;
        if token * 2 < numbers.len() {
            let (low, high) =
                multiply_64(numbers[token * 2], numbers[token * 2 + 1], features, 0u32);
            let (low, high) = add_64(low, high, feature as u32 + 1, 0u32);
            let (low, high) = multiply_64(low, high, 0x7f4a_7c15u32, 0x9e37_79b9u32);
            let (low, high) = add_64(low, high, start_low, start_high);
            let (low, high) = shifted_xor_64(low, high, 30u32);
            let (low, high) = multiply_64(low, high, 0x1ce4_e5b9u32, 0xbf58_476du32);
            let (low, high) = shifted_xor_64(low, high, 27u32);
            let (low, high) = multiply_64(low, high, 0x1331_11ebu32, 0x94d0_49bbu32);
            let (low, high) = shifted_xor_64(low, high, 31u32);
            if high < limit_high || (high == limit_high && low < limit_low) {
                x[index] = 0.0f32;
            } else {
                x[index] *= scale;
            }
        }
    }
}

/// The number of panels of `features` features in a buffer.
#[track_caller]
pub(crate) fn count(buffer: &Buffer, features: usize, what: &str) -> usize {
    let (length, panel) = (buffer.len(), features * LANES);
    let panels = length.checked_div(panel).unwrap_or(0);
    assert!(
        panels * panel == length,
        "{what}: {length} floats are no panels of {features} features"
    );
    panels
}

/// Checks that a buffer has `panels` panels of `features` features.
#[track_caller]
pub(crate) fn check(buffer: &Buffer, features: usize, panels: usize, what: &str) {
    let wanted = panels.saturating_mul(features).saturating_mul(LANES);
    assert_eq!(
        buffer.len(),
        wanted,
        "{what}: the size of {panels} panels of {features} features"
    );
}

/// The angles of rotary position embeddings of a pass, and the heads that they rotate, see [`pipeline_kernels::elementwise::Rotary`].
#[derive(Debug, Clone, Copy)]
pub struct Rotary<'a> {
    /// The cosines of the angles, panels of `pairs` features.
    pub cos: &'a Buffer,
    /// The sines, of the same shape.
    pub sin: &'a Buffer,
    /// The number of rotated pairs of features of a head.
    pub pairs: usize,
    /// The number of features of a head, at least `2 * pairs`; those after the first `2 * pairs` stay as they are.
    pub width: usize,
}

/// Some features of panels.
#[derive(Debug, Clone, Copy)]
pub struct Features {
    /// The number of features of the panels.
    pub all: usize,
    /// The first of the features that are meant.
    pub first: usize,
}

impl Device {
    /// See [`pipeline_kernels::elementwise::add`]: `x += y * factor`.
    ///
    /// # Panics
    /// If the lengths of `x` and `y` differ.
    pub fn add(&self, x: &mut Buffer, y: &Buffer, factor: f32) {
        self.combine(x, Some(y), 1., factor);
    }

    /// See [`pipeline_kernels::elementwise::scale_and_add`]: `x = x * factor + y`.
    ///
    /// # Panics
    /// If the lengths of `x` and `y` differ.
    pub fn scale_and_add(&self, x: &mut Buffer, factor: f32, y: &Buffer) {
        self.combine(x, Some(y), factor, 1.);
    }

    /// See [`pipeline_kernels::elementwise::scale`]: `x *= factor`.
    pub fn scale(&self, x: &mut Buffer, factor: f32) {
        if factor.to_bits() != 1f32.to_bits() {
            self.combine(x, None, factor, 0.);
        }
    }

    fn combine(&self, x: &mut Buffer, y: Option<&Buffer>, a: f32, b: f32) {
        if let Some(y) = y {
            assert_eq!(x.len(), y.len(), "lengths of the terms of a sum");
        }
        if self.idle(x.len()) {
            return;
        }
        let (cubes, units) = self.units(x.len());
        let other = y.unwrap_or(&self.nothing);
        combine_kernel::launch(
            &self.client,
            cubes,
            units,
            x.arg(),
            other.arg(),
            a,
            b,
            y.is_some(),
        );
    }

    /// Copies all values.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn copy(&self, from: &Buffer, to: &mut Buffer) {
        assert_eq!(from.len(), to.len(), "lengths of a copy");
        if self.idle(to.len()) {
            return;
        }
        let (cubes, units) = self.units(to.len());
        copy_kernel::launch(&self.client, cubes, units, from.arg(), to.arg());
    }

    /// Sets all values from index `first` on to `value`.
    pub fn fill_from(&self, x: &mut Buffer, first: usize, value: f32) {
        let count = x.len().saturating_sub(first);
        if self.idle(count) {
            return;
        }
        let (cubes, units) = self.units(count);
        fill_kernel::launch(&self.client, cubes, units, x.arg(), first as u32, value);
    }

    /// Sets all values to zero.
    pub fn clear(&self, x: &mut Buffer) {
        self.fill_from(x, 0, 0.);
    }

    /// Sets the last panel of `features` to zero.
    pub fn clear_last_panel(&self, x: &mut Buffer, features: usize) {
        let first = x.len().saturating_sub(features * LANES);
        self.fill_from(x, first, 0.);
    }

    /// Copies `count` features of each token from some place among a panel's features to another one.
    ///
    /// # Panics
    /// If a buffer is no whole number of panels, has not so many features, or the numbers of panels differ.
    pub fn copy_features(
        &self,
        (from, source): (&Buffer, Features),
        (to, target): (&mut Buffer, Features),
        features: usize,
    ) {
        let panels = count(from, source.all, "the features' source");
        check(to, target.all, panels, "the features' target");
        for part in [source, target] {
            let Features { all, first } = part;
            assert!(
                first + features <= all,
                "features {first} + {features} of {all}"
            );
        }
        let all = panels * features * LANES;
        if self.idle(all) {
            return;
        }
        let (cubes, units) = self.units(all);
        copy_features_kernel::launch(
            &self.client,
            cubes,
            units,
            from.arg(),
            to.arg(),
            source.all as u32,
            source.first as u32,
            target.all as u32,
            target.first as u32,
            features as u32,
            all as u32,
        );
    }

    /// Sets all `features` of some tokens to zero.
    ///
    /// # Panics
    /// If `x` is no whole number of panels or has not all these tokens.
    pub fn clear_tokens(&self, x: &mut Buffer, features: usize, tokens: &[u32]) {
        let panels = count(x, features, "tokens that are cleared");
        check_tokens(tokens, panels);
        if self.idle(tokens.len() * features) {
            return;
        }
        let words = self.take_with_words(tokens);
        if self.idle(1) {
            return;
        }
        let (cubes, units) = self.units(tokens.len() * features);
        clear_tokens_kernel::launch(
            &self.client,
            cubes,
            units,
            x.arg(),
            words.arg(),
            features as u32,
        );
    }

    /// Multiplies all `features` of each token by its factor, a float for each lane of each panel.
    ///
    /// # Panics
    /// If `x` is no whole number of panels, or `factors` are not 32 for each.
    pub fn multiply(&self, x: &mut Buffer, features: usize, factors: &Buffer) {
        let panels = count(x, features, "what is multiplied");
        check(factors, 1, panels, "the tokens' factors");
        if self.idle(x.len()) {
            return;
        }
        let (cubes, units) = self.units(x.len());
        multiply_kernel::launch(
            &self.client,
            cubes,
            units,
            x.arg(),
            factors.arg(),
            features as u32,
        );
    }

    /// See [`pipeline_kernels::elementwise::rope`].
    ///
    /// # Panics
    /// As it does.
    pub fn rope(&self, x: &mut Buffer, features: usize, rotary: Rotary<'_>, back: bool) {
        let Rotary {
            cos,
            sin,
            pairs,
            width,
        } = rotary;
        assert!(
            width > 0 && features.is_multiple_of(width) && pairs > 0 && 2 * pairs <= width,
            "heads of {width} features with {pairs} rotated pairs in panels of {features}"
        );
        let panels = count(x, features, "what is rotated");
        check(cos, pairs, panels, "the cosines");
        check(sin, pairs, panels, "the sines");
        let heads = features / width;
        let all = panels * heads * pairs * LANES;
        if self.idle(all) {
            return;
        }
        let (cubes, units) = self.units(all);
        rope_kernel::launch(
            &self.client,
            cubes,
            units,
            x.arg(),
            cos.arg(),
            sin.arg(),
            heads as u32,
            pairs as u32,
            width as u32,
            if back { -1. } else { 1. },
            all as u32,
        );
    }

    /// The numbers of tokens, for [`Device::dropout`].
    pub fn numbers(&self, numbers: &[u64]) -> Buffer {
        let halves = |number: &u64| [*number as u32, (number >> 32) as u32];
        let words: Vec<u32> = numbers.iter().flat_map(halves).collect();
        self.take_with_words(&words)
    }

    /// See [`Dropout::apply`]; `numbers` are those that [`Device::numbers`] copied. The masks are those of the CPU.
    ///
    /// # Panics
    /// If `x` has not as many panels of `features` as hold so many tokens.
    pub fn dropout(&self, dropout: Dropout, x: &mut Buffer, features: usize, numbers: &Buffer) {
        let tokens = numbers.len() / 2;
        let panels = pipeline_kernels::panels::panels(tokens);
        check(x, features, panels, "what is dropped from");
        if self.idle(x.len()) {
            return;
        }
        let (cubes, units) = self.units(x.len());
        let limit = (dropout.p * 2f64.powi(64)) as u64;
        dropout_kernel::launch(
            &self.client,
            cubes,
            units,
            x.arg(),
            numbers.arg(),
            features as u32,
            dropout.start as u32,
            (dropout.start >> 32) as u32,
            limit as u32,
            (limit >> 32) as u32,
            dropout.scale(),
        );
    }
}

/// Checks that panels hold all of some tokens.
#[track_caller]
pub(crate) fn check_tokens(tokens: &[u32], panels: usize) {
    let outside = tokens
        .iter()
        .find(|token| **token as usize >= panels * LANES);
    assert!(outside.is_none(), "token {outside:?} of {panels} panels");
}
