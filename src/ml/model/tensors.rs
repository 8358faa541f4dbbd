//! The table of a model's modules and tensors: names, shapes and roles.
//!
//! Loading, layer-wise reading, creating, quantising, attaching, merging, comparing and `show` all use it, and no module's name appears
//! anywhere else. Names and their order are those of torch's modules in transformers' `modeling_llama.py` and the files derived from it.
//!
//! A module that a new family adds to the layer is a line of [`LAYER`] or of [`norms`], with its shapes in [`tensors_of`].
//!
//! A norm's [`NormKind`] is its place in the layer, and its name depends on which others there are:
//!
//! | place | Llama | OLMo 2 | Gemma 2 |
//! |---|---|---|---|
//! | before the attention | `input_layernorm` | | `input_layernorm` |
//! | after the attention | | `post_attention_layernorm` | `post_attention_layernorm` |
//! | before the feed-forward block | `post_attention_layernorm` | | `pre_feedforward_layernorm` |
//! | after the feed-forward block | | `post_feedforward_layernorm` | `post_feedforward_layernorm` |

use super::arch::{Arch, NormPlaces, Projection, QkNorm};
pub use super::arch::{HEAD, SCORE};
use crate::ml::quant::nf4::owner_of;

/// The embeddings' module.
pub const EMBED_TOKENS: &str = "model.embed_tokens";
/// The embeddings (vocabulary, hidden), which are also the weight of a tied head.
pub const EMBEDDINGS: &str = "model.embed_tokens.weight";
/// The head's module.
pub const LM_HEAD: &str = "lm_head";
/// The modules at both ends, whose weights have a row for each token id.
pub const ENDS: [&str; 2] = [EMBED_TOKENS, LM_HEAD];
/// The path of the list of layers.
const LAYERS: &str = "model.layers";
const WEIGHT: &str = ".weight";
const BIAS: &str = ".bias";

/// The norms of a model, by their places.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// Before the attention.
    Input,
    /// After the attention, before its result is added to the hidden states.
    PostAttention,
    /// Before the feed-forward block.
    PreFeedforward,
    /// After the feed-forward block, before its result is added to the hidden states.
    PostFeedforward,
    /// The norm of the queries, see [`QkNorm`].
    Query,
    /// The norm of the keys.
    Key,
    /// The norm after the last layer.
    Final,
}

/// The kind of a module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Projection(Projection),
    Norm(NormKind),
    /// A module that contains others, or has no tensor.
    Other,
}

/// The modules of a layer before its own norms, by their paths in it, in the order in which torch registers them.
const LAYER: [(&str, Kind); 15] = [
    ("self_attn", Kind::Other),
    ("self_attn.q_proj", Kind::Projection(Projection::Q)),
    ("self_attn.k_proj", Kind::Projection(Projection::K)),
    ("self_attn.v_proj", Kind::Projection(Projection::V)),
    ("self_attn.o_proj", Kind::Projection(Projection::O)),
    ("self_attn.qkv_proj", Kind::Projection(Projection::Qkv)),
    ("self_attn.q_norm", Kind::Norm(NormKind::Query)),
    ("self_attn.k_norm", Kind::Norm(NormKind::Key)),
    ("mlp", Kind::Other),
    ("mlp.gate_proj", Kind::Projection(Projection::Gate)),
    ("mlp.up_proj", Kind::Projection(Projection::Up)),
    ("mlp.gate_up_proj", Kind::Projection(Projection::GateUp)),
    ("mlp.down_proj", Kind::Projection(Projection::Down)),
    ("mlp.act_fn", Kind::Other),
    ("mlp.activation_fn", Kind::Other),
];
const INPUT_LAYERNORM: &str = "input_layernorm";
const POST_ATTENTION_LAYERNORM: &str = "post_attention_layernorm";
const PRE_FEEDFORWARD_LAYERNORM: &str = "pre_feedforward_layernorm";
const POST_FEEDFORWARD_LAYERNORM: &str = "post_feedforward_layernorm";

/// The norms of a layer apart from those of queries and keys, by their paths in it, in the order in which torch registers them.
fn norms(places: NormPlaces) -> &'static [(&'static str, NormKind)] {
    match places {
        NormPlaces::Before => &[
            (INPUT_LAYERNORM, NormKind::Input),
            (POST_ATTENTION_LAYERNORM, NormKind::PreFeedforward),
        ],
        NormPlaces::After => &[
            (POST_ATTENTION_LAYERNORM, NormKind::PostAttention),
            (POST_FEEDFORWARD_LAYERNORM, NormKind::PostFeedforward),
        ],
        NormPlaces::Both => &[
            (INPUT_LAYERNORM, NormKind::Input),
            (POST_ATTENTION_LAYERNORM, NormKind::PostAttention),
            (PRE_FEEDFORWARD_LAYERNORM, NormKind::PreFeedforward),
            (POST_FEEDFORWARD_LAYERNORM, NormKind::PostFeedforward),
        ],
    }
}

