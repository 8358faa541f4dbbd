//! A new adapter for a model: its initial matrices, and what it takes from the model's weights.

use std::borrow::Cow;

use anyhow::{Context as _, bail, ensure};
use candle_core::{DType, Device, Tensor};

use super::{init, principal, svd};
use crate::ml::adapter::{Adapter, Bias, LoraPair, NewAdapter, TokenRows, names_module};
use crate::ml::io::finite;
use crate::ml::io::float::Float;
use crate::ml::io::weights::Weights;
use crate::ml::model::arch::Arch;
use crate::ml::model::linear::row_norms;
use crate::ml::model::tensors::{EMBED_TOKENS, EMBEDDINGS, ENDS, HEAD, LM_HEAD, weight_name};
use crate::ml::quant::nf4::Nf4;

/// How the matrices of a new adapter begin.
#[derive(Clone, Copy)]
pub enum Beginning<'a> {
    /// As they are drawn ([`NewAdapter::init_lora_weights`]).
    Drawn,
    /// With random matrices whose product is 0 (PEFT's `orthogonal_init`).
    Orthogonal,
    /// With the best low-rank approximation of the quantisation error of these dense weights, from which the model's 4-bit ones were made (Li
    /// et al. 2023, arXiv 2310.08659, algorithm 1, one iteration).
    Loftq(&'a Weights),
    /// With the best low-rank approximation of the weight itself (`PiSSA`, arXiv 2404.02948).
    Pissa,
    /// With the first columns and rows of the QR decomposition of the weight (`OLoRA`, arXiv 2406.01775).
    Olora,
}

impl Beginning<'_> {
    /// PEFT's name of it, for those that look at weights.
    fn name(&self) -> Option<&'static str> {
        match self {
            Self::Drawn | Self::Orthogonal => None,
            Self::Loftq(_) => Some("loftq"),
            Self::Pissa => Some("pissa"),
            Self::Olora => Some("olora"),
        }
    }
}

/// Makes a new adapter for the model with the given weights. Matrices are drawn from `seed` as PEFT draws them, or begin as `beginning` says;
/// fully trained modules and biases are copied, and `DoRA`'s magnitudes are the row norms of the weights.
///
/// `progress` is called before each module with the number of finished modules and their total, and may stop with an error.
///
/// # Errors
/// The settings don't fit the model, a weight is missing, has another shape or a value that is not finite, or `progress` returns an error.
pub fn attach(
    arch: &Arch,
    weights: &Weights,
    new: &NewAdapter,
    seed: u64,
    beginning: Beginning<'_>,
    progress: &mut dyn FnMut(usize, usize) -> anyhow::Result<()>,
) -> anyhow::Result<Adapter> {
    let mut new = Cow::Borrowed(new);
    // As PEFT does for `task_type: SEQ_CLS`: a head that gives scores is trained whole.
    if arch.scores && !new.modules_to_save.iter().any(|name| name == "score") {
        new.to_mut().modules_to_save.push("score".into());
    }
    let orthogonal = matches!(beginning, Beginning::Orthogonal);
    let mut adapter = if orthogonal {
        init::orthogonal(arch, &new, seed)?
    } else {
        init::adapter(arch, &new, seed)?
    };
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
        let of_weights = beginning.name();
        ensure!(
            !end || (!settings.use_dora && of_weights.is_none()),
            "`{}` beside `{path}` is not supported; expected it beside projections of the layers",
            match of_weights {
                _ if settings.use_dora => "use_dora".to_owned(),
                name => format!("init_lora_weights: {}", name.unwrap_or_default()),
            }
        );
        let tied = arch.tie_word_embeddings && *path == LM_HEAD;
        let name = if tied {
            EMBEDDINGS.to_owned()
        } else {
            weight_name(path)
        };
        let mut begin = || -> anyhow::Result<()> {
            let (r, scaling) = (settings.rank(path), settings.scaling(path));
            match beginning {
                Beginning::Drawn => {}
                Beginning::Orthogonal => round_as(pair, weights, &name)?,
                Beginning::Loftq(dense) => {
                    (pair.a, pair.b) = quantisation_error(weights, dense, &name, r)?;
                }
                Beginning::Pissa => {
                    (pair.a, pair.b) = principal::singular(&base(weights, &name)?, r, scaling)?;
                }
                Beginning::Olora => {
                    (pair.a, pair.b) = principal::orthonormal(&base(weights, &name)?, r)?;
                }
            }
            if settings.use_dora {
                let base = base(weights, &name)?;
                let norms = row_norms(&base, &pair.a, &pair.b, scaling)?;
                pair.magnitude = Some(norms);
            }
            check_shape(weights, &name, pair)
        };
        begin().with_context(|| format!("could not begin the adapter of `{path}`"))?;
    }
    Ok(adapter)
}

