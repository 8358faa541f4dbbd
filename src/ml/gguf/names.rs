//! llama.cpp's architectures that are families of ours, and what tensors are called on both sides.
//!
//! The names are those of the `gguf` package (`constants.py`, `tensor_mapping.py`) and of transformers.

/// An architecture of llama.cpp: how a file of it differs from the folder of the same model.
#[derive(Debug, PartialEq, Eq)]
pub struct GgufArch {
    /// Its name in `general.architecture`, which is also the prefix of its keys.
    pub name: &'static str,
    /// The families that are stored by this name, by their `model_type`.
    pub model_types: &'static [&'static str],
    /// Whether the rows of q and k are permuted within each head: see [`GgufArch::permutes`].
    pub permuted: bool,
    /// Whether norms are stored as `1 + w` (Gemma).
    pub norms_plus_one: bool,
    norms: &'static [Name],
}

/// What a tensor of a layer is called in GGUF and in transformers, behind the number of the layer.
type Name = (&'static str, &'static str);

/// Norms before both blocks.
const BEFORE: &[Name] = &[
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
];
/// Norms before and after both blocks (Gemma 2 and 3).
const AROUND: &[Name] = &[
    ("attn_norm", "input_layernorm"),
    ("post_attention_norm", "post_attention_layernorm"),
    ("ffn_norm", "pre_feedforward_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
];
/// Norms after both blocks (`OLMo` 2).
const AFTER: &[Name] = &[
    ("post_attention_norm", "post_attention_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
];
/// The projections of a layer and the norms of q and k. Of two that have one name in GGUF, the family's file has only one: see
/// [`FUSED`].
const PROJECTIONS: &[Name] = &[
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];
/// The projections of Phi-3, fused in both formats in the same order: q, k, v and gate, up.
const FUSED: &[Name] = &[
    ("attn_qkv", "self_attn.qkv_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_up", "mlp.gate_up_proj"),
    ("ffn_down", "mlp.down_proj"),
];
/// The tensors that belong to no layer.
const OUTSIDE: &[Name] = &[
    ("token_embd", "model.embed_tokens"),
    ("output_norm", "model.norm"),
    ("output", "lm_head"),
];

/// An architecture like Llama.
const fn arch(name: &'static str, model_types: &'static [&'static str]) -> GgufArch {
    GgufArch {
        name,
        model_types,
        permuted: false,
        norms_plus_one: false,
        norms: BEFORE,
    }
}

/// All supported architectures.
pub const ARCHS: &[GgufArch] = &[
    GgufArch {
        permuted: true,
        ..arch("llama", &["llama", "mistral"])
    },
    arch("qwen2", &["qwen2"]),
    arch("qwen3", &["qwen3"]),
    GgufArch {
        permuted: true,
        ..arch("smollm3", &["smollm3"])
    },
    GgufArch {
        permuted: true,
        ..arch("granite", &["granite"])
    },
    GgufArch {
        norms_plus_one: true,
        ..arch("gemma", &["gemma"])
    },
    GgufArch {
        norms_plus_one: true,
        norms: AROUND,
        ..arch("gemma2", &["gemma2"])
    },
    GgufArch {
        norms_plus_one: true,
        norms: AROUND,
        ..arch("gemma3", &["gemma3_text"])
    },
    GgufArch {
        norms: AFTER,
        ..arch("olmo2", &["olmo2", "olmo3"])
    },
    arch("phi3", &["phi3"]),
];

impl GgufArch {
    /// The architecture called `name` in `general.architecture`.
    pub fn by_name(name: &str) -> Option<&'static Self> {
        ARCHS.iter().find(|arch| arch.name == name)
    }

    /// The architecture of a family, by its `model_type`.
    pub fn by_model_type(model_type: &str) -> Option<&'static Self> {
        ARCHS
            .iter()
            .find(|arch| arch.model_types.contains(&model_type))
    }

    fn projections(&self) -> &'static [Name] {
        if self.name == "phi3" {
            FUSED
        } else {
            PROJECTIONS
        }
    }

    /// transformers' name of a tensor (`blk.0.attn_q.weight` is `model.layers.0.self_attn.q_proj.weight`); `None` for a tensor
    /// that is no weight of the model there, such as the factors of the rotary embedding.
    pub fn to_transformers(&self, name: &str) -> Option<String> {
        let (rest, kind) = split(name)?;
        if let Some((_, theirs)) = OUTSIDE.iter().find(|(ours, _)| *ours == rest) {
            return Some(format!("{theirs}.{kind}"));
        }
        let (layer, rest) = rest.strip_prefix("blk.")?.split_once('.')?;
        let layer = number(layer)?;
        let mut names = self.projections().iter().chain(self.norms);
        let (_, theirs) = names.find(|(ours, _)| *ours == rest)?;
        Some(format!("model.layers.{layer}.{theirs}.{kind}"))
    }

    /// The name in GGUF of a tensor of transformers; `None` for one that this architecture doesn't have.
    pub fn to_gguf(&self, name: &str) -> Option<String> {
        let (rest, kind) = split(name)?;
        if let Some((ours, _)) = OUTSIDE.iter().find(|(_, theirs)| *theirs == rest) {
            return Some(format!("{ours}.{kind}"));
        }
        let (layer, rest) = rest.strip_prefix("model.layers.")?.split_once('.')?;
        let layer = number(layer)?;
        let mut names = self.projections().iter().chain(self.norms);
        let (ours, _) = names.find(|(_, theirs)| *theirs == rest)?;
        Some(format!("blk.{layer}.{ours}.{kind}"))
    }

    /// Whether the rows of this tensor (by transformers' name) are permuted. Within a head of `d` rows, row `i + p * d/2` of
    /// transformers (i below d/2, p 0 or 1) is row `2 * i + p` in GGUF, because llama.cpp rotates neighbours and transformers halves
    /// (`LlamaModel.permute` in llama.cpp's converter). Biases are permuted as weights are.
    pub fn permutes(&self, name: &str) -> bool {
        self.permuted && (name.contains(".q_proj.") || name.contains(".k_proj."))
    }

    /// Whether 1 is added to this tensor (by transformers' name) in GGUF: all norms of Gemma, those of q and k included.
    pub fn adds_one(&self, name: &str) -> bool {
        self.norms_plus_one && name.ends_with("norm.weight")
    }
}

