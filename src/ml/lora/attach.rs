//! A new adapter for a model: its initial matrices, and what it takes from the model's weights.

use std::borrow::Cow;

use anyhow::{Context as _, bail, ensure};
use candle_core::{DType, Device, Tensor};

use super::{init, svd};
use crate::ml::adapter::{Adapter, Bias, LoraPair, NewAdapter, TokenRows, names_module};
use crate::ml::io::finite;
use crate::ml::io::float::Float;
use crate::ml::io::weights::Weights;
use crate::ml::model::arch::Arch;
use crate::ml::model::linear::row_norms;
use crate::ml::model::tensors::{EMBED_TOKENS, EMBEDDINGS, ENDS, HEAD, LM_HEAD, weight_name};
use crate::ml::quant::nf4::Nf4;

/// Makes a new adapter for the model with the given weights. Matrices are drawn from `seed` as PEFT draws them, fully trained modules
/// and biases are copied, and `DoRA`'s magnitudes are the row norms of the weights.
///
/// With `loftq`, the dense weights from which the model's 4-bit ones were made, the matrices start as the best low-rank approximation of
/// the quantisation error (Li et al. 2023, arXiv 2310.08659, algorithm 1, one iteration). `progress` is called before each module with the
/// number of finished modules and their total, and may stop with an error.
///
/// # Errors
/// The settings don't fit the model, a weight is missing, has another shape or a value that is not finite, or `progress` returns an error.
pub fn attach(
    arch: &Arch,
    weights: &Weights,
    new: &NewAdapter,
    seed: u64,
    loftq: Option<&Weights>,
    progress: &mut dyn FnMut(usize, usize) -> anyhow::Result<()>,
) -> anyhow::Result<Adapter> {
    let mut new = Cow::Borrowed(new);
    // As PEFT does for `task_type: SEQ_CLS`: a head that gives scores is trained whole.
    if arch.scores && !new.modules_to_save.iter().any(|name| name == "score") {
        new.to_mut().modules_to_save.push("score".into());
    }
    let mut adapter = init::adapter(arch, &new, seed)?;
    if arch.scores {
        adapter.config = adapter.config.classifying();
    }
    copy_whole(&mut adapter, arch, weights)?;
    copy_rows(&mut adapter, arch, weights)?;
    let total = adapter.tensors.len();
    let settings = adapter.config.clone();
    for (done, (path, pair)) in adapter.tensors.iter_mut().enumerate() {
        progress(done, total)?;
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
        let tied = arch.tie_word_embeddings && *path == LM_HEAD;
        let name = if tied {
            EMBEDDINGS.to_owned()
        } else {
            weight_name(path)
        };
        let mut begin = || -> anyhow::Result<()> {
            if let Some(dense) = loftq {
                (pair.a, pair.b) = quantisation_error(weights, dense, &name, settings.rank(path))?;
            }
            if settings.use_dora {
                let base = base(weights, &name)?;
                let norms = row_norms(&base, &pair.a, &pair.b, settings.scaling(path))?;
                pair.magnitude = Some(norms);
            }
            check_shape(weights, &name, pair)
        };
        begin().with_context(|| format!("could not begin the adapter of `{path}`"))?;
    }
    Ok(adapter)
}

