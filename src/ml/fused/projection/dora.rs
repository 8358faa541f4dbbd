//! Projections with `DoRA` (Liu et al. 2024, arXiv 2402.09353), `y = W x + b + (c - 1) * W x' + c * s B A x'` with `x'` the input after dropout
//! and `c = m / |W + s B A|` a factor for each row (equation 5); without dropout that is `b + c * (W x + s B A x)`.
//!
//! The norms are constants for the gradient (section 4.3). With `z = W x' + s B A x'` and the gradient g with respect to y, those with respect
//! to A and B are a plain pair's for `c * g`, and that with respect to m is the sum over tokens of `g * z`, divided by the norm. z is computed
//! again for it and not kept.

use candle_core::{Result, bail};

use super::{ProjectionGroup, alone};
use crate::ml::fused::device::{Device, Factor, Onto, Product, Term, Transpose as _};
use crate::ml::fused::weights::{Pair, Projection};

/// For each projection with `DoRA` its rows' factors and the reciprocals of their norms.
pub(super) type RowFactors<D> = Vec<Option<[<D as Device>::Buffer; 2]>>;

/// The pair of a projection with `DoRA`.
pub(super) fn dora<'p, 'a>(projection: &'p Projection<'a>) -> Option<&'p Pair<'a>> {
    let pair = projection.lora.as_ref();
    pair.filter(|pair| pair.magnitude.is_some())
}

