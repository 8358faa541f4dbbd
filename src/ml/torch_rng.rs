//! torch's random numbers on the CPU: the Mersenne twister MT19937 (Matsumoto and Nishimura 1998).

/// The stream of `torch.Generator().manual_seed(seed)`.
#[derive(Debug, Clone)]
pub struct TorchRng {
    state: Vec<u32>,
    next: usize,
}

const SIZE: usize = 624;

impl TorchRng {
    /// Starts the stream; as in torch only the low 32 bits of the seed count.
    pub fn new(seed: u64) -> Self {
        let mut state = Vec::with_capacity(SIZE);
        let mut last = seed as u32;
        state.push(last);
        for place in 1..SIZE as u32 {
            last = 1_812_433_253u32
                .wrapping_mul(last ^ (last >> 30))
                .wrapping_add(place);
            state.push(last);
        }
        Self { state, next: SIZE }
    }

    /// The next 32 bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.next == SIZE {
            for place in 0..SIZE {
                let high = self.state[place] & 0x8000_0000;
                let y = high | (self.state[(place + 1) % SIZE] & 0x7fff_ffff);
                let twist = if y % 2 == 1 { 0x9908_b0df } else { 0 };
                self.state[place] = self.state[(place + 397) % SIZE] ^ (y >> 1) ^ twist;
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_is_the_published_one() {
        // The first number of the reference implementation for its seed 5489, and its ten-thousandth.
        let mut rng = TorchRng::new(5489);
        assert_eq!(rng.next_u32(), 3_499_211_612);
        for _ in 0..9_998 {
            rng.next_u32();
        }
        assert_eq!(rng.next_u32(), 4_123_659_995);
    }
}
