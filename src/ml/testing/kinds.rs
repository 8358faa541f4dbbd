//! The backends on which goldens are computed.

use crate::ml::execution::Kind;
use crate::ml::fused::Packing;

const PADDED: Packing = Packing {
    padding_free: false,
    share_prompts: false,
};
const FREE: Packing = Packing {
    padding_free: true,
    share_prompts: false,
};
const SHARED: Packing = Packing {
    padding_free: true,
    share_prompts: true,
};

/// Whether goldens are computed on a GPU.
fn on_gpu() -> bool {
    #[cfg(feature = "gpu")]
    {
        crate::ml::place::Place::of_tests().is_some()
    }
    #[cfg(not(feature = "gpu"))]
    {
        false
    }
}

/// Every way a model can be run; with the feature `gpu` and a GPU that alone, because the others are tested without.
pub(in crate::ml) fn kinds() -> Vec<Kind> {
    if on_gpu() {
        return vec![fastest()];
    }
    vec![
        Kind::Reference,
        Kind::Fused(PADDED),
        Kind::Fused(FREE),
        Kind::Fused(SHARED),
    ]
}

/// The fastest of them.
pub(in crate::ml) fn fastest() -> Kind {
    if on_gpu() {
        Kind::Gpu(SHARED)
    } else {
        Kind::default()
    }
}