impl<D: Device> ProjectionGroup<'_, D> {
    /// Whether any projection has `DoRA`.
    pub(super) fn has_dora(&self) -> bool {
        self.all.iter().any(|projection| dora(projection).is_some())
    }

    /// The factors of rows, which are computed once.
    fn row_factors(&self, device: &D) -> Result<&RowFactors<D>> {
        if let Some(known) = self.row_factors.get() {
            return Ok(known);
        }
        let each = self.all.iter().map(|projection| {
            let Some(pair) = dora(projection) else {
                return Ok(None);
            };
            let Some(magnitude) = &pair.magnitude else {
                return Ok(None);
            };
            let base = device.matrix(&projection.base)?;
            let own = (device.matrix(&pair.a)?, device.matrix(&pair.b)?);
            let magnitude = device.vector(magnitude)?;
            let factors = device.row_factors(base, own, pair.scaling, magnitude);
            Ok(Some(factors))
        });
        let made = each.collect::<Result<RowFactors<D>>>()?;
        Ok(self.row_factors.get_or_init(|| made))
    }

    /// The factors of the rows of projection `number`, and the reciprocals of their norms.
    fn factors_of(&self, number: usize, device: &D) -> Result<[&D::Buffer; 2]> {
        match self.row_factors(device)?.get(number) {
            Some(Some([factors, inverse])) => Ok([factors, inverse]),
            _ => bail!("projection {number} has no factors of rows"),
        }
    }

    /// z of a projection, panels of its height; `x` is its input after dropout, and `low` is `s A x`.
    fn unscaled(
        &self,
        projection: &Projection<'_>,
        x: &Factor<'_, D>,
        low: &Factor<'_, D>,
        device: &D,
    ) -> Result<D::Buffer> {
        let mut z = self.shape.take(device, projection.height()?);
        let mut terms = vec![Term {
            weight: device.matrix(&projection.base)?,
            x,
        }];
        if let Some(pair) = &projection.lora {
            let weight = device.matrix(&pair.b)?;
            terms.push(Term { weight, x: low });
        }
        device.products(vec![Product {
            out: &mut z,
            terms,
            onto: Onto::Zero,
            bias: None,
        }]);
        Ok(z)
    }

    /// Writes `onto + y` of projection `number` to `out`. `factor` is the input `x` as a factor, and `low` is `s A x'`.
    pub(super) fn forward_dora(
        &self,
        number: usize,
        (x, factor): (&D::Buffer, &Factor<'_, D>),
        low: &Factor<'_, D>,
        (onto, out): (&Onto<'_, D>, &mut D::Buffer),
        device: &D,
    ) -> Result<()> {
        let Some(projection) = self.all.get(number) else {
            bail!("there is no projection {number}")
        };
        let half = self.shape.half;
        let bias = projection.bias.as_ref();
        let bias = bias.map(|bias| device.vector(bias)).transpose()?;
        let dropped = self.dropped(projection, x, device);
        let own = dropped
            .as_ref()
            .map(|x| device.factor(half, x, self.features));
        let z = self.unscaled(projection, own.as_ref().unwrap_or(factor), low, device)?;
        let [factors, _] = self.factors_of(number, device)?;
        if let Some(dropped) = &dropped {
            // What was dropped goes through the weight alone.
            let mut rest = device.take(device.length(x));
            device.copy(x, &mut rest);
            device.add(&mut rest, dropped, -1.);
            let rounded = device.factor(half, &rest, self.features);
            device.products(vec![Product {
                out,
                terms: vec![Term {
                    weight: device.matrix(&projection.base)?,
                    x: &rounded,
                }],
                onto: onto.same(),
                bias,
            }]);
            device.give_factors([rounded]);
            device.give(rest);
            device.scale_features(&z, factors, None, &Onto::Out, out);
        } else {
            device.scale_features(&z, factors, bias, onto, out);
        }
        device.give_factors(own);
        device.give_all(dropped);
        device.give(z);
        Ok(())
    }

    /// `c * g` of each projection with `DoRA`.
    pub(super) fn scaled_grads(
        &self,
        grad_outs: &[&D::Buffer],
        device: &D,
    ) -> Result<Vec<Option<D::Buffer>>> {
        let each = self.all.iter().zip(grad_outs).enumerate();
        each.map(|(number, (projection, grad_out))| {
            if dora(projection).is_none() {
                return Ok(None);
            }
            let [factors, _] = self.factors_of(number, device)?;
            let mut scaled = device.take(device.length(grad_out));
            device.scale_features(grad_out, factors, None, &Onto::Zero, &mut scaled);
            Ok(Some(scaled))
        })
        .collect()
    }

    /// Adds to `grad_x` what goes back through the dropout of a projection's pair: `scaled` is `c * g`, `grad_low` is `s B^T (c * g)`.
    pub(super) fn back_through_dropout(
        &self,
        projection: &Projection<'_>,
        (grad_out, scaled): (&D::Buffer, Option<&D::Buffer>),
        grad_low: &Factor<'_, D>,
        grad_x: &mut D::Buffer,
        device: &D,
    ) -> Result<()> {
        let (Some(pair), Some(dropout)) = (&projection.lora, projection.dropout) else {
            return Ok(());
        };
        let mut own = device.take(device.length(grad_x));
        let weight = device.matrix(&pair.a)?.transposed();
        device.products(vec![alone(&mut own, weight, grad_low)]);
        if let Some(scaled) = scaled {
            // (c - 1) * g through the weight: all of g goes there without dropout.
            let mut rest = device.take(device.length(grad_out));
            device.copy(scaled, &mut rest);
            device.add(&mut rest, grad_out, -1.);
            let factor = device.factor(self.shape.half, &rest, projection.height()?);
            let weight = device.matrix(&projection.base)?.transposed();
            device.products(vec![Product {
                onto: Onto::Out,
                ..alone(&mut own, weight, &factor)
            }]);
            device.give_factors([factor]);
            device.give(rest);
        }
        device.dropout(dropout, &mut own, self.features, &self.shape.padded_index);
        device.add(grad_x, &own, 1.);
        device.give(own);
        Ok(())
    }

    /// Adds the gradient with respect to the magnitudes of projection `number` to `sum`. `x` is the input after dropout, and `low` is `s A x`.
    pub(super) fn grad_magnitude(
        &self,
        number: usize,
        x: &D::Buffer,
        low: &D::Buffer,
        grad_out: &D::Buffer,
        sum: &mut D::Buffer,
        device: &D,
    ) -> Result<()> {
        let Some(projection) = self.all.get(number) else {
            bail!("there is no projection {number}")
        };
        let half = self.shape.half;
        let x = device.factor(half, x, self.features);
        let low = device.factor(half, low, projection.rank());
        let z = self.unscaled(projection, &x, &low, device)?;
        let [_, inverse] = self.factors_of(number, device)?;
        device.feature_dots(grad_out, &z, inverse, sum);
        device.give(z);
        device.give_factors([x, low]);
        Ok(())
    }
}