/// The modules of the layers of a model, by their paths in one, in the order in which torch registers them.
fn layer_modules(arch: &Arch) -> impl Iterator<Item = (&'static str, Kind)> {
    let own = LAYER.iter().copied().filter(|(path, kind)| match kind {
        Kind::Projection(projection) => arch.projections().contains(projection),
        Kind::Norm(_) => arch.qk_norm != QkNorm::None,
        Kind::Other => match *path {
            "mlp.act_fn" => !arch.fused_projections,
            "mlp.activation_fn" => arch.fused_projections,
            _ => true,
        },
    });
    let norms = norms(arch.norm_places).iter();
    let norms = norms.map(|(path, norm)| (*path, Kind::Norm(*norm)));
    own.chain(norms)
}

/// The modules after the layers.
const BEHIND: [(&str, Kind); 2] = [
    ("model.norm", Kind::Norm(NormKind::Final)),
    ("model.rotary_emb", Kind::Other),
];

/// The role of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The embeddings.
    Embeddings,
    /// The weight of a head that is not tied.
    Head,
    /// A norm's weight.
    Norm(NormKind),
    /// A projection's weight, which can be quantised and have a LoRA pair.
    Projection(Projection),
    /// A projection's bias.
    Bias(Projection),
}

impl Role {
    /// Whether weight decay applies to it; not to norms and biases (transformers' `get_decay_parameter_names`).
    pub fn decays(self) -> bool {
        !matches!(self, Self::Norm(_) | Self::Bias(_))
    }
}

/// A tensor of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name in the files.
    pub name: String,
    /// Its shape; (out, in) for a matrix, as in torch.
    pub shape: Vec<usize>,
    /// Its role.
    pub role: Role,
}

/// A module as an adapter sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Module {
    /// A product with a weight (out, in).
    Linear(usize, usize),
    /// A look-up of rows of a weight (vocabulary, hidden).
    Embedding(usize, usize),
    /// A module that can't have a pair: a norm, or a module that contains others.
    Other,
}

/// The path of a layer (`model.layers.0`).
pub fn layer_path(layer: usize) -> String {
    format!("{LAYERS}.{layer}")
}

/// The path of a projection, relative to its layer.
fn projection_in_layer(projection: Projection) -> &'static str {
    let found = LAYER
        .iter()
        .find(|(_, kind)| *kind == Kind::Projection(projection));
    found.map_or("", |(path, _)| *path)
}

/// The path of a layer's projection (`model.layers.0.self_attn.q_proj`).
pub fn projection_path(layer: usize, projection: Projection) -> String {
    format!("{LAYERS}.{layer}.{}", projection_in_layer(projection))
}

/// The path of a norm; `layer` does not matter for the final one.
pub fn norm_path(arch: &Arch, layer: usize, norm: NormKind) -> String {
    let kind = Kind::Norm(norm);
    if let Some((path, _)) = BEHIND.iter().find(|(_, own)| *own == kind) {
        return (*path).to_owned();
    }
    let path = layer_modules(arch).find(|(_, own)| *own == kind);
    format!("{LAYERS}.{layer}.{}", path.map_or("", |(path, _)| path))
}

/// The norms of each layer of a model, those of queries and keys included.
pub fn layer_norms(arch: &Arch) -> Vec<NormKind> {
    let kinds = layer_modules(arch).filter_map(|(_, kind)| match kind {
        Kind::Norm(norm) => Some(norm),
        Kind::Projection(_) | Kind::Other => None,
    });
    kinds.collect()
}

/// The name of the weight of the module at `path`.
pub fn weight_name(path: &str) -> String {
    format!("{path}{WEIGHT}")
}

/// The name of the bias of the module at `path`.
pub fn bias_name(path: &str) -> String {
    format!("{path}{BIAS}")
}

/// The path of the module to which the tensor called `name` belongs.
pub fn module_path(name: &str) -> &str {
    name.strip_suffix(WEIGHT)
        .or_else(|| name.strip_suffix(BIAS))
        .unwrap_or(name)
}

/// The last part of a projection's path (`q_proj`).
pub fn projection_name(projection: Projection) -> &'static str {
    let path = projection_in_layer(projection);
    path.rsplit_once('.').map_or(path, |(_, name)| name)
}

/// The last parts of the paths of a model's projections.
pub fn projection_names(arch: &Arch) -> impl Iterator<Item = &'static str> {
    arch.projections().iter().copied().map(projection_name)
}

/// Whether `path` is the path of a projection, in a model with any number of layers.
pub fn is_projection(path: &str) -> bool {
    let rest = path.strip_prefix(LAYERS);
    let rest = rest.and_then(|rest| rest.strip_prefix('.'));
    let name = path.rsplit_once('.').map_or("", |(_, name)| name);
    let all = Projection::SEPARATE.iter().chain(&Projection::FUSED);
    rest.is_some() && { all }.any(|projection| projection_name(*projection) == name)
}

/// Whether `path` can be the path of a module or of a tensor in some model.
pub fn is_plausible(path: &str) -> bool {
    ["model.", "lm_head.", "score."]
        .iter()
        .any(|start| path.starts_with(start))
}

