//! The table of a model's modules and tensors: names, shapes and roles.
//!
//! Loading, layer-wise reading, creating, quantising, attaching, merging, comparing and `show` all use it, and no module's name appears
//! anywhere else. Names and their order are those of torch's modules in transformers' `modeling_llama.py` and the files derived from it.
//!
//! A module that a new family adds to the layer is a line of [`LAYER`], with its shapes in [`tensors_of`].

use super::arch::{Arch, Projection, QkNorm};
use crate::ml::quant::nf4::owner_of;

/// The embeddings' module.
pub const EMBED_TOKENS: &str = "model.embed_tokens";
/// The embeddings (vocabulary, hidden), which are also the weight of a tied head.
pub const EMBEDDINGS: &str = "model.embed_tokens.weight";
/// The head's module.
pub const LM_HEAD: &str = "lm_head";
/// The head's weight (vocabulary, hidden).
pub const HEAD: &str = "lm_head.weight";
/// The modules at both ends, whose weights have a row for each token id.
pub const ENDS: [&str; 2] = [EMBED_TOKENS, LM_HEAD];
/// The path of the list of layers.
const LAYERS: &str = "model.layers";
const WEIGHT: &str = ".weight";
const BIAS: &str = ".bias";

/// The norms of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// The norm before the attention.
    Input,
    /// The norm before the feed-forward block.
    PostAttention,
    /// The norm of each query head, see [`QkNorm::PerHead`].
    Query,
    /// The norm of each key head.
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

/// The modules of a layer, by their paths in it, in the order in which torch registers them.
const LAYER: [(&str, Kind); 14] = [
    ("self_attn", Kind::Other),
    ("self_attn.q_proj", Kind::Projection(Projection::Q)),
    ("self_attn.k_proj", Kind::Projection(Projection::K)),
    ("self_attn.v_proj", Kind::Projection(Projection::V)),
    ("self_attn.o_proj", Kind::Projection(Projection::O)),
    ("self_attn.q_norm", Kind::Norm(NormKind::Query)),
    ("self_attn.k_norm", Kind::Norm(NormKind::Key)),
    ("mlp", Kind::Other),
    ("mlp.gate_proj", Kind::Projection(Projection::Gate)),
    ("mlp.up_proj", Kind::Projection(Projection::Up)),
    ("mlp.down_proj", Kind::Projection(Projection::Down)),
    ("mlp.act_fn", Kind::Other),
    ("input_layernorm", Kind::Norm(NormKind::Input)),
    (
        "post_attention_layernorm",
        Kind::Norm(NormKind::PostAttention),
    ),
];
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

/// The path of a module, relative to its layer if it is in one.
fn path_of(kind: Kind) -> &'static str {
    let mut all = LAYER.iter().chain(&BEHIND);
    all.find(|(_, own)| *own == kind)
        .map_or("", |(path, _)| *path)
}

/// The path of a layer's projection (`model.layers.0.self_attn.q_proj`).
pub fn projection_path(layer: usize, projection: Projection) -> String {
    format!("{LAYERS}.{layer}.{}", path_of(Kind::Projection(projection)))
}

/// The path of a norm; `layer` does not matter for the final one.
pub fn norm_path(layer: usize, norm: NormKind) -> String {
    let path = path_of(Kind::Norm(norm));
    match norm {
        NormKind::Final => path.to_owned(),
        _ => format!("{LAYERS}.{layer}.{path}"),
    }
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
    let path = path_of(Kind::Projection(projection));
    path.rsplit_once('.').map_or(path, |(_, name)| name)
}

/// The last parts of the paths of all projections.
pub fn projection_names() -> [&'static str; 7] {
    Projection::ALL.map(projection_name)
}

/// Whether `path` is the path of a projection, in a model with any number of layers.
pub fn is_projection(path: &str) -> bool {
    let rest = path.strip_prefix(LAYERS);
    let rest = rest.and_then(|rest| rest.strip_prefix('.'));
    let name = path.rsplit_once('.').map_or("", |(_, name)| name);
    rest.is_some() && projection_names().contains(&name)
}

/// Whether `path` can be the path of a module or of a tensor in some model.
pub fn is_plausible(path: &str) -> bool {
    path.starts_with("model.") || path.starts_with("lm_head.")
}

/// Whether the layers of a model have a module of this kind.
fn has(arch: &Arch, kind: Kind) -> bool {
    match kind {
        Kind::Norm(NormKind::Query | NormKind::Key) => arch.qk_norm == QkNorm::PerHead,
        _ => true,
    }
}

/// The number of elements of a norm's weight.
pub fn norm_shape(arch: &Arch, norm: NormKind) -> usize {
    match norm {
        NormKind::Query | NormKind::Key => arch.head_dim,
        NormKind::Input | NormKind::PostAttention | NormKind::Final => arch.hidden_size,
    }
}

/// The tensors of the module at `path`.
fn tensors_of(arch: &Arch, path: &str, kind: Kind) -> Vec<TensorSpec> {
    let tensor = |name, shape, role| TensorSpec { name, shape, role };
    match kind {
        _ if !has(arch, kind) => Vec::new(),
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
    let modules = LAYER.iter();
    let tensors =
        modules.flat_map(|(name, kind)| tensors_of(arch, &format!("{path}.{name}"), *kind));
    tensors.collect()
}

/// All tensors of a model, in torch's order.
pub fn tensors(arch: &Arch) -> impl Iterator<Item = TensorSpec> {
    let end = |name: &str, role| TensorSpec {
        name: name.to_owned(),
        shape: vec![arch.vocab_size, arch.hidden_size],
        role,
    };
    let layers = (0..arch.num_hidden_layers()).flat_map(|layer| layer_tensors(arch, layer));
    let behind = BEHIND
        .iter()
        .flat_map(|(path, kind)| tensors_of(arch, path, *kind));
    let head = (!arch.tie_word_embeddings).then(|| end(HEAD, Role::Head));
    std::iter::once(end(EMBEDDINGS, Role::Embeddings))
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
        for (name, kind) in LAYER.iter().filter(|(_, kind)| has(arch, *kind)) {
            let module = match kind {
                Kind::Projection(projection) => {
                    let (out, input) = arch.shape(*projection);
                    Module::Linear(out, input)
                }
                Kind::Norm(_) | Kind::Other => Module::Other,
            };
            modules.push((format!("{path}.{name}"), module));
        }
    }
    modules.extend(BEHIND.iter().map(|(path, _)| other(path)));
    modules.push((LM_HEAD.into(), Module::Linear(vocabulary, hidden)));
    modules
}

/// The role of the tensor called `name`, or of the 4-bit tensor of which it is a part; `None` if the model does not use it. The files of a
/// tied model may have a head too.
pub fn role(arch: &Arch, name: &str) -> Option<Role> {
    let name = owner_of(name).unwrap_or(name);
    match name {
        EMBEDDINGS => return Some(Role::Embeddings),
        HEAD => return Some(Role::Head),
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
