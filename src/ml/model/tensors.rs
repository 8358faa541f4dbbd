//! The tensors of a Llama by name and shape, and whether a folder's files hold them.

use anyhow::{Context as _, bail, ensure};

use super::arch::Arch;
use crate::ml::io::float::Float;
use crate::ml::io::weights::Weights;
use crate::ml::lora::init::projections;
use crate::ml::quant::nf4::{Nf4, owner_of};

/// The embeddings, which are the head too where it is tied.
pub const EMBEDDINGS: &str = "model.embed_tokens.weight";
/// The head.
pub const HEAD: &str = "lm_head.weight";

/// A tensor's name and shape.
type Named = (String, Vec<usize>);

/// The tensors that a model of this shape needs, in the order of torch's modules, made one after another: a config may claim
/// any number of layers.
fn needed(config: &Arch) -> impl Iterator<Item = Named> {
    let (vocabulary, hidden) = (config.vocab_size, config.hidden_size);
    let norm = move |name: String| (name, vec![hidden]);
    let first = [(EMBEDDINGS.to_owned(), vec![vocabulary, hidden])];
    let layers = (0..config.num_hidden_layers()).flat_map(move |layer| {
        let path = format!("model.layers.{layer}");
        let mut tensors = Vec::new();
        for projection in projections(config) {
            let (out, input) = projection.shape;
            let name = format!("{path}.{}", projection.path);
            tensors.push((format!("{name}.weight"), vec![out, input]));
            if config.has_bias(projection.kind) {
                tensors.push((format!("{name}.bias"), vec![out]));
            }
        }
        tensors.push(norm(format!("{path}.input_layernorm.weight")));
        tensors.push(norm(format!("{path}.post_attention_layernorm.weight")));
        tensors
    });
    let head = (!config.tie_word_embeddings).then(|| (HEAD.to_owned(), vec![vocabulary, hidden]));
    let last = [norm("model.norm.weight".to_owned())];
    first.into_iter().chain(layers).chain(last).chain(head)
}

/// Whether a model of this shape uses a tensor called `name`, or a part of one in 4 bits.
pub fn is_used(config: &Arch, name: &str) -> bool {
    let name = owner_of(name).unwrap_or(name);
    if [EMBEDDINGS, HEAD, "model.norm.weight"].contains(&name) {
        return true;
    }
    let Some(rest) = name.strip_prefix("model.layers.") else {
        return false;
    };
    let Some((number, rest)) = rest.split_once('.') else {
        return false;
    };
    let in_model = number
        .parse::<usize>()
        .is_ok_and(|layer| layer < config.num_hidden_layers() && layer.to_string() == number);
    let is_norm = ["input_layernorm.weight", "post_attention_layernorm.weight"].contains(&rest);
    let of_projection =
        projections(config)
            .iter()
            .any(|projection| match rest.strip_prefix(projection.path) {
                Some(".weight") => true,
                Some(".bias") => config.has_bias(projection.kind),
                _ => false,
            });
    in_model && (is_norm || of_projection)
}

/// Buffers of old files that are made anew from the config, here and in transformers.
fn is_made_anew(name: &str) -> bool {
    name.contains("rotary_emb.inv_freq")
}

/// Compares a folder's tensors with what its config says, by their headers alone. A tensor that is missing or has another
/// shape is an error, as is one whose values are no floats. Gives the names of those that the model doesn't use, sorted.
pub fn compare(config: &Arch, weights: &Weights) -> anyhow::Result<Vec<String>> {
    // A tied pair of which only the head is stored: transformers takes it for both.
    let only_head =
        config.tie_word_embeddings && !weights.contains(EMBEDDINGS) && weights.contains(HEAD);
    for (name, shape) in needed(config) {
        if !(only_head && name == EMBEDDINGS) {
            check(weights, &name, &shape)?;
        }
    }
    if config.tie_word_embeddings && weights.contains(HEAD) {
        check(weights, HEAD, &[config.vocab_size, config.hidden_size])?;
    }
    let names = weights.names().into_iter();
    let unused = names.filter(|name| !is_used(config, name) && !is_made_anew(name));
    Ok(unused.map(str::to_owned).collect())
}

fn check(weights: &Weights, name: &str, shape: &[usize]) -> anyhow::Result<()> {
    if !weights.contains(name) {
        bail!(
            "the weights lack the tensor `{name}`, which a model has that `config.json` describes; was the folder saved whole, and by \
             `save_pretrained` of a causal language model?"
        );
    }
    let found = if let Some(((rows, columns), _)) = Nf4::shape_of(weights, name)? {
        vec![rows, columns]
    } else {
        let raw = weights.raw(name)?;
        let dtype = raw.dtype;
        Float::of(dtype).with_context(|| {
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
            let config = Arch::read(&folder).unwrap();
            let unused = compare(&config, &Weights::open(&folder).unwrap()).unwrap();
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
        let mut config = golden_config();
        config.tie_word_embeddings = true;
        let compared = |gone: &[&str]| {
            let folder = tempfile::tempdir().unwrap();
            let mut tensors = golden::tensors("model/model.safetensors");
            tensors.retain(|name, _| !gone.contains(&name.as_str()));
            save(&folder.path().join("model.safetensors"), &tensors, &[]).unwrap();
            compare(&config, &Weights::open(folder.path()).unwrap())
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
            let mut config = golden_config();
            change(&mut config);
            compare(&config, &weights).unwrap_err().to_string()
        };
        let error = fails(&|config| config.layers = vec![LayerArch::default(); 1 << 14]);
        assert!(
            error.contains("`model.layers.3.self_attn.q_proj.weight`"),
            "{error}"
        );
        let error = fails(&|config| config.biases = Projection::ATTENTION.to_vec());
        assert!(
            error.contains("lack the tensor `model.layers.0.self_attn.q_proj.bias`"),
            "{error}"
        );
        let error = fails(&|config| config.vocab_size = 1000);
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
