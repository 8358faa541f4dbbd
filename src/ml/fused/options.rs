//! The options of an architecture that the fast path does not compute.

use crate::ml::model::arch::{
    Activation, Arch, LayerArch, NormPlaces, QkNorm, Rope, RopeScaling, default_score_scale,
};

/// The first option of an architecture that the fast path does not compute, if there is one.
pub(super) fn unsupported_option(arch: &Arch) -> Option<&'static str> {
    let is_one = |factor: f64| factor.to_bits() == 1f64.to_bits();
    let plain_rope = |layer: &LayerArch| layer.rope == Some(0);
    let depends_on_length = |rope: &Rope| {
        matches!(
            rope.scaling,
            Some(RopeScaling::Dynamic { .. } | RopeScaling::LongRope(_))
        )
    };
    let options = [
        (arch.fused_projections, "projections are fused"),
        (
            !arch.layers.iter().all(plain_rope),
            "not all layers have the same rotary embedding",
        ),
        (
            arch.ropes.iter().any(depends_on_length),
            "the rotary embedding depends on the longest sequence",
        ),
        (
            arch.rotary_dim != arch.head_dim,
            "only a part of each head is rotated",
        ),
        (
            arch.qk_norm == QkNorm::Whole,
            "queries and keys have norms over all heads",
        ),
        (
            arch.norm_places != NormPlaces::Before,
            "there are norms after the blocks",
        ),
        (
            arch.activation != Activation::Silu,
            "the activation is not SiLU",
        ),
        (!is_one(arch.embedding_scale), "embeddings are scaled"),
        (
            !is_one(arch.residual_scale),
            "the blocks' results are scaled",
        ),
        (
            arch.score_scale.to_bits() != default_score_scale(arch.head_dim).to_bits(),
            "attention scores have a scale of their own",
        ),
        (
            arch.score_softcap.is_some(),
            "attention scores have a soft-cap",
        ),
        (!is_one(arch.logit_scale), "logits are scaled"),
        (arch.logit_softcap.is_some(), "logits have a soft-cap"),
    ];
    let mut options = options.into_iter();
    options.find_map(|(has, option)| has.then_some(option))
}
