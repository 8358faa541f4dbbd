//! Noise on the embeddings in training (NEFTune; Jain et al. 2023, arXiv 2310.05914, algorithm 1; `transformers/integrations/neftune.py`).
//!
//! transformers draws it from torch's global stream, whose place depends on all that was drawn before: data loaders, dropout. Here a value's
//! noise follows from the step's seed, the micro-batch's index in the step, and the value's index in the micro-batch, so that a training that was
//! interrupted goes on with the same noise, and neither threads nor the order of computation matter. The distribution is the same.

use pipeline_kernels::random::splitmix64;

use super::linear::{BATCH_STRIDE, EmbeddingNoise};

/// Keeps the stream apart from that of dropout.
const STREAM: u64 = 0x6e65_6674_756e_6500;

/// Adds the noise of a pass to embeddings (tokens, width), row-major. Each token has its index in the padded batch plus [`BATCH_STRIDE`] for each
/// micro-batch of the step between the pass's first one and its own. `lengths` has the padded length of each micro-batch of the pass, of which
/// each is `stride` micro-batches of the step behind the one before it.
///
/// # Panics
/// A token's micro-batch has no length.
pub(in crate::ml) fn add(
    noise: EmbeddingNoise,
    rows: &mut [f32],
    width: usize,
    tokens: impl Iterator<Item = u64>,
    lengths: &[usize],
    stride: usize,
) {
    for (row, token) in rows.chunks_mut(width.max(1)).zip(tokens) {
        let length = lengths[(token / BATCH_STRIDE) as usize / stride];
        let size = (noise.alpha / ((length * width) as f64).sqrt()) as f32;
        let place = token + noise.seed.batch as u64 * BATCH_STRIDE;
        let mut state = noise.seed.seed ^ STREAM;
        let mut state = splitmix64(&mut state) ^ place;
        for value in row {
            let unit = (splitmix64(&mut state) >> 40) as f32 / (1u64 << 23) as f32 - 1.;
            *value += size * unit;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ml::model::linear::DropoutSeed;

    fn noise(batch: usize) -> EmbeddingNoise {
        EmbeddingNoise {
            alpha: 5.,
            seed: DropoutSeed { seed: 7, batch },
        }
    }

    #[test]
    fn the_noise_is_uniform_and_of_the_paper_s_size() {
        let (width, tokens) = (64, 200u64);
        let mut rows = vec![0f32; width * tokens as usize];
        add(noise(0), &mut rows, width, 0..tokens, &[50], 1);
        let size = 5. / (50f64 * 64.).sqrt();
        let values = rows.iter().map(|x| f64::from(*x) / size);
        let count = rows.len() as f64;
        let mean = values.clone().sum::<f64>() / count;
        let square = values.clone().map(|x| x * x).sum::<f64>() / count;
        assert!(values.clone().all(|x| x.abs() <= 1.));
        assert!(values.clone().any(|x| x > 0.99) && values.clone().any(|x| x < -0.99));
        assert!(
            mean.abs() < 0.02 && (square - 1. / 3.).abs() < 0.01,
            "{mean} {square}"
        );
    }

    #[test]
    fn a_value_s_noise_depends_on_its_place_alone() {
        let one = |noise: EmbeddingNoise, token: u64| {
            let mut row = vec![1f32; 8];
            add(noise, &mut row, 8, std::iter::once(token), &[10, 10], 1);
            row
        };
        // The second micro-batch of a pass, and the same one alone.
        assert_eq!(one(noise(0), BATCH_STRIDE + 3), one(noise(1), 3));
        assert_ne!(one(noise(0), 3), one(noise(1), 3));
        assert_ne!(one(noise(0), 3), one(noise(0), 4));
    }
}
