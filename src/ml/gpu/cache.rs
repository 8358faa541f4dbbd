//! The keys and values that a GPU keeps for text generation.

use std::ops::Range;

use pipeline_kernels_gpu as gpu;

use super::{Floats, Gpu, words};
use crate::ml::fused::cached::{CachedAttention, Caching};

impl Caching for Gpu {
    type Seen = gpu::Seen;

    fn seen(&self, places: &[Range<usize>]) -> gpu::Seen {
        self.device.seen(places)
    }

    fn store(&self, x: &Floats, features: usize, places: &[usize], cache: &mut Floats) {
        let (x, places) = (self.of(x), words(places.iter()));
        let cache = self.of_mut(cache);
        self.device.store(x, features, &places, cache);
    }

    fn cached_attention(&self, inputs: CachedAttention<'_, Self>, out: &mut Floats) {
        let inputs = gpu::CachedAttention {
            q: self.of(inputs.q),
            k: self.of(inputs.k),
            v: self.of(inputs.v),
            heads: inputs.heads,
            scores: inputs.scores,
            seen: inputs.seen,
        };
        self.device.cached_attention(inputs, self.of_mut(out));
    }

    fn token_rows(&self, x: &Floats, features: usize, tokens: usize) -> Floats {
        Floats(Some(self.device.token_rows(self.of(x), features, tokens)))
    }
}
