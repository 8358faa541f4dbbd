//! Finds out why a merged weight is not finite: because of the model, the adapter, or the type.

use super::Update;
use crate::ml::io::finite;
use crate::ml::io::float::Float;

/// A clause that says why W + s B A is not finite, for a piece that starts at value `first`.
pub(crate) fn why(
    first: usize,
    bytes: &[u8],
    float: Float,
    update: Option<&Update>,
    read: &dyn Fn(usize) -> anyhow::Result<f32>,
) -> anyhow::Result<String> {
    let at = first + finite::first_in(float, bytes).map_or(0, |(at, _)| at);
    let mut value = [read(at)?];
    if !value[0].is_finite() {
        let found = finite::named(value[0]);
        return Ok(format!(
            "the model holds {found} there (value {at}, from 0) before anything is added; look at where the model comes from"
        ));
    }
    if let Some(update) = update {
        update.add(at, &mut value);
    }
    if !value[0].is_finite() {
        return Ok(format!(
            "adding the adapter's update leads to {} (value {at}, from 0); the adapter may have diverged in its training",
            finite::named(value[0])
        ));
    }
    Ok(format!(
        "value {at} (from 0) becomes {:e}, which {} can't hold; hint: merge into weights in bfloat16 or float32",
        value[0],
        float.name()
    ))
}
