//! torch's random numbers on the CPU: the Mersenne twister MT19937 (Matsumoto and Nishimura 1998, "Mersenne Twister: A 623-dimensionally
//! equidistributed uniform pseudo-random number generator"; ATen/core/MT19937RNGEngine.h).

use anyhow::ensure;
use serde::{Deserialize, Serialize};

/// The stream of `torch.Generator().manual_seed(seed)`. Its state can be serialised, and a stream can be continued from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Saved")]
pub struct TorchRng {
    state: Vec<u32>,
    next: usize,
}

/// A state that was deserialised and is not yet validated.
#[derive(Deserialize)]
struct Saved {
    state: Vec<u32>,
    next: usize,
}

impl TryFrom<Saved> for TorchRng {
    type Error = anyhow::Error;

    fn try_from(saved: Saved) -> anyhow::Result<Self> {
        let Saved { state, next } = saved;
        ensure!(
            state.len() == SIZE && next <= SIZE,
            "a random generator's state has {} numbers, of which {next} are used, expected {SIZE}",
            state.len()
        );
        Ok(Self { state, next })
    }
}

const SIZE: usize = 624;

impl TorchRng {
    /// Starts the stream. As in torch, only the low 32 bits of the seed matter.
    pub fn new(seed: u64) -> Self {
        let mut state = Vec::with_capacity(SIZE);
        let mut last = seed as u32;
        state.push(last);
        for index in 1..SIZE as u32 {
            last = 1_812_433_253u32
                .wrapping_mul(last ^ (last >> 30))
                .wrapping_add(index);
            state.push(last);
        }
        Self { state, next: SIZE }
    }

    /// The next 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.next == SIZE {
            for index in 0..SIZE {
                let high = self.state[index] & 0x8000_0000;
                let y = high | (self.state[(index + 1) % SIZE] & 0x7fff_ffff);
                let twist = if y % 2 == 1 { 0x9908_b0df } else { 0 };
                self.state[index] = self.state[(index + 397) % SIZE] ^ (y >> 1) ^ twist;
            }
            self.next = 0;
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// `count` numbers of `tensor.uniform_(low, high)` in f32, from `low` (inclusive) to `high` (exclusive). The last operation is a
    /// fused multiply-add, as in torch's builds for processors that have one; with two roundings, half of the numbers would differ unless
    /// `high - low` is a power of two.
    pub fn uniform(&mut self, count: usize, low: f32, high: f32) -> Vec<f32> {
        const UNIT: f32 = 1. / (1 << 24) as f32;
        let width = high - low;
        let draw = |_| ((self.next_u32() & 0x00ff_ffff) as f32 * UNIT).mul_add(width, low);
        (0..count).map(draw).collect()
    }

    /// `count` numbers of `tensor.normal_()` in f32, standard normal: the transform of Box and Muller (1958) for groups of eight pairs
    /// (ATen/native/cpu/DistributionTemplates.h, `normal_fill`). If the last group would be incomplete, the last 16 numbers are drawn
    /// again. The numbers equal torch's up to the rounding of its vectorised logarithm and cosine.
    ///
    /// # Errors
    /// `count` is below 16, for which torch uses another method.
    pub fn normal(&mut self, count: usize) -> anyhow::Result<Vec<f32>> {
        ensure!(
            count >= GROUP,
            "torch draws {count} normal numbers, fewer than {GROUP}, in a way that is not known here"
        );
        let mut values = self.uniform(count, 0., 1.);
        for group in values.as_chunks_mut::<GROUP>().0 {
            *group = pairs(*group);
        }
        if !count.is_multiple_of(GROUP) {
            let last: [f32; GROUP] = std::array::from_fn(|_| self.unit());
            values[count - GROUP..].copy_from_slice(&pairs(last));
        }
        Ok(values)
    }

    /// The next number of `tensor.uniform_()`.
    fn unit(&mut self) -> f32 {
        self.uniform(1, 0., 1.).first().copied().unwrap_or_default()
    }

    /// Discards the next `count` numbers of 32 bits.
    pub fn skip(&mut self, count: usize) {
        for _ in 0..count {
            self.next_u32();
        }
    }

    /// `torch.randperm(count)`: a random order of `0..count`, for `count` below 2^32 / 20, from which on torch uses another method.
    pub fn permutation(&mut self, count: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..count).collect();
        for index in 0..count.saturating_sub(1) {
            let other = self.next_u32() as usize % (count - index);
            order.swap(index, index + other);
        }
        order
    }
}

/// The size of the groups in which torch computes normal numbers.
const GROUP: usize = 16;

/// Turns uniform numbers into normal ones. A pair is one number of the first half and one of the second.
fn pairs(uniform: [f32; GROUP]) -> [f32; GROUP] {
    let mut normal = [0.; GROUP];
    for index in 0..GROUP / 2 {
        let radius = (-2. * (1. - uniform[index]).ln()).sqrt();
        let angle = std::f32::consts::TAU * uniform[index + GROUP / 2];
        normal[index] = radius * angle.cos();
        normal[index + GROUP / 2] = radius * angle.sin();
    }
    normal
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_is_the_published_one() {
        // The first number of the reference implementation for its seed 5489, and its ten-thousandth.
        let mut rng = TorchRng::new(5489);
        assert_eq!(rng.next_u32(), 3_499_211_612);
        rng.skip(9_998);
        assert_eq!(rng.next_u32(), 4_123_659_995);
    }

    #[test]
    fn a_saved_stream_goes_on() {
        let mut rng = TorchRng::new(3407);
        rng.skip(1000);
        let saved = serde_json::to_string(&rng).unwrap();
        let mut again: TorchRng = serde_json::from_str(&saved).unwrap();
        assert_eq!(again.uniform(700, -1., 1.), rng.uniform(700, -1., 1.));
        assert!(serde_json::from_str::<TorchRng>(r#"{"state": [1, 2], "next": 0}"#).is_err());
        let late = saved.replace(r#""next":376"#, r#""next":625"#);
        assert!(late != saved && serde_json::from_str::<TorchRng>(&late).is_err());
    }
}