/// Rounds a pair to the type of a dense weight, in which PEFT makes it.
fn round_as(pair: &mut LoraPair, weights: &Weights, name: &str) -> anyhow::Result<()> {
    if Nf4::stored_shape(weights, name)?.is_some() {
        return Ok(());
    }
    let float = Float::from_safetensors(weights.raw(name)?.dtype);
    let dtype = float.map_or(DType::F32, Float::dtype);
    for matrix in [&mut pair.a, &mut pair.b] {
        *matrix = matrix.to_dtype(dtype)?.to_dtype(DType::F32)?;
    }
    Ok(())
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
    let (a, b) = principal::factors(&svd.values, &svd, (out, input), r);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ml::adapter::Names;
    use crate::ml::testing::golden;

    /// An adapter that begins in this way, as in `generate_adapters.py`.
    fn begin(model: &str, beginning: Beginning<'_>, r: usize) -> anyhow::Result<Adapter> {
        let folder = golden::folder(model);
        let new = NewAdapter {
            r,
            lora_alpha: 2. * r as f64,
            target_modules: Names::List(vec!["k_proj".into(), "down_proj".into()]),
            ..NewAdapter::default()
        };
        let arch = Arch::read(&folder)?;
        let weights = Weights::open(&folder)?;
        attach(&arch, &weights, &new, 3407, beginning, &mut |_, _| Ok(()))
    }

    #[test]
    fn pairs_begin_as_those_of_peft() {
        let theirs = golden::tensors("adapters/begin.safetensors");
        let weights = Weights::open(&golden::folder("model")).unwrap();
        for (name, beginning) in [
            ("pissa", Beginning::Pissa),
            ("olora", Beginning::Olora),
            ("orthogonal", Beginning::Orthogonal),
        ] {
            let ours = begin("model", beginning, 4).unwrap();
            for path in [
                "model.layers.0.self_attn.k_proj",
                "model.layers.1.mlp.down_proj",
            ] {
                let pair = &ours.tensors[path];
                let golden = |what: &str| &theirs[&format!("{name}.{path}.{what}")];
                let (mut a, mut b) = (pair.a.clone(), pair.b.clone());
                if name == "pissa" {
                    // Signs are anybody's choice, in A and B alike.
                    let along = (&a * golden("a")).unwrap().sum_keepdim(1).unwrap();
                    let signs = along.sign().unwrap();
                    a = a.broadcast_mul(&signs).unwrap();
                    b = b.broadcast_mul(&signs.t().unwrap()).unwrap();
                }
                let far = golden::far(&a, golden("a")).max(golden::far(&b, golden("b")));
                // Vectors of singular values that are close to each other are known less exactly than their products.
                let bound = if name == "pissa" { 2e-5 } else { 2e-6 };
                println!("| init_lora_weights | {name} | {far:.1e} | | {bound:.0e} |");
                assert!(far < bound, "{name} {path}: {far}");
                if name == "orthogonal" {
                    let product = pair.b.matmul(&pair.a).unwrap();
                    let zero = golden::far(&product, &product.zeros_like().unwrap());
                    assert!(zero < 1e-7, "{zero}");
                    continue;
                }
                let taken = (pair.b.matmul(&pair.a).unwrap() * ours.config.scaling(path)).unwrap();
                let rest = (base(&weights, &weight_name(path)).unwrap() - taken).unwrap();
                let far = golden::far(&rest, golden("rest"));
                println!("| init_lora_weights | {name}, what is left | {far:.1e} | | 5e-6 |");
                assert!(far < 5e-6, "{name} {path}: {far}");
            }
            // Done is done: PEFT must not begin again.
            assert_eq!(ours.config.raw["init_lora_weights"], true);
        }
    }

    #[test]
    fn ranks_that_don_t_fit_are_told() {
        let told = |beginning, r| format!("{:#}", begin("model", beginning, r).unwrap_err());
        assert!(told(Beginning::Orthogonal, 5).contains("expected an even one"));
        assert!(told(Beginning::Orthogonal, 2).contains("fewer than 16"));
        for beginning in [Beginning::Pissa, Beginning::Olora] {
            let told = told(beginning, 33);
            assert!(told.contains("32") && told.contains("k_proj"), "{told}");
        }
        // The quantised weights are taken as they are.
        assert!(begin("model_nf4", Beginning::Olora, 4).is_ok());
    }
}
