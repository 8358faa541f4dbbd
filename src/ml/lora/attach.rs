//! A new adapter beside a model: its first matrices, and what it takes from the model's weights.

use anyhow::{Context as _, bail, ensure};
use candle_core::{DType, Device, Tensor};

use super::{init, svd};
use crate::ml::adapter::{Adapter, Bias, ENDS, LoraPair, NewAdapter, is_meant};
use crate::ml::io::finite;
use crate::ml::io::weights::Weights;
use crate::ml::model::arch::Arch;
use crate::ml::model::linear::row_lengths;
use crate::ml::model::tied::{EMBEDDINGS, HEAD};
use crate::ml::quant::nf4::Nf4;

/// A new adapter for the model `weights`. Matrices are drawn from `seed` as PEFT does it; modules that are trained whole and
/// biases are copied; `DoRA`'s lengths are those of the rows as they are.
///
/// With `loftq`, the dense weights from which the 4-bit ones of the model were made, the matrices begin as the best
/// approximation of the quantisation's error (Li et al. 2023, arXiv 2310.08659, one iteration). `tell` is called with each
/// module, and may stop.
pub fn attach(
    config: &Arch,
    weights: &Weights,
    new: &NewAdapter,
    seed: u64,
    loftq: Option<&Weights>,
    tell: &mut dyn FnMut(usize, usize) -> anyhow::Result<()>,
) -> anyhow::Result<Adapter> {
    let mut adapter = init::adapter(config, new, seed)?;
    copy_whole(&mut adapter, config, weights)?;
    let total = adapter.tensors.len();
    let settings = adapter.config.clone();
    for (done, (path, pair)) in adapter.tensors.iter_mut().enumerate() {
        tell(done, total)?;
        let end = ENDS.contains(&path.as_str());
        ensure!(
            !end || (!settings.use_dora && loftq.is_none()),
            "`{}` beside `{path}` is not supported; expected it beside projections of the layers",
            if settings.use_dora {
                "use_dora"
            } else {
                "init_lora_weights: loftq"
            }
        );
        let tied = config.tie_word_embeddings && *path == ENDS[1];
        let name = if tied {
            EMBEDDINGS.to_owned()
        } else {
            format!("{path}.weight")
        };
        let mut begin = || -> anyhow::Result<()> {
            if let Some(dense) = loftq {
                (pair.a, pair.b) = error_of(weights, dense, &name, settings.rank(path))?;
            }
            if settings.use_dora {
                let base = base(weights, &name)?;
                let lengths = row_lengths(&base, &pair.a, &pair.b, settings.scaling(path))?;
                pair.magnitude = Some(lengths);
            }
            shape_fits(weights, &name, pair)
        };
        begin().with_context(|| format!("could not begin the adapter of `{path}`"))?;
    }
    Ok(adapter)
}

/// Takes in the tensors of modules that are trained whole, and biases.
fn copy_whole(adapter: &mut Adapter, config: &Arch, weights: &Weights) -> anyhow::Result<()> {
    // As in PEFT, a head that was the embeddings gets values of its own when it is trained.
    if config.tie_word_embeddings && adapter.trains(HEAD) {
        let tensor = weights.tensor(EMBEDDINGS, &Device::Cpu)?;
        adapter.saved.insert(HEAD.to_owned(), tensor);
    }
    let mut unused = adapter.config.modules_to_save.clone();
    unused.retain(|module| !adapter.saved.contains_key(HEAD) || !is_meant(module, ENDS[1]));
    for name in weights.names() {
        let is_own = name.ends_with(".weight") || name.ends_with(".bias");
        if !is_own || !adapter.trains(name) {
            continue;
        }
        ensure!(
            Nf4::shape_of(weights, name)?.is_none(),
            "`modules_to_save` means `{name}` too, which is stored in 4 bits and can't be trained itself; expected `lm_head`, \
             `embed_tokens` or a norm"
        );
        let path = name.rsplit_once('.').map_or(name, |(path, _)| path);
        unused.retain(|module| !is_meant(module, path));
        is_finite(weights, name)?;
        let tensor = weights.tensor(name, &Device::Cpu)?;
        adapter.saved.insert(name.to_owned(), tensor);
    }
    if let Some(module) = unused.first() {
        ensure!(
            false,
            "`modules_to_save` names `{module}`, but the model has no such module; expected `lm_head`, `embed_tokens`, a norm \
             or a projection"
        );
    }
    Ok(())
}

/// A weight as products see it, (out, in) in f32; one with a NaN or an infinity can't begin anything.
fn base(weights: &Weights, name: &str) -> anyhow::Result<Tensor> {
    for part in [
        name.to_owned(),
        format!("{name}.absmax"),
        format!("{name}.nested_absmax"),
    ] {
        if weights.contains(&part) {
            is_finite(weights, &part)?;
        }
    }
    Ok(match Nf4::load(weights, name)? {
        Some(nf4) => nf4.to_tensor(DType::F32, &Device::Cpu)?,
        None => weights.tensor(name, &Device::Cpu)?.to_dtype(DType::F32)?,
    })
}

fn is_finite(weights: &Weights, name: &str) -> anyhow::Result<()> {
    if let Some(found) = finite::check(weights, name)? {
        bail!("{found}; look at where the model comes from");
    }
    Ok(())
}

/// The matrices A (r, in) and B (out, r) whose product is nearest to what quantisation took from a weight.
fn error_of(
    weights: &Weights,
    dense: &Weights,
    name: &str,
    r: usize,
) -> anyhow::Result<(Tensor, Tensor)> {
    let is_quantised = Nf4::shape_of(weights, name)?.is_some();
    ensure!(
        is_quantised && Nf4::shape_of(dense, name)?.is_none(),
        "LoftQ needs the weight in 4 bits in `model` and dense in `loftq_from`"
    );
    let (base, dense) = (base(weights, name)?, base(dense, name)?);
    ensure!(
        base.dims() == dense.dims(),
        "it has the shape {:?} in `model` and {:?} in `loftq_from`, expected the model that the 4-bit one was made from",
        base.dims(),
        dense.dims()
    );
    let (out, input) = dense.dims2()?;
    let error = (dense - base)?.flatten_all()?.to_vec1::<f32>()?;
    let svd = svd::largest(&error, (out, input), r)?;
    let (mut a, mut b) = (vec![0f32; r * input], vec![0f32; out * r]);
    for (k, value) in svd.values.iter().enumerate() {
        let root = value.sqrt();
        let row = a[k * input..].iter_mut().zip(&svd.right[k]);
        row.for_each(|(a, v)| *a = (root * v) as f32);
        let column = b[k..].iter_mut().step_by(r).zip(&svd.left[k]);
        column.for_each(|(b, u)| *b = (root * u) as f32);
    }
    Ok((
        Tensor::from_vec(a, (r, input), &Device::Cpu)?,
        Tensor::from_vec(b, (out, r), &Device::Cpu)?,
    ))
}

fn shape_fits(weights: &Weights, name: &str, pair: &LoraPair) -> anyhow::Result<()> {
    let shape = match Nf4::shape_of(weights, name)? {
        Some(((out, input), _)) => vec![out, input],
        None => weights.raw(name)?.shape.to_vec(),
    };
    ensure!(
        shape == [pair.b.dim(0)?, pair.a.dim(1)?],
        "the tensor `{name}` has the shape {shape:?}, which is not that of `config.json`"
    );
    Ok(())
}

/// Whether `bias` asks for what the model has not.
pub fn lacks_biases(config: &Arch, bias: Bias) -> bool {
    bias != Bias::None && config.biases.is_empty()
}