/// The number of elements of a norm's weight.
pub fn norm_shape(arch: &Arch, norm: NormKind) -> usize {
    match norm {
        NormKind::Query | NormKind::Key if arch.qk_norm == QkNorm::PerHead => arch.head_dim,
        NormKind::Query => arch.num_attention_heads * arch.head_dim,
        NormKind::Key => arch.num_key_value_heads * arch.head_dim,
        NormKind::Input
        | NormKind::PostAttention
        | NormKind::PreFeedforward
        | NormKind::PostFeedforward
        | NormKind::Final => arch.hidden_size,
    }
}

/// The tensors of the module at `path`.
fn tensors_of(arch: &Arch, path: &str, kind: Kind) -> Vec<TensorSpec> {
    let tensor = |name, shape, role| TensorSpec { name, shape, role };
    match kind {
        Kind::Other => Vec::new(),
        Kind::Norm(norm) => {
            let shape = vec![norm_shape(arch, norm)];
            vec![tensor(weight_name(path), shape, Role::Norm(norm))]
        }
        Kind::Projection(projection) => {
            let (out, input) = arch.shape(projection);
            let role = Role::Projection(projection);
            let mut tensors = vec![tensor(weight_name(path), vec![out, input], role)];
            if arch.has_bias(projection) {
                tensors.push(tensor(bias_name(path), vec![out], Role::Bias(projection)));
            }
            tensors
        }
    }
}

/// The tensors of one layer, in torch's order.
pub fn layer_tensors(arch: &Arch, layer: usize) -> Vec<TensorSpec> {
    let path = layer_path(layer);
    let tensors = layer_modules(arch)
        .flat_map(|(name, kind)| tensors_of(arch, &format!("{path}.{name}"), kind));
    tensors.collect()
}

/// All tensors of a model, in torch's order.
pub fn tensors(arch: &Arch) -> impl Iterator<Item = TensorSpec> {
    let end = |name: &str, rows, role| TensorSpec {
        name: name.to_owned(),
        shape: vec![rows, arch.hidden_size],
        role,
    };
    let layers = (0..arch.num_hidden_layers()).flat_map(|layer| layer_tensors(arch, layer));
    let behind = BEHIND
        .iter()
        .flat_map(|(path, kind)| tensors_of(arch, path, *kind));
    let head =
        (!arch.tie_word_embeddings).then(|| end(arch.head_name(), arch.head_rows(), Role::Head));
    std::iter::once(end(EMBEDDINGS, arch.vocab_size, Role::Embeddings))
        .chain(layers)
        .chain(behind)
        .chain(head)
}

/// All modules of a model, by their paths, in torch's order.
pub fn modules(arch: &Arch) -> Vec<(String, Module)> {
    let (vocabulary, hidden) = (arch.vocab_size, arch.hidden_size);
    let other = |path: &str| (path.to_owned(), Module::Other);
    let mut modules = vec![
        other("model"),
        (EMBED_TOKENS.into(), Module::Embedding(vocabulary, hidden)),
        other(LAYERS),
    ];
    for layer in 0..arch.num_hidden_layers() {
        let path = layer_path(layer);
        modules.push(other(&path));
        for (name, kind) in layer_modules(arch) {
            let module = match kind {
                Kind::Projection(projection) => {
                    let (out, input) = arch.shape(projection);
                    Module::Linear(out, input)
                }
                Kind::Norm(_) | Kind::Other => Module::Other,
            };
            modules.push((format!("{path}.{name}"), module));
        }
    }
    modules.extend(BEHIND.iter().map(|(path, _)| other(path)));
    modules.push(if arch.scores {
        other("score")
    } else {
        (LM_HEAD.into(), Module::Linear(vocabulary, hidden))
    });
    modules
}

/// The role of the tensor called `name`, or of the 4-bit tensor of which it is a part; `None` if the model does not use it. The files of a
/// tied model may have a head too.
pub fn role(arch: &Arch, name: &str) -> Option<Role> {
    let name = owner_of(name).unwrap_or(name);
    match name {
        EMBEDDINGS => return Some(Role::Embeddings),
        HEAD | SCORE => return (name == arch.head_name()).then_some(Role::Head),
        _ => {}
    }
    let named = |tensors: Vec<TensorSpec>| {
        let tensor = tensors.into_iter().find(|tensor| tensor.name == name)?;
        Some(tensor.role)
    };
    let Some(rest) = name
        .strip_prefix(LAYERS)
        .and_then(|rest| rest.strip_prefix('.'))
    else {
        let mut behind = BEHIND.iter();
        return behind.find_map(|(path, kind)| named(tensors_of(arch, path, *kind)));
    };
    let (number, _) = rest.split_once('.')?;
    let layer = number.parse::<usize>().ok()?;
    (layer < arch.num_hidden_layers())
        .then(|| named(layer_tensors(arch, layer)))
        .flatten()
}

/// Whether a model uses the tensor called `name`, or the 4-bit tensor of which it is a part.
pub fn is_used(arch: &Arch, name: &str) -> bool {
    role(arch, name).is_some()
}
