//! The check that a folder's files hold the tensors that its `config.json` describes.

use anyhow::{Context as _, bail, ensure};

use super::arch::Arch;
use super::tensors::{EMBEDDINGS, HEAD, is_used, tensors};
use crate::ml::io::float::Float;
use crate::ml::io::weights::Weights;
use crate::ml::quant::nf4::Nf4;

/// Whether a tensor is a buffer in old files that is recomputed from `config.json`, here as in transformers.
fn is_made_anew(name: &str) -> bool {
    name.contains("rotary_emb.inv_freq")
}

/// Compares the tensors of a folder with its architecture, by the files' headers alone. Returns the names of the tensors that the model
/// does not use, sorted.
///
/// # Errors
/// A tensor is missing, has another shape, or has values that are not floating-point numbers.
pub fn compare(arch: &Arch, weights: &Weights) -> anyhow::Result<Vec<String>> {
    // If only the head of a tied pair is stored, transformers uses it for both.
    let only_head =
        arch.tie_word_embeddings && !weights.contains(EMBEDDINGS) && weights.contains(HEAD);
    for tensor in tensors(arch) {
        if !(only_head && tensor.name == EMBEDDINGS) {
            check(weights, &tensor.name, &tensor.shape)?;
        }
    }
    if arch.tie_word_embeddings && weights.contains(HEAD) {
        check(weights, HEAD, &[arch.vocab_size, arch.hidden_size])?;
    }
    let names = weights.names().into_iter();
    let unused = names.filter(|name| !is_used(arch, name) && !is_made_anew(name));
    Ok(unused.map(str::to_owned).collect())
}

fn check(weights: &Weights, name: &str, shape: &[usize]) -> anyhow::Result<()> {
    if !weights.contains(name) {
        bail!(
            "the weights lack the tensor `{name}`, which a model has that `config.json` describes; was the folder saved whole, and by \
             `save_pretrained` of a causal language model?"
        );
    }
    let found = if let Some(((rows, columns), _)) = Nf4::stored_shape(weights, name)? {
        vec![rows, columns]
    } else {
        let raw = weights.raw(name)?;
        let dtype = raw.dtype;
        Float::from_safetensors(dtype).with_context(|| {
            format!("the tensor `{name}` is stored as {dtype:?}, expected F32, F16 or BF16")
        })?;
        raw.shape.to_vec()
    };
    ensure!(
        found == shape,
        "the tensor `{name}` has the shape {found:?}, expected {shape:?} from `config.json`"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};

    use super::*;
    use crate::ml::io::weights::save;
    use crate::ml::model::arch::{LayerArch, Projection};
    use crate::ml::testing::golden;

    fn golden_config() -> Arch {
        Arch::read(&golden::folder("model")).unwrap()
    }

    #[test]
    fn a_whole_folder_has_nothing_to_tell() {
        for name in [
            "model",
            "model_nf4",
            "adapters/model",
            "adapters/model_nf4",
            "four_bit/bf16_head",
            "four_bit/f32_skip",
        ] {
            let folder = golden::folder(name);
            let arch = Arch::read(&folder).unwrap();
            let unused = compare(&arch, &Weights::open(&folder).unwrap()).unwrap();
            assert!(unused.is_empty(), "{name}: {unused:?}");
        }
    }

    #[test]
    fn what_the_config_does_not_speak_of_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let mut tensors = golden::tensors("model/model.safetensors");
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        for (name, shape) in [
            ("model.layers.0.self_attn.rotary_emb.inv_freq", &[8][..]),
            ("model.layers.0.self_attn.q_proj.bias", &[64]),
            ("model.layers.3.input_layernorm.weight", &[64]),
            ("model.layers.01.input_layernorm.weight", &[64]),
            ("model.vision_tower.patch.weight", &[2, 2]),
        ] {
            tensors.insert(name.into(), zeros(shape));
        }
        save(&path, &tensors, &[]).unwrap();
        let unused = compare(&golden_config(), &Weights::open(folder.path()).unwrap()).unwrap();
        // As transformers' report of unexpected keys.
        let expected = [
            "model.layers.0.self_attn.q_proj.bias",
            "model.layers.01.input_layernorm.weight",
            "model.layers.3.input_layernorm.weight",
            "model.vision_tower.patch.weight",
        ];
        assert_eq!(unused, expected);
    }

    #[test]
    fn of_a_tied_pair_either_is_enough() {
        let mut arch = golden_config();
        arch.tie_word_embeddings = true;
        let compared = |gone: &[&str]| {
            let folder = tempfile::tempdir().unwrap();
            let mut tensors = golden::tensors("model/model.safetensors");
            tensors.retain(|name, _| !gone.contains(&name.as_str()));
            save(&folder.path().join("model.safetensors"), &tensors, &[]).unwrap();
            compare(&arch, &Weights::open(folder.path()).unwrap())
                .map_err(|error| error.to_string())
        };
        for gone in [&[][..], &[HEAD], &[EMBEDDINGS]] {
            assert_eq!(compared(gone), Ok(Vec::new()), "{gone:?}");
        }
        let error = compared(&[HEAD, EMBEDDINGS]).unwrap_err();
        assert!(error.contains(EMBEDDINGS), "{error}");
    }

    #[test]
    fn what_is_missing_or_odd_is_named() {
        let weights = Weights::open(&golden::folder("model")).unwrap();
        let fails = |change: &dyn Fn(&mut Arch)| {
            let mut arch = golden_config();
            change(&mut arch);
            compare(&arch, &weights).unwrap_err().to_string()
        };
        let error = fails(&|arch| arch.layers = vec![LayerArch::default(); 1 << 14]);
        assert!(
            error.contains("`model.layers.3.self_attn.q_proj.weight`"),
            "{error}"
        );
        let error = fails(&|arch| arch.biases = Projection::ATTENTION.to_vec());
        assert!(
            error.contains("lack the tensor `model.layers.0.self_attn.q_proj.bias`"),
            "{error}"
        );
        let error = fails(&|arch| arch.vocab_size = 1000);
        assert!(error.contains("[1024, 64], expected [1000, 64]"), "{error}");
        let folder = tempfile::tempdir().unwrap();
        let mut tensors = golden::tensors("model/model.safetensors");
        let odd = tensors["model.norm.weight"].to_dtype(DType::F64).unwrap();
        tensors.insert("model.norm.weight".into(), odd);
        save(&folder.path().join("model.safetensors"), &tensors, &[]).unwrap();
        let weights = Weights::open(folder.path()).unwrap();
        let error = compare(&golden_config(), &weights).unwrap_err().to_string();
        assert!(
            error.contains("`model.norm.weight` is stored as F64"),
            "{error}"
        );
    }
}