/// A name without its last part, which must be `weight` or `bias`.
fn split(name: &str) -> Option<(&str, &str)> {
    name.rsplit_once('.')
        .filter(|(_, kind)| ["weight", "bias"].contains(kind))
}

/// The number of a layer in its one spelling, so that two names can't mean one tensor.
fn number(text: &str) -> Option<u32> {
    let number = text.parse().ok()?;
    Some(number).filter(|number: &u32| number.to_string() == text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back() {
        for arch in ARCHS {
            let layer = arch.projections().iter().chain(arch.norms);
            let mut names: Vec<_> = layer
                .map(|(ours, _)| format!("blk.7.{ours}.weight"))
                .collect();
            names.extend(OUTSIDE.iter().map(|(ours, _)| format!("{ours}.weight")));
            names.push("blk.12.attn_output.bias".into());
            for name in names {
                let theirs = arch.to_transformers(&name).unwrap();
                assert_eq!(arch.to_gguf(&theirs), Some(name), "{}", arch.name);
            }
            for model_type in arch.model_types {
                assert_eq!(GgufArch::by_model_type(model_type), Some(arch));
            }
            assert_eq!(GgufArch::by_name(arch.name), Some(arch));
        }
    }

    #[test]
    fn what_is_no_weight_has_no_name() {
        let llama = GgufArch::by_name("llama").unwrap();
        for name in [
            "rope_freqs.weight",
            "blk.0.attn_qkv.weight",
            "blk.0.post_ffw_norm.weight",
            "blk.00.attn_q.weight",
            "blk.-1.attn_q.weight",
            "blk.0.attn_q",
            "blk.attn_q.weight",
            "weight",
        ] {
            assert_eq!(llama.to_transformers(name), None, "{name}");
        }
        let gemma = GgufArch::by_name("gemma3").unwrap();
        let norm = "model.layers.3.post_attention_layernorm.weight";
        assert_eq!(
            gemma.to_gguf(norm).unwrap(),
            "blk.3.post_attention_norm.weight"
        );
        assert_eq!(llama.to_gguf(norm).unwrap(), "blk.3.ffn_norm.weight");
        assert!(gemma.adds_one(norm) && !llama.adds_one(norm));
        assert!(gemma.adds_one("model.norm.weight"));
        assert!(gemma.adds_one("model.layers.0.self_attn.q_norm.weight"));
        assert!(!gemma.adds_one("model.layers.0.self_attn.q_proj.weight"));
        assert!(llama.permutes("model.layers.0.self_attn.k_proj.weight"));
        assert!(!llama.permutes("model.layers.0.self_attn.v_proj.weight"));
        assert!(!gemma.permutes("model.layers.0.self_attn.k_proj.weight"));
    }
}