/// Copies the tensors of fully trained modules, and biases.
fn copy_whole(adapter: &mut Adapter, arch: &Arch, weights: &Weights) -> anyhow::Result<()> {
    // As in PEFT, a tied head gets values of its own when it is trained.
    if arch.tie_word_embeddings && adapter.trains(HEAD) {
        let tensor = weights.tensor(EMBEDDINGS, &Device::Cpu)?;
        adapter.saved.insert(HEAD.to_owned(), tensor);
    }
    let mut unused = adapter.config.modules_to_save.clone();
    unused.retain(|module| !adapter.saved.contains_key(HEAD) || !names_module(module, LM_HEAD));
    for name in weights.names() {
        let is_own = name.ends_with(".weight") || name.ends_with(".bias");
        if !is_own || !adapter.trains(name) {
            continue;
        }
        ensure!(
            Nf4::stored_shape(weights, name)?.is_none(),
            "`modules_to_save` means `{name}` too, which is stored in 4 bits and can't be trained itself; expected `lm_head`, \
             `embed_tokens` or a norm"
        );
        let path = name.rsplit_once('.').map_or(name, |(path, _)| path);
        unused.retain(|module| !names_module(module, path));
        ensure_finite(weights, name)?;
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

/// Copies the rows of tokens that are trained.
fn copy_rows(adapter: &mut Adapter, arch: &Arch, weights: &Weights) -> anyhow::Result<()> {
    for path in ENDS {
        let Some(ids) = adapter.config.token_ids(path) else {
            continue;
        };
        let tied = arch.tie_word_embeddings && path == LM_HEAD;
        // As in PEFT, a head that is the embeddings follows them if both name the same tokens.
        if tied && adapter.config.token_ids(EMBED_TOKENS) == Some(ids) {
            continue;
        }
        let name = if tied {
            EMBEDDINGS.to_owned()
        } else {
            weight_name(path)
        };
        let raw = weights.raw(&name)?;
        let float = Float::from_safetensors(raw.dtype);
        let float = float.filter(|_| raw.shape == [arch.vocab_size, arch.hidden_size]);
        let float = float.with_context(|| {
            format!("`{name}` is no matrix of floats of the shape in `config.json`, so its rows can't be trained")
        })?;
        let mut values = Vec::with_capacity(ids.len() * arch.hidden_size);
        for id in ids {
            ensure!(
                (*id as usize) < arch.vocab_size,
                "`trainable_token_indices` has the token {id}, but the model's vocabulary has {}; hint: `add_tokens` makes room for new ones",
                arch.vocab_size
            );
            let mut bytes = vec![0; arch.hidden_size * float.size()];
            raw.read(*id as usize * bytes.len(), &mut bytes)?;
            let mut row = vec![0f32; arch.hidden_size];
            float.read(&bytes, &mut row);
            values.extend(row);
        }
        let rows = TokenRows {
            ids: ids.to_vec(),
            values: Tensor::from_vec(values, (ids.len(), arch.hidden_size), &Device::Cpu)?,
        };
        ensure!(
            rows.floats()?.iter().all(|x| x.is_finite()),
            "a row of `{name}` holds a NaN or an infinity; look at where the model comes from"
        );
        adapter.token_rows.insert(path.to_owned(), rows);
    }
    Ok(())
}

/// Reads a weight (out, in) in f32, dequantised if needed. A NaN or an infinity in it is an error.
fn base(weights: &Weights, name: &str) -> anyhow::Result<Tensor> {
    for part in [
        name.to_owned(),
        format!("{name}.absmax"),
        format!("{name}.nested_absmax"),
    ] {
        if weights.contains(&part) {
            ensure_finite(weights, &part)?;
        }
    }
    Ok(match Nf4::load(weights, name)? {
        Some(nf4) => nf4.to_tensor(DType::F32, &Device::Cpu)?,
        None => weights.tensor(name, &Device::Cpu)?.to_dtype(DType::F32)?,
    })
}

fn ensure_finite(weights: &Weights, name: &str) -> anyhow::Result<()> {
    if let Some(found) = finite::check(weights, name)? {
        bail!("{found}; look at where the model comes from");
    }
    Ok(())
}

/// The matrices A (r, in) and B (out, r) whose product B A is nearest to the quantisation error of a weight, by its singular values.
fn quantisation_error(
    weights: &Weights,
    dense: &Weights,
    name: &str,
    r: usize,
) -> anyhow::Result<(Tensor, Tensor)> {
    let is_quantised = Nf4::stored_shape(weights, name)?.is_some();
    ensure!(
        is_quantised && Nf4::stored_shape(dense, name)?.is_none(),
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
    let svd = svd::largest_singular_values(&error, (out, input), r)?;
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

fn check_shape(weights: &Weights, name: &str, pair: &LoraPair) -> anyhow::Result<()> {
    let shape = match Nf4::stored_shape(weights, name)? {
        Some(((out, input), _)) => vec![out, input],
        None => weights.raw(name)?.shape.to_vec(),
    };
    ensure!(
        shape == [pair.b.dim(0)?, pair.a.dim(1)?],
        "the tensor `{name}` has the shape {shape:?}, which is not that of `config.json`"
    );
    Ok(())
}

/// Whether `bias` selects biases and the model has none.
pub fn lacks_biases(arch: &Arch, bias: Bias) -> bool {
    bias != Bias::None && arch.biases.is_empty()
}
